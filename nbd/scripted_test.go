package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/nbd"
	"github.com/ramshelf/ramshelf/nbd/nbdtest"
)

// The numbers of the protocol as proto.md has them, so that a wrong one in the package shows.
const (
	nbdMagic      = uint64(0x4e42444d41474943)
	iHaveOpt      = uint64(0x49484156454f5054)
	optReplyMagic = uint64(0x0003e889045565a9)
	reqMagic      = uint32(0x25609513)
	extReqMagic   = uint32(0x21e41c71)
	simpleMagic   = uint32(0x67446698)
	chunkMagic    = uint32(0x668e33ef)
	extReplyMagic = uint32(0x6e8a278c)

	optExportName = uint32(1)
	optAbort      = uint32(2)
	optList       = uint32(3)
	optStartTLS   = uint32(5)
	optInfo       = uint32(6)
	optGo         = uint32(7)
	optStructured = uint32(8)
	optListMeta   = uint32(9)
	optSetMeta    = uint32(10)
	optExtended   = uint32(11)
	optSession    = uint32(0x52534853)

	repAck     = uint32(1)
	repServer  = uint32(2)
	repInfo    = uint32(3)
	repMeta    = uint32(4)
	repSession = uint32(0x52534853)

	errUnsup        = uint32(1<<31 + 1)
	errPolicy       = uint32(1<<31 + 2)
	errInvalid      = uint32(1<<31 + 3)
	errUnknown      = uint32(1<<31 + 6)
	errShutdown     = uint32(1<<31 + 7)
	errTooBig       = uint32(1<<31 + 9)
	errExtHeaderReq = uint32(1<<31 + 10)

	cmdRead, cmdWrite, cmdDisc, cmdFlush, cmdTrim, cmdCache, cmdZeroes, cmdStatus = uint16(0), uint16(1), uint16(2),
		uint16(3), uint16(4), uint16(5), uint16(6), uint16(7)

	flagFUA, flagNoHole, flagDF, flagReqOne, flagFastZero, flagPayload = uint16(1), uint16(2), uint16(4), uint16(8),
		uint16(16), uint16(32)

	chunkDone                             = uint16(1)
	chunkNone, chunkData, chunkHole       = uint16(0), uint16(1), uint16(2)
	chunkStatus, chunkStatusExt, chunkErr = uint16(5), uint16(6), uint16(0x8001)
)

// patience is how long a test waits for what must come. Only a failing test takes that long.
const patience = 20 * time.Second

// pack puts numbers and strings behind each other, big-endian.
func pack(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case uint8:
			b = append(b, p)
		case uint16:
			b = binary.BigEndian.AppendUint16(b, p)
		case uint32:
			b = binary.BigEndian.AppendUint32(b, p)
		case uint64:
			b = binary.BigEndian.AppendUint64(b, p)
		case string:
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		default:
			panic(fmt.Sprintf("pack %T", p))
		}
	}
	return b
}

// testServer is a server on a unix socket, and with tcp on a TCP port too.
type testServer struct {
	*nbd.Server
	t      testing.TB
	socket string
	tcp    string
	device *nbdtest.Memory

	serving sync.WaitGroup
}

const testSize = 16 << 20

// newDevice returns a device of testSize bytes.
func newDevice() *nbdtest.Memory { return nbdtest.NewMemory(testSize) }

// serve starts a server with d as its only export "vol".
func serve(t testing.TB, d *nbdtest.Memory, o nbd.Options) *testServer {
	t.Helper()
	s := serveExports(t, o, &nbd.Export{Name: "vol", Description: "a volume", Device: d, Contexts: nbdtest.Contexts})
	s.device = d
	return s
}

func serveExports(t testing.TB, o nbd.Options, exports ...*nbd.Export) *testServer {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &testServer{Server: nbd.NewServer(o), t: t, socket: filepath.Join(dir, "s")}
	for _, e := range exports {
		if err := s.AddExport(e); err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.Listen("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	s.listen(l)
	t.Cleanup(s.stop)
	return s
}

func (s *testServer) listen(l net.Listener) {
	s.serving.Go(func() {
		if err := s.Serve(l); err != nil {
			s.t.Errorf("Serve: %v", err)
		}
	})
}

func (s *testServer) listenTCP() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	s.tcp = l.Addr().String()
	s.listen(l)
}

func (s *testServer) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		s.t.Errorf("Shutdown: %v", err)
	}
	s.serving.Wait()
	if s.device != nil {
		if err := s.device.Settled(); err != nil {
			s.t.Error(err)
		}
	}
}

// peer is the client's end of a connection, driven byte by byte.
type peer struct {
	t testing.TB
	net.Conn
	mode   int // 0 simple, 1 structured, 2 extended
	cookie uint64
}

func (s *testServer) dial() *peer    { return s.dialNet("unix", s.socket) }
func (s *testServer) dialTCP() *peer { return s.dialNet("tcp", s.tcp) }
func (s *testServer) dialNet(network, address string) *peer {
	s.t.Helper()
	nc, err := net.DialTimeout(network, address, patience)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	return &peer{t: s.t, Conn: nc}
}

// send writes all parts at once.
func (p *peer) send(parts ...any) {
	p.t.Helper()
	if _, err := p.Write(pack(parts...)); err != nil {
		p.t.Fatalf("send: %v", err)
	}
}

// receive reads n bytes.
func (p *peer) receive(n int) []byte {
	p.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(p, b); err != nil {
		p.t.Fatalf("receive %d bytes: %v", n, err)
	}
	return b
}

// expect reads exactly the bytes of parts.
func (p *peer) expect(parts ...any) {
	p.t.Helper()
	want := pack(parts...)
	if got := p.receive(len(want)); !bytes.Equal(got, want) {
		p.t.Fatalf("received\n%swant\n%s", hex.Dump(head(got)), hex.Dump(head(want)))
	}
}

func head(b []byte) []byte { return b[:min(len(b), 256)] }

// expectClosed expects that the server closes the connection without another byte.
func (p *peer) expectClosed() {
	p.t.Helper()
	var b [1]byte
	n, err := p.Read(b[:])
	if n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Fatalf("received %d bytes, %v; want the connection closed", n, err)
	}
}

// expectGone expects that the server closes the connection, whatever it sends before.
func (p *peer) expectGone() {
	p.t.Helper()
	if _, err := io.Copy(io.Discard, p); errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Fatal("the server keeps the connection open")
	}
}

// greet does the greeting and answers with flags.
func (p *peer) greet(flags uint32) *peer {
	p.t.Helper()
	p.expect(nbdMagic, iHaveOpt, uint16(3))
	p.send(flags)
	return p
}

func option(opt uint32, data ...any) []byte {
	d := pack(data...)
	return pack(iHaveOpt, opt, uint32(len(d)), d)
}

func (p *peer) option(opt uint32, data ...any) {
	p.t.Helper()
	p.send(option(opt, data...))
}

// reply reads one option reply.
func (p *peer) reply(opt uint32) (uint32, []byte) {
	p.t.Helper()
	p.expect(optReplyMagic, opt)
	b := p.receive(8)
	return binary.BigEndian.Uint32(b), p.receive(int(binary.BigEndian.Uint32(b[4:])))
}

// expectReply reads one option reply with exactly that data.
func (p *peer) expectReply(opt, kind uint32, data ...any) {
	p.t.Helper()
	got, d := p.reply(opt)
	if want := pack(data...); got != kind || !bytes.Equal(d, want) {
		p.t.Fatalf("option %d answered by %#x %q, want %#x %q", opt, got, d, kind, want)
	}
}

// expectRefused reads one error reply; its text is free.
func (p *peer) expectRefused(opt, kind uint32) string {
	p.t.Helper()
	got, text := p.reply(opt)
	if got != kind {
		p.t.Fatalf("option %d answered by %#x %q, want %#x", opt, got, text, kind)
	}
	if len(text) > 4096 {
		p.t.Fatalf("error text of %d bytes", len(text))
	}
	return string(text)
}

func goData(name string, infos ...uint16) []byte {
	b := pack(uint32(len(name)), name, uint16(len(infos)))
	for _, i := range infos {
		b = append(b, pack(i)...)
	}
	return b
}

func metaData(name string, queries ...string) []byte {
	b := pack(uint32(len(name)), name, uint32(len(queries)))
	for _, q := range queries {
		b = append(b, pack(uint32(len(q)), q)...)
	}
	return b
}

// enter goes through the handshake into the transmission phase of export name, with those contexts.
func (p *peer) enter(mode int, name string, contexts ...string) *peer {
	p.t.Helper()
	p.greet(3)
	p.agree(mode, name, contexts...)
	p.enterGo(name)
	return p
}

// agree negotiates the form of replies and the contexts.
func (p *peer) agree(mode int, name string, contexts ...string) {
	p.t.Helper()
	p.mode = mode
	if mode > 0 {
		opt := []uint32{optStructured, optExtended}[mode-1]
		p.option(opt)
		p.expectReply(opt, repAck)
	}
	if len(contexts) > 0 {
		p.option(optSetMeta, metaData(name, contexts...))
		for kind := uint32(0); kind != repAck; {
			kind, _ = p.reply(optSetMeta)
			if kind != repAck && kind != repMeta {
				p.t.Fatalf("SET_META_CONTEXT answered by %#x", kind)
			}
		}
	}
}

func (p *peer) enterGo(name string) uint16 {
	p.t.Helper()
	p.option(optGo, goData(name))
	kind, info := p.reply(optGo)
	if kind != repInfo || len(info) != 12 {
		p.t.Fatalf("GO answered by %#x %q", kind, info)
	}
	p.expectReply(optGo, repAck)
	return binary.BigEndian.Uint16(info[10:])
}

// request makes the bytes of a request. Extended writes get their flag.
func (p *peer) request(cmd, flags uint16, offset, length uint64, payload ...any) []byte {
	p.cookie++
	if p.mode == 2 {
		if cmd == cmdWrite {
			flags |= flagPayload
		}
		return pack(extReqMagic, flags, cmd, p.cookie, offset, length, pack(payload...))
	}
	return pack(reqMagic, flags, cmd, p.cookie, offset, uint32(length), pack(payload...))
}

// chunk is one reply, or part of one.
type chunk struct {
	flags, kind uint16 // of a simple reply: done, none or an error
	cookie      uint64
	offset      uint64
	payload     []byte
	simple      bool
	errno       uint32
}

// chunk reads the next reply or chunk. The data of a simple reply is not read.
func (p *peer) chunk() chunk {
	p.t.Helper()
	magic := binary.BigEndian.Uint32(p.receive(4))
	switch {
	case magic == simpleMagic && p.mode < 2:
		b := p.receive(12)
		return chunk{flags: chunkDone, simple: true, errno: binary.BigEndian.Uint32(b), cookie: binary.BigEndian.Uint64(b[4:])}
	case magic == chunkMagic && p.mode == 1:
		b := p.receive(16)
		return p.payload(chunk{flags: binary.BigEndian.Uint16(b), kind: binary.BigEndian.Uint16(b[2:]),
			cookie: binary.BigEndian.Uint64(b[4:])}, uint64(binary.BigEndian.Uint32(b[12:])))
	case magic == extReplyMagic && p.mode == 2:
		b := p.receive(28)
		return p.payload(chunk{flags: binary.BigEndian.Uint16(b), kind: binary.BigEndian.Uint16(b[2:]),
			cookie: binary.BigEndian.Uint64(b[4:]), offset: binary.BigEndian.Uint64(b[12:])}, binary.BigEndian.Uint64(b[20:]))
	}
	p.t.Fatalf("reply magic %#x in mode %d", magic, p.mode)
	return chunk{}
}

func (p *peer) payload(c chunk, n uint64) chunk {
	p.t.Helper()
	if n > 64<<20 {
		p.t.Fatalf("chunk of %d bytes", n)
	}
	c.payload = p.receive(int(n))
	if c.kind == chunkErr {
		c.errno = binary.BigEndian.Uint32(c.payload)
	}
	return c
}

// status sends a request without an answer of data and returns the error of the reply.
func (p *peer) status(cmd, flags uint16, offset, length uint64, payload ...any) syscall.Errno {
	p.t.Helper()
	p.send(p.request(cmd, flags, offset, length, payload...))
	return p.expectStatus()
}

func (p *peer) expectStatus() syscall.Errno {
	p.t.Helper()
	c := p.chunk()
	if c.cookie != p.cookie {
		p.t.Fatalf("cookie %d answered, want %d", c.cookie, p.cookie)
	}
	if c.flags&chunkDone == 0 {
		p.t.Fatalf("reply of more than one chunk: %+v", c)
	}
	return syscall.Errno(c.errno)
}

// read sends a READ and returns the data and the error of the reply.
func (p *peer) read(flags uint16, offset, length uint64) ([]byte, syscall.Errno) {
	p.t.Helper()
	p.send(p.request(cmdRead, flags, offset, length))
	return p.readReply(p.cookie, offset, length)
}

func (p *peer) readReply(cookie, offset, length uint64) ([]byte, syscall.Errno) {
	p.t.Helper()
	var data []byte
	for covered := uint64(0); ; {
		c := p.chunk()
		if data == nil && c.errno == 0 && !c.simple {
			data = make([]byte, length)
		}
		if c.cookie != cookie {
			p.t.Fatalf("cookie %d answered, want %d", c.cookie, cookie)
		}
		switch {
		case c.errno != 0:
			return nil, syscall.Errno(c.errno)
		case c.simple:
			return p.receive(int(length)), 0
		case c.kind == chunkData:
			at := binary.BigEndian.Uint64(c.payload) - offset
			covered += uint64(copy(data[at:], c.payload[8:]))
		case c.kind == chunkHole:
			covered += uint64(binary.BigEndian.Uint32(c.payload[8:]))
		}
		if c.flags&chunkDone != 0 {
			if covered != length {
				p.t.Fatalf("read of %d bytes answered with %d", length, covered)
			}
			return data, 0
		}
	}
}

// mustWrite writes data and expects success.
func (p *peer) mustWrite(offset uint64, data []byte) {
	p.t.Helper()
	if err := p.status(cmdWrite, 0, offset, uint64(len(data)), data); err != 0 {
		p.t.Fatalf("write of %d bytes at %d: %v", len(data), offset, err)
	}
}

// mustRead reads and expects want.
func (p *peer) mustRead(offset uint64, want []byte) {
	p.t.Helper()
	got, err := p.read(0, offset, uint64(len(want)))
	if err != 0 {
		p.t.Fatalf("read of %d bytes at %d: %v", len(want), offset, err)
	}
	if !bytes.Equal(got, want) {
		p.t.Fatalf("read of %d bytes at %d gave other data than was written", len(want), offset)
	}
}

// eventually waits until ok, which must come true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// pattern returns n bytes that differ from those of another seed.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7) ^ byte(i>>8) ^ seed
	}
	return b
}
