package journal

import (
	"errors"
	"fmt"
	"io"
	"time"
)

// Writer is a backing as Store needs it; *os.File satisfies it.
type Writer interface {
	io.WriterAt
	Sync() error
}

// copyOffsets are where the copies lie in the superblock area.
var copyOffsets = [2]int64{0, AreaBytes - SuperblockBytes}

// areaAlignment is what the superblock area begins at a multiple of.
const areaAlignment = SuperblockBytes

// AreaOffset is where the superblock area of a backing of that size begins; negative if it has no room.
func AreaOffset(backingBytes int64) int64 {
	return (backingBytes - AreaBytes) &^ (areaAlignment - 1)
}

// Load reads both copies in the superblock area at areaOffset and returns the one that holds. A copy that
// cannot be read or is damaged does not matter as long as the other is valid. Otherwise the error is
// ErrNewer if a copy is of a newer format, ErrNoMagic if there is no sign of a superblock in either, else
// that of the copies.
func Load(r io.ReaderAt, areaOffset int64) (*Superblock, error) {
	var found [2]*Superblock
	var errs [2]error
	for i, at := range copyOffsets {
		found[i], errs[i] = readCopy(r, areaOffset+at)
		if errors.Is(errs[i], ErrNewer) {
			return nil, errs[i]
		}
	}
	newest := 0
	if found[0] == nil || found[1] != nil && found[1].Sequence > found[0].Sequence {
		newest = 1
	}
	s := found[newest]
	switch {
	case s != nil && s.AreaOffset != areaOffset:
		return nil, fmt.Errorf("%w: it was written for offset %d and found at %d", ErrDamaged, s.AreaOffset, areaOffset)
	case s != nil:
		s.newest = newest
		return s, nil
	case errors.Is(errs[0], ErrNoMagic) && errors.Is(errs[1], ErrNoMagic):
		return nil, ErrNoMagic
	case errors.Is(errs[0], ErrNoMagic): // that one copy is missing does not make the error one of no superblock
		return nil, fmt.Errorf("read superblock: copy 0: %v; copy 1: %w", errs[0], errs[1])
	case errors.Is(errs[1], ErrNoMagic):
		return nil, fmt.Errorf("read superblock: copy 0: %w; copy 1: %v", errs[0], errs[1])
	}
	return nil, fmt.Errorf("read superblock: copy 0: %w; copy 1: %w", errs[0], errs[1])
}

func readCopy(r io.ReaderAt, off int64) (*Superblock, error) {
	b := make([]byte, SuperblockBytes)
	if n, err := r.ReadAt(b, off); n < len(b) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return Decode(b)
}

// Store raises the sequence number of s, notes now as the time and writes both copies, each followed by a
// sync. After an error either the old or the new superblock holds.
func (s *Superblock) Store(w Writer, now time.Time) error {
	s.Sequence++
	s.WrittenAt = time.Unix(0, now.UnixNano()).UTC()
	b := s.Encode()
	other := 1 - s.newest
	for _, i := range [2]int{other, s.newest} {
		n, err := w.WriteAt(b, s.AreaOffset+copyOffsets[i])
		if err == nil && n < len(b) {
			err = io.ErrShortWrite
		}
		if err == nil {
			err = w.Sync()
		}
		if err != nil {
			return fmt.Errorf("write superblock, copy %d: %w", i, err)
		}
	}
	s.newest = other
	return nil
}
