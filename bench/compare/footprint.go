package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"

	"github.com/ramshelf/ramshelf/bench"
	"github.com/ramshelf/ramshelf/bench/load"
)

// footprintConnections is how many clients are connected while memory is measured.
const footprintConnections = 16

// footprint is what the subject takes beside the bytes that it caches.
type footprint struct {
	server        string
	memoryBytes   int64 // for slots, as configured
	residentBytes int64 // cached
	fileBytes     int64 // the memory file as a whole: slots and what describes them
	process       bench.Memory
}

// metadataShare is what describes the slots, in the memory file, ÷ the slots.
func (f footprint) metadataShare() float64 {
	return float64(f.fileBytes-f.memoryBytes) / float64(f.memoryBytes)
}

// beyondBytes is what the process has resident outside its memory file.
func (f footprint) beyondBytes() int64 { return f.process.Anonymous + f.process.File }

// measureFootprint looks at r, which must be a ramshelf, after its jobs.
func measureFootprint(ctx context.Context, r *running) (footprint, error) {
	f := footprint{server: r.name}
	l, err := load.Open(ctx, load.Config{Target: r.target(), Connections: footprintConnections, ReadPercent: 100})
	if err != nil {
		return f, fmt.Errorf("measure memory: %w", err)
	}
	defer l.Close()
	if _, err := l.Run(ctx, warmUp); err != nil {
		return f, fmt.Errorf("measure memory: %w", err)
	}
	if f.process, err = bench.MemoryOf(r.proc.Pid); err != nil {
		return f, err
	}
	if f.fileBytes, err = bench.DiskBytes(filepath.Join(r.dir, "shm")); err != nil {
		return f, err
	}
	out, err := exec.CommandContext(ctx, r.command[0], "status", "--json", "--control", filepath.Join(r.dir, "control")).Output()
	if err != nil {
		return f, fmt.Errorf("read status: %w", err)
	}
	f.memoryBytes, f.residentBytes, err = parseStatus(out)
	return f, err
}

// parseStatus reads the memory of the only volume of a daemon from its status.
func parseStatus(text []byte) (memoryBytes, residentBytes int64, err error) {
	var status struct {
		Volumes []struct {
			MemoryBytes   int64 `json:"memory_bytes"`
			ResidentBytes int64 `json:"resident_bytes"`
		} `json:"volumes"`
	}
	if err := json.Unmarshal(text, &status); err != nil {
		return 0, 0, fmt.Errorf("parse status: %w", err)
	}
	if len(status.Volumes) != 1 || status.Volumes[0].MemoryBytes <= 0 {
		return 0, 0, fmt.Errorf("parse status: want one volume with memory_bytes, got %+v", status.Volumes)
	}
	return status.Volumes[0].MemoryBytes, status.Volumes[0].ResidentBytes, nil
}

// memory is the table of footprints, nil when there are none.
func (r *report) memory() *bench.Table {
	if len(r.footprint) == 0 {
		return nil
	}
	mib := func(n int64) string { return bench.Number(float64(n) / (1 << 20)) }
	t := &bench.Table{Header: []string{"server", "memory MiB", "cached MiB", "memory file MiB", "metadata %",
		fmt.Sprintf("resident beyond it MiB, %d connections", footprintConnections)}}
	for _, f := range r.footprint {
		t.Row(f.server, mib(f.memoryBytes), mib(f.residentBytes), mib(f.fileBytes),
			bench.Number(100*f.metadataShare()), mib(f.beyondBytes()))
	}
	return t
}
