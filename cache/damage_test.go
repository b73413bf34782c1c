package cache_test

import (
	"bytes"
	"errors"
	"hash/crc32"
	"syscall"
	"testing"

	"github.com/ramshelf/ramshelf/cache"
)

func journaled(cfg *cache.Config) { cfg.Journaled = true }

// drainPass takes everything that is left of the sweep and writes it home. It reports whether there was anything.
func (v *volume) drainPass() (moved bool) {
	var batch [16]cache.Version
	for n := v.Next(batch[:]); n > 0; n = v.Next(batch[:]) {
		for _, b := range batch[:n] {
			v.disk.write(b)
		}
		moved = true
	}
	return moved
}

// TestLostOnItsWayHome has the only block of a sweep found damaged: nothing is lent, so nothing is synced. The slot is used
// again, for a block that the next sync has nothing to do with.
func TestLostOnItsWayHome(t *testing.T) {
	v := newVolume(t, testSize, testMemory, journaled)
	c := v.client()
	mustWrite(t, c, 0, 0xa5)
	v.commit()
	v.flipAll(t, bytes.Repeat([]byte{0xa5}, 4096))
	if !v.Sweep() || v.drainPass() {
		t.Fatal("the damaged block was lent")
	}
	if _, err := c.read(0, 4096); !errors.Is(err, syscall.EIO) {
		t.Fatalf("the damaged block reads with %v", err)
	}
	mustWrite(t, c, 0, 1)
	v.commit()
	v.Sweep() // the lost version is dropped
	mustWrite(t, c, 50, 7)
	v.drainPass()
	v.Synced()
	v.commit()
	v.sweep()
	if got := v.disk.data[50*4096]; got != 7 || v.Dirty() {
		t.Errorf("home has %d of an answered write, want 7; dirty %v", got, v.Dirty())
	}
}

// TestCommitOfRepaired has a version damaged and repaired on its way into the journal: the checksum that goes with it is
// that of the data that go.
func TestCommitOfRepaired(t *testing.T) {
	p := bytes.Repeat([]byte{0xa5}, 4096)
	v := newVolume(t, testSize, testMemory, func(cfg *cache.Config) {
		cfg.Journaled = true
		cfg.Repair = func(_, _ uint64, dst []byte) bool { copy(dst, p); return true }
	})
	mustWrite(t, v.client(), 0, 0xa5)
	v.flipAll(t, p)
	v.Seal()
	var batch [4]cache.Version
	if n := v.Take(batch[:]); n != 1 {
		t.Fatalf("%d versions, want 1", n)
	}
	if b := batch[0]; !bytes.Equal(b.Data, p) || b.Sum != crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)) {
		t.Errorf("checksum %08x does not go with the data", b.Sum)
	}
}

// TestDamagedHeaderOnItsWayHome flips the block number of a slot that is committed: it counts as a lost block, and the volume
// does not pass for clean.
func TestDamagedHeaderOnItsWayHome(t *testing.T) {
	v := newVolume(t, testSize, testMemory, journaled)
	mustWrite(t, v.client(), 7*4096, 0xa5)
	v.commit()
	for i := range v.arena.Headers {
		if h := &v.arena.Headers[i]; h.Number.Load() != 0 {
			h.Block.Store(h.Block.Load() ^ 1<<3)
		}
	}
	for range 2 {
		v.sweep()
		if s := v.Stats(); s.Lost != 1 || !v.Dirty() {
			t.Errorf("%d blocks are lost, dirty %v", s.Lost, v.Dirty())
		}
	}
}
