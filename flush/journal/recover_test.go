package journal_test

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// TestRecoverModel runs random histories into power cuts, over and over, with many laps of the ring: recovery yields
// exactly the state at the last durable seal or at the one that was being committed, also when it is itself cut and
// run again, and so does a start whose new ring was written and whose superblock was not.
func TestRecoverModel(t *testing.T) {
	seeds := 16
	if testing.Short() {
		seeds = 5
	}
	travel, torn, whole, again := 0.0, 0, 0, 0
	for seed := range uint64(seeds) {
		rng := rand.New(rand.NewPCG(seed, 7))
		e := newEngine(rng, 1+rng.Uint64N(24), 64+rng.Int64N(64))
		if rng.IntN(4) == 0 {
			e.home.sector = 4096
		}
		for range 30 { // lives
			began := e.ring.State().Head
			powerGoes := e.live(t, seed)
			travel += float64(e.ring.State().Head-began) / float64(e.ring.Blocks())
			// At times the process dies before the machine does, and another one has begun to recover: it has read what was
			// written and not synced.
			if rng.IntN(3) == 0 {
				rec, err := journal.Scan(context.Background(), e.log, e.s, nil)
				if err != nil {
					describe(t, e)
					t.Fatalf("seed %d: process died: %v", seed, err)
				}
				e.home.failAt, e.home.dead = e.home.calls+1+rng.IntN(20), true
				if journal.Replay(context.Background(), rec, e.log, e.home, nil) != nil {
					again++
				}
			}
			log, home := e.log.cutAtRandom(rng), e.home.cutAtRandom(rng)
			// Replays that end somewhere: by an error, then by another power cut.
			for range rng.IntN(3) {
				rec, err := journal.Scan(context.Background(), log, e.s, nil)
				if err != nil {
					describe(t, e)
					t.Fatalf("seed %d: %v", seed, err)
				}
				home.failAt, home.dead = home.calls+1+rng.IntN(20), true
				if journal.Replay(context.Background(), rec, log, home, nil) != nil {
					again++
				}
				home = home.cutAtRandom(rng)
			}
			rec, err := e.recover(log, home)
			if err != nil {
				describe(t, e)
				t.Fatalf("seed %d: %v", seed, err)
			}
			switch {
			case !powerGoes:
			case rec.Seal == e.pending && e.pending != e.durable:
				whole++
			case rec.Torn:
				torn++
			}
			// A new ring that nothing names yet changes nothing for the old one, wherever the power goes.
			if s := *e.s; rng.IntN(2) == 0 {
				if _, err := journal.Reset(log, &s, rec.Seal, 1, rec.Lost, rec.State); err != nil {
					t.Fatalf("seed %d: reset: %v", seed, err)
				}
				torn := rec.Torn
				if rec, err = e.recover(log.cutAtRandom(rng), home); err != nil || rec.Torn && !torn {
					describe(t, e)
					t.Fatalf("seed %d: after a reset that was not stored: %v", seed, err)
				}
			}
			e.resume(rec, log, home)
		}
	}
	t.Logf("%.0f laps, %d torn runs, %d whole ones without sync, %d replays that were cut", travel, torn, whole, again)
	if travel < float64(seeds) || torn < seeds/2 || whole < seeds/2 || again < seeds/2 {
		t.Error("that is not what this test is about")
	}
}

// live runs the engine for a while and stops it anywhere; it reports whether that was in a commit.
func (e *engine) live(t *testing.T, seed uint64) bool {
	t.Helper()
	for {
		// Room for a run of everything.
		need := journal.RunBlocks(int(e.blocks), 0) + 40
		if e.ring.FreeBlocks() < need {
			e.checkpoint(len(e.runs), false)
			e.commitMark()
		}
		if e.ring.FreeBlocks() < need {
			t.Fatalf("seed %d: ring is full: %+v", seed, e.ring.State())
		}
		for range e.rng.IntN(6) {
			e.step()
		}
		if e.rng.IntN(25) == 0 {
			e.commit(1+e.rng.IntN(9), true)
			return true
		}
		e.commit(1+e.rng.IntN(165), false)
		if e.rng.IntN(3) == 0 {
			n := e.rng.IntN(len(e.runs) + 1)
			if e.rng.IntN(10) == 0 {
				e.checkpoint(n, true)
				return false
			}
			e.checkpoint(n, false)
			e.advance()
		}
	}
}

// commitMark lets the tail pass all that is home.
func (e *engine) commitMark() {
	e.ring.Advance(e.ring.State().Head)
	e.runs = []runNote{{end: e.ring.State().Head}}
	e.commit(165, false)
}
