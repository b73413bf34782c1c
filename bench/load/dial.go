package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The bytes of the protocol are spelled out here, and not taken from the server's package, so that the
// generator measures what is on the wire and nothing that both ends happen to agree on.
const (
	magicGreeting    = 0x4e42444d41474943
	magicOption      = 0x49484156454f5054
	magicOptionReply = 0x0003e889045565a9
	magicRequest     = 0x25609513
	magicSimple      = 0x67446698
	magicStructured  = 0x668e33ef

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optGo              = 7
	optStructuredReply = 8

	replyAck   = 1
	replyInfo  = 3
	replyError = 1 << 31
	infoExport = 0

	commandRead       = 0
	commandWrite      = 1
	commandDisconnect = 2

	sizeRequest    = 28
	sizeSimple     = 16
	sizeStructured = 20

	chunkDone       = 1 << 0
	chunkNone       = 0
	chunkOffsetData = 1
	chunkOffsetHole = 2
	chunkError      = 1 << 15
)

const (
	// handshakeTimeout bounds the negotiation, replyTimeout the wait for any byte of a reply.
	handshakeTimeout = 10 * time.Second
	replyTimeout     = 30 * time.Second
	// socketBytes is what is asked for as the socket's buffers; the kernel clips it.
	socketBytes = 2 << 20
	// maxOptionBytes bounds the data of one option reply.
	maxOptionBytes = 64 << 10
)

// ErrStructured is returned where structured replies were asked for and the server has none.
var ErrStructured = errors.New("server offers no structured replies")

// dial connects to t and negotiates. The descriptor that it returns blocks; size is the export's in bytes.
func dial(ctx context.Context, t Target, structured bool) (fd int, size uint64, err error) {
	dialer := net.Dialer{Timeout: handshakeTimeout}
	nc, err := dialer.DialContext(ctx, t.Network, t.Address)
	if err != nil {
		return -1, 0, fmt.Errorf("connect: %w", err)
	}
	defer nc.Close()
	if err := nc.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return -1, 0, fmt.Errorf("connect: %w", err)
	}
	if size, err = negotiate(nc, t.Export, structured); err != nil {
		return -1, 0, fmt.Errorf("negotiate with %s: %w", t.URI(), err)
	}
	if fd, err = descriptor(nc); err != nil {
		return -1, 0, fmt.Errorf("set up socket: %w", err)
	}
	return fd, size, nil
}

// descriptor gives a descriptor of the socket that belongs to the caller and whose calls block.
func descriptor(nc net.Conn) (int, error) {
	raw, err := nc.(syscall.Conn).SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	var dupErr error
	if err := raw.Control(func(p uintptr) { fd, dupErr = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return -1, err
	}
	if dupErr != nil {
		return -1, dupErr
	}
	timeout := unix.NsecToTimeval(int64(replyTimeout))
	err = errors.Join(
		unix.SetNonblock(fd, false),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, socketBytes),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
	)
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// negotiate goes through the handshake of a fixed newstyle server (proto.md, "Fixed newstyle negotiation").
func negotiate(rw io.ReadWriter, export string, structured bool) (size uint64, err error) {
	var greeting [18]byte
	if _, err := io.ReadFull(rw, greeting[:]); err != nil {
		return 0, fmt.Errorf("read greeting: %w", err)
	}
	flags := binary.BigEndian.Uint16(greeting[16:])
	if binary.BigEndian.Uint64(greeting[:]) != magicGreeting || binary.BigEndian.Uint64(greeting[8:]) != magicOption ||
		flags&flagFixedNewstyle == 0 {
		return 0, fmt.Errorf("greeting % x is not that of a fixed newstyle NBD server", greeting)
	}
	client := uint32(flags) & (flagFixedNewstyle | flagNoZeroes)
	if _, err := rw.Write(binary.BigEndian.AppendUint32(nil, client)); err != nil {
		return 0, fmt.Errorf("write client flags: %w", err)
	}
	if structured {
		_, err := option(rw, optStructuredReply, nil)
		if _, refused := errors.AsType[optionError](err); refused {
			return 0, ErrStructured
		}
		if err != nil {
			return 0, err
		}
	}
	data := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	data = append(data, export...)
	data = append(data, 0, 0) // no information asked for besides the export's
	return option(rw, optGo, data)
}

// optionError is a refused option: the type of the reply without its top bit.
type optionError uint32

func (e optionError) Error() string { return fmt.Sprintf("option refused with error %d", uint32(e)) }

// option sends one option and reads its replies to the last one. The size is that of NBD_INFO_EXPORT.
func option(rw io.ReadWriter, number uint32, data []byte) (size uint64, err error) {
	message := binary.BigEndian.AppendUint64(nil, magicOption)
	message = binary.BigEndian.AppendUint32(message, number)
	message = binary.BigEndian.AppendUint32(message, uint32(len(data)))
	if _, err := rw.Write(append(message, data...)); err != nil {
		return 0, fmt.Errorf("write option %d: %w", number, err)
	}
	for {
		kind, data, err := optionReply(rw, number)
		switch {
		case err != nil:
			return 0, err
		case kind == replyAck:
			return size, nil
		case kind&replyError != 0:
			return 0, fmt.Errorf("option %d: %w: %.200q", number, optionError(kind&^replyError), data)
		case kind == replyInfo && len(data) >= 10 && binary.BigEndian.Uint16(data) == infoExport:
			size = binary.BigEndian.Uint64(data[2:])
		}
	}
}

func optionReply(r io.Reader, number uint32) (kind uint32, data []byte, err error) {
	var header [20]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, nil, fmt.Errorf("read reply to option %d: %w", number, err)
	}
	n := binary.BigEndian.Uint32(header[16:])
	if binary.BigEndian.Uint64(header[:]) != magicOptionReply || binary.BigEndian.Uint32(header[8:]) != number || n > maxOptionBytes {
		return 0, nil, fmt.Errorf("reply to option %d is malformed: % x", number, header)
	}
	data = make([]byte, n)
	if _, err := io.ReadFull(r, data); err != nil {
		return 0, nil, fmt.Errorf("read reply to option %d: %w", number, err)
	}
	return binary.BigEndian.Uint32(header[12:]), data, nil
}
