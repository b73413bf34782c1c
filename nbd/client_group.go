package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// errStopping is the cause when a server says that it is about to stop.
var errStopping = fmt.Errorf("server is stopping: %w", syscall.ESHUTDOWN)

// connGroup is all connections of a Client at a time. They live and die together, under one attach number.
type connGroup struct {
	client  *Client
	info    Info
	links   []*link
	running sync.WaitGroup

	once   sync.Once
	dead   chan struct{} // closed by kill
	cause  error         // set before dead is closed
	deadAt time.Time     // likewise

	useful     atomic.Bool // something was answered
	lostWrites atomic.Bool // something that writes was sent and not answered
}

// link is one connection with its two goroutines: runSend sends what is queued, in batches, runReceive takes the
// answers.
type link struct {
	g        *connGroup
	conn     *Conn
	wake     chan struct{} // queue is not empty
	sent     chan struct{} // closed at the end of runSend
	inFlight atomic.Int32  // operations queued and not ended

	mu    sync.Mutex
	queue []*operation
	ended bool // nothing can be queued any more
}

// attached gives connections that were alive a moment ago. If there are none it waits until they are made.
func (c *Client) attached(deadline time.Time) (*connGroup, error) {
	for {
		c.mu.Lock()
		g, err := c.current, c.final
		if err != nil || g.alive() {
			c.mu.Unlock()
			return g, err
		}
		if c.context.Err() != nil {
			c.mu.Unlock()
			return nil, net.ErrClosed
		}
		if c.dialing == nil {
			c.dialing = make(chan struct{})
			c.running.Go(c.runDial)
		}
		ended, dialErr := c.dialing, c.dialErr
		c.mu.Unlock()
		if err := c.waitDial(ended, deadline, dialErr); err != nil {
			return nil, err
		}
	}
}

// waitDial waits for the end of an attempt to connect.
func (c *Client) waitDial(ended <-chan struct{}, deadline time.Time, last error) error {
	expired, stop := c.timer(deadline)
	defer stop()
	select {
	case <-ended:
		return nil
	case <-c.context.Done():
		return net.ErrClosed
	case <-expired:
		if last == nil {
			last = errors.New("connecting again takes longer")
		}
		return fmt.Errorf("%w: %w", os.ErrDeadlineExceeded, last)
	}
}

// runDial is one attempt to connect again.
func (c *Client) runDial() {
	c.mu.Lock()
	old := c.current
	c.mu.Unlock()
	old.running.Wait()
	delay := c.settle(old)
	var g *connGroup
	err := c.sleep(delay)
	if err == nil {
		g, err = c.dial(c.context)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dialErr = err; err != nil {
		c.failures++
		if isFinal(err) {
			c.final = err
		}
	} else {
		c.publishLocked(g)
		c.o.Log.Info("connected again", "export", c.uri.String(), "conns", len(g.links))
	}
	close(c.dialing)
	c.dialing = nil
}

// sleep waits for d, or the end of c.
func (c *Client) sleep(d time.Duration) error {
	if d == 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-c.context.Done():
		return net.ErrClosed
	}
}

// settle draws the consequences of the loss of old, whose goroutines have ended, and tells how long to wait before the
// next attempt.
func (c *Client) settle(old *connGroup) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old.lostWrites.Swap(false) {
		if old.deadAt.After(c.writeAfter) {
			c.unfenced = false // the writes of the quarantine before are gone
		}
		c.unfenced = c.unfenced || !old.info.session
		c.writeAfter = old.deadAt.Add(c.o.Quarantine)
	}
	if c.answered.Load() != c.synced {
		c.unsure = true
	}
	switch {
	case old.useful.Swap(false):
		c.failures = 0
	case c.dialErr == nil:
		c.failures++ // it connected, and that was all
	}
	if c.failures == 0 {
		return 0
	}
	return min(c.o.ReconnectDelay<<min(c.failures-1, 16), maxReconnectDelay)
}

// publish makes g the current group.
func (c *Client) publish(g *connGroup) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.publishLocked(g)
}

func (c *Client) publishLocked(g *connGroup) {
	if g.info.session && !c.unfenced {
		c.writeAfter = time.Time{} // the server has fenced the connections before
	}
	if c.unsure && !c.retained(g.info) {
		c.losses++
		c.synced = c.answered.Load()
	}
	c.unsure = false
	c.volume = g.info.volume
	c.current = g
	g.start()
	if c.context.Err() != nil {
		g.kill(net.ErrClosed)
	}
}

// retained tells whether the server has all that it answered before, and a FLUSH now covers it.
func (c *Client) retained(now Info) bool {
	return now.session && now.volume.Generation != 0 && now.volume.Generation == c.volume.Generation &&
		now.Flags&FlagCanMultiConn != 0
}

// dial makes the connections of one group.
func (c *Client) dial(ctx context.Context) (*connGroup, error) {
	o := ConnOptions{Depth: c.o.InFlight * window}
	if c.o.Session != [16]byte{} {
		c.mu.Lock()
		c.attach++
		o.session = &session{ID: c.o.Session, Attach: c.attach, Generation: c.generation}
		c.mu.Unlock()
	}
	first, err := DialConn(ctx, c.uri, o)
	if err != nil {
		return nil, err
	}
	if err := c.acceptable(first.info); err != nil {
		_ = first.Close()
		return nil, fmt.Errorf("connect to %s: %w", c.uri, err)
	}
	g := &connGroup{client: c, info: first.info, dead: make(chan struct{})}
	g.add(first)
	for len(g.links) < c.o.Connections && first.info.Flags&FlagCanMultiConn != 0 {
		conn, err := DialConn(ctx, c.uri, o)
		if err == nil && conn.info.Size != first.info.Size {
			err = fmt.Errorf("%w: size %d and %d bytes", ErrExportChanged, first.info.Size, conn.info.Size)
			_ = conn.Close()
		}
		if err != nil {
			c.o.Log.Warn("fewer connections than asked for", "export", c.uri.String(), "conns", len(g.links), "err", err)
			break
		}
		g.add(conn)
	}
	return g, nil
}

// acceptable tells whether an export can be used, and is what it was before.
func (c *Client) acceptable(now Info) error {
	before := c.info
	switch {
	case before.Size == 0 && now.Size == 0:
		return errors.New("the export has no bytes; let the server export something larger")
	case before.Size == 0: // the first time
		return nil
	case now.Size != before.Size:
		return fmt.Errorf("%w: %d bytes, before %d", ErrExportChanged, now.Size, before.Size)
	case now.MinBlock > before.MinBlock:
		return fmt.Errorf("%w: minimum block %d, before %d", ErrExportChanged, now.MinBlock, before.MinBlock)
	case now.MaxPayload < before.MaxPayload:
		return fmt.Errorf("%w: maximum payload %d, before %d", ErrExportChanged, now.MaxPayload, before.MaxPayload)
	case now.BlockStatus != before.BlockStatus && before.BlockStatus:
		return fmt.Errorf("%w: no block status any more", ErrExportChanged)
	}
	const needed = FlagSendFlush | FlagSendTrim | FlagSendWriteZeroes
	if before.Flags&^now.Flags&needed != 0 || now.Flags&^before.Flags&FlagReadOnly != 0 {
		return fmt.Errorf("%w: transmission flags %#x, before %#x", ErrExportChanged, now.Flags, before.Flags)
	}
	return nil
}

// isFinal tells whether trying again is of no use.
func isFinal(err error) bool {
	var refused *OptionError
	return errors.Is(err, ErrExportChanged) ||
		errors.As(err, &refused) && refused.Option == OptSession && errors.Is(err, ErrRefused)
}

func (g *connGroup) alive() bool {
	select {
	case <-g.dead:
		return false
	default:
		return true
	}
}

func (g *connGroup) add(conn *Conn) {
	g.links = append(g.links, &link{g: g, conn: conn, wake: make(chan struct{}, 1), sent: make(chan struct{})})
}

func (g *connGroup) start() {
	for _, l := range g.links {
		g.running.Go(l.runSend)
		g.running.Go(l.runReceive)
	}
}

// kill ends all connections; every operation on them ends soon after.
func (g *connGroup) kill(cause error) {
	g.once.Do(func() {
		g.cause, g.deadAt = cause, time.Now()
		close(g.dead)
		for _, l := range g.links {
			if errors.Is(cause, net.ErrClosed) || errors.Is(cause, errStopping) {
				_ = l.conn.Close()
			} else {
				l.conn.abort()
			}
		}
		if !errors.Is(cause, net.ErrClosed) {
			g.client.o.Log.Warn("connections lost", "export", g.client.uri.String(), "err", cause)
		}
	})
}

// submit queues o on the connection with the least to do. False: the connections are dead, nothing was sent.
func (g *connGroup) submit(o *operation) bool {
	best := g.links[0]
	for _, l := range g.links[1:] {
		if l.inFlight.Load() < best.inFlight.Load() {
			best = l
		}
	}
	return best.submit(o)
}

func (l *link) submit(o *operation) bool {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return false
	}
	o.err = nil
	o.pending.Store(int32(len(o.calls)))
	l.inFlight.Add(1)
	l.queue = append(l.queue, o)
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	return true
}

// runSend sends what is queued until the group is dead.
func (l *link) runSend() {
	defer close(l.sent)
	var batch []*operation
	for {
		select {
		case <-l.wake:
		case <-l.g.dead:
			return
		}
		l.mu.Lock()
		batch, l.queue = l.queue, batch[:0]
		l.mu.Unlock()
		if err := l.send(batch); err != nil {
			l.g.kill(err)
			return
		}
		clear(batch)
	}
}

// send sends a batch of operations by one system call.
func (l *link) send(batch []*operation) error {
	for _, o := range batch {
		for i := range o.calls {
			if err := l.conn.Queue(&o.calls[i]); err != nil {
				o.calls[i].Err = syscall.EINVAL // this connection cannot do what another one could
				l.complete(o)
			}
		}
	}
	return l.conn.Send()
}

// runReceive takes answers until the connection is dead, then ends what was not answered.
func (l *link) runReceive() {
	var done [64]*Call
	for {
		n, err := l.conn.Receive(done[:])
		for _, call := range done[:n] {
			if call.Err == syscall.ESHUTDOWN {
				err = errStopping
			}
		}
		if err != nil {
			l.g.kill(err) // first, so that whoever tries again does not do so here
		}
		for _, call := range done[:n] {
			l.answered(call)
		}
		if err != nil {
			break
		}
	}
	<-l.sent
	l.abandon()
}

// answered ends a call that the server has answered.
func (l *link) answered(call *Call) {
	l.g.useful.Store(true)
	if call.Err == 0 && call.Command.writes() {
		l.g.client.answered.Add(1)
	}
	l.complete(call.op)
}

func (l *link) complete(o *operation) {
	if o.pending.Add(-1) == 0 {
		l.inFlight.Add(-1)
		o.done <- struct{}{}
	}
}

// abandon ends all that is not answered. No goroutine touches the calls any more.
func (l *link) abandon() {
	lost := fmt.Errorf("connection lost: %w", l.g.cause)
	for _, call := range l.conn.Unanswered() {
		if call.Command.writes() {
			l.g.lostWrites.Store(true)
		}
		call.op.err = lost
		l.complete(call.op)
	}
	l.mu.Lock()
	l.ended = true
	queue := l.queue
	l.queue = nil
	l.mu.Unlock()
	for _, o := range queue {
		o.err = fmt.Errorf("%w: %w", errNotSent, l.g.cause)
		o.done <- struct{}{}
	}
}
