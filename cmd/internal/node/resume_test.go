package node

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cache/arena"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// forgetful is a drive behind a page cache. A sync that fails takes what was not synced with it: it can be read as long as
// the power lasts, and no later sync brings it to the disk.
type forgetful struct {
	*drive
	disk  []byte
	dirty []span
}

type span struct{ from, to int64 }

func newForgetful() *forgetful {
	d := newDrive()
	return &forgetful{drive: d, disk: bytes.Clone(d.data)}
}

func (d *forgetful) WriteAt(p []byte, off int64) (int, error) {
	n, err := d.drive.WriteAt(p, off)
	d.set(func() { d.dirty = append(d.dirty, span{off, off + int64(n)}) })
	return n, err
}

func (d *forgetful) Sync() error {
	err := d.drive.Sync()
	d.set(func() {
		for _, s := range d.dirty {
			if err == nil {
				copy(d.disk[s.from:s.to], d.data[s.from:])
			}
		}
		d.dirty = nil
	})
	return err
}

// cut is the drive after a loss of the power.
func (d *forgetful) cut() *forgetful {
	after := newForgetful()
	copy(after.disk, d.disk)
	copy(after.data, d.disk)
	return after
}

func openWith(t *testing.T, b backing, daemon *config.Daemon, c *config.Volume) *Volume {
	t.Helper()
	v := &Volume{config: c, log: slog.New(slog.DiscardHandler), backing: b, meta: b, stop: make(chan struct{})}
	if err := v.open(context.Background(), daemon); err != nil {
		t.Fatal(err)
	}
	return v
}

// TestRestartAfterFailedSync: a run that can be read and whose sync has failed is not committed, also for a process that knows
// nothing of that.
func TestRestartAfterFailedSync(t *testing.T) {
	daemon, c, d := &config.Daemon{Shm: shmDir(t)}, testConfig(), newForgetful()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	v := openWith(t, d, daemon, c)
	v.start()
	if err := v.flusher.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	d.set(func() { d.syncFails = true })
	write(t, v, 0, pattern(1))
	if err := v.flusher.Commit(ctx); err == nil {
		t.Fatal("committed without a sync")
	}
	closeVolume(t, v)
	d.syncFails = false

	v = openWith(t, d, daemon, c)
	v.start()
	if err := v.flusher.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	closeVolume(t, v)

	if err := os.Remove(daemon.MemoryFile(c)); err != nil {
		t.Fatal(err)
	}
	v = openWith(t, d.cut(), daemon, c)
	if got := read(t, v, 0, cache.BlockBytes); !bytes.Equal(got, pattern(1)) {
		t.Error("a committed write is gone")
	}
	closeVolume(t, v)
}

// TestStaleRunIsWrittenOver: a run that was whole and never noted lies where the next one begins. Whatever becomes of
// that one, the volume can be recovered.
func TestStaleRunIsWrittenOver(t *testing.T) {
	daemon, c, d := &config.Daemon{Shm: shmDir(t)}, testConfig(), newForgetful()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	v := openWith(t, d, daemon, c)
	v.start()
	if err := v.flusher.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	before, _ := v.arena.Journal()
	write(t, v, 0, pattern(1))
	if err := v.flusher.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	closeVolume(t, v)
	a, _, err := arena.Inspect(daemon.MemoryFile(c))
	if err != nil {
		t.Fatal(err)
	}
	a.SetJournal(before) // as if it had been killed before it noted the run
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}

	v = openWith(t, d, daemon, c)
	if got := v.flusher.Status().JournalUsedBytes; got != int64(before.Head-before.Tail)*journal.BlockBytes {
		t.Errorf("%d bytes of the journal are in use", got)
	}
	write(t, v, 4096, pattern(2))
	v.start()
	if err := v.flusher.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	closeVolume(t, v)
	if err := os.Remove(daemon.MemoryFile(c)); err != nil {
		t.Fatal(err)
	}
	v = openWith(t, d.cut(), daemon, c)
	for off, want := range map[int64][]byte{0: pattern(1), 4096: pattern(2)} {
		if got := read(t, v, off, cache.BlockBytes); !bytes.Equal(got, want) {
			t.Errorf("the write at %d is gone", off)
		}
	}
	closeVolume(t, v)
}
