package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// EntriesPerChunk is how many entries the header block of a chunk has room for.
const EntriesPerChunk = (BlockBytes - chunkHeaderBytes - 4) / entryBytes

// The bytes of a chunk's header block; docs/FORMAT.md, "Ring".
const (
	chunkMagic       = "RSHELFRN"
	chunkVersion     = 1
	chunkLast        = 1 << 0 // flag: the last chunk of the run
	chunkHeaderBytes = 128
	chunkReserved    = 84
	chunkCRC         = BlockBytes - 4
	entryBytes       = 24

	blockBits     = 40
	maskShift     = blockBits
	kindShift     = 48
	maxBlock      = 1<<blockBits - 1
	positionLimit = 1 << 62 // no ring gets there: at 10 GB/s that takes 60 thousand years
)

// EntryKind says what an entry of a run is about.
type EntryKind uint8

// The kinds of entries.
const (
	EntryBlock EntryKind = iota + 1 // a block, its data in the run
	EntryZero                       // an extent of zeroes
	EntryLost                       // a block whose content is lost
)

// Entry is one thing that a run commits. Everything in the ring is redone in the order of the numbers.
type Entry struct {
	Kind   EntryKind
	Block  uint64 // of an extent the first; offset in the volume = Block * BlockBytes
	Mask   uint8  // EntryBlock: bit i: sector i holds and must be home before the tail passes; not 0
	Number uint64 // at most the seal of its run
	CRC    uint32 // EntryBlock: CRC32C of the BlockBytes of data as they are in the run
	Blocks uint64 // EntryZero: how many, not 0
}

// Chunk is the content of a chunk's header block.
type Chunk struct {
	Last       bool   // of its run
	Position   uint64 // of this header block
	Start      uint64 // position of the first chunk of the run
	Index      uint32 // in the run
	Seal       uint64 // that the run commits
	Generation uint64
	Committed  uint64 // the highest committed seal known before this run
	Tail       uint64 // everything before this position is home and synced
	Link       uint32 // Sum of the chunk before this one in the run, 0 in the first
	Entries    []Entry

	Sum uint32 // CRC32C of the header block
}

// Errors of DecodeChunk.
var (
	// ErrNoChunk: the block is no chunk header of this ring.
	ErrNoChunk = errors.New("no chunk of this ring")
	// ErrChunk: it is one, and its checksum or a field is wrong.
	ErrChunk = errors.New("chunk is damaged")
)

// dataBlocks is how many blocks of data follow the header block.
func (c *Chunk) dataBlocks() uint64 {
	n := uint64(0)
	for i := range c.Entries {
		if c.Entries[i].Kind == EntryBlock {
			n++
		}
	}
	return n
}

// end is the position behind the chunk.
func (c *Chunk) end() uint64 { return c.Position + 1 + c.dataBlocks() }

// encode writes the header block of c to dst and sets c.Sum. It panics if c is not valid.
func (c *Chunk) encode(dst []byte, stamp uint64) {
	if err := c.validate(); err != nil {
		panic(fmt.Sprintf("journal: encode chunk: %v", err))
	}
	b := dst[:BlockBytes]
	clear(b)
	be := binary.BigEndian
	copy(b, chunkMagic)
	be.PutUint32(b[8:], chunkVersion)
	if c.Last {
		be.PutUint32(b[12:], chunkLast)
	}
	be.PutUint64(b[16:], stamp)
	be.PutUint64(b[24:], c.Position)
	be.PutUint64(b[32:], c.Start)
	be.PutUint32(b[40:], c.Index)
	be.PutUint32(b[44:], uint32(len(c.Entries)))
	be.PutUint64(b[48:], c.Seal)
	be.PutUint64(b[56:], c.Generation)
	be.PutUint64(b[64:], c.Committed)
	be.PutUint64(b[72:], c.Tail)
	be.PutUint32(b[80:], c.Link)
	for i := range c.Entries {
		e := &c.Entries[i]
		p := b[chunkHeaderBytes+i*entryBytes:][:entryBytes]
		be.PutUint64(p[0:], e.Block|uint64(e.Mask)<<maskShift|uint64(e.Kind)<<kindShift)
		be.PutUint64(p[8:], e.Number)
		be.PutUint64(p[16:], e.Blocks|uint64(e.CRC)) // one of them is 0
	}
	c.Sum = crc32.Checksum(b[:chunkCRC], castagnoli)
	be.PutUint32(b[chunkCRC:], c.Sum)
}

// DecodeChunk reads the header block of a chunk of the ring with that stamp. Every field is checked but for what
// only the place in the ring and the size of the volume tell. Its error is ErrNoChunk or ErrChunk, wrapped.
func DecodeChunk(b []byte, stamp uint64) (*Chunk, error) {
	c := new(Chunk)
	if err := c.decode(b, stamp); err != nil {
		return nil, err
	}
	return c, nil
}

// decode is DecodeChunk into c, whose memory for entries is used again. After an error c means nothing.
func (c *Chunk) decode(b []byte, stamp uint64) error {
	be := binary.BigEndian
	if len(b) != BlockBytes || string(b[:8]) != chunkMagic || be.Uint64(b[16:]) != stamp {
		return ErrNoChunk
	}
	sum, version, flags, n := be.Uint32(b[chunkCRC:]), be.Uint32(b[8:]), be.Uint32(b[12:]), be.Uint32(b[44:])
	switch {
	case sum != crc32.Checksum(b[:chunkCRC], castagnoli):
		return fmt.Errorf("%w: wrong checksum", ErrChunk)
	case version != chunkVersion || flags&^chunkLast != 0:
		return fmt.Errorf("%w: version %d, flags %#x", ErrChunk, version, flags)
	case n > EntriesPerChunk:
		return fmt.Errorf("%w: %d entries are more than %d", ErrChunk, n, EntriesPerChunk)
	case !isZero(b[chunkReserved:chunkHeaderBytes]) || !isZero(b[chunkHeaderBytes+n*entryBytes:chunkCRC]):
		return fmt.Errorf("%w: reserved bytes are not zero", ErrChunk)
	}
	*c = Chunk{
		Last: flags&chunkLast != 0, Position: be.Uint64(b[24:]), Start: be.Uint64(b[32:]), Index: be.Uint32(b[40:]),
		Seal: be.Uint64(b[48:]), Generation: be.Uint64(b[56:]), Committed: be.Uint64(b[64:]), Tail: be.Uint64(b[72:]),
		Link: be.Uint32(b[80:]), Sum: sum, Entries: c.Entries[:0],
	}
	for i := range int(n) {
		p := b[chunkHeaderBytes+i*entryBytes:][:entryBytes]
		word0, word2 := be.Uint64(p[0:]), be.Uint64(p[16:])
		if word0>>52 != 0 {
			return fmt.Errorf("%w: entry %d has unknown bits", ErrChunk, i)
		}
		e := Entry{Kind: EntryKind(word0 >> kindShift), Block: word0 & maxBlock, Mask: uint8(word0 >> maskShift), Number: be.Uint64(p[8:])}
		if e.Kind == EntryBlock {
			e.CRC = uint32(word2)
			word2 &^= 1<<32 - 1
		}
		e.Blocks = word2
		c.Entries = append(c.Entries, e)
	}
	if err := c.validate(); err != nil {
		return fmt.Errorf("%w: %w", ErrChunk, err)
	}
	return nil
}

// validate reports the first field that the format does not allow.
func (c *Chunk) validate() error {
	switch {
	case c.Position >= positionLimit:
		return fmt.Errorf("position %d is beyond all rings", c.Position)
	case c.Tail > c.Start:
		return fmt.Errorf("run at %d begins before its tail at %d", c.Start, c.Tail)
	case c.Start > c.Position || c.Position-c.Start < uint64(c.Index) || (c.Index == 0) != (c.Start == c.Position):
		return fmt.Errorf("chunk %d of the run at %d is at %d", c.Index, c.Start, c.Position)
	case c.Index == 0 && c.Link != 0:
		return errors.New("first chunk names one before it")
	case c.Committed > c.Seal:
		return fmt.Errorf("seal %d is older than %d, which is committed", c.Seal, c.Committed)
	case len(c.Entries) > EntriesPerChunk:
		return fmt.Errorf("%d entries are more than %d", len(c.Entries), EntriesPerChunk)
	}
	for i := range c.Entries {
		if err := c.Entries[i].validate(c.Seal); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
	}
	return nil
}

func (e *Entry) validate(seal uint64) error {
	switch {
	case e.Block > maxBlock:
		return fmt.Errorf("block %d has more than %d bits", e.Block, blockBits)
	case e.Number > seal:
		return fmt.Errorf("number %d is newer than the seal %d", e.Number, seal)
	case e.Kind == EntryBlock && (e.Mask == 0 || e.Blocks != 0):
		return fmt.Errorf("block %d has sectors %#x and an extent of %d", e.Block, e.Mask, e.Blocks)
	case e.Kind == EntryZero && (e.Mask != 0 || e.CRC != 0 || e.Blocks == 0 || e.Blocks > maxBlock+1-e.Block):
		return fmt.Errorf("extent of %d blocks at %d, sectors %#x, checksum %#x", e.Blocks, e.Block, e.Mask, e.CRC)
	case e.Kind == EntryLost && (e.Mask != 0 || e.CRC != 0 || e.Blocks != 0):
		return fmt.Errorf("lost block %d has sectors %#x, checksum %#x and an extent of %d", e.Block, e.Mask, e.CRC, e.Blocks)
	case e.Kind < EntryBlock || e.Kind > EntryLost:
		return fmt.Errorf("kind %d is unknown", e.Kind)
	}
	return nil
}
