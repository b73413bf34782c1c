package journal

import (
	"errors"
	"fmt"
	"io"
)

// RefusedError says that a backing is not taken for safety's sake, and what the operator can do. The
// command's exit code for it is 5.
type RefusedError struct {
	Reason string // what is there
	Remedy string // what to do
	Err    error  // the cause, nil where Reason says all
}

// Error is reason and remedy in one line.
func (e *RefusedError) Error() string {
	if e.Err == nil {
		return e.Reason + "; " + e.Remedy
	}
	return fmt.Sprintf("%s: %v; %s", e.Reason, e.Err, e.Remedy)
}

// Unwrap is the cause.
func (e *RefusedError) Unwrap() error { return e.Err }

// Wanted is the volume that an operator asks for.
type Wanted struct {
	Name        string
	UUID        UUID  // zero: any
	VolumeBytes int64 // zero: what the superblock says, or what a device leaves
	Journal     Kind  // with KindExternal the backing that is examined is the one with the metadata
	AnyJournal  bool  // none or internal, as the superblock says; Journal is for a backing that has no superblock
	RingBytes   int64 // the ring that a backing without superblock is to get; nothing for KindNone
	DataBytes   int64 // with KindExternal the size of the backing with the data
	Extendable  bool  // the backing is a file, which may become longer
	Force       bool  // overwrite another volume's superblock, a damaged one, or data in the tail
}

// Found is what Examine makes of a backing.
type Found struct {
	Superblock *Superblock // to be stored before anything is written; its incarnation is not begun yet
	Geometry   Geometry
	Adopted    bool // there was no superblock, or Force passed over it: this one is new
}

// Examine looks for the superblock on a backing, or adopts a backing that has none and whose tail is zero.
// It only reads: the caller grows the backing to Geometry.BackingBytes, calls Superblock.Begin, Reset where there
// is a ring, and Superblock.Store. A *RefusedError means that the backing is not to be touched. With KindExternal
// the backing is the one with the metadata; for the one with the data see ForeignTail.
func Examine(r io.ReaderAt, backingBytes int64, want Wanted) (*Found, error) {
	if err := ValidateName(want.Name); err != nil {
		return nil, err
	}
	s, err := (*Superblock)(nil), ErrNoMagic
	if area := AreaOffset(backingBytes); area >= 0 {
		s, err = Load(r, area)
	}
	switch {
	case err == nil:
		if foreign := want.foreign(s); foreign == nil {
			return want.accept(s, backingBytes)
		} else if !want.Force {
			return nil, foreign
		}
	case errors.Is(err, ErrNewer):
		return nil, &RefusedError{Reason: "backing is of a newer ramshelf", Remedy: "use that version or a newer one", Err: err}
	case !errors.Is(err, ErrNoMagic) && !want.Force:
		return nil, &RefusedError{
			Reason: "backing has a superblock of which no copy can be used",
			Remedy: "restore one of the copies, or --force to make a new one and keep the content as it is", Err: err,
		}
	}
	return want.adopt(r, backingBytes)
}

// foreign refuses the superblock of another volume.
func (w *Wanted) foreign(s *Superblock) error {
	switch {
	case s.Name != w.Name:
		return &RefusedError{
			Reason: fmt.Sprintf("backing holds volume %q, not %q", s.Name, w.Name),
			Remedy: fmt.Sprintf("give --name %s or another backing, or --force to make it volume %q", s.Name, w.Name),
		}
	case w.UUID != UUID{} && s.UUID != w.UUID:
		return &RefusedError{
			Reason: fmt.Sprintf("backing holds volume %s with UUID %s, not %s", s.Name, s.UUID, w.UUID),
			Remedy: "give the backing of that volume, or --force to take this one",
		}
	}
	return nil
}

// accept takes a backing that holds the volume, unless it is not as wanted. Force helps only where a backing has
// grown: what else is asked for cannot be had of this volume.
func (w *Wanted) accept(s *Superblock, backingBytes int64) (*Found, error) {
	switch {
	case w.VolumeBytes != 0 && s.VolumeBytes != w.VolumeBytes:
		remedy := fmt.Sprintf("leave --size out or give --size %d", s.VolumeBytes)
		if s.VolumeBytes < w.VolumeBytes {
			remedy += "; ramshelf resize makes it larger"
		}
		return nil, &RefusedError{Reason: fmt.Sprintf("volume %s has %d bytes, not %d", s.Name, s.VolumeBytes, w.VolumeBytes), Remedy: remedy}
	case s.Journal == KindExternal && w.Journal != KindExternal:
		return nil, &RefusedError{
			Reason: fmt.Sprintf("backing is the journal of volume %s, not its data", s.Name),
			Remedy: "give the backing with the data (--backing) and this one as --journal",
		}
	case s.Journal != KindExternal && w.Journal == KindExternal:
		return nil, &RefusedError{
			Reason: fmt.Sprintf("backing holds volume %s itself with journal %s and is not an external journal", s.Name, s.Journal),
			Remedy: fmt.Sprintf("give it as --backing with --journal %s, or another backing as --journal", s.Journal),
		}
	case s.Journal != w.Journal && !w.AnyJournal:
		return nil, &RefusedError{
			Reason: fmt.Sprintf("volume %s has journal %s, not %s", s.Name, s.Journal, w.Journal),
			Remedy: fmt.Sprintf("give --journal %s", s.Journal),
		}
	case s.DataBytes != w.DataBytes && s.Journal == KindExternal:
		if !w.Force || w.DataBytes < s.VolumeBytes {
			return nil, &RefusedError{
				Reason: fmt.Sprintf("journal of volume %s belongs to a backing of %d bytes, not of %d", s.Name, s.DataBytes, w.DataBytes),
				Remedy: "give the backing that it belongs to, or --force if this is it and it has grown",
			}
		}
		s.DataBytes = w.DataBytes
	}
	return &Found{Superblock: s, Geometry: s.geometry(backingBytes)}, nil
}

// adopt makes a superblock for a backing that has none.
func (w *Wanted) adopt(r io.ReaderAt, backingBytes int64) (*Found, error) {
	g, err := Plan(backingBytes, *w)
	if err != nil {
		return nil, err
	}
	if !w.Force {
		if err := checkTail(r, g.MetadataOffset, min(backingBytes, AreaOffset(g.BackingBytes)+AreaBytes)); err != nil {
			return nil, err
		}
	}
	s := &Superblock{
		UUID: w.UUID, Name: w.Name, VolumeBytes: g.VolumeBytes, AreaOffset: AreaOffset(g.BackingBytes), Journal: w.Journal, Clean: true,
		RingOffset: g.RingOffset, RingBytes: g.RingBytes,
		BitmapOffset: g.BitmapOffset, BitmapBytes: g.BitmapBytes, RegionBytes: g.RegionBytes,
	}
	s.MetadataBytes = s.AreaOffset + AreaBytes - g.MetadataOffset
	if w.Journal == KindExternal {
		s.DataBytes = w.DataBytes
	}
	if s.UUID == (UUID{}) {
		s.UUID = NewUUID()
	}
	return &Found{Superblock: s, Geometry: g, Adopted: true}, nil
}

// ForeignTail returns the superblock at the tail of a backing that is to hold the data of a volume whose metadata
// lie elsewhere: with one there the backing has metadata of its own, and it is nil as it should be otherwise. An
// error that is ErrDamaged or ErrNewer says that something there looks like one and cannot be used.
func ForeignTail(r io.ReaderAt, backingBytes int64) (*Superblock, error) {
	area := AreaOffset(backingBytes)
	if area < 0 {
		return nil, nil
	}
	s, err := Load(r, area)
	if errors.Is(err, ErrNoMagic) {
		return nil, nil
	}
	return s, err
}

// checkTail refuses a backing where the metadata would overwrite something.
func checkTail(r io.ReaderAt, from, to int64) error {
	b := make([]byte, min(1<<20, max(to-from, 0)))
	for from < to {
		p := b[:min(int64(len(b)), to-from)]
		if n, err := r.ReadAt(p, from); n < len(p) {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read tail of backing: %w", err)
		}
		for i, c := range p {
			if c != 0 {
				return &RefusedError{
					Reason: fmt.Sprintf("tail of the backing, where the metadata go, holds data (at byte %d)", from+int64(i)),
					Remedy: "keep the metadata elsewhere (--journal BACKING), or --force to overwrite it",
				}
			}
		}
		from += int64(len(p))
	}
	return nil
}
