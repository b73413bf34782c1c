package bench_test

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/bench"
)

func TestPercentileIsNeverBelowTheTruthAndAtMost4PercentAbove(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var h bench.Histogram
	var values []time.Duration
	for range 20_000 {
		d := time.Duration(1) << random.UintN(36)
		d += time.Duration(random.Int64N(int64(d)))
		values = append(values, d)
		h.Record(d)
	}
	slices.Sort(values)
	for _, p := range []float64{0.1, 1, 25, 50, 90, 99, 99.9, 100} {
		want := values[min(max(int(p/100*float64(len(values))+0.5), 1), len(values))-1]
		got := h.Percentile(p)
		if got < want || float64(got) > float64(want)*1.04 {
			t.Errorf("p%v is %d ns, the recorded value %d ns", p, got, want)
		}
	}
	if h.Max() != values[len(values)-1] || h.Count() != uint64(len(values)) {
		t.Errorf("max %v, count %d; want %v, %d", h.Max(), h.Count(), values[len(values)-1], len(values))
	}
}

func TestShortLatenciesAreExact(t *testing.T) {
	for d := range time.Duration(64) {
		var h bench.Histogram
		h.Record(d)
		h.Record(time.Hour)
		if got := h.Percentile(50); got != d {
			t.Errorf("p50 of %d ns is %d ns", d, got)
		}
	}
}

func TestOutOfRangeLatencies(t *testing.T) {
	var h bench.Histogram
	h.Record(-5)
	h.RecordN(time.Hour, 3)
	if got := h.Percentile(1); got != 0 {
		t.Errorf("a negative latency counts as %v, want 0", got)
	}
	if got := h.Max(); got != time.Hour {
		t.Errorf("max is %v, want 1h", got)
	}
	if got := h.Percentile(99); got < 2*time.Minute {
		t.Errorf("p99 is %v, want the end of the range", got)
	}
}

func TestEmptyHistogram(t *testing.T) {
	var h bench.Histogram
	if h.Percentile(99) != 0 || h.Mean() != 0 || h.Max() != 0 {
		t.Errorf("empty histogram gives %v, %v, %v", h.Percentile(99), h.Mean(), h.Max())
	}
}

func TestAddIsTheSameAsRecordingTogether(t *testing.T) {
	var a, b, both bench.Histogram
	for i := range 1000 {
		d := time.Duration(i*i) * time.Microsecond
		if i%3 == 0 {
			a.Record(d)
		} else {
			b.RecordN(d, 2)
			both.Record(d)
		}
		both.Record(d)
	}
	if a.Add(&b); a != both {
		t.Error("the sum of two histograms differs from one that recorded everything")
	}
}

func TestRecordAllocatesNothing(t *testing.T) {
	var h bench.Histogram
	if n := testing.AllocsPerRun(100, func() { h.Record(12345) }); n != 0 {
		t.Errorf("Record allocates %v times", n)
	}
}

func BenchmarkRecord(b *testing.B) {
	var h bench.Histogram
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		h.Record(time.Duration(i & 0xfffff))
	}
}
