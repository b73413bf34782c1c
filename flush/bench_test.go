package flush_test

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/flush"
	"github.com/ramshelf/ramshelf/flush/home"
)

// endlessSource has the same dirty blocks in every seal. Their data lie scattered in its memory, as those of
// a cache do.
type endlessSource struct {
	memory []byte
	dirty  []uint64
	next   int
}

func newEndlessSource(tb testing.TB, dirty []uint64) *endlessSource {
	memory, err := unix.Mmap(-1, 0, len(dirty)*flush.BlockBytes, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = unix.Munmap(memory) })
	for i := range memory {
		memory[i] = byte(i>>12 ^ i)
	}
	return &endlessSource{memory: memory, dirty: dirty}
}

func (s *endlessSource) Seal() (uint64, int64, bool) {
	s.next = 0
	return 0, int64(len(s.dirty)) * flush.BlockBytes, true
}

func (s *endlessSource) Next(dst []flush.Block) int {
	n := 0
	for ; n < len(dst) && s.next < len(s.dirty); n++ {
		slot := (s.next*7919 + 13) % len(s.dirty) // scattered: 7919 is prime
		dst[n] = flush.Block{
			Number: s.dirty[s.next], Valid: 0xff, Dirty: 0xff,
			Data: s.memory[slot*flush.BlockBytes:][:flush.BlockBytes:flush.BlockBytes],
		}
		s.next++
	}
	return n
}

func (s *endlessSource) Synced()                              {}
func (s *endlessSource) Again()                               { s.next = 0 }
func (s *endlessSource) Zeroes(dst []flush.Zero) []flush.Zero { return dst }
func (s *endlessSource) Bridge(uint64, []flush.Block) int     { return 0 }
func (s *endlessSource) Committed(uint64)                     {}
func (s *endlessSource) Failed(error)                         {}
func (s *endlessSource) Sweep() bool                          { return true }
func (s *endlessSource) Refuse(bool)                          {}
func (s *endlessSource) PressedToCommit() bool                { return false }

// every lists each step-th of n blocks.
func every(step, n int) (dirty []uint64) {
	for i := range n {
		dirty = append(dirty, uint64(i*step))
	}
	return dirty
}

// nullBacking takes everything at once.
type nullBacking struct{}

func (nullBacking) ReadAt(p []byte, _ int64) (int, error)  { return len(p), nil }
func (nullBacking) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (nullBacking) WritevAt([][]byte, int64) error         { return nil }
func (nullBacking) Sync() error                            { return nil }

// TestSweepAllocatesNothing: a pass over many blocks allocates a few things and nothing per block or write.
func TestSweepAllocatesNothing(t *testing.T) {
	const blocks = 20000
	f, err := flush.New(newEndlessSource(t, every(2, blocks)), nullBacking{}, flush.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.Start()
	flushOnce := func() {
		if err := f.Flush(context.Background()); err != nil {
			t.Error(err)
		}
	}
	flushOnce()
	if n := testing.AllocsPerRun(5, flushOnce); n > 50 {
		t.Errorf("%v allocations for %d blocks in as many writes", n, blocks)
	}
	if err := f.Stop(context.Background()); err != nil {
		t.Error(err)
	}
}

// BenchmarkSweep writes sorted dirty blocks to a file in the temporary directory. Compare with fio writing
// the same offsets at the same depth:
//
//	fio --name=sweep --filename=FILE --direct=1 --ioengine=libaio --iodepth=4 --rw=write --bs=4M --size=512M --end_fsync=1
//	fio … --rw=write:28k --bs=4k --io_size=…     (every eighth block)
func BenchmarkSweep(b *testing.B) {
	for _, c := range []struct {
		name        string
		step, count int
	}{{"dense", 1, 131072}, {"every-8th", 8, 16384}} {
		b.Run(c.name, func(b *testing.B) {
			size := int64(c.step*c.count) * flush.BlockBytes
			dev, err := home.Open(filepath.Join(b.TempDir(), "backing"), home.Options{CreateBytes: size, Direct: true})
			if err != nil {
				b.Fatal(err)
			}
			defer dev.Close()
			src := newEndlessSource(b, every(c.step, c.count))
			prepare(b, dev)
			f, err := flush.New(src, dev, flush.Options{})
			if err != nil {
				b.Fatal(err)
			}
			f.Start()
			b.SetBytes(int64(c.count) * flush.BlockBytes)
			b.ReportAllocs()
			for b.Loop() {
				if err := f.Flush(context.Background()); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(f.Status().Writes)/float64(b.N), "writes/op")
			if err := f.Stop(context.Background()); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// prepare writes all of dev, so that no run pays for the allocation of its space.
func prepare(b *testing.B, dev *home.File) {
	buf := make([]byte, 4<<20)
	for off := int64(0); off < dev.Size(); off += int64(len(buf)) {
		if _, err := dev.WriteAt(buf[:min(int64(len(buf)), dev.Size()-off)], off); err != nil {
			b.Fatal(fmt.Errorf("prepare: %w", err))
		}
	}
	if err := dev.Sync(); err != nil {
		b.Fatal(err)
	}
	runtime.GC()
}
