package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"github.com/ramshelf/ramshelf/bench"
	"github.com/ramshelf/ramshelf/bench/load"
)

// sample is one measurement of one job on one server.
type sample struct {
	IOPS        float64 `json:"iops"`
	BytesPerSec float64 `json:"bytes_per_second"`
	P50         float64 `json:"p50_microseconds"`
	P99         float64 `json:"p99_microseconds"`
	P999        float64 `json:"p999_microseconds"`
	ServerCPU   float64 `json:"server_cpu_seconds_per_million"` // while the job ran
	SettledCPU  float64 `json:"settled_cpu_seconds_per_million"`
	ClientCPU   float64 `json:"client_cpu_seconds_per_million"`
}

// errNotOffered marks a job that a server has not what it takes for.
var errNotOffered = errors.New("not offered by this server")

// exitDelay is the time that a server gets to notice that its client has gone and to reap what served it, before
// its processor time is read.
const exitDelay = 20 * time.Millisecond

// measure runs j on r once. The processor time is read right before and right after, and once more when the
// server has come to rest.
func measure(ctx context.Context, r *running, j job, seed uint64) (sample, error) {
	var s sample
	var requests float64
	before, err := r.cpu()
	if err != nil {
		return s, err
	}
	var after time.Duration
	if j.fio != nil {
		if s, requests, err = runFio(ctx, r, j, seed); err == nil {
			time.Sleep(exitDelay)
			after, err = r.cpu()
		}
	} else {
		s, requests, before, after, err = runBatch(ctx, r, j, seed)
	}
	if err != nil {
		return s, err
	}
	if err := r.rest(ctx); err != nil {
		return s, err
	}
	time.Sleep(exitDelay)
	settled, err := r.cpu()
	if err != nil {
		return s, err
	}
	s.ServerCPU = (after - before).Seconds() / requests * 1e6
	s.SettledCPU = (settled - before).Seconds() / requests * 1e6
	return s, nil
}

func runFio(ctx context.Context, r *running, j job, seed uint64) (sample, float64, error) {
	fio := *j.fio
	fio.Duration, fio.Seed = j.duration, seed
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "fio", fio.Args(r.target().URI())...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return sample{}, 0, fmt.Errorf("run fio: %w: %s%s", err, stderr.Bytes(), out)
	}
	f, err := bench.ParseFio(out)
	if err != nil {
		return sample{}, 0, err
	}
	n := float64(f.Requests)
	return sample{
		IOPS:        f.IOPS(),
		BytesPerSec: float64(f.Bytes) / f.Elapsed.Seconds(),
		P50:         microseconds(f.P50), P99: microseconds(f.P99), P999: microseconds(f.P999),
		ClientCPU: f.CPU.Seconds() / n * 1e6,
	}, n, nil
}

// warmUp is run before a measurement of the batching client and not counted.
const warmUp = 50 * time.Millisecond

func runBatch(ctx context.Context, r *running, j job, seed uint64) (s sample, n float64, before, after time.Duration, err error) {
	c := *j.batch
	c.Target, c.Seed = r.target(), seed
	l, err := load.Open(ctx, c)
	if errors.Is(err, load.ErrStructured) {
		err = errNotOffered
	}
	if err != nil {
		return s, 0, 0, 0, err
	}
	defer l.Close()
	if _, err = l.Run(ctx, warmUp); err != nil {
		return s, 0, 0, 0, err
	}
	if before, err = r.cpu(); err != nil {
		return s, 0, 0, 0, err
	}
	result, err := l.Run(ctx, j.duration)
	if err != nil {
		return s, 0, 0, 0, err
	}
	if after, err = r.cpu(); err != nil {
		return s, 0, 0, 0, err
	}
	n = float64(result.Requests)
	h := result.Latency()
	return sample{
		IOPS:        result.IOPS(),
		BytesPerSec: float64(result.Bytes) / result.Elapsed.Seconds(),
		P50:         microseconds(h.Percentile(50)), P99: microseconds(h.Percentile(99)), P999: microseconds(h.Percentile(99.9)),
		ClientCPU: result.CPU.Seconds() / n * 1e6,
	}, n, before, after, nil
}

func microseconds(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// prefill writes every block once, so that reads hit data, and reads all of it back: a server that loses or
// mixes up data is not worth measuring.
func prefill(ctx context.Context, r *running) error {
	const blockBytes = 256 * kib
	for _, percent := range []int{0, 100} {
		c := load.Config{Target: r.target(), Depth: 8, Batch: 1, BlockBytes: blockBytes, ReadPercent: percent,
			Sequential: true, Stamp: true, Check: true}
		l, err := load.Open(ctx, c)
		if err != nil {
			return err
		}
		_, err = l.Pass(ctx, uint64(r.size/blockBytes))
		if err := errors.Join(err, l.Close()); err != nil {
			return err
		}
	}
	return r.rest(ctx)
}
