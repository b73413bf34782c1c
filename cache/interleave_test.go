package cache_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/cache"
)

// take gives one batch of the seal to the disk.
func (v *volume) take(n int) {
	batch := make([]cache.Version, n)
	for _, b := range batch[:v.Next(batch)] {
		v.disk.write(b)
	}
}

func mustWrite(t *testing.T, c *client, block int64, value byte) {
	t.Helper()
	if err := c.write(block*4096, bytes.Repeat([]byte{value}, 4096)); err != nil {
		t.Fatal(err)
	}
}

// TestSyncBeforeSuperseded syncs in the middle of a pass whose extent supersedes versions that the pass has not come to.
func TestSyncBeforeSuperseded(t *testing.T) {
	v := newVolume(t, testSize, testMemory, nil)
	c := v.client()
	for b := range int64(64) {
		mustWrite(t, c, b, 1)
		mustWrite(t, c, 1000+b, 1)
	}
	if err := c.zero(1000*4096, 64*4096); err != nil {
		t.Fatal(err)
	}
	seal, _, _ := v.Seal()
	v.Sweep()
	v.Zeroes(v.disk.zero)
	v.take(64)
	v.Synced()
	for b := range int64(64) {
		mustWrite(t, c, 2000+b, 2) // in the slots of the superseded versions
	}
	v.take(64)
	for b := range int64(64) {
		mustWrite(t, c, 2000+b, 3)
	}
	v.Synced()
	v.Committed(seal)
	v.flush()
	if got := v.disk.data[1000*4096]; got != 0 {
		t.Errorf("home of a zeroed block has %d", got)
	}
	for b := range int64(64) {
		if got := v.disk.data[(2000+b)*4096]; got != 3 {
			t.Fatalf("home of block %d has %d, want 3", 2000+b, got)
		}
	}
}

// TestLostWhileSealed has a version lost, rewritten, and its slot wanted by another block while it is being committed.
func TestLostWhileSealed(t *testing.T) {
	v := newVolume(t, testSize, testMemory, nil)
	c := v.client()
	p := bytes.Repeat([]byte{0xa5}, 4096)
	mustWrite(t, c, 0, 0xa5)
	seal, _, _ := v.Seal()
	v.Sweep()
	v.take(8)
	v.flipAll(t, p)
	if _, err := c.read(0, 4096); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	mustWrite(t, c, 0, 7)
	mustWrite(t, c, 50, 7)
	v.Synced()
	v.Committed(seal)
	v.flush()
	if got := v.disk.data[50*4096]; got != 7 || v.Dirty() {
		t.Errorf("home has %d of an answered write, want 7; dirty %v", got, v.Dirty())
	}
}

// TestStaleFillAfterEviction has the version that a read is to complete brought home and evicted before the read ends.
func TestStaleFillAfterEviction(t *testing.T) {
	home := &slowHome{asked: make(chan struct{}, 4096), gate: make(chan struct{}, 4096)}
	v := newVolume(t, testSize, testMemory, func(cfg *cache.Config) { home.disk = cfg.Home.(*disk); cfg.Home = home })
	c, r := v.client(), v.client()
	if err := c.write(0, bytes.Repeat([]byte{7}, 512)); err != nil {
		t.Fatal(err)
	}
	done := make(chan []byte, 1)
	go func() {
		p, err := r.read(0, 4096)
		if err != nil {
			t.Error(err)
		}
		done <- p
	}()
	<-home.asked
	v.flush()
	for range 6 {
		for b := range int64(2500) {
			mustWrite(t, c, 100+b, byte(b))
			if b%300 == 0 {
				v.flush()
			}
		}
	}
	v.flush()
	stop := make(chan struct{})
	go func() {
		for {
			select {
			case home.gate <- struct{}{}:
			case <-home.asked:
			case <-stop:
				return
			}
		}
	}()
	defer close(stop)
	if p := <-done; p[0] != 7 {
		t.Errorf("the read that was under way got %d, want 7", p[0])
	}
	if p, err := c.read(0, 512); err != nil || p[0] != 7 {
		t.Errorf("an answered write of 7 reads %d (%v)", p[0], err)
	}
}

// TestUnalignedOverSealed writes a few bytes over a version that lacks their sector while it is being committed.
func TestUnalignedOverSealed(t *testing.T) {
	v := newVolume(t, testSize, testMemory, nil)
	c := v.client()
	if err := c.write(0, bytes.Repeat([]byte{7}, 512)); err != nil {
		t.Fatal(err)
	}
	seal, _, _ := v.Seal()
	v.Sweep()
	v.take(8)
	if err := c.write(1000, []byte{1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	if n := v.Stats().FilledBytes; n > 3*4096 {
		t.Errorf("home was read %d bytes for one block", n)
	}
	v.Synced()
	v.Committed(seal)
	v.flush()
	if got := v.disk.data[998:1004]; !bytes.Equal(got, []byte{0, 0, 1, 2, 3, 0}) || v.disk.data[0] != 7 {
		t.Errorf("home has %v", got)
	}
}

// TestMapLongRuns asks for runs that end just where Map would jump.
func TestMapLongRuns(t *testing.T) {
	for _, run := range []int64{1, 4095, 4096, 4097, 4098, 8194} {
		v := newVolume(t, 64<<20, testMemory, nil)
		if err := v.client().zero(0, run*4096); err != nil {
			t.Fatal(err)
		}
		var first int64
		v.Map(cache.Allocation, 0, 64<<20, func(n int64, flags uint32) bool {
			if flags == cache.HoleZero {
				first += n
			}
			return true
		})
		if first != run*4096 {
			t.Errorf("%d bytes are holes, Map says %d", run*4096, first)
		}
	}
}

func TestSmallMaxDirty(t *testing.T) {
	v := newVolume(t, testSize, testMemory, func(c *cache.Config) { c.MaxDirtyBytes = 4096 })
	v.startFlusher()
	c := v.client()
	for b := range int64(20) {
		mustWrite(t, c, b, 1)
	}
	if err := c.write(100, make([]byte, 100000)); err != nil { // alone it may be larger than the bound
		t.Fatal(err)
	}
}

// TestDamagedHeader flips the block number of a dirty slot: the process goes on, says that a block is lost, and so does the next.
func TestDamagedHeader(t *testing.T) {
	v := newVolume(t, testSize, testMemory, nil)
	c := v.client()
	mustWrite(t, c, 41, 4)
	mustWrite(t, c, 40, 5)
	for i := range v.arena.Headers {
		if h := &v.arena.Headers[i]; h.Number.Load() > 1 && h.Block.Load()&0xffff == 40 {
			h.Block.Store(h.Block.Load() ^ 1)
		}
	}
	v.flush()
	if s := v.Stats(); s.Lost != 1 || !v.Dirty() {
		t.Errorf("%d blocks are lost, dirty %v", s.Lost, v.Dirty())
	}
	v.restart()
	if s := v.Stats(); s.Lost != 1 || !v.Dirty() {
		t.Errorf("after a restart %d blocks are lost, dirty %v", s.Lost, v.Dirty())
	}
	if p, err := v.client().read(41*4096, 4096); err != nil || p[0] != 4 {
		t.Errorf("the block whose number the slot took reads %d (%v), want 4", p[0], err)
	}
}

// TestStress lets clients that own sectors of shared blocks, and ranges of their own, read back what they wrote, beside a flusher
// that syncs and fails anywhere, with evictions and restarts.
func TestStress(t *testing.T) {
	for seed := range uint64(seeds()) / 2 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { stress(t, seed) })
	}
}

const stressClients = 4

func stress(t *testing.T, seed uint64) {
	v := newVolume(t, testSize, testMemory, func(cfg *cache.Config) {
		cfg.Commits = seed%2 == 1
		if seed%3 == 0 {
			cfg.MaxDirtyBytes = 1 << 20
		}
	})
	v.fate = rand.New(rand.NewPCG(seed, 6))
	var models [stressClients][]byte
	for i := range models {
		models[i] = make([]byte, testSize)
	}
	var failed atomic.Bool
	for round := range uint64(3) {
		v.startFlusher()
		var wg sync.WaitGroup
		for k := range stressClients {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(seed<<8|round, uint64(k)))
				c := v.client()
				for step := 0; step < 400 && !failed.Load(); step++ {
					if err := stressStep(v, c, r, k, models[k]); err != nil {
						failed.Store(true)
						t.Errorf("client %d: %v", k, err)
					}
				}
			})
		}
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		for waiting := true; waiting; {
			select {
			case <-done:
				waiting = false
			case <-time.After(time.Millisecond):
				v.cfg.Wake()
			}
		}
		v.stopFlusher()
		v.restart()
	}
	v.flush()
}

// stressStep does one operation of client k on what it owns.
func stressStep(v *volume, c *client, r *rand.Rand, k int, model []byte) error {
	off, n := stressRange(r, k)
	switch r.IntN(8) {
	case 0, 1, 2:
		fill(r, model[off:off+n])
		return c.write(off, model[off:off+n])
	case 3:
		clear(model[off : off+n])
		return c.zero(off, n)
	case 4: // a scan
		_, err := c.read(r.Int64N(testSize-(1<<20))/4096*4096, 1<<20)
		v.Prefetch(uint64(r.IntN(testSize/4096)), uint64(r.IntN(testSize/4096)))
		return err
	}
	got, err := c.read(off, n)
	if err != nil || bytes.Equal(got, model[off:off+n]) {
		return err
	}
	i := 0
	for got[i] == model[off+int64(i)] {
		i++
	}
	at := off + int64(i)
	return fmt.Errorf("block %d+%d reads %d, want %d (read of %d+%d)", at/4096, at%4096, got[i], model[at], off, n)
}

// stressRange is a part of a sector that client k owns in a shared block, or a range of its own stripe.
func stressRange(r *rand.Rand, k int) (off, n int64) {
	const blocks = testSize / 4096
	if r.IntN(3) > 0 {
		set := blocks / 2
		if r.IntN(2) == 0 {
			set = 40
		}
		d := r.Int64N(511) * r.Int64N(2)
		off = int64(r.IntN(set))*4096 + int64(k+stressClients*r.IntN(2))*512 + d
		return off, 512 - d - r.Int64N(512-d)*r.Int64N(2)
	}
	base := int64(blocks/2+256*(k+stressClients*r.IntN(2))) * 4096
	off = r.Int64N(255 * 4096)
	n = 1 + r.Int64N(256*4096-off)
	if r.IntN(3) > 0 {
		n = min(n, 1+r.Int64N(40000))
	}
	return base + off, n
}
