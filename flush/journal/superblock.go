// Package journal is the metadata that a volume keeps on its backing: the superblock.
//
// All of it lies in the metadata area at the tail of the backing, so that data stay at offset 0 and a backing
// that was stopped cleanly can be mounted without ramshelf.
//
// # Metadata area
//
// The superblock area is the last 1 MiB of the backing, its start rounded down to a multiple of 4096 bytes.
// Whatever metadata there are besides lie before it, the volume before those. All offsets are in bytes.
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
//	12      4       flags: bit 0 clean, the others zero
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
//	160     96      reserved, zero
//	256     1024    generations, the oldest first, 32 bytes each; unused ones are zero
//	1280    2812    reserved, zero
//	4092    4       CRC32C (Castagnoli) of bytes 0..4091
//
// A generation:
//
//	offset  length  field
//	0       8       id, not zero
//	8       8       id of the generation that it left, 0 for the first
//	16      8       fork: the number at which it left that one
//	24      8       began at: nanoseconds since 1970-01-01 UTC, signed
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
)

// MaxGenerations is how many generations a superblock remembers.
const MaxGenerations = 32

// Version is the version of the format that this package writes, and the newest that it reads.
const Version = 1

const (
	magic           = "RSHELFSB"
	flagClean       = 1 << 0
	offsetName      = 40
	offsetReserved1 = 160
	offsetGens      = 256
	generationBytes = 32
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
	KindInternal             // before the superblock area
	KindExternal             // on a backing of its own
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
	WrittenAt     time.Time // for people; to the nanosecond, UTC
	Generations   []Generation

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
	if s.Clean {
		be.PutUint32(b[12:], flagClean)
	}
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
	for i, g := range s.Generations {
		p := b[offsetGens+i*generationBytes:]
		be.PutUint64(p[0:], g.ID)
		be.PutUint64(p[8:], g.Parent)
		be.PutUint64(p[16:], g.Fork)
		be.PutUint64(p[24:], uint64(g.Began.UnixNano()))
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
	case be.Uint32(b[8:]) != Version || be.Uint32(b[12:])&^flagClean != 0:
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
		WrittenAt:     time.Unix(0, int64(be.Uint64(b[144:]))).UTC(),
	}
	for i := range int(n) {
		p := b[offsetGens+i*generationBytes:]
		s.Generations = append(s.Generations, Generation{
			ID: be.Uint64(p[0:]), Parent: be.Uint64(p[8:]), Fork: be.Uint64(p[16:]),
			Began: time.Unix(0, int64(be.Uint64(p[24:]))).UTC(),
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
	case s.VolumeBytes <= 0 || s.VolumeBytes%SectorBytes != 0:
		return fmt.Errorf("volume size %d is not a positive multiple of %d", s.VolumeBytes, SectorBytes)
	case s.MetadataBytes < AreaBytes || s.MetadataBytes%SuperblockBytes != 0:
		return fmt.Errorf("metadata size %d is not a multiple of %d from %d on", s.MetadataBytes, SuperblockBytes, AreaBytes)
	case s.AreaOffset < 0 || s.AreaOffset > math.MaxInt64-AreaBytes || s.AreaOffset%SuperblockBytes != 0:
		return fmt.Errorf("offset %d of the superblock area is not a multiple of %d", s.AreaOffset, SuperblockBytes)
	case s.AreaOffset < s.MetadataBytes-AreaBytes || s.VolumeBytes > s.MetadataOffset():
		return fmt.Errorf("volume of %d bytes does not end before %d bytes of metadata with their superblock area at %d",
			s.VolumeBytes, s.MetadataBytes, s.AreaOffset)
	case s.Journal > KindExternal:
		return fmt.Errorf("journal kind %d is unknown", s.Journal)
	case len(s.Generations) > MaxGenerations:
		return fmt.Errorf("%d generations are more than %d", len(s.Generations), MaxGenerations)
	}
	for i, g := range s.Generations {
		if g.ID == 0 {
			return fmt.Errorf("generation %d has id 0", i)
		}
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
