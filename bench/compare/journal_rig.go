package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/bench"
	"github.com/ramshelf/ramshelf/bench/load"
)

const mib = 1 << 20

// rig is what the parts share: where things lie, and the commands that were run.
type rig struct {
	options
	root, disk string // directories on a tmpfs and on the disk
	part       string // that is being measured
	commands   []usedCommand
	kept       []*running // servers that stay for all rounds
}

// usedCommand is a command line of the report.
type usedCommand struct{ part, line string }

func newRig(o options) (*rig, error) {
	root, err := os.MkdirTemp(o.dir, "ramshelf-bench-")
	if err != nil {
		return nil, fmt.Errorf("make directory: %w", err)
	}
	r := &rig{options: o, root: root}
	if r.disk, err = os.MkdirTemp(o.flushDir, "ramshelf-bench-"); err != nil {
		return nil, errors.Join(fmt.Errorf("make directory: %w", err), r.remove())
	}
	// The largest part has a volume, its journal and its memory there.
	if err := checkRoom(root, 8<<30); err != nil {
		return nil, errors.Join(err, r.remove())
	}
	return r, nil
}

// remove ends what was kept and removes everything.
func (r *rig) remove() error {
	for _, s := range r.kept {
		s.stop()
	}
	err := os.RemoveAll(r.root)
	if r.disk != "" {
		err = errors.Join(err, os.RemoveAll(r.disk))
	}
	return err
}

// scaled is n bytes, and a quarter of them in a quick run.
func (r *rig) scaled(n int64) int64 {
	if r.quick {
		return n / 4
	}
	return n
}

// note keeps a command line for the report, each once a part. What differs from round to round stands for all.
func (r *rig) note(argv []string) {
	words := slices.Clone(argv)
	for i, w := range words {
		if name, _, ok := strings.Cut(w, "="); ok && name == "--randseed" {
			words[i] = name + "=SEED"
		}
	}
	line := strings.NewReplacer(r.root, "$DIR", r.disk, "$DISK").Replace(strings.Join(words, " "))
	if c := (usedCommand{r.part, line}); !slices.Contains(r.commands, c) {
		r.commands = append(r.commands, c)
	}
}

// volume is a ramshelf to be measured.
type volume struct {
	backing      string // BACKING
	size, memory int64
	ack          string
	staleness    time.Duration
	journal      string
	more         []string // further arguments
}

func (r *rig) spec(v volume) spec {
	return spec{
		name: "ramshelf", kind: ours, export: "vol",
		command: append([]string{r.ramshelf, "serve", "--name", "vol", "--backing", v.backing, "--size", "SIZE",
			"--memory", strconv.FormatInt(v.memory, 10), "--ack", v.ack, "--staleness", v.staleness.String(), "--journal", v.journal,
			"--listen", "nbd+unix:///vol?socket=DIR/s", "--control", "DIR/control", "--shm", "DIR/shm"}, v.more...),
		settle: []string{r.ramshelf, "flush", "--control", "DIR/control"},
	}
}

// daemon is a running ramshelf and the way to ask it.
type daemon struct {
	*running
	ask *asker
}

// start starts a ramshelf and waits until what it fills by itself is filled.
func (r *rig) start(ctx context.Context, v volume) (*daemon, error) {
	one, err := r.spec(v).start(ctx, r.root, v.size)
	if err != nil {
		return nil, err
	}
	r.note(one.expand(one.command))
	d := &daemon{one, newAsker(filepath.Join(one.dir, "control"))}
	err = d.await(ctx, fillTimeout, func(s *volumeStatus) bool { return s.FillRemaining == 0 })
	if err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the memory to be filled: %w", err), d.end())
	}
	return d, nil
}

const fillTimeout = 2 * time.Minute

// end stops d cleanly, with everything home, and removes what it had on the tmpfs.
func (d *daemon) end() error {
	d.ask.close()
	d.stop()
	return os.RemoveAll(d.dir)
}

// kill ends d as a power cut would, but for its memory.
func (d *daemon) kill() {
	d.ask.close()
	// It may have ended already; then there is nothing to kill.
	_ = d.proc.Kill()
	<-d.done
	_ = d.log.Close()
}

// await looks at the status until it is as wanted.
func (d *daemon) await(ctx context.Context, limit time.Duration, wanted func(*volumeStatus) bool) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		s, err := d.ask.status(ctx)
		if err != nil {
			return err
		}
		if wanted(s) {
			return nil
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

// sleep waits for d, or for the end of ctx, which is an error.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// dirty writes blocks once, 4 KiB each, in their order, with enough in flight to be quick.
func (d *daemon) dirty(ctx context.Context, blocks []uint64) error {
	return dirty(ctx, d.running, blocks)
}

// someBlocks draws n different blocks of the first size bytes, in random order.
func someBlocks(size, n int64) []uint64 {
	all := rand.Perm(int(size / blockBytes))[:n]
	blocks := make([]uint64, n)
	for i, p := range all {
		blocks[i] = uint64(p)
	}
	return blocks
}

// volumeStatus is what is looked at of a volume's status (docs/OPERATIONS.md).
type volumeStatus struct {
	Dirty            int64 `json:"dirty_bytes"`
	Uncommitted      int64 `json:"uncommitted_bytes"`
	UncommittedLimit int64 `json:"uncommitted_limit_bytes"`
	FillRemaining    int64 `json:"fill_remaining_bytes"`
	Backing          struct {
		Written int64 `json:"written_bytes"`
		Writes  int64 `json:"writes"`
		Syncs   int64 `json:"syncs"`
	} `json:"backing"`
	Journal struct {
		Bytes   int64 `json:"bytes"`
		Used    int64 `json:"used_bytes"`
		Written int64 `json:"written_bytes"`
		Rate    int64 `json:"bytes_per_second"`
		Slowest int64 `json:"slowest_bytes_per_second"`
	} `json:"journal"`
	Writes struct {
		Bytes int64 `json:"bytes"`
	} `json:"writes"`
}

// asker asks a ramshelf over its control socket, without a process for each question.
type asker struct {
	http      http.Client
	transport *http.Transport
}

func newAsker(socket string) *asker {
	var dialer net.Dialer
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialer.DialContext(ctx, "unix", socket)
	}}
	return &asker{http.Client{Transport: t}, t}
}

func (a *asker) close() { a.transport.CloseIdleConnections() }

// status is that of the only volume.
func (a *asker) status(ctx context.Context) (*volumeStatus, error) {
	text, err := a.do(ctx, http.MethodGet, "/v1/status")
	if err != nil {
		return nil, fmt.Errorf("read status: %w", err)
	}
	var status struct {
		Volumes []volumeStatus `json:"volumes"`
	}
	if err := json.Unmarshal(text, &status); err != nil {
		return nil, fmt.Errorf("parse status: %w", err)
	}
	if len(status.Volumes) != 1 {
		return nil, fmt.Errorf("parse status: %d volumes, want 1", len(status.Volumes))
	}
	return &status.Volumes[0], nil
}

// flush returns when everything is committed and home.
func (a *asker) flush(ctx context.Context) error {
	if _, err := a.do(ctx, http.MethodPost, "/v1/volumes/vol/flush"); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	return nil
}

func (a *asker) do(ctx context.Context, method, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://ramshelf"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("answered %s: %s", resp.Status, text)
	}
	return text, err
}

// place is a backing that ramshelf and fio are given in turn.
type place struct {
	name    string
	backing string   // for ramshelf
	fio     []string // engine and target for fio
	file    string   // what the target is called in a list of offsets for fio
}

// filePlace makes a file of volumeBytes and a journal and metadata, all of it written, and gives it as a place.
func filePlace(name, path string, volumeBytes, ringBytes int64) (place, error) {
	p := place{
		name: name, backing: "file:" + path, file: path,
		fio: []string{"--ioengine=libaio", "--direct=1", "--filename=" + path},
	}
	return p, writeZeroes(path, volumeBytes+ringBytes+metadataBytes)
}

// metadataBytes is more than what a volume has on its backing besides content and ring.
const metadataBytes = 8 * mib

// ringFor is the size of the journal of a volume with so much memory: twice the third of it that may be uncommitted.
func ringFor(memoryBytes int64) int64 { return 2 * memoryBytes / 3 / blockBytes * blockBytes }

// writeZeroes makes a file of zeroes whose blocks all are allocated and written, and none in the page cache: what is measured
// later is neither allocation nor a cache that has to be emptied. size is a multiple of the block.
func writeZeroes(path string, size int64) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write zeroes to %s: %w", path, err)
		}
	}()
	f, err := openDirect(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil {
		return err
	}
	zeroes, err := unix.Mmap(-1, 0, 4*mib, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS) // aligned, as direct I/O wants it
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Munmap(zeroes)) }()
	for at := int64(0); at < size; at += int64(len(zeroes)) {
		if _, err := f.WriteAt(zeroes[:min(int64(len(zeroes)), size-at)], at); err != nil {
			return err
		}
	}
	return f.Sync()
}

// openDirect makes a file and opens it past the page cache, where the file system has that.
func openDirect(path string) (*os.File, error) {
	flags := os.O_CREATE | os.O_TRUNC | os.O_WRONLY
	f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0o600)
	if errors.Is(err, unix.EINVAL) {
		f, err = os.OpenFile(path, flags, 0o600)
	}
	return f, err
}

// fioAlone are the arguments of a fio that needs no server.
func fioAlone(args ...string) []string {
	return append([]string{"--name=bench", "--output-format=json", "--group_reporting"}, args...)
}

// runFio runs fio and gives what it measured, all its threads together.
func (r *rig) runFio(ctx context.Context, args ...string) (bench.FioResult, error) {
	argv := append([]string{"fio"}, args...)
	r.note(argv)
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return bench.FioResult{}, fmt.Errorf("run fio: %w: %s", err, out)
	}
	return bench.ParseFio(out)
}

// runLoad generates load on d for a time.
func (d *daemon) runLoad(ctx context.Context, c load.Config, duration time.Duration) (load.Result, error) {
	c.Target, c.Seed = d.target(), rand.Uint64()>>1
	l, err := load.Open(ctx, c)
	if err != nil {
		return load.Result{}, err
	}
	result, err := l.Run(ctx, duration)
	return result, errors.Join(err, l.Close())
}

// limited is an nbdkit that serves a file on the tmpfs no faster than it is told.
type limited struct {
	*running
	place
}

// startLimited starts an nbdkit on a file for volumeBytes and a journal, all of it written. It stays until the rig is removed.
func (r *rig) startLimited(ctx context.Context, name string, volumeBytes, ringBytes int64, bytesPerSecond int64) (*limited, error) {
	s := spec{
		name: name, kind: peer,
		command: []string{"nbdkit", "-f", "-U", "DIR/s", "--filter=rate", "file", "DIR/disk",
			"rate-file=DIR/rate", "burstiness=" + rateBurst},
		files: map[string]string{"rate": rateText(bytesPerSecond)},
	}
	dir := filepath.Join(r.root, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory: %w", err)
	}
	disk := filepath.Join(dir, "disk")
	if err := writeZeroes(disk, volumeBytes+ringBytes+metadataBytes); err != nil {
		return nil, err
	}
	one, err := s.start(ctx, r.root, volumeBytes+ringBytes+metadataBytes)
	if err != nil {
		return nil, err
	}
	r.note(one.expand(one.command))
	r.kept = append(r.kept, one)
	return &limited{one, place{
		name:    fmt.Sprintf("NBD, %d MB/s", bytesPerSecond/1e6),
		backing: "nbd+unix:///?socket=" + filepath.Join(dir, "s"),
		fio:     []string{"--ioengine=nbd", "--uri=" + one.target().URI()},
		file:    "nbd",
	}}, nil
}

// rateBurst is how many seconds' worth of bytes the rate filter lets through at once after a pause. With its default of two,
// most of what is measured here would pass unhindered.
const rateBurst = "0.1"

// rateText is a rate in the words of nbdkit's filter: bits per second.
func rateText(bytesPerSecond int64) string { return strconv.FormatInt(8*bytesPerSecond, 10) }

// setRate changes the rate. The filter looks at its file at every request and wants it to be replaced as a whole.
func (l *limited) setRate(bytesPerSecond int64) error {
	path := filepath.Join(l.dir, "rate")
	if err := os.WriteFile(path+".new", []byte(rateText(bytesPerSecond)), 0o600); err != nil {
		return fmt.Errorf("set rate: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("set rate: %w", err)
	}
	return nil
}
