package cache

import "sync"

// State of a slot while the process lives; one word per slot.
const (
	statePins = 1<<20 - 1
	stateDead = 1 << 20 // out of the index: free at the last unpin
	oneUse    = 1 << 21
	stateUses = 3 << 21 // uses since it was admitted or last passed over, at most 3
	stateMain = 1 << 23 // in the main queue, else in the small one
	stateRing = 1 << 24 // has a place in the ring of the small queue
)

// pool is a part of the slots with their free list and their eviction, which is S3-FIFO (Yang et al., SOSP 2023): a new
// block enters a small queue and gets into the main one only if it is used again before it has passed through, or if it
// came back soon after it was evicted. So a scan passes through a tenth of the memory and leaves the rest alone, which
// SIEVE and plain CLOCK do not promise, and a hit costs a counter, not a list operation. The main queue is a hand
// over the slots of the pool, the small one a ring of slots.
type pool struct {
	mu     sync.Mutex
	free   uint32 // slot+1 of the head of the free list, linked through Cache.next
	lo, hi uint32 // slots [lo, hi)
	hand   uint32
	ring   []uint32
	head   int // index of the oldest entry
	count  int
	_      [32]byte
}

// victimBatch is how many slots one eviction looks for, so that its lock is taken once for several misses.
const victimBatch = 32

// take moves up to len(dst) slots from the free list into dst and gives each a place in the small queue.
func (p *pool) take(c *Cache, dst []uint32) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for n < len(dst) && p.free != 0 {
		s := p.free - 1
		p.free = c.next[s]
		p.enqueue(c, s)
		dst[n] = s
		n++
	}
	return n
}

// enqueue gives slot s a place at the end of the small queue; where the ring is full its oldest slot goes to the main one.
// A slot that still has a place from its last use keeps it.
func (p *pool) enqueue(c *Cache, s uint32) {
	if c.state[s].Load()&stateRing != 0 {
		c.state[s].Store(stateRing)
		return
	}
	if p.count == len(p.ring) {
		c.promote(p.dequeue())
	}
	p.ring[(p.head+p.count)%len(p.ring)] = s
	p.count++
	c.state[s].Store(stateRing)
}

func (p *pool) dequeue() uint32 {
	s := p.ring[p.head]
	p.head = (p.head + 1) % len(p.ring)
	p.count--
	return s
}

// promote moves a slot whose place in the ring is gone to the main queue.
func (c *Cache) promote(s uint32) {
	c.state[s].Or(stateMain)
	c.state[s].And(^uint32(stateRing | stateUses))
}

// fromSmall marks a victim that was never used again after it was admitted.
const fromSmall = 1 << 31

// victims appends slots to dst that may be evicted; whether they can is decided under the lock of their block. A slot
// that leaves the ring is in the main queue from then on, so none is ever in neither.
func (p *pool) victims(c *Cache, dst []uint32) []uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	for full := len(p.ring) * 4 / 5; p.count > full && len(dst) < victimBatch; {
		s := p.dequeue()
		state := c.state[s].Load()
		c.promote(s)
		if state&(stateMain|stateUses|statePins|stateDead) == 0 && c.clean(s) {
			dst = append(dst, s|fromSmall)
		}
	}
	for scanned := 0; len(dst) < victimBatch && scanned < 4*int(p.hi-p.lo); scanned++ {
		s := p.hand
		if p.hand++; p.hand == p.hi {
			p.hand = p.lo
		}
		state := c.state[s].Load()
		switch {
		case state&stateMain == 0 || state&(stateDead|statePins) != 0 || !c.clean(s):
		case state&stateUses != 0:
			c.state[s].Add(^uint32(oneUse - 1))
		default:
			dst = append(dst, s)
		}
	}
	for len(dst) == 0 && p.count > 0 {
		s := p.dequeue()
		state := c.state[s].Load()
		c.promote(s)
		if state&(statePins|stateDead) == 0 && c.clean(s) {
			dst = append(dst, s)
		}
	}
	return dst
}

// clean tells whether slot s is published, home and synced.
func (c *Cache) clean(s uint32) bool {
	h := &c.arena.Headers[s]
	number := h.Number.Load()
	return number != 0 && h.Check.Load()&(0xff<<32|lostFlag) == 0
}

// evict frees clean slots of pool p and reports how many.
func (c *Cache) evict(p *pool) int {
	var found [victimBatch]uint32
	n := 0
	for _, s := range p.victims(c, found[:0]) {
		small := s&fromSmall != 0
		s &^= fromSmall
		block := c.arena.Headers[s].Block.Load() & blockMask
		sh := c.shardOf(block)
		sh.mu.Lock()
		ok := c.newest(sh, block) == s && c.clean(s) && c.state[s].Load()&(statePins|stateDead) == 0
		if ok {
			if small {
				sh.remember(block)
			}
			c.drop(sh, block, s)
		}
		sh.mu.Unlock()
		if ok {
			c.release(s)
			n++
		}
	}
	c.stats.evicted.Add(uint64(n))
	return n
}

// remember notes that block was evicted after a single use.
func (sh *shard) remember(block uint64) {
	at, mark := sh.fingerprint(block)
	sh.ghost[at] = mark
}

// recall tells whether block was evicted a short while ago, and forgets it.
func (sh *shard) recall(block uint64) bool {
	at, mark := sh.fingerprint(block)
	if sh.ghost[at] != mark {
		return false
	}
	sh.ghost[at] = 0
	return true
}

func (sh *shard) fingerprint(block uint64) (uint64, uint16) {
	h := hash(block)
	return uint64(uint32(h)) * uint64(len(sh.ghost)) >> 32, uint16(h>>40) | 1
}

// reserve appends n slots to dst for the caller alone, evicting clean blocks where too few are free. All or nothing.
func (c *Cache) reserve(dst []uint32, n int) ([]uint32, bool) {
	for !c.claim(int64(n)) {
		if !c.evictAny() {
			return dst, false
		}
	}
	got := len(dst)
	for range n {
		dst = append(dst, noSlot)
	}
	for turn := c.turn.Add(1); got < len(dst); turn++ {
		got += c.pools[turn%uint32(len(c.pools))].take(c, dst[got:])
	}
	return dst, true
}

// claim takes the right to n slots of the free lists.
func (c *Cache) claim(n int64) bool {
	for {
		free := c.free.Load()
		if free < n {
			return false
		}
		if c.free.CompareAndSwap(free, free-n) {
			return true
		}
	}
}

// evictAny evicts from the next pool that has something to evict. Where none has, it does not look again before a slot
// has turned clean or lost its last pin.
func (c *Cache) evictAny() bool {
	if c.barren.Load() {
		return false
	}
	c.barren.Store(true)
	for range c.pools {
		if c.evict(&c.pools[c.turn.Add(1)%uint32(len(c.pools))]) > 0 {
			c.barren.Store(false)
			c.readQueue.kick() // who came in between saw nothing to evict
			c.writeQueue.kick()
			return true
		}
	}
	return false
}

// fertile says that a slot may be evicted that could not be before.
func (c *Cache) fertile() {
	if c.barren.Load() {
		c.barren.Store(false)
		c.readQueue.kick()
		c.writeQueue.kick()
	}
}

// release gives slot s back: it is out of the index and nobody pins it.
func (c *Cache) release(s uint32) {
	p := &c.pools[int(s)/c.perPool]
	p.mu.Lock()
	c.next[s] = p.free
	p.free = s + 1
	p.mu.Unlock()
	c.free.Add(1)
	c.readQueue.kick()
	c.writeQueue.kick()
}

// releaseAll gives back what drop and retire returned.
func (c *Cache) releaseAll(slots []uint32) {
	for _, s := range slots {
		if s != noSlot {
			c.release(s)
		}
	}
}
