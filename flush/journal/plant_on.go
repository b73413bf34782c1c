//go:build planted

package journal

import "os"

// planted reports whether the bug of that name is switched on by RAMSHELF_PLANT. Bugs of this package:
// torn-run-replayed (the data of a run are not verified), recovery-stops-early (a scan ends before the last run).
func planted(name string) bool { return os.Getenv("RAMSHELF_PLANT") == name }
