package load

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// receiveBytes is how much one receive can bring. It stays within a core's cache.
const receiveBytes = 256 << 10

// slot is a request in flight. Its number is the cookie.
type slot struct {
	sent   time.Duration // since the start of the run; -1 when nothing is in flight
	offset uint64
	left   uint32 // bytes of data that its replies have still to bring
	write  bool
}

// connection is one socket and the requests in flight on it. It belongs to the thread that runs it.
type connection struct {
	fd     int
	config Config
	stop   *atomic.Bool

	first, blocks uint64 // the part of the export that it visits, in blocks
	next          uint64 // the next block, from first, or the next of the order
	random        uint64

	slots   []slot
	free    []uint32
	headers []byte // of one batch
	payload []byte // a piece for each slot
	vectors []unix.Iovec
	message unix.Msghdr

	parser parser
	start  time.Time
	sendAt time.Duration
	issued uint64
	result Result
}

func newConnection(fd int, c Config, number int, stop *atomic.Bool) *connection {
	conn := &connection{
		fd: fd, config: c, stop: stop,
		random:  (c.Seed+uint64(number))*0x9e3779b97f4a7c15 | 1,
		slots:   make([]slot, c.Depth),
		free:    make([]uint32, c.Depth),
		headers: make([]byte, c.Batch*sizeRequest),
		vectors: make([]unix.Iovec, 0, 2*c.Batch),
	}
	for i := range conn.free {
		conn.free[i] = uint32(c.Depth - 1 - i)
		conn.slots[i].sent = -1
	}
	for i := range c.Batch {
		binary.BigEndian.PutUint32(conn.headers[i*sizeRequest:], magicRequest)
	}
	if c.ReadPercent < 100 {
		conn.payload = make([]byte, c.Depth*c.BlockBytes)
		for i := range conn.payload {
			conn.payload[i] = byte(conn.draw() >> 56)
		}
	}
	conn.parser = newParser(c)
	return conn
}

// spread gives the connection its part of the export.
func (c *connection) spread(blocks uint64, number, connections int) {
	if !c.config.Sequential {
		c.first, c.blocks = 0, blocks
		return
	}
	c.blocks = blocks / uint64(connections)
	c.first = c.blocks * uint64(number)
}

// run sends until d is over, or requests are sent, and returns after the last reply.
//
//  1. send batches while a whole one fits into the depth
//  2. take the replies that have arrived, waiting for at least one byte
func (c *connection) run(start time.Time, d time.Duration, requests uint64) error {
	cpu := threadCPU()
	c.start, c.issued, c.result = start, 0, Result{}
	now := time.Since(start)
	for {
		sending := !c.stop.Load() && (requests == 0 && now < d || c.issued < requests)
		for sending && len(c.free) >= c.config.Batch {
			n := c.config.Batch
			if requests > 0 {
				n = int(min(uint64(n), requests-c.issued))
			}
			if err := c.send(n); err != nil {
				return err
			}
			sending = requests == 0 || c.issued < requests
		}
		if len(c.free) == len(c.slots) {
			break
		}
		if err := c.receive(0); err != nil {
			return err
		}
		now = time.Since(start)
	}
	c.result.Elapsed = time.Since(start)
	c.result.CPU = threadCPU() - cpu
	return nil
}

// send makes n requests and sends them with one call. When the socket is full it takes replies meanwhile, so
// that a server that waits for its replies to be taken cannot wait for ever.
func (c *connection) send(n int) error {
	c.sendAt = time.Since(c.start)
	c.vectors = c.vectors[:0]
	header := 0 // start of the headers that are in no vector yet
	for i := range n {
		if payload := c.prepare(i); payload != nil {
			c.vector(c.headers[header : (i+1)*sizeRequest])
			c.vector(payload)
			header = (i + 1) * sizeRequest
		}
	}
	if header < n*sizeRequest {
		c.vector(c.headers[header : n*sizeRequest])
	}
	c.issued += uint64(n)
	return c.transmit()
}

// prepare fills the header i of the batch with the next request and gives the payload, nil for a read.
func (c *connection) prepare(i int) (payload []byte) {
	number := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	s := &c.slots[number]
	s.sent = c.sendAt
	s.offset = c.block() * uint64(c.config.BlockBytes)
	s.left = uint32(c.config.BlockBytes)
	s.write = !c.isRead()
	command := uint16(commandRead)
	if s.write {
		s.left = 0
		command = commandWrite
		payload = c.payload[int(number)*c.config.BlockBytes:][:c.config.BlockBytes]
		if c.config.Stamp {
			stamp(payload, s.offset)
		}
	}
	h := c.headers[i*sizeRequest:][:sizeRequest]
	binary.BigEndian.PutUint16(h[6:], command)
	binary.BigEndian.PutUint64(h[8:], uint64(number))
	binary.BigEndian.PutUint64(h[16:], s.offset)
	binary.BigEndian.PutUint32(h[24:], uint32(c.config.BlockBytes))
	return payload
}

// block chooses the next block to visit.
func (c *connection) block() uint64 {
	switch {
	case c.config.Order != nil:
		b := c.config.Order[c.next]
		if c.next++; c.next == uint64(len(c.config.Order)) {
			c.next = 0
		}
		return b
	case c.config.Sequential:
		b := c.first + c.next
		if c.next++; c.next == c.blocks {
			c.next = 0
		}
		return b
	}
	hi, _ := bits.Mul64(c.draw(), c.blocks)
	return c.first + hi
}

func (c *connection) isRead() bool {
	switch c.config.ReadPercent {
	case 0:
		return false
	case 100:
		return true
	}
	hi, _ := bits.Mul64(c.draw(), 100)
	return int(hi) < c.config.ReadPercent
}

// draw is the xorshift64* generator: a few cycles, and even enough for offsets.
func (c *connection) draw() uint64 {
	x := c.random
	x ^= x >> 12
	x ^= x << 25
	x ^= x >> 27
	c.random = x
	return x * 0x2545f4914f6cdd1d
}

func (c *connection) vector(p []byte) {
	v := unix.Iovec{Base: unsafe.SliceData(p)}
	v.SetLen(len(p))
	c.vectors = append(c.vectors, v)
}

// transmit sends the vectors.
func (c *connection) transmit() error {
	left := c.vectors
	for len(left) > 0 {
		c.message.Iov = &left[0]
		c.message.SetIovlen(len(left))
		c.result.Calls++
		n, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&c.message)),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch errno {
		case 0:
			left = advance(left, int(n))
		case unix.EINTR:
		case unix.EAGAIN:
			if err := c.waitForRoom(); err != nil {
				return err
			}
		default:
			return fmt.Errorf("send requests: %w", errno)
		}
	}
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

// waitForRoom waits until the socket takes more, and takes replies while it does not.
func (c *connection) waitForRoom() error {
	poll := [1]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN | unix.POLLOUT}}
	c.result.Calls++
	n, err := unix.Poll(poll[:], int(replyTimeout.Milliseconds()))
	switch {
	case errors.Is(err, unix.EINTR):
		return nil
	case err != nil:
		return fmt.Errorf("wait for socket: %w", err)
	case n == 0:
		return fmt.Errorf("wait for socket: server took no byte for %s", replyTimeout)
	case poll[0].Revents&unix.POLLIN != 0:
		return c.receive(unix.MSG_DONTWAIT)
	}
	return nil
}

// receive takes what has arrived with one call and counts the requests that are answered by it.
func (c *connection) receive(flags int) error {
	room := c.parser.room()
	c.result.Calls++
	n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(c.fd), uintptr(unsafe.Pointer(unsafe.SliceData(room))),
		uintptr(len(room)), uintptr(flags), 0, 0)
	switch {
	case errno == unix.EINTR, errno == unix.EAGAIN && flags != 0:
		return nil
	case errno == unix.EAGAIN:
		return fmt.Errorf("receive replies: none for %s", replyTimeout)
	case errno != 0:
		return fmt.Errorf("receive replies: %w", errno)
	case n == 0:
		return fmt.Errorf("receive replies: %w", io.ErrUnexpectedEOF)
	}
	return c.parser.parse(int(n), c, time.Since(c.start))
}

// answered counts the request number as done.
func (c *connection) answered(number uint32, now time.Duration) {
	s := &c.slots[number]
	h := &c.result.Reads
	if s.write {
		h = &c.result.Writes
	}
	h.Record(now - s.sent)
	s.sent = -1
	c.free = append(c.free, number)
	c.result.Requests++
	c.result.Bytes += uint64(c.config.BlockBytes)
}

// inFlight gives the slot of a cookie, or an error where no request of that cookie waits for a reply.
func (c *connection) inFlight(cookie uint64) (*slot, error) {
	if cookie >= uint64(len(c.slots)) || c.slots[cookie].sent < 0 {
		return nil, fmt.Errorf("reply with cookie %d answers no request in flight", cookie)
	}
	return &c.slots[cookie], nil
}

// close says goodbye (NBD_CMD_DISC) and closes the socket.
func (c *connection) close() error {
	var bye [sizeRequest]byte
	binary.BigEndian.PutUint32(bye[:], magicRequest)
	binary.BigEndian.PutUint16(bye[6:], commandDisconnect)
	// A server that has gone already needs no goodbye.
	_ = unix.Sendto(c.fd, bye[:], unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil)
	if err := unix.Close(c.fd); err != nil {
		return fmt.Errorf("close connection: %w", err)
	}
	return nil
}

// threadCPU is the processor time that this thread has used.
func threadCPU() time.Duration {
	var usage unix.Rusage
	if unix.Getrusage(unix.RUSAGE_THREAD, &usage) != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
