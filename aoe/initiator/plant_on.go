//go:build planted

package initiator

import "os"

// planted reports whether the bug of that name is switched on by RAMSHELF_PLANT. Bugs of this package: no-ghost-fence (a newer
// write is sent while copies of an older one may be on their way).
func planted(name string) bool { return os.Getenv("RAMSHELF_PLANT") == name }
