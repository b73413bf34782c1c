package journal_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

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

// diskGeometry is that of a disk of the tests in store_test.go.
var diskGeometry = journal.Geometry{
	VolumeBytes: volumeBytes, MetadataOffset: volumeBytes, BackingBytes: areaOffset + journal.AreaBytes,
	BitmapOffset: volumeBytes, BitmapBytes: 8192, RegionBytes: 64 << 10,
}

func TestExamineFinds(t *testing.T) {
	d, s := stored(t)
	for _, w := range []journal.Wanted{
		{Name: s.Name, Journal: s.Journal},
		{Name: s.Name, Journal: s.Journal, UUID: s.UUID, VolumeBytes: s.VolumeBytes},
		{Name: s.Name, Journal: s.Journal, Force: true},
		{Name: s.Name, Journal: s.Journal, Extendable: true},
		{Name: s.Name, Journal: journal.KindInternal, AnyJournal: true, RingBytes: 64 << 20},
	} {
		found, err := examine(t, d, w)
		if err != nil {
			t.Errorf("%+v: %v", w, err)
			continue
		}
		if found.Adopted || found.Superblock.UUID != s.UUID || found.Geometry != diskGeometry {
			t.Errorf("%+v: %+v", w, found)
		}
	}
}

func TestExamineAdopts(t *testing.T) {
	filled := func() *disk {
		d := newDisk()
		for i := range d.written[:volumeBytes] {
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
		"zero tail":  {filled(), journal.Wanted{Name: "vol"}, diskGeometry},
		"given uuid": {filled(), journal.Wanted{Name: "vol", UUID: uuid}, diskGeometry},
		"extended": {
			&disk{written: bytes.Repeat([]byte{1}, 8192)},
			journal.Wanted{Name: "vol", VolumeBytes: 8192, Extendable: true},
			journal.Geometry{
				VolumeBytes: 8192, MetadataOffset: 8192, BackingBytes: 8192 + 8192 + journal.AreaBytes,
				BitmapOffset: 8192, BitmapBytes: 8192, RegionBytes: 64 << 10,
			},
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
	inBitmap := newDisk()
	inBitmap.written[volumeBytes] = 1
	for name, c := range map[string]struct {
		d      *disk
		w      journal.Wanted
		says   []string // in the message
		forced bool     // Force passes over it
	}{
		"other name":      {d, with(func(w *journal.Wanted) { w.Name = "other" }), []string{`"redo-log"`, `"other"`, "--name redo-log", "--force"}, true},
		"other uuid":      {d, with(func(w *journal.Wanted) { w.UUID = journal.NewUUID() }), []string{s.UUID.String(), "--force"}, true},
		"other size":      {d, with(func(w *journal.Wanted) { w.VolumeBytes = 4096 }), []string{"65536", "4096", "--size"}, false},
		"other journal":   {d, with(func(w *journal.Wanted) { w.Journal = journal.KindInternal }), []string{"internal", "none", "--journal"}, false},
		"newer":           {newer, same, []string{"version 2", "newer"}, false},
		"damaged":         {damaged, same, []string{"copy 0", "copy 1", "checksum", "--force"}, true},
		"tail not zero":   {tail, same, []string{"86073", "--journal", "--force"}, true},
		"last not zero":   {lastByte, same, []string{"1122303"}, true},
		"bitmap not zero": {inBitmap, same, []string{"at byte 65536"}, true},
		"damaged, small":  {damaged, with(func(w *journal.Wanted) { w.VolumeBytes = 4096 }), []string{"--force"}, true},
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
