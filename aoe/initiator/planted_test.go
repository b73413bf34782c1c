//go:build planted

package initiator

import (
	"strings"
	"testing"
)

// TestPlantedGhost: without fences the simulation finds a newer write sent over an older one, and a sector that has lost what was
// answered last.
func TestPlantedGhost(t *testing.T) {
	t.Setenv("RAMSHELF_PLANT", "no-ghost-fence")
	for _, c := range []struct {
		wire bool
		want string
	}{{true, "is on its way"}, {false, "was answered"}} {
		caught := uint64(0)
		for seed := range uint64(500) {
			s := runSeed(seed, c.wire)
			if len(s.problems) > 0 && strings.Contains(s.problems[0], c.want) {
				t.Logf("caught by seed %d: %s", seed, s.problems[0])
				caught++
				break
			}
		}
		if caught == 0 {
			t.Errorf("no seed of 500 found that something %s", c.want)
		}
	}
}
