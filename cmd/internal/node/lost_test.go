package node

import (
	"context"
	"log/slog"
	"os"
	"syscall"
	"testing"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cache/arena"
)

// readErrno is how a read of the block at off ends.
func readErrno(v *Volume, off int64) syscall.Errno {
	done := make(ended, 1)
	op := &cache.Op{Off: off, Len: cache.BlockBytes, Owner: done}
	v.cache.Read(op)
	errno := <-done
	v.cache.Release(op)
	return errno
}

// flipSlots flips a bit of the only version of the block that has that content.
func flipSlots(v *Volume, content []byte) {
	for i := range v.arena.Headers {
		if data := v.arena.Data(uint32(i)); v.arena.Headers[i].Number.Load() != 0 && string(data) == string(content) {
			data[17] ^= 1
		}
	}
}

// TestKilledBeforeLostBlocksAreInMemory: a start that is killed when the backing has its stamp, and its memory has not the blocks
// that are lost, leaves them lost.
func TestKilledBeforeLostBlocksAreInMemory(t *testing.T) {
	r := newRig(t)
	v := r.open()
	v.start()
	if err := v.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	write(t, v, 0, pattern(1))
	flipSlots(v, pattern(1))
	if err := v.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if errno := readErrno(v, 0); errno != syscall.EIO {
		t.Fatalf("the damaged block reads with %v", errno)
	}
	closeVolume(t, v)
	if err := os.Remove(r.memoryFile()); err != nil {
		t.Fatal(err)
	}

	c := *r.config
	v = &Volume{config: &c, log: slog.New(slog.DiscardHandler), backing: r.drive, meta: r.drive}
	found, err := v.examine(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	v.superblock = found.Superblock
	memory := memoryFile{
		path: r.memoryFile(), log: v.log, stamp: found.Superblock.Incarnation.Stamp,
		id: arena.Identity{Volume: found.Superblock.UUID, SizeBytes: testSize, MemoryBytes: testMemory},
	}
	if v.arena, err = memory.open(); err != nil {
		t.Fatal(err)
	}
	rec, err := v.begin(context.Background(), found, &memory)
	if err != nil || len(rec.lost) != 1 {
		t.Fatalf("%d lost blocks, %v", len(rec.lost), err)
	}
	if err := v.arena.Close(); err != nil { // killed
		t.Fatal(err)
	}

	for range 2 {
		v = r.open()
		if errno := readErrno(v, 0); errno != syscall.EIO || v.cache.Stats().Lost != 1 {
			t.Errorf("the lost block reads with %v, and %d are lost", errno, v.cache.Stats().Lost)
		}
		if g := v.generation(); g != 2 {
			t.Errorf("generation %d, want 2", g)
		}
		closeVolume(t, v)
	}
}
