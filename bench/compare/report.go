package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/ramshelf/ramshelf/bench"
)

// report is all that is printed about a comparison.
type report struct {
	*comparison
	host        bench.Host
	loadAverage string // of the machine before the comparison: it should be near 0
	when        time.Time
	size        int64
	duration    time.Duration
	absent      []string // servers that are not installed
	footprint   []footprint
}

// style is how the parts of a report are set: for a terminal or as markdown.
type style struct {
	heading string
	table   func(*bench.Table, io.Writer) error
}

var (
	terminal = style{heading: "\n", table: (*bench.Table).Text}
	markdown = style{heading: "\n### ", table: (*bench.Table).Markdown}
)

// render gives the report in a style.
func (r *report) render(st style) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s; %s; load average %s at the start.\n\n", r.when.UTC().Format("2006-01-02 15:04 UTC"), r.host, r.loadAverage)
	fmt.Fprintf(&b, "Device %d MiB, unix sockets; every job %d × %s on each server, servers in turn. "+
		"Figures are medians of the rounds; ratios are medians of the ratios of each round, lowest–highest behind them.\n",
		r.size>>20, r.rounds, r.duration)
	if n := r.unrest(); n > quietNoise {
		fmt.Fprintf(&b, "**The machine was not quiet**: the rounds of a job are %.0f %% apart, so differences below that mean nothing.\n", n)
	}
	for _, name := range r.absent {
		fmt.Fprintf(&b, "Not installed, so not compared: %s.\n", name)
	}
	sections := []struct {
		title string
		table *bench.Table
	}{
		{r.subject() + " ÷ others", r.ratios()},
		{"Goals", r.goals()},
		{"Jobs", r.details()},
		{"Memory", r.memory()},
	}
	var errs []error
	for _, s := range sections {
		if s.table == nil {
			continue
		}
		fmt.Fprintf(&b, "%s%s\n\n", st.heading, s.title)
		errs = append(errs, st.table(s.table, &b))
	}
	fmt.Fprintf(&b, "%sServers\n\n", st.heading)
	r.servers(&b)
	return b.Bytes(), errors.Join(errs...)
}

// ratios is the summary: the subject's throughput and processor time against everyone's.
func (r *report) ratios() *bench.Table {
	subject := r.subject()
	t := &bench.Table{Header: []string{"job", "IOPS"}}
	var others []string
	for _, s := range r.comparison.servers {
		if s.name != subject && s.kind != hot {
			others = append(others, s.name)
			t.Header = append(t.Header, "÷ "+s.name)
		}
	}
	t.Header = append(t.Header, "÷ best peer", "CPU ÷ "+reference, "noise %")
	for _, j := range r.jobs {
		row := []string{j.name, bench.Count(bench.SpreadOf(r.values(j.name, subject, iops)).Median)}
		for _, o := range others {
			row = append(row, bench.Number(r.ratio(j.name, subject, o, iops).Median))
		}
		row = append(row, withRange(r.ratio(j.name, subject, r.best(j.name), iops)),
			withRange(r.ratio(j.name, subject, reference, serverCPU)), bench.Number(r.noise(j.name)))
		t.Row(row...)
	}
	return t
}

// quietNoise is the noise in percent that a machine with nothing else to do stays below.
const quietNoise = 10

// unrest is the median noise of all jobs, NaN where one round tells nothing about it.
func (r *report) unrest() float64 {
	var all []float64
	for _, j := range r.jobs {
		all = append(all, r.noise(j.name))
	}
	return bench.SpreadOf(all).Median
}

// noise is the median over the servers of how far the rounds of a job are apart.
func (r *report) noise(job string) float64 {
	if r.rounds < 2 {
		return math.NaN()
	}
	var all []float64
	for _, s := range r.comparison.servers {
		if v := r.values(job, s.name, iops); len(v) > 0 {
			all = append(all, bench.SpreadOf(v).Noise())
		}
	}
	return bench.SpreadOf(all).Median
}

func withRange(s bench.Spread) string {
	if math.IsNaN(s.Median) {
		return "-"
	}
	return fmt.Sprintf("%s (%s–%s)", bench.Number(s.Median), bench.Number(s.Min), bench.Number(s.Max))
}

// roundsToJudge is how many rounds it takes to tell a goal missed from a bad moment of the machine.
const roundsToJudge = 3

// goals is the table of verdicts, nil when there is no subject to judge, or too little to judge it by.
func (r *report) goals() *bench.Table {
	if r.only(ours) == "" || r.rounds < roundsToJudge {
		return nil
	}
	t := &bench.Table{Header: []string{"job", "what", "goal", "floor", "bound", "measured", "held"}}
	for _, v := range r.verdicts() {
		sign, held := "≥ ", "no"
		if v.atMost {
			sign = "≤ "
		}
		if v.held() {
			held = "yes"
		}
		t.Row(v.job, v.what, sign+bench.Number(v.want), bench.Number(v.floor), sign+bench.Number(v.bound), bench.Number(v.got), held)
	}
	return t
}

// details is every cell with its latencies and costs.
func (r *report) details() *bench.Table {
	t := &bench.Table{Header: []string{"job and server", "IOPS", "lowest–highest", "MB/s", "p50 µs", "p99 µs", "p99.9 µs",
		"CPU s/M", "settled", "client"}}
	for _, j := range r.jobs {
		t.Row(j.name)
		for _, s := range r.comparison.servers {
			if s.runs != nil && !s.runs(j) {
				continue
			}
			if err := r.failed[cell{j.name, s.name}]; err != nil {
				t.Row("– "+s.name, failure(err))
				continue
			}
			t.Row(append([]string{"– " + s.name}, r.cells(j.name, s.name)...)...)
		}
	}
	return t
}

func failure(err error) string {
	if errors.Is(err, errNotOffered) {
		return "-"
	}
	return "failed"
}

func (r *report) cells(job, server string) []string {
	median := func(figure func(sample) float64) float64 { return bench.SpreadOf(r.values(job, server, figure)).Median }
	rate := bench.SpreadOf(r.values(job, server, iops))
	return []string{
		bench.Count(rate.Median),
		bench.Count(rate.Min) + "–" + bench.Count(rate.Max),
		bench.Number(median(func(s sample) float64 { return s.BytesPerSec / 1e6 })),
		bench.Number(median(func(s sample) float64 { return s.P50 })),
		bench.Number(median(func(s sample) float64 { return s.P99 })),
		bench.Number(median(func(s sample) float64 { return s.P999 })),
		bench.Number(median(serverCPU)),
		bench.Number(median(func(s sample) float64 { return s.SettledCPU })),
		bench.Number(median(func(s sample) float64 { return s.ClientCPU })),
	}
}

// servers lists how each server was started.
func (r *report) servers(w io.Writer) {
	for _, s := range r.comparison.servers {
		fmt.Fprintf(w, "- **%s** (%s): %s.\n  `%s`\n", s.name, s.versionOf(), s.why, s.commandLine(r.size))
	}
}
