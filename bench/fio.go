package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// FioJob is one job of fio's nbd engine.
type FioJob struct {
	Pattern    string // fio's rw: randread, randwrite, read, write, randrw
	BlockBytes int
	Depth      int // requests in flight
	Duration   time.Duration
	Seed       uint64
}

// Args are the arguments of fio for the job on the export at uri. The data of writes do not change from
// request to request, so that making them up does not count.
func (j FioJob) Args(uri string) []string {
	return []string{
		"--name=bench", "--ioengine=nbd", "--uri=" + uri, "--thread", "--output-format=json",
		"--rw=" + j.Pattern,
		"--bs=" + strconv.Itoa(j.BlockBytes),
		"--iodepth=" + strconv.Itoa(j.Depth),
		"--time_based", fmt.Sprintf("--runtime=%dms", j.Duration.Milliseconds()),
		"--norandommap", "--randrepeat=0", "--random_generator=tausworthe64",
		"--randseed=" + strconv.FormatUint(j.Seed, 10),
		"--refill_buffers=0", "--scramble_buffers=0", "--gtod_reduce=0",
	}
}

// FioResult is what fio measured, reads and writes together.
type FioResult struct {
	Requests uint64
	Bytes    uint64
	Elapsed  time.Duration
	P50, P99 time.Duration // completion latency; of a mix the worse of reads and writes
	P999     time.Duration
	CPU      time.Duration // of fio itself
}

// IOPS is requests per second.
func (r FioResult) IOPS() float64 { return float64(r.Requests) / r.Elapsed.Seconds() }

// fioSide is one direction of a job in fio's JSON (fio(1), "JSON+ OUTPUT").
type fioSide struct {
	TotalIOs uint64  `json:"total_ios"`
	IOBytes  uint64  `json:"io_bytes"`
	Runtime  float64 `json:"runtime"` // ms
	Clat     struct {
		Percentile map[string]float64 `json:"percentile"` // ns
	} `json:"clat_ns"`
}

type fioOutput struct {
	Jobs []struct {
		Error      int     `json:"error"`
		Read       fioSide `json:"read"`
		Write      fioSide `json:"write"`
		JobRuntime float64 `json:"job_runtime"` // ms
		UserCPU    float64 `json:"usr_cpu"`     // percent of the runtime
		SystemCPU  float64 `json:"sys_cpu"`
	} `json:"jobs"`
}

// ParseFio reads the output of fio --output-format=json with one job. Notes that fio prints before the JSON
// are skipped. A job that ended with an error, or did nothing, is an error.
func ParseFio(output []byte) (FioResult, error) {
	start := bytes.IndexByte(output, '{')
	if start < 0 {
		return FioResult{}, errors.New("parse fio output: no JSON in it")
	}
	var out fioOutput
	if err := json.NewDecoder(bytes.NewReader(output[start:])).Decode(&out); err != nil {
		return FioResult{}, fmt.Errorf("parse fio output: %w", err)
	}
	if len(out.Jobs) != 1 {
		return FioResult{}, fmt.Errorf("parse fio output: %d jobs, want 1", len(out.Jobs))
	}
	job := out.Jobs[0]
	if job.Error != 0 {
		return FioResult{}, fmt.Errorf("fio job ended with error %d", job.Error)
	}
	read, write := job.Read, job.Write
	runtime := max(read.Runtime, write.Runtime)
	r := FioResult{
		Requests: read.TotalIOs + write.TotalIOs,
		Bytes:    read.IOBytes + write.IOBytes,
		Elapsed:  milliseconds(runtime),
		P50:      worse(read, write, "50.000000"),
		P99:      worse(read, write, "99.000000"),
		P999:     worse(read, write, "99.900000"),
		CPU:      milliseconds(job.JobRuntime * (job.UserCPU + job.SystemCPU) / 100),
	}
	if r.Requests == 0 || r.Elapsed == 0 {
		return FioResult{}, errors.New("fio completed no request")
	}
	return r, nil
}

func worse(a, b fioSide, percentile string) time.Duration {
	return time.Duration(max(a.Clat.Percentile[percentile], b.Clat.Percentile[percentile]))
}

func milliseconds(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }
