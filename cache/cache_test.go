package cache_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cache/arena"
)

// disk is a home in memory that can be told to fail.
type disk struct {
	mu   sync.Mutex
	data []byte
	fail bool
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail {
		return 0, errors.New("disk failed")
	}
	return copy(p, d.data[off:]), nil
}

func (d *disk) write(v cache.Version) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range 8 {
		if v.Dirty&(1<<i) != 0 {
			at := int64(v.Number)*cache.BlockBytes + int64(i)*cache.SectorBytes
			copy(d.data[at:at+cache.SectorBytes], v.Data[i*cache.SectorBytes:])
		}
	}
}

func (d *disk) zero(off, n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+n])
}

// garble is what a disk may do to a block whose sync failed.
func (d *disk) garble(block int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range int64(cache.BlockBytes) {
		d.data[block*cache.BlockBytes+i] ^= 0x5a
	}
}

// volume is a cache with a flusher that a test drives or that runs beside it.
type volume struct {
	*cache.Cache
	t     testing.TB
	arena *arena.Arena
	disk  *disk
	path  string
	id    arena.Identity
	fate  *rand.Rand // of the flusher's goroutine
	cfg   cache.Config
	wake  chan struct{}
	stop  chan struct{}
	done  chan struct{}

	journal memoryJournal // where Journaled
}

func newVolume(t testing.TB, sizeBytes, memoryBytes int64, change func(*cache.Config)) *volume {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "cache-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	v := &volume{t: t, disk: &disk{data: make([]byte, sizeBytes)}, path: filepath.Join(dir, "v.mem"), fate: rand.New(rand.NewPCG(5, 5)), wake: make(chan struct{}, 1)}
	v.id = arena.Identity{Volume: [16]byte{1}, SizeBytes: sizeBytes, MemoryBytes: memoryBytes}
	v.cfg = cache.Config{SizeBytes: sizeBytes, Home: v.disk}
	v.cfg.Wake = func() {
		select {
		case v.wake <- struct{}{}:
		default:
		}
	}
	if change != nil {
		change(&v.cfg)
	}
	v.open()
	t.Cleanup(v.close)
	return v
}

func (v *volume) open() {
	v.t.Helper()
	a, _, err := arena.Open(v.path, v.id)
	if err != nil {
		v.t.Fatal(err)
	}
	v.arena = a
	v.cfg.Committed = v.journal.committed
	if v.Cache, err = cache.New(a, v.cfg); err != nil {
		v.t.Fatal(err)
	}
}

func (v *volume) close() {
	if v.Cache == nil {
		return
	}
	v.stopFlusher()
	v.Cache.Close()
	v.arena.Close()
	v.Cache = nil
}

// restart ends the cache as a kill would and starts it again on the same memory.
func (v *volume) restart() {
	v.t.Helper()
	v.close()
	v.open()
}

// flush commits everything. Now and then it syncs in the middle of the pass, and fails: then the disk may have what it was
// given since the last sync, or garbage in its place.
func (v *volume) flush() {
	if v.cfg.Journaled {
		v.commit()
		v.sweep()
		return
	}
	seal, _, _ := v.Seal()
	v.Sweep()
	for !v.pass() {
	}
	v.Committed(seal)
}

// pass brings the seal home and reports whether it got to its end.
func (v *volume) pass() bool {
	v.Zeroes(v.disk.zero)
	var batch [16]cache.Version
	var unsynced []int64
	last := int64(-1)
	for n := v.Next(batch[:]); n > 0; n = v.Next(batch[:]) {
		for _, b := range batch[:n] {
			if int64(b.Number) <= last {
				v.t.Errorf("block %d came after block %d", b.Number, last)
			}
			last = int64(b.Number)
			v.disk.write(b)
			if b.Dirty == 0xff {
				unsynced = append(unsynced, last)
			}
		}
		switch v.fate.IntN(24) {
		case 0, 1, 2:
			v.Synced()
			unsynced = unsynced[:0]
		case 3:
			for _, b := range unsynced {
				v.disk.garble(b)
			}
			v.Again()
			return false
		}
	}
	v.Synced()
	return true
}

func (v *volume) startFlusher() {
	v.stop, v.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(v.done)
		for {
			select {
			case <-v.stop:
				return
			case <-v.wake:
				for v.PressedToCommit() || v.cfg.Journaled && v.PressedHome() {
					v.flush()
				}
			}
		}
	}()
}

func (v *volume) stopFlusher() {
	if v.stop != nil {
		close(v.stop)
		<-v.done
		v.stop = nil
	}
}

// client does one operation at a time and waits for it.
type client struct {
	v    *volume
	op   cache.Op
	done chan syscall.Errno
}

func (v *volume) client() *client {
	c := &client{v: v, done: make(chan syscall.Errno, 1)}
	c.op.Owner = c
	return c
}

func (c *client) Ended(op *cache.Op) { c.done <- op.Err }

func (c *client) read(off, n int64) ([]byte, error) {
	c.op.Off, c.op.Len = off, n
	c.v.Read(&c.op)
	if err := <-c.done; err != 0 {
		return nil, err
	}
	var out []byte
	for i := range c.op.Pieces() {
		data, n := c.v.Piece(&c.op, i)
		if data == nil {
			data = make([]byte, n)
		}
		out = append(out, data...)
	}
	c.v.Release(&c.op)
	return out, nil
}

func (c *client) write(off int64, p []byte) error {
	c.op.Off, c.op.Len, c.op.Payload = off, int64(len(p)), nil
	if c.v.Reserve(&c.op) {
		rest := p
		for i := 0; len(rest) > 0; i++ {
			rest = rest[copy(c.v.Dest(&c.op, i), rest):]
		}
	} else {
		c.op.Payload = p
	}
	c.v.Write(&c.op)
	if err := <-c.done; err != 0 {
		return err
	}
	return nil
}

func (c *client) zero(off, n int64) error {
	c.op.Off, c.op.Len = off, n
	c.v.Zero(&c.op)
	if err := <-c.done; err != 0 {
		return err
	}
	return nil
}

func (c *client) flush() error {
	c.v.Flush(&c.op)
	if err := <-c.done; err != 0 {
		return err
	}
	return nil
}

const (
	testSize   = 24 << 20
	testMemory = cache.MinMemoryBytes
)

// TestModel compares the cache with a byte array over random operations, flushes and restarts.
func TestModel(t *testing.T) {
	for seed := range uint64(seeds()) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			v := newVolume(t, testSize, testMemory, func(cfg *cache.Config) {
				cfg.Commits, cfg.Journaled = seed%2 == 1, seed%3 > 0
			})
			v.startFlusher()
			model := make([]byte, testSize)
			for i := range model {
				model[i] = byte(i / 4096)
			}
			copy(v.disk.data, model)
			c := v.client()
			for step := range 1500 {
				off, n := randomRange(r)
				switch k := r.IntN(20); {
				case k < 9:
					p := make([]byte, n)
					fill(r, p)
					if err := c.write(off, p); err != nil {
						t.Fatalf("step %d: write %d+%d: %v", step, off, n, err)
					}
					copy(model[off:], p)
				case k < 10:
					if r.IntN(2) == 0 {
						n = r.Int64N(testSize - off)
					}
					if err := c.zero(off, n); err != nil {
						t.Fatalf("step %d: zero %d+%d: %v", step, off, n, err)
					}
					clear(model[off : off+n])
				case k < 19:
					got, err := c.read(off, n)
					if err != nil {
						t.Fatalf("step %d: read %d+%d: %v", step, off, n, err)
					}
					compare(t, step, off, got, model[off:off+n])
				case r.IntN(4) == 0:
					v.restart()
					v.startFlusher()
				default:
					v.stopFlusher()
					v.flush()
					v.startFlusher()
				}
			}
			v.stopFlusher()
			v.flush()
			compare(t, -1, 0, v.disk.data, model)
			if v.Dirty() {
				t.Error("dirty after a flush of everything")
			}
		})
	}
}

func randomRange(r *rand.Rand) (off, n int64) {
	switch r.IntN(4) {
	case 0: // whole blocks
		n = int64(1+r.IntN(16)) * 4096
		off = r.Int64N((testSize-n)/4096) * 4096
	case 1: // sectors in a hot region
		n = int64(1+r.IntN(20)) * 512
		off = r.Int64N(1<<20/512) * 512
	case 2: // any bytes
		n = 1 + r.Int64N(3000)
		off = r.Int64N(testSize - n)
	default: // large
		n = 1 + r.Int64N(1<<20)
		off = r.Int64N(testSize - n)
	}
	return off, n
}

func fill(r *rand.Rand, p []byte) {
	x := r.Uint64()
	for i := range p {
		p[i] = byte(x >> (uint(i) % 57))
	}
}

func compare(t *testing.T, step int, off int64, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("step %d: byte %d (block %d+%d) is %#x, want %#x", step, off+int64(i), (off+int64(i))/4096, (off+int64(i))%4096, got[i], want[i])
		}
	}
}

// seeds is how many random histories a test runs; CACHE_SEEDS asks for more.
func seeds() int {
	n := 6
	if testing.Short() {
		n = 2
	}
	fmt.Sscan(os.Getenv("CACHE_SEEDS"), &n)
	return n
}
