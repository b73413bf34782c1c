package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"regexp"
	"time"

	"github.com/ramshelf/ramshelf/bench"
)

// part is one thing that is measured about the journal.
type part interface {
	// title names the part in the report and for -jobs.
	title() string
	// round measures once.
	round(ctx context.Context, rig *rig) error
	// about says how it was measured.
	about() string
	// table gives what all rounds gave.
	table() *bench.Table
	// reached gives the part's goals with what was measured.
	reached() []reached
	// samples are all figures of all rounds by their names, for programs.
	samples() map[string][]float64
}

// reached is a goal and what was measured.
type reached struct {
	what   string
	want   float64
	atMost bool // the figure is to be at most want; else at least
	figure bench.Spread
	always bool // every round counts; else the median
}

// got is the value that is judged.
func (r reached) got() float64 {
	switch {
	case !r.always:
		return r.figure.Median
	case r.atMost:
		return r.figure.Max
	}
	return r.figure.Min
}

func (r reached) held() bool {
	if r.atMost {
		return r.got() <= r.want
	}
	return r.got() >= r.want
}

// journaling measures what the journal does and costs.
type journaling struct {
	options
	host        bench.Host
	loadAverage string
	when        time.Time
	rig         *rig
	parts       []part
	took        time.Duration
}

// compareJournal measures the journal part by part, round by round, so that whatever else happens on the machine meets all
// figures alike, and writes its section.
func compareJournal(ctx context.Context, o options) (err error) {
	if err := o.checkPrograms(); err != nil {
		return err
	}
	if o.ramshelf == "" {
		return errors.New("-journal measures ramshelf; name it with -ramshelf")
	}
	wanted, err := regexp.Compile(o.jobs)
	if err != nil {
		return fmt.Errorf("-jobs: %w", err)
	}
	g := &journaling{options: o, host: bench.ThisHost(), loadAverage: bench.LoadAverage(), when: time.Now()}
	if g.rig, err = newRig(o); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.rig.remove()) }()
	for _, p := range journalParts(g.rig) {
		if wanted.MatchString(p.title()) {
			g.parts = append(g.parts, p)
		}
	}
	if len(g.parts) == 0 {
		return fmt.Errorf("-jobs %q leaves nothing to measure", o.jobs)
	}
	for round := range o.rounds {
		for _, p := range g.parts {
			fmt.Fprintf(os.Stderr, "%6s  round %d of %d  %s\n", time.Since(g.when).Round(time.Second), round+1, o.rounds, p.title())
			g.rig.part = p.title()
			if err := p.round(ctx, g.rig); err != nil {
				return fmt.Errorf("%s: %w", p.title(), err)
			}
		}
	}
	g.took = time.Since(g.when)
	return g.publish()
}

func journalParts(r *rig) []part {
	return []part{newHomeward(r), newTraffic(r), newForeground(r), newGroup(r), newBudget(r), newCost(r), newRestart(r)}
}

// publish prints the result and writes it where the flags say.
func (g *journaling) publish() error {
	text, err := g.render(terminal)
	if err != nil {
		return err
	}
	if _, err := os.Stdout.Write(text); err != nil {
		return fmt.Errorf("print report: %w", err)
	}
	if g.json != "" {
		if err := g.writeSamples(); err != nil {
			return err
		}
	}
	if g.doc == "" {
		return nil
	}
	body, err := g.render(markdown)
	if err != nil {
		return err
	}
	return bench.WriteSection(g.doc, "journal", body)
}

func (g *journaling) writeSamples() error {
	all := map[string]map[string][]float64{}
	for _, p := range g.parts {
		all[p.title()] = p.samples()
	}
	text, err := json.MarshalIndent(map[string]any{"host": g.host, "time": g.when, "parts": all}, "", "\t")
	if err != nil {
		return fmt.Errorf("encode samples: %w", err)
	}
	if err := os.WriteFile(g.json, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("write samples: %w", err)
	}
	return nil
}

// render gives the report in a style.
func (g *journaling) render(st style) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s; %s; load average %s at the start; %s in all.\n\n", g.when.UTC().Format("2006-01-02 15:04 UTC"), g.host, g.loadAverage,
		g.took.Round(time.Second))
	fmt.Fprintf(&b, "%d rounds, in each every part in turn and what is compared right after each other. Figures are medians of the rounds; ratios are "+
		"medians of the ratios of each round; lowest–highest in parentheses. $DIR is on a tmpfs, $DISK on the disk, where nothing else is said.\n", g.rounds)
	section := func(title string, t *bench.Table) error {
		fmt.Fprintf(&b, "%s%s\n\n", st.heading, title)
		return st.table(t, &b)
	}
	errs := []error{section("Goals of the journal", g.goals())}
	for _, p := range g.parts {
		errs = append(errs, section(p.title(), p.table()))
		fmt.Fprintf(&b, "\n%s\n", p.about())
	}
	fmt.Fprintf(&b, "%sCommands\n\n", st.heading)
	for _, c := range g.rig.commands {
		fmt.Fprintf(&b, "- %s: `%s`\n", c.part, c.line)
	}
	return b.Bytes(), errors.Join(errs...)
}

func (g *journaling) goals() *bench.Table {
	t := &bench.Table{Header: []string{"what", "goal", "measured", "held"}}
	for _, p := range g.parts {
		for _, r := range p.reached() {
			sign, held := "≥ ", "no"
			if r.atMost {
				sign = "≤ "
			}
			if r.held() {
				held = "yes"
			}
			if g.rounds < roundsToJudge || math.IsNaN(r.got()) {
				held = "-"
			}
			t.Row(r.what, sign+bench.Number(r.want), withRange(r.figure), held)
		}
	}
	return t
}
