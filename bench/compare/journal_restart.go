package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/ramshelf/ramshelf/bench"
	"github.com/ramshelf/ramshelf/bench/load"
)

// restart is how long it takes from the start of the daemon to the first answered read, with a full journal: after the loss
// of the memory, when the journal is replayed, and after a kill, when the memory is there.
type restart struct {
	ringBytes, volumeBytes, memory int64
	prepared                       bool
	cold, warm                     restarted
}

// restarted is one way to lose the process.
type restarted struct {
	seconds []float64
	used    []float64 // bytes of the journal that were in use
	dirty   []float64 // bytes that were not home
	perGiB  []float64 // seconds ÷ GiB of the journal that were in use
}

const (
	// fullEnough is how much of the ring is in use when the daemon is killed; fillFor is how long that is waited for at most.
	fullEnough = 0.85
	fillFor    = 20 * time.Second
)

func newRestart(r *rig) *restart {
	return &restart{ringBytes: r.scaled(1 << 30), volumeBytes: r.scaled(2 << 30), memory: r.scaled(3 << 30)}
}

func (t *restart) title() string { return "Recovery" }

func (t *restart) about() string {
	return fmt.Sprintf("`ack = ram`, volume of %d MiB on a file, journal of %d MiB, memory of %d MiB; random 4 KiB writes until %.0f %% of the journal hold something that is not "+
		"known to be home, or for %s; then kill -9. Cold: the memory is gone, and the journal is scanned and replayed. Warm: the memory is there. Seconds from the start of the daemon to the "+
		"first answered read.", t.volumeBytes/mib, t.ringBytes/mib, t.memory/mib, 100*fullEnough, fillFor)
}

func (t *restart) volume(r *rig) volume {
	return volume{
		backing: "file:" + filepath.Join(r.disk, "restart"), size: t.volumeBytes, memory: t.memory, ack: "ram", staleness: time.Second, journal: "internal",
		more: []string{"--journal-size", strconv.FormatInt(t.ringBytes, 10)},
	}
}

func (t *restart) round(ctx context.Context, r *rig) error {
	if !t.prepared {
		if _, err := filePlace("file", filepath.Join(r.disk, "restart"), t.volumeBytes, t.ringBytes); err != nil {
			return err
		}
		t.prepared = true
	}
	for _, lose := range []bool{false, true} {
		if err := t.once(ctx, r, lose); err != nil {
			return err
		}
	}
	return nil
}

// once fills the journal, kills the daemon and starts it again, without its memory if lose is set.
func (t *restart) once(ctx context.Context, r *rig, lose bool) error {
	d, err := r.start(ctx, t.volume(r))
	if err != nil {
		return err
	}
	full, err := t.fill(ctx, d)
	d.kill()
	if err != nil {
		return errors.Join(err, os.RemoveAll(d.dir))
	}
	into := &t.warm
	if lose {
		into = &t.cold
		if err := os.RemoveAll(filepath.Join(d.dir, "shm")); err != nil {
			return fmt.Errorf("remove memory: %w", err)
		}
	}
	took, again, err := t.again(ctx, r, d)
	if err != nil {
		return err
	}
	into.seconds = append(into.seconds, took.Seconds())
	into.used = append(into.used, float64(full.Journal.Used))
	into.dirty = append(into.dirty, float64(full.Dirty))
	into.perGiB = append(into.perGiB, took.Seconds()/(float64(full.Journal.Used)/(1<<30)))
	return again.end()
}

// fill writes until the journal is full, and gives the last look at it.
func (t *restart) fill(ctx context.Context, d *daemon) (*volumeStatus, error) {
	loading, enough := context.WithCancel(ctx)
	defer enough()
	loaded := make(chan error, 1)
	go func() {
		_, err := d.runLoad(loading, load.Config{Depth: 64, Batch: batchSize, BlockBytes: blockBytes}, fillFor)
		loaded <- err
	}()
	var last *volumeStatus
	err := d.await(ctx, fillFor, func(s *volumeStatus) bool {
		last = s
		return float64(s.Journal.Used) >= fullEnough*float64(s.Journal.Bytes)
	})
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		err = nil // as full as it gets
	}
	select {
	case ended := <-loaded: // by itself: it broke, or time was up
		return last, errors.Join(err, ended)
	default:
	}
	enough()
	if ended := <-loaded; !errors.Is(ended, context.Canceled) {
		err = errors.Join(err, ended)
	}
	return last, err
}

// again starts the daemon where d was and takes the time to the first answered read.
func (t *restart) again(ctx context.Context, r *rig, d *daemon) (time.Duration, *daemon, error) {
	s := r.spec(t.volume(r))
	one := &running{spec: s, dir: d.dir, size: t.volumeBytes, done: make(chan struct{})}
	if err := one.prepare(); err != nil {
		return 0, nil, fmt.Errorf("prepare: %w", err)
	}
	begun := time.Now()
	if err := one.launch(); err != nil {
		return 0, nil, fmt.Errorf("start again: %w", err)
	}
	go func() {
		_, _ = one.proc.Wait()
		close(one.done)
	}()
	next := &daemon{one, newAsker(filepath.Join(one.dir, "control"))}
	for {
		err := readOne(ctx, one, rand.Uint64N(uint64(t.volumeBytes/blockBytes)))
		if err == nil {
			return time.Since(begun), next, nil
		}
		select {
		case <-one.done:
			return 0, nil, errors.New("the daemon ended" + one.lastWords())
		case <-ctx.Done():
			return 0, nil, errors.Join(context.Cause(ctx), next.end())
		case <-time.After(time.Millisecond):
		}
	}
}

// readOne reads one block.
func readOne(ctx context.Context, r *running, block uint64) error {
	l, err := load.Open(ctx, load.Config{Target: r.target(), Depth: 1, Batch: 1, BlockBytes: blockBytes, ReadPercent: 100, Order: []uint64{block}})
	if err != nil {
		return err
	}
	_, err = l.Pass(ctx, 1)
	return errors.Join(err, l.Close())
}

func (t *restart) table() *bench.Table {
	table := &bench.Table{Header: []string{"restart", "seconds", "journal in use MiB", "not home MiB", "seconds per GiB in use"}}
	median := func(values []float64) string { return bench.Number(bench.SpreadOf(values).Median / mib) }
	for _, row := range []struct {
		name string
		restarted
	}{{"cold: memory lost", t.cold}, {"warm: memory kept", t.warm}} {
		table.Row(row.name, withRange(bench.SpreadOf(row.seconds)), median(row.used), median(row.dirty), withRange(bench.SpreadOf(row.perGiB)))
	}
	return table
}

func (t *restart) reached() []reached { return nil }

func (t *restart) samples() map[string][]float64 {
	return map[string][]float64{
		"cold seconds": t.cold.seconds, "cold bytes in use": t.cold.used,
		"warm seconds": t.warm.seconds, "warm bytes in use": t.warm.used,
	}
}
