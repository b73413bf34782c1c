package system

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// export is an export as nbdinfo --json shows it.
type export struct {
	Name         string   `json:"export-name"`
	Size         int64    `json:"export-size"`
	Contexts     []string `json:"contexts"`
	ReadOnly     bool     `json:"is_read_only"`
	Cache        bool     `json:"can_cache"`
	DF           bool     `json:"can_df"`
	FastZero     bool     `json:"can_fast_zero"`
	Flush        bool     `json:"can_flush"`
	FUA          bool     `json:"can_fua"`
	MultiConn    bool     `json:"can_multi_conn"`
	Trim         bool     `json:"can_trim"`
	Zero         bool     `json:"can_zero"`
	MinimumBlock int64    `json:"block_size_minimum"`
	Preferred    int64    `json:"block_size_preferred"`
	MaximumBlock int64    `json:"block_size_maximum"`
}

type info struct {
	Protocol   string   `json:"protocol"`
	Structured bool     `json:"structured"`
	Exports    []export `json:"exports"`
}

func nbdinfo(t *testing.T, args ...string) info {
	t.Helper()
	var i info
	out := run(t, "nbdinfo", append([]string{"--json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &i); err != nil {
		t.Fatalf("nbdinfo --json: %v\n%s", err, out)
	}
	return i
}

var contexts = []string{"base:allocation", "x-ramshelf:dirty", "x-ramshelf:resident"}

func checkExport(t *testing.T, e export, size int64) {
	t.Helper()
	if e.Size != size {
		t.Errorf("export-size is %d, want %d", e.Size, size)
	}
	for name, can := range map[string]bool{
		"flush": e.Flush, "fua": e.FUA, "multi-conn": e.MultiConn, "cache": e.Cache, "zero": e.Zero,
		"fast zero": e.FastZero, "df": e.DF, "trim": e.Trim, "writes": !e.ReadOnly,
	} {
		if !can {
			t.Errorf("the export cannot do %s", name)
		}
	}
	for _, c := range contexts {
		if !slices.Contains(e.Contexts, c) {
			t.Errorf("contexts %q lack %s", e.Contexts, c)
		}
	}
	if e.MinimumBlock != 1 || e.Preferred != 4096 || e.MaximumBlock < mib || e.MaximumBlock > 32*mib {
		t.Errorf("block sizes are %d, %d, %d, want 1, 4096 and 1 to 32 MiB", e.MinimumBlock, e.Preferred, e.MaximumBlock)
	}
}

func TestInfo(t *testing.T) {
	const size = 256*mib + 4096*3
	s := serveRamshelf(t, volume{size: size})
	i := nbdinfo(t, s.uri())
	if i.Protocol != "newstyle-fixed" || !i.Structured || len(i.Exports) != 1 {
		t.Errorf("protocol %q, structured %v, %d exports", i.Protocol, i.Structured, len(i.Exports))
	}
	checkExport(t, i.Exports[0], size)
	if got := strings.TrimSpace(run(t, "nbdinfo", "--size", s.uri())); got != fmt.Sprint(size) {
		t.Errorf("nbdinfo --size: %s", got)
	}
	// The empty name means the only export.
	checkExport(t, nbdinfo(t, nbdURI("", s.socket())).Exports[0], size)
	if r := (command{}).try(t, "nbdinfo", nbdURI("nosuch", s.socket())); r.code == 0 {
		t.Error("an export that does not exist was opened")
	}
	if l := nbdinfo(t, "--list", s.uri()); len(l.Exports) != 1 || l.Exports[0].Name != "vol" {
		t.Errorf("--list shows %+v", l.Exports)
	}
}

func TestSeveralVolumes(t *testing.T) {
	dir := t.TempDir()
	s := newRamshelf(t, volume{})
	other := s.dir + "/other.sock"
	s.v.config = fmt.Sprintf(`[[volume]]
name = "vol"
backing = "file:%s/one.img"
size = "64MiB"
memory = "32MiB"
ack = "ram"
listen = ["%s", "%s"]

[[volume]]
name = "two"
backing = "file:%s/two.img"
size = "96MiB"
memory = "32MiB"
ack = "disk"
listen = ["%s"]
`, dir, nbdURI("vol", s.socket()), nbdURI("vol", other), dir, nbdURI("two", s.socket()))
	s.start()
	l := nbdinfo(t, "--list", nbdURI("", s.socket()))
	sizes := map[string]int64{}
	for _, e := range l.Exports {
		sizes[e.Name] = e.Size
	}
	if len(l.Exports) != 2 || sizes["vol"] != 64*mib || sizes["two"] != 96*mib {
		t.Fatalf("--list shows %v", sizes)
	}
	if l := nbdinfo(t, "--list", nbdURI("", other)); len(l.Exports) != 1 {
		t.Errorf("the second socket lists %d exports, want 1", len(l.Exports))
	}
	if _, err := dialNBD(s.socket(), ""); err == nil {
		t.Error("the empty name opened one of two exports")
	}
	for i, name := range []string{"vol", "two"} {
		c, err := dialNBD(s.socket(), name)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.do(cmdWrite, 0, 12345, []byte(strings.Repeat(name, 100+i))); err != nil {
			t.Fatal(err)
		}
		c.close()
	}
	if r := s.cli("flush"); r.code != 64 || !strings.Contains(r.stderr, "two") {
		t.Errorf("flush without a name among two volumes: exit code %d, %s", r.code, r.stderr)
	}
	for _, name := range []string{"vol", "two"} {
		if r := s.cli("flush", name); r.code != 0 {
			t.Errorf("flush %s: exit code %d, %s", name, r.code, r.stderr)
		}
	}
	if r := s.cli("flush", "three"); r.code != 4 {
		t.Errorf("flush of an unknown volume: exit code %d, want 4", r.code)
	}
	if r := s.cli("status", "three"); r.code != 4 {
		t.Errorf("status of an unknown volume: exit code %d, want 4", r.code)
	}
	s.p.signal(15)
	if code := s.p.wait(t, stopLimit); code != 0 {
		t.Fatalf("SIGTERM: exit code %d", code)
	}
	for file, want := range map[string]string{"one.img": strings.Repeat("vol", 100), "two.img": strings.Repeat("two", 101)} {
		if got := slurp(filepath.Join(dir, file)); !strings.HasPrefix(got[12345:], want) {
			t.Errorf("%s does not hold what was written to its volume", file)
		}
	}
}

// extent is a line of nbdinfo --map --json.
type extent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
	Type   int   `json:"type"`
}

// mapOf is a context's map, with adjacent extents of one type joined.
func mapOf(t *testing.T, s server, context string) []extent {
	t.Helper()
	var all, joined []extent
	out := run(t, "nbdinfo", "--map="+context, "--json", s.uri())
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("nbdinfo --map=%s: %v\n%s", context, err, out)
	}
	for _, e := range all {
		if n := len(joined); n > 0 && joined[n-1].Type == e.Type {
			joined[n-1].Length += e.Length
		} else {
			joined = append(joined, e)
		}
	}
	return joined
}

func checkMap(t *testing.T, s server, context, when string, want ...extent) {
	t.Helper()
	if got := mapOf(t, s, context); !slices.Equal(got, want) {
		t.Errorf("%s %s: %v, want %v", context, when, got, want)
	}
}

// TestMaps follows the three contexts through a write, a flush and a zeroing.
func TestMaps(t *testing.T) {
	const size = 64 * mib
	const hole = 3 // HOLE and ZERO of base:allocation
	s := serveRamshelf(t, volume{size: size, memory: 32 * mib, extra: []string{"--staleness", "1h"}})
	checkMap(t, s, "base:allocation", "of a fresh volume", extent{0, size, hole})
	checkMap(t, s, "x-ramshelf:dirty", "of a fresh volume", extent{0, size, 0})
	checkMap(t, s, "x-ramshelf:resident", "of a fresh volume", extent{0, size, 0})

	c := mustDial(t, s)
	if err := c.do(cmdWrite, 0, 8*mib, slices.Repeat([]byte{7}, mib)); err != nil {
		t.Fatal(err)
	}
	written := func(kind int) []extent {
		other := 0
		if kind == 0 {
			other = hole
		}
		return []extent{{0, 8 * mib, other}, {8 * mib, mib, kind}, {9 * mib, size - 9*mib, other}}
	}
	checkMap(t, s, "base:allocation", "after a write", written(0)...)
	checkMap(t, s, "x-ramshelf:dirty", "after a write", written(1)...)
	checkMap(t, s, "x-ramshelf:resident", "after a write", written(1)...)
	if dirty := s.status().DirtyBytes; dirty != mib {
		t.Errorf("dirty_bytes is %d after 1 MiB", dirty)
	}

	s.flush()
	checkMap(t, s, "base:allocation", "after the flush", written(0)...)
	checkMap(t, s, "x-ramshelf:dirty", "after the flush", extent{0, size, 0})
	checkMap(t, s, "x-ramshelf:resident", "after the flush", written(1)...)

	if err := c.effect(cmdTrim, 0, 8*mib, mib, nil); err != nil {
		t.Fatal(err)
	}
	checkMap(t, s, "base:allocation", "after the trim", extent{0, size, hole})
	s.flush()
	checkMap(t, s, "base:allocation", "after the trim is home", extent{0, size, hole})
	checkMap(t, s, "x-ramshelf:dirty", "after the trim is home", extent{0, size, 0})
	cleanStop(t, s)
}

// TestMapKind checks the words that people see.
func TestMapKind(t *testing.T) {
	s := serveRamshelf(t, volume{size: 64 * mib, memory: 16 * mib})
	out := run(t, "nbdinfo", "--map", s.uri())
	if fields := strings.Fields(out); len(fields) != 4 || fields[3] != "hole,zero" {
		t.Errorf("nbdinfo --map of a fresh volume: %q", out)
	}
	for _, context := range contexts {
		if out := run(t, "nbdinfo", "--map="+context, "--totals", s.uri()); !strings.Contains(out, "100.0%") {
			t.Errorf("totals of %s: %s", context, out)
		}
	}
}

// TestCopy copies in and out by nbdcopy with 4 connections.
func TestCopy(t *testing.T) {
	const size = 192 * mib
	dir := t.TempDir()
	image := dir + "/image"
	writeImage(t, image, size)
	s := serve(t, volume{size: size})
	run(t, "nbdcopy", "--connections=4", "--requests=64", "--flush", image, s.uri())
	run(t, "nbdcopy", "--connections=4", "--requests=64", s.uri(), dir+"/out")
	run(t, "cmp", image, dir+"/out")
	// From one server to another, with and without asking for holes.
	to := nbdkitMemory(t, size)
	to.start()
	run(t, "nbdcopy", "--connections=4", "--no-extents", s.uri(), to.uri())
	run(t, "nbdcopy", "--connections=4", to.uri(), dir+"/out2")
	run(t, "cmp", image, dir+"/out2")
	run(t, "nbdcopy", "--connections=4", "--allocated", "--request-size=4194304", to.uri(), s.uri())
	run(t, "nbdcopy", "--connections=4", s.uri(), dir+"/out3")
	run(t, "cmp", image, dir+"/out3")
	checkRSS(t, s, 64*mib)
	cleanStop(t, s)
	run(t, "cmp", "-n", fmt.Sprint(size), image, s.home())
}

// writeImage makes a file of data and holes.
func writeImage(t testing.TB, path string, size int64) {
	t.Helper()
	f := create(t, path)
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 3*mib-1536)
	for off := int64(0); off+int64(len(p)) < size; off += 5 * mib {
		for i := 0; i < len(p); i += sectorBytes {
			putStamp(p[i:min(i+sectorBytes, len(p))][:sectorBytes], off/sectorBytes+int64(i/sectorBytes), 1, 0, 1, 1)
		}
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
}

// TestShell runs a script of libnbd's Python binding against the volume.
func TestShell(t *testing.T) {
	const size = 8 * gib
	s := serveRamshelf(t, volume{size: size, memory: 64 * mib})
	begin := time.Now()
	out := run(t, "/usr/bin/python3", "testdata/shell.py", s.uri(), fmt.Sprint(size))
	t.Logf("%v:\n%s", time.Since(begin), out)
	if !strings.HasSuffix(strings.TrimSpace(out), "done") {
		t.Errorf("the script did not reach its end")
	}
	// The same through nbdsh itself.
	debian := command{env: []string{"PATH=/usr/bin:/bin"}} // whose python3 has the nbd module
	debian.must(t, "/usr/bin/nbdsh", "-u", s.uri(), "-c", "assert h.get_size() == "+fmt.Sprint(size), "-c", "h.pwrite(b'x' * 513, 777)",
		"-c", "assert bytes(h.pread(515, 776)) == b'\\0' + b'x' * 513 + b'\\0'")
	checkRSS(t, s, s.v.memory)
	cleanStop(t, s)
}
