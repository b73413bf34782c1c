package flush

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// headsPerJob is how many chunks of a run may begin in one write.
const headsPerJob = maxPieces/(journal.EntriesPerChunk+1) + 2

// commits writes seals into the journal. Its goroutine moves the head of the ring; that of the way home moves the tail.
type commits struct {
	f    *Flusher
	src  Journaled
	j    *Journal
	lane lane

	wakeHome chan struct{}
	mark     atomic.Uint64 // position behind the last run whose blocks all are on their way home, or are there
	moved    chan struct{} // the tail was moved: a run should name it

	mu   sync.Mutex // guards ring and home
	ring *journal.Ring
	home uint64 // everything before this position is home and synced

	sealedAt time.Time
	beganAt  time.Time // when the run of the last seal began to be written
	named    bool      // the last run that committed something is named by one behind it
	entries  []journal.Entry
	others   []journal.Entry
	blocks   [journal.EntriesPerChunk]Block
	next     uint64 // position of what comes next in the run
	job      *job   // is being put together; nil: none is
	heads    int    // chunks that begin in job
	rate     rate
	began    atomic.Int64  // when the run under way began to be written, nanoseconds since lane.base; 0: none is
	before   atomic.Uint64 // lane.bytes then
	ready    uint64        // position up to which the backing has given the ring its blocks; see prepare
	lap      uint64        // position at which all of the ring has them
}

func newCommits(f *Flusher, src Journaled, j *Journal, d *disk) *commits {
	c := &commits{
		f: f, src: src, j: j, ring: j.Ring,
		wakeHome: make(chan struct{}, 1), moved: make(chan struct{}, 1),
		entries: make([]journal.Entry, 0, journal.EntriesPerChunk),
	}
	c.lane.init(f, j.Dev, d)
	st := c.ring.State()
	c.mark.Store(st.Head)
	c.home = st.Tail
	c.ready, c.lap = st.Head, st.Head+c.ring.Blocks()
	c.tellRoom()
	return c
}

// run takes one seal after another and commits each.
func (c *commits) run() {
	f := c.f
	timer := time.NewTimer(f.o.Staleness)
	defer timer.Stop()
	c.sealedAt = time.Now()
	moved := false
	for {
		if !moved || !f.src.PressedToCommit() {
			timer.Reset(max(0, f.o.Staleness-time.Since(c.sealedAt)))
			select {
			case <-f.stop:
			case <-f.wake:
			case <-timer.C:
			case <-c.moved:
			}
		}
		if f.stopping() {
			return
		}
		unsignal(f.wake) // the seal that follows fulfills a wish made until here
		ok := false
		if moved, ok = c.commit(); !ok {
			return
		}
	}
}

// commit takes a seal and commits it, however many attempts that takes. It reports whether there was anything to do, and false
// when Stop ended it early.
func (c *commits) commit() (moved, ok bool) {
	f := c.f
	begin := time.Now()
	due := begin.Sub(c.sealedAt) >= f.o.Staleness
	c.sealedAt = begin
	f.waiting.seal()
	seal, dirtyBytes, changed := f.src.Seal()
	f.counters.seals.Add(1)
	moved = changed || dirtyBytes > 0
	switch {
	case moved:
		ok = c.attempt(func() error {
			defer c.began.Store(0)
			return c.write(seal, dirtyBytes/BlockBytes)
		})
	case c.tailPending() || due && !c.named:
		ok = c.attempt(c.writeMark)
	default:
		ok = true
	}
	if !ok {
		return moved, false
	}
	if moved {
		c.measure(dirtyBytes, time.Since(c.beganAt)) // a wait for room in the ring says nothing about its speed
		f.counters.committed(seal, time.Since(begin))
	}
	f.src.Committed(seal)
	if moved { // the place behind a mark is no news to the way home
		c.mark.Store(c.state().Head)
	}
	f.waiting.commit()
	if f.waiting.wantsHome() || c.src.PressedHome() {
		signal(c.wakeHome)
	}
	return moved, true
}

// attempt does something until it succeeds. It reports false when Stop ended it early.
func (c *commits) attempt(do func() error) bool {
	backoff := c.f.o.Backoff
	for attempt := 1; ; attempt++ {
		c.lane.begins()
		err := do()
		if err == nil || planted("commit-marks-clean-on-error") && !c.f.stopping() {
			c.f.health.attemptDone(&c.lane.progress)
			return true
		}
		if !c.f.failed(&c.lane.progress, attempt, err, &backoff) {
			return false
		}
	}
}

// write writes the run of seal, which has at most that many blocks, and syncs it: then it is committed.
func (c *commits) write(seal uint64, blocks int64) error {
	c.others = c.others[:0]
	c.src.NewZeroes(func(first, blocks, sequence uint64) {
		c.others = append(c.others, journal.Entry{Kind: journal.EntryZero, Block: first, Blocks: blocks, Number: sequence})
	})
	if err := c.waitForRoom(blocks); err != nil {
		return err
	}
	if err := c.prepare(blocks); err != nil {
		return err
	}
	c.before.Store(c.lane.bytes.Load())
	c.began.Store(int64(time.Since(c.lane.base)))
	c.beganAt = time.Now()
	c.begin(seal)
	c.src.Retake()
	others := c.others
	for ended := false; ; {
		room := journal.EntriesPerChunk - min(len(others), journal.EntriesPerChunk)
		n := 0
		if !ended && room > 0 {
			n = c.src.Take(c.blocks[:room])
			if ended = n < room; ended {
				// All of the seal was looked at: what is lost is known now.
				others = slices.Clip(others)
				others = c.lost(others, seal)
			}
		}
		with := min(len(others), journal.EntriesPerChunk-n)
		last := ended && with == len(others)
		if !c.chunk(others[:with], c.blocks[:n], last) {
			return c.lane.wait()
		}
		if others = others[with:]; last {
			break
		}
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.named = false
	return nil
}

// writeMark writes a run without content: it names the tail, and that the run before it was committed.
func (c *commits) writeMark() error {
	committed := c.state().Committed
	c.begin(committed)
	// What a seal under way has written over is still lost if that is never committed. Its own entries are in c.others.
	others := c.lost(nil, committed)
	for last := false; !last; {
		n := min(len(others), journal.EntriesPerChunk)
		last = n == len(others)
		if !c.chunk(others[:n], nil, last) {
			return c.lane.wait()
		}
		others = others[n:]
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.named = true
	return nil
}

// maxLost is how many lost blocks a run lists: the room that every run has besides its blocks is bounded.
const maxLost = 1024

// lost appends the blocks that are lost as of seal to a run.
func (c *commits) lost(others []journal.Entry, seal uint64) []journal.Entry {
	n := 0
	c.src.LostBlocks(seal, func(block, sequence uint64) {
		if n++; n <= maxLost && !planted("lost-not-recorded") {
			others = append(others, journal.Entry{Kind: journal.EntryLost, Block: block, Number: sequence})
		}
	})
	if n > maxLost {
		c.f.log.Error("more blocks are lost than the journal records: after a power cut the others read as they were before", "lost", n, "recorded", maxLost)
	}
	return others
}

// slackBlocks is what a run may need besides its blocks and their share of headers: one half for the 2048 extents that a cache
// keeps at most and a mark before the run, so that what was let in always finds room in the end, the other for lost blocks and a
// last chunk that is empty.
const slackBlocks = 32

// waitForRoom waits until the ring has room for a run. What is uncommitted is bound by that room, so it has as a rule.
func (c *commits) waitForRoom(blocks int64) error {
	need := journal.RunBlocks(int(blocks), len(c.others)) + slackBlocks/2
	for c.freeBlocks() < need {
		if c.tailPending() {
			if err := c.writeMark(); err != nil {
				return err
			}
			continue
		}
		signal(c.wakeHome)
		select {
		case <-c.moved:
		case <-c.f.stop:
			return ErrStopped
		}
	}
	return nil
}

// prepareBytes is how much of the ring is prepared at once.
const prepareBytes = 8 << 20

// hole are the flags of a range that has no content and reads as zeroes: the bits of the NBD context base:allocation.
const hole = 3

// prepare has a sparse file allocate the blocks of the ring before they are used, many at a time: else each commit of the first
// lap would have to wait for the file system to record that a few more blocks have content. Only holes are written, so
// nothing is written over that was there.
func (c *commits) prepare(blocks int64) error {
	holes, ok := c.j.Dev.(interface {
		Extents(off, n int64, fn func(off, n int64, flags uint32) bool) error
	})
	need := c.state().Head + journal.RunBlocks(int(blocks), len(c.others)) + slackBlocks
	for ok && c.ready < min(need, c.lap) {
		size := c.ring.Blocks()
		n := min(prepareBytes/BlockBytes, size-c.ready%size)
		off, end := c.ring.Offset(c.ready), c.ring.Offset(c.ready)+int64(n)*BlockBytes
		var found []Zero
		err := holes.Extents(off, end-off, func(off, n int64, flags uint32) bool {
			if flags == hole {
				found = append(found, Zero{off, min(n, end-off)})
			}
			return true
		})
		if err != nil {
			return err
		}
		for _, h := range found {
			if err := c.lane.writeZeroes(h.Off, h.Bytes); err != nil {
				return c.f.counters.failure(err, "allocate", h.Off, h.Bytes)
			}
		}
		c.ready += n
	}
	return nil
}

func (c *commits) begin(seal uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ring.Begin(seal, c.j.Generation)
	c.next = c.ring.State().Head
	c.job, c.heads = nil, 0
}

// chunk writes the next chunk of the run. It reports false when the attempt is lost: lane.wait tells why.
func (c *commits) chunk(others []journal.Entry, blocks []Block, last bool) bool {
	c.entries = append(c.entries[:0], others...)
	if i := c.f.o.Intent; i != nil {
		markIntent(i, others, blocks)
	}
	for i := range blocks {
		b := &blocks[i]
		mask := b.Dirty
		if b.Valid == allSectors {
			mask = allSectors
		}
		c.entries = append(c.entries, journal.Entry{Kind: journal.EntryBlock, Block: b.Number, Mask: mask, Number: b.Sequence, CRC: b.Sum})
	}
	if c.job != nil && c.heads == headsPerJob && !c.send() || !c.place() {
		return false
	}
	head := c.job.head(c.heads)
	c.heads++
	c.mu.Lock()
	c.ring.Chunk(head, c.entries, last)
	c.mu.Unlock()
	c.put(head)
	for i := range blocks {
		if !c.place() {
			return false
		}
		c.put(blocks[i].Data)
	}
	return true
}

// markIntent marks what a chunk is going to commit.
func markIntent(i Intent, others []journal.Entry, blocks []Block) {
	for _, e := range others {
		if e.Kind == journal.EntryZero {
			i.Mark(int64(e.Block)*BlockBytes, int64(e.Blocks)*BlockBytes, e.Number)
		}
	}
	for _, b := range blocks {
		i.Mark(int64(b.Number)*BlockBytes, BlockBytes, b.Sequence)
	}
}

// place sees to it that job is one that the block at next can join.
func (c *commits) place() bool {
	off := c.ring.Offset(c.next)
	if c.job != nil && (off != c.job.off+c.job.length || len(c.job.bufs) == cap(c.job.bufs)) && !c.send() {
		return false
	}
	if c.job == nil {
		c.job, c.heads = c.lane.take(), 0
		c.job.off = off
	}
	return true
}

func (c *commits) put(data []byte) {
	c.job.bufs = append(c.job.bufs, data)
	c.job.length += BlockBytes
	c.next++
}

func (c *commits) send() bool {
	j := c.job
	c.job = nil
	return c.lane.start(j)
}

// finish makes the run durable: it is committed. The head moves, and those who keep it are told before anybody is answered.
func (c *commits) finish() error {
	if !c.send() {
		return c.lane.wait()
	}
	if err := c.lane.wait(); err != nil {
		return err
	}
	if c.f.stopping() {
		return ErrStopped
	}
	if !planted("commit-without-sync") {
		if err := c.lane.sync(); err != nil {
			return err
		}
	}
	c.mu.Lock()
	c.ring.Commit()
	st := c.ring.State()
	c.mu.Unlock()
	if c.j.Record != nil {
		c.j.Record(st)
	}
	c.tellRoom()
	return nil
}

// advance says that everything before the position mark is home and synced. It reports whether that is news.
func (c *commits) advance(mark uint64) bool {
	c.mu.Lock()
	news := mark > c.home
	if news {
		c.home = mark
		c.ring.Advance(mark)
	}
	c.mu.Unlock()
	if news {
		signal(c.moved)
	}
	return news
}

func (c *commits) tellRoom() {
	c.mu.Lock()
	free, total, st := int64(c.ring.FreeBlocks()), int64(c.ring.Blocks()), c.ring.State()
	c.mu.Unlock()
	room := max(0, free-slackBlocks) * journal.EntriesPerChunk / (journal.EntriesPerChunk + 1)
	c.src.Room(room, int64(st.Head-st.Tail), total)
}

func (c *commits) state() journal.RingState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ring.State()
}

func (c *commits) freeBlocks() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ring.FreeBlocks()
}

func (c *commits) tailPending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ring.TailPending()
}

// measure notes how fast a commit was, and what may be uncommitted if all of it has to be saved within the hold-up time.
func (c *commits) measure(bytes int64, d time.Duration) {
	c.rate.add(bytes, d)
	c.holdUp()
}

func (c *commits) holdUp() {
	if slowest := c.rate.lowest(); c.f.o.HoldUp > 0 && slowest > 0 {
		limit := max(BlockBytes, int64(slowest*c.f.o.HoldUp.Seconds()))
		c.rate.allow(limit)
		c.src.Limit(limit)
	}
}

// holdUpInterval is how often a run under way is looked at.
const holdUpInterval = 50 * time.Millisecond

// watchHoldUp lowers what may be uncommitted while a run is being written, when that turns out to be slow.
func (c *commits) watchHoldUp() {
	ticker := time.NewTicker(holdUpInterval)
	defer ticker.Stop()
	for {
		select {
		case <-c.f.stop:
			return
		case <-ticker.C:
		}
		began := c.began.Load()
		d := time.Since(c.lane.base) - time.Duration(began)
		if began != 0 && d >= 2*holdUpInterval && c.rate.sofar(int64(c.lane.bytes.Load()-c.before.Load()), d) {
			c.holdUp()
		}
	}
}
