package journal_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

func TestPlan(t *testing.T) {
	const mib, gib = int64(1) << 20, int64(1) << 30
	for _, c := range []struct {
		name            string
		backing, volume int64
		extendable      bool
		want            journal.Geometry
		err             string // part of the message
	}{
		{"device, all of it", gib, 0, false, journal.Geometry{gib - mib, gib - mib, gib}, ""},
		{"device, odd sectors", gib + 512, 0, false, journal.Geometry{gib - mib, gib - mib, gib + 512}, ""},
		{"device, a part", gib, 512 * mib, false, journal.Geometry{512 * mib, gib - mib, gib}, ""},
		{"device, just fits", gib, gib - mib, false, journal.Geometry{gib - mib, gib - mib, gib}, ""},
		{"device, no room", gib, gib - mib + 512, false, journal.Geometry{}, "give at most 1072693248"},
		{"device, exact size", gib, gib, false, journal.Geometry{}, "--journal"},
		{"device, too small", mib, 0, false, journal.Geometry{}, "do not fit"},
		{"device, tiny", 512, 0, false, journal.Geometry{}, "do not fit"},
		{"volume larger", gib, gib + 512, false, journal.Geometry{}, "larger than its backing"},
		{"volume larger than file", gib, gib + 512, true, journal.Geometry{}, "larger than its backing"},
		{"file made for it", gib + mib, gib, true, journal.Geometry{gib, gib, gib + mib}, ""},
		{"file of exact size", gib, gib, true, journal.Geometry{gib, gib, gib + mib}, ""},
		{"file a little larger", gib + mib/2, gib, true, journal.Geometry{gib, gib, gib + mib}, ""},
		{"file much larger", 2 * gib, gib, true, journal.Geometry{gib, 2*gib - mib, 2 * gib}, ""},
		{"file, odd volume", gib + 512, gib + 512, true, journal.Geometry{gib + 512, gib + 4096, gib + 4096 + mib}, ""},
		{"file without size", gib, 0, true, journal.Geometry{}, "--size"},
		{"odd size", gib, 1000, true, journal.Geometry{}, "1000"},
		{"negative size", gib, -512, true, journal.Geometry{}, "-512"},
	} {
		got, err := journal.Plan(c.backing, c.volume, c.extendable)
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %+v, %v, want %+v, %q", c.name, got, err, c.want, c.err)
		}
	}
}

// examine looks at d without changing it.
func examine(t *testing.T, d *disk, w journal.Wanted) (*journal.Found, error) {
	t.Helper()
	before := bytes.Clone(d.written)
	found, err := journal.Examine(d, int64(len(d.written)), w)
	if !bytes.Equal(before, d.written) {
		t.Error("examining changed the backing")
	}
	return found, err
}

func TestExamineFinds(t *testing.T) {
	d, s := stored(t)
	for _, w := range []journal.Wanted{
		{Name: s.Name, Journal: s.Journal},
		{Name: s.Name, Journal: s.Journal, UUID: s.UUID, VolumeBytes: s.VolumeBytes},
		{Name: s.Name, Journal: s.Journal, Force: true},
		{Name: s.Name, Journal: s.Journal, Extendable: true},
	} {
		found, err := examine(t, d, w)
		if err != nil {
			t.Errorf("%+v: %v", w, err)
			continue
		}
		want := journal.Geometry{VolumeBytes: areaOffset, MetadataOffset: areaOffset, BackingBytes: areaOffset + journal.AreaBytes}
		if found.Adopted || found.Superblock.UUID != s.UUID || found.Geometry != want {
			t.Errorf("%+v: %+v", w, found)
		}
	}
}

func TestExamineAdopts(t *testing.T) {
	filled := func() *disk {
		d := newDisk()
		for i := range d.written[:areaOffset] {
			d.written[i] = 0xaa // a file system there is content
		}
		return d
	}
	uuid := journal.NewUUID()
	for name, c := range map[string]struct {
		d    *disk
		w    journal.Wanted
		want journal.Geometry
	}{
		"zero tail":  {filled(), journal.Wanted{Name: "vol"}, journal.Geometry{areaOffset, areaOffset, areaOffset + journal.AreaBytes}},
		"given uuid": {filled(), journal.Wanted{Name: "vol", UUID: uuid}, journal.Geometry{areaOffset, areaOffset, areaOffset + journal.AreaBytes}},
		"extended": {
			&disk{written: bytes.Repeat([]byte{1}, 8192)},
			journal.Wanted{Name: "vol", VolumeBytes: 8192, Extendable: true},
			journal.Geometry{8192, 8192, 8192 + journal.AreaBytes},
		},
	} {
		found, err := examine(t, c.d, c.w)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		s := found.Superblock
		if !found.Adopted || found.Geometry != c.want || s.Validate() != nil || s.Name != "vol" || !s.Clean || s.VolumeBytes != c.want.VolumeBytes {
			t.Errorf("%s: %+v, %+v", name, found, s)
		}
		if c.w.UUID != (journal.UUID{}) && s.UUID != c.w.UUID {
			t.Errorf("%s: uuid %s", name, s.UUID)
		}
	}
}

func TestExamineRefuses(t *testing.T) {
	d, s := stored(t)
	same := journal.Wanted{Name: s.Name, Journal: s.Journal}
	with := func(change func(*journal.Wanted)) journal.Wanted {
		w := same
		change(&w)
		return w
	}
	spoilt := func(change func(b []byte)) *disk {
		d, _ := stored(t)
		change(d.written)
		return d
	}
	const second = areaOffset + journal.AreaBytes - journal.SuperblockBytes
	newer := spoilt(func(b []byte) {
		for _, at := range []int{areaOffset, second} {
			b[at+11] = 2
			journal.PutChecksum(b[at:][:4096])
		}
	})
	damaged := spoilt(func(b []byte) { b[areaOffset+50]++; b[second+50]++ })
	tail := newDisk()
	tail.written[areaOffset+12345] = 1
	lastByte := newDisk()
	lastByte.written[len(lastByte.written)-1] = 1
	for name, c := range map[string]struct {
		d      *disk
		w      journal.Wanted
		says   []string // in the message
		forced bool     // Force passes over it
	}{
		"other name":     {d, with(func(w *journal.Wanted) { w.Name = "other" }), []string{`"redo-log"`, `"other"`, "--name redo-log", "--force"}, true},
		"other uuid":     {d, with(func(w *journal.Wanted) { w.UUID = journal.NewUUID() }), []string{s.UUID.String(), "--force"}, true},
		"other size":     {d, with(func(w *journal.Wanted) { w.VolumeBytes = 4096 }), []string{"65536", "4096", "--size"}, false},
		"other journal":  {d, with(func(w *journal.Wanted) { w.Journal = journal.KindNone }), []string{"internal", "none", "--journal"}, false},
		"newer":          {newer, same, []string{"version 2", "newer"}, false},
		"damaged":        {damaged, same, []string{"copy 0", "copy 1", "checksum", "--force"}, true},
		"tail not zero":  {tail, same, []string{"77881", "--journal", "--force"}, true},
		"last not zero":  {lastByte, same, []string{"1114111"}, true},
		"damaged, small": {damaged, with(func(w *journal.Wanted) { w.VolumeBytes = 4096 }), []string{"--force"}, true},
	} {
		_, err := examine(t, c.d, c.w)
		var refused *journal.RefusedError
		if !errors.As(err, &refused) || refused.Remedy == "" {
			t.Errorf("%s: %v is no refusal with a remedy", name, err)
			continue
		}
		for _, says := range c.says {
			if !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %q does not say %q", name, err, says)
			}
		}
		c.w.Force = true
		found, err := examine(t, c.d, c.w)
		if (err == nil) != c.forced {
			t.Errorf("%s, forced: %v", name, err)
		}
		if err == nil && (!found.Adopted || found.Superblock.Name != c.w.Name) {
			t.Errorf("%s, forced: %+v", name, found)
		}
	}
	for name, w := range map[string]journal.Wanted{"no name": {}, "size": {Name: "v", VolumeBytes: 1}, "file": {Name: "v", Extendable: true}} {
		var refused *journal.RefusedError
		if _, err := examine(t, newDisk(), w); err == nil || errors.As(err, &refused) {
			t.Errorf("%s: %v, want an error that is no refusal", name, err)
		}
	}
}

// TestForcedStoreReplaces: after Force another volume's superblock is gone, whatever its sequence number was.
func TestForcedStoreReplaces(t *testing.T) {
	d, _ := stored(t)
	found, err := examine(t, d, journal.Wanted{Name: "other", Force: true})
	if err != nil {
		t.Fatal(err)
	}
	found.Superblock.Begin()
	if err := found.Superblock.Store(d, now); err != nil {
		t.Fatal(err)
	}
	if got := load(t, d); got.Name != "other" || got.Incarnation.Counter != 1 {
		t.Errorf("%+v", got)
	}
}
