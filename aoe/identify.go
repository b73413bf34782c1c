package aoe

import (
	"encoding/binary"
	"strings"
)

// Identity is what a target says of itself in its answer to IDENTIFY DEVICE (ATA/ATAPI-8 7.16).
type Identity struct {
	Serial   string // at most 20 characters
	Firmware string // at most 8
	Model    string // at most 40
	Sectors  uint64
	LBA48    bool
	Flush    bool // FLUSH CACHE, 0xE7
	FlushExt bool // FLUSH CACHE EXT, 0xEA
	// WriteCache: answered writes may still be lost when the target loses its power.
	WriteCache bool
}

// Words of the answer; strings are pairs of bytes, swapped.
const (
	wordSerial     = 10
	wordFirmware   = 23
	wordModel      = 27
	wordLBA28      = 60
	wordSupported  = 83
	wordCache      = 85
	wordEnabled    = 86
	wordLBA48      = 100
	bitWriteCache  = 1 << 5
	bitLBA48       = 1 << 10
	bitFlush       = 1 << 12
	bitFlushExt    = 1 << 13
	maskValid      = 0xC000
	valid          = 0x4000
	serialBytes    = 20
	firmwareBytes  = 8
	modelBytes     = 40
	lba28Max       = 1 << 28
	lba48Max       = 1 << 48
	identifyLength = SectorBytes
)

// ParseIdentity reads the 512 bytes of the answer; more may follow. ErrShort; ErrLength where the size is none.
func ParseIdentity(data []byte) (id Identity, err error) {
	if len(data) < identifyLength {
		return id, ErrShort
	}
	word := func(n int) uint16 { return binary.LittleEndian.Uint16(data[2*n:]) }
	supported := word(wordSupported)
	if supported&maskValid != valid {
		supported = 0 // the word is not filled in
	}
	enabled := word(wordEnabled)
	id = Identity{
		Serial:     swapped(data[2*wordSerial:][:serialBytes]),
		Firmware:   swapped(data[2*wordFirmware:][:firmwareBytes]),
		Model:      swapped(data[2*wordModel:][:modelBytes]),
		LBA48:      (supported|enabled)&bitLBA48 != 0,
		Flush:      supported&bitFlush != 0,
		FlushExt:   supported&bitFlushExt != 0,
		WriteCache: word(wordCache)&bitWriteCache != 0,
	}
	id.Sectors = uint64(binary.LittleEndian.Uint32(data[2*wordLBA28:]))
	limit := uint64(lba28Max)
	if id.LBA48 {
		id.Sectors, limit = binary.LittleEndian.Uint64(data[2*wordLBA48:]), lba48Max
	}
	if id.Sectors == 0 || id.Sectors > limit {
		return id, ErrLength
	}
	return id, nil
}

// Put writes the answer into the first 512 bytes of data, which are cleared before.
func (id *Identity) Put(data []byte) {
	data = data[:identifyLength]
	clear(data)
	word := func(n int, v uint16) { binary.LittleEndian.PutUint16(data[2*n:], v) }
	swap(data[2*wordSerial:][:serialBytes], id.Serial)
	swap(data[2*wordFirmware:][:firmwareBytes], id.Firmware)
	swap(data[2*wordModel:][:modelBytes], id.Model)
	bits := uint16(0)
	for _, b := range []struct {
		on  bool
		bit uint16
	}{{id.LBA48, bitLBA48}, {id.Flush, bitFlush}, {id.FlushExt, bitFlushExt}} {
		if b.on {
			bits |= b.bit
		}
	}
	word(wordSupported, valid|bits)
	word(wordEnabled, bits)
	if id.WriteCache {
		word(wordCache, bitWriteCache)
	}
	binary.LittleEndian.PutUint32(data[2*wordLBA28:], uint32(min(id.Sectors, lba28Max-1)))
	if id.LBA48 {
		binary.LittleEndian.PutUint64(data[2*wordLBA48:], id.Sectors)
	}
}

// swapped is the text of a field, without the spaces at its ends and without what cannot be printed.
func swapped(b []byte) string {
	var s strings.Builder
	for i := range b {
		if c := b[i^1]; c >= ' ' && c <= '~' {
			s.WriteByte(c)
		}
	}
	return strings.TrimSpace(s.String())
}

// swap fills the field with s, cut or followed by spaces.
func swap(b []byte, s string) {
	for i := range b {
		b[i^1] = ' '
		if i < len(s) {
			b[i^1] = s[i]
		}
	}
}
