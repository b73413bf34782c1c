package cache

import (
	"sync/atomic"
	"syscall"
)

// Owner is told that an operation ended.
type Owner interface {
	// Ended is called exactly once for each operation that Read, Write, Zero, Flush or Prefetch started, before
	// that call returns or later from any goroutine. op.Err tells how.
	Ended(op *Op)
}

// Op is one operation on the cache. Its maker uses it again for the next one: what it holds grows to the largest request
// and stays. It belongs to the cache from the start of an operation until Ended, and after that to its owner, who calls
// Release once the data of a read are no longer looked at.
type Op struct {
	Off, Len int64 // bytes; within the volume
	FUA      bool  // a write is answered only once it is committed
	Payload  []byte
	Owner    Owner
	Err      syscall.Errno // result; 0: success

	kind   kind
	first  uint64   // block
	slots  []uint32 // of a write one per block, of a zero one per edge
	spare  []uint32 // for what must be read from home
	room   int      // slots that count as reserved for the open epoch
	refs   []ref    // read: what answers each block
	edges  [2]edge  // write and zero: blocks that are not covered whole
	nedges int
	number uint64 // highest number that a read depends on
	staged bool   // a write that has its slots and its payload in them

	pending atomic.Int32 // fills that the operation waits for
	failed  atomic.Uint32
	next    *Op // in a queue or list of waiters
}

type kind uint8

const (
	kindRead kind = iota
	kindWrite
	kindZero
	kindFlush
)

// edge is a block that a write or a zero covers only in part.
type edge struct {
	index  int    // of the block within the operation
	slot   uint32 // takes the new version
	base   ref    // version that the rest comes from; refPending: there is none, refHole: zeroes
	pinned bool   // base was found and, if it is a slot, is pinned
}

func (op *Op) blocks() int {
	if op.Len == 0 {
		return 0
	}
	return int((op.Off+op.Len-1)/BlockBytes - op.Off/BlockBytes + 1)
}

// span is the bytes [from, to) of block i of the operation that it is about.
func (op *Op) span(i int) (from, to int) {
	start := (int64(op.first) + int64(i)) * BlockBytes
	return int(max(0, op.Off-start)), int(min(BlockBytes, op.Off+op.Len-start))
}

// Pieces is the number of pieces of a read that ended well.
func (op *Op) Pieces() int { return len(op.refs) }

// Piece is part i of the data of a read; nil data stand for n zero bytes. The data are lent until Release.
func (c *Cache) Piece(op *Op, i int) (data []byte, n int) {
	from, to := op.span(i)
	if op.refs[i].slot == refHole {
		return nil, to - from
	}
	return c.arena.Data(op.refs[i].slot)[from:to], to - from
}

// Parts is the number of parts of the payload of a write that Reserve accepted.
func (op *Op) Parts() int { return len(op.slots) }

// Dest is the room for part i of the payload of a write that Reserve accepted; there is one part per block.
func (c *Cache) Dest(op *Op, i int) []byte {
	from, to := op.span(i)
	return c.arena.Data(op.slots[i])[from:to]
}

// Release ends the loan of the data of a read.
func (c *Cache) Release(op *Op) {
	for _, r := range op.refs {
		if r.slot < refPending {
			c.unpin(r.slot)
		}
	}
	op.refs = op.refs[:0]
}

func (op *Op) reset(k kind) {
	op.kind, op.Err, op.number, op.next = k, 0, 0, nil
	op.staged, op.room, op.nedges = false, 0, 0
	op.first = uint64(op.Off) / BlockBytes
	op.failed.Store(0)
}

func (op *Op) end(err syscall.Errno) {
	op.Err = err
	op.Owner.Ended(op)
}
