package bench

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	const line = "4242 (a (b) c) S 17 4242 4242 0 -1 4194304 108 0 0 0 5 6 70 800 20 0 1 0 12345 1 1 1\n"
	got, err := parseStat([]byte(line))
	if want := (stat{pid: 4242, parent: 17, used: 11 * clockTick, reaped: 870 * clockTick}); err != nil || got != want {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{"", "1 bash S 1", "1 (x) S 1 2 3", "x (x) S 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1"} {
		if got, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q gives %+v", bad, got)
		}
	}
}

// The shell waits for one child that computes and leaves another running: both count, beside itself.
func TestCPUCountsChildrenLivingAndDead(t *testing.T) {
	const burn = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done"
	cmd := exec.Command("sh", "-c", "("+burn+"); ("+burn+"; echo x; read y); :")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	own, err := statOf(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	all, err := CPU(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if own.reaped == 0 || all <= own.used+own.reaped {
		t.Errorf("shell used %v, its dead child %v, all together %v; want something for the dead child and the living one",
			own.used, own.reaped, all)
	}
}

func TestCPUOfNoProcess(t *testing.T) {
	if d, err := CPU(1 << 30); err == nil {
		t.Errorf("processor time of no process is %v", d)
	}
}

func TestParseMemory(t *testing.T) {
	const text = "Name:\tx\nVmRSS:\t     10 kB\nRssAnon:\t       4 kB\nRssFile:\t       5 kB\nRssShmem:\t       1 kB\nThreads:\t1\n"
	got, err := parseMemory(text)
	if want := (Memory{Resident: 10 << 10, Anonymous: 4 << 10, File: 5 << 10, Shared: 1 << 10}); err != nil || got != want {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{"", "VmRSS: 1 kB\n", "VmRSS: x kB\nRssAnon: 1 kB\nRssFile: 1 kB\nRssShmem: 1 kB\n"} {
		if got, err := parseMemory(bad); err == nil {
			t.Errorf("%q gives %+v", bad, got)
		}
	}
}

func TestMemoryOfThisProcess(t *testing.T) {
	m, err := MemoryOf(os.Getpid())
	if err != nil || m.Anonymous == 0 || m.Resident < m.Anonymous+m.File {
		t.Errorf("got %+v, %v", m, err)
	}
}

func TestDiskBytesLeavesHolesOut(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(1 << 30); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if got, err := DiskBytes(dir); err != nil || got < 1<<20 || got > 2<<20 {
		t.Errorf("got %d, %v; want about 1 MiB", got, err)
	}
}

func TestThisHost(t *testing.T) {
	h := ThisHost()
	if h.Cores < 1 || h.MemoryMiB < 1 || h.Kernel == unknown || h.Processor == unknown || h.Commit == "" {
		t.Errorf("host is %s", h)
	}
	if _, err := strconv.ParseFloat(LoadAverage(), 64); err != nil {
		t.Errorf("load average: %v", err)
	}
}

func TestParseFio(t *testing.T) {
	text, err := os.ReadFile("testdata/fio-randrw.json")
	if err != nil {
		t.Fatal(err)
	}
	want := FioResult{
		Requests: 10307 + 10296, Bytes: 42217472 + 42172416, Elapsed: 301 * time.Millisecond,
		P50: 305152, P99: 1466368, P999: 26607616, CPU: 120 * time.Millisecond,
	}
	for _, output := range [][]byte{text, append([]byte("fio: a note before the output\n"), text...)} {
		got, err := ParseFio(output)
		if err != nil || got != want {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
	}
}

func TestParseFioRefuses(t *testing.T) {
	for name, output := range map[string]string{
		"nothing":    "fio: not found",
		"cut":        `{"jobs":[{"read":`,
		"no job":     `{"jobs":[]}`,
		"an error":   `{"jobs":[{"error":5,"read":{"total_ios":5,"runtime":5}}]}`,
		"no request": `{"jobs":[{"read":{"total_ios":0,"runtime":5}}]}`,
		"no time":    `{"jobs":[{"read":{"total_ios":5,"runtime":0}}]}`,
	} {
		if got, err := ParseFio([]byte(output)); err == nil {
			t.Errorf("%s gives %+v", name, got)
		}
	}
}

func TestFioArgs(t *testing.T) {
	args := FioJob{Pattern: "randread", BlockBytes: 4096, Depth: 32, Duration: 1500 * time.Millisecond, Seed: 7}.Args("nbd://h/x")
	for _, want := range []string{"--uri=nbd://h/x", "--rw=randread", "--bs=4096", "--iodepth=32", "--runtime=1500ms", "--randseed=7", "--time_based"} {
		found := false
		for _, a := range args {
			found = found || a == want
		}
		if !found {
			t.Errorf("%q is not in %q", want, args)
		}
	}
}
