package cache

// Context is what Map tells about blocks.
type Context uint8

// The contexts.
const (
	Allocation Context = iota // Hole+Zero, Data, or Unknown where only home can tell
	Dirty                     // 1: not yet home and synced
	Resident                  // 1: in memory
)

// What Map says in the context Allocation.
const (
	Data     uint32 = 0
	HoleZero uint32 = 3
	Unknown  uint32 = ^uint32(0)
)

const (
	// mapBlocks and mapJumps bound the work of one Map: blocks looked up, and walks over all headers that skip what is
	// not resident.
	mapBlocks = 1 << 16
	mapJumps  = 4
	// mapPatience is how many blocks that are not resident Map looks up one by one before it walks the headers.
	mapPatience = 1 << 12
)

// Map gives the state of the range as extents of whole blocks, in order, until give refuses or the bound on the work is
// reached; so it may end before the range does, but not before its first extent.
func (c *Cache) Map(ctx Context, off, n int64, give func(n int64, flags uint32) bool) {
	block, end := uint64(off)/BlockBytes, uint64(off+n+BlockBytes-1)/BlockBytes
	start, flags := block, c.flagsOf(ctx, block)
	absent, jumps := 0, 0
	for looked := 0; block < end && looked < mapBlocks; looked++ {
		f := c.flagsOf(ctx, block)
		if f != flags {
			if !give(int64(block-start)*BlockBytes, flags) {
				return
			}
			start, flags, absent = block, f, 0
		}
		block++
		if absent++; absent > mapPatience && jumps < mapJumps && block < end && c.flagsOf(ctx, block) == flags {
			absent = 0
			jumps++
			block = max(block, c.sameUntil(block, end))
		}
	}
	if block > start {
		give(int64(block-start)*BlockBytes, flags)
	}
}

func (c *Cache) flagsOf(ctx Context, block uint64) uint32 {
	sh := c.shardOf(block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	s, z := c.newest(sh, block), c.zeroes.covering(block)
	zeroed := z != 0 && (s == noSlot || z > c.arena.Headers[s].Number.Load())
	switch {
	case ctx == Allocation && zeroed:
		return HoleZero
	case ctx == Allocation && s == noSlot:
		return Unknown
	case ctx == Allocation:
		return Data
	case zeroed:
		return 1
	case s == noSlot || ctx == Dirty && c.clean(s):
		return 0
	}
	return 1
}

// sameUntil is the first block from block on that is resident or where the extents change, at most end: all blocks before it
// have the flags of block.
func (c *Cache) sameUntil(block, end uint64) uint64 {
	end = c.zeroes.end(block, end)
	for i := range c.arena.Headers {
		h := &c.arena.Headers[i]
		if b := h.Block.Load() & blockMask; h.Number.Load() != 0 && b >= block && b < end {
			end = b
		}
	}
	return end
}
