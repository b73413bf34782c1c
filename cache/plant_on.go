//go:build planted

package cache

import "os"

// planted reports whether the bug of that name is switched on by RAMSHELF_PLANT. Bugs of this package:
// torn-slot (a write of one resident block fills the published slot in place), clear-early (what a write supersedes is
// cleared before the write counts as issued), publish-early (the number counts as issued before all of its slots have
// it), drain-skips (the flusher is not given every block), stale-fill (a fill that came too late is taken),
// blind-checksum (blocks are not verified), commit-skips (a commit leaves blocks out), home-before-commit (blocks of the open
// epoch go home), ack-before-commit (writes that promise a commit do not wait for it), unsafe-read (reads do not either).
func planted(name string) bool { return os.Getenv("RAMSHELF_PLANT") == name }

// CrashPoint is called between two stores to the memory file, where a process may die.
var CrashPoint = func() {}

func crashPoint() { CrashPoint() }

// overwriteInPlace is the bug torn-slot.
func (c *Cache) overwriteInPlace(op *Op) bool {
	if !planted("torn-slot") || op.kind != kindWrite || len(op.slots) != 1 || op.Len != BlockBytes {
		return false
	}
	sh := c.shardOf(op.first)
	sh.mu.Lock()
	s := c.newest(sh, op.first)
	if s == noSlot || c.zeroes.covering(op.first) != 0 {
		sh.mu.Unlock()
		return false
	}
	c.pin(s)
	number := c.arena.Headers[s].Number.Load()
	sh.mu.Unlock()
	from, to := c.arena.Data(op.slots[0]), c.arena.Data(s)
	for i := 0; i < BlockBytes; i += 64 {
		copy(to[i:i+64], from[i:])
		crashPoint()
	}
	c.pub.Lock()
	c.describe(s, meta{block: op.first, valid: allValid, dirty: allValid}, number, sum(to, allValid))
	sh.mu.Lock()
	if c.newest(sh, op.first) == s && !c.isSealed(number) {
		c.open.add(s)
	}
	sh.mu.Unlock()
	c.pub.Unlock()
	c.unpin(s)
	c.Abort(op)
	op.end(0)
	return true
}

// clearOld is the bug clear-early.
func (c *Cache) clearOld(op *Op) {
	for i := range op.slots {
		block := op.blockOf(i)
		sh := c.shardOf(block)
		sh.mu.Lock()
		if s := c.newest(sh, block); s != noSlot && !c.isSealed(c.arena.Headers[s].Number.Load()) {
			c.arena.Headers[s].Number.Store(0)
		}
		sh.mu.Unlock()
		crashPoint()
	}
}

// Idle tells whether no read from home is under way.
func (c *Cache) Idle() bool { return c.fills.busy.Load() == 0 }
