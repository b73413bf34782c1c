package cache

// Cut ends every operation that waits for a commit: none of them is answered. Later ones that would wait are cut too.
func (c *Cache) Cut() {
	c.pub.Lock()
	c.closed = true
	waiting := c.waitSealed
	waiting.join(c.waitOpen)
	c.waitSealed, c.waitOpen = opList{}, opList{}
	c.pub.Unlock()
	waiting.each(c.abandon)
}

// Close stops the goroutines of the cache and cuts what still waits. No operation may be started afterwards. The arena stays
// open.
func (c *Cache) Close() {
	c.Cut()
	close(c.stop)
	c.queues.Wait()
	c.fills.close()
	c.wg.Wait()
	for _, q := range [2]*queue{c.readQueue, c.writeQueue} {
		for op := q.pop(); op != nil; op = q.pop() {
			if op.staged {
				c.Abort(op)
			}
			c.abandon(op)
		}
	}
	c.free.Store(0)
}
