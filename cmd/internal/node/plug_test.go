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

const pageBytes = cache.BlockBytes

// plug is a disk in memory that can be unplugged: what was not synced then stays or goes, each sector by itself.
type plug struct {
	mu       sync.Mutex
	base     []byte           // what it was made of; never written
	size     int64            // what lies behind base is zero
	now      map[int64][]byte // pages as they are, else as they are in base
	durable  map[int64][]byte // pages as they are without power, likewise
	unsynced map[int64]bool   // sectors
	left     int              // operations until it is unplugged, which that one does not survive; negative: it never is
	holes    bool             // Extents tells pages of zeroes from data, as a file does; else all is data, as of a disk
	reads    int64            // bytes
}

func newPlug(content []byte, left int) *plug {
	return &plug{
		base: content, size: int64(len(content)), left: left,
		now: map[int64][]byte{}, durable: map[int64][]byte{}, unsynced: map[int64]bool{},
	}
}

// copied is a disk with what is durable of p.
func (p *plug) copied(left int) *plug {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := newPlug(p.base, left)
	c.size, c.holes = p.size, p.holes
	for at, page := range p.durable {
		c.now[at], c.durable[at] = bytes.Clone(page), bytes.Clone(page)
	}
	return c
}

// replugged is the disk after it was unplugged.
func (p *plug) replugged(rng *rand.Rand, left int) *plug {
	after := p.copied(left)
	for _, s := range slices.Sorted(maps.Keys(p.unsynced)) {
		if rng.IntN(2) == 0 {
			sector := p.sector(p.now, s)
			copy(after.sector(after.now, s), sector)
			copy(after.sector(after.durable, s), sector)
		}
	}
	return after
}

// page is the page at an offset, to be changed.
func (p *plug) page(pages map[int64][]byte, at int64) []byte {
	if pages[at] == nil {
		pages[at] = make([]byte, pageBytes)
		if at < int64(len(p.base)) {
			copy(pages[at], p.base[at:])
		}
	}
	return pages[at]
}

func (p *plug) sector(pages map[int64][]byte, s int64) []byte {
	off := s * journal.SectorBytes
	return p.page(pages, off-off%pageBytes)[off%pageBytes:][:journal.SectorBytes]
}

// fails counts an operation that changes something. Callers hold mu.
func (p *plug) fails() bool {
	if p.left > 0 {
		p.left--
	}
	return p.left == 0
}

func (p *plug) ReadAt(b []byte, off int64) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.read(p.now, b, off)
	p.reads += int64(n)
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (p *plug) read(pages map[int64][]byte, b []byte, off int64) int {
	n := int(max(0, min(int64(len(b)), p.size-off)))
	for done := 0; done < n; {
		at := (off + int64(done)) / pageBytes * pageBytes
		skip := int(off + int64(done) - at)
		part := b[done:min(n, done+pageBytes-skip)]
		switch page := pages[at]; {
		case page != nil:
			copy(part, page[skip:])
		case at < int64(len(p.base)):
			clear(part[copy(part, p.base[at+int64(skip):]):])
		default:
			clear(part)
		}
		done += len(part)
	}
	return n
}

// content is what lies from an offset to another without power.
func (p *plug) content(from, to int64) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := make([]byte, to-from)
	p.read(p.durable, b, from)
	return b
}

// unchanged reports whether nothing was ever written.
func (p *plug) unchanged() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.now) == 0 && p.size == int64(len(p.base))
}

// settled reports whether all that was written is durable.
func (p *plug) settled() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.unsynced) == 0
}

func (p *plug) WriteAt(b []byte, off int64) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.left == 0 || off+int64(len(b)) > p.size {
		return 0, errDrive
	}
	for done := 0; done < len(b); {
		at := (off + int64(done)) / pageBytes * pageBytes
		done += copy(p.page(p.now, at)[off+int64(done)-at:], b[done:])
	}
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
		copy(p.sector(p.durable, s), p.sector(p.now, s))
	}
	clear(p.unsynced)
	return nil
}

// Grow is durable where it succeeds; where it does not, it may have happened.
func (p *plug) Grow(size int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.left == 0 {
		return errDrive
	}
	p.size = size
	if p.fails() {
		return errDrive
	}
	return nil
}

func (p *plug) Size() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.size
}

func (p *plug) Close() error { return nil }

func (p *plug) Extents(off, n int64, fn func(off, n int64, flags uint32) bool) error {
	if !p.holes {
		fn(off, n, cache.Data)
		return nil
	}
	page := make([]byte, pageBytes)
	for end := off + n; off < end; {
		part := page[:min(pageBytes, end-off)]
		p.mu.Lock()
		p.read(p.now, part, off)
		p.mu.Unlock()
		flags := uint32(cache.Data)
		if isZero(part) {
			flags = cache.HoleZero
		}
		if !fn(off, int64(len(part)), flags) {
			return nil
		}
		off += int64(len(part))
	}
	return nil
}

var zeroPage [1 << 20]byte

func isZero(b []byte) bool {
	for ; len(b) > len(zeroPage); b = b[len(zeroPage):] {
		if !bytes.Equal(b[:len(zeroPage)], zeroPage[:]) {
			return false
		}
	}
	return bytes.Equal(b, zeroPage[:len(b)])
}
