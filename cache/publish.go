package cache

import "syscall"

type publishResult int

const (
	published    publishResult = iota
	publishStale               // a version that the operation was merged with holds no more
	publishFull                // no entry for a zero extent is left
)

// publish makes a staged write or zero visible: under one lock it takes the next number, its blocks become the newest
// versions, and the stream goes on. This is the only place where a number is given to a write.
func (c *Cache) publish(op *Op) publishResult {
	c.releaseAll(op.spare)
	whole := op.wholeBlocks()

	c.pub.Lock()
	if whole.end > whole.first && c.zeroes.full() {
		c.pub.Unlock()
		op.spare = op.spare[:0]
		return publishFull
	}
	if !c.basesHold(op) {
		c.pub.Unlock()
		op.spare = op.spare[:0]
		return publishStale
	}
	number := c.nextNumber()
	if planted("publish-early") {
		c.arena.SetPublished(number)
	}
	if planted("clear-early") {
		c.clearOld(op)
	}
	for _, s := range op.slots {
		c.number(s, number)
	}
	if whole.end > whole.first {
		c.zeroes.store(whole.first, whole.end, number)
	}
	c.arena.SetPublished(number)
	crashPoint()
	dropped := op.spare[:0]
	for i, s := range op.slots {
		dropped = c.show(op.blockOf(i), s, dropped)
		crashPoint()
	}
	if whole.end > whole.first {
		c.zeroes.show(whole.first, whole.end, number, c.seal)
	}
	c.opened()
	c.lastWrite = number
	c.pub.Unlock()

	c.unpinEdges(op)
	c.releaseAll(dropped)
	op.spare, op.slots, op.number = dropped[:0], op.slots[:0], number
	c.unreserve(op)
	if (c.commits.Load() || op.FUA && c.flushCommits) && !planted("ack-before-commit") && c.park(op) {
		return published
	}
	op.end(0)
	return published
}

// wholeBlocks is the range that a zero covers whole.
func (op *Op) wholeBlocks() segment {
	if op.kind != kindZero {
		return segment{}
	}
	return segment{first: uint64(op.Off+BlockBytes-1) / BlockBytes, end: uint64(op.Off+op.Len) / BlockBytes}
}

// blockOf is the block that slot i of op is for.
func (op *Op) blockOf(i int) uint64 {
	if op.kind == kindZero {
		i = op.edges[i].index
	}
	return op.first + uint64(i)
}

// nextNumber is the number that comes next; it is taken once SetPublished has stored it. Callers hold pub.
func (c *Cache) nextNumber() uint64 { return c.arena.Published() + 1 }

// basesHold tells whether what the edges were merged with is still what holds. Callers hold pub.
func (c *Cache) basesHold(op *Op) bool {
	for k := range op.nedges {
		e := &op.edges[k]
		block := op.first + uint64(e.index)
		sh := c.shardOf(block)
		sh.mu.Lock()
		s, z, number := c.newest(sh, block), c.zeroes.covering(block), uint64(0)
		if s != noSlot {
			number = c.arena.Headers[s].Number.Load()
		}
		sh.mu.Unlock()
		holds := false
		switch e.base.slot {
		case refPending:
			holds = s == noSlot && z == 0
		case refHole:
			holds = z == e.base.number && number < z
		default:
			// Another slot with the same number is the same version with other sectors besides, unless the number
			// is the one that all blocks from home have.
			holds = s != noSlot && (s == e.base.slot || number > numberFilled) && number == e.base.number && z < number
		}
		if !holds {
			return false
		}
	}
	return true
}

// number gives a described slot its number. Callers hold pub.
func (c *Cache) number(s uint32, number uint64) {
	crashPoint()
	h := &c.arena.Headers[s]
	check := h.Check.Load()
	m := metaOf(h.Block.Load(), check)
	h.Check.Store(m.checkWord(number, uint32(check)^m.mix(0)))
	crashPoint()
	h.Number.Store(number)
	crashPoint()
}

// show makes slot s the newest version of its block. The version before stays if a commit or the way home needs it;
// otherwise it is dropped. Callers hold pub.
func (c *Cache) show(block uint64, s uint32, dropped []uint32) []uint32 {
	sh := c.shardOf(block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	sh.supersede(block)
	old := c.newest(sh, block)
	c.insert(sh, block, s)
	c.open.add(s)
	if old == noSlot {
		if sh.recall(block) {
			c.state[s].Or(stateMain)
		}
		return dropped
	}
	// The new version takes the standing of the old one: its queue, and one more use.
	standing := c.state[old].Load() & (stateMain | stateUses)
	if standing&stateUses != stateUses {
		standing += oneUse
	}
	c.state[s].Or(standing)
	m := c.meta(old)
	if m.dirty != 0 && c.kept(c.arena.Headers[old].Number.Load()) {
		return dropped
	}
	if m.dirty != 0 {
		c.open.remove(old)
	}
	return append(dropped, c.drop(sh, block, old))
}

// kept tells whether a dirty version has to stay although a newer one is there: it belongs to a seal, which is not committed
// yet or whose blocks are not home. Callers hold pub.
func (c *Cache) kept(number uint64) bool { return number <= c.seal }

// isSealed tells whether the commit under way covers a number. Callers hold pub.
func (c *Cache) isSealed(number uint64) bool { return number <= c.seal && number > c.committed.Load() }

// mustWait tells whether op has to wait for a commit. Callers hold pub.
func (c *Cache) mustWait(op *Op) bool {
	if op.kind == kindRead {
		return op.number > c.safe.Load()
	}
	return op.number > c.committed.Load()
}

// park puts op on the list of those who wait for a commit. It reports false where there is nothing to wait for any more.
func (c *Cache) park(op *Op) bool {
	c.pub.Lock()
	if !c.mustWait(op) {
		c.pub.Unlock()
		return false
	}
	if c.closed {
		c.pub.Unlock()
		c.abandon(op)
		return true
	}
	if c.isSealed(op.number) {
		c.waitSealed.push(op)
	} else {
		c.waitOpen.push(op)
		c.waiting.Store(true)
	}
	c.pub.Unlock()
	c.wake()
	return true
}

// Flush ends when everything that was answered before it holds at the level that a flush promises.
func (c *Cache) Flush(op *Op) {
	op.reset(kindFlush)
	c.stats.flushes.Add(1)
	if c.commits.Load() || c.flushCommits {
		c.pub.Lock()
		op.number = c.lastWrite
		c.pub.Unlock()
		if c.park(op) {
			return
		}
	}
	op.end(0)
}

// abandon ends an operation whose wait cannot end: it is not answered, its connection is cut.
func (c *Cache) abandon(op *Op) {
	if op.kind == kindRead {
		c.Release(op)
	}
	op.end(syscall.ESHUTDOWN)
}

// opList is a list of operations in order. It is not safe for concurrent use.
type opList struct{ head, tail *Op }

func (l *opList) push(op *Op) {
	op.next = nil
	if l.head == nil {
		l.head = op
	} else {
		l.tail.next = op
	}
	l.tail = op
}

func (l *opList) join(other opList) {
	if other.head == nil {
		return
	}
	if l.head == nil {
		*l = other
		return
	}
	l.tail.next = other.head
	l.tail = other.tail
}

// each calls fn for every operation; fn may give it to its owner, who may use it again.
func (l opList) each(fn func(*Op)) {
	for op := l.head; op != nil; {
		next := op.next
		op.next = nil
		fn(op)
		op = next
	}
}
