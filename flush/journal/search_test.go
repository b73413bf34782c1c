package journal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// far is a large backing of zeroes with a few blocks that are not.
type far struct {
	bytes  int64
	blocks map[int64][]byte
	bad    map[int64]bool // blocks that cannot be read
	reads  int64          // bytes
	unmade error          // of Extents
}

func (f *far) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	n := len(p)
	if int64(n) > f.bytes-off {
		return 0, io.EOF
	}
	f.reads += int64(n)
	for at := range f.bad {
		if at < off+int64(n) && at+4096 > off {
			return 0, errors.New("unreadable")
		}
	}
	for at, b := range f.blocks {
		if at >= off && at < off+int64(n) {
			copy(p[at-off:], b)
		}
	}
	return n, nil
}

// extents makes holes of all that is not in blocks, in pieces of at most 64 MiB.
func (f *far) extents(off, n int64, fn func(off, n int64, flags uint32) bool) error {
	for end := off + n; off < end; {
		next, flags := min(end, off+64<<20), uint32(3)
		for at := range f.blocks {
			if at <= off && off < at+4096 {
				next, flags = min(end, at+4096), 0
				break
			}
			if at > off {
				next = min(next, at)
			}
		}
		if !fn(off, next-off, flags) {
			break
		}
		off = next
	}
	return f.unmade
}

// put stores a superblock whose area begins at area, with a sequence number.
func (f *far) put(area int64, sequence uint64) *journal.Superblock {
	s := sample()
	s.VolumeBytes, s.AreaOffset, s.Journal, s.MetadataBytes = 1<<20, area, journal.KindNone, 8192+journal.AreaBytes
	s.RingOffset, s.RingBytes, s.RingStamp = 0, 0, 0
	s.BitmapOffset, s.ZeroOffset, s.ZeroBytes, s.Sequence = area-8192, 0, 0, sequence
	for _, at := range []int64{0, journal.AreaBytes - journal.SuperblockBytes} {
		f.blocks[area+at] = s.Encode()
	}
	return s
}

func newFar(bytes int64) *far {
	return &far{bytes: bytes, blocks: map[int64][]byte{}, bad: map[int64]bool{}}
}

func TestSearch(t *testing.T) {
	const gib = 1 << 30
	copy1 := int64(journal.AreaBytes - journal.SuperblockBytes)
	for name, c := range map[string]struct {
		make     func(f *far)
		bounded  bool
		sequence uint64 // of what must be found; 0: nothing
		err      error
	}{
		"nothing":            {func(*far) {}, false, 0, journal.ErrNoMagic},
		"one":                {func(f *far) { f.put(2*gib+4096, 3) }, false, 3, nil},
		"two":                {func(f *far) { f.put(2*gib, 3); f.put(3*gib, 2) }, false, 2, nil},
		"one over the other": {func(f *far) { f.put(2*gib, 3); f.put(2*gib+8192, 4); delete(f.blocks, 2*gib+8192+copy1) }, false, 4, nil},
		"copy on copy":       {func(f *far) { f.put(2*gib, 3); f.put(2*gib+copy1, 4) }, false, 4, nil},
		"copy 0 alone":       {func(f *far) { f.put(2*gib, 3); delete(f.blocks, 2*gib+copy1) }, false, 3, nil},
		"copy 1 alone":       {func(f *far) { f.put(2*gib, 3); delete(f.blocks, 2*gib) }, false, 3, nil},
		"copy 1 flipped":     {func(f *far) { f.put(2*gib, 3); f.blocks[2*gib+copy1][99] ^= 1 }, false, 3, nil},
		"copy 1 unreadable":  {func(f *far) { f.put(2*gib, 3); f.bad[2*gib+copy1] = true }, false, 3, nil},
		"not in its place": {func(f *far) {
			f.put(2*gib, 3)
			f.blocks[3*gib] = f.blocks[2*gib]
			f.blocks[3*gib+copy1] = f.blocks[2*gib]
		}, false, 3, nil},
		"at the start": {func(f *far) { f.put(1<<20+8192, 3) }, false, 3, nil},
		"newer format": {func(f *far) {
			f.put(2*gib, 3)
			f.blocks[2*gib+copy1][11] = 9
			journal.PutChecksum(f.blocks[2*gib+copy1])
		}, false, 0, journal.ErrNewer},
		"within bounds":      {func(f *far) { f.put(4*gib-64<<20, 3) }, true, 3, nil},
		"out of bounds":      {func(f *far) { f.put(2*gib+4096, 3) }, true, 0, journal.ErrNoMagic},
		"of a device of GiB": {func(f *far) { f.put(2*gib-journal.AreaBytes, 3) }, true, 3, nil},
		"too far back":       {func(f *far) { f.put(1*gib-journal.AreaBytes, 3) }, true, 0, journal.ErrNoMagic},
		"newer, of GiB": {func(f *far) {
			f.put(2*gib-journal.AreaBytes, 3)
			f.blocks[2*gib-4096][11] = 9
			journal.PutChecksum(f.blocks[2*gib-4096])
		}, true, 0, journal.ErrNewer},
	} {
		for _, holes := range []bool{false, true} {
			if holes && c.bounded {
				continue // with holes little is read, and all is seen
			}
			f := newFar(4*gib + 1000)
			c.make(f)
			o := journal.Search{Backing: f, Bytes: f.bytes}
			if c.bounded {
				o.MostBytes, o.MostProbes = 128<<20, 3
			}
			if holes {
				o.Extents = f.extents
			}
			s, err := o.Find(context.Background())
			if c.err != nil && !errors.Is(err, c.err) || c.err == nil && (err != nil || s.Sequence != c.sequence) {
				t.Errorf("%s, holes %v: %+v, %v", name, holes, s, err)
			}
			if most := o.MostBytes + 1<<20; (holes || c.bounded) && f.reads > max(most, 8<<20) {
				t.Errorf("%s, holes %v: read %d bytes", name, holes, f.reads)
			}
		}
	}
}

func TestSearchEnds(t *testing.T) {
	f := newFar(4 << 30)
	ctx, cancel := context.WithCancel(context.Background())
	o := journal.Search{Backing: f, Bytes: f.bytes, Progress: func(done, total int64) {
		if done != 1<<30 || total != f.bytes {
			t.Errorf("told %d of %d", done, total)
		}
		cancel()
	}}
	if _, err := o.Find(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	o.MostBytes, o.MostProbes = 4096, 9
	if _, err := o.Find(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled before the probes: %v", err)
	}
	f.unmade = errors.New("no map")
	o.Extents = f.extents
	if _, err := o.Find(context.Background()); !errors.Is(err, f.unmade) {
		t.Errorf("extents fail: %v", err)
	}
}

func TestMayHaveGrown(t *testing.T) {
	const area = 1 << 30
	copy1 := int64(journal.AreaBytes - journal.SuperblockBytes)
	for name, c := range map[string]struct {
		make func(f *far)
		want bool
	}{
		"nothing":               {func(*far) {}, true},
		"stored":                {func(f *far) { f.put(area, 3) }, false},
		"copy 0 flipped":        {func(f *far) { f.put(area, 3); f.blocks[area][99] ^= 1 }, false},
		"copy 0 unreadable":     {func(f *far) { f.bad[area] = true }, false},
		"copy 1 cut short":      {func(f *far) { f.put(area, 3); delete(f.blocks, area); clear(f.blocks[area+copy1][512:]) }, true},
		"old copy 1 as copy 0":  {func(f *far) { f.put(area-copy1, 3) }, true},
		"another one as copy 0": {func(f *far) { f.put(area-8192, 3); f.blocks[area] = f.blocks[area-8192] }, false},
	} {
		f := newFar(2 << 30)
		c.make(f)
		if got := journal.MayHaveGrown(f, area); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if journal.MayHaveGrown(newFar(4096), -4096) {
		t.Error("a backing without room for a superblock may have grown")
	}
}

// TestPlanGrow compares what is planned with what a new volume of that size has, and with what was there.
func TestPlanGrow(t *testing.T) {
	const mib = 1 << 20
	for _, kind := range []journal.Kind{journal.KindNone, journal.KindInternal} {
		ring := int64(kind) * journal.MinRingBytes
		for _, c := range []struct{ old, extra, size, grow int64 }{
			{16 * mib, 0, 16*mib + 4096, 0}, {16 * mib, 0, 64 * mib, 0}, {16 * mib, 0, 3 << 30, 0}, {16 * mib, 0, 16 * mib, 5 * mib},
			{16 * mib, 7*mib + 512, 18 * mib, 0}, {16*mib + 512, 0, 40 * mib, 90*mib + 1536}, {1 << 30, 0, 90 << 30, 0},
		} {
			name := fmt.Sprintf("%v %+v", kind, c)
			backing := journal.CreateBytes(c.old, ring) + c.extra
			found, err := journal.Examine(zeroReader{}, backing, journal.Wanted{Name: "v", VolumeBytes: c.old, Journal: kind, RingBytes: ring, Extendable: true})
			if err != nil {
				t.Fatal(err)
			}
			old := found.Superblock
			for _, file := range []bool{true, false} {
				size := backing + c.grow
				if !file {
					size = max(size, journal.CreateBytes(c.size, ring))
				}
				want := journal.Wanted{VolumeBytes: c.size, Extendable: file}
				grown, bytes, err := journal.PlanGrow(zeroReader{}, size, old, want)
				if err != nil {
					t.Errorf("%s: %v", name, err)
					continue
				}
				if err := grown.Validate(); err != nil || grown.VolumeBytes != c.size || grown.RingBytes != old.RingBytes || grown.RingStamp != 0 ||
					grown.UUID != old.UUID || bytes < size || !file && bytes != size || grown.AreaOffset != journal.AreaOffset(bytes) {
					t.Errorf("%s: %+v on %d, %v", name, grown, bytes, err)
				}
				// What was metadata and is none any more is pending, and nothing else.
				from, to := old.MetadataOffset(), min(old.AreaOffset+journal.AreaBytes, grown.MetadataOffset())
				if want := max(0, to-from); grown.ZeroBytes != want || want > 0 && grown.ZeroOffset != from {
					t.Errorf("%s: pending %d at %d, want %d at %d", name, grown.ZeroBytes, grown.ZeroOffset, want, from)
				}
			}
		}
	}
}

func TestPlanGrowRefuses(t *testing.T) {
	const mib = 1 << 20
	w := journal.Wanted{Name: "v", VolumeBytes: 16 * mib, Journal: journal.KindInternal, RingBytes: journal.MinRingBytes}
	backing := journal.CreateBytes(w.VolumeBytes, w.RingBytes)
	volume := func(change func(s *journal.Superblock)) *journal.Superblock {
		found, err := journal.Examine(zeroReader{}, backing, w)
		if err != nil {
			t.Fatal(err)
		}
		change(found.Superblock)
		return found.Superblock
	}
	as := func(*journal.Superblock) {}
	f := newFar(64 * mib)
	f.blocks[60*mib] = []byte{1} // where the metadata go
	used := newFar(64 * mib)
	used.blocks[backing-2*mib] = []byte{1}                                                         // in the old ring
	used.blocks[journal.AreaOffset(64*mib)+journal.AreaBytes-4096] = []byte("RSHELFSB, cut short") // and a Store that did not end
	for name, c := range map[string]struct {
		r       io.ReaderAt
		s       *journal.Superblock
		want    journal.Wanted
		refused bool
		ok      bool
	}{
		"not clean":        {zeroReader{}, volume(func(s *journal.Superblock) { s.Clean = false }), journal.Wanted{VolumeBytes: 20 * mib}, false, false},
		"pending":          {zeroReader{}, volume(func(s *journal.Superblock) { s.ZeroBytes = 4096 }), journal.Wanted{VolumeBytes: 20 * mib}, false, false},
		"external":         {zeroReader{}, volume(func(s *journal.Superblock) { s.Journal = journal.KindExternal }), journal.Wanted{VolumeBytes: 20 * mib}, false, false},
		"smaller":          {zeroReader{}, volume(as), journal.Wanted{VolumeBytes: 8 * mib}, true, false},
		"no room":          {zeroReader{}, volume(as), journal.Wanted{VolumeBytes: 63 * mib}, false, false},
		"too large":        {zeroReader{}, volume(as), journal.Wanted{VolumeBytes: journal.MaxVolumeBytes * 2, Extendable: true}, false, false},
		"data in the tail": {f, volume(as), journal.Wanted{VolumeBytes: 20 * mib}, true, false},
		"forced":           {f, volume(as), journal.Wanted{VolumeBytes: 20 * mib, Force: true}, false, true},
		"ours in the way":  {used, volume(as), journal.Wanted{VolumeBytes: 20 * mib}, false, true},
	} {
		grown, _, err := journal.PlanGrow(c.r, 64*mib, c.s, c.want)
		var refused *journal.RefusedError
		if (err == nil) != c.ok || errors.As(err, &refused) != c.refused || c.ok && grown.VolumeBytes != 20*mib {
			t.Errorf("%s: %+v, %v", name, grown, err)
		}
	}
}
