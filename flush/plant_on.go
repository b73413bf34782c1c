//go:build planted

package flush

import "os"

// planted reports whether the bug of that name is switched on by RAMSHELF_PLANT. Bugs of this package:
// clean-before-sync (blocks turn clean before the sync), drop-on-error (a failed write counts as done), commit-without-sync (a
// run counts as committed without its sync), tail-early (the tail passes what is not home yet), commit-marks-clean-on-error
// (a run that failed counts as committed), ignore-other-sync (that a sync of another lane failed does not matter),
// lost-not-recorded (a run does not name the blocks that are lost).
func planted(name string) bool { return os.Getenv("RAMSHELF_PLANT") == name }
