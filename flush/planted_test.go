//go:build planted

package flush

import (
	"strings"
	"testing"
	"testing/synctest"
)

// TestPlantedBugs: the models catch every planted bug of this package, by the words named here.
func TestPlantedBugs(t *testing.T) {
	for _, c := range []struct {
		on                     rigKind
		bug, kind, fault, want string
	}{
		{rigKinds[0], "clean-before-sync", opSync, faultFail, "turned clean and is not durable"},
		{rigKinds[0], "drop-on-error", opWrite, faultFail, "turned clean and is not durable"},
		{rigKinds[0], "drop-on-error", opWrite, faultTear, "turned clean and is not durable"},
		{rigKinds[3], "drop-on-error", opWrite, faultFail, "turned clean and is not durable"},
		{rigKinds[3], "drop-on-error", opWrite, faultTear, "turned clean and is not durable"},
		{rigKinds[0], "drop-on-error", opZero, faultFail, "turned clean and is not durable"},
	} {
		t.Run(c.on.name+"/"+c.bug+"/"+c.kind+"/"+c.fault, func(t *testing.T) {
			t.Setenv("RAMSHELF_PLANT", c.bug)
			problems, runs := sweepErrors(t, c.kind, c.fault, c.on)
			for i, p := range problems {
				if strings.Contains(p, c.want) {
					t.Logf("caught by problem %d of %d in %d runs: %s", i+1, len(problems), runs, p)
					return
				}
			}
			t.Errorf("not caught in %d runs; problems: %q", runs, problems)
		})
	}
}

// TestPlantedJournalBugs: the models with a journal catch every planted bug of the commits and of the recovery.
func TestPlantedJournalBugs(t *testing.T) {
	sweep := func(kind string, k journalKind, ring bool) func(*testing.T) ([]string, int) {
		return func(t *testing.T) ([]string, int) { return sweepJournalErrors(t, kind, faultFail, k, ring) }
	}
	cuts := func(loses int, syncFails bool) func(*testing.T) ([]string, int) {
		return func(t *testing.T) ([]string, int) {
			for seed := range uint64(40) {
				var problems []string
				synctest.Test(t, func(t *testing.T) {
					r := newJournalRig(t, seed, journalKinds[int(seed)%len(journalKinds)], nil)
					r.source.journal.loses, r.source.journal.every = loses, 2
					r.backing.fault = func(kind string, n int) string {
						if syncFails && kind == opSync && n%3 > 0 && n < 20 {
							return faultFail
						}
						return ""
					}
					problems = r.runJournaled(t, seed)
				})
				if len(problems) > 0 {
					return problems, int(seed) + 1
				}
			}
			return nil, 40
		}
	}
	for _, c := range []struct {
		bug  string
		runs func(*testing.T) ([]string, int)
	}{
		{"commit-without-sync", cuts(0, false)},
		{"tail-early", cuts(0, false)},
		{"torn-run-replayed", cuts(0, false)},
		{"recovery-stops-early", cuts(0, false)},
		{"lost-not-recorded", cuts(12, false)},
		{"commit-marks-clean-on-error", sweep(opSync, journalKinds[0], true)},
		{"commit-marks-clean-on-error", sweep(opWrite, journalKinds[3], true)},
		{"ignore-other-sync", cuts(0, true)},
		{"ignore-other-sync", sweep(opSync, journalKinds[0], true)},
	} {
		t.Run(c.bug, func(t *testing.T) {
			t.Setenv("RAMSHELF_PLANT", c.bug)
			problems, runs := c.runs(t)
			if len(problems) == 0 {
				t.Fatalf("not caught in %d runs", runs)
			}
			t.Logf("caught in %d runs: %s", runs, problems[0])
		})
	}
}
