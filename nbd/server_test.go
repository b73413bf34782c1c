package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/nbd"
)

// TestShutdown: requests in flight end and are answered, later ones are not begun, options are refused.
func TestShutdown(t *testing.T) {
	s, h := serveHolding(t, nbd.Options{}, isWrite)
	s.listenTCP()
	data := pattern(1, 4096)
	busy := []*peer{s.dial().enter(0, "vol"), s.dialTCP().enter(1, "vol")}
	idle := s.dial().enter(2, "vol")
	handshaking, aborting := s.dial().greet(3), s.dial().greet(3)
	for i, p := range busy {
		p.send(p.request(cmdWrite, 0, uint64(i)*4096, 4096, data))
	}
	eventually(t, "writes submitted", func() bool { return h.count() == 2 })
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(context.Background()) }()
	idle.expectClosed()
	for _, p := range busy {
		p.Write(p.request(cmdWrite, 0, 1<<20, 4096, data))
	}
	handshaking.option(optGo, goData("vol"))
	handshaking.expectRefused(optGo, errShutdown)
	handshaking.option(optList)
	handshaking.expectRefused(optList, errShutdown)
	aborting.option(optAbort)
	aborting.expectReply(optAbort, repAck)
	if _, err := net.Dial("unix", s.socket); err == nil {
		t.Error("connections are still accepted")
	}
	select {
	case err := <-ended:
		t.Fatalf("Shutdown returned %v with requests in flight", err)
	default:
	}
	h.release()
	for _, p := range busy {
		if c := p.chunk(); c.cookie != 1 || c.errno != 0 {
			t.Errorf("write answered by %+v", c)
		}
		p.expectGone()
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	handshaking.expectGone()
	if got := s.device.Bytes(0, 2<<20); !bytes.Equal(got[:8192], append(data, data...)) || bytes.Contains(got[8192:], data) {
		t.Error("writes in flight are not there, or later ones are")
	}
	if err := s.Shutdown(context.Background()); err != nil {
		t.Errorf("second Shutdown: %v", err)
	}
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	} else if err := s.Serve(l); err != nil {
		t.Errorf("Serve after Shutdown: %v", err)
	}
}

// TestShutdownMidBatch: of requests that have arrived together, those not submitted yet when the server stops are
// not begun.
func TestShutdownMidBatch(t *testing.T) {
	s, g := serveGated(t)
	p, handshaking := s.dial().enter(0, "vol"), s.dial().greet(3)
	p.send(p.request(cmdRead, 0, gateOffset, 1), p.request(cmdWrite, 0, 0, 4096, pattern(1, 4096)), p.request(cmdFlush, 0, 0, 0))
	<-g.reached
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(context.Background()) }()
	for kind := errUnsup; kind == errUnsup; {
		handshaking.option(0)
		kind, _ = handshaking.reply(0)
	}
	close(g.open)
	p.expect(simpleMagic, uint32(0), uint64(1), uint8(0))
	p.expectClosed()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if n := s.device.Submitted.Load(); n != 1 {
		t.Errorf("%d requests submitted, want 1", n)
	}
}

// TestShutdownCut: what does not end in time is cut, and its requests are still released when they end.
func TestShutdownCut(t *testing.T) {
	s, h := serveHolding(t, nbd.Options{}, isWrite)
	p := s.dial().enter(0, "vol")
	p.send(p.request(cmdWrite, 0, 0, 4096, make([]byte, 4096)))
	eventually(t, "write submitted", func() bool { return h.count() == 1 })
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Shutdown: %v", err)
	}
	p.expectClosed()
	h.release()
	eventually(t, "write released", func() bool { return s.device.Settled() == nil })
}

// TestShutdownRepliesArrive: replies that are on their way when a server stops are not lost to a reset, though the
// client goes on sending.
func TestShutdownRepliesArrive(t *testing.T) {
	s, h := serveHolding(t, nbd.Options{}, isRead)
	s.listenTCP()
	p := s.dialTCP().enter(0, "vol")
	const reads = 8
	for range reads {
		p.send(p.request(cmdRead, 0, 0, 1<<20))
	}
	eventually(t, "reads submitted", func() bool { return h.count() == reads })
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(context.Background()) }()
	h.release()
	for range 100 {
		p.Write(p.request(cmdFlush, 0, 0, 0))
	}
	for i := range reads {
		p.expect(simpleMagic, uint32(0), uint64(i+1))
		p.receive(1 << 20)
	}
	p.expectGone()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// TestPlaces: a full server refuses by closing; clients that are in the handshake give way, others never.
func TestPlaces(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{MaxConnections: 3})
	working := []*peer{s.dial().enter(0, "vol"), s.dial().enter(0, "vol")}
	var silent []*peer
	for range 50 {
		silent = append(silent, s.dial())
	}
	p := s.dial().enter(0, "vol")
	for _, q := range silent {
		q.expectGone()
	}
	p.mustWrite(0, pattern(1, 4096))
	refused := s.dial()
	refused.expectClosed()
	for _, q := range append(working, p) {
		q.mustRead(0, pattern(1, 4096))
	}
	p.Close()
	eventually(t, "a place is free", func() bool {
		q := s.dial()
		defer q.Close()
		n, _ := q.Read(make([]byte, 18))
		return n == 18
	})
}

// TestClients: connections count for their export while they are in the transmission phase.
func TestClients(t *testing.T) {
	s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "a", Device: newDevice()}, &nbd.Export{Name: "b", Device: newDevice()})
	s.dial().greet(3)
	one, two, three := s.dial().enter(0, "a"), s.dial().enter(1, "a"), s.dial().enter(2, "b")
	clients := func(a, b int) func() bool {
		return func() bool { return s.Clients("a") == a && s.Clients("b") == b && s.Clients("") == 0 }
	}
	eventually(t, "two clients and one", clients(2, 1))
	one.send(one.request(cmdDisc, 0, 0, 0))
	two.Close()
	eventually(t, "none and one", clients(0, 1))
	three.Close()
	eventually(t, "none", clients(0, 0))
}

// TestHandshakeTimeout bounds the whole handshake, however busy the client is.
func TestHandshakeTimeout(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{HandshakeTimeout: 100 * time.Millisecond})
	silent, trickling, busy := s.dial(), s.dial(), s.dial().greet(3)
	go func() {
		for {
			if _, err := trickling.Write([]byte{0}); err != nil {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	busy.option(optList)
	silent.expectGone()
	trickling.expectGone()
	busy.expectGone()
}

// failingListener fails to accept as a process without descriptors does.
type failingListener struct {
	net.Listener
	failures atomic.Int64
	closed   chan struct{}
	once     sync.Once
}

func (l *failingListener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	default:
		l.failures.Add(1)
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
}

func (l *failingListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// TestAcceptBacksOff: without descriptors the server waits instead of spinning, and stops when it is told to.
func TestAcceptBacksOff(t *testing.T) {
	s := nbd.NewServer(nbd.Options{})
	l := &failingListener{closed: make(chan struct{})}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	eventually(t, "three failures", func() bool { return l.failures.Load() >= 3 })
	time.Sleep(100 * time.Millisecond)
	if n := l.failures.Load(); n > 10 {
		t.Errorf("%d attempts in 100 ms", n)
	}
	if err := s.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// TestNotASocket: what is not a socket is closed, not served.
func TestNotASocket(t *testing.T) {
	s := nbd.NewServer(nbd.Options{})
	client, end := net.Pipe()
	l := &pipeListener{conns: make(chan net.Conn, 1), closed: make(chan struct{})}
	l.conns <- end
	go s.Serve(l)
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read: %v, want EOF", err)
	}
	s.Shutdown(context.Background())
}

type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case nc := <-l.conns:
		return nc, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return nil }

// TestLog: clients cannot fill the log, nor put what they like into it.
func TestLog(t *testing.T) {
	var mu sync.Mutex
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(writerFunc(func(b []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return out.Write(b)
	}), &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := serve(t, newDevice(), nbd.Options{Log: log})
	p := s.dial().greet(3)
	p.option(optGo, goData("../../x\n\x1b[31mred\x00\xff"+strings.Repeat("y", 4000)))
	p.expectRefused(optGo, errUnknown)
	for range 500 {
		q := s.dial().greet(3)
		q.send("GET / HTTP/1.1\r\n\r\n", make([]byte, 64))
		q.expectClosed()
	}
	mu.Lock()
	defer mu.Unlock()
	lines := strings.Count(out.String(), "\n")
	if lines > 100 {
		t.Errorf("%d lines logged for 501 bad clients", lines)
	}
	for _, r := range out.String() {
		if (r < ' ' || r > '~') && r != '\n' {
			t.Fatalf("character %q in the log", r)
		}
	}
	if len(out.String()) > lines*600 {
		t.Errorf("%d bytes in %d lines", out.Len(), lines)
	}
	if !strings.Contains(out.String(), "../../x") {
		t.Error("the name asked for is not logged")
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
