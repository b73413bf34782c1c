package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Options are the limits of a Server. The zero value of each means its default.
type Options struct {
	// Log gets one line for every connection that ends badly, at a bounded rate; nil means none.
	Log *slog.Logger
	// MaxConnections is how many clients may be connected at once; 512. Where all places are taken, those that
	// are in the handshake for longest give way.
	MaxConnections int
	// HandshakeTimeout bounds the whole handshake of a client; 10 s.
	HandshakeTimeout time.Duration
	// StallTimeout is how long a client may pause within a message; 30 s. Between messages it may be idle for
	// ever.
	StallTimeout time.Duration
	// UnreadTimeout is how long a client may leave replies unread without reading any of them; 60 s.
	UnreadTimeout time.Duration
	// SlowAfter is after what time a client that moves less than 1 MiB/s is cut, where it holds what others
	// wait for; 5 s.
	SlowAfter time.Duration
	// StagingBytes is the memory for payloads for which a device has no room at once; 16 MiB. It is raised to
	// the largest payload of any export.
	StagingBytes int64
}

func (o Options) withDefaults() Options {
	setDefault(&o.MaxConnections, defaultMaxConnections)
	setDefault(&o.HandshakeTimeout, defaultHandshakeTimeout)
	setDefault(&o.StallTimeout, defaultStallTimeout)
	setDefault(&o.UnreadTimeout, defaultUnreadTimeout)
	setDefault(&o.SlowAfter, defaultSlowAfter)
	setDefault(&o.StagingBytes, defaultStagingBytes)
	return o
}

func setDefault[T int | int64 | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Server serves exports to NBD clients (the NBD project's doc/proto.md): fixed newstyle negotiation, simple,
// structured and extended replies. Its methods are safe for concurrent use.
type Server struct {
	options Options
	log     *slog.Logger
	staging *staging
	tick    time.Duration
	ticks   atomic.Int64
	closed  chan struct{} // closed when Shutdown is over
	work    sync.WaitGroup

	mu        sync.Mutex
	exports   exports
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	handshake []*conn // those of conns that have not entered transmission, oldest first
	started   bool
	stopping  bool
}

// NewServer returns a server without exports.
func NewServer(o Options) *Server {
	o = o.withDefaults()
	s := &Server{
		options:   o,
		log:       limitLog(o.Log),
		staging:   newStaging(o.StagingBytes),
		tick:      tickFor(o),
		closed:    make(chan struct{}),
		listeners: make(map[net.Listener]struct{}),
		conns:     make(map[*conn]struct{}),
	}
	s.ticks.Store(1)
	return s
}

// tickFor is how exactly the shortest limit is kept: an eighth of it, and never finer than it costs.
func tickFor(o Options) time.Duration {
	shortest := min(o.StallTimeout, o.UnreadTimeout, o.SlowAfter)
	return min(max(shortest/8, 5*time.Millisecond), time.Second)
}

// AddExport adds e. Clients see it from then on.
func (s *Server) AddExport(e *Export) error {
	x, err := newExport(e)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, have := range s.exports {
		if have.Name == x.Name {
			return fmt.Errorf("export %q: %w", x.Name, errDuplicateExport)
		}
	}
	s.staging.grow(int(x.MaxPayload))
	s.exports = append(s.exports, x)
	return nil
}

// Clients is how many connections to the export of that name, exactly, are past their handshake.
func (s *Server) Clients(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.exports {
		if x.Name == name {
			return int(x.clients.Load())
		}
	}
	return 0
}

func (s *Server) findExport(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exports.find(name)
}

func (s *Server) listExports() exports {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exports[:len(s.exports):len(s.exports)]
}

func (s *Server) isStopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping
}

// connections returns all connections.
func (s *Server) connections() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	return conns
}

// Serve accepts clients from l, a *net.TCPListener or a *net.UnixListener, until Shutdown; then it returns nil. It
// closes l.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	if !s.enter(l) {
		return nil
	}
	defer s.leave(l)
	var wait time.Duration
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			wait = 0
			s.accept(nc)
		case s.isStopping():
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept: %w", err)
		default:
			wait = s.backOff(wait, err)
		}
	}
}

// The waits after a failed accept: it fails for want of descriptors or memory, which others must give back first.
const (
	minAcceptWait = 5 * time.Millisecond
	maxAcceptWait = time.Second
)

func (s *Server) backOff(wait time.Duration, err error) time.Duration {
	wait = min(max(2*wait, minAcceptWait), maxAcceptWait)
	s.log.Warn("client not accepted", "err", err, "retry_after", wait)
	select {
	case <-time.After(wait):
	case <-s.closed:
	}
	return wait
}

func (s *Server) enter(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.listeners[l] = struct{}{}
	if !s.started {
		s.started = true
		s.work.Go(s.runWatch)
	}
	return true
}

func (s *Server) leave(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}

// accept starts to serve a client, if there is a place for it.
func (s *Server) accept(nc net.Conn) {
	tuneSocket(nc)
	c, err := newConn(s, nc)
	if err != nil {
		s.log.Warn("client not accepted", "err", err)
		nc.Close()
		return
	}
	if !s.admit(c) {
		nc.Close()
		s.log.Warn("client refused: all places are taken", "peer", peerName(nc), "places", s.options.MaxConnections)
	}
}

// admit gives c a place and starts it.
func (s *Server) admit(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping || len(s.conns) >= s.options.MaxConnections && !s.evict() {
		return false
	}
	s.conns[c] = struct{}{}
	s.handshake = append(s.handshake, c)
	s.work.Go(func() {
		c.serve()
		s.remove(c)
	})
	return true
}

// evict takes the place of the client that is in the handshake for longest: clients that connect and say nothing
// must not keep out those that do. It reports false when there is none. s.mu is held.
func (s *Server) evict() bool {
	if len(s.handshake) == 0 {
		return false
	}
	c := s.handshake[0]
	s.handshake = s.handshake[1:]
	delete(s.conns, c)
	c.kill(errEvicted)
	return true
}

var errEvicted = errors.New("still in the handshake when its place was needed")

// entered takes note that c is about to enter the transmission phase.
func (s *Server) entered(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgetHandshake(c)
}

func (s *Server) forgetHandshake(c *conn) {
	for i := range s.handshake {
		if s.handshake[i] == c {
			s.handshake = append(s.handshake[:i], s.handshake[i+1:]...)
			return
		}
	}
}

func (s *Server) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	s.forgetHandshake(c)
}

// Shutdown stops the server: no new connections, options answered by ERR_SHUTDOWN, no new requests. Requests in
// flight end and are answered; then all connections are closed. When ctx ends first, connections are cut and its
// error is returned; requests that the device still has end later.
func (s *Server) Shutdown(ctx context.Context) error {
	transmitting := s.beginShutdown()
	err := awaitGone(ctx, transmitting)
	for _, c := range s.connections() {
		c.kill(errStopped)
	}
	s.close()
	if err == nil {
		s.work.Wait()
	}
	return err
}

// beginShutdown closes the listeners and stops the connections that are in the transmission phase, which it
// returns.
func (s *Server) beginShutdown() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopping = true
	for l := range s.listeners {
		l.Close()
	}
	waiting := make(map[*conn]bool)
	for _, c := range s.handshake {
		waiting[c] = true
	}
	var transmitting []*conn
	for c := range s.conns {
		if !waiting[c] {
			c.stop()
			transmitting = append(transmitting, c)
		}
	}
	return transmitting
}

func awaitGone(ctx context.Context, conns []*conn) error {
	for _, c := range conns {
		select {
		case <-c.gone:
		case <-ctx.Done():
			return fmt.Errorf("wait for requests in flight: %w", ctx.Err())
		}
	}
	return nil
}

func (s *Server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.closed:
	default:
		close(s.closed)
	}
}
