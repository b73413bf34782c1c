package main

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Numbers of the protocol (proto.md). They are spelled out here so that the floor shares no code with the
// server that is compared with it.
const (
	magicGreeting    = 0x4e42444d41474943
	magicOption      = 0x49484156454f5054
	magicOptionReply = 0x0003e889045565a9

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8

	replyAck    = 1
	replyServer = 2
	replyInfo   = 3
	replyUnsup  = 1<<31 + 1

	// transmissionFlags: HAS_FLAGS, SEND_FLUSH, SEND_FUA, CAN_MULTI_CONN.
	transmissionFlags = 1<<0 | 1<<2 | 1<<3 | 1<<8

	maxOptionBytes = 64 << 10
	maxOptions     = 64
)

// negotiate goes through the handshake and tells whether replies are to be structured. transmit is false where the
// client left instead of choosing the export.
func negotiate(rw io.ReadWriter, size int64) (structured, transmit bool, err error) {
	greeting := binary.BigEndian.AppendUint64(nil, magicGreeting)
	greeting = binary.BigEndian.AppendUint64(greeting, magicOption)
	greeting = binary.BigEndian.AppendUint16(greeting, flagFixedNewstyle|flagNoZeroes)
	if _, err := rw.Write(greeting); err != nil {
		return false, false, fmt.Errorf("write greeting: %w", err)
	}
	var flags [4]byte
	if _, err := io.ReadFull(rw, flags[:]); err != nil {
		return false, false, fmt.Errorf("read client flags: %w", err)
	}
	zeroes := binary.BigEndian.Uint32(flags[:])&flagNoZeroes == 0
	for range maxOptions {
		number, err := readOption(rw)
		if err != nil {
			return false, false, err
		}
		structured = structured || number == optStructuredReply
		if err := answerOption(rw, number, size, zeroes); err != nil {
			return false, false, fmt.Errorf("answer option %d: %w", number, err)
		}
		switch number {
		case optAbort:
			return false, false, nil
		case optGo, optExportName:
			return structured, true, nil
		}
	}
	return false, false, fmt.Errorf("client sent more than %d options", maxOptions)
}

// readOption reads one option; the floor has one export, so that it need not look at the data.
func readOption(r io.Reader) (number uint32, err error) {
	var header [16]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, fmt.Errorf("read option: %w", err)
	}
	n := binary.BigEndian.Uint32(header[12:])
	if binary.BigEndian.Uint64(header[:]) != magicOption || n > maxOptionBytes {
		return 0, fmt.Errorf("option is malformed: % x", header)
	}
	if _, err := io.CopyN(io.Discard, r, int64(n)); err != nil {
		return 0, fmt.Errorf("read option: %w", err)
	}
	return binary.BigEndian.Uint32(header[8:]), nil
}

func answerOption(w io.Writer, number uint32, size int64, zeroes bool) error {
	var answer []byte
	switch number {
	case optExportName:
		answer = binary.BigEndian.AppendUint64(nil, uint64(size))
		answer = binary.BigEndian.AppendUint16(answer, transmissionFlags)
		if zeroes {
			answer = append(answer, make([]byte, 124)...)
		}
	case optAbort, optStructuredReply:
		answer = appendReply(nil, number, replyAck, nil)
	case optList:
		answer = appendReply(nil, number, replyServer, []byte{0, 0, 0, 0}) // the name is ""
		answer = appendReply(answer, number, replyAck, nil)
	case optInfo, optGo:
		info := binary.BigEndian.AppendUint16(nil, 0) // NBD_INFO_EXPORT
		info = binary.BigEndian.AppendUint64(info, uint64(size))
		info = binary.BigEndian.AppendUint16(info, transmissionFlags)
		answer = appendReply(nil, number, replyInfo, info)
		answer = appendReply(answer, number, replyAck, nil)
	default:
		answer = appendReply(nil, number, replyUnsup, nil)
	}
	_, err := w.Write(answer)
	return err
}

func appendReply(b []byte, number, kind uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOptionReply)
	b = binary.BigEndian.AppendUint32(b, number)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}
