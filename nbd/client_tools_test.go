package nbd

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// tool is a server of somebody else, run for a test.
type tool struct {
	t      testing.TB
	args   []string
	cmd    *exec.Cmd
	ended  chan struct{}
	uri    string
	socket string
	pid    string // file with its process id, which says that it is ready
	forks  bool   // it goes into the background
}

// shortDir gives a directory whose name leaves room for that of a socket.
func shortDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// nbdkit runs nbdkit on a Unix socket with args, and ends it with the test.
func nbdkit(t testing.TB, args ...string) *tool {
	dir := shortDir(t)
	socket, pid := filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	k := &tool{t: t, uri: "nbd+unix:///?socket=" + socket, socket: socket, pid: pid}
	k.args = append([]string{"nbdkit", "-f", "-P", pid, "-U", socket}, args...)
	k.start()
	t.Cleanup(k.kill)
	return k
}

// qemuNBD runs qemu-nbd on a new raw image.
func qemuNBD(t testing.TB, size int64, args ...string) *tool {
	dir := shortDir(t)
	image, socket, pid := filepath.Join(dir, "image"), filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	sparse(t, image, size)
	q := &tool{t: t, uri: "nbd+unix:///disk?socket=" + socket, socket: socket, pid: pid}
	q.args = append([]string{"qemu-nbd", "-t", "-x", "disk", "-f", "raw", "-k", socket, "--pid-file", pid}, args...)
	q.args = append(q.args, image)
	q.start()
	t.Cleanup(q.kill)
	return q
}

// nbdServer runs nbd-server with flush, FUA and trim switched as extra says.
func nbdServer(t testing.TB, size int64, extra string) *tool {
	dir := shortDir(t)
	image, config, socket := filepath.Join(dir, "image"), filepath.Join(dir, "config"), filepath.Join(dir, "s")
	sparse(t, image, size)
	text := "[generic]\nunixsock=" + socket + "\n[disk]\nexportname=" + image + "\n" + extra
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	// Its foreground mode serves one connection only.
	s := &tool{t: t, uri: "nbd+unix:///disk?socket=" + socket, socket: socket, pid: filepath.Join(dir, "pid"), forks: true}
	s.args = []string{"nbd-server", "-C", config, "-p", s.pid}
	s.start()
	t.Cleanup(s.kill)
	return s
}

func sparse(t testing.TB, path string, size int64) {
	f, err := os.Create(path)
	if err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
}

// start runs the tool until it says that it is ready.
func (k *tool) start() {
	k.t.Helper()
	_ = os.Remove(k.pid)
	_ = os.Remove(k.socket)
	var out bytes.Buffer
	k.cmd = exec.Command(k.args[0], k.args[1:]...)
	k.cmd.Stdout, k.cmd.Stderr = &out, &out
	if err := k.cmd.Start(); err != nil {
		k.t.Fatalf("%v (package %s of Debian)", err, k.args[0])
	}
	cmd, ended := k.cmd, make(chan struct{})
	k.ended = ended
	go func() { _ = cmd.Wait(); close(ended) }()
	if k.forks {
		<-ended
	}
	for range 1000 {
		if pid, err := os.ReadFile(k.pid); err == nil && bytes.HasSuffix(pid, []byte("\n")) && k.listens() {
			return
		}
		select {
		case <-ended:
			if !k.forks {
				k.t.Fatalf("%s ended at once: %s", strings.Join(k.args, " "), out.String())
			}
			time.Sleep(10 * time.Millisecond)
		case <-time.After(10 * time.Millisecond):
		}
	}
	k.t.Fatalf("%s is not ready after 10 s", strings.Join(k.args, " "))
}

// listens tells whether connections are taken. Only a tool that forks writes its process id before.
func (k *tool) listens() bool {
	if !k.forks {
		return true
	}
	nc, err := net.Dial("unix", k.socket)
	if err == nil {
		_ = nc.Close()
	}
	return err == nil
}

// kill ends the tool as by a crash.
func (k *tool) kill() {
	if !k.forks {
		_ = k.cmd.Process.Kill()
		<-k.ended
		return
	}
	b, _ := os.ReadFile(k.pid)
	if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// conn connects to the tool.
func (k *tool) conn(o ConnOptions) *Conn {
	k.t.Helper()
	u, err := ParseURI(k.uri)
	if err != nil {
		k.t.Fatal(err)
	}
	c, err := DialConn(context.Background(), u, o)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { _ = c.Close() })
	return c
}

// roundTrip sends calls in one batch and waits for all of them.
func roundTrip(t testing.TB, c *Conn, calls ...*Call) {
	t.Helper()
	for _, call := range calls {
		if err := c.Queue(call); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Send(); err != nil {
		t.Fatal(err)
	}
	done := make([]*Call, len(calls))
	for n := 0; n < len(calls); {
		k, err := c.Receive(done[n:])
		if err != nil {
			t.Fatal(err)
		}
		n += k
	}
}
