package node

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/nbd"
)

// contexts are what a volume tells about its blocks, in the order of the bits of nbd.Request.Contexts.
var contexts = [...]struct {
	name string
	kind cache.Context
}{
	{"base:allocation", cache.Allocation},
	{"x-ramshelf:dirty", cache.Dirty},
	{"x-ramshelf:resident", cache.Resident},
}

// How many BLOCK_STATUS requests are answered at once: each may walk the headers of the whole memory. One less of them may
// ask home, which may hang: the rest are then answered from memory alone.
const (
	surveyCount = askCount + 1
	askCount    = 4
)

// surveys answers BLOCK_STATUS.
type surveys struct {
	cache *cache.Cache
	home  extentMapper // nil: home knows no holes
	size  int64        // of the volume

	mu      sync.Mutex
	queue   []*nbd.Request // its length is bounded by what the connections may have in flight
	running int            // goroutines
	asking  int            // those that may ask home
	closed  atomic.Bool    // set with mu held
	wg      sync.WaitGroup
}

// submit starts to answer r. It does not wait.
func (s *surveys) submit(r *nbd.Request) {
	if !s.enter(r) {
		r.Cut()
	}
}

func (s *surveys) enter(r *nbd.Request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Load() {
		return false
	}
	s.queue = append(s.queue, r)
	if s.running < surveyCount {
		s.running++
		s.wg.Go(s.run)
	}
	return true
}

// run answers requests until none are left.
func (s *surveys) run() {
	r, ask := s.next(false)
	for r != nil {
		s.answer(r, ask)
		r.Done(0)
		r, ask = s.next(ask)
	}
}

// next gives the next request and whether home may be asked about it; asked tells that of the one before.
func (s *surveys) next(asked bool) (r *nbd.Request, ask bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if asked {
		s.asking--
	}
	if len(s.queue) == 0 {
		s.running--
		return nil, false
	}
	r = s.queue[0]
	s.queue = slices.Delete(s.queue, 0, 1)
	if ask = s.asking < askCount; ask {
		s.asking++
	}
	return r, ask
}

// close cuts what waits and returns when nothing is being answered any more, which may take as long as home does.
func (s *surveys) close() {
	s.mu.Lock()
	s.closed.Store(true)
	waiting := s.queue
	s.queue = nil
	s.mu.Unlock()
	for _, r := range waiting {
		r.Cut()
	}
	s.wg.Wait()
}

// answer fills in the extents that r asks for.
func (s *surveys) answer(r *nbd.Request, ask bool) {
	for i, c := range contexts {
		if r.Contexts&(1<<i) == 0 {
			continue
		}
		e := newSurveyor(r, s.size)
		e.extents = r.Extents[i][:0]
		s.cache.Map(c.kind, int64(r.Offset), int64(r.Length), func(n int64, flags uint32) bool {
			if flags == cache.Unknown {
				return s.ask(e, n, ask)
			}
			return e.add(n, flags)
		})
		r.Extents[i] = e.extents
	}
}

// ask tells what home knows of the next n bytes, which are not resident. Where home is not asked they count as data.
func (s *surveys) ask(e *surveyor, n int64, ask bool) bool {
	left, more := n, true
	if ask && s.home != nil && !s.closed.Load() {
		// What an error leaves open counts as data too.
		_ = s.home.Extents(e.at, n, func(_, m int64, flags uint32) bool {
			m = min(m, left)
			left -= m
			more = e.add(m, flags&cache.HoleZero)
			return more && left > 0
		})
	}
	if more && left > 0 {
		return e.add(left, cache.Data)
	}
	return more
}

// surveyor puts extents together. The cache tells about whole blocks: what lies before the request or behind the volume is
// left out.
type surveyor struct {
	extents []nbd.Extent
	at      int64 // offset of what comes next
	start   int64 // of the request
	end     int64 // of the volume
	most    int   // extents
}

func newSurveyor(r *nbd.Request, size int64) *surveyor {
	e := &surveyor{start: int64(r.Offset), end: size, most: nbd.MaxExtents}
	e.at = e.start - e.start%cache.BlockBytes
	if r.Flags&nbd.CmdFlagReqOne != 0 {
		e.most = 1
	}
	return e
}

// add appends n bytes and reports whether there is room for more.
func (e *surveyor) add(n int64, flags uint32) bool {
	from, to := max(e.at, e.start), min(e.at+n, e.end)
	last := len(e.extents) - 1
	switch {
	case from >= to:
	case last >= 0 && e.extents[last].Flags == flags:
		e.extents[last].Length += uint64(to - from)
	case len(e.extents) == e.most:
		return false
	default:
		e.extents = append(e.extents, nbd.Extent{Length: uint64(to - from), Flags: flags})
	}
	e.at += n
	return e.at < e.end
}
