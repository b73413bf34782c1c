package journal_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

const mib, gib = int64(1) << 20, int64(1) << 30

func TestRegionBytes(t *testing.T) {
	for _, c := range []struct{ volume, want int64 }{
		{512, 64 << 10}, {gib, 64 << 10}, {64 * gib, 64 << 10}, {64*gib + 512, 128 << 10}, {128 * gib, 128 << 10}, {1024 * gib, mib},
		{journal.MaxVolumeBytes, 4 * gib},
	} {
		if got := journal.RegionBytes(c.volume); got != c.want {
			t.Errorf("volume of %d: %d, want %d", c.volume, got, c.want)
		}
	}
}

func TestPlan(t *testing.T) {
	const (
		bitmap = int64(8192) // of a volume up to 2 GiB
		area   = mib
	)
	device := func(volume, ring int64) journal.Wanted {
		return journal.Wanted{Journal: journal.KindInternal, VolumeBytes: volume, RingBytes: ring}
	}
	file := func(volume, ring int64) journal.Wanted {
		w := device(volume, ring)
		w.Extendable = true
		return w
	}
	none := func(w journal.Wanted) journal.Wanted {
		w.Journal = journal.KindNone
		return w
	}
	external := func(w journal.Wanted, data int64) journal.Wanted {
		w.Journal, w.DataBytes = journal.KindExternal, data
		return w
	}
	for _, c := range []struct {
		name                     string
		backing                  int64
		w                        journal.Wanted
		volume, metadata, length int64  // wanted
		ring                     int64  // wanted
		err                      string // part of the message
	}{
		{"none: device, all of it", gib, none(device(0, 0)), gib - mib - bitmap, gib - mib - bitmap, gib, 0, ""},
		{"none: ring is ignored", gib, none(device(0, gib)), gib - mib - bitmap, gib - mib - bitmap, gib, 0, ""},
		{"none: device, odd sectors", gib + 512, none(device(0, 0)), gib - mib - bitmap, gib - mib - bitmap, gib + 512, 0, ""},
		{"none: device, a part", gib, none(device(512*mib, 0)), 512 * mib, gib - mib - bitmap, gib, 0, ""},
		{"none: device, just fits", gib, none(device(gib-mib-bitmap, 0)), gib - mib - bitmap, gib - mib - bitmap, gib, 0, ""},
		{"none: device, no room", gib, none(device(gib-mib-bitmap+512, 0)), 0, 0, 0, 0, "give at most 1072685056"},
		{"none: device, exact size", gib, none(device(gib, 0)), 0, 0, 0, 0, "--journal"},
		{"none: device, too small", mib, none(device(0, 0)), 0, 0, 0, 0, "do not fit"},
		{"none: device, tiny", 512, none(device(0, 0)), 0, 0, 0, 0, "do not fit"},
		{"none: file of exact size", gib, none(file(gib, 0)), gib, gib, gib + mib + bitmap, 0, ""},
		{"none: file, odd volume", gib + 512, none(file(gib+512, 0)), gib + 512, gib + 4096, gib + 4096 + mib + bitmap, 0, ""},
		{"volume larger", gib, device(gib+512, 0), 0, 0, 0, 0, "larger than its backing"},
		{"volume larger than file", gib, file(gib+512, 0), 0, 0, 0, 0, "larger than its backing"},

		{"device, all of it", gib, device(0, 64*mib), gib - 65*mib - bitmap, gib - 65*mib - bitmap, gib, 64 * mib, ""},
		{"device, an eighth", gib, device(0, gib), gib - 129*mib - bitmap, gib - 129*mib - bitmap, gib, 128 * mib, ""},
		{"device, odd eighth", gib + 4096, device(0, gib), gib + 4096 - 129*mib - bitmap, gib + 4096 - 129*mib - bitmap, gib + 4096, 128 * mib, ""},
		{"device, least ring", 16 * mib, device(0, gib), 11*mib - bitmap, 11*mib - bitmap, 16 * mib, 4 * mib, ""},
		{"device, small wish", gib, device(0, 1), gib - 5*mib - bitmap, gib - 5*mib - bitmap, gib, 4 * mib, ""},
		{"device, odd wish", gib, device(0, 5*mib+1), gib - 6*mib - 4096 - bitmap, gib - 6*mib - 4096 - bitmap, gib, 5*mib + 4096, ""},
		{"device, too small", 5 * mib, device(0, gib), 0, 0, 0, 0, "--journal none"},
		{"device, a part", gib, device(512*mib, 64*mib), 512 * mib, gib - 65*mib - bitmap, gib, 64 * mib, ""},
		{"device, what is left", gib, device(gib-50*mib, 64*mib), gib - 50*mib, gib - 50*mib, gib, 49*mib - bitmap, ""},
		{"device, just fits", gib, device(gib-5*mib-bitmap, gib), gib - 5*mib - bitmap, gib - 5*mib - bitmap, gib, 4 * mib, ""},
		{"device, odd, just fits", gib, device(gib-5*mib-bitmap-512, gib), gib - 5*mib - bitmap - 512, gib - 5*mib - bitmap, gib, 4 * mib, ""},
		{"device, no room", gib, device(gib-5*mib-bitmap+512, gib), 0, 0, 0, 0, "give at most 1068490752"},
		{"file made for it", gib + bitmap + 65*mib, file(gib, 64*mib), gib, gib, gib + bitmap + 65*mib, 64 * mib, ""},
		{"file of exact size", gib, file(gib, 64*mib), gib, gib, gib + bitmap + 65*mib, 64 * mib, ""},
		{"file a little larger", gib + 20*mib, file(gib, 64*mib), gib, gib, gib + bitmap + 65*mib, 64 * mib, ""},
		{"file much larger", 2 * gib, file(gib, 64*mib), gib, 2*gib - 65*mib - bitmap, 2 * gib, 64 * mib, ""},
		{"file without size", gib, file(0, 64*mib), 0, 0, 0, 0, "--size"},
		{"odd size", gib, file(1000, 0), 0, 0, 0, 0, "1000"},
		{"negative size", gib, file(-512, 0), 0, 0, 0, 0, "-512"},
		{"huge size", gib, file(1<<53, 0), 0, 0, 0, 0, "up to 4503599627370496"},

		{"external: device", gib, external(device(0, 64*mib), gib+512*mib), gib + 512*mib, gib - 65*mib - bitmap, gib, 64 * mib, ""},
		{"external: a part", gib, external(device(gib, 64*mib), 2*gib), gib, gib - 65*mib - bitmap, gib, 64 * mib, ""},
		{"external: odd data", gib, external(device(0, 64*mib), gib+512), gib, gib - 65*mib - bitmap, gib, 64 * mib, ""},
		{"external: what there is", 32 * mib, external(device(0, 64*mib), gib), gib, 0, 32 * mib, 31*mib - bitmap, ""},
		{"external: device too small", 5 * mib, external(device(0, 64*mib), gib), 0, 0, 0, 0, "5251072 bytes of metadata"},
		{"external: file made for it", 65*mib + bitmap, external(file(0, 64*mib), gib), gib, 0, 65*mib + bitmap, 64 * mib, ""},
		{"external: file too small", 32 * mib, external(file(0, 64*mib), gib), gib, 0, 65*mib + bitmap, 64 * mib, ""},
		{"external: file larger", gib, external(file(0, 64*mib), gib), gib, gib - 65*mib - bitmap, gib, 64 * mib, ""},
		{"external: volume too large", gib, external(device(gib, 64*mib), gib-512), 0, 0, 0, 0, "larger than its backing"},
		{"external: no data", gib, external(device(0, 64*mib), 512), 0, 0, 0, 0, "no room"},
	} {
		got, err := journal.Plan(c.backing, c.w)
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, want %q", c.name, err, c.err)
			continue
		}
		if err != nil {
			continue
		}
		want := journal.Geometry{
			VolumeBytes: c.volume, MetadataOffset: c.metadata, BackingBytes: c.length, RingBytes: c.ring,
			BitmapOffset: c.metadata, BitmapBytes: bitmap, RegionBytes: 64 << 10,
		}
		if c.ring > 0 {
			want.RingOffset = c.metadata + bitmap
		}
		if got != want {
			t.Errorf("%s: %+v, want %+v", c.name, got, want)
		}
	}
}

// TestPlanIsValid: whatever the sizes are, what is planned makes a valid superblock, also where the volume's own
// size decides how large its bitmap is.
func TestPlanIsValid(t *testing.T) {
	for _, around := range []int64{5 * mib, 6 * mib, 2 * gib, 64 * gib, 73 * gib, 128 * gib, 1024 * gib, 1 << 50} {
		for d := -300 * mib / 1024; d <= 300*mib/1024; d += 4096 - 512 {
			for _, kind := range []journal.Kind{journal.KindNone, journal.KindInternal, journal.KindExternal} {
				w := journal.Wanted{Name: "v", Journal: kind, RingBytes: 8 * mib, Force: true}
				if kind == journal.KindExternal {
					w.DataBytes = around + d
				}
				found, err := journal.Examine(zeroReader{}, around+d, w)
				if err != nil {
					if around > 6*mib {
						t.Fatalf("%d bytes, %s: %v", around+d, kind, err)
					}
					continue
				}
				if err := found.Superblock.Validate(); err != nil {
					t.Fatalf("%d bytes, %s: %v", around+d, kind, err)
				}
				if spare := found.Geometry.MetadataOffset - found.Geometry.VolumeBytes; kind != journal.KindExternal && spare > 300<<10 {
					t.Fatalf("%d bytes, %s: %d bytes are left over", around+d, kind, spare)
				}
			}
		}
	}
}

// zeroReader is an empty backing of any size.
type zeroReader struct{}

func (zeroReader) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

// externalDisk is a second backing with the metadata of a volume whose data have 64 KiB.
func externalDisk(t *testing.T) *disk {
	t.Helper()
	d := &disk{synced: make([]byte, journal.ExternalBytes(volumeBytes, 1)), steps: -1}
	d.written = bytes.Clone(d.synced)
	found, err := examine(t, d, journal.Wanted{Name: "vol", Journal: journal.KindExternal, DataBytes: volumeBytes})
	if err != nil {
		t.Fatal(err)
	}
	if s := found.Superblock; !found.Adopted || s.VolumeBytes != volumeBytes || s.DataBytes != volumeBytes || s.RingBytes != journal.MinRingBytes || s.BitmapOffset != 0 {
		t.Fatalf("%+v", s)
	}
	if err := found.Superblock.Store(d, now); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestExamineExternal(t *testing.T) {
	d := externalDisk(t)
	want := journal.Wanted{Name: "vol", Journal: journal.KindExternal, DataBytes: volumeBytes}
	found, err := examine(t, d, want)
	if err != nil || found.Adopted {
		t.Fatalf("%+v, %v", found, err)
	}
	want.RingBytes = gib
	if found, err := examine(t, d, want); err != nil || found.Geometry.RingBytes != journal.MinRingBytes {
		t.Errorf("ring of a volume that is there: %+v, %v", found, err)
	}
	internal, _ := stored(t)
	for name, c := range map[string]struct {
		d      *disk
		w      journal.Wanted
		says   string
		forced bool
	}{
		"journal as data":        {d, journal.Wanted{Name: "vol", Journal: journal.KindInternal}, "is the journal of volume vol", false},
		"journal as data, any":   {d, journal.Wanted{Name: "vol", Journal: journal.KindInternal, AnyJournal: true}, "is the journal of volume vol", false},
		"data as journal":        {internal, journal.Wanted{Name: "redo-log", Journal: journal.KindExternal, DataBytes: volumeBytes}, "holds volume redo-log itself", false},
		"other volume's journal": {d, journal.Wanted{Name: "other", Journal: journal.KindExternal, DataBytes: volumeBytes}, `"vol"`, true},
		"other uuid":             {d, journal.Wanted{Name: "vol", UUID: journal.NewUUID(), Journal: journal.KindExternal, DataBytes: volumeBytes}, "UUID", true},
		"backing grown":          {d, journal.Wanted{Name: "vol", Journal: journal.KindExternal, DataBytes: 2 * volumeBytes}, "has grown", true},
		"backing shrunk":         {d, journal.Wanted{Name: "vol", Journal: journal.KindExternal, DataBytes: volumeBytes / 2}, "belongs to a backing", false},
	} {
		var refused *journal.RefusedError
		if _, err := examine(t, c.d, c.w); !errors.As(err, &refused) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
		c.w.Force = true
		found, err := examine(t, c.d, c.w)
		if (err == nil) != c.forced {
			t.Errorf("%s, forced: %v", name, err)
		}
		if err == nil && (found.Superblock.DataBytes != c.w.DataBytes || found.Superblock.Validate() != nil) {
			t.Errorf("%s, forced: %+v", name, found.Superblock)
		}
	}
}

func TestForeignTail(t *testing.T) {
	d, s := stored(t)
	if got, err := journal.ForeignTail(d, int64(len(d.written))); err != nil || got == nil || got.UUID != s.UUID {
		t.Errorf("own metadata: %+v, %v", got, err)
	}
	for _, n := range []int{0, 4096, volumeBytes + int(mib)} {
		if got, err := journal.ForeignTail(bytes.NewReader(make([]byte, n)), int64(n)); got != nil || err != nil {
			t.Errorf("%d zeroes: %+v, %v", n, got, err)
		}
	}
	d.written[areaOffset+99] ^= 1
	d.written[areaOffset+journal.AreaBytes-journal.SuperblockBytes+99] ^= 1
	if got, err := journal.ForeignTail(d, int64(len(d.written))); got != nil || !errors.Is(err, journal.ErrDamaged) {
		t.Errorf("damaged: %+v, %v", got, err)
	}
}

// TestTailErrors: an error while the tail is looked through is told.
func TestTailErrors(t *testing.T) {
	d := newDisk()
	d.bad[volumeBytes] = true
	if _, err := examine(t, d, journal.Wanted{Name: "vol"}); err == nil || !strings.Contains(err.Error(), "unreadable") {
		t.Errorf("unreadable tail: %v", err)
	}
}

// TestBitmapCost is the table in docs/FORMAT.md.
func TestBitmapCost(t *testing.T) {
	for _, c := range []struct{ volume, region, bits, pages int64 }{
		{gib, 64 << 10, 16384, 1}, {16 * gib, 64 << 10, 262144, 9}, {64 * gib, 64 << 10, 1 << 20, 33}, {256 * gib, 256 << 10, 1 << 20, 33},
		{1024 * gib, mib, 1 << 20, 33}, {16 * 1024 * gib, 16 * mib, 1 << 20, 33},
	} {
		g, err := journal.Plan(2*c.volume, journal.Wanted{VolumeBytes: c.volume})
		if err != nil || g.RegionBytes != c.region || c.volume/g.RegionBytes != c.bits || g.BitmapBytes != c.pages*8192 {
			t.Errorf("volume of %d: %+v, %v", c.volume, g, err)
		}
	}
}
