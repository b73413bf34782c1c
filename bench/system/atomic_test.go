package system

import (
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// overlapping is a load in which most requests overlap others, read and written by several connections at once.
var overlapping = load{connections: 6, depths: []int{16, 4, 32, 1}, maxSectors: 24, hotSectors: 64, readPercent: 45, zeroPercent: 2}

// checkAtomic is the checker of invariant 2: under overlapping writes each sector, and each aligned 4 KiB block,
// holds one write or the other, and a read returns none older than an answered one.
// It ends with the first fault, or after d.
func checkAtomic(s server, l *ledger, d time.Duration) {
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		for end := time.Now().Add(d); time.Now().Before(end) && l.faults.Load() == 0; {
			time.Sleep(10 * time.Millisecond)
		}
	}()
	overlapping.run(s, l, stop, nil)
}

func TestAtomic(t *testing.T) {
	const size = 16 * mib
	d := 2 * time.Second
	if soak {
		d = time.Minute
	}
	s := serveRamshelf(t, volume{size: size, memory: 16 * mib, extra: []string{"--staleness", "50ms"}})
	l := newLedger(t, size)
	checkAtomic(s, l, d)
	l.verify(t, s, true)
	t.Logf("%d writes answered", l.answers)
	if l.answers < 1000 {
		t.Errorf("only %d writes were answered", l.answers)
	}
	cleanStop(t, s)
	l.verifyFile(t, s.home())

	// nbdkit's memory plugin serves one request at a time: the checker must be content with it.
	control := nbdkitMemory(t, size)
	control.start()
	l = newLedger(t, size)
	checkAtomic(control, l, time.Second)
	l.verify(t, control, true)
}

// plants are the bugs of a planted build and the checkers that must find them.
var plants = []struct {
	bug   string
	check func(t *testing.T, s *ramshelf, p *probe, limit time.Duration)
}{
	{"torn-slot", func(_ *testing.T, s *ramshelf, p *probe, limit time.Duration) {
		l := newLedger(p, s.v.size)
		checkAtomic(s, l, limit)
		l.verify(p, s, true)
	}},
	{"drain-skips", func(t *testing.T, s *ramshelf, p *probe, _ time.Duration) {
		h := newShadow(t, s, s.v.size)
		h.write(200, 0, s.v.size, 1)
		s.t = p
		checkCleanStop(p, s, nil)
	}},
}

// probe is a test that may fail: it notes that it did.
type probe struct {
	testing.TB
	mu     sync.Mutex
	failed []string
}

func (p *probe) note(msg string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failed = append(p.failed, msg)
}

func (p *probe) found() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.failed, "\n")
}

func (p *probe) Failed() bool { return p.found() != "" }

func (p *probe) Error(args ...any)                 { p.note(fmt.Sprint(args...)) }
func (p *probe) Errorf(format string, args ...any) { p.note(fmt.Sprintf(format, args...)) }
func (p *probe) Fatal(args ...any)                 { p.Error(args...); runtime.Goexit() }
func (p *probe) Fatalf(format string, args ...any) { p.Errorf(format, args...); runtime.Goexit() }
func (p *probe) FailNow()                          { p.note("failed"); runtime.Goexit() }

// TestPlanted runs each checker against a build with the bug that it is for: it must fail; and against the same
// build without it: it must pass.
func TestPlanted(t *testing.T) {
	binary, err := plantedBinary()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range plants {
		for _, bug := range []string{"", row.bug} {
			t.Run(row.bug+"="+bug, func(t *testing.T) {
				s := serveRamshelf(t, volume{size: 16 * mib, memory: 16 * mib, journal: "none", binary: binary, env: []string{"RAMSHELF_PLANT=" + bug}})
				p := &probe{TB: t}
				done := make(chan struct{})
				limit := time.Minute // to find the bug; far less shows that there is none to find
				if bug == "" {
					limit = 2 * time.Second
				}
				go func() { defer close(done); row.check(t, s, p, limit) }()
				<-done
				s.t = t
				switch found := p.found(); {
				case bug == "" && found != "":
					t.Errorf("without the bug the checker fails:\n%s", found)
				case bug != "" && found == "":
					t.Errorf("the checker does not find %s", bug)
				case bug != "":
					t.Logf("found: %.300s", found)
				}
			})
		}
	}
}
