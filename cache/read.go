package cache

import "syscall"

// Read starts a read. Blocks that are resident answer at once; the others are read from home. A read whose data could
// still vanish at the level of the volume ends when they no longer can.
func (c *Cache) Read(op *Op) {
	op.reset(kindRead)
	c.stats.reads.Add(1)
	c.stats.readBytes.Add(uint64(op.Len))
	if !c.tryRead(op) {
		c.stats.waits.Add(1)
		c.readQueue.push(op)
		c.wake()
	}
}

// tryRead reports false where no slots could be had for what is not resident; nothing is held then.
func (c *Cache) tryRead(op *Op) bool {
	n := op.blocks()
	misses := c.pinResident(op, n)
	if misses == 0 {
		c.stats.hits.Add(1)
		c.finishRead(op)
		return true
	}
	spare, ok := c.reserve(op.spare[:0], misses)
	op.spare = spare
	if !ok {
		for _, r := range op.refs {
			if r.slot < refPending {
				c.unpinQuietly(r.slot)
			}
		}
		op.refs = op.refs[:0]
		return false
	}
	c.stats.misses.Add(1)
	op.pending.Store(1)
	c.fillMissing(op)
	if op.pending.Add(-1) == 0 {
		c.finishRead(op)
	}
	return true
}

// pinResident pins what is there and counts what is not.
func (c *Cache) pinResident(op *Op, n int) (misses int) {
	op.refs = op.refs[:0]
	for i := range n {
		block := op.first + uint64(i)
		sh := c.shardOf(block)
		sh.mu.Lock()
		r, ok := c.lookup(sh, block, touched(op.span(i)))
		sh.mu.Unlock()
		if !ok {
			r.slot = refPending
			misses++
		}
		op.refs = append(op.refs, r)
	}
	return misses
}

// finishRead verifies what the read found and ends it, or parks it until what it found can no longer vanish.
func (c *Cache) finishRead(op *Op) {
	if err := syscall.Errno(op.failed.Load()); err != 0 {
		c.Release(op)
		op.end(err)
		return
	}
	for i, r := range op.refs {
		if r.slot == refHole {
			op.number = max(op.number, r.number)
			continue
		}
		if c.intact(r.slot, r.number) {
			if c.meta(r.slot).dirty != 0 {
				op.number = max(op.number, r.number)
			}
			continue
		}
		if !c.dropCorrupt(op.first+uint64(i), r) {
			c.Release(op)
			op.end(syscall.EIO)
			return
		}
		// The block is clean: home has it. All is looked up again, since what is pinned may be old by then.
		c.Release(op)
		if !c.tryRead(op) {
			c.readQueue.push(op)
		}
		return
	}
	if op.number > c.safe.Load() && !planted("unsafe-read") && c.park(op) {
		return
	}
	op.end(0)
}

// dropCorrupt takes a version whose checksum fails out of the cache if home has the same, and marks it lost if not.
// It reports whether a new look may find good data.
func (c *Cache) dropCorrupt(block uint64, r ref) bool {
	if m := c.meta(r.slot); m.dirty != 0 && !m.lost && c.repaired(r.slot, r.number) {
		return true
	}
	c.pub.Lock()
	defer c.pub.Unlock()
	sh := c.shardOf(block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if c.arena.Headers[r.slot].Number.Load() != r.number || c.newest(sh, block) != r.slot {
		return true
	}
	m := c.meta(r.slot)
	if m.lost {
		return false
	}
	if c.intact(r.slot, r.number) {
		return true // repaired meanwhile
	}
	c.stats.corrupt.Add(1)
	c.log.Error("block failed its checksum", "block", block, "number", r.number, "dirty", m.dirty != 0)
	if m.dirty == 0 {
		c.drop(sh, block, r.slot) // pinned by the caller, so the last unpin frees it
		return true
	}
	c.lose(r.slot)
	return false
}

// lose marks a dirty version as lost: it answers EIO until it is rewritten, and is never written home. The commit of its
// epoch records it; what walks a set skips it. Callers hold pub.
func (c *Cache) lose(s uint32) {
	c.redirty(s, c.meta(s).dirty, true)
	c.open.remove(s)
	c.lost[s] = struct{}{}
}

// need is the sectors that a read or the edge of a write wants of block i of op.
func (op *Op) need(i int) uint8 {
	from, to := op.span(i)
	if op.kind == kindRead {
		return touched(from, to)
	}
	return touched(from, to) &^ covered(from, to)
}

// resolve records the pinned version that answers block i of a read, or that the edge of a write is merged with.
func (op *Op) resolve(i int, r ref) {
	if op.kind == kindRead {
		op.refs[i] = r
		return
	}
	for k := range op.nedges {
		if e := &op.edges[k]; e.index == i {
			e.base, e.pinned = r, true
		}
	}
}
