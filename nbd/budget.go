package nbd

import (
	"math/bits"
	"sync"
)

// budget hands out bytes in the order in which they were asked for. It is safe for concurrent use.
type budget struct {
	mu      sync.Mutex
	free    int64
	waiters []*budgetWaiter
}

type budgetWaiter struct {
	bytes int64
	ready chan struct{} // closed when the bytes are granted
}

// tryAcquire takes n bytes if that needs no waiting. It reports false when it took nothing.
func (b *budget) tryAcquire(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.take(n)
}

// take is tryAcquire for who holds b.mu.
func (b *budget) take(n int64) bool {
	if len(b.waiters) > 0 || b.free < n {
		return false
	}
	b.free -= n
	return true
}

// acquire takes n bytes, waiting for its turn. It reports false when done was closed first; then it took nothing.
// n must not exceed the whole budget.
func (b *budget) acquire(n int64, done <-chan struct{}) bool {
	b.mu.Lock()
	if b.take(n) {
		b.mu.Unlock()
		return true
	}
	w := &budgetWaiter{n, make(chan struct{})}
	b.waiters = append(b.waiters, w)
	b.mu.Unlock()
	select {
	case <-w.ready:
		return true
	case <-done:
		b.abandon(w)
		return false
	}
}

// release gives n bytes back.
func (b *budget) release(n int64) {
	b.mu.Lock()
	b.free += n
	b.grant()
	b.mu.Unlock()
}

// waiting reports whether somebody waits for bytes.
func (b *budget) waiting() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.waiters) > 0
}

// grant serves the waiters that have their turn.
func (b *budget) grant() {
	for len(b.waiters) > 0 && b.waiters[0].bytes <= b.free {
		b.free -= b.waiters[0].bytes
		close(b.waiters[0].ready)
		b.waiters = b.waiters[1:]
	}
}

// abandon takes w out of the queue, or gives back what it was granted meanwhile.
func (b *budget) abandon(w *budgetWaiter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.waiters {
		if b.waiters[i] == w {
			b.waiters = append(b.waiters[:i], b.waiters[i+1:]...)
			b.grant() // w may have held up those behind it
			return
		}
	}
	b.free += w.bytes
	b.grant()
}

// staging is the memory for payloads for which the device had no room. Buffers are powers of two and are used
// again; those in use and those kept for use together never exceed limit. It is safe for concurrent use.
type staging struct {
	budget
	limit int64

	buffers sync.Mutex
	used    int64
	idle    int64
	free    [maxStagingClass + 1][][]byte // by the logarithm of the size
}

// The smallest and the largest staging buffer are 1<<minStagingClass and 1<<maxStagingClass bytes.
const (
	minStagingClass = 12
	maxStagingClass = 25
)

func newStaging(limit int64) *staging {
	return &staging{budget: budget{free: limit}, limit: limit}
}

// grow sees to it that one buffer of n bytes can be had. It is called before the first get.
func (s *staging) grow(n int) {
	if size := int64(1) << stagingClass(n); size > s.limit {
		s.release(size - s.limit)
		s.limit = size
	}
}

func stagingClass(n int) int { return max(minStagingClass, bits.Len(uint(n-1))) }

// get returns a buffer of n bytes, waiting for its turn, or nil when done was closed first.
func (s *staging) get(n int, done <-chan struct{}) []byte {
	class := stagingClass(n)
	size := int64(1) << class
	if !s.acquire(size, done) {
		return nil
	}
	s.buffers.Lock()
	defer s.buffers.Unlock()
	s.used += size
	if k := len(s.free[class]); k > 0 {
		b := s.free[class][k-1]
		s.free[class] = s.free[class][:k-1]
		s.idle -= size
		return b[:n]
	}
	if s.used+s.idle > s.limit {
		s.dropIdle()
	}
	return make([]byte, size)[:n]
}

// put gives back a buffer of get.
func (s *staging) put(b []byte) {
	size := int64(cap(b))
	class := stagingClass(cap(b))
	s.buffers.Lock()
	s.used -= size
	s.idle += size
	s.free[class] = append(s.free[class], b[:size])
	s.buffers.Unlock()
	s.release(size)
}

// trim lets go of the buffers kept for use when none is in use.
func (s *staging) trim() {
	s.buffers.Lock()
	defer s.buffers.Unlock()
	if s.used == 0 && s.idle > 0 {
		s.dropIdle()
	}
}

func (s *staging) dropIdle() {
	s.idle = 0
	for i := range s.free {
		s.free[i] = nil
	}
}
