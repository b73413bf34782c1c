package main

import (
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// answering is an NBD server that reads every request at once and answers it when it is told to.
type answering struct {
	answers  chan []byte
	requests atomic.Int64
	failed   chan error
}

func serveAnswering(t *testing.T, socket string, blocks uint64) *answering {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	a := &answering{answers: make(chan []byte, 1<<20), failed: make(chan error, 1)}
	go func() { a.failed <- a.serve(l, blocks) }()
	return a
}

func (a *answering) serve(l net.Listener, blocks uint64) error {
	c, err := l.Accept()
	if err != nil {
		return err
	}
	greeting := binary.BigEndian.AppendUint64(nil, nbdGreeting)
	greeting = binary.BigEndian.AppendUint64(greeting, nbdOption)
	if _, err := c.Write(append(greeting, 0, nbdFlags)); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, make([]byte, 4+16+len("vol"))); err != nil {
		return err
	}
	if _, err := c.Write(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint64(nil, blocks*blockBytes), 0)); err != nil {
		return err
	}
	go func() {
		for answer := range a.answers {
			if _, err := c.Write(answer); err != nil {
				return
			}
		}
	}()
	for {
		var h [nbdRequestSize]byte
		if _, err := io.ReadFull(c, h[:]); err != nil {
			return err
		}
		answer := binary.BigEndian.AppendUint32(nil, nbdSimpleReply)
		answer = binary.BigEndian.AppendUint32(answer, 0)
		answer = append(answer, h[8:16]...)
		if binary.BigEndian.Uint16(h[6:]) == nbdWrite {
			if _, err := io.CopyN(io.Discard, c, blockBytes); err != nil {
				return err
			}
		} else {
			answer = append(answer, make([]byte, blockBytes)...)
		}
		a.requests.Add(1)
		a.answers <- answer
	}
}

// A server that stops is charged with what came due meanwhile, though the client could not send all of it.
func TestPacedCountsFromWhenARequestWasDue(t *testing.T) {
	const iops, stopped = 200_000, 300 * time.Millisecond
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	released := make(chan struct{})
	go func() {
		// Nothing is even read for a while: the socket gets full.
		a := &answering{answers: make(chan []byte, 1<<20)}
		slow := &slowListener{Listener: l, released: released}
		_ = a.serve(slow, 64)
	}()
	p, err := dialPaced(socket, "vol", iops, 50)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.close(); err != nil {
			t.Error(err)
		}
	}()
	begun := time.Now()
	var took time.Duration
	if err := p.during(func() error {
		time.Sleep(stopped)
		took = time.Since(begun)
		close(released)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	h := p.latency()
	due := uint64(took/p.interval) * batchSize
	if h.Count() < due*9/10 || h.Count() <= pacedDepth {
		t.Errorf("%d requests were counted, about %d came due", h.Count(), due)
	}
	if h.Max() < stopped || h.Percentile(50) < stopped/4 {
		t.Errorf("highest latency %s, median %s with a server that did nothing for %s", h.Max(), h.Percentile(50), stopped)
	}
	if p.reads.Count() == 0 || p.writes.Count() == 0 {
		t.Errorf("%d reads and %d writes, want both", p.reads.Count(), p.writes.Count())
	}
}

// slowListener gives connections that read the handshake and then nothing until released is closed.
type slowListener struct {
	net.Listener
	released chan struct{}
}

func (l *slowListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return &slowConn{Conn: c, released: l.released}, err
}

type slowConn struct {
	net.Conn
	released chan struct{}
}

func (c *slowConn) Read(b []byte) (int, error) {
	if len(b) == nbdRequestSize {
		<-c.released
	}
	return c.Conn.Read(b)
}

func TestPacedKeepsToItsRate(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	a := serveAnswering(t, socket, 64)
	p, err := dialPaced(socket, "vol", 16_000, 70)
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if err := p.during(func() error { time.Sleep(200 * time.Millisecond); return nil }); err != nil {
		t.Fatal(err)
	}
	took := time.Since(begun)
	if err := p.close(); err != nil {
		t.Fatal(err)
	}
	<-a.failed // the end of the connection
	if p.interval != time.Millisecond {
		t.Errorf("batches are %s apart, want 1 ms", p.interval)
	}
	// One batch at 0 and one each interval, until the end at the latest.
	n := p.latency().Count()
	if most := uint64(took/p.interval+1) * batchSize; n < 200*batchSize || n > most || n != uint64(a.requests.Load()) {
		t.Errorf("%d requests were counted and %d served in %s, want %d to %d", n, a.requests.Load(), took, 200*batchSize, most)
	}
}

func TestPacedReportsAnError(t *testing.T) {
	p := &paced{in: make([]byte, 64)}
	answer := binary.BigEndian.AppendUint32(nil, nbdSimpleReply)
	answer = binary.BigEndian.AppendUint32(answer, 5) // EIO
	if err := p.parse(binary.BigEndian.AppendUint64(answer, 0), 0); err == nil {
		t.Error("an error was taken for an answer")
	}
}
