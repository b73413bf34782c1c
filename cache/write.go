package cache

import (
	"syscall"
)

// Reserve takes the slots of a write and reports whether there was room: the payload then goes into Dest, and Write or
// Abort follows. Where it reports false, Write takes the payload from op.Payload when there is room.
func (c *Cache) Reserve(op *Op) bool {
	op.reset(kindWrite)
	return op.Len > 0 && !c.refusing.Load() && c.writeQueue.empty() && c.tryReserve(op)
}

// tryReserve takes the slots of a write or zero, within the bounds of what may be uncommitted and dirty, and those for
// reading the sectors that it covers only in part.
func (c *Cache) tryReserve(op *Op) bool {
	n := op.blocks()
	op.findEdges()
	if op.kind == kindZero {
		n = op.nedges
	}
	reads := 0
	for k := range op.nedges {
		if op.need(op.edges[k].index) != 0 {
			reads++
		}
	}
	if !c.admit(int64(n)) {
		c.wake()
		return false
	}
	var ok bool
	if op.slots, ok = c.reserve(op.slots[:0], n+reads); !ok {
		c.reserved.Add(-int64(n))
		c.wake()
		return false
	}
	op.spare = append(op.spare[:0], op.slots[n:]...)
	op.slots = op.slots[:n]
	op.room = n
	for k := range op.nedges {
		if op.kind == kindZero {
			op.edges[k].slot = op.slots[k]
		} else {
			op.edges[k].slot = op.slots[op.edges[k].index]
		}
	}
	return true
}

// findEdges lists the blocks that op covers only in part: at most the first and the last.
func (op *Op) findEdges() {
	op.nedges = 0
	n := op.blocks()
	for _, i := range [2]int{0, n - 1} {
		if from, to := op.span(i); (from > 0 || to < BlockBytes) && (op.nedges == 0 || i > 0) {
			op.edges[op.nedges] = edge{index: i}
			op.nedges++
		}
	}
}

// Abort gives back what Reserve took.
func (c *Cache) Abort(op *Op) {
	c.unpinEdges(op)
	c.releaseAll(op.slots)
	c.releaseAll(op.spare)
	op.slots, op.spare = op.slots[:0], op.spare[:0]
	c.unreserve(op)
}

func (c *Cache) unreserve(op *Op) {
	c.reserved.Add(-int64(op.room))
	op.room = 0
	c.writeQueue.kick()
}

// Write publishes a write whose payload is in Dest, or starts one whose payload is in op.Payload. It ends when the level of
// the volume holds for it.
func (c *Cache) Write(op *Op) {
	c.stats.writes.Add(1)
	c.stats.writeBytes.Add(uint64(op.Len))
	if op.room > 0 {
		c.stage(op)
		return
	}
	c.stats.waits.Add(1)
	op.reset(kindWrite)
	c.writeQueue.push(op)
}

// Zero starts the zeroing of a range: one extent for the blocks that it covers whole, partial writes at its edges.
func (c *Cache) Zero(op *Op) {
	c.stats.zeroes.Add(1)
	c.stats.zeroBytes.Add(uint64(op.Len))
	op.reset(kindZero)
	if c.writeQueue.empty() && c.tryWrite(op) {
		return
	}
	c.stats.waits.Add(1)
	c.writeQueue.push(op)
}

// tryWrite starts a write or zero that waited in the queue. It reports false where there is still no room.
func (c *Cache) tryWrite(op *Op) bool {
	if c.refusing.Load() {
		c.Abort(op)
		op.end(syscall.EIO)
		return true
	}
	if op.staged {
		if op.kind == kindZero && c.zeroesFull() || c.barren.Load() && c.free.Load() < int64(op.nedges) {
			return false
		}
		c.stage(op)
		return true
	}
	if op.Len == 0 {
		op.end(0)
		return true
	}
	if op.kind == kindZero && c.zeroesFull() {
		c.wake()
		return false
	}
	if !c.tryReserve(op) {
		return false
	}
	if op.kind == kindWrite {
		rest := op.Payload
		for i := range op.slots {
			rest = rest[copy(c.Dest(op, i), rest):]
		}
	}
	c.stage(op)
	return true
}

// stage merges, checksums and publishes a write or zero whose slots hold the payload. It goes on by itself after what must
// be read from home has come.
func (c *Cache) stage(op *Op) {
	op.staged = true
	for op.failed.Load() == 0 {
		switch c.mergeEdges(op) {
		case mergeWaits:
			return
		case mergeStale:
			c.unpinEdges(op)
			continue
		case mergeLost:
			op.failed.Store(uint32(syscall.EIO))
			continue
		}
		if c.overwriteInPlace(op) {
			return
		}
		c.describeWhole(op)
		switch c.publish(op) {
		case published:
			return
		case publishFull:
			c.unpinEdges(op)
			c.wake()
			c.writeQueue.push(op)
			return
		case publishStale:
			c.unpinEdges(op)
		}
	}
	err := syscall.Errno(op.failed.Load())
	c.Abort(op)
	op.end(err)
}

// describeWhole writes the headers of the blocks that a write covers whole.
func (c *Cache) describeWhole(op *Op) {
	if op.kind == kindZero {
		return
	}
	from, to := 0, len(op.slots)
	for k := range op.nedges {
		if op.edges[k].index == 0 {
			from = 1
		} else {
			to--
		}
	}
	for i := from; i < to; i++ {
		s := op.slots[i]
		c.describe(s, meta{block: op.first + uint64(i), valid: allValid, dirty: allValid}, 0, sum(c.arena.Data(s), allValid))
	}
}

type mergeResult int

const (
	mergeDone  mergeResult = iota
	mergeWaits             // for a read from home
	mergeStale             // the base was dropped: look again
	mergeLost              // the base is lost
)

// mergeEdges completes the blocks that op covers only in part from the versions that hold now. Where sectors are written in
// part and not resident, it has them read and stage goes on when they are there.
func (c *Cache) mergeEdges(op *Op) mergeResult {
	missing := 0
	for k := range op.nedges {
		e := &op.edges[k]
		if !e.pinned && !c.findBase(op, e) {
			missing++
		}
	}
	if missing > 0 {
		return c.fillEdges(op, missing)
	}
	for k := range op.nedges {
		if r := c.merge(op, &op.edges[k]); r != mergeDone {
			return r
		}
	}
	return mergeDone
}

// findBase pins the version that the edge is merged with. It reports false where sectors of it are missing.
func (c *Cache) findBase(op *Op, e *edge) bool {
	block := op.first + uint64(e.index)
	sh := c.shardOf(block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	r, ok := c.lookup(sh, block, op.need(e.index))
	if !ok && (r.slot != refPending || op.need(e.index) != 0) {
		return false
	}
	e.base, e.pinned = r, true
	return true
}

func (c *Cache) fillEdges(op *Op, missing int) mergeResult {
	if len(op.spare) < missing {
		var ok bool
		if op.spare, ok = c.reserve(op.spare, missing-len(op.spare)); !ok {
			c.letGoOfEdges(op, c.unpinQuietly)
			c.writeQueue.push(op)
			return mergeWaits
		}
	}
	op.pending.Store(1)
	for k := range op.nedges {
		if e := &op.edges[k]; !e.pinned {
			c.startFill(c.fillBlock(op, e.index, op.first+uint64(e.index), nil))
		}
	}
	if op.pending.Add(-1) > 0 {
		return mergeWaits
	}
	return c.mergeEdges(op)
}

// unpinEdges lets go of the versions that the edges were merged with.
func (c *Cache) unpinEdges(op *Op) { c.letGoOfEdges(op, c.unpin) }

func (c *Cache) letGoOfEdges(op *Op, unpin func(uint32)) {
	for k := range op.nedges {
		e := &op.edges[k]
		if e.pinned && e.base.slot < refPending {
			unpin(e.base.slot)
		}
		e.pinned = false
	}
}

// merge completes one edge from its base and writes its header.
func (c *Cache) merge(op *Op, e *edge) mergeResult {
	from, to := op.span(e.index)
	dst := c.arena.Data(e.slot)
	if op.kind == kindZero {
		clear(dst[from:to])
	}
	m := meta{block: op.first + uint64(e.index), valid: touched(from, to), dirty: touched(from, to)}
	switch e.base.slot {
	case refPending:
	case refHole:
		// The zeroes may not be home yet: the new version must cover them.
		clear(dst[:from])
		clear(dst[to:])
		m.valid, m.dirty = allValid, allValid
	default:
		if !c.intact(e.base.slot, e.base.number) {
			if c.dropCorrupt(m.block, e.base) {
				return mergeStale
			}
			return mergeLost
		}
		base := c.meta(e.base.slot)
		old := c.arena.Data(e.base.slot)
		for i := range sectors {
			if base.valid&(1<<i) != 0 {
				start, end := i*SectorBytes, (i+1)*SectorBytes
				copy(dst[start:max(start, min(end, from))], old[start:end])
				if at := max(start, to); at < end {
					copy(dst[at:end], old[at:end])
				}
			}
		}
		m.valid |= base.valid
		m.dirty |= base.dirty
	}
	c.describe(e.slot, m, 0, sum(dst, m.valid))
	return mergeDone
}
