package journal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Search looks for the superblock of a backing that has grown since that was stored, so that it does not lie at the tail any more.
// A Search that is zero but for the backing looks everywhere.
type Search struct {
	Backing io.ReaderAt
	Bytes   int64 // of the backing
	// Extents, if not nil, tells holes: it calls fn for the extents of n bytes from off on, ascending; what has bit 1 of flags
	// set reads as zeroes.
	Extents func(off, n int64, fn func(off, n int64, flags uint32) bool) error
	// MostBytes, if not 0, ends the search when so many bytes have been read, and then it looks where a device of whole units of
	// ProbeUnit had its last block, at the last MostProbes of those.
	MostBytes  int64
	MostProbes int
	// Progress, if not nil, is told how many bytes of the backing the search is past.
	Progress func(done, total int64)
}

// ProbeUnit is what the sizes of volumes of volume managers and clouds are multiples of.
const ProbeUnit = 1 << 30

const (
	searchWindow = 1 << 30 // bytes of which the extents are kept at a time
	searchRead   = 1 << 20
)

// errSearched ends a search that has read as much as it may.
var errSearched = errors.New("searched enough")

// search is the state of a Search. It goes from the end of the backing to its start.
type search struct {
	Search
	left  int64 // bytes that it may read; negative: any number
	buf   []byte
	found *Superblock // the one with the highest sequence number so far
	until int64       // where to stop once one was found: a copy of a newer one may lie among those of an older one
}

// Find returns the superblock that lies where it says that it does, the last on the backing. Without one the error is ErrNoMagic,
// also where the bounds of the search ended it; ErrNewer, wrapped, says that it has a newer format. What cannot be read is
// passed over.
func (o Search) Find(ctx context.Context) (*Superblock, error) {
	s := &search{Search: o, left: o.MostBytes, buf: make([]byte, searchRead), until: -1}
	if s.left == 0 {
		s.left = -1
	}
	err := s.backwards(ctx)
	if errors.Is(err, errSearched) {
		if err = nil; s.found == nil {
			err = s.probe(ctx)
		}
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("search superblock: %w", err)
	case s.found == nil:
		return nil, ErrNoMagic
	}
	return Load(o.Backing, s.found.AreaOffset)
}

// backwards looks at every block from the end on.
func (s *search) backwards(ctx context.Context) error {
	for end := roundDown(s.Bytes); end > max(s.until, 0); {
		start := max(0, end-searchWindow)
		spans, err := s.data(start, end)
		if err != nil {
			return err
		}
		for _, d := range slices.Backward(spans) {
			if err := s.blocks(ctx, d[0], d[1]); err != nil {
				return err
			}
		}
		end = start
		if s.Progress != nil {
			s.Progress(s.Bytes-end, s.Bytes)
		}
	}
	return nil
}

// data are the parts from start to end that are not known to be zeroes, ascending, in whole blocks.
func (s *search) data(start, end int64) (spans [][2]int64, err error) {
	if s.Extents == nil {
		return [][2]int64{{start, end}}, nil
	}
	err = s.Extents(start, end-start, func(off, n int64, flags uint32) bool {
		if from, to := roundDown(off), min(roundUp(off+n), end); flags&2 == 0 {
			if last := len(spans) - 1; last >= 0 && spans[last][1] >= from {
				spans[last][1] = max(spans[last][1], to)
			} else {
				spans = append(spans, [2]int64{from, to})
			}
		}
		return true
	})
	return spans, err
}

// blocks looks at the blocks of a part, the last one first.
func (s *search) blocks(ctx context.Context, from, to int64) error {
	for to > from && to > s.until {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := s.buf[:min(to-from, searchRead)]
		if s.left >= 0 {
			if s.left < int64(len(b)) {
				return errSearched
			}
			s.left -= int64(len(b))
		}
		to -= int64(len(b))
		whole := readFull(s.Backing, b, to) == nil
		for at := len(b) - BlockBytes; at >= 0; at -= BlockBytes {
			block := b[at:][:BlockBytes]
			if !whole && readFull(s.Backing, block, to+int64(at)) != nil {
				continue
			}
			if err := s.look(block, to+int64(at)); err != nil {
				return err
			}
		}
	}
	return nil
}

// look takes a block up that is a copy of a superblock in its place.
func (s *search) look(b []byte, at int64) error {
	if at < s.until {
		return nil
	}
	c, err := Decode(b)
	switch {
	case errors.Is(err, ErrNewer):
		return err
	case err != nil || at != c.AreaOffset+copyOffsets[0] && at != c.AreaOffset+copyOffsets[1]:
		return nil
	}
	if s.found == nil {
		s.until = max(0, at-AreaBytes)
	}
	if s.found == nil || c.Sequence > s.found.Sequence {
		s.found = c
	}
	return nil
}

// probe looks at the last block of the sizes that the backing may have had.
func (s *search) probe(ctx context.Context) error {
	b := s.buf[:BlockBytes]
	end := s.Bytes &^ (ProbeUnit - 1)
	for range s.MostProbes {
		if end <= 0 || s.found != nil {
			break
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if at := end - BlockBytes; readFull(s.Backing, b, at) == nil {
			if err := s.look(b, at); err != nil {
				return err
			}
		}
		end -= ProbeUnit
	}
	return nil
}

// MayHaveGrown reports whether no superblock was ever stored at the tail of a backing, whose superblock area would begin at
// areaOffset, though a Store there may have been cut short: Store begins a new place with its copy 1. Then the one that holds may
// lie before it.
func MayHaveGrown(r io.ReaderAt, areaOffset int64) bool {
	if areaOffset < 0 {
		return false
	}
	s, err := readCopy(r, areaOffset)
	return errors.Is(err, ErrNoMagic) || err == nil && s.AreaOffset+copyOffsets[1] == areaOffset
}
