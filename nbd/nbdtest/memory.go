// Package nbdtest has what tests of NBD servers and clients need: a device in memory.
package nbdtest

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/ramshelf/ramshelf/nbd"
)

const pageBytes = 4096

// Contexts are the metadata contexts that a Memory answers, in this order: base:allocation, x-ramshelf:dirty (bit 0:
// written since the last FLUSH), x-ramshelf:resident (bit 0: was ever written).
var Contexts = []string{"base:allocation", "x-ramshelf:dirty", "x-ramshelf:resident"}

// Memory is an nbd.Device in memory, for tests. A page never changes once it can be read, so a read is never torn.
// Operations take effect one after the other, when they complete. In steady state a request allocates nothing.
//
// The functions are set before the device is served; nil ones do nothing.
type Memory struct {
	// Fault gives the error with which r fails without effect; 0 lets it succeed.
	Fault func(r *nbd.Request) syscall.Errno
	// Defer takes over when r completes: it must see to it that complete is called once, from any goroutine.
	// It may report false to let r complete at once.
	Defer func(r *nbd.Request, complete func()) bool
	// NoRoom makes Reserve report false.
	NoRoom func(r *nbd.Request) bool
	// Observe sees every request at the moment when it takes effect, one at a time.
	Observe func(r *nbd.Request)

	// What was called how often.
	Reserved, Aborted, Submitted, Ended, Released atomic.Int64

	size  int64
	mu    sync.Mutex
	pages []*page // nil: never written, or zeroed
	free  []*page
}

type page struct {
	refs  int // of pages, and of requests that were lent it
	dirty bool
	data  [pageBytes]byte
}

// operation is what a Memory keeps in Request.Device.
type operation struct {
	memory *Memory
	pages  []*page // lent for a write, or pinned by a read
}

// NewMemory returns a device of size bytes that reads as zeroes.
func NewMemory(size int64) *Memory {
	return &Memory{size: size, pages: make([]*page, (size+pageBytes-1)/pageBytes)}
}

// Size implements nbd.Device.
func (m *Memory) Size() int64 { return m.size }

func (m *Memory) operation(r *nbd.Request) *operation {
	o, ok := r.Device.(*operation)
	if !ok || o.memory != m {
		o = &operation{memory: m}
		r.Device = o
	}
	return o
}

// Reserve implements nbd.Device.
func (m *Memory) Reserve(r *nbd.Request) bool {
	if m.NoRoom != nil && m.NoRoom(r) {
		return false
	}
	m.Reserved.Add(1)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lend(r)
	return true
}

// lend fills r.Dest with fresh pages.
func (m *Memory) lend(r *nbd.Request) {
	o := m.operation(r)
	for off, left := r.Offset, r.Length; left > 0; {
		p := m.newPage()
		at := off % pageBytes
		n := min(pageBytes-at, left)
		o.pages = append(o.pages, p)
		r.Dest = append(r.Dest, p.data[at:at+n])
		off, left = off+n, left-n
	}
}

func (m *Memory) newPage() *page {
	if k := len(m.free); k > 0 {
		p := m.free[k-1]
		m.free = m.free[:k-1]
		p.refs, p.dirty = 1, false
		return p
	}
	return &page{refs: 1}
}

func (m *Memory) drop(p *page) {
	if p == nil {
		return
	}
	if p.refs--; p.refs == 0 {
		m.free = append(m.free, p)
	}
}

// Abort implements nbd.Device.
func (m *Memory) Abort(r *nbd.Request) {
	m.Aborted.Add(1)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dropAll(m.operation(r))
}

func (m *Memory) dropAll(o *operation) {
	for i, p := range o.pages {
		m.drop(p)
		o.pages[i] = nil
	}
	o.pages = o.pages[:0]
}

// Release implements nbd.Device.
func (m *Memory) Release(r *nbd.Request) {
	m.Released.Add(1)
	o := m.operation(r)
	if len(o.pages) == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dropAll(o)
}

// Submit implements nbd.Device.
func (m *Memory) Submit(r *nbd.Request) {
	m.Submitted.Add(1)
	if m.Defer != nil && m.Defer(r, func() { m.complete(r) }) {
		return
	}
	m.complete(r)
}

func (m *Memory) complete(r *nbd.Request) {
	err := m.apply(r)
	m.Ended.Add(1)
	r.Done(err)
}

func (m *Memory) apply(r *nbd.Request) syscall.Errno {
	if m.Fault != nil {
		if err := m.Fault(r); err != 0 {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Observe != nil {
		m.Observe(r)
	}
	switch r.Command {
	case nbd.CmdRead:
		m.read(r)
	case nbd.CmdWrite:
		m.write(r)
	case nbd.CmdTrim, nbd.CmdWriteZeroes:
		m.zero(r.Offset, r.Length)
	case nbd.CmdFlush:
		m.clean()
	case nbd.CmdBlockStatus:
		m.status(r)
	}
	return 0
}

func (m *Memory) read(r *nbd.Request) {
	o := m.operation(r)
	for off, left := r.Offset, r.Length; left > 0; {
		at := off % pageBytes
		n := min(pageBytes-at, left)
		if p := m.pages[off/pageBytes]; p == nil {
			r.AddHole(n)
		} else {
			p.refs++
			o.pages = append(o.pages, p)
			r.AddData(p.data[at : at+n])
		}
		off, left = off+n, left-n
	}
}

func (m *Memory) write(r *nbd.Request) {
	o := m.operation(r)
	if len(o.pages) == 0 {
		m.lend(r)
		from := r.Payload
		for _, d := range r.Dest {
			from = from[copy(d, from):]
		}
	}
	off := r.Offset
	for i, p := range o.pages {
		at, n := off%pageBytes, uint64(len(r.Dest[i]))
		p.dirty = true
		m.publish(off/pageBytes, p, at, at+n)
		off += n
	}
	o.pages = o.pages[:0]
}

// publish puts p in the place of the page number k; p has new data from lo to hi.
func (m *Memory) publish(k uint64, p *page, lo, hi uint64) {
	old := m.pages[k]
	if lo > 0 || hi < pageBytes {
		if old == nil {
			clear(p.data[:lo])
			clear(p.data[hi:])
		} else {
			copy(p.data[:lo], old.data[:lo])
			copy(p.data[hi:], old.data[hi:])
		}
	}
	m.pages[k] = p
	m.drop(old)
}

func (m *Memory) zero(off, left uint64) {
	for left > 0 {
		k, at := off/pageBytes, off%pageBytes
		n := min(pageBytes-at, left)
		switch {
		case m.pages[k] == nil:
		case n == pageBytes:
			m.drop(m.pages[k])
			m.pages[k] = nil
		default:
			p := m.newPage()
			p.dirty = true
			clear(p.data[at : at+n])
			m.publish(k, p, at, at+n)
		}
		off, left = off+n, left-n
	}
}

func (m *Memory) clean() {
	for _, p := range m.pages {
		if p != nil {
			p.dirty = false
		}
	}
}

func (m *Memory) status(r *nbd.Request) {
	for i := range Contexts {
		if r.Contexts>>i&1 == 1 {
			r.Extents[i] = m.extents(r.Extents[i], r, i)
		}
	}
}

// extents appends the extents of context number i from where r begins, up to its end or the most there may be.
func (m *Memory) extents(to []nbd.Extent, r *nbd.Request, i int) []nbd.Extent {
	for off, left := r.Offset, r.Length; left > 0; {
		n := min(pageBytes-off%pageBytes, left)
		flags := m.pages[off/pageBytes].flags(i)
		if k := len(to); k > 0 && to[k-1].Flags == flags {
			to[k-1].Length += n
		} else if k == nbd.MaxExtents {
			return to
		} else {
			to = append(to, nbd.Extent{Length: n, Flags: flags})
		}
		off, left = off+n, left-n
	}
	return to
}

func (p *page) flags(context int) uint32 {
	switch {
	case context == 0 && p == nil:
		return nbd.StateHole | nbd.StateZero
	case context == 1 && p != nil && p.dirty, context == 2 && p != nil:
		return 1
	}
	return 0
}

// Bytes returns a copy of n bytes at off.
func (m *Memory) Bytes(off, n int64) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := make([]byte, n)
	for i := int64(0); i < n; {
		at := (off + i) % pageBytes
		k := min(pageBytes-at, n-i)
		if p := m.pages[(off+i)/pageBytes]; p != nil {
			copy(b[i:i+k], p.data[at:])
		}
		i += k
	}
	return b
}

// Settled tells what is wrong with the calls of a server that has no connection any more: every reserved write was
// submitted or aborted, every submitted request was ended and released.
func (m *Memory) Settled() error {
	if s, e, r := m.Submitted.Load(), m.Ended.Load(), m.Released.Load(); s != e || e != r {
		return fmt.Errorf("%d requests submitted, %d ended, %d released", s, e, r)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, p := range m.pages {
		if p != nil && p.refs != 1 {
			return fmt.Errorf("page %d is still lent %d times", k, p.refs-1)
		}
	}
	return nil
}
