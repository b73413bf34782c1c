// Package journal is the metadata that a volume keeps on its backing: superblock, ring and intent bitmap. It
// is layout, codec and bookkeeping; the caller does the I/O of runs, and decides when.
//
// All metadata lie in one place: at the tail of the backing, so that data stay at offset 0 and a backing that
// was stopped cleanly can be mounted without ramshelf, or at the tail of a second backing that holds nothing
// else. docs/FORMAT.md is the byte-exact description; ascending:
//
//	intent bitmap   copy A, then copy B           Intent
//	ring            not with KindNone             Ring, Scan, Replay
//	superblock      area of 1 MiB at the very end Superblock, Examine
//
// The superblock area begins at a multiple of 4096 bytes, and so does everything before it:
//
//	offset in the area   length   content
//	0                    4096     superblock, copy 0
//	4096                 1040384  reserved, zero
//	1044480              4096     superblock, copy 1
//
// # Superblock
//
// Numbers are unsigned and big-endian unless said otherwise. The first 12 bytes and the checksum are the same
// in all versions of the format, so that any version can tell a newer one from damage.
//
//	offset  length  field
//	0       8       magic "RSHELFSB"
//	8       4       format version, 1
//	12      4       flags: bit 0 clean, bit 1 volatile, the others zero
//	16      8       sequence number: the higher of two valid copies holds
//	24      16      volume UUID, not zero
//	40      64      volume name, UTF-8, 1..64 bytes, padded with zeroes
//	104     8       volume size in bytes, a multiple of 512
//	112     8       metadata size in bytes: from the start of the metadata to the end of the superblock area
//	120     8       offset of the superblock area in the backing
//	128     8       incarnation: counter, raised by every opening for writing
//	136     8       incarnation: random stamp
//	144     8       written at: nanoseconds since 1970-01-01 UTC, signed
//	152     4       journal kind: 0 none, 1 internal, 2 external
//	156     4       number of generations, 0..32
//	160     8       ring: offset in the backing, 0 for journal none, as the next two
//	168     8       ring: bytes
//	176     8       ring: stamp of its chunks; 0: it was never used
//	184     8       intent bitmap: offset in the backing
//	192     8       intent bitmap: bytes, both copies together
//	200     8       intent bitmap: bytes of the volume that a bit stands for
//	208     8       journal external: bytes of the backing with the data; else 0
//	216     8       pending zero: offset in the backing with the data, before the metadata
//	224     8       pending zero: bytes; 0: none is pending
//	232     8       committed: the highest committed number known when this was written
//	240     16      reserved, zero
//	256     1280    generations, the oldest first, 40 bytes each; unused ones are zero
//	1536    2556    reserved, zero
//	4092    4       CRC32C (Castagnoli) of bytes 0..4091
//
// A generation:
//
//	offset  length  field
//	0       8       id, not zero
//	8       8       id of the generation that it left, 0 for the first
//	16      8       fork: the number at which it left that one
//	24      8       began at: nanoseconds since 1970-01-01 UTC, signed
//	32      8       flags: bit 0 rollback: answered writes were lost when it began; the others zero
//
// # Writing
//
// Both copies are written with the same content and sequence number, one after the other, each followed by a
// sync: first the copy that does not hold at present, so that at every instant one valid copy is there that
// is not being written.
package journal

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"time"
	"unicode/utf8"
)

// Sizes of the format, in bytes.
const (
	// SuperblockBytes is the length of a copy of the superblock.
	SuperblockBytes = 4096
	// AreaBytes is the length of the superblock area at the tail of the backing.
	AreaBytes = 1 << 20
	// MaxNameBytes is the longest name of a volume.
	MaxNameBytes = 64
	// SectorBytes is what a volume's size is a multiple of.
	SectorBytes = 512
	// MaxVolumeBytes is the largest volume: block numbers have 40 bits.
	MaxVolumeBytes = 1 << 52
)

// MaxGenerations is how many generations a superblock remembers.
const MaxGenerations = 32

// Version is the version of the format that this package writes, and the newest that it reads.
const Version = 1

const (
	magic           = "RSHELFSB"
	flagClean       = 1 << 0
	flagVolatile    = 1 << 1
	flagRollback    = 1 << 0 // of a generation
	offsetName      = 40
	offsetReserved1 = 240
	offsetGens      = 256
	generationBytes = 40
	offsetReserved2 = offsetGens + MaxGenerations*generationBytes
	offsetCRC       = SuperblockBytes - 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// UUID identifies a volume. The zero value is none.
type UUID [16]byte

// NewUUID returns a random UUID (RFC 9562, version 4).
func NewUUID() UUID {
	var u UUID
	_, _ = rand.Read(u[:]) // never fails (crypto/rand)
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// String is the usual form, 8-4-4-4-12 hexadecimal digits.
func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}

// Kind says where a volume's journal is.
type Kind uint32

// The kinds of journal.
const (
	KindNone     Kind = iota // no journal: blocks go straight home
	KindInternal             // on the backing, behind the volume
	KindExternal             // on a backing of its own, with all other metadata
)

// String is the word for k in flags and status.
func (k Kind) String() string {
	switch k {
	case KindNone:
		return "none"
	case KindInternal:
		return "internal"
	case KindExternal:
		return "external"
	}
	return fmt.Sprintf("kind(%d)", uint32(k))
}

// Incarnation names one opening of a volume for writing.
type Incarnation struct {
	Counter uint64 // one more than the incarnation before
	Stamp   uint64 // random, so that two copies of a backing do not go on with the same one
}

// Generation is an entry of a volume's history: positions are pairs of a generation and a number in it.
type Generation struct {
	ID     uint64    // not 0
	Parent uint64    // the generation that it left, 0 for the first
	Fork   uint64    // the number at which it left its parent
	Began  time.Time // for people; to the nanosecond, UTC

	Rollback bool // answered writes were lost when it began
}

// Superblock is the identity and state of a volume on its backing. Its methods are not safe for concurrent
// use.
type Superblock struct {
	Sequence      uint64 // of the copies; Store raises it
	UUID          UUID
	Name          string
	VolumeBytes   int64
	MetadataBytes int64 // all metadata, the superblock area included
	AreaOffset    int64 // of the superblock area in the backing
	Incarnation   Incarnation
	Journal       Kind
	Clean         bool      // the volume was stopped with everything home
	Volatile      bool      // this opening answers writes before they are committed, or inherited such writes in memory
	WrittenAt     time.Time // for people; to the nanosecond, UTC
	Generations   []Generation

	RingOffset, RingBytes int64  // in the backing; 0 with KindNone
	RingStamp             uint64 // of the chunks that count; 0: the ring was never used, all is home
	BitmapOffset          int64  // of the intent bitmap in the backing
	BitmapBytes           int64  // both copies
	RegionBytes           int64  // what a bit of it stands for
	DataBytes             int64  // with KindExternal the size of the backing with the data, else 0
	ZeroOffset, ZeroBytes int64  // a range of the backing, before the metadata, that reads as zeroes and may not be zero yet; ZeroBytes 0: none
	// Committed is the highest committed number known when this was written. With a ring it is the seal of a run that
	// is durable: Scan refuses a ring that does not hold it.
	Committed uint64

	newest int // the copy that holds: Store writes the other one first
}

// Errors of Decode, by what a copy turns out to be.
var (
	// ErrNoMagic: there is no superblock.
	ErrNoMagic = errors.New("no superblock")
	// ErrDamaged: there is one, but its checksum or a field is wrong.
	ErrDamaged = errors.New("superblock is damaged")
	// ErrNewer: it is valid, of a format that this package does not know.
	ErrNewer = errors.New("superblock has a newer format")
)

// Encode returns the SuperblockBytes of s. It panics if s is not valid.
func (s *Superblock) Encode() []byte {
	if err := s.Validate(); err != nil {
		panic(fmt.Sprintf("journal: encode superblock: %v", err))
	}
	b := make([]byte, SuperblockBytes)
	be := binary.BigEndian
	copy(b, magic)
	be.PutUint32(b[8:], Version)
	flags := uint32(0)
	if s.Clean {
		flags |= flagClean
	}
	if s.Volatile {
		flags |= flagVolatile
	}
	be.PutUint32(b[12:], flags)
	be.PutUint64(b[16:], s.Sequence)
	copy(b[24:], s.UUID[:])
	copy(b[offsetName:], s.Name)
	be.PutUint64(b[104:], uint64(s.VolumeBytes))
	be.PutUint64(b[112:], uint64(s.MetadataBytes))
	be.PutUint64(b[120:], uint64(s.AreaOffset))
	be.PutUint64(b[128:], s.Incarnation.Counter)
	be.PutUint64(b[136:], s.Incarnation.Stamp)
	be.PutUint64(b[144:], uint64(s.WrittenAt.UnixNano()))
	be.PutUint32(b[152:], uint32(s.Journal))
	be.PutUint32(b[156:], uint32(len(s.Generations)))
	be.PutUint64(b[160:], uint64(s.RingOffset))
	be.PutUint64(b[168:], uint64(s.RingBytes))
	be.PutUint64(b[176:], s.RingStamp)
	be.PutUint64(b[184:], uint64(s.BitmapOffset))
	be.PutUint64(b[192:], uint64(s.BitmapBytes))
	be.PutUint64(b[200:], uint64(s.RegionBytes))
	be.PutUint64(b[208:], uint64(s.DataBytes))
	be.PutUint64(b[216:], uint64(s.ZeroOffset))
	be.PutUint64(b[224:], uint64(s.ZeroBytes))
	be.PutUint64(b[232:], s.Committed)
	for i, g := range s.Generations {
		p := b[offsetGens+i*generationBytes:]
		be.PutUint64(p[0:], g.ID)
		be.PutUint64(p[8:], g.Parent)
		be.PutUint64(p[16:], g.Fork)
		be.PutUint64(p[24:], uint64(g.Began.UnixNano()))
		if g.Rollback {
			be.PutUint64(p[32:], flagRollback)
		}
	}
	be.PutUint32(b[offsetCRC:], crc32.Checksum(b[:offsetCRC], castagnoli))
	return b
}

// Decode reads the SuperblockBytes of b. Its error is one of ErrNoMagic, ErrDamaged and ErrNewer, wrapped.
func Decode(b []byte) (*Superblock, error) {
	be := binary.BigEndian
	switch {
	case len(b) != SuperblockBytes:
		return nil, fmt.Errorf("%w: %d bytes instead of %d", ErrDamaged, len(b), SuperblockBytes)
	case string(b[:8]) != magic:
		return nil, ErrNoMagic
	case be.Uint32(b[offsetCRC:]) != crc32.Checksum(b[:offsetCRC], castagnoli):
		return nil, fmt.Errorf("%w: wrong checksum", ErrDamaged)
	case be.Uint32(b[8:]) > Version:
		return nil, fmt.Errorf("%w: version %d, this program knows %d", ErrNewer, be.Uint32(b[8:]), Version)
	case be.Uint32(b[8:]) != Version || be.Uint32(b[12:])&^(flagClean|flagVolatile) != 0:
		return nil, fmt.Errorf("%w: version %d, flags %#x", ErrDamaged, be.Uint32(b[8:]), be.Uint32(b[12:]))
	}
	n := be.Uint32(b[156:])
	if n > MaxGenerations {
		return nil, fmt.Errorf("%w: %d generations", ErrDamaged, n)
	}
	if !isZero(b[offsetReserved1:offsetGens]) || !isZero(b[offsetGens+n*generationBytes:offsetCRC]) {
		return nil, fmt.Errorf("%w: reserved bytes are not zero", ErrDamaged)
	}
	name, padding, _ := bytes.Cut(b[offsetName:offsetName+MaxNameBytes], []byte{0})
	if !isZero(padding) {
		return nil, fmt.Errorf("%w: name %q", ErrDamaged, b[offsetName:offsetName+MaxNameBytes])
	}
	s := &Superblock{
		Sequence:      be.Uint64(b[16:]),
		UUID:          UUID(b[24:40]),
		Name:          string(name),
		VolumeBytes:   int64(be.Uint64(b[104:])),
		MetadataBytes: int64(be.Uint64(b[112:])),
		AreaOffset:    int64(be.Uint64(b[120:])),
		Incarnation:   Incarnation{Counter: be.Uint64(b[128:]), Stamp: be.Uint64(b[136:])},
		Journal:       Kind(be.Uint32(b[152:])),
		Clean:         be.Uint32(b[12:])&flagClean != 0,
		Volatile:      be.Uint32(b[12:])&flagVolatile != 0,
		WrittenAt:     time.Unix(0, int64(be.Uint64(b[144:]))).UTC(),
		RingOffset:    int64(be.Uint64(b[160:])),
		RingBytes:     int64(be.Uint64(b[168:])),
		RingStamp:     be.Uint64(b[176:]),
		BitmapOffset:  int64(be.Uint64(b[184:])),
		BitmapBytes:   int64(be.Uint64(b[192:])),
		RegionBytes:   int64(be.Uint64(b[200:])),
		DataBytes:     int64(be.Uint64(b[208:])),
		ZeroOffset:    int64(be.Uint64(b[216:])),
		ZeroBytes:     int64(be.Uint64(b[224:])),
		Committed:     be.Uint64(b[232:]),
	}
	for i := range int(n) {
		p := b[offsetGens+i*generationBytes:]
		if flags := be.Uint64(p[32:]); flags&^flagRollback != 0 {
			return nil, fmt.Errorf("%w: generation %d has flags %#x", ErrDamaged, i, flags)
		}
		s.Generations = append(s.Generations, Generation{
			ID: be.Uint64(p[0:]), Parent: be.Uint64(p[8:]), Fork: be.Uint64(p[16:]),
			Began: time.Unix(0, int64(be.Uint64(p[24:]))).UTC(), Rollback: be.Uint64(p[32:])&flagRollback != 0,
		})
	}
	if err := s.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return s, nil
}

// Validate reports the first field that the format does not allow.
func (s *Superblock) Validate() error {
	switch {
	case s.UUID == UUID{}:
		return errors.New("volume UUID is zero")
	case ValidateName(s.Name) != nil:
		return ValidateName(s.Name)
	case s.VolumeBytes <= 0 || s.VolumeBytes > MaxVolumeBytes || s.VolumeBytes%SectorBytes != 0:
		return fmt.Errorf("volume size %d is not a positive multiple of %d up to %d", s.VolumeBytes, SectorBytes, int64(MaxVolumeBytes))
	case s.MetadataBytes < AreaBytes || s.MetadataBytes%SuperblockBytes != 0:
		return fmt.Errorf("metadata size %d is not a multiple of %d from %d on", s.MetadataBytes, SuperblockBytes, AreaBytes)
	case s.AreaOffset < 0 || s.AreaOffset > math.MaxInt64-AreaBytes || s.AreaOffset%SuperblockBytes != 0:
		return fmt.Errorf("offset %d of the superblock area is not a multiple of %d", s.AreaOffset, SuperblockBytes)
	case s.Journal > KindExternal:
		return fmt.Errorf("journal kind %d is unknown", s.Journal)
	case s.AreaOffset < s.MetadataBytes-AreaBytes:
		return fmt.Errorf("%d bytes of metadata do not fit a backing with its superblock area at %d", s.MetadataBytes, s.AreaOffset)
	case s.Journal != KindExternal && s.VolumeBytes > s.MetadataOffset():
		return fmt.Errorf("volume of %d bytes does not end before %d bytes of metadata with their superblock area at %d",
			s.VolumeBytes, s.MetadataBytes, s.AreaOffset)
	case s.Journal == KindExternal && s.DataBytes < s.VolumeBytes || s.Journal != KindExternal && s.DataBytes != 0:
		return fmt.Errorf("backing with the data of %d bytes does not go with a volume of %d and journal %s", s.DataBytes, s.VolumeBytes, s.Journal)
	case s.ZeroOffset < 0 || s.ZeroBytes < 0 || s.ZeroOffset > s.room() || s.ZeroBytes > s.room()-s.ZeroOffset ||
		s.ZeroOffset%SectorBytes != 0 || s.ZeroBytes%SectorBytes != 0:
		return fmt.Errorf("pending zero of %d bytes at %d is not in the room of %d for the volume", s.ZeroBytes, s.ZeroOffset, s.room())
	case len(s.Generations) > MaxGenerations:
		return fmt.Errorf("%d generations are more than %d", len(s.Generations), MaxGenerations)
	}
	for i, g := range s.Generations {
		if g.ID == 0 {
			return fmt.Errorf("generation %d has id 0", i)
		}
	}
	return s.validateLayout()
}

// validateLayout reports metadata that do not lie one behind the other, from their start to the superblock area.
func (s *Superblock) validateLayout() error {
	end := s.AreaOffset
	if s.Journal == KindNone {
		if s.RingOffset != 0 || s.RingBytes != 0 || s.RingStamp != 0 {
			return fmt.Errorf("ring of %d bytes at %d in a volume without journal", s.RingBytes, s.RingOffset)
		}
	} else {
		if s.RingBytes < MinRingBytes || s.RingBytes > MaxRingBytes || s.RingBytes%BlockBytes != 0 {
			return fmt.Errorf("ring of %d bytes is not a multiple of %d from %d to %d", s.RingBytes, BlockBytes, MinRingBytes, int64(MaxRingBytes))
		}
		if end -= s.RingBytes; s.RingOffset != end {
			return fmt.Errorf("ring of %d bytes at %d does not end at the superblock area at %d", s.RingBytes, s.RingOffset, s.AreaOffset)
		}
	}
	switch {
	case s.RegionBytes != RegionBytes(s.VolumeBytes):
		return fmt.Errorf("region of %d bytes does not go with a volume of %d", s.RegionBytes, s.VolumeBytes)
	case s.BitmapBytes != bitmapBytes(s.VolumeBytes):
		return fmt.Errorf("bitmap of %d bytes does not go with a volume of %d", s.BitmapBytes, s.VolumeBytes)
	case s.BitmapOffset != end-s.BitmapBytes || s.BitmapOffset != s.MetadataOffset():
		return fmt.Errorf("bitmap of %d bytes at %d does not begin the metadata at %d and end at %d", s.BitmapBytes, s.BitmapOffset, s.MetadataOffset(), end)
	}
	return nil
}

// ValidateName reports why name cannot be a volume's.
func ValidateName(name string) error {
	switch {
	case name == "" || len(name) > MaxNameBytes:
		return fmt.Errorf("name %q has %d bytes, must have 1 to %d", name, len(name), MaxNameBytes)
	case !utf8.ValidString(name) || bytes.IndexByte([]byte(name), 0) >= 0:
		return fmt.Errorf("name %q is not UTF-8 without NUL", name)
	}
	return nil
}

// MetadataOffset is where the metadata begin in the backing: the end of the room for the volume.
func (s *Superblock) MetadataOffset() int64 { return s.AreaOffset + AreaBytes - s.MetadataBytes }

// room is what a volume may have of the backing with the data.
func (s *Superblock) room() int64 {
	if s.Journal == KindExternal {
		return s.DataBytes
	}
	return s.MetadataOffset()
}

// Begin makes s that of the next opening for writing: a new incarnation, not clean.
func (s *Superblock) Begin() {
	var stamp [8]byte
	_, _ = rand.Read(stamp[:]) // never fails (crypto/rand)
	s.Incarnation.Counter++
	s.Incarnation.Stamp = binary.BigEndian.Uint64(stamp[:])
	s.Clean = false
}

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
