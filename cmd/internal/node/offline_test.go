package node

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush/home"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// offlineVolume is a volume on b that nobody serves.
func offlineVolume(b backing, force bool) (*Volume, error) {
	v := &Volume{config: &config.Volume{Force: force}, log: slog.New(slog.DiscardHandler), backing: b, meta: b}
	return v, v.identify(context.Background())
}

// recoverOn recovers the volume on b.
func recoverOn(b backing, force, dryRun bool) (*Recovery, error) {
	v, err := offlineVolume(b, force)
	if err != nil {
		return nil, err
	}
	return v.recoverOffline(context.Background(), dryRun)
}

// openOn serves the volume on b, without its background work.
func openOn(r *rig, b backing) (*Volume, error) {
	c := *r.config
	v := &Volume{config: &c, log: slog.New(slog.DiscardHandler), backing: b, meta: b, stop: make(chan struct{})}
	return v, v.open(context.Background(), r.daemon)
}

// crash makes a volume of which much is in the journal and nothing home, and lets it lose its memory. It returns the disk and the
// content of the volume.
func crash(t *testing.T, r *rig) (disk, content []byte) {
	t.Helper()
	v := r.open()
	v.start()
	content = make([]byte, testSize)
	rng := rand.New(rand.NewPCG(1, 2))
	for commit := range 3 {
		for range 40 {
			block := rng.Int64N(testSize / cache.BlockBytes)
			data := pattern(byte(rng.IntN(256)))
			write(t, v, block*cache.BlockBytes, data)
			copy(content[block*cache.BlockBytes:], data)
		}
		at, n := int64(commit*100), int64(50)
		zero(t, v, at*cache.BlockBytes, n*cache.BlockBytes)
		clear(content[at*cache.BlockBytes : (at+n)*cache.BlockBytes])
		if err := v.flusher.Commit(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	closeVolume(t, v)
	loseMemory(t, r)
	return r.drive.data, content
}

func loseMemory(t *testing.T, r *rig) {
	t.Helper()
	if err := os.Remove(r.memoryFile()); err != nil {
		t.Fatal(err)
	}
}

func zero(t *testing.T, v *Volume, off, n int64) {
	t.Helper()
	done := make(ended, 1)
	v.cache.Zero(&cache.Op{Off: off, Len: n, Owner: done})
	if errno := <-done; errno != 0 {
		t.Fatalf("zero at %d: %v", off, errno)
	}
}

func TestRecover(t *testing.T) {
	r := newRig(t)
	disk, content := crash(t, r)
	before := superblockOf(t, r.drive)
	dry := newPlug(disk, -1)
	dry.holes = true
	found, err := recoverOn(dry, false, true)
	if err != nil || found.Volume != "v" || found.UUID != before.UUID.String() || found.SizeBytes != testSize || found.Journal != "internal" ||
		found.Runs < 3 || found.WriteBytes < 100*cache.BlockBytes || found.ZeroBytes < 100*cache.BlockBytes || found.LostBlocks != 0 ||
		found.Clean || found.Recovered || !found.DryRun || found.Damage != "" || found.SuspectBytes != 0 {
		t.Errorf("dry run: %+v, %v", found, err)
	}
	if !dry.unchanged() {
		t.Error("a dry run changed the disk")
	}

	p := newPlug(disk, -1)
	done, err := recoverOn(p, false, false)
	if err != nil || !done.Recovered || done.Seal != found.Seal || done.WriteBytes != found.WriteBytes {
		t.Errorf("recover: %+v, %v", done, err)
	}
	if !bytes.Equal(p.content(0, testSize), content) {
		t.Error("the backing is not the volume")
	}
	s := superblockOf(t, p)
	generations := len(before.Generations) + 1
	if !s.Clean || s.Volatile || s.Incarnation.Counter != before.Incarnation.Counter+1 || s.Incarnation.Stamp == before.Incarnation.Stamp ||
		s.RingStamp == before.RingStamp || s.Committed != done.Seal || len(s.Generations) != generations || !s.Generations[generations-1].Rollback {
		t.Errorf("superblock %+v after %+v", s, before)
	}
	again := newPlug(p.content(0, p.Size()), -1)
	nothing, err := recoverOn(again, false, false)
	if err != nil || !nothing.Clean || nothing.Recovered || !again.unchanged() {
		t.Errorf("a second time: %+v, %v", nothing, err)
	}
	v, err := openOn(r, p)
	if err != nil {
		t.Fatal(err)
	}
	if g := v.generation(); g != s.Generations[generations-1].ID {
		t.Errorf("served in generation %d after %+v", g, s.Generations)
	}
	if got := read(t, v, 0, 1<<20); !bytes.Equal(got, content[:1<<20]) {
		t.Error("the volume is not what it was")
	}
	closeVolume(t, v)
}

// TestRecoverUnplugged cuts the power at every write and every sync of a recovery: the next one ends it.
func TestRecoverUnplugged(t *testing.T) {
	disk, content := crash(t, newRig(t))
	rng := rand.New(rand.NewPCG(3, 4))
	for n := 1; ; n++ {
		p := newPlug(disk, n)
		_, err := recoverOn(p, false, false)
		cut := p.left == 0
		if (err != nil) != cut {
			t.Fatalf("operation %d: %v", n, err)
		}
		p = p.replugged(rng, -1)
		r, err := recoverOn(p, false, false)
		if err != nil || !r.Recovered && !r.Clean || !bytes.Equal(p.content(0, testSize), content) || !superblockOf(t, p).Clean {
			t.Fatalf("after a cut at operation %d: %+v, %v", n, r, err)
		}
		if !cut {
			if n < 10 {
				t.Fatalf("a recovery of %d operations is none", n)
			}
			return
		}
	}
}

// damage flips a bit in the data of the second run of the ring.
func damage(t *testing.T, disk []byte) {
	t.Helper()
	s, err := journal.Load(bytes.NewReader(disk), journal.AreaOffset(int64(len(disk))))
	if err != nil {
		t.Fatal(err)
	}
	ring := disk[s.RingOffset : s.RingOffset+s.RingBytes]
	var starts []int
	for at := 0; at < len(ring); at += cache.BlockBytes {
		c, err := journal.DecodeChunk(ring[at:at+cache.BlockBytes], s.RingStamp)
		if err == nil && c.Index == 0 && len(c.Entries) > 20 {
			starts = append(starts, at)
		}
	}
	if len(starts) < 3 {
		t.Fatalf("only %d runs with data", len(starts))
	}
	ring[starts[1]+10*cache.BlockBytes] ^= 1
}

func TestRecoverDamagedJournal(t *testing.T) {
	disk, _ := crash(t, newRig(t))
	damage(t, disk)
	for _, dryRun := range []bool{true, false} {
		p := newPlug(disk, -1)
		r, err := recoverOn(p, false, dryRun)
		var f *control.Failure
		if !errors.As(err, &f) || f.Code != control.ExitRefused || !strings.Contains(f.Hint, "--force") || r == nil || r.Damage == "" || r.Recovered {
			t.Errorf("dry run %v: %+v, %v", dryRun, r, err)
		}
		if !p.unchanged() {
			t.Errorf("dry run %v: a refusal changed something", dryRun)
		}
	}
	p := newPlug(disk, -1)
	r, err := recoverOn(p, true, false)
	if err != nil || !r.Recovered || r.Damage == "" || r.Runs == 0 {
		t.Errorf("forced: %+v, %v", r, err)
	}
	if s := superblockOf(t, p); !s.Clean || s.Committed != r.Seal {
		t.Errorf("forced: superblock %+v, recovered up to %d", s, r.Seal)
	}
}

// lose lets a block of a volume be lost: its slot goes bad before it is committed.
func lose(t *testing.T, r *rig) {
	t.Helper()
	v := r.open()
	write(t, v, 0, pattern(5))
	write(t, v, 1<<20, pattern(6))
	for i := range v.arena.Headers {
		if v.arena.Headers[i].Number.Load() != 0 && bytes.Equal(v.arena.Data(uint32(i)), pattern(6)) {
			v.arena.Data(uint32(i))[17] ^= 1
		}
	}
	v.start()
	if err := v.flusher.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	closeVolume(t, v)
	loseMemory(t, r)
}

func TestRecoverLostBlocks(t *testing.T) {
	r := newRig(t)
	lose(t, r)
	p := newPlug(r.drive.data, -1)
	for range 2 {
		found, err := recoverOn(p, false, false)
		var f *control.Failure
		if !errors.As(err, &f) || f.Code != control.ExitFailed || !strings.Contains(f.Hint, "--force") ||
			found.LostBlocks != 1 || !slices.Equal(found.Lost, []uint64{256}) || found.Recovered {
			t.Fatalf("%+v, %v", found, err)
		}
		if !bytes.Equal(p.content(0, cache.BlockBytes), pattern(5)) {
			t.Error("what is not lost is not home")
		}
		if superblockOf(t, p).Clean {
			t.Error("the volume is called clean")
		}
	}
	v, err := openOn(r, p)
	if err != nil {
		t.Fatal(err)
	}
	if n := v.Status().LostBlocks; n != 1 {
		t.Errorf("served with %d lost blocks", n)
	}
	closeVolume(t, v)
	loseMemory(t, r)
	if found, err := recoverOn(p, true, false); err != nil || !found.Recovered || found.LostBlocks != 1 || !superblockOf(t, p).Clean {
		t.Errorf("forced: %+v, %v", found, err)
	}
}

// fileRig is a volume in real files.
func fileRig(t *testing.T) (*config.Daemon, *config.Volume, *config.Offline) {
	t.Helper()
	d := &config.Daemon{Shm: shmDir(t)}
	c := testConfig()
	var o config.Offline
	if err := o.Backing.UnmarshalText([]byte("file:" + filepath.Join(t.TempDir(), "v.img"))); err != nil {
		t.Fatal(err)
	}
	c.Backing, o.Shm = o.Backing, d.Shm
	return d, c, &o
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// TestRecoverRefuses has what keeps a recovery from touching a volume.
func TestRecoverRefuses(t *testing.T) {
	d, c, o := fileRig(t)
	refused := func(what string, code control.ExitCode, words ...string) {
		t.Helper()
		_, err := Recover(context.Background(), o, quiet())
		var f *control.Failure
		if !errors.As(err, &f) || f.Code != code {
			t.Errorf("%s: %v, want exit code %d", what, err, code)
			return
		}
		for _, word := range words {
			if said := f.Error() + " " + f.Hint; !strings.Contains(said, word) {
				t.Errorf("%s: %q does not say %q", what, said, word)
			}
		}
	}
	if _, err := Recover(context.Background(), o, quiet()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no backing: %v", err)
	}
	if exists(c.Backing.Path) {
		t.Error("recover made the backing")
	}
	v := openFile(t, d, c)
	refused("served", control.ExitRefused, "in use", "stop the daemon")
	write(t, v, 0, pattern(1))
	closeVolume(t, v)
	refused("dirty memory", control.ExitRefused, d.MemoryFile(c), "start ramshelf serve")

	// The name of the file does not matter, nor what else is there.
	odd := filepath.Join(d.Shm, "odd"+config.MemorySuffix)
	if err := errors.Join(os.Rename(d.MemoryFile(c), odd), os.WriteFile(d.MemoryFile(c), []byte("something else"), 0o600),
		os.Mkdir(filepath.Join(d.Shm, "folder"+config.MemorySuffix), 0o700)); err != nil {
		t.Fatal(err)
	}
	refused("dirty memory elsewhere", control.ExitRefused, odd)
	if err := os.Rename(odd, odd+".away"); err != nil {
		t.Fatal(err)
	}
	if r, err := Recover(context.Background(), o, quiet()); err != nil || !r.Recovered {
		t.Errorf("without the memory: %+v, %v", r, err)
	}

	// A daemon has the memory of the volume open, though not this backing.
	if err := os.Remove(d.MemoryFile(c)); err != nil {
		t.Fatal(err)
	}
	v = openFile(t, d, c)
	copied := *o
	if err := copied.Backing.UnmarshalText([]byte("file:" + c.Backing.Path + ".copy")); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(c.Backing.Path)
	if err == nil {
		err = os.WriteFile(copied.Backing.Path, content, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	original := o
	o = &copied
	refused("memory in use", control.ExitRefused, "in use", "stop the daemon that serves volume v")
	o = original
	closeVolume(t, v)

	o.Backing = config.Backing{Kind: config.BackingFile, Path: filepath.Join(t.TempDir(), "none.img")}
	if err := os.WriteFile(o.Backing.Path, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	refused("no superblock", control.ExitFailed, "holds no volume", "--journal")
}

// TestRecoverExternalJournal replays from a backing of its own, and is refused what does not go together.
func TestRecoverExternalJournal(t *testing.T) {
	d, c, o := fileRig(t)
	if err := c.Journal.UnmarshalText([]byte("file:" + c.Backing.Path + ".journal")); err != nil {
		t.Fatal(err)
	}
	v := openFile(t, d, c)
	write(t, v, 8192, pattern(7))
	if err := v.flusher.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	closeVolume(t, v)
	if err := os.Remove(d.MemoryFile(c)); err != nil {
		t.Fatal(err)
	}
	for name, given := range map[string]config.Offline{
		"the data alone":    {Backing: c.Backing},
		"the journal alone": {Backing: c.Journal.Backing},
		"the wrong way":     {Backing: c.Journal.Backing, Journal: config.Journal{Kind: config.JournalBacking, Backing: c.Backing}},
	} {
		var f *control.Failure
		if _, err := Recover(context.Background(), &given, quiet()); !errors.As(err, &f) || !strings.Contains(f.Hint, "--journal") {
			t.Errorf("%s: %v, want a refusal with a hint", name, err)
		}
	}
	o.Journal = c.Journal
	if r, err := Recover(context.Background(), o, quiet()); err != nil || !r.Recovered || r.Journal != "external" {
		t.Errorf("%+v, %v", r, err)
	}
	inspectFile(t, c.Backing.Path, func(f *home.File) {
		if p := make([]byte, cache.BlockBytes); readAt(t, f, p, 8192) && !bytes.Equal(p, pattern(7)) {
			t.Error("the write is not home")
		}
	})
}
