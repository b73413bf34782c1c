package cache

import "math/bits"

// bitmap is a set of slots with a summary level, so that walking a nearly empty one costs next to nothing.
// It is not safe for concurrent use.
type bitmap struct {
	words []uint64
	sum   []uint64 // bit i: words[i] is not zero
	n     int      // members
}

func newBitmap(words, sum []uint64) bitmap { return bitmap{words: words, sum: sum} }

func bitmapWords(slots int) (words, sum int) {
	words = (slots + 63) / 64
	return words, (words + 63) / 64
}

func (b *bitmap) add(s uint32) {
	w, bit := s/64, uint64(1)<<(s%64)
	if b.words[w]&bit == 0 {
		b.words[w] |= bit
		b.sum[w/64] |= 1 << (w % 64)
		b.n++
	}
}

func (b *bitmap) has(s uint32) bool { return b.words[s/64]&(1<<(s%64)) != 0 }

// remove reports whether s was a member.
func (b *bitmap) remove(s uint32) bool {
	w, bit := s/64, uint64(1)<<(s%64)
	if b.words[w]&bit == 0 {
		return false
	}
	b.words[w] &^= bit
	if b.words[w] == 0 {
		b.sum[w/64] &^= 1 << (w % 64)
	}
	b.n--
	return true
}

// next is the first member at or after s.
func (b *bitmap) next(s uint32) (uint32, bool) {
	w := s / 64
	if int(w) >= len(b.words) {
		return 0, false
	}
	if rest := b.words[w] >> (s % 64); rest != 0 {
		return s + uint32(bits.TrailingZeros64(rest)), true
	}
	w++
	for g := w / 64; int(g) < len(b.sum); g++ {
		group := b.sum[g]
		if g == w/64 {
			group = group >> (w % 64) << (w % 64)
		}
		if group != 0 {
			at := g*64 + uint32(bits.TrailingZeros64(group))
			return at*64 + uint32(bits.TrailingZeros64(b.words[at])), true
		}
	}
	return 0, false
}
