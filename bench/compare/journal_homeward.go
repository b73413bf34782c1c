package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/ramshelf/ramshelf/bench"
)

// homeward is how fast a large epoch of random dirt is saved in the journal, and then brought home, next to fio on the same
// backing: in one linear run, and with the same blocks in ascending order.
type homeward struct {
	dirtyBytes int64
	ways       []*way
}

// way is homeward on one backing. Rates are bytes of dirt per second, a value per round.
type way struct {
	place
	run, linear   []float64
	sweep, sorted []float64
	writeSize     []float64 // bytes of the sweep ÷ its writes
	noted         []float64 // what the daemon itself notes of the run's rate
}

const (
	homewardVolume = 2 << 30
	// homewardMemory is less than the volume, so that nothing is resident but dirt: no gap is bridged, and the sweep has as many
	// writes to do as fio.
	homewardMemory = 1 << 30
	// homewardDepth is how many writes a flusher keeps in flight.
	homewardDepth = 4
	homewardRate  = 100e6 // of the backing over NBD, bytes per second
	watchInterval = 3 * time.Millisecond
)

func newHomeward(r *rig) *homeward { return &homeward{dirtyBytes: r.scaled(150 * mib)} }

func (h *homeward) title() string { return "Journal run and home sweep" }

func (h *homeward) about() string {
	return fmt.Sprintf("Volume of %d MiB, memory of %d MiB, `ack = ram`; %d MiB of it are written once, in random order, while nothing is committed, then flushed. "+
		"The journal run ends when nothing is uncommitted any more, the sweep when the flush returns. fio writes past the page cache at the depth of "+
		"the flusher, %d, with a sync at its end: linear, as many bytes in order, 4 MiB each; sorted, the same blocks, ascending, 4 KiB each. "+
		"The file, and that behind nbdkit on the tmpfs, was written in full before. MB/s count dirty bytes.",
		homewardVolume/mib, homewardMemory/mib, h.dirtyBytes/mib, homewardDepth)
}

// prepare makes the backings.
func (h *homeward) prepare(ctx context.Context, r *rig) error {
	file, err := filePlace("file", filepath.Join(r.disk, "homeward"), homewardVolume, ringFor(homewardMemory))
	if err != nil {
		return err
	}
	nbd, err := r.startLimited(ctx, "homeward-nbd", homewardVolume, ringFor(homewardMemory), homewardRate)
	if err != nil {
		return err
	}
	h.ways = []*way{{place: file}, {place: nbd.place}}
	// The first start reads where the metadata are to lie. It is not measured and need not wait for the rate.
	if err := nbd.setRate(100 * homewardRate); err != nil {
		return err
	}
	for _, w := range h.ways {
		d, err := r.start(ctx, w.volume())
		if err != nil {
			return err
		}
		if err := d.end(); err != nil {
			return err
		}
	}
	return nbd.setRate(homewardRate)
}

func (h *homeward) round(ctx context.Context, r *rig) error {
	if h.ways == nil {
		if err := h.prepare(ctx, r); err != nil {
			return err
		}
	}
	for _, w := range h.ways {
		blocks := someBlocks(homewardVolume, h.dirtyBytes/blockBytes)
		turns := []func() error{
			func() error { return w.ours(ctx, r, blocks) },
			func() error { return w.fios(ctx, r, blocks) },
		}
		// Who begins changes from round to round.
		if len(w.run)%2 == 1 {
			turns[0], turns[1] = turns[1], turns[0]
		}
		for _, turn := range turns {
			if err := turn(); err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
		}
	}
	return nil
}

func (w *way) volume() volume {
	return volume{
		backing: w.backing, size: homewardVolume, memory: homewardMemory, ack: "ram", staleness: time.Hour, journal: "internal",
	}
}

// ours measures the journal run and the sweep. Volume and journal stay where they are from round to round.
func (w *way) ours(ctx context.Context, r *rig, blocks []uint64) (err error) {
	d, err := r.start(ctx, w.volume())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.end()) }()
	if err := d.dirty(ctx, blocks); err != nil {
		return err
	}
	before, err := d.ask.status(ctx)
	if err != nil {
		return err
	}
	if want := int64(len(blocks) * blockBytes); before.Uncommitted != want {
		return fmt.Errorf("%d bytes are uncommitted before the flush, want %d", before.Uncommitted, want)
	}
	begun := time.Now()
	flushed := make(chan error, 1)
	go func() { flushed <- d.ask.flush(ctx) }()
	var saved time.Duration
	var atSaved *volumeStatus
	for saved == 0 {
		s, err := d.ask.status(ctx)
		if err != nil {
			return errors.Join(err, <-flushed)
		}
		if s.Uncommitted == 0 {
			saved, atSaved = time.Since(begun), s
			break
		}
		time.Sleep(watchInterval)
	}
	if err := <-flushed; err != nil {
		return err
	}
	swept := time.Since(begun) - saved
	after, err := d.ask.status(ctx)
	if err != nil {
		return err
	}
	dirtyBytes := float64(before.Uncommitted)
	w.run = append(w.run, dirtyBytes/saved.Seconds())
	w.noted = append(w.noted, float64(after.Journal.Rate))
	w.sweep = append(w.sweep, dirtyBytes/swept.Seconds())
	w.writeSize = append(w.writeSize, float64(after.Backing.Written-atSaved.Backing.Written)/float64(max(after.Backing.Writes-atSaved.Backing.Writes, 1)))
	return nil
}

// fios has fio do the same on the volume while no daemon runs.
func (w *way) fios(ctx context.Context, r *rig, blocks []uint64) error {
	path := filepath.Join(r.root, "offsets")
	if err := os.WriteFile(path, ioLog(w.file, blocks), 0o600); err != nil {
		return fmt.Errorf("write offsets for fio: %w", err)
	}
	common := append(fioAlone("--iodepth="+strconv.Itoa(homewardDepth), "--end_fsync=1"), w.fio...)
	linear, err := r.runFio(ctx, slices.Concat(common, []string{"--rw=write", "--bs=4m", "--size=" + strconv.Itoa(len(blocks)*blockBytes)})...)
	if err != nil {
		return err
	}
	sorted, err := r.runFio(ctx, slices.Concat(common, []string{"--read_iolog=" + path})...)
	if err != nil {
		return err
	}
	// fio does not count the last writes in flight.
	if want := uint64(len(blocks) * blockBytes); sorted.Bytes < want-homewardDepth*blockBytes {
		return fmt.Errorf("fio wrote %d bytes from its list, want %d", sorted.Bytes, want)
	}
	w.linear = append(w.linear, rate(linear))
	w.sorted = append(w.sorted, rate(sorted))
	return nil
}

// rate is bytes per second.
func rate(r bench.FioResult) float64 { return float64(r.Bytes) / r.Elapsed.Seconds() }

func (h *homeward) table() *bench.Table {
	t := &bench.Table{Header: []string{"what", "backing", "ramshelf MB/s", "fio MB/s", "÷ fio", "KiB per write"}}
	for _, w := range h.ways {
		t.Row("journal run ÷ linear", w.name, mega(w.run), mega(w.linear), withRange(bench.RatioOf(w.run, w.linear)), "")
		t.Row("home sweep ÷ sorted", w.name, mega(w.sweep), mega(w.sorted), withRange(bench.RatioOf(w.sweep, w.sorted)),
			bench.Number(bench.SpreadOf(w.writeSize).Median/kib))
	}
	return t
}

// mega is the median with its range in units of 10⁶.
func mega(values []float64) string {
	scaled := make([]float64, len(values))
	for i, v := range values {
		scaled[i] = v / 1e6
	}
	return withRange(bench.SpreadOf(scaled))
}

func (h *homeward) reached() []reached {
	var all []reached
	for _, w := range h.ways {
		all = append(all,
			reached{what: "journal run ÷ fio linear, " + w.name, want: 0.9, figure: bench.RatioOf(w.run, w.linear)},
			reached{what: "home sweep ÷ fio sorted, " + w.name, want: 0.9, figure: bench.RatioOf(w.sweep, w.sorted)})
	}
	return all
}

func (h *homeward) samples() map[string][]float64 {
	all := map[string][]float64{}
	for _, w := range h.ways {
		for name, values := range map[string][]float64{"run": w.run, "linear": w.linear, "noted": w.noted, "sweep": w.sweep, "sorted": w.sorted} {
			all[w.name+" "+name] = values
		}
	}
	return all
}
