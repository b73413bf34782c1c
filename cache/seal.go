package cache

import (
	"slices"
	"syscall"
)

// Version is a version of a block that belongs to the seal that is being committed.
type Version struct {
	Number uint64 // of the block
	Valid  uint8  // bit i: sector i is present
	Dirty  uint8  // bit i: sector i is not yet home and synced; subset of Valid
	Data   []byte // BlockBytes; does not change before Synced or Again
}

// sortSlots bounds how many sealed slots are sorted at once, and so the memory that a commit needs whatever its size.
const sortSlots = 1 << 16

// pass is the state of the one who commits; only the flusher's goroutine touches it.
type pass struct {
	sealed bitmap // not yet taken
	taken  bitmap // given out since the last Synced or Again
	from   uint64 // blocks before it were taken in this pass
	sorted []keyed
	zeroes []extent // given out since the last Synced or Again
	zeroed bool     // the extents of the seal were given out in this pass
	pinned []uint32 // by Bridge
	lost   []uint32 // slots of the seal that were lost and still hold; those that do not at its end are dropped then
}

type keyed struct {
	block uint64
	slot  uint32
}

// Seal takes a number: everything that was published before it belongs to the seal. The seal before must have been
// committed. It reports the bytes that are dirty in it.
func (c *Cache) Seal() (seal uint64, dirtyBytes int64) {
	c.pub.Lock()
	seal = c.nextNumber()
	c.arena.SetPublished(seal)
	c.seal, c.sealing = seal, true
	c.pass.sealed, c.open.bitmap = c.open.bitmap, c.pass.sealed
	dirtyBytes = int64(c.pass.sealed.n) * BlockBytes
	c.sealedSlots.Store(int64(c.pass.sealed.n))
	c.open.count.Store(0)
	c.waitSealed.join(c.waitOpen)
	c.waitOpen = opList{}
	c.waiting.Store(false)
	c.sealedSince, c.openSince = c.openSince, 0
	c.zeroes.mu.RLock()
	c.zeroes.sealed = append(c.zeroes.sealed[:0], c.zeroes.segments...)
	c.zeroes.mu.RUnlock()
	c.pub.Unlock()
	c.restartPass()
	c.writeQueue.kick()
	return seal, dirtyBytes
}

func (c *Cache) restartPass() {
	c.pass.from, c.pass.sorted, c.pass.zeroed = 0, c.pass.sorted[:0], false
}

// Zeroes gives the extents of the seal that are not home yet, as ranges of bytes, oldest first. They go home before any block.
func (c *Cache) Zeroes(give func(off, n int64)) {
	p := &c.pass
	if p.zeroed {
		return
	}
	p.zeroed = true
	c.pub.Lock()
	p.zeroes = c.zeroes.upTo(c.seal)
	c.pub.Unlock()
	for _, e := range p.zeroes {
		give(int64(e.first)*BlockBytes, int64(e.end-e.first)*BlockBytes)
	}
}

// Next fills dst with versions of the seal, ascending, each once per pass, and returns how many; 0 ends the pass. Each was
// verified; one whose checksum fails is recorded as lost instead. What an extent of the seal supersedes is left out.
func (c *Cache) Next(dst []Version) int {
	p := &c.pass
	n := 0
	for n < len(dst) {
		if len(p.sorted) == 0 && !c.sortNext() {
			break
		}
		k := p.sorted[0]
		p.sorted = p.sorted[1:]
		p.from = k.block + 1
		if !p.sealed.remove(k.slot) {
			continue
		}
		if planted("drain-skips") && k.block%64 == 17 {
			p.taken.add(k.slot)
			continue
		}
		p.taken.add(k.slot)
		number := c.arena.Headers[k.slot].Number.Load()
		m := c.meta(k.slot)
		switch {
		case m.lost || coveringIn(c.zeroes.sealed, k.block) > number:
		case !c.intact(k.slot, number):
			c.loseSealed(k.slot)
		default:
			dst[n] = Version{Number: k.block, Valid: m.valid, Dirty: m.dirty, Data: c.arena.Data(k.slot)}
			n++
		}
	}
	c.earn(int64(n))
	return n
}

func (c *Cache) loseSealed(s uint32) {
	c.pub.Lock()
	defer c.pub.Unlock()
	m := c.meta(s)
	c.log.Error("block failed its checksum on the way home", "block", m.block)
	c.stats.corrupt.Add(1)
	c.redirty(s, m.dirty, true)
	c.stats.lost.Add(1)
}

// sortNext sorts the lowest of the sealed slots that come next; false when none are left.
func (c *Cache) sortNext() bool {
	p := &c.pass
	all := p.sorted[:0:cap(p.sorted)]
	if cap(all) < sortSlots {
		all = c.sortBuffer[:0]
	}
	limit := ^uint64(0)
	for s, ok := p.sealed.next(0); ok; s, ok = p.sealed.next(s + 1) {
		block := c.arena.Headers[s].Block.Load() & blockMask
		if block < p.from || block >= limit {
			continue
		}
		if len(all) == cap(all) {
			sortKeyed(all)
			all = all[:len(all)/2]
			limit = all[len(all)-1].block + 1
			if block >= limit {
				continue
			}
		}
		all = append(all, keyed{block, s})
	}
	sortKeyed(all)
	p.sorted = all
	return len(all) > 0
}

func sortKeyed(k []keyed) {
	slices.SortFunc(k, func(a, b keyed) int {
		if a.block < b.block {
			return -1
		}
		return 1
	})
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

// pubStep is how many slots turn clean under one hold of pub.
const pubStep = 128

// Synced says that all that Zeroes and Next gave since the last Synced or Again is home and synced: it turns clean.
func (c *Cache) Synced() {
	p := &c.pass
	c.unpinBridges()
	// Extents go first: while a newer block in the range of one is dirty, nothing depends on which of the two is found.
	for _, e := range p.zeroes {
		c.reap(e)
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
			gone = c.turnClean(s, gone)
			s, ok = p.taken.next(s + 1)
		}
		c.sealedSlots.Store(int64(p.sealed.n + p.taken.n))
		c.pub.Unlock()
		c.releaseAll(gone)
	}
	c.sealedSlots.Store(int64(p.sealed.n))
	c.fertile()
	c.writeQueue.kick()
	c.readQueue.kick()
}

// turnClean marks a version that is home and synced; one that was superseded meanwhile is dropped. Callers hold pub.
func (c *Cache) turnClean(s uint32, gone []uint32) []uint32 {
	m := c.meta(s)
	sh := c.shardOf(m.block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	newest := c.newest(sh, m.block) == s
	if m.lost && (newest || !wellFormed(c.arena.Headers[s].Block.Load())) {
		c.pass.lost = append(c.pass.lost, s)
		return gone
	}
	c.redirty(s, 0, m.lost)
	if !newest {
		gone = append(gone, c.drop(sh, m.block, s))
	}
	return gone
}

// reap drops every version that an extent superseded, wherever the pass has it, so that the extent may be forgotten.
func (c *Cache) reap(e extent) {
	if e.end-e.first <= uint64(len(c.arena.Headers)) {
		for block := e.first; block < e.end; block++ {
			c.reapBlock(block, e.number)
		}
		return
	}
	for s := range c.arena.Headers {
		h := &c.arena.Headers[s]
		block := h.Block.Load() & blockMask
		if n := h.Number.Load(); n != 0 && n < e.number && block >= e.first && block < e.end {
			c.reapBlock(block, e.number)
		}
	}
}

func (c *Cache) reapBlock(block, number uint64) {
	sh := c.shardOf(block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for s := c.newest(sh, block); s != noSlot; {
		older := c.older(s, block)
		if c.arena.Headers[s].Number.Load() < number {
			c.pass.sealed.remove(s)
			c.pass.taken.remove(s)
			if freed := c.drop(sh, block, s); freed != noSlot {
				c.release(freed)
			}
		}
		s = older
	}
}

// Again says that what Zeroes and Next gave since the last Synced is not home for sure: all of it stays dirty, and the pass
// starts again at the lowest block.
func (c *Cache) Again() {
	p := &c.pass
	c.unpinBridges()
	for s, ok := p.taken.next(0); ok; s, ok = p.taken.next(s + 1) {
		p.taken.remove(s)
		p.sealed.add(s)
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

// Committed says that the whole seal is home and synced. Those who waited for it are answered.
func (c *Cache) Committed(seal uint64) {
	c.pub.Lock()
	c.sealing, c.committed, c.sealedSince = false, seal, 0
	if c.safe.Load() < seal {
		c.safe.Store(seal)
	}
	done := c.waitSealed
	c.waitSealed = opList{}
	rewritten := c.dropLost()
	c.pub.Unlock()
	c.releaseAll(rewritten)
	c.readQueue.kick()
	c.writeQueue.kick()
	done.each(func(op *Op) { op.end(0) })
}

// dropLost drops the lost versions of the seal that were rewritten while it was committed. Callers hold pub.
func (c *Cache) dropLost() (gone []uint32) {
	for _, s := range c.pass.lost {
		block := c.meta(s).block
		sh := c.shardOf(block)
		sh.mu.Lock()
		if c.newest(sh, block) != s {
			gone = append(gone, c.drop(sh, block, s))
		}
		sh.mu.Unlock()
	}
	c.pass.lost = c.pass.lost[:0]
	return gone
}

// Failed says that the backing refuses the commit. Writes and flushes that wait for one are told; what they wrote stays
// dirty and the commit is tried again. Reads go on waiting, since they may not return what could still vanish.
func (c *Cache) Failed(error) {
	c.pub.Lock()
	told := c.waitSealed
	told.join(c.waitOpen)
	c.waitSealed, c.waitOpen = opList{}, opList{}
	c.pub.Unlock()
	var reads opList
	told.each(func(op *Op) {
		if op.kind == kindRead {
			reads.push(op)
		} else {
			op.end(syscall.EIO)
		}
	})
	reads.each(func(op *Op) {
		if !c.park(op) {
			op.end(0)
		}
	})
}

// Pressed tells whether the next seal should not wait: somebody waits for a commit, or memory is getting short.
func (c *Cache) Pressed() bool {
	return c.waiting.Load() || !c.writeQueue.empty() || !c.readQueue.empty() || c.open.count.Load() > c.openLimit/2 ||
		c.zeroesUsed() > len(c.arena.Zeroes)/2
}
