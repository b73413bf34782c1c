package node

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// coldAfter is how long a region stays in the bitmap after it was last written home: one that is written all the time is not worth
// a write of its page, and a sync, each time. It is also the shortest time between two writes of pages that only take regions out.
const coldAfter = 5 * time.Second

// intent is the intent bitmap of a volume as the flusher sees it. Its methods are safe for concurrent use.
//
// Without a peer it says which regions are being written home, so that a volume without journal knows after a loss of power where
// it may hold a mixture of older and newer blocks; they leave it when they have not been written for coldAfter. With a peer it says
// which regions that one may lack; they leave it when it reports them.
type intent struct {
	mu         sync.Mutex // protects all of it
	set        *journal.Intent
	dev        backing // where the pages lie
	superblock *journal.Superblock
	page       []byte
	pending    bool // the set on disk lacks something, or may
	now        func() time.Time

	// Without a peer.

	region  int64
	touched []uint32  // of each region: when it was last written, in seconds since began, + 1; 0: it is not in the set
	hot     []uint32  // regions that were touched since the last Store
	began   time.Time //
	stored  time.Time // when pages were last written
}

// Values of intent.touched that are no times.
const (
	touchedNow   = math.MaxUint32 - 1 // since the last Store
	touchedStays = math.MaxUint32     // until the volume is stopped cleanly
)

// newIntent keeps the set t, which may have more than the disk, for a peer.
func newIntent(t *journal.Intent, dev backing, s *journal.Superblock) *intent {
	return &intent{set: t, dev: dev, superblock: s, page: make([]byte, journal.BlockBytes), now: time.Now, pending: true}
}

// newCoolingIntent keeps the set t, which is on disk. Regions leave it by themselves, but for those of stays.
func newCoolingIntent(t *journal.Intent, dev backing, s *journal.Superblock, stays []control.Range) *intent {
	i := newIntent(t, dev, s)
	i.began, i.region = i.now(), s.RegionBytes
	i.touched = make([]uint32, (s.VolumeBytes+i.region-1)/i.region)
	t.Regions(func(off, n int64) bool {
		i.touch(off, n, 0)
		return true
	})
	i.pending = false
	for _, r := range stays {
		for at := r.OffsetBytes; at < r.OffsetBytes+r.LengthBytes; at += i.region {
			i.touched[at/i.region] = touchedStays
		}
	}
	return i
}

// Mark puts the regions that n bytes from off on touch into the set: flush.Intent.
func (i *intent) Mark(off, n int64, number uint64) {
	n = min(n, i.superblock.VolumeBytes-off)
	if n <= 0 {
		return
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.touched == nil {
		i.set.Mark(off, n, number)
		i.pending = true
		return
	}
	i.touch(off, n, number)
}

// touch notes that regions are written now. Callers hold mu.
func (i *intent) touch(off, n int64, number uint64) {
	for r := off / i.region; r <= (off+n-1)/i.region; r++ {
		switch i.touched[r] {
		case touchedNow, touchedStays:
			continue
		case 0:
			i.set.Mark(r*i.region, 1, number)
			i.pending = true
		}
		i.touched[r] = touchedNow
		i.hot = append(i.hot, uint32(r))
	}
}

// Store writes the pages that changed: flush.Intent.
func (i *intent) Store(number uint64, sync func() error) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.touched != nil {
		i.cool()
	}
	return i.store(number, sync)
}

// cool takes regions out that were not written for some time, where pages are to be written or were not for as long. They are home:
// what is under way now was touched since the last Store. Callers hold mu.
func (i *intent) cool() {
	now := i.now()
	seconds := uint32(now.Sub(i.began)/time.Second) + 1
	for _, r := range i.hot {
		if i.touched[r] == touchedNow {
			i.touched[r] = seconds
		}
	}
	i.hot = i.hot[:0]
	if !i.pending && now.Sub(i.stored) < coldAfter {
		return
	}
	for r, at := range i.touched {
		if at != 0 && at < touchedNow && at+uint32(coldAfter/time.Second) < seconds {
			i.touched[r] = 0
			i.set.Clear(int64(r)*i.region, i.region)
			i.pending = true
		}
	}
}

// store writes the pages that changed. Callers hold mu.
func (i *intent) store(number uint64, sync func() error) error {
	if !i.pending {
		return nil
	}
	s := i.superblock
	err := i.set.Pages(i.page, number, generationOf(s), func(off int64, page []byte) error {
		_, err := i.dev.WriteAt(page, s.BitmapOffset+off)
		return err
	})
	if err == nil {
		err = sync()
	}
	if err != nil {
		i.set.Failed()
		return fmt.Errorf("store intent bitmap: %w", err)
	}
	i.set.Stored()
	i.pending, i.stored = false, i.now()
	return nil
}

// retire takes all regions out: everything is home and synced. With a peer they stay until it reports them.
func (i *intent) retire(number uint64) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.touched != nil && i.set.Bytes() > 0 {
		clear(i.touched)
		i.hot = nil
		i.set.Clear(0, i.superblock.VolumeBytes)
		i.pending = true
	}
	return i.store(number, i.dev.Sync)
}

// reported takes out what the peer has committed up to number.
func (i *intent) reported(number uint64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	before := i.set.Bytes()
	i.set.Reported(number)
	i.pending = i.pending || i.set.Bytes() != before
}

// openIntent reads which regions were being written, or may be lacked by a peer, when the volume was last in use. Without a peer only a
// volume without journal keeps that: with one the backing and the journal are a point in time, whatever was under way. What only
// the journal knows is stored, since the journal begins anew.
func (v *Volume) openIntent(ctx context.Context, fresh bool, memory *memoryFile, rec *recovery) error {
	s := v.superblock
	v.suspect = []control.Range{}
	peer := v.config.Peer != ""
	if s.Journal != journal.KindNone && !peer {
		return nil
	}
	t, err := v.loadIntent(fresh || s.Clean && !peer)
	if err != nil {
		return err
	}
	if peer {
		if s.Journal != journal.KindNone && !s.Clean {
			if err := v.markJournal(ctx, t, rec); err != nil {
				return err
			}
		}
		v.intent = newIntent(t, v.meta, s)
		return v.intent.Store(rec.seal, v.meta.Sync)
	}
	var stays []control.Range
	if !memory.kept {
		v.suspect, v.suspectBytes = listRanges(t, maxListed)
		stays, _ = listRanges(t, math.MaxInt)
		logSuspect(v.log, v.suspect, v.suspectBytes)
	}
	v.intent = newCoolingIntent(t, v.meta, s, stays)
	return nil
}

// loadIntent reads the intent bitmap; an empty one where nothing can be in it.
func (v *Volume) loadIntent(empty bool) (*journal.Intent, error) {
	s := v.superblock
	t, warnings, err := journal.LoadIntent(v.meta, s)
	switch {
	case err != nil:
		return nil, fmt.Errorf("backing %s: %w", v.metaName(), err)
	case empty && (len(warnings) > 0 || t.Bytes() > 0):
		return journal.NewIntent(s.VolumeBytes, s.RegionBytes, s.IntentStamp()), nil
	}
	for _, w := range warnings {
		v.log.Warn("intent bitmap", "err", w)
	}
	return t, nil
}

// markJournal marks what the runs in the journal have committed: the bitmap on disk may not have it yet.
func (v *Volume) markJournal(ctx context.Context, t *journal.Intent, rec *recovery) error {
	found := rec.found
	if found == nil {
		var damage, err error
		if found, damage, err = v.scan(ctx); err != nil {
			return err
		}
		if damage != nil { // the memory has what lies behind it, but not which of it is committed
			t.Mark(0, v.superblock.VolumeBytes, v.arena.Published())
			v.log.Warn("the journal is damaged: the peer may lack every region", "err", damage)
		}
	}
	for e := range found.Entries() {
		switch e.Kind {
		case journal.EntryBlock:
			t.Mark(int64(e.Block)*config.BlockBytes, config.BlockBytes, e.Number)
		case journal.EntryZero:
			t.Mark(int64(e.Block)*config.BlockBytes, int64(e.Blocks)*config.BlockBytes, e.Number)
		}
	}
	return nil
}

// Reported says that the peer has committed everything up to a position: what no commit behind it has changed is not lacked by
// the peer any more. A position in an older generation counts only up to where that was left; one in a generation that is
// not known counts for nothing.
func (v *Volume) Reported(generation, number uint64) {
	if v.intent == nil || v.config.Peer == "" || generation > v.generation() {
		return
	}
	for _, g := range v.superblock.Generations {
		if g.ID > generation {
			number = min(number, g.Fork)
		}
	}
	v.intent.reported(number)
}

// listRanges gives the regions of t, at most so many of them, and how many bytes all have.
func listRanges(t *journal.Intent, most int) (list []control.Range, bytes int64) {
	list = []control.Range{}
	t.Regions(func(off, n int64) bool {
		list = append(list, control.Range{OffsetBytes: off, LengthBytes: n})
		return len(list) < most
	})
	return list, t.Bytes()
}

// lookAtIntent tells which regions of a volume without journal were being written when it was last in use.
func (v *Volume) lookAtIntent(r *Recovery) error {
	t, err := v.loadIntent(false)
	if err != nil {
		return err
	}
	r.Suspect, r.SuspectBytes = listRanges(t, maxListed)
	logSuspect(v.log, r.Suspect, r.SuspectBytes)
	return nil
}

// logSuspect says that regions may hold a mixture of older and newer blocks.
func logSuspect(log *slog.Logger, list []control.Range, bytes int64) {
	if bytes == 0 {
		return
	}
	log.Warn("the volume was being written when its memory was lost, and has no journal: regions may hold a mixture of older and newer blocks",
		"suspect", config.FormatBytes(bytes), "ranges", len(list), "first_offset", list[0].OffsetBytes, "first_bytes", list[0].LengthBytes)
}
