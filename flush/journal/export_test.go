package journal

import (
	"encoding/binary"
	"hash/crc32"
)

// PutChecksum puts the right checksum on a superblock.
func PutChecksum(b []byte) {
	binary.BigEndian.PutUint32(b[offsetCRC:], crc32.Checksum(b[:offsetCRC], castagnoli))
}
