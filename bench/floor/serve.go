package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef

	commandRead       = 0
	commandWrite      = 1
	commandDisconnect = 2
	commandFlush      = 3

	sizeRequest = 28
	// minReply is the shortest header of a reply.
	minReply = 16

	chunkDone       = 1 << 0
	chunkNone       = 0
	chunkOffsetData = 1
	chunkError      = 1<<15 + 1

	// receiveBytes is how much one receive can bring beyond a payload that is being received; it stays
	// within a core's cache.
	receiveBytes = 256 << 10
	// maxReplies bounds the replies of one send: each has at most two vectors, and a send takes 1024.
	maxReplies = 512
	// socketBytes is what is asked for as the socket's buffer; the kernel clips it.
	socketBytes = 2 << 20
)

// errDisconnect ends a connection whose client said goodbye.
var errDisconnect = errors.New("client disconnected")

// conn is the transmission phase of one connection. It belongs to one thread.
type conn struct {
	fd         int
	device     []byte
	structured bool

	in     []byte
	filled int    // bytes at the start of in that wait for the rest of their message
	rest   []byte // the part of the device that takes the payload still to come
	owed   bool   // the reply of that payload
	cookie uint64

	headers []byte // of the noted replies, one behind the other
	used    int
	out     []unix.Iovec
	open    bool // the last vector of out is the end of headers[:used]
	message unix.Msghdr
	vectors [2]unix.Iovec
	receive unix.Msghdr
}

// serve negotiates with the client of nc and answers it until it leaves. It takes nc over.
func serve(nc net.Conn, device []byte) (err error) {
	structured, transmit, err := negotiate(nc, int64(len(device)))
	if err != nil || !transmit {
		return errors.Join(err, nc.Close())
	}
	fd, err := descriptor(nc)
	if err != nil {
		return errors.Join(fmt.Errorf("set up socket: %w", err), nc.Close())
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	// The runtime's poller would wake a thread for every byte that arrives as long as it watches the socket.
	if err := nc.Close(); err != nil {
		return fmt.Errorf("set up socket: %w", err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c := &conn{
		fd: fd, device: device, structured: structured,
		in:      make([]byte, receiveBytes),
		headers: make([]byte, maxReplies*minReply),
		out:     make([]unix.Iovec, 0, 2*maxReplies),
	}
	if err := c.run(); !errors.Is(err, errDisconnect) {
		return err
	}
	return nil
}

// descriptor gives a descriptor of the socket that belongs to the caller and whose calls block: a thread that
// waits in the kernel is woken sooner than a goroutine that waits for the poller.
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
	err = errors.Join(unix.SetNonblock(fd, false), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, socketBytes))
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// run is the whole server:
//
//  1. receive what has arrived, the rest of a payload straight into the device
//  2. parse every complete request, copy payloads, note the replies
//  3. send all replies with one call
func (c *conn) run() error {
	for {
		if err := c.fill(); err != nil {
			return err
		}
		err := c.parse()
		if err := c.flush(); err != nil {
			return err
		}
		if err != nil {
			return err
		}
	}
}

func (c *conn) fill() error {
	n := 0
	if len(c.rest) > 0 {
		c.vectors[0].Base = &c.rest[0]
		c.vectors[0].SetLen(len(c.rest))
		n = 1
	}
	c.vectors[n].Base = &c.in[c.filled]
	c.vectors[n].SetLen(len(c.in) - c.filled)
	c.receive.Iov = &c.vectors[0]
	c.receive.SetIovlen(n + 1)
	got, _, errno := unix.Syscall(unix.SYS_RECVMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&c.receive)), 0)
	switch {
	case errno == unix.EINTR:
		return nil
	case errno == unix.ECONNRESET, errno == 0 && got == 0:
		return errDisconnect
	case errno != 0:
		return fmt.Errorf("receive: %w", errno)
	}
	direct := min(int(got), len(c.rest))
	c.rest = c.rest[direct:]
	c.filled += int(got) - direct
	if len(c.rest) == 0 && c.owed {
		c.owed = false
		return c.reply(c.cookie, 0)
	}
	return nil
}

func (c *conn) parse() error {
	data := c.in[:c.filled]
	for len(data) >= sizeRequest && len(c.rest) == 0 {
		if binary.BigEndian.Uint32(data) != magicRequest {
			return fmt.Errorf("request begins with % x", data[:4])
		}
		payload := data[sizeRequest:]
		used, err := c.request(data[:sizeRequest], payload)
		if err != nil {
			return err
		}
		data = payload[used:]
	}
	c.filled = copy(c.in, data)
	return nil
}

// request does one request and gives how much of payload belongs to it.
func (c *conn) request(header, payload []byte) (used int, err error) {
	command := binary.BigEndian.Uint16(header[6:])
	cookie, offset := binary.BigEndian.Uint64(header[8:]), binary.BigEndian.Uint64(header[16:])
	length := binary.BigEndian.Uint32(header[24:])
	size := uint64(len(c.device))
	inside := offset <= size && uint64(length) <= size-offset
	switch {
	case command == commandDisconnect:
		return 0, errDisconnect
	case command == commandFlush:
		return 0, c.reply(cookie, 0)
	case command == commandWrite && !inside:
		return 0, fmt.Errorf("write of %d bytes at offset %d exceeds the device", length, offset)
	case command == commandWrite:
		place := c.device[offset:][:length]
		used = copy(place, payload)
		if c.rest = place[used:]; len(c.rest) > 0 {
			c.owed, c.cookie = true, cookie
			return used, nil
		}
		return used, c.reply(cookie, 0)
	case command != commandRead || !inside:
		return 0, c.reply(cookie, syscall.EINVAL)
	}
	return 0, c.data(cookie, offset, c.device[offset:][:length])
}

// header gives room for the n bytes of the header of the next reply, sending the earlier ones when it is full.
// Headers without data between them share a vector.
func (c *conn) header(n int) ([]byte, error) {
	if c.used+n > len(c.headers) {
		if err := c.flush(); err != nil {
			return nil, err
		}
	}
	h := c.headers[c.used:][:n]
	c.used += n
	if !c.open {
		c.vector(h)
		c.open = true
		return h, nil
	}
	last := &c.out[len(c.out)-1]
	last.SetLen(int(last.Len) + n)
	return h, nil
}

// reply notes an answer without data.
func (c *conn) reply(cookie uint64, errno syscall.Errno) error {
	if c.structured {
		return c.chunk(cookie, errno)
	}
	h, err := c.header(16)
	if err != nil {
		return err
	}
	binary.BigEndian.PutUint32(h, magicSimple)
	binary.BigEndian.PutUint32(h[4:], uint32(errno))
	binary.BigEndian.PutUint64(h[8:], cookie)
	return nil
}

// chunk notes a structured answer without data.
func (c *conn) chunk(cookie uint64, errno syscall.Errno) error {
	n, kind := 20, uint16(chunkNone)
	if errno != 0 {
		n, kind = 26, chunkError
	}
	h, err := c.header(n)
	if err != nil {
		return err
	}
	putChunk(h, kind, cookie, uint32(n-20))
	if errno != 0 {
		binary.BigEndian.PutUint32(h[20:], uint32(errno))
		binary.BigEndian.PutUint16(h[24:], 0)
	}
	return nil
}

// data notes the answer to a read; the kernel copies p when the replies are sent.
func (c *conn) data(cookie, offset uint64, p []byte) error {
	if !c.structured || len(p) == 0 {
		if err := c.reply(cookie, 0); err != nil || len(p) == 0 {
			return err
		}
		c.vector(p)
		c.open = false
		return nil
	}
	h, err := c.header(28)
	if err != nil {
		return err
	}
	putChunk(h, chunkOffsetData, cookie, uint32(len(p)+8))
	binary.BigEndian.PutUint64(h[20:], offset)
	c.vector(p)
	c.open = false
	return nil
}

func putChunk(h []byte, kind uint16, cookie uint64, length uint32) {
	binary.BigEndian.PutUint32(h, magicStructured)
	binary.BigEndian.PutUint16(h[4:], chunkDone)
	binary.BigEndian.PutUint16(h[6:], kind)
	binary.BigEndian.PutUint64(h[8:], cookie)
	binary.BigEndian.PutUint32(h[16:], length)
}

func (c *conn) vector(p []byte) {
	v := unix.Iovec{Base: unsafe.SliceData(p)}
	v.SetLen(len(p))
	c.out = append(c.out, v)
}

// flush sends all noted replies.
func (c *conn) flush() error {
	left := c.out
	for len(left) > 0 {
		c.message.Iov = &left[0]
		c.message.SetIovlen(len(left))
		n, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&c.message)), unix.MSG_NOSIGNAL)
		switch errno {
		case 0:
			left = advance(left, int(n))
		case unix.EINTR:
		case unix.EPIPE, unix.ECONNRESET:
			return errDisconnect
		default:
			return fmt.Errorf("send: %w", errno)
		}
	}
	c.out, c.used, c.open = c.out[:0], 0, false
	return nil
}

// advance drops the first n bytes of vectors.
func advance(vectors []unix.Iovec, n int) []unix.Iovec {
	for n > 0 {
		size := int(vectors[0].Len)
		if n < size {
			vectors[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(vectors[0].Base), n))
			vectors[0].SetLen(size - n)
			return vectors
		}
		n -= size
		vectors = vectors[1:]
	}
	return vectors
}
