package main

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestIOLogIsAscending(t *testing.T) {
	got := string(ioLog("/d", []uint64{9, 0, 3}))
	want := "fio version 2 iolog\n/d add\n/d open\n/d write 0 4096\n/d write 12288 4096\n/d write 36864 4096\n/d close\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// fio takes the list for what it is: so many writes of 4 KiB.
func TestFioReplaysTheIOLog(t *testing.T) {
	dir := t.TempDir()
	f := &flushing{root: dir, disk: filepath.Join(dir, "disk"), size: 1 << 20}
	if out, err := exec.Command("truncate", "-s", "1M", f.disk).CombinedOutput(); err != nil {
		t.Fatalf("truncate: %v: %s", err, out)
	}
	var c flushCase
	if err := f.sorted(t.Context(), &c, f.blocks(50)); err != nil {
		t.Fatal(err)
	}
	if len(c.sorted) != 1 || c.sorted[0] <= 0 {
		t.Errorf("measured %v bytes per second", c.sorted)
	}
}

func TestBlocksAreDistinctAndInRandomOrder(t *testing.T) {
	f := &flushing{size: 4 << 20}
	for percent, want := range map[int]int{100: 1024, 50: 512} {
		blocks := f.blocks(percent)
		if slices.IsSorted(blocks) {
			t.Error("blocks are in ascending order")
		}
		slices.Sort(blocks)
		if n := len(slices.Compact(blocks)); n != want || blocks[len(blocks)-1] >= 1024 {
			t.Errorf("%d %%: %d distinct blocks up to %d, want %d below 1024", percent, n, blocks[len(blocks)-1], want)
		}
	}
}

func TestFlushReport(t *testing.T) {
	f := &flushing{size: 1 << 30, linear: []float64{200e6, 100e6}, cases: []*flushCase{
		{percent: 50, sorted: []float64{50e6, 25e6}, home: []float64{100e6, 50e6}, writeSize: []float64{2 << 20}, surplus: []float64{1.25}},
	}}
	text, err := f.render(terminal)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"1024 MiB", "0.50 (0.50–0.50)", "2.00 (2.00–2.00)", "2048", "1.25"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("%q is not in the report:\n%s", want, text)
		}
	}
}
