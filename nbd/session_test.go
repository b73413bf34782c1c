package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/nbd"
)

func sessionData(id byte, attach, generation uint64, name string) []byte {
	return pack(bytes.Repeat([]byte{id}, 16), attach, generation, uint32(len(name)), name)
}

// attach names a session and expects to be taken in.
func (p *peer) attach(id byte, number, generation uint64) {
	p.t.Helper()
	p.option(optSession, sessionData(id, number, generation, "vol"))
	p.expectReply(optSession, repSession, uint64(0), uint64(0))
	p.expectReply(optSession, repAck)
}

func TestSessionOption(t *testing.T) {
	generation := uint64(7)
	var serves atomic.Pointer[error]
	serves.Store(new(error))
	s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "vol", Device: newDevice(),
		Generation: func() uint64 { return generation }, Incarnation: func() uint64 { return 9 },
		Ready: func() error { return *serves.Load() }},
		&nbd.Export{Name: "other", Device: newDevice()})
	tests := []struct {
		name string
		data []byte
		want uint32
	}{
		{"a new session takes the current generation", sessionData(1, 1, 0, "vol"), repAck},
		{"a session of the current generation", sessionData(2, 1, 7, "vol"), repAck},
		{"a session older than a rollback is refused for good", sessionData(3, 1, 6, "vol"), errPolicy},
		{"a session of a generation that this server has not seen", sessionData(4, 1, 8, "vol"), errShutdown},
		{"an unknown export", sessionData(5, 1, 0, "none"), errUnknown},
		{"no default export", sessionData(5, 1, 0, ""), errUnknown},
		{"too short", sessionData(6, 1, 0, "vol")[:35], errInvalid},
		{"name shorter than its length", sessionData(6, 1, 0, "vol")[:38], errInvalid},
		{"data behind the name", append(sessionData(6, 1, 0, "vol"), 0), errInvalid},
		{"empty", nil, errInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := s.dial().greet(3)
			p.t = t
			p.option(optSession, tt.data)
			if tt.want != repAck {
				p.expectRefused(optSession, tt.want)
				alive(p)
				return
			}
			p.expectReply(optSession, repSession, uint64(7), uint64(9))
			p.expectReply(optSession, repAck)
			p.option(optSession, tt.data)
			p.expectRefused(optSession, errInvalid) // once only
			p.option(optGo, goData("other"))
			p.expectRefused(optGo, errInvalid) // it is for that export
			p.enterGo("vol")
			p.mustRead(0, make([]byte, 1))
		})
	}
	recovering := errors.New("recovering")
	serves.Store(&recovering)
	p := s.dial().greet(3)
	p.option(optSession, sessionData(1, 1, 0, "vol"))
	if text := p.expectRefused(optSession, errShutdown); !strings.Contains(text, "recovering") {
		t.Errorf("refused with %q", text)
	}
}

// TestAttachNumbers: a higher number replaces, the same one joins, a lower one comes too late.
func TestAttachNumbers(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	join := func(id byte, number uint64) *peer {
		p := s.dial().greet(3)
		p.attach(id, number, 0)
		p.enterGo("vol")
		return p
	}
	first, second, stranger := join(1, 5), join(1, 5), join(2, 1)
	handshaking := s.dial().greet(3)
	handshaking.attach(1, 5, 0)
	for _, p := range []*peer{first, second, stranger} {
		p.mustRead(0, make([]byte, 4096))
	}
	newer := join(1, 6)
	for _, p := range []*peer{first, second, handshaking} {
		p.expectClosed()
	}
	newer.mustRead(0, make([]byte, 4096))
	stranger.mustRead(0, make([]byte, 4096))
	late := s.dial().greet(3)
	late.option(optSession, sessionData(1, 5, 0, "vol"))
	late.expectRefused(optSession, errPolicy)
	newer.Close()
	stranger.mustRead(0, make([]byte, 4096))
	late.option(optSession, sessionData(1, 5, 0, "vol"))
	late.expectRefused(optSession, errPolicy) // the session is remembered without a connection
	join(1, 6).mustRead(0, make([]byte, 4096))
}

// gate stops a device in the middle of a batch: the READ at gateOffset does not return from Submit before it is
// opened. It stands for a reader that is descheduled at the worst moment.
type gate struct {
	reached chan struct{}
	open    chan struct{}
	ended   chan struct{} // one for every connection that has ended
}

// Enabled, Handle, WithAttrs and WithGroup make the log of the server tell of connections that have ended.
func (g *gate) Enabled(context.Context, slog.Level) bool { return true }
func (g *gate) WithAttrs([]slog.Attr) slog.Handler       { return g }
func (g *gate) WithGroup(string) slog.Handler            { return g }
func (g *gate) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "connection ended" || r.Message == "connection closed" {
		g.ended <- struct{}{}
	}
	return nil
}

const gateOffset = 8 << 20

func serveGated(t testing.TB) (*testServer, *gate) {
	g := &gate{make(chan struct{}, 1), make(chan struct{}), make(chan struct{}, 10)}
	d := newDevice()
	d.Defer = func(r *nbd.Request, _ func()) bool {
		if r.Command == nbd.CmdRead && r.Offset == gateOffset {
			g.reached <- struct{}{}
			<-g.open
		}
		return false
	}
	return serve(t, d, nbd.Options{Log: slog.New(g)}), g
}

var (
	oldData = pattern(1, 4096)
	newData = pattern(2, 4096)
)

// checkNewest is the checker of invariant 16: after the answered write of newData, written when the connection of
// the unanswered write of oldData had been replaced, nothing brings oldData back. That connection has ended.
func checkNewest(s *testServer) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		return err
	}
	if got := s.device.Bytes(0, 4096); !bytes.Equal(got, newData) {
		return fmt.Errorf("an older write was applied over a newer answered one: old %v", bytes.Equal(got, oldData))
	}
	return nil
}

// checkFencing replaces a connection of a session while a write of it is received but not submitted.
func checkFencing(t *testing.T, oneSegment bool) error {
	s, g := serveGated(t)
	old := s.dial().greet(3)
	old.attach(1, 1, 0)
	old.enterGo("vol")
	blocker, write := old.request(cmdRead, 0, gateOffset, 1), old.request(cmdWrite, 0, 0, 4096, oldData)
	if oneSegment {
		old.send(blocker, write)
		<-g.reached
	} else {
		old.send(blocker)
		<-g.reached
		old.send(write)
	}
	fencing, replaced := make(chan struct{}), make(chan struct{})
	go func() {
		// The replies to both requests come only where nothing was fenced; the client has forgotten them.
		io.CopyN(io.Discard, old, 16+1+16)
		old.Close()
		close(fencing)
	}()
	go func() {
		defer close(replaced)
		p := s.dial().greet(3)
		p.attach(1, 2, 0)
		p.enterGo("vol")
		p.mustWrite(0, newData)
	}()
	// Either the fence closes the old connection first, or the new one is served without waiting for it.
	select {
	case <-fencing:
	case <-replaced:
	}
	close(g.open)
	<-replaced
	<-g.ended
	return checkNewest(s)
}

// checkClosed closes a connection both ways, or resets it, while a write of it is received but not submitted.
func checkClosed(t *testing.T, oneSegment, reset bool) error {
	s, g := serveGated(t)
	s.listenTCP()
	old := s.dial()
	if reset {
		old = s.dialTCP()
	}
	old.enter(0, "vol")
	old.mustWrite(4096, oldData) // it was alive before
	blocker, write := old.request(cmdRead, 0, gateOffset, 1), old.request(cmdWrite, 0, 0, 4096, oldData)
	if oneSegment {
		old.send(blocker, write)
		<-g.reached
	} else {
		old.send(blocker)
		<-g.reached
		old.send(write)
	}
	if nc, ok := old.Conn.(*net.TCPConn); ok {
		nc.SetLinger(0)
	}
	old.Close()
	s.dial().enter(0, "vol").mustWrite(0, newData)
	close(g.open)
	<-g.ended
	return checkNewest(s)
}

// TestFencing and TestClosedConnections hold the server to invariant 16 of the design.
func TestFencing(t *testing.T) {
	for _, oneSegment := range []bool{true, false} {
		if err := checkFencing(t, oneSegment); err != nil {
			t.Errorf("one segment %v: %v", oneSegment, err)
		}
	}
}

func TestClosedConnections(t *testing.T) {
	for i := range 4 {
		if err := checkClosed(t, i&1 == 0, i&2 == 0); err != nil {
			t.Errorf("case %d: %v", i, err)
		}
	}
}

// TestFenceWaitsForSubmitted: what the device has of an old connection ends before the new one is served.
func TestFenceWaitsForSubmitted(t *testing.T) {
	s, h := serveHolding(t, nbd.Options{}, isWrite)
	old := s.dial().greet(3)
	old.attach(1, 1, 0)
	old.enterGo("vol")
	old.send(old.request(cmdWrite, 0, 0, 4096, oldData))
	eventually(t, "write submitted", func() bool { return h.count() == 1 })
	p := s.dial().greet(3)
	p.option(optSession, sessionData(1, 2, 0, "vol"))
	old.expectClosed() // fenced, and still not served:
	p.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := p.Read(make([]byte, 1)); err == nil {
		t.Fatalf("%d bytes of an answer while an old write was at work", n)
	}
	p.SetReadDeadline(time.Now().Add(patience))
	h.release()
	p.expectReply(optSession, repSession, uint64(0), uint64(0))
	p.expectReply(optSession, repAck)
	p.enterGo("vol")
	p.mustRead(0, oldData)
}

// TestFenceIsBounded: a fence that cannot end does not outlast the handshake.
func TestFenceIsBounded(t *testing.T) {
	s, h := serveHolding(t, nbd.Options{HandshakeTimeout: 100 * time.Millisecond}, isWrite)
	old := s.dial().greet(3)
	old.attach(1, 1, 0)
	old.enterGo("vol")
	old.send(old.request(cmdWrite, 0, 0, 4096, oldData))
	eventually(t, "write submitted", func() bool { return h.count() == 1 })
	p := s.dial().greet(3)
	p.option(optSession, sessionData(1, 2, 0, "vol"))
	p.expectGone()
	again := s.dial().greet(3)
	again.option(optSession, sessionData(1, 1, 0, "vol"))
	again.expectRefused(optSession, errPolicy) // the attempt counts
}

// TestManySessions: the memory of sessions without a connection is bounded, and those with one stay.
func TestManySessions(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	stays := s.dial().greet(3)
	stays.attach(1, 10, 0)
	stays.enterGo("vol")
	for i := range 5000 {
		p := s.dial().greet(3)
		p.option(optSession, pack(uint64(i), uint64(0x77), uint64(5), uint64(0), uint32(3), "vol"))
		p.expectReply(optSession, repSession, uint64(0), uint64(0))
		p.expectReply(optSession, repAck)
		p.Close()
	}
	late := s.dial().greet(3)
	late.option(optSession, sessionData(1, 9, 0, "vol"))
	late.expectRefused(optSession, errPolicy)
	forgotten := s.dial().greet(3)
	forgotten.option(optSession, pack(uint64(0), uint64(0x77), uint64(1), uint64(0), uint32(3), "vol"))
	forgotten.expectReply(optSession, repSession, uint64(0), uint64(0))
	forgotten.expectReply(optSession, repAck)
	remembered := s.dial().greet(3)
	remembered.option(optSession, pack(uint64(4999), uint64(0x77), uint64(1), uint64(0), uint32(3), "vol"))
	remembered.expectRefused(optSession, errPolicy)
}
