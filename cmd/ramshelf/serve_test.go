package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/nbd"
)

// waitLimit is how long a daemon may take to start or to end; one that takes longer is stuck.
const waitLimit = 60 * time.Second

// place is where a daemon of a test has its files.
type place struct{ dir, backing, socket, control, shm string }

func newPlace(t *testing.T) place {
	t.Helper()
	dir, err := os.MkdirTemp("", "ramshelf") // short enough for sockets
	if err != nil {
		t.Fatal(err)
	}
	shm, err := os.MkdirTemp("/dev/shm", "ramshelf-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		os.RemoveAll(dir)
		os.RemoveAll(shm)
	})
	return place{dir: dir, backing: dir + "/home.img", socket: dir + "/nbd.sock", control: dir + "/run/control.sock", shm: shm}
}

// args are the arguments of serve for one small volume.
func (p place) args(more ...string) []string {
	return append([]string{
		"serve", "--name", "vol", "--backing", "file:" + p.backing, "--size", "16M", "--memory", "8M",
		"--listen", "nbd+unix:///vol?socket=" + p.socket, "--control", p.control, "--shm", p.shm,
	}, more...)
}

// process is a daemon that a test started.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdout *bufio.Reader
	stderr *log
}

// log keeps what a daemon writes to stderr.
type log struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// start starts this test binary as ramshelf.
func start(t *testing.T, args ...string) *process {
	t.Helper()
	return startWith(t, exec.Command(os.Args[0], args...))
}

func startWith(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, cmd: cmd, stderr: &log{}}
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stderr = p.stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdout = bufio.NewReader(out)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(waitLimit, func() { _ = cmd.Process.Kill() })
	t.Cleanup(func() {
		kill.Stop()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("the daemon said:\n%s", p.stderr)
		}
	})
	return p
}

// ready waits for a line of stdout that says that an export is served.
func (p *process) ready() string {
	p.t.Helper()
	line, err := p.stdout.ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "ready ") {
		p.t.Fatalf("the daemon is not ready: %q, %v\n%s", line, err, p.stderr)
	}
	return strings.TrimSpace(line)
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// wait waits for the end and gives the exit code.
func (p *process) wait() control.ExitCode {
	_, _ = io.Copy(io.Discard, p.stdout)
	_ = p.cmd.Wait()
	return control.ExitCode(p.cmd.ProcessState.ExitCode())
}

// gone tells that a file does not exist.
func gone(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("%s is left behind (%v)", path, err)
		}
	}
}

func TestServeStatusFlushStop(t *testing.T) {
	at := newPlace(t)
	d := start(t, at.args("--ack", "ram")...)
	if got, want := d.ready(), "ready vol nbd+unix:///vol?socket="+at.socket; got != want {
		t.Errorf("said %q, want %q", got, want)
	}
	for path, want := range map[string]os.FileMode{at.socket: 0o660, at.control: 0o660, filepath.Dir(at.control): 0o750} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v; want %v", path, info.Mode(), err, want)
		}
	}
	greet(t, "unix", at.socket)
	client, err := nbd.Dial(t.Context(), "nbd+unix:///vol?socket="+at.socket, nbd.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}

	s, err := control.NewClient(at.control).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	v := volumes(t, at)[0]
	if s.PID != d.cmd.Process.Pid || len(s.Volumes) != 1 || v.Name != "vol" || v.Role != control.RolePrimary ||
		v.State != control.StateOK || v.Ack != "ram" || v.AckInForce != "ram" || v.SizeBytes != 16<<20 || v.MemoryBytes != 8<<20 ||
		v.Peer != nil || v.Backing.State != control.BackingOK || len(v.Exports) != 1 || v.Emergency || v.Clients != 1 {
		t.Errorf("status: %+v", v)
	}
	for _, c := range []struct {
		args []string
		code control.ExitCode
		want string
	}{
		{[]string{"status"}, control.ExitDone, "vol role:Primary state:ok ack:ram clients:1"},
		{[]string{"status", "vol"}, control.ExitDone, "disk:UpToDate size:16 MiB"},
		{[]string{"status", "other"}, control.ExitNoVolume, "hint: it serves vol"},
		{[]string{"flush"}, control.ExitDone, ""},
		{[]string{"flush", "vol"}, control.ExitDone, ""},
		{[]string{"flush", "other"}, control.ExitNoVolume, "hint: it serves vol"},
		{[]string{"emergency", "on", "other"}, control.ExitNoVolume, "hint: it serves vol"},
		{[]string{"emergency", "on", "vol"}, control.ExitDone, ""},
		{[]string{"status"}, control.ExitDone, "ack:ram (in force: disk) emergency:on clients:"},
		{[]string{"emergency", "off"}, control.ExitDone, ""},
	} {
		code, stdout, stderr := cli(append(c.args, "--control", at.control)...)
		if code != c.code || !strings.Contains(stdout+stderr, c.want) {
			t.Errorf("ramshelf %v: exit code %d\n%s%swant %d with %q", c.args, code, stdout, stderr, c.code, c.want)
		}
	}

	// These end nothing.
	d.signal(unix.SIGPWR)
	d.signal(syscall.SIGHUP)
	waitFor(t, d, "all volumes are committed and answer as ack=disk", "reload lands later")
	if v := volumes(t, at)[0]; !v.Emergency || v.Ack != "ram" || v.AckInForce != "disk" {
		t.Errorf("status after SIGPWR: %+v", v)
	}
	d.signal(syscall.SIGTERM)
	if code := d.wait(); code != control.ExitDone {
		t.Errorf("SIGTERM: exit code %d\n%s", code, d.stderr)
	}
	gone(t, at.socket, at.control)
	if code, _, _ := cli("status", "--control", at.control); code != control.ExitUnreachable {
		t.Errorf("status afterwards: exit code %d", code)
	}
}

// volumes are those of status --json.
func volumes(t *testing.T, at place) []control.VolumeStatus {
	t.Helper()
	code, stdout, stderr := cli("status", "--json", "--control", at.control)
	var s control.Status
	if err := json.Unmarshal([]byte(stdout), &s); code != control.ExitDone || err != nil {
		t.Fatalf("status: exit code %d, %v\n%s%s", code, err, stdout, stderr)
	}
	return s.Volumes
}

// waitFor waits until the log of d has every text.
func waitFor(t *testing.T, d *process, texts ...string) {
	t.Helper()
	for end := time.Now().Add(waitLimit); ; time.Sleep(5 * time.Millisecond) {
		missing := ""
		for _, text := range texts {
			if !strings.Contains(d.stderr.String(), text) {
				missing = text
			}
		}
		if missing == "" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the log has no %q:\n%s", missing, d.stderr)
		}
	}
}

// greet tells that an NBD server answers.
func greet(t *testing.T, network, address string) {
	t.Helper()
	c, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := make([]byte, 18)
	if _, err := io.ReadFull(c, p); err != nil || string(p[:16]) != "NBDMAGICIHAVEOPT" {
		t.Errorf("greeted by %q, %v", p, err)
	}
}

// A second daemon is refused, whatever it would share with the first, and harms nothing.
func TestSecondDaemonIsRefused(t *testing.T) {
	at := newPlace(t)
	d := start(t, at.args()...)
	d.ready()
	other := newPlace(t)
	for name, c := range map[string]struct{ backing, socket, control, shm string }{
		"everything": {at.backing, at.socket, at.control, at.shm},
		"control":    {other.backing, other.socket, at.control, other.shm},
		"listen":     {other.backing, at.socket, other.control, other.shm},
		"backing":    {at.backing, other.socket, other.control, other.shm},
		"volume":     {at.backing, other.socket, other.control, at.shm},
	} {
		second := start(t, place{"", c.backing, c.socket, c.control, c.shm}.args()...)
		if code := second.wait(); code != control.ExitRefused {
			t.Errorf("%s: exit code %d, want %d\n%s", name, code, control.ExitRefused, second.stderr)
		}
		if !strings.Contains(second.stderr.String(), "hint: ") {
			t.Errorf("%s: no hint\n%s", name, second.stderr)
		}
		gone(t, other.socket, other.control, filepath.Dir(other.control))
	}
	greet(t, "unix", at.socket)
	if code, _, stderr := cli("flush", "--control", at.control); code != control.ExitDone {
		t.Errorf("flush: exit code %d\n%s", code, stderr)
	}
	d.signal(syscall.SIGINT)
	if code := d.wait(); code != control.ExitDone {
		t.Errorf("SIGINT: exit code %d\n%s", code, d.stderr)
	}
}

// Sockets of a daemon that was killed are in nobody's way.
func TestRestartAfterKill(t *testing.T) {
	at := newPlace(t)
	d := start(t, at.args()...)
	d.ready()
	d.signal(syscall.SIGKILL)
	d.wait()
	if _, err := os.Lstat(at.socket); err != nil {
		t.Fatalf("no stale socket to begin with: %v", err)
	}
	d = start(t, at.args()...)
	d.ready()
	greet(t, "unix", at.socket)
	d.signal(syscall.SIGTERM)
	if code := d.wait(); code != control.ExitDone {
		t.Errorf("exit code %d\n%s", code, d.stderr)
	}
}

// What is wrong with the host is refused before anything is touched.
func TestNothingIsLeftBehind(t *testing.T) {
	at := newPlace(t)
	file := at.dir + "/file"
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for name, c := range map[string]struct {
		args []string
		code control.ExitCode
		want string
	}{
		"backing is a folder": {at.args("--backing", "file:"+at.shm), control.ExitFailed, at.shm},
		"backing is missing":  {at.args("--backing", "file:"+at.dir+"/none/home.img"), control.ExitFailed, "no such file"},
		"no such device":      {at.args("--backing", "/dev/no-such-disk"), control.ExitFailed, "/dev/no-such-disk"},
		"socket is a file":    {at.args("--listen", "nbd+unix:///x?socket="+file), control.ExitFailed, "no socket"},
		"no folder":           {at.args("--listen", "nbd+unix:///x?socket="+at.dir+"/none/x"), control.ExitFailed, "no such file"},
		"address is taken":    {at.args("--listen", "nbd://"+taken.Addr().String()), control.ExitRefused, "somebody else serves there"},
		"control is a file":   {at.args("--control", file), control.ExitFailed, "no socket"},
	} {
		d := start(t, c.args...)
		if code := d.wait(); code != c.code || !strings.Contains(d.stderr.String(), c.want) {
			t.Errorf("%s: exit code %d\n%swant %d with %q", name, code, d.stderr, c.code, c.want)
		}
		gone(t, at.socket, at.control, filepath.Dir(at.control), at.backing)
		if left, err := os.ReadDir(at.shm); err != nil || len(left) > 0 {
			t.Errorf("%s: left in --shm: %v, %v", name, left, err)
		}
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != "precious" {
		t.Errorf("the file is %q, %v", got, err)
	}
}

// Two volumes of one file, on one socket and on TCP.
func TestServeFile(t *testing.T) {
	at := newPlace(t)
	port, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := port.Addr().String()
	port.Close()
	path := at.dir + "/ramshelf.toml"
	text := `
control = "` + at.control + `"
shm = "` + at.shm + `"
log_format = "json"
[[volume]]
name = "a"
backing = "file:` + at.dir + `/a.img"
size = "16MiB"
memory = "8MiB"
socket_mode = "0600"
listen = ["nbd+unix:///a?socket=` + at.socket + `", "nbd://` + address + `/a"]
[[volume]]
name = "b"
backing = "file:` + at.dir + `/b.img"
size = "16MiB"
memory = "8MiB"
socket_mode = "0600"
listen = ["nbd+unix:///b?socket=` + at.socket + `"]
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d := start(t, "serve", "--config", path)
	for _, want := range []string{
		"ready a nbd+unix:///a?socket=" + at.socket, "ready a nbd://" + address + "/a", "ready b nbd+unix:///b?socket=" + at.socket,
	} {
		if got := d.ready(); got != want {
			t.Errorf("said %q, want %q", got, want)
		}
	}
	greet(t, "unix", at.socket)
	greet(t, "tcp", address)
	if info, err := os.Stat(at.socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket mode %v, %v", info.Mode(), err)
	}
	code, _, stderr := cli("flush", "--control", at.control)
	if code != control.ExitUsage || !strings.Contains(stderr, "hint: name one of a b") {
		t.Errorf("flush of no volume: exit code %d, %s", code, stderr)
	}
	if code, _, stderr := cli("flush", "b", "--control", at.control); code != control.ExitDone {
		t.Errorf("flush b: exit code %d, %s", code, stderr)
	}
	for _, step := range []struct {
		args []string
		a, b bool
	}{
		{[]string{"on", "b"}, false, true},
		{[]string{"on"}, true, true},
		{[]string{"off", "b"}, true, false},
		{[]string{"off"}, false, false},
	} {
		code, _, stderr := cli(append([]string{"emergency", "--control", at.control}, step.args...)...)
		if v := volumes(t, at); code != control.ExitDone || v[0].Emergency != step.a || v[1].Emergency != step.b {
			t.Errorf("emergency %v: exit code %d, %v and %v, want %v and %v\n%s", step.args, code, v[0].Emergency, v[1].Emergency, step.a, step.b, stderr)
		}
	}
	d.signal(syscall.SIGTERM)
	if code := d.wait(); code != control.ExitDone {
		t.Errorf("exit code %d\n%s", code, d.stderr)
	}
	for line := range strings.Lines(d.stderr.String()) {
		if !json.Valid([]byte(line)) {
			t.Errorf("log line is no JSON: %s", line)
		}
	}
}

// systemd passes the sockets and is told when they are served.
func TestSocketActivation(t *testing.T) {
	at := newPlace(t)
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at.dir + "/notify", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	var files []*os.File
	for _, path := range []string{at.socket, at.dir + "/passed.sock"} {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	args := at.args()
	args = append([]string{"-c", `export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=nbd:control NOTIFY_SOCKET="$0/notify"; exec "$@"`,
		at.dir, os.Args[0]}, args...)
	cmd := exec.Command("/bin/sh", args...)
	cmd.ExtraFiles = files
	d := startWith(t, cmd)
	d.ready()
	greet(t, "unix", at.socket)
	if s, err := control.NewClient(at.dir + "/passed.sock").Status(context.Background()); err != nil || len(s.Volumes) != 1 {
		t.Errorf("status on the inherited socket: %v", err)
	}
	gone(t, at.control)
	d.signal(syscall.SIGTERM)
	if code := d.wait(); code != control.ExitDone {
		t.Errorf("exit code %d\n%s", code, d.stderr)
	}
	if _, err := os.Stat(at.socket); err != nil {
		t.Errorf("a socket of systemd was removed: %v", err)
	}
	for _, want := range []string{"READY=1\nSTATUS=serving vol", "STOPPING=1"} {
		p := make([]byte, 1024)
		n, err := notify.Read(p)
		if err != nil || !strings.HasPrefix(string(p[:n]), want) {
			t.Errorf("systemd was told %q, %v; want %q", p[:n], err, want)
		}
	}
}

// A socket that nobody asked for would never be served.
func TestUnusedActivationSocketIsRefused(t *testing.T) {
	at := newPlace(t)
	var files []*os.File
	for _, path := range []string{at.dir + "/1", at.dir + "/2"} {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	cmd := exec.Command("/bin/sh", append([]string{"-c", `export LISTEN_PID=$$ LISTEN_FDS=2; exec "$0" "$@"`, os.Args[0]}, at.args()...)...)
	cmd.ExtraFiles = files
	d := startWith(t, cmd)
	if code := d.wait(); code != control.ExitUsage || !strings.Contains(d.stderr.String(), "systemd passed 1 sockets") {
		t.Errorf("exit code %d\n%s", code, d.stderr)
	}
	gone(t, at.backing, at.control)
}

// A reader of the daemon's output that goes away does not end it.
func TestSurvivesClosedOutput(t *testing.T) {
	at := newPlace(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], at.args()...)
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	r.Close()
	defer time.AfterFunc(waitLimit, func() { _ = cmd.Process.Kill() }).Stop()
	for end := time.Now().Add(waitLimit); ; time.Sleep(10 * time.Millisecond) {
		if code, _, _ := cli("status", "--control", at.control); code == control.ExitDone {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the daemon never served")
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the daemon ended with %v", err)
	}
}

// A stop takes as long as the backing needs, and tells how far it is; a second signal ends it and loses nothing.
func TestSecondSignal(t *testing.T) {
	at := newPlace(t)
	store := exec.Command("nbdkit", "--foreground", "--exit-with-parent", "-U", at.dir+"/store.sock", "memory", "32M")
	if err := store.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = store.Process.Kill()
		_ = store.Wait()
	})
	waitForSocket(t, at.dir+"/store.sock")
	args := at.args("--ack", "ram", "--staleness", "1h", "--backing", "nbd+unix:///?socket="+at.dir+"/store.sock")
	d := start(t, args...)
	d.ready()
	content := bytes.Repeat([]byte("ramshelf"), 1<<17)
	transfer(t, at, func(c *nbd.Client) error {
		_, err := c.WriteAt(content, 8192)
		return err
	})

	if err := store.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	d.signal(syscall.SIGTERM)
	waitFor(t, d, "msg=draining volume=vol left=\"1.0 MiB\"")
	s, err := control.NewClient(at.control).Status(t.Context())
	if err != nil || s.Volumes[0].DrainRemainingBytes != int64(len(content)) {
		t.Errorf("status while draining: %+v, %v", s, err)
	}
	d.signal(syscall.SIGTERM)
	if code := d.wait(); code != control.ExitFailed || !strings.Contains(d.stderr.String(), "second signal") {
		t.Errorf("second signal: exit code %d\n%s", code, d.stderr)
	}
	if err := store.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}

	d = start(t, args...)
	d.ready()
	transfer(t, at, func(c *nbd.Client) error {
		got := make([]byte, len(content))
		if _, err := c.ReadAt(got, 8192); err != nil {
			return err
		}
		if !bytes.Equal(got, content) {
			t.Error("what was answered is lost")
		}
		return nil
	})
	d.signal(syscall.SIGTERM)
	if code := d.wait(); code != control.ExitDone {
		t.Errorf("exit code %d\n%s", code, d.stderr)
	}
	if left, err := os.ReadDir(at.shm); err != nil || len(left) > 0 {
		t.Errorf("left in --shm: %v, %v", left, err)
	}
}

// transfer does something as a client of the volume.
func transfer(t *testing.T, at place, do func(c *nbd.Client) error) {
	t.Helper()
	c, err := nbd.Dial(t.Context(), "nbd+unix:///vol?socket="+at.socket, nbd.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := do(c); err != nil {
		t.Fatal(err)
	}
}

// waitForSocket waits until somebody serves a socket.
func waitForSocket(t *testing.T, path string) {
	t.Helper()
	for end := time.Now().Add(waitLimit); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", path)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}
