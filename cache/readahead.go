package cache

import "sync"

const (
	streamCount = 16
	// aheadFirst and aheadMost bound what is read ahead of a stream, in blocks: the window doubles with each miss at
	// its end.
	aheadFirst = 16
	aheadMost  = 512
)

// streams remembers where the last sequential readers are expected next.
type streams struct {
	mu     sync.Mutex
	expect [streamCount]stream
	oldest int
}

type stream struct {
	next   uint64 // block at which the next miss of the stream comes
	window uint64 // blocks
}

// window tells how far to read ahead after a miss on the blocks [first, end).
func (t *streams) window(first, end uint64) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.expect {
		s := &t.expect[i]
		if s.next != 0 && first <= s.next && s.next < end+aheadFirst && s.next <= first+aheadFirst {
			s.window = min(aheadMost, max(aheadFirst, 2*s.window))
			s.next = end + s.window
			return s.window
		}
	}
	t.expect[t.oldest] = stream{next: end}
	t.oldest = (t.oldest + 1) % streamCount
	return 0
}

// readAhead reads on behind a miss where a stream is seen.
func (c *Cache) readAhead(first, end uint64) {
	if n := c.streams.window(first, end); n > 0 && c.free.Load() > int64(len(c.arena.Headers)/16) || n > 0 && !c.barren.Load() {
		c.Prefetch(end, end+n)
	}
}

// Prefetch starts to read the blocks [first, end) that are not resident, as far as slots can be had without waiting. It
// returns how many blocks it started to read.
func (c *Cache) Prefetch(first, end uint64) int {
	end = min(end, uint64(c.size/BlockBytes))
	started := 0
	var run *fill
	for block := first; block < end; block++ {
		if run != nil && run.n == fillBlocks {
			c.startFill(run)
			run = nil
		}
		var ok bool
		if run, ok = c.prefetchOne(block, run, &started); !ok {
			break
		}
	}
	c.startFill(run)
	return started
}

// prefetchOne enters block into the fill that is being put together, unless it is resident or under way; that ends the fill.
func (c *Cache) prefetchOne(block uint64, run *fill, started *int) (*fill, bool) {
	began := c.arena.Published()
	sh := c.shardOf(block)
	sh.mu.Lock()
	wanted := c.absent(sh, block)
	sh.mu.Unlock()
	if !wanted {
		c.startFill(run)
		return nil, true
	}
	var slot [1]uint32
	got, ok := c.reserve(slot[:0], 1)
	if !ok {
		return run, false
	}
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if !c.absent(sh, block) {
		c.release(got[0])
		c.startFill(run)
		return nil, true
	}
	if run == nil {
		run = newFill(block, began)
	}
	run.enter(sh, got[0])
	*started++
	return run, true
}

// absent tells whether nothing is known of block, and nobody reads it. Callers hold sh.mu.
func (c *Cache) absent(sh *shard, block uint64) bool {
	return c.newest(sh, block) == noSlot && c.zeroes.covering(block) == 0 && sh.fills[block] == nil
}

// fillStep is how many blocks FillAll has under way at once.
const fillStep = 8 * fillBlocks

// FillAll reads the whole volume into a memory that is large enough for it, while requests go on. It leaves a part of the
// slots free for writes, and ends when the device is resident, the free slots are used up, or stop is closed.
func (c *Cache) FillAll(stop <-chan struct{}, pause func()) {
	spare := int64(len(c.arena.Headers) / 32)
	blocks := uint64(c.size / BlockBytes)
	for at := uint64(0); at < blocks; at += fillBlocks {
		for c.fills.busy.Load() > fillStep/fillBlocks || c.free.Load() <= spare+fillBlocks {
			if c.fills.busy.Load() == 0 && c.free.Load() <= spare+fillBlocks {
				return
			}
			select {
			case <-stop:
				return
			case <-c.stop:
				return
			default:
				pause()
			}
		}
		c.Prefetch(at, at+fillBlocks)
		c.stats.fillAt.Store(at + fillBlocks)
	}
	c.stats.fillAt.Store(blocks)
}
