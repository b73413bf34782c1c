package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Errors of a Conn.
var (
	// ErrFull says that as many calls are in flight as the connection may have.
	ErrFull    = errors.New("as many calls are in flight as the connection may have")
	errBadCall = errors.New("call cannot be sent")
)

// Defaults and bounds of ConnOptions.
const (
	defaultDepth       = 128
	maxDepth           = 1 << 16
	defaultBufferBytes = 256 << 10
	minBufferBytes     = 4 << 10
	dialTimeout        = 10 * time.Second
	sendBufferBytes    = 2 << 20 // of a Unix socket: the default holds up batches
	discTimeout        = 100 * time.Millisecond
)

// ReplyFormat is the form of the replies of a connection, the best that both sides know.
type ReplyFormat uint8

// The forms, best first, so that the zero value of ConnOptions asks for the best.
const (
	ReplyExtended ReplyFormat = iota
	ReplyStructured
	ReplySimple
)

// String gives the word of proto.md for f.
func (f ReplyFormat) String() string {
	return [...]string{"extended", "structured", "simple"}[min(f, ReplySimple)]
}

// ConnOptions say how to make a connection. The zero value is good.
type ConnOptions struct {
	// Replies is the best form of replies to ask for.
	Replies ReplyFormat
	// Depth is how many calls can be in flight; 0 = 128, at most 65536.
	Depth int
	// BufferBytes is the size of the receive buffer; 0 = 256 KiB, at least 4 KiB. What of a read does not fit
	// is received straight into its destination.
	BufferBytes int

	session *session
}

// Call is one command to a server. Between Queue and its completion it belongs to the Conn, with all that it
// points to; then it can be used again.
type Call struct {
	Command Command
	Flags   CommandFlags
	Offset  uint64 // in bytes
	// Length is the effect length of the commands without data, in bytes. Queue sets it for READ and WRITE.
	Length uint64
	// Data is the destination of a READ, or the payload of a WRITE.
	Data []byte
	// Pieces is more payload of a WRITE, behind Data.
	Pieces [][]byte
	// Extents is where the answer to BLOCK_STATUS is appended.
	Extents []Extent
	// Err is the error of the server, 0 = success. It counts only for a Call that Receive has given back:
	// for one that is still in flight, or that Unanswered gave back, it is EINPROGRESS.
	Err syscall.Errno

	op *operation // of a Client
}

// Conn is one connection to an export, for explicit batches: any number of Queue, then Send, which sends them by
// one system call, then Receive, which waits for some replies and gives back the calls that they complete.
// In steady state nothing is allocated.
//
// One goroutine at a time may use Queue and Send, one Receive and Unanswered: the same goroutine, if the replies
// to all that is in flight fit into the buffers of the socket, else two (a server that waits with its replies reads
// no requests). Info and Close are safe at any time. A Conn never connects again; Client does.
type Conn struct {
	net   net.Conn
	raw   syscall.RawConn
	info  Info
	depth int

	// The sender's part.
	free    []uint32 // slots not in use
	queued  []uint32 // slots queued since the last Send
	headers []byte   // the requests queued since the last Send
	batch   net.Buffers
	out     net.Buffers // what WriteTo has not sent of the batch
	merge   bool        // the last buffer of the batch is the end of headers

	sending sync.Mutex // held while something is sent
	cut     bool       // the stream ends within a request; with sending
	closed  atomic.Bool

	// From the receiver to the sender.
	mu       sync.Mutex
	returned []uint32 // slots that the sender may take

	// The receiver's part.
	replies  replyParser
	answered []uint32 // slots of the calls that this Receive gives back
	iovecs   [2]syscall.Iovec
	iovecN   int
	readN    int
	readErr  syscall.Errno
	readv    func(fd uintptr) bool
}

// DialConn connects to u and negotiates. It gives up when ctx ends, at the latest after 10 s.
func DialConn(ctx context.Context, u URI, o ConnOptions) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var dialer net.Dialer
	nc, err := dialer.DialContext(ctx, u.Network, u.Address)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", u, err)
	}
	c, err := clientConn(ctx, nc, u.Export, o)
	if err != nil {
		_ = nc.Close()
		return nil, fmt.Errorf("negotiate with %s: %w", u, err)
	}
	return c, nil
}

// clientConn negotiates on nc, a *net.TCPConn or *net.UnixConn.
func clientConn(ctx context.Context, nc net.Conn, export string, o ConnOptions) (*Conn, error) {
	if u, ok := nc.(*net.UnixConn); ok {
		_ = u.SetWriteBuffer(sendBufferBytes) // the kernel takes what it allows
	}
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	info, err := negotiate(nc, export, o)
	if !stop() {
		return nil, fmt.Errorf("handshake: %w", context.Cause(ctx))
	}
	if err != nil {
		return nil, err
	}
	raw, err := nc.(syscall.Conn).SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &Conn{net: nc, raw: raw, info: info, depth: min(o.Depth, maxDepth)}
	if c.depth <= 0 {
		c.depth = defaultDepth
	}
	if o.BufferBytes <= 0 {
		o.BufferBytes = defaultBufferBytes
	}
	c.makeBuffers(max(o.BufferBytes, minBufferBytes))
	return c, nil
}

func (c *Conn) makeBuffers(bufferBytes int) {
	c.free = make([]uint32, c.depth)
	for i := range c.free {
		c.free[i] = uint32(c.depth - 1 - i)
	}
	c.queued = make([]uint32, 0, c.depth)
	c.returned = make([]uint32, 0, c.depth)
	c.answered = make([]uint32, 0, c.depth)
	c.headers = make([]byte, 0, c.depth*sizeExtendedRequest)
	c.replies = replyParser{
		format:  c.info.Replies,
		context: c.info.allocation,
		status:  c.info.BlockStatus,
		slots:   make([]slot, c.depth),
		buffer:  make([]byte, bufferBytes),
	}
	runs := make([]run, c.depth) // one each is enough for a read whose chunks come in order
	for i := range c.replies.slots {
		c.replies.slots[i].runs = runs[i : i : i+1]
	}
	c.readv = c.tryReadv
}

// Info tells what was negotiated.
func (c *Conn) Info() Info { return c.info }

// Queue adds call to the next batch. It does no I/O. ErrFull says that calls must be received first; any other
// error, that call can never be sent.
func (c *Conn) Queue(call *Call) error {
	if err := c.check(call); err != nil {
		return err
	}
	i, ok := c.take()
	if !ok {
		return ErrFull
	}
	s := &c.replies.slots[i]
	if s.uses++; s.uses == 0 {
		s.uses++ // no cookie is 0
	}
	call.Err = syscall.EINPROGRESS
	s.reset(call)
	c.queued = append(c.queued, i)
	c.appendHeader(call, uint64(s.uses)<<32|uint64(i))
	if call.Command == CmdWrite {
		c.appendPayload(call.Data)
		for _, p := range call.Pieces {
			c.appendPayload(p)
		}
	}
	return nil
}

// check sets the length of call and tells whether it can be sent.
func (c *Conn) check(call *Call) error {
	switch call.Command {
	case CmdRead:
		call.Length = uint64(len(call.Data))
	case CmdWrite:
		call.Length = uint64(len(call.Data))
		for _, p := range call.Pieces {
			call.Length += uint64(len(p))
		}
	case CmdFlush, CmdTrim, CmdCache, CmdWriteZeroes:
	case CmdBlockStatus:
		if !c.info.BlockStatus {
			return fmt.Errorf("%w: block-status without base:allocation, which the server does not offer", errBadCall)
		}
	default:
		return fmt.Errorf("%w: %s", errBadCall, call.Command)
	}
	if call.Length > 0xffffffff && (c.info.Replies != ReplyExtended || call.Command == CmdRead || call.Command == CmdWrite) {
		return fmt.Errorf("%w: %s of %d bytes, more than 32 bits", errBadCall, call.Command, call.Length)
	}
	return nil
}

// take gives a slot that is not in use.
func (c *Conn) take() (uint32, bool) {
	if len(c.free) == 0 {
		c.mu.Lock()
		c.free, c.returned = c.returned, c.free
		c.mu.Unlock()
	}
	n := len(c.free)
	if n == 0 {
		return 0, false
	}
	i := c.free[n-1]
	c.free = c.free[:n-1]
	return i, true
}

func (c *Conn) appendHeader(call *Call, cookie uint64) {
	begin, flags := len(c.headers), call.Flags
	if c.info.Replies == ReplyExtended {
		if call.Command == CmdWrite {
			flags |= CmdFlagPayloadLen
		}
		c.headers = appendRequest(c.headers, magicExtendedRequest, flags, call.Command, cookie, call.Offset)
		c.headers = binary.BigEndian.AppendUint64(c.headers, call.Length)
	} else {
		c.headers = appendRequest(c.headers, magicRequest, flags, call.Command, cookie, call.Offset)
		c.headers = binary.BigEndian.AppendUint32(c.headers, uint32(call.Length))
	}
	if c.merge {
		last := &c.batch[len(c.batch)-1]
		*last = c.headers[begin-len(*last):]
	} else {
		c.batch = append(c.batch, c.headers[begin:])
	}
	c.merge = true
}

// appendRequest adds what compact and extended requests have in common to b.
func appendRequest(b []byte, magic uint32, flags CommandFlags, command Command, cookie, offset uint64) []byte {
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint16(b, uint16(flags))
	b = binary.BigEndian.AppendUint16(b, uint16(command))
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint64(b, offset)
}

func (c *Conn) appendPayload(p []byte) {
	if len(p) > 0 {
		c.batch = append(c.batch, p)
		c.merge = false
	}
}

// Send sends what is queued, by one system call if the socket has room for it. After an error the connection is
// lost.
func (c *Conn) Send() error {
	if len(c.queued) == 0 {
		return nil
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	if c.closed.Load() {
		return net.ErrClosed
	}
	// From here on a reply is possible.
	for _, i := range c.queued {
		s := &c.replies.slots[i]
		s.cookie.Store(uint64(s.uses)<<32 | uint64(i))
	}
	c.queued = c.queued[:0]
	c.out = c.batch
	_, err := c.out.WriteTo(c.net)
	c.batch, c.headers, c.merge = c.batch[:0], c.headers[:0], false
	if c.cut = err != nil; c.cut {
		return fmt.Errorf("send requests: %w", err)
	}
	return nil
}

// Receive waits until at least one call is answered and gives back the answered ones in done, as many as are there.
// After an error the connection is lost, and no call is given back: Unanswered gives those still in flight.
func (c *Conn) Receive(done []*Call) (int, error) {
	if len(done) == 0 {
		return 0, nil
	}
	for {
		n, err := c.collect(done)
		if n > 0 {
			return n, nil // err, if any, comes again
		}
		if err == nil {
			err = c.read()
		}
		if err != nil {
			return 0, err
		}
	}
}

// collect gives back the calls that are answered by what has been received.
func (c *Conn) collect(done []*Call) (n int, err error) {
	for n < len(done) {
		var call *Call
		var i uint32
		if call, i, err = c.replies.next(); call == nil {
			break
		}
		c.answered = append(c.answered, i)
		done[n] = call
		n++
	}
	if n > 0 {
		c.mu.Lock()
		c.returned = append(c.returned, c.answered...)
		c.mu.Unlock()
		c.answered = c.answered[:0]
	}
	return n, err
}

// read receives some bytes.
func (c *Conn) read() error {
	rest, buffer := c.replies.space()
	n, err := 0, error(nil)
	if len(rest) == 0 {
		n, err = c.net.Read(buffer)
	} else {
		n, err = c.readBoth(rest, buffer)
	}
	if err != nil {
		return fmt.Errorf("receive replies: %w", err)
	}
	c.replies.received(n)
	return nil
}

// readBoth receives into a and, when that is full, b.
func (c *Conn) readBoth(a, b []byte) (int, error) {
	c.iovecN = 0
	for _, p := range [...][]byte{a, b} {
		if len(p) > 0 {
			c.iovecs[c.iovecN].Base = &p[0]
			c.iovecs[c.iovecN].SetLen(len(p))
			c.iovecN++
		}
	}
	err := c.raw.Read(c.readv)
	c.iovecs = [2]syscall.Iovec{}
	switch {
	case err != nil:
		return 0, err
	case c.readErr != 0:
		return 0, os.NewSyscallError("readv", c.readErr)
	case c.readN == 0:
		return 0, io.EOF
	}
	return c.readN, nil
}

// Unanswered gives the calls that were queued and not given back. It is for a lost connection, once no goroutine is
// in Queue, Send or Receive any more: until then they may still be read or written. The fate of those that write is
// not known.
func (c *Conn) Unanswered() []*Call {
	var calls []*Call
	for i := range c.replies.slots {
		s := &c.replies.slots[i]
		if s.call != nil {
			calls = append(calls, s.call)
			s.call = nil
			s.cookie.Store(0)
		}
	}
	return calls
}

// Close ends the connection, with a DISC if the server takes it at once. Send and Receive return with an error.
func (c *Conn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	_ = c.net.SetWriteDeadline(time.Now().Add(discTimeout)) // also for a Send under way
	c.sending.Lock()
	if !c.cut {
		_, _ = c.net.Write(c.disc()) // a courtesy
	}
	c.sending.Unlock()
	return c.net.Close()
}

// abort ends the connection without a word. On TCP it is reset, so that the server drops what it has not read.
func (c *Conn) abort() {
	if c.closed.Swap(true) {
		return
	}
	if t, ok := c.net.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = c.net.Close()
}

// disc is the request that says goodbye.
func (c *Conn) disc() []byte {
	if c.info.Replies == ReplyExtended {
		return append(appendRequest(nil, magicExtendedRequest, 0, CmdDisc, 0, 0), make([]byte, 8)...)
	}
	return append(appendRequest(nil, magicRequest, 0, CmdDisc, 0, 0), make([]byte, 4)...)
}
