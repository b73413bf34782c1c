package bench

import (
	"math/bits"
	"time"
)

// A histogram keeps the six leading bits of a value, so that a bucket is at most 1/32 of its value wide.
const (
	leadingBits = 6
	perOctave   = 1 << (leadingBits - 1)
	maxBits     = 37 // 2^37 ns are 137 s; longer is counted as that
	buckets     = (maxBits - leadingBits + 2) * perOctave
)

// Histogram counts latencies in log-linear buckets: each bucket is at most 3.2 % of its value wide, from 1 ns
// to 137 s. The zero value is ready for use. Recording allocates nothing. It is not safe for concurrent use;
// give each goroutine its own and Add them.
type Histogram struct {
	counts [buckets]uint64
	total  uint64
	sum    uint64 // nanoseconds
	max    uint64 // nanoseconds
}

// bucketOf is the index of the bucket that holds v nanoseconds.
func bucketOf(v uint64) int {
	if v >= 1<<maxBits {
		return buckets - 1
	}
	if v < 2*perOctave {
		return int(v)
	}
	shift := bits.Len64(v) - leadingBits
	return shift*perOctave + int(v>>shift)
}

// highestOf is the highest value of bucket i in nanoseconds.
func highestOf(i int) uint64 {
	if i < 2*perOctave {
		return uint64(i)
	}
	shift := i/perOctave - 1
	return uint64(i-shift*perOctave+1)<<shift - 1
}

// Record counts one latency. A negative one, which only a broken clock gives, counts as 0.
func (h *Histogram) Record(d time.Duration) { h.RecordN(d, 1) }

// RecordN counts n requests that all took d, such as the answered ones of one batch.
func (h *Histogram) RecordN(d time.Duration, n uint64) {
	v := uint64(max(d, 0))
	h.counts[bucketOf(v)] += n
	h.total += n
	h.sum += v * n
	h.max = max(h.max, v)
}

// Add counts everything in o as well.
func (h *Histogram) Add(o *Histogram) {
	for i, n := range o.counts {
		h.counts[i] += n
	}
	h.total += o.total
	h.sum += o.sum
	h.max = max(h.max, o.max)
}

// Count is how many latencies were recorded.
func (h *Histogram) Count() uint64 { return h.total }

// Max is the longest latency, exactly.
func (h *Histogram) Max() time.Duration { return time.Duration(h.max) }

// Mean is the mean latency, 0 when nothing was recorded.
func (h *Histogram) Mean() time.Duration {
	if h.total == 0 {
		return 0
	}
	return time.Duration(h.sum / h.total)
}

// Percentile is the latency that p percent of the requests did not exceed, rounded up to the end of its
// bucket, so that it never flatters. It is 0 when nothing was recorded.
func (h *Histogram) Percentile(p float64) time.Duration {
	if h.total == 0 {
		return 0
	}
	rank := uint64(p/100*float64(h.total) + 0.5)
	rank = min(max(rank, 1), h.total)
	var seen uint64
	for i, n := range h.counts {
		if seen += n; seen >= rank {
			return time.Duration(min(highestOf(i), h.max))
		}
	}
	return h.Max()
}
