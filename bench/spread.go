package bench

import (
	"math"
	"slices"
)

// Spread is the median of the rounds of a measurement with its lowest and highest value.
type Spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// SpreadOf gives the spread of values, which may be in any order. Of no values it is all NaN.
func SpreadOf(values []float64) Spread {
	if len(values) == 0 {
		return Spread{math.NaN(), math.NaN(), math.NaN()}
	}
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return Spread{
		Median: (sorted[(n-1)/2] + sorted[n/2]) / 2,
		Min:    sorted[0],
		Max:    sorted[n-1],
	}
}

// RatioOf gives the spread of a[i] ÷ b[i]: values that were measured right after each other are compared with
// each other, so that a machine that is slow for a while does not favor one side. Surplus values are left out.
func RatioOf(a, b []float64) Spread {
	n := min(len(a), len(b))
	ratios := make([]float64, 0, n)
	for i := range n {
		if b[i] > 0 {
			ratios = append(ratios, a[i]/b[i])
		}
	}
	return SpreadOf(ratios)
}

// Noise is half the distance between the lowest and the highest value in percent of the median: what a
// difference between two medians has to exceed before it means anything.
func (s Spread) Noise() float64 {
	if s.Median == 0 {
		return 0
	}
	return 100 * (s.Max - s.Min) / 2 / s.Median
}
