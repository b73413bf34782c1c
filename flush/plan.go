package flush

import (
	"fmt"
	"math/bits"
	"slices"
)

// allSectors is the mask of a whole block.
const allSectors = 0xff

// piece is a stretch of bytes to be written: whole sectors of one block.
type piece struct {
	off  int64
	data []byte
	// fill, when not 0, says that only these sectors of data hold, and that the backing cannot write them
	// alone: the rest of the block is read from home first.
	fill uint8
}

func (p *piece) end() int64 { return p.off + int64(len(p.data)) }

// appendPieces appends what must be written of b to a backing that writes sectors of sectorBytes. A block
// that is whole in memory is written whole, since its clean sectors are what home has already.
func appendPieces(dst []piece, b *Block, sectorBytes int) []piece {
	off := int64(b.Number) * BlockBytes
	switch {
	case b.Dirty == 0:
		return dst
	case b.Valid == allSectors:
		return append(dst, piece{off: off, data: b.Data})
	case sectorBytes > SectorBytes:
		return append(dst, piece{off: off, data: b.Data, fill: b.Dirty})
	}
	for valid := b.Valid; valid != 0; {
		first := bits.TrailingZeros8(valid)
		run := sectorMask(first, bits.TrailingZeros8(^(valid >> first)))
		valid &^= run
		if dirty := b.Dirty & run; dirty != 0 {
			from, to := bits.TrailingZeros8(dirty)*SectorBytes, bits.Len8(dirty)*SectorBytes
			dst = append(dst, piece{off: off + int64(from), data: b.Data[from:to]})
		}
	}
	return dst
}

// sectorMask has n bits set from bit first on.
func sectorMask(first, n int) uint8 { return uint8((1<<n - 1) << first) }

// check panics where b breaks the contract of Source.Next after a block with number last.
func (b *Block) check(last int64) {
	if b.Dirty&^b.Valid != 0 || len(b.Data) != BlockBytes || int64(b.Number) <= last {
		panic(fmt.Sprintf("flush: block %d after %d: dirty %#02x, valid %#02x, %d bytes",
			b.Number, last, b.Dirty, b.Valid, len(b.Data)))
	}
}

// window holds the pieces that are not in a write yet, ascending, and cuts writes off its front. It looks
// minPieces further than a write is long, so that a run a little longer than one write is cut in two halves
// and not into a large write and a crumb.
type window struct {
	pieces    []piece
	lead      int // how many pieces at the front adjoin one another
	maxPieces int // longest write
	minPieces int // shortest write cut from a run that has more
}

func newWindow(maxPieces int) window {
	minPieces := maxPieces / 4
	return window{
		pieces:    make([]piece, 0, maxPieces+minPieces+MaxBridgeBlocks+BlockBytes/SectorBytes),
		maxPieces: maxPieces,
		minPieces: minPieces,
	}
}

// add appends p, which lies behind every piece in the window.
func (w *window) add(p piece) {
	if n := len(w.pieces); w.lead == n && (n == 0 || w.pieces[n-1].end() == p.off) {
		w.lead++
	}
	w.pieces = append(w.pieces, p)
}

// gap is the range of whole blocks between the window and a piece at off, in blocks, if clean blocks there
// would let both go in one write.
func (w *window) gap(off int64) (first uint64, blocks int64) {
	n := len(w.pieces)
	if n == 0 || w.lead < n || n >= w.maxPieces {
		return 0, 0
	}
	end := w.pieces[n-1].end()
	if end%BlockBytes != 0 || off%BlockBytes != 0 {
		return 0, 0
	}
	return uint64(end / BlockBytes), (off - end) / BlockBytes
}

// next is how many pieces at the front are the next write; 0 asks for more pieces. final says that there are
// none.
func (w *window) next(final bool) int {
	if w.lead == len(w.pieces) && w.lead < w.maxPieces+w.minPieces && !final {
		return 0
	}
	n := w.lead
	switch {
	case n <= w.maxPieces:
	case n < w.maxPieces+w.minPieces:
		n /= 2
	default:
		n = w.maxPieces
	}
	return w.limitFills(n)
}

// limitFills shortens a write of n pieces to those whose fills have room in a job.
func (w *window) limitFills(n int) int {
	fills := 0
	for i := range w.pieces[:n] {
		if w.pieces[i].fill != 0 {
			if fills == maxFills {
				return i
			}
			fills++
		}
	}
	return n
}

// drop takes n pieces off the front.
func (w *window) drop(n int) {
	rest := copy(w.pieces, w.pieces[n:])
	clear(w.pieces[rest:])
	w.pieces = w.pieces[:rest]
	w.lead = min(rest, 1)
	for w.lead > 0 && w.lead < rest && w.pieces[w.lead-1].end() == w.pieces[w.lead].off {
		w.lead++
	}
}

// reset empties the window.
func (w *window) reset() { w.drop(len(w.pieces)) }

// mergeZeroes sorts extents and joins those that touch or overlap, in place: all are zeroes and older than
// every block, so their order among one another does not matter.
func mergeZeroes(z []Zero) []Zero {
	slices.SortFunc(z, func(a, b Zero) int {
		switch {
		case a.Off < b.Off:
			return -1
		case a.Off > b.Off:
			return 1
		}
		return 0
	})
	out := z[:0]
	for _, e := range z {
		if e.Off < 0 || e.Bytes < 0 || e.Off%BlockBytes != 0 || e.Bytes%BlockBytes != 0 {
			panic(fmt.Sprintf("flush: zero extent of %d bytes at %d is not whole blocks", e.Bytes, e.Off))
		}
		if n := len(out); n > 0 && e.Off <= out[n-1].Off+out[n-1].Bytes {
			out[n-1].Bytes = max(out[n-1].Bytes, e.Off+e.Bytes-out[n-1].Off)
		} else if e.Bytes > 0 {
			out = append(out, e)
		}
	}
	return out
}
