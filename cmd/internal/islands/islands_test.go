// Package islands holds the rule who may import whom: nbd, cache, aoe and flush never import one another, only cmd
// joins them. It has no code of its own; the linter holds the same rule while one types.
package islands

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const module = "github.com/ramshelf/ramshelf/"

// islands never depend on one another, nor on cmd or bench.
var islands = []string{"nbd", "cache", "aoe", "flush"}

// outside are the modules beyond the standard library and golang.org/x/sys, and the rooms that may use them.
var outside = map[string][]string{
	"github.com/vishvananda/netlink": {"nbd/kernel", "cmd"},
	"github.com/dustin/go-humanize":  {"cmd", "bench"},
}

// anywhere are modules that every room may use.
var anywhere = []string{"golang.org/x/sys"}

// dependencies are the packages that each package of this module needs to build, tests left out, by import path.
func dependencies(t *testing.T) map[string][]string {
	t.Helper()
	lookAtSources(t)
	var stderr bytes.Buffer
	cmd := exec.Command("go", "list", "-f", `{{.ImportPath}}{{range .Deps}} {{.}}{{end}}`, module+"...")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	deps := map[string][]string{}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		deps[fields[0]] = fields[1:]
	}
	return deps
}

// lookAtSources looks at every source of the module: go test uses a result again unless a file changed that the
// test itself has looked at.
func lookAtSources(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join("..", "..", ".."), func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (entry.Name() == "out" || entry.Name() == ".git" || entry.Name() == "var"):
			return fs.SkipDir
		case filepath.Ext(path) == ".go":
			_, err = os.Stat(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// in reports whether the import path lies in the room.
func in(path, room string) bool {
	rest, ours := strings.CutPrefix(path, module)
	return ours && (rest == room || strings.HasPrefix(rest, room+"/"))
}

func TestIslandsDoNotKnowOneAnother(t *testing.T) {
	deps := dependencies(t)
	for _, island := range islands {
		found := false
		for path, needs := range deps {
			if !in(path, island) {
				continue
			}
			found = true
			for _, need := range needs {
				if strings.HasPrefix(need, module) && !in(need, island) {
					t.Errorf("%s depends on %s", path, need)
				}
			}
		}
		if !found {
			t.Errorf("the island %s has no package: the rule was not looked at", island)
		}
	}
}

func TestModulesStayInTheirRooms(t *testing.T) {
	for path, needs := range dependencies(t) {
		if in(path, "cmd") {
			continue
		}
		for _, need := range needs {
			if first, _, _ := strings.Cut(need, "/"); !strings.Contains(first, ".") || strings.HasPrefix(need, module) {
				continue // the standard library, and ourselves
			}
			if !allowed(path, need) {
				t.Errorf("%s depends on %s", path, need)
			}
		}
	}
}

func allowed(path, need string) bool {
	for _, m := range anywhere {
		if strings.HasPrefix(need, m) {
			return true
		}
	}
	if in(path, "bench") {
		return !strings.HasPrefix(need, "github.com/spf13/") // what measures may use what it likes
	}
	for m, rooms := range outside {
		for _, room := range rooms {
			if strings.HasPrefix(need, m) && in(path, room) {
				return true
			}
		}
	}
	return false
}
