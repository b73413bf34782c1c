package journal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// lab is a ring that a test fills by hand, and a home.
type lab struct {
	t    testing.TB
	s    *journal.Superblock
	log  *media
	home *media
	ring *journal.Ring
}

// newLab is a volume of that many blocks, of which every sector holds "home", with a ring whose first run, at position
// start, names seal 1.
func newLab(t testing.TB, blocks, ringBlocks int64, start uint64) *lab {
	s := &journal.Superblock{
		Name: "vol", Journal: journal.KindExternal, VolumeBytes: blocks * 4096, RingOffset: 8192, RingBytes: ringBlocks * 4096,
	}
	l := &lab{t: t, s: s, log: newMedia(8192 + s.RingBytes), home: newMedia(s.VolumeBytes)}
	for at := 0; at < len(l.home.now); at += 512 {
		copy(l.home.now[at:], sector("home"))
		copy(l.home.durable[at:], sector("home"))
	}
	st, err := journal.Reset(l.log, s, 1, 1, nil, journal.RingState{Head: start, Tail: start})
	if err != nil {
		t.Fatal(err)
	}
	l.ring = journal.NewRing(s.RingOffset, s.RingBytes, st)
	return l
}

// sector is 512 bytes that say text.
func sector(text string) []byte {
	return bytes.Repeat([]byte(text+"#"), 512/(len(text)+1)+1)[:512]
}

// entry is one to be written into the lab's ring: its data say its number.
type entry struct {
	kind   journal.EntryKind
	block  uint64
	mask   uint8
	number uint64
	blocks uint64
}

func block(b uint64, mask uint8, number uint64) entry {
	return entry{journal.EntryBlock, b, mask, number, 0}
}
func zero(b, n, number uint64) entry { return entry{journal.EntryZero, b, 0, number, n} }
func lose(b, number uint64) entry    { return entry{journal.EntryLost, b, 0, number, 0} }

// data are what a run holds for an entry: its number in every sector, also in those that do not count.
func (e entry) data() []byte { return bytes.Repeat(sector(fmt.Sprint(e.number)), 8) }

// run writes a run with chunks of at most that many entries, and returns its position. It is synced and committed.
func (l *lab) run(seal uint64, chunk int, entries ...entry) uint64 {
	l.t.Helper()
	start := l.write(seal, chunk, entries...)
	if err := l.log.Sync(); err != nil {
		l.t.Fatal(err)
	}
	l.ring.Commit()
	return start
}

// write is run without sync and commit.
func (l *lab) write(seal uint64, chunk int, entries ...entry) uint64 {
	l.t.Helper()
	start := l.ring.State().Head
	l.ring.Begin(seal, 1)
	header := make([]byte, 4096)
	for {
		var list []journal.Entry
		n := min(len(entries), chunk)
		for _, e := range entries[:n] {
			x := journal.Entry{Kind: e.kind, Block: e.block, Mask: e.mask, Number: e.number, Blocks: e.blocks}
			if e.kind == journal.EntryBlock {
				x.CRC = crc32.Checksum(e.data(), crc32.MakeTable(crc32.Castagnoli))
			}
			list = append(list, x)
		}
		pos := l.ring.Chunk(header, list, n == len(entries))
		l.put(pos, header)
		for _, e := range entries[:n] {
			if e.kind == journal.EntryBlock {
				pos++
				l.put(pos, e.data())
			}
		}
		if entries = entries[n:]; len(entries) == 0 {
			return start
		}
	}
}

func (l *lab) put(pos uint64, b []byte) {
	l.t.Helper()
	if _, err := l.log.WriteAt(b, l.ring.Offset(pos)); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) scan() (*journal.Recovered, error) {
	return journal.Scan(context.Background(), l.log, l.s, nil)
}

// mustScan is scan of a ring that is whole.
func (l *lab) mustScan() *journal.Recovered {
	l.t.Helper()
	rec, err := l.scan()
	if err != nil {
		l.t.Fatal(err)
	}
	return rec
}

// say is what the sectors of a block at home say; equal neighbors count once, zeroes are 0.
func say(home *media, b int) string {
	var words []string
	for i := range 8 {
		p := home.now[b*4096+i*512:][:512]
		word, _, _ := strings.Cut(string(p), "#")
		switch {
		case bytes.Equal(p, make([]byte, 512)):
			word = "0"
		case !bytes.Equal(p, sector(word)):
			word = "torn"
		}
		words = append(words, word)
	}
	return strings.Join(slices.Compact(words), " ")
}

// TestReplayOrder: the numbers decide, whatever the order in the ring is.
func TestReplayOrder(t *testing.T) {
	for name, c := range map[string]struct {
		runs [][]entry
		want map[int]string // block: what it says; all others say home
		lost []journal.LostBlock
	}{
		"nothing":       {nil, nil, nil},
		"a block":       {[][]entry{{block(3, 0xff, 10)}}, map[int]string{3: "10"}, nil},
		"sectors":       {[][]entry{{block(3, 0x82, 10)}}, map[int]string{3: "home 10 home 10"}, nil},
		"newer whole":   {[][]entry{{block(3, 0xff, 10)}, {block(3, 0xff, 20)}}, map[int]string{3: "20"}, nil},
		"newer part":    {[][]entry{{block(3, 0xff, 10)}, {block(3, 0x03, 20)}}, map[int]string{3: "20 10"}, nil},
		"parts":         {[][]entry{{block(3, 0x0f, 10)}, {block(3, 0x3c, 20)}, {block(3, 0x18, 30)}}, map[int]string{3: "10 20 30 20 home"}, nil},
		"older later":   {[][]entry{{block(3, 0xff, 20)}, {block(3, 0x0f, 10)}}, map[int]string{3: "20"}, nil},
		"two in a run":  {[][]entry{{block(3, 0xf0, 20), block(3, 0xff, 10)}}, map[int]string{3: "10 20"}, nil},
		"extent":        {[][]entry{{zero(2, 3, 10)}}, map[int]string{2: "0", 3: "0", 4: "0"}, nil},
		"extent wins":   {[][]entry{{block(3, 0xff, 10)}, {zero(2, 3, 20)}}, map[int]string{2: "0", 3: "0", 4: "0"}, nil},
		"extent loses":  {[][]entry{{zero(2, 3, 10)}, {block(3, 0xff, 20)}}, map[int]string{2: "0", 3: "20", 4: "0"}, nil},
		"part over it":  {[][]entry{{zero(2, 2, 10)}, {block(3, 0x02, 20)}}, map[int]string{2: "0", 3: "0 20 0"}, nil},
		"under it":      {[][]entry{{block(3, 0xff, 10)}, {zero(3, 1, 20)}, {block(3, 0x02, 30)}}, map[int]string{3: "0 30 0"}, nil},
		"extents cross": {[][]entry{{zero(0, 4, 10), block(1, 0xff, 15), block(3, 0xff, 16)}, {zero(3, 4, 20)}}, map[int]string{0: "0", 1: "15", 2: "0", 3: "0", 4: "0", 5: "0", 6: "0"}, nil},
		"extent in extent": {[][]entry{{zero(0, 8, 30)}, {zero(2, 2, 10), zero(4, 1, 40)}, {block(3, 1, 20), block(5, 1, 35), block(4, 1, 39)}},
			map[int]string{0: "0", 1: "0", 2: "0", 3: "0", 4: "0", 5: "35 0", 6: "0", 7: "0"}, nil},
		"extent again": {[][]entry{{zero(2, 1, 10)}, {block(2, 0xff, 20)}, {zero(2, 1, 10)}}, map[int]string{2: "20"}, nil},
		"to the end":   {[][]entry{{zero(14, 2, 10)}, {block(15, 0xff, 20)}}, map[int]string{14: "0", 15: "20"}, nil},
		// Version 20 is home and clean, so that 30 has but the one sector; the tail has passed neither.
		"clean in between": {[][]entry{{zero(3, 1, 10)}, {block(3, 0xff, 20)}, {block(3, 0x02, 30)}}, map[int]string{3: "20 30 20"}, nil},

		"lost":               {[][]entry{{lose(3, 10)}}, nil, []journal.LostBlock{{3, 10}}},
		"lost version":       {[][]entry{{block(3, 0xff, 5)}, {lose(3, 10)}}, nil, []journal.LostBlock{{3, 10}}},
		"lost again":         {[][]entry{{lose(3, 10)}, {lose(3, 10)}, {lose(3, 10), lose(5, 11)}}, nil, []journal.LostBlock{{3, 10}, {5, 11}}},
		"lost twice":         {[][]entry{{lose(3, 10)}, {block(3, 0xff, 15)}, {lose(3, 20)}}, nil, []journal.LostBlock{{3, 20}}},
		"lost, same number":  {[][]entry{{block(3, 0xff, 10)}, {lose(3, 10)}}, nil, []journal.LostBlock{{3, 10}}},
		"lost, then whole":   {[][]entry{{lose(3, 10)}, {block(3, 0xff, 20)}}, map[int]string{3: "20"}, nil},
		"lost, then a part":  {[][]entry{{lose(3, 10)}, {block(3, 0x7f, 20)}}, nil, []journal.LostBlock{{3, 10}}},
		"lost, then parts":   {[][]entry{{lose(3, 10)}, {block(3, 0x0f, 20)}, {block(3, 0xf0, 30)}}, nil, []journal.LostBlock{{3, 10}}},
		"part, whole, part":  {[][]entry{{lose(3, 10)}, {block(3, 1, 20)}, {block(3, 0xff, 30)}, {block(3, 1, 40)}}, map[int]string{3: "40 30"}, nil},
		"lost, then zeroed":  {[][]entry{{lose(3, 10)}, {zero(3, 1, 20)}}, map[int]string{3: "0"}, nil},
		"zeroed, part":       {[][]entry{{lose(3, 10)}, {zero(3, 1, 20)}, {block(3, 2, 30)}}, map[int]string{3: "0 30 0"}, nil},
		"lost behind a zero": {[][]entry{{lose(3, 30)}, {zero(4, 1, 20)}}, map[int]string{4: "0"}, []journal.LostBlock{{3, 30}}},
	} {
		for _, chunk := range []int{1, 2, 165} {
			for how, open := range map[string]func(m *media) journal.Home{
				"sectors of 512":  func(m *media) journal.Home { return m },
				"sectors of 4096": func(m *media) journal.Home { m.sector = 4096; return m },
				"plain":           func(m *media) journal.Home { return plain{m} },
			} {
				l := newLab(t, 16, 64, 60)
				for i, r := range c.runs {
					l.run(uint64(100+i), chunk, r...)
				}
				rec := l.mustScan()
				if !reflect.DeepEqual(rec.Lost, c.lost) || rec.Runs != 1+len(c.runs) || rec.State != l.ring.State() || rec.Torn {
					t.Errorf("%s: %+v, want lost %v and %+v", name, rec, c.lost, l.ring.State())
				}
				told := int64(0)
				for range 2 { // the second changes nothing
					err := journal.Replay(context.Background(), rec, l.log, open(l.home), func(done, total int64) {
						if told = done; total != rec.BlockBytes+rec.ZeroBytes {
							t.Errorf("%s: total %d", name, total)
						}
					})
					if err != nil || told != rec.BlockBytes+rec.ZeroBytes || len(l.home.open) > 0 {
						t.Errorf("%s: %v after %d of %d+%d bytes, %d sectors not synced", name, err, told, rec.BlockBytes, rec.ZeroBytes, len(l.home.open))
					}
					for b := range 16 {
						want := "home"
						if w, ok := c.want[b]; ok {
							want = w
						}
						if got := say(l.home, b); got != want {
							t.Errorf("%s, %s, chunks of %d: block %d says %q, want %q", name, how, chunk, b, got, want)
						}
					}
				}
			}
		}
	}
}

// TestRecoveredEntries: each entry once, however often it is listed.
func TestRecoveredEntries(t *testing.T) {
	l := newLab(t, 16, 64, 0)
	l.run(100, 2, block(5, 3, 20), block(3, 0xff, 10), lose(4, 9), zero(8, 2, 11))
	l.run(101, 2, block(5, 7, 30), lose(4, 9), zero(8, 2, 11), zero(7, 1, 12))
	var got []string
	for e := range l.mustScan().Entries() {
		if (e.CRC != 0) != (e.Kind == journal.EntryBlock) {
			t.Errorf("%+v", e)
		}
		got = append(got, fmt.Sprint(e.Kind, e.Block, e.Mask, e.Number, e.Blocks))
	}
	want := []string{"1 3 255 10 0", "3 4 0 9 0", "1 5 3 20 0", "1 5 7 30 0", "2 7 0 12 1", "2 8 0 11 2"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	for range l.mustScan().Entries() {
		break
	}
}

// writes notes what comes home.
type writes struct {
	*media
	list [][2]int64 // offset, bytes
}

func (w *writes) WriteAt(p []byte, off int64) (int, error) {
	w.list = append(w.list, [2]int64{off, int64(len(p))})
	return w.media.WriteAt(p, off)
}

func (w *writes) Zero(off, n int64) error {
	w.list = append(w.list, [2]int64{off, -n})
	return w.media.Zero(off, n)
}

// TestReplayWrites: ascending, neighbors together, none larger than 1 MiB, and right where there are several windows.
func TestReplayWrites(t *testing.T) {
	l := newLab(t, 8192, 16384, 16000)
	var first, second []entry
	for b := range uint64(600) {
		first = append(first, block(b, 0xff, 10))
	}
	first = append(first, block(600, 0x0f, 11), block(601, 0xf0, 12), block(700, 0x01, 13))
	for b := uint64(1000); b < 6000; b++ {
		if first = append(first, block(b, 0xff, 20)); b%2 == 0 {
			second = append(second, block(b, 0x3c, 30))
		}
	}
	l.run(100, 165, first...)
	for b := uint64(7000); b < 7010; b++ {
		second = append(second, block(b, 0x10, 50))
	}
	l.run(101, 165, append(second, zero(7000, 10, 40), zero(8000, 100, 40), zero(8050, 100, 41))...)
	w := &writes{media: l.home}
	if err := journal.Replay(context.Background(), l.mustScan(), l.log, w, nil); err != nil {
		t.Fatal(err)
	}
	want := [][2]int64{{7000 * 4096, -10 * 4096}, {8000 * 4096, -150 * 4096}, {0, 1 << 20}, {1 << 20, 1 << 20}, {2 << 20, 88*4096 + 2048}, {601*4096 + 2048, 2048}, {700 * 4096, 512}}
	if len(w.list) < len(want) || !slices.Equal(w.list[:len(want)], want) {
		t.Errorf("%v, want %v", w.list[:min(len(w.list), len(want))], want)
	}
	if n := len(w.list); n > 7+5000/256+4+1 {
		t.Errorf("%d writes", n)
	}
	for b := range 8192 {
		want := "home"
		switch {
		case b < 600:
			want = "10"
		case b == 600:
			want = "11 home"
		case b == 601:
			want = "home 12"
		case b == 700:
			want = "13 home"
		case b >= 1000 && b < 6000 && b%2 == 0:
			want = "20 30 20"
		case b >= 1000 && b < 6000:
			want = "20"
		case b >= 7000 && b < 7010:
			want = "0 50 0"
		case b >= 8000 && b < 8150:
			want = "0"
		}
		if got := say(l.home, b); got != want {
			t.Fatalf("block %d says %q, want %q", b, got, want)
		}
	}
}

// TestReplayOddVolume: nothing is written behind the end of a volume that ends inside a block.
func TestReplayOddVolume(t *testing.T) {
	for _, sectorBytes := range []int{512, 4096} {
		l := newLab(t, 4, 64, 0)
		l.s.VolumeBytes = 3*4096 + 1024
		l.run(100, 165, block(3, 0xf6, 10), zero(2, 2, 5))
		l.home.now = l.home.now[:l.s.VolumeBytes]
		home := &oddHome{l.home, sectorBytes}
		if err := journal.Replay(context.Background(), l.mustScan(), l.log, home, nil); err != nil {
			t.Fatal(err)
		}
		if got := l.home.now[3*4096:]; !bytes.Equal(got[:512], make([]byte, 512)) || !bytes.Equal(got[512:], sector("10")) {
			t.Errorf("sectors of %d: the end says %.20q, %.20q", sectorBytes, got, got[512:])
		}
	}
}

// oddHome claims a sector size and takes any write.
type oddHome struct {
	*media
	sectorBytes int
}

func (h *oddHome) SectorBytes() int { return h.sectorBytes }

// TestReplayVerifies: what has rotted between scan and replay is not brought home.
func TestReplayVerifies(t *testing.T) {
	l := newLab(t, 16, 64, 0)
	pos := l.run(100, 165, block(3, 0xff, 10), block(4, 0xff, 11))
	rec := l.mustScan()
	l.log.now[l.ring.Offset(pos+2)+77] ^= 1
	err := journal.Replay(context.Background(), rec, l.log, l.home, nil)
	if err == nil || !strings.Contains(err.Error(), "block 4 of the volume") || say(l.home, 4) != "home" {
		t.Errorf("%v; block 4 says %q", err, say(l.home, 4))
	}
}

// TestReplayErrors: whichever call fails, Replay says so, and the next one puts everything right.
func TestReplayErrors(t *testing.T) {
	for _, sectorBytes := range []int{512, 4096} {
		for _, onHome := range []bool{false, true} {
			ended := false
			for n := 1; !ended; n++ {
				l := newLab(t, 64, 128, 0)
				l.home.sector = sectorBytes
				l.run(100, 5, block(3, 0x0f, 10), zero(10, 4, 11), block(11, 0x18, 12), block(30, 0xff, 13))
				l.run(101, 5, block(3, 0x11, 14), zero(40, 4, 15))
				rec := l.mustScan()
				m := l.log
				if onHome {
					m = l.home
				}
				m.calls, m.failAt = 0, n
				err := journal.Replay(context.Background(), rec, l.log, l.home, nil)
				if ended = err == nil; ended {
					if m.calls >= n {
						t.Errorf("call %d of %d failed and nobody noticed", n, m.calls)
					}
				} else if !errors.Is(err, errMedia) {
					t.Errorf("call %d: %v", n, err)
				}
				m.failAt = 0
				if err := journal.Replay(context.Background(), rec, l.log, l.home, nil); err != nil {
					t.Fatal(err)
				}
				for b, want := range map[int]string{3: "14 10 14 home", 10: "0", 11: "0 12 0", 13: "0", 30: "13", 43: "0", 44: "home"} {
					if got := say(l.home, b); got != want {
						t.Errorf("after call %d failed block %d says %q, want %q", n, b, got, want)
					}
				}
			}
		}
	}
}

func TestReplayCanceled(t *testing.T) {
	for _, e := range []entry{block(3, 0xff, 10), zero(3, 1, 10)} {
		l := newLab(t, 16, 64, 0)
		l.run(100, 165, e)
		rec := l.mustScan()
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := journal.Replay(ctx, rec, l.log, l.home, nil); !errors.Is(err, context.Canceled) || say(l.home, 3) != "home" {
			t.Errorf("%v; block 3 says %q", err, say(l.home, 3))
		}
	}
}
