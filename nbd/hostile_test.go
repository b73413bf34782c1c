package nbd_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/nbd"
	"github.com/ramshelf/ramshelf/nbd/nbdtest"
)

// unharmed shows that the server still serves others.
func unharmed(s *testServer) {
	s.t.Helper()
	p := s.dial().enter(1, "vol")
	data := pattern(77, 10000)
	p.mustWrite(3<<20, data)
	p.mustRead(3<<20, data)
	p.Close()
}

// conversation is a valid one with everything in it, as the client sends it.
func conversation() []byte {
	p := &peer{mode: 1}
	return pack(uint32(3),
		option(optList), option(optStructured), option(optSetMeta, metaData("vol", "base:allocation")),
		option(optInfo, goData("vol", 3)), option(optGo, goData("vol", 1, 2, 3)),
		p.request(cmdWrite, 0, 0, 5000, pattern(1, 5000)), p.request(cmdRead, 0, 0, 5000),
		p.request(cmdStatus, 0, 0, 1<<20), p.request(cmdZeroes, flagFUA, 100, 3000), p.request(cmdTrim, 0, 8192, 8192),
		p.request(cmdFlush, 0, 0, 0), p.request(cmdDisc, 0, 0, 0))
}

// TestCutAnywhere closes, half-closes or resets the connection after every byte of a conversation
// (CVE-2013-7441, CVE-2017-9524).
func TestCutAnywhere(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	s.listenTCP()
	all := conversation()
	for n := 0; n <= len(all); n++ {
		if n > 300 && n < len(all)-300 && n%97 != 0 {
			continue // inside the payload
		}
		p := s.dial()
		p.send(all[:n])
		switch n % 3 {
		case 0:
			p.Close()
		case 1:
			p.Conn.(*net.UnixConn).CloseWrite()
			p.expectGone()
		default:
			q := s.dialTCP()
			q.send(all[:n])
			q.Conn.(*net.TCPConn).SetLinger(0)
			q.Close()
		}
	}
	unharmed(s)
}

// TestSegments: a conversation in single bytes and one in a single segment have the same answer.
func TestSegments(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	var answers [][]byte
	for _, size := range []int{1, 7, 1 << 20} {
		p := s.dial()
		go func() {
			for all := conversation(); len(all) > 0; {
				k := min(size, len(all))
				if _, err := p.Write(all[:k]); err != nil {
					t.Error(err)
					return
				}
				all = all[k:]
			}
		}()
		b, err := io.ReadAll(p)
		if err != nil {
			t.Fatal(err)
		}
		answers = append(answers, b)
	}
	for i := 1; i < len(answers); i++ {
		if !bytes.Equal(answers[i], answers[0]) {
			t.Errorf("answer %d differs: %d and %d bytes", i, len(answers[i]), len(answers[0]))
		}
	}
}

// TestOtherProtocols: what is no NBD client is disconnected.
func TestOtherProtocols(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	for _, hello := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"SSH-2.0-OpenSSH_9.2\r\n",
		"\x00\x00\x00\x03NBDMAGIC\x00\x00\x00\x07\x00\x00\x00\x00",
		"\x00\x00\x00\x03" + strings.Repeat("\xff", 64),
	} {
		p := s.dial()
		p.expect(nbdMagic, iHaveOpt, uint16(3))
		p.send(hello)
		p.expectClosed()
	}
	wrong := s.dial().enter(0, "vol")
	wrong.send("\x25\x60\x95\x12", make([]byte, 24))
	wrong.expectClosed()
	compact := s.dial().enter(2, "vol")
	compact.send(reqMagic, make([]byte, 28))
	compact.expectClosed()
	unharmed(s)
}

// TestNames goes through the lengths at which names broke other servers (CVE-2017-15118, CVE-2020-10761,
// CVE-2022-26495), in every option that has one.
func TestNames(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	names := []string{"../../x", "a\x00b", "\xff\xfe", "new\nline", "\x1b[2J"}
	for _, n := range []int{1, 255, 256, 257, 4095, 4096, 4097, 60000} {
		names = append(names, strings.Repeat("n", n))
	}
	for _, name := range names {
		want := errUnknown
		if len(name) > 4096 {
			want = errTooBig
		}
		p := s.dial().greet(3)
		p.option(optStructured)
		p.expectReply(optStructured, repAck)
		p.option(optInfo, goData(name))
		p.expectRefused(optInfo, want)
		p.option(optGo, goData(name))
		p.expectRefused(optGo, want)
		p.option(optListMeta, metaData(name, "base:"))
		p.expectRefused(optListMeta, want)
		p.option(optSetMeta, metaData(name, "base:"))
		p.expectRefused(optSetMeta, want)
		p.option(optSession, sessionData(1, 1, 0, name))
		p.expectRefused(optSession, map[bool]uint32{true: errInvalid, false: errUnknown}[len(name) > 4096])
		p.option(optExportName, name)
		p.expectClosed()
	}
	unharmed(s)
}

// TestLongOptions: long ones are discarded and refused, longer ones end the connection (CVE-2017-15119).
func TestLongOptions(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{HandshakeTimeout: 500 * time.Millisecond})
	p := s.dial().greet(3)
	p.option(optGo, make([]byte, 64<<10))
	p.expectRefused(optGo, errInvalid)
	for _, n := range []int{64<<10 + 1, 256 << 10} {
		p.option(99, make([]byte, n))
		p.expectRefused(99, errTooBig)
	}
	alive(p)
	for _, n := range []uint32{256<<10 + 1, 1 << 31, 1<<32 - 1} {
		q := s.dial().greet(3)
		q.send(iHaveOpt, optGo, n)
		q.expectClosed()
	}
	short := s.dial().greet(3)
	short.send(iHaveOpt, optGo, uint32(100), make([]byte, 10))
	short.expectClosed()
	unharmed(s)
}

// TestManyOptions: their number is bounded, and grows with the exports that LIST showed, once.
func TestManyOptions(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	count := func(list int) int {
		p := s.dial().greet(3)
		for range list {
			p.option(optList)
			p.expectReply(optList, repServer, uint32(3), "vol", "a volume")
			p.expectReply(optList, repAck)
		}
		for n := 0; ; n++ {
			if _, err := p.Write(option(optInfo, goData("vol"))); err != nil {
				return n
			}
			if _, err := io.ReadFull(p, make([]byte, 20+12+20)); err != nil {
				return n
			}
		}
	}
	for list, want := range []int{32, 63, 62} {
		if got := count(list); got != want {
			t.Errorf("%d options after %d LIST, want %d", got, list, want)
		}
	}
	p := s.dial().greet(3)
	queries := make([]string, 12000)
	for i := range queries {
		queries[i] = "base"[:i%2]
	}
	queries[0] = "base:"
	p.option(optListMeta, metaData("vol", queries...))
	p.expectReply(optListMeta, repMeta, uint32(0), "base:allocation")
	p.expectReply(optListMeta, repAck)
	unharmed(s)
}

// TestRandomOptions sends options in any order with any data (CVE-2019-14851). Whatever comes back has the form of
// the protocol, up to the end of the connection or the transmission phase.
func TestRandomOptions(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	dice := rand.New(rand.NewPCG(1, 2))
	data := [][]byte{nil, goData("vol"), goData("vol", 3), goData("x"), metaData("vol", "base:"), metaData("vol"),
		sessionData(1, 1, 0, "vol"), []byte("vol"), make([]byte, 100)}
	for range 300 {
		p := s.dial().greet(3)
		for open := true; open; {
			opt := []uint32{2, 3, 4, 5, 6, 8, 9, 10, 11, optSession, dice.Uint32()}[dice.IntN(11)]
			p.option(opt, data[dice.IntN(len(data))])
			for {
				if _, err := io.ReadFull(p, make([]byte, 8)); err != nil {
					open = false
					break
				}
				p.expect(opt)
				b := p.receive(8)
				p.receive(int(b[6])<<8 | int(b[7]))
				if kind := b[3]; b[0]&0x80 != 0 || kind == byte(repAck) && b[0] == 0 {
					open = opt != optAbort
					break
				}
			}
		}
		p.Close()
	}
	unharmed(s)
}

// TestNothingTouchedBeforeGo: connecting and negotiating touch no device (CVE-2019-14850).
func TestNothingTouchedBeforeGo(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	for i := range 200 {
		p := s.dial()
		if i%2 == 0 {
			p.greet(3).option(optInfo, goData("vol"))
			p.reply(optInfo)
		}
		p.Close()
	}
	d := s.device
	if n := d.Reserved.Load() + d.Submitted.Load() + d.Aborted.Load() + d.Released.Load(); n != 0 {
		t.Errorf("the device was called %d times", n)
	}
}

// TestLongPayloads: up to 64 MiB are consumed, what is longer ends the connection.
func TestLongPayloads(t *testing.T) {
	s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "vol", Device: nbdtest.NewMemory(256 << 20), MaxPayload: 1 << 20})
	for mode := 1; mode < 3; mode++ {
		p := s.dial().enter(mode, "vol")
		for _, n := range []int{1<<20 + 1, 32<<20 + 1, 64 << 20} {
			go p.Write(p.request(cmdWrite, 0, 0, uint64(n), make([]byte, n)))
			if c := p.chunk(); c.errno != uint32(syscall.EINVAL) {
				t.Errorf("payload of %d bytes answered by %v", n, syscall.Errno(c.errno))
			}
			p.mustRead(0, make([]byte, 10))
		}
		for _, n := range []uint64{64<<20 + 1, 1 << 31, 1<<32 - 1} {
			q := s.dial().enter(mode, "vol")
			q.send(q.request(cmdWrite, 0, 0, n))
			q.expectClosed()
		}
	}
	unharmed(s)
}

// TestWriteCut: a write whose payload does not arrive in full has no effect, whatever its size.
func TestWriteCut(t *testing.T) {
	for _, size := range []int{1, 4096, 100_000, 300_000, 1 << 20, 8 << 20} {
		for _, room := range []bool{true, false} {
			d := newDevice()
			d.NoRoom = func(*nbd.Request) bool { return !room }
			s := serve(t, d, nbd.Options{})
			for _, missing := range []int{1, (size + 1) / 2, size} {
				p := s.dial().enter(0, "vol")
				p.Write(p.request(cmdWrite, 0, 0, uint64(size), pattern(1, size)[:size-missing]))
				p.Conn.(*net.UnixConn).CloseWrite()
				p.expectClosed()
			}
			if n := d.Submitted.Load(); n != 0 {
				t.Errorf("%d of the cut writes of %d bytes submitted", n, size)
			}
			if r, a := d.Reserved.Load(), d.Aborted.Load(); r != a {
				t.Errorf("size %d: %d reserved, %d aborted", size, r, a)
			}
		}
	}
}

// TestStorms: many requests that cost the client nothing are done in bounded time and memory, and hold up nobody.
func TestStorms(t *testing.T) {
	const size = 1 << 40
	storms := map[string]func(p *peer) []byte{
		"flush":        func(p *peer) []byte { return p.request(cmdFlush, 0, 0, 0) },
		"cache":        func(p *peer) []byte { return p.request(cmdCache, 0, 0, 1<<32-1) },
		"trim":         func(p *peer) []byte { return p.request(cmdTrim, 0, 0, 1<<32-1) },
		"zeroes":       func(p *peer) []byte { return p.request(cmdZeroes, 0, size-1<<32, 1<<32-1) },
		"block status": func(p *peer) []byte { return p.request(cmdStatus, 0, size-1<<32, 1<<32-1) },
		"bad requests": func(p *peer) []byte { return p.request(0x4242, 0xffff, 1<<63, 1<<32-1) },
	}
	for name, request := range storms {
		t.Run(name, func(t *testing.T) {
			d := &hugeDevice{Memory: nbdtest.NewMemory(16 << 20)}
			s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "vol", Device: d, Contexts: nbdtest.Contexts})
			p := s.dial().enter(1, "vol", nbdtest.Contexts...)
			requests := 100_000
			if name == "block status" {
				requests = 2000 // of 24 KiB each
			}
			batch := bytes.Repeat(request(p), 1000)
			go func() {
				for range requests / 1000 {
					p.Write(batch)
				}
				p.Conn.(*net.UnixConn).CloseWrite()
			}()
			unharmed(s)
			if n, err := io.Copy(io.Discard, p); err != nil || n < int64(requests)*16 {
				t.Errorf("%d bytes of replies, %v", n, err)
			}
		})
	}
}

// hugeDevice has a size that no memory holds, and does what is beyond its Memory at once.
type hugeDevice struct{ *nbdtest.Memory }

func (d *hugeDevice) Size() int64 { return 1 << 40 }

func (d *hugeDevice) Submit(r *nbd.Request) {
	switch {
	case r.Command == nbd.CmdBlockStatus:
		for i := range nbdtest.Contexts {
			for range nbd.MaxExtents {
				r.Extents[i] = append(r.Extents[i], nbd.Extent{Length: 512})
			}
		}
		r.Done(0)
	case r.Offset+r.Length > uint64(d.Memory.Size()):
		r.Done(0)
	default:
		d.Memory.Submit(r)
	}
}

// TestFloods: connections that come and go in numbers, in every way, leave nothing behind.
func TestFloods(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{MaxConnections: 20})
	s.listenTCP()
	s.dialTCP().enter(0, "vol").Close()
	unharmed(s)
	goroutines := runtime.NumGoroutine()
	var floods sync.WaitGroup
	for i := range 4 {
		floods.Go(func() {
			for k := range 250 {
				nc, err := net.Dial([]string{"unix", "tcp"}[i%2], []string{s.socket, s.tcp}[i%2])
				if err != nil {
					continue
				}
				switch k % 3 {
				case 0: // a connection without a word
				case 1:
					nc.Write(pack(uint32(3), option(optGo, goData("vol")), (&peer{}).request(cmdWrite, 0, 0, 4096, pattern(byte(k), 4096))))
				case 2:
					if tc, ok := nc.(*net.TCPConn); ok {
						tc.SetLinger(0)
					}
				}
				nc.Close()
			}
		})
	}
	floods.Wait()
	// Connections are accepted in order: once a later one was heard, none of the flood is left to be accepted, which would
	// make the server give up the oldest handshake for it.
	for _, at := range [][2]string{{"unix", s.socket}, {"tcp", s.tcp}} {
		if nc, err := net.Dial(at[0], at[1]); err == nil {
			io.ReadFull(nc, make([]byte, 18))
			nc.Close()
		}
	}
	eventually(t, "the connections are gone", func() bool { return runtime.NumGoroutine() <= goroutines })
	unharmed(s)
}

// TestIdleCost: a connection that says little costs little.
func TestIdleCost(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{MaxConnections: 1000})
	const conns = 200
	memory := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	before := memory()
	var peers []*peer
	for range conns {
		p := s.dial().enter(0, "vol")
		p.mustWrite(0, make([]byte, 512))
		p.mustRead(0, make([]byte, 512))
		peers = append(peers, p)
	}
	per := (memory() - before) / conns // with the client's end, and what the race detector adds
	t.Logf("an idle connection costs %d bytes", per)
	if per > 64<<10 {
		t.Error("more than 64 KiB")
	}
	runtime.KeepAlive(peers)
}

// TestStoppedClients: clients that stop reading in the middle of everything hold up nobody while they last.
func TestStoppedClients(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	w := s.dial().enter(0, "vol")
	w.mustWrite(0, pattern(1, 4<<20))
	for i := range 8 {
		p := s.dial().enter(i%3, "vol")
		p.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
		for range 10_000 {
			if _, err := p.Write(p.request(cmdRead, 0, 0, 1<<20)); err != nil {
				break
			}
		}
	}
	for i := range 50 {
		w.mustWrite(5<<20, pattern(byte(i), 300_000))
		w.mustRead(5<<20, pattern(byte(i), 300_000))
	}
}

// TestNeverWritten: what was never written reads as zeroes, also in memory that was used before.
func TestNeverWritten(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	p := s.dial().enter(1, "vol")
	for i := range 20 {
		off := uint64(i) * 65536
		p.mustWrite(off, pattern(9, 40000))
		if err := p.status(cmdZeroes, 0, off, 40000); err != 0 {
			t.Fatal(err)
		}
		p.mustWrite(off+100_000, []byte{1})
		p.mustRead(off+100_001, make([]byte, 3000))
		p.mustRead(off, make([]byte, 40000))
		if err := p.status(cmdTrim, 0, off+100_000, 1); err != 0 {
			t.Fatal(err)
		}
	}
}
