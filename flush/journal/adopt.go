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

// Geometry is how a backing is divided. All values are in bytes.
type Geometry struct {
	VolumeBytes    int64 // the volume lies from 0 to here
	MetadataOffset int64 // the metadata from here to the end of the superblock area
	BackingBytes   int64 // what the backing must have: more than it has where a file is to be extended
}

// Plan divides a backing without superblock. volumeBytes is the wanted size of the volume; 0 means all that
// the metadata leave, which only a device is asked for. A file may be extended: extendable.
func Plan(backingBytes, volumeBytes int64, extendable bool) (Geometry, error) {
	switch {
	case volumeBytes < 0 || volumeBytes%SectorBytes != 0:
		return Geometry{}, fmt.Errorf("volume size of %d bytes is not a multiple of %d; give one that is", volumeBytes, SectorBytes)
	case volumeBytes == 0 && extendable:
		return Geometry{}, fmt.Errorf("file of %d bytes holds no volume yet; give the size of the volume in it (--size)", backingBytes)
	case volumeBytes > backingBytes:
		return Geometry{}, fmt.Errorf("volume of %d bytes is larger than its backing of %d; give a smaller size or a larger backing",
			volumeBytes, backingBytes)
	}
	area := AreaOffset(backingBytes)
	if volumeBytes == 0 {
		volumeBytes = max(area, 0)
	}
	if volumeBytes == 0 || area < volumeBytes {
		if !extendable {
			return Geometry{}, fmt.Errorf("volume of %d bytes and %d bytes of metadata do not fit a device of %d; give at most %d (--size) or keep the metadata elsewhere (--journal BACKING)",
				volumeBytes, AreaBytes, backingBytes, max(area, 0))
		}
		backingBytes = CreateBytes(volumeBytes)
		area = AreaOffset(backingBytes)
	}
	return Geometry{VolumeBytes: volumeBytes, MetadataOffset: area, BackingBytes: backingBytes}, nil
}

// CreateBytes is the size of a file that is made for a volume of volumeBytes.
func CreateBytes(volumeBytes int64) int64 {
	return (volumeBytes+areaAlignment-1)&^(areaAlignment-1) + AreaBytes
}

// Wanted is the volume that an operator asks for.
type Wanted struct {
	Name        string
	UUID        UUID  // zero: any
	VolumeBytes int64 // zero: what the superblock says, or what a device leaves
	Journal     Kind
	Extendable  bool // the backing is a file, which may become longer
	Force       bool // overwrite another volume's superblock, a damaged one, or data in the tail
}

// Found is what Examine makes of a backing.
type Found struct {
	Superblock *Superblock // to be stored before anything is written; its incarnation is not begun yet
	Geometry   Geometry
	Adopted    bool // there was no superblock, or Force passed over it: this one is new
}

// Examine looks for the superblock on a backing, or adopts a backing that has none and whose tail is zero.
// It only reads: the caller grows the backing to Geometry.BackingBytes, calls Superblock.Begin and
// Superblock.Store. A *RefusedError means that the backing is not to be touched.
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

// accept takes a backing that holds the volume, unless it is not as wanted. Force does not help here: what
// is asked for cannot be had of this volume.
func (w *Wanted) accept(s *Superblock, backingBytes int64) (*Found, error) {
	switch {
	case w.VolumeBytes != 0 && s.VolumeBytes != w.VolumeBytes:
		return nil, &RefusedError{
			Reason: fmt.Sprintf("volume %s has %d bytes, not %d", s.Name, s.VolumeBytes, w.VolumeBytes),
			Remedy: fmt.Sprintf("leave --size out or give --size %d", s.VolumeBytes),
		}
	case s.Journal != w.Journal:
		return nil, &RefusedError{
			Reason: fmt.Sprintf("volume %s has journal %s, not %s", s.Name, s.Journal, w.Journal),
			Remedy: fmt.Sprintf("give --journal %s", s.Journal),
		}
	}
	g := Geometry{VolumeBytes: s.VolumeBytes, MetadataOffset: s.MetadataOffset(), BackingBytes: backingBytes}
	return &Found{Superblock: s, Geometry: g}, nil
}

// adopt makes a superblock for a backing that has none.
func (w *Wanted) adopt(r io.ReaderAt, backingBytes int64) (*Found, error) {
	g, err := Plan(backingBytes, w.VolumeBytes, w.Extendable)
	if err != nil {
		return nil, err
	}
	if !w.Force {
		if err := checkTail(r, g.MetadataOffset, min(backingBytes, g.MetadataOffset+AreaBytes)); err != nil {
			return nil, err
		}
	}
	s := &Superblock{
		UUID: w.UUID, Name: w.Name, VolumeBytes: g.VolumeBytes,
		MetadataBytes: AreaBytes, AreaOffset: g.MetadataOffset, Journal: w.Journal, Clean: true,
	}
	if s.UUID == (UUID{}) {
		s.UUID = NewUUID()
	}
	return &Found{Superblock: s, Geometry: g, Adopted: true}, nil
}

// checkTail refuses a backing where the metadata would overwrite something.
func checkTail(r io.ReaderAt, from, to int64) error {
	b := make([]byte, 64<<10)
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
