package system

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// checkCleanStop is the checker of invariant 13: after SIGTERM the exit code is 0, the first bytes of the backing
// file equal the volume, every answered write among them, and no dirt stays in the memory file. It needs a
// volume over a file.
func checkCleanStop(t testing.TB, s *ramshelf, l *ledger) {
	t.Helper()
	want := sha256.New()
	io.Copy(want, volumeReader(t, s, s.v.size))
	cleanStop(t, s)
	checkNothingInShm(t, s.shm)
	if got := hashFile(t, s.home(), s.v.size); got != fmt.Sprintf("%x", want.Sum(nil)) {
		t.Errorf("after SIGTERM the first %d bytes of the backing file are not the volume", s.v.size)
	}
	if l != nil {
		l.verifyFile(t, s.home())
	}
}

// volumeReader reads the volume from its start.
func volumeReader(t testing.TB, s server, bytes int64) io.Reader {
	t.Helper()
	return io.NewSectionReader(nbdReaderAt{mustDial(t, s)}, 0, bytes)
}

type nbdReaderAt struct{ c *nbdConn }

func (r nbdReaderAt) ReadAt(p []byte, off int64) (int, error) {
	if err := r.c.do(cmdRead, 0, off, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func hashFile(t testing.TB, path string, bytes int64) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if n, err := io.CopyN(h, f, bytes); err != nil {
		t.Fatalf("%s ends after %d bytes: %v", path, n, err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// checkNothingInShm checks that a clean stop has emptied the memory file: it is gone, or holds next to nothing.
func checkNothingInShm(t testing.TB, dir string) {
	t.Helper()
	var blocks int64
	for _, path := range files(t, dir) {
		n, err := strconv.ParseInt(strings.TrimSpace(run(t, "stat", "-c", "%b", path)), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		blocks += n
	}
	if used := blocks * 512; used > mib {
		t.Errorf("after a clean stop %d bytes of memory stay in %s: %v", used, dir, files(t, dir))
	}
}

func files(t testing.TB, dir string) []string {
	t.Helper()
	var all []string
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err == nil && !info.IsDir() {
			all = append(all, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestCleanStop checks that the backing file of a cleanly stopped volume is the volume, and mounts by itself.
func TestCleanStop(t *testing.T) {
	image := sparse(t, filepath.Join(t.TempDir(), "ext4.img"), 128*mib)
	run(t, "mkfs.ext4", "-q", "-F", image)
	s := serveRamshelf(t, volume{size: 128 * mib})
	run(t, "nbdcopy", image, s.uri())
	checkCleanStop(t, s, nil)
	if a, b := hashFile(t, s.home(), s.v.size), hashFile(t, image, s.v.size); a != b {
		t.Error("the backing file differs from what was copied into the volume")
	}
	dev := loop(t, s.home(), "--sizelimit", fmt.Sprint(s.v.size))
	run(t, "e2fsck", "-f", "-n", dev)
	point := t.TempDir()
	mount(t, dev, point)
	run(t, "sh", "-c", "echo hello > "+point+"/hello")
	run(t, "umount", point)
	run(t, "e2fsck", "-f", "-n", dev)

	// What was written without us is the volume's content at the next start.
	detach(t, dev)
	want := hashFile(t, s.home(), s.v.size)
	s.start()
	h := sha256.New()
	io.Copy(h, volumeReader(t, s, s.v.size))
	if got := fmt.Sprintf("%x", h.Sum(nil)); got != want {
		t.Error("the volume is not what its backing file held at the start")
	}
	cleanStop(t, s)
}

// logWrite is a write in the log of nbdkit's log filter.
type logWrite struct{ off, bytes int64 }

var logLine = regexp.MustCompile(`connection=\d+ (Write|Zero|Trim|Flush) id=\d+(?: offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+))?`)

// writesIn are the writes to the first size bytes that the log names after its first skip lines, in order.
func writesIn(t testing.TB, log string, size int64) []logWrite {
	t.Helper()
	var writes []logWrite
	for _, m := range logLine.FindAllStringSubmatch(log, -1) {
		if m[1] != "Write" {
			continue
		}
		off, err1 := strconv.ParseInt(m[2], 0, 64)
		n, err2 := strconv.ParseInt(m[3], 0, 64)
		if err1 != nil || err2 != nil {
			t.Fatalf("log line %q", m[0])
		}
		if off < size {
			writes = append(writes, logWrite{off, n})
		}
	}
	return writes
}

// TestLinearWrites counts at the backing: a fully dirty volume, written in random order, goes home in few
// ascending writes.
func TestLinearWrites(t *testing.T) {
	const size = gib
	const maxWrites = 1100
	dir := t.TempDir()
	file, logFile := sparse(t, dir+"/backing.img", size+64*mib), dir+"/backing.log"
	backing := newNBDKit(t, file, "--filter=log", "file", file, "logfile="+logFile)
	backing.start()
	// What is not home may take a third of the memory and is sent home from half of that on: so much memory does
	// it take that nothing goes home before all is dirty.
	s := serveRamshelf(t, volume{size: size, memory: 6400 * mib, journal: "none", backing: backing.uri(), extra: []string{"--staleness", "1h"}})
	content := func(n int, p []byte) {
		for i := 0; i < blockBytes; i += 8 {
			binary.LittleEndian.PutUint64(p[i:], uint64(n)<<16|uint64(i))
		}
	}
	fillRandomly(t, s, size, 2, 64, rand.Perm(size/blockBytes), content)
	if n := len(writesIn(t, slurp(logFile), size)); n != 0 {
		t.Errorf("%d writes went home before anything made them", n)
	}
	if dirty := s.status().DirtyBytes; dirty != size {
		t.Errorf("dirty_bytes is %d, want the whole volume", dirty)
	}
	skip := len(slurp(logFile))
	s.flush()
	writes := writesIn(t, slurp(logFile)[skip:], size)
	checkRSS(t, s, s.v.memory)
	var sum int64
	for _, w := range writes {
		sum += w.bytes
	}
	t.Logf("%d writes of %d KiB in the mean", len(writes), sum/max(1, int64(len(writes)))/kib)
	if len(writes) > maxWrites {
		t.Errorf("%d writes went to the backing, the bound is %d", len(writes), maxWrites)
	}
	if sum != size {
		t.Errorf("%d bytes went to the backing, want %d, each once", sum, int64(size))
	}
	checkAscending(t, writes)
	if st := s.status(); st.DirtyBytes != 0 {
		t.Errorf("dirty_bytes is %d after a flush", st.DirtyBytes)
	}
	cleanStop(t, s)
	backing.stop()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, want := make([]byte, blockBytes), make([]byte, blockBytes)
	for n := range size / blockBytes {
		if _, err := f.ReadAt(got, int64(n)*blockBytes); err != nil {
			t.Fatal(err)
		}
		if content(n, want); string(got) != string(want) {
			t.Fatalf("block %d of the backing is not what was written", n)
		}
	}
}

// checkAscending checks that the writes came in order of their offsets. Several are in flight on several
// connections, so one may arrive a few places from its own.
func checkAscending(t testing.TB, writes []logWrite) {
	t.Helper()
	const inFlight = 32
	sorted := slices.Clone(writes)
	slices.SortStableFunc(sorted, func(a, b logWrite) int { return int(a.off - b.off) })
	place := make(map[int64]int, len(sorted))
	for i, w := range sorted {
		place[w.off] = i
	}
	for i, w := range writes {
		if d := place[w.off] - i; d > inFlight || d < -inFlight {
			t.Fatalf("write %d, at %d, is %d places from where an ascending sweep has it", i, w.off, d)
		}
	}
}
