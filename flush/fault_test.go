package flush_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/flush"
	"github.com/ramshelf/ramshelf/flush/home"
)

// waitFor waits until done, for a time that only a broken run needs.
func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 500 {
		if done() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("no %s", what)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// start runs a tool until the end of the test.
func start(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", name, &stderr)
		}
	})
}

// faultyDisk makes a block device whose writes take 2 ms, and fail while the file inject exists: nbdkit's
// error and delay filters under nbdfuse and a loop device.
func faultyDisk(t *testing.T, size int64) (dev, image, inject string) {
	dir := t.TempDir()
	image, inject = filepath.Join(dir, "image"), filepath.Join(dir, "inject")
	socket, mount := filepath.Join(dir, "sock"), filepath.Join(dir, "mnt")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size), os.Mkdir(mount, 0o700)); err != nil {
		t.Fatal(err)
	}
	start(t, "nbdkit", "-f", "-U", socket, "--filter=error", "--filter=delay", "file", image,
		"error-pwrite=EIO", "error-pwrite-rate=100%", "error-pwrite-file="+inject, "wdelay=2ms")
	waitFor(t, "socket of nbdkit", func() bool { return exists(socket) })
	start(t, "nbdfuse", filepath.Join(mount), "nbd+unix:///?socket="+socket)
	disk := filepath.Join(mount, "nbd")
	t.Cleanup(func() { tool(t, "fusermount3", "-u", mount) })
	waitFor(t, "disk of nbdfuse", func() bool { return exists(disk) })
	dev = tool(t, "losetup", "--direct-io=on", "-f", "--show", disk)
	t.Cleanup(func() { tool(t, "losetup", "-d", dev) })
	return dev, image, inject
}

// onceSource has its blocks dirty until they are home.
type onceSource struct {
	*endlessSource
	clean  bool
	failed chan error
}

func (s *onceSource) Next(dst []flush.Block) int {
	if s.clean {
		return 0
	}
	return s.endlessSource.Next(dst)
}

func (s *onceSource) Committed(uint64) { s.clean = true }

func (s *onceSource) Failed(err error) {
	select {
	case s.failed <- err:
	default:
	}
}

// TestRealFaults: while a disk refuses every write nothing turns clean and a flush says so; afterwards all of
// it arrives.
func TestRealFaults(t *testing.T) {
	const blocks = 1500
	dev, image, inject := faultyDisk(t, 2*blocks*flush.BlockBytes)
	disk, err := home.Open(dev, home.Options{Direct: true})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	source := &onceSource{endlessSource: newEndlessSource(t, every(1, blocks)), failed: make(chan error, 1)}
	states := make(chan flush.State, 16)
	f, err := flush.New(source, disk, flush.Options{
		Backoff: 20 * time.Millisecond, Event: func(e flush.Event) { states <- e.To },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(inject, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	f.Start()
	if err := f.Flush(ctx); !errors.Is(err, syscall.EIO) {
		t.Errorf("flush to a failing disk: %v", err)
	}
	select {
	case err := <-source.failed:
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("failed with %v", err)
		}
	default:
		t.Error("the source was not told")
	}
	if st := f.Status(); st.State != flush.StateFailed || st.Errors == 0 || st.CommittedSeal != 0 || st.FailedAttempts < flush.DefaultFailAfter {
		t.Errorf("status %+v", st)
	}
	if err := os.Remove(inject); err != nil {
		t.Fatal(err)
	}
	if err := f.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	if err := f.Stop(ctx); err != nil {
		t.Error(err)
	}
	close(states)
	if a, b := <-states, <-states; a != flush.StateFailed || b != flush.StateOK {
		t.Errorf("states %v, %v", a, b)
	}
	got, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if want := source.content(); !bytes.Equal(got[:len(want)], want) {
		t.Error("image differs from what was flushed")
	}
}

// content is what the backing holds when all is home, for a source whose blocks are neighbors.
func (s *onceSource) content() (out []byte) {
	var dst [1]flush.Block
	for s.next = 0; s.endlessSource.Next(dst[:]) > 0; {
		out = append(out, dst[0].Data...)
	}
	return out
}
