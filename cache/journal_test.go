package cache_test

import (
	"bytes"
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/cache"
)

// memoryJournal is what a journal on a disk would hold: the runs whose blocks may not be home.
type memoryJournal struct {
	mu        sync.Mutex
	fate      rand.PCG // of the commits
	runs      []run
	committed uint64
	first     int // index of runs[0] in the order of all runs
}

// run is one commit.
type run struct {
	seal   uint64
	redo   []redo
	lo, hi int // operations that had ended before the seal was taken, and begun when it had been
}

// redo is an entry of a run: a block with its data, or zeroes.
type redo struct {
	number        uint64
	block, blocks uint64
	mask          uint8 // 0: zeroes
	data          []byte
}

// commit seals and commits; the journal has the run before anybody is answered.
func (v *volume) commit() { v.commitAs(0, func() int { return 0 }) }

func (v *volume) commitAs(lo int, hi func() int) {
	seal, _, _ := v.Seal()
	r := run{seal: seal, lo: lo, hi: hi()}
	v.NewZeroes(func(first, blocks, number uint64) {
		r.redo = append(r.redo, redo{number: number, block: first, blocks: blocks})
	})
	var batch [16]cache.Version
	last := int64(-1)
	for n := v.Take(batch[:]); n > 0; n = v.Take(batch[:]) {
		for _, b := range batch[:n] {
			if int64(b.Number) <= last {
				v.t.Errorf("block %d came after block %d", b.Number, last)
			}
			last = int64(b.Number)
			mask := b.Dirty
			if b.Valid == 0xff {
				mask = 0xff
			}
			r.redo = append(r.redo, redo{number: b.Sequence, block: b.Number, mask: mask, data: bytes.Clone(b.Data)})
		}
		if v.journal.fate.Uint64()%40 == 0 { // the run was not written: once more
			v.Retake()
			r.redo = slices.DeleteFunc(r.redo, func(e redo) bool { return e.mask != 0 })
			last = -1
		}
	}
	j := &v.journal
	j.mu.Lock()
	j.runs = append(j.runs, r)
	j.committed = seal
	j.mu.Unlock()
	v.Committed(seal)
}

// sweep brings home what is committed and then forgets the runs that had been committed when it began.
func (v *volume) sweep() {
	j := &v.journal
	j.mu.Lock()
	mark := j.first + len(j.runs)
	j.mu.Unlock()
	v.Sweep()
	for !v.pass() {
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	// The last run stays, since it says what is committed.
	n := min(mark-j.first, len(j.runs)-1)
	j.runs = j.runs[n:]
	j.first += n
}

// recovered is what a recovery makes of home and journal: everything is done again in the order of the numbers.
func (v *volume) recovered() (data []byte, last run) {
	j := &v.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	v.disk.mu.Lock()
	data = bytes.Clone(v.disk.data)
	v.disk.mu.Unlock()
	var all []redo
	for _, r := range j.runs {
		all = append(all, r.redo...)
		last = r
	}
	slices.SortStableFunc(all, func(a, b redo) int { return cmp.Compare(a.number, b.number) })
	for _, e := range all {
		at := e.block * cache.BlockBytes
		if e.mask == 0 {
			clear(data[at : at+e.blocks*cache.BlockBytes])
		}
		for i := range uint64(8) {
			if e.mask&(1<<i) != 0 {
				copy(data[at+i*512:at+(i+1)*512], e.data[i*512:])
			}
		}
	}
	return data, last
}

// history is the operations of one client, so that the state after any number of them can be made.
type history struct {
	mu           sync.Mutex
	begun, ended int
	ops          []func([]byte)
	state        []byte
	at           int // operations in state
}

func (h *history) begin(op func([]byte)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, op)
	h.begun++
}

func (h *history) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended++
}

func (h *history) counts() (begun, ended int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.begun, h.ended
}

// matches tells whether data is the state after some number of operations between lo and hi.
func (h *history) matches(data []byte, lo, hi int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for n := h.at; n <= hi; n++ {
		if n > h.at {
			h.ops[n-1](h.state)
			h.at = n
		}
		if n >= lo && bytes.Equal(data, h.state) {
			return true
		}
	}
	return false
}

// TestPowerCut lets commits and sweeps run beside a client and looks again and again at what a loss of the memory would leave:
// exactly the state at the newest committed seal.
func TestPowerCut(t *testing.T) {
	const size = 12 << 20
	for seed := range uint64(seeds()) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			v := newVolume(t, size, testMemory, func(cfg *cache.Config) { cfg.Journaled, cfg.Commits = true, seed%2 == 1 })
			h := &history{state: make([]byte, size)}
			for i := range h.state {
				h.state[i] = byte(i / 4096)
			}
			copy(v.disk.data, h.state)
			stop, wake := make(chan struct{}), make(chan struct{}, 1)
			var both, sweeper sync.WaitGroup
			both.Go(func() {
				defer close(wake)
				looked := -1
				for {
					select {
					case <-stop:
						return
					default:
					}
					begun, ended := h.counts()
					if begun == looked && !v.PressedToCommit() {
						time.Sleep(100 * time.Microsecond)
						continue
					}
					looked = begun
					v.commitAs(ended, func() int { begun, _ := h.counts(); return begun })
					data, last := v.recovered()
					if !h.matches(data, last.lo, last.hi) {
						t.Errorf("home and journal hold no state between operation %d and %d", last.lo, last.hi)
					}
					select {
					case wake <- struct{}{}:
					default:
					}
				}
			})
			sweeper.Go(func() {
				for range wake {
					v.sweep()
				}
			})
			c, r := v.client(), rand.New(rand.NewPCG(seed, 3))
			steps := 200
			if testing.Short() {
				steps = 60
			}
			for step := 0; step < steps && !t.Failed(); step++ {
				n := (1 + r.Int64N(24)) * 4096
				off := r.Int64N((size-n)/4096) * 4096
				if r.IntN(3) == 0 { // a hot and small range
					off, n = r.Int64N(1<<18), 1+r.Int64N(9000)
				}
				var err error
				if r.IntN(8) == 0 {
					if r.IntN(4) == 0 {
						n = min(size-off, 1+r.Int64N(3<<20))
					}
					h.begin(func(b []byte) { clear(b[off : off+n]) })
					err = c.zero(off, n)
				} else {
					p := make([]byte, n)
					fill(r, p)
					h.begin(func(b []byte) { copy(b[off:], p) })
					err = c.write(off, p)
				}
				h.end()
				if err != nil {
					t.Fatal(err)
				}
			}
			close(stop)
			both.Wait()
			sweeper.Wait()
			v.commit()
			v.sweep()
			if !h.matches(v.disk.data, h.ended, h.ended) {
				t.Error("home is not what was written after everything went there")
			}
		})
	}
}

// TestIdleSealsTakeNoNumber: while nothing is written no numbers go by, so that what status calls committed is never ahead of what
// the journal says.
func TestIdleSealsTakeNoNumber(t *testing.T) {
	v := newVolume(t, testSize, testMemory, func(cfg *cache.Config) { cfg.Journaled = true })
	if err := v.client().write(0, make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	v.commit()
	first := v.Stats().Committed
	v.commit()
	if _, _, changed := v.Seal(); changed || v.Stats().Committed != first || v.Stats().Open != first {
		t.Errorf("committed %d, open %d after seals of nothing, want %d", v.Stats().Committed, v.Stats().Open, first)
	}
}

// TestLostUntilCommitted: a block that is lost and written over stays on the list as of the committed seal, by a write and by an
// extent, until the seal of those is committed.
func TestLostUntilCommitted(t *testing.T) {
	v := newVolume(t, testSize, testMemory, func(cfg *cache.Config) { cfg.Journaled = true })
	c := v.client()
	p := bytes.Repeat([]byte{0xa5}, 4096)
	for _, off := range []int64{0, 4096, 8192} {
		if err := c.write(off, p); err != nil {
			t.Fatal(err)
		}
	}
	v.commit()
	if n := v.flipAll(t, p); n != 3 {
		t.Fatalf("flipped %d blocks, want 3", n)
	}
	for _, off := range []int64{0, 4096, 8192} {
		if _, err := c.read(off, 4096); err == nil {
			t.Fatalf("block at %d with a flipped bit was read", off)
		}
	}
	lost := func(seal uint64) (blocks []uint64) {
		v.LostBlocks(seal, func(block, _ uint64) { blocks = append(blocks, block) })
		slices.Sort(blocks)
		return blocks
	}
	committed := v.journal.committed
	if err := c.write(4096, p); err != nil {
		t.Fatal(err)
	}
	if err := c.zero(8192, 4096); err != nil {
		t.Fatal(err)
	}
	seal, _, _ := v.Seal()
	if got := lost(committed); !slices.Equal(got, []uint64{0, 1, 2}) {
		t.Errorf("as of the committed seal %v are lost, want 0, 1 and 2", got)
	}
	if got := lost(seal); !slices.Equal(got, []uint64{0}) {
		t.Errorf("as of the newest seal %v are lost, want 0", got)
	}
	v.Committed(seal)
	if got := lost(seal); !slices.Equal(got, []uint64{0}) {
		t.Errorf("after its commit %v are lost, want 0", got)
	}
}
