package main

import "math"

// floorShare is how much of the floor is asked for where the floor itself misses a goal.
const floorShare = 0.9

// verdict is one goal of one job against what was measured. Ratios are medians.
type verdict struct {
	job, what string
	want      float64 // the goal
	floor     float64 // the floor's ratio, NaN without one
	bound     float64 // what counts: the goal, or a share of the floor where that misses the goal
	got       float64
	atMost    bool // got is to be at most bound; else at least
}

// held tells whether what was measured is within the bound.
func (v verdict) held() bool {
	if v.atMost {
		return v.got <= v.bound
	}
	return v.got >= v.bound
}

// bounded gives v with its bound set: a goal that the floor misses on this machine cannot be had, and
// floorShare of the floor stands in for it.
func (v verdict) bounded() verdict {
	v.bound = v.want
	switch {
	case math.IsNaN(v.floor):
	case v.atMost && v.floor > v.want:
		v.bound = v.floor / floorShare
	case !v.atMost && v.floor < v.want:
		v.bound = v.floor * floorShare
	}
	return v
}

// reference is the server that processor time is compared with.
const reference = "nbdkit"

// verdicts gives those of all goals that can be judged.
func (c *comparison) verdicts() []verdict {
	var all []verdict
	subject, null := c.only(ours), c.only(floor)
	for _, j := range c.jobs {
		if best := c.best(j.name); j.goal.speed > 0 && best != "" {
			all = append(all, verdict{
				job: j.name, what: "IOPS ÷ " + best, want: j.goal.speed,
				got:   c.ratio(j.name, subject, best, iops).Median,
				floor: c.ratio(j.name, null, best, iops).Median,
			}.bounded())
		}
		if j.goal.cpu > 0 {
			all = append(all, verdict{
				job: j.name, what: "server CPU ÷ " + reference, want: j.goal.cpu, atMost: true,
				got:   c.ratio(j.name, subject, reference, serverCPU).Median,
				floor: c.ratio(j.name, null, reference, serverCPU).Median,
			}.bounded())
		}
	}
	judged := all[:0]
	for _, v := range all {
		if !math.IsNaN(v.got) {
			judged = append(judged, v)
		}
	}
	return judged
}
