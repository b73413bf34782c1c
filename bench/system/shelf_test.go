package system

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// shelf is vblade over a file, in a network namespace of its own, and a way to start our daemon there.
type shelf struct {
	t      testing.TB
	ns     string
	file   string
	binary string // our daemon, in the namespace
	p      *process
}

// shelves counts them, for names.
var shelves atomic.Int32

// newShelf makes the file and serves it as e1.0, over a cable with jumbo frames.
func newShelf(t testing.TB, file string, bytes int64) *shelf {
	t.Helper()
	path, err := ramshelfBinary()
	if err != nil {
		t.Fatal(err)
	}
	s := &shelf{
		t: t, ns: fmt.Sprintf("ramshelf-%d-%d", os.Getpid(), shelves.Add(1)), file: sparse(t, file, bytes),
		binary: filepath.Join(t.TempDir(), "ramshelf"),
	}
	writeFile(t, s.binary, fmt.Sprintf("#!/bin/sh\nexec ip netns exec %s %s \"$@\"\n", s.ns, path))
	if err := os.Chmod(s.binary, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "netns", "add", s.ns)
	t.Cleanup(func() { run(t, "ip", "netns", "del", s.ns) })
	run(t, "ip", "-n", s.ns, "link", "add", "host0", "mtu", "9000", "type", "veth", "peer", "name", "shelf0", "mtu", "9000")
	for _, name := range []string{"host0", "shelf0"} {
		run(t, "ip", "-n", s.ns, "link", "set", name, "up")
	}
	s.start()
	return s
}

func (s *shelf) backing() string { return "aoe:e1.0@host0" }

func (s *shelf) start() {
	s.t.Helper()
	s.p = command{}.start(s.t, "ip", "netns", "exec", s.ns, tool(s.t, "vblade"), "1", "0", "shelf0", s.file)
}

func (s *shelf) kill() {
	s.t.Helper()
	s.p.kill()
	s.p.wait(s.t, 30*time.Second)
}

// TestShelfPowerCut cuts the power of volumes whose backing is an AoE shelf.
func TestShelfPowerCut(t *testing.T) {
	for _, m := range []cutMode{
		{name: "disk", journal: "internal", ack: "disk", size: 64 * mib, shelf: true},
		{name: "ram", journal: "internal", ack: "ram", staleness: "50ms", size: 64 * mib, shelf: true},
	} {
		t.Run(m.name, func(t *testing.T) {
			p := newPowerCut(t, m, volume{})
			p.evidence = filepath.Join(outDir(t), "powercut-shelf-"+m.name+".txt")
			p.run(count("RAMSHELF_SHELF_CUTS", 4, 100), time.Now().Add(time.Hour))
			t.Logf("%+v", p.tally)
		})
	}
}

// TestShelfRestarts: the shelf is killed under load and started again; the volume waits, goes on, and at the end everything is home.
func TestShelfRestarts(t *testing.T) {
	file := filepath.Join(t.TempDir(), "shelf.img")
	shelf := newShelf(t, file, backingBytes+128*mib)
	s := serveRamshelf(t, volume{size: backingBytes, memory: 32 * mib, ack: "disk", backing: shelf.backing(), binary: shelf.binary})
	h := newShadow(t, s, backingBytes)
	for range 3 {
		h.write(200, 0, backingBytes, sectorBytes)
		shelf.kill()
		answered := make(chan struct{})
		go func() {
			h.write(100, 0, backingBytes, sectorBytes)
			close(answered)
		}()
		select {
		case <-answered:
			t.Fatal("writes are answered as on disk, and there is no disk")
		case <-time.After(1500 * time.Millisecond):
		}
		eventually(t, 20*time.Second, "the status says that the shelf is away", func() bool {
			return strings.Contains(s.status().Backing.Error, "shelf e1.0 not answering for")
		})
		shelf.start()
		select {
		case <-answered:
		case <-time.After(time.Minute):
			t.Fatal("no write is answered after the return of the shelf")
		}
	}
	h.check("after the restarts", 0, backingBytes)
	cleanStop(t, s)
	h.checkFile(file)
}
