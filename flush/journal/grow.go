package journal

import (
	"fmt"
	"io"
	"slices"
)

// PlanGrow plans that the volume of s becomes larger, or that its metadata go to the tail of a backing that has become larger.
// want has the size of the volume, whether the backing may be extended, and Force, which overwrites what lies where the metadata
// go. It only reads; s, which is clean, stays as it is. The caller extends the backing to backingBytes where it has less, and stores
// grown. Until then s holds; from then on grown does, and that the place of the old metadata is not zero yet is pending in it.
// It must be told apart from s: with the same AreaOffset and VolumeBytes there is nothing to do. A *RefusedError means that the
// backing is not to be touched.
func PlanGrow(r io.ReaderAt, size int64, s *Superblock, want Wanted) (grown *Superblock, backingBytes int64, err error) {
	switch {
	case s.Journal == KindExternal:
		return nil, 0, fmt.Errorf("grow volume %s: with a journal on a backing of its own that lands later", s.Name)
	case !s.Clean || s.ZeroBytes != 0:
		return nil, 0, fmt.Errorf("grow volume %s: it is not clean", s.Name)
	case want.VolumeBytes < s.VolumeBytes:
		return nil, 0, RefuseShrink(s, want.VolumeBytes)
	}
	w := Wanted{VolumeBytes: want.VolumeBytes, Journal: s.Journal, Extendable: want.Extendable}
	g := layout(w.VolumeBytes, s.RingBytes, size)
	if g.MetadataOffset < roundUp(w.VolumeBytes) {
		if !w.Extendable {
			return nil, 0, fmt.Errorf("volume %s of %d bytes and %d bytes of metadata do not fit a device of %d; make that larger, or give at most %d (--size)",
				s.Name, w.VolumeBytes, ExternalBytes(w.VolumeBytes, s.RingBytes), size, volumeBefore(AreaOffset(size)-s.RingBytes))
		}
		g = layout(w.VolumeBytes, s.RingBytes, CreateBytes(w.VolumeBytes, s.RingBytes))
	}
	n := *s
	n.Generations = slices.Clone(s.Generations)
	n.VolumeBytes, n.AreaOffset, n.MetadataBytes = g.VolumeBytes, AreaOffset(g.BackingBytes), AreaOffset(g.BackingBytes)+AreaBytes-g.MetadataOffset
	n.RingOffset, n.RingStamp = g.RingOffset, 0
	n.BitmapOffset, n.BitmapBytes, n.RegionBytes = g.BitmapOffset, g.BitmapBytes, g.RegionBytes
	if n.AreaOffset != s.AreaOffset {
		// Where the new area begins in the old one its copy 0 may lie on an old copy 1: copy 1 goes first, and by then holds.
		n.newest = 0
	}
	if left := min(s.AreaOffset+AreaBytes, g.MetadataOffset) - s.MetadataOffset(); left > 0 {
		n.ZeroOffset, n.ZeroBytes = s.MetadataOffset(), left
	}
	if err := n.Validate(); err != nil {
		return nil, 0, fmt.Errorf("grow volume %s: %w", s.Name, err)
	}
	if !want.Force {
		if err := n.checkRoom(r, size, s); err != nil {
			return nil, 0, err
		}
	}
	return &n, g.BackingBytes, nil
}

// RefuseShrink says that the volume of s cannot become smaller.
func RefuseShrink(s *Superblock, volumeBytes int64) error {
	return &RefusedError{
		Reason: fmt.Sprintf("volume %s has %d bytes and cannot shrink to %d", s.Name, s.VolumeBytes, volumeBytes),
		Remedy: "make a volume of that size and copy what is to stay",
	}
}

// checkRoom refuses a backing that has something where the metadata of n go, besides those of old and what a Store of n
// that was cut short has left.
func (n *Superblock) checkRoom(r io.ReaderAt, size int64, old *Superblock) error {
	oldFrom, oldTo := old.MetadataOffset(), old.AreaOffset+AreaBytes
	for _, part := range [2][2]int64{
		{n.MetadataOffset(), n.AreaOffset},
		{n.AreaOffset + SuperblockBytes, n.AreaOffset + copyOffsets[1]},
	} {
		from, to := part[0], min(part[1], size)
		if err := checkTail(r, from, min(to, oldFrom)); err != nil {
			return err
		}
		if err := checkTail(r, max(from, oldTo), to); err != nil {
			return err
		}
	}
	return nil
}
