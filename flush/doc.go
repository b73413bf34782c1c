// Package flush brings dirty blocks home.
//
// A Flusher takes seals of a Source (the cache, by way of an adapter), writes the blocks of each seal to a
// Backing in one ascending sweep, and tells the Source when they are home and synced. Neighbors are merged
// into large writes, several of which are in flight at a time. Nothing turns clean before a sync that follows
// every write of it has succeeded; after any failure everything since the last good sync is written again.
//
// The flow of one seal, with the goroutine that runs each stage:
//
//  1. seal    (runLoop)    Source.Seal: what was published before it belongs to it
//  2. zero    (runWriter)  the extents of Source.Zeroes, all of them before any block
//  3. plan    (runLoop)    blocks of Source.Next and Source.Bridge become writes; the next write is planned
//     while others are in flight
//  4. write   (runWriter, or runLoop where the backing writes asynchronously)  started in ascending order, up
//     to Options.Depth at once, no two overlapping
//  5. sync    (runLoop)    after every SyncBytes of blocks and at the end, with no write in flight
//  6. answer  (runLoop)    Source.Synced after each sync, Source.Committed after the last
//
// Memory belongs to the Source: the flusher only borrows the blocks that Next and Bridge give, until it calls
// Synced or Again. Its own memory is a fixed number of write descriptors.
//
// The sub-packages do not know one another: home is files and disks as a Backing, journal the metadata on it.
package flush
