package journal

import (
	"encoding/binary"
	"hash/crc32"
)

// PutChecksum puts the right checksum on a superblock.
func PutChecksum(b []byte) {
	binary.BigEndian.PutUint32(b[offsetCRC:], crc32.Checksum(b[:offsetCRC], castagnoli))
}

// PutChunkChecksum puts the right checksum on the header block of a chunk, or on a page of the intent bitmap.
func PutChunkChecksum(b []byte) {
	binary.BigEndian.PutUint32(b[chunkCRC:], crc32.Checksum(b[:chunkCRC], castagnoli))
}

// EncodeChunk is the header block of c.
func EncodeChunk(c *Chunk, stamp uint64) []byte {
	b := make([]byte, BlockBytes)
	c.encode(b, stamp)
	return b
}
