//go:build !planted

package cache

// planted reports whether the bug of that name is switched on; never, outside builds with the tag planted.
func planted(string) bool { return false }

// crashPoint stands between two stores to the memory file, where a process may die.
func crashPoint() {}

func (c *Cache) clearOld(*Op) {}

func (c *Cache) overwriteInPlace(*Op) bool { return false }
