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

// TestStatus checks the documented fields of status --json, and that people get something to read.
func TestStatus(t *testing.T) {
	s := serveRamshelf(t, volume{size: 64 * mib, memory: 32 * mib, ack: "disk"})
	r := s.cli("status", "--json")
	var all struct {
		Schema  *int                         `json:"schema"`
		Volumes []map[string]json.RawMessage `json:"volumes"`
	}
	if err := json.Unmarshal([]byte(r.stdout), &all); err != nil || all.Schema == nil || *all.Schema != 1 || len(all.Volumes) != 1 {
		t.Fatalf("status --json: %v\n%s", err, r.stdout)
	}
	for _, field := range []string{
		"name", "role", "state", "ack", "ack_in_force", "size_bytes", "memory_bytes", "dirty_bytes",
		"uncommitted_bytes", "uncommitted_age_seconds", "epoch", "peer", "backing",
	} {
		if _, ok := all.Volumes[0][field]; !ok {
			t.Errorf("status --json has no volumes[].%s", field)
		}
	}
	if string(all.Volumes[0]["peer"]) != "null" {
		t.Errorf("peer is %s without one, want null", all.Volumes[0]["peer"])
	}
	for field, keys := range map[string][]string{"epoch": {"open", "committed"}, "backing": {"state"}} {
		var nested map[string]json.RawMessage
		if err := json.Unmarshal(all.Volumes[0][field], &nested); err != nil {
			t.Errorf("%s: %v", field, err)
		}
		for _, key := range keys {
			if _, ok := nested[key]; !ok {
				t.Errorf("status --json has no volumes[].%s.%s", field, key)
			}
		}
	}
	st := s.status()
	if st.Name != "vol" || st.Role != "primary" || st.State != "ok" || st.Ack != "disk" || st.AckInForce != "disk" ||
		st.SizeBytes != 64*mib || st.MemoryBytes != 32*mib || st.Backing.State != "ok" || st.DirtyBytes != 0 {
		t.Errorf("status: %+v", st)
	}
	before := st.Epoch
	if err := mustDial(t, s).do(cmdWrite, 0, 0, make([]byte, 5000)); err != nil {
		t.Fatal(err)
	}
	if st := s.status(); st.Epoch.Committed <= before.Committed || st.Epoch.Open <= st.Epoch.Committed {
		t.Errorf("epochs after a write under ack=disk: %+v, before %+v", st.Epoch, before)
	}
	if r := s.cli("status"); r.code != 0 || !strings.Contains(r.stdout, "vol") || !strings.Contains(r.stdout, "64 MiB") && !strings.Contains(r.stdout, "64.0 MiB") {
		t.Errorf("status: exit code %d\n%s", r.code, r.stdout)
	}
	cleanStop(t, s)
	if r := s.cli("status"); r.code != 3 {
		t.Errorf("status without a daemon: exit code %d, want 3\n%s", r.code, r.stderr)
	}
	if r := s.cli("flush"); r.code != 3 {
		t.Errorf("flush without a daemon: exit code %d, want 3\n%s", r.code, r.stderr)
	}
	if _, err := os.Stat(s.socket()); !os.IsNotExist(err) {
		t.Errorf("a clean stop leaves the socket: %v", err)
	}
}

// TestVerbs checks what needs no daemon.
func TestVerbs(t *testing.T) {
	s := newRamshelf(t, volume{})
	for _, row := range []struct {
		args []string
		code int
		word string
	}{
		{[]string{"version"}, 0, "go1."},
		{[]string{"--help"}, 0, "serve"},
		{[]string{"serve", "--help"}, 0, "--backing"},
		{[]string{"frobnicate"}, 64, "frobnicate"},
		{[]string{"promote"}, 1, "later"},
		{[]string{"emergency", "on", "--control", "/nonexistent/c.sock"}, 3, "/nonexistent/c.sock"},
		{[]string{"recover", "--backing", "file:/nonexistent"}, 1, "/nonexistent"},
	} {
		r := command{}.try(t, s.v.binary, row.args...)
		if r.code != row.code || !strings.Contains(r.stdout+r.stderr, row.word) {
			t.Errorf("ramshelf %s: exit code %d, want %d and %q\n%s%s",
				strings.Join(row.args, " "), r.code, row.code, row.word, r.stdout, r.stderr)
		}
	}
}

// TestStaleSocket starts over the socket that a killed daemon left, and not over a file that is none.
func TestStaleSocket(t *testing.T) {
	s := serveRamshelf(t, volume{size: 32 * mib, memory: 16 * mib})
	s.kill()
	if _, err := os.Stat(s.socket()); err != nil {
		t.Fatalf("the killed daemon left no socket: %v", err)
	}
	s.v.extra = []string{"--socket-mode", "0600"}
	s.start()
	if info, err := os.Stat(s.socket()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v, want mode 0600", info.Mode(), err)
	}
	cleanStop(t, s)
	writeFile(t, s.socket(), "not a socket")
	s.launch()
	if code := s.p.wait(t, startLimit); code == 0 {
		t.Error("the daemon started over a file that is no socket")
	}
	if slurp(s.socket()) != "not a socket" {
		t.Error("the daemon removed a file that is no socket")
	}
	if st := fingerprints(t, s.shm); strings.Contains(st, ".mem ") {
		t.Errorf("the refused start left memory: %s", st)
	}
}

// TestSocketActivation passes listening sockets as systemd does.
func TestSocketActivation(t *testing.T) {
	t.Run("systemd-socket-activate", func(t *testing.T) {
		s := newRamshelf(t, volume{size: 32 * mib, memory: 16 * mib})
		args := append([]string{"-l", s.socket(), s.v.binary}, s.args()...)
		p := command{}.start(t, "systemd-socket-activate", args...)
		eventually(t, 20*time.Second, "the activated daemon serves: "+p.stderr(), func() bool {
			c, err := dialNBD(s.socket(), s.export())
			if err == nil {
				c.close()
			}
			return err == nil
		})
		if size := strings.TrimSpace(run(t, "nbdinfo", "--size", s.uri())); size != fmt.Sprint(32*mib) {
			t.Errorf("size %s", size)
		}
		p.signal(syscall.SIGTERM)
		if code := p.wait(t, stopLimit); code != 0 {
			t.Errorf("SIGTERM: exit code %d\n%s", code, p.stderr())
		}
	})
	t.Run("inherited", func(t *testing.T) {
		// A TCP and a Unix socket, bound before the daemon exists: connections wait in the backlog.
		s := newRamshelf(t, volume{size: 32 * mib, memory: 16 * mib})
		tcp, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer tcp.Close()
		unix, err := net.Listen("unix", s.socket())
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close()
		early := raw(t, s)
		s.v.extra = []string{"--listen", "nbd://" + tcp.Addr().String() + "/vol"}
		fds := []*os.File{file(t, tcp), file(t, unix)}
		// The process id must be the daemon's own: a shell sets it and becomes the daemon.
		script := `LISTEN_PID=$$ LISTEN_FDS=2 exec "$0" "$@"`
		p := command{files: fds}.start(t, "sh", append([]string{"-c", script, s.v.binary}, s.args()...)...)
		early.SetReadDeadline(time.Now().Add(startLimit))
		if _, err := early.Read(make([]byte, 18)); err != nil {
			t.Fatalf("a connection made before the daemon: %v\n%s", err, p.stderr())
		}
		for _, uri := range []string{s.uri(), "nbd://" + tcp.Addr().String() + "/vol"} {
			if size := strings.TrimSpace(run(t, "nbdinfo", "--size", uri)); size != fmt.Sprint(32*mib) {
				t.Errorf("%s: size %s", uri, size)
			}
		}
		p.signal(syscall.SIGTERM)
		if code := p.wait(t, stopLimit); code != 0 {
			t.Errorf("SIGTERM: exit code %d\n%s", code, p.stderr())
		}
	})
}

// file is the descriptor of a listener.
func file(t *testing.T, l net.Listener) *os.File {
	t.Helper()
	f, err := l.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestStopUnderLoad stops the daemon while several clients work: exit code 0, every answered write is home.
func TestStopUnderLoad(t *testing.T) {
	for _, ack := range []string{"ram", "disk"} {
		t.Run(ack, func(t *testing.T) {
			const size = 96 * mib
			s := serveRamshelf(t, volume{size: size, memory: 32 * mib, ack: ack})
			l := newLedger(t, size)
			ended := make(chan struct{})
			go func() { defer close(ended); crashLoad.run(s, l, make(chan struct{}), nil) }()
			time.Sleep(700 * time.Millisecond)
			cleanStop(t, s)
			select {
			case <-ended:
			case <-time.After(30 * time.Second):
				t.Fatal("connections outlive the daemon")
			}
			t.Logf("%d writes answered", l.answers)
			checkNothingInShm(t, s.shm)
			l.verifyFile(t, s.home())
			if l.answers < 100 {
				t.Errorf("only %d writes were answered", l.answers)
			}
		})
	}
}

// TestDisk serves from a block device, by sectors of 512 and of 4096 bytes.
func TestDisk(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprint(sector), func(t *testing.T) {
			const size = 64 * mib
			path := sparse(t, filepath.Join(t.TempDir(), "disk.img"), size+16*mib)
			dev := loop(t, path, "--sector-size", fmt.Sprint(sector))
			s := serveRamshelf(t, volume{size: size, memory: 24 * mib, backing: dev})
			l := newLedger(t, size)
			stop := make(chan struct{})
			time.AfterFunc(700*time.Millisecond, func() { close(stop) })
			crashLoad.run(s, l, stop, nil)
			s.kill()
			s.start()
			l.verify(t, s, true)
			cleanStop(t, s)
			run(t, "blockdev", "--flushbufs", dev)
			l.verifyFile(t, path)
			if l.answers < 100 {
				t.Errorf("only %d writes were answered", l.answers)
			}
		})
	}
}
