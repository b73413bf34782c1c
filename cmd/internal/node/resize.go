package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// Resized is what Resize did.
type Resized struct {
	Volume       string
	OldBytes     int64
	SizeBytes    int64
	BackingBytes int64
	Moved        bool // false: there was nothing to do
	Recovery     *Recovery
}

// grower is a backing that can become longer.
type grower interface{ Grow(bytes int64) error }

// Resize makes a volume larger that no daemon serves, and recovers it before where it was not stopped cleanly. A file becomes as
// long as it must; anything else must have grown before. It may be killed at any point and run again: until the metadata are at
// the new tail those at the old place hold. What is refused for safety is a control.Refused.
func Resize(ctx context.Context, o *config.Offline, log *slog.Logger) (*Resized, error) {
	v, err := openOffline(ctx, o, (*Volume).identifyGrown, log)
	if err != nil {
		return nil, err
	}
	r, err := v.resize(ctx, int64(o.Size))
	return r, errors.Join(err, v.closeBackings())
}

// identifyGrown is identify for a backing that may have grown.
func (v *Volume) identifyGrown(ctx context.Context) error {
	area := journal.AreaOffset(v.meta.Size())
	_, err := loadTail(v.meta)
	if err == nil || !journal.MayHaveGrown(v.meta, area) {
		return v.identify(ctx)
	}
	v.log.Info("no superblock at the tail: looking for one before it", "backing", v.metaName())
	p := progressLog{log: v.log, what: "searching the superblock"}
	s, err := v.search(journal.Search{Progress: p.report}).Find(ctx)
	if err != nil {
		return v.noSuperblock(err)
	}
	v.config.Name, v.superblock = s.Name, s
	return nil
}

// search is a search of the backing with the metadata.
func (v *Volume) search(s journal.Search) journal.Search {
	s.Backing, s.Bytes = v.meta, v.meta.Size()
	if m, ok := v.meta.(extentMapper); ok {
		s.Extents = m.Extents
	}
	return s
}

// How far a start looks for the metadata of a backing that has none at its tail, before it takes it as a new one: it must not read
// a whole disk. In a file and an NBD export with holes it sees all, as a rule.
const (
	grownBytes  = 256 << 20
	grownProbes = 1024
)

// refuseGrown refuses to take a backing as a new one that has grown and has its metadata still where its tail was.
func (v *Volume) refuseGrown(ctx context.Context) error {
	area := journal.AreaOffset(v.meta.Size())
	if _, err := loadTail(v.meta); err == nil || !journal.MayHaveGrown(v.meta, area) {
		return nil
	}
	s, err := v.search(journal.Search{MostBytes: grownBytes, MostProbes: grownProbes}).Find(ctx)
	switch {
	case errors.Is(err, journal.ErrNoMagic):
		return nil
	case err != nil:
		return fmt.Errorf("backing %s: %w", v.metaName(), err)
	}
	why := fmt.Errorf("backing %s has grown: the metadata of volume %s, of %d bytes, end at %d, and it has %d", v.metaName(), s.Name,
		s.VolumeBytes, s.AreaOffset+journal.AreaBytes, v.meta.Size())
	if s.Journal == journal.KindExternal {
		return control.Refused(why, "give it its old size again; ramshelf serve --force begins a new journal on it")
	}
	return control.Refused(why, fmt.Sprintf("run ramshelf resize --backing %s --size SIZE, with %d to keep the size; ramshelf serve --force takes the backing as a new volume",
		v.metaName(), s.VolumeBytes))
}

// resize gives the volume the size.
func (v *Volume) resize(ctx context.Context, size int64) (*Resized, error) {
	old := v.superblock
	r := &Resized{Volume: old.Name, OldBytes: old.VolumeBytes, SizeBytes: size, BackingBytes: v.meta.Size()}
	if size < old.VolumeBytes {
		return nil, v.refused(journal.RefuseShrink(old, size))
	}
	if old.Journal == journal.KindExternal {
		return nil, control.Later(fmt.Sprintf("volume %s: resize with a journal on a backing of its own", old.Name))
	}
	if !old.Clean || old.ZeroBytes != 0 {
		var err error
		if r.Recovery, err = v.recoverOffline(ctx, false); err != nil {
			return r, err
		}
	}
	grower, _ := v.meta.(grower)
	grown, bytes, err := journal.PlanGrow(v.meta, v.meta.Size(), old, journal.Wanted{
		VolumeBytes: size, Extendable: grower != nil && v.config.Backing.Kind == config.BackingFile, Force: v.config.Force,
	})
	if err != nil {
		return r, v.refused(err)
	}
	if grown.VolumeBytes == old.VolumeBytes && grown.AreaOffset == old.AreaOffset {
		return r, v.meta.Sync() // what says so may be from a run whose sync failed
	}
	if bytes > v.meta.Size() {
		if err := grower.Grow(bytes); err != nil {
			return r, err
		}
	}
	if err := v.move(ctx, grown); err != nil {
		return r, err
	}
	r.Moved, r.BackingBytes = true, v.meta.Size()
	v.log.Info("resized", "volume", old.Name, "from", config.FormatBytes(r.OldBytes), "to", config.FormatBytes(size))
	return r, nil
}

// move stores the superblock of the volume as it has grown, and makes the place of the old metadata read as zeroes. Where the new
// metadata lie over the old ones a copy of the old superblock may stay, in the ring: only the one at the tail holds.
func (v *Volume) move(ctx context.Context, grown *journal.Superblock) error {
	grown.Begin()
	grown.Clean = true
	if err := grown.Store(v.meta, time.Now()); err != nil {
		return err
	}
	v.superblock = grown
	if err := v.finishZero(ctx); err != nil {
		return err
	}
	return grown.Store(v.meta, time.Now())
}
