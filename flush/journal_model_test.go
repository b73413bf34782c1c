package flush

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// modelRingBlocks is a ring that goes round once or twice in a short run.
const modelRingBlocks = 128

// modelJournal is what a modelSource has besides where there is a journal, and the judge of what a power cut leaves.
type modelJournal struct {
	src   *modelSource
	way   *modelBacking // to the ring
	super *journal.Superblock
	fate  *rand.Rand // of the power cuts
	every int        // one of so many moments is looked at
	cuts  int

	loses  int               // of so many blocks one turns out to be lost on its way; 0: none
	lost   map[uint64]uint64 // number by block, as of the newest seal
	was    map[uint64]uint64 // as of the committed one
	states map[uint64]*modelState
	taking uint64 // where Take goes on
	// The newest seals with anything in them, and of those the newest committed one: others need no run.
	run, done uint64

	record            atomic.Uint64 // committed seal that Record was told of
	room, used, total int64
	limits            []int64
	refusals          []bool
}

// modelState is a volume as it was at a seal.
type modelState struct {
	volume []byte
	lost   map[uint64]uint64
}

// journalKind is a rig with a journal.
type journalKind struct {
	rigKind
	same bool // the ring lies on the disk of the data
}

func (k journalKind) String() string {
	if k.same {
		return k.name + " same disk"
	}
	return k.name + " own disk"
}

var journalKinds = []journalKind{
	{rigKinds[0], true}, {rigKinds[1], false}, {rigKinds[2], true}, {rigKinds[3], false}, {rigKinds[4], true},
}

// newJournalRig makes a rig like newRig with a journal.
func newJournalRig(tb testing.TB, seed uint64, kind journalKind, change func(*Options)) *rig {
	rng := rand.New(rand.NewPCG(seed, uint64(kind.sector)))
	const volume, ring = modelBlocks * BlockBytes, modelRingBlocks * BlockBytes
	r := new(rig)
	super := &journal.Superblock{Name: "v", Journal: journal.KindInternal, VolumeBytes: volume, RingBytes: ring}
	var way *modelBacking
	if kind.same {
		super.RingOffset = volume
		r.backing = newModelBacking(volume+ring, kind.sector, rng)
		r.backing.to = volume
		way = r.backing.way(volume, volume+ring, kind.sector)
	} else {
		super.Journal = journal.KindExternal
		r.backing = newModelBacking(volume, kind.sector, rng)
		way = newModelBacking(ring, kind.sector, rand.New(rand.NewPCG(seed, 4)))
	}
	way.unordered = true
	s := newModelSource(r.backing, rand.New(rand.NewPCG(seed, 1)))
	s.number, s.seal, s.committed = 1, 1, 1
	j := &modelJournal{
		src: s, way: way, super: super, fate: rand.New(rand.NewPCG(seed, 5)), every: 6,
		lost: map[uint64]uint64{}, was: map[uint64]uint64{}, states: map[uint64]*modelState{}, run: 1, done: 1,
	}
	j.states[1] = &modelState{bytes.Clone(s.volume), map[uint64]uint64{}}
	st, err := journal.Reset(image(way.cache), super, 1, 7, nil, journal.RingState{})
	if err != nil {
		tb.Fatal(err)
	}
	copy(way.durable, way.cache)
	s.journal, r.source = j, s
	o := Options{
		WriteBytes: 8 * BlockBytes, SyncBytes: 24 * BlockBytes, BridgeBlocks: 3, Depth: 3, SweepAfter: 50 * time.Millisecond,
		Event: func(e Event) { r.events = append(r.events, e) },
		Journal: &Journal{
			Ring: journal.NewRing(super.RingOffset, ring, st), Dev: kind.dev(way), SameDisk: kind.same, Generation: 7,
			Record: func(st journal.RingState) { j.record.Store(st.Committed) },
		},
	}
	if change != nil {
		change(&o)
	}
	if r.flusher, err = New(s, kind.dev(r.backing), o); err != nil {
		tb.Fatal(err)
	}
	s.wake = r.flusher.Wake
	r.backing.moment, way.moment = j.look, j.look
	return r
}

// image is what a power cut left.
type image []byte

func (m image) ReadAt(p []byte, off int64) (int, error)  { return bytes.NewReader(m).ReadAt(p, off) }
func (m image) WriteAt(p []byte, off int64) (int, error) { return copy(m[off:], p), nil }
func (m image) Sync() error                              { return nil }

// look cuts the power at some of the moments.
func (j *modelJournal) look() {
	j.src.mu.Lock()
	defer j.src.mu.Unlock()
	if j.fate.IntN(j.every) == 0 {
		j.cut()
	}
}

// cut recovers from what a power cut leaves now: that has to be the state at the newest seal for which Committed was called, or
// at the one that is being committed. Callers hold the lock of the source.
func (j *modelJournal) cut() {
	s := j.src
	j.cuts++
	s.backing.mu.Lock()
	home := image(s.backing.image(j.fate))
	s.backing.mu.Unlock()
	ring := home
	if j.way.medium != s.backing.medium {
		j.way.mu.Lock()
		ring = j.way.image(j.fate)
		j.way.mu.Unlock()
	}
	rec, err := journal.Scan(context.Background(), ring, j.super, nil)
	if err != nil {
		s.problem("after a power cut: %v", err)
		return
	}
	want := j.states[rec.Seal]
	if rec.Seal != j.done && rec.Seal != j.run || want == nil {
		s.problem("after a power cut: recovered seal %d, committed %d, being committed %d", rec.Seal, j.done, j.run)
		return
	}
	if err := journal.Replay(context.Background(), rec, ring, home, nil); err != nil {
		s.problem("after a power cut: %v", err)
		return
	}
	lost := map[uint64]uint64{}
	for _, l := range rec.Lost {
		lost[l.Block] = l.Number
	}
	if !maps.Equal(lost, want.lost) {
		s.problem("after a power cut: at seal %d blocks are lost: %v, recovered %v", rec.Seal, want.lost, lost)
	}
	for off := 0; off < len(want.volume); off += SectorBytes {
		if _, is := lost[uint64(off)/BlockBytes]; !is && !bytes.Equal(home[off:][:SectorBytes], want.volume[off:][:SectorBytes]) {
			s.problem("after a power cut: sector at %d is not as it was at seal %d", off, rec.Seal)
			return
		}
	}
}

// sealed notes the state at a new seal.
func (j *modelJournal) sealed(s *modelSource, changed bool) {
	maps.Copy(j.lost, j.was)
	for b := range j.was {
		if s.sealed[b] != nil || covers(s.sealedZeroes, b) {
			delete(j.lost, b)
		}
	}
	if j.taking = 0; changed {
		j.run = s.seal
		j.states[s.seal] = &modelState{bytes.Clone(s.volume), maps.Clone(j.lost)}
	}
}

func covers(list []Zero, block uint64) bool {
	off := int64(block) * BlockBytes
	for _, z := range list {
		if off >= z.Off && off < z.Off+z.Bytes {
			return true
		}
	}
	return false
}

// committed notes that the newest seal is committed. Callers hold the lock of the source.
func (j *modelJournal) committed() {
	s := j.src
	if told := j.record.Load(); told != j.run && j.run > 1 {
		s.problem("seal %d committed, those who keep the ring know of %d", j.run, told)
	}
	j.done = j.run
	j.was = maps.Clone(j.lost)
	for b := range j.was {
		delete(s.home, b)
	}
	maps.DeleteFunc(j.states, func(seal uint64, _ *modelState) bool { return seal < j.run })
}

func (s *modelSource) NewZeroes(give func(first, blocks, sequence uint64)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, z := range s.sealedZeroes {
		give(uint64(z.Off/BlockBytes), uint64(z.Bytes/BlockBytes), s.sealedNumbers[i])
	}
}

func (s *modelSource) Take(dst []Block) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	j, n := s.journal, 0
	for ; n < len(dst) && j.taking < uint64(len(s.resident)); j.taking++ {
		b := j.taking
		v := s.sealed[b]
		if v == nil {
			continue
		}
		if j.loses > 0 && s.open[b] == nil && s.rng.IntN(j.loses) == 0 {
			j.lost[b], j.states[s.seal].lost[b] = v.number, v.number
			delete(s.sealed, b)
			continue
		}
		data := bytes.Clone(v.data)
		for i := range BlockBytes / SectorBytes {
			if v.valid&(1<<i) == 0 {
				fillRandom(s.rng, data[i*SectorBytes:][:SectorBytes])
			}
		}
		dst[n] = Block{
			Number: b, Sequence: v.number, Sum: crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli)), Valid: v.valid, Dirty: v.dirty, Data: data,
		}
		n++
	}
	return n
}

func (s *modelSource) Retake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.journal.taking = 0
}

func (s *modelSource) LostBlocks(seal uint64, give func(block, sequence uint64)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lost := s.journal.lost
	if seal != s.seal {
		lost = s.journal.was
	}
	for b, n := range lost {
		give(b, n)
	}
}

func (s *modelSource) PressedHome() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.home)+len(s.homeZeroes) > modelBlocks/4 || s.journal.used > s.journal.total/4
}

func (s *modelSource) Room(blocks, used, total int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.journal.room, s.journal.used, s.journal.total = blocks, used, total
}

func (s *modelSource) Limit(bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.journal.limits = append(s.journal.limits, bytes)
}

func (s *modelSource) Refuse(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.journal != nil {
		s.journal.refusals = append(s.journal.refusals, on)
	}
}

func (s *modelSource) refused() []bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.journal.refusals)
}

// full tells whether the journal could not take n more blocks.
func (s *modelSource) full(n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.journal != nil && int64(len(s.open)+len(s.sealed)+n) > s.journal.room
}

// runJournaled publishes while seals are committed and go home, and drains.
func (r *rig) runJournaled(tb testing.TB, seed uint64) []string {
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(seed, 2))
	bounded := seed%4 != 0 // else the flusher itself waits for room
	r.flusher.Start()
	for range 5 {
		for range 8 {
			for pause := time.Millisecond; bounded && r.source.full(12); pause *= 2 {
				r.flusher.Wake()
				time.Sleep(pause)
			}
			r.load(rng, 1)
		}
		r.flusher.Wake()
		time.Sleep(time.Duration(rng.IntN(8)) * time.Millisecond)
		if rng.IntN(3) == 0 {
			if err := r.flusher.Commit(ctx); err == nil {
				r.source.mu.Lock()
				r.source.journal.cut()
				r.source.mu.Unlock()
			}
		}
	}
	if err := r.flusher.Drain(ctx); err != nil {
		tb.Errorf("drain: %v", err)
	}
	if err := r.flusher.Stop(ctx); err != nil {
		tb.Errorf("stop: %v", err)
	}
	r.source.journal.cut()
	problems := r.source.finish()
	if r.source.journal.way.medium != r.backing.medium {
		problems = append(problems, r.source.journal.way.problems...)
	}
	return problems
}

// seeds is how many random runs a test has: n, a quarter of that with -short, or as many times more as SIM_SEEDS says.
func seeds(n uint64) uint64 {
	times := uint64(1)
	if testing.Short() {
		n = (n + 3) / 4
	}
	fmt.Sscan(os.Getenv("SIM_SEEDS"), &times)
	if testing.Short() {
		n = max(1, n/4)
	}
	return n * times
}

// TestJournalPowerCuts runs the models without faults and cuts the power all the time.
func TestJournalPowerCuts(t *testing.T) {
	cuts := 0
	for _, k := range journalKinds {
		t.Run(k.String(), func(t *testing.T) {
			for seed := range seeds(4) {
				synctest.Test(t, func(t *testing.T) {
					r := newJournalRig(t, seed, k, nil)
					r.source.journal.every = 2
					for _, p := range r.runJournaled(t, seed) {
						t.Errorf("seed %d: %s", seed, p)
					}
					cuts += r.source.journal.cuts
				})
			}
		})
	}
	t.Logf("%d power cuts", cuts)
}

// TestJournalLostBlocks: blocks turn out to be lost on their way, and every recovery knows of them until they are written again.
func TestJournalLostBlocks(t *testing.T) {
	for seed := range seeds(15) {
		synctest.Test(t, func(t *testing.T) {
			r := newJournalRig(t, seed, journalKinds[int(seed)%len(journalKinds)], nil)
			r.source.journal.loses, r.source.journal.every = 12, 2
			for _, p := range r.runJournaled(t, seed) {
				t.Errorf("seed %d: %s", seed, p)
			}
		})
	}
}

// sweepJournalErrors lets the n-th operation of a kind go wrong, n = 1, 2, …, on the way to the ring or on the way home.
func sweepJournalErrors(t *testing.T, kind, fault string, k journalKind, ring bool) (problems []string, runs int) {
	for n := 1; ; n++ {
		fired := false
		synctest.Test(t, func(t *testing.T) {
			seed := uint64(n)
			r := newJournalRig(t, seed, k, nil)
			r.source.journal.every = 24
			on := r.backing
			if ring {
				on = r.source.journal.way
			}
			on.fault = func(op string, i int) string {
				if op == kind && i == n {
					fired = true
					return fault
				}
				return ""
			}
			for _, p := range r.runJournaled(t, seed) {
				problems = append(problems, fmt.Sprintf("%s of %s %d: %s", fault, kind, n, p))
			}
			if st := r.flusher.Status(); fired && fault != faultHang && st.Errors != 1 {
				problems = append(problems, fmt.Sprintf("%s of %s %d: %d errors counted", fault, kind, n, st.Errors))
			}
		})
		if !fired || len(problems) > 20 {
			return problems, n - 1
		}
	}
}

// TestJournalErrorSweep has every operation fail, tear and hang once, on the way to the ring and on the way home, with both on
// one disk and on two.
func TestJournalErrorSweep(t *testing.T) {
	for i, k := range journalKinds {
		for _, ring := range []bool{false, true} {
			for _, kind := range []string{opRead, opWrite, opZero, opSync} {
				if ring && (kind == opRead || kind == opZero) || !k.can(kind) {
					continue // the way to the ring has none
				}
				for j, fault := range []string{faultFail, faultTear, faultHang} {
					if fault == faultHang && i%3 > 0 || testing.Short() && i != 3 && i+j > 0 {
						continue
					}
					t.Run(fmt.Sprintf("%s/ring %v/%s/%s", k, ring, kind, fault), func(t *testing.T) {
						problems, runs := sweepJournalErrors(t, kind, fault, k, ring)
						for _, p := range problems {
							t.Error(p)
						}
						if runs == 0 {
							t.Error("no operations")
						}
					})
				}
			}
		}
	}
}

// TestJournalManyErrors lets each operation of both ways go wrong with some probability, for a while.
func TestJournalManyErrors(t *testing.T) {
	for seed := range seeds(25) {
		synctest.Test(t, func(t *testing.T) {
			r := newJournalRig(t, seed, journalKinds[int(seed)%len(journalKinds)], nil)
			r.source.journal.loses = 60
			fate := rand.New(rand.NewPCG(seed, 3))
			var mu sync.Mutex
			left := 30
			fault := func(string, int) string {
				mu.Lock()
				defer mu.Unlock()
				if left == 0 || fate.IntN(6) > 0 {
					return ""
				}
				left--
				return []string{faultFail, faultTear, faultHang}[fate.IntN(3)]
			}
			r.backing.fault, r.source.journal.way.fault = fault, fault
			for _, p := range r.runJournaled(t, seed) {
				t.Errorf("seed %d: %s", seed, p)
			}
		})
	}
}

// TestJournalStop stops at any time, whatever goes wrong just then, and what is left recovers.
func TestJournalStop(t *testing.T) {
	for seed := range seeds(40) {
		synctest.Test(t, func(t *testing.T) {
			r := newJournalRig(t, seed, journalKinds[int(seed)%len(journalKinds)], nil)
			fate := rand.New(rand.NewPCG(seed, 6))
			worse := seed%3 == 0
			fault := func(string, int) string {
				if worse && r.backing.rng.IntN(8) == 0 {
					return []string{faultFail, faultTear, faultHang}[r.backing.rng.IntN(3)]
				}
				return ""
			}
			locked := func(kind string, n int) string { // the rng belongs to the medium
				r.backing.mu.Lock()
				defer r.backing.mu.Unlock()
				return fault(kind, n)
			}
			r.backing.fault, r.source.journal.way.fault = fault, locked
			if r.source.journal.way.medium == r.backing.medium {
				r.source.journal.way.fault = fault
			}
			r.flusher.Start()
			go func() {
				time.Sleep(time.Duration(fate.IntN(40_000)) * time.Microsecond)
				if err := r.flusher.Stop(context.Background()); err != nil {
					t.Errorf("stop: %v", err)
				}
			}()
			load := rand.New(rand.NewPCG(seed, 2))
			for err := error(nil); err == nil || !errors.Is(err, ErrStopped); {
				for range 6 {
					if !r.source.full(12) {
						r.load(load, 1)
					}
				}
				if load.IntN(2) == 0 {
					err = r.flusher.Commit(context.Background())
				} else {
					err = r.flusher.Flush(context.Background())
				}
			}
			_ = r.flusher.Stop(context.Background())
			r.source.mu.Lock()
			defer r.source.mu.Unlock()
			for range 3 {
				r.source.journal.cut()
			}
			if len(r.source.given) > 0 {
				t.Errorf("seed %d: %d blocks not given back", seed, len(r.source.given))
			}
			for _, p := range slices.Concat(r.backing.problems, r.source.journal.way.problems) {
				t.Errorf("seed %d: %s", seed, p)
			}
		})
	}
}

// TestJournalHang: nobody waits for ever for a lane that does nothing any more, whichever it is, and everybody may write again
// after it went on.
func TestJournalHang(t *testing.T) {
	for _, k := range journalKinds {
		for _, ring := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				const giveUp = 6 * time.Second
				r := newJournalRig(t, 1, k, func(o *Options) { o.GiveUpAfter = giveUp })
				on := r.backing
				if ring {
					on = r.source.journal.way
				}
				on.fault = func(kind string, n int) string {
					if kind == opSync && n == 1 {
						return faultHang
					}
					return ""
				}
				r.flusher.Start()
				r.source.publish(3, 0, 8)
				begin := time.Now()
				if err := r.flusher.Flush(context.Background()); !errors.Is(err, errHung) {
					t.Errorf("%v, ring %v: flush: %v", k, ring, err)
				}
				if d := time.Since(begin); d < giveUp || d > giveUp+2*time.Second {
					t.Errorf("%v, ring %v: given up after %v", k, ring, d)
				}
				if st := r.flusher.Status(); st.State != StateFailed {
					t.Errorf("%v, ring %v: state %v", k, ring, st.State)
				}
				if err := r.flusher.Drain(context.Background()); err != nil {
					t.Errorf("%v, ring %v: drain: %v", k, ring, err)
				}
				time.Sleep(DefaultSlowAfter)
				if got := r.source.refused(); len(got) < 2 || got[0] != true || got[len(got)-1] != false {
					t.Errorf("%v, ring %v: writes refused: %v", k, ring, got)
				}
				if st := r.flusher.Status(); st.State != StateOK || st.Stalled != 0 {
					t.Errorf("%v, ring %v: late state %v", k, ring, st.State)
				}
				checkEvents(t, r, StateSlow, StateFailed, StateOK)
				_ = r.flusher.Stop(context.Background())
				for _, p := range r.source.finish() {
					t.Error(p)
				}
			})
		}
	}
}

// TestJournalFails: whoever waits for a commit is told of a journal that fails, not of a way home that does.
func TestJournalFails(t *testing.T) {
	for _, k := range journalKinds {
		for _, ring := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				r := newJournalRig(t, 1, k, nil)
				on := r.backing
				if ring {
					on = r.source.journal.way
				}
				broken := true
				on.fault = func(kind string, _ int) string {
					if broken && kind == opWrite {
						return faultFail
					}
					return ""
				}
				r.flusher.Start()
				r.source.publish(3, 0, 8)
				err := r.flusher.Commit(context.Background())
				if (err != nil) != ring || err != nil && !errors.Is(err, syscall.EIO) {
					t.Errorf("%v, ring %v: commit: %v", k, ring, err)
				}
				if err := r.flusher.Flush(context.Background()); !errors.Is(err, syscall.EIO) {
					t.Errorf("%v, ring %v: flush: %v", k, ring, err)
				}
				if (r.source.failed > 0) != ring {
					t.Errorf("%v, ring %v: those who wait for a commit were told %d times", k, ring, r.source.failed)
				}
				on.mu.Lock()
				broken = false
				on.mu.Unlock()
				if err := r.flusher.Drain(context.Background()); err != nil {
					t.Errorf("%v, ring %v: drain: %v", k, ring, err)
				}
				_ = r.flusher.Stop(context.Background())
				if st := r.flusher.Status(); st.State != StateOK {
					t.Errorf("%v, ring %v: state %v", k, ring, st.State)
				}
				for _, p := range r.source.finish() {
					t.Error(p)
				}
			})
		}
	}
}

// TestJournalRests: a volume that nobody writes to does nothing to its disks once all is home and the last commit is named.
func TestJournalRests(t *testing.T) {
	for _, k := range journalKinds {
		synctest.Test(t, func(t *testing.T) {
			r := newJournalRig(t, 1, k, nil)
			r.flusher.Start()
			r.load(rand.New(rand.NewPCG(1, 2)), 8)
			if err := r.flusher.Flush(context.Background()); err != nil {
				t.Error(err)
			}
			time.Sleep(10 * time.Second)
			before := r.flusher.Status()
			time.Sleep(time.Hour)
			if st := r.flusher.Status(); st.Writes != before.Writes || st.Syncs != before.Syncs {
				t.Errorf("%v: %d writes and %d syncs in an hour of rest", k, st.Writes-before.Writes, st.Syncs-before.Syncs)
			}
			_ = r.flusher.Stop(context.Background())
			for _, p := range r.source.finish() {
				t.Error(p)
			}
		})
	}
}

// TestJournalHoldUp: what may be uncommitted follows from how long the commits took.
func TestJournalHoldUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const holdUp = 50 * time.Millisecond
		r := newJournalRig(t, 1, journalKinds[0], func(o *Options) { o.HoldUp = holdUp })
		c := r.flusher.commits
		c.measure(rateBytes-1, time.Hour) // too short to tell anything
		if got := r.source.journal.limits; len(got) != 0 {
			t.Fatalf("limits %v after a short commit", got)
		}
		for i := range 400 {
			d := 10 * time.Millisecond
			if i == 150 || i == 151 { // two are more than a hundredth of the samples
				d = 100 * time.Millisecond
			}
			c.measure(4<<20, d)
		}
		limits := r.source.journal.limits
		// 4 MiB in 10 ms are 20 MiB in 50 ms; the slow ones count as long as both are among the last.
		for i, want := range map[int]int64{0: 20 << 20, 149: 20 << 20, 150: 20 << 20, 151: 2 << 20, 149 + rateSamples: 2 << 20, 150 + rateSamples: 20 << 20} {
			if limits[i] < want-BlockBytes || limits[i] > want+BlockBytes {
				t.Errorf("limit %d is %d, want %d", i, limits[i], want)
			}
		}
	})
}
