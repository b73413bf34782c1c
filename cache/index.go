package cache

import "sync"

// shard is a part of the index: the blocks whose hash falls into it. Its chains hold the versions of a block newest
// first, since a version is inserted at the head.
type shard struct {
	mu      sync.Mutex
	buckets []uint32         // slot+1 of the head of each chain, 0: empty
	fills   map[uint64]*fill // blocks that are being read from home
	ghost   []uint16         // fingerprints of blocks that were evicted after a single use
	_       [24]byte         // a shard to itself on its cache lines
}

const (
	shardBits  = 6
	shardCount = 1 << shardBits

	noSlot = ^uint32(0)
)

func hash(block uint64) uint64 {
	x := block * 0x9e3779b97f4a7c15
	x ^= x >> 32
	return x * 0xd6e8feb86659fd93
}

func (c *Cache) shardOf(block uint64) *shard { return &c.shards[hash(block)>>(64-shardBits)] }

// bucket spreads the low bits of the hash over any number of buckets.
func (sh *shard) bucket(block uint64) *uint32 {
	h := uint64(uint32(hash(block)))
	return &sh.buckets[h*uint64(len(sh.buckets))>>32]
}

// newest is the newest version of block, or noSlot. Callers hold sh.mu.
func (c *Cache) newest(sh *shard, block uint64) uint32 {
	return c.from(*sh.bucket(block), block)
}

// older is the next older version of the block of slot s. Callers hold the shard's lock.
func (c *Cache) older(s uint32, block uint64) uint32 { return c.from(c.next[s], block) }

func (c *Cache) from(link uint32, block uint64) uint32 {
	for link != 0 {
		s := link - 1
		if c.arena.Headers[s].Block.Load()&blockMask == block {
			return s
		}
		link = c.next[s]
	}
	return noSlot
}

// insert makes s the newest version of block. Callers hold sh.mu.
func (c *Cache) insert(sh *shard, block uint64, s uint32) {
	head := sh.bucket(block)
	c.next[s] = *head
	*head = s + 1
}

// unlink takes s out of the index. It reports false where s is not in the chain of block: its header was damaged.
// Callers hold sh.mu.
func (c *Cache) unlink(sh *shard, block uint64, s uint32) bool {
	for link := sh.bucket(block); *link != 0; link = &c.next[*link-1] {
		if *link == s+1 {
			*link = c.next[s]
			return true
		}
	}
	c.stats.corrupt.Add(1)
	c.log.Error("slot is not where its header says", "slot", s, "block", block)
	return false
}

// drop takes a version out of index and memory: it is used again once nobody pins it. A read of the block from home that is
// under way may bring what is older than the version: it comes too late. Callers hold sh.mu and pass what drop returns to
// c.release after they have unlocked; noSlot if somebody still pins it.
func (c *Cache) drop(sh *shard, block uint64, s uint32) uint32 {
	sh.supersede(block)
	if !c.unlink(sh, block, s) {
		return noSlot
	}
	if c.meta(s).lost {
		delete(c.lost, s) // with pub held: what is lost is dirty
	}
	return c.retire(s)
}

// retire clears the header of a slot that is out of the index, so that a restart does not find it.
func (c *Cache) retire(s uint32) uint32 {
	crashPoint()
	c.arena.Headers[s].Number.Store(0)
	crashPoint()
	if c.state[s].Or(stateDead)&statePins == 0 {
		return s
	}
	return noSlot
}

// A ref is a pinned slot together with the number that it had when it was pinned: its header is cleared when it is
// superseded, its data not before the pin is gone.
type ref struct {
	slot   uint32 // or refHole, refPending
	number uint64 // of the slot, or of the extent that makes the hole
}

const (
	refHole    = noSlot
	refPending = noSlot - 1
)

// lookup pins the version of block that holds if it has the sectors in need. Otherwise it reports false, and the ref
// tells what there is: a slot (not pinned) that lacks sectors, or refPending where there is nothing.
// Callers hold sh.mu.
func (c *Cache) lookup(sh *shard, block uint64, need uint8) (ref, bool) {
	s := c.newest(sh, block)
	if s == noSlot {
		if z := c.zeroes.covering(block); z != 0 {
			return ref{refHole, z}, true
		}
		return ref{refPending, 0}, false
	}
	h := &c.arena.Headers[s]
	number := h.Number.Load()
	if z := c.zeroes.covering(block); z > number {
		return ref{refHole, z}, true
	}
	if uint8(h.Block.Load()>>blockBits)&need != need {
		return ref{s, number}, false
	}
	c.pin(s)
	return ref{s, number}, true
}

// pin keeps slot s from being used again, and counts as a use for eviction. Callers hold the lock of its shard.
func (c *Cache) pin(s uint32) {
	if c.state[s].Load()&stateUses == stateUses {
		c.state[s].Add(1)
		return
	}
	c.state[s].Add(1 + oneUse)
}

// unpinQuietly is unpin without a look at who waits for slots: what it lets go of was not there for them before either.
func (c *Cache) unpinQuietly(s uint32) {
	if c.state[s].Add(^uint32(0))&(statePins|stateDead) == stateDead {
		c.release(s)
	}
}

// unpin ends a pin and frees the slot if it was superseded meanwhile.
func (c *Cache) unpin(s uint32) {
	switch c.state[s].Add(^uint32(0)) & (statePins | stateDead) {
	case stateDead:
		c.release(s)
	case 0:
		c.fertile()
	}
}
