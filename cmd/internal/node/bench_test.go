package node

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/ramshelf/ramshelf/cache/arena"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/flush/home"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// BenchmarkIntent brings 1024 random blocks of a volume without journal home, from all of it and from one region, with the intent
// bitmap and without. The backing is a file where TMPDIR is.
func BenchmarkIntent(b *testing.B) {
	const size = 1 << 30
	for _, c := range []struct {
		name   string
		intent bool
		within int64
	}{{"spread/with", true, size}, {"spread/without", false, size}, {"hot/with", true, 4 << 20}, {"hot/without", false, 4 << 20}} {
		b.Run(c.name, func(b *testing.B) {
			v := benchVolume(b, size, c.intent)
			rng := rand.New(rand.NewPCG(1, 1))
			data := pattern(1)
			b.SetBytes(1024 * int64(len(data)))
			b.ResetTimer()
			for range b.N {
				for range 1024 {
					write(b, v, rng.Int64N(c.within/4096)*4096, data)
				}
				if err := v.Flush(context.Background()); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			if err := v.Drain(context.Background(), func(int64) {}); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// benchVolume is a volume without journal in a file that is allocated.
func benchVolume(b *testing.B, size int64, intent bool) *Volume {
	b.Helper()
	path := filepath.Join(b.TempDir(), "v.img")
	f, err := home.Open(path, home.Options{Direct: true, CreateBytes: journal.CreateBytes(size, 0)})
	if err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 4<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		if _, err := f.WriteAt(buf, off); err != nil {
			b.Fatal(err)
		}
	}
	shm, err := os.MkdirTemp("/dev/shm", "node-test-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(shm) })
	c := testConfig()
	c.Size, c.Memory, c.MaxDirty, c.Journal.Kind = config.Size(size), 64<<20, 16<<20, config.JournalNone
	c.Backing = config.Backing{Kind: config.BackingFile, Path: path}
	v := &Volume{config: c, log: slog.New(slog.DiscardHandler), backing: f, meta: f, stop: make(chan struct{})}
	found, err := v.examine(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	v.superblock = found.Superblock
	memory := memoryFile{path: filepath.Join(shm, "v.mem"), log: v.log,
		id: arena.Identity{Volume: v.superblock.UUID, SizeBytes: size, MemoryBytes: int64(c.Memory)}}
	if v.arena, err = memory.open(); err != nil {
		b.Fatal(err)
	}
	rec, err := v.begin(context.Background(), found, &memory)
	if err != nil {
		b.Fatal(err)
	}
	if !intent {
		v.intent = nil
	}
	if err := v.assemble(size, &rec); err != nil {
		b.Fatal(err)
	}
	v.start()
	return v
}

// BenchmarkIntentMark marks blocks all over a volume, as a pass does before it writes them.
func BenchmarkIntentMark(b *testing.B) {
	const size = 64 << 30
	s := &journal.Superblock{VolumeBytes: size, RegionBytes: journal.RegionBytes(size)}
	i := newCoolingIntent(journal.NewIntent(size, s.RegionBytes, 1), nil, s, nil)
	rng := rand.New(rand.NewPCG(1, 1))
	for range b.N {
		i.Mark(rng.Int64N(size/4096)*4096, 4096, 1)
	}
}
