package node

import (
	"bytes"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// plug is a disk in memory that can be unplugged: what was not synced then stays or goes, each sector by itself.
type plug struct {
	mu       sync.Mutex
	now      []byte
	durable  []byte
	unsynced map[int64]bool // sectors
	left     int            // operations until it is unplugged, which that one does not survive; negative: it never is
	holes    bool           // Extents tells pages of zeroes from data, as a file does; else all is data, as of a disk
	reads    int64          // bytes
}

func newPlug(content []byte, left int) *plug {
	return &plug{now: bytes.Clone(content), durable: bytes.Clone(content), unsynced: map[int64]bool{}, left: left}
}

// fails counts an operation that changes something. Callers hold mu.
func (p *plug) fails() bool {
	if p.left > 0 {
		p.left--
	}
	return p.left == 0
}

// replugged is the disk after it was unplugged.
func (p *plug) replugged(rng *rand.Rand, left int) *plug {
	p.mu.Lock()
	defer p.mu.Unlock()
	after := newPlug(p.durable, left)
	after.holes = p.holes
	for _, s := range slices.Sorted(maps.Keys(p.unsynced)) {
		if rng.IntN(2) == 0 {
			after.keep(s, p)
		}
	}
	return after
}

func (p *plug) ReadAt(b []byte, off int64) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := copy(b, p.now[min(off, int64(len(p.now))):])
	p.reads += int64(n)
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (p *plug) WriteAt(b []byte, off int64) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.left == 0 {
		return 0, errDrive
	}
	copy(p.now[off:], b)
	for s := off / journal.SectorBytes; s*journal.SectorBytes < off+int64(len(b)); s++ {
		p.unsynced[s] = true
	}
	if p.fails() {
		return 0, errDrive
	}
	return len(b), nil
}

func (p *plug) Zero(off, n int64) error {
	_, err := p.WriteAt(make([]byte, n), off)
	return err
}

func (p *plug) Sync() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.left == 0 || p.fails() {
		return errDrive
	}
	for s := range p.unsynced {
		p.keep(s, p)
	}
	clear(p.unsynced)
	return nil
}

// keep makes a sector of from durable in p.
func (p *plug) keep(s int64, from *plug) {
	sector := from.now[s*journal.SectorBytes:][:journal.SectorBytes]
	copy(p.now[s*journal.SectorBytes:], sector)
	copy(p.durable[s*journal.SectorBytes:], sector)
}

// Grow is durable where it succeeds; where it does not, it may have happened.
func (p *plug) Grow(size int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.left == 0 {
		return errDrive
	}
	p.now = append(p.now, make([]byte, size-int64(len(p.now)))...)
	p.durable = append(p.durable, make([]byte, size-int64(len(p.durable)))...)
	if p.fails() {
		return errDrive
	}
	return nil
}

func (p *plug) Size() int64  { return int64(len(p.now)) }
func (p *plug) Close() error { return nil }

func (p *plug) Extents(off, n int64, fn func(off, n int64, flags uint32) bool) error {
	for end := off + n; off < end; {
		m := min(cache.BlockBytes, end-off)
		flags := uint32(cache.Data)
		if p.holes && isZero(p.now[off:off+m]) {
			flags = cache.HoleZero
		}
		if !fn(off, m, flags) {
			return nil
		}
		off += m
	}
	return nil
}

func isZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
