package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/bench"
	"github.com/ramshelf/ramshelf/bench/load"
)

// kind says what a server stands for in the comparison.
type kind int

const (
	ours  kind = iota // the subject, one
	hot               // the subject with less memory than device
	peer              // what it is compared with
	floor             // what the machine allows
)

// spec is how to start one server. In its texts DIR is the server's own directory on tmpfs and SIZE the
// device's size in bytes.
type spec struct {
	name    string
	kind    kind
	why     string // what was chosen, and on whose advice
	command []string
	files   map[string]string // to be written before the start: name in DIR and content
	disk    bool              // make a file DIR/disk of SIZE bytes before the start
	daemon  bool              // the command forks, leaves the process id of the server in DIR/pid and ends
	export  string
	version []string // the command that prints the version, on its first line
	settle  []string // command that returns when what a job left to do in the background is done
	// runs tells which jobs the server takes part in; nil is all.
	runs func(job) bool
}

const (
	startTimeout = 30 * time.Second
	stopTimeout  = 30 * time.Second
)

// specs lists the servers. The binaries of the subject and of the floor are named by their paths; memory is
// that of the subject, hotMemory that of its hot-set variant, in bytes.
func specs(ramshelf, floorPath string, memory, hotMemory int64) []spec {
	list := []spec{}
	if ramshelf != "" {
		list = append(list,
			ramshelfSpec("ramshelf", ours, ramshelf, memory, "memory larger than the device: all of it stays in RAM, written home every second"),
			ramshelfSpec("ramshelf-hot", hot, ramshelf, hotMemory, "memory a quarter of the device: most reads come from the backing"))
		list[1].runs = func(j job) bool { return j.hot }
	}
	return append(list,
		spec{
			name: "nbdkit", kind: peer,
			why:     "memory plugin; allocator=malloc is the faster one by nbdkit-memory-plugin(1); 16 threads per connection, the default: fewer made no difference",
			command: []string{"nbdkit", "-f", "-U", "DIR/s", "memory", "SIZE", "allocator=malloc"},
			version: []string{"nbdkit", "--version"},
		},
		spec{
			name: "nbdkit-nosr", kind: peer,
			why:     "the same without structured replies, which saves clients a receive",
			command: []string{"nbdkit", "-f", "--no-sr", "-U", "DIR/s", "memory", "SIZE", "allocator=malloc"},
			version: []string{"nbdkit", "--version"},
			runs:    func(j job) bool { return j.fio != nil },
		},
		spec{
			name: "nbd-server", kind: peer, export: "vol", disk: true,
			why:     "file on tmpfs; flush, fua and trim on, as every one of them is off by default; 4 threads, the default",
			command: []string{"nbd-server", "-C", "DIR/config", "-p", "DIR/pid"},
			daemon:  true,
			files: map[string]string{"config": "[generic]\nunixsock = DIR/s\nmax_threads = 4\n" +
				"[vol]\nexportname = DIR/disk\nflush = true\nfua = true\ntrim = true\n"},
			version: []string{"nbd-server", "-V"},
		},
		spec{
			name: "qemu-nbd", kind: peer, disk: true,
			why:     "raw file on tmpfs; io_uring, which is faster here than its default of threads; cache=writeback, the default; 16 clients",
			command: []string{"qemu-nbd", "-t", "-e", "16", "-f", "raw", "--cache=writeback", "--aio=io_uring", "--discard=unmap", "-k", "DIR/s", "DIR/disk"},
			version: []string{"qemu-nbd", "--version"},
		},
		spec{
			name: "floor", kind: floor,
			why:     "parses, copies each payload once, gathers replies, and nothing else: what the machine allows",
			command: []string{floorPath, "-listen", "unix:DIR/s", "-size-mib", "MIB"},
		})
}

func ramshelfSpec(name string, k kind, path string, memory int64, why string) spec {
	return spec{
		name: name, kind: k, why: why, export: "vol",
		command: []string{path, "serve", "--name", "vol", "--backing", "file:DIR/disk", "--size", "SIZE",
			"--memory", strconv.FormatInt(memory, 10), "--ack", "ram", "--flush", "ack", "--staleness", "1s", "--journal", "none",
			"--listen", "nbd+unix:///vol?socket=DIR/s", "--control", "DIR/control", "--shm", "DIR/shm"},
		version: []string{path, "version"},
		settle:  []string{path, "flush", "--control", "DIR/control"},
	}
}

// running is a started server.
type running struct {
	spec
	dir  string
	size int64
	log  *os.File
	proc *os.Process
	done chan struct{} // closed when proc has ended
}

// start makes the server's directory below root, starts it there and waits until it answers.
func (s spec) start(ctx context.Context, root string, size int64) (*running, error) {
	r := &running{spec: s, dir: filepath.Join(root, s.name), size: size, done: make(chan struct{})}
	if err := r.prepare(); err != nil {
		return nil, fmt.Errorf("prepare %s: %w", s.name, err)
	}
	if err := r.launch(); err != nil {
		return nil, fmt.Errorf("start %s: %w%s", s.name, err, r.lastWords())
	}
	go func() {
		// How it ended is in its log; awaitReady and the jobs tell whether it ended too early.
		_, _ = r.proc.Wait()
		close(r.done)
	}()
	if err := r.awaitReady(ctx); err != nil {
		r.stop()
		return nil, fmt.Errorf("start %s: %w%s", s.name, err, r.lastWords())
	}
	return r, nil
}

// launch starts the process. A server that forks becomes a child of this process all the same (see
// adoptOrphans), so that it can be waited for.
func (r *running) launch() error {
	argv := r.expand(r.command)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = r.log, r.log
	if r.daemon {
		if err := cmd.Run(); err != nil {
			return err
		}
		return r.findDaemon()
	}
	// The server goes when this process goes, however that comes.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	r.proc = cmd.Process
	return nil
}

// findDaemon waits for the process id that a server leaves when it has forked.
func (r *running) findDaemon() error {
	deadline := time.Now().Add(startTimeout)
	for {
		text, err := os.ReadFile(filepath.Join(r.dir, "pid"))
		if pid, convErr := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && convErr == nil {
			r.proc, err = os.FindProcess(pid)
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no process id in %s after %s", filepath.Join(r.dir, "pid"), startTimeout)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// adoptOrphans makes processes that forked and lost their parent children of this one.
func adoptOrphans() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become parent of servers: %w", err)
	}
	return nil
}

func (r *running) prepare() error {
	if err := os.MkdirAll(filepath.Join(r.dir, "shm"), 0o700); err != nil {
		return err
	}
	for name, content := range r.files {
		if err := os.WriteFile(filepath.Join(r.dir, name), []byte(r.expandText(content)), 0o600); err != nil {
			return err
		}
	}
	if r.disk {
		if err := os.WriteFile(filepath.Join(r.dir, "disk"), nil, 0o600); err != nil {
			return err
		}
		if err := os.Truncate(filepath.Join(r.dir, "disk"), r.size); err != nil {
			return err
		}
	}
	log, err := os.Create(filepath.Join(r.dir, "log"))
	r.log = log
	return err
}

func (r *running) expandText(text string) string {
	return strings.NewReplacer("DIR", r.dir, "SIZE", strconv.FormatInt(r.size, 10), "MIB", strconv.FormatInt(r.size>>20, 10)).Replace(text)
}

func (r *running) expand(words []string) []string {
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = r.expandText(w)
	}
	return out
}

// target is where the server listens.
func (r *running) target() load.Target {
	return load.Target{Network: "unix", Address: filepath.Join(r.dir, "s"), Export: r.export}
}

// awaitReady waits until a client gets through the handshake and sees the right size.
func (r *running) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		l, err := load.Open(ctx, load.Config{Target: r.target()})
		if err == nil {
			defer l.Close()
			if l.Size() != r.size {
				return fmt.Errorf("export has %d bytes, want %d", l.Size(), r.size)
			}
			return nil
		}
		select {
		case <-r.done:
			return errors.New("process ended")
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// rest waits until what the last job left to do is done, so that it does not burden the next server.
func (r *running) rest(ctx context.Context) error {
	if r.settle == nil {
		return nil
	}
	argv := r.expand(r.settle)
	if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
	}
	return nil
}

// cpu is the processor time that the server has used so far.
func (r *running) cpu() (time.Duration, error) { return bench.CPU(r.proc.Pid) }

// stop ends the server.
func (r *running) stop() {
	// It may have ended already; then there is nothing to signal.
	_ = r.proc.Signal(syscall.SIGTERM)
	select {
	case <-r.done:
	case <-time.After(stopTimeout):
		_ = r.proc.Kill()
		<-r.done
	}
	// Everything that was logged is in the file already.
	_ = r.log.Close()
}

// lastWords is the end of the server's log, for errors.
func (r *running) lastWords() string {
	text, err := os.ReadFile(filepath.Join(r.dir, "log"))
	if err != nil || len(text) == 0 {
		return ""
	}
	return "; its log ends:\n" + string(text[max(0, len(text)-1000):])
}

// versionOf is the first line that the server's version command prints.
func (s spec) versionOf() string {
	if s.version == nil {
		return "as checked in"
	}
	out, err := exec.Command(s.version[0], s.version[1:]...).CombinedOutput()
	line, _, _ := strings.Cut(string(out), "\n")
	if err != nil && line == "" {
		return "unknown"
	}
	return strings.TrimSpace(line)
}

// commandLine is the command with DIR for the server's own directory, as it stands in the report.
func (s spec) commandLine(size int64) string {
	return (&running{spec: s, dir: "$DIR", size: size}).expandText(strings.Join(s.command, " "))
}
