package system

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A client of our own, apart from the product's: fixed newstyle and simple replies, nothing more, so that the
// checkers share no code with what they check.

// Commands and flags of proto.md.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6

	flagFUA = 1 << 0
)

const (
	requestMagic = 0x25609513
	replyMagic   = 0x67446698
	optionMagic  = 0x49484156454F5054
)

// nbdConn is one connection in the transmission phase.
type nbdConn struct {
	net.Conn
	in    *bufio.Reader
	size  int64
	flags uint16
}

// dialNBD connects to the export by GO.
func dialNBD(socket, export string) (*nbdConn, error) {
	raw, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return nil, err
	}
	c := &nbdConn{Conn: raw, in: bufio.NewReaderSize(raw, 256*kib)}
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if err := c.negotiate(export); err != nil {
		raw.Close()
		return nil, err
	}
	c.SetDeadline(time.Time{})
	return c, nil
}

func (c *nbdConn) negotiate(export string) error {
	var greeting [18]byte
	if _, err := io.ReadFull(c.in, greeting[:]); err != nil {
		return fmt.Errorf("read greeting: %w", err)
	}
	if string(greeting[:8]) != "NBDMAGIC" {
		return fmt.Errorf("greeting is %x", greeting)
	}
	msg := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	msg = appendOption(msg, 7, goData(export))
	if _, err := c.Write(msg); err != nil {
		return err
	}
	for {
		var h [20]byte
		if _, err := io.ReadFull(c.in, h[:]); err != nil {
			return fmt.Errorf("read answer to GO: %w", err)
		}
		data := make([]byte, binary.BigEndian.Uint32(h[16:]))
		if _, err := io.ReadFull(c.in, data); err != nil {
			return err
		}
		switch kind := binary.BigEndian.Uint32(h[12:]); {
		case kind == 1: // ACK
			return nil
		case kind == 3 && binary.BigEndian.Uint16(data) == 0: // INFO_EXPORT
			c.size = int64(binary.BigEndian.Uint64(data[2:]))
			c.flags = binary.BigEndian.Uint16(data[10:])
		case kind>>31 == 1:
			return fmt.Errorf("GO refused with %#x: %s", kind, data)
		}
	}
}

func appendOption(b []byte, option uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, optionMagic)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func goData(export string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	b = append(b, export...)
	return append(b, 0, 0) // no information asked for
}

// appendRequest appends a request without its payload.
func appendRequest(b []byte, flags, cmd uint16, cookie uint64, off int64, length int) []byte {
	b = binary.BigEndian.AppendUint32(b, requestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// reply reads the header of a reply.
func (c *nbdConn) reply() (cookie uint64, errno syscall.Errno, err error) {
	var h [16]byte
	if _, err := io.ReadFull(c.in, h[:]); err != nil {
		return 0, 0, err
	}
	if m := binary.BigEndian.Uint32(h[:]); m != replyMagic {
		return 0, 0, fmt.Errorf("reply has magic %#x", m)
	}
	return binary.BigEndian.Uint64(h[8:]), syscall.Errno(binary.BigEndian.Uint32(h[4:])), nil
}

// do makes one request and waits for its answer: p is the payload of a write, the buffer of a read, and for the
// other commands gives the length.
func (c *nbdConn) do(cmd, flags uint16, off int64, p []byte) error {
	return c.effect(cmd, flags, off, len(p), p)
}

func (c *nbdConn) effect(cmd, flags uint16, off int64, length int, p []byte) error {
	msg := appendRequest(nil, flags, cmd, 1, off, length)
	if cmd == cmdWrite {
		msg = append(msg, p...)
	}
	if _, err := c.Write(msg); err != nil {
		return err
	}
	_, errno, err := c.reply()
	if err != nil {
		return err
	}
	if errno != 0 {
		return errno
	}
	if cmd == cmdRead {
		_, err = io.ReadFull(c.in, p)
	}
	return err
}

func (c *nbdConn) close() {
	c.SetDeadline(time.Now().Add(time.Second))
	c.Write(appendRequest(nil, 0, cmdDisc, 0, 0, 0))
	c.Conn.Close()
}

// mustDial connects for the length of the test, with a limit on every wait.
func mustDial(t testing.TB, s server) *nbdConn {
	t.Helper()
	c, err := dialNBD(s.socket(), s.export())
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(commandLimit))
	t.Cleanup(func() { c.Conn.Close() })
	return c
}

// readAll reads the whole range.
func readAll(t testing.TB, s server, off, bytes int64) []byte {
	t.Helper()
	c := mustDial(t, s)
	defer c.close()
	data := make([]byte, bytes)
	for n := int64(0); n < bytes; n += mib {
		if err := c.do(cmdRead, 0, off+n, data[n:min(n+mib, bytes)]); err != nil {
			t.Fatalf("read %d at %d: %v", min(mib, bytes-n), off+n, err)
		}
	}
	return data
}

// operation is a request in flight on a pipe.
type operation struct {
	cmd, flags uint16
	off        int64
	length     int
	data       []byte // payload, or room for what a read returns
	id         uint64 // the owner's
	sent       int64  // likewise
	floors     []int64
}

// pipe keeps up to depth requests in flight on one connection.
type pipe struct {
	conn    *nbdConn
	ops     []operation
	free    chan int
	answer  func(o *operation, errno syscall.Errno)
	readEnd chan struct{}
	err     error // after readEnd
	header  []byte
}

// newPipe makes a pipe whose answers go to the function, from another goroutine.
func newPipe(c *nbdConn, depth int, answer func(*operation, syscall.Errno)) *pipe {
	p := &pipe{conn: c, ops: make([]operation, depth), free: make(chan int, depth), answer: answer,
		readEnd: make(chan struct{})}
	for i := range depth {
		p.free <- i
	}
	go p.runReplies()
	return p
}

func (p *pipe) runReplies() {
	defer close(p.readEnd)
	for {
		cookie, errno, err := p.conn.reply()
		if err == nil && cookie >= uint64(len(p.ops)) {
			err = fmt.Errorf("reply to cookie %d, which was never sent", cookie)
		}
		if err != nil {
			p.err = err
			return
		}
		o := &p.ops[cookie]
		if o.cmd == cmdRead && errno == 0 {
			if _, err := io.ReadFull(p.conn.in, o.data[:o.length]); err != nil {
				p.err = err
				return
			}
		}
		p.answer(o, errno)
		p.free <- int(cookie)
	}
}

// submit waits for room, lets the function fill the operation, and sends it. It reports false when the
// connection is gone.
func (p *pipe) submit(fill func(*operation)) bool {
	var slot int
	select {
	case slot = <-p.free:
	case <-p.readEnd:
		return false
	}
	o := &p.ops[slot]
	fill(o)
	p.header = appendRequest(p.header[:0], o.flags, o.cmd, uint64(slot), o.off, o.length)
	msg := net.Buffers{p.header}
	if o.cmd == cmdWrite {
		msg = append(msg, o.data[:o.length])
	}
	_, err := msg.WriteTo(p.conn.Conn)
	return err == nil
}

// drain waits until everything is answered; it reports false when the connection was lost before.
func (p *pipe) drain() bool {
	for range p.ops {
		select {
		case <-p.free:
		case <-p.readEnd:
			return false
		}
	}
	return true
}

// fillRandomly writes every block of the range once, in random order by several connections, and fails the test
// on any error. content gives the bytes of a block.
func fillRandomly(t testing.TB, s server, size int64, connections, depth int, order []int, content func(block int, p []byte)) {
	t.Helper()
	var wg sync.WaitGroup
	for i := range connections {
		wg.Go(func() {
			c, err := dialNBD(s.socket(), s.export())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Conn.Close()
			c.SetDeadline(time.Now().Add(commandLimit))
			p := newPipe(c, depth, func(o *operation, errno syscall.Errno) {
				if errno != 0 {
					t.Errorf("write at %d: %v", o.off, errno)
				}
			})
			for n := i; n < len(order); n += connections {
				ok := p.submit(func(o *operation) {
					if o.data == nil {
						o.data = make([]byte, blockBytes)
					}
					o.cmd, o.off, o.length = cmdWrite, int64(order[n])*blockBytes, blockBytes
					content(order[n], o.data)
				})
				if !ok {
					break
				}
			}
			if !p.drain() {
				<-p.readEnd
				t.Errorf("connection lost: %v", p.err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}
