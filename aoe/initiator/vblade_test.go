package initiator

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/aoe"
	"github.com/ramshelf/ramshelf/aoe/ether"
	"github.com/ramshelf/ramshelf/aoe/internal/testnet"
)

func TestMain(m *testing.M) { testnet.Main(m) }

const diskBytes = 16 << 20

// blade is a running vblade.
type blade struct {
	t    *testing.T
	args []string
	cmd  *exec.Cmd
}

// startBlade makes a disk and has vblade serve it as e1.0 on the interface.
func startBlade(t *testing.T, iface string, bytes int64) (b *blade, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err == nil {
		err = errors.Join(f.Truncate(bytes), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	b = &blade{t: t, args: []string{"1", "0", iface, path}}
	b.start()
	t.Cleanup(b.kill)
	return b, path
}

func (b *blade) start() {
	b.cmd = exec.Command("vblade", b.args...)
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := b.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
}

func (b *blade) kill() {
	_ = b.cmd.Process.Kill()
	_ = b.cmd.Wait()
}

func wires(t *testing.T, names ...string) (wires []Wire) {
	t.Helper()
	for _, name := range names {
		w, err := ether.Open(name, ether.Options{Responses: true})
		if err != nil {
			t.Fatal(err)
		}
		wires = append(wires, w)
	}
	return wires
}

// logTo keeps what is logged.
type logTo struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logTo) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logTo) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func openTarget(t *testing.T, o Options, names ...string) (*Initiator, *logTo) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	log := &logTo{}
	o.Address = shelf
	i, err := Open(ctx, wires(t, names...), Config{Options: o, Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	t.Cleanup(func() {
		if err := i.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("log:\n%s", log)
		}
	})
	return i, log
}

// load has workers that own a part of the disk each, write it at random and read it back; until stop. The disk must then be what they
// hold.
type load struct {
	t       *testing.T
	i       *Initiator
	content []byte
	stop    atomic.Bool
	done    atomic.Int64 // operations
	all     sync.WaitGroup
}

func startLoad(t *testing.T, i *Initiator, workers int) *load {
	l := &load{t: t, i: i, content: make([]byte, i.Size())}
	part := len(l.content) / workers
	for w := range workers {
		l.all.Go(func() { l.work(rand.New(rand.NewPCG(uint64(w), 7)), w*part, part) })
	}
	return l
}

func (l *load) work(r *rand.Rand, from, part int) {
	mine := l.content[from : from+part]
	stamp := uint64(0)
	for !l.stop.Load() {
		sectors := 1 + r.IntN(64)
		off := r.IntN(part/aoe.SectorBytes-sectors) * aoe.SectorBytes
		if r.IntN(2) == 0 {
			off = r.IntN(16) * aoe.SectorBytes // again and again
		}
		p := mine[off : off+sectors*aoe.SectorBytes]
		if r.IntN(3) == 0 {
			got := make([]byte, len(p))
			if _, err := l.i.ReadAt(got, int64(from+off)); err != nil {
				l.t.Errorf("read: %v", err)
				return
			}
			if !bytes.Equal(got, p) {
				l.t.Errorf("%d bytes at %d are not what was written", len(p), from+off)
				return
			}
		} else {
			for s := 0; s < len(p); s += 8 {
				stamp++
				binary.BigEndian.PutUint64(p[s:], stamp<<20|uint64(from/aoe.SectorBytes))
			}
			if _, err := l.i.WriteAt(p, int64(from+off)); err != nil {
				l.t.Errorf("write: %v", err)
				return
			}
		}
		l.done.Add(1)
	}
}

// await waits until n more operations are done.
func (l *load) await(n int64) {
	l.t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for goal := l.done.Load() + n; l.done.Load() < goal && !l.t.Failed(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			l.t.Fatalf("%d operations of %d more: %+v", l.done.Load(), n, l.i.Status())
		}
	}
}

// end stops the load and compares the disk, through the target and below it.
func (l *load) end(path string) {
	l.t.Helper()
	l.stop.Store(true)
	l.all.Wait()
	got := make([]byte, l.i.Size())
	if _, err := l.i.ReadAt(got, 0); err != nil {
		l.t.Fatal(err)
	}
	if !bytes.Equal(got, l.content) {
		l.t.Error("the disk is not what was written")
	}
	if below, err := os.ReadFile(path); err != nil || !bytes.Equal(below, l.content) {
		l.t.Errorf("the file below is not what was written: %v", err)
	}
	l.t.Logf("%d operations, %+v", l.done.Load(), l.i.Status())
}

func TestVblade(t *testing.T) {
	for mtu, sectors := range map[int]int{1500: 2, 9000: 16} {
		t.Run(strconv.Itoa(mtu), func(t *testing.T) {
			testnet.Pair(t, "host0", "shelf0", mtu)
			_, path := startBlade(t, "shelf0", diskBytes)
			i, _ := openTarget(t, Options{Clean: true}, "host0")
			s := i.Status()
			if i.Size() != diskBytes || s.State != StateUp || len(s.Paths) != 1 || s.Paths[0].Sectors != sectors || s.Paths[0].Buffers != 16 ||
				!strings.HasPrefix(s.Identity.Serial, "1.0:") || s.Durability != "flushed by the target, which is believed" {
				t.Fatalf("size %d, %+v", i.Size(), s)
			}
			l := startLoad(t, i, 8)
			l.await(1500)
			l.end(path)
			if err := i.Sync(); err != nil {
				t.Error(err)
			}
		})
	}
}

// vblade is killed and started again under load: calls wait, and nothing that was answered is lost.
func TestVbladeRestarts(t *testing.T) {
	testnet.Pair(t, "host0", "shelf0", 9000)
	b, path := startBlade(t, "shelf0", diskBytes)
	i, log := openTarget(t, Options{Clean: true}, "host0")
	l := startLoad(t, i, 8)
	for range 3 {
		l.await(100)
		b.kill()
		for deadline := time.Now().Add(time.Minute); i.Status().State != StateSilent; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("a target that is gone is not noticed: %+v", i.Status())
			}
		}
		b.start()
		l.await(100)
	}
	l.end(path)
	if err := i.Sync(); !errors.Is(err, ErrRestarted) {
		t.Errorf("the first sync after a restart: %v", err)
	}
	if err := i.Sync(); err != nil {
		t.Errorf("the second: %v", err)
	}
	if !strings.Contains(log.String(), "no answer from") {
		t.Error("nothing was logged")
	}
}

// A target of another size under the same address is not used.
func TestVbladeIsAnother(t *testing.T) {
	testnet.Pair(t, "host0", "shelf0", 1500)
	b, path := startBlade(t, "shelf0", diskBytes)
	i, log := openTarget(t, Options{Clean: true, DeadAfter: 5 * time.Second}, "host0")
	if _, err := i.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	b.kill()
	if err := os.Truncate(path, diskBytes/2); err != nil {
		t.Fatal(err)
	}
	b.start()
	if _, err := i.ReadAt(make([]byte, 512), 0); !errors.Is(err, ErrDead) {
		t.Errorf("a read from another device: %v", err)
	}
	if s := i.Status(); s.State != StateRefused || s.Trouble() != "shelf e1.0 is another device now" || !strings.Contains(log.String(), "is another device") {
		t.Errorf("status %+v", s)
	}
}

// One of two cables is cut under load.
func TestVbladePaths(t *testing.T) {
	testnet.Pair(t, "host0", "shelf0", 1500)
	testnet.Pair(t, "host1", "shelf1", 9000)
	b, path := startBlade(t, "shelf0", diskBytes)
	second := &blade{t: t, args: []string{"1", "0", "shelf1", b.args[3]}}
	second.start()
	t.Cleanup(second.kill)
	i, _ := openTarget(t, Options{Clean: true}, "host0", "host1")
	for deadline := time.Now().Add(time.Minute); len(i.Status().Paths) != 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%+v", i.Status())
		}
	}
	l := startLoad(t, i, 8)
	for _, name := range []string{"shelf0", "shelf1"} {
		l.await(200)
		testnet.IP(t, "link", "set", name, "down")
		l.await(200)
		testnet.IP(t, "link", "set", name, "up")
		testnet.Await(t, name)
		// vblade ends when its interface is down; somebody starts it again.
		for _, v := range []*blade{b, second} {
			if v.args[2] == name {
				v.kill()
				v.start()
			}
		}
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			up := 0
			for _, p := range i.Status().Paths {
				if p.State == "up" {
					up++
				}
			}
			if up == 2 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s does not come back: %+v", name, i.Status())
			}
		}
	}
	l.end(path)
}

func TestCalls(t *testing.T) {
	testnet.Pair(t, "host0", "shelf0", 1500)
	b, _ := startBlade(t, "shelf0", diskBytes)
	i, _ := openTarget(t, Options{Clean: true}, "host0")
	p := make([]byte, 1024)
	for _, c := range []struct {
		off  int64
		n    int
		want error
	}{{-512, 512, ErrAlign}, {1, 512, ErrAlign}, {0, 511, ErrAlign}, {diskBytes - 512, 1024, ErrAlign}, {diskBytes, 512, ErrAlign}, {diskBytes, 0, nil},
		{diskBytes - 1024, 1024, nil}} {
		if n, err := i.WriteAt(p[:c.n], c.off); !errors.Is(err, c.want) || err == nil && n != c.n {
			t.Errorf("write %d at %d: %d, %v", c.n, c.off, n, err)
		}
	}
	for _, c := range []struct {
		off  int64
		n    int
		got  int
		want error
	}{{-512, 512, 0, ErrAlign}, {1, 512, 0, ErrAlign}, {diskBytes - 512, 1024, 512, io.EOF}, {diskBytes, 512, 0, io.EOF}, {1 << 60, 512, 0, io.EOF}, {0, 1024, 1024, nil}} {
		if n, err := i.ReadAt(p[:c.n], c.off); n != c.got || !errors.Is(err, c.want) {
			t.Errorf("read %d at %d: %d, %v", c.n, c.off, n, err)
		}
	}
	// A call that waits for a target that is gone ends when the initiator is closed.
	b.kill()
	failed := make(chan error)
	go func() {
		_, err := i.ReadAt(make([]byte, 512), 0)
		failed <- err
	}()
	for i.Status().Silent == 0 {
		time.Sleep(time.Millisecond)
	}
	for range 2 {
		if err := i.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := <-failed; !errors.Is(err, ErrClosed) {
		t.Errorf("a read while closing: %v", err)
	}
	if err := i.Sync(); !errors.Is(err, ErrClosed) {
		t.Errorf("sync after close: %v", err)
	}
}

func TestOpenFindsNothing(t *testing.T) {
	testnet.Pair(t, "host0", "shelf0", 1500)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	_, err := Open(ctx, wires(t, "host0"), Config{Options: Options{Address: shelf}})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "discovering") || !strings.Contains(err.Error(), "host0") {
		t.Errorf("%v", err)
	}
}
