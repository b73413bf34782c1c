package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// stopped is a volume of two MiB that was stopped cleanly, with content everywhere. extra bytes lie between it and its metadata.
func stopped(t *testing.T, kind config.JournalKind, extra int64) (r *rig, disk []byte) {
	t.Helper()
	r = newRig(t)
	r.config.Size, r.config.Journal.Kind = smallSize, kind
	ring := int64(journal.MinRingBytes)
	if kind == config.JournalNone {
		ring = 0
	}
	r.drive.data = make([]byte, journal.CreateBytes(smallSize, ring)+extra)
	for at := range int64(smallSize / cache.BlockBytes) {
		copy(r.drive.data[at*cache.BlockBytes:], pattern(byte(at)))
	}
	v := r.open()
	v.start()
	write(t, v, 4096, pattern(77))
	drain(t, v)
	closeVolume(t, v)
	return r, r.drive.data
}

const smallSize = 2 << 20

// resizeOn gives the volume on p another size.
func resizeOn(p *plug, kind config.BackingKind, size int64, force bool) (*Resized, error) {
	v := &Volume{config: &config.Volume{Force: force, Backing: config.Backing{Kind: kind}}, log: slog.New(slog.DiscardHandler), backing: p, meta: p}
	if err := v.identifyGrown(context.Background()); err != nil {
		return nil, err
	}
	return v.resize(context.Background(), size)
}

// checkResized: the volume has its old content and zeroes behind it, and no superblock before its metadata.
func checkResized(t *testing.T, p *plug, before []byte, size int64) {
	t.Helper()
	s := superblockOf(t, p)
	if s.VolumeBytes != size || !s.Clean || s.ZeroBytes != 0 || !p.settled() {
		t.Errorf("superblock %+v, synced %v", s, p.settled())
	}
	room := p.content(0, s.MetadataOffset())
	if !bytes.Equal(room[:smallSize], before[:smallSize]) {
		t.Error("the content is not what it was")
	}
	if !isZero(room[smallSize:size]) {
		t.Error("what is new is not zero")
	}
	for at := int64(0); at < s.MetadataOffset(); at += cache.BlockBytes {
		if string(room[at:at+8]) == "RSHELFSB" {
			t.Errorf("a superblock is left at %d", at)
		}
	}
}

// TestResizeUnplugged cuts the power at every step of a resize: at every point the volume is served as it was or as it is to be, or it is
// refused with the remedy, and the next resize ends it.
func TestResizeUnplugged(t *testing.T) {
	const area = journal.AreaBytes
	rng := rand.New(rand.NewPCG(5, 6))
	for _, kind := range []config.JournalKind{config.JournalInternal, config.JournalNone} {
		for i, c := range []struct {
			name  string
			size  int64 // of the volume, afterwards
			extra int64 // room before the metadata
			grown int64 // what the backing has become larger by
			kind  config.BackingKind
		}{
			{"file, a block", smallSize + 4096, 0, 0, config.BackingFile},
			{"file, copy on copy", smallSize + area - 4096, 0, 0, config.BackingFile},
			{"file, a superblock area", smallSize + area, 0, 0, config.BackingFile},
			{"file, more than the metadata", 8 << 20, 0, 0, config.BackingFile},
			{"file that has grown", smallSize + 4<<20, 0, 8 << 20, config.BackingFile},
			{"file that has grown too little", 8 << 20, 0, 1 << 20, config.BackingFile},
			{"file with room", smallSize + 1<<20, 3 << 20, 0, config.BackingFile},
			{"device that has grown", smallSize + 4<<20, 0, 4 << 20, config.BackingDevice},
			{"device that has grown more", smallSize + 1<<20, 0, 9 << 20, config.BackingDevice},
			{"device that has grown, volume as it was", smallSize, 0, 9 << 20, config.BackingDevice},
		} {
			if kind == config.JournalNone && i%3 != 0 {
				continue // the ring is the only difference
			}
			t.Run(fmt.Sprintf("%s/%s", kind, c.name), func(t *testing.T) {
				r, disk := stopped(t, kind, c.extra)
				before := disk
				disk = append(bytes.Clone(disk), make([]byte, c.grown)...)
				for n := 1; ; n++ {
					p := newPlug(disk, n)
					p.holes = c.kind == config.BackingFile
					res, err := resizeOn(p, c.kind, c.size, false)
					cut := p.left == 0
					if (err != nil) != cut || err == nil && (!res.Moved || res.OldBytes != smallSize || res.BackingBytes != p.Size()) {
						t.Fatalf("operation %d: %+v, %v", n, res, err)
					}
					if !cut {
						checkResized(t, p, before, c.size)
						if n < 6 {
							t.Fatalf("a resize of %d operations is none", n)
						}
						return
					}
					p = p.replugged(rng, -1)
					serveResized(t, r, p.copied(-1), before, c.size)
					if res, err := resizeOn(p, c.kind, c.size, false); err != nil || res.SizeBytes != c.size {
						t.Fatalf("after a cut at operation %d: %+v, %v", n, res, err)
					}
					checkResized(t, p, before, c.size)
				}
			})
		}
	}
}

// serveResized serves a volume whose resize was cut short, if it can be.
func serveResized(t *testing.T, r *rig, p *plug, before []byte, size int64) {
	t.Helper()
	r.config.Size = 0
	v, err := openOn(r, p)
	var f *control.Failure
	if errors.As(err, &f) && f.Code == control.ExitRefused && strings.Contains(f.Error(), "has grown") && strings.Contains(f.Hint, "ramshelf resize") {
		if exists(r.memoryFile()) {
			t.Error("a refused start left a memory file")
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if n := v.device.size; n != smallSize && n != size {
		t.Errorf("served with %d bytes", n)
	}
	for off := int64(0); off < v.device.size; off += 1 << 20 {
		n := min(1<<20, v.device.size-off)
		want := make([]byte, n)
		if off < smallSize {
			copy(want, before[off:min(off+n, smallSize)])
		}
		if !bytes.Equal(read(t, v, off, n), want) {
			t.Errorf("the volume of %d bytes has something else at %d", v.device.size, off)
		}
	}
	v.start()
	drain(t, v)
	closeVolume(t, v)
	if n := v.device.size; n == size {
		checkResized(t, p, before, size)
	}
}

// TestResizeErrors fails every operation once without a cut of the power: the error is told, and the next resize is good.
func TestResizeErrors(t *testing.T) {
	_, disk := stopped(t, config.JournalInternal, 0)
	for n := 1; ; n++ {
		p := newPlug(disk, n)
		p.holes = true
		_, err := resizeOn(p, config.BackingFile, 8<<20, false)
		failed := p.left == 0
		if failed && !errors.Is(err, errDrive) || !failed && err != nil {
			t.Fatalf("operation %d: %v", n, err)
		}
		p.left = -1
		res, err := resizeOn(p, config.BackingFile, 8<<20, false)
		if err != nil || !failed && res.Moved {
			t.Fatalf("operation %d, again: %+v, %v", n, res, err)
		}
		checkResized(t, p, disk, 8<<20)
		if !failed {
			return
		}
	}
}

func TestResizeRecoversFirst(t *testing.T) {
	disk, content := crash(t, newRig(t))
	p := newPlug(disk, -1)
	p.holes = true
	r, err := resizeOn(p, config.BackingFile, testSize+8<<20, false)
	if err != nil || !r.Moved || r.Recovery == nil || !r.Recovery.Recovered {
		t.Fatalf("%+v, %v", r, err)
	}
	if !bytes.Equal(p.content(0, testSize), content) || !isZero(p.content(testSize, testSize+8<<20)) {
		t.Error("the volume is not what was committed, or not zero behind that")
	}

	damage(t, disk)
	p = newPlug(disk, -1)
	p.holes = true
	var f *control.Failure
	if r, err := resizeOn(p, config.BackingFile, testSize+8<<20, false); !errors.As(err, &f) || f.Code != control.ExitRefused || r.Recovery.Damage == "" {
		t.Errorf("with a damaged journal: %+v, %v", r, err)
	}
	if !p.unchanged() {
		t.Error("a refusal changed something")
	}
}

func TestResizeRefuses(t *testing.T) {
	_, disk := stopped(t, config.JournalInternal, 0)
	junk := append(bytes.Clone(disk), bytes.Repeat([]byte("junk"), 8<<20/4)...)
	_, gap := stopped(t, config.JournalNone, 1<<20)
	copy(gap[len(gap)-journal.AreaBytes-8192-4096:], "junk")
	broken := bytes.Clone(disk)
	area := journal.AreaOffset(int64(len(disk)))
	broken[area+100] ^= 1
	broken[area+journal.AreaBytes-4096+100] ^= 1
	for name, c := range map[string]struct {
		disk  []byte
		kind  config.BackingKind
		size  int64
		code  control.ExitCode // 0: an error without one
		words string
	}{
		"shrink":            {disk, config.BackingFile, smallSize - 4096, control.ExitRefused, "cannot shrink to 2093056"},
		"device too small":  {disk, config.BackingDevice, smallSize + 4096, 0, "make that larger, or give at most 2097152 (--size)"},
		"junk at the tail":  {junk, config.BackingDevice, smallSize + 4096, control.ExitRefused, "--force"},
		"metadata on junk":  {gap, config.BackingFile, smallSize + 2<<20 + 4096, 0, ""},
		"damaged":           {broken, config.BackingFile, 8 << 20, control.ExitRefused, "superblock is damaged"},
		"nothing":           {make([]byte, 4<<20), config.BackingFile, 8 << 20, control.ExitFailed, "holds no volume"},
		"nothing, a device": {make([]byte, 4<<20), config.BackingDevice, 8 << 20, control.ExitFailed, "holds no volume"},
	} {
		p := newPlug(c.disk, -1)
		p.holes = c.kind == config.BackingFile
		_, err := resizeOn(p, c.kind, c.size, false)
		if c.words == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		var f *control.Failure
		hint := ""
		if errors.As(err, &f) {
			hint = f.Hint
		}
		if err == nil || (f == nil) != (c.code == 0) || f != nil && f.Code != c.code || !strings.Contains(err.Error()+hint, c.words) {
			t.Errorf("%s: %v (%s), want %d with %q", name, err, hint, c.code, c.words)
		}
		if !p.unchanged() {
			t.Errorf("%s: a refusal changed something", name)
		}
	}
	p := newPlug(junk, -1)
	if r, err := resizeOn(p, config.BackingDevice, smallSize+4096, true); err != nil || !r.Moved {
		t.Errorf("junk, forced: %+v, %v", r, err)
	}
	if r, err := resizeOn(newPlug(disk, -1), config.BackingDevice, smallSize, false); err != nil || r.Moved {
		t.Errorf("as it is: %+v, %v", r, err)
	}
}

// TestGrownBackingIsRefused: a start does not take a backing as a new one that has grown, but does where nothing says so.
func TestGrownBackingIsRefused(t *testing.T) {
	r, disk := stopped(t, config.JournalInternal, 0)
	grown := append(bytes.Clone(disk), make([]byte, 30<<20)...)
	for _, holes := range []bool{true, false} {
		p := newPlug(grown, -1)
		p.holes = holes
		_, err := openOn(r, p)
		var f *control.Failure
		if !errors.As(err, &f) || f.Code != control.ExitRefused || !strings.Contains(f.Hint, "ramshelf resize") || !strings.Contains(f.Hint, "--size SIZE, with 2097152") {
			t.Errorf("holes %v: %v", holes, err)
		}
		if _, err := recoverOn(p, true, false); !errors.As(err, &f) || f.Code != control.ExitRefused || !strings.Contains(f.Hint, "ramshelf resize") {
			t.Errorf("holes %v: recover: %v", holes, err)
		}
		if !p.unchanged() {
			t.Errorf("holes %v: a refusal changed something", holes)
		}
		if holes && p.reads > 8<<20 {
			t.Errorf("read %d bytes of a file with holes", p.reads)
		}
	}
	r.config.Force = true
	v, err := openOn(r, newPlug(grown, -1))
	if err != nil {
		t.Fatal(err)
	}
	if v.generation() != 1 {
		t.Error("forced, the volume is not a new one")
	}
	closeVolume(t, v)
	loseMemory(t, r)
	r.config.Force = false
	if v, err = openOn(r, newPlug(make([]byte, len(grown)), -1)); err != nil {
		t.Fatal(err)
	}
	closeVolume(t, v)
}
