package cache

import (
	"io"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/ramshelf/ramshelf/cache/arena"
)

const (
	// fillBlocks is the largest read from home, in blocks: long enough that a disk streams, short enough that the
	// blocks that a client waits for do not wait for many that it has not asked for.
	fillBlocks = 64
	// fillers is how many reads from home run at once. Each has a buffer of fillBlocks.
	fillers = 32
)

// fill is one read of neighboring blocks from home. Every block of it holds a slot, so the slots bound the fills.
type fill struct {
	first  uint64
	n      int
	began  uint64 // newest number before the first block was looked up
	blocks [fillBlocks]fillBlock
	next   *fill
}

// fillBlock is one block of a fill. The lock of the block's shard guards it until the fill takes it out of shard.fills.
type fillBlock struct {
	slot    uint32
	stale   bool // something was published for the block since it was entered
	waiters []waiter
}

// waiter is an operation that waits for one block of a fill.
type waiter struct {
	op    *Op
	index int
}

var fillPool = sync.Pool{New: func() any { return new(fill) }}

// newFill makes a fill; began was the newest number before its first block was looked up, so that an extent that the look-up
// missed has that number or a higher one.
func newFill(first, began uint64) *fill {
	f := fillPool.Get().(*fill)
	f.first, f.n, f.next, f.began = first, 0, nil, began
	return f
}

// enter adds the next block to a fill. Callers hold the lock of the block's shard.
func (f *fill) enter(sh *shard, slot uint32) *fillBlock {
	fb := &f.blocks[f.n]
	fb.slot, fb.stale, fb.waiters = slot, false, fb.waiters[:0]
	sh.fills[f.first+uint64(f.n)] = f
	f.n++
	return fb
}

// supersede tells a fill that it is too late for block. Callers hold sh.mu.
func (sh *shard) supersede(block uint64) {
	if f := sh.fills[block]; f != nil {
		f.blocks[block-f.first].stale = true
		delete(sh.fills, block)
	}
}

// fillQueue is the fills that no filler has taken yet.
type fillQueue struct {
	mu     sync.Mutex
	ready  sync.Cond
	head   *fill
	tail   *fill
	closed bool
	busy   atomic.Int32 // fills queued or under way
}

func (q *fillQueue) push(f *fill) {
	q.busy.Add(1)
	q.mu.Lock()
	if q.head == nil {
		q.head = f
	} else {
		q.tail.next = f
	}
	q.tail = f
	q.mu.Unlock()
	q.ready.Signal()
}

// pop waits for a fill; nil when the queue is closed.
func (q *fillQueue) pop() *fill {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.head == nil && !q.closed {
		q.ready.Wait()
	}
	f := q.head
	if f != nil {
		q.head = f.next
	}
	return f
}

func (q *fillQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.ready.Broadcast()
}

// startFill hands a fill to the fillers; nil is no fill.
func (c *Cache) startFill(f *fill) {
	if f == nil {
		return
	}
	c.startFillers.Do(func() {
		for range fillers {
			c.wg.Go(c.runFiller)
		}
	})
	c.fills.push(f)
}

// fillMissing looks again at every block of op that was not resident: it pins it if it came meanwhile, joins a read from
// home that is under way, or starts one. Neighbors are read together. It uses op.spare and gives back what is left.
func (c *Cache) fillMissing(op *Op) {
	var run *fill
	for i := range op.refs {
		if op.refs[i].slot == refPending {
			run = c.fillBlock(op, i, op.first+uint64(i), run)
		}
	}
	c.startFill(run)
	c.releaseAll(op.spare)
	op.spare = op.spare[:0]
	if op.Len > 0 && op.pending.Load() > 1 {
		c.readAhead(op.first, op.first+uint64(len(op.refs)))
	}
}

// fillBlock resolves block i of op, or makes op wait for it, and returns the fill that is being put together.
func (c *Cache) fillBlock(op *Op, i int, block uint64, run *fill) *fill {
	if run != nil && (run.first+uint64(run.n) != block || run.n == fillBlocks) {
		c.startFill(run)
		run = nil
	}
	began := c.arena.Published()
	sh := c.shardOf(block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if r, ok := c.lookup(sh, block, op.need(i)); ok {
		op.resolve(i, r)
		return run
	}
	op.pending.Add(1)
	if f := sh.fills[block]; f != nil {
		fb := &f.blocks[block-f.first]
		fb.waiters = append(fb.waiters, waiter{op, i})
		return run
	}
	if run == nil {
		run = newFill(block, began)
	}
	last := len(op.spare) - 1
	fb := run.enter(sh, op.spare[last])
	op.spare = op.spare[:last]
	fb.waiters = append(fb.waiters, waiter{op, i})
	return run
}

// runFiller reads from home until the cache is closed.
func (c *Cache) runFiller() {
	buf, err := arena.Make[byte](fillBlocks * BlockBytes)
	if err != nil {
		c.log.Error("filler could not start", "err", err)
		return
	}
	defer arena.Free(buf)
	for f := c.fills.pop(); f != nil; f = c.fills.pop() {
		c.runFill(f, buf)
		c.fills.busy.Add(-1)
	}
}

// runFill reads the blocks of f at once; where that fails, one by one, so that an error stays with its block.
func (c *Cache) runFill(f *fill, buf []byte) {
	data := buf[:f.n*BlockBytes]
	err := c.readHome(data, f.first)
	for i := range f.n {
		one := data[i*BlockBytes : (i+1)*BlockBytes]
		oneErr := err
		if err != nil && f.n > 1 {
			oneErr = c.readHome(one, f.first+uint64(i))
		}
		if oneErr != nil {
			c.stats.readErrors.Add(1)
		}
		c.finishFill(f, i, one, oneErr)
	}
	fillPool.Put(f)
}

func (c *Cache) readHome(p []byte, block uint64) error {
	n, err := c.source.ReadAt(p, int64(block)*BlockBytes)
	c.stats.filledBytes.Add(uint64(n))
	if err == io.EOF && n == len(p) {
		err = nil
	}
	return err
}

// finishFill gives block i of f to the cache and to those who wait for it.
func (c *Cache) finishFill(f *fill, i int, data []byte, err error) {
	block := f.first + uint64(i)
	fb := &f.blocks[i]
	sh := c.shardOf(block)
	sh.mu.Lock()
	locked := false
	if s := c.newest(sh, block); s != noSlot && !c.clean(s) {
		// The version that lacks sectors is dirty: its place in the epoch goes to the one that has them all.
		sh.mu.Unlock()
		c.pub.Lock()
		sh.mu.Lock()
		locked = true
	}
	stale := (fb.stale || c.zeroes.removed.Load() >= f.began || c.dropDamaged(sh, block)) && !planted("stale-fill")
	if !fb.stale {
		delete(sh.fills, block)
	}
	slot := fb.slot
	var retry *fill
	ended := fb.waiters
	switch {
	case stale:
		ended, retry = c.lookAgain(sh, block, fb)
		if retry == nil {
			c.release(slot)
		}
	case err != nil:
		for _, w := range fb.waiters {
			w.op.failed.Store(uint32(syscall.EIO))
		}
		c.release(slot)
	default:
		r, ok := c.adopt(sh, block, slot, data, locked)
		for _, w := range fb.waiters {
			if !ok {
				w.op.failed.Store(uint32(syscall.EIO))
			} else {
				if r.slot != refHole {
					c.pin(r.slot)
				}
				w.op.resolve(w.index, r)
			}
		}
		if r.slot != slot {
			c.release(slot)
		} else if c.arena.Headers[slot].Number.Load() == 0 && c.state[slot].Or(stateDead)&statePins == 0 {
			c.release(slot)
		}
	}
	sh.mu.Unlock()
	if locked {
		c.pub.Unlock()
	}
	c.startFill(retry)
	for _, w := range ended {
		c.filled(w.op)
	}
}

// filled ends one of the waits of op and goes on with it after the last.
func (c *Cache) filled(op *Op) {
	if op.pending.Add(-1) > 0 {
		return
	}
	if op.kind == kindRead {
		c.finishRead(op)
	} else {
		c.stage(op)
	}
}

// lookAgain resolves the waiters of a fill that came too late. Those for whom there is still too little wait for another
// read, which takes over the slot. Callers hold sh.mu.
func (c *Cache) lookAgain(sh *shard, block uint64, fb *fillBlock) (ended []waiter, retry *fill) {
	began := c.arena.Published()
	var rest []waiter
	for _, w := range fb.waiters {
		if r, ok := c.lookup(sh, block, w.op.need(w.index)); ok {
			w.op.resolve(w.index, r)
			ended = append(ended, w)
		} else {
			rest = append(rest, w)
		}
	}
	if len(rest) == 0 {
		return ended, nil
	}
	if f := sh.fills[block]; f != nil {
		other := &f.blocks[block-f.first]
		other.waiters = append(other.waiters, rest...)
		return ended, nil
	}
	retry = newFill(block, began)
	again := retry.enter(sh, fb.slot)
	again.waiters = append(again.waiters, rest...)
	return ended, retry
}

// adopt makes slot, filled with data from home, the version of block that has all sectors. It keeps number and dirty
// sectors of a version that lacked some. It returns what holds for the block now, and false where that is lost.
// Callers hold sh.mu, and pub if the version is dirty.
func (c *Cache) adopt(sh *shard, block uint64, slot uint32, data []byte, pub bool) (ref, bool) {
	s := c.newest(sh, block)
	number := uint64(numberFilled)
	m := meta{block: block, valid: allValid}
	if s != noSlot {
		number = c.arena.Headers[s].Number.Load()
		m.dirty = c.meta(s).dirty
	}
	if z := c.zeroes.covering(block); z > number || z != 0 && s == noSlot {
		return ref{refHole, z}, true
	}
	dst := c.arena.Data(slot)
	copy(dst, data)
	if s != noSlot {
		if !c.intact(s, number) { // and dirty, else it was dropped before
			if !c.meta(s).lost {
				c.stats.corrupt.Add(1)
				c.lose(s)
			}
			return ref{refPending, 0}, false
		}
		copySectors(dst, c.arena.Data(s), c.meta(s).valid)
	}
	c.describe(slot, m, number, sum(dst, allValid))
	if pub && m.dirty != 0 && c.kept(number) {
		if !c.home.remove(s) {
			// A commit or a sweep reads the old version: it stays, and the merged one serves these readers only.
			return ref{slot, number}, true
		}
		c.home.add(slot)
	}
	crashPoint()
	c.arena.Headers[slot].Number.Store(number)
	crashPoint()
	if s == noSlot {
		if sh.recall(block) {
			c.state[slot].Or(stateMain)
		}
	} else {
		if m.dirty != 0 && c.open.remove(s) {
			c.open.add(slot)
		}
		if old := c.drop(sh, block, s); old != noSlot {
			c.release(old)
		}
	}
	c.insert(sh, block, slot)
	c.fertile()
	return ref{slot, number}, true
}

// dropDamaged drops a clean version of block whose checksum fails. What was read from home meanwhile may be older than the version's
// way home, so it has to be read again. Callers hold sh.mu.
func (c *Cache) dropDamaged(sh *shard, block uint64) bool {
	s := c.newest(sh, block)
	if s == noSlot || !c.clean(s) || c.intact(s, c.arena.Headers[s].Number.Load()) {
		return false
	}
	c.stats.corrupt.Add(1)
	c.log.Error("block failed its checksum", "block", block)
	if freed := c.drop(sh, block, s); freed != noSlot {
		c.release(freed)
	}
	return true
}

func copySectors(dst, src []byte, valid uint8) {
	for i := range sectors {
		if valid&(1<<i) != 0 {
			copy(dst[i*SectorBytes:(i+1)*SectorBytes], src[i*SectorBytes:])
		}
	}
}
