// Compare runs the same loads on ramshelf, on the other NBD servers that are installed and on the floor
// server, all on tmpfs or in memory and over unix sockets, and reports throughput, latency and the servers'
// processor time, with ramshelf's ratio to each.
//
// Usage, from the root of the repository:
//
//	go run ./bench/compare            # about ten minutes; writes its section of docs/BENCHMARKS.md
//	go run ./bench/compare -quick     # about a minute; writes nothing
//	go run ./bench/compare -flush     # the speed of the way home instead; writes its section
//	go run ./bench/compare -journal   # what the journal does and costs instead; writes its section
//
// The machine should have nothing else to do.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/bench"
)

// options are the flags.
type options struct {
	ramshelf, floor, dir string
	sizeMiB              int64
	memoryMiB, hotMiB    int64
	rounds               int
	duration             time.Duration
	servers, jobs        string
	doc, json            string
	quick                bool
	flush, journal       bool
	flushDir             string
}

func main() {
	var o options
	flag.StringVar(&o.ramshelf, "ramshelf", "bin/ramshelf", "`PATH` of ramshelf; empty compares the others alone")
	flag.StringVar(&o.floor, "floor", "", "`PATH` of the floor server (default: built from ./bench/floor)")
	flag.StringVar(&o.dir, "dir", "/dev/shm", "`DIR` on a tmpfs for disks, sockets and memory")
	flag.Int64Var(&o.sizeMiB, "size-mib", 512, "size of each device in MiB")
	flag.Int64Var(&o.memoryMiB, "memory-mib", 0, "ramshelf's memory in MiB (default 7 × size)")
	flag.Int64Var(&o.hotMiB, "hot-mib", 0, "memory of ramshelf's hot-set variant in MiB (default size ÷ 4)")
	flag.IntVar(&o.rounds, "rounds", 0, "rounds (default 5, of -journal 3, quick 1)")
	flag.DurationVar(&o.duration, "time", 0, "duration of each job in each round (default 1s, quick 400ms)")
	flag.StringVar(&o.servers, "servers", "", "compare only servers whose name matches `REGEXP`")
	flag.StringVar(&o.jobs, "jobs", "", "run only jobs whose name matches `REGEXP`")
	flag.StringVar(&o.doc, "doc", "", "`FILE` whose section is replaced (default docs/BENCHMARKS.md for a full run)")
	flag.StringVar(&o.json, "json", "", "`FILE` for all samples as JSON")
	flag.BoolVar(&o.quick, "quick", false, "about a minute instead of ten; nothing is written by default")
	flag.BoolVar(&o.flush, "flush", false, "measure how fast dirty memory goes home instead, and write that section")
	flag.BoolVar(&o.journal, "journal", false, "measure what the journal does and costs instead, and write that section; -jobs chooses parts")
	flag.StringVar(&o.flushDir, "flush-dir", "/var/tmp", "`DIR` on the disk that -flush and -journal write to")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	measure := compare
	switch {
	case o.flush && o.journal:
		fmt.Fprintln(os.Stderr, "compare: give -flush or -journal, not both")
		os.Exit(2)
	case o.flush:
		measure = compareFlush
	case o.journal:
		measure = compareJournal
	}
	if err := measure(ctx, o.withDefaults()); err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(1)
	}
}

func (o options) withDefaults() options {
	full := !o.quick && o.ramshelf != "" && o.servers == "" && o.jobs == "" && o.rounds == 0 && o.duration == 0
	if full && o.doc == "" {
		o.doc = "docs/BENCHMARKS.md"
	}
	rounds, duration := 5, time.Second
	if o.journal {
		rounds = 3
	}
	if o.quick {
		rounds, duration = 1, 400*time.Millisecond
	}
	if o.rounds == 0 {
		o.rounds = rounds
	}
	if o.duration == 0 {
		o.duration = duration
	}
	if o.memoryMiB == 0 {
		// Writes are paced at the speed of home once an epoch and the requests in flight have a sixth of the memory: that
		// is the whole device and something beside it.
		o.memoryMiB = o.sizeMiB * 7
	}
	if o.hotMiB == 0 {
		o.hotMiB = o.sizeMiB / 4
	}
	return o
}

// compare does everything: choose, start, fill, measure, report.
func compare(ctx context.Context, o options) (err error) {
	root, err := os.MkdirTemp(o.dir, "ramshelf-bench-")
	if err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	if err := adoptOrphans(); err != nil {
		return err
	}
	c, absent, err := o.choose(ctx)
	if err != nil {
		return err
	}
	size := o.sizeMiB << 20
	if err := checkRoom(root, size*int64(2*len(c.servers))); err != nil {
		return err
	}
	r := &report{
		comparison: c, host: bench.ThisHost(), loadAverage: bench.LoadAverage(), when: time.Now(),
		size: size, duration: o.duration, absent: absent,
	}
	if err := r.measure(ctx, root); err != nil {
		return err
	}
	return errors.Join(r.publish(o), c.failures())
}

// choose gives the comparison that the flags ask for, and the names of servers that are not installed.
func (o options) choose(ctx context.Context) (c *comparison, absent []string, err error) {
	serverName, err := regexp.Compile(o.servers)
	if err != nil {
		return nil, nil, fmt.Errorf("-servers: %w", err)
	}
	jobName, err := regexp.Compile(o.jobs)
	if err != nil {
		return nil, nil, fmt.Errorf("-jobs: %w", err)
	}
	if err := o.checkPrograms(); err != nil {
		return nil, nil, err
	}
	floorPath, err := o.floorPath(ctx)
	if err != nil {
		return nil, nil, err
	}
	c = &comparison{rounds: o.rounds}
	for _, s := range specs(o.ramshelf, floorPath, o.memoryMiB<<20, o.hotMiB<<20) {
		if !serverName.MatchString(s.name) {
			continue
		}
		if _, err := exec.LookPath(s.command[0]); err != nil {
			absent = append(absent, s.name)
			continue
		}
		c.servers = append(c.servers, s)
	}
	for _, j := range jobs(o.duration) {
		if jobName.MatchString(j.name) {
			c.jobs = append(c.jobs, j)
		}
	}
	if len(c.servers) == 0 || len(c.jobs) == 0 {
		return nil, nil, fmt.Errorf("-servers %q and -jobs %q leave %d servers and %d jobs", o.servers, o.jobs, len(c.servers), len(c.jobs))
	}
	return c, absent, nil
}

func (o options) checkPrograms() error {
	if o.ramshelf != "" {
		if _, err := os.Stat(o.ramshelf); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("no program at %s; run make build, or give -ramshelf '' to compare the others alone", o.ramshelf)
		}
	}
	if _, err := exec.LookPath("fio"); err != nil {
		return fmt.Errorf("%w; install fio, with its nbd engine", err)
	}
	return nil
}

// floorPath is the floor server, built if none was given.
func (o options) floorPath(ctx context.Context) (string, error) {
	if o.floor != "" {
		return o.floor, nil
	}
	path := filepath.Join(os.TempDir(), fmt.Sprintf("ramshelf-floor-%d", os.Getuid()))
	cmd := exec.CommandContext(ctx, "go", "build", "-o", path, "github.com/ramshelf/ramshelf/bench/floor")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build floor: %w: %s", err, out)
	}
	return path, nil
}

// checkRoom refuses to begin where the devices would not fit.
func checkRoom(dir string, needBytes int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if st.Type != unix.TMPFS_MAGIC {
		return fmt.Errorf("%s is not on a tmpfs; name one with -dir", dir)
	}
	if free := int64(st.Bavail) * st.Bsize; free < needBytes {
		return fmt.Errorf("%s has %d MiB free, the devices want about %d; make them smaller with -size-mib", dir, free>>20, needBytes>>20)
	}
	return nil
}

// measure starts the servers, fills their devices, runs the comparison and stops them.
func (r *report) measure(ctx context.Context, root string) error {
	started := map[string]*running{}
	defer func() {
		for _, s := range started {
			s.stop()
		}
	}()
	for _, s := range r.comparison.servers {
		fmt.Fprintf(os.Stderr, "        start and fill %s\n", s.name)
		one, err := s.start(ctx, root, r.size)
		if err != nil {
			return err
		}
		started[s.name] = one
		if err := prefill(ctx, one); err != nil {
			return fmt.Errorf("fill %s: %w%s", s.name, err, one.lastWords())
		}
	}
	if err := r.run(ctx, started, os.Stderr); err != nil {
		return err
	}
	for _, s := range r.comparison.servers {
		if s.kind != ours && s.kind != hot {
			continue
		}
		f, err := measureFootprint(ctx, started[s.name])
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		r.footprint = append(r.footprint, f)
	}
	return nil
}

// publish prints the report and writes it where the flags say. A comparison with failures is printed only.
func (r *report) publish(o options) error {
	text, err := r.render(terminal)
	if err != nil {
		return err
	}
	if _, err := os.Stdout.Write(text); err != nil {
		return fmt.Errorf("print report: %w", err)
	}
	if r.failures() != nil {
		return nil
	}
	if o.json != "" {
		if err := r.writeJSON(o.json); err != nil {
			return err
		}
	}
	if o.doc == "" {
		return nil
	}
	body, err := r.render(markdown)
	if err != nil {
		return err
	}
	return bench.WriteSection(o.doc, "compare", body)
}

// writeJSON writes every sample of every cell.
func (r *report) writeJSON(path string) error {
	all := map[string]map[string][]sample{}
	for at, samples := range r.samples {
		if all[at.job] == nil {
			all[at.job] = map[string][]sample{}
		}
		all[at.job][at.server] = samples
	}
	text, err := json.MarshalIndent(map[string]any{"host": r.host, "time": r.when, "jobs": all}, "", "\t")
	if err != nil {
		return fmt.Errorf("encode samples: %w", err)
	}
	if err := os.WriteFile(path, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("write samples: %w", err)
	}
	return nil
}
