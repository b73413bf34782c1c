package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// covers reports whether n bytes at off lie in the ranges.
func covers(ranges []control.Range, off, n int64) bool {
	for _, r := range ranges {
		if off >= r.OffsetBytes && off+n <= r.OffsetBytes+r.LengthBytes {
			return true
		}
	}
	return false
}

// storedIntent is the bitmap as it is on a disk without power.
func storedIntent(t *testing.T, p *plug) []control.Range {
	t.Helper()
	disk := bytes.NewReader(p.content(0, p.Size()))
	s, err := journal.Load(disk, journal.AreaOffset(p.Size()))
	if err != nil {
		t.Fatal(err)
	}
	set, warnings, err := journal.LoadIntent(disk, s)
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	list, _ := listRanges(set, 1<<30)
	return list
}

// intentRig is a volume without journal on a disk that can be unplugged.
func intentRig(t *testing.T) (*rig, *plug) {
	t.Helper()
	r := newRig(t)
	r.config.Size, r.config.Journal.Kind = 8<<20, config.JournalNone
	p := newPlug(make([]byte, journal.CreateBytes(8<<20, 0)), -1)
	p.holes = true
	return r, p
}

func mustOpen(t *testing.T, r *rig, b backing) *Volume {
	t.Helper()
	v, err := openOn(r, b)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// TestIntentComesBeforeHome: nothing is written home before its region is in the bitmap on the disk.
func TestIntentComesBeforeHome(t *testing.T) {
	r, p := intentRig(t)
	v := mustOpen(t, r, p)
	v.start()
	var mu sync.Mutex
	wrote := 0
	p.watch = func(off, n int64) {
		if off >= 8<<20 {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		wrote++
		if list := storedIntent(t, p); !covers(list, off, n) {
			t.Errorf("%d bytes at %d are written home and the bitmap has %v", n, off, list)
		}
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for range 10 {
		for range 5 {
			write(t, v, rng.Int64N(2047)*4096, pattern(byte(rng.IntN(256))))
		}
		zero(t, v, rng.Int64N(1000)*4096, 4096*(1+rng.Int64N(40)))
		if err := v.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	mu.Lock()
	n := wrote
	mu.Unlock()
	if n < 50 {
		t.Errorf("only %d writes came home", n)
	}
	if len(storedIntent(t, p)) == 0 {
		t.Error("the bitmap is empty right after something was written")
	}
	drain(t, v)
	closeVolume(t, v)
	if list := storedIntent(t, p); len(list) > 0 {
		t.Errorf("after a clean stop the bitmap has %v", list)
	}
	v = mustOpen(t, r, p)
	if s := v.Status(); s.SuspectBytes != 0 || s.Suspect == nil || len(s.Suspect) != 0 {
		t.Errorf("suspect after a clean stop: %d bytes, %v", s.SuspectBytes, s.Suspect)
	}
	closeVolume(t, v)
}

// TestSuspectRegions cuts the power at every operation of a volume without journal: whatever is not as it was before lies in a region
// that is told, by serve, in the status and by recover, also after another cut, until a clean stop.
func TestSuspectRegions(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	for n := 1; ; n++ {
		r, p := intentRig(t)
		v := mustOpen(t, r, p)
		before := p.content(0, 8<<20)
		v.start()
		if err := v.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
		p.mu.Lock()
		p.left = n
		p.mu.Unlock()
		for block := int64(3); block < 2048; block += 170 {
			write(t, v, block*4096, pattern(byte(block)))
		}
		zero(t, v, 1<<20, 64<<10)
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		err := v.Flush(ctx)
		cancel()
		closeVolume(t, v)
		loseMemory(t, r)
		if err == nil {
			if n < 10 {
				t.Fatalf("%d operations are too few", n)
			}
			return
		}
		p = p.replugged(rng, -1)
		after := p.content(0, 8<<20)
		found, err := recoverOn(p.copied(-1), false, false)
		if err != nil || !found.Recovered {
			t.Fatalf("operation %d: %+v, %v", n, found, err)
		}
		for round := range 2 {
			v = mustOpen(t, r, p)
			s := v.Status()
			if s.SuspectBytes != found.SuspectBytes || fmt.Sprint(s.Suspect) != fmt.Sprint(found.Suspect) {
				t.Errorf("operation %d, start %d: suspect are %v, recover found %v", n, round, s.Suspect, found.Suspect)
			}
			for off := int64(0); off < 8<<20; off += 4096 {
				if !bytes.Equal(before[off:off+4096], after[off:off+4096]) && !covers(s.Suspect, off, 4096) {
					t.Errorf("operation %d: block at %d changed and only %v are suspect", n, off, s.Suspect)
				}
			}
			if round == 1 {
				v.start()
				drain(t, v)
			}
			closeVolume(t, v)
			if round == 0 {
				loseMemory(t, r)
				p = p.replugged(rng, -1)
			}
		}
		if list := storedIntent(t, p); len(list) > 0 {
			t.Errorf("operation %d: after a clean stop the bitmap has %v", n, list)
		}
	}
}

// TestIntentSurvivesRestart: a start that finds the memory suspects nothing, since all of it is written again; but what was being
// written stays in the bitmap until that has happened.
func TestIntentSurvivesRestart(t *testing.T) {
	r, p := intentRig(t)
	v := mustOpen(t, r, p)
	v.start()
	write(t, v, 1<<20, pattern(1))
	if err := v.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	closeVolume(t, v)
	had := storedIntent(t, p)
	if !covers(had, 1<<20, 4096) {
		t.Fatalf("the bitmap has %v", had)
	}
	v = mustOpen(t, r, p)
	if s := v.Status(); s.SuspectBytes != 0 {
		t.Errorf("%d bytes are suspect though nothing is lost", s.SuspectBytes)
	}
	if list := storedIntent(t, p); fmt.Sprint(list) != fmt.Sprint(had) {
		t.Errorf("the bitmap has %v after a restart, had %v", list, had)
	}
	closeVolume(t, v)
}

// TestFailedIntentKeepsHome: while the bitmap cannot be stored nothing is written home; afterwards everything is.
func TestFailedIntentKeepsHome(t *testing.T) {
	r, p := intentRig(t)
	v := mustOpen(t, r, p)
	v.start()
	if err := v.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	home := false
	var mu sync.Mutex
	p.watch = func(off, _ int64) {
		mu.Lock()
		defer mu.Unlock()
		home = home || off < 8<<20
	}
	p.mu.Lock()
	p.left = 1 // the page, or its sync
	p.mu.Unlock()
	write(t, v, 0, pattern(3))
	if err := v.Flush(context.Background()); !errors.Is(err, errDrive) {
		t.Errorf("flush: %v, want %v", err, errDrive)
	}
	mu.Lock()
	if home {
		t.Error("something was written home though the bitmap was not stored")
	}
	mu.Unlock()
	p.mu.Lock()
	p.left = -1
	p.mu.Unlock()
	if err := v.Flush(context.Background()); err != nil {
		// The attempt that failed may be the one that is waited for.
		if err = v.Flush(context.Background()); err != nil {
			t.Error(err)
		}
	}
	if !bytes.Equal(p.content(0, 4096), pattern(3)) || !covers(storedIntent(t, p), 0, 4096) {
		t.Error("the write is not home, or not in the bitmap")
	}
	closeVolume(t, v)
}

// TestIntentCools: a region stays in the bitmap while it is written again and again, at no cost, and leaves it some time after. What
// is suspect stays.
func TestIntentCools(t *testing.T) {
	_, disk := stopped(t, config.JournalNone, 0)
	p := newPlug(disk, -1)
	s := superblockOf(t, p)
	empty := func() *journal.Intent { return journal.NewIntent(s.VolumeBytes, s.RegionBytes, s.IntentStamp()) }
	now := time.Now()
	i := newCoolingIntent(empty(), p, s, []control.Range{})
	i.now = func() time.Time { return now }
	syncs := 0
	store := func() {
		t.Helper()
		if err := i.Store(1, func() error { syncs++; return p.Sync() }); err != nil {
			t.Fatal(err)
		}
	}
	check := func(step string, wantSyncs int, want ...int64) {
		t.Helper()
		var got []int64
		for _, r := range storedIntent(t, p) {
			for at := r.OffsetBytes; at < r.OffsetBytes+r.LengthBytes; at += s.RegionBytes {
				got = append(got, at/s.RegionBytes)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) || syncs != wantSyncs {
			t.Errorf("%s: regions %v after %d syncs, want %v after %d", step, got, syncs, want, wantSyncs)
		}
	}
	store()
	check("nothing", 0)
	i.Mark(s.RegionBytes-1, 2, 1)
	store()
	check("two", 1, 0, 1)
	for range 20 {
		now = now.Add(time.Second)
		i.Mark(0, 1, 1)
		store()
	}
	check("one is hot", 2, 0)
	now = now.Add(coldAfter / 2)
	i.Mark(5*s.RegionBytes, 1, 1)
	store()
	check("another one", 3, 0, 5)
	now = now.Add(2 * coldAfter)
	store()
	check("all are cold", 4)
	now = now.Add(2 * coldAfter)
	store()
	check("still", 4)
	i.Mark(s.VolumeBytes, 4096, 1)
	i.Mark(s.VolumeBytes-1, 1<<40, 1)
	store()
	check("the end", 5, s.VolumeBytes/s.RegionBytes-1)

	set := empty()
	set.Mark(0, 3*s.RegionBytes, 1)
	i = newCoolingIntent(set, p, s, []control.Range{{OffsetBytes: s.RegionBytes, LengthBytes: s.RegionBytes}})
	i.now = func() time.Time { return now }
	i.began = now
	i.Mark(7*s.RegionBytes, 1, 1)
	store()
	check("suspect", 6, 0, 1, 2, 7)
	now = now.Add(time.Hour)
	store()
	check("suspect stay", 7, 1)
	i.Mark(s.RegionBytes, 1, 1)
	store()
	check("also where they are written", 7, 1)
	if err := i.retire(9); err != nil {
		t.Fatal(err)
	}
	check("retired", 7)
}

// TestJournalKeepsNoIntent: with a journal and without a peer the bitmap costs nothing.
func TestJournalKeepsNoIntent(t *testing.T) {
	r := newRig(t)
	p := newPlug(r.drive.data, -1)
	p.holes = true
	v := mustOpen(t, r, p)
	s := v.superblock
	p.watch = func(off, _ int64) {
		if off >= s.BitmapOffset && off < s.BitmapOffset+s.BitmapBytes {
			t.Errorf("a write at %d of the bitmap", off-s.BitmapOffset)
		}
	}
	v.start()
	write(t, v, 0, pattern(1))
	v.Reported(1, 1<<40) // from nowhere
	drain(t, v)
	closeVolume(t, v)
	if v.intent != nil {
		t.Error("an intent bitmap is kept for nobody")
	}
}

// TestIntentForPeer: whenever the power goes, what was committed and not reported is in the bitmap and the journal together.
func TestIntentForPeer(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 9))
	regions := map[int64]uint64{} // last committed number at least
	r := newRig(t)
	r.config.Peer = "peer:1"
	p := newPlug(r.drive.data, -1)
	p.holes = true
	check := func(v *Volume, when string) {
		t.Helper()
		list, _ := listRanges(v.intent.set, 1<<30)
		for at := range regions {
			if !covers(list, at*v.superblock.RegionBytes, v.superblock.RegionBytes) {
				t.Errorf("%s: region %d was committed and not reported, and only %v are in the set", when, at, list)
			}
		}
	}
	kept := 0
	for round := range 12 {
		v := mustOpen(t, r, p)
		if round%3 == 2 { // the power goes again at once, and the journal that knew is no more
			closeVolume(t, v)
			loseMemory(t, r)
			p = p.replugged(rng, -1)
			p.holes = true
			v = mustOpen(t, r, p)
		}
		check(v, fmt.Sprintf("start %d", round))
		for region, number := range regions { // seals without content leave no trace
			regions[region] = min(number, v.Status().Epoch.Committed)
		}
		v.start()
		for range 6 {
			var touched []int64
			before := v.Status().Epoch.Committed
			for range 4 {
				block := rng.Int64N(testSize / 4096)
				write(t, v, block*4096, pattern(byte(block)))
				touched = append(touched, block*4096/v.superblock.RegionBytes)
			}
			at, n := rng.Int64N(3000), 1+rng.Int64N(50)
			zero(t, v, at*4096, n*4096)
			for off := at * 4096; off < (at+n)*4096; off += 4096 {
				touched = append(touched, off/v.superblock.RegionBytes)
			}
			end := v.flusher.Commit
			if rng.IntN(2) == 0 {
				end = v.Flush // the tail may pass what is committed
			}
			if err := end(context.Background()); err != nil {
				t.Fatal(err)
			}
			for _, region := range touched {
				regions[region] = v.Status().Epoch.Committed
			}
			switch rng.IntN(4) {
			case 0:
				v.Reported(v.generation(), before)
				maps.DeleteFunc(regions, func(_ int64, number uint64) bool { return number <= before })
			case 1:
				v.Reported(v.generation()+1, 1<<60) // of a generation that is not known
			case 2:
				v.Reported(v.generation(), v.Status().Epoch.Committed)
				clear(regions)
			}
			v.intent.mu.Lock()
			check(v, "reported")
			if n := v.intent.set.Bytes(); n > 0 && len(regions) == 0 {
				t.Errorf("everything is reported and the set has %d bytes", n)
			}
			v.intent.mu.Unlock()
		}
		kept += len(regions)
		switch rng.IntN(3) {
		case 0:
			drain(t, v)
			closeVolume(t, v)
		case 1:
			closeVolume(t, v)
		default:
			closeVolume(t, v)
			loseMemory(t, r)
			p = p.replugged(rng, -1)
			p.holes = true
		}
	}
	if kept == 0 {
		t.Error("no region was ever kept over a start")
	}
}

// TestReportedInOlderGeneration: a position counts up to where its generation was left.
func TestReportedInOlderGeneration(t *testing.T) {
	r := newRig(t)
	r.config.Peer = "peer:1"
	v := r.open()
	v.superblock.Generations = []journal.Generation{{ID: 3, Fork: 0}, {ID: 4, Parent: 3, Fork: 100}, {ID: 6, Parent: 4, Fork: 200}}
	for _, c := range []struct {
		generation, number uint64
		left               int64 // of regions with the numbers 50, 150 and 250
	}{{7, 1 << 60, 3}, {2, 1 << 60, 3}, {3, 40, 3}, {3, 1 << 60, 2}, {4, 149, 2}, {4, 1 << 60, 1}, {6, 249, 1}, {6, 250, 0}} {
		v.intent.set.Clear(0, testSize)
		for i, number := range []uint64{50, 150, 250} {
			v.intent.Mark(int64(i)*v.superblock.RegionBytes, 1, number)
		}
		v.Reported(c.generation, c.number)
		if got := v.intent.set.Bytes() / v.superblock.RegionBytes; got != c.left {
			t.Errorf("reported %d of generation %d: %d regions left, want %d", c.number, c.generation, got, c.left)
		}
	}
	closeVolume(t, v)
}
