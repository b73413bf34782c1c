package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"time"

	"github.com/ramshelf/ramshelf/bench"
	"github.com/ramshelf/ramshelf/bench/load"
)

// cost is what the journal takes off the speed of writes that do not wait for it.
type cost struct {
	job      job
	variants []*variant
}

// variant is a kind of journal.
type variant struct {
	journal  string
	prepared bool
	samples  []sample
}

const (
	costVolume = 512 * mib
	// costMemory is such that an epoch may hold all of the volume before writes are paced.
	costMemory = 6 * costVolume
)

func newCost(r *rig) *cost {
	return &cost{
		job: job{name: "batch16 randwrite 4k QD32", duration: 3 * r.duration,
			batch: &load.Config{Depth: 32, Batch: batchSize, BlockBytes: blockBytes}},
		variants: []*variant{{journal: "none"}, {journal: "internal"}},
	}
}

func (c *cost) title() string { return "Cost of the journal" }

func (c *cost) about() string {
	return fmt.Sprintf("%s for %s, `ack = ram`, staleness 1 s, volume of %d MiB, memory of %d MiB, the backing a file on the tmpfs that was written in full before: the cost is "+
		"processor time, and no disk's. CPU: the server's processor time per million requests, while the job ran and until everything is home.",
		c.job.name, c.job.duration, costVolume/mib, costMemory/mib)
}

func (c *cost) round(ctx context.Context, r *rig) error {
	first := len(c.variants[0].samples) // who begins changes from round to round
	for i := range c.variants {
		v := c.variants[(first+i)%len(c.variants)]
		if err := v.measure(ctx, r, c.job); err != nil {
			return fmt.Errorf("journal %s: %w", v.journal, err)
		}
	}
	return nil
}

func (v *variant) measure(ctx context.Context, r *rig, j job) (err error) {
	path := filepath.Join(r.root, "cost-"+v.journal)
	if !v.prepared {
		ring := int64(ringFor(costMemory))
		if v.journal == "none" {
			ring = 0
		}
		if _, err := filePlace("file", path, costVolume, ring); err != nil {
			return err
		}
		v.prepared = true
	}
	d, err := r.start(ctx, volume{
		backing: "file:" + path, size: costVolume, memory: costMemory, ack: "ram", staleness: time.Second, journal: v.journal,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.end()) }()
	if err := prefill(ctx, d.running); err != nil {
		return err
	}
	s, err := measure(ctx, d.running, j, rand.Uint64()>>1)
	if err != nil {
		return err
	}
	v.samples = append(v.samples, s)
	return nil
}

func (v *variant) values(figure func(sample) float64) []float64 {
	out := make([]float64, len(v.samples))
	for i, s := range v.samples {
		out[i] = figure(s)
	}
	return out
}

func (c *cost) table() *bench.Table {
	t := &bench.Table{Header: []string{"journal", "IOPS", "÷ none", "p99 µs", "CPU s/M", "÷ none", "CPU s/M settled", "÷ none"}}
	settled := func(s sample) float64 { return s.SettledCPU }
	without := c.variants[0]
	for _, v := range c.variants {
		row := []string{v.journal, countRange(v.values(iops)), "", bench.Number(bench.SpreadOf(v.values(func(s sample) float64 { return s.P99 })).Median)}
		for _, figure := range []func(sample) float64{serverCPU, settled} {
			ratio := ""
			if v != without {
				ratio = withRange(bench.RatioOf(v.values(figure), without.values(figure)))
			}
			row = append(row, bench.Number(bench.SpreadOf(v.values(figure)).Median), ratio)
		}
		if v != without {
			row[2] = withRange(bench.RatioOf(v.values(iops), without.values(iops)))
		}
		t.Row(row...)
	}
	t.Row("internal, with the intent bitmap", "lands later")
	return t
}

func (c *cost) reached() []reached { return nil }

func (c *cost) samples() map[string][]float64 {
	all := map[string][]float64{}
	for _, v := range c.variants {
		all["journal "+v.journal+" IOPS"] = v.values(iops)
		all["journal "+v.journal+" CPU s/M"] = v.values(serverCPU)
	}
	return all
}
