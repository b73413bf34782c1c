//go:build !planted

package journal

// planted reports whether the bug of that name is switched on; never, outside builds with the tag planted.
func planted(string) bool { return false }
