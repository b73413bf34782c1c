package host

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// childEnv chooses what this test binary does when a test starts it.
const childEnv = "RAMSHELF_HOST_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "":
		os.Exit(m.Run())
	case "activation":
		activationChild()
	case "flusher":
		flusherChild()
	}
}

// child is this test binary as a process that does one thing.
func child(what, script string, env ...string) *exec.Cmd {
	cmd := exec.Command("/bin/sh", "-c", script+` exec "$0"`, os.Args[0])
	cmd.Env = append(append(os.Environ(), childEnv+"="+what), env...)
	return cmd
}

// shortDir is a folder whose path leaves room for the name of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "host")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestListenUnix(t *testing.T) {
	path := filepath.Join(shortDir(t), "x.sock")
	l, err := Listen("unix", path, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != os.ModeSocket|0o640 {
		t.Errorf("mode %v, %v; want a socket of 0640", info.Mode(), err)
	}
	if _, err := Listen("unix", path, 0o640); !errors.Is(err, ErrInUse) {
		t.Errorf("second listener: %v, want ErrInUse", err)
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the first listener was harmed: %v", err)
	} else {
		c.Close()
	}
	l.Close()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestListenReplacesStaleSocket(t *testing.T) {
	path := filepath.Join(shortDir(t), "x.sock")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	l, err := Listen("unix", path, 0o660)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestListenLeavesOtherFilesAlone(t *testing.T) {
	path := filepath.Join(shortDir(t), "x.sock")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix", path, 0o660); err == nil || errors.Is(err, ErrInUse) {
		t.Errorf("listened on a file: %v", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "precious" {
		t.Errorf("the file is %q, %v", got, err)
	}
	if _, err := Listen("unix", filepath.Join(shortDir(t), "none", "x.sock"), 0o660); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}

// While one daemon looks at a socket and replaces it, another cannot take the fresh one for stale.
func TestListenLocksItsFolder(t *testing.T) {
	dir := shortDir(t)
	folder, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "x.sock")
	if _, err := Listen("unix", path, 0o660); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("listened beside another: %v", err)
	}
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	l, err := Listen("unix", path, 0o660)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("the lock outlives Listen: %v", err)
	}
}

func TestListenTCPInUse(t *testing.T) {
	l, err := Listen("tcp", "127.0.0.1:0", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := Listen("tcp", l.Addr().String(), 0); !errors.Is(err, ErrInUse) {
		t.Errorf("second listener: %v, want ErrInUse", err)
	}
}

// activationChild tells what it inherited.
func activationChild() {
	a, err := Inherit()
	if err != nil {
		fmt.Println("error", err)
		return
	}
	if l := a.Control(); l != nil {
		fmt.Println("control", l.Addr())
	}
	if l := a.Take("unix", os.Getenv("WANT_UNIX")); l != nil {
		fmt.Println("unix", l.Addr())
	}
	if l := a.Take("tcp", os.Getenv("WANT_TCP")); l != nil {
		fmt.Println("tcp", l.Addr())
	}
	fmt.Println("left", a.Left())
	if l := a.Next(); l != nil {
		fmt.Println("next", l.Addr())
	}
	fmt.Println("env", os.Getenv("LISTEN_FDS")+os.Getenv("LISTEN_PID"))
	a.Close()
}

func TestInherit(t *testing.T) {
	dir := shortDir(t)
	var files []*os.File
	var addrs []string
	for _, network := range []string{"unix", "unix", "tcp", "unix"} {
		address := "127.0.0.1:0"
		if network == "unix" {
			address = filepath.Join(dir, fmt.Sprint(len(files)))
		}
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		f, err := l.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files, addrs = append(files, f), append(addrs, l.Addr().String())
	}
	cmd := child("activation", "export LISTEN_PID=$$;", "LISTEN_FDS=4", "LISTEN_FDNAMES=ramshelf.socket:control:ramshelf.socket:other",
		"WANT_UNIX="+addrs[3], "WANT_TCP="+addrs[2])
	cmd.ExtraFiles = files
	out, err := cmd.CombinedOutput()
	want := fmt.Sprintf("control %s\nunix %s\ntcp %s\nleft 1\nnext %s\nenv \n", addrs[1], addrs[3], addrs[2], addrs[0])
	if err != nil || string(out) != want {
		t.Errorf("got %v\n%s\nwant\n%s", err, out, want)
	}
	// The sockets belong to systemd: nobody removed them.
	if _, err := os.Stat(addrs[0]); err != nil {
		t.Errorf("an inherited socket was removed: %v", err)
	}
}

func TestInheritNothing(t *testing.T) {
	out, err := child("activation", "").CombinedOutput()
	if err != nil || string(out) != "left 0\nenv \n" {
		t.Errorf("got %v\n%s", err, out)
	}
	// Sockets for another process are not ours.
	out, err = child("activation", "", "LISTEN_FDS=1", "LISTEN_PID=1").CombinedOutput()
	if err != nil || string(out) != "left 0\nenv \n" {
		t.Errorf("for another process: got %v\n%s", err, out)
	}
	// What is no stream socket is an error.
	cmd := child("activation", "export LISTEN_PID=$$;", "LISTEN_FDS=1")
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	cmd.ExtraFiles = []*os.File{null}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.HasPrefix(string(out), "error ") {
		t.Errorf("a file: got %v\n%s", err, out)
	}
}

func TestNotify(t *testing.T) {
	path := filepath.Join(shortDir(t), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	NotifyReady("serving vol")
	NotifyStopping("stopping")
	NotifyDraining("draining vol: 1.0 MiB left")
	for _, want := range []string{
		"READY=1\nSTATUS=serving vol", "STOPPING=1\nSTATUS=stopping", "EXTEND_TIMEOUT_USEC=60000000\nSTATUS=draining vol: 1.0 MiB left",
	} {
		p := make([]byte, 1024)
		n, err := c.Read(p)
		if err != nil || string(p[:n]) != want {
			t.Errorf("got %q, %v; want %q", p[:n], err, want)
		}
	}
	t.Setenv("NOTIFY_SOCKET", "")
	NotifyReady("nobody listens")
}

// flusherChild tells what the setting is on every thread.
func flusherChild() {
	if err := BecomeIOFlusher(); err != nil {
		fmt.Println("error", err)
		return
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			v, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
			fmt.Println(v, err)
		})
	}
	wg.Wait()
}

// The tests of this package may be linked with cgo, where the setting is refused; then that is what must be told.
func TestBecomeIOFlusher(t *testing.T) {
	out, err := child("flusher", "").CombinedOutput()
	text := string(out)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if strings.HasPrefix(text, "error prctl PR_SET_IO_FLUSHER: ") {
		return
	}
	if text != strings.Repeat("1 <nil>\n", 8) {
		t.Errorf("threads say\n%s", text)
	}
}

func TestRaiseLimits(t *testing.T) {
	RaiseLimits()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur != limit.Max {
		t.Errorf("open files: %+v, %v", limit, err)
	}
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil || limit.Cur != limit.Max {
		t.Errorf("locked memory: %+v, %v", limit, err)
	}
}

// stuck is a reader of the log that reads nothing until it is let go.
type stuck struct {
	mu    sync.Mutex
	lines bytes.Buffer
}

func (s *stuck) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lines.Write(p)
}

func TestLogDoesNotWaitForItsReader(t *testing.T) {
	var w stuck
	w.mu.Lock()
	log, closeLog := Log(&w, false, slog.LevelInfo)
	const lines = 3 * logQueueLines
	for i := range lines {
		log.Info("line", "i", i)
	}
	w.mu.Unlock()
	closeLog()
	written := strings.Count(w.lines.String(), "msg=line")
	var dropped int
	for line := range strings.Lines(w.lines.String()) {
		if at := strings.Index(line, `msg="dropped log lines" lines=`); at >= 0 {
			var n int
			if _, err := fmt.Sscanf(line[at:], `msg="dropped log lines" lines=%d`, &n); err != nil {
				t.Fatal(err)
			}
			dropped += n
		}
	}
	if written < logQueueLines || dropped == 0 || written+dropped != lines {
		t.Errorf("%d written, %d told to be dropped, of %d", written, dropped, lines)
	}
}

func TestLogForms(t *testing.T) {
	for name, c := range map[string]struct {
		json bool
		want string
	}{
		"text": {false, "level=WARN msg=slow volume=vol"},
		"JSON": {true, `"level":"WARN","msg":"slow","volume":"vol"}`},
	} {
		var b bytes.Buffer
		log, closeLog := Log(&b, c.json, slog.LevelWarn)
		log.Info("not this")
		log.Warn("slow", "volume", "vol")
		closeLog()
		if got := strings.TrimSpace(b.String()); !strings.HasSuffix(got, c.want) || strings.Contains(got, "not this") {
			t.Errorf("%s: %s", name, got)
		}
	}
}

func TestJournalPriorities(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(priorityWriter{&b}, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: dropTime}))
	log.Debug("a")
	log.Info("b")
	log.Warn("c", "level", "x")
	log.Error("d")
	if got, want := b.String(), "<7>msg=a\n<6>msg=b\n<4>msg=c level=x\n<3>msg=d\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A log whose reader is gone for good does not hold up the end of the process.
func TestLogCloseIsBounded(t *testing.T) {
	r, w := io.Pipe()
	log, closeLog := Log(w, false, slog.LevelInfo)
	for range 2 * logQueueLines {
		log.Info("line")
	}
	closed := make(chan struct{})
	go func() {
		closeLog()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(10 * logCloseWait):
		t.Error("close waits for ever")
	}
	if _, err := bufio.NewReader(r).ReadString('\n'); err != nil {
		t.Error(err)
	}
	r.Close()
}
