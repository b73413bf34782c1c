package cache

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/ramshelf/ramshelf/cache/arena"
)

// Home is where blocks come from that are not resident. It must allow concurrent reads.
type Home interface {
	ReadAt(p []byte, off int64) (int, error)
}

// Config is what a cache is made of.
type Config struct {
	SizeBytes int64 // of the volume; a multiple of BlockBytes
	Home      Home
	// Commits tells that a write is answered only once it is committed, FlushCommits that a flush or FUA is.
	Commits, FlushCommits bool
	// MaxDirtyBytes bounds what is uncommitted; 0, or more than a third of the memory: that third.
	MaxDirtyBytes int64
	// Journaled tells that a seal is committed by its run in a journal and goes home later. Otherwise it is committed by
	// being home and synced.
	Journaled bool
	// Committed is the newest seal that a journal holds, of what is found in the memory.
	Committed uint64
	// Repair looks elsewhere for version number of a block whose checksum failed and fills dst with it. What it finds counts
	// only if it has the checksum of the version. Nil: there is nowhere to look.
	Repair func(block, number uint64, dst []byte) bool
	// Wake tells the flusher to look at PressedToCommit and PressedHome; it must not block. Nil: nobody listens.
	Wake func()
	// Now is the time in nanoseconds, for the age of the oldest uncommitted write.
	Now func() int64
	Log *slog.Logger // nil: discard
}

// Cache is the hot set of one volume. Read, Reserve, Write, Abort, Zero, Flush, Release and the methods that look are safe
// for concurrent use. Seal, NewZeroes, Take, Retake, LostBlocks and Committed belong to one goroutine, that of the commits;
// Sweep, Zeroes, Next, Bridge, Synced and Again to one, that of the way home, which may be the same.
type Cache struct {
	arena  *arena.Arena
	source Home
	size   int64
	log    *slog.Logger
	wake   func()
	now    func() int64
	repair func(block, number uint64, dst []byte) bool

	shards [shardCount]shard
	next   []uint32        // per slot: link of its chain or free list
	state  []atomic.Uint32 // per slot: pins and standing, see pool.go

	pools   []pool
	perPool int
	turn    atomic.Uint32
	free    atomic.Int64 // slots in the free lists that nobody has claimed
	barren  atomic.Bool  // nothing was left to evict at the last look

	pacing   pacing
	reserved atomic.Int64 // slots of requests that are not published yet
	refusing atomic.Bool  // writes are answered EIO: the backing does nothing any more

	journaled    bool
	commits      atomic.Bool
	flushCommits bool
	safe         atomic.Uint64 // reads may return versions up to this number
	waiting      atomic.Bool   // somebody waits for the next seal
	committed    atomic.Uint64 // the newest committed seal; changed with pub held

	pub    sync.Mutex          // guards what follows, and the order of all numbers
	open   counted             // above the newest seal
	sealed counted             // of the newest seal, until it is committed
	home   counted             // committed, not home, and not in the sweep under way
	lost   map[uint32]struct{} // slots of blocks that are lost; some may be in a set above or in the sweep besides
	seal   uint64              // the newest seal
	// The newest seal has nothing in it: it makes no room, so it wakes nobody who waits for some. They would ask for another.
	hollow      bool
	lastWrite   uint64 // number of the newest write or zero
	openSince   int64  // when the open epoch got its first write; 0: it has none
	sealedSince int64
	waitOpen    opList // wait for the next seal to be committed
	waitSealed  opList // wait for the commit under way
	closed      bool

	zeroes *zeroSet

	take      order // by the commit under way
	pass      pass  // the sweep under way
	passSlots atomic.Int64

	fills        fillQueue
	streams      streams
	startFillers sync.Once
	readQueue    *queue
	writeQueue   *queue

	stop   chan struct{}
	queues sync.WaitGroup // run what waits for slots
	wg     sync.WaitGroup // fillers

	stats stats
}

// counted is a set of slots whose count may be read at any time.
type counted struct {
	bitmap
	count atomic.Int64
}

func (o *counted) add(s uint32) {
	o.bitmap.add(s)
	o.count.Store(int64(o.n))
}

func (o *counted) remove(s uint32) bool {
	ok := o.bitmap.remove(s)
	o.count.Store(int64(o.n))
	return ok
}

// exchange swaps the members with those of b.
func (o *counted) exchange(b *bitmap) {
	o.bitmap, *b = *b, o.bitmap
	o.count.Store(int64(o.n))
}

// MinMemoryBytes is the least memory that a cache works with.
const MinMemoryBytes = 8 << 20

// New makes the cache of a volume over its memory, which it closes. Whatever an earlier process left in the memory is
// there again.
func New(a *arena.Arena, cfg Config) (*Cache, error) {
	c := &Cache{
		arena: a, source: cfg.Home, size: cfg.SizeBytes, log: cfg.Log, wake: cfg.Wake, now: cfg.Now, repair: cfg.Repair,
		flushCommits: cfg.FlushCommits, journaled: cfg.Journaled, seal: cfg.Committed, lost: make(map[uint32]struct{}),
		readQueue: newQueue(), writeQueue: newQueue(), stop: make(chan struct{}),
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.wake == nil {
		c.wake = func() {}
	}
	if c.now == nil {
		c.now = func() int64 { return 1 }
	}
	c.fills.ready.L = &c.fills.mu
	if err := c.allocate(len(a.Headers)); err != nil {
		return nil, fmt.Errorf("allocate the index: %w", err)
	}
	c.committed.Store(cfg.Committed)
	c.pacing.init(int64(len(a.Headers)), cfg.MaxDirtyBytes/BlockBytes)
	c.zeroes = newZeroSet(a.Zeroes)
	c.restore()
	c.commits.Store(cfg.Commits)
	if !cfg.Commits {
		c.safe.Store(^uint64(0))
	}
	c.queues.Go(func() { c.readQueue.run(c.stop, c.tryRead) })
	c.queues.Go(func() { c.writeQueue.run(c.stop, c.tryWrite) })
	return c, nil
}

// opened notes when the open epoch got its first write. Callers hold pub.
func (c *Cache) opened() {
	if c.openSince == 0 {
		c.openSince = c.now()
	}
}

// Pieces of the memory beside the slots, in bytes per slot: header 24, bucket 4, chain 4, state 4, ghost 2, five sets 5/8,
// ring 1/2: 39 of 4096, below one per cent.
const ringShare = 8

func (c *Cache) allocate(slots int) error {
	words, sums := bitmapWords(slots)
	var err error
	take32 := func(n int) []uint32 {
		s, e := arena.Make[uint32](n)
		if e != nil {
			err = e
		}
		return s
	}
	take64 := func(n int) []uint64 {
		s, e := arena.Make[uint64](n)
		if e != nil {
			err = e
		}
		return s
	}
	state, e := arena.Make[atomic.Uint32](slots)
	if e != nil {
		return e
	}
	ghosts, e := arena.Make[uint16](slots + shardCount)
	if e != nil {
		return e
	}
	c.state, c.next = state, take32(slots)
	buckets := take32(slots + shardCount)
	sets := [5]*bitmap{&c.open.bitmap, &c.sealed.bitmap, &c.home.bitmap, &c.pass.left, &c.pass.taken}
	for _, set := range sets {
		*set = newBitmap(take64(words), take64(sums))
	}
	rings := take32(slots/ringShare + 64)
	if err != nil {
		return err
	}
	per := slots/shardCount + 1
	for i := range c.shards {
		sh := &c.shards[i]
		sh.buckets, sh.ghost = buckets[i*per:(i+1)*per], ghosts[i*per:(i+1)*per]
		sh.fills = make(map[uint64]*fill)
	}
	c.makePools(slots, rings)
	c.take.buffer = make([]keyed, 0, min(sortSlots, slots))
	c.pass.order.buffer = make([]keyed, 0, min(sortSlots, slots))
	return nil
}

// poolSlots is the least slots of a pool; fewer make the small queue too short to tell a scan from a hot set.
const poolSlots = 4096

func (c *Cache) makePools(slots int, rings []uint32) {
	n := min(16, max(1, slots/poolSlots))
	c.perPool = (slots + n - 1) / n
	c.pools = make([]pool, n)
	ring := len(rings) / n
	for i := range c.pools {
		p := &c.pools[i]
		p.lo, p.hi = uint32(i*c.perPool), uint32(min((i+1)*c.perPool, slots))
		p.hand = p.lo
		p.ring = rings[i*ring : (i+1)*ring]
	}
}

func (c *Cache) zeroesFull() bool {
	c.pub.Lock()
	defer c.pub.Unlock()
	return c.zeroes.full()
}

// openZeroes is how many extents are not sealed.
func (c *Cache) openZeroes() int {
	c.pub.Lock()
	defer c.pub.Unlock()
	return c.zeroes.open
}

func (c *Cache) zeroesUsed() int {
	c.pub.Lock()
	defer c.pub.Unlock()
	return c.zeroes.used()
}
