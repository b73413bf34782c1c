package system

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A machine is all that a power cut ends at one instant: a disk whose cache is volatile, our daemon on it, and its
// client: nbdfuse, a loop device, and the ext4 that is mounted at point.
type machine struct {
	t     testing.TB
	disk  *nbdkit // nil where the backing is a file
	s     *ramshelf
	point string
	dev   string // while the machine is on
	fuse  func() // ends nbdfuse
}

// diskBeyond is what the disk has beyond the volume, for metadata.
const diskBeyond = 64 * mib

// newMachine prepares a machine with a volume of the kind. Its disk keeps in memory what was not flushed, in a mode of nbdkit's
// cache filter: writeback obeys flushes, unsafe lies about them. Mode "" makes the volume's backing a file of the host,
// where what was written outlives the daemon, flushed or not.
func newMachine(t testing.TB, kind cutKind, v volume) *machine {
	t.Helper()
	m := &machine{t: t, point: t.TempDir()}
	v.ack, v.journal = kind.ack, kind.journal
	if kind.cache != "" {
		path := sparse(t, filepath.Join(t.TempDir(), "disk.img"), v.size+diskBeyond)
		m.disk = newNBDKit(t, path)
		m.diskCache(kind.cache)
		m.disk.env = []string{"TMPDIR=" + shmDir(t)}
		v.backing = nbdURI("", m.disk.socket())
	}
	m.s = newRamshelf(t, v)
	return m
}

// diskCache chooses the mode of the disk's cache for its next start.
func (m *machine) diskCache(mode string) {
	m.disk.args = []string{"--filter=cache", "file", m.disk.file, "cache=" + mode, "cache-min-block-size=4096"}
}

// on starts everything up to the loop device.
func (m *machine) on() {
	m.t.Helper()
	if m.disk != nil {
		m.disk.start()
	}
	m.s.start()
	var file string
	file, m.fuse = fuseDisk(m.t, m.s.uri())
	m.dev = loop(m.t, file, "--direct-io=on")
}

// format makes the file system and mounts it.
func (m *machine) format() {
	m.t.Helper()
	run(m.t, "mkfs.ext4", "-q", "-F", m.dev)
	mount(m.t, m.dev, m.point)
}

// cut is the power cut: the daemon dies first, and with it the only way to the disk; then the disk with its cache, what
// else uses the volume, and the memory. What the client's kernel still has to write gets errors.
func (m *machine) cut(users ...*process) {
	m.t.Helper()
	if m.s.p.ended() {
		m.t.Fatalf("the daemon ended by itself with %d:\n%s", m.s.p.code(), lastWords(m.s.p.stderr()))
	}
	victims := []*process{m.s.p}
	if m.disk != nil {
		victims = append(victims, m.disk.p)
	}
	victims = append(victims, users...)
	for _, p := range victims {
		p.kill()
	}
	for _, p := range victims {
		p.wait(m.t, 30*time.Second)
	}
	for _, path := range files(m.t, m.s.shm) {
		if err := os.Remove(path); err != nil {
			m.t.Fatal(err)
		}
	}
	m.disconnect()
}

// off shuts down in order; the file system must be in use by nobody.
func (m *machine) off() {
	m.t.Helper()
	m.disconnect()
	cleanStop(m.t, m.s)
	if m.disk != nil {
		m.disk.stop()
	}
}

// disconnect takes the client apart.
func (m *machine) disconnect() {
	m.t.Helper()
	run(m.t, "umount", m.point)
	detach(m.t, m.dev)
	m.fuse()
}

// recover lets ext4 replay its journal, has it checked, and mounts it.
func (m *machine) recover() {
	m.t.Helper()
	mount(m.t, m.dev, m.point)
	run(m.t, "umount", m.point)
	run(m.t, "e2fsck", "-f", "-n", m.dev)
	mount(m.t, m.dev, m.point)
}

// rounds runs the rounds 0 to n of a test. In a soak it counts those that passed in out/soak/NAME, so that a run which was
// stopped takes up where it stopped, as long as the program under test is the same.
func rounds(t *testing.T, name string, n int, round func(i int)) {
	t.Helper()
	if !soak {
		for i := range n {
			round(i)
		}
		return
	}
	path := filepath.Join("..", "..", "out", "soak", name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	binary, err := ramshelfBinary()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	of := fmt.Sprintf("%x", h.Sum(nil))
	passed := 0
	if k, _ := fmt.Sscanf(slurp(path), of+" %d", &passed); k != 1 {
		passed = 0
	}
	if passed > 0 {
		t.Logf("%d of %d rounds passed before", passed, n)
	}
	for i := passed; i < n; i++ {
		round(i)
		if t.Failed() {
			return
		}
		writeFile(t, path, fmt.Sprintf("%s %d\n", of, i+1))
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}
