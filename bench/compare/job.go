package main

import (
	"time"

	"github.com/ramshelf/ramshelf/bench"
	"github.com/ramshelf/ramshelf/bench/load"
)

// job is one kind of load. Exactly one of fio and batch is set.
type job struct {
	name string
	// duration of one measurement.
	duration time.Duration
	fio      *bench.FioJob
	batch    *load.Config
	goal     goal // what the subject wants to reach, the zero value where nothing is set
	hot      bool // also for the hot-set variant
}

// goal is the least throughput of the subject ÷ that of the best peer, and the most processor time of it per
// request ÷ that of nbdkit. 0 is no goal.
type goal struct {
	speed, cpu float64
}

const (
	kib = 1 << 10
	// batchSize is how many requests the batching client sends together.
	batchSize = 16
)

// jobs lists the loads in the order of the report. seed is drawn anew for every measurement.
func jobs(d time.Duration) []job {
	fio := func(name, pattern string, blockBytes, depth int, g goal) job {
		return job{name: name, duration: d, goal: g, hot: blockBytes == 4*kib && depth > 1,
			fio: &bench.FioJob{Pattern: pattern, BlockBytes: blockBytes, Depth: depth}}
	}
	batch := func(name string, depth, readPercent int, structured bool, g goal) job {
		return job{name: name, duration: d, goal: g, hot: depth == 32 && !structured,
			batch: &load.Config{Depth: depth, Batch: batchSize, BlockBytes: 4 * kib, ReadPercent: readPercent, Structured: structured}}
	}
	return []job{
		fio("fio randread 4k QD1", "randread", 4*kib, 1, goal{speed: 0.95}),
		fio("fio randwrite 4k QD1", "randwrite", 4*kib, 1, goal{speed: 0.95}),
		fio("fio randread 4k QD32", "randread", 4*kib, 32, goal{speed: 1.25, cpu: 0.75}),
		fio("fio randwrite 4k QD32", "randwrite", 4*kib, 32, goal{speed: 1.1, cpu: 0.75}),
		fio("fio read 64k QD16", "read", 64*kib, 16, goal{}),
		fio("fio write 64k QD16", "write", 64*kib, 16, goal{}),
		batch("batch16 randread 4k QD16", 16, 100, false, goal{speed: 2, cpu: 0.5}),
		batch("batch16 randread 4k QD32", 32, 100, false, goal{speed: 2, cpu: 0.5}),
		batch("batch16 randread 4k QD128", 128, 100, false, goal{speed: 2, cpu: 0.5}),
		batch("batch16 randread 4k QD32, structured", 32, 100, true, goal{speed: 2, cpu: 0.5}),
		batch("batch16 randwrite 4k QD16", 16, 0, false, goal{speed: 1.5, cpu: 0.5}),
		batch("batch16 randwrite 4k QD32", 32, 0, false, goal{speed: 1.5, cpu: 0.5}),
		batch("batch16 randwrite 4k QD128", 128, 0, false, goal{speed: 1.5, cpu: 0.5}),
		batch("batch16 70/30 4k QD32", 32, 70, false, goal{}),
	}
}
