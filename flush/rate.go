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

// rate keeps how fast the last commits were. add belongs to one goroutine; the other methods may be called at any time.
type rate struct {
	samples [rateSamples]float64 // bytes per second
	n       int                  // ever added
	slowest atomic.Uint64        // float64 bits
	middle  atomic.Uint64
	least   atomic.Int64 // bytes of the shortest commit that counts, if that is below rateBytes; 0: it is not
}

// allow says how many bytes a commit can have from now on: where that is little, those that are as long as can be have to tell the
// bandwidth, too low as that may be. Else one that was slow would hold all that follow below what counts. It may be called beside add.
func (r *rate) allow(bytes int64) { r.least.Store(max(1, bytes/4)) }

// counts tells whether a commit is long enough to tell something.
func (r *rate) counts(bytes int64, d time.Duration) bool {
	least := r.least.Load()
	return d > 0 && (bytes >= rateBytes || least > 0 && bytes >= least)
}

func (r *rate) add(bytes int64, d time.Duration) {
	if !r.counts(bytes, d) {
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

// sofar takes into account a commit that is under way and slower than all before: whoever waits for its end would go on for too
// long by a speed that is over. It reports whether that is news. It may be called beside add.
func (r *rate) sofar(bytes int64, d time.Duration) bool {
	if !r.counts(bytes, d) {
		return false
	}
	now := float64(bytes) / d.Seconds()
	for {
		old := r.slowest.Load()
		if slowest := math.Float64frombits(old); slowest > 0 && now >= slowest {
			return false
		}
		if r.slowest.CompareAndSwap(old, math.Float64bits(now)) {
			return true
		}
	}
}

// lowest is the first percentile, 0 before the first sample.
func (r *rate) lowest() float64 { return math.Float64frombits(r.slowest.Load()) }

// median is 0 before the first sample.
func (r *rate) median() float64 { return math.Float64frombits(r.middle.Load()) }
