package cache

// Scrub verifies every resident block once, slot by slot, and calls pause after every step of slots; it ends early when
// pause reports false. A clean block that fails is dropped, home has it; a dirty one is recorded as lost.
func (c *Cache) Scrub(step int, pause func() bool) {
	for i := range c.arena.Headers {
		if i%step == 0 && !pause() {
			return
		}
		c.scrubSlot(uint32(i))
	}
}

func (c *Cache) scrubSlot(s uint32) {
	h := &c.arena.Headers[s]
	block := h.Block.Load() & blockMask
	sh := c.shardOf(block)
	sh.mu.Lock()
	number := h.Number.Load()
	ok := number != 0 && c.newest(sh, block) == s && !c.meta(s).lost
	if ok {
		c.state[s].Add(1)
	}
	sh.mu.Unlock()
	if number != 0 && !wellFormed(h.Block.Load()) {
		c.stats.corrupt.Add(1)
		c.log.Error("slot has a damaged header", "slot", s, "number", number)
	}
	if !ok {
		return
	}
	if !c.intact(s, number) {
		c.dropCorrupt(block, ref{s, number})
	}
	c.unpin(s)
	c.stats.scrubbed.Add(BlockBytes)
}
