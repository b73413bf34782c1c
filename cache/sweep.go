package cache

// pass is one sweep: everything that was committed and not home when it began goes there in ascending order. Only the
// goroutine of the way home touches it.
type pass struct {
	order    order
	left     bitmap // not yet taken
	taken    bitmap // given out since the last Synced or Again
	seal     uint64 // the extents up to it go home too
	segments []segment
	zeroes   []extent // given out since the last Synced or Again
	zeroed   bool     // the extents were given out in this pass
	pinned   []uint32 // by Bridge
}

// Sweep begins the way home of everything that is committed; without a journal, of the seal. The sweep before must have
// ended. It reports whether there is anything to do.
func (c *Cache) Sweep() bool {
	p := &c.pass
	c.pub.Lock()
	from := &c.home
	p.seal = c.committed.Load()
	p.segments = append(p.segments[:0], c.zeroes.committed...)
	if !c.journaled {
		from, p.seal = &c.sealed, c.seal
		p.segments = append(p.segments[:0], c.zeroes.sealed...)
	}
	from.exchange(&p.left)
	if planted("home-before-commit") && c.journaled {
		for s, ok := c.open.next(0); ok; s, ok = c.open.next(s + 1) {
			p.left.add(s)
		}
	}
	c.passSlots.Store(int64(p.left.n))
	gone := c.dropLost(nil)
	something := p.left.n > 0 || len(c.zeroes.between(0, p.seal)) > 0
	c.pub.Unlock()
	c.releaseAll(gone)
	c.restartPass()
	return something
}

func (c *Cache) restartPass() {
	c.pass.order.restart()
	c.pass.zeroed = false
}

// dropLost drops the lost versions that a committed one has superseded. No sweep has them. Callers hold pub.
func (c *Cache) dropLost(gone []uint32) []uint32 {
	for s := range c.lost {
		block := c.meta(s).block
		sh := c.shardOf(block)
		sh.mu.Lock()
		if c.placed(s) && c.supersededLocked(sh, s, block, c.committed.Load()) && !c.pass.left.has(s) {
			c.home.remove(s)
			gone = append(gone, c.drop(sh, block, s))
		}
		sh.mu.Unlock()
	}
	return gone
}

// Plan gives the ranges that the sweep is going to zero or write, in no order, and some perhaps that it will not.
func (c *Cache) Plan(give func(off, n int64)) {
	p := &c.pass
	c.pub.Lock()
	zeroes := c.zeroes.between(0, p.seal)
	c.pub.Unlock()
	for _, e := range zeroes {
		give(int64(e.first)*BlockBytes, int64(e.end-e.first)*BlockBytes)
	}
	for s, ok := p.left.next(0); ok; s, ok = p.left.next(s + 1) {
		if c.placed(s) {
			give(int64(c.meta(s).block)*BlockBytes, BlockBytes)
		}
	}
}

// Zeroes gives the extents that are not home yet, as ranges of bytes, oldest first. They go home before any block.
func (c *Cache) Zeroes(give func(off, n int64)) {
	p := &c.pass
	if p.zeroed {
		return
	}
	p.zeroed = true
	c.pub.Lock()
	p.zeroes = c.zeroes.between(0, p.seal)
	c.pub.Unlock()
	for _, e := range p.zeroes {
		give(int64(e.first)*BlockBytes, int64(e.end-e.first)*BlockBytes)
	}
}

// Next fills dst with versions of the sweep, ascending, each once, and returns how many; 0 ends it. Each was verified; one
// whose checksum fails is repaired, or recorded as lost instead. What is superseded by an extent or another version that
// is committed is left out.
func (c *Cache) Next(dst []Version) int {
	p := &c.pass
	n := 0
	for n < len(dst) {
		given := p.order.next(c, &p.left, len(dst)-n)
		if len(given) == 0 {
			break
		}
		for _, k := range given {
			if p.left.remove(k.slot) && c.takeHome(k, &dst[n]) {
				n++
			}
		}
	}
	if c.journaled {
		c.earnHome(int64(n))
	} else {
		c.earnCommit(int64(n))
	}
	return n
}

// takeHome lends one version of the sweep, unless it need not go home any more.
func (c *Cache) takeHome(k keyed, v *Version) bool {
	p := &c.pass
	if c.dropSuperseded(k.slot, k.block) {
		c.passSlots.Add(-1)
		return false
	}
	if c.meta(k.slot).lost {
		c.passSlots.Add(-1) // it waits in c.lost until it is written again
		return false
	}
	p.taken.add(k.slot)
	if planted("drain-skips") && k.block%64 == 17 {
		return false
	}
	number, m := c.arena.Headers[k.slot].Number.Load(), c.meta(k.slot)
	if coveringIn(p.segments, k.block) > number {
		return false
	}
	if !c.intact(k.slot, number) && !c.mend(k.slot, number) {
		// Where nothing is lent nothing is synced, and the slot may be another block's by the next time.
		p.taken.remove(k.slot)
		c.passSlots.Add(-1)
		return false
	}
	*v = Version{Number: k.block, Sequence: number, Valid: m.valid, Dirty: m.dirty, Data: c.arena.Data(k.slot)}
	return true
}

// dropSuperseded drops a version that a newer committed one supersedes: the journal has the newer one, which covers it. Of a slot
// with a damaged header nobody knows what supersedes it.
func (c *Cache) dropSuperseded(s uint32, block uint64) bool {
	if !c.journaled || !c.placed(s) {
		return false
	}
	sh := c.shardOf(block)
	sh.mu.Lock()
	if c.newest(sh, block) == s || !c.supersededLocked(sh, s, block, c.committed.Load()) {
		sh.mu.Unlock()
		return false
	}
	if c.meta(s).lost {
		sh.mu.Unlock()
		return false // dropLost has it
	}
	freed := c.drop(sh, block, s)
	sh.mu.Unlock()
	if freed != noSlot {
		c.release(freed)
	}
	return true
}

// Bridge gives consecutive resident blocks from number first on that are clean and whole, as long as there are any and dst
// has room, and returns how many. They may be written between dirty ones to make one write of two.
func (c *Cache) Bridge(first uint64, dst []Version) int {
	for i := range dst {
		block := first + uint64(i)
		sh := c.shardOf(block)
		sh.mu.Lock()
		s := c.newest(sh, block)
		ok := s != noSlot && c.clean(s) && c.meta(s).valid == allValid && c.zeroes.covering(block) == 0
		number := uint64(0)
		if ok {
			number = c.arena.Headers[s].Number.Load()
			c.state[s].Add(1)
		}
		sh.mu.Unlock()
		if !ok {
			return i
		}
		c.pass.pinned = append(c.pass.pinned, s)
		if !c.intact(s, number) {
			return i
		}
		dst[i] = Version{Number: block, Valid: allValid, Data: c.arena.Data(s)}
	}
	return len(dst)
}

// Synced says that all that Zeroes and Next gave since the last Synced or Again is home and synced: it turns clean.
func (c *Cache) Synced() {
	p := &c.pass
	c.unpinBridges()
	// Extents go first: while a newer block in the range of one is dirty, nothing depends on which of the two is found.
	c.reap(p.zeroes)
	for _, e := range p.zeroes {
		c.pub.Lock()
		c.zeroes.remove(e.number)
		c.pub.Unlock()
	}
	p.zeroes = p.zeroes[:0]
	var dropped [pubStep]uint32
	for p.taken.n > 0 {
		gone := dropped[:0]
		c.pub.Lock()
		s, ok := p.taken.next(0)
		for n := 0; ok && n < pubStep; n++ {
			p.taken.remove(s)
			c.passSlots.Add(-1)
			gone = c.turnClean(s, gone)
			s, ok = p.taken.next(s + 1)
		}
		c.pub.Unlock()
		c.releaseAll(gone)
	}
	c.fertile()
	c.writeQueue.kick()
	c.readQueue.kick()
}

// turnClean marks a version that is home and synced; one that was superseded meanwhile is dropped. Callers hold pub.
func (c *Cache) turnClean(s uint32, gone []uint32) []uint32 {
	m := c.meta(s)
	if m.lost {
		return gone // it stays in c.lost
	}
	sh := c.shardOf(m.block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	c.redirty(s, 0, false)
	if c.newest(sh, m.block) != s {
		gone = append(gone, c.drop(sh, m.block, s))
	}
	return gone
}

// reap drops every version that one of the extents, oldest first, superseded, whichever set has it, so that they may be
// forgotten: block by block where they are short, else in one walk over the headers.
func (c *Cache) reap(extents []extent) {
	var newest []segment
	total := uint64(0)
	for _, e := range extents {
		newest = overlay(newest, segment(e))
		total += e.end - e.first
	}
	if total <= uint64(len(c.arena.Headers)) {
		for _, e := range newest {
			for block := e.first; block < e.end; block++ {
				c.reapBlock(block, e.number)
			}
		}
		return
	}
	for s := range c.arena.Headers {
		h := &c.arena.Headers[s]
		block := h.Block.Load() & blockMask
		if n := h.Number.Load(); n != 0 {
			if z := coveringIn(newest, block); z > n {
				c.reapBlock(block, z)
			}
		}
	}
}

func (c *Cache) reapBlock(block, number uint64) {
	sh := c.shardOf(block)
	sh.mu.Lock()
	old := c.newest(sh, block)
	for old != noSlot && c.arena.Headers[old].Number.Load() >= number {
		old = c.older(old, block)
	}
	sh.mu.Unlock()
	if old == noSlot {
		return
	}
	var freed [4]uint32
	gone := freed[:0]
	c.pub.Lock()
	sh.mu.Lock()
	for s := c.newest(sh, block); s != noSlot; {
		older := c.older(s, block)
		if c.arena.Headers[s].Number.Load() < number {
			c.sealed.remove(s)
			c.home.remove(s)
			if c.pass.left.remove(s) || c.pass.taken.remove(s) {
				c.passSlots.Add(-1)
			}
			gone = append(gone, c.drop(sh, block, s))
		}
		s = older
	}
	sh.mu.Unlock()
	c.pub.Unlock()
	c.releaseAll(gone)
}

// Again says that what Zeroes and Next gave since the last Synced is not home for sure: all of it stays dirty, and the sweep
// starts again at the lowest block.
func (c *Cache) Again() {
	p := &c.pass
	c.unpinBridges()
	for s, ok := p.taken.next(0); ok; s, ok = p.taken.next(s + 1) {
		p.taken.remove(s)
		p.left.add(s)
	}
	p.zeroes = p.zeroes[:0]
	c.restartPass()
}

func (c *Cache) unpinBridges() {
	for _, s := range c.pass.pinned {
		c.unpin(s)
	}
	c.pass.pinned = c.pass.pinned[:0]
}
