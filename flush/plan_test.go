package flush

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// block makes a block whose every sector holds its own place.
func block(number uint64, valid, dirty uint8) Block {
	b := Block{Number: number, Valid: valid, Dirty: dirty, Data: make([]byte, BlockBytes)}
	for i := range b.Data {
		b.Data[i] = byte(number*8 + uint64(i/SectorBytes))
	}
	return b
}

func TestAppendPieces(t *testing.T) {
	// A piece is written here as first sector + number of sectors, ! for a fill with its mask.
	for _, c := range []struct {
		valid, dirty uint8
		sector       int
		want         string
	}{
		{0xff, 0xff, 512, "0+8"},
		{0xff, 0xff, 4096, "0+8"},
		{0xff, 0x10, 512, "0+8"},  // whole in memory: written whole
		{0xff, 0x10, 4096, "0+8"}, //
		{0xff, 0x00, 512, ""},     // clean
		{0x00, 0x00, 4096, ""},
		{0x01, 0x01, 512, "0+1"},
		{0x80, 0x80, 1, "7+1"},
		{0x7f, 0x7f, 512, "0+7"},
		{0x3c, 0x3c, 512, "2+4"},
		{0xa5, 0xa5, 512, "0+1 2+1 5+1 7+1"},
		{0x7e, 0x24, 512, "2+4"},     // valid clean sectors between dirty ones are written along
		{0x7e, 0x02, 512, "1+1"},     // and not beyond
		{0xe7, 0x81, 512, "0+1 7+1"}, //
		{0xe7, 0x01, 512, "0+1"},     // a run without a dirty sector is left out
		{0x7f, 0x7f, 4096, "0+8!7f"},
		{0x7f, 0x11, 4096, "0+8!11"},
		{0x01, 0x01, 1024, "0+8!01"},
	} {
		b := block(5, c.valid, c.dirty)
		got := ""
		for _, p := range appendPieces(nil, &b, c.sector) {
			first := (p.off - 5*BlockBytes) / SectorBytes
			got += fmt.Sprintf(" %d+%d", first, len(p.data)/SectorBytes)
			if p.fill != 0 {
				got += fmt.Sprintf("!%02x", p.fill)
			}
			if p.data[0] != byte(5*8+first) {
				t.Errorf("valid %02x dirty %02x: piece %d has the data of another", c.valid, c.dirty, first)
			}
		}
		if got = string(bytes.TrimSpace([]byte(got))); got != c.want {
			t.Errorf("valid %02x dirty %02x sector %d: %q, want %q", c.valid, c.dirty, c.sector, got, c.want)
		}
	}
}

func TestBlockCheck(t *testing.T) {
	good := block(5, 0x0f, 0x03)
	good.check(4)
	for name, b := range map[string]Block{
		"order":      block(4, 0xff, 0xff),
		"same":       block(4, 0xff, 0xff),
		"not subset": block(5, 0x0f, 0x10),
		"short":      {Number: 5, Valid: 0xff, Dirty: 0xff, Data: make([]byte, 512)},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			b.check(4)
		}()
	}
}

// cutAll runs pieces through a window as leg does and returns the writes.
func cutAll(w *window, in []piece) (writes [][]piece) {
	final := false
	for {
		n := w.next(final)
		switch {
		case n > 0:
			writes = append(writes, slices.Clone(w.pieces[:n]))
			w.drop(n)
		case final:
			return writes
		case len(in) > 0:
			w.add(in[0])
			in = in[1:]
		default:
			final = true
		}
	}
}

// blocks makes pieces of whole blocks.
func blocks(first, n int) (out []piece) {
	data := make([]byte, BlockBytes)
	for i := range n {
		out = append(out, piece{off: int64(first+i) * BlockBytes, data: data})
	}
	return out
}

func TestWindowCuts(t *testing.T) {
	for _, c := range []struct {
		name string
		in   []piece
		want []int // pieces per write
	}{
		{"nothing", nil, nil},
		{"one block", blocks(7, 1), []int{1}},
		{"a full write", blocks(7, 1024), []int{1024}},
		{"two full writes", blocks(7, 2048), []int{1024, 1024}},
		{"no crumb behind a full write", blocks(7, 1025), []int{512, 513}},
		{"just enough for a write of 1 MiB behind", blocks(7, 1280), []int{1024, 256}},
		{"just not", blocks(7, 1279), []int{639, 640}},
		{"a crumb behind two", blocks(0, 2049), []int{1024, 512, 513}},
		{"a gap ends a write", slices.Concat(blocks(0, 3), blocks(4, 5)), []int{3, 5}},
		{"every second block", slices.Concat(blocks(0, 1), blocks(2, 1), blocks(4, 1)), []int{1, 1, 1}},
		{"a crumb of its own", slices.Concat(blocks(0, 1024), blocks(2000, 1)), []int{1024, 1}},
		{
			"sectors adjoin",
			[]piece{{off: 512, data: make([]byte, 3584)}, {off: 4096, data: make([]byte, 512)}, {off: 5120, data: make([]byte, 512)}},
			[]int{2, 1},
		},
	} {
		w := newWindow(1024)
		var got []int
		for _, write := range cutAll(&w, c.in) {
			got = append(got, len(write))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// TestWindowLimitsFills: a write holds no more blocks to be completed than its job has memory for.
func TestWindowLimitsFills(t *testing.T) {
	in := blocks(0, 3*maxFills)
	for i := range in {
		in[i].fill = 1
	}
	w := newWindow(1024)
	for _, write := range cutAll(&w, in) {
		if len(write) != maxFills {
			t.Errorf("write with %d fills, want %d", len(write), maxFills)
		}
	}
}

// TestWindowKeepsEverything: whatever comes in leaves once, in order, in writes that adjoin and are within
// the limits; and neighbors are cut only where a limit or the 1 MiB rule says so.
func TestWindowKeepsEverything(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 0))
		maxPieces := 1 + rng.IntN(40)
		var in []piece
		for off := int64(0); len(in) < 300; {
			n := int64(1+rng.IntN(8)) * SectorBytes
			in = append(in, piece{off: off, data: make([]byte, n)})
			off += n
			if rng.IntN(20) == 0 {
				off += SectorBytes
			}
		}
		w := newWindow(maxPieces)
		writes := cutAll(&w, in)
		var out []piece
		for i, write := range writes {
			out = append(out, write...)
			if len(write) > maxPieces {
				t.Fatalf("seed %d: write of %d pieces, at most %d", seed, len(write), maxPieces)
			}
			for k := 1; k < len(write); k++ {
				if write[k].off != write[k-1].end() {
					t.Fatalf("seed %d: write with a gap", seed)
				}
			}
			if i > 0 && writes[i-1][len(writes[i-1])-1].end() == write[0].off && len(writes[i-1])+len(write) <= maxPieces {
				t.Errorf("seed %d: writes of %d and %d neighbors could be one", seed, len(writes[i-1]), len(write))
			}
		}
		if !slices.EqualFunc(in, out, func(a, b piece) bool { return a.off == b.off && len(a.data) == len(b.data) }) {
			t.Fatalf("seed %d: pieces lost, doubled or out of order", seed)
		}
	}
}

func TestWindowGap(t *testing.T) {
	for _, c := range []struct {
		name  string
		in    []piece
		off   int64
		first uint64
		gap   int64
	}{
		{"empty", nil, 8 * BlockBytes, 0, 0},
		{"neighbor", blocks(0, 2), 2 * BlockBytes, 2, 0},
		{"three blocks", blocks(0, 2), 5 * BlockBytes, 2, 3},
		{"ends in a block", []piece{{off: 0, data: make([]byte, 512)}}, 5 * BlockBytes, 0, 0},
		{"begins in a block", blocks(0, 2), 5*BlockBytes + 512, 0, 0},
		{"behind a gap", slices.Concat(blocks(0, 1), blocks(2, 1)), 5 * BlockBytes, 0, 0},
		{"behind a full write", blocks(0, 16), 18 * BlockBytes, 0, 0},
	} {
		w := newWindow(16)
		for _, p := range c.in {
			w.add(p)
		}
		if first, gap := w.gap(c.off); gap != c.gap || gap > 0 && first != c.first {
			t.Errorf("%s: %d blocks from %d, want %d from %d", c.name, gap, first, c.gap, c.first)
		}
	}
}

func TestMergeZeroes(t *testing.T) {
	const b = BlockBytes
	for _, c := range []struct{ in, want []Zero }{
		{nil, nil},
		{[]Zero{{b, 0}}, nil},
		{[]Zero{{3 * b, b}, {0, b}}, []Zero{{0, b}, {3 * b, b}}},
		{[]Zero{{0, b}, {b, 2 * b}}, []Zero{{0, 3 * b}}},
		{[]Zero{{0, 5 * b}, {b, 2 * b}}, []Zero{{0, 5 * b}}},
		{[]Zero{{2 * b, 4 * b}, {0, 3 * b}}, []Zero{{0, 6 * b}}},
	} {
		if got := mergeZeroes(slices.Clone(c.in)); !slices.Equal(got, c.want) {
			t.Errorf("%v: %v, want %v", c.in, got, c.want)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("half a block: no panic")
		}
	}()
	mergeZeroes([]Zero{{512, b}})
}
