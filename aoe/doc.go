// Package aoe is the wire format of ATA over Ethernet (AoEr11, S. Hopkins and B. Coile, 2009): frames of the four
// commands, and the names of targets.
//
// A frame is the Ethernet header of 14 bytes, the AoE header of 10, the argument of the command, and data. Decoding
// reads from a byte slice and never past it; what it returns refers into that slice. Encoding appends to one. Neither
// allocates where there is room, and all functions are safe for concurrent use on distinct slices. All numbers are
// big-endian but the LBA, whose bytes go least significant first.
//
// The protocol has no connections, no order, no sequence numbers and no authentication: what a frame says is a claim.
package aoe

import "errors"

// Numbers of the format.
const (
	// EtherType is the Ethernet type of every frame.
	EtherType = 0x88A2
	// Version is the version of the protocol.
	Version = 1
	// SectorBytes is what LBAs and counts count.
	SectorBytes = 512
	// MinFrameBytes is the shortest frame that goes out: some peers ignore shorter ones, and virtual interfaces do
	// not pad.
	MinFrameBytes = 60
	// EthernetBytes is the Ethernet header, which an MTU does not count.
	EthernetBytes = 14
	// HeaderBytes is the Ethernet header and the AoE header.
	HeaderBytes = 24
	// ATABytes, ConfigBytes, MaskBytes and ReserveBytes are the header and the fixed argument of each command.
	ATABytes     = 36
	ConfigBytes  = 32
	MaskBytes    = 28
	ReserveBytes = 26

	// MaxConfigBytes is the longest config string.
	MaxConfigBytes = 1024
	// MaxSectors is the most that the count of an ATA frame can say.
	MaxSectors = 255
	// UserTag is the bit of a tag that initiators outside the kernel set: Linux ignores responses that have it, so
	// that it does not take them for its own.
	UserTag = 1 << 31

	directiveBytes = 8
)

// Errors of decoding. They are values without detail, so that frames of strangers cost no allocation.
var (
	// ErrShort: the frame ends before what it announces.
	ErrShort = errors.New("aoe: the frame is too short")
	// ErrType: the frame is none of AoE.
	ErrType = errors.New("aoe: wrong Ethernet type")
	// ErrCommand: the frame has another command than the one asked for.
	ErrCommand = errors.New("aoe: wrong command")
	// ErrLength: a length in the frame is above what the format allows.
	ErrLength = errors.New("aoe: a length is out of range")
)

// SectorsIn is how many sectors of data a frame on a link of that MTU in bytes carries, 0..255. Like all implementations it
// counts the Ethernet header, although the MTU does not, so that both ends find the same.
func SectorsIn(mtu int) int {
	return min(max((mtu-ATABytes)/SectorBytes, 0), MaxSectors)
}
