// Package cache is the hot set of a volume: blocks of 4 KiB in slots that never change once they are published.
//
// # Writes
//
// A write reserves slots, fills them, merges what it does not cover from the version before, and checksums them. All of
// that happens outside any lock. Then, under one short lock (Cache.pub), it takes the next number of the one counter, its
// slots get that number, and they become the newest versions of their blocks. A seal takes a number under the same lock, so
// every seal is a point in time: all writes below it are in, all above are out. Nothing waits under that lock.
//
// # Versions
//
// At most three versions of a block exist: one in the open epoch, one in the sealed epoch that is being committed, and a
// clean one that readers still look at. A version is freed when a newer one of the same epoch supersedes it, or when it is
// home and synced and is either superseded or evicted.
//
// # Zero extents
//
// A zeroed range of any length is one entry with a number. For each block the higher number of slot and extent holds.
//
// # Locks
//
// Cache.pub, then shard.mu, then zeroSet.mu; pool.mu and queue.mu are leaves. A slot is pinned only under the lock of its
// block's shard, and only unpinned slots that are out of the index are used again.
//
// # What a restart finds
//
// Everything that must survive the process lies in the arena; the index and the lists are made again from its headers.
// The order of the stores is the whole of the protocol: data, header, number, "published" in the file's head, and only
// then the clearing of the headers that were superseded. So the newest number that is not above "published" is the truth
// for each block, whichever instruction the process died at.
package cache
