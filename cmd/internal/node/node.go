// Package node assembles one volume: backing, superblock, memory, cache, flusher, exports. Open starts them in that order,
// Drain and Close stop them in reverse. It is the only place that sees all the parts.
package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cache/arena"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush"
	"github.com/ramshelf/ramshelf/flush/home"
	"github.com/ramshelf/ramshelf/flush/journal"
	"github.com/ramshelf/ramshelf/nbd"
)

// Volume is one served volume. Its methods are safe for concurrent use; Drain and Close come after the last request.
type Volume struct {
	config     *config.Volume
	log        *slog.Logger
	backing    backing   // the content
	meta       backing   // the metadata: the backing itself, or that of the journal
	queue      io.Closer // second way to meta, of the commits; nil where there is none
	superblock *journal.Superblock
	arena      *arena.Arena
	cache      *cache.Cache
	flusher    *flush.Flusher
	device     *device
	stepDown   stepDown

	stop   chan struct{} // ends the goroutines below
	wg     sync.WaitGroup
	closed sync.Once
}

// Open opens a volume: backing, memory, flusher. What is refused for safety is a control.Refused. Nothing is changed
// where it fails.
func Open(ctx context.Context, d *config.Daemon, c *config.Volume, log *slog.Logger) (*Volume, error) {
	b, err := openBacking(ctx, c, log)
	if err != nil {
		return nil, err
	}
	v := &Volume{config: c, log: log, backing: b, meta: b, stop: make(chan struct{})}
	if c.Journal.Kind == config.JournalBacking {
		if v.meta, err = openJournal(ctx, c, b, log); err != nil {
			return nil, errors.Join(err, undo(b))
		}
	}
	if err := v.open(ctx, d); err != nil {
		if v.meta != v.backing {
			err = errors.Join(err, undo(v.meta))
		}
		return nil, errors.Join(err, undo(b))
	}
	v.start()
	return v, nil
}

func (v *Volume) open(ctx context.Context, d *config.Daemon) error {
	found, err := v.examine()
	if err != nil {
		return err
	}
	v.superblock = found.Superblock
	size := found.Geometry.VolumeBytes
	if size%cache.BlockBytes != 0 {
		return fmt.Errorf("volume of %d bytes is not a multiple of %d; give --size %d", size, cache.BlockBytes, size/cache.BlockBytes*cache.BlockBytes)
	}
	memory := memoryFile{
		path: d.MemoryFile(v.config), force: v.config.Force, log: v.log,
		id:    arena.Identity{Volume: found.Superblock.UUID, SizeBytes: size, MemoryBytes: int64(v.config.Memory)},
		stamp: found.Superblock.Incarnation.Stamp,
	}
	if v.arena, err = memory.open(); err != nil {
		return err
	}
	rec, err := v.begin(ctx, found, &memory)
	if err != nil {
		return errors.Join(err, memory.undo(v.arena))
	}
	if err := v.assemble(size, &rec); err != nil {
		return errors.Join(err, v.arena.Close())
	}
	return nil
}

// assemble makes cache, flusher and device over memory and backing.
func (v *Volume) assemble(size int64, rec *recovery) error {
	journaled := v.superblock.Journal != journal.KindNone
	committed := rec.state.Committed
	if !rec.warm {
		v.arena.SetPublished(max(v.arena.Published(), rec.seal))
	}
	c, err := cache.New(v.arena, cache.Config{
		SizeBytes: size, Home: v.backing, Commits: v.config.Ack == config.AckDisk, FlushCommits: v.config.Flush == config.FlushDisk,
		MaxDirtyBytes: int64(v.config.MaxDirty), Journaled: journaled, Committed: committed, Repair: v.repair,
		Wake: v.wake, Now: func() int64 { return time.Now().UnixNano() }, Log: v.log,
	})
	if err != nil {
		return err
	}
	for _, l := range rec.lost {
		if !c.Lose(l.Block, l.Number) {
			c.Close()
			return fmt.Errorf("the memory has no room for %d lost blocks; give more --memory", len(rec.lost))
		}
	}
	options := flush.Options{
		Staleness: time.Duration(v.config.Staleness), SyncBytes: syncBytes(int64(v.config.Memory)),
		GiveUpAfter: time.Duration(v.config.BackingTimeout), HoldUp: time.Duration(v.config.Holdup), Log: v.log,
	}
	if journaled {
		options.Journal = &flush.Journal{
			Ring: journal.NewRing(v.superblock.RingOffset, v.superblock.RingBytes, rec.state), Dev: v.meta,
			SameDisk: v.meta == v.backing, Generation: v.generation(), Record: v.noteRing,
		}
		if f, ok := v.meta.(*home.File); ok {
			q := f.Queue()
			v.queue, options.Journal.Dev = q, q
		}
	}
	f, err := flush.New(&source{Cache: c}, v.backing, options)
	if err != nil {
		c.Close()
		return err
	}
	v.cache, v.flusher = c, f
	v.device = newDevice(c, v.backing, size, int64(v.config.Memory))
	return nil
}

// syncBytes is how much goes home between two syncs: an eighth of a small memory, since it stays in use until the sync.
func syncBytes(memory int64) int64 { return min(flush.DefaultSyncBytes, memory/8) }

// examine reads the superblock, or says how a backing without one is taken.
func (v *Volume) examine() (*journal.Found, error) {
	want := journal.Wanted{
		Name: v.config.Name, VolumeBytes: int64(v.config.Size), Journal: journal.KindInternal, RingBytes: ringBytes(v.config),
		Extendable: v.config.Backing.Kind == config.BackingFile, Force: v.config.Force,
	}
	switch v.config.Journal.Kind {
	case config.JournalNone:
		want.Journal = journal.KindNone
	case config.JournalBacking:
		if err := v.examineData(); err != nil {
			return nil, err
		}
		want.Journal, want.DataBytes = journal.KindExternal, v.backing.Size()
		want.Extendable = v.config.Journal.Backing.Kind == config.BackingFile
	case config.JournalInternal:
	default:
		want.AnyJournal = true
	}
	found, err := journal.Examine(v.meta, v.meta.Size(), want)
	if refused := v.refused(err); refused != err {
		return nil, refused
	}
	if err != nil {
		return nil, fmt.Errorf("backing %s: %w", v.config.Backing, err)
	}
	return found, nil
}

// examineData refuses a backing for the content that has metadata of its own, where they are to lie elsewhere.
func (v *Volume) examineData() error {
	s, err := journal.ForeignTail(v.backing, v.backing.Size())
	switch {
	case v.config.Force:
		return nil
	case err != nil:
		return control.Refused(fmt.Errorf("backing %s: its tail holds a superblock: %w", v.config.Backing, err), "leave --journal out, or --force to take the backing all the same")
	case s != nil:
		return control.Refused(fmt.Errorf("backing %s holds volume %s with its metadata", v.config.Backing, s.Name),
			"leave --journal out, or --force to take the backing as the content of a volume and not to use its own metadata")
	}
	return nil
}

// ringBytes is the size of a new journal: twice what may be uncommitted, so that one half takes commits while the other goes
// home.
func ringBytes(c *config.Volume) int64 {
	if c.JournalSize > 0 {
		return int64(c.JournalSize)
	}
	return 2 * int64(c.MaxDirty)
}

// begin recovers the volume and stamps a new incarnation into memory and backing. The memory knows the stamp before the backing
// has it, so a process that ends in between finds them to belong together.
func (v *Volume) begin(ctx context.Context, found *journal.Found, memory *memoryFile) (recovery, error) {
	if f, ok := v.meta.(*home.File); ok && found.Geometry.BackingBytes > f.Size() {
		if err := f.Grow(found.Geometry.BackingBytes); err != nil {
			return recovery{}, fmt.Errorf("make room for the metadata: %w", err)
		}
	}
	if memory.kept {
		// The memory has room for two stamps. That of the backing may be the second one, announced by a start that failed:
		// once it is there for good it becomes the first, and the next start that fails takes nothing away.
		if err := v.meta.Sync(); err != nil {
			return recovery{}, fmt.Errorf("sync superblock: %w", err)
		}
		v.arena.Stamp(v.superblock.Incarnation.Stamp)
	}
	rec, err := v.recover(ctx, found, memory)
	if err != nil {
		return rec, err
	}
	v.beginGeneration(memory, rec.seal)
	if found.Adopted && v.superblock.Journal != journal.KindNone {
		// From here on the tail is not zero, and only a superblock tells that it is ours if the start ends before its last step.
		if err := v.superblock.Store(v.meta, time.Now()); err != nil {
			return rec, err
		}
	}
	if err := v.beginRing(&rec); err != nil {
		return rec, err
	}
	v.superblock.Begin()
	v.superblock.Volatile = v.config.Ack != config.AckDisk
	v.arena.Announce(v.superblock.Incarnation.Stamp)
	v.noteRing(rec.state)
	if err := v.superblock.Store(v.meta, time.Now()); err != nil {
		return rec, err
	}
	v.arena.Stamp(v.superblock.Incarnation.Stamp)
	return rec, nil
}

// beginGeneration notes in the superblock that the volume serves after its memory was lost while it was in use: numbers
// above seal may be given a second time. Where that opening answered writes before they were committed, or where memory
// with such writes was set aside, they are lost: a session that began before must not run on over its own past.
func (v *Volume) beginGeneration(memory *memoryFile, seal uint64) {
	s := v.superblock
	last := v.generation()
	lost := memory.lost || !s.Clean && !memory.kept
	if last != 0 && !lost {
		return
	}
	rollback := memory.lost || lost && s.Volatile
	if rollback {
		v.log.Warn("the memory of the volume was lost while it was in use; answered writes that were not committed are gone",
			"generation", last+1, "seal", seal)
	}
	if len(s.Generations) == journal.MaxGenerations {
		s.Generations = s.Generations[1:]
	}
	s.Generations = append(s.Generations, journal.Generation{
		ID: last + 1, Parent: last, Fork: seal, Began: time.Now().UTC(), Rollback: rollback,
	})
}

// generation is the current generation of the volume, 0 before the first.
func (v *Volume) generation() uint64 {
	if n := len(v.superblock.Generations); n > 0 {
		return v.superblock.Generations[n-1].ID
	}
	return 0
}

// rollback is the generation in which the volume went back behind something answered last: a session from before it must not
// go on. Where it never did, it is the first one known.
func (v *Volume) rollback() uint64 {
	g := v.superblock.Generations
	for i := len(g) - 1; i > 0; i-- {
		if g[i].Rollback {
			return g[i].ID
		}
	}
	if len(g) > 0 {
		return g[0].ID
	}
	return 0
}

func (v *Volume) wake() {
	if v.flusher != nil {
		v.flusher.Wake()
	}
}

// Pace of what goes on in the background.
const (
	scrubStep  = 256 // slots
	scrubPause = 500 * time.Millisecond
	fillPause  = 2 * time.Millisecond
)

func (v *Volume) start() {
	v.flusher.Start()
	v.flusher.Wake()
	v.wg.Go(func() {
		if err := v.arena.Lock(v.stop); err != nil {
			v.log.Warn("memory is not locked and may be swapped out", "err", err)
		}
		if v.config.Memory >= config.Size(v.device.size) {
			v.cache.FillAll(v.stop, func() { time.Sleep(fillPause) })
		}
	})
	v.wg.Go(func() {
		for v.pause(scrubPause) {
			v.cache.Scrub(scrubStep, func() bool { return v.pause(scrubPause) })
		}
	})
}

// pause waits and reports whether the volume is still open.
func (v *Volume) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-v.stop:
		return false
	case <-t.C:
		return true
	}
}

// Export describes the volume under a name.
func (v *Volume) Export(name string) *nbd.Export {
	e := &nbd.Export{
		Name: name, Description: fmt.Sprintf("ramshelf volume %s, ack=%s flush=%s", v.config.Name, v.config.Ack, v.config.Flush),
		Device: v.device, MaxPayload: v.maxPayload(), PreferredBlock: cache.BlockBytes,
		Generation: v.rollback, Incarnation: func() uint64 { return v.superblock.Incarnation.Counter },
	}
	for _, c := range contexts {
		e.Contexts = append(e.Contexts, c.name)
	}
	return e
}

// maxPayload is the largest payload of one request: what memory and journal can always take at once.
func (v *Volume) maxPayload() uint32 {
	p := v.config.MaxPayloadBytes()
	for v.superblock.Journal != journal.KindNone && int64(p) > v.superblock.RingBytes/4 {
		p /= 2
	}
	return p
}

// Status is a snapshot of the volume.
func (v *Volume) Status() control.VolumeStatus {
	c, f := v.cache.Stats(), v.flusher.Status()
	s := control.VolumeStatus{
		Name: v.config.Name, Role: control.RolePrimary, State: control.StateOK, Generation: v.generation(),
		Ack: string(v.config.Ack), AckInForce: string(v.stepDown.inForce(v.config.Ack)), Flush: string(v.config.Flush),
		SizeBytes: c.SizeBytes, MemoryBytes: c.MemoryBytes, ResidentBytes: c.ResidentBytes, FreeBytes: c.FreeBytes,
		DirtyBytes: c.DirtyBytes, UncommittedBytes: c.UncommittedBytes, UncommittedLimitBytes: c.LimitBytes, LostBlocks: c.Lost,
		Epoch:   control.Epoch{Open: c.Open + 1, Committed: c.Committed},
		Journal: v.journalStatus(&f),
		Reads:   control.Traffic{Requests: c.Reads, Bytes: c.ReadBytes},
		Writes:  control.Traffic{Requests: c.Writes, Bytes: c.WriteBytes},
		Zeroes:  control.Traffic{Requests: c.Zeroes, Bytes: c.ZeroBytes},
		Flushes: c.Flushes, Hits: c.Hits, Misses: c.Misses,
		Backing: control.BackingStatus{
			State: control.BackingState(f.State.String()), Kind: string(v.config.Backing.Kind), Address: v.config.Backing.String(),
			WrittenBytes: int64(f.WrittenBytes), Writes: f.Writes, Syncs: f.Syncs, Durability: durability(v.backing),
		},
	}
	if rate := f.SlowestBytesPerSecond; rate > 0 {
		s.CommitSeconds = float64(c.UncommittedBytes) / rate
	}
	if c.UncommittedSinceNano != 0 {
		s.UncommittedAgeSeconds = time.Since(time.Unix(0, c.UncommittedSinceNano)).Seconds()
	}
	if v.config.Memory >= config.Size(c.SizeBytes) {
		s.FillRemainingBytes = max(0, c.SizeBytes-c.FillBytes)
	}
	if f.Err != nil {
		s.Backing.Error = f.Err.Error()
	}
	switch {
	case f.State == flush.StateFailed:
		s.State = control.StateFailed
	case f.State == flush.StateSlow || c.Lost > 0:
		s.State = control.StateDegraded
	}
	return s
}

func (v *Volume) journalStatus(f *flush.Status) control.JournalStatus {
	s := v.superblock
	j := control.JournalStatus{
		Kind: s.Journal.String(), Bytes: s.RingBytes, UsedBytes: f.JournalUsedBytes, WrittenBytes: int64(f.JournalBytes),
		BytesPerSecond: int64(f.CommitBytesPerSecond), SlowestBytesPerSecond: int64(f.SlowestBytesPerSecond),
	}
	if s.Journal == journal.KindExternal {
		j.Address = v.config.Journal.Backing.String()
	}
	return j
}

// Flush returns when all that was answered before it is home and synced.
func (v *Volume) Flush(ctx context.Context) error { return v.flusher.Flush(ctx) }

// progressInterval is how often Drain tells what is left.
const progressInterval = 200 * time.Millisecond

// Drain stops the volume cleanly: everything is brought home, the superblock says so, and the memory file is gone. After an
// error the memory file stays for the next start; flush.ErrInFlight is as in Close. It comes after the last request; Close
// comes after it.
func (v *Volume) Drain(ctx context.Context, progress func(remainingBytes int64)) error {
	dirty, written := v.cache.Stats().DirtyBytes, v.flusher.Status().WrittenBytes
	done := make(chan error, 1)
	go func() { done <- v.flusher.Drain(ctx) }()
	ticker := time.NewTicker(progressInterval)
	defer ticker.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("bring everything home: %w", err)
			}
			return v.retire(ctx)
		case <-ticker.C:
			// What is written counts at once, though it turns clean only with the next sync.
			progress(max(0, dirty-int64(v.flusher.Status().WrittenBytes-written)))
		}
	}
}

// retire ends a volume after a drain. What did not come home keeps it from being called clean: blocks that are lost, and
// writes that were under way when their connections were cut.
func (v *Volume) retire(ctx context.Context) error {
	var err error
	v.closed.Do(func() {
		if err = v.halt(ctx); err != nil {
			return
		}
		if v.cache.Dirty() {
			err = errors.Join(v.left(), v.arena.Close(), v.closeBackings())
			return
		}
		v.superblock.Clean, v.superblock.Committed = true, v.arena.Published()
		err = await(ctx, func() error { return v.superblock.Store(v.meta, time.Now()) })
		switch {
		case errors.Is(err, flush.ErrInFlight):
		case err != nil:
			err = errors.Join(err, v.arena.Close(), v.closeBackings())
		default:
			err = errors.Join(v.arena.Remove(), v.closeBackings())
		}
	})
	return err
}

// left says what of a volume is not home.
func (v *Volume) left() error {
	s := v.cache.Stats()
	return fmt.Errorf("the backing lacks %d dirty bytes, %d zeroed ranges and %d lost blocks, whose checksum failed; the memory file is kept",
		s.DirtyBytes, s.ZeroExtents, s.Lost)
}

// stopTimeout bounds how long a stop waits for operations of the backing that have not ended.
const stopTimeout = 5 * time.Second

// Close stops the volume without bringing anything home: the memory file stays for a warm restart. Where operations of the
// backing hang it gives up with flush.ErrInFlight; memory and backing then stay open, and locked, until the process ends.
func (v *Volume) Close() error { return v.close(context.Background()) }

func (v *Volume) close(ctx context.Context) error {
	var err error
	v.closed.Do(func() {
		if err = v.halt(ctx); err == nil {
			err = errors.Join(v.arena.Close(), v.closeBackings())
		}
	})
	return err
}

func (v *Volume) closeBackings() error {
	var errs []error
	if v.queue != nil {
		errs = append(errs, v.queue.Close())
	}
	if v.meta != v.backing {
		errs = append(errs, v.meta.Close())
	}
	return errors.Join(append(errs, v.backing.Close())...)
}

// halt ends everything that uses memory and backing, or gives up with flush.ErrInFlight.
func (v *Volume) halt(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	v.stepDown.close()
	close(v.stop)
	if err := v.flusher.Stop(ctx); err != nil {
		return err
	}
	return await(ctx, func() error {
		v.wg.Wait()
		v.device.surveys.close()
		v.cache.Close()
		return nil
	})
}

// await calls something that may hang with the backing. When ctx ends first the call is left alone and the error is
// flush.ErrInFlight.
func await(ctx context.Context, call func() error) error {
	done := make(chan error, 1)
	go func() { done <- call() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", flush.ErrInFlight, context.Cause(ctx))
	}
}
