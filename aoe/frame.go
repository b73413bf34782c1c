package aoe

import "encoding/binary"

// Command is what a frame is about.
type Command uint8

// Commands. 0xF0 and above are a vendor's.
const (
	CommandATA     Command = 0
	CommandConfig  Command = 1
	CommandMask    Command = 2
	CommandReserve Command = 3
)

// Flags are the low half of the byte that also holds the version.
type Flags uint8

// Flags of the header.
const (
	FlagResponse Flags = 0x08
	FlagError    Flags = 0x04
)

// ErrorCode is why a target refused a frame; valid with FlagError.
type ErrorCode uint8

// Error codes.
const (
	ErrorCommand     ErrorCode = 1
	ErrorArgument    ErrorCode = 2
	ErrorUnavailable ErrorCode = 3
	ErrorConfigSet   ErrorCode = 4
	ErrorVersion     ErrorCode = 5
	ErrorReserved    ErrorCode = 6
)

// String is the code in words.
func (e ErrorCode) String() string {
	switch e {
	case ErrorCommand:
		return "unrecognized command"
	case ErrorArgument:
		return "bad argument"
	case ErrorUnavailable:
		return "device unavailable"
	case ErrorConfigSet:
		return "config string present"
	case ErrorVersion:
		return "unsupported version"
	case ErrorReserved:
		return "target is reserved"
	}
	return "unknown error"
}

// Frame is a frame to be sent in two parts, so that data need not be copied behind its header. Either may be empty.
type Frame struct {
	Head, Data []byte
}

// Header is what all frames begin with.
type Header struct {
	Dst, Src MAC
	Version  uint8 // some targets send 0 in responses
	Flags    Flags
	Error    ErrorCode
	Address  Address
	Command  Command
	Tag      uint32 // the initiator's; a response repeats it
}

// Append appends the header.
func (h *Header) Append(b []byte) []byte {
	b = append(b, h.Dst[:]...)
	b = append(b, h.Src[:]...)
	b = binary.BigEndian.AppendUint16(b, EtherType)
	b = append(b, h.Version<<4|uint8(h.Flags&0x0F), uint8(h.Error))
	b = binary.BigEndian.AppendUint16(b, h.Address.Shelf)
	b = append(b, h.Address.Slot, uint8(h.Command))
	return binary.BigEndian.AppendUint32(b, h.Tag)
}

// ParseHeader reads the header of a frame. ErrShort, ErrType.
func ParseHeader(frame []byte) (h Header, err error) {
	if len(frame) < HeaderBytes {
		return h, ErrShort
	}
	if binary.BigEndian.Uint16(frame[12:]) != EtherType {
		return h, ErrType
	}
	copy(h.Dst[:], frame)
	copy(h.Src[:], frame[6:])
	h.Version, h.Flags = frame[14]>>4, Flags(frame[14]&0x0F)
	h.Error = ErrorCode(frame[15])
	h.Address = Address{Shelf: binary.BigEndian.Uint16(frame[16:]), Slot: frame[18]}
	h.Command = Command(frame[19])
	h.Tag = binary.BigEndian.Uint32(frame[20:])
	return h, nil
}

// Pad appends zeroes up to MinFrameBytes.
func Pad(frame []byte) []byte {
	var zeroes [MinFrameBytes]byte
	if len(frame) >= MinFrameBytes {
		return frame
	}
	return append(frame, zeroes[len(frame):]...)
}

// argument checks that the frame has the command and bytes for its fixed argument.
func argument(frame []byte, c Command, bytes int) error {
	if len(frame) < bytes {
		return ErrShort
	}
	if Command(frame[19]) != c {
		return ErrCommand
	}
	return nil
}
