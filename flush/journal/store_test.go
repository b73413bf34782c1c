package journal_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// The disk of these tests: a small volume without journal.
const (
	volumeBytes = 64 << 10
	areaOffset  = volumeBytes + 8192
)

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// disk is a backing that stops after a number of sectors or syncs, keeps any part of what was not synced, and
// has unreadable places.
type disk struct {
	synced  []byte
	written []byte
	steps   int            // sectors and syncs that still succeed; negative: all
	bad     map[int64]bool // offsets of unreadable copies
}

func newDisk() *disk {
	d := &disk{synced: make([]byte, areaOffset+journal.AreaBytes), steps: -1, bad: map[int64]bool{}}
	d.written = bytes.Clone(d.synced)
	return d
}

var errPower = errors.New("power is gone")

func (d *disk) step() bool {
	d.steps--
	return d.steps != -1
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if d.bad[off] {
		return 0, errors.New("unreadable")
	}
	return bytes.NewReader(d.written).ReadAt(p, off)
}

func (d *disk) WriteAt(p []byte, off int64) (n int, err error) {
	for ; n < len(p); n += 512 {
		if !d.step() {
			d.steps = 0
			return n, errPower
		}
		copy(d.written[off+int64(n):][:512], p[n:])
	}
	return n, nil
}

func (d *disk) Sync() error {
	if !d.step() {
		d.steps = 0
		return errPower
	}
	copy(d.synced, d.written)
	return nil
}

// crash returns a disk with what is durable and, of what is not, the sectors that keep says.
func (d *disk) crash(keep func(i int) bool) *disk {
	c := newDisk()
	copy(c.synced, d.synced)
	i := 0
	for at := 0; at < len(d.synced); at += 512 {
		if now := d.written[at:][:512]; !bytes.Equal(now, d.synced[at:][:512]) {
			if keep(i) {
				copy(c.synced[at:], now)
			}
			i++
		}
	}
	copy(c.written, c.synced)
	return c
}

func stored(t *testing.T) (*disk, *journal.Superblock) {
	t.Helper()
	s := sample()
	s.VolumeBytes, s.MetadataBytes, s.AreaOffset = volumeBytes, 8192+journal.AreaBytes, areaOffset
	s.Journal, s.RingOffset, s.RingBytes, s.RingStamp, s.ZeroBytes = journal.KindNone, 0, 0, 0, 4096
	s.BitmapOffset = volumeBytes
	d := newDisk()
	if err := s.Store(d, now); err != nil {
		t.Fatal(err)
	}
	return d, s
}

func load(t *testing.T, d *disk) *journal.Superblock {
	t.Helper()
	s, err := journal.Load(d, areaOffset)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStoreLoad(t *testing.T) {
	d, s := stored(t)
	got := load(t, d)
	if !bytes.Equal(got.Encode(), s.Encode()) || got.Sequence != sample().Sequence+1 || !got.WrittenAt.Equal(now) {
		t.Errorf("loaded %+v, stored %+v", got, s)
	}
	if !bytes.Equal(d.synced, d.written) {
		t.Error("not all is synced")
	}
	// The tables: both copies, the rest zero.
	first, last := d.synced[areaOffset:][:4096], d.synced[areaOffset+1044480:]
	if !bytes.Equal(first, last) || !bytes.Equal(first, s.Encode()) {
		t.Error("copies are not at 0 and 1044480 of the area")
	}
	if !bytes.Equal(d.synced[areaOffset+4096:areaOffset+1044480], make([]byte, 1040384)) {
		t.Error("something is written between the copies")
	}
}

// TestStoreTorn stops Store after every sector and every sync, with every kind of loss of what was not
// synced: the old or the new superblock holds, the new one once Store has succeeded, and Store works again.
func TestStoreTorn(t *testing.T) {
	keeps := map[string]func(int) bool{
		"all": func(int) bool { return true }, "none": func(int) bool { return false },
		"even": func(i int) bool { return i%2 == 0 }, "odd": func(i int) bool { return i%2 == 1 },
		"first": func(i int) bool { return i == 0 }, "not first": func(i int) bool { return i > 0 },
	}
	const steps = 2 * (journal.SuperblockBytes/512 + 1)
	for name, keep := range keeps {
		for rounds := range 3 { // Store begins with the one copy or the other
			for n := 0; n <= steps; n++ {
				d, _ := stored(t)
				s := load(t, d)
				for range rounds {
					if err := s.Store(d, now); err != nil {
						t.Fatal(err)
					}
				}
				before := s.Encode()
				s.Begin()
				s.Clean = false
				d.steps = n
				err := s.Store(d, now)
				if (err == nil) != (n == steps) {
					t.Fatalf("%d of %d steps: %v", n, steps, err)
				}
				crashed := d.crash(keep)
				got := load(t, crashed)
				if !bytes.Equal(got.Encode(), s.Encode()) && (err == nil || !bytes.Equal(got.Encode(), before)) {
					t.Fatalf("%s, round %d, %d steps: neither old nor new but %+v", name, rounds, n, got)
				}
				if err := got.Store(crashed, now); err != nil || load(t, crashed).Sequence != got.Sequence {
					t.Fatalf("%s, %d steps: store afterwards: %v", name, n, err)
				}
			}
		}
	}
}

// TestStoreTornTwice: a copy torn by one crash is the one that is written first after it, so a second crash
// at any step leaves a valid one too.
func TestStoreTornTwice(t *testing.T) {
	keep := func(i int) bool { return i%2 == 0 }
	const steps = 2 * (journal.SuperblockBytes/512 + 1)
	for n := range steps {
		for m := range steps {
			d, _ := stored(t)
			s := load(t, d)
			d.steps = n
			_ = s.Store(d, now)
			d = d.crash(keep)
			s = load(t, d)
			d.steps = m
			_ = s.Store(d, now)
			load(t, d.crash(keep))
		}
	}
}

// TestLoadSurvivesOneBadCopy, whichever it is and however it is bad.
func TestLoadSurvivesOneBadCopy(t *testing.T) {
	for i, at := range []int64{areaOffset, areaOffset + journal.AreaBytes - journal.SuperblockBytes} {
		for how, spoil := range map[string]func(*disk){
			"flipped":    func(d *disk) { d.written[at+100] ^= 1 },
			"zero":       func(d *disk) { clear(d.written[at:][:4096]) },
			"unreadable": func(d *disk) { d.bad[at] = true },
		} {
			d, s := stored(t)
			spoil(d)
			if got := load(t, d); !bytes.Equal(got.Encode(), s.Encode()) {
				t.Errorf("copy %d %s: loaded %+v", i, how, got)
			}
		}
	}
}

func TestLoadRefuses(t *testing.T) {
	const second = areaOffset + journal.AreaBytes - journal.SuperblockBytes
	for name, c := range map[string]struct {
		spoil func(d *disk)
		want  error
	}{
		"both flipped": {func(d *disk) { d.written[areaOffset+99] ^= 4; d.written[second+99] ^= 4 }, journal.ErrDamaged},
		"one zero, one flipped": {func(d *disk) {
			clear(d.written[areaOffset:][:4096])
			d.written[second+99] ^= 4
		}, journal.ErrDamaged},
		"one flipped, one zero": {func(d *disk) {
			d.written[areaOffset+99] ^= 4
			clear(d.written[second:][:4096])
		}, journal.ErrDamaged},
		"none": {func(d *disk) { clear(d.written) }, journal.ErrNoMagic},
		"one newer": {func(d *disk) {
			b := d.written[second:][:4096]
			b[11] = 9
			journal.PutChecksum(b)
		}, journal.ErrNewer},
		"end of backing": {func(d *disk) { d.written = d.written[:areaOffset] }, io.ErrUnexpectedEOF},
	} {
		d, _ := stored(t)
		c.spoil(d)
		if s, err := journal.Load(d, areaOffset); !errors.Is(err, c.want) || c.want != journal.ErrNoMagic && errors.Is(err, journal.ErrNoMagic) {
			t.Errorf("%s: %+v, %v, want %v", name, s, err, c.want)
		}
	}
	d, _ := stored(t)
	moved := append(make([]byte, 4096), d.written...)
	if _, err := journal.Load(bytes.NewReader(moved), areaOffset+4096); !errors.Is(err, journal.ErrDamaged) {
		t.Errorf("superblock that was moved: %v", err)
	}
}

// TestLoadTakesTheNewer: between two valid copies the sequence number decides.
func TestLoadTakesTheNewer(t *testing.T) {
	for _, at := range []int64{areaOffset, areaOffset + journal.AreaBytes - journal.SuperblockBytes} {
		d, s := stored(t)
		s.Sequence++
		s.Name = "newer"
		copy(d.written[at:], s.Encode())
		if got := load(t, d); got.Name != "newer" {
			t.Errorf("copy at %d: %q holds", at, got.Name)
		}
	}
}

// TestStoreErrorSweep: an error of any step is reported, with the copy.
func TestStoreErrorSweep(t *testing.T) {
	for n := range 2 * (journal.SuperblockBytes/512 + 1) {
		d, s := stored(t)
		d.steps = n
		if err := s.Store(d, now); !errors.Is(err, errPower) {
			t.Errorf("step %d: %v", n, err)
		}
	}
	d, s := stored(t)
	if err := s.Store(shortWriter{d}, now); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("short write: %v", err)
	}
}

type shortWriter struct{ *disk }

func (w shortWriter) WriteAt(p []byte, _ int64) (int, error) { return len(p) - 1, nil }

func TestAreaOffset(t *testing.T) {
	for _, c := range []struct{ backing, want int64 }{
		{1 << 30, 1<<30 - 1<<20}, {1<<30 + 512, 1<<30 - 1<<20}, {1<<30 + 4096, 1<<30 - 1<<20 + 4096}, {1 << 20, 0}, {1<<20 - 1, -4096}, {0, -1 << 20},
	} {
		if got := journal.AreaOffset(c.backing); got != c.want {
			t.Errorf("backing of %d: area at %d, want %d", c.backing, got, c.want)
		}
	}
	for _, v := range []int64{512, 4096, 1 << 30, 1<<30 + 512} {
		if at := journal.AreaOffset(journal.CreateBytes(v, 0)); at < v+8192 || at >= v+8192+4096 {
			t.Errorf("file for a volume of %d: area at %d", v, at)
		}
	}
}

func Example() {
	d := newDisk()
	found, err := journal.Examine(d, int64(len(d.written)), journal.Wanted{Name: "vol"})
	if err != nil {
		fmt.Println(err)
		return
	}
	s := found.Superblock
	s.Begin()
	if err := s.Store(d, now); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(found.Adopted, s.VolumeBytes, s.Incarnation.Counter)
	// Output: true 65536 1
}
