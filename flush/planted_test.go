//go:build planted

package flush

import (
	"strings"
	"testing"
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
