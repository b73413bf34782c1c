package main

import (
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/bench"
)

func TestReached(t *testing.T) {
	spread := bench.Spread{Median: 2, Min: 1, Max: 3}
	for _, c := range []struct {
		r    reached
		got  float64
		held bool
	}{
		{reached{want: 2, figure: spread}, 2, true},
		{reached{want: 2.1, figure: spread}, 2, false},
		{reached{want: 2, atMost: true, figure: spread}, 2, true},
		{reached{want: 2, atMost: true, always: true, figure: spread}, 3, false},
		{reached{want: 3, atMost: true, always: true, figure: spread}, 3, true},
		{reached{want: 1.5, always: true, figure: spread}, 1, false},
	} {
		if c.r.got() != c.got || c.r.held() != c.held {
			t.Errorf("%+v: got %v, held %v; want %v, %v", c.r, c.r.got(), c.r.held(), c.got, c.held)
		}
	}
}

func TestBudgetJudgesEverySample(t *testing.T) {
	look := func(at time.Duration, uncommitted, limit, written int64) statusAt {
		l := statusAt{at: at}
		l.Uncommitted, l.UncommittedLimit, l.Writes.Bytes = uncommitted*mib, limit*mib, written
		return l
	}
	b := newBudget(&rig{})
	got := b.judge([]statusAt{
		look(0, 0, 100, 0), look(1*time.Second, 90, 100, 100e6), look(2*time.Second, 100, 100, 200e6),
		look(3*time.Second, 100, 80, 230e6), look(4*time.Second, 60, 38, 230e6), look(5*time.Second, 30, 38, 230e6), look(6*time.Second, 20, 38, 250e6),
	}, 2*time.Second+1)
	if math.Abs(got.worst-60.0/38) > 1e-9 || math.Abs(got.worstAt-2) > 1e-6 || got.excess != 22*mib || got.over != 2 || math.Abs(got.firstAt-1) > 1e-6 {
		t.Errorf("judged %+v", got)
	}
	if math.Abs(got.followed-2) > 1e-6 || got.fastLimit != 100*mib || got.slowLimit != 38*mib || got.taken != 7 {
		t.Errorf("bounds: %+v", got)
	}
	if math.Abs(got.fast-100e6) > 1 || math.Abs(got.slow-10e6) > 1 {
		t.Errorf("clients wrote %v and %v bytes a second, want 100e6 and 10e6", got.fast, got.slow)
	}
	b.rounds = []budgetRound{got}
	if r := b.reached()[0]; r.held() {
		t.Errorf("%+v counts as held", r)
	}
}

func TestJournalReport(t *testing.T) {
	r := &rig{root: "/dev/shm/x", disk: "/var/tmp/y", options: options{rounds: 3, duration: time.Second}}
	r.part = "a part"
	for _, seed := range []string{"1", "2"} {
		r.note([]string{"fio", "--randseed=" + seed, "--filename=/var/tmp/y/f", "/dev/shm/x/g"})
	}
	g := &journaling{options: r.options, host: bench.Host{Processor: "a processor"}, rig: r, parts: journalParts(r)}
	for _, p := range g.parts {
		switch p := p.(type) {
		case *homeward:
			p.ways = []*way{{place: place{name: "file"}, run: []float64{200e6, 190e6, 180e6}, linear: []float64{200e6, 200e6, 200e6}}}
		case *foreground:
			p.idle.p99, p.busy.p99 = []float64{10, 10, 10}, []float64{30, 15, 40}
		case *group:
			p.ours[2].iops, p.synced[1].iops = []float64{500}, []float64{100}
		}
	}
	text, err := g.render(markdown)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"a processor", "0.95 (0.90–1.00)", " yes |", "3.00 (1.50–4.00)", " no |", "5.00 (5.00–5.00)",
		"a part: `fio --randseed=SEED --filename=$DISK/f $DIR/g`\n", "### Recovery", "lands later"} {
		if n := strings.Count(string(text), want); n == 0 || strings.HasPrefix(want, "a part") && n != 1 {
			t.Errorf("%q is %d times in the report:\n%s", want, n, text)
		}
	}
	for _, p := range g.parts {
		if !strings.Contains(string(text), "### "+p.title()+"\n") || len(p.samples()) == 0 && p.title() != "Journal run and home sweep" {
			t.Errorf("%s is not in the report, or has no samples", p.title())
		}
	}
}

func TestWriteZeroesAllocatesAll(t *testing.T) {
	const size = 9*mib + 4096
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("longer than nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeZeroes(path, size); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(text) != size || strings.Trim(string(text), "\x00") != "" {
		t.Errorf("the file has %d bytes, want %d, and nothing but zeroes", len(text), size)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Sys().(*syscall.Stat_t).Blocks * 512; got < size {
		t.Errorf("%d bytes are allocated, want %d", got, size)
	}
}

// What goes to the backing of a real daemon is counted right: with a journal everything twice, without once.
func TestTrafficForReal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ramshelf")
	if out, err := exec.Command("go", "build", "-o", path, "github.com/ramshelf/ramshelf/cmd/ramshelf").CombinedOutput(); err != nil {
		t.Fatalf("build ramshelf: %v\n%s", err, out)
	}
	root, err := os.MkdirTemp("/dev/shm", "ramshelf-bench-test-")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{options: options{ramshelf: path, duration: 10 * time.Millisecond}, root: root, disk: t.TempDir()}
	t.Cleanup(func() {
		if err := r.remove(); err != nil {
			t.Error(err)
		}
	})
	p := newTraffic(r)
	p.volumeBytes, p.memory, p.dirtyBytes, p.hotBytes = 64*mib, 48*mib, 2*mib, mib
	p.passEvery, p.watched = time.Millisecond, time.Second
	if err := p.round(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	for _, a := range p.ratios {
		least := 1.0
		if a.journal == "internal" {
			least = 2
		}
		if len(a.written) != 1 || a.written[0] < least || a.passes == 1 && a.written[0] > least+0.2 {
			t.Errorf("%s, journal %s: %v times what was dirty went to the backing, want about %v", a.name, a.journal, a.written, least)
		}
	}
	for _, s := range p.streams {
		if len(s.rewrites) != 1 || s.rewrites[0] <= 0 || s.ack == "disk" && s.syncs[0] <= 0 {
			t.Errorf("ack %s, journal %s: %+v", s.ack, s.journal, s)
		}
	}
	if len(r.commands) != 4 {
		t.Errorf("%d commands were noted, want one for each kind of journal and ack:\n%v", len(r.commands), r.commands)
	}
}
