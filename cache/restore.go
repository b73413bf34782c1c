package cache

import (
	"cmp"
	"slices"

	"github.com/ramshelf/ramshelf/cache/arena"
)

// restore makes the index again from the headers that the process before left. For each block the highest number that was
// issued whole holds; what is above "published" was never answered and counts as never issued.
func (c *Cache) restore() {
	published := max(numberFilled, c.arena.Published(), c.seal)
	c.arena.SetPublished(published)
	c.restoreZeroes(published)
	c.restoreSlots(published)
	c.freeRest()
	if c.dirtySlots() > 0 || c.zeroes.used() > 0 {
		c.lastWrite = c.arena.Published()
		c.opened()
	}
}

func (c *Cache) restoreZeroes(published uint64) {
	z := c.zeroes
	z.unused = z.unused[:0]
	var found []extent
	blocks := uint64(c.size / BlockBytes)
	for i := range z.entries {
		e := &z.entries[i]
		n, first, count := e.Number.Load(), e.First.Load(), e.Blocks.Load()
		switch {
		case n == 0:
			z.unused = append(z.unused, uint32(i))
		case n > published:
			z.clear(uint32(i))
		case e.Check.Load() != zeroCheck(first, count, n) || first+count > blocks || first+count < first:
			c.log.Error("zero extent failed its checksum", "first", first, "blocks", count, "number", n)
			c.stats.corrupt.Add(1)
			z.clear(uint32(i))
		default:
			found = append(found, extent{first, first + count, n})
		}
	}
	slices.SortFunc(found, func(a, b extent) int { return cmp.Compare(a.number, b.number) })
	for _, e := range found {
		z.segments = overlay(z.segments, segment(e))
		if e.number <= c.seal {
			z.committed = append(z.committed[:0], z.segments...)
		} else {
			z.open++
		}
	}
	z.live.Store(int32(len(z.segments)))
}

func (c *Cache) restoreSlots(published uint64) {
	blocks := uint64(c.size / BlockBytes)
	for i := range c.arena.Headers {
		h, s := &c.arena.Headers[i], uint32(i)
		number := h.Number.Load()
		if number == 0 {
			continue
		}
		m := c.meta(s)
		if !wellFormed(h.Block.Load()) {
			c.restoreDamaged(s, m)
			continue
		}
		if number > published || m.block >= blocks || c.restoreCovered(m, number) {
			h.Number.Store(0)
			continue
		}
		c.restoreSlot(s, m, number)
	}
}

// restoreCovered tells whether an extent supersedes a version for good. One that is not committed does not supersede what is:
// without the memory the version counts.
func (c *Cache) restoreCovered(m meta, number uint64) bool {
	if m.dirty != 0 && number <= c.seal {
		return coveringIn(c.zeroes.committed, m.block) > number
	}
	return c.zeroes.covering(m.block) > number
}

// restoreDamaged deals with a slot of which nobody knows any more which block it holds. A clean one is freed; a dirty one stays as it
// is, out of the index, and counts as a lost block.
func (c *Cache) restoreDamaged(s uint32, m meta) {
	c.stats.corrupt.Add(1)
	if m.dirty == 0 && !m.lost {
		c.arena.Headers[s].Number.Store(0)
		return
	}
	c.log.Error("slot with a damaged header holds a write that is lost", "slot", s, "number", c.arena.Headers[s].Number.Load())
	c.stats.damaged.Add(1)
}

// restoreSlot enters a slot unless a better version of its block is there: a newer one, or the same one with more sectors.
// Of a block that is not home two versions may hold: the newest committed one, which the journal has, and the newest.
func (c *Cache) restoreSlot(s uint32, m meta, number uint64) {
	sh := c.shardOf(m.block)
	after := noSlot // the newer version that s comes behind
	for old := c.newest(sh, m.block); old != noSlot; {
		next := c.older(old, m.block)
		other := c.arena.Headers[old].Number.Load()
		have := c.meta(old)
		same := other == number
		switch {
		case same && have.valid == allValid, other > number && (other <= c.seal || number > c.seal || m.dirty == 0):
			c.arena.Headers[s].Number.Store(0)
			return
		case other > number:
			after = old
		case same, number <= c.seal || other > c.seal || have.dirty == 0:
			c.open.remove(old)
			c.home.remove(old)
			c.drop(sh, m.block, old) // freeRest puts it on its free list
		}
		old = next
	}
	if after == noSlot {
		c.insert(sh, m.block, s)
	} else {
		c.next[s], c.next[after] = c.next[after], s+1
	}
	c.state[s].Store(stateMain)
	switch {
	case m.lost:
		c.lost[s] = struct{}{}
	case m.dirty != 0 && number <= c.seal:
		c.home.add(s)
	case m.dirty != 0:
		c.open.add(s)
	}
}

// freeRest puts every slot without a number on the free list of its pool, the lowest first.
func (c *Cache) freeRest() {
	for i := len(c.arena.Headers) - 1; i >= 0; i-- {
		s := uint32(i)
		if c.arena.Headers[s].Number.Load() == 0 {
			p := &c.pools[i/c.perPool]
			c.next[s] = p.free
			p.free = s + 1
			c.free.Add(1)
		}
	}
}

// Lose records a block of which a recovery found that its content is lost, as version number, which is committed: it answers
// EIO until it is written again. It reports false where there is no slot for it. It comes before any operation; a block that
// the memory knows to be lost already stays as it is.
func (c *Cache) Lose(block, number uint64) bool {
	if s := c.newest(c.shardOf(block), block); s != noSlot && c.meta(s).lost {
		return true
	}
	slots, ok := c.reserve(nil, 1)
	if !ok {
		return false
	}
	c.pub.Lock()
	defer c.pub.Unlock()
	s := slots[0]
	m := meta{block: block, valid: allValid, dirty: allValid, lost: true}
	c.describe(s, m, number, 0)
	c.arena.Headers[s].Number.Store(number)
	sh := c.shardOf(block)
	sh.mu.Lock()
	c.insert(sh, block, s)
	sh.mu.Unlock()
	c.lost[s] = struct{}{}
	return true
}

// Dirty tells whether the memory that the cache found at its start, or has now, holds anything that home has not.
func (c *Cache) Dirty() bool {
	c.pub.Lock()
	defer c.pub.Unlock()
	return c.dirtySlots() > 0 || c.zeroes.used() > 0 || c.lostBlocks() > 0
}

// Holds tells whether a memory file holds anything above number that home has not, without making a cache of it.
func Holds(a *arena.Arena, number uint64) bool {
	published := a.Published()
	for i := range a.Zeroes {
		if n := a.Zeroes[i].Number.Load(); n > number && n <= published {
			return true
		}
	}
	for i := range a.Headers {
		h := &a.Headers[i]
		if n := h.Number.Load(); n > number && n <= published && metaOf(0, h.Check.Load()).dirty != 0 {
			return true
		}
	}
	return false
}
