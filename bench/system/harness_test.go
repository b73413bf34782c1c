package system

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30

	sectorBytes = 512
	blockBytes  = 4096
)

var (
	soak = os.Getenv("RAMSHELF_SOAK") == "1"

	// binDir holds what TestMain and the tests build.
	binDir string
)

func TestMain(m *testing.M) {
	if os.Getenv(janitorEnv) != "" {
		janitorMain()
		return
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "bench/system needs root: it mounts file systems and makes loop devices")
		return 1
	}
	var err error
	if binDir, err = os.MkdirTemp("", "ramshelf-system-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(binDir)
	if err := startJanitor(); err != nil {
		fmt.Fprintln(os.Stderr, "start janitor:", err)
		return 1
	}
	defer stopJanitor()
	keep(keepDir, binDir)
	return m.Run()
}

// ramshelfBinary is the binary under test.
var ramshelfBinary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("RAMSHELF"); path != "" {
		return filepath.Abs(path)
	}
	return build("ramshelf")
})

// plantedBinary is a build whose bugs RAMSHELF_PLANT chooses.
var plantedBinary = sync.OnceValues(func() (string, error) {
	return build("ramshelf-planted", "-tags", "planted")
})

func build(name string, flags ...string) (string, error) {
	path := filepath.Join(binDir, name)
	args := append([]string{"build", "-o", path}, flags...)
	cmd := exec.Command("go", append(args, "github.com/ramshelf/ramshelf/cmd/ramshelf")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", name, err, out)
	}
	return path, nil
}

// count is n, or the value of the environment variable, or the soak's number.
func count(env string, n, soakN int) int {
	if v, err := strconv.Atoi(os.Getenv(env)); err == nil && v > 0 {
		return v
	}
	if soak {
		return soakN
	}
	return n
}

// tool is the path of a program that the test cannot do without.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		for _, dir := range []string{"/usr/sbin", "/sbin"} {
			if _, err := os.Stat(dir + "/" + name); err == nil {
				return dir + "/" + name
			}
		}
		t.Fatalf("%s is missing: install the packages that bench/system names (%v)", name, err)
	}
	return path
}

// commandLimit is how long a tool may take; a tool that takes longer is stuck.
const commandLimit = 2 * time.Minute

// result is how a command ended.
type result struct {
	code           int // -1 when it was killed
	stdout, stderr string
}

// command is a tool to run: a name, arguments, and where they differ from the usual, the rest.
type command struct {
	env           []string
	dir           string
	stdin, stdout *os.File   // instead of nothing, and of a file that process.stdout reads
	files         []*os.File // passed as descriptors 3 and on
	limit         time.Duration
}

// run runs a tool that must succeed and returns what it printed.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	return command{}.must(t, name, args...)
}

func (c command) must(t testing.TB, name string, args ...string) string {
	t.Helper()
	r := c.try(t, name, args...)
	if r.code != 0 {
		t.Fatalf("%s %s: exit code %d\n%s%s", name, strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// try runs a tool that may fail. Its output goes to files, so that nothing waits for a process that cannot be
// killed; when the limit passes, the test ends.
func (c command) try(t testing.TB, name string, args ...string) result {
	t.Helper()
	p := c.start(t, name, args...)
	limit := c.limit
	if limit == 0 {
		limit = commandLimit
	}
	select {
	case <-p.done:
	case <-time.After(limit):
		p.kill()
		select {
		case <-p.done:
			t.Fatalf("%s %s: not done after %v\n%s%s", name, strings.Join(args, " "), limit, p.stdout(), p.stderr())
		case <-time.After(10 * time.Second):
			t.Fatalf("%s %s: stuck in the kernel", name, strings.Join(args, " "))
		}
	}
	return result{p.code(), p.stdout(), p.stderr()}
}

// process is a running tool or daemon, in a process group of its own.
type process struct {
	cmd      *exec.Cmd
	out, err string // files
	done     chan struct{}
	drop     func()
}

// start starts a tool or a daemon; it is killed when the test ends.
func (c command) start(t testing.TB, name string, args ...string) *process {
	t.Helper()
	dir := t.TempDir()
	p := &process{out: dir + "/stdout", err: dir + "/stderr", done: make(chan struct{})}
	path := name
	if !strings.Contains(name, "/") {
		path = tool(t, name)
	}
	p.cmd = exec.Command(path, args...)
	p.cmd.Dir = c.dir
	p.cmd.Env = append(append(os.Environ(), "LC_ALL=C"), c.env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.ExtraFiles = c.files
	stdout, stderr := create(t, p.out), create(t, p.err)
	defer stdout.Close()
	defer stderr.Close()
	p.cmd.Stdout, p.cmd.Stderr = stdout, stderr
	if c.stdin != nil {
		p.cmd.Stdin = c.stdin
	}
	if c.stdout != nil {
		p.cmd.Stdout = c.stdout
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	p.drop = keepProcess(p.cmd.Process.Pid)
	go func() {
		p.cmd.Wait()
		p.drop()
		close(p.done)
	}()
	t.Cleanup(func() { p.end(t) })
	return p
}

// end kills what still runs and waits for it.
func (p *process) end(t testing.TB) {
	if p.ended() {
		return
	}
	p.kill()
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		t.Errorf("%s does not die", p.cmd.Path)
	}
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// kill is SIGKILL to the whole group, also where it is stopped.
func (p *process) kill() { p.signal(syscall.SIGKILL) }

func (p *process) signal(s syscall.Signal) {
	if !p.ended() {
		syscall.Kill(-p.pid(), s)
	}
}

// wait waits until the process has ended and returns its exit code.
func (p *process) wait(t testing.TB, limit time.Duration) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(limit):
		p.kill()
		t.Fatalf("%s: not done after %v\n%s%s", p.cmd.Path, limit, p.stdout(), tail(p.stderr(), 40))
	}
	return p.code()
}

func (p *process) code() int      { return p.cmd.ProcessState.ExitCode() }
func (p *process) stdout() string { return slurp(p.out) }
func (p *process) stderr() string { return slurp(p.err) }

// slurp is what a file holds now, "" where there is none.
func slurp(path string) string {
	b, _ := os.ReadFile(path)
	return string(b)
}

func create(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// tail is the last lines of s.
func tail(s string, lines int) string {
	all := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// eventually polls until ok reports true; when the limit passes, the test ends.
func eventually(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after %v still not: %s", limit, what)
		}
	}
}

// sparse makes a file of the size.
func sparse(t testing.TB, path string, bytes int64) string {
	t.Helper()
	f := create(t, path)
	defer f.Close()
	if err := f.Truncate(bytes); err != nil {
		t.Fatal(err)
	}
	return path
}

// shortDir is a directory whose path leaves room for the name of a Unix socket.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rs")
	if err != nil {
		t.Fatal(err)
	}
	drop := keep(keepDir, dir)
	t.Cleanup(func() { os.RemoveAll(dir); drop() })
	return dir
}

// shmDir is a directory of the test's own in shared memory.
func shmDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ramshelf-test-")
	if err != nil {
		t.Fatal(err)
	}
	drop := keep(keepDir, dir)
	t.Cleanup(func() { os.RemoveAll(dir); drop() })
	return dir
}

// mount mounts and sees to it that it is unmounted. The test process itself never looks into the mount: a
// server that hangs would hang it too.
func mount(t testing.TB, args ...string) {
	t.Helper()
	point := args[len(args)-1]
	if err := os.MkdirAll(point, 0o755); err != nil {
		t.Fatal(err)
	}
	drop := keep(keepMount, point)
	run(t, "mount", args...)
	t.Cleanup(func() {
		if mounted(point) {
			discard(keepMount, point)
		}
		drop()
	})
}

func mounted(point string) bool {
	return strings.Contains(slurp("/proc/self/mounts"), " "+point+" ")
}

// attached has what takes each loop device of this process off the janitor's list.
var attached sync.Map

// loop makes a loop device of a file and sees to it that it is detached.
func loop(t testing.TB, file string, flags ...string) string {
	t.Helper()
	dev := strings.TrimSpace(run(t, "losetup", append(flags, "-f", "--show", file)...))
	attached.Store(dev, keep(keepLoop, dev))
	t.Cleanup(func() { detach(t, dev) })
	return dev
}

// detach detaches a loop device, unless that was done before: by now its number may be somebody else's.
func detach(t testing.TB, dev string) {
	t.Helper()
	drop, ok := attached.LoadAndDelete(dev)
	if !ok {
		return
	}
	if r := (command{limit: 10 * time.Second}).try(t, "losetup", "-d", dev); r.code != 0 {
		t.Errorf("losetup -d %s: exit code %d %s", dev, r.code, r.stderr)
		return // the janitor tries again
	}
	drop.(func())()
}

// fuseDisk shows the export at the URI as a file, through nbdfuse (recipe R1), until unmount is called or the test
// ends.
func fuseDisk(t testing.TB, uri string) (file string, unmount func()) {
	t.Helper()
	if r := (command{}).try(t, "nbdinfo", "--can", "flush", uri); r.code != 0 {
		t.Fatalf("%s does not advertise FLUSH, so nbdfuse would drop fsync (exit code %d) %s", uri, r.code, r.stderr)
	}
	point := t.TempDir()
	file = filepath.Join(point, "disk")
	drop := keep(keepFuse, point)
	p := command{}.start(t, "nbdfuse", file, uri)
	unmount = sync.OnceFunc(func() {
		if err := quietly("fusermount", "-u", point); err != nil {
			quietly("fusermount", "-uz", point)
		}
		select {
		case <-p.done:
		case <-time.After(10 * time.Second):
			p.kill()
		}
		drop()
	})
	t.Cleanup(unmount)
	eventually(t, 20*time.Second, "nbdfuse shows the volume: "+p.stderr(), func() bool {
		return p.ended() || mounted(point)
	})
	if p.ended() {
		t.Fatalf("nbdfuse: %s", p.stderr())
	}
	return file, unmount
}
