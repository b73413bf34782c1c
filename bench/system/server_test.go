package system

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A server is one NBD server on a Unix socket: ours, or another to calibrate a test by.
type server interface {
	uri() string    // of the volume
	socket() string // path
	export() string // name
	home() string   // path of the file that the volume's content arrives in, "" without one
	start()         // starts it, again after a kill; returns when it serves
	kill()          // SIGKILL, and waits
	stop() int      // SIGTERM; the exit code
	pid() int
}

// volume is how a daemon is started: the flags of serve. Zero values get a small volume over a file.
type volume struct {
	size, memory int64 // bytes; 256 MiB and 64 MiB
	ack          string
	journal      string // internal
	backing      string // a file of the test's own
	extra        []string
	binary       string // the one under test
	env          []string
	config       string // the text of a TOML file instead of all flags
}

// ramshelf is our daemon.
type ramshelf struct {
	t       testing.TB
	v       volume
	dir     string // of the sockets
	shm     string
	control string
	p       *process
	starts  int
}

// startLimit is how long a daemon may take until it serves: it may have 1 GiB to lock or a file to read.
const startLimit = 30 * time.Second

// newRamshelf prepares a daemon; start starts it.
func newRamshelf(t testing.TB, v volume) *ramshelf {
	t.Helper()
	if v.size == 0 {
		v.size = 256 * mib
	}
	if v.memory == 0 {
		v.memory = 64 * mib
	}
	if v.ack == "" {
		v.ack = "ram"
	}
	if v.journal == "" {
		v.journal = "internal"
	}
	if v.backing == "" {
		v.backing = "file:" + filepath.Join(t.TempDir(), "home.img")
	}
	if v.binary == "" {
		path, err := ramshelfBinary()
		if err != nil {
			t.Fatal(err)
		}
		v.binary = path
	}
	s := &ramshelf{t: t, v: v, dir: shortDir(t), shm: shmDir(t)}
	s.control = s.dir + "/control.sock"
	return s
}

// serveRamshelf starts a daemon.
func serveRamshelf(t testing.TB, v volume) *ramshelf {
	t.Helper()
	s := newRamshelf(t, v)
	s.start()
	return s
}

func (s *ramshelf) uri() string    { return nbdURI(s.export(), s.socket()) }
func (s *ramshelf) socket() string { return s.dir + "/nbd.sock" }
func (s *ramshelf) export() string { return "vol" }
func (s *ramshelf) pid() int       { return s.p.pid() }

func (s *ramshelf) home() string {
	path, ok := strings.CutPrefix(s.v.backing, "file:")
	if !ok {
		return ""
	}
	return path
}

func nbdURI(export, socket string) string {
	return fmt.Sprintf("nbd+unix:///%s?socket=%s", export, socket)
}

// args are the arguments of serve.
func (s *ramshelf) args() []string {
	if s.v.config != "" {
		path := filepath.Join(s.dir, "ramshelf.toml")
		if err := os.WriteFile(path, []byte(s.v.config), 0o600); err != nil {
			s.t.Fatal(err)
		}
		return []string{"serve", "--config", path, "--control", s.control, "--shm", s.shm}
	}
	args := []string{
		"serve", "--name", s.export(), "--backing", s.v.backing,
		"--size", fmt.Sprint(s.v.size), "--memory", fmt.Sprint(s.v.memory),
		"--ack", s.v.ack, "--journal", s.v.journal,
		"--listen", nbdURI(s.export(), s.socket()),
		"--control", s.control, "--shm", s.shm,
	}
	return append(args, s.v.extra...)
}

func (s *ramshelf) start() {
	s.t.Helper()
	s.launch()
	s.ready()
}

// launch starts the process and does not wait until it serves.
func (s *ramshelf) launch() {
	s.t.Helper()
	s.starts++
	s.p = command{env: append([]string{"GOTRACEBACK=all"}, s.v.env...)}.start(s.t, s.v.binary, s.args()...)
	p, n := s.p, s.starts
	s.t.Cleanup(func() {
		if s.t.Failed() {
			s.t.Logf("end of the log of daemon %d:\n%s", n, lastWords(p.stderr()))
		}
	})
}

// lastWords is the end of a log, or the crash in it.
func lastWords(log string) string {
	for _, word := range []string{"panic: ", "fatal error: ", "unexpected fault address", "SIGSEGV", "SIGBUS"} {
		if at := strings.Index(log, word); at >= 0 {
			return log[at:min(len(log), at+4000)]
		}
	}
	return tail(log, 40)
}

// ready waits until the daemon serves.
func (s *ramshelf) ready() {
	s.t.Helper()
	for end := time.Now().Add(startLimit); ; time.Sleep(5 * time.Millisecond) {
		if s.p.ended() {
			s.t.Fatalf("the daemon ended with %d:\n%s", s.p.code(), lastWords(s.p.stderr()))
		}
		c, err := dialNBD(s.socket(), s.export())
		if err == nil {
			c.close()
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("the daemon does not serve after %v: %v\n%s", startLimit, err, lastWords(s.p.stderr()))
		}
	}
}

func (s *ramshelf) kill() {
	s.t.Helper()
	if s.p.ended() {
		s.t.Fatalf("the daemon ended by itself with %d:\n%s", s.p.code(), lastWords(s.p.stderr()))
	}
	s.p.kill()
	s.p.wait(s.t, 30*time.Second)
}

// stopLimit is how long a drain may take.
const stopLimit = 90 * time.Second

func (s *ramshelf) stop() int {
	s.t.Helper()
	if s.p.ended() {
		s.t.Fatalf("the daemon ended by itself with %d:\n%s", s.p.code(), lastWords(s.p.stderr()))
	}
	s.p.signal(syscall.SIGTERM)
	return s.p.wait(s.t, stopLimit)
}

// cleanStop stops the daemon, which must say 0.
func cleanStop(t testing.TB, s server) {
	t.Helper()
	if code := s.stop(); code != 0 {
		log := ""
		if r, ok := s.(*ramshelf); ok {
			log = tail(r.p.stderr(), 40)
		}
		t.Fatalf("SIGTERM: exit code %d, want 0\n%s", code, log)
	}
}

// cli runs a client verb.
func (s *ramshelf) cli(args ...string) result {
	s.t.Helper()
	return command{}.try(s.t, s.v.binary, append(args, "--control", s.control)...)
}

// flush runs `ramshelf flush`, which must succeed.
func (s *ramshelf) flush() {
	s.t.Helper()
	if r := s.cli("flush"); r.code != 0 {
		s.t.Fatalf("ramshelf flush: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}

// volumeStatus are the documented fields of `status --json`.
type volumeStatus struct {
	Name                  string      `json:"name"`
	Role                  string      `json:"role"`
	State                 string      `json:"state"`
	Ack                   string      `json:"ack"`
	AckInForce            string      `json:"ack_in_force"`
	SizeBytes             int64       `json:"size_bytes"`
	MemoryBytes           int64       `json:"memory_bytes"`
	DirtyBytes            int64       `json:"dirty_bytes"`
	UncommittedBytes      int64       `json:"uncommitted_bytes"`
	UncommittedAgeSeconds json.Number `json:"uncommitted_age_seconds"`
	Epoch                 struct {
		Open      uint64 `json:"open"`
		Committed uint64 `json:"committed"`
	} `json:"epoch"`
	Peer    *json.RawMessage `json:"peer"`
	Backing struct {
		State string `json:"state"`
		Error string `json:"error"`
	} `json:"backing"`
}

// status is the only volume's part of `status --json`.
func (s *ramshelf) status() volumeStatus {
	s.t.Helper()
	r := s.cli("status", "--json")
	if r.code != 0 {
		s.t.Fatalf("ramshelf status --json: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	var all struct {
		Schema  int            `json:"schema"`
		Volumes []volumeStatus `json:"volumes"`
	}
	if err := json.Unmarshal([]byte(r.stdout), &all); err != nil {
		s.t.Fatalf("status --json: %v\n%s", err, r.stdout)
	}
	if all.Schema != 1 || len(all.Volumes) != 1 {
		s.t.Fatalf("status --json: schema %d, %d volumes\n%s", all.Schema, len(all.Volumes), r.stdout)
	}
	return all.Volumes[0]
}

// nbdkit is nbdkit as a server under test: memory, or a file whose content survives kill -9 because writes are
// in the page cache before they are answered.
type nbdkit struct {
	t    testing.TB
	dir  string
	args []string // plugin with parameters, filters before it
	env  []string
	file string
	p    *process
}

// newNBDKit prepares an nbdkit with the arguments; start starts it.
func newNBDKit(t testing.TB, file string, args ...string) *nbdkit {
	t.Helper()
	return &nbdkit{t: t, dir: shortDir(t), args: args, file: file}
}

func nbdkitMemory(t testing.TB, size int64) *nbdkit {
	t.Helper()
	return newNBDKit(t, "", "memory", fmt.Sprint(size))
}

func nbdkitFile(t testing.TB, size int64) *nbdkit {
	t.Helper()
	path := sparse(t, filepath.Join(t.TempDir(), "nbdkit.img"), size)
	return newNBDKit(t, path, "file", path)
}

func (s *nbdkit) uri() string    { return nbdURI("", s.socket()) }
func (s *nbdkit) socket() string { return s.dir + "/nbdkit.sock" }
func (s *nbdkit) export() string { return "" }
func (s *nbdkit) home() string   { return s.file }
func (s *nbdkit) pid() int       { return s.p.pid() }

func (s *nbdkit) start() {
	s.t.Helper()
	os.Remove(s.socket())
	s.p = command{env: s.env}.start(s.t, "nbdkit", append([]string{"-f", "-U", s.socket()}, s.args...)...)
	eventually(s.t, 10*time.Second, "nbdkit listens", func() bool {
		if s.p.ended() {
			s.t.Fatalf("nbdkit: %s", s.p.stderr())
		}
		c, err := net.Dial("unix", s.socket())
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func (s *nbdkit) kill() {
	s.t.Helper()
	s.p.kill()
	s.p.wait(s.t, 30*time.Second)
}

func (s *nbdkit) stop() int {
	s.t.Helper()
	s.p.signal(syscall.SIGTERM)
	return s.p.wait(s.t, stopLimit)
}

// serve starts the server under test: our daemon, or nbdkit over a file where RAMSHELF_TARGET says so.
func serve(t testing.TB, v volume) server {
	t.Helper()
	if os.Getenv("RAMSHELF_TARGET") == "nbdkit" {
		s := nbdkitFile(t, max(v.size, 256*mib))
		if v.size != 0 {
			s = nbdkitFile(t, v.size)
		}
		s.start()
		return s
	}
	return serveRamshelf(t, v)
}

// rssPeak is the largest resident set of a process so far, in bytes: VmHWM of proc(5).
func rssPeak(t testing.TB, pid int) int64 {
	t.Helper()
	for line := range strings.Lines(slurp(fmt.Sprintf("/proc/%d/status", pid))) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kb); n == 1 {
			return kb * kib
		}
	}
	t.Fatalf("process %d has no VmHWM", pid)
	return 0
}

// rssBeyondMemory is the bound on what a daemon needs besides --memory and its metadata, a hundredth of it.
const rssBeyondMemory = 64 * mib

// checkRSS checks the bound for a daemon with one volume.
func checkRSS(t testing.TB, s server, memory int64) {
	t.Helper()
	r, ok := s.(*ramshelf)
	if !ok {
		return
	}
	peak := rssPeak(t, r.pid())
	t.Logf("RSS peaked at %d MiB with %d MiB of memory", peak/mib, memory/mib)
	if peak > memory+memory/100+rssBeyondMemory {
		t.Errorf("RSS peaked at %d MiB: %d MiB beyond --memory, the bound is %d MiB",
			peak/mib, (peak-memory)/mib, int64(rssBeyondMemory)/mib)
	}
}
