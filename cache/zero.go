package cache

import (
	"cmp"
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"github.com/ramshelf/ramshelf/cache/arena"
)

// segment is a range of blocks of which one zero extent is the newest.
type segment struct {
	first, end uint64 // blocks [first, end)
	number     uint64
}

// zeroSet holds the zero extents that are not yet home: entries in the arena, and for look-ups the segments that are left
// of them after newer extents took their part, sorted and without overlap.
type zeroSet struct {
	mu       sync.RWMutex // guards segments
	segments []segment
	live     atomic.Int32  // len(segments), so that a look-up without extents takes no lock
	removed  atomic.Uint64 // highest number that ever left the set

	entries   []arena.Zero // guarded by Cache.pub, like all below
	unused    []uint32     // free entries
	sealed    []segment    // the segments as they were at the newest seal
	committed []segment    // as they were at the newest committed seal
	open      int          // entries above the newest seal
}

func newZeroSet(entries []arena.Zero) *zeroSet {
	z := &zeroSet{entries: entries}
	for i := len(entries) - 1; i >= 0; i-- {
		z.unused = append(z.unused, uint32(i))
	}
	return z
}

// covering is the number of the extent that is the newest over block, 0 if there is none.
func (z *zeroSet) covering(block uint64) uint64 {
	if z.live.Load() == 0 {
		return 0
	}
	z.mu.RLock()
	defer z.mu.RUnlock()
	return coveringIn(z.segments, block)
}

func coveringIn(segments []segment, block uint64) uint64 {
	i := sort.Search(len(segments), func(i int) bool { return segments[i].end > block })
	if i < len(segments) && segments[i].first <= block {
		return segments[i].number
	}
	return 0
}

// end is the first block after from at which the answer of covering may change, at most limit.
func (z *zeroSet) end(from, limit uint64) uint64 {
	z.mu.RLock()
	defer z.mu.RUnlock()
	i := sort.Search(len(z.segments), func(i int) bool { return z.segments[i].end > from })
	switch {
	case i == len(z.segments):
		return limit
	case z.segments[i].first > from:
		return min(limit, z.segments[i].first)
	}
	return min(limit, z.segments[i].end)
}

// full tells whether no entry is left. Callers hold pub.
func (z *zeroSet) full() bool { return len(z.unused) == 0 }

// used is the number of entries in use. Callers hold pub.
func (z *zeroSet) used() int { return len(z.entries) - len(z.unused) }

// seal remembers the extents that belong to a seal. Callers hold pub.
func (z *zeroSet) seal() {
	z.mu.RLock()
	z.sealed = append(z.sealed[:0], z.segments...)
	z.mu.RUnlock()
	z.open = 0
}

// commit says that the newest seal is committed. Callers hold pub.
func (z *zeroSet) commit() { z.committed = append(z.committed[:0], z.sealed...) }

// store writes the entry of an extent; it counts only once "published" has reached its number. Callers hold pub.
func (z *zeroSet) store(first, end, number uint64) {
	i := z.unused[len(z.unused)-1]
	z.unused = z.unused[:len(z.unused)-1]
	e := &z.entries[i]
	e.First.Store(first)
	e.Blocks.Store(end - first)
	crashPoint()
	e.Check.Store(zeroCheck(first, end-first, number))
	e.Number.Store(number)
	z.open++
	crashPoint()
}

func zeroCheck(first, blocks, number uint64) uint64 {
	return hash(first^hash(blocks^hash(number))) | 1
}

// show makes the extent the newest over its range. Entries that no segment needs any more and that no seal holds are
// freed. Callers hold pub.
func (z *zeroSet) show(first, end, number, seal uint64) {
	z.mu.Lock()
	z.segments = overlay(z.segments, segment{first, end, number})
	z.live.Store(int32(len(z.segments)))
	z.mu.Unlock()
	if z.used() > len(z.entries)/2 {
		z.prune(seal)
	}
}

// overlay puts s over the segments and keeps them sorted.
func overlay(segments []segment, s segment) []segment {
	from := sort.Search(len(segments), func(i int) bool { return segments[i].end > s.first })
	to := from
	var parts [3]segment
	keep := parts[:0]
	if from < len(segments) && segments[from].first < s.first {
		keep = append(keep, segment{segments[from].first, s.first, segments[from].number})
	}
	keep = append(keep, s)
	for to < len(segments) && segments[to].first < s.end {
		to++
	}
	if to > from && segments[to-1].end > s.end {
		keep = append(keep, segment{s.end, segments[to-1].end, segments[to-1].number})
	}
	return slices.Replace(segments, from, to, keep...)
}

// prune frees entries of the open epoch that newer extents cover whole.
func (z *zeroSet) prune(seal uint64) {
	shown := make(map[uint64]bool, len(z.segments))
	for _, s := range z.segments {
		shown[s.number] = true
	}
	for i := range z.entries {
		if n := z.entries[i].Number.Load(); n > seal && !shown[n] {
			z.clear(uint32(i))
			z.open--
		}
	}
}

func (z *zeroSet) clear(i uint32) {
	z.entries[i].Number.Store(0)
	crashPoint()
	z.unused = append(z.unused, i)
}

// remove takes an extent out that is home, synced, and whose superseded slots are gone. Callers hold pub.
func (z *zeroSet) remove(number uint64) {
	z.mu.Lock()
	z.segments = slices.DeleteFunc(z.segments, func(s segment) bool { return s.number == number })
	z.live.Store(int32(len(z.segments)))
	z.mu.Unlock()
	z.removed.Store(max(z.removed.Load(), number))
	for i := range z.entries {
		if z.entries[i].Number.Load() == number {
			z.clear(uint32(i))
		}
	}
}

// extent is one entry of the table.
type extent struct {
	first, end, number uint64
}

// between are the extents with numbers above after, up to seal, oldest first. Callers hold pub.
func (z *zeroSet) between(after, seal uint64) []extent {
	if z.used() == 0 {
		return nil
	}
	var found []extent
	for i := range z.entries {
		e := &z.entries[i]
		if n := e.Number.Load(); n > after && n <= seal {
			first := e.First.Load()
			found = append(found, extent{first, first + e.Blocks.Load(), n})
		}
	}
	slices.SortFunc(found, func(a, b extent) int { return cmp.Compare(a.number, b.number) })
	return found
}
