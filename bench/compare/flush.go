package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/ramshelf/ramshelf/bench"
	"github.com/ramshelf/ramshelf/bench/load"
)

const (
	// flushDepth is how many requests fio keeps in flight on the disk.
	flushDepth = 32
	blockBytes = 4 * kib
)

// flushShares are the shares of dirty blocks that are measured, in percent.
var flushShares = []int{100, 50}

// flushCase is what one share of dirty blocks gave, in bytes of dirt per second, a value per round.
type flushCase struct {
	percent   int
	sorted    []float64 // fio writing the same blocks in ascending order, 4 KiB each
	home      []float64 // ramshelf
	writeSize []float64 // bytes that ramshelf wrote ÷ its writes
	surplus   []float64 // bytes that ramshelf wrote ÷ dirty bytes
}

// flushing is a comparison of the way home with what fio reaches on the same file.
type flushing struct {
	options
	root, disk string // on tmpfs, and the file on the disk
	size       int64
	linear     []float64 // fio writing all of the file in order, 1 MiB each
	cases      []*flushCase
}

// compareFlush measures how fast a volume that was written in random order goes home, next to fio on the same
// file: in one linear run, and with the same blocks in ascending order.
func compareFlush(ctx context.Context, o options) (err error) {
	if err := o.checkPrograms(); err != nil {
		return err
	}
	if o.ramshelf == "" {
		return errors.New("-flush measures ramshelf; name it with -ramshelf")
	}
	root, err := os.MkdirTemp(o.dir, "ramshelf-bench-")
	if err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	diskDir, err := os.MkdirTemp(o.flushDir, "ramshelf-bench-")
	if err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(diskDir)) }()
	f := &flushing{options: o, root: root, disk: filepath.Join(diskDir, "disk"), size: o.sizeMiB << 20}
	if err := checkRoom(root, 7*f.size); err != nil {
		return err
	}
	for _, percent := range flushShares {
		f.cases = append(f.cases, &flushCase{percent: percent})
	}
	if err := f.run(ctx); err != nil {
		return err
	}
	return f.publish()
}

// run measures all rounds. The first way home is not counted: it makes the file.
func (f *flushing) run(ctx context.Context) error {
	if err := f.home(ctx, &flushCase{}, f.blocks(100)); err != nil {
		return err
	}
	for round := range f.rounds {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", round+1, f.rounds)
		rate, err := f.fio(ctx, "--rw=write", "--bs=1m", "--size="+strconv.FormatInt(f.size, 10))
		if err != nil {
			return err
		}
		f.linear = append(f.linear, rate)
		for _, c := range f.cases {
			blocks := f.blocks(c.percent)
			if err := f.sorted(ctx, c, blocks); err != nil {
				return err
			}
			if err := f.home(ctx, c, blocks); err != nil {
				return err
			}
		}
	}
	return nil
}

// blocks chooses percent of all blocks by chance, in random order.
func (f *flushing) blocks(percent int) []uint64 {
	all := make([]uint64, f.size/blockBytes)
	for i, p := range rand.Perm(len(all)) {
		all[i] = uint64(p)
	}
	return all[:len(all)*percent/100]
}

// sorted has fio write blocks in ascending order.
func (f *flushing) sorted(ctx context.Context, c *flushCase, blocks []uint64) error {
	path := filepath.Join(f.root, "iolog")
	if err := os.WriteFile(path, ioLog(f.disk, blocks), 0o600); err != nil {
		return fmt.Errorf("write offsets for fio: %w", err)
	}
	rate, err := f.fio(ctx, "--read_iolog="+path)
	c.sorted = append(c.sorted, rate)
	return err
}

// ioLog lists writes of blocks in ascending order in fio's words (fio(1), "TRACE FILE FORMAT", version 2).
func ioLog(path string, blocks []uint64) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "fio version 2 iolog\n%s add\n%s open\n", path, path)
	for _, n := range slices.Sorted(slices.Values(blocks)) {
		fmt.Fprintf(&b, "%s write %d %d\n", path, n*blockBytes, blockBytes)
	}
	fmt.Fprintf(&b, "%s close\n", path)
	return b.Bytes()
}

// fio writes to the disk, past the page cache and with a sync at the end, and gives bytes per second.
func (f *flushing) fio(ctx context.Context, args ...string) (float64, error) {
	args = append([]string{"--name=bench", "--ioengine=libaio", "--direct=1", "--iodepth=" + strconv.Itoa(flushDepth),
		"--filename=" + f.disk, "--end_fsync=1", "--output-format=json"}, args...)
	out, err := exec.CommandContext(ctx, "fio", args...).Output()
	if err != nil {
		return 0, fmt.Errorf("run fio: %w: %s", err, out)
	}
	r, err := bench.ParseFio(out)
	if err != nil {
		return 0, err
	}
	return float64(r.Bytes) / r.Elapsed.Seconds(), nil
}

// home starts ramshelf on the disk, writes blocks in the order given and takes the time until they are home.
func (f *flushing) home(ctx context.Context, c *flushCase, blocks []uint64) (err error) {
	// Memory and the bound of dirt are so large that nothing goes home before it is asked for.
	s := ramshelfSpec("ramshelf", ours, f.ramshelf, 6*f.size, "")
	s.command = append(s.command, "--max-dirty", strconv.FormatInt(2*f.size, 10))
	for i, word := range s.command {
		switch word {
		case "file:DIR/disk":
			s.command[i] = "file:" + f.disk
		case "1s":
			s.command[i] = "1h"
		}
	}
	r, err := s.start(ctx, f.root, f.size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(r.dir)) }()
	defer r.stop()
	if err := dirty(ctx, r, blocks); err != nil {
		return err
	}
	before, err := written(ctx, r)
	if err != nil {
		return err
	}
	begun := time.Now()
	if err := r.rest(ctx); err != nil {
		return err
	}
	elapsed := time.Since(begun)
	after, err := written(ctx, r)
	if err != nil {
		return err
	}
	dirtyBytes := float64(len(blocks) * blockBytes)
	c.home = append(c.home, dirtyBytes/elapsed.Seconds())
	c.writeSize = append(c.writeSize, float64(after.Bytes-before.Bytes)/float64(max(after.Writes-before.Writes, 1)))
	c.surplus = append(c.surplus, float64(after.Bytes-before.Bytes)/dirtyBytes)
	return nil
}

// dirty writes blocks once.
func dirty(ctx context.Context, r *running, blocks []uint64) error {
	l, err := load.Open(ctx, load.Config{Target: r.target(), Depth: 64, Batch: batchSize, BlockBytes: blockBytes, Order: blocks, Stamp: true})
	if err != nil {
		return err
	}
	_, err = l.Pass(ctx, uint64(len(blocks)))
	return errors.Join(err, l.Close())
}

// backingTraffic is what went to a backing.
type backingTraffic struct {
	Bytes  int64 `json:"written_bytes"`
	Writes int64 `json:"writes"`
}

// written asks a ramshelf what it has written to its backing so far.
func written(ctx context.Context, r *running) (backingTraffic, error) {
	out, err := exec.CommandContext(ctx, r.command[0], "status", "--json", "--control", filepath.Join(r.dir, "control")).Output()
	if err != nil {
		return backingTraffic{}, fmt.Errorf("read status: %w", err)
	}
	var status struct {
		Volumes []struct {
			Backing backingTraffic `json:"backing"`
		} `json:"volumes"`
	}
	if err := json.Unmarshal(out, &status); err != nil {
		return backingTraffic{}, fmt.Errorf("parse status: %w", err)
	}
	if len(status.Volumes) != 1 {
		return backingTraffic{}, fmt.Errorf("parse status: %d volumes, want 1", len(status.Volumes))
	}
	return status.Volumes[0].Backing, nil
}

// publish prints the result and writes its section.
func (f *flushing) publish() error {
	text, err := f.render(terminal)
	if err != nil {
		return err
	}
	if _, err := os.Stdout.Write(text); err != nil {
		return fmt.Errorf("print report: %w", err)
	}
	if f.doc == "" {
		return nil
	}
	body, err := f.render(markdown)
	if err != nil {
		return err
	}
	return bench.WriteSection(f.doc, "flush", body)
}

func (f *flushing) render(st style) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s; %s.\n\n", time.Now().UTC().Format("2006-01-02 15:04 UTC"), bench.ThisHost())
	fmt.Fprintf(&b, "Volume of %d MiB on a file on disk, written once in random order while nothing goes home, then flushed; %d rounds in turn with fio "+
		"on the same file (libaio, direct, depth %d, sync at the end): all of it in order, 1 MiB each (linear), and the same blocks in ascending "+
		"order, 4 KiB each (sorted). MB/s count dirty bytes.\n\n", f.size>>20, f.rounds, flushDepth)
	t := &bench.Table{Header: []string{"dirty %", "linear MB/s", "sorted MB/s", "ramshelf MB/s", "÷ linear", "÷ sorted", "KiB per write", "written ÷ dirty"}}
	mega := func(values []float64) string { return bench.Number(bench.SpreadOf(values).Median / 1e6) }
	for _, c := range f.cases {
		t.Row(strconv.Itoa(c.percent), mega(f.linear), mega(c.sorted), mega(c.home),
			withRange(bench.RatioOf(c.home, f.linear)), withRange(bench.RatioOf(c.home, c.sorted)),
			bench.Number(bench.SpreadOf(c.writeSize).Median/kib), bench.Number(bench.SpreadOf(c.surplus).Median))
	}
	err := st.table(t, &b)
	return b.Bytes(), err
}
