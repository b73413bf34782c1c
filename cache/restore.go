package cache

import (
	"cmp"
	"slices"

	"github.com/ramshelf/ramshelf/cache/arena"
)

// restore makes the index again from the headers that the process before left. For each block the highest number that was
// issued whole holds; what is above "published" was never answered and counts as never issued.
func (c *Cache) restore() {
	published := max(numberFilled, c.arena.Published())
	c.arena.SetPublished(published)
	c.restoreZeroes(published)
	c.restoreSlots(published)
	c.freeRest()
	if c.open.n > 0 || c.zeroes.used() > 0 {
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
		if number > published || m.block >= blocks || c.zeroes.covering(m.block) > number {
			h.Number.Store(0)
			continue
		}
		c.restoreSlot(s, m, number)
	}
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
	c.stats.lost.Add(1)
}

// restoreSlot enters a slot unless a better version of its block is there: a newer one, or the same one with more sectors.
func (c *Cache) restoreSlot(s uint32, m meta, number uint64) {
	sh := c.shardOf(m.block)
	if old := c.newest(sh, m.block); old != noSlot {
		other := c.arena.Headers[old].Number.Load()
		if other > number || other == number && c.meta(old).valid == allValid {
			c.arena.Headers[s].Number.Store(0)
			return
		}
		c.open.remove(old)
		c.drop(sh, m.block, old) // freeRest puts it on its free list
	}
	c.insert(sh, m.block, s)
	c.state[s].Store(stateMain)
	if m.lost {
		c.stats.lost.Add(1)
	} else if m.dirty != 0 {
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

// Dirty tells whether the memory that the cache found at its start, or has now, holds anything that home has not.
func (c *Cache) Dirty() bool {
	c.pub.Lock()
	defer c.pub.Unlock()
	return c.open.n > 0 || c.sealedSlots.Load() > 0 || c.zeroes.used() > 0 || c.stats.lost.Load() > 0
}

// Holds tells whether a memory file holds anything that home has not, without making a cache of it.
func Holds(a *arena.Arena) bool {
	published := a.Published()
	for i := range a.Zeroes {
		if n := a.Zeroes[i].Number.Load(); n != 0 && n <= published {
			return true
		}
	}
	for i := range a.Headers {
		h := &a.Headers[i]
		if n := h.Number.Load(); n != 0 && n <= published && metaOf(0, h.Check.Load()).dirty != 0 {
			return true
		}
	}
	return false
}
