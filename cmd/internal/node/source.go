package node

import (
	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/flush"
)

// source is the cache as the flusher sees it.
type source struct {
	*cache.Cache
	versions []cache.Version // of the way home
	taken    []cache.Version // of the commits
}

// Zeroes appends the extents of the seal that must be zeroed at home.
func (s *source) Zeroes(dst []flush.Zero) []flush.Zero {
	s.Cache.Zeroes(func(off, n int64) { dst = append(dst, flush.Zero{Off: off, Bytes: n}) })
	return dst
}

// Next fills dst with the next versions of the seal.
func (s *source) Next(dst []flush.Block) int {
	return s.lend(dst, s.Cache.Next(s.room(len(dst))))
}

// Take fills dst with the next versions of the seal, for the journal.
func (s *source) Take(dst []flush.Block) int {
	if len(s.taken) < len(dst) {
		s.taken = make([]cache.Version, len(dst))
	}
	n := s.Cache.Take(s.taken[:len(dst)])
	for i, v := range s.taken[:n] {
		dst[i] = flush.Block(v)
	}
	return n
}

// Bridge fills dst with clean neighbors.
func (s *source) Bridge(first uint64, dst []flush.Block) int {
	return s.lend(dst, s.Cache.Bridge(first, s.room(len(dst))))
}

func (s *source) room(n int) []cache.Version {
	if len(s.versions) < n {
		s.versions = make([]cache.Version, n)
	}
	return s.versions[:n]
}

func (s *source) lend(dst []flush.Block, n int) int {
	for i, v := range s.versions[:n] {
		dst[i] = flush.Block(v)
	}
	return n
}
