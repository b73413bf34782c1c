//go:build planted

package nbd

import "os"

// planted reports whether the bug of that name is switched on by RAMSHELF_PLANT. Bugs of this package:
// zombie-connection (the older connections of a session are not fenced), closed-connection (what a closed or
// reset connection sent is still executed), unbounded-inflight (a connection has no quota of requests).
func planted(name string) bool { return os.Getenv("RAMSHELF_PLANT") == name }
