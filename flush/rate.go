package flush

import (
	"math"
	"slices"
	"sync/atomic"
	"time"
)

const (
	rateSamples = 128
	// rateBytes is the shortest commit that tells something about the bandwidth: of a shorter one most is the sync.
	rateBytes = 1 << 20
)

// rate keeps how fast the last commits were. add belongs to one goroutine; the others may be called at any time.
type rate struct {
	samples [rateSamples]float64 // bytes per second
	n       int                  // ever added
	slowest atomic.Uint64        // float64 bits
	middle  atomic.Uint64
}

func (r *rate) add(bytes int64, d time.Duration) {
	if bytes < rateBytes || d <= 0 {
		return
	}
	r.samples[r.n%rateSamples] = float64(bytes) / d.Seconds()
	r.n++
	sorted := r.samples
	have := sorted[:min(r.n, rateSamples)]
	slices.Sort(have)
	r.slowest.Store(math.Float64bits(have[len(have)/100]))
	r.middle.Store(math.Float64bits(have[len(have)/2]))
}

// lowest is the first percentile, 0 before the first sample.
func (r *rate) lowest() float64 { return math.Float64frombits(r.slowest.Load()) }

// median is 0 before the first sample.
func (r *rate) median() float64 { return math.Float64frombits(r.middle.Load()) }
