package system

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// qemu is one release of qemu's tools.
type qemu struct {
	name string
	dir  string // of the unpacked packages, "" for the installed ones
}

// qemus are the stock tools and those of bookworm-backports, which speak extended headers.
func qemus(t *testing.T) []qemu {
	t.Helper()
	dir, err := filepath.Abs("../../out/backports")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir + "/usr/bin/qemu-img"); err != nil {
		t.Fatalf("qemu-img of bookworm-backports is missing: run bench/system/backports.sh %s (%v)", dir, err)
	}
	return []qemu{{"stock", ""}, {"backports", dir}}
}

func (q qemu) run(t *testing.T, name string, args ...string) string {
	t.Helper()
	if q.dir == "" {
		return run(t, name, args...)
	}
	libs, err := filepath.Glob(q.dir + "/usr/lib/*-linux-gnu")
	if err != nil {
		t.Fatal(err)
	}
	c := command{env: []string{"LD_LIBRARY_PATH=" + strings.Join(libs, ":")}}
	return c.must(t, q.dir+"/usr/bin/"+name, args...)
}

// io runs qemu-io with the commands and checks that no pattern failed: qemu-io says so in words.
func (q qemu) io(t *testing.T, s server, commands ...string) string {
	t.Helper()
	args := []string{"-f", "raw"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out := q.run(t, "qemu-io", append(args, s.uri())...)
	if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
		t.Errorf("qemu-io: %s", out)
	}
	return out
}

func TestQEMU(t *testing.T) {
	const size = 128 * mib
	for _, q := range qemus(t) {
		t.Run(q.name, func(t *testing.T) {
			dir := t.TempDir()
			image := dir + "/image"
			writeImage(t, image, size)
			s := serve(t, volume{size: size})
			q.run(t, "qemu-img", "convert", "-n", "-m", "16", "-W", "-f", "raw", "-O", "raw", image, s.uri())
			q.run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, s.uri())
			q.run(t, "qemu-img", "convert", "-m", "16", "-f", "raw", "-O", "raw", s.uri(), dir+"/out")
			run(t, "cmp", image, dir+"/out")
			q.run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri(), dir+"/out.qcow2")
			q.run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", dir+"/out.qcow2", s.uri())
			q.checkMap(t, s, size)

			// The negative control: compare must see one changed byte.
			q.io(t, s, "write -P 0x55 77777 1")
			if r := (command{}).try(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, s.uri()); r.code != 1 {
				t.Errorf("qemu-img compare of different content: exit code %d, want 1", r.code)
			}
			q.patterns(t, s)
			checkRSS(t, s, 64*mib)
			cleanStop(t, s)
		})
	}
}

// checkMap checks that qemu-img's map covers the volume.
func (q qemu) checkMap(t *testing.T, s server, size int64) {
	t.Helper()
	var extents []struct {
		Start  int64 `json:"start"`
		Length int64 `json:"length"`
		Data   bool  `json:"data"`
		Zero   bool  `json:"zero"`
	}
	out := q.run(t, "qemu-img", "map", "-f", "raw", "--output=json", s.uri())
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("qemu-img map: %v\n%s", err, out)
	}
	var at, data int64
	for _, e := range extents {
		if e.Start != at {
			t.Fatalf("qemu-img map: an extent begins at %d, not %d", e.Start, at)
		}
		at += e.Length
		if e.Data && !e.Zero {
			data += e.Length
		}
	}
	if at != size || data == 0 || data == size {
		t.Errorf("qemu-img map covers %d of %d bytes, %d of them data; the volume has data and holes", at, size, data)
	}
}

// patterns are qemu-io's at odd offsets: written and read back, zeroed, discarded, overlapping and asynchronous.
func (q qemu) patterns(t *testing.T, s server) {
	t.Helper()
	var commands []string
	for i, p := range []struct{ off, bytes int }{
		{0, 1}, {511, 2}, {4095, 2}, {4097, 4095}, {12345, 54321}, {mib - 7, 14}, {3*mib + 1, 2*mib + 513}, {128*mib - 3, 3},
	} {
		commands = append(commands, fmt.Sprintf("write -P %d %d %d", 0x40+i, p.off, p.bytes))
	}
	commands = append(commands,
		"read -P 0x40 0 1", "read -P 0x41 511 2", "read -P 0x42 4095 2", "read -P 0x43 4097 4095",
		"read -P 0x44 12345 54321", "read -P 0x45 1048569 14", "read -P 0x46 3145729 2097665", "read -P 0x47 134217725 3",
		// Zeroing inside of a pattern, with and without unmap, with FUA.
		"write -P 0xaa 20m 1m", "write -z 20975001 7777", "read -P 0xaa 20m 3481", "read -P 0 20975001 7777",
		"read -P 0xaa 20982778 1037318",
		"write -z -u 22m 1m", "read -P 0 22m 1m", "write -f -P 0xbb 22m 513", "read -P 0xbb 22m 513", "read -P 0 23069185 3583",
		"discard 20m 1m", "read -P 0 20m 1m", "flush",
		// Overlapping requests in flight: the last one sent alone decides where nothing else was sent after it.
		"aio_write -P 1 40m 64k", "aio_write -P 2 41m 64k", "aio_write -z 42m 64k", "aio_read -P 1 40m 0",
		"aio_flush", "read -P 1 40m 64k", "read -P 2 41m 64k", "read -P 0 42m 64k",
		"aio_write -P 3 44m 8k", "aio_write -P 3 46141440 8k", "aio_write -P 3 46145536 8k", "aio_flush",
		"read -P 3 44m 16k", "write -P 9 44m 100", "read -P 9 44m 100", "read -P 3 46137444 1000",
	)
	q.io(t, s, commands...)
	// Another connection sees the same.
	q.io(t, s, "read -P 0x44 12345 54321", "read -P 3 46137444 1000")
	// The negative control: a wrong pattern is told.
	out := (command{}).try(t, "qemu-io", "-f", "raw", "-c", "read -P 4 46137444 1000", s.uri())
	if !strings.Contains(out.stdout, "verification failed") {
		t.Errorf("qemu-io does not tell a wrong pattern: %s", out.stdout)
	}
}

// TestExtendedHeaders checks that the backports qemu really gets extended headers: one zeroing of 6 GiB, which no
// compact request can hold.
func TestExtendedHeaders(t *testing.T) {
	s := serveRamshelf(t, volume{size: 12 * gib})
	q := qemus(t)[1]
	q.io(t, s, "write -P 7 5g 1m", "write -z -n 1g 6g", "read -P 0 5g 1m", "discard 8g 1g", "map")
	reads, zeroes := s.traffic()
	t.Logf("%d reads, %d zeroings", reads, zeroes)
	if zeroes != 2 {
		t.Errorf("a zeroing of 6 GiB and a discard of 1 GiB came as %d requests: extended headers were not used", zeroes)
	}
	cleanStop(t, s)
}

// traffic is how many reads and zeroings the volume has served.
func (s *ramshelf) traffic() (reads, zeroes uint64) {
	s.t.Helper()
	var all struct {
		Volumes []struct {
			Reads  struct{ Requests uint64 } `json:"reads"`
			Zeroes struct{ Requests uint64 } `json:"zeroes"`
		} `json:"volumes"`
	}
	r := s.cli("status", "--json")
	if err := json.Unmarshal([]byte(r.stdout), &all); err != nil || len(all.Volumes) != 1 {
		s.t.Fatalf("status --json: %v\n%s", err, r.stdout)
	}
	return all.Volumes[0].Reads.Requests, all.Volumes[0].Zeroes.Requests
}
