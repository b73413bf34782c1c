package node

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cache/arena"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush"
	"github.com/ramshelf/ramshelf/flush/home"
)

// openFile opens a volume over a file, and waits for the seal that every opening begins with, so that what is written
// afterwards stays in memory.
func openFile(t *testing.T, d *config.Daemon, c *config.Volume) *Volume {
	t.Helper()
	v, err := Open(context.Background(), d, c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	return v
}

// inspectFile looks at a backing file that nobody serves.
func inspectFile(t *testing.T, path string, look func(f *home.File)) {
	t.Helper()
	f, err := home.Open(path, home.Options{})
	if err != nil {
		t.Fatal(err)
	}
	look(f)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLifeOfVolume opens, leaves, reopens and stops a volume over real files.
func TestLifeOfVolume(t *testing.T) {
	d := &config.Daemon{Shm: shmDir(t)}
	c := testConfig()
	c.Backing = config.Backing{Kind: config.BackingFile, Path: filepath.Join(t.TempDir(), "v.img")}

	v := openFile(t, d, c)
	if g := v.generation(); g != 1 {
		t.Errorf("the first opening begins generation %d, want 1", g)
	}
	write(t, v, 3*cache.BlockBytes, pattern(1))
	closeVolume(t, v)
	var counter uint64
	inspectFile(t, c.Backing.Path, func(f *home.File) {
		s := superblockOf(t, f)
		counter = s.Incarnation.Counter
		if s.Clean {
			t.Error("the superblock is clean though the volume was not drained")
		}
		if p := make([]byte, cache.BlockBytes); readAt(t, f, p, 3*cache.BlockBytes) && !bytes.Equal(p, make([]byte, cache.BlockBytes)) {
			t.Error("the write is home although nothing asked for that")
		}
	})
	if !exists(d.MemoryFile(c)) {
		t.Fatal("the memory file is gone though the volume was not drained")
	}

	v = openFile(t, d, c)
	if got := read(t, v, 3*cache.BlockBytes, cache.BlockBytes); !bytes.Equal(got, pattern(1)) {
		t.Error("the write did not survive in memory")
	}
	if g := v.generation(); g != 1 {
		t.Errorf("generation %d after the memory was kept, want 1", g)
	}
	if n := v.superblock.Incarnation.Counter; n != counter+1 {
		t.Errorf("incarnation %d after %d", n, counter)
	}
	write(t, v, 5*cache.BlockBytes, pattern(2))
	drain(t, v)
	closeVolume(t, v)
	if exists(d.MemoryFile(c)) {
		t.Error("the memory file is still there after a drain")
	}
	inspectFile(t, c.Backing.Path, func(f *home.File) {
		if s := superblockOf(t, f); !s.Clean || s.Incarnation.Counter != counter+1 {
			t.Errorf("superblock after a drain: clean %v, incarnation %d", s.Clean, s.Incarnation.Counter)
		}
		for block, want := range map[int64][]byte{3: pattern(1), 5: pattern(2)} {
			if p := make([]byte, cache.BlockBytes); readAt(t, f, p, block*cache.BlockBytes) && !bytes.Equal(p, want) {
				t.Errorf("block %d is not home after a drain", block)
			}
		}
	})

	v = openFile(t, d, c)
	if g := v.generation(); g != 1 {
		t.Errorf("generation %d after a clean stop, want 1", g)
	}
	drain(t, v)
}

func readAt(t *testing.T, f io.ReaderAt, p []byte, off int64) bool {
	t.Helper()
	_, err := f.ReadAt(p, off)
	if err != nil {
		t.Error(err)
	}
	return err == nil
}

// TestMemoryRules has what becomes of a memory file that does not go with the backing.
func TestMemoryRules(t *testing.T) {
	elsewhere := func(drained bool) func(*testing.T, *rig) {
		return func(t *testing.T, r *rig) {
			other := *r
			other.daemon = &config.Daemon{Shm: shmDir(t)}
			v := other.open()
			if drained {
				v.start()
				drain(t, v)
			}
			closeVolume(t, v)
		}
	}
	resized := func(_ *testing.T, r *rig) { r.config.Memory += 1 << 20 }
	damaged := func(t *testing.T, r *rig) {
		f, err := os.OpenFile(r.memoryFile(), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("damage"), 0); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	nothing := func(*testing.T, *rig) {}
	tests := []struct {
		name   string
		dirty  bool
		happen func(*testing.T, *rig)
		force  bool

		refused    bool
		kept       bool
		aside      int
		generation uint64
	}{
		{name: "dirty memory that belongs is kept", dirty: true, happen: nothing, kept: true, generation: 1},
		{name: "clean memory that belongs is kept", happen: nothing, kept: true, generation: 1},
		{name: "force does not lose memory that belongs", dirty: true, happen: nothing, force: true, kept: true, generation: 1},
		{name: "dirty memory of another size is refused", dirty: true, happen: resized, refused: true},
		{name: "forced, it is set aside", dirty: true, happen: resized, force: true, aside: 1, generation: 2},
		{name: "clean memory of another size is dropped", happen: resized, generation: 2},
		{name: "dirty memory of an earlier opening is refused", dirty: true, happen: elsewhere(false), refused: true},
		{name: "forced, it is set aside for a new generation", dirty: true, happen: elsewhere(false), force: true, aside: 1, generation: 3},
		{name: "dirty memory is refused where the backing was stopped cleanly since", dirty: true, happen: elsewhere(true), refused: true},
		{name: "forced, it is a loss although the superblock is clean", dirty: true, happen: elsewhere(true), force: true, aside: 1, generation: 3},
		{name: "clean memory of an earlier opening is dropped", happen: elsewhere(true), generation: 2},
		{name: "a damaged file is set aside", dirty: true, happen: damaged, aside: 1, generation: 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			v := r.open()
			if tt.dirty {
				write(t, v, 0, pattern(9))
			}
			closeVolume(t, v)
			tt.happen(t, r)
			r.config.Force = tt.force
			before := bytes.Clone(r.drive.data)
			v, err := r.tryOpen()
			if tt.refused {
				var failure *control.Failure
				if !errors.As(err, &failure) || failure.Code != control.ExitRefused || !strings.Contains(failure.Hint, "--force") {
					t.Fatalf("open: %v, want a refusal", err)
				}
				if !exists(r.memoryFile()) || !bytes.Equal(before, r.drive.data) {
					t.Error("a refusal changed something")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := v.cache.Dirty(); got != (tt.kept && tt.dirty) {
				t.Errorf("dirty %v", got)
			}
			if got := len(setAside(t, r.memoryFile())); got != tt.aside {
				t.Errorf("%d files set aside, want %d", got, tt.aside)
			}
			if got := v.generation(); got != tt.generation {
				t.Errorf("generation %d, want %d", got, tt.generation)
			}
			closeVolume(t, v)
		})
	}
}

func TestSecondOpeningIsRefused(t *testing.T) {
	r := newRig(t)
	v := r.open()
	var failure *control.Failure
	if _, err := r.tryOpen(); !errors.As(err, &failure) || failure.Code != control.ExitRefused || !errors.Is(err, arena.ErrBusy) {
		t.Errorf("second opening: %v, want a refusal", err)
	}
	closeVolume(t, v)
}

// TestFailedStartsKeepMemory: however many starts fail at whatever point of stamping the backing, the memory goes with it.
func TestFailedStartsKeepMemory(t *testing.T) {
	faults := map[string]func(*drive){
		"first write":  func(d *drive) { d.writes = 0 },
		"second write": func(d *drive) { d.writes = 1 },
		"sync":         func(d *drive) { d.syncFails = true },
	}
	for one, first := range faults {
		for other, second := range faults {
			t.Run(one+", "+other, func(t *testing.T) {
				r := newRig(t)
				v := r.open()
				write(t, v, 0, pattern(3))
				closeVolume(t, v)
				for _, fault := range []func(*drive){first, second, first} {
					fault(r.drive)
					if _, err := r.tryOpen(); !errors.Is(err, errDrive) {
						t.Fatalf("open: %v, want %v", err, errDrive)
					}
					r.drive.writes, r.drive.syncFails = -1, false
				}
				v = r.open()
				if got := read(t, v, 0, cache.BlockBytes); !bytes.Equal(got, pattern(3)) {
					t.Error("the write did not survive")
				}
				if g := v.generation(); g != 1 {
					t.Errorf("generation %d, want 1", g)
				}
				closeVolume(t, v)
			})
		}
	}
}

// TestFailedStartUndoesSetAside: a start that fails after it set dirty memory aside puts it back, so that the next one
// cannot mistake the volume for one that lost nothing.
func TestFailedStartUndoesSetAside(t *testing.T) {
	r := newRig(t)
	v := r.open()
	write(t, v, 0, pattern(4))
	closeVolume(t, v)
	r.config.Memory += 1 << 20
	r.config.Force = true
	r.drive.writes = 0
	if _, err := r.tryOpen(); !errors.Is(err, errDrive) {
		t.Fatalf("open: %v, want %v", err, errDrive)
	}
	if aside := setAside(t, r.memoryFile()); len(aside) != 0 {
		t.Errorf("still set aside: %v", aside)
	}
	r.drive.writes = -1
	r.config.Memory -= 1 << 20
	v = r.open()
	if got := read(t, v, 0, cache.BlockBytes); !bytes.Equal(got, pattern(4)) {
		t.Error("the write is gone")
	}
	closeVolume(t, v)
}

// TestLostMemoryBeginsGeneration: what counts is how the opening before ended, not what this one promises.
func TestLostMemoryBeginsGeneration(t *testing.T) {
	for _, before := range []config.Ack{config.AckRAM, config.AckDisk} {
		for _, after := range []config.Ack{config.AckRAM, config.AckDisk} {
			t.Run(string(before)+" then "+string(after), func(t *testing.T) {
				r := newRig(t)
				r.config.Ack = before
				v := r.open()
				closeVolume(t, v)
				if err := os.Remove(r.memoryFile()); err != nil {
					t.Fatal(err)
				}
				r.config.Ack = after
				v = r.open()
				if g := v.generation(); g != 2 {
					t.Errorf("generation %d, want 2", g)
				}
				closeVolume(t, v)
			})
		}
	}
}

// TestCloseLeavesHangingReads: a read that hangs at home keeps neither Close nor Drain, and what it uses stays mapped.
func TestCloseLeavesHangingReads(t *testing.T) {
	ends := map[string]func(*Volume, context.Context) error{
		"close": func(v *Volume, ctx context.Context) error { return v.close(ctx) },
		"drain": func(v *Volume, ctx context.Context) error { return v.Drain(ctx, func(int64) {}) },
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			v := r.open()
			v.start()
			hang := make(chan struct{})
			r.drive.set(func() { r.drive.readsStop = hang })
			done := make(ended, 1)
			v.cache.Read(&cache.Op{Off: 0, Len: cache.BlockBytes, Owner: done})
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if err := end(v, ctx); !errors.Is(err, flush.ErrInFlight) {
				t.Errorf("%s: %v, want %v", name, err, flush.ErrInFlight)
			}
			close(hang)
			<-done
			if err := v.Close(); err != nil {
				t.Errorf("close again: %v", err)
			}
			if s := superblockOf(t, r.drive); s.Clean {
				t.Error("the superblock is clean")
			}
			if _, err := r.tryOpen(); !errors.Is(err, arena.ErrBusy) {
				t.Errorf("the memory was let go: %v", err)
			}
		})
	}
}

// TestDrainLeavesHangingSuperblock: a drain ends with its context though the last write of all hangs.
func TestDrainLeavesHangingSuperblock(t *testing.T) {
	r := newRig(t)
	v := r.open()
	v.start()
	for range 2 { // after the second one the journal names all that came home by the first
		if err := v.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	hang := make(chan struct{})
	defer close(hang)
	r.drive.set(func() { r.drive.writesStop = hang })
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := v.Drain(ctx, func(int64) {}); !errors.Is(err, flush.ErrInFlight) {
		t.Errorf("drain: %v, want %v", err, flush.ErrInFlight)
	}
	if !exists(r.memoryFile()) {
		t.Error("the memory file is gone")
	}
}

// TestRetireSaysWhatIsLeft: a volume that is not home as a whole is not called clean, and the reason is the true one.
func TestRetireSaysWhatIsLeft(t *testing.T) {
	r := newRig(t)
	v := r.open()
	write(t, v, 0, pattern(5))
	write(t, v, 1<<20, pattern(6))
	err := v.retire(context.Background())
	if err == nil || !strings.Contains(err.Error(), " 8192 dirty bytes, 0 zeroed ranges and 0 lost") {
		t.Errorf("retire: %v", err)
	}
	if superblockOf(t, r.drive).Clean || !exists(r.memoryFile()) {
		t.Error("the volume was stopped as if it were clean")
	}
	v = r.open()
	if got := read(t, v, 1<<20, cache.BlockBytes); !bytes.Equal(got, pattern(6)) {
		t.Error("the write did not survive")
	}
	// Damage one of the two: it is lost, the other goes home.
	for i := range v.arena.Headers {
		if v.arena.Headers[i].Number.Load() != 0 && bytes.Equal(v.arena.Data(uint32(i)), pattern(6)) {
			v.arena.Data(uint32(i))[17] ^= 1
		}
	}
	v.start()
	err = v.Drain(context.Background(), func(int64) {})
	if err == nil || !strings.Contains(err.Error(), " 0 dirty bytes, 0 zeroed ranges and 1 lost") {
		t.Errorf("drain: %v", err)
	}
	if superblockOf(t, r.drive).Clean || !exists(r.memoryFile()) {
		t.Error("the volume was stopped as if it were clean")
	}
}
