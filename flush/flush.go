package flush

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// Units of the data. They are part of the contract with the Source and equal the cache's.
const (
	// BlockBytes is the length of a block.
	BlockBytes = 4096
	// SectorBytes is the length of a sector, the unit of Block.Valid and Block.Dirty.
	SectorBytes = 512
)

// Block is a version of a block as the Source lends it.
type Block struct {
	Number   uint64 // offset in bytes = Number * BlockBytes
	Sequence uint64 // of the version; a journal keeps it
	Sum      uint32 // CRC32C of all of Data, for a journal
	Valid    uint8  // bit i: sector i is present in Data
	Dirty    uint8  // bit i: sector i must be written; a subset of Valid
	Data     []byte // BlockBytes bytes that do not change while they are lent
}

// Zero is a range to be zeroed at home: whole blocks, in bytes.
type Zero struct{ Off, Bytes int64 }

// Source is what the flusher sees of the cache. Without a journal it is called from one goroutine: a seal is committed by
// being home. With one, Seal, Committed and the methods of Journaled are called from the goroutine of the commits, and
// Sweep, Zeroes, Next, Bridge, Synced and Again from that of the way home. None may wait for the flusher.
type Source interface {
	// Seal ends the epoch: everything published before it belongs to the seal. It is called only when the
	// previous seal ended in Committed. With nothing dirty it still takes a seal, with dirtyBytes 0. changed
	// reports whether anything was published since the seal before.
	Seal() (seal uint64, dirtyBytes int64, changed bool)
	// Sweep begins the way home of what is committed; without a journal, of the seal. It reports whether
	// there is anything to do.
	Sweep() bool
	// Zeroes appends to dst the extents that must be zeroed at home before the blocks. They are older than any
	// block that Next gives in their range.
	Zeroes(dst []Zero) []Zero
	// Next fills dst with the next blocks of the sweep, ascending by Number, each once per pass.
	// It returns how many; 0 ends the pass.
	Next(dst []Block) int
	// Bridge lends up to len(dst) consecutive blocks from number first that are resident, clean and fully
	// valid, and returns how many.
	Bridge(first uint64, dst []Block) int
	// Synced says that everything given by Zeroes, Next and Bridge since the last Synced or Again is home
	// and synced: it turns clean.
	Synced()
	// Again says that it is not: everything given since the last Synced goes back into the sweep, and the
	// pass begins again at the lowest block.
	Again()
	// Committed says that the whole seal is committed: its waiters are answered.
	Committed(seal uint64)
	// Failed says that the attempts have failed for good for those that must be told: they get err. What is
	// dirty stays dirty and the flusher goes on trying.
	Failed(err error)
	// Refuse says that the backing has done nothing for so long that nobody is to wait for it, or that it does
	// again.
	Refuse(on bool)
	// PressedToCommit reports that memory is short or that somebody waits for a commit: the flusher does not
	// wait for staleness. It is asked after every commit and after Wake, so whoever makes it true calls Wake.
	PressedToCommit() bool
}

// Journaled is what a Source must do besides where there is a journal.
type Journaled interface {
	// NewZeroes gives the extents of the seal that no commit holds yet, oldest first.
	NewZeroes(give func(first, blocks, sequence uint64))
	// Take fills dst with the next blocks of the seal, ascending, each once; 0 ends them.
	Take(dst []Block) int
	// Retake begins again at the lowest block.
	Retake()
	// LostBlocks gives the blocks that nobody can read any more as of seal, which is the newest or the newest committed one.
	LostBlocks(seal uint64, give func(block, sequence uint64))
	// PressedHome reports that memory or journal are short: the sweep does not wait. Whoever makes it true
	// calls Wake.
	PressedHome() bool
	// Room says how many blocks of data the journal can take now, how many of its blocks are in use, and how
	// many it has.
	Room(blocks, used, total int64)
	// Limit says how many bytes may be uncommitted.
	Limit(bytes int64)
}

// Backing is where the data go: *os.File satisfies it. Optional abilities are found once, in New:
//
//	WritevAt(bufs [][]byte, off int64) error   one gathered write; else the data are copied together
//	Zero(off, n int64) error                   zeroes a range; else zeroes are written
//	SectorBytes() int                          smallest aligned write in bytes; else any length is right
//	Async() bool; StartWritev(bufs [][]byte, off int64, done func(error)); Reap()
//	    if Async: a WritevAt that returns at once; Reap waits for at least one to end, and calls its done
//
// A write that returns an error may have changed any part of its range. All methods are safe for concurrent
// use.
type Backing interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

type (
	vectorWriter interface {
		WritevAt(bufs [][]byte, off int64) error
	}
	zeroer   interface{ Zero(off, n int64) error }
	sectored interface{ SectorBytes() int }
	starter  interface {
		Async() bool
		StartWritev(bufs [][]byte, off int64, done func(error))
		Reap()
	}
)

// Defaults and bounds of Options.
const (
	DefaultStaleness   = time.Second
	DefaultDepth       = 4
	DefaultWriteBytes  = 4 << 20
	DefaultSyncBytes   = 64 << 20
	DefaultFailAfter   = 3
	DefaultBackoff     = 100 * time.Millisecond
	DefaultMaxBackoff  = 5 * time.Second
	DefaultSlowAfter   = 3 * time.Second
	DefaultGiveUpAfter = 30 * time.Second
	DefaultSweepAfter  = 30 * time.Second
	MaxDepth           = 64
	MaxBridgeBlocks    = 64
	maxPieces          = 1024 // iovecs of one pwritev, IOV_MAX in Linux's include/uapi/linux/uio.h
	maxWriteBytes      = maxPieces * BlockBytes
	smallestWriteBytes = BlockBytes
)

// DefaultBridgeBlocks is the widest gap between two dirty runs that is written with clean blocks instead of
// beginning another write. 16 KiB cost a flash device or a page cache about what the fixed part of a command
// costs there (5–10 µs, the checksums of the blocks included), and a disk much less than the seek that they
// save. With gaps of 64 KiB, random dirt over a tenth of a volume cost a fifth of the process's CPU time.
const DefaultBridgeBlocks = 4

// Options are the settings of a Flusher. The zero value of each field means its default.
type Options struct {
	Staleness    time.Duration // longest time from one seal to the next
	Depth        int           // writes in flight, at most MaxDepth
	WriteBytes   int           // longest write, a multiple of BlockBytes, at most 4 MiB
	SyncBytes    int64         // most that is borrowed, and written, between two syncs of a pass, in bytes
	BridgeBlocks int           // widest bridged gap in blocks, at most MaxBridgeBlocks; negative: none
	FailAfter    int           // consecutive failed attempts before Source.Failed
	Backoff      time.Duration // wait after the first failed attempt; doubles up to MaxBackoff
	MaxBackoff   time.Duration
	SlowAfter    time.Duration // time without a completion after which the backing is slow
	GiveUpAfter  time.Duration // time without a completion after which the Source refuses writes
	// SweepAfter is how long a committed block may wait for its way home where nothing presses: a block that is rewritten
	// all the time goes there once in that time.
	SweepAfter time.Duration
	Journal    *Journal // nil: a seal is committed by being home
	// HoldUp is how long the power lasts: what is uncommitted is kept to what the journal can save in that time, by the
	// first percentile of how fast it was. 0: no such bound.
	HoldUp time.Duration

	Log *slog.Logger // nil discards
	// Event, if not nil, is called for every change of state, by one goroutine at a time. It must not wait
	// and must not call the Flusher.
	Event func(Event)
}

// Journal is where seals are committed.
type Journal struct {
	Ring     *journal.Ring // belongs to the Flusher from Start on
	Dev      Backing       // where the ring lies. Its asynchronous writes are reaped apart from those of the backing
	SameDisk bool          // Dev leads to the same device as the backing: a failed sync of one is one of the other
	// Generation is what the runs say of theirs.
	Generation uint64
	// Record is told where the ring has got to, before anybody is answered for it. It must not wait. Nil: nobody is.
	Record func(journal.RingState)
}

// Flusher commits the seals of a Source and writes them home. Its methods are safe for concurrent use.
type Flusher struct {
	src Source
	o   Options
	log *slog.Logger

	wake     chan struct{} // holds at most one wish for a seal
	stop     chan struct{} // closed by Stop
	stopped  chan struct{} // closed when every goroutine has ended
	stopOnce sync.Once
	started  atomic.Bool

	sweep    sweep // owned by the goroutine of the way home
	homeLane lane
	commits  *commits // nil without a journal

	counters counters
	health   health
	waiting  waiting
}

// Errors of Flush, Drain and Stop.
var (
	// ErrStopped: the flusher was stopped before what was asked for was done.
	ErrStopped = errors.New("flusher is stopped")
	// ErrInFlight: operations of the backing have not ended. Nothing that they use may be unmapped or
	// closed, and nothing else may write to the backing until this process has ended.
	ErrInFlight = errors.New("backing operations are still in flight")
)

// New returns a Flusher of src's data to dev. It does nothing before Start.
func New(src Source, dev Backing, o Options) (*Flusher, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	f := &Flusher{
		src: src, o: o, log: o.Log,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), stopped: make(chan struct{}),
	}
	d := newDisk()
	f.health.f = f
	f.homeLane.init(f, dev, d)
	if n := f.homeLane.out.sector; n > BlockBytes || n&(n-1) != 0 {
		return nil, fmt.Errorf("backing has sectors of %d bytes, the largest supported are %d", n, BlockBytes)
	}
	if o.Journal != nil {
		journaled, ok := src.(Journaled)
		if !ok {
			return nil, errors.New("the source knows no journal")
		}
		if !o.Journal.SameDisk {
			d = newDisk()
		}
		f.commits = newCommits(f, journaled, o.Journal, d)
	}
	f.sweep.init(f)
	return f, nil
}

// complete puts in the defaults and checks the bounds.
func (o *Options) complete() error {
	setDefault(&o.Staleness, DefaultStaleness)
	setDefault(&o.Depth, DefaultDepth)
	setDefault(&o.WriteBytes, DefaultWriteBytes)
	setDefault(&o.SyncBytes, DefaultSyncBytes)
	setDefault(&o.BridgeBlocks, DefaultBridgeBlocks)
	setDefault(&o.FailAfter, DefaultFailAfter)
	setDefault(&o.Backoff, DefaultBackoff)
	setDefault(&o.MaxBackoff, DefaultMaxBackoff)
	setDefault(&o.SlowAfter, DefaultSlowAfter)
	setDefault(&o.GiveUpAfter, DefaultGiveUpAfter)
	setDefault(&o.SweepAfter, DefaultSweepAfter)
	o.BridgeBlocks = max(o.BridgeBlocks, 0)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.Depth < 1 || o.Depth > MaxDepth:
		return fmt.Errorf("depth %d is not within 1..%d", o.Depth, MaxDepth)
	case o.WriteBytes < smallestWriteBytes || o.WriteBytes > maxWriteBytes || o.WriteBytes%BlockBytes != 0:
		return fmt.Errorf("longest write of %d bytes is not a multiple of %d within %d..%d",
			o.WriteBytes, BlockBytes, smallestWriteBytes, maxWriteBytes)
	case o.SyncBytes < BlockBytes:
		return fmt.Errorf("%d bytes between syncs are less than a block of %d", o.SyncBytes, BlockBytes)
	case o.BridgeBlocks > MaxBridgeBlocks:
		return fmt.Errorf("bridge of %d blocks is wider than %d", o.BridgeBlocks, MaxBridgeBlocks)
	case o.FailAfter < 1:
		return fmt.Errorf("failure after %d attempts is less than one attempt", o.FailAfter)
	case o.Staleness < 0 || o.Backoff < 0 || o.MaxBackoff < o.Backoff || o.SlowAfter < 0 || o.GiveUpAfter < 0 || o.SweepAfter < 0:
		return fmt.Errorf("times must not be negative, nor the backoff %v above its maximum %v", o.Backoff, o.MaxBackoff)
	}
	return nil
}

func setDefault[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// Start starts the goroutines of f. It is called once.
func (f *Flusher) Start() {
	if f.started.Swap(true) {
		panic("flush: Start called twice")
	}
	var wg sync.WaitGroup
	loop := func(l *lane, run func()) {
		for range f.o.Depth {
			wg.Go(l.runWriter)
		}
		wg.Go(func() {
			run()
			l.close()
		})
	}
	wg.Go(f.health.runWatch)
	if f.commits == nil {
		loop(&f.homeLane, f.runDirect)
	} else {
		loop(&f.commits.lane, f.commits.run)
		if f.o.HoldUp > 0 {
			wg.Go(f.commits.watchHoldUp)
		}
		loop(&f.homeLane, f.runHome)
	}
	go func() {
		wg.Wait()
		f.waiting.finish(ErrStopped)
		close(f.stopped)
	}()
}

// Wake asks for a seal now instead of after Staleness. It never waits and costs next to nothing while an
// earlier wish is open.
func (f *Flusher) Wake() {
	signal(f.wake)
	if f.commits != nil {
		signal(f.commits.wakeHome)
	}
}

// signal leaves one wish in a channel of length 1.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Flush takes a seal and returns when everything that was published before the call is home and synced. It
// returns the error of the backing when Options.FailAfter consecutive attempts have failed; what is dirty
// stays so and is tried again.
func (f *Flusher) Flush(ctx context.Context) error {
	return f.waiting.wait(ctx, f.Wake, false)
}

// Commit is Flush that returns as soon as everything is committed.
func (f *Flusher) Commit(ctx context.Context) error {
	return f.waiting.wait(ctx, f.Wake, true)
}

// Drain is Flush that goes on through failures of the backing, until ctx ends.
func (f *Flusher) Drain(ctx context.Context) error {
	for {
		err := f.Flush(ctx)
		if err == nil || errors.Is(err, ErrStopped) || ctx.Err() != nil {
			return err
		}
	}
}

// Stop ends the flusher without a seal: no further operation is started, and what is not home goes back to
// the Source by Again. It returns when the operations in flight have ended, or ErrInFlight when ctx ends
// before. It may be called again.
func (f *Flusher) Stop(ctx context.Context) error {
	f.stopOnce.Do(func() { close(f.stop) })
	if !f.started.Load() {
		return nil
	}
	select {
	case <-f.stopped:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-f.stopped:
		return nil
	default:
		return fmt.Errorf("stop flusher: %w: %w", ErrInFlight, context.Cause(ctx))
	}
}

// stopping reports whether Stop was called.
func (f *Flusher) stopping() bool {
	select {
	case <-f.stop:
		return true
	default:
		return false
	}
}
