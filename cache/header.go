package cache

import (
	"hash/crc32"
	"math/bits"

	"github.com/ramshelf/ramshelf/cache/arena"
)

const (
	// BlockBytes is the unit of the cache.
	BlockBytes = arena.SlotBytes
	// SectorBytes is the unit of what is valid and what is dirty within a block.
	SectorBytes = 512

	sectors   = BlockBytes / SectorBytes
	allValid  = 0xff
	blockBits = 40
	blockMask = 1<<blockBits - 1
	lostFlag  = 1 << 40

	// numberFilled is the number of a block that came from home and was never written since: below every write.
	numberFilled = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// meta is the header of a slot as values.
type meta struct {
	block uint64
	valid uint8
	dirty uint8
	lost  bool
}

// blockWord holds block and valid sectors, and above them a checksum of their own: the rest of the header says what a slot
// holds, this word says for which block, and a slot under the wrong block would make the right one disappear.
func (m meta) blockWord() uint64 {
	w := m.block | uint64(m.valid)<<blockBits
	return w | hash(w)>>48<<48
}

// wellFormed tells whether a block word is as it was written.
func wellFormed(word uint64) bool { return metaOf(word, 0).blockWord() == word }

// mix folds the header into the checksum, so that a header that changed by itself is found like data that did.
func (m meta) mix(number uint64) uint32 {
	x := m.blockWord()*0x9e3779b97f4a7c15 ^ bits.RotateLeft64(number, 29)*0xbf58476d1ce4e5b9 ^ uint64(m.dirty)*0x94d049bb133111eb
	x ^= x >> 31
	x *= 0x94d049bb133111eb
	return uint32(x >> 32)
}

func (m meta) checkWord(number uint64, crc uint32) uint64 {
	w := uint64(crc^m.mix(number)) | uint64(m.dirty)<<32
	if m.lost {
		w |= lostFlag
	}
	return w
}

func metaOf(block, check uint64) meta {
	return meta{block: block & blockMask, valid: uint8(block >> blockBits), dirty: uint8(check >> 32), lost: check&lostFlag != 0}
}

// meta reads the header of slot s. It is stable while the slot is in the index or pinned, but for the dirty sectors.
func (c *Cache) meta(s uint32) meta {
	h := &c.arena.Headers[s]
	return metaOf(h.Block.Load(), h.Check.Load())
}

// describe writes the header of a slot that is not published.
func (c *Cache) describe(s uint32, m meta, number uint64, crc uint32) {
	h := &c.arena.Headers[s]
	h.Block.Store(m.blockWord())
	h.Check.Store(m.checkWord(number, crc))
}

// redirty changes which sectors of a published slot are dirty, and its lost mark. Callers hold pub.
func (c *Cache) redirty(s uint32, dirty uint8, lost bool) {
	h := &c.arena.Headers[s]
	number, check := h.Number.Load(), h.Check.Load()
	m := metaOf(h.Block.Load(), check)
	crc := uint32(check) ^ m.mix(number)
	m.dirty, m.lost = dirty, lost
	h.Check.Store(m.checkWord(number, crc))
	crashPoint()
}

// intact tells whether slot s still has the content and header that it was published with under number.
func (c *Cache) intact(s uint32, number uint64) bool {
	h := &c.arena.Headers[s]
	check := h.Check.Load()
	m := metaOf(h.Block.Load(), check)
	return !m.lost && (planted("blind-checksum") || uint32(check)^m.mix(number) == sum(c.arena.Data(s), m.valid))
}

// intactSum is intact for a caller that has the sum of the whole data already.
func (c *Cache) intactSum(s uint32, number uint64, all uint32) bool {
	h := &c.arena.Headers[s]
	check := h.Check.Load()
	if m := metaOf(h.Block.Load(), check); m.valid == allValid && !m.lost {
		return planted("blind-checksum") || uint32(check)^m.mix(number) == all
	}
	return c.intact(s, number)
}

// sum is the CRC32C of the valid sectors of a block.
func sum(data []byte, valid uint8) uint32 {
	if valid == allValid {
		return crc32.Update(0, castagnoli, data)
	}
	crc := uint32(0)
	for i := range sectors {
		if valid&(1<<i) != 0 {
			crc = crc32.Update(crc, castagnoli, data[i*SectorBytes:(i+1)*SectorBytes])
		}
	}
	return crc
}

// covered is the mask of the sectors that the bytes [from, to) of a block cover whole, touched those that they touch.
func covered(from, to int) uint8 {
	return mask((from+SectorBytes-1)/SectorBytes, to/SectorBytes)
}

func touched(from, to int) uint8 {
	return mask(from/SectorBytes, (to+SectorBytes-1)/SectorBytes)
}

func mask(first, end int) uint8 {
	if end <= first {
		return 0
	}
	return uint8((1<<(end-first) - 1) << first)
}
