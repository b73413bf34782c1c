package load

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const exportBytes = 1 << 20

// server is an NBD server whose answers a test decides on.
type server struct {
	device     [exportBytes]byte
	structured bool // offered
	// answer gives the bytes of the reply to a request; nil is the right answer.
	answer func(s *server, r request) []byte
	// pieces cuts what is sent into pieces of so many bytes; 0 is whole replies.
	pieces   int
	requests atomic.Uint64
}

type request struct {
	structured     bool
	command        uint16
	cookie, offset uint64
	length         uint32
}

// start serves on a unix socket until the test ends.
func (s *server) start(t *testing.T) Target {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go s.serve(c)
		}
	}()
	return Target{Network: "unix", Address: path}
}

func (s *server) serve(c net.Conn) {
	defer c.Close()
	be := binary.BigEndian
	c.Write(be.AppendUint16(be.AppendUint64(be.AppendUint64(nil, magicGreeting), magicOption), flagFixedNewstyle|flagNoZeroes))
	io.ReadFull(c, make([]byte, 4))
	structured := false
	for {
		var h [16]byte
		if _, err := io.ReadFull(c, h[:]); err != nil {
			return
		}
		io.CopyN(io.Discard, c, int64(be.Uint32(h[12:])))
		reply := func(kind uint32, data []byte) {
			b := be.AppendUint32(be.AppendUint32(be.AppendUint64(nil, magicOptionReply), be.Uint32(h[8:])), kind)
			c.Write(append(be.AppendUint32(b, uint32(len(data))), data...))
		}
		switch number := be.Uint32(h[8:]); {
		case number == optStructuredReply && s.structured:
			structured = true
			reply(replyAck, nil)
		case number == optGo:
			reply(replyInfo, []byte{0, 1, 'x'}) // information of a kind that was not asked for
			reply(replyInfo, be.AppendUint16(be.AppendUint64([]byte{0, 0}, exportBytes), 1))
			reply(replyAck, nil)
			s.transmit(c, structured)
			return
		default:
			reply(replyError|1, []byte("unsupported"))
		}
	}
}

func (s *server) transmit(c net.Conn, structured bool) {
	be := binary.BigEndian
	var h [sizeRequest]byte
	for {
		if _, err := io.ReadFull(c, h[:]); err != nil {
			return
		}
		r := request{structured, be.Uint16(h[6:]), be.Uint64(h[8:]), be.Uint64(h[16:]), be.Uint32(h[24:])}
		if r.command == commandDisconnect {
			return
		}
		if r.command == commandWrite {
			if _, err := io.ReadFull(c, s.device[r.offset:][:r.length]); err != nil {
				return
			}
		}
		s.requests.Add(1)
		var answer []byte
		if s.answer != nil {
			answer = s.answer(s, r)
		}
		if answer == nil {
			answer = s.right(r)
		}
		for step := max(s.pieces, 0); len(answer) > 0; {
			n := len(answer)
			if step > 0 {
				n = min(n, step)
			}
			if _, err := c.Write(answer[:n]); err != nil {
				return
			}
			answer = answer[n:]
		}
	}
}

func (s *server) right(r request) []byte {
	if r.structured && r.command == commandRead {
		return chunk(chunkDone, chunkOffsetData, r.cookie, data(r.offset, s.device[r.offset:][:r.length]))
	}
	if r.command == commandRead {
		return append(simple(0, r.cookie), s.device[r.offset:][:r.length]...)
	}
	return simple(0, r.cookie)
}

func simple(code uint32, cookie uint64) []byte {
	be := binary.BigEndian
	return be.AppendUint64(be.AppendUint32(be.AppendUint32(nil, magicSimple), code), cookie)
}

func chunk(flags, kind uint16, cookie uint64, payload []byte) []byte {
	be := binary.BigEndian
	b := be.AppendUint16(be.AppendUint16(be.AppendUint32(nil, magicStructured), flags), kind)
	return append(be.AppendUint32(be.AppendUint64(b, cookie), uint32(len(payload))), payload...)
}

func data(offset uint64, p []byte) []byte {
	return append(binary.BigEndian.AppendUint64(nil, offset), p...)
}

func hole(offset uint64, n uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, offset), n)
}

func open(t *testing.T, c Config) *Load {
	t.Helper()
	l, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// One pass writes every block with its mark, a second reads them all back, whatever the pieces in which the
// replies arrive.
func TestPassVisitsEveryBlockOnce(t *testing.T) {
	for _, structured := range []bool{false, true} {
		for _, pieces := range []int{0, 7, 1000} {
			s := &server{structured: true, pieces: pieces}
			c := Config{Target: s.start(t), Connections: 2, Depth: 8, Batch: 4, BlockBytes: 8192, Sequential: true,
				Structured: structured, Stamp: true, Check: true}
			const each = exportBytes / 8192 / 2
			for _, c.ReadPercent = range []int{0, 100} {
				l := open(t, c)
				r, err := l.Pass(t.Context(), each)
				if err != nil {
					t.Fatalf("structured %v, pieces %d: %v", structured, pieces, err)
				}
				h := &r.Writes
				if c.ReadPercent == 100 {
					h = &r.Reads
				}
				if r.Requests != 2*each || r.Bytes != exportBytes || h.Count() != 2*each || r.Latency().Count() != 2*each {
					t.Errorf("structured %v, pieces %d: result %d requests, %d bytes, %d latencies",
						structured, pieces, r.Requests, r.Bytes, h.Count())
				}
			}
			for off := uint64(0); off < exportBytes; off += stampBytes {
				if err := checkStamps(s.device[off:][:stampBytes], off); err != nil {
					t.Fatalf("structured %v, pieces %d: on the server: %v", structured, pieces, err)
				}
			}
		}
	}
}

func TestRunEndsInTimeWithEveryReplyTaken(t *testing.T) {
	s := &server{}
	l := open(t, Config{Target: s.start(t), Depth: 32, ReadPercent: 70})
	const d = 50 * time.Millisecond
	for range 2 {
		before := s.requests.Load()
		r, err := l.Run(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		if got := s.requests.Load() - before; got != r.Requests || r.Elapsed < d || r.Calls == 0 {
			t.Errorf("server counted %d requests, the result is %d in %v with %d calls", got, r.Requests, r.Elapsed, r.Calls)
		}
		share := float64(r.Reads.Count()) / float64(r.Requests)
		if r.Requests > 1000 && (share < 0.6 || share > 0.8) {
			t.Errorf("%.2f of %d requests are reads, want 0.7", share, r.Requests)
		}
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	l := open(t, Config{Target: (&server{}).start(t)})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := l.Run(ctx, time.Hour); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want that the context has ended", err)
	}
}

// Requests are held back until a batch is together: with depth and batch of 8 the server sees 8 requests
// before it has to answer any.
func TestBatchLeavesTogether(t *testing.T) {
	var held []byte
	s := &server{answer: func(s *server, r request) []byte {
		held = append(held, s.right(r)...)
		if s.requests.Load()%8 != 0 {
			return []byte{}
		}
		all := held
		held = nil
		return all
	}}
	l := open(t, Config{Target: s.start(t), Depth: 8, Batch: 8, ReadPercent: 100})
	r, err := l.Pass(t.Context(), 80)
	if err != nil || r.Requests != 80 {
		t.Fatalf("%d requests, %v", r.Requests, err)
	}
	if r.Calls > 10*4 {
		t.Errorf("%d system calls for 10 batches", r.Calls)
	}
}

func TestSplitAndHoleyStructuredReads(t *testing.T) {
	s := &server{structured: true, answer: func(s *server, r request) []byte {
		half := r.length / 2
		b := chunk(0, chunkOffsetData, r.cookie, data(r.offset, s.device[r.offset:][:half]))
		b = append(b, chunk(0, chunkOffsetHole, r.cookie, hole(r.offset+uint64(half), half))...)
		return append(b, chunk(chunkDone, chunkNone, r.cookie, nil)...)
	}}
	l := open(t, Config{Target: s.start(t), ReadPercent: 100, Structured: true})
	if r, err := l.Pass(t.Context(), 100); err != nil || r.Requests != 100 {
		t.Errorf("%d requests, %v", r.Requests, err)
	}
}

func TestWrongReplies(t *testing.T) {
	for _, c := range []struct {
		name       string
		config     Config
		structured bool
		answer     func(s *server, r request) []byte
		want       string
	}{
		{"error", Config{}, false, func(_ *server, r request) []byte { return simple(5, r.cookie) }, "error 5"},
		{"magic", Config{}, false, func(*server, request) []byte { return make([]byte, 16) }, "begins with 0x0"},
		{"cookie", Config{}, false, func(*server, request) []byte { return simple(0, 1<<40) }, "no request in flight"},
		{"twice", Config{Depth: 2, Batch: 2}, false,
			func(_ *server, r request) []byte { return append(simple(0, r.cookie), simple(0, r.cookie)...) }, "no request in flight"},
		{"not what was written", Config{ReadPercent: 100, Check: true}, false, nil, "not with its mark"},
		{"structured: not what was written", Config{ReadPercent: 100, Check: true}, true, nil, "not with its mark"},
		{"structured: hole for data", Config{ReadPercent: 100, Check: true}, true,
			func(_ *server, r request) []byte {
				return chunk(chunkDone, chunkOffsetHole, r.cookie, hole(r.offset, r.length))
			}, "hole"},
		{"structured: magic", Config{}, true, func(*server, request) []byte { return make([]byte, 20) }, "begins with 0x0"},
		{"structured: simple reply to a read", Config{ReadPercent: 100}, true,
			func(_ *server, r request) []byte { return simple(0, r.cookie) }, "simple reply"},
		{"structured: error", Config{}, true,
			func(_ *server, r request) []byte {
				return chunk(chunkDone, chunkError+1, r.cookie, []byte{0, 0, 0, 28, 0, 0})
			}, "error 28"},
		{"structured: too much", Config{ReadPercent: 100}, true,
			func(_ *server, r request) []byte {
				return chunk(0, chunkOffsetData, r.cookie, make([]byte, r.length+9))
			}, "more than asked for"},
		{"structured: too little", Config{ReadPercent: 100}, true,
			func(_ *server, r request) []byte {
				return chunk(chunkDone, chunkOffsetData, r.cookie, make([]byte, r.length))
			}, "ends 8 bytes early"},
		{"structured: unknown chunk", Config{}, true,
			func(_ *server, r request) []byte { return chunk(chunkDone, 77, r.cookie, nil) }, "type 77"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &server{structured: true, answer: c.answer}
			c.config.Target, c.config.Structured = s.start(t), c.structured
			_, err := open(t, c.config).Pass(t.Context(), 16)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got error %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestServerThatHangsUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := &server{answer: func(*server, request) []byte { return nil }}
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		s.answer = func(*server, request) []byte { c.Close(); return []byte{} }
		s.serve(c)
	}()
	load := open(t, Config{Target: Target{Network: "unix", Address: path}})
	if _, err := load.Pass(t.Context(), 100); err == nil {
		t.Error("a server that hung up was not noticed")
	}
}

func TestStructuredRepliesAreRefused(t *testing.T) {
	_, err := Open(t.Context(), Config{Target: (&server{}).start(t), Structured: true})
	if !errors.Is(err, ErrStructured) {
		t.Errorf("got %v, want ErrStructured", err)
	}
}

func TestBadConfig(t *testing.T) {
	target := (&server{}).start(t)
	for name, c := range map[string]Config{
		"depth":       {Depth: -1},
		"batch":       {Depth: 8, Batch: 9},
		"block":       {BlockBytes: 64 << 20},
		"percent":     {ReadPercent: 101},
		"connections": {Connections: 5000},
		"stamp":       {BlockBytes: 512, Stamp: true},
		"order":       {Order: []uint64{256}},
		"empty order": {Order: []uint64{}},
		"two orders":  {Order: []uint64{1}, Connections: 2},
		"too small":   {BlockBytes: 1 << 20, Connections: 2},
		"nowhere":     {Target: Target{Network: "unix", Address: "/nonexistent"}},
	} {
		if c.Target == (Target{}) {
			c.Target = target
		}
		if l, err := Open(t.Context(), c); err == nil {
			l.Close()
			t.Errorf("%s: %+v was accepted", name, c)
		}
	}
}

// The server of the test answers from memory made beforehand, so that all allocations of the process are the
// generator's: a long run may make no more of them than a short one, but for what the runtime does by itself.
func TestRequestsAllocateNothing(t *testing.T) {
	for _, c := range []Config{{ReadPercent: 100}, {}, {ReadPercent: 50, Structured: true, Stamp: true, Check: true}} {
		s := &server{structured: true}
		replies := make([][]byte, 32)
		s.answer = func(_ *server, r request) []byte {
			b := &replies[r.cookie]
			*b = (*b)[:0]
			if r.command == commandRead && r.structured {
				*b = append(*b, chunkHeader[:]...)
				binary.BigEndian.PutUint64((*b)[20:], r.offset)
			} else {
				*b = append(*b, simpleHeader[:]...)
			}
			binary.BigEndian.PutUint64((*b)[8:], r.cookie)
			if r.command == commandRead {
				*b = append(*b, s.device[r.offset:][:r.length]...)
			}
			return *b
		}
		for off := uint64(0); off < exportBytes; off += stampBytes {
			stamp(s.device[off:], off)
		}
		c.Target, c.Depth = s.start(t), 32
		l := open(t, c)
		count := func(n uint64) uint64 {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			if _, err := l.Pass(t.Context(), n); err != nil {
				t.Fatal(err)
			}
			runtime.ReadMemStats(&after)
			return after.Mallocs - before.Mallocs
		}
		count(1000)
		if short, long := count(1000), count(20_000); long > short+100 {
			t.Errorf("%d %% reads: %d allocations for 1000 requests, %d for 20000", c.ReadPercent, short, long)
		}
	}
}

var (
	simpleHeader = [sizeSimple]byte(simple(0, 0))
	chunkHeader  = func() (h [28]byte) {
		copy(h[:], chunk(chunkDone, chunkOffsetData, 0, data(0, make([]byte, 4096))))
		return h
	}()
)

func TestOrderIsKept(t *testing.T) {
	want := []uint64{7, 3, 200, 7, 3}
	seen := make(chan uint64, len(want))
	s := &server{answer: func(_ *server, r request) []byte { seen <- r.offset / 4096; return nil }}
	l := open(t, Config{Target: s.start(t), Order: want[:3]})
	if _, err := l.Pass(t.Context(), uint64(len(want))); err != nil {
		t.Fatal(err)
	}
	for i, b := range want {
		if got := <-seen; got != b {
			t.Errorf("request %d went to block %d, want %d", i, got, b)
		}
	}
}

func TestURI(t *testing.T) {
	for uri, want := range map[string]Target{
		"nbd://localhost":                             {Network: "tcp", Address: "localhost:10809"},
		"nbd://10.0.0.1:99/vol":                       {Network: "tcp", Address: "10.0.0.1:99", Export: "vol"},
		"nbd://[::1]/a%20b":                           {Network: "tcp", Address: "[::1]:10809", Export: "a b"},
		"nbd+unix:///?socket=/run/a.sock":             {Network: "unix", Address: "/run/a.sock"},
		"nbd+unix:///vol?socket=/run/a%20b/ram%3fx.s": {Network: "unix", Address: "/run/a b/ram?x.s", Export: "vol"},
	} {
		got, err := ParseURI(uri)
		if err != nil || got != want {
			t.Errorf("%s is %+v, %v; want %+v", uri, got, err, want)
		}
		if again, err := ParseURI(got.URI()); err != nil || again != want {
			t.Errorf("%s becomes %s and that %+v, %v", uri, got.URI(), again, err)
		}
	}
	for _, bad := range []string{"", "http://x", "nbd://", "nbd:///x", "nbd+unix:///x", "nbd://%zz"} {
		if got, err := ParseURI(bad); err == nil {
			t.Errorf("%q is %+v", bad, got)
		}
	}
}

func TestOffsetsCoverTheExportEvenly(t *testing.T) {
	c := newConnection(-1, Config{Depth: 1, Batch: 1, BlockBytes: 4096, ReadPercent: 100}, 0, new(atomic.Bool))
	c.spread(10, 0, 1)
	var hits [10]int
	for range 10_000 {
		hits[c.block()]++
	}
	for b, n := range hits {
		if n < 850 || n > 1150 {
			t.Errorf("block %d was chosen %d times of 10000, want about 1000", b, n)
		}
	}
}
