package nbd

import (
	"fmt"
	"syscall"
)

// Magic numbers of the protocol (proto.md, "Protocol phases" and "Transmission").
const (
	magicGreeting        uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption          uint64 = 0x49484156454f5054 // "IHAVEOPT"
	magicOptionReply     uint64 = 0x0003e889045565a9
	magicRequest         uint32 = 0x25609513
	magicExtendedRequest uint32 = 0x21e41c71
	magicSimpleReply     uint32 = 0x67446698
	magicStructuredReply uint32 = 0x668e33ef
	magicExtendedReply   uint32 = 0x6e8a278c
)

// Sizes of the fixed parts of messages, in bytes.
const (
	sizeGreeting        = 18
	sizeOption          = 16
	sizeOptionReply     = 20
	sizeRequest         = 28
	sizeExtendedRequest = 32
	sizeSimpleReply     = 16
	sizeStructuredReply = 20
	sizeExtendedReply   = 32
)

// Handshake flags of the greeting; the client answers with the same bits (proto.md, "Handshake flags").
const (
	flagFixedNewstyle uint16 = 1 << 0
	flagNoZeroes      uint16 = 1 << 1
)

// Option is the number of a request of the negotiation (proto.md, "Option types").
type Option uint32

// The options of the protocol, and our own.
const (
	OptExportName      Option = 1
	OptAbort           Option = 2
	OptList            Option = 3
	OptStartTLS        Option = 5
	OptInfo            Option = 6
	OptGo              Option = 7
	OptStructuredReply Option = 8
	OptListMetaContext Option = 9
	OptSetMetaContext  Option = 10
	OptExtendedHeaders Option = 11

	// OptSession names the session of one of our own clients, so that a connection that its client has
	// replaced is fenced before the new one is served. "RSHS"; its content is type session.
	OptSession Option = 0x52534853
)

// optionReply is the type of an answer to an option (proto.md, "Option reply types").
type optionReply uint32

const (
	repAck         optionReply = 1
	repServer      optionReply = 2
	repInfo        optionReply = 3
	repMetaContext optionReply = 4
	// repSession answers OptSession with the generation and incarnation of the volume.
	repSession optionReply = 0x52534853

	repError            optionReply = 1 << 31
	repErrUnsup         optionReply = repError + 1
	repErrPolicy        optionReply = repError + 2
	repErrInvalid       optionReply = repError + 3
	repErrPlatform      optionReply = repError + 4
	repErrTLSReqd       optionReply = repError + 5
	repErrUnknown       optionReply = repError + 6
	repErrShutdown      optionReply = repError + 7
	repErrBlockSizeReqd optionReply = repError + 8
	repErrTooBig        optionReply = repError + 9
	repErrExtHeaderReqd optionReply = repError + 10
)

// Information types of INFO and GO (proto.md, "NBD_INFO_*").
const (
	infoExport      uint16 = 0
	infoName        uint16 = 1
	infoDescription uint16 = 2
	infoBlockSize   uint16 = 3
)

// TransmissionFlags tell a client what an export can do (proto.md, "Transmission flags").
type TransmissionFlags uint16

// The transmission flags.
const (
	FlagHasFlags           TransmissionFlags = 1 << 0
	FlagReadOnly           TransmissionFlags = 1 << 1
	FlagSendFlush          TransmissionFlags = 1 << 2
	FlagSendFUA            TransmissionFlags = 1 << 3
	FlagRotational         TransmissionFlags = 1 << 4
	FlagSendTrim           TransmissionFlags = 1 << 5
	FlagSendWriteZeroes    TransmissionFlags = 1 << 6
	FlagSendDF             TransmissionFlags = 1 << 7
	FlagCanMultiConn       TransmissionFlags = 1 << 8
	FlagSendCache          TransmissionFlags = 1 << 10
	FlagSendFastZero       TransmissionFlags = 1 << 11
	FlagBlockStatusPayload TransmissionFlags = 1 << 12
)

// Command is the type of a request of the transmission phase (proto.md, "Request types").
type Command uint16

// The commands.
const (
	CmdRead        Command = 0
	CmdWrite       Command = 1
	CmdDisc        Command = 2
	CmdFlush       Command = 3
	CmdTrim        Command = 4
	CmdCache       Command = 5
	CmdWriteZeroes Command = 6
	CmdBlockStatus Command = 7
)

var commandNames = [...]string{"read", "write", "disc", "flush", "trim", "cache", "write-zeroes", "block-status"}

// String gives the command in the words of proto.md.
func (c Command) String() string {
	if int(c) < len(commandNames) {
		return commandNames[c]
	}
	return fmt.Sprintf("command-%d", uint16(c))
}

// CommandFlags modify one request (proto.md, "Command flags").
type CommandFlags uint16

// The command flags.
const (
	CmdFlagFUA        CommandFlags = 1 << 0
	CmdFlagNoHole     CommandFlags = 1 << 1
	CmdFlagDF         CommandFlags = 1 << 2
	CmdFlagReqOne     CommandFlags = 1 << 3
	CmdFlagFastZero   CommandFlags = 1 << 4
	CmdFlagPayloadLen CommandFlags = 1 << 5
)

// Chunk types of structured and extended replies (proto.md, "Structured reply types").
const (
	chunkFlagDone uint16 = 1 << 0

	chunkNone           uint16 = 0
	chunkOffsetData     uint16 = 1
	chunkOffsetHole     uint16 = 2
	chunkBlockStatus    uint16 = 5
	chunkBlockStatusExt uint16 = 6
	chunkError          uint16 = 0x8001
	chunkErrorOffset    uint16 = 0x8002
)

// Flags of the extents of base:allocation (proto.md, "base:allocation metadata context").
const (
	StateHole uint32 = 1 << 0
	StateZero uint32 = 1 << 1
)

// maxString is the longest name, query or text of the protocol, in bytes (proto.md, "Values").
const maxString = 4096

// wireErrno is the error of a reply for err: the errno itself where the protocol has it, the nearest one where
// it has not (proto.md, "Error values"). It is the only place where errors become protocol numbers.
func wireErrno(err syscall.Errno) uint32 {
	switch err {
	case 0:
		return 0
	case syscall.EPERM, syscall.EROFS:
		return uint32(syscall.EPERM)
	case syscall.ENOMEM, syscall.EINVAL, syscall.EOVERFLOW, syscall.ENOTSUP, syscall.ESHUTDOWN:
		return uint32(err)
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return uint32(syscall.ENOSPC)
	}
	return uint32(syscall.EIO)
}
