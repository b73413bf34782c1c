package home

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const testBytes = 4 << 20

// command runs a tool and fails the test when that fails.
func command(tb testing.TB, name string, args ...string) string {
	tb.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		tb.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopDevice makes a block device of the given sector over a file in the temporary directory.
func loopDevice(tb testing.TB, bytes int64, sector int, options ...string) string {
	tb.Helper()
	image := filepath.Join(tb.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Truncate(image, bytes); err != nil {
		tb.Fatal(err)
	}
	args := append([]string{"-f", "--show", "-b", fmt.Sprint(sector)}, options...)
	dev := command(tb, "losetup", append(args, image)...)
	tb.Cleanup(func() { command(tb, "losetup", "-d", dev) })
	return dev
}

// tmpfsDir is a directory on tmpfs.
func tmpfsDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ramshelf-home-")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func mustOpen(tb testing.TB, path string, o Options) *File {
	tb.Helper()
	f, err := Open(path, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = f.Close() })
	return f
}

// backings are the kinds of backing that every I/O test runs over.
var backings = []struct {
	name string
	open func(tb testing.TB) *File
}{
	{"file", func(tb testing.TB) *File {
		return mustOpen(tb, filepath.Join(tb.TempDir(), "b"), Options{CreateBytes: testBytes, Direct: true})
	}},
	{"file buffered", func(tb testing.TB) *File {
		return mustOpen(tb, filepath.Join(tb.TempDir(), "b"), Options{CreateBytes: testBytes})
	}},
	{"tmpfs", func(tb testing.TB) *File {
		return mustOpen(tb, filepath.Join(tmpfsDir(tb), "b"), Options{CreateBytes: testBytes, Direct: true})
	}},
	{"loop 512", func(tb testing.TB) *File {
		return mustOpen(tb, loopDevice(tb, testBytes, 512), Options{Direct: true})
	}},
	{"loop 4096", func(tb testing.TB) *File {
		return mustOpen(tb, loopDevice(tb, testBytes, 4096), Options{Direct: true})
	}},
	{"loop buffered", func(tb testing.TB) *File {
		return mustOpen(tb, loopDevice(tb, testBytes, 4096), Options{})
	}},
	{"one bounce buffer", func(tb testing.TB) *File {
		return mustOpen(tb, loopDevice(tb, testBytes, 4096, "--direct-io=on"), Options{Direct: true, BounceBuffers: 1})
	}},
}

func eachBacking(t *testing.T, test func(t *testing.T, f *File)) {
	for _, b := range backings {
		t.Run(b.name, func(t *testing.T) { test(t, b.open(t)) })
	}
}

func TestFacts(t *testing.T) {
	for i, want := range map[int]struct {
		direct, device bool
		sector         int
	}{0: {true, false, 512}, 1: {false, false, 512}, 3: {true, true, 512}, 4: {true, true, 4096}, 5: {false, true, 4096}} {
		f := backings[i].open(t)
		if f.Direct() != want.direct || f.Device() != want.device || f.SectorBytes() != want.sector || f.Size() != testBytes || f.Created() == want.device {
			t.Errorf("%s: direct %v, device %v, sector %d, %d bytes, created %v",
				backings[i].name, f.Direct(), f.Device(), f.SectorBytes(), f.Size(), f.Created())
		}
	}
}

// randomRange is a range within the backing, aligned or not.
func randomRange(rng *rand.Rand) (off, n int64) {
	longest := int64([]int{100, 5000, 300 << 10, 2 << 20}[rng.IntN(4)])
	off, n = rng.Int64N(testBytes), 1+rng.Int64N(longest)
	if unit := int64([]int{1, 512, 4096}[rng.IntN(3)]); unit > 1 {
		off, n = off/unit*unit, (n+unit-1)/unit*unit
	}
	return off, min(n, testBytes-off)
}

// TestAnyRange reads, writes and zeroes any ranges from any memory and compares with an array, and with what
// the page cache shows others at the end.
func TestAnyRange(t *testing.T) {
	eachBacking(t, func(t *testing.T, f *File) {
		rng, random := rand.New(rand.NewPCG(1, 1)), rand.NewChaCha8([32]byte{})
		model := make([]byte, testBytes)
		memory := alignedBytes(testBytes + 4096)
		for i := range 150 {
			off, n := randomRange(rng)
			p := memory[rng.IntN(2)*rng.IntN(4096):][:n]
			switch rng.IntN(5) {
			case 0:
				if err := f.Zero(off, n); err != nil {
					t.Fatalf("zero %d+%d: %v", off, n, err)
				}
				clear(model[off : off+n])
			case 1, 2:
				random.Read(p)
				write := f.WritevAt
				if rng.IntN(2) == 0 {
					write = func(bufs [][]byte, off int64) error { return startAndReap(f, bufs, off) }
				}
				if err := write(split(rng, p), off); err != nil {
					t.Fatalf("write %d+%d: %v", off, n, err)
				}
				copy(model[off:], p)
			default:
				if got, err := f.ReadAt(p, off); err != nil || got != len(p) || !bytes.Equal(p, model[off:off+n]) {
					t.Fatalf("operation %d: read %d+%d: %d bytes, %v, or wrong content", i, off, n, got, err)
				}
			}
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(f.Path())
		if err != nil || !bytes.Equal(got, model) {
			t.Errorf("content differs at the end: %v", err)
		}
	})
}

// startAndReap is WritevAt by StartWritev.
func startAndReap(f *File, bufs [][]byte, off int64) (err error) {
	ended := false
	f.StartWritev(bufs, off, func(e error) { err, ended = e, true })
	for !ended {
		f.Reap()
	}
	return err
}

// split cuts p into buffers, some of them empty.
func split(rng *rand.Rand, p []byte) (bufs [][]byte) {
	unit := []int{1, 512, 4096}[rng.IntN(3)]
	for len(p) > 0 {
		n := min(len(p), rng.IntN(40)*unit*(1+len(p)/unit/400))
		bufs = append(bufs, p[:n])
		p = p[n:]
	}
	return bufs
}

// TestManyVectors writes more buffers than one system call takes.
func TestManyVectors(t *testing.T) {
	eachBacking(t, func(t *testing.T, f *File) {
		want := alignedBytes(testBytes)
		rand.NewChaCha8([32]byte{}).Read(want)
		unit := f.SectorBytes()
		var bufs [][]byte
		for p := want; len(p) > 0; p = p[unit:] {
			bufs = append(bufs, p[:unit])
		}
		if unit == 512 && len(bufs) <= maxVectors {
			t.Fatalf("only %d buffers", len(bufs))
		}
		if err := f.WritevAt(bufs, 0); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, testBytes)
		if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("wrong content, %v", err)
		}
	})
}

// TestAsyncWrites keeps more writes in flight than the system is given.
func TestAsyncWrites(t *testing.T) {
	eachBacking(t, func(t *testing.T, f *File) {
		if f.Async() != f.Direct() {
			t.Errorf("asynchronous %v, direct %v", f.Async(), f.Direct())
		}
		want := alignedBytes(testBytes)
		rand.NewChaCha8([32]byte{}).Read(want)
		const n = 16 << 10
		left := 0
		for off := 0; off < testBytes; off += n {
			left++
			f.StartWritev([][]byte{want[off:][:n/2], want[off+n/2:][:n/2]}, int64(off), func(err error) {
				left--
				if err != nil {
					t.Errorf("write at %d: %v", off, err)
				}
			})
		}
		for left > 0 {
			f.Reap()
		}
		f.Reap() // nothing is in flight: does not wait
		got := make([]byte, testBytes)
		if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("wrong content, %v", err)
		}
		if err := startAndReap(f, [][]byte{want[:4096]}, testBytes); err == nil {
			t.Error("write behind the end: no error")
		}
	})
}

// TestAsyncEnds gives each kind of result to a write: a partial one is completed, others are errors.
func TestAsyncEnds(t *testing.T) {
	for _, c := range []struct {
		res  int64
		want error
	}{{3 * 4096, nil}, {4096, nil}, {512, nil}, {0, io.ErrShortWrite}, {-int64(unix.EIO), unix.EIO}, {-int64(unix.ENOSPC), unix.ENOSPC}} {
		f := backings[0].open(t)
		a := f.async
		p := alignedBytes(3 * 4096)
		rand.NewChaCha8([32]byte{}).Read(p)
		if _, err := f.WriteAt(p[:max(0, c.res)], 0); err != nil {
			t.Fatal(err)
		}
		result, calls := error(nil), 0
		w := <-a.free
		w.vector, w.total, w.span = f.takeVector(), int64(len(p)), f.lockRange(0, int64(len(p)))
		w.done = func(err error) { result = err; calls++ }
		w.vector.set([][]byte{p[:4096], p[4096:]}, 0)
		a.inFlight.Add(1)
		a.end(w, c.res)
		if calls != 1 || !errors.Is(result, c.want) || len(a.free) != asyncDepth || a.inFlight.Load() != 0 || len(f.ranges.held) != 0 {
			t.Errorf("result %d: %v, %d calls", c.res, result, calls)
		}
		if got, err := os.ReadFile(f.Path()); c.want == nil && (err != nil || !bytes.Equal(got[:len(p)], p)) {
			t.Errorf("result %d: wrong content, %v", c.res, err)
		}
	}
}

// TestPartsOfSectors: writers of different bytes of the same sectors, and of whole sectors beside them, do not
// undo one another.
func TestPartsOfSectors(t *testing.T) {
	eachBacking(t, func(t *testing.T, f *File) {
		const writers, each, rounds = 8, 100, 20
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				p := make([]byte, each)
				for round := range rounds {
					for i := range p {
						p[i] = byte(w*rounds + round)
					}
					for group := range 4 {
						if _, err := f.WriteAt(p, int64(group*writers*each+w*each)); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		wg.Wait()
		got := make([]byte, 4*writers*each)
		if _, err := f.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		for i, c := range got {
			if want := byte(i/each%writers*rounds + rounds - 1); c != want {
				t.Fatalf("byte %d is %d, want %d", i, c, want)
			}
		}
	})
}

func TestEnds(t *testing.T) {
	eachBacking(t, func(t *testing.T, f *File) {
		p := make([]byte, 1000)
		if n, err := f.ReadAt(p, testBytes-600); n != 600 || err != io.EOF {
			t.Errorf("read over the end: %d, %v", n, err)
		}
		if n, err := f.ReadAt(p, testBytes); n != 0 || err != io.EOF {
			t.Errorf("read behind the end: %d, %v", n, err)
		}
		if n, err := f.ReadAt(p, testBytes-1000); n != 1000 || err != nil {
			t.Errorf("read up to the end: %d, %v", n, err)
		}
		if n, err := f.ReadAt(nil, 5); n != 0 || err != nil {
			t.Errorf("read of nothing: %d, %v", n, err)
		}
		if _, err := f.ReadAt(p, -1); err == nil {
			t.Error("read at -1: no error")
		}
		for _, off := range []int64{-1, testBytes - 999, testBytes + 1, 1<<63 - 1} {
			if _, err := f.WriteAt(p, off); err == nil {
				t.Errorf("write at %d: no error", off)
			}
			if err := f.Zero(off, 1000); err == nil {
				t.Errorf("zero at %d: no error", off)
			}
			if err := f.Extents(off, 1000, nil); err == nil {
				t.Errorf("extents at %d: no error", off)
			}
		}
		if err := errors.Join(f.WritevAt(nil, 0), f.Zero(0, 0)); err != nil {
			t.Errorf("nothing at all: %v", err)
		}
		if info, err := os.Stat(f.Path()); err != nil || !f.Device() && info.Size() != testBytes {
			t.Errorf("size %d, %v", info.Size(), err)
		}
	})
}

// TestZeroMethods: each way of zeroing zeroes, and what the page cache held of the range is gone.
func TestZeroMethods(t *testing.T) {
	eachBacking(t, func(t *testing.T, f *File) {
		want := make([]byte, testBytes)
		rand.NewChaCha8([32]byte{}).Read(want)
		for method := zeroPunch; method <= zeroWrite; method++ {
			if _, err := f.WriteAt(want, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := os.ReadFile(f.Path()); err != nil { // fill the page cache
				t.Fatal(err)
			}
			f.zeroing.Store(method)
			for _, r := range [][2]int64{{0, 4096}, {64 << 10, 1 << 20}, {2<<20 + 5, 100}, {3<<20 - 100, 9000}} {
				if err := f.Zero(r[0], r[1]); err != nil {
					t.Fatalf("method %d: %v", method, err)
				}
				clear(want[r[0] : r[0]+r[1]])
			}
			got := make([]byte, testBytes)
			if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("method %d: wrong content, %v", method, err)
			}
			if got, err := os.ReadFile(f.Path()); err != nil || !bytes.Equal(got, want) {
				t.Errorf("method %d: stale page cache, %v", method, err)
			}
		}
	})
}

// TestZeroGivesSpaceBack on a file, by the method found.
func TestZeroGivesSpaceBack(t *testing.T) {
	f := backings[0].open(t)
	if _, err := f.WriteAt(bytes.Repeat([]byte{1}, testBytes), 0); err != nil {
		t.Fatal(err)
	}
	before := usedBytes(t, f)
	if err := f.Zero(1<<20, 2<<20); err != nil {
		t.Fatal(err)
	}
	if after := usedBytes(t, f); after > before-2<<20 {
		t.Errorf("%d bytes used before, %d after", before, after)
	}
}

func usedBytes(t *testing.T, f *File) int64 {
	var st unix.Stat_t
	if err := errors.Join(f.Sync(), unix.Stat(f.Path(), &st)); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func extents(t *testing.T, f *File, off, n int64) (out []string) {
	t.Helper()
	err := f.Extents(off, n, func(off, n int64, flags uint32) bool {
		out = append(out, fmt.Sprintf("%d+%d:%d", off>>10, n>>10, flags))
		return len(out) < 4
	})
	if err != nil {
		t.Error(err)
	}
	return out
}

func TestExtents(t *testing.T) {
	for _, i := range []int{0, 2} {
		f := backings[i].open(t)
		check := func(off, n int64, want string) {
			t.Helper()
			if got := strings.Join(extents(t, f, off<<10, n<<10), " "); got != want {
				t.Errorf("%s: extents of %d+%d KiB: %q, want %q", backings[i].name, off, n, got, want)
			}
		}
		check(0, 4096, "0+4096:3")
		for _, at := range []int64{64, 1024, 2048} {
			if _, err := f.WriteAt(bytes.Repeat([]byte{1}, 64<<10), at<<10); err != nil {
				t.Fatal(err)
			}
		}
		check(0, 4096, "0+64:3 64+64:0 128+896:3 1024+64:0") // ends when told
		check(1056, 2048, "1056+32:0 1088+960:3 2048+64:0 2112+992:3")
		check(70, 10, "70+10:0")
		check(0, 0, "")
		if err := f.Zero(1024<<10, 64<<10); err != nil {
			t.Fatal(err)
		}
		check(128, 1920, "128+1920:3")
	}
	for _, i := range []int{3, 4} {
		if got := strings.Join(extents(t, backings[i].open(t), 4096, 8192), " "); got != "4+8:0" {
			t.Errorf("%s: %q", backings[i].name, got)
		}
	}
}

func TestCreate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b")
	f := mustOpen(t, path, Options{CreateBytes: testBytes, Direct: true})
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 || info.Size() != testBytes || usedBytes(t, f) != 0 || !f.Created() {
		t.Errorf("%v: %v, %d bytes, %d used", err, info.Mode(), info.Size(), usedBytes(t, f))
	}
	if err := errors.Join(f.Close(), f.Close()); err != nil {
		t.Errorf("close twice: %v", err)
	}
	if _, err := f.ReadAt(make([]byte, 512), 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	// An existing file keeps its size and is not removed.
	f = mustOpen(t, path, Options{CreateBytes: 2 * testBytes})
	if f.Size() != testBytes || f.Created() {
		t.Errorf("%d bytes, created %v", f.Size(), f.Created())
	}
	if err := f.Discard(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	f = mustOpen(t, path+"2", Options{CreateBytes: testBytes})
	if err := f.Discard(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path + "2"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("discarded file: %v", err)
	}
}

func TestGrow(t *testing.T) {
	f := backings[0].open(t)
	if err := f.Grow(testBytes + 1<<20); err != nil || f.Size() != testBytes+1<<20 {
		t.Errorf("%d bytes, %v", f.Size(), err)
	}
	if _, err := f.WriteAt(make([]byte, 4096), testBytes); err != nil {
		t.Error(err)
	}
	for _, n := range []int64{testBytes, testBytes + 1<<20 + 1} {
		if err := f.Grow(n); !errors.Is(err, ErrSize) {
			t.Errorf("grow to %d: %v", n, err)
		}
	}
	if err := backings[3].open(t).Grow(2 * testBytes); !errors.Is(err, ErrKind) {
		t.Errorf("grow a device: %v", err)
	}
}

// TestOpenRefuses: each error is of its kind, names the path and the value, and nothing is created.
func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		os.WriteFile(in("empty"), nil, 0o600),
		os.WriteFile(in("odd"), make([]byte, 5000), 0o600),
		unix.Mkfifo(in("fifo"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	socket, err := net.Listen("unix", in("socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	readOnly := loopDevice(t, testBytes, 512, "-r")
	for _, c := range []struct {
		path string
		o    Options
		want error
		says string
	}{
		{in("missing"), Options{}, fs.ErrNotExist, "give a size to create it"},
		{in("no/missing"), Options{CreateBytes: testBytes}, fs.ErrNotExist, "create the directory"},
		{in("missing"), Options{CreateBytes: 5000}, ErrSize, "5000"},
		{in("missing"), Options{CreateBytes: -4096}, ErrSize, "-4096"},
		{in("missing"), Options{CreateBytes: 1 << 62}, unix.EFBIG, "4611686018427387904"},
		{dir, Options{Direct: true}, ErrKind, "directory"},
		{in("fifo"), Options{}, ErrKind, "FIFO"},
		{in("socket"), Options{}, ErrKind, "socket"},
		{"/dev/null", Options{}, ErrKind, "character device"},
		{in("empty"), Options{Direct: true}, ErrSize, "empty"},
		{in("odd"), Options{Direct: true}, ErrSize, "5000 bytes are not a multiple of its sector of 512; extend it to 5120"},
		{in("odd"), Options{}, ErrSize, "5000"},
		{in("odd/below"), Options{CreateBytes: testBytes}, syscall.ENOTDIR, "odd/below"},
		{readOnly, Options{Direct: true}, syscall.EROFS, "writable"},
	} {
		f, err := Open(c.path, c.o)
		if err == nil {
			_ = f.Close()
		}
		if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), c.says) || !strings.Contains(fmt.Sprint(err), c.path) {
			t.Errorf("%s, %+v: %v, want %v and %q", c.path, c.o, err, c.want, c.says)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 4 {
		t.Errorf("%d files in the directory, %v", len(entries), err)
	}
}

// TestOpenBusy: a second opening is refused, and so is a mounted device.
func TestOpenBusy(t *testing.T) {
	for _, i := range []int{0, 2, 3} {
		f := backings[i].open(t)
		if _, err := Open(f.Path(), Options{}); !errors.Is(err, ErrBusy) {
			t.Errorf("%s: second opening: %v", backings[i].name, err)
		}
		_ = f.Close()
		g, err := Open(f.Path(), Options{})
		if err != nil {
			t.Errorf("%s: opening after close: %v", backings[i].name, err)
			continue
		}
		_ = g.Close()
	}
	dev, dir := loopDevice(t, 16<<20, 512), t.TempDir()
	command(t, "mkfs.ext4", "-q", dev)
	command(t, "mount", dev, dir)
	defer command(t, "umount", dir)
	if _, err := Open(dev, Options{Direct: true}); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "unmount") {
		t.Errorf("mounted device: %v", err)
	}
	// The lock itself, without O_EXCL: somebody who only holds flock(2).
	holder, err := os.Open(loopDevice(t, testBytes, 512))
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	if err := unix.Flock(int(holder.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(holder.Name(), Options{}); !errors.Is(err, ErrBusy) {
		t.Errorf("locked device: %v", err)
	}
}

// TestOpenWithoutPermission runs this test again as nobody.
func TestOpenWithoutPermission(t *testing.T) {
	if path := os.Getenv("RAMSHELF_TEST_PATH"); path != "" {
		_, err := Open(path, Options{CreateBytes: testBytes})
		if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "read and write access") {
			t.Errorf("%s: %v", path, err)
		}
		return
	}
	dir := tmpfsDir(t)
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	binary, secret := filepath.Join(dir, "test"), filepath.Join(dir, "secret")
	if err := errors.Join(
		os.Chmod(dir, 0o755), os.WriteFile(binary, self, 0o755), os.WriteFile(secret, make([]byte, 4096), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{secret, filepath.Join(dir, "new")} {
		cmd := exec.Command(binary, "-test.run=^TestOpenWithoutPermission$", "-test.count=1")
		cmd.Dir, cmd.Env = dir, []string{"RAMSHELF_TEST_PATH=" + path}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("as nobody: %v: %s", err, out)
		}
	}
}

// TestPartialWrite: a file system that becomes full in the middle of a write gives an error, and what the
// first part of the write was is there.
func TestPartialWrite(t *testing.T) {
	dir := t.TempDir()
	command(t, "mount", "-t", "tmpfs", "-o", "size=1m", "none", dir)
	defer command(t, "umount", dir)
	f := mustOpen(t, filepath.Join(dir, "b"), Options{CreateBytes: testBytes})
	defer f.Close()
	p := bytes.Repeat([]byte{7}, 2<<20)
	if err := f.WritevAt([][]byte{p[:1000], p[1000:]}, 0); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("write to a full file system: %v", err)
	}
	got := make([]byte, 512<<10)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, p[:len(got)]) {
		t.Errorf("first part: %v", err)
	}
}

// TestAdvance: a write that ended anywhere goes on with the byte after.
func TestAdvance(t *testing.T) {
	data := []byte("0123456789")
	for wrote := 0; wrote <= len(data); wrote++ {
		v := &vector{n: 3, off: 100, wrote: wrote}
		for i, b := range [][]byte{data[:2], data[2:7], data[7:]} {
			v.iov[i].Base = &b[0]
			v.iov[i].SetLen(len(b))
		}
		v.advance()
		rest := ""
		for _, iov := range v.iov[:v.n] {
			rest += string(unsafe.Slice(iov.Base, iov.Len))
		}
		if v.off != 100+int64(wrote) || rest != string(data[wrote:]) {
			t.Errorf("%d written: at %d with %q left", wrote, v.off, rest)
		}
	}
}

// TestRangeLock: overlapping ranges exclude one another, others do not.
func TestRangeLock(t *testing.T) {
	var l rangeLock
	l.init()
	l.lock(span{0, 10})
	l.lock(span{10, 20}) // does not wait
	got := make(chan string, 2)
	go func() {
		l.lock(span{5, 15})
		got <- "locked"
	}()
	l.unlock(span{0, 10})
	l.mu.Lock()
	got <- "unlocked"
	l.mu.Unlock()
	l.unlock(span{10, 20})
	if a, b := <-got, <-got; a != "unlocked" || b != "locked" {
		t.Errorf("%s before %s", a, b)
	}
}

// TestWriteAllocatesNothing in steady state.
func TestWriteAllocatesNothing(t *testing.T) {
	f := backings[0].open(t)
	p := alignedBytes(1 << 20)
	var bufs [][]byte
	for i := range 256 {
		bufs = append(bufs, p[i*4096:][:4096])
	}
	if n := testing.AllocsPerRun(20, func() {
		if err := f.WritevAt(bufs, 0); err != nil {
			t.Error(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations per write", n)
	}
	done := func(error) {}
	if n := testing.AllocsPerRun(20, func() {
		f.StartWritev(bufs, 0, done)
		f.Reap()
	}); n > 0 {
		t.Errorf("%v allocations per asynchronous write", n)
	}
}
