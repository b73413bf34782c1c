package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/ramshelf/ramshelf/bench"
)

// cell is one job on one server.
type cell struct{ job, server string }

// comparison runs every job on every server, in rounds.
type comparison struct {
	servers []spec
	jobs    []job
	rounds  int

	samples map[cell][]sample // one a round, in order
	failed  map[cell]error    // cells that have no result
}

// run measures all rounds. Within a job the servers take their turns right after each other, each round in
// another order, so that whatever else happens on the machine meets all of them alike.
func (c *comparison) run(ctx context.Context, running map[string]*running, progress io.Writer) error {
	c.samples, c.failed = map[cell][]sample{}, map[cell]error{}
	begun := time.Now()
	for round := range c.rounds {
		for i, j := range c.jobs {
			fmt.Fprintf(progress, "%6s  round %d of %d  %s\n", time.Since(begun).Round(time.Second), round+1, c.rounds, j.name)
			for k := range c.servers {
				s := c.servers[(k+i+round)%len(c.servers)]
				if err := c.turn(ctx, running[s.name], j); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// turn is one measurement. A cell that failed is not tried again; only the end of ctx ends the comparison.
func (c *comparison) turn(ctx context.Context, r *running, j job) error {
	at := cell{j.name, r.name}
	if c.failed[at] != nil || r.runs != nil && !r.runs(j) {
		return nil
	}
	s, err := measure(ctx, r, j, rand.Uint64()>>1)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		c.failed[at] = err
		delete(c.samples, at)
	default:
		c.samples[at] = append(c.samples[at], s)
	}
	return nil
}

// failures joins what went wrong, cells that a server does not offer left out.
func (c *comparison) failures() error {
	var errs []error
	for _, j := range c.jobs {
		for _, s := range c.servers {
			if err := c.failed[cell{j.name, s.name}]; err != nil && !errors.Is(err, errNotOffered) {
				errs = append(errs, fmt.Errorf("%s on %s: %w", j.name, s.name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// values gives one figure of all rounds of a cell.
func (c *comparison) values(job, server string, figure func(sample) float64) []float64 {
	samples := c.samples[cell{job, server}]
	out := make([]float64, len(samples))
	for i, s := range samples {
		out[i] = figure(s)
	}
	return out
}

func iops(s sample) float64      { return s.IOPS }
func serverCPU(s sample) float64 { return s.ServerCPU }

// ratio is a ÷ b in one figure of one job, round by round.
func (c *comparison) ratio(job, a, b string, figure func(sample) float64) bench.Spread {
	return bench.RatioOf(c.values(job, a, figure), c.values(job, b, figure))
}

// best is the peer with the highest median in a job, "" when none has a result.
func (c *comparison) best(job string) string {
	var name string
	var highest float64
	for _, s := range c.servers {
		if s.kind != peer {
			continue
		}
		if m := bench.SpreadOf(c.values(job, s.name, iops)).Median; m > highest {
			name, highest = s.name, m
		}
	}
	return name
}

// only gives the name of the first server of a kind, "" when there is none.
func (c *comparison) only(k kind) string {
	for _, s := range c.servers {
		if s.kind == k {
			return s.name
		}
	}
	return ""
}

// subject is the server whose ratios are reported: ours, and the floor in a comparison of the peers alone.
func (c *comparison) subject() string {
	if name := c.only(ours); name != "" {
		return name
	}
	return c.only(floor)
}
