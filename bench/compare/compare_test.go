package main

import (
	"bytes"
	"context"
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/bench"
)

// fake is a comparison with made-up figures: ramshelf is twice as fast as nbdkit and 1.5 times as fast as
// qemu-nbd, the floor three times as fast as nbdkit.
func fake(j job) *comparison {
	c := &comparison{
		servers: []spec{{name: "ramshelf", kind: ours}, {name: "nbdkit", kind: peer}, {name: "qemu-nbd", kind: peer}, {name: "floor", kind: floor}},
		jobs:    []job{j},
		rounds:  3,
		samples: map[cell][]sample{},
		failed:  map[cell]error{},
	}
	for _, slow := range []float64{1, 2, 2} {
		for name, speed := range map[string]float64{"ramshelf": 6, "nbdkit": 3, "qemu-nbd": 4, "floor": 9} {
			at := cell{j.name, name}
			c.samples[at] = append(c.samples[at], sample{IOPS: 1e5 * speed / slow, ServerCPU: slow / speed, P50: 10, P99: 20, P999: 30})
		}
	}
	return c
}

func TestRatiosAreOfTheSameRound(t *testing.T) {
	c := fake(job{name: "j"})
	if got := c.ratio("j", "ramshelf", "nbdkit", iops); got != (bench.Spread{Median: 2, Min: 2, Max: 2}) {
		t.Errorf("ratio is %+v, want 2 in each round", got)
	}
	if c.best("j") != "qemu-nbd" || c.subject() != "ramshelf" {
		t.Errorf("best peer is %q, subject %q; want qemu-nbd, ramshelf", c.best("j"), c.subject())
	}
	c.servers = c.servers[1:]
	if c.subject() != "floor" {
		t.Errorf("subject without ramshelf is %q, want the floor", c.subject())
	}
}

func TestVerdicts(t *testing.T) {
	for _, c := range []struct {
		goal       goal
		speedBound float64
		speedHeld  bool
		cpuBound   float64
		cpuHeld    bool
	}{
		// The floor is 2.25 × the best peer and takes a third of nbdkit's processor time.
		{goal{speed: 1.4, cpu: 0.6}, 1.4, true, 0.6, true},
		{goal{speed: 2, cpu: 0.4}, 2, false, 0.4, false},
		{goal{speed: 3, cpu: 0.1}, 2.25 * 0.9, false, 1.0 / 3 / 0.9, false},
	} {
		got := fake(job{name: "j", goal: c.goal}).verdicts()
		if len(got) != 2 {
			t.Fatalf("goal %+v gives %d verdicts, want 2", c.goal, len(got))
		}
		if math.Abs(got[0].bound-c.speedBound) > 1e-9 || got[0].held() != c.speedHeld {
			t.Errorf("goal %+v: speed %+v, held %v", c.goal, got[0], got[0].held())
		}
		if math.Abs(got[1].bound-c.cpuBound) > 1e-9 || got[1].held() != c.cpuHeld {
			t.Errorf("goal %+v: processor time %+v, held %v", c.goal, got[1], got[1].held())
		}
	}
}

func TestNoVerdictWithoutMeasurement(t *testing.T) {
	c := fake(job{name: "j", goal: goal{speed: 1, cpu: 1}})
	delete(c.samples, cell{"j", "ramshelf"})
	if got := c.verdicts(); len(got) != 0 {
		t.Errorf("verdicts on nothing: %+v", got)
	}
}

func TestReport(t *testing.T) {
	c := fake(job{name: "j", goal: goal{speed: 1.4}})
	c.servers = append(c.servers, spec{name: "odd", kind: peer})
	c.failed[cell{"j", "odd"}] = errNotOffered
	r := &report{comparison: c, host: bench.Host{Processor: "a processor"}, when: time.Unix(0, 0), size: 1 << 30, duration: time.Second,
		absent:    []string{"gone-server"},
		footprint: []footprint{{server: "ramshelf", memoryBytes: 100 << 20, fileBytes: 101 << 20, process: bench.Memory{Anonymous: 7 << 20}}}}
	text, err := r.render(markdown)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"a processor", "1024 MiB", "gone-server", "### Goals", "1.50 (1.50–1.50)", " yes |", "### Memory", "1.00", "7.00", "– odd"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("%q is not in the report:\n%s", want, text)
		}
	}
	if strings.Contains(string(text), "not quiet") == (r.unrest() <= quietNoise) {
		t.Errorf("noise of %v %% and the report says\n%s", r.unrest(), text)
	}
	c.rounds = 1
	if r.goals() != nil || !math.IsNaN(r.unrest()) {
		t.Error("one round is judged")
	}
	if c.failures() != nil {
		t.Errorf("a job that a server does not offer counts as failure: %v", c.failures())
	}
	c.failed[cell{"j", "odd"}] = errors.New("broke")
	if err := c.failures(); err == nil || !strings.Contains(err.Error(), "j on odd: broke") {
		t.Errorf("failure is %v", err)
	}
}

func TestParseStatus(t *testing.T) {
	memory, resident, err := parseStatus([]byte(`{"schema":1,"volumes":[{"name":"v","memory_bytes":5,"resident_bytes":4,"x":{}}]}`))
	if err != nil || memory != 5 || resident != 4 {
		t.Errorf("got %d, %d, %v", memory, resident, err)
	}
	for _, bad := range []string{"", "{}", `{"volumes":[{}]}`, `{"volumes":[{"memory_bytes":1},{"memory_bytes":1}]}`} {
		if _, _, err := parseStatus([]byte(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestOptions(t *testing.T) {
	full := options{ramshelf: "x", sizeMiB: 512}.withDefaults()
	if full.doc != "docs/BENCHMARKS.md" || full.rounds != 5 || full.memoryMiB != 3584 || full.hotMiB != 128 {
		t.Errorf("full run has %+v", full)
	}
	for _, part := range []options{{ramshelf: "x", quick: true}, {ramshelf: ""}, {ramshelf: "x", jobs: "fio"}, {ramshelf: "x", rounds: 2}} {
		if got := part.withDefaults(); got.doc != "" {
			t.Errorf("%+v writes %s", part, got.doc)
		}
	}
	_, _, err := options{ramshelf: "/nonexistent"}.choose(t.Context())
	if err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("missing ramshelf gives %v", err)
	}
}

// The peers and the floor are started, filled, checked and measured for real, two jobs each.
func TestPeersForReal(t *testing.T) {
	if err := adoptOrphans(); err != nil {
		t.Fatal(err)
	}
	floorPath := filepath.Join(t.TempDir(), "floor")
	if out, err := exec.Command("go", "build", "-o", floorPath, "github.com/ramshelf/ramshelf/bench/floor").CombinedOutput(); err != nil {
		t.Fatalf("build floor: %v\n%s", err, out)
	}
	root, err := os.MkdirTemp("/dev/shm", "ramshelf-bench-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	c := &comparison{rounds: 1}
	for _, j := range jobs(50 * time.Millisecond) {
		if j.name == "fio randread 4k QD32" || j.name == "batch16 randread 4k QD32, structured" {
			c.jobs = append(c.jobs, j)
		}
	}
	c.servers = specs("", floorPath, 0, 0)
	r := &report{comparison: c, size: 16 << 20}
	if err := r.measure(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	if err := c.failures(); err != nil {
		t.Fatal(err)
	}
	for _, s := range c.servers {
		for _, j := range c.jobs {
			samples := c.samples[cell{j.name, s.name}]
			offered := (s.name != "nbd-server" || j.fio != nil) && (s.runs == nil || s.runs(j))
			if offered != (len(samples) == 1) {
				t.Errorf("%s on %s has %d samples", j.name, s.name, len(samples))
			}
			for _, got := range samples {
				if got.IOPS <= 0 || got.P50 <= 0 || got.ServerCPU < 0 || got.SettledCPU < got.ServerCPU {
					t.Errorf("%s on %s measured %+v", j.name, s.name, got)
				}
			}
		}
	}
}

func TestStartReportsAServerThatEnds(t *testing.T) {
	root := t.TempDir()
	s := spec{name: "broken", command: []string{"sh", "-c", "echo no such luck; exit 3"}}
	_, err := s.start(t.Context(), root, 1<<20)
	if err == nil || !strings.Contains(err.Error(), "process ended") || !strings.Contains(err.Error(), "no such luck") {
		t.Errorf("got %v", err)
	}
}

func TestInterruptEndsTheComparison(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c := fake(job{name: "j", batch: jobs(time.Second)[6].batch})
	servers := map[string]*running{}
	for _, s := range c.servers {
		servers[s.name] = &running{spec: s, dir: t.TempDir(), proc: &os.Process{Pid: os.Getpid()}}
	}
	if err := c.run(ctx, servers, &bytes.Buffer{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that it was canceled", err)
	}
}
