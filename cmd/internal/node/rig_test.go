package node

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/flush/journal"
)

const (
	testSize   = 16 << 20
	testMemory = 8 << 20
)

var errDrive = errors.New("drive failed")

// drive is a backing in memory that fails or hangs where it is told to.
type drive struct {
	mu         sync.Mutex
	data       []byte
	writes     int // that succeed before all others fail; -1: all do
	syncFails  bool
	writesStop chan struct{} // not nil: writes wait for its close
	readsStop  chan struct{} // not nil: reads wait for its close
	extents    func(off, n int64, fn func(off, n int64, flags uint32) bool) error
}

func newDrive() *drive {
	return &drive{data: make([]byte, journal.CreateBytes(testSize, testMemory/2)), writes: -1}
}

func (d *drive) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

func (d *drive) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	stop := d.readsStop
	d.mu.Unlock()
	if stop != nil {
		<-stop
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := copy(p, d.data[min(off, int64(len(d.data))):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *drive) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	stop := d.writesStop
	d.mu.Unlock()
	if stop != nil {
		<-stop
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.writes == 0 {
		return 0, errDrive
	}
	if d.writes > 0 {
		d.writes--
	}
	return copy(d.data[off:], p), nil
}

func (d *drive) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.syncFails {
		return errDrive
	}
	return nil
}

func (d *drive) Size() int64  { return int64(len(d.data)) }
func (d *drive) Close() error { return nil }

func (d *drive) Extents(off, n int64, fn func(off, n int64, flags uint32) bool) error {
	if d.extents == nil {
		fn(off, n, cache.Data)
		return nil
	}
	return d.extents(off, n, fn)
}

// shmDir is a private folder for memory files.
func shmDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "node-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// testConfig is a volume of which nothing goes home unless it is asked to.
func testConfig() *config.Volume {
	return &config.Volume{
		Name: "v", Size: testSize, Memory: testMemory, MaxDirty: testMemory / 4,
		Ack: config.AckRAM, Flush: config.FlushAck, Staleness: config.Duration(time.Hour),
		Journal: config.Journal{Kind: config.JournalInternal},
	}
}

// rig opens volumes over a drive, without their background work.
type rig struct {
	t      *testing.T
	drive  *drive
	daemon *config.Daemon
	config *config.Volume
}

func newRig(t *testing.T) *rig {
	return &rig{t: t, drive: newDrive(), daemon: &config.Daemon{Shm: shmDir(t)}, config: testConfig()}
}

func (r *rig) tryOpen() (*Volume, error) {
	c := *r.config
	v := &Volume{config: &c, log: slog.New(slog.DiscardHandler), backing: r.drive, meta: r.drive, stop: make(chan struct{})}
	return v, v.open(context.Background(), r.daemon)
}

func (r *rig) open() *Volume {
	r.t.Helper()
	v, err := r.tryOpen()
	if err != nil {
		r.t.Fatal(err)
	}
	return v
}

func (r *rig) memoryFile() string { return r.daemon.MemoryFile(r.config) }

func closeVolume(t *testing.T, v *Volume) {
	t.Helper()
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
}

// ended is the owner of one operation.
type ended chan syscall.Errno

func (e ended) Ended(op *cache.Op) { e <- op.Err }

// write is answered by the cache.
func write(t testing.TB, v *Volume, off int64, data []byte) {
	t.Helper()
	done := make(ended, 1)
	op := &cache.Op{Off: off, Len: int64(len(data)), Payload: data, Owner: done}
	if v.cache.Reserve(op) {
		for i := range op.Parts() {
			data = data[copy(v.cache.Dest(op, i), data):]
		}
	}
	v.cache.Write(op)
	if errno := <-done; errno != 0 {
		t.Fatalf("write at %d: %v", off, errno)
	}
}

func read(t *testing.T, v *Volume, off, n int64) []byte {
	t.Helper()
	done := make(ended, 1)
	op := &cache.Op{Off: off, Len: n, Owner: done}
	v.cache.Read(op)
	if errno := <-done; errno != 0 {
		t.Fatalf("read at %d: %v", off, errno)
	}
	defer v.cache.Release(op)
	var data []byte
	for i := range op.Pieces() {
		p, n := v.cache.Piece(op, i)
		if p == nil {
			p = make([]byte, n)
		}
		data = append(data, p...)
	}
	return data
}

func pattern(b byte) []byte {
	p := make([]byte, cache.BlockBytes)
	for i := range p {
		p[i] = b + byte(i)
	}
	return p
}

// superblockOf reads the superblock of a backing file.
func superblockOf(t *testing.T, r interface {
	io.ReaderAt
	Size() int64
}) *journal.Superblock {
	t.Helper()
	s, err := journal.Load(r, journal.AreaOffset(r.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func setAside(t *testing.T, path string) []string {
	t.Helper()
	found, err := filepath.Glob(path + ".set-aside-*")
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func drain(t *testing.T, v *Volume) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := v.Drain(ctx, func(int64) {}); err != nil {
		t.Fatal(err)
	}
}
