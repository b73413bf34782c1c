package cache

import "syscall"

// Version is a version of a block that is lent to be written.
type Version struct {
	Number   uint64 // of the block
	Sequence uint64 // of the version: its place in the order of everything
	Sum      uint32 // CRC32C of all of Data; only Take tells it
	Valid    uint8  // bit i: sector i is present
	Dirty    uint8  // bit i: sector i is not yet home and synced; subset of Valid
	Data     []byte // BlockBytes; does not change while it is lent
}

// Seal takes a number: everything that was published before it belongs to the seal. The seal before must have been
// committed. It reports the blocks of the seal in bytes, and whether anything was published since the seal before.
func (c *Cache) Seal() (seal uint64, dirtyBytes int64, changed bool) {
	c.pub.Lock()
	changed = c.lastWrite > c.seal
	seal = c.nextNumber()
	c.arena.SetPublished(seal)
	c.seal = seal
	c.sealed.exchange(&c.open.bitmap)
	c.open.count.Store(0)
	dirtyBytes = int64(c.sealed.n) * BlockBytes
	c.waitSealed.join(c.waitOpen)
	c.waitOpen = opList{}
	c.waiting.Store(false)
	c.sealedSince, c.openSince = c.openSince, 0
	c.zeroes.seal()
	c.hollow = !changed && dirtyBytes == 0
	hollow := c.hollow
	c.pub.Unlock()
	c.take.restart()
	if !hollow {
		c.writeQueue.kick()
	}
	return seal, dirtyBytes, changed
}

// NewZeroes gives the extents of the seal that no commit holds yet, oldest first.
func (c *Cache) NewZeroes(give func(first, blocks, sequence uint64)) {
	c.pub.Lock()
	found := c.zeroes.between(c.committed.Load(), c.seal)
	c.pub.Unlock()
	for _, e := range found {
		give(e.first, e.end-e.first, e.number)
	}
}

// Take fills dst with versions of the seal for its commit, ascending, each once, and returns how many; 0 ends the walk. Each
// was verified; one whose checksum fails and that cannot be repaired is recorded as lost instead. What an extent of the
// seal supersedes is left out. They are lent until Committed, or the next Retake.
func (c *Cache) Take(dst []Version) int {
	n := 0
	for n < len(dst) {
		given := c.take.next(c, &c.sealed.bitmap, len(dst)-n)
		if len(given) == 0 {
			break
		}
		for _, k := range given {
			if planted("commit-skips") && k.block%64 == 17 {
				continue
			}
			number, m := c.arena.Headers[k.slot].Number.Load(), c.meta(k.slot)
			if m.lost || coveringIn(c.zeroes.sealed, k.block) > number {
				continue
			}
			data := c.arena.Data(k.slot)
			all := sum(data, allValid)
			if !c.intactSum(k.slot, number, all) && !c.mend(k.slot, number) {
				continue
			}
			dst[n] = Version{Number: k.block, Sequence: number, Sum: all, Valid: m.valid, Dirty: m.dirty, Data: data}
			n++
		}
	}
	c.earnCommit(int64(n))
	return n
}

// Retake starts the walk of Take again.
func (c *Cache) Retake() { c.take.restart() }

// LostBlocks gives the blocks that are lost as of seal, which is the newest or the newest committed one: what nobody can read
// until it is written again.
func (c *Cache) LostBlocks(seal uint64, give func(block, sequence uint64)) {
	type lostBlock struct{ block, number uint64 }
	var found []lostBlock
	c.pub.Lock()
	segments := c.zeroes.committed
	if seal == c.seal {
		segments = c.zeroes.sealed
	}
	for s := range c.lost {
		block, number := c.meta(s).block, c.arena.Headers[s].Number.Load()
		if number <= seal && c.placed(s) && coveringIn(segments, block) < number && !c.superseded(s, block, seal) {
			found = append(found, lostBlock{block, number})
		}
	}
	c.pub.Unlock()
	for _, l := range found {
		give(l.block, l.number)
	}
}

// placed tells whether the header of slot s still says which block it holds.
func (c *Cache) placed(s uint32) bool { return wellFormed(c.arena.Headers[s].Block.Load()) }

// superseded tells whether a newer version of the block of slot s, at most limit, is there. Callers hold pub or nothing.
func (c *Cache) superseded(s uint32, block, limit uint64) bool {
	sh := c.shardOf(block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return c.supersededLocked(sh, s, block, limit)
}

// supersededLocked is superseded for callers that hold the lock of the shard. A slot that is out of the index counts as
// superseded.
func (c *Cache) supersededLocked(sh *shard, s uint32, block, limit uint64) bool {
	at := c.newest(sh, block)
	for ; at != noSlot && at != s; at = c.older(at, block) {
		if c.arena.Headers[at].Number.Load() <= limit {
			return true
		}
	}
	return at == noSlot
}

// mend repairs a version whose checksum fails from where it is written besides, or records it as lost. It reports whether
// the data are good now.
func (c *Cache) mend(s uint32, number uint64) bool {
	if c.repaired(s, number) {
		return true
	}
	c.pub.Lock()
	defer c.pub.Unlock()
	c.stats.corrupt.Add(1)
	c.log.Error("block failed its checksum on its way out and is lost", "block", c.meta(s).block, "number", number)
	c.lose(s)
	return false
}

// repaired looks for the data of a version elsewhere and puts them into its slot, if they have its checksum.
func (c *Cache) repaired(s uint32, number uint64) bool {
	m := c.meta(s)
	if c.repair == nil || !c.placed(s) {
		return false
	}
	found := make([]byte, BlockBytes) // rare: memory went bad
	if !c.repair(m.block, number, found) || uint32(c.arena.Headers[s].Check.Load())^m.mix(number) != sum(found, m.valid) {
		return false
	}
	copy(c.arena.Data(s), found)
	c.stats.corrupt.Add(1)
	c.stats.repaired.Add(1)
	c.log.Warn("block failed its checksum and was repaired", "block", m.block, "number", number)
	return true
}

// Committed says that the whole seal is committed. Those who waited for it are answered.
func (c *Cache) Committed(seal uint64) {
	c.pub.Lock()
	hollow := c.hollow
	c.committed.Store(seal)
	c.sealedSince = 0
	if c.safe.Load() < seal {
		c.safe.Store(seal)
	}
	done := c.waitSealed
	c.waitSealed = opList{}
	if c.journaled {
		c.zeroes.commit()
	}
	c.pub.Unlock()
	done.each(func(op *Op) { op.end(0) })
	if hollow {
		return
	}
	c.readQueue.kick()
	c.writeQueue.kick()
	if c.journaled {
		c.settle()
	}
}

// pubStep is how many slots change their standing under one hold of pub.
const pubStep = 128

// settle gives the versions of a seal that was committed to the way home. What they supersede need not go there any more.
func (c *Cache) settle() {
	var dropped [2 * pubStep]uint32
	for more := true; more; {
		gone := dropped[:0]
		c.pub.Lock()
		s, ok := c.sealed.next(0)
		for n := 0; ok && n < pubStep; n++ {
			c.sealed.remove(s)
			gone = c.settleSlot(s, gone)
			s, ok = c.sealed.next(s + 1)
		}
		more = c.sealed.n > 0
		c.pub.Unlock()
		c.releaseAll(gone)
	}
	c.fertile()
	c.writeQueue.kick()
}

// settleSlot gives one version to the way home. Callers hold pub.
func (c *Cache) settleSlot(s uint32, gone []uint32) []uint32 {
	m := c.meta(s)
	if !c.placed(s) {
		if !m.lost {
			c.lose(s)
		}
		return gone
	}
	if !m.lost {
		c.home.add(s)
	}
	sh := c.shardOf(m.block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for old := c.older(s, m.block); old != noSlot; {
		next := c.older(old, m.block)
		if c.home.remove(old) {
			gone = append(gone, c.drop(sh, m.block, old))
		}
		old = next
	}
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

// Refuse lets writes be answered EIO at once, or ends that: the backing does nothing any more, and nobody knows for how long.
// Reads of what is resident go on.
func (c *Cache) Refuse(on bool) {
	c.refusing.Store(on)
	c.writeQueue.kick()
}

// Commits changes when writes are answered from now on: only once they are committed, or at once. What was answered at once
// before may be read on.
func (c *Cache) Commits(on bool) {
	c.pub.Lock()
	defer c.pub.Unlock()
	if c.commits.Load() == on {
		return
	}
	c.commits.Store(on)
	if on {
		c.safe.Store(c.arena.Published())
		return
	}
	c.safe.Store(^uint64(0))
}
