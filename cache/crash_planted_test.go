//go:build planted

package cache_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cache/arena"
)

// crashes takes a copy of the memory at the stores where a process may die, and checks that a restart from the copy finds
// every operation that was answered, and the one under way whole or not at all.
type crashes struct {
	t       *testing.T
	v       *volume
	r       *rand.Rand
	mu      sync.Mutex
	before  []byte
	after   []byte
	off, n  int64
	checked int
	failed  string
	busy    atomic.Bool // a copy is being checked: its own stores are no crash points
}

func (k *crashes) point() {
	if k.busy.Load() {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.before == nil || k.failed != "" || k.r.IntN(6) != 0 {
		return
	}
	k.checked++
	k.busy.Store(true)
	k.failed = k.check()
	k.busy.Store(false)
}

func (k *crashes) check() string {
	data, err := os.ReadFile(k.v.path)
	if err != nil {
		return err.Error()
	}
	path := filepath.Join(filepath.Dir(k.v.path), "copy.mem")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return err.Error()
	}
	defer os.Remove(path)
	a, _, err := arena.Open(path, k.v.id)
	if err != nil {
		return err.Error()
	}
	defer a.Close()
	cfg := k.v.cfg
	cfg.Wake, cfg.Committed = nil, k.v.journal.committed
	home := &disk{data: bytes.Clone(k.v.disk.data)}
	cfg.Home = home
	c, err := cache.New(a, cfg)
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	again := &volume{Cache: c, t: k.t, disk: home, fate: k.r, cfg: cfg}
	cl := &client{v: again, done: make(chan syscall.Errno, 1)}
	cl.op.Owner = cl
	lo := max(0, k.off-8192)
	hi := min(testSize, k.off+k.n+8192)
	got, err := cl.read(lo, hi-lo)
	if err != nil {
		return err.Error()
	}
	if !bytes.Equal(got, k.before[lo:hi]) && !bytes.Equal(got, k.after[lo:hi]) {
		return fmt.Sprintf("after a crash in %d+%d the volume has neither the state before nor after (%s)", k.off, k.n, difference(got, k.before[lo:hi], k.after[lo:hi], lo))
	}
	if k.checked%3 == 0 {
		// The restarted cache brings everything home; what was clean in it must be there already.
		again.flush()
		if got := home.data; !bytes.Equal(got, k.before) && !bytes.Equal(got, k.after) {
			return fmt.Sprintf("after a crash in %d+%d and a flush home has neither state (%s)", k.off, k.n, difference(got, k.before, k.after, 0))
		}
	}
	return ""
}

func difference(got, before, after []byte, at int64) string {
	var b strings.Builder
	for i := 0; i < len(got) && b.Len() < 300; i += 512 {
		j := min(len(got), i+512)
		switch {
		case bytes.Equal(before[i:j], after[i:j]) && bytes.Equal(got[i:j], before[i:j]):
		case bytes.Equal(got[i:j], before[i:j]):
			fmt.Fprintf(&b, " %d:before", (at+int64(i))/512)
		case bytes.Equal(got[i:j], after[i:j]):
			fmt.Fprintf(&b, " %d:after", (at+int64(i))/512)
		default:
			fmt.Fprintf(&b, " %d:neither", (at+int64(i))/512)
		}
	}
	return b.String()
}

// crash runs a history with crashes and says what it found.
func crash(t *testing.T, seed uint64, steps int) (checked int, failed string) {
	v := newVolume(t, testSize, testMemory, func(cfg *cache.Config) { cfg.Journaled = seed%2 == 1 })
	r := rand.New(rand.NewPCG(seed, 7))
	k := &crashes{t: t, v: v, r: rand.New(rand.NewPCG(seed, 8))}
	cache.CrashPoint = k.point
	defer func() { cache.CrashPoint = func() {} }()
	model := make([]byte, testSize)
	c := v.client()
	for step := 0; step < steps && k.failed == ""; step++ {
		off := r.Int64N(64) * 4096
		n := int64(4096)
		switch r.IntN(3) {
		case 0:
			n = (1 + r.Int64N(6)) * 4096
		case 1: // within a block, so that one goroutine at a time has a store to do
			off += r.Int64N(4000)
			n = 1 + r.Int64N((off/4096+1)*4096-off)
		}
		for !v.Idle() {
			time.Sleep(100 * time.Microsecond)
		}
		k.begin(model, off, n)
		var err error
		switch p := k.after[off : off+n]; r.IntN(8) {
		case 0:
			clear(p)
			err = c.zero(off, n)
		case 1:
			copy(p, k.before[off:])
			_, err = c.read(off, n)
		case 2:
			copy(p, k.before[off:])
			v.flush()
		default:
			fill(r, p)
			err = c.write(off, p)
		}
		if err != nil {
			t.Fatal(err)
		}
		copy(model, k.after)
		k.end()
	}
	return k.checked, k.failed
}

func (k *crashes) begin(model []byte, off, n int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.before = model
	k.after = append(k.after[:0], model...)
	k.off, k.n = off, n
}

func (k *crashes) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.before = nil
}

func TestCrashAtAnyStore(t *testing.T) {
	checked := 0
	for seed := range uint64(seeds()) / 3 {
		n, failed := crash(t, seed, 60)
		if failed != "" {
			t.Fatalf("seed %d: %s", seed, failed)
		}
		checked += n
	}
	t.Logf("%d crashes", checked)
	if checked == 0 {
		t.Error("no crash was checked")
	}
}

// TestPlanted runs the checkers of this package with each planted bug: they must fail.
func TestPlanted(t *testing.T) {
	for bug, check := range map[string]string{
		"clear-early":    "TestCrashAtAnyStore",
		"publish-early":  "TestCrashAtAnyStore",
		"torn-slot":      "TestAtomicBlocks",
		"drain-skips":    "TestModel",
		"stale-fill":     "TestStaleFill",
		"blind-checksum": "TestBitFlips",

		"commit-skips":       "TestPowerCut",
		"home-before-commit": "TestPowerCut",
		"ack-before-commit":  "TestCommitLevels",
		"unsafe-read":        "TestCommitLevels",
	} {
		t.Run(bug, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(os.Args[0], "-test.run", "^"+check+"$", "-test.count=1", "-test.timeout=2m")
			cmd.Env = append(os.Environ(), "RAMSHELF_PLANT="+bug)
			out, err := cmd.CombinedOutput()
			if err == nil {
				t.Fatalf("%s did not notice the bug", check)
			}
			if !bytes.Contains(out, []byte("--- FAIL: "+check)) {
				t.Fatalf("%s did not run to its end:\n%s", check, out)
			}
		})
	}
}
