package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cache/arena"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// Recovery is what Recover found and did. Its JSON is stable as that of the status is.
type Recovery struct {
	Schema    int    `json:"schema"`
	Volume    string `json:"volume"`
	UUID      string `json:"uuid"`
	SizeBytes int64  `json:"size_bytes"`
	Journal   string `json:"journal"`   // none, internal or external
	Clean     bool   `json:"clean"`     // it was: there was nothing to do
	DryRun    bool   `json:"dry_run"`   // nothing was changed
	Recovered bool   `json:"recovered"` // all is home now

	Seal             uint64          `json:"seal"` // the volume is as it was then
	Runs             int             `json:"runs"` // in the journal
	WriteBytes       int64           `json:"write_bytes"`
	ZeroBytes        int64           `json:"zero_bytes"`
	LostBlocks       int             `json:"lost_blocks"`
	Lost             []uint64        `json:"lost"`               // their numbers, the first of them
	Torn             bool            `json:"torn"`               // a run that was never committed lies at the end
	Damage           string          `json:"damage"`             // why the journal cannot be relied upon; empty where it can
	PendingZeroBytes int64           `json:"pending_zero_bytes"` // that a resize had still to zero
	SuspectBytes     int64           `json:"suspect_bytes"`      // that may hold a mixture of older and newer blocks
	Suspect          []control.Range `json:"suspect"`            // where, the first of them
}

// maxListed is how many blocks or ranges are listed one by one.
const maxListed = 1000

// Recover brings home what the journal of a volume holds that no daemon serves, and marks the backing clean: then it can be used
// without ramshelf. It may be killed at any point and run again. What is refused for safety is a control.Refused. With an error
// the first result tells what was found, unless it is nil.
func Recover(ctx context.Context, o *config.Offline, log *slog.Logger) (*Recovery, error) {
	v, err := openOffline(ctx, o, (*Volume).identify, log)
	if err != nil {
		return nil, err
	}
	r, err := v.recoverOffline(ctx, o.DryRun)
	return r, errors.Join(err, v.closeBackings())
}

// openOffline opens the backings of a volume that is not to be served, and has identify read what it is.
func openOffline(ctx context.Context, o *config.Offline, identify func(*Volume, context.Context) error, log *slog.Logger) (*Volume, error) {
	c := o.Volume()
	b, err := openAt(ctx, c.Backing, "backing", true, 0, log)
	if err != nil {
		return nil, err
	}
	v := &Volume{config: c, log: log, backing: b, meta: b}
	if c.Journal.Kind == config.JournalBacking {
		if v.meta, err = openAt(ctx, c.Journal.Backing, "journal", true, 0, log); err != nil {
			return nil, errors.Join(err, b.Close())
		}
	}
	err = identify(v, ctx)
	if err == nil {
		err = refuseMemory(o.Shm, v.superblock)
	}
	if err != nil {
		return nil, errors.Join(err, v.closeBackings())
	}
	return v, nil
}

// metaName is the backing with the metadata as it was given.
func (v *Volume) metaName() string {
	if v.meta != v.backing {
		return v.config.Journal.Backing.String()
	}
	return v.config.Backing.String()
}

// identify reads the superblock of a volume of which nothing was said, and checks that everything goes with it.
func (v *Volume) identify(ctx context.Context) error {
	if err := v.refuseGrown(ctx); err != nil {
		return err
	}
	s, err := loadTail(v.meta)
	if err != nil {
		return v.noSuperblock(err)
	}
	v.config.Name = s.Name
	found, err := v.examine(ctx)
	if err != nil {
		return err
	}
	v.superblock = found.Superblock
	return nil
}

// noSuperblock says why a volume cannot be read from its backing.
func (v *Volume) noSuperblock(err error) error {
	switch {
	case errors.Is(err, journal.ErrNoMagic):
		return &control.Failure{
			Code: control.ExitFailed, Err: fmt.Errorf("backing %s holds no volume: %w at its tail", v.metaName(), err),
			Hint: "give the backing that the volume is served with, and --journal where that has its metadata elsewhere",
		}
	case errors.Is(err, journal.ErrNewer):
		return control.Refused(fmt.Errorf("backing %s: %w", v.metaName(), err), "use that version of ramshelf or a newer one")
	case errors.Is(err, journal.ErrDamaged):
		return control.Refused(fmt.Errorf("backing %s: %w", v.metaName(), err),
			"restore one of the copies of the superblock; without, ramshelf serve --force makes a new one and keeps the content as it is")
	}
	return fmt.Errorf("backing %s: %w", v.metaName(), err)
}

// loadTail reads the superblock at the tail of b.
func loadTail(b backing) (*journal.Superblock, error) {
	area := journal.AreaOffset(b.Size())
	if area < 0 {
		return nil, journal.ErrNoMagic
	}
	return journal.Load(b, area)
}

// refuseMemory refuses to touch a volume while a memory file in dir has something of it that the backing has not, or a daemon has
// that open. Files that are not ours, and those of other volumes, do not matter.
func refuseMemory(dir string, s *journal.Superblock) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for memory files of volume %s: %w", s.Name, err)
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), config.MemorySuffix) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		id, err := arena.Identify(path)
		if errors.Is(err, arena.ErrForeign) || err == nil && id.Volume != s.UUID {
			continue
		}
		if err == nil {
			err = refuseDirty(path, s)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func refuseDirty(path string, s *journal.Superblock) error {
	a, _, err := arena.Inspect(path)
	switch {
	case errors.Is(err, arena.ErrBusy):
		return control.Refused(err, fmt.Sprintf("stop the daemon that serves volume %s", s.Name))
	case err != nil:
		return err
	}
	dirty := cache.Holds(a, 0)
	if err := a.Close(); err != nil {
		return err
	}
	if dirty {
		return control.Refused(fmt.Errorf("memory file %s holds writes of volume %s that are not on the backing", path, s.Name),
			"start ramshelf serve, which brings them home; or move the file away to go on without them")
	}
	return nil
}

// recoverOffline brings the volume home, or with dryRun only tells what that would take.
func (v *Volume) recoverOffline(ctx context.Context, dryRun bool) (*Recovery, error) {
	s := v.superblock
	r := &Recovery{
		Schema: control.Schema, Volume: s.Name, UUID: s.UUID.String(), SizeBytes: s.VolumeBytes, Journal: s.Journal.String(),
		Clean: s.Clean && s.ZeroBytes == 0, DryRun: dryRun, Seal: s.Committed, PendingZeroBytes: s.ZeroBytes,
		Lost: []uint64{}, Suspect: []control.Range{},
	}
	if r.Clean {
		if dryRun {
			return r, nil
		}
		return r, v.meta.Sync() // what says so may be from a run whose sync failed
	}
	rec, err := v.look(ctx, r)
	if err != nil || dryRun {
		return r, err
	}
	back := recovery{seal: r.Seal}
	if rec != nil {
		if back, err = v.replay(ctx, rec); err != nil {
			return r, err
		}
		back.gaveUp = r.Damage != ""
	}
	if err := v.finishZero(ctx); err != nil {
		return r, err
	}
	return r, v.storeRecovered(&back, r)
}

// look fills in r what is to be done, and gives what the journal holds where there is one to be replayed.
func (v *Volume) look(ctx context.Context, r *Recovery) (*journal.Recovered, error) {
	s := v.superblock
	switch {
	case s.Clean:
		return nil, nil
	case s.Journal == journal.KindNone:
		return nil, v.lookAtIntent(r)
	}
	rec, damage, err := v.scan(ctx)
	if err != nil {
		return nil, err
	}
	r.Seal, r.Runs, r.WriteBytes, r.ZeroBytes, r.Torn, r.LostBlocks = rec.Seal, rec.Runs, rec.BlockBytes, rec.ZeroBytes, rec.Torn, len(rec.Lost)
	for _, l := range rec.Lost[:min(len(rec.Lost), maxListed)] {
		r.Lost = append(r.Lost, l.Block)
	}
	if damage != nil {
		r.Damage = damage.Error()
		if !v.config.Force {
			return nil, damage
		}
	}
	return rec, nil
}

// storeRecovered ends a recovery: everything is home and synced. With blocks that are lost, the backing is not the volume: unless
// that is forced it is not marked clean, and a daemon goes on to refuse to read them.
func (v *Volume) storeRecovered(back *recovery, r *Recovery) error {
	s := v.superblock
	given := len(back.lost) > 0 && v.config.Force
	if given {
		back.lost = nil
	}
	if !s.Clean {
		v.beginGeneration(new(memoryFile), back)
		if err := v.beginRing(back); err != nil {
			return err
		}
	}
	s.Begin()
	s.Clean, s.Volatile, s.Committed = len(back.lost) == 0, false, back.seal
	if err := s.Store(v.meta, time.Now()); err != nil {
		return err
	}
	r.Recovered = s.Clean
	if !s.Clean {
		return &control.Failure{
			Code: control.ExitFailed,
			Err:  fmt.Errorf("volume %s is home but for %d lost blocks, where the backing has something older", s.Name, len(back.lost)),
			Hint: "serve the volume, which gives errors for them until they are written again; or --force to take the backing as it is",
		}
	}
	return nil
}
