package cache

import "slices"

// sortSlots bounds how many slots are sorted at once, and so the memory that a commit or a sweep needs whatever its size.
const sortSlots = 1 << 18

type keyed struct {
	block uint64
	slot  uint32
}

// order walks a set of slots, at most one version of each block, ascending by block, in a bounded buffer: each time that it
// is empty it is filled with the lowest blocks that come next.
type order struct {
	buffer []keyed
	sorted []keyed
	from   uint64 // blocks before it are done
}

func (o *order) restart() { o.from, o.sorted = 0, o.sorted[:0] }

// next gives up to n slots of set that come next; none where the walk is over. They are good until the next call.
func (o *order) next(c *Cache, set *bitmap, n int) []keyed {
	if len(o.sorted) == 0 {
		o.fill(c, set)
	}
	given := o.sorted[:min(n, len(o.sorted))]
	o.sorted = o.sorted[len(given):]
	if len(given) > 0 {
		o.from = given[len(given)-1].block + 1
	}
	return given
}

func (o *order) fill(c *Cache, set *bitmap) {
	all := o.buffer[:0]
	limit := ^uint64(0)
	for s, ok := set.next(0); ok; s, ok = set.next(s + 1) {
		block := c.arena.Headers[s].Block.Load() & blockMask
		if block < o.from || block >= limit {
			continue
		}
		if len(all) == cap(all) {
			sortKeyed(all)
			all = all[:len(all)/2]
			limit = all[len(all)-1].block + 1
			if block >= limit {
				continue
			}
		}
		all = append(all, keyed{block, s})
	}
	sortKeyed(all)
	o.sorted = all
}

func sortKeyed(k []keyed) {
	slices.SortFunc(k, func(a, b keyed) int {
		if a.block < b.block {
			return -1
		}
		return 1
	})
}
