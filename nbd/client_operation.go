package nbd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// errNotSent says that a connection died before anything of the operation was sent on it.
var errNotSent = errors.New("not sent")

// operation is up to window calls of a Client that go out and are waited for together. A Client has a fixed number
// of them and uses them again.
type operation struct {
	calls  []Call
	pieces [][]byte // what the Pieces of the calls point to
	losses uint64   // of a Sync: losses when it began
	mark   uint64   // of a Sync: writes that it covers

	pending atomic.Int32 // calls not answered
	err     error        // of the connection
	done    chan struct{}
	timer   *time.Timer
}

func newOperation() *operation {
	o := &operation{calls: make([]Call, 0, window), done: make(chan struct{}, 1), timer: time.NewTimer(time.Hour)}
	o.timer.Stop()
	return o
}

// clear lets go of the caller's buffers.
func (o *operation) clear() {
	clear(o.calls)
	clear(o.pieces)
	o.calls, o.pieces = o.calls[:0], o.pieces[:0]
}

// single makes o an operation of one call.
func (o *operation) single(call Call) {
	call.op = o
	o.calls = append(o.calls[:0], call)
}

// bufferCursor is a place in a list of buffers.
type bufferCursor struct {
	bufs [][]byte
	at   int // in bufs[0]
}

// next gives at most n of the bytes that follow, in one piece, and steps over them. There must be some.
func (c *bufferCursor) next(n int64) []byte {
	for c.at == len(c.bufs[0]) {
		c.bufs, c.at = c.bufs[1:], 0
	}
	size := int(min(n, int64(len(c.bufs[0])-c.at)))
	p := c.bufs[0][c.at : c.at+size]
	c.at += size
	return p
}

// fill makes o an operation of the next calls of a transfer that has n bytes to go, at most payload in each, and tells
// how many bytes that are.
func (o *operation) fill(command Command, at *bufferCursor, off, n, payload int64) (total int64) {
	o.clear()
	for total < n && len(o.calls) < window {
		size := min(n-total, payload)
		call := Call{Command: command, Offset: uint64(off + total), op: o}
		call.Data = at.next(size)
		begin := len(o.pieces)
		for rest := size - int64(len(call.Data)); rest > 0; {
			p := at.next(rest)
			o.pieces = append(o.pieces, p)
			rest -= int64(len(p))
		}
		// A later append may move o.pieces; these stay readable where they are.
		call.Pieces = o.pieces[begin:len(o.pieces):len(o.pieces)]
		o.calls = append(o.calls, call)
		total += size
	}
	return total
}

// writes tells whether o changes data.
func (o *operation) writes() bool { return o.calls[0].Command.writes() }

// answer is the first error of the server.
func (o *operation) answer() error {
	for i := range o.calls {
		if err := o.calls[i].Err; err != 0 {
			return err
		}
	}
	return nil
}

// run does o: it waits for connections, sends, waits for the answers, and does so again where that is safe.
func (c *Client) run(o *operation) error {
	deadline := c.deadline()
	for attempt := 1; ; {
		g, err := c.attached(deadline)
		if err != nil {
			return err
		}
		if skip, err := c.prepare(o, deadline); skip || err != nil {
			return err
		}
		if !g.submit(o) {
			continue
		}
		err = c.await(g, o, deadline)
		switch {
		case err == nil:
			return nil
		case c.context.Err() != nil:
			return net.ErrClosed
		case errors.Is(err, errNotSent):
			// It is certain that nothing has happened, so even a write can go to the next connection.
		case o.writes() || attempt == readAttempts || !retriable(err):
			return err
		default:
			attempt++
		}
		if !deadline.IsZero() && !time.Now().Before(deadline) {
			return fmt.Errorf("%w: %w", os.ErrDeadlineExceeded, err)
		}
		for i := range o.calls {
			o.calls[i].Extents = o.calls[i].Extents[:0]
		}
	}
}

// prepare does what comes between a connection and sending: the quarantine of a write, the account of a Sync. skip
// says that there is nothing to send.
func (c *Client) prepare(o *operation, deadline time.Time) (skip bool, err error) {
	switch {
	case o.writes():
		return false, c.quarantine(deadline)
	case o.calls[0].Command == CmdFlush:
		o.mark, err = c.covered(o.losses)
		return !c.CanFlush(), err
	}
	return false, nil
}

// retriable tells whether another connection may do better: errors of the server are final, but for one that is about
// to stop, and a server that breaks the protocol will do so again.
func retriable(err error) bool {
	var errno syscall.Errno
	if errors.As(err, &errno) && errors.Is(err, errAnswered) {
		return errno == syscall.ESHUTDOWN
	}
	return !errors.Is(err, ErrProtocol)
}

// errAnswered marks errors that came from the server, not from the connection to it.
var errAnswered = errors.New("server")

// await waits for the end of o on a.
func (c *Client) await(g *connGroup, o *operation, deadline time.Time) error {
	if deadline.IsZero() {
		<-o.done
	} else {
		o.timer.Reset(time.Until(deadline))
		select {
		case <-o.done:
			o.timer.Stop()
		case <-o.timer.C:
			// Only with the connections gone will nobody touch the caller's buffers any more.
			g.kill(fmt.Errorf("%w: no answer within %v", os.ErrDeadlineExceeded, c.o.Timeout))
			<-o.done
		}
	}
	if o.err != nil {
		return o.err
	}
	if err := o.answer(); err != nil {
		return fmt.Errorf("%w: %w", errAnswered, err)
	}
	return nil
}

// quarantine waits until a write of a lost connection cannot land on top of a new one.
func (c *Client) quarantine(deadline time.Time) error {
	c.mu.Lock()
	end := c.writeAfter
	c.mu.Unlock()
	wait := time.Until(end)
	if end.IsZero() || wait <= 0 {
		return nil
	}
	expired, stop := c.timer(deadline)
	defer stop()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-expired:
		return fmt.Errorf("%w: no write before the quarantine of %v after a lost connection is over",
			os.ErrDeadlineExceeded, c.o.Quarantine)
	case <-c.context.Done():
		return net.ErrClosed
	}
}
