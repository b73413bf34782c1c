package nbd_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/nbd"
	"github.com/ramshelf/ramshelf/nbd/nbdtest"
)

// held collects requests that a device has been given and does not complete yet.
type held struct {
	mu       sync.Mutex
	complete []func()
	open     bool
}

// take keeps complete until release.
func (h *held) take(complete func()) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.open {
		return false
	}
	h.complete = append(h.complete, complete)
	return true
}

func (h *held) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.complete)
}

// release completes everything, and lets later requests complete at once.
func (h *held) release() {
	h.mu.Lock()
	h.open = true
	all := h.complete
	h.complete = nil
	h.mu.Unlock()
	for _, complete := range all {
		complete()
	}
}

// serveHolding serves a device that holds every request that which selects until the test or its end releases it.
func serveHolding(t testing.TB, o nbd.Options, which func(r *nbd.Request) bool) (*testServer, *held) {
	h := new(held)
	d := newDevice()
	d.Defer = func(r *nbd.Request, complete func()) bool { return which(r) && h.take(complete) }
	s := serve(t, d, o)
	t.Cleanup(h.release)
	return s, h
}

func isRead(r *nbd.Request) bool  { return r.Command == nbd.CmdRead }
func isWrite(r *nbd.Request) bool { return r.Command == nbd.CmdWrite }

// TestLaterRequestsPass: a request that waits in the device holds up nobody else, not even on its connection.
func TestLaterRequestsPass(t *testing.T) {
	s, h := serveHolding(t, nbd.Options{}, func(r *nbd.Request) bool { return r.Offset == 0 })
	for mode := range 3 {
		p := s.dial().enter(mode, "vol")
		p.send(p.request(cmdRead, 0, 0, 4096))
		slow := p.cookie
		for i := range 10 {
			p.mustWrite(uint64(1+i)*4096, pattern(byte(i), 4096))
		}
		if mode == 2 {
			h.release()
			if _, err := p.readReply(slow, 0, 4096); err != 0 {
				t.Fatal(err)
			}
		}
	}
}

// TestRandomLoad runs clients in every form of replies against a device that completes in any order, from any
// goroutine, with room or without. Every client has its part of the device and checks every byte; a reply that
// mixes with another breaks the form.
func TestRandomLoad(t *testing.T) {
	d := nbdtest.NewMemory(8 << 20)
	var dice atomic.Uint64
	d.Defer = func(_ *nbd.Request, complete func()) bool {
		switch dice.Add(1) % 5 {
		case 0:
			go complete()
			return true
		case 1:
			time.AfterFunc(time.Duration(dice.Load()%200)*time.Microsecond, complete)
			return true
		}
		return false
	}
	d.NoRoom = func(*nbd.Request) bool { return dice.Load()%3 == 0 }
	s := serve(t, d, nbd.Options{StagingBytes: 1 << 20})
	s.listenTCP()
	var clients sync.WaitGroup
	for i := range 6 {
		clients.Go(func() {
			p := s.dialNet([]string{"unix", "tcp"}[i%2], []string{s.socket, s.tcp}[i%2])
			p.enter(i%3, "vol")
			load := &randomLoad{peer: p, base: uint64(i) << 20, rand: rand.New(rand.NewPCG(uint64(i), 7)), model: make([]byte, 1<<20)}
			load.run(300)
		})
	}
	clients.Wait()
}

type randomLoad struct {
	*peer
	base  uint64
	rand  *rand.Rand
	model []byte
}

// run sends rounds of requests that do not overlap, each round in one batch, and checks all replies.
func (l *randomLoad) run(rounds int) {
	for range rounds {
		pending := make(map[uint64]func(c chunk) bool)
		var batch []byte
		for at := 0; at < len(l.model); {
			at += l.rand.IntN(len(l.model) / 4)
			n := min(1+l.rand.IntN(1<<uint(1+l.rand.IntN(18))), len(l.model)-at)
			if n <= 0 {
				break
			}
			batch = append(batch, l.add(pending, at, n)...)
			at += n
		}
		go l.Write(batch) // the server must not need us to read before it takes all
		for len(pending) > 0 {
			c := l.chunk()
			check := pending[c.cookie]
			if check == nil {
				l.t.Errorf("reply to cookie %d that is not asked for", c.cookie)
				return
			}
			if check(c) {
				delete(pending, c.cookie)
			}
		}
	}
}

// add makes a request for n bytes at at, and the check of its reply, which reports whether that is complete.
func (l *randomLoad) add(pending map[uint64]func(chunk) bool, at, n int) []byte {
	off, length, want := l.base+uint64(at), uint64(n), l.model[at:at+n]
	var b []byte
	done := func(c chunk) bool {
		if c.errno != 0 {
			l.t.Errorf("%d bytes at %d: %v", n, off, syscall.Errno(c.errno))
		}
		return c.flags&chunkDone != 0
	}
	switch l.rand.IntN(5) {
	case 0:
		clear(want)
		b = l.request(cmdZeroes, 0, off, length)
	case 1, 2:
		for i := range want {
			want[i] = byte(l.rand.Uint32())
		}
		b = l.request(cmdWrite, 0, off, length, want)
	default:
		b = l.request(cmdRead, 0, off, length)
		done = func(c chunk) bool { return l.checkRead(c, off, want) }
	}
	pending[l.cookie] = done
	return b
}

func (l *randomLoad) checkRead(c chunk, off uint64, want []byte) bool {
	switch {
	case c.errno != 0:
		l.t.Errorf("read of %d bytes at %d: %v", len(want), off, syscall.Errno(c.errno))
	case c.simple:
		if !bytes.Equal(l.receive(len(want)), want) {
			l.t.Errorf("read of %d bytes at %d gave wrong data", len(want), off)
		}
	case c.kind == chunkData:
		at := binary.BigEndian.Uint64(c.payload) - off
		if data := c.payload[8:]; !bytes.Equal(data, want[at:at+uint64(len(data))]) {
			l.t.Errorf("read of %d bytes at %d gave wrong data", len(want), off)
		}
	case c.kind == chunkHole:
		at, k := binary.BigEndian.Uint64(c.payload)-off, uint64(binary.BigEndian.Uint32(c.payload[8:]))
		if !bytes.Equal(want[at:at+k], make([]byte, k)) {
			l.t.Errorf("read of %d bytes at %d told a hole over data", len(want), off)
		}
	}
	return c.flags&chunkDone != 0
}

// TestKeepsReading: a client that sends everything before it reads anything gets all its replies.
func TestKeepsReading(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	p := s.dial().enter(1, "vol")
	data := pattern(3, 256<<10)
	p.mustWrite(0, data)
	for range 40 {
		p.send(p.request(cmdRead, 0, 0, 256<<10))
	}
	for range 60 {
		p.send(p.request(cmdWrite, 0, 1<<20, 64<<10, data[:64<<10]))
	}
	for range 40 + 60 {
		if c := p.chunk(); c.errno != 0 || !c.simple && !bytes.Equal(c.payload[8:], data) {
			t.Fatalf("wrong reply to cookie %d: %v", c.cookie, syscall.Errno(c.errno))
		}
	}
}

// TestLargestPayload goes beyond every buffer, with more pieces than one call takes.
func TestLargestPayload(t *testing.T) {
	for _, room := range []bool{true, false} {
		d := nbdtest.NewMemory(48 << 20)
		d.NoRoom = func(*nbd.Request) bool { return !room }
		s := serve(t, d, nbd.Options{})
		for mode := range 3 {
			p := s.dial().enter(mode, "vol")
			data := pattern(byte(mode), 32<<20)
			go p.Write(append(p.request(cmdWrite, 0, 77, 32<<20, data), p.request(cmdRead, 0, 77, 32<<20)...))
			if c := p.chunk(); c.errno != 0 {
				t.Fatal(syscall.Errno(c.errno))
			}
			eventually(t, "second request sent", func() bool { return p.cookie == 2 })
			got, err := p.readReply(2, 77, 32<<20)
			if err != 0 || !bytes.Equal(got, data) {
				t.Fatalf("mode %d: read back %v, equal %v", mode, err, bytes.Equal(got, data))
			}
		}
	}
}

// TestLargeHole: a hole longer than any buffer, where holes cannot be told.
func TestLargeHole(t *testing.T) {
	s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "vol", Device: nbdtest.NewMemory(64 << 20)})
	for mode, flags := range []uint16{0, flagDF} {
		p := s.dial().enter(mode, "vol")
		p.mustWrite(32<<20-3, []byte{1, 2, 3})
		got, err := p.read(flags, 0, 32<<20)
		if want := append(make([]byte, 32<<20-3), 1, 2, 3); err != 0 || !bytes.Equal(got, want) {
			t.Errorf("mode %d: %v, equal %v", mode, err, bytes.Equal(got, want))
		}
	}
}

// TestQuota is the checker of the bound on what one connection has in flight: requests and bytes.
func TestQuota(t *testing.T) {
	if err := checkQuota(t); err != nil {
		t.Error(err)
	}
}

// checkQuota has clients that send requests and read no reply, while the device answers none, and tells what
// exceeds the bounds: 512 requests and 16 MiB per connection.
func checkQuota(t *testing.T) error {
	for _, tt := range []struct {
		length uint64
		most   int64
	}{{512, 512}, {1 << 20, 16}, {8 << 20, 2}, {16 << 20, 1}} {
		s, h := serveHolding(t, nbd.Options{}, isRead)
		p := s.dial().enter(0, "vol")
		var batch []byte
		for range 2000 {
			batch = append(batch, p.request(cmdRead, 0, 0, tt.length)...)
		}
		p.send(batch)
		eventually(t, "the quota is used", func() bool { return s.device.Submitted.Load() >= tt.most })
		// Whoever would go on does so now: another connection is served from start to end meanwhile.
		for range 20 {
			s.dial().enter(0, "vol").mustWrite(0, make([]byte, 4096))
		}
		got := int64(h.count())
		p.Close()
		h.release()
		if got != tt.most {
			return fmt.Errorf("%d requests of %d bytes in flight, want %d", got, tt.length, tt.most)
		}
	}
	return nil
}

// TestUnreadReplies: a client that reads nothing keeps a bounded number of requests, is cut after a while, and
// holds up nobody.
func TestUnreadReplies(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{UnreadTimeout: 300 * time.Millisecond})
	greedy, other := s.dial().enter(1, "vol"), s.dial().enter(1, "vol")
	other.mustWrite(0, pattern(1, 1<<20))
	for range 200 {
		if _, err := greedy.Write(greedy.request(cmdRead, 0, 0, 1<<20)); err != nil {
			break
		}
	}
	other.mustRead(0, pattern(1, 1<<20))
	eventually(t, "requests of the greedy client released", func() bool {
		return s.device.Submitted.Load() == s.device.Released.Load()
	})
	greedy.expectGone()
	other.mustRead(0, pattern(1, 1<<20))
}

// TestIdleForever: between messages a client may be silent for longer than every limit.
func TestIdleForever(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{StallTimeout: 50 * time.Millisecond, UnreadTimeout: 50 * time.Millisecond,
		SlowAfter: 50 * time.Millisecond, HandshakeTimeout: 10 * time.Second})
	idle, stalled := s.dial().enter(0, "vol"), s.dial().enter(0, "vol")
	stalled.send(reqMagic)
	stalled.expectClosed() // the limits are at work
	idle.mustRead(0, make([]byte, 512))
}

// TestStalls: a client that stops half-way through a message is cut, wherever that is, and nothing of the message
// takes effect.
func TestStalls(t *testing.T) {
	big := make([]byte, 1<<20)
	tests := []struct {
		name  string
		bytes func(p *peer) []byte
	}{
		{"in the header", func(p *peer) []byte { return p.request(cmdWrite, 0, 0, 4096)[:20] }},
		{"in a payload that fits the buffer", func(p *peer) []byte { return p.request(cmdWrite, 0, 0, 4096, big[:4095]) }},
		{"in a large payload", func(p *peer) []byte { return p.request(cmdWrite, 0, 0, 1<<20, big[:1<<20-1]) }},
		{"in a large payload in staging", func(p *peer) []byte { return p.request(cmdWrite, 0, 8<<20, 1<<20, big[:1<<20-1]) }},
		{"in a payload to be thrown away", func(p *peer) []byte { return p.request(cmdWrite, 0, testSize, 1<<20, big[:1000]) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := newDevice()
			d.NoRoom = func(r *nbd.Request) bool { return r.Offset == 8<<20 }
			s := serve(t, d, nbd.Options{StallTimeout: 50 * time.Millisecond})
			p, other := s.dial().enter(1, "vol"), s.dial().enter(1, "vol")
			p.send(tt.bytes(p))
			p.expectClosed()
			if n := d.Submitted.Load(); n != 0 {
				t.Errorf("%d requests submitted", n)
			}
			eventually(t, "the room given back", func() bool { return d.Reserved.Load() == d.Aborted.Load() })
			other.mustWrite(0, big)
		})
	}
}

// TestTricklingHoldsLittleRoom: while a short payload is on its way, nothing of the device is taken for it, and for longer
// ones no more than one largest payload; nobody waits for those that hold it.
func TestTricklingHoldsLittleRoom(t *testing.T) {
	tests := []struct {
		name        string
		size, holds int
	}{
		{"short", 31 << 10, 0},
		{"longer", 256 << 10, 4},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := newDevice()
			s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "vol", Device: d, MaxPayload: 1 << 20})
			var slow []*peer
			data := pattern(9, tt.size)
			for i := range 8 {
				p := s.dial().enter(0, "vol")
				p.send(p.request(cmdWrite, 0, uint64(i)<<20, uint64(tt.size), data[:tt.size-1]))
				slow = append(slow, p)
			}
			eventually(t, "the room taken", func() bool { return int(d.Reserved.Load()) == tt.holds })
			other := s.dial().enter(0, "vol")
			for i := range 5 {
				other.mustWrite(8<<20, pattern(byte(i), 64<<10))
				other.mustRead(8<<20, pattern(byte(i), 64<<10))
			}
			if n := int(d.Reserved.Load()); n != tt.holds+5 {
				t.Errorf("%d writes reserved before their payload was there, want %d", n-5, tt.holds)
			}
			for i, p := range slow {
				p.send(data[tt.size-1:])
				if err := p.expectStatus(); err != 0 {
					t.Fatal(err)
				}
				p.mustRead(uint64(i)<<20, data)
			}
		})
	}
}

// TestInPlace: what arrives together with the end of a payload that is received in place is not lost.
func TestInPlace(t *testing.T) {
	d := newDevice()
	d.NoRoom = func(r *nbd.Request) bool { return r.Offset >= 8<<20 }
	s := serve(t, d, nbd.Options{})
	for _, offset := range []uint64{0, 1000, 8 << 20} {
		for _, cut := range []int{28, 29, 4096, 40 << 10} {
			for _, size := range []int{32 << 10, 100_000, 320 << 10, 1 << 20} {
				p := s.dial().enter(0, "vol")
				data, at := pattern(byte(cut), 3*size+10_000), offset
				next := func(n int) []byte {
					b := p.request(cmdWrite, 0, at, uint64(n), data[:n])
					data, at = data[n:], at+uint64(n)
					return b
				}
				all := data
				first := next(size)
				k := min(cut, len(first)-1)
				p.send(first[:k])
				p.send(bytes.Join([][]byte{first[k:], next(size), next(10_000), next(size)}, nil))
				for range 4 {
					if c := p.chunk(); c.errno != 0 {
						t.Fatal(syscall.Errno(c.errno))
					}
				}
				p.mustRead(offset, all)
			}
		}
	}
}

// TestSlowPayload: the client of a large payload that trickles is cut when, and only when, others wait for their
// turn.
func TestSlowPayload(t *testing.T) {
	d := newDevice()
	s := serveExports(t, nbd.Options{SlowAfter: 50 * time.Millisecond},
		&nbd.Export{Name: "vol", Device: d, MaxPayload: 1 << 20})
	slow, fast := s.dial().enter(0, "vol"), s.dial().enter(0, "vol")
	slow.send(slow.request(cmdWrite, 0, 0, 1<<20, make([]byte, 1<<19)))
	eventually(t, "room reserved", func() bool { return d.Reserved.Load() == 1 })
	for end := time.Now().Add(200 * time.Millisecond); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		slow.send(uint8(0))
	}
	fast.mustWrite(1<<20, pattern(1, 1<<20))
	slow.expectClosed()
	eventually(t, "room given back", func() bool { return d.Aborted.Load() == 1 })
	fast.mustRead(0, make([]byte, 1<<20))
}

// TestStagingIsBounded: when the device has no room, what waits for it is bounded by the staging memory, and goes on
// when the device does.
func TestStagingIsBounded(t *testing.T) {
	h := new(held)
	d := newDevice()
	d.NoRoom = func(*nbd.Request) bool { return true }
	d.Defer = func(r *nbd.Request, complete func()) bool { return isWrite(r) && h.take(complete) }
	s := serveExports(t, nbd.Options{StagingBytes: 1 << 20},
		&nbd.Export{Name: "vol", Device: d, MaxPayload: 1 << 20})
	var clients sync.WaitGroup
	for i := range 4 {
		clients.Go(func() {
			p := s.dial().enter(0, "vol")
			data := pattern(byte(i), 64<<10)
			for k := range 16 {
				p.send(p.request(cmdWrite, 0, uint64(i*16+k)<<16, uint64(len(data)), data))
			}
			for range 16 {
				if c := p.chunk(); c.errno != 0 {
					t.Error(syscall.Errno(c.errno))
				}
			}
			for k := range 16 {
				p.mustRead(uint64(i*16+k)<<16, data)
			}
		})
	}
	eventually(t, "the staging memory is full", func() bool { return h.count() == 16 })
	s.dial().enter(0, "vol").mustRead(0, make([]byte, 4096))
	if n := h.count(); n != 16 {
		t.Errorf("%d payloads of 64 KiB staged in 1 MiB", n)
	}
	h.release()
	clients.Wait()
}

// TestHalfClose: a client that ended its own direction still gets the replies to what it sent.
func TestHalfClose(t *testing.T) {
	s, h := serveHolding(t, nbd.Options{}, func(r *nbd.Request) bool { return r.Offset == 4096 })
	s.listenTCP()
	for _, p := range []*peer{s.dial(), s.dialTCP()} {
		p.enter(0, "vol")
		data := pattern(5, 4096)
		p.send(p.request(cmdWrite, 0, 0, 4096, data), p.request(cmdWrite, 0, 4096, 4096, data), p.request(cmdRead, 0, 0, 1)[:20])
		if err := p.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		p.expect(simpleMagic, uint32(0), uint64(1))
		h.release()
		p.expect(simpleMagic, uint32(0), uint64(2))
		p.expectClosed()
		s.dial().enter(0, "vol").mustRead(0, append(data, data...))
	}
}

// TestDisconnect: DISC lets what is in flight end and be answered, and has no reply of its own.
func TestDisconnect(t *testing.T) {
	for mode := range 3 {
		s, h := serveHolding(t, nbd.Options{}, isWrite)
		p := s.dial().enter(mode, "vol")
		data := pattern(6, 4096)
		p.send(p.request(cmdWrite, 0, 0, 4096, data))
		p.send(p.request(cmdDisc, 0, 0, 0), p.request(cmdWrite, 0, 4096, 4096, data))
		eventually(t, "write submitted", func() bool { return h.count() == 1 })
		h.release()
		if c := p.chunk(); c.cookie != 1 || c.errno != 0 {
			t.Fatalf("reply %+v", c)
		}
		p.expectClosed()
		if got := s.device.Bytes(0, 8192); !bytes.Equal(got, append(data, make([]byte, 4096)...)) {
			t.Error("requests after DISC were executed, or those before were not")
		}
	}
}

// TestDuplicateCookies are the client's fault; the server answers each.
func TestDuplicateCookies(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	p := s.dial().enter(0, "vol")
	for range 5 {
		p.cookie = 41
		p.send(p.request(cmdFlush, 0, 0, 0))
	}
	for range 5 {
		p.expect(simpleMagic, uint32(0), uint64(42))
	}
}

// TestOverlappingWrites: every sector holds one of the writes, on all connections the same.
func TestOverlappingWrites(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	var clients sync.WaitGroup
	for i := range 16 {
		clients.Go(func() {
			p := s.dial().enter(i%3, "vol")
			data := bytes.Repeat([]byte{byte(i + 1)}, 32<<10)
			for range 30 {
				p.mustWrite(uint64(i%4)*4096, data)
				p.read(0, 0, 64<<10)
			}
		})
	}
	clients.Wait()
	first, err := s.dial().enter(0, "vol").read(0, 0, 44<<10)
	if err != 0 {
		t.Fatal(err)
	}
	for at := 0; at < len(first); at += 512 {
		if sector := first[at : at+512]; !bytes.Equal(sector, bytes.Repeat(sector[:1], 512)) || sector[0] == 0 {
			t.Fatalf("the sector at %d holds a mixture", at)
		}
	}
	s.dial().enter(1, "vol").mustRead(0, first)
}

// TestSlowReader: replies larger than the socket buffer leave in many pieces and stay whole while requests
// go on arriving.
func TestSlowReader(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	p := s.dial().enter(1, "vol")
	data := pattern(8, 1<<20)
	p.mustWrite(0, data)
	go func() {
		for i := range 64 {
			length := uint64(1 + i*16111)
			if _, err := p.Write(pack(reqMagic, uint16(0), cmdRead, length, uint64(0), uint32(length))); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for range 64 {
		c := p.chunk()
		if c.errno != 0 || !bytes.Equal(c.payload[8:], data[:c.cookie]) {
			t.Fatalf("wrong reply of %d bytes to a read of %d", len(c.payload)-8, c.cookie)
		}
		runtime.Gosched()
	}
}
