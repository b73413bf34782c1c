package nbd

import (
	"encoding/binary"
	"syscall"
)

// replyMode is the form of replies that the negotiation agreed on.
type replyMode uint8

const (
	repliesSimple replyMode = iota
	repliesStructured
	repliesExtended
)

// terms are what a request is measured by: the export as it was when the client chose it, and what the
// negotiation agreed on.
type terms struct {
	size       uint64 // bytes
	maxPayload uint64 // bytes
	flags      TransmissionFlags
	mode       replyMode
	contexts   uint32 // selected metadata contexts, bit i for Export.Contexts[i]
}

// requestBytes is the length of the header of a request, in bytes.
func (t *terms) requestBytes() int {
	if t.mode == repliesExtended {
		return sizeExtendedRequest
	}
	return sizeRequest
}

// header is a request as it was received.
type header struct {
	command  Command
	flags    CommandFlags
	cookie   uint64
	offset   uint64
	length   uint64 // of the payload with CmdFlagPayloadLen and in compact writes, else the effect length
	contexts uint32 // BLOCK_STATUS: what is asked for
}

// decodeHeader reads the header at the start of b, which holds requestBytes bytes at least. It reports false when
// no request begins there.
func (t *terms) decodeHeader(b []byte, h *header) bool {
	magic := binary.BigEndian.Uint32(b)
	h.flags = CommandFlags(binary.BigEndian.Uint16(b[4:]))
	h.command = Command(binary.BigEndian.Uint16(b[6:]))
	h.cookie = binary.BigEndian.Uint64(b[8:])
	h.offset = binary.BigEndian.Uint64(b[16:])
	h.contexts = t.contexts
	if t.mode == repliesExtended {
		h.length = binary.BigEndian.Uint64(b[24:])
		if h.command == CmdWrite {
			// It is required there; qemu's client up to 10.0 at least sends the payload without announcing it.
			h.flags |= CmdFlagPayloadLen
		}
		return magic == magicExtendedRequest
	}
	h.length = uint64(binary.BigEndian.Uint32(b[24:]))
	return magic == magicRequest
}

// payloadBytes is how many bytes follow the header.
func (t *terms) payloadBytes(h *header) uint64 {
	if t.mode == repliesExtended {
		if h.flags&CmdFlagPayloadLen != 0 {
			return h.length
		}
		return 0
	}
	if h.command == CmdWrite {
		return h.length
	}
	return 0
}

// writing reports whether c may change data.
func writing(c Command) bool {
	return c == CmdWrite || c == CmdTrim || c == CmdWriteZeroes
}

// applicableFlags are the flags that each command may carry, FUA included, which is legal everywhere (proto.md,
// "Command flags").
var applicableFlags = [...]CommandFlags{
	CmdRead:        CmdFlagFUA | CmdFlagDF,
	CmdWrite:       CmdFlagFUA | CmdFlagPayloadLen,
	CmdDisc:        CmdFlagFUA,
	CmdFlush:       CmdFlagFUA,
	CmdTrim:        CmdFlagFUA,
	CmdCache:       CmdFlagFUA,
	CmdWriteZeroes: CmdFlagFUA | CmdFlagNoHole | CmdFlagFastZero,
	CmdBlockStatus: CmdFlagFUA | CmdFlagReqOne | CmdFlagPayloadLen,
}

// validate judges a request before anything is done for it; 0 means that a device may see it. The order of the
// questions is fixed: what is it, where is it, how is it asked for, how much is it, may it (proto.md, "Error
// values": ENOSPC for writes past the end goes before the other errors).
func (t *terms) validate(h *header) syscall.Errno {
	if h.command > CmdBlockStatus || h.command == CmdDisc || !t.payloadExpected(h) {
		return syscall.EINVAL
	}
	if err := t.validateRange(h); err != 0 {
		return err
	}
	if err := t.validateFlags(h); err != 0 {
		return err
	}
	switch h.command {
	case CmdRead:
		if h.length > t.maxPayload {
			return syscall.EOVERFLOW
		}
	case CmdWrite:
		if h.length > t.maxPayload {
			return syscall.EINVAL
		}
	case CmdBlockStatus:
		if h.contexts == 0 || h.length == 0 {
			return syscall.EINVAL
		}
	}
	if writing(h.command) && t.flags&FlagReadOnly != 0 {
		return syscall.EPERM
	}
	return 0
}

// payloadExpected reports whether the request has a payload where it must, and none where it must not. A payload
// of BLOCK_STATUS has been taken out of the header before, and its flag with it.
func (t *terms) payloadExpected(h *header) bool {
	announced := h.flags&CmdFlagPayloadLen != 0
	return announced == (t.mode == repliesExtended && h.command == CmdWrite)
}

func (t *terms) validateRange(h *header) syscall.Errno {
	if h.command == CmdFlush {
		if h.offset != 0 || h.length != 0 {
			return syscall.EINVAL
		}
		return 0
	}
	if h.offset <= t.size && h.length <= t.size-h.offset {
		return 0
	}
	if h.command == CmdWrite || h.command == CmdWriteZeroes {
		return syscall.ENOSPC
	}
	return syscall.EINVAL
}

func (t *terms) validateFlags(h *header) syscall.Errno {
	if h.flags&^applicableFlags[h.command] != 0 ||
		h.flags&CmdFlagDF != 0 && t.flags&FlagSendDF == 0 ||
		h.flags&CmdFlagFastZero != 0 && t.flags&FlagSendFastZero == 0 && t.flags&FlagReadOnly == 0 {
		return syscall.EINVAL
	}
	return 0
}

// maxStatusPayload is the longest payload of BLOCK_STATUS that can be valid.
const maxStatusPayload = 8 + 4*maxContexts

// decodeStatusPayload turns the payload form of BLOCK_STATUS into the plain one: effect length and contexts
// (proto.md, extension-ext-header, NBD_CMD_BLOCK_STATUS). It reports false when the payload is invalid; the flag then
// stays, and validate refuses the request.
func (t *terms) decodeStatusPayload(h *header, b []byte) bool {
	if t.flags&FlagBlockStatusPayload == 0 || len(b) < 8+4 || len(b) > maxStatusPayload || len(b)%4 != 0 {
		return false
	}
	length := binary.BigEndian.Uint64(b)
	h.contexts = 0
	for b = b[8:]; len(b) > 0; b = b[4:] {
		id := binary.BigEndian.Uint32(b)
		if id == 0 || id > maxContexts || t.contexts>>(id-1)&1 == 0 || h.contexts>>(id-1)&1 == 1 {
			return false
		}
		h.contexts |= 1 << (id - 1)
	}
	h.flags &^= CmdFlagPayloadLen
	h.length = length
	return true
}
