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

// traffic is how many bytes go to the backing for the bytes that are written.
type traffic struct {
	volumeBytes, memory  int64
	dirtyBytes, hotBytes int64
	passEvery            time.Duration // from one rewriting of the hot set to the next: several commits see it
	watched              time.Duration
	ratios               []*amplification
	streams              []*stream
}

// amplification is what went to the backing ÷ the different bytes that were written, until all is home.
type amplification struct {
	name, journal string
	passes        int
	written       []float64
}

// stream is what goes to the backing while one block is rewritten for ever.
type stream struct {
	journal, ack string
	bytes        []float64 // per second, to the backing
	rewrites     []float64 // per second
	syncs        []float64 // per second
}

const hotPasses = 20

func newTraffic(r *rig) *traffic {
	t := &traffic{
		volumeBytes: 2 << 30, memory: 1 << 30, dirtyBytes: r.scaled(128 * mib), hotBytes: r.scaled(32 * mib),
		passEvery: r.duration / 5, watched: 4 * r.duration,
	}
	for _, journal := range []string{"internal", "none"} {
		t.ratios = append(t.ratios, &amplification{name: "random, each block once", journal: journal, passes: 1})
	}
	for _, journal := range []string{"internal", "none"} {
		t.ratios = append(t.ratios, &amplification{name: fmt.Sprintf("hot set rewritten %d times", hotPasses), journal: journal, passes: hotPasses})
	}
	for _, journal := range []string{"internal", "none"} {
		for _, ack := range []string{"ram", "disk"} {
			t.streams = append(t.streams, &stream{journal: journal, ack: ack})
		}
	}
	return t
}

func (t *traffic) title() string { return "Bytes to the backing" }

func (t *traffic) about() string {
	return fmt.Sprintf("`ack = ram`, staleness 1 s, on a file, 4 KiB each: all that the daemon wrote to the backing, the journal included, until all is home, ÷ "+
		"the different bytes that were written: %d MiB of %d MiB once; and %d MiB rewritten %d times in %s. The stream is one block that is "+
		"rewritten all the time by batch16 with 16 in flight, for %s: bytes that go to the backing in a second, and syncs.",
		t.dirtyBytes/mib, t.volumeBytes/mib, t.hotBytes/mib, hotPasses, hotPasses*t.passEvery, t.watched)
}

func (t *traffic) round(ctx context.Context, r *rig) error {
	for _, a := range t.ratios {
		if err := t.amplify(ctx, r, a); err != nil {
			return fmt.Errorf("%s, journal %s: %w", a.name, a.journal, err)
		}
	}
	for _, s := range t.streams {
		if err := t.rewrite(ctx, r, s); err != nil {
			return fmt.Errorf("journal %s, ack %s: %w", s.journal, s.ack, err)
		}
	}
	return nil
}

// volume has a file of its own for each kind of journal, which is made when it is first needed.
func (t *traffic) volume(r *rig, journal, ack string) volume {
	return volume{
		backing: "file:" + filepath.Join(r.disk, "traffic-"+journal), size: t.volumeBytes, memory: t.memory,
		ack: ack, staleness: time.Second, journal: journal,
	}
}

func (t *traffic) amplify(ctx context.Context, r *rig, a *amplification) (err error) {
	d, err := r.start(ctx, t.volume(r, a.journal, "ram"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.end()) }()
	before, err := d.ask.status(ctx)
	if err != nil {
		return err
	}
	bytes := t.dirtyBytes
	if a.passes > 1 {
		bytes = t.hotBytes
	}
	blocks := someBlocks(t.volumeBytes, bytes/blockBytes)
	begun := time.Now()
	for pass := range a.passes {
		if err := sleep(ctx, time.Until(begun.Add(time.Duration(pass)*t.passEvery))); err != nil {
			return err
		}
		if err := d.dirty(ctx, blocks); err != nil {
			return err
		}
	}
	if err := d.ask.flush(ctx); err != nil {
		return err
	}
	after, err := d.ask.status(ctx)
	if err != nil {
		return err
	}
	a.written = append(a.written, float64(after.Backing.Written-before.Backing.Written)/float64(bytes))
	return nil
}

func (t *traffic) rewrite(ctx context.Context, r *rig, s *stream) (err error) {
	d, err := r.start(ctx, t.volume(r, s.journal, s.ack))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.end()) }()
	before, err := d.ask.status(ctx)
	if err != nil {
		return err
	}
	result, err := d.runLoad(ctx, load.Config{Depth: batchSize, Batch: batchSize, BlockBytes: blockBytes, Order: []uint64{7}}, t.watched)
	if err != nil {
		return err
	}
	after, err := d.ask.status(ctx)
	if err != nil {
		return err
	}
	seconds := result.Elapsed.Seconds()
	s.bytes = append(s.bytes, float64(after.Backing.Written-before.Backing.Written)/seconds)
	s.syncs = append(s.syncs, float64(after.Backing.Syncs-before.Backing.Syncs)/seconds)
	s.rewrites = append(s.rewrites, result.IOPS())
	return nil
}

func (t *traffic) table() *bench.Table {
	table := &bench.Table{Header: []string{"what", "journal", "written ÷ dirtied", "KiB/s to the backing", "syncs/s", "rewrites/s", "bytes per rewrite"}}
	for _, a := range t.ratios {
		table.Row(a.name, a.journal, withRange(bench.SpreadOf(a.written)))
	}
	for _, s := range t.streams {
		table.Row("one block for ever, ack "+s.ack, s.journal, "", bench.Number(bench.SpreadOf(s.bytes).Median/kib), bench.Number(bench.SpreadOf(s.syncs).Median),
			bench.Count(bench.SpreadOf(s.rewrites).Median), bench.Number(bench.RatioOf(s.bytes, s.rewrites).Median))
	}
	return table
}

func (t *traffic) reached() []reached { return nil }

func (t *traffic) samples() map[string][]float64 {
	all := map[string][]float64{}
	for _, a := range t.ratios {
		all[a.name+", journal "+a.journal] = a.written
	}
	for _, s := range t.streams {
		all["one block, ack "+s.ack+", journal "+s.journal+", bytes per second"] = s.bytes
	}
	return all
}
