package node

import (
	"errors"
	"os"
	"testing"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// TestInheritedWritesAreVolatile: writes that were answered from memory under one promise are lost with the memory under
// the next as well, if they were not committed before.
func TestInheritedWritesAreVolatile(t *testing.T) {
	for name, tt := range map[string]struct {
		dirty    bool
		restarts int
		rollback uint64
	}{
		"dirty":               {dirty: true, restarts: 1, rollback: 2},
		"dirty, twice":        {dirty: true, restarts: 2, rollback: 2},
		"nothing to be lost":  {restarts: 1, rollback: 1},
		"lost with the first": {dirty: true, rollback: 2},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			v := r.open()
			if tt.dirty {
				write(t, v, 0, pattern(1))
			}
			closeVolume(t, v)
			r.config.Ack = config.AckDisk
			for range tt.restarts {
				closeVolume(t, r.open())
			}
			if err := os.Remove(r.memoryFile()); err != nil {
				t.Fatal(err)
			}
			v = r.open()
			if g := v.rollback(); g != tt.rollback {
				t.Errorf("the volume went back last in generation %d, want %d", g, tt.rollback)
			}
			closeVolume(t, v)
		})
	}
}

// TestForcedRecoveryIsRollback: who forces a damaged journal gives up writes that were answered, whatever the promise was.
func TestForcedRecoveryIsRollback(t *testing.T) {
	r := newRig(t)
	r.config.Ack = config.AckDisk
	v := r.open()
	v.start()
	first, _ := v.arena.Journal()
	for i := range int64(3) {
		write(t, v, i*cache.BlockBytes, pattern(byte(i)))
	}
	offset := v.superblock.RingOffset + int64(first.Head+1)*journal.BlockBytes
	closeVolume(t, v)
	if err := os.Remove(r.memoryFile()); err != nil {
		t.Fatal(err)
	}
	r.drive.data[offset]++
	var failure *control.Failure
	if _, err := r.tryOpen(); !errors.As(err, &failure) || failure.Code != control.ExitRefused {
		t.Fatalf("open: %v, want a refusal", err)
	}
	r.config.Force = true
	v = r.open()
	if g := v.rollback(); g != 2 {
		t.Errorf("the volume went back last in generation %d, want 2", g)
	}
	closeVolume(t, v)
}
