package flush

import "time"

// zeroBytes is the longest range zeroed by one operation of a backing that can: short enough that a stop is
// noticed, long enough that an extent is few operations.
const zeroBytes = 1 << 30

// nextBlocks is how many blocks are asked of the Source at a time.
const nextBlocks = 256

// sweep is the state of one pass over what goes home. It belongs to the goroutine of the way home.
type sweep struct {
	f       *Flusher
	window  window
	zeroes  []Zero
	blocks  [nextBlocks]Block // given by Next; pos..n are not in the window yet
	pos, n  int
	last    int64 // number of the last block taken, -1 before the first
	given   int64 // bytes lent by Next and Bridge since the last sync
	ended   bool  // Next has said that the pass is complete
	bridges [MaxBridgeBlocks]Block
	scratch []piece
}

func (s *sweep) init(f *Flusher) {
	s.f = f
	s.window = newWindow(f.o.WriteBytes / BlockBytes)
	s.scratch = make([]piece, 0, BlockBytes/SectorBytes)
}

// pass writes what goes home once: the zeroes, then the blocks, with a sync after every SyncBytes and at
// the end. When it returns no operation is in flight. It reports whether there was anything to write; after
// an error the caller gives everything back by Again.
func (f *Flusher) pass() (moved bool, err error) {
	s := &f.sweep
	s.reset()
	f.homeLane.begins()
	begin, before := time.Now(), f.homeLane.bytes.Load()
	if err := f.intents.before(f); err != nil {
		return false, err
	}
	pending, err := s.zero()
	moved = pending
	for err == nil && !s.ended {
		err = s.leg()
		if pending = pending || s.given > 0; pending && err == nil {
			err = s.sync()
			pending, moved = false, true
		}
	}
	f.counters.swept(f.homeLane.bytes.Load()-before, time.Since(begin))
	return moved, err
}

func (s *sweep) reset() {
	s.window.reset()
	clear(s.blocks[:])
	s.pos, s.n, s.last, s.given, s.ended = 0, 0, -1, 0, false
}

// zero zeroes the extents of the seal and waits until all are done, since blocks may be written into them.
func (s *sweep) zero() (moved bool, err error) {
	f := s.f
	s.zeroes = mergeZeroes(f.src.Zeroes(s.zeroes[:0]))
	chunk := int64(zeroBytes)
	if f.homeLane.out.zeroer == nil {
		chunk = int64(f.o.WriteBytes)
	}
	ok := true
	for _, z := range s.zeroes {
		for ok && z.Bytes > 0 {
			j := f.homeLane.take()
			j.off, j.zeroBytes = z.Off, min(z.Bytes, chunk)
			z.Off, z.Bytes = z.Off+j.zeroBytes, z.Bytes-j.zeroBytes
			ok = f.homeLane.start(j)
		}
	}
	return len(s.zeroes) > 0, f.homeLane.wait()
}

// leg writes blocks until SyncBytes are lent or the set is at its end, and waits for the last write.
// It plans the next write while earlier ones are in flight.
func (s *sweep) leg() error {
	s.given = 0
	final, ok := false, true
	for ok {
		n := s.window.next(final)
		switch {
		case n > 0:
			ok = s.write(n)
		case final:
			ok = false
		default:
			final = !s.more()
		}
	}
	return s.f.homeLane.wait()
}

// more moves one block from the Source to the window, and the bridge to it. It reports false when the leg is
// complete.
func (s *sweep) more() bool {
	if s.pos == s.n && !s.fetch() {
		return false
	}
	b := &s.blocks[s.pos]
	s.pos++
	b.check(s.last)
	s.last = int64(b.Number)
	s.scratch = appendPieces(s.scratch[:0], b, s.f.homeLane.out.sector)
	if len(s.scratch) > 0 {
		s.bridge(s.scratch[0].off)
	}
	for _, p := range s.scratch {
		s.window.add(p)
	}
	return true
}

// fetch asks the Source for more blocks, no more than the leg has room for.
func (s *sweep) fetch() bool {
	room := (s.f.o.SyncBytes - s.given) / BlockBytes
	if s.ended || room <= 0 {
		return false
	}
	s.pos, s.n = 0, s.f.src.Next(s.blocks[:min(nextBlocks, room)])
	s.given += int64(s.n) * BlockBytes
	s.ended = s.n == 0
	return !s.ended
}

// bridge closes a small gap between the window and a piece at off with clean blocks, if all of them are
// resident.
func (s *sweep) bridge(off int64) {
	first, gap := s.window.gap(off)
	if gap == 0 || gap > int64(s.f.o.BridgeBlocks) {
		return
	}
	lent := s.bridges[:s.f.src.Bridge(first, s.bridges[:gap])]
	s.given += int64(len(lent)) * BlockBytes
	if int64(len(lent)) < gap {
		return
	}
	for i := range lent {
		s.window.add(piece{off: int64(first+uint64(i)) * BlockBytes, data: lent[i].Data})
	}
	s.f.counters.bridgedBytes.Add(uint64(gap) * BlockBytes)
}

// write starts a write of the first n pieces of the window. It reports false when the attempt is lost.
func (s *sweep) write(n int) bool {
	j := s.f.homeLane.take()
	j.off = s.window.pieces[0].off
	for i := range s.window.pieces[:n] {
		j.add(&s.window.pieces[i])
	}
	s.window.drop(n)
	return s.f.homeLane.start(j)
}

// sync makes what has been written durable and lets it turn clean. No write is in flight.
func (s *sweep) sync() error {
	f := s.f
	if f.stopping() {
		return ErrStopped
	}
	if planted("clean-before-sync") {
		f.src.Synced()
	}
	if err := f.homeLane.sync(); err != nil {
		return err
	}
	f.homeLane.begins()
	if !planted("clean-before-sync") {
		f.src.Synced()
	}
	return nil
}
