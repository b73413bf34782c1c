package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/ramshelf/ramshelf/bench"
	"github.com/ramshelf/ramshelf/bench/load"
)

// foreground is what clients notice of a large epoch that is committed and brought home at full speed.
type foreground struct {
	dirtyBytes int64
	idleTime   time.Duration
	prepared   bool
	rate       float64 // requests per second, a share of the most that one client gets
	most       []float64
	idle, busy latencies
	flushTime  []float64 // seconds
	flushed    []float64 // bytes that went to the backing ÷ dirty bytes
}

// latencies are percentiles in µs, a value per round.
type latencies struct{ p50, p99, p999, max, reads99, writes99 []float64 }

func (l *latencies) add(p *paced) {
	h := p.latency()
	for _, v := range []struct {
		to *[]float64
		d  time.Duration
	}{
		{&l.p50, h.Percentile(50)}, {&l.p99, h.Percentile(99)}, {&l.p999, h.Percentile(99.9)}, {&l.max, h.Max()},
		{&l.reads99, p.reads.Percentile(99)}, {&l.writes99, p.writes.Percentile(99)},
	} {
		*v.to = append(*v.to, microseconds(v.d))
	}
}

const (
	foregroundVolume = 1 << 30
	// foregroundMemory is such that neither the dirt nor what the client adds is anywhere near a bound.
	foregroundMemory = 4 << 30
	foregroundShare  = 0.2
	foregroundReads  = 70 // percent
)

func newForeground(r *rig) *foreground {
	return &foreground{dirtyBytes: r.scaled(300 * mib), idleTime: 2 * r.duration}
}

func (f *foreground) title() string { return "Latency during a flush" }

func (f *foreground) about() string {
	return fmt.Sprintf("Volume of %d MiB, all of it resident, on a file that was written in full before. A client sends batches of %d requests of 4 KiB, %d %% reads, at fixed instants, "+
		"%.0f %% of what it gets when it waits for answers (%s a second; the most: %s); each is counted from the instant at which it was due. Idle: nothing else, for %s. "+
		"Flush: from the moment at which %d MiB of random dirt begin to be committed and brought home until they are.",
		foregroundVolume/mib, batchSize, foregroundReads, 100*foregroundShare, bench.Count(f.rate), countRange(f.most), f.idleTime, f.dirtyBytes/mib)
}

func (f *foreground) round(ctx context.Context, r *rig) (err error) {
	path := filepath.Join(r.disk, "foreground")
	if !f.prepared {
		if _, err := filePlace("file", path, foregroundVolume, ringFor(foregroundMemory)); err != nil {
			return err
		}
		f.prepared = true
	}
	d, err := r.start(ctx, volume{
		backing: "file:" + path, size: foregroundVolume, memory: foregroundMemory, ack: "ram", staleness: time.Hour, journal: "internal",
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.end()) }()
	if f.rate == 0 {
		result, err := d.runLoad(ctx, load.Config{Depth: 64, Batch: batchSize, BlockBytes: blockBytes, ReadPercent: foregroundReads}, r.duration)
		if err != nil {
			return err
		}
		f.most = append(f.most, result.IOPS())
		f.rate = foregroundShare * result.IOPS()
	}
	if err := d.ask.flush(ctx); err != nil {
		return err
	}
	p, err := dialPaced(d.target().Address, "vol", f.rate, foregroundReads)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	if err := p.during(func() error { return sleep(ctx, f.idleTime) }); err != nil {
		return err
	}
	f.idle.add(p)
	// What the client wrote goes home first, so that the flush has as much to do in every round.
	if err := d.ask.flush(ctx); err != nil {
		return err
	}
	if err := d.dirty(ctx, someBlocks(foregroundVolume, f.dirtyBytes/blockBytes)); err != nil {
		return err
	}
	before, err := d.ask.status(ctx)
	if err != nil {
		return err
	}
	begun := time.Now()
	if err := p.during(func() error { return d.ask.flush(ctx) }); err != nil {
		return err
	}
	f.flushTime = append(f.flushTime, time.Since(begun).Seconds())
	after, err := d.ask.status(ctx)
	if err != nil {
		return err
	}
	f.flushed = append(f.flushed, float64(after.Backing.Written-before.Backing.Written)/float64(f.dirtyBytes))
	f.busy.add(p)
	return nil
}

// during sends while do runs.
func (p *paced) during(do func() error) error {
	done := make(chan struct{})
	ran := make(chan error, 1)
	go func() {
		ran <- do()
		close(done)
	}()
	err := p.run(done)
	return errors.Join(err, <-ran)
}

func (f *foreground) table() *bench.Table {
	t := &bench.Table{Header: []string{"µs", "idle", "flush", "flush ÷ idle"}}
	for _, row := range []struct {
		name       string
		idle, busy []float64
	}{
		{"p50", f.idle.p50, f.busy.p50}, {"p99", f.idle.p99, f.busy.p99}, {"p99 of reads", f.idle.reads99, f.busy.reads99},
		{"p99 of writes", f.idle.writes99, f.busy.writes99}, {"p99.9", f.idle.p999, f.busy.p999}, {"highest", f.idle.max, f.busy.max},
	} {
		t.Row(row.name, withRange(bench.SpreadOf(row.idle)), withRange(bench.SpreadOf(row.busy)), withRange(bench.RatioOf(row.busy, row.idle)))
	}
	t.Row("duration, s", bench.Number(f.idleTime.Seconds()), withRange(bench.SpreadOf(f.flushTime)))
	return t
}

func (f *foreground) reached() []reached {
	return []reached{{what: "p99 during a flush ÷ idle p99", want: 2, atMost: true, figure: bench.RatioOf(f.busy.p99, f.idle.p99)}}
}

func (f *foreground) samples() map[string][]float64 {
	return map[string][]float64{"idle p99": f.idle.p99, "busy p99": f.busy.p99, "flush seconds": f.flushTime, "written ÷ dirty": f.flushed}
}
