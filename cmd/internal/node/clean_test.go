package node

import (
	"bytes"
	"context"
	"os"
	"testing"

	"github.com/ramshelf/ramshelf/cache"
)

// TestKilledAfterCleanStop: a stop that is killed before it removes the memory leaves a backing that may be used without
// ramshelf: what was in the memory is older than it from then on.
func TestKilledAfterCleanStop(t *testing.T) {
	r := newRig(t)
	v := r.open()
	v.start()
	write(t, v, 0, pattern(1))
	kept := r.memoryFile() + ".kept"
	if err := os.Link(r.memoryFile(), kept); err != nil {
		t.Fatal(err)
	}
	if err := v.Drain(context.Background(), func(int64) {}); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(kept, r.memoryFile()); err != nil {
		t.Fatal(err)
	}
	copy(r.drive.data, pattern(2)) // somebody mounts it
	v = r.open()
	if got := read(t, v, 0, cache.BlockBytes); !bytes.Equal(got, pattern(2)) {
		t.Error("a block is served as it was before the volume was stopped")
	}
	if g := v.generation(); g != 1 {
		t.Errorf("generation %d, want 1", g)
	}
	closeVolume(t, v)
}
