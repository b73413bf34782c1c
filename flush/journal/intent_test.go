package journal_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

const pageRegions = 32224

// bitmap is a bitmap with small regions, so that a few pages need no large volume, and the media it lies on.
func bitmap(regions int64) (*journal.Superblock, *media) {
	s := sample()
	s.RegionBytes, s.VolumeBytes, s.BitmapOffset = 512, regions*512, 4096
	pages := (regions + pageRegions - 1) / pageRegions
	s.BitmapBytes = 2 * pages * 4096
	return s, newMedia(4096 + s.BitmapBytes)
}

func newIntent(s *journal.Superblock) *journal.Intent {
	return journal.NewIntent(s.VolumeBytes, s.RegionBytes, s.IntentStamp())
}

// store stores the pages that changed.
func store(t *journal.Intent, s *journal.Superblock, m *media, number uint64) error {
	err := t.Pages(make([]byte, 4096), number, 0x22, func(off int64, page []byte) error {
		_, err := m.WriteAt(page, s.BitmapOffset+off)
		return err
	})
	if err == nil {
		err = m.Sync()
	}
	if err != nil {
		t.Failed()
		return err
	}
	t.Stored()
	return nil
}

// loadIntent loads a bitmap that is whole.
func loadIntent(t *testing.T, s *journal.Superblock, m *media) *journal.Intent {
	t.Helper()
	got, warnings, err := journal.LoadIntent(m, s)
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	return got
}

type span struct{ off, n int64 }

func regions(t *journal.Intent) []span {
	var list []span
	t.Regions(func(off, n int64) bool {
		list = append(list, span{off, n})
		return true
	})
	return list
}

func TestPageGolden(t *testing.T) {
	s, m := bitmap(2 * pageRegions)
	it := newIntent(s)
	for _, r := range []int64{0, 3, pageRegions - 1} {
		it.Mark((pageRegions+r)*512, 1, 54321)
	}
	if err := store(it, s, m, 54321); err != nil {
		t.Fatal(err)
	}
	want := golden(t, "page.hex")
	if got := m.durable[4096+3*4096:][:4096]; !bytes.Equal(got, want) { // copy B of page 1
		t.Errorf("page %x, ends in %x", got[:80], got[4080:])
	}
	if got := regions(loadIntent(t, s, m)); !slices.Equal(got, []span{{pageRegions * 512, 512}, {(pageRegions + 3) * 512, 512}, {(2*pageRegions - 1) * 512, 512}}) {
		t.Errorf("loaded %v", got)
	}
}

func TestIntentRegions(t *testing.T) {
	const volume, region = 10<<16 + 4096, 1 << 16 // the eleventh region is a short one
	fill := func() *journal.Intent {
		it := journal.NewIntent(volume, region, 1)
		it.Mark(0, volume, 10)
		return it
	}
	for name, c := range map[string]struct {
		do   func() *journal.Intent
		want []span
	}{
		"empty":          {func() *journal.Intent { return journal.NewIntent(volume, region, 1) }, nil},
		"all":            {fill, []span{{0, volume}}},
		"nothing marked": {func() *journal.Intent { it := journal.NewIntent(volume, region, 1); it.Mark(5, 0, 9); return it }, nil},
		"a byte":         {func() *journal.Intent { it := journal.NewIntent(volume, region, 1); it.Mark(region, 1, 9); return it }, []span{{region, region}}},
		"two bytes": {func() *journal.Intent { it := journal.NewIntent(volume, region, 1); it.Mark(region-1, 2, 9); return it },
			[]span{{0, 2 * region}}},
		"the last":       {func() *journal.Intent { it := journal.NewIntent(volume, region, 1); it.Mark(volume-1, 1, 9); return it }, []span{{10 * region, 4096}}},
		"clear all":      {func() *journal.Intent { it := fill(); it.Clear(0, volume); return it }, nil},
		"clear one":      {func() *journal.Intent { it := fill(); it.Clear(region, region); return it }, []span{{0, region}, {2 * region, 8*region + 4096}}},
		"clear a part":   {func() *journal.Intent { it := fill(); it.Clear(1, 2*region-2); return it }, []span{{0, volume}}},
		"clear inside":   {func() *journal.Intent { it := fill(); it.Clear(1, 2*region-1); return it }, []span{{0, region}, {2 * region, 8*region + 4096}}},
		"clear the last": {func() *journal.Intent { it := fill(); it.Clear(10*region, 4096); return it }, []span{{0, 10 * region}}},
		"clear nothing":  {func() *journal.Intent { it := fill(); it.Clear(region, 0); return it }, []span{{0, volume}}},
		"clear twice":    {func() *journal.Intent { it := fill(); it.Clear(0, region); it.Clear(0, region); return it }, []span{{region, 9*region + 4096}}},
		"reported":       {func() *journal.Intent { it := fill(); it.Mark(region, 1, 11); it.Reported(10); return it }, []span{{region, region}}},
		"not yet":        {func() *journal.Intent { it := fill(); it.Reported(9); return it }, []span{{0, volume}}},
		"older mark":     {func() *journal.Intent { it := fill(); it.Mark(0, volume, 5); it.Reported(9); return it }, []span{{0, volume}}},
		"marked again":   {func() *journal.Intent { it := fill(); it.Reported(10); it.Mark(0, 1, 3); it.Reported(2); return it }, []span{{0, region}}},
	} {
		it := c.do()
		total := int64(0)
		for _, s := range c.want {
			total += s.n
		}
		if got := regions(it); !slices.Equal(got, c.want) || it.Bytes() != total {
			t.Errorf("%s: %v, %d bytes, want %v, %d", name, got, it.Bytes(), c.want, total)
		}
	}
	n := 0
	it := fill()
	it.Clear(region, region)
	it.Regions(func(int64, int64) bool { n++; return false })
	if n != 1 {
		t.Errorf("%d calls after one said no", n)
	}
}

// TestIntentFarNumbers: numbers that are too far apart for the memory they have may keep a region for longer, never for
// less.
func TestIntentFarNumbers(t *testing.T) {
	it := journal.NewIntent(8*512, 512, 1)
	it.Mark(0, 1, 5)
	it.Mark(512, 1, 1<<31)
	it.Mark(1024, 1, 1<<40)
	it.Mark(1536, 1, 1<<40-1)
	it.Mark(2048, 1, 7) // older than all that is remembered exactly
	it.Reported(1 << 31)
	if got := it.Bytes(); got < 2*512 {
		t.Errorf("%d bytes", got)
	}
	it.Reported(1<<40 - 2)
	if got := regions(it); !slices.Equal(got, []span{{1024, 1024}}) {
		t.Errorf("%v", got)
	}
	it.Reported(1<<40 - 1)
	if got := regions(it); !slices.Equal(got, []span{{1024, 512}}) {
		t.Errorf("%v", got)
	}
	it.Mark(0, 1, 1<<63)
	it.Reported(1<<63 - 1)
	if got := regions(it); !slices.Equal(got, []span{{0, 512}}) {
		t.Errorf("%v", got)
	}
}

// TestIntentModel compares with the plain truth, through power cuts and errors: no region is ever missing of which the
// last number was not reported, given that after a cut is marked again what is newer than the number of the last store
// that succeeded.
func TestIntentModel(t *testing.T) {
	seeds := 16
	if testing.Short() {
		seeds = 5
	}
	warned, exact := 0, 0
	for seed := range uint64(seeds) {
		rng := rand.New(rand.NewPCG(seed, 3))
		count := int64(1 + rng.IntN(2*pageRegions+100))
		s, m := bitmap(count)
		truth := make([]uint64, count) // last number, 0: not in the set
		type mark struct {
			region int64
			number uint64
		}
		var ring []mark // newer than the tail
		it := newIntent(s)
		strict := true // since a cut the set may be larger
		number, reported := uint64(rng.IntN(2))<<33, uint64(0)
		for range 300 {
			switch k := rng.IntN(20); {
			case k < 12:
				number++
				from := rng.Int64N(count)
				n := min(1+rng.Int64N(5), count-from)
				it.Mark(from*512, n*512, number)
				for r := from; r < from+n; r++ {
					truth[r] = number
					ring = append(ring, mark{r, number})
				}
			case k < 14:
				reported += rng.Uint64N(number - reported + 1)
				it.Reported(reported)
				for r := range truth {
					if truth[r] <= reported {
						truth[r] = 0
					}
				}
			case k < 15:
				from := rng.Int64N(count)
				it.Clear(from*512, 512)
				truth[from] = 0
				ring = slices.DeleteFunc(ring, func(x mark) bool { return x.region == from })
			case k < 17:
				if err := store(it, s, m, number); err != nil {
					t.Fatal(err)
				}
				ring = ring[:0]
			case k < 18:
				m.calls, m.failAt = 0, 1+rng.IntN(4)
				if store(it, s, m, number) == nil {
					ring = ring[:0]
				}
				m.failAt = 0
			case k < 18+rng.IntN(2): // cut somewhere in a store
				_ = it.Pages(make([]byte, 4096), number, 1, func(off int64, page []byte) error {
					_, err := m.WriteAt(page, s.BitmapOffset+off)
					return err
				})
				m = m.cutAtRandom(rng)
				got, warnings, err := journal.LoadIntent(m, s)
				if err != nil {
					t.Fatal(err)
				}
				warned += len(warnings)
				it, strict = got, false
				for _, x := range ring {
					it.Mark(x.region*512, 512, x.number)
				}
			default: // a restart without a cut, with a page that cannot be read
				if m.Sync() != nil {
					t.Fatal("sync")
				}
				m.bad[s.BitmapOffset+rng.Int64N(s.BitmapBytes)/4096*4096] = true
				got, warnings, err := journal.LoadIntent(m, s)
				if err != nil {
					t.Fatal(err)
				}
				warned += len(warnings)
				it, strict = got, false
				for _, x := range ring {
					it.Mark(x.region*512, 512, x.number)
				}
				m.bad = map[int64]bool{}
			}
			set := make([]bool, count)
			it.Regions(func(off, n int64) bool {
				for r := off / 512; r < (off+n)/512; r++ {
					set[r] = true
				}
				return true
			})
			for r := range truth {
				if truth[r] != 0 && !set[r] {
					t.Fatalf("seed %d: region %d with number %d is missing, reported is %d", seed, r, truth[r], reported)
				}
				if strict && truth[r] == 0 && set[r] {
					t.Fatalf("seed %d: region %d is set for nothing", seed, r)
				}
			}
			if strict {
				exact++
			}
		}
	}
	if warned < seeds/4 || exact < 4*seeds {
		t.Errorf("%d warnings, %d exact steps: that is not what this test is about", warned, exact)
	}
}

// TestIntentMarkedAgain: a page whose bits remain the same is stored again when their numbers grew, or a restart would
// take them back.
func TestIntentMarkedAgain(t *testing.T) {
	s, m := bitmap(100)
	it := newIntent(s)
	for _, number := range []uint64{10, 20} {
		it.Mark(0, 512, number)
		if err := store(it, s, m, number); err != nil {
			t.Fatal(err)
		}
	}
	got := loadIntent(t, s, m)
	got.Reported(19)
	if got.Bytes() != 512 {
		t.Error("a region left the set before its last number was reported")
	}
	got.Reported(20)
	if got.Bytes() != 0 {
		t.Error("a region stays in the set for nothing")
	}
}

// TestPagesWritesWhatChanged, to the copy that does not hold.
func TestPagesWritesWhatChanged(t *testing.T) {
	s, _ := bitmap(3 * pageRegions)
	it := newIntent(s)
	pages := func() (list []int64) {
		err := it.Pages(make([]byte, 4096), 1, 1, func(off int64, _ []byte) error {
			list = append(list, off/4096)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	check := func(step string, want ...int64) {
		t.Helper()
		if got := pages(); !slices.Equal(got, want) {
			t.Errorf("%s: wrote %v, want %v", step, got, want)
		}
	}
	check("new", 3, 0, 4, 1, 5, 2) // copies A are 0, 1, 2
	check("outcome not told", 3, 0, 4, 1, 5, 2)
	it.Stored()
	check("nothing changed")
	it.Stored()
	it.Mark(pageRegions*512, 1, 1)
	check("one", 1)
	it.Failed()
	check("failed", 1)
	it.Stored()
	it.Clear(pageRegions*512, 512)
	it.Mark(0, 1, 2)
	check("two", 0, 4)
	it.Stored()
	it.Reported(1)
	it.Clear(512, 512)
	check("no news")
}

func TestLoadIntentDamage(t *testing.T) {
	const regionCount = 2 * pageRegions
	all := []span{{0, pageRegions * 512}}
	for name, c := range map[string]struct {
		spoil func(m *media) // page 0: copy A at 4096, copy B at 4096+2*4096; B holds
		want  []span
		warns string
	}{
		"whole":            {func(*media) {}, []span{{512, 512}}, ""},
		"held flipped":     {func(m *media) { m.now[4096+8192+100] ^= 1 }, all, "copy B"},
		"other flipped":    {func(m *media) { m.now[4096+100] ^= 1 }, all, "copy A"},
		"no magic":         {func(m *media) { m.now[4096+8192] ^= 1 }, all, "it is none"},
		"both flipped":     {func(m *media) { m.now[4096+1] ^= 1; m.now[4096+8192+100] ^= 1 }, all, "copy A"},
		"unreadable":       {func(m *media) { m.bad[4096+8192] = true }, all, "input/output"},
		"other unreadable": {func(m *media) { m.bad[4096] = true }, all, "copy A"},
		"other never used": {func(m *media) { clear(m.now[4096:8192]) }, []span{{512, 512}}, ""},
		"never used":       {func(m *media) { clear(m.now[4096:8192]); clear(m.now[4096+8192:][:4096]) }, nil, ""},
		"of another volume": {func(m *media) {
			for _, at := range []int{4096, 4096 + 8192} {
				m.now[at+16] ^= 1
				journal.PutChunkChecksum(m.now[at:][:4096])
			}
		}, nil, ""},
		"other version": {func(m *media) { m.now[4096+11]++; journal.PutChunkChecksum(m.now[4096:][:4096]) }, all, "version 2"},
		"other page":    {func(m *media) { m.now[4096+15]++; journal.PutChunkChecksum(m.now[4096:][:4096]) }, all, "page 1"},
		"reserved":      {func(m *media) { m.now[4096+63]++; journal.PutChunkChecksum(m.now[4096:][:4096]) }, all, "reserved"},
		"same sequence": {func(m *media) { copy(m.now[4096:8192], m.now[4096+8192:]) }, all, "both copies"},
		"sequence 0":    {func(m *media) { clear(m.now[4096+24:][:8]); journal.PutChunkChecksum(m.now[4096:][:4096]) }, all, "sequence"},
	} {
		s, m := bitmap(regionCount)
		it := newIntent(s)
		for _, number := range []uint64{1, 2, 3} {
			it.Mark(512, 512, number)
			if number == 2 {
				it.Mark(0, 512, number) // copy A, which does not hold in the end, has another content
			}
			if number == 3 {
				it.Clear(0, 512)
			}
			if err := store(it, s, m, number); err != nil {
				t.Fatal(err)
			}
		}
		c.spoil(m)
		got, warnings, err := journal.LoadIntent(m, s)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(regions(got), c.want) || (len(warnings) > 0) != (c.warns != "") || len(warnings) > 0 && !strings.Contains(warnings[0].Error(), c.warns) {
			t.Errorf("%s: %v, %v, want %v, %q", name, regions(got), warnings, c.want, c.warns)
		}
		if c.warns == "" {
			continue
		}
		// No report takes out what nobody knows; what is stored afterwards is whole again.
		got.Reported(1 << 60)
		if !slices.Equal(regions(got), c.want) {
			t.Errorf("%s: %v after a report", name, regions(got))
		}
		got.Clear(512, 1024)
		m.bad = map[int64]bool{}
		if err := store(got, s, m, 9); err != nil {
			t.Fatal(err)
		}
		if again := loadIntent(t, s, m); !slices.Equal(regions(again), regions(got)) || len(regions(again)) != 2 {
			t.Errorf("%s: loaded %v, stored %v", name, regions(again), regions(got))
		}
	}
	// A bit behind the end of the volume.
	s, m := bitmap(100)
	if err := store(newIntent(s), s, m, 1); err != nil {
		t.Fatal(err)
	}
	m.now[4096+64+12] |= 1 << 4
	journal.PutChunkChecksum(m.now[4096:][:4096])
	if _, warnings, err := journal.LoadIntent(m, s); err != nil || len(warnings) != 1 || !strings.Contains(warnings[0].Error(), "region 100") {
		t.Errorf("%v, %v", warnings, err)
	}
	s.BitmapBytes *= 2
	if _, _, err := journal.LoadIntent(m, s); err == nil {
		t.Error("bitmap of the wrong length is loaded")
	}
}

// TestPagesErrors: whichever call fails, the caller hears of it, and the next store puts everything right.
func TestPagesErrors(t *testing.T) {
	for n := 1; ; n++ {
		s, m := bitmap(2 * pageRegions)
		it := newIntent(s)
		it.Mark(0, 512, 5)
		m.failAt = n
		err := store(it, s, m, 5)
		if (err == nil) != (m.calls < n) || err != nil && !errors.Is(err, errMedia) {
			t.Errorf("call %d: %v after %d", n, err, m.calls)
		}
		if err == nil {
			break
		}
		m.failAt = 0
		if err := store(it, s, m, 5); err != nil {
			t.Fatal(err)
		}
		if got := regions(loadIntent(t, s, m)); !slices.Equal(got, []span{{0, 512}}) {
			t.Errorf("call %d: %v", n, got)
		}
	}
}

// FuzzLoadIntent: nothing panics, what is said is consistent, and what is stored afterwards is loaded as it was.
func FuzzLoadIntent(f *testing.F) {
	page := golden(f, "page.hex")
	page[15] = 0
	clear(page[4091:])
	f.Add(page, []byte{})
	f.Add([]byte{}, page)
	f.Add([]byte("RSHELFBM"), bytes.Repeat([]byte{1}, 4096))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		s, m := bitmap(100)
		for i, c := range [][]byte{a, b} {
			p := m.now[4096*(1+i):][:4096]
			if copy(p, c) == 4096 {
				journal.PutChunkChecksum(p)
			}
		}
		it, warnings, err := journal.LoadIntent(m, s)
		if err != nil {
			t.Fatal(err)
		}
		total := int64(0)
		it.Regions(func(off, n int64) bool {
			total += n
			return n > 0 && off >= 0 && off+n <= s.VolumeBytes
		})
		if total != it.Bytes() || len(warnings) > 0 && total != s.VolumeBytes {
			t.Errorf("%d bytes in regions, %d in all, warnings %v", total, it.Bytes(), warnings)
		}
		it.Mark(0, 512, 1<<62)
		want := regions(it)
		if err := store(it, s, m, 1<<62); err != nil {
			t.Fatal(err)
		}
		again, warnings, err := journal.LoadIntent(m, s)
		if err != nil || len(warnings) > 0 || !slices.Equal(regions(again), want) {
			t.Errorf("%v, %v: %v, want %v", err, warnings, regions(again), want)
		}
	})
}
