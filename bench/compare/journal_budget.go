package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/ramshelf/ramshelf/bench"
	"github.com/ramshelf/ramshelf/bench/load"
)

// budget is whether what is uncommitted keeps to its bound while the backing slows down: the bound is what the journal
// can save while the power lasts.
type budget struct {
	server *limited
	before time.Duration // time at the high rate, whose second half is measured
	after  time.Duration // time at the low rate, whose second half is measured
	rounds []budgetRound
}

// budgetRound is one cut of the rate.
type budgetRound struct {
	worst      float64 // uncommitted ÷ limit, the highest of all samples
	worstAt    float64 // seconds after the cut, negative before
	excess     int64   // bytes above the limit, the most of all samples
	over       int     // samples above the limit
	firstAt    float64 // seconds after the cut when the first of them was
	taken      int
	fast, slow float64 // what the clients wrote, bytes per second
	fastLimit  int64   // when the rate was cut
	slowLimit  int64   // at the end
	followed   float64 // seconds after the cut when the bound first was no more than the low rate can save; NaN: never
}

const (
	budgetVolume = 1 << 30
	budgetMemory = 768 * mib
	budgetHigh   = 200e6
	budgetLow    = 20e6
	budgetHoldUp = 2 * time.Second
	budgetEvery  = 50 * time.Millisecond
)

func newBudget(r *rig) *budget { return &budget{before: 6 * r.duration, after: 30 * r.duration} }

func (b *budget) title() string { return "Uncommitted against its bound" }

func (b *budget) about() string {
	return fmt.Sprintf("A file on the tmpfs behind nbdkit, whose rate is cut from %d to %d MB/s after %s, under batch16 randwrite 4k QD32 without a pause, `ack = ram`, "+
		"holdup %s, volume of %d MiB, memory of %d MiB. The status is read every %s: the highest `uncommitted_bytes` ÷ `uncommitted_limit_bytes` "+
		"of all samples, and what the clients wrote in the second half of either time (%s and %s). The bound follows when it is no more than the low rate "+
		"saves in that time.",
		int64(budgetHigh/1e6), int64(budgetLow/1e6), b.before, budgetHoldUp, budgetVolume/mib, budgetMemory/mib, budgetEvery, b.before, b.after)
}

// statusAt is one look at the status.
type statusAt struct {
	at time.Duration // since the load began
	volumeStatus
}

func (b *budget) round(ctx context.Context, r *rig) (err error) {
	if b.server == nil {
		if b.server, err = r.startLimited(ctx, "budget-nbd", budgetVolume, ringFor(budgetMemory), budgetHigh); err != nil {
			return err
		}
	}
	if err := b.server.setRate(budgetHigh); err != nil {
		return err
	}
	d, err := r.start(ctx, volume{
		backing: b.server.backing, size: budgetVolume, memory: budgetMemory, ack: "ram", staleness: time.Second, journal: "internal",
		more: []string{"--holdup", budgetHoldUp.String()},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.end()) }()
	// The stop need not wait for the low rate.
	defer func() { err = errors.Join(err, b.server.setRate(100*budgetHigh)) }()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	loaded := make(chan error, 1)
	go func() {
		_, err := d.runLoad(ctx, load.Config{Depth: 32, Batch: batchSize, BlockBytes: blockBytes}, b.before+b.after)
		loaded <- err
	}()
	looks, cut, err := b.watch(ctx, d)
	if err != nil {
		cancel()
	}
	if err := errors.Join(err, <-loaded); err != nil {
		return err
	}
	b.rounds = append(b.rounds, b.judge(looks, cut))
	return nil
}

// watch looks at the status all the time and cuts the rate.
func (b *budget) watch(ctx context.Context, d *daemon) (looks []statusAt, cut time.Duration, err error) {
	begun := time.Now()
	for next := time.Duration(0); next < b.before+b.after; next += budgetEvery {
		if err := sleep(ctx, time.Until(begun.Add(next))); err != nil {
			return nil, 0, err
		}
		if cut == 0 && next >= b.before {
			if err := b.server.setRate(budgetLow); err != nil {
				return nil, 0, err
			}
			cut = time.Since(begun)
		}
		at := time.Since(begun)
		s, err := d.ask.status(ctx)
		if err != nil {
			return nil, 0, err
		}
		looks = append(looks, statusAt{at, *s})
	}
	return looks, cut, nil
}

// judge finds in the looks what counts.
func (b *budget) judge(looks []statusAt, cut time.Duration) budgetRound {
	round := budgetRound{taken: len(looks), followed: math.NaN()}
	for _, l := range looks {
		after := (l.at - cut).Seconds()
		if ratio := float64(l.Uncommitted) / float64(max(l.UncommittedLimit, 1)); ratio > round.worst {
			round.worst, round.worstAt = ratio, after
		}
		if excess := l.Uncommitted - l.UncommittedLimit; excess > 0 {
			if round.over == 0 {
				round.firstAt = after
			}
			round.over++
			round.excess = max(round.excess, excess)
		}
		if l.at > cut && math.IsNaN(round.followed) && float64(l.UncommittedLimit) <= budgetLow*budgetHoldUp.Seconds() {
			round.followed = after
		}
		if l.at < cut {
			round.fastLimit = l.UncommittedLimit
		}
		round.slowLimit = l.UncommittedLimit
	}
	round.fast = writtenBetween(looks, cut/2, cut)
	end := looks[len(looks)-1].at
	round.slow = writtenBetween(looks, cut+(end-cut)/2, end)
	return round
}

// writtenBetween is how many bytes a second the clients wrote between two instants.
func writtenBetween(looks []statusAt, from, to time.Duration) float64 {
	var first, last *statusAt
	for i := range looks {
		l := &looks[i]
		if l.at >= from && first == nil {
			first = l
		}
		if l.at <= to {
			last = l
		}
	}
	if first == nil || last == nil || last.at <= first.at {
		return 0
	}
	return float64(last.Writes.Bytes-first.Writes.Bytes) / (last.at - first.at).Seconds()
}

func (b *budget) values(figure func(*budgetRound) float64) []float64 {
	out := make([]float64, len(b.rounds))
	for i := range b.rounds {
		out[i] = figure(&b.rounds[i])
	}
	return out
}

func (b *budget) table() *bench.Table {
	t := &bench.Table{Header: []string{"round", "highest ÷ bound", "s after the cut", "above the bound by MiB", "first s after the cut", "samples above", "of",
		"bound MiB before", "after", "follows after s", "clients MB/s before", "after"}}
	number := func(n int64) string { return bench.Number(float64(n) / mib) }
	for i, r := range b.rounds {
		above, first := "-", "-"
		if r.over > 0 {
			above, first = number(r.excess), seconds(r.firstAt)
		}
		t.Row(strconv.Itoa(i+1), bench.Number(r.worst), seconds(r.worstAt), above, first, strconv.Itoa(r.over), strconv.Itoa(r.taken),
			number(r.fastLimit), number(r.slowLimit), seconds(r.followed), bench.Number(r.fast/1e6), bench.Number(r.slow/1e6))
	}
	return t
}

func seconds(v float64) string {
	if math.IsNaN(v) {
		return "-"
	}
	return fmt.Sprintf("%.2f", v)
}

func (b *budget) worst() []float64 { return b.values(func(r *budgetRound) float64 { return r.worst }) }

func (b *budget) reached() []reached {
	return []reached{{what: "uncommitted ÷ its bound, at every sample", want: 1, atMost: true, always: true, figure: bench.SpreadOf(b.worst())}}
}

func (b *budget) samples() map[string][]float64 {
	return map[string][]float64{
		"worst": b.worst(),
		"fast":  b.values(func(r *budgetRound) float64 { return r.fast }),
		"slow":  b.values(func(r *budgetRound) float64 { return r.slow }),
		"above": b.values(func(r *budgetRound) float64 { return float64(r.excess) }),
	}
}
