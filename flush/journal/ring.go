package journal

import "fmt"

// MaxLost is how many lost blocks the first run of a ring has room for: see Reset.
const MaxLost = maxReserve / 2 * EntriesPerChunk

// maxReserve is how many blocks of a ring its runs leave free, fewer in a ring of less than 1024 blocks. One half is
// for marks: without it a ring that is full of blocks could never name the tail that would empty it. The other
// half is for the first run of the ring that follows this one: see Reset.
const maxReserve = 64

// RingState is where a ring has got to. Positions are blocks since the ring was made, and only grow.
type RingState struct {
	Stamp     uint64 // of its chunks
	Head      uint64 // position of the next run
	Tail      uint64 // durable: everything before this position is home and synced, and a durable run says so
	Committed uint64 // the highest committed seal
}

// Ring is the bookkeeping of a journal ring: which place a run takes, and what its chunks say. It does no I/O. A
// run is Begin, Chunk as often as needed, and Commit when all of it has been written and synced. A Ring is not safe
// for concurrent use.
type Ring struct {
	offset  int64  // in the backing, bytes
	blocks  uint64 // of all
	reserve uint64 // of those, left free
	st      RingState
	tail    uint64 // that the next run names

	run   Chunk  // the last chunk of the run under way
	next  uint64 // position of its next chunk
	open  bool   // a run was begun and lacks its last chunk
	whole bool   // it has its last chunk
	marks bool   // it has no data so far
}

// NewRing returns the ring of bytes at offset in the backing, which has got to st.
func NewRing(offset, bytes int64, st RingState) *Ring {
	r := &Ring{offset: offset, blocks: uint64(bytes) / BlockBytes, st: st, tail: st.Tail}
	r.reserve = reserveBlocks(r.blocks)
	if bytes <= 0 || st.Tail > st.Head || st.Head-st.Tail > r.blocks {
		panic(fmt.Sprintf("journal: ring of %d blocks from %d to %d", r.blocks, st.Tail, st.Head))
	}
	return r
}

func reserveBlocks(blocks uint64) uint64 { return min(maxReserve, blocks/16) }

// State is where the ring has got to.
func (r *Ring) State() RingState { return r.st }

// Blocks is how many blocks the ring has. A position's place is the position modulo Blocks.
func (r *Ring) Blocks() uint64 { return r.blocks }

// FreeBlocks is how many blocks a run may use now: what lies behind the head up to the durable tail, less a
// reserve (at most 64 blocks). A run without EntryBlock may take half of the reserve besides, so that
// a mark of a few blocks that names the next tail has room also when this is 0.
func (r *Ring) FreeBlocks() uint64 {
	used := r.st.Head - r.st.Tail + r.reserve
	return r.blocks - min(used, r.blocks)
}

// RunBlocks is how many blocks of the ring a run needs for that many entries with data and others without, if every
// chunk but the last has EntriesPerChunk entries.
func RunBlocks(blocks, others int) uint64 {
	return uint64(blocks) + uint64(max(1, (blocks+others+EntriesPerChunk-1)/EntriesPerChunk))
}

// Advance says that everything before the position tail is home and synced. The next run that is begun names it; its
// space is free once that run is durable. A tail never goes back; one beyond the head panics.
func (r *Ring) Advance(tail uint64) {
	if tail > r.st.Head {
		panic(fmt.Sprintf("journal: tail %d beyond head %d", tail, r.st.Head))
	}
	r.tail = max(r.tail, tail)
}

// TailPending reports whether Advance was called and no durable run names its tail yet.
func (r *Ring) TailPending() bool { return r.tail > r.st.Tail }

// Begin starts a run at the head that commits seal, which is not older than the one before. Starting again forgets
// an attempt that failed: what is left of it is written over or does not count.
func (r *Ring) Begin(seal, generation uint64) {
	if seal < r.st.Committed {
		panic(fmt.Sprintf("journal: seal %d after %d", seal, r.st.Committed))
	}
	r.run = Chunk{Start: r.st.Head, Seal: seal, Generation: generation, Committed: r.st.Committed, Tail: r.tail}
	r.next, r.open, r.whole, r.marks = r.st.Head, true, false, true
}

// Chunk encodes the header block of the next chunk of the run into dst, BlockBytes long, and returns its position. The
// data of its block entries follow at the positions behind it, in their order. It panics beyond EntriesPerChunk,
// beyond the free space, without Begin, behind the last chunk, and on an entry that the format does not allow.
func (r *Ring) Chunk(dst []byte, entries []Entry, last bool) uint64 {
	if !r.open {
		panic("journal: chunk of no run")
	}
	c := &r.run
	if r.next != c.Start {
		c.Link = c.Sum
		c.Index++
	}
	c.Position, c.Last, c.Entries = r.next, last, entries
	r.next = c.end()
	r.marks = r.marks && r.next == c.Position+1
	limit := r.blocks - r.reserve
	if r.marks {
		limit += r.reserve / 2
	}
	if r.next-r.st.Tail > limit {
		panic(fmt.Sprintf("journal: run from %d to %d overruns the tail at %d in a ring of %d blocks", c.Start, r.next, r.st.Tail, r.blocks))
	}
	c.encode(dst, r.st.Stamp)
	c.Entries = nil
	r.open, r.whole = !last, last
	return c.Position
}

// Offset is where the block at a position lies in the backing, in bytes. The next position lies behind it, but for
// the last block of the ring, which the first follows.
func (r *Ring) Offset(pos uint64) int64 { return r.offset + int64(pos%r.blocks)*BlockBytes }

// Commit says that the run is durable, all of its chunks and data. The head moves behind it, its tail becomes
// the durable one, and its seal is committed.
func (r *Ring) Commit() {
	if !r.whole {
		panic("journal: commit of a run without its last chunk")
	}
	r.whole = false
	r.st.Head, r.st.Tail, r.st.Committed = r.next, r.run.Tail, r.run.Seal
}
