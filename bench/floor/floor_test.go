package main

import (
	"encoding/json"
	"net"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/bench"
	"github.com/ramshelf/ramshelf/bench/load"
)

const testBytes = 16 << 20

// start serves a floor on a unix socket until the test ends.
func start(t *testing.T) load.Target {
	t.Helper()
	device, err := newDevice(testBytes)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		if err := accept(l, device); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { l.Close() })
	return load.Target{Network: "unix", Address: path}
}

func command(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		var text string
		if e, ok := err.(*exec.ExitError); ok {
			text = string(e.Stderr)
		}
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, text)
	}
	return out
}

func TestNbdinfoReadsTheExport(t *testing.T) {
	var info struct {
		Protocol   string
		Structured bool
		Exports    []struct {
			Size     int64 `json:"export-size"`
			CanFlush bool  `json:"can_flush"`
			CanTrim  bool  `json:"can_trim"`
		}
	}
	if err := json.Unmarshal(command(t, "nbdinfo", "--json", "--list", start(t).URI()), &info); err != nil {
		t.Fatal(err)
	}
	if info.Protocol != "newstyle-fixed" || len(info.Exports) != 1 {
		t.Fatalf("nbdinfo says %+v; want one export of a fixed newstyle server", info)
	}
	if e := info.Exports[0]; e.Size != testBytes || !e.CanFlush || e.CanTrim {
		t.Errorf("nbdinfo says %+v; want %d bytes, flush and no trim", e, testBytes)
	}
}

func TestFioReadsBackWhatItWrote(t *testing.T) {
	uri := start(t).URI()
	for _, bs := range []string{"4k", "1m"} {
		command(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri, "--thread", "--rw=randwrite", "--bs="+bs,
			"--iodepth=32", "--size=8m", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0", "--fsync=100")
	}
}

func TestFioMeasures(t *testing.T) {
	job := bench.FioJob{Pattern: "randread", BlockBytes: 4096, Depth: 8, Duration: 200 * time.Millisecond, Seed: 1}
	r, err := bench.ParseFio(command(t, "fio", job.Args(start(t).URI())...))
	if err != nil {
		t.Fatal(err)
	}
	if r.Bytes != r.Requests*4096 || r.P50 <= 0 || r.P99 < r.P50 || r.CPU <= 0 {
		t.Errorf("fio measured %+v", r)
	}
}

func TestGeneratorReadsBackWhatItWrote(t *testing.T) {
	target := start(t)
	for _, structured := range []bool{false, true} {
		for _, blockBytes := range []int{4096, 64 << 10, 4 << 20} {
			config := load.Config{
				Target: target, Connections: 2, Depth: 16, Batch: 4, BlockBytes: blockBytes,
				Sequential: true, Structured: structured, Stamp: true, Check: true,
			}
			n := uint64(testBytes / blockBytes / 2)
			for _, percent := range []int{0, 100} {
				config.ReadPercent = percent
				r := pass(t, config, n)
				if r.Requests != 2*n || r.Bytes != testBytes {
					t.Errorf("structured %v, %d-byte blocks, %d %% reads: %d requests, %d bytes; want %d, %d",
						structured, blockBytes, percent, r.Requests, r.Bytes, 2*n, testBytes)
				}
			}
		}
	}
}

func pass(t *testing.T, c load.Config, n uint64) load.Result {
	t.Helper()
	l, err := load.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r, err := l.Pass(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A client that sends far more reads than the socket's buffers hold must not come to a stop.
func TestDeepMixWithLargeBlocks(t *testing.T) {
	c := load.Config{Target: start(t), Depth: 512, Batch: 256, BlockBytes: 64 << 10, ReadPercent: 50}
	if r := pass(t, c, 2000); r.Requests != 2000 {
		t.Errorf("%d requests answered, want 2000", r.Requests)
	}
}

func TestBadArguments(t *testing.T) {
	for _, listen := range []string{"", "/tmp/s", "udp:1.2.3.4:5"} {
		if err := run(listen, 1<<20); err == nil {
			t.Errorf("run(%q) succeeded", listen)
		}
	}
	if err := run("tcp:127.0.0.1:0", 0); err == nil {
		t.Error("a device of 0 bytes was accepted")
	}
}
