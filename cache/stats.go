package cache

import "sync/atomic"

type stats struct {
	reads, readBytes, writes, writeBytes, zeroes, zeroBytes, flushes atomic.Uint64
	hits, misses, waits, evicted, filledBytes, readErrors            atomic.Uint64
	corrupt, repaired, damaged, fillAt, scrubbed                     atomic.Uint64
}

// Stats is what a cache holds and has done. Counters count from the start of the process.
type Stats struct {
	SizeBytes     int64 // of the volume
	MemoryBytes   int64 // of the slots
	MetadataBytes int64 // of headers, index and sets
	FreeBytes     int64 // slots that hold nothing
	ResidentBytes int64 // slots that hold a block

	DirtyBytes           int64  // slots not yet home and synced
	UncommittedBytes     int64  // the part of them that the loss of the memory would lose
	LimitBytes           int64  // what may be uncommitted now
	ZeroExtents          int    // zero extents not yet home and synced
	UncommittedSinceNano int64  // when the oldest uncommitted write came; 0: there is none
	Open, Committed      uint64 // numbers of the newest seal and of the newest committed one
	FillBytes            int64  // of the volume that the background fill has passed

	Reads, ReadBytes, Writes, WriteBytes, Zeroes, ZeroBytes, Flushes uint64
	Hits, Misses, Waits, Evicted, FilledBytes, ReadErrors            uint64
	Corrupt, Repaired, ScrubbedBytes                                 uint64
	Lost                                                             uint64 // blocks that are lost now
}

// Stats reads the counters.
func (c *Cache) Stats() Stats {
	s := &c.stats
	slots := int64(len(c.arena.Headers))
	free := c.free.Load()
	out := Stats{
		SizeBytes: c.size, MemoryBytes: slots * BlockBytes, MetadataBytes: c.metadataBytes(),
		FreeBytes: free * BlockBytes, ResidentBytes: (slots - free) * BlockBytes,
		FillBytes: int64(s.fillAt.Load()) * BlockBytes,
		Reads:     s.reads.Load(), ReadBytes: s.readBytes.Load(), Writes: s.writes.Load(), WriteBytes: s.writeBytes.Load(),
		Zeroes: s.zeroes.Load(), ZeroBytes: s.zeroBytes.Load(), Flushes: s.flushes.Load(),
		Hits: s.hits.Load(), Misses: s.misses.Load(), Waits: s.waits.Load(), Evicted: s.evicted.Load(),
		FilledBytes: s.filledBytes.Load(), ReadErrors: s.readErrors.Load(),
		Corrupt: s.corrupt.Load(), Repaired: s.repaired.Load(), LimitBytes: c.commitLimit() * BlockBytes, ScrubbedBytes: s.scrubbed.Load(),
	}
	c.pub.Lock()
	defer c.pub.Unlock()
	out.DirtyBytes = c.dirtySlots() * BlockBytes
	out.UncommittedBytes = int64(c.open.n) * BlockBytes
	if c.committed.Load() < c.seal { // else the sealed ones are committed and about to be given to the way home
		out.UncommittedBytes += int64(c.sealed.n) * BlockBytes
	}
	if !c.journaled {
		out.UncommittedBytes = out.DirtyBytes
	}
	out.Lost = c.lostBlocks()
	out.ZeroExtents = c.zeroes.used()
	out.UncommittedSinceNano = c.openSince
	if c.sealedSince != 0 {
		out.UncommittedSinceNano = c.sealedSince
	}
	out.Open, out.Committed = c.seal, c.committed.Load()
	return out
}

// dirtySlots is how many slots are not home and synced. Callers hold pub.
func (c *Cache) dirtySlots() int64 {
	return int64(c.open.n+c.sealed.n+c.home.n) + c.passSlots.Load()
}

// lostBlocks is how many blocks are lost now: nothing that is committed has been written over them. Callers hold pub.
func (c *Cache) lostBlocks() uint64 {
	n := c.stats.damaged.Load()
	for s := range c.lost {
		if !c.superseded(s, c.meta(s).block, c.committed.Load()) || !c.placed(s) {
			n++
		}
	}
	return n
}

func (c *Cache) metadataBytes() int64 {
	slots := int64(len(c.arena.Headers))
	return slots*(24+4+4+4+2) + slots*5/8 + slots*4/ringShare
}
