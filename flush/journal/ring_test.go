package journal_test

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// blocks is n entries with data.
func blocks(n int) []journal.Entry {
	e := make([]journal.Entry, n)
	for i := range e {
		e[i] = journal.Entry{Kind: journal.EntryBlock, Block: uint64(i), Mask: 0xff}
	}
	return e
}

// lost is n entries without.
func lost(n int) []journal.Entry {
	e := make([]journal.Entry, n)
	for i := range e {
		e[i] = journal.Entry{Kind: journal.EntryLost, Block: uint64(i)}
	}
	return e
}

// put makes a whole run.
func put(r *journal.Ring, seal uint64, entries []journal.Entry) {
	header := make([]byte, journal.BlockBytes)
	r.Begin(seal, 1)
	for {
		n := min(len(entries), journal.EntriesPerChunk)
		r.Chunk(header, entries[:n], n == len(entries))
		if entries = entries[n:]; len(entries) == 0 {
			return
		}
	}
}

func TestRunBlocks(t *testing.T) {
	for _, c := range []struct {
		blocks, others int
		want           uint64
	}{{0, 0, 1}, {1, 0, 2}, {165, 0, 166}, {166, 0, 168}, {0, 165, 1}, {0, 166, 2}, {100, 66, 102}, {1000, 1000, 1013}} {
		if got := journal.RunBlocks(c.blocks, c.others); got != c.want {
			t.Errorf("%d and %d: %d, want %d", c.blocks, c.others, got, c.want)
		}
		r := journal.NewRing(0, 16<<20, journal.RingState{Stamp: 1})
		put(r, 1, append(blocks(c.blocks), lost(c.others)...))
		r.Commit()
		if got := r.State().Head; got != c.want {
			t.Errorf("%d and %d: the run took %d, want %d", c.blocks, c.others, got, c.want)
		}
	}
}

func TestRingOffset(t *testing.T) {
	r := journal.NewRing(1<<30, journal.MinRingBytes, journal.RingState{Stamp: 1, Head: 5000, Tail: 5000})
	for _, c := range []struct {
		pos  uint64
		want int64
	}{{0, 1 << 30}, {1, 1<<30 + 4096}, {1023, 1<<30 + 1023*4096}, {1024, 1 << 30}, {5000, 1<<30 + 904*4096}} {
		if got := r.Offset(c.pos); got != c.want {
			t.Errorf("position %d: %d, want %d", c.pos, got, c.want)
		}
	}
	if r.Blocks() != 1024 || r.FreeBlocks() != 1024-64 {
		t.Errorf("%d blocks, %d free", r.Blocks(), r.FreeBlocks())
	}
}

// TestRingTail: space is free once a durable run names the tail behind it, not before.
func TestRingTail(t *testing.T) {
	r := journal.NewRing(0, journal.MinRingBytes, journal.RingState{Stamp: 1})
	free := r.FreeBlocks()
	put(r, 5, blocks(100))
	if r.State().Head != 0 || r.FreeBlocks() != free {
		t.Error("a run counts before it is committed")
	}
	r.Commit()
	if st := r.State(); st != (journal.RingState{Stamp: 1, Head: 101, Committed: 5}) || r.FreeBlocks() != free-101 || r.TailPending() {
		t.Errorf("%+v, %d free", st, r.FreeBlocks())
	}
	r.Advance(101)
	if !r.TailPending() || r.FreeBlocks() != free-101 || r.State().Tail != 0 {
		t.Error("a tail counts that no run names")
	}
	put(r, 5, nil)
	r.Advance(50) // never goes back
	r.Begin(5, 1) // the attempt failed
	if c := chunkOf(r); c.Tail != 101 || c.Committed != 5 || c.Position != 101 {
		t.Errorf("%+v", c)
	}
	if !r.TailPending() {
		t.Error("tail is not pending while its run is not durable")
	}
	r.Commit()
	if st := r.State(); st.Tail != 101 || st.Head != 102 || r.TailPending() || r.FreeBlocks() != free-1 {
		t.Errorf("%+v, %d free", st, r.FreeBlocks())
	}
}

// chunkOf ends the run with a chunk without entries and returns it.
func chunkOf(r *journal.Ring) *journal.Chunk {
	b := make([]byte, journal.BlockBytes)
	r.Chunk(b, nil, true)
	c, err := journal.DecodeChunk(b, r.State().Stamp)
	if err != nil {
		panic(err)
	}
	return c
}

// TestRingFull: when blocks have filled the ring, a mark still finds room to name the tail that empties it, again and
// again; and then half of the reserve is there for the ring that follows.
func TestRingFull(t *testing.T) {
	r := journal.NewRing(0, journal.MinRingBytes, journal.RingState{Stamp: 1})
	for lap := range uint64(5) {
		for r.FreeBlocks() > 1 {
			put(r, lap, blocks(int(min(100, r.FreeBlocks()-1))))
			r.Commit()
		}
		for range 99 {
			r.Advance(r.State().Tail + 1)
			put(r, lap, nil)
			r.Commit()
			if st := r.State(); st.Head-st.Tail > r.Blocks()-32 {
				t.Fatalf("%+v leaves less than half of the reserve", st)
			}
		}
		r.Advance(r.State().Head)
		put(r, lap, nil)
		r.Commit()
		if r.FreeBlocks() != r.Blocks()-64-1 {
			t.Fatalf("%d free", r.FreeBlocks())
		}
	}
}

// TestRingPanics on what would write a ring that cannot be read.
func TestRingPanics(t *testing.T) {
	header := make([]byte, journal.BlockBytes)
	for name, c := range map[string]struct {
		says string
		do   func(r *journal.Ring)
	}{
		"older seal":       {"seal 9 after 10", func(r *journal.Ring) { r.Begin(9, 1) }},
		"tail beyond head": {"tail 51 beyond", func(r *journal.Ring) { r.Advance(51) }},
		"no begin":         {"no run", func(r *journal.Ring) { r.Chunk(header, nil, true) }},
		"behind the last":  {"no run", func(r *journal.Ring) { put(r, 10, nil); r.Chunk(header, nil, true) }},
		"commit nothing":   {"without its last", func(r *journal.Ring) { r.Commit() }},
		"commit a half":    {"without its last", func(r *journal.Ring) { r.Begin(10, 1); r.Chunk(header, nil, false); r.Commit() }},
		"commit twice":     {"without its last", func(r *journal.Ring) { put(r, 10, nil); r.Commit(); r.Commit() }},
		"many entries":     {"more than 165", func(r *journal.Ring) { r.Begin(10, 1); r.Chunk(header, blocks(166), true) }},
		"newer number": {"newer than the seal", func(r *journal.Ring) {
			r.Begin(10, 1)
			r.Chunk(header, []journal.Entry{{Kind: journal.EntryLost, Number: 11}}, true)
		}},
		"overrun":                               {"overruns", func(r *journal.Ring) { put(r, 10, blocks(1000)) }},
		"overrun by one":                        {"overruns", func(r *journal.Ring) { put(r, 10, blocks(int(r.FreeBlocks())-5)) }},
		"overrun of a tail that is not durable": {"overruns", func(r *journal.Ring) { r.Advance(50); put(r, 10, blocks(int(r.FreeBlocks())-5)) }},
		"marks overrun":                         {"overruns", func(r *journal.Ring) { put(r, 10, lost((int(r.FreeBlocks())+32)*165+1)) }},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if got, ok := recover().(string); !ok || !strings.Contains(got, c.says) {
					t.Errorf("panic %q, want %q", got, c.says)
				}
			}()
			c.do(journal.NewRing(0, journal.MinRingBytes, journal.RingState{Stamp: 1, Head: 50, Tail: 40, Committed: 10}))
		})
	}
	r := journal.NewRing(0, journal.MinRingBytes, journal.RingState{Stamp: 1, Head: 50, Tail: 40, Committed: 10})
	put(r, 10, blocks(int(r.FreeBlocks())-6))
	r.Commit()
	if r.FreeBlocks() != 0 {
		t.Errorf("%d blocks are free after a run that just fits", r.FreeBlocks())
	}
}

// TestRingModel: over many laps no run ever touches a block of the ring that a run behind the durable tail has.
func TestRingModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	r := journal.NewRing(0, journal.MinRingBytes, journal.RingState{Stamp: 1, Head: 1 << 40, Tail: 1 << 40})
	owner := make([]uint64, r.Blocks()) // the position that lies there
	durable := r.State().Tail
	var starts []uint64
	header := make([]byte, journal.BlockBytes)
	for seal := range uint64(3000) {
		if len(starts) > 0 && rng.IntN(3) == 0 {
			k := rng.IntN(len(starts))
			r.Advance(starts[k])
			starts = starts[k:]
		}
		start := r.State().Head
		r.Begin(seal, 1)
		for range 1 + rng.IntN(2) { // attempts
			r.Begin(seal, 1)
			for pos := start; ; {
				n := min(rng.IntN(journal.EntriesPerChunk+1), int(r.FreeBlocks()-(pos-start)))
				last := n <= 1 || rng.IntN(3) == 0
				n = max(0, n-2)
				if at := r.Chunk(header, blocks(n), last); at != pos {
					t.Fatalf("chunk at %d, want %d", at, pos)
				}
				for range n + 1 {
					place := r.Offset(pos) / journal.BlockBytes
					if old := owner[place]; old >= durable && old < start {
						t.Fatalf("position %d goes over %d, tail is %d", pos, old, durable)
					}
					owner[place] = pos
					pos++
				}
				if last {
					break
				}
			}
		}
		r.Commit()
		durable = r.State().Tail
		starts = append(starts, start)
		if r.FreeBlocks() < 200 {
			r.Advance(start)
			put(r, seal, nil)
			r.Commit()
			durable = r.State().Tail
			starts = starts[:0]
		}
	}
	if laps := (r.State().Head - 1<<40) / r.Blocks(); laps < 20 {
		t.Errorf("only %d laps", laps)
	}
}
