package journal_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// history is a lab with three runs behind its mark, of which the tail has passed the first: seal 100 is home, 101 and
// 102 are not. The runs of the two have two chunks each.
func history(t testing.TB) (l *lab, a, b, c uint64) {
	l = newLab(t, 16, 64, 10*64+56) // the runs go round the end
	a = l.run(100, 165, block(1, 0xff, 10))
	copy(l.home.now[4096:], block(1, 0xff, 10).data())
	l.ring.Advance(l.ring.State().Head)
	b = l.run(101, 2, block(2, 0xff, 11), zero(5, 2, 12), block(3, 0x0f, 13))
	c = l.run(102, 2, block(2, 0x01, 14), block(4, 0xff, 15), block(5, 0x80, 16))
	return l, a, b, c
}

// historyAt is what the volume says at a seal of history.
func historyAt(seal uint64) map[int]string {
	switch seal {
	case 100:
		return map[int]string{1: "10"}
	case 101:
		return map[int]string{1: "10", 2: "11", 3: "13 home", 5: "0", 6: "0"}
	case 102:
		return map[int]string{1: "10", 2: "14 11", 3: "13 home", 4: "15", 5: "0 16", 6: "0"}
	}
	return nil
}

// check replays what was recovered and compares the volume.
func (l *lab) check(what string, rec *journal.Recovered, want map[int]string) {
	l.t.Helper()
	if err := journal.Replay(context.Background(), rec, l.log, l.home, nil); err != nil {
		l.t.Errorf("%s: %v", what, err)
		return
	}
	for b := range len(l.home.now) / 4096 {
		w, ok := want[b]
		if !ok {
			w = "home"
		}
		if got := say(l.home, b); got != w {
			l.t.Errorf("%s: seal %d: block %d says %q, want %q", what, rec.Seal, b, got, w)
		}
	}
}

// TestScanBitFlips flips bits everywhere: in a run that something behind it proves to be committed that is refused, in
// the last one it counts as never committed, or is refused if the superblock names its seal; before the tail it does
// not matter. What is recovered is always a state that was committed.
func TestScanBitFlips(t *testing.T) {
	l, a, b, c := history(t)
	home := bytes.Clone(l.home.now)
	end := l.ring.State().Head
	for pos := a; pos < end; pos++ {
		at := int(l.ring.Offset(pos))
		var places []int
		for i := range 4096 {
			// The headers' fields and entries, and their checksum; of data and of what must be zero, samples.
			if (i < 128+3*24 || i >= 4088) && (!testing.Short() || i%5 == 0) || i%193 == 0 {
				places = append(places, i)
			}
		}
		for i, place := range places {
			l.log.now[at+place] ^= 1 << (i % 8)
			copy(l.home.now, home)
			for _, committed := range []uint64{0, 102} {
				l.s.Committed = committed
				rec, err := l.scan()
				var refused *journal.RefusedError
				seal, refuse := uint64(102), false
				switch {
				case pos >= c:
					seal, refuse = 101, committed == 102
				case pos >= b:
					seal, refuse = 0, true // nothing says which seal the tail is at
				}
				if errors.As(err, &refused) != refuse || err != nil && !refuse || rec.Seal != seal {
					t.Fatalf("position %d, byte %d, superblock knows %d: seal %d, %v; want %d, refused %v", pos, place, committed, rec.Seal, err, seal, refuse)
				}
				if refuse && (!strings.Contains(refused.Remedy, "--force") || refused.Err == nil) {
					t.Fatalf("%v has no cause or remedy", refused)
				}
				if i%16 == 0 {
					l.check("flipped", rec, historyAt(max(rec.Seal, 100)))
				}
			}
			l.log.now[at+place] ^= 1 << (i % 8)
		}
	}
	l.s.Committed = 102
	l.check("whole", l.mustScan(), historyAt(102))
}

// TestScanDamage: other ways in which a ring can be wrong.
func TestScanDamage(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(l *lab, a, b, c uint64)
		seal  uint64
		torn  bool
		says  string // in the refusal; empty: there is none
	}{
		"whole":                 {func(*lab, uint64, uint64, uint64) {}, 102, false, ""},
		"wiped":                 {func(l *lab, _, _, _ uint64) { clear(l.log.now) }, 1, false, "holds no run"},
		"of another ring":       {func(l *lab, _, _, _ uint64) { l.s.RingStamp++ }, 1, false, "holds no run"},
		"wiped, unreadable":     {func(l *lab, _, _, _ uint64) { clear(l.log.now); l.log.bad[8192] = true }, 1, false, "input/output"},
		"never used":            {func(l *lab, _, _, _ uint64) { l.s.RingStamp = 0 }, 1, false, ""},
		"first run gone":        {func(l *lab, _, b, _ uint64) { clear(l.log.now[l.ring.Offset(b):][:4096]) }, 0, false, "another one begins behind it"},
		"its second chunk gone": {func(l *lab, _, b, _ uint64) { clear(l.log.now[l.ring.Offset(b+2):][:4096]) }, 0, false, "another one begins behind it"},
		"both gone": {func(l *lab, _, b, c uint64) {
			clear(l.log.now[l.ring.Offset(b):][:4096])
			clear(l.log.now[l.ring.Offset(c):][:4096])
		}, 0, false, "another one begins behind it"},
		"last run without start": {func(l *lab, _, _, c uint64) { clear(l.log.now[l.ring.Offset(c):][:4096]) }, 101, true, ""},
		"last run without end":   {func(l *lab, _, _, c uint64) { clear(l.log.now[l.ring.Offset(c+3):][:4096]) }, 101, true, ""},
		"last run gone": {func(l *lab, _, _, c uint64) {
			for pos := c; pos < c+5; pos++ {
				clear(l.log.now[l.ring.Offset(pos):][:4096])
			}
		}, 101, false, ""},
		"last run gone, named": {func(l *lab, _, _, c uint64) {
			for pos := c; pos < c+5; pos++ {
				clear(l.log.now[l.ring.Offset(pos):][:4096])
			}
			l.s.Committed = 102
		}, 101, false, "seal 102 is known"},
		"unreadable data":        {func(l *lab, _, b, _ uint64) { l.log.bad[l.ring.Offset(b+1)] = true }, 0, false, "input/output"},
		"unreadable in the last": {func(l *lab, _, _, c uint64) { l.log.bad[l.ring.Offset(c+1)] = true }, 101, true, "may be committed"},
		"unreadable behind it":   {func(l *lab, _, _, c uint64) { l.log.bad[l.ring.Offset(c+5)] = true }, 102, false, "may be committed"},
		"unreadable, clean": {func(l *lab, _, _, c uint64) {
			l.log.bad[l.ring.Offset(c+5)] = true
			l.s.Clean, l.s.Committed = true, 102
		}, 102, false, ""},
		"unreadable before the tail": {func(l *lab, a, _, _ uint64) { l.log.bad[l.ring.Offset(a)] = true }, 102, false, ""},
		"unreadable free space":      {func(l *lab, _, _, c uint64) { l.log.bad[l.ring.Offset(c+9)] = true }, 102, false, ""},
		"not in the volume":          {func(l *lab, _, _, _ uint64) { l.s.VolumeBytes = 4 * 4096 }, 0, false, "not in the volume"},
		"extent over the end":        {func(l *lab, _, _, _ uint64) { l.s.VolumeBytes = 6 * 4096 }, 0, false, "not in the volume"},
		"last not in the volume": {func(l *lab, _, _, _ uint64) {
			l.run(103, 165, block(1000, 0xff, 50))
		}, 102, true, "not in the volume"},
		"seal goes back": {func(l *lab, _, _, _ uint64) {
			st := l.ring.State()
			st.Committed = 90
			l.ring = journal.NewRing(l.s.RingOffset, l.s.RingBytes, st)
			l.run(91, 165, block(1, 0xff, 50))
		}, 102, true, "seal 91 after 102"},
		"longer than the ring": {func(l *lab, _, _, _ uint64) {
			head := l.ring.State().Head
			b := journal.EncodeChunk(&journal.Chunk{Last: true, Position: head, Start: head, Seal: 103, Committed: 102, Tail: head - 64}, l.s.RingStamp)
			l.put(head, b)
		}, 102, true, "more than 64 blocks"},
		"from another place": {func(l *lab, _, b, c uint64) {
			copy(l.log.now[l.ring.Offset(c+5):][:4096], l.log.now[l.ring.Offset(c):])
		}, 102, false, ""},
		"of an older lap": {func(l *lab, _, _, _ uint64) {
			head := l.ring.State().Head
			b := journal.EncodeChunk(&journal.Chunk{Last: true, Position: head - 64, Start: head - 64}, l.s.RingStamp)
			l.put(head, b)
		}, 102, false, ""},
	} {
		l, a, b, last := history(t)
		c.spoil(l, a, b, last)
		rec, err := l.scan()
		var refused *journal.RefusedError
		if errors.As(err, &refused) != (c.says != "") || err != nil && !strings.Contains(err.Error(), c.says) || rec.Seal != c.seal || rec.Torn != c.torn {
			t.Errorf("%s: seal %d, torn %v, %v; want %d, %v, %q", name, rec.Seal, rec.Torn, err, c.seal, c.torn, c.says)
			continue
		}
		// What lies before the damage is what force is left with.
		want := historyAt(max(rec.Seal, 100))
		l.log.bad = map[int64]bool{}
		l.check(name, rec, want)
		// And a ring can be begun after it.
		l.s.Committed = max(l.s.Committed, 50)
		if _, err := journal.Reset(l.log, l.s, rec.Seal, 2, rec.Lost, rec.State); err != nil {
			t.Errorf("%s: reset: %v", name, err)
			continue
		}
		if again, err := l.scan(); err != nil || again.Seal != rec.Seal || again.Runs != 1 || again.Generation != 2 || l.s.Committed != rec.Seal {
			t.Errorf("%s: after a reset %+v, %v", name, again, err)
		}
	}
}

// TestScanUnreadable: a journal of which nothing can be read is no reason to think that it is damaged.
func TestScanUnreadable(t *testing.T) {
	l := newLab(t, 16, 2048, 0)
	l.log.failAt, l.log.dead = l.log.calls+1, true
	var refused *journal.RefusedError
	if rec, err := l.scan(); rec != nil || !errors.Is(err, errMedia) || errors.As(err, &refused) {
		t.Errorf("%+v, %v", rec, err)
	}
	l.s.Journal = journal.KindNone
	if _, err := l.scan(); err == nil || !strings.Contains(err.Error(), "none") {
		t.Errorf("volume without journal: %v", err)
	}
}

// TestScanErrors: a read that fails once is done again; one that fails for good is an error or a refusal, whichever it
// is.
func TestScanErrors(t *testing.T) {
	for _, dead := range []bool{false, true} {
		for n := 1; ; n++ {
			l, _, _, _ := history(t)
			l.log.calls, l.log.failAt, l.log.dead = 0, n, dead
			rec, err := l.scan()
			if l.log.calls < n {
				break
			}
			if !dead && (err != nil || rec.Seal != 102) {
				t.Errorf("read %d fails once: %v", n, err)
			}
			if dead && err == nil {
				t.Errorf("reads from the %dth on fail: seal %d and no error", n, rec.Seal)
			}
		}
	}
}

func TestScanProgressAndCancel(t *testing.T) {
	l, _, _, _ := history(t)
	var last, all int64
	ctx, cancel := context.WithCancel(context.Background())
	rec, err := journal.Scan(ctx, l.log, l.s, func(done, total int64) {
		if done < last || done > total {
			t.Errorf("%d of %d after %d", done, total, last)
		}
		last, all = done, total
	})
	if err != nil || last < 64*4096 || last != all {
		t.Errorf("%+v, %v, ended at %d of %d", rec, err, last, all)
	}
	calls := 0
	_, err = journal.Scan(ctx, l.log, l.s, func(int64, int64) {
		if calls++; calls == 2 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("canceled in the walk: %v", err)
	}
	if _, err = journal.Scan(ctx, l.log, l.s, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled before: %v", err)
	}
}

// subsets calls fn with every media that a power cut can leave of m if each of the open blocks is kept or not.
func subsets(t *testing.T, m *media, fn func(kept int, c *media)) {
	t.Helper()
	var open []int64
	for at := range m.open {
		if !slices.Contains(open, at/4096) {
			open = append(open, at/4096)
		}
	}
	slices.Sort(open)
	if len(open) == 0 || len(open) > 12 {
		t.Fatalf("%d open blocks", len(open))
	}
	c := newMedia(int64(len(m.now)))
	for set := range 1 << len(open) {
		copy(c.now, m.durable)
		n := 0
		for i, at := range open {
			if set&(1<<i) != 0 {
				copy(c.now[at*4096:][:4096], m.now[at*4096:])
				n++
			}
		}
		fn(n, c)
	}
}

// TestPowerCutExhaustive: of a run that is being written any subset of its blocks may be there. All of them: it is
// committed. Any other: it never was, and the one before holds. Also over what an attempt before it left, in part or as
// a whole, which then may hold itself.
func TestPowerCutExhaustive(t *testing.T) {
	small := []entry{block(2, 0x02, 21), zero(7, 1, 22), block(8, 0xff, 23)}
	large := []entry{block(2, 0x04, 31), block(3, 0xff, 32), block(4, 0x0f, 33), block(9, 0xff, 34), zero(11, 2, 36)}
	same := slices.Clone(large) // another attempt at the same seal
	for i := range same {
		same[i].number += 10
	}
	with := func(more map[int]string) map[int]string {
		m := historyAt(102)
		maps.Copy(m, more)
		return m
	}
	says := map[uint64][]map[int]string{
		102: {historyAt(102)},
		110: {with(map[int]string{2: "14 21 11", 7: "0", 8: "23"})},
		120: {
			with(map[int]string{2: "14 11 31 11", 3: "32", 4: "33 15", 9: "34", 11: "0", 12: "0"}),
			with(map[int]string{2: "14 11 41 11", 3: "42", 4: "43 15", 9: "44", 11: "0", 12: "0"}),
		},
	}
	for name, c := range map[string]struct {
		before      []entry // an attempt that failed, all of it durable but for what lose says
		beforeChunk int
		loses       []uint64 // blocks of it, counted from its start
		entries     []entry
		chunk       int
	}{
		"one chunk":               {nil, 0, nil, large, 165},
		"many chunks":             {nil, 0, nil, large, 1},
		"chunks of two":           {nil, 0, nil, large, 2},
		"over a whole one":        {small, 165, nil, large, 3},
		"over a longer one":       {large, 1, nil, small, 165},
		"over a longer one, 1":    {large, 1, nil, small, 1},
		"over a torn one":         {large, 1, []uint64{3}, small, 1},
		"over one without start":  {large, 2, []uint64{0}, small, 2},
		"over one of its own cut": {large, 2, []uint64{1}, large, 2},
		"over one of its seal":    {same, 2, nil, large, 2},
		"over one of its seal, 1": {same, 1, nil, large, 1},
	} {
		l, _, _, _ := history(t)
		if err := l.log.Sync(); err != nil {
			t.Fatal(err)
		}
		if c.before != nil {
			start := l.write(110, c.beforeChunk, c.before...)
			if len(c.before) == len(large) {
				start = l.write(120, c.beforeChunk, c.before...)
			}
			for _, i := range c.loses {
				clear(l.log.now[l.ring.Offset(start+i):][:4096])
			}
			if err := l.log.Sync(); err != nil {
				t.Fatal(err)
			}
		}
		seal := uint64(110)
		if len(c.entries) == len(large) {
			seal = 120
		}
		l.write(seal, c.chunk, c.entries...)
		home := bytes.Clone(l.home.now)
		all := 0
		for at := range l.log.open {
			if at%4096 == 0 {
				all++
			}
		}
		seen := map[uint64]int{}
		m := l.log
		subsets(t, m, func(kept int, cut *media) {
			l.log = cut
			rec, err := l.scan()
			if err != nil {
				t.Fatalf("%s, %d of %d blocks kept: %v", name, kept, all, err)
			}
			seen[rec.Seal]++
			if kept == all && rec.Seal != seal || kept < all && rec.Seal != 102 && c.before == nil {
				t.Fatalf("%s, %d of %d blocks kept: seal %d", name, kept, all, rec.Seal)
			}
			copy(l.home.now, home)
			want := says[rec.Seal]
			if len(want) > 1 && say(l.home, 3) != want[0][3] { // which of the two, the whole of it must be
				if err := journal.Replay(context.Background(), rec, l.log, l.home, nil); err != nil {
					t.Fatal(err)
				}
				if say(l.home, 3) == want[1][3] {
					want = want[1:]
				}
			}
			l.check(name, rec, want[0])
		})
		if seen[seal] == 0 || c.before == nil && seen[102] != 1<<all-1 {
			t.Errorf("%s: seals %v", name, seen)
		}
	}
}

// TestPowerCutAtHome: of the writes of a checkpoint any subset may be there, and the ring makes up for it.
func TestPowerCutAtHome(t *testing.T) {
	l, _, _, _ := history(t)
	copy(l.home.durable, l.home.now)
	clear(l.home.open)
	for b := range 7 { // garbage where the checkpoint was writing
		if b != 0 && b != 1 {
			if _, err := l.home.WriteAt(bytes.Repeat(sector("garbage"), 8), int64(b)*4096); err != nil {
				t.Fatal(err)
			}
		}
	}
	rec := l.mustScan()
	// Of block 3 the second half is no matter of the ring: no checkpoint writes it.
	copy(l.home.now[3*4096+2048:][:2048], l.home.durable[3*4096+2048:])
	home := l.home
	subsets(t, home, func(_ int, cut *media) {
		l.home = cut
		l.check("checkpoint", rec, historyAt(102))
	})
}

func TestResumeAt(t *testing.T) {
	l, _, b, c := history(t)
	whole := l.ring.State()
	at := func(head uint64, committed uint64) journal.RingState {
		return journal.RingState{Stamp: l.s.RingStamp, Head: head, Tail: b, Committed: committed}
	}
	resume := func(st journal.RingState) journal.RingState {
		t.Helper()
		got, err := journal.ResumeAt(l.log, l.s, st)
		if err != nil {
			t.Error(err)
		}
		return got
	}
	for name, st := range map[string]journal.RingState{"two behind": at(b, 100), "one behind": at(c, 101), "none": whole} {
		if got := resume(st); got != whole {
			t.Errorf("%s: %+v, want %+v", name, got, whole)
		}
	}
	l.write(103, 165, block(9, 0xff, 40)) // and not synced
	if got := resume(whole); got.Head != whole.Head+2 || got.Committed != 103 || len(l.log.open) > 0 {
		t.Errorf("not synced: %+v, %d sectors still are not", got, len(l.log.open))
	}
	l.write(103, 165, block(9, 0x0f, 40))
	l.log.dead = true
	for n := 1; ; n++ { // the last call is the sync
		l.log.calls, l.log.failAt = 0, n
		got, err := journal.ResumeAt(l.log, l.s, whole)
		if l.log.calls < n {
			break
		}
		if !errors.Is(err, errMedia) || got != whole || len(l.log.open) == 0 {
			t.Errorf("call %d fails: %+v, %v", n, got, err)
		}
	}
	l.log.failAt = 0
	l.log.now[l.ring.Offset(c+1)]++
	if got, want := resume(at(b, 100)), at(c, 101); got != want {
		t.Errorf("torn: %+v, want %+v", got, want)
	}
	// What the engine writes over it counts again.
	l.ring = journal.NewRing(l.s.RingOffset, l.s.RingBytes, at(c, 101))
	l.run(105, 165, block(9, 0xff, 50))
	if got := resume(at(c, 101)); got != l.ring.State() {
		t.Errorf("written over: %+v, want %+v", got, l.ring.State())
	}
	l.log.bad[l.ring.Offset(c+1)] = true
	if got, err := journal.ResumeAt(l.log, l.s, at(c, 101)); !errors.Is(err, errMedia) || got != at(c, 101) {
		t.Errorf("unreadable: %+v, %v", got, err)
	}
	if _, err := journal.ResumeAt(l.log, l.s, journal.RingState{Stamp: 5}); err == nil {
		t.Error("another ring is resumed")
	}
}

func TestFind(t *testing.T) {
	l, _, b, c := history(t)
	find := func(block, number uint64) (bool, string, error) {
		dst := make([]byte, 4096)
		ok, err := journal.Find(context.Background(), l.log, l.s, l.ring.State(), block, number, dst)
		word, _, _ := strings.Cut(string(dst), "#")
		return ok, word, err
	}
	for _, x := range []struct {
		block, number uint64
		want          string
	}{
		{2, 11, "11"}, {3, 13, "13"}, {2, 14, "14"}, {4, 15, "15"}, {5, 16, "16"},
		{1, 10, ""}, // before the tail
		{2, 15, ""}, {4, 14, ""}, {5, 12, ""}, {99, 11, ""},
	} {
		if ok, got, err := find(x.block, x.number); err != nil || ok != (x.want != "") || ok && got != x.want {
			t.Errorf("block %d number %d: %v, %q, %v, want %q", x.block, x.number, ok, got, err, x.want)
		}
	}
	l.log.now[l.ring.Offset(b+1)+5]++
	if ok, _, err := find(2, 11); ok || err == nil {
		t.Error("data that have rotted are found")
	}
	if ok, _, err := find(2, 14); !ok || err != nil {
		t.Errorf("what lies behind them: %v", err)
	}
	l.log.now[l.ring.Offset(c)+5]++
	if ok, _, err := find(2, 14); ok || err == nil {
		t.Error("a header that has rotted is passed over")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := journal.Find(ctx, l.log, l.s, l.ring.State(), 2, 11, make([]byte, 4096)); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	for n := 1; ; n++ {
		l, _, _, _ := history(t)
		l.log.calls, l.log.failAt, l.log.dead = 0, n, true
		ok, err := journal.Find(context.Background(), l.log, l.s, l.ring.State(), 5, 16, make([]byte, 4096))
		if l.log.calls < n {
			break
		}
		if ok || !errors.Is(err, errMedia) {
			t.Errorf("read %d fails: %v, %v", n, ok, err)
		}
	}
}

// TestReset: the new ring carries what is lost, round the end of the ring if need be, and the old one is what it was
// until the superblock names the new one, however full it is.
func TestReset(t *testing.T) {
	for name, c := range map[string]struct {
		start uint64
		lost  int
	}{"none": {0, 0}, "one": {7, 1}, "some": {100, 400}, "round the end": {1000, 3000}, "the most": {1020, journal.MaxLost}} {
		l := newLab(t, 8192, 1024, c.start)
		seal := uint64(2)
		for l.ring.FreeBlocks() > 1 {
			l.run(seal, 165, many(int(min(150, l.ring.FreeBlocks()-1)), seal)...)
			seal++
		}
		for range 32 { // marks take their half of the reserve
			l.ring.Advance(l.ring.State().Tail)
			l.run(seal, 165)
		}
		old, was := *l.s, l.mustScan()
		var list []journal.LostBlock
		for i := range c.lost {
			list = append(list, journal.LostBlock{Block: uint64(i), Number: uint64(1 + i%2)})
		}
		// Whichever call fails, nothing has changed.
		for n := 1; ; n++ {
			l.log.calls, l.log.failAt = 0, n
			st, err := journal.Reset(l.log, l.s, seal, 7, list, was.State)
			if err == nil {
				l.log.failAt = 0
				got := l.mustScan()
				if got.State != st || got.Seal != seal || got.Generation != 7 || got.Runs != 1 || !reflect.DeepEqual(got.Lost, list) {
					t.Errorf("%s: %+v with %d lost, want %+v with %d", name, got.State, len(got.Lost), st, len(list))
				}
				break
			}
			if !errors.Is(err, errMedia) || !reflect.DeepEqual(*l.s, old) {
				t.Errorf("%s, call %d: %v, stamp %x", name, n, err, l.s.RingStamp)
			}
			l.log.failAt = 0
			if again := l.mustScan(); again.Seal != was.Seal || again.State.Head != was.State.Head {
				t.Errorf("%s, call %d: old ring has %+v, had %+v", name, n, again.State, was.State)
			}
		}
		if l.s.RingStamp == old.RingStamp || l.s.Committed != seal {
			t.Errorf("%s: stamp %x, committed %d", name, l.s.RingStamp, l.s.Committed)
		}
		renamed := l.s
		l.s = &old
		again := l.mustScan()
		if again.Seal != was.Seal || again.State.Head != was.State.Head || again.BlockBytes != was.BlockBytes {
			t.Errorf("%s: old ring has %+v, had %+v", name, again, was)
		}
		l.s = renamed
	}
}

// many is n blocks.
func many(n int, number uint64) []entry {
	var list []entry
	for i := range uint64(n) {
		list = append(list, block(i, 0xff, number))
	}
	return list
}

func TestResetRefuses(t *testing.T) {
	l := newLab(t, 16, 1024, 0)
	before := l.s.RingStamp
	st := l.ring.State()
	if _, err := journal.Reset(l.log, l.s, 9, 1, make([]journal.LostBlock, journal.MaxLost+1), st); err == nil || !strings.Contains(err.Error(), "5281 lost blocks") {
		t.Errorf("too many: %v", err)
	}
	if _, err := journal.Reset(l.log, l.s, 9, 1, []journal.LostBlock{{1, 10}}, st); err == nil || !strings.Contains(err.Error(), "newer than seal 9") {
		t.Errorf("too new: %v", err)
	}
	if l.s.RingStamp != before {
		t.Error("stamp has changed")
	}
	l.s.Journal = journal.KindNone
	if _, err := journal.Reset(l.log, l.s, 9, 1, nil, st); err == nil || !strings.Contains(err.Error(), "none") {
		t.Errorf("no journal: %v", err)
	}
}

// TestNewVolume goes the way of a real one, from a device without anything through two lives.
func TestNewVolume(t *testing.T) {
	ctx := context.Background()
	disk := newMedia(16 << 20)
	copy(disk.now, sector("content of before"))
	copy(disk.durable, disk.now)
	open := func() *journal.Superblock {
		t.Helper()
		found, err := journal.Examine(disk, int64(len(disk.now)), journal.Wanted{Name: "vol", Journal: journal.KindInternal, AnyJournal: true, RingBytes: 1 << 30})
		if err != nil {
			t.Fatal(err)
		}
		return found.Superblock
	}
	begin := func(s *journal.Superblock) *journal.Ring {
		t.Helper()
		rec, err := journal.Scan(ctx, disk, s, nil)
		if err == nil {
			err = journal.Replay(ctx, rec, disk, disk, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		s.Begin()
		st, err := journal.Reset(disk, s, rec.Seal, 1, rec.Lost, rec.State)
		if err == nil {
			err = s.Store(disk, now)
		}
		if err != nil {
			t.Fatal(err)
		}
		return journal.NewRing(s.RingOffset, s.RingBytes, st)
	}
	s := open()
	l := &lab{t: t, s: s, log: disk, home: disk, ring: begin(s)}
	if s.RingBytes != journal.MinRingBytes || s.VolumeBytes != 16<<20-4<<20-1<<20-8192 {
		t.Fatalf("%+v", s)
	}
	l.run(10, 165, block(1, 0xff, 5), zero(2, 1, 6))
	l.write(20, 165, block(1, 0xff, 15))
	l.log = disk.cut(func() fate { return dropped })
	disk = l.log
	s = open()
	l = &lab{t: t, s: s, log: disk, home: disk, ring: begin(s)}
	if say(disk, 1) != "5" || say(disk, 2) != "0" || s.Incarnation.Counter != 2 || s.Committed != 10 || l.ring.State().Committed != 10 {
		t.Errorf("block 1 says %q, block 2 %q; %+v", say(disk, 1), say(disk, 2), s)
	}
	if got := disk.now[:512]; !bytes.Equal(got, sector("content of before")) {
		t.Errorf("adopted content says %.20q", got)
	}
	if bytes.Equal(disk.now[s.RingOffset:][:8], make([]byte, 8)) || binary.BigEndian.Uint64(disk.now[l.ring.Offset(l.ring.State().Tail)+16:]) != s.RingStamp {
		t.Error("ring is not where the superblock says")
	}
}
