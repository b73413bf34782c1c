package flush

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

const modelBlocks = 64

// rig is a flusher between the two models.
type rig struct {
	backing *modelBacking
	source  *modelSource
	flusher *Flusher
	events  []Event // of the flusher, in order
}

// newRig makes a rig with small limits, so that a short run has several legs, halved runs and bridges.
func newRig(tb testing.TB, seed uint64, kind rigKind) *rig {
	rng := rand.New(rand.NewPCG(seed, uint64(kind.sector)))
	r := &rig{backing: newModelBacking(modelBlocks*BlockBytes, kind.sector, rng)}
	r.source = newModelSource(r.backing, rand.New(rand.NewPCG(seed, 1)))
	f, err := New(r.source, kind.dev(r.backing), Options{
		WriteBytes: 8 * BlockBytes, SyncBytes: 24 * BlockBytes, BridgeBlocks: 3, Depth: 3,
		Event: func(e Event) { r.events = append(r.events, e) },
	})
	if err != nil {
		tb.Fatal(err)
	}
	r.flusher = f
	return r
}

// load publishes random writes and zeroes.
func (r *rig) load(rng *rand.Rand, n int) {
	for range n {
		switch rng.IntN(8) {
		case 0:
			first := rng.Uint64N(modelBlocks)
			r.source.zero(first, 1+rng.Uint64N(min(10, modelBlocks-first)))
		case 1, 2:
			first := rng.IntN(8)
			r.source.publish(rng.Uint64N(modelBlocks), first, 1+rng.IntN(8-first))
		default:
			first := rng.Uint64N(modelBlocks)
			for i := first; i < min(modelBlocks, first+1+rng.Uint64N(12)); i++ {
				r.source.publish(i, 0, 8)
			}
		}
	}
}

// run publishes, flushes while more is published, and drains.
func (r *rig) run(tb testing.TB, seed uint64) []string {
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(seed, 2))
	r.flusher.Start()
	for range 3 {
		r.load(rng, 10)
		r.flusher.Wake()
		time.Sleep(time.Duration(rng.IntN(8)) * time.Millisecond)
		r.load(rng, 3)
	}
	if err := r.flusher.Drain(ctx); err != nil {
		tb.Errorf("drain: %v", err)
	}
	if err := r.flusher.Stop(ctx); err != nil {
		tb.Errorf("stop: %v", err)
	}
	return r.source.finish()
}

// rigKind is a backing by its abilities.
type rigKind struct {
	name   string
	sector int
	dev    func(b *modelBacking) Backing
}

func (k rigKind) can(kind string) bool {
	switch kind {
	case opRead:
		return k.sector > SectorBytes
	case opZero:
		return k.name != "plain"
	}
	return true
}

var rigKinds = []rigKind{
	{"sector512", 512, func(b *modelBacking) Backing { return richBacking{b} }},
	{"sector4096", 4096, func(b *modelBacking) Backing { return richBacking{b} }},
	{"plain", 512, func(b *modelBacking) Backing { return b }},
	{"async512", 512, func(b *modelBacking) Backing { return newAsyncBacking(b) }},
	{"async4096", 4096, func(b *modelBacking) Backing { return newAsyncBacking(b) }},
}

// eachKind runs test in a bubble of its own for each kind.
func eachKind(t *testing.T, test func(t *testing.T, k rigKind)) {
	for _, k := range rigKinds {
		t.Run(k.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, k) })
		})
	}
}

// TestFlusherBringsAllHome runs the models without faults.
func TestFlusherBringsAllHome(t *testing.T) {
	for _, k := range rigKinds {
		t.Run(k.name, func(t *testing.T) {
			for seed := range uint64(20) {
				synctest.Test(t, func(t *testing.T) {
					r := newRig(t, seed, k)
					for _, p := range r.run(t, seed) {
						t.Errorf("seed %d: %s", seed, p)
					}
				})
			}
		})
	}
}

// sweepErrors lets the n-th operation of a kind go wrong, n = 1, 2, … until a run has no n-th one, and returns
// what the models found wrong and how many runs there were.
func sweepErrors(t *testing.T, kind, fault string, k rigKind) (problems []string, runs int) {
	for n := 1; ; n++ {
		fired := false
		synctest.Test(t, func(t *testing.T) {
			seed := uint64(n)
			r := newRig(t, seed, k)
			r.backing.fault = func(op string, i int) string {
				if op == kind && i == n {
					fired = true
					return fault
				}
				return ""
			}
			for _, p := range r.run(t, seed) {
				problems = append(problems, fmt.Sprintf("%s of %s %d: %s", fault, kind, n, p))
			}
			if st := r.flusher.Status(); fired && fault != faultHang && st.Errors != 1 {
				problems = append(problems, fmt.Sprintf("%s of %s %d: %d errors counted", fault, kind, n, st.Errors))
			}
		})
		if !fired {
			return problems, n - 1
		}
	}
}

// TestFlusherErrorSweep has every operation of the backing fail, tear and hang once (invariant 7: a failed
// write or sync never marks anything clean, and everything since the last good sync is written again).
func TestFlusherErrorSweep(t *testing.T) {
	for _, k := range rigKinds {
		for _, kind := range []string{opRead, opWrite, opZero, opSync} {
			for _, fault := range []string{faultFail, faultTear, faultHang} {
				t.Run(k.name+"/"+kind+"/"+fault, func(t *testing.T) {
					problems, runs := sweepErrors(t, kind, fault, k)
					for _, p := range problems {
						t.Error(p)
					}
					if (runs > 0) != k.can(kind) {
						t.Errorf("%d operations", runs)
					}
				})
			}
		}
	}
}

// TestFlusherManyErrors lets each operation go wrong with some probability, for a while.
func TestFlusherManyErrors(t *testing.T) {
	for seed := range uint64(40) {
		synctest.Test(t, func(t *testing.T) {
			k := rigKinds[int(seed)%len(rigKinds)]
			r := newRig(t, seed, k)
			rng := rand.New(rand.NewPCG(seed, 3))
			left := 30
			r.backing.fault = func(string, int) string {
				if left == 0 || rng.IntN(6) > 0 {
					return ""
				}
				left--
				return []string{faultFail, faultTear, faultHang}[rng.IntN(3)]
			}
			for _, p := range r.run(t, seed) {
				t.Errorf("seed %d: %s", seed, p)
			}
		})
	}
}

// TestFlusherFails: a backing that fails is tried again with growing pauses; those that must be told are told
// after FailAfter attempts; nothing is lost, and the state says so.
func TestFlusherFails(t *testing.T) {
	eachKind(t, func(t *testing.T, k rigKind) {
		r := newRig(t, 1, k)
		const attempts = 5
		var at []time.Time
		r.backing.fault = func(kind string, n int) string {
			if kind == opSync && n <= attempts {
				at = append(at, time.Now())
				return faultFail
			}
			return ""
		}
		r.source.publish(3, 0, 8)
		r.flusher.Start()
		ctx := context.Background()
		if err := r.flusher.Flush(ctx); !errors.Is(err, syscall.EIO) {
			t.Errorf("flush: %v, want EIO", err)
		}
		if len(at) != DefaultFailAfter || !r.source.dirty() {
			t.Errorf("told after %d attempts, dirty %v", len(at), r.source.dirty())
		}
		if st := r.flusher.Status(); st.State != StateFailed || !errors.Is(st.Err, syscall.EIO) || st.FailedAttempts != DefaultFailAfter {
			t.Errorf("status %+v", st)
		}
		if err := r.flusher.Drain(ctx); err != nil {
			t.Errorf("drain: %v", err)
		}
		for i := 1; i < attempts; i++ {
			want := DefaultBackoff << (i - 1)
			if got := at[i].Sub(at[i-1]); got < want || got > want+10*time.Millisecond {
				t.Errorf("pause %d of %v, want %v", i, got, want)
			}
		}
		if r.source.failed != attempts-DefaultFailAfter+1 {
			t.Errorf("Failed called %d times", r.source.failed)
		}
		if st := r.flusher.Status(); st.State != StateOK || st.Err != nil || st.FailedAttempts != 0 || st.Errors != attempts {
			t.Errorf("status %+v", st)
		}
		checkEvents(t, r, StateFailed, StateOK)
		if err := r.flusher.Stop(ctx); err != nil {
			t.Error(err)
		}
		for _, p := range r.source.finish() {
			t.Error(p)
		}
	})
}

func checkEvents(t *testing.T, r *rig, want ...State) {
	t.Helper()
	var got []State
	from := StateOK
	for _, e := range r.events {
		if e.From != from || (e.Err != nil) != (e.To == StateFailed) {
			t.Errorf("event %+v after %v", e, from)
		}
		from = e.To
		got = append(got, e.To)
	}
	if !slices.Equal(got, want) {
		t.Errorf("states %v, want %v", got, want)
	}
}

// TestFlusherBackoffIsBounded: the pauses end at MaxBackoff.
func TestFlusherBackoffIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1, rigKinds[0])
		var at []time.Time
		r.backing.fault = func(kind string, n int) string {
			if kind != opSync || n > 12 {
				return ""
			}
			at = append(at, time.Now())
			return faultFail
		}
		r.source.publish(3, 0, 8)
		r.flusher.Start()
		if err := r.flusher.Drain(context.Background()); err != nil {
			t.Error(err)
		}
		if got := at[11].Sub(at[10]); got < DefaultMaxBackoff || got > DefaultMaxBackoff+10*time.Millisecond {
			t.Errorf("last pause %v, want %v", got, DefaultMaxBackoff)
		}
		_ = r.flusher.Stop(context.Background())
	})
}

// TestFlusherSlow: a hang shows after SlowAfter and is over with the next completion; nothing is written
// beside it in its range, which modelBacking watches.
func TestFlusherSlow(t *testing.T) {
	eachKind(t, func(t *testing.T, k rigKind) {
		r := newRig(t, 1, k)
		r.backing.fault = func(kind string, n int) string {
			if kind == opWrite && n == 1 {
				return faultHang
			}
			return ""
		}
		r.source.publish(3, 0, 8)
		r.flusher.Start()
		r.flusher.Wake()
		time.Sleep(DefaultSlowAfter / 2)
		if st := r.flusher.Status(); st.State != StateOK || st.Stalled < DefaultSlowAfter/3 {
			t.Errorf("early status %+v", st)
		}
		time.Sleep(DefaultSlowAfter)
		if st := r.flusher.Status(); st.State != StateSlow {
			t.Errorf("status %+v, want slow", st)
		}
		if err := r.flusher.Drain(context.Background()); err != nil {
			t.Error(err)
		}
		if st := r.flusher.Status(); st.State != StateOK || st.Stalled != 0 {
			t.Errorf("late status %+v", st)
		}
		checkEvents(t, r, StateSlow, StateOK)
		_ = r.flusher.Stop(context.Background())
		for _, p := range r.source.finish() {
			t.Error(p)
		}
	})
}

// TestFlusherStopDuringHang: Stop says that something is in flight and does not give it up.
func TestFlusherStopDuringHang(t *testing.T) {
	eachKind(t, func(t *testing.T, k rigKind) {
		r := newRig(t, 1, k)
		r.backing.fault = func(kind string, n int) string {
			if kind == opWrite && n == 1 {
				return faultHang
			}
			return ""
		}
		r.source.publish(3, 0, 8)
		r.flusher.Start()
		flushed := make(chan error, 1)
		go func() { flushed <- r.flusher.Flush(context.Background()) }()
		time.Sleep(time.Second)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := r.flusher.Stop(ctx); !errors.Is(err, ErrInFlight) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("stop during a hang: %v", err)
		}
		if err := r.flusher.Stop(context.Background()); err != nil {
			t.Errorf("stop after the hang: %v", err)
		}
		if err := <-flushed; !errors.Is(err, ErrStopped) {
			t.Errorf("flush: %v, want ErrStopped", err)
		}
		if err := r.flusher.Flush(context.Background()); !errors.Is(err, ErrStopped) {
			t.Errorf("flush after stop: %v, want ErrStopped", err)
		}
		if !r.source.dirty() || len(r.source.given) > 0 {
			t.Errorf("dirty %v, %d blocks not given back", r.source.dirty(), len(r.source.given))
		}
	})
}

// TestFlusherStopDuringBackoff: a failing backing does not hold up a stop.
func TestFlusherStopDuringBackoff(t *testing.T) {
	eachKind(t, func(t *testing.T, k rigKind) {
		r := newRig(t, 1, k)
		r.backing.fault = func(string, int) string { return faultFail }
		r.source.publish(3, 0, 8)
		r.flusher.Start()
		r.flusher.Wake()
		time.Sleep(20 * time.Second)
		begin := time.Now()
		if err := r.flusher.Stop(context.Background()); err != nil || time.Since(begin) > time.Second {
			t.Errorf("stop: %v after %v", err, time.Since(begin))
		}
		if !r.source.dirty() {
			t.Error("nothing dirty after failures only")
		}
	})
}

// TestFlusherPace: seals are Staleness apart while nothing presses, and follow one another while something
// does, but not when a pressed source has nothing dirty.
func TestFlusherPace(t *testing.T) {
	eachKind(t, func(t *testing.T, k rigKind) {
		r := newRig(t, 1, k)
		r.flusher.Start()
		time.Sleep(10*time.Second + time.Millisecond)
		if got := r.flusher.Status().Seals; got != 10 {
			t.Errorf("%d seals in 10 s at rest, want 10", got)
		}
		r.source.mu.Lock()
		r.source.pressed = true
		r.source.mu.Unlock()
		before := r.flusher.Status().Seals
		for i := range uint64(20) {
			r.source.publish(i, 0, 8)
			r.flusher.Wake()
			time.Sleep(10 * time.Millisecond)
		}
		if got := r.flusher.Status().Seals - before; got < 20 || got > 41 {
			t.Errorf("%d seals for 20 presses", got)
		}
		before = r.flusher.Status().Seals
		time.Sleep(10 * time.Second)
		if got := r.flusher.Status().Seals - before; got > 11 {
			t.Errorf("%d seals in 10 s with nothing dirty", got)
		}
		_ = r.flusher.Stop(context.Background())
	})
}

// TestFlusherZeroesAlone: a seal of zeroes without blocks is synced before it is committed.
func TestFlusherZeroesAlone(t *testing.T) {
	eachKind(t, func(t *testing.T, k rigKind) {
		r := newRig(t, 1, k)
		r.source.zero(5, 9)
		r.flusher.Start()
		if err := r.flusher.Flush(context.Background()); err != nil {
			t.Error(err)
		}
		if st := r.flusher.Status(); st.Syncs != 1 || st.ZeroedBytes != 9*BlockBytes || st.Writes != 0 {
			t.Errorf("status %+v", st)
		}
		_ = r.flusher.Stop(context.Background())
		for _, p := range r.source.finish() {
			t.Error(p)
		}
	})
}

// TestFlusherBridges: gaps that are resident and no wider than the limit are written along; a gap that is
// wider, or not all resident, begins another write, and none of it is written.
func TestFlusherBridges(t *testing.T) {
	for _, c := range []struct {
		name            string
		resident, dirty []uint64
		writes, bridged uint64 // writes, and blocks
	}{
		{"no gap", nil, []uint64{2, 3, 4}, 1, 0},
		{"three resident", []uint64{3, 4, 5}, []uint64{2, 6}, 1, 3},
		{"four resident", []uint64{3, 4, 5, 6}, []uint64{2, 7}, 2, 0},
		{"the last is not resident", []uint64{3, 4}, []uint64{2, 6}, 2, 0},
		{"the first is not resident", []uint64{4, 5}, []uint64{2, 6}, 2, 0},
		{"two gaps", []uint64{3, 5}, []uint64{2, 4, 6}, 1, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 1, rigKinds[0])
				for _, i := range c.resident {
					r.source.resident[i] = true
				}
				for _, i := range c.dirty {
					r.source.publish(i, 0, 8)
				}
				r.flusher.Start()
				if err := r.flusher.Flush(context.Background()); err != nil {
					t.Error(err)
				}
				st := r.flusher.Status()
				want := (uint64(len(c.dirty)) + c.bridged) * BlockBytes
				if st.Writes != c.writes || st.BridgedBytes != c.bridged*BlockBytes || st.WrittenBytes != want {
					t.Errorf("%d writes of %d bytes, %d bridged", st.Writes, st.WrittenBytes, st.BridgedBytes)
				}
				_ = r.flusher.Stop(context.Background())
				for _, p := range r.source.finish() {
					t.Error(p)
				}
			})
		})
	}
}

// TestFlushCoversWhatCameBefore: Flush does not return on a seal that was taken before it was called.
func TestFlushCoversWhatCameBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1, rigKinds[0])
		r.flusher.Start()
		for i := range uint64(30) {
			r.source.publish(i, 0, 8)
			r.flusher.Wake()
			time.Sleep(300 * time.Microsecond) // the seal is taken and being written
			r.source.publish(i+30, 0, 8)
			if err := r.flusher.Flush(context.Background()); err != nil {
				t.Fatal(err)
			}
			if r.source.dirty() {
				t.Fatalf("round %d: dirty after flush", i)
			}
		}
		_ = r.flusher.Stop(context.Background())
	})
}

// TestFlushContext: a wait ends with its context.
func TestFlushContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1, rigKinds[0])
		r.backing.fault = func(string, int) string { return faultHang }
		r.source.publish(3, 0, 8)
		r.flusher.Start()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := r.flusher.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("flush: %v", err)
		}
		if err := r.flusher.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("drain: %v", err)
		}
		_ = r.flusher.Stop(context.Background())
	})
}

// TestNewRefusesOptions names the value that is wrong.
func TestNewRefusesOptions(t *testing.T) {
	for _, o := range []Options{
		{Depth: -1}, {Depth: MaxDepth + 1}, {WriteBytes: 5000}, {WriteBytes: maxWriteBytes + BlockBytes}, {SyncBytes: 1},
		{BridgeBlocks: MaxBridgeBlocks + 1}, {FailAfter: -1}, {Staleness: -1}, {Backoff: time.Minute},
	} {
		if _, err := New(nil, newModelBacking(BlockBytes, 512, rand.New(rand.NewPCG(1, 1))), o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
	for _, sector := range []int{8192, 513} {
		if _, err := New(nil, newModelBacking(BlockBytes, sector, rand.New(rand.NewPCG(1, 1))), Options{}); err == nil {
			t.Errorf("sector %d: no error", sector)
		}
	}
}
