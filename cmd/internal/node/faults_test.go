package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush"
)

// some writes and zeroes a little, as one client.
func (s *sim) some(seed uint64, n int) {
	fate, ranges := rand.New(rand.NewPCG(seed, 21)), new(exclusions)
	var op cache.Op
	for range n {
		if off, length := s.place(fate, true); fate.IntN(4) > 0 {
			s.write(&op, fate, off, length, ranges)
		} else {
			s.zero(&op, fate, off, length, ranges)
		}
	}
}

// check judges what is there; all that was answered has to be.
func (s *sim) check(what string) {
	s.t.Helper()
	shown := s.shown(false)
	if why := s.history.judge(shown, s.history.answered()); why != "" {
		s.fatal("%s: %s", what, why)
	}
	s.history.revealed(shown)
}

// stage is a part of the life of a volume in which an operation of a disk goes wrong.
type stage struct {
	name    string
	prepare func(s *sim)       // until there
	act     func(s *sim) error // the part itself

	generation uint64 // of the volume after it
}

var stages = []stage{
	{"first start", func(*sim) {}, (*sim).tryOpen, 1},
	{"start after a clean stop", func(s *sim) {
		s.reopen(true)
		s.some(1, 12)
		if err := s.drain(); err != nil {
			s.t.Fatal(err)
		}
	}, (*sim).tryOpen, 1},
	{"start after a power cut", func(s *sim) {
		s.reopen(true)
		s.some(1, 12)
		if err := s.volume.flusher.Commit(context.Background()); err != nil {
			s.t.Fatal(err)
		}
		s.shut()
		s.cut()
	}, (*sim).tryOpen, 2},
	{"start after a kill", func(s *sim) {
		s.reopen(true)
		s.some(1, 12)
		s.shut()
	}, (*sim).tryOpen, 1},
	{"stop", func(s *sim) {
		s.reopen(true)
		s.some(1, 12)
	}, (*sim).drain, 1},
}

// drain stops the volume cleanly.
func (s *sim) drain() error {
	v := s.volume
	s.volume = nil
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	err := v.Drain(ctx, func(int64) {})
	if errors.Is(err, flush.ErrInFlight) {
		// The process ends without letting anything go. What hangs has to end before another one starts.
		time.Sleep(2 * hangTime)
		stopped := v.flusher.Stop(context.Background())
		v.cache.Close()
		return errors.Join(err, stopped, v.arena.Close())
	}
	return errors.Join(err, v.Close())
}

// TestVolumeErrorSweep has every operation of starts and stops fail or hang once: nothing is lost, and the next start is good.
func TestVolumeErrorSweep(t *testing.T) {
	for i, mode := range simModes[:7] {
		for _, st := range stages {
			for _, hangs := range []bool{false, true} {
				if hangs && (i > 0 || testing.Short()) || i == 2 || i == 5 {
					continue
				}
				step := 1
				if testing.Short() {
					step = 7
				}
				t.Run(fmt.Sprintf("%v/%s/hang %v", mode, st.name, hangs), func(t *testing.T) {
					n := 1
					for ; sweepVolume(t, mode, st, n, hangs) && !t.Failed(); n += step {
					}
					if n < 2 {
						t.Error("no operations")
					}
				})
			}
		}
	}
}

// sweepVolume runs one stage with its n-th operation going wrong. It reports false where it has none.
func sweepVolume(t *testing.T, mode simMode, st stage, n int, hangs bool) (fired bool) {
	synctest.Test(t, func(t *testing.T) {
		s := newSim(t, mode, 1)
		s.config.Staleness = config.Duration(time.Second)
		st.prepare(s)
		s.power.again(0)
		s.power.fail(n, hangs)
		before := s.power.count()
		err := st.act(s)
		fired = s.power.count()-before >= n
		if s.volume != nil {
			s.some(2, 3)
			for last := -1; hangs && last != s.power.count(); time.Sleep(2 * hangTime) {
				last = s.power.count() // until nothing happens any more
			}
			fired = s.power.count()-before >= n
			s.shut()
		}
		if err != nil && (!fired || hangs && !errors.Is(err, flush.ErrInFlight)) {
			t.Errorf("%v: %s: %v", mode, st.name, err)
		}
		s.power.again(0)
		s.note("%s: %v", st.name, err)
		again := s.tryOpen()
		if refused := new(control.Failure); st.name == "first start" && errors.As(again, &refused) {
			// A part of the very first superblock is no superblock, and may be anything.
			s.config.Force = true
			again = s.tryOpen()
		}
		if err := again; err != nil {
			t.Fatalf("%v: start after operation %d of the %s went wrong (%v): %v", mode, n, st.name, err, err)
		}
		s.check(fmt.Sprintf("after operation %d of the %s went wrong", n, st.name))
		// A start that failed may have left a superblock behind, and counts as one that served then.
		if g := s.volume.generation(); g < st.generation || g > st.generation+1 || err == nil && g != st.generation {
			t.Errorf("%v: generation %d after operation %d of the %s went wrong (%v), want %d", mode, g, n, st.name, err, st.generation)
		}
		if err := s.drain(); err != nil {
			t.Errorf("%v: stop: %v", mode, err)
		}
		for _, p := range s.power.problems {
			t.Error(p)
		}
	})
	return fired
}

// TestEverySubset cuts the power at every operation of a short history and tries every subset of the blocks that were not synced
// then, where they are few, else some of them. Recovery alone is judged, so that there can be many.
func TestEverySubset(t *testing.T) {
	few := 6
	if simSeeds(1) > 1 {
		few = 12
	}
	images := 0
	modes := simModes[:6]
	if testing.Short() {
		modes = modes[:1]
	}
	for i, mode := range modes {
		for at := 1; ; at++ {
			over := false
			synctest.Test(t, func(t *testing.T) {
				s := newSim(t, mode, uint64(i))
				s.reopen(true)
				s.power.again(at)
				s.some(uint64(i), 6)
				if err := s.volume.flusher.Flush(context.Background()); err == nil {
					s.some(uint64(i)+100, 4)
					_ = s.volume.flusher.Commit(context.Background())
				}
				over = !s.power.gone()
				s.gate.Lock()
				s.dead = true
				s.gate.Unlock()
				s.shut()
				images += s.everySubset(few)
			})
			if over || t.Failed() {
				break
			}
		}
	}
	t.Logf("%d images", images)
}

// everySubset judges what recovery makes of the subsets of what is not synced.
func (s *sim) everySubset(few int) (images int) {
	disks := []*recorder{s.data}
	if s.meta != s.data {
		disks = append(disks, s.meta)
	}
	n := 0
	for _, d := range disks {
		d.split()
		n += len(d.pending)
	}
	s.forget()
	try := func(keep func(i int) bool) {
		i, old := 0, []recorder{}
		for _, d := range disks {
			old = append(old, *d)
			d.now, d.shared = slices.Clone(d.durable), true
			for _, p := range d.pending {
				if keep(i) {
					d.put(d.now, p.off, p.data)
				}
				i++
			}
			d.durable, d.pending = slices.Clone(d.now), nil
		}
		images++
		s.recovers()
		for k, d := range disks {
			*d = old[k]
		}
	}
	if n <= few {
		for set := range 1 << n {
			try(func(i int) bool { return set&(1<<i) != 0 })
		}
		return images
	}
	for range 8 {
		chance := []float64{0, 0.1, 0.5, 0.9, 1}[s.fate.IntN(5)]
		try(func(int) bool { return s.fate.Float64() < chance })
	}
	return images
}

// recovers runs the recovery alone and judges the disk.
func (s *sim) recovers() {
	s.power.again(0)
	c := *s.config
	v := &Volume{config: &c, log: slog.New(slog.DiscardHandler), backing: s.data, meta: s.meta}
	found, err := v.examine(context.Background())
	if err != nil {
		s.fatal("examine: %v", err)
	}
	v.superblock = found.Superblock
	if _, err := v.recover(context.Background(), found, new(memoryFile)); err != nil {
		s.fatal("recover: %v", err)
	}
	s.view.blocks = s.view.blocks[:0]
	for b := range s.history.seen {
		s.view.blocks = append(s.view.blocks, b)
	}
	slices.Sort(s.view.blocks)
	var p page
	for _, b := range s.view.blocks {
		s.data.look(s.data.now, int64(b), &p)
		s.see(b, p[:])
	}
	if why := s.history.judge(&s.view, nil); why != "" {
		s.fatal("of a subset: %s", why)
	}
}

// split makes of what is not synced pieces of one block at most.
func (r *recorder) split() {
	var split []piece
	for _, p := range r.pending {
		for len(p.data) > 0 {
			n := min(int64(len(p.data)), cache.BlockBytes-p.off%cache.BlockBytes)
			split = append(split, piece{p.off, p.data[:n], p.number})
			p.off, p.data = p.off+n, p.data[n:]
		}
	}
	r.pending = split
}

// TestVolumeBitFlips flips bits of blocks in the memory in every state that a block can be in. What the journal or home has is
// repaired. The rest is lost: it answers EIO until it is written again, also after a kill and after a power cut.
func TestVolumeBitFlips(t *testing.T) {
	for i, mode := range simModes[:6] {
		for seed := range simSeeds(3) {
			synctest.Test(t, func(t *testing.T) {
				s := newSim(t, mode, seed)
				s.config.Staleness = config.Duration(time.Hour)
				s.reopen(true)
				s.flips(uint64(i) + seed)
				s.shut()
			})
		}
	}
}

// flips writes blocks, flips bits of them before their commit, after it, and when they are home, and looks what becomes of
// them.
func (s *sim) flips(seed uint64) {
	const blocks = 12
	ctx := context.Background()
	fate := rand.New(rand.NewPCG(seed, 31))
	want := map[int64][]byte{}
	put := func(block int64) {
		p := bytes.Repeat([]byte{byte(1 + fate.IntN(255))}, cache.BlockBytes)
		fate.Shuffle(len(p), func(i, j int) { p[i] ^= byte(i * j) })
		if errno := s.put(block*cache.BlockBytes, p); errno != 0 {
			s.fatal("write of block %d: %v", block, errno)
		}
		want[block] = p
	}
	lost := map[int64]bool{}
	look := func(when string) {
		for block := range int64(3 * blocks) {
			data, errno, _ := s.ask(block*cache.BlockBytes, cache.BlockBytes)
			switch {
			case lost[block] && errno != syscall.EIO:
				s.fatal("%s: lost block %d reads with %v", when, block, errno)
			case !lost[block] && (errno != 0 || !bytes.Equal(data, want[block])):
				s.fatal("%s: block %d reads with %v, or not as it was written", when, block, errno)
			}
		}
	}
	// A third of the blocks is home, a third committed, a third neither, where that can be.
	for block := range int64(blocks) {
		put(block)
	}
	if err := s.volume.flusher.Flush(ctx); err != nil {
		s.fatal("flush: %v", err)
	}
	for block := range int64(blocks) {
		put(blocks + block)
	}
	if err := s.volume.flusher.Commit(ctx); err != nil {
		s.fatal("commit: %v", err)
	}
	for block := range int64(blocks) {
		put(2*blocks + block)
	}
	for block := range int64(3 * blocks) {
		if fate.IntN(3) > 0 {
			continue
		}
		if n := s.flip(block, fate); n == 0 {
			s.fatal("block %d is not in the memory", block)
		}
		lost[block] = block >= 2*blocks && s.mode.ack != config.AckDisk
	}
	if fate.IntN(2) == 0 { // else the commit finds them
		look("after the flips")
	}
	if err := s.volume.flusher.Commit(ctx); err != nil {
		s.fatal("commit: %v", err)
	}
	look("after the commit")
	if fate.IntN(2) == 0 {
		if err := s.volume.flusher.Flush(ctx); err != nil {
			s.fatal("flush: %v", err)
		}
		look("after all is home")
	}
	s.shut()
	if err := s.tryOpen(); err != nil {
		s.fatal("start after a kill: %v", err)
	}
	look("after a kill")
	for range 1 + fate.IntN(3) {
		s.shut()
		s.cut()
		if err := s.tryOpen(); err != nil {
			s.fatal("start after a power cut: %v", err)
		}
		look("after a power cut")
		// A mark names the next tail, so the runs of before do not say what is lost any more.
		if err := s.volume.flusher.Flush(ctx); err != nil {
			s.fatal("flush: %v", err)
		}
	}
	for block := range lost {
		if errno := s.put(block*cache.BlockBytes, make([]byte, sectorBytes)); lost[block] && errno != syscall.EIO {
			s.fatal("write of a part of lost block %d: %v", block, errno)
		}
		if lost[block] {
			put(block)
		} else {
			copy(want[block], make([]byte, sectorBytes))
		}
	}
	clear(lost)
	look("after they were written again")
	if err := s.volume.flusher.Commit(ctx); err != nil {
		s.fatal("commit: %v", err)
	}
	s.shut()
	s.cut()
	if err := s.tryOpen(); err != nil {
		s.fatal("last start: %v", err)
	}
	look("at the end")
}

// put writes and waits for the answer.
func (s *sim) put(off int64, p []byte) syscall.Errno {
	op := &cache.Op{Off: off, Len: int64(len(p)), Payload: p}
	errno, _ := s.do(op, func() {
		if rest := p; s.volume.cache.Reserve(op) {
			for i := range op.Parts() {
				rest = rest[copy(s.volume.cache.Dest(op, i), rest):]
			}
		}
		s.volume.cache.Write(op)
	})
	return errno
}

// flip changes a bit of every version of a block in the memory.
func (s *sim) flip(block int64, fate *rand.Rand) (n int) {
	a := s.volume.arena
	for i := range a.Headers {
		h := &a.Headers[i]
		if h.Number.Load() != 0 && h.Block.Load()&(1<<40-1) == uint64(block) {
			a.Data(uint32(i))[fate.IntN(cache.BlockBytes)] ^= 1 << fate.IntN(8)
			n++
		}
	}
	return n
}

// TestRunWithoutSync: a run that was written and whose sync failed may be read after a kill, and is not durable all the same.
func TestRunWithoutSync(t *testing.T) {
	for seed := range simSeeds(20) {
		synctest.Test(t, func(t *testing.T) {
			s := newSim(t, simModes[1], seed)
			s.reopen(true)
			s.some(seed, 3)
			ranges, fate := new(exclusions), rand.New(rand.NewPCG(seed, 41))
			s.power.mu.Lock()
			s.power.syncsFail = true
			s.power.mu.Unlock()
			answered := make(chan struct{})
			go func() {
				defer close(answered)
				var op cache.Op
				s.write(&op, fate, 1<<20, 1<<18, ranges)
			}()
			time.Sleep(20 * time.Millisecond) // the run is written, and its sync fails
			s.shut()
			<-answered
			s.history.killed()
			s.power.again(0)
			s.power.cutFrom = 1 << 20
			s.meta.drop()
			if err := s.tryOpen(); err == nil {
				_ = s.volume.flusher.Flush(context.Background())
				s.shut()
			}
			s.cut()
			s.reopen(true)
			if why := s.history.judge(s.shown(false), nil); why != "" {
				s.fatal("after a run without sync: %s", why)
			}
			s.shut()
		})
	}
}

// drop makes durable nothing of what was written, as a failed sync may.
func (r *recorder) drop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending, r.dropped = nil, append(r.dropped, r.pending...)
}
