package journal

import (
	"cmp"
	"container/heap"
	"iter"
	"slices"
)

// live is an entry that may not be home, in 24 bytes.
type live struct {
	word   uint64 // block, sectors and kind, as in the ring
	number uint64
	rest   uint64 // EntryBlock: place in the ring << 32 | CRC32C; EntryZero: blocks
}

func (l live) block() uint64   { return l.word & maxBlock }
func (l live) mask() uint8     { return uint8(l.word >> maskShift) }
func (l live) kind() EntryKind { return EntryKind(l.word >> kindShift) }
func (l live) place() uint64   { return l.rest >> 32 }
func (l live) crc() uint32     { return uint32(l.rest) }
func (l live) end() uint64     { return l.block() + l.rest } // of an extent

// found collects entries in the order of the ring. What carries no data is kept once, however often it is listed again.
type found struct {
	blocks  []live // EntryBlock and EntryLost
	extents []live
	seen    map[live]struct{}
	others  []live // keys of seen in the order in which they came
}

// foundMark is a point to which found can be cut back.
type foundMark struct{ blocks, extents, others int }

func (f *found) mark() foundMark { return foundMark{len(f.blocks), len(f.extents), len(f.others)} }

func (f *found) cut(m foundMark) {
	for _, l := range f.others[m.others:] {
		delete(f.seen, l)
	}
	f.blocks, f.extents, f.others = f.blocks[:m.blocks], f.extents[:m.extents], f.others[:m.others]
}

// add collects e, whose data lie at a place of the ring.
func (f *found) add(e *Entry, place uint32) {
	l := live{word: e.Block | uint64(e.Mask)<<maskShift | uint64(e.Kind)<<kindShift, number: e.Number, rest: e.Blocks}
	if e.Kind == EntryBlock {
		l.rest = uint64(place)<<32 | uint64(e.CRC)
		f.blocks = append(f.blocks, l)
		return
	}
	if _, again := f.seen[l]; again {
		return
	}
	if f.seen == nil {
		f.seen = make(map[live]struct{})
	}
	f.seen[l] = struct{}{}
	f.others = append(f.others, l)
	if e.Kind == EntryZero {
		f.extents = append(f.extents, l)
	} else {
		f.blocks = append(f.blocks, l)
	}
}

// resolve sorts what was found and computes what it comes to.
func (rec *Recovered) resolve(f found) {
	rec.blocks, rec.extents = f.blocks, f.extents
	slices.SortFunc(rec.blocks, func(a, b live) int {
		return cmp.Or(cmp.Compare(a.block(), b.block()), cmp.Compare(a.number, b.number), cmp.Compare(a.kind(), b.kind()))
	})
	slices.SortFunc(rec.extents, func(a, b live) int {
		return cmp.Or(cmp.Compare(a.block(), b.block()), cmp.Compare(a.number, b.number))
	})
	for from, to := range rec.zeroed() {
		rec.ZeroBytes += to - from
	}
	for o := range rec.outcomes() {
		switch {
		case o.lost:
			rec.Lost = append(rec.Lost, LostBlock{o.block, o.number})
		case o.mask != 0:
			rec.BlockBytes += BlockBytes
		}
	}
}

// Entries are the entries from tail to head, each once: blocks ascending and by their numbers, then extents
// ascending.
func (rec *Recovered) Entries() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for _, list := range [2][]live{rec.blocks, rec.extents} {
			for _, l := range list {
				e := Entry{Kind: l.kind(), Block: l.block(), Mask: l.mask(), Number: l.number}
				switch e.Kind {
				case EntryBlock:
					e.CRC = l.crc()
				case EntryZero:
					e.Blocks = l.rest
				}
				if !yield(e) {
					return
				}
			}
		}
	}
}

// zeroed are the ranges of the volume that extents cover, in bytes, ascending and merged.
func (rec *Recovered) zeroed() iter.Seq2[int64, int64] {
	return func(yield func(from, to int64) bool) {
		for i := 0; i < len(rec.extents); {
			from, to := rec.extents[i].block(), rec.extents[i].end()
			for i++; i < len(rec.extents) && rec.extents[i].block() <= to; i++ {
				to = max(to, rec.extents[i].end())
			}
			if !yield(int64(from)*BlockBytes, min(int64(to)*BlockBytes, rec.volumeBytes)) {
				return
			}
		}
	}
}

// outcome is what the entries of one block come to.
type outcome struct {
	block  uint64
	lost   bool
	number uint64 // of the newest lost entry
	zero   bool   // an extent covers the block: what versions do not have is zero
	mask   uint8  // sectors to be written
	// versions are those of which something is left, the newest first, and sectors which.
	versions []live
	sectors  [8]uint8
}

// outcomes are those of all blocks with entries, ascending. They share their memory: each is valid until the next.
func (rec *Recovered) outcomes() iter.Seq[*outcome] {
	return func(yield func(*outcome) bool) {
		var o outcome
		over := covers{extents: rec.extents}
		for i := 0; i < len(rec.blocks); {
			j := i + 1
			for j < len(rec.blocks) && rec.blocks[j].block() == rec.blocks[i].block() {
				j++
			}
			o.resolve(rec.blocks[i:j], &over)
			if !yield(&o) {
				return
			}
			i = j
		}
	}
}

// resolve applies the entries of one block in the order of their numbers, and the newest extent that covers it.
func (o *outcome) resolve(entries []live, over *covers) {
	*o = outcome{block: entries[0].block(), versions: o.versions[:0]}
	extent, covered := over.at(o.block)
	o.zero = covered
	first := 0 // the oldest version that counts
	for i, e := range entries {
		switch {
		case covered && e.number < extent:
			first = i + 1
		case e.kind() == EntryLost:
			o.lost, o.number, first = true, e.number, i+1
		case e.mask() == 0xff:
			o.lost, first = false, i
		case o.lost:
			first = i + 1 // a part does not bring back the rest
		}
	}
	if o.lost {
		return
	}
	for i := len(entries) - 1; i >= first; i-- {
		if left := entries[i].mask() &^ o.mask; left != 0 {
			o.sectors[len(o.versions)] = left
			o.versions = append(o.versions, entries[i])
			o.mask |= left
		}
	}
	if o.zero {
		o.mask = 0xff
	}
}

// covers finds, for ascending blocks, the newest extent over each.
type covers struct {
	extents []live // not looked at yet, by first block
	over    newest // those that begin at or before the block, and some that ended before it
}

func (c *covers) at(block uint64) (number uint64, ok bool) {
	for len(c.extents) > 0 && c.extents[0].block() <= block {
		heap.Push(&c.over, c.extents[0])
		c.extents = c.extents[1:]
	}
	for len(c.over) > 0 && c.over[0].end() <= block {
		heap.Pop(&c.over)
	}
	if len(c.over) == 0 {
		return 0, false
	}
	return c.over[0].number, true
}

// newest is a heap with the newest extent at the top.
type newest []live

func (n newest) Len() int           { return len(n) }
func (n newest) Less(i, j int) bool { return n[i].number > n[j].number }
func (n newest) Swap(i, j int)      { n[i], n[j] = n[j], n[i] }
func (n *newest) Push(x any)        { *n = append(*n, x.(live)) }
func (n *newest) Pop() any {
	last := (*n)[len(*n)-1]
	*n = (*n)[:len(*n)-1]
	return last
}
