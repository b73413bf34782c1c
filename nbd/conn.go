package nbd

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Why a connection ends.
var (
	errCut         = errors.New("request was cut by the device")
	errDisconnect  = errors.New("client disconnected")
	errFenced      = errors.New("replaced by a newer connection of its session")
	errHungUp      = errors.New("closed or reset by the client; its last requests were dropped")
	errMagic       = errors.New("no request where one must begin")
	errPayloadLong = fmt.Errorf("payload longer than %d bytes", maxDiscardPayloadBytes)
	errSlow        = errors.New("too slow while others wait for what it holds")
	errStalled     = errors.New("message stalled half-way")
	errStopped     = errors.New("server stops")
	errUnread      = errors.New("replies not read")
)

// sender says who writes replies at the moment. The one who found nobody claims it under conn.mu and keeps it
// until no reply is left, so replies never mix.
type sender uint8

const (
	senderNobody sender = iota
	senderReader
	senderWriter
)

// conn is one connection of a client. Two goroutines serve it: the reader negotiates, then receives, parses and
// submits requests and sends what the device answered at once; the writer sends what is answered later, and what
// the socket did not take. The reader thus never waits for the client to read.
type conn struct {
	srv *Server
	log *slog.Logger
	nc  net.Conn
	raw syscall.RawConn
	// fd is the socket. It stays open until both goroutines have ended, so they may use it without raw.
	fd int
	// gone is closed when both goroutines have ended and every request is released.
	gone chan struct{}

	export  *export
	session *sessionState
	terms   terms

	// Of the reader.
	header   header
	buffer   []byte
	start    int // buffer[start:end] has been received and not been handled
	end      int
	want     int  // so many bytes of buffer are needed to go on
	alive    bool // the client had not closed the connection when the batch was received
	free     []*Request
	made     int   // requests there are
	begun    int   // requests that were submitted or refused
	taken    int64 // bytes that requests took of the quota
	gathered int   // bytes of replies since the last flush
	read     ioVector
	readFunc func(fd uintptr) bool

	// Of the sender.
	outbox    outbox
	write     ioVector
	writeFunc func(fd uintptr) bool

	stopping atomic.Bool   // nothing more is submitted
	stopped  chan struct{} // closed with stopping
	dead     atomic.Bool   // nothing more is sent
	batching atomic.Bool   // the reader is at work and will flush

	mu       sync.Mutex
	wake     sync.Cond // the writer waits: it is the sender, or the end has come
	room     sync.Cond // the reader waits for the quota
	sender   sender
	done     []*Request // answered, not yet taken by the sender
	freed    []*Request // released, not yet taken by the reader
	queued   int64      // bytes held by answered requests whose replies have not left
	returned int64      // bytes given back to the quota
	ended    int        // requests released
	total    int        // begun, once the reader has ended; -1 before
	cause    error      // why it was killed

	watch watch
}

func newConn(s *Server, nc net.Conn) (*conn, error) {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("serve %T: not a socket", nc)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &conn{
		srv: s, log: s.log.With("peer", peerName(nc)), nc: nc, raw: raw, total: -1,
		gone: make(chan struct{}), stopped: make(chan struct{}),
		buffer: make([]byte, smallBufferBytes),
	}
	c.wake.L, c.room.L = &c.mu, &c.mu
	if err := raw.Control(func(fd uintptr) { c.fd = int(fd) }); err != nil {
		return nil, err
	}
	return c, nil
}

// serve runs the connection from the greeting to its end.
func (c *conn) serve() {
	defer close(c.gone)
	err := c.negotiate()
	if err == nil {
		c.export.clients.Add(1)
		err = c.transmit()
		c.linger(err)
		c.export.clients.Add(-1)
	}
	c.stop()
	if c.session != nil {
		c.export.sessions.leave(c.session, c)
	}
	c.nc.Close()
	c.logEnd(err)
}

func (c *conn) logEnd(err error) {
	c.mu.Lock()
	if c.cause != nil {
		err = c.cause
	}
	c.mu.Unlock()
	switch {
	case err == nil, errors.Is(err, errDisconnect), errors.Is(err, io.EOF), errors.Is(err, errStopped):
		c.log.Debug("connection closed", "err", err)
	default:
		c.log.Info("connection ended", "err", err)
	}
}

// transmit serves the transmission phase.
func (c *conn) transmit() error {
	c.outbox.init(c.terms.mode)
	c.readFunc, c.writeFunc = c.readOrFlush, c.write.writev
	c.nc.SetDeadline(noDeadline)
	var writer sync.WaitGroup
	writer.Go(c.runWriter)
	err := c.handleRequests()
	c.flush()
	if !graceful(err) {
		c.kill(err)
	}
	c.mu.Lock()
	c.total = c.begun
	c.mu.Unlock()
	c.wake.Signal()
	writer.Wait()
	return err
}

// linger waits until the client of a server that stops has the last replies. Closed with requests unread, a TCP
// connection is reset, and what is still on its way is lost.
func (c *conn) linger(err error) {
	nc, ok := c.nc.(*net.TCPConn)
	if !ok || c.dead.Load() || !errors.Is(err, errStopped) {
		return
	}
	_ = nc.CloseWrite()
	for end := time.Now().Add(lingerTimeout); time.Now().Before(end) && unacknowledged(c.fd) > 0; {
		_ = nc.SetReadDeadline(time.Now().Add(lingerPoll))
		if _, err := io.Copy(io.Discard, nc); err == nil {
			return
		}
	}
}

// graceful reports whether requests in flight are answered after the reader ended with err: the client closed at
// most its own direction.
func graceful(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errDisconnect) ||
		errors.Is(err, errStopped)
}

// stop lets nothing more be read or submitted. Requests in flight end and are answered. It does not wait.
func (c *conn) stop() {
	c.mu.Lock()
	first := !c.stopping.Swap(true)
	c.room.Broadcast()
	c.mu.Unlock()
	if first {
		close(c.stopped)
		c.nc.SetReadDeadline(pastDeadline)
	}
}

// kill stops c and drops its replies. It does not wait, and may be called from anywhere.
func (c *conn) kill(cause error) {
	c.mu.Lock()
	if c.cause == nil {
		c.cause = cause
	}
	c.mu.Unlock()
	c.dead.Store(true)
	c.stop()
	// Both goroutines wake up; the descriptor itself is closed when they have ended.
	_ = c.raw.Control(func(fd uintptr) { _ = syscall.Shutdown(int(fd), syscall.SHUT_RDWR) })
}

// finish queues the reply to r and finds a sender for it: the reader when that is at work, else the writer.
func (c *conn) finish(r *Request) {
	c.mu.Lock()
	if r.ended || !r.submitted {
		c.mu.Unlock()
		panic(fmt.Sprintf("nbd: device ended a %v at %d twice, or without Submit", r.Command, r.Offset))
	}
	r.ended = true
	wake := c.queue(r)
	c.mu.Unlock()
	if wake {
		c.wake.Signal()
	}
}

// queue appends r to the replies. It reports whether the writer must be woken. c.mu is held.
func (c *conn) queue(r *Request) bool {
	c.done = append(c.done, r)
	c.queued += r.held
	if c.sender != senderNobody {
		return false
	}
	if c.batching.Load() {
		c.sender = senderReader
		return false
	}
	c.sender = senderWriter
	return true
}

// flush sends the replies that the reader's batch has gathered. What the socket does not take is left to the
// writer.
func (c *conn) flush() {
	c.gathered = 0
	c.batching.Store(false)
	c.mu.Lock()
	own := c.sender == senderReader
	c.mu.Unlock()
	if !own || c.send(false) {
		return
	}
	c.mu.Lock()
	c.sender = senderWriter
	c.mu.Unlock()
	c.wake.Signal()
}

// runWriter sends the replies that are left to it, until the reader has ended and all requests are released.
func (c *conn) runWriter() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.ended != c.total {
		if c.sender != senderWriter {
			c.wake.Wait()
			continue
		}
		c.mu.Unlock()
		c.send(true)
		c.mu.Lock()
	}
}

// send writes replies until none is left, then gives up being the sender and reports true. Unless wait is set it
// returns false, still the sender, when the socket is full. Only the sender calls it.
func (c *conn) send(wait bool) bool {
	o := &c.outbox
	for {
		if o.sent == len(o.iovecs) && !c.refill() {
			return true
		}
		if c.dead.Load() {
			o.sent = len(o.iovecs)
			continue
		}
		if !c.writeSome(wait) {
			return false
		}
	}
}

// writeSome writes what the socket takes of the iovecs. It reports false when that is nothing.
func (c *conn) writeSome(wait bool) bool {
	o := &c.outbox
	c.write.iovecs = o.iovecs[o.sent:]
	if !wait {
		if !c.write.writev(uintptr(c.fd)) {
			return false
		}
	} else {
		c.watch.blocked(c.srv.now())
		if err := c.raw.Write(c.writeFunc); err != nil {
			c.kill(fmt.Errorf("write replies: %w", err))
			return true
		}
	}
	if c.write.errno != 0 {
		c.kill(fmt.Errorf("write replies: %w", c.write.errno))
		return true
	}
	if wait {
		c.watch.sent(c.write.n)
	}
	o.wrote(c.write.n)
	return true
}

// refill releases the requests whose replies have left and encodes the next ones. It reports false when there are
// none; then the caller is the sender no more.
func (c *conn) refill() bool {
	o := &c.outbox
	gone := o.requests[o.released:o.next]
	var bytes int64
	for _, r := range gone {
		bytes += c.release(r)
	}
	o.released = o.next

	c.mu.Lock()
	c.ended += len(gone)
	c.queued -= bytes
	c.returned += bytes
	c.freed = append(c.freed, gone...)
	if len(gone) > 0 {
		c.room.Signal()
	}
	if o.next == len(o.requests) {
		o.requests, c.done = c.done, o.requests[:0]
		o.released, o.next = 0, 0
	}
	if len(o.requests) == 0 {
		c.sender = senderNobody
		c.watch.unblocked()
		c.mu.Unlock()
		return false
	}
	c.mu.Unlock()
	if c.dead.Load() {
		o.next, o.iovecs, o.sent = len(o.requests), o.iovecs[:0], 0
		return true
	}
	o.fill()
	return true
}

// release tells the device that r is over, and gives back what the server held for it. It returns the bytes that r
// took of the quota.
func (c *conn) release(r *Request) int64 {
	if r.submitted {
		c.export.Device.Release(r)
	}
	if r.staged != nil {
		c.srv.staging.put(r.staged)
		r.staged = nil
	}
	r.shrink()
	return r.held
}

// closed reports whether the client has closed both directions, or reset the connection. A client that only ended
// its own direction still wants its replies.
func (c *conn) closed() bool {
	if planted("closed-connection") {
		return false
	}
	return pollClosed(c.fd)
}

// receiveError is the error of a read of the socket.
func (c *conn) receiveError(err error) error {
	if c.stopping.Load() || errors.Is(err, os.ErrDeadlineExceeded) {
		return errStopped
	}
	return fmt.Errorf("read requests: %w", err)
}
