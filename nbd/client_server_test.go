package nbd_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/nbd"
	"github.com/ramshelf/ramshelf/nbd/nbdtest"
)

// cuttable is a way to a Unix socket that can be cut.
type cuttable struct {
	uri   string
	mu    sync.Mutex
	conns []net.Conn
}

func newCuttable(t *testing.T, socket string) *cuttable {
	path := filepath.Join(filepath.Dir(socket), "cuttable")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c := &cuttable{uri: "nbd+unix:///?socket=" + path}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("unix", socket)
			if err != nil {
				_ = near.Close()
				continue
			}
			c.mu.Lock()
			c.conns = append(c.conns, near, far)
			c.mu.Unlock()
			for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
				wg.Go(func() {
					_, _ = io.Copy(way[0], way[1])
					_ = way[0].Close()
					_ = way[1].Close()
				})
			}
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		c.cut()
		wg.Wait()
	})
	return c
}

func (c *cuttable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, nc := range c.conns {
		_ = nc.Close()
	}
	c.conns = nil
}

func dialClient(t *testing.T, uri string, o nbd.ClientOptions) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(t.Context(), uri, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// Our client and our server over connections that are cut all the time: every write that was answered is there, every
// read succeeds, and no write that failed lands on top of a newer one.
func TestClientAndServerCut(t *testing.T) {
	s := serveExports(t, nbd.Options{}, &nbd.Export{
		Device: newDevice(), Contexts: nbdtest.Contexts, Generation: func() uint64 { return 1 },
	})
	way := newCuttable(t, s.socket)
	c := dialClient(t, way.uri, nbd.ClientOptions{
		Connections: 3, Session: [16]byte{1}, Quarantine: time.Hour, ReconnectDelay: time.Millisecond,
	})
	const workers, part = 4, 256 << 10
	var answered, failed atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 7))
			model, from := make([]byte, part), int64(i*part)
			for {
				select {
				case <-stop:
					return
				default:
				}
				off := r.IntN(part - 1)
				p := pattern(byte(r.Uint32()), 1+r.IntN(min(part-off, 100_000)))
				var err error
				if r.IntN(8) == 0 {
					err = retry(&failed, func() error { return c.Zero(from+int64(off), int64(len(p))) })
					clear(model[off : off+len(p)])
				} else {
					err = retry(&failed, func() error { _, err := c.WriteAt(p, from+int64(off)); return err })
					copy(model[off:], p)
				}
				if err != nil {
					t.Error(err)
					return
				}
				answered.Add(1)
				got := make([]byte, part)
				if _, err := c.ReadAt(got, from); err != nil || !bytes.Equal(got, model) {
					t.Errorf("part %d differs from what was written, %v", i, err)
					return
				}
			}
		})
	}
	for range 15 {
		for before := answered.Load(); answered.Load() < before+20 && !t.Failed(); {
			time.Sleep(time.Millisecond)
		}
		way.cut()
	}
	close(stop)
	wg.Wait()
	if failed.Load() == 0 {
		t.Error("no write was cut; the test shows nothing")
	}
	if err := c.Sync(); err != nil {
		t.Errorf("Sync: %v; the server says that nothing was lost", err)
	}
}

// retry does what the user of a Client must: it writes again what was not answered.
func retry(failed *atomic.Int64, write func() error) (err error) {
	for range 20 {
		if err = write(); err == nil || !strings.Contains(err.Error(), "connection lost") {
			return err
		}
		failed.Add(1)
	}
	return err
}

// A write that is still at work in the server when its connection is lost ends before the next one begins, without any
// quarantine in the client.
func TestClientFence(t *testing.T) {
	d := newDevice()
	release := make(chan struct{})
	var first atomic.Bool
	d.Defer = func(r *nbd.Request, complete func()) bool {
		if r.Command != nbd.CmdWrite || first.Swap(true) {
			return false
		}
		go func() { <-release; complete() }()
		return true
	}
	way := newCuttable(t, serve(t, d, nbd.Options{}).socket)
	c := dialClient(t, way.uri, nbd.ClientOptions{
		Session: [16]byte{1}, Quarantine: time.Hour, ReconnectDelay: time.Millisecond,
	})
	older, newer, got := pattern(1, 4096), pattern(2, 4096), make([]byte, 4096)
	lost, written := make(chan error), make(chan error)
	go func() { _, err := c.WriteAt(older, 0); lost <- err }()
	eventually(t, "the write is at work", first.Load)
	way.cut()
	if err := <-lost; err == nil {
		t.Fatal("the write that was cut succeeded")
	}
	go func() { _, err := c.WriteAt(newer, 0); written <- err }()
	select {
	case err := <-written:
		close(release)
		t.Fatalf("the second write ended before the first: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, newer) {
		t.Errorf("the block does not hold the newer write, %v", err)
	}
}

// A server that lost what it had answered refuses the session for good.
func TestClientRolledBack(t *testing.T) {
	var generation atomic.Uint64
	generation.Store(1)
	s := serveExports(t, nbd.Options{}, &nbd.Export{Device: newDevice(), Generation: generation.Load})
	way := newCuttable(t, s.socket)
	c := dialClient(t, way.uri, nbd.ClientOptions{Session: [16]byte{1}, ReconnectDelay: time.Millisecond})
	if _, err := c.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	generation.Store(2)
	way.cut()
	for range 2 {
		if _, err := c.ReadAt(make([]byte, 512), 0); !errors.Is(err, nbd.ErrRefused) {
			t.Errorf("read after the rollback: %v", err)
		}
	}
	if err := c.Sync(); !errors.Is(err, nbd.ErrRefused) {
		t.Errorf("Sync after the rollback: %v", err)
	}
}

// All that the server can do, through the client, with extended headers.
func TestClientAndServer(t *testing.T) {
	s := serveExports(t, nbd.Options{}, &nbd.Export{Device: newDevice(), Contexts: nbdtest.Contexts, MaxPayload: 64 << 10})
	s.listenTCP()
	for _, uri := range []string{"nbd+unix:///?socket=" + s.socket, "nbd://" + s.tcp} {
		checkClient(t, dialClient(t, uri, nbd.ClientOptions{Connections: 2}))
	}
}

func checkClient(t *testing.T, c *nbd.Client) {
	t.Helper()
	if c.Size() != testSize || c.SectorBytes() != 1 || !c.CanFlush() {
		t.Errorf("size %d, sector %d, flush %t", c.Size(), c.SectorBytes(), c.CanFlush())
	}
	want, got := pattern(3, testSize-7), make([]byte, testSize-7)
	if err := c.WritevAt([][]byte{want[:1], want[1:70_001], want[70_001:]}, 3); err != nil {
		t.Fatal(err)
	}
	if err := c.Zero(100_001, 50_000); err != nil {
		t.Fatal(err)
	}
	clear(want[100_001-3 : 150_001-3])
	if _, err := c.ReadAt(got, 3); err != nil || !bytes.Equal(got, want) {
		t.Error("read differs", err)
	}
	if err := c.Trim(0, testSize); err != nil {
		t.Error(err)
	}
	at, end := int64(0), c.Size()
	err := c.Extents(0, end, func(off, n int64, flags uint32) bool {
		if off != at || flags != nbd.StateHole|nbd.StateZero {
			t.Errorf("extent at %d (want %d) has flags %d", off, at, flags)
		}
		at += n
		return true
	})
	if err != nil || at != end {
		t.Errorf("extents end at %d, %v", at, err)
	}
	if err := c.Sync(); err != nil {
		t.Error(err)
	}
}
