package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strconv"
	"time"

	"github.com/ramshelf/ramshelf/bench"
)

// group is how many writes a second are answered when each is committed, next to fio that syncs each write.
type group struct {
	duration time.Duration
	prepared bool
	ours     []*grouped
	synced   []*synced // as many as ours: they take turns
}

// grouped is ack = disk at one depth.
type grouped struct {
	depth    int
	iops     []float64
	p50, p99 []float64 // µs
	perSync  []float64 // writes ÷ syncs
}

// synced is a way to have fio sync each write.
type synced struct {
	name string
	args []string
	iops []float64
}

const (
	groupVolume = 512 * mib
	groupMemory = 768 * mib
)

func newGroup(r *rig) *group {
	g := &group{duration: 2 * r.duration}
	g.synced = []*synced{
		{name: "psync, QD 1", args: []string{"--ioengine=psync"}},
		{name: "libaio, QD 32", args: []string{"--ioengine=libaio", "--iodepth=32"}},
		{name: "psync, 32 threads", args: []string{"--ioengine=psync", "--thread", "--numjobs=32"}},
	}
	g.ours = []*grouped{{depth: 1}, {depth: 8}, {depth: 32}}
	return g
}

func (g *group) title() string { return "Group commit" }

func (g *group) about() string {
	return fmt.Sprintf("Random writes of 4 KiB in %d MiB for %s each. ramshelf: `ack = disk`, fio's nbd engine. fio alone: on a file of the same size beside it, direct, "+
		"with a fdatasync after every write. Both files were written in full before.", groupVolume/mib, g.duration)
}

func (g *group) round(ctx context.Context, r *rig) (err error) {
	if !g.prepared {
		if _, err := filePlace("file", filepath.Join(r.disk, "group"), groupVolume, ringFor(groupMemory)); err != nil {
			return err
		}
		if err := writeZeroes(filepath.Join(r.disk, "group-fio"), groupVolume); err != nil {
			return err
		}
		g.prepared = true
	}
	d, err := r.start(ctx, volume{
		backing: "file:" + filepath.Join(r.disk, "group"), size: groupVolume, memory: groupMemory, ack: "disk", staleness: time.Second, journal: "internal",
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.end()) }()
	for i, o := range g.ours {
		if err := g.synced[i].measure(ctx, r, g.duration); err != nil {
			return err
		}
		if err := o.measure(ctx, r, d, g.duration); err != nil {
			return err
		}
		// What was committed goes home before fio has the disk again.
		if err := d.ask.flush(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (o *grouped) measure(ctx context.Context, r *rig, d *daemon, duration time.Duration) error {
	before, err := d.ask.status(ctx)
	if err != nil {
		return err
	}
	job := bench.FioJob{Pattern: "randwrite", BlockBytes: blockBytes, Depth: o.depth, Duration: duration, Seed: rand.Uint64() >> 1}
	result, err := r.runFio(ctx, job.Args(d.target().URI())...)
	if err != nil {
		return err
	}
	after, err := d.ask.status(ctx)
	if err != nil {
		return err
	}
	o.iops = append(o.iops, result.IOPS())
	o.p50, o.p99 = append(o.p50, microseconds(result.P50)), append(o.p99, microseconds(result.P99))
	o.perSync = append(o.perSync, float64(result.Requests)/float64(max(after.Backing.Syncs-before.Backing.Syncs, 1)))
	return nil
}

// measure has fio write without ramshelf.
func (s *synced) measure(ctx context.Context, r *rig, duration time.Duration) error {
	result, err := r.runFio(ctx, append(fioAlone(s.args...), "--filename="+filepath.Join(r.disk, "group-fio"), "--size="+strconv.Itoa(groupVolume), "--direct=1",
		"--rw=randwrite", "--bs=4k", "--fdatasync=1", "--norandommap", "--randrepeat=0", "--time_based",
		fmt.Sprintf("--runtime=%dms", duration.Milliseconds()))...)
	if err != nil {
		return err
	}
	s.iops = append(s.iops, result.IOPS())
	return nil
}

func (g *group) table() *bench.Table {
	t := &bench.Table{Header: []string{"what", "IOPS", "p50 µs", "p99 µs", "writes per sync", "÷ " + g.synced[0].name, "÷ " + g.synced[1].name, "÷ " + g.synced[2].name}}
	for _, o := range g.ours {
		row := []string{fmt.Sprintf("ramshelf, QD %d", o.depth), countRange(o.iops), bench.Number(bench.SpreadOf(o.p50).Median), bench.Number(bench.SpreadOf(o.p99).Median),
			bench.Number(bench.SpreadOf(o.perSync).Median)}
		for _, s := range g.synced {
			row = append(row, withRange(bench.RatioOf(o.iops, s.iops)))
		}
		t.Row(row...)
	}
	for _, s := range g.synced {
		t.Row("fio, "+s.name, countRange(s.iops))
	}
	return t
}

// countRange is the median with its range as counts.
func countRange(values []float64) string {
	s := bench.SpreadOf(values)
	return fmt.Sprintf("%s (%s–%s)", bench.Count(s.Median), bench.Count(s.Min), bench.Count(s.Max))
}

func (g *group) reached() []reached {
	one, most := g.ours[0], g.ours[len(g.ours)-1]
	all := []reached{{what: "ack = disk, QD 1 ÷ fio, " + g.synced[0].name, want: 0.7, figure: bench.RatioOf(one.iops, g.synced[0].iops)}}
	for _, s := range g.synced[1:] {
		all = append(all, reached{what: "ack = disk, QD 32 ÷ fio, " + s.name, want: 4, figure: bench.RatioOf(most.iops, s.iops)})
	}
	return all
}

func (g *group) samples() map[string][]float64 {
	all := map[string][]float64{}
	for _, o := range g.ours {
		all[fmt.Sprintf("ramshelf QD %d IOPS", o.depth)] = o.iops
	}
	for _, s := range g.synced {
		all["fio "+s.name+" IOPS"] = s.iops
	}
	return all
}
