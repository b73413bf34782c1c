package cache_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/cache"
)

// TestAtomicBlocks lets writers stamp whole blocks over one another while readers look: a block shows one writer's stamp in
// all its words.
func TestAtomicBlocks(t *testing.T) {
	v := newVolume(t, testSize, testMemory, nil)
	v.startFlusher()
	const blocks = 4
	var wg sync.WaitGroup
	var stop atomic.Bool
	var torn atomic.Int64
	for w := range 3 {
		wg.Go(func() {
			c, r := v.client(), rand.New(rand.NewPCG(uint64(w), 3))
			p := make([]byte, 4096)
			for i := uint64(1); !stop.Load(); i++ {
				for at := 0; at < len(p); at += 8 {
					binary.LittleEndian.PutUint64(p[at:], i<<8|uint64(w))
				}
				if err := c.write(r.Int64N(blocks)*4096, p); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 2 {
		wg.Go(func() {
			c, r := v.client(), rand.New(rand.NewPCG(9, 3))
			for !stop.Load() {
				p, err := c.read(r.Int64N(blocks)*4096, 4096)
				if err != nil {
					t.Error(err)
					stop.Store(true)
					return
				}
				first := p[:8]
				for at := 0; at < len(p); at += 8 {
					if !bytes.Equal(p[at:at+8], first) {
						torn.Add(1)
						stop.Store(true)
						return
					}
				}
			}
		})
	}
	time.AfterFunc(time.Second, func() { stop.Store(true) })
	wg.Wait()
	if torn.Load() > 0 {
		t.Error("a reader saw a block in two states")
	}
}

// slowHome holds its reads back until it is told to let them go.
type slowHome struct {
	*disk
	asked chan struct{}
	gate  chan struct{}
}

func (s *slowHome) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.disk.ReadAt(p, off)
	s.asked <- struct{}{}
	<-s.gate
	return n, err
}

// TestStaleFill has a block written, or zeroed, brought home and forgotten while an older read of it from home is under way: what
// that read brings must not come back.
func TestStaleFill(t *testing.T) {
	for name, change := range map[string]func(c *client) error{
		"write": func(c *client) error { return c.write(40960, bytes.Repeat([]byte{7}, 4096)) },
		"zero":  func(c *client) error { return c.zero(40960, 4096) },
	} {
		t.Run(name, func(t *testing.T) {
			home := &slowHome{asked: make(chan struct{}, 16), gate: make(chan struct{}, 16)}
			v := newVolume(t, testSize, testMemory, func(cfg *cache.Config) { home.disk = cfg.Home.(*disk); cfg.Home = home })
			for i := range home.data {
				home.data[i] = 1
			}
			reader, writer := v.client(), v.client()
			done := make(chan []byte)
			go func() {
				p, err := reader.read(40960, 4096)
				if err != nil {
					t.Error(err)
				}
				done <- p
			}()
			<-home.asked
			if err := change(writer); err != nil {
				t.Fatal(err)
			}
			v.flush()
			for range 64 {
				home.gate <- struct{}{}
				if len(home.asked) == 0 {
					break
				}
				<-home.asked
			}
			go func() {
				for range home.asked {
					home.gate <- struct{}{}
				}
			}()
			<-done
			got, err := v.client().read(40960, 4096)
			close(home.asked)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, home.data[40960:45056]) || got[0] == 1 {
				t.Errorf("the block reads %d after it was changed, home has %d", got[0], home.data[40960])
			}
		})
	}
}

// TestBitFlips flips bits in the memory. A clean block is read from home again; a dirty one is lost: it answers EIO and is not
// written home, until it is rewritten.
func TestBitFlips(t *testing.T) {
	v := newVolume(t, testSize, testMemory, nil)
	c := v.client()
	p := bytes.Repeat([]byte{0xa5}, 4096)
	for _, off := range []int64{0, 4096, 8192} {
		if err := c.write(off, p); err != nil {
			t.Fatal(err)
		}
	}
	v.flush()
	if err := c.write(4096, p); err != nil {
		t.Fatal(err)
	}
	flipped := v.flipAll(t, p)
	if flipped < 3 {
		t.Fatalf("found %d copies of the block, want 3", flipped)
	}
	for _, off := range []int64{0, 8192} {
		got, err := c.read(off, 4096)
		if err != nil || !bytes.Equal(got, p) {
			t.Errorf("clean block at %d was not read again: %v", off, err)
		}
	}
	if _, err := c.read(4096, 4096); !errors.Is(err, syscall.EIO) {
		t.Errorf("dirty block with a flipped bit reads with %v, want EIO", err)
	}
	if err := c.write(4096+512, p[:512]); !errors.Is(err, syscall.EIO) {
		t.Errorf("merge with a lost block gave %v, want EIO", err)
	}
	v.flush()
	if !bytes.Equal(v.disk.data[4096:8192], p) {
		t.Error("a lost block was written home")
	}
	if s := v.Stats(); s.Lost != 1 || s.Corrupt < 3 {
		t.Errorf("counted %d lost and %d corrupt", s.Lost, s.Corrupt)
	}
	v.restart()
	c = v.client()
	if _, err := c.read(4096, 4096); !errors.Is(err, syscall.EIO) {
		t.Errorf("lost block reads with %v after a restart, want EIO", err)
	}
	if err := c.write(4096, p); err != nil {
		t.Fatal(err)
	}
	if got, err := c.read(4096, 4096); err != nil || !bytes.Equal(got, p) {
		t.Errorf("rewritten block: %v", err)
	}
	v.flush()
	if s := v.Stats(); s.Lost != 0 || v.Dirty() {
		t.Errorf("%d blocks count as lost after they were rewritten, dirty %v", s.Lost, v.Dirty())
	}
}

// flipAll flips a bit in every copy of the block in the memory file, behind the back of the cache.
func (v *volume) flipAll(t *testing.T, block []byte) int {
	t.Helper()
	f, err := os.OpenFile(v.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	b := make([]byte, 4096)
	for off := int64(0); ; off += 4096 {
		if _, err := f.ReadAt(b, off); err == io.EOF {
			return n
		} else if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(b, block) {
			b[100] ^= 4
			if _, err := f.WriteAt(b, off); err != nil {
				t.Fatal(err)
			}
			n++
		}
	}
}

// TestCommitLevels holds answers and reads back until the commit, and tells flushes and writes when it fails.
func TestCommitLevels(t *testing.T) {
	v := newVolume(t, testSize, testMemory, func(cfg *cache.Config) { cfg.Commits = true })
	writer, reader, flusher := v.client(), v.client(), v.client()
	p := bytes.Repeat([]byte{3}, 4096)
	ended := make(chan error, 3)
	go func() { ended <- writer.write(0, p) }()
	for wait := time.Now(); !v.PressedToCommit(); time.Sleep(time.Millisecond) {
		if time.Since(wait) > 5*time.Second {
			t.Fatal("a write that promises a commit waits for none")
		}
	}
	go func() {
		_, err := reader.read(0, 4096)
		ended <- err
	}()
	go func() { ended <- flusher.flush() }()
	if got, err := v.client().read(4096, 4096); err != nil || got[0] != 0 {
		t.Fatalf("read of another block: %v", err)
	}
	select {
	case err := <-ended:
		t.Fatalf("something was answered before the commit (%v)", err)
	case <-time.After(50 * time.Millisecond):
	}
	v.Failed(errors.New("disk failed"))
	for range 2 {
		if err := <-ended; !errors.Is(err, syscall.EIO) {
			t.Errorf("write or flush ended with %v after a failed commit, want EIO", err)
		}
	}
	select {
	case err := <-ended:
		t.Fatalf("the read was answered before the commit (%v)", err)
	case <-time.After(20 * time.Millisecond):
	}
	v.flush()
	if err := <-ended; err != nil {
		t.Errorf("read after the commit: %v", err)
	}
	if !bytes.Equal(v.disk.data[:4096], p) {
		t.Error("the write is not home after the commit")
	}
}

// TestReadErrors keeps an error of home with the block that has it.
func TestReadErrors(t *testing.T) {
	v := newVolume(t, testSize, testMemory, nil)
	c := v.client()
	if err := c.write(4096, bytes.Repeat([]byte{9}, 4096)); err != nil {
		t.Fatal(err)
	}
	v.disk.fail = true
	if _, err := c.read(8192, 4096); !errors.Is(err, syscall.EIO) {
		t.Errorf("read of a block that home cannot give: %v, want EIO", err)
	}
	if err := c.write(16384+100, []byte("x")); !errors.Is(err, syscall.EIO) {
		t.Errorf("write of a byte into a block that home cannot give: %v, want EIO", err)
	}
	if got, err := c.read(4096, 4096); err != nil || got[0] != 9 {
		t.Errorf("resident block: %v", err)
	}
	if err := c.write(16384+512, make([]byte, 512)); err != nil {
		t.Errorf("write of a whole sector needs nothing from home: %v", err)
	}
	v.disk.fail = false
	if _, err := c.read(8192, 4096); err != nil {
		t.Errorf("read after home came back: %v", err)
	}
}

// TestNoAllocations holds that hits and overwrites allocate nothing.
func TestNoAllocations(t *testing.T) {
	v := newVolume(t, testSize, testMemory, nil)
	op := &cache.Op{Owner: nobody{}}
	p := bytes.Repeat([]byte{1}, 4096)
	i := int64(0)
	step := func() {
		i++
		op.Off, op.Len = i%64*4096, 4096
		if !v.Reserve(op) {
			t.Fatal("no room")
		}
		copy(v.Dest(op, 0), p)
		v.Write(op)
		op.Off, op.Len = i%64*4096, 4096
		v.Read(op)
		v.Piece(op, 0)
		v.Release(op)
	}
	for range 200 {
		step()
	}
	if n := testing.AllocsPerRun(1000, step); n > 0 {
		t.Errorf("%v allocations per write and read", n)
	}
}

type nobody struct{}

func (nobody) Ended(*cache.Op) {}
