//go:build planted

package flush

import "os"

// planted reports whether the bug of that name is switched on by RAMSHELF_PLANT. Bugs of this package:
// clean-before-sync (blocks turn clean before the sync), drop-on-error (a failed write counts as done).
func planted(name string) bool { return os.Getenv("RAMSHELF_PLANT") == name }
