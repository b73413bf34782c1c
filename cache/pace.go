package cache

import "sync/atomic"

// pacing is what bounds the writes. Above half of a bound they go on at the pace at which room is made: every block that is
// committed, or that goes home, gives credit for the next, twice as many where the pacing begins, as many at the bound. So
// a burst runs at the speed of memory and what goes on for long at the speed of the backing, and nobody meets a wall.
type pacing struct {
	// commit bounds what is uncommitted, paced by the commits; home what is dirty and how full the journal is, paced by
	// the way home.
	commit, home pace

	limit     atomic.Int64 // blocks that may be uncommitted
	most      int64        // the highest limit there may be: max_dirty, and a third of the slots
	slots     int64        // blocks that may be dirty
	room      atomic.Int64 // blocks that the journal can take now; without a journal any number
	ringUsed  atomic.Int64 // blocks of the journal in use
	ringTotal atomic.Int64 // blocks of the journal; 0 without
}

// pace is one bound with its credit.
type pace struct {
	credit  atomic.Int64
	starved atomic.Bool // somebody was refused since room was made last
}

func (p *pacing) init(slots, maxDirty int64) {
	p.most = slots / 3
	p.slots = slots - slots/4
	p.room.Store(1 << 62)
	p.setLimit(maxDirty)
	p.most = p.limit.Load()
	p.commit.credit.Store(p.limit.Load()/8 + 1)
	p.home.credit.Store(p.slots/8 + 1)
}

// setLimit changes how many blocks may be uncommitted, up to most; 0: most.
func (p *pacing) setLimit(blocks int64) {
	if blocks <= 0 || blocks > p.most {
		blocks = p.most
	}
	p.limit.Store(max(2, blocks))
}

// allows tells whether the bound lets used, which includes the request, rise so far.
func (p *pace) allows(used, limit int64) bool {
	return used <= limit/2 || used <= limit && p.credit.Load() > 0
}

// spend takes the credit that a request of n blocks needs.
func (p *pace) spend(used, limit, n int64) {
	if used > limit/2 {
		p.credit.Add(-n)
	}
}

// earn gives credit for n blocks for which room was made.
func (p *pace) earn(n, used, limit int64) {
	half := max(1, limit/2)
	room := max(0, min(half, limit-used))
	p.credit.Store(min(limit/8+1, p.credit.Load()+n+n*room/half))
	p.starved.Store(false)
}

// uncommitted is the blocks that the loss of the memory would lose. Without a journal the sealed ones are on their way
// home and bound by the memory.
func (c *Cache) uncommitted() int64 {
	if !c.journaled {
		return c.open.count.Load()
	}
	return c.open.count.Load() + c.sealed.count.Load()
}

// commitLimit is how many blocks may be uncommitted now.
func (c *Cache) commitLimit() int64 { return min(c.pacing.limit.Load(), c.pacing.room.Load()) }

// homeLoad is how far the way home is behind: dirty blocks against those that may be, or the journal against its size,
// whichever is fuller.
func (c *Cache) homeLoad(reserved int64) (used, limit int64) {
	p := &c.pacing
	open := c.uncommitted() + reserved
	used, limit = open+c.home.count.Load()+c.passSlots.Load(), p.slots
	if total := p.ringTotal.Load(); total > 0 {
		if filled := p.ringUsed.Load() + open; filled*limit > used*total {
			return filled, total
		}
	}
	return used, limit
}

// admit counts n slots towards the open epoch if there is room for them.
func (c *Cache) admit(n int64) bool {
	if n == 0 {
		return true
	}
	p := &c.pacing
	reserved := c.reserved.Add(n)
	used, limit := c.uncommitted()+reserved, c.commitLimit()
	homeUsed, homeLimit := c.homeLoad(reserved)
	fits := used <= p.room.Load()
	// A request that is larger than its bound goes when it is alone: there is nothing that it could wait for.
	switch {
	case !fits || !p.commit.allows(used, limit) && used != n:
		p.commit.starved.Store(true)
		if !fits {
			p.home.starved.Store(true)
		}
	case c.journaled && !p.home.allows(homeUsed, homeLimit) && homeUsed != n:
		p.home.starved.Store(true)
	default:
		p.commit.spend(used, limit, n)
		if c.journaled {
			p.home.spend(homeUsed, homeLimit, n)
		}
		return true
	}
	c.reserved.Add(-n)
	return false
}

// earnCommit gives the writers credit for n blocks that were committed.
func (c *Cache) earnCommit(n int64) {
	c.pacing.commit.earn(n, c.uncommitted(), c.commitLimit())
	c.writeQueue.kick()
}

// earnHome gives the writers credit for n blocks that went home.
func (c *Cache) earnHome(n int64) {
	used, limit := c.homeLoad(c.reserved.Load())
	c.pacing.home.earn(n, used, limit)
	c.writeQueue.kick()
}

// Room says how many blocks the journal can take now, and how many of its blocks are in use.
func (c *Cache) Room(blocks, used, total int64) {
	p := &c.pacing
	p.room.Store(blocks)
	p.ringUsed.Store(used)
	p.ringTotal.Store(total)
	c.writeQueue.kick()
}

// Limit changes how many bytes may be uncommitted, up to MaxDirtyBytes; 0: that.
func (c *Cache) Limit(bytes int64) {
	blocks := bytes / BlockBytes
	if bytes > 0 {
		blocks = max(blocks, 2)
	}
	c.pacing.setLimit(blocks)
	c.writeQueue.kick()
}

// PressedToCommit tells whether the next seal should not wait: somebody waits for a commit, or the bound on what is
// uncommitted is near.
func (c *Cache) PressedToCommit() bool {
	if c.waiting.Load() || c.uncommitted() > c.commitLimit()/2 || c.openZeroes() > len(c.arena.Zeroes)/4 {
		return true
	}
	starved := c.pacing.commit.starved.Load()
	if !c.journaled {
		starved = starved || !c.writeQueue.empty() || !c.readQueue.empty() || c.zeroesUsed() > len(c.arena.Zeroes)/2
	}
	return starved && c.open.count.Load() > 0 || !c.journaled && starved
}

// PressedHome tells whether committed blocks should go home now: memory is short, or the journal is.
func (c *Cache) PressedHome() bool {
	used, limit := c.homeLoad(0)
	return c.home.count.Load() > int64(len(c.arena.Headers))/4 || used > limit/4 || c.pacing.home.starved.Load() ||
		c.zeroesUsed() > len(c.arena.Zeroes)/4 || !c.readQueue.empty() || !c.writeQueue.empty()
}
