package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// newParser gives a parser with calls in flight, the i-th with cookie 1<<32|i. The destinations are filled with 0xee.
func newParser(form ReplyFormat, calls []Call, bufferBytes int) *replyParser {
	p := &replyParser{format: form, context: 7, status: true, slots: make([]slot, len(calls)), buffer: make([]byte, bufferBytes)}
	for i := range calls {
		call := &calls[i]
		if call.Command == CmdRead {
			call.Length = uint64(len(call.Data))
			for j := range call.Data {
				call.Data[j] = 0xee
			}
		}
		call.Err = syscall.EINPROGRESS
		p.slots[i].reset(call)
		p.slots[i].cookie.Store(1<<32 | uint64(i))
	}
	return p
}

// feed gives b to p, at most step bytes at a time, and returns the calls that are answered then.
func feed(p *replyParser, b []byte, step int) (answered []*Call, err error) {
	for {
		for {
			call, _, err := p.next()
			if err != nil {
				return answered, err
			}
			if call == nil {
				break
			}
			answered = append(answered, call)
		}
		if len(b) == 0 {
			return answered, nil
		}
		rest, buffer := p.space()
		n := min(len(b), step, len(rest)+len(buffer))
		k := copy(rest, b[:n])
		copy(buffer, b[k:n])
		p.received(n)
		b = b[n:]
	}
}

// testCalls are a read of 10 bytes at 1000, a write of 10 bytes, a flush and a block status of 64 KiB at 4096.
func testCalls() []Call {
	return []Call{
		{Command: CmdRead, Offset: 1000, Data: make([]byte, 10)},
		{Command: CmdWrite, Offset: 1000, Data: make([]byte, 10), Length: 10},
		{Command: CmdFlush},
		{Command: CmdBlockStatus, Offset: 4096, Length: 64 << 10},
	}
}

var (
	replyRead   = &fakeRequest{cookie: 1 << 32, offset: 1000}
	replyWrite  = &fakeRequest{cookie: 1<<32 | 1, offset: 1000}
	replyFlush  = &fakeRequest{cookie: 1<<32 | 2}
	replyStatus = &fakeRequest{cookie: 1<<32 | 3, offset: 4096}
)

// Good replies, in pieces of every size.
func TestReplies(t *testing.T) {
	type outcome struct {
		call int
		err  syscall.Errno
	}
	done := chunkFlagDone
	for _, form := range []ReplyFormat{ReplyExtended, ReplyStructured} {
		status := func(pairs ...uint32) []byte {
			b := be32(7)
			if form == ReplyExtended {
				b = append(b, be32(uint32(len(pairs)/2))...)
			}
			for _, v := range pairs {
				if form == ReplyExtended {
					b = append(b, be64(uint64(v))...)
				} else {
					b = append(b, be32(v)...)
				}
			}
			return b
		}
		statusKind := chunkBlockStatus
		if form == ReplyExtended {
			statusKind = chunkBlockStatusExt
		}
		chunk := func(flags, kind uint16, r *fakeRequest, payload ...[]byte) []byte {
			return chunkBytes(form, flags, kind, r, payload...)
		}
		for _, test := range []struct {
			name    string
			b       []byte
			want    []outcome
			data    string
			extents []Extent
		}{
			{"one chunk", chunk(done, chunkOffsetData, replyRead, be64(1000), []byte("0123456789")), []outcome{{0, 0}}, "0123456789", nil},
			{"data, hole and NONE", slices.Concat(
				chunk(0, chunkOffsetData, replyRead, be64(1000), []byte("0123")),
				chunk(0, chunkOffsetHole, replyRead, be64(1004), be32(6)),
				chunk(done, chunkNone, replyRead)), []outcome{{0, 0}}, "0123\x00\x00\x00\x00\x00\x00", nil},
			{"any order, between others", slices.Concat(
				chunk(0, chunkOffsetData, replyRead, be64(1008), []byte("89")),
				chunk(done, chunkNone, replyWrite),
				chunk(0, chunkOffsetData, replyRead, be64(1002), []byte("23")),
				chunk(0, chunkOffsetData, replyRead, be64(1006), []byte("67")),
				chunk(done, chunkError, replyFlush, be32(5), be16(4), []byte("disk")),
				chunk(0, chunkOffsetData, replyRead, be64(1004), []byte("45")),
				chunk(done, chunkOffsetData, replyRead, be64(1000), []byte("01"))),
				[]outcome{{1, 0}, {2, syscall.EIO}, {0, 0}}, "0123456789", nil},
			{"error after data", slices.Concat(
				chunk(0, chunkOffsetData, replyRead, be64(1000), []byte("0123456789")),
				chunk(done, chunkErrorOffset, replyRead, be32(12), be16(0), be64(1004))), []outcome{{0, syscall.ENOMEM}}, "", nil},
			{"the first error counts", slices.Concat(
				chunk(0, chunkError, replyRead, be32(28), be16(0)),
				chunk(0, chunkError, replyRead, be32(1), be16(0)),
				chunk(done, chunkNone, replyRead)), []outcome{{0, syscall.ENOSPC}}, "", nil},
			{"unknown error counts as EINVAL", chunk(done, chunkError, replyRead, be32(4711), be16(0)), []outcome{{0, syscall.EINVAL}}, "", nil},
			{"error 0 is an error", chunk(done, chunkError, replyRead, be32(0), be16(0)), []outcome{{0, syscall.EINVAL}}, "", nil},
			{"unknown type of error", chunk(done, 0x8fff, replyWrite, []byte("what")), []outcome{{1, syscall.EIO}}, "", nil},
			{"unknown flags", chunk(done|0x7ffe, chunkNone, replyWrite), []outcome{{1, 0}}, "", nil},
			{"status", chunk(done, statusKind, replyStatus, status(4096, 0, 61440, 3)), []outcome{{3, 0}}, "", []Extent{{4096, 0}, {61440, 3}}},
			{"status overruns", slices.Concat(chunk(0, statusKind, replyStatus, status(4096, 1, 1<<30, 2)), chunk(done, chunkNone, replyStatus)),
				[]outcome{{3, 0}}, "", []Extent{{4096, 1}, {1 << 30, 2}}},
			{"status ends before", chunk(done, statusKind, replyStatus, status(512, 0)), []outcome{{3, 0}}, "", []Extent{{512, 0}}},
			{"status fails", chunk(done, chunkError, replyStatus, be32(95), be16(0)), []outcome{{3, syscall.ENOTSUP}}, "", nil},
		} {
			for _, step := range []int{1, 2, 3, 7, 16, 31, 100, 1 << 20} {
				calls := testCalls()
				answered, err := feed(newParser(form, calls, 64), test.b, step)
				var got []outcome
				for _, call := range answered {
					got = append(got, outcome{slices.IndexFunc(calls, func(c Call) bool { return c.Command == call.Command }), call.Err})
				}
				if err != nil || !slices.Equal(got, test.want) {
					t.Fatalf("%s, %s, %d bytes at a time: %v, %v; want %v", test.name, form, step, got, err, test.want)
				}
				if test.data != "" && string(calls[0].Data) != test.data {
					t.Fatalf("%s, %s: read %q, want %q", test.name, form, calls[0].Data, test.data)
				}
				if !slices.Equal(calls[3].Extents, test.extents) {
					t.Fatalf("%s, %s: extents %v, want %v", test.name, form, calls[3].Extents, test.extents)
				}
			}
			// The same bytes cut anywhere answer fewer calls, and none with success that was not complete.
			for n := range test.b {
				calls := testCalls()
				answered, err := feed(newParser(form, calls, 64), test.b[:n], 1<<20)
				if err != nil || len(answered) >= len(test.want) {
					t.Fatalf("%s, %s, cut at %d: %d answered, %v", test.name, form, n, len(answered), err)
				}
			}
		}
	}
}

func TestSimpleReplies(t *testing.T) {
	b := slices.Concat(simpleBytes(replyFlush, 0, nil), simpleBytes(replyRead, 0, []byte("0123456789")),
		simpleBytes(replyWrite, 28, nil), simpleBytes(replyStatus, 22, nil))
	for step := 1; step < len(b); step++ {
		calls := testCalls()
		answered, err := feed(newParser(ReplySimple, calls, 64), b, step)
		if err != nil || len(answered) != 4 || string(calls[0].Data) != "0123456789" ||
			calls[0].Err != 0 || calls[1].Err != syscall.ENOSPC || calls[2].Err != 0 || calls[3].Err != syscall.EINVAL {
			t.Fatalf("%d bytes at a time: %d answered, %v, %+v", step, len(answered), err, calls)
		}
	}
	calls := testCalls()
	if answered, err := feed(newParser(ReplySimple, calls, 64), simpleBytes(replyRead, 5, nil), 100); err != nil || len(answered) != 1 || calls[0].Err != syscall.EIO {
		t.Errorf("failed read: %d answered, %v, %v", len(answered), err, calls[0].Err)
	}
	// Commands without data may get simple replies after structured ones were agreed.
	calls = testCalls()
	if answered, err := feed(newParser(ReplyStructured, calls, 64), simpleBytes(replyWrite, 0, nil), 100); err != nil || len(answered) != 1 {
		t.Errorf("simple reply to a write: %d answered, %v", len(answered), err)
	}
}

// A reply that breaks the protocol answers nothing and ends the connection for good.
func TestRepliesRefused(t *testing.T) {
	const s, x = ReplyStructured, ReplyExtended
	done := chunkFlagDone
	ten := []byte("0123456789")
	unknown := &fakeRequest{cookie: 99}
	free := &fakeRequest{cookie: 2<<32 | 1}
	zero := &fakeRequest{}
	elsewhere := &fakeRequest{cookie: 1 << 32, offset: 1001}
	pair := slices.Concat(be32(512), be32(0))
	for _, test := range []struct {
		name string
		form ReplyFormat
		b    []byte
		says string
	}{
		{"no magic", s, make([]byte, 4), "0x00000000"},
		{"structured without agreement", ReplySimple, chunkBytes(s, done, chunkNone, replyWrite), "simple replies"},
		{"extended without agreement", s, chunkBytes(x, done, chunkNone, replyWrite), "structured replies"},
		{"simple after extended", x, simpleBytes(replyWrite, 0, nil), "extended replies"},
		{"structured after extended", x, chunkBytes(s, done, chunkNone, replyWrite), "extended replies"},
		{"simple reply to a read", s, simpleBytes(replyRead, 0, ten), "simple reply to read"},
		{"simple error of a read", s, simpleBytes(replyRead, 5, nil), "simple reply to read"},
		{"simple success of a status", s, simpleBytes(replyStatus, 0, nil), "simple reply to block-status"},
		{"status without structured", ReplySimple, simpleBytes(replyStatus, 0, nil), "without a status"},
		{"unknown cookie", s, chunkBytes(s, done, chunkNone, unknown), "not in flight"},
		{"cookie of another use", s, chunkBytes(s, done, chunkNone, free), "not in flight"},
		{"cookie 0", s, chunkBytes(s, done, chunkNone, zero), "not in flight"},
		{"unknown cookie, simple", ReplySimple, simpleBytes(unknown, 0, nil), "not in flight"},
		{"answered twice", s, slices.Concat(chunkBytes(s, done, chunkNone, replyWrite), chunkBytes(s, done, chunkNone, replyWrite)), "not in flight"},
		{"other offset", x, chunkBytes(x, done, chunkOffsetData, elsewhere, be64(1000), ten), "offset 1001"},
		{"NONE that is not the last", s, chunkBytes(s, 0, chunkNone, replyWrite), "type 0x0"},
		{"NONE with data", s, chunkBytes(s, done, chunkNone, replyWrite, ten), "type 0x0"},
		{"nothing of a read", s, chunkBytes(s, done, chunkNone, replyRead), "before all of it"},
		{"short read", s, chunkBytes(s, done, chunkOffsetData, replyRead, be64(1000), ten[:9]), "before all of it"},
		{"hole in a read", s, slices.Concat(chunkBytes(s, 0, chunkOffsetData, replyRead, be64(1000), ten[:4]),
			chunkBytes(s, done, chunkOffsetData, replyRead, be64(1005), ten[5:])), "before all of it"},
		{"long read", s, chunkBytes(s, done, chunkOffsetData, replyRead, be64(1000), ten, []byte("x")), "do not lie"},
		{"data before the read", s, chunkBytes(s, done, chunkOffsetData, replyRead, be64(999), ten), "do not lie"},
		{"data behind the read", s, chunkBytes(s, done, chunkOffsetData, replyRead, be64(1010), ten), "do not lie"},
		{"data at 2^64", s, chunkBytes(s, done, chunkOffsetData, replyRead, be64(1<<64-1), ten), "do not lie"},
		{"hole of 4 GiB", s, chunkBytes(s, done, chunkOffsetHole, replyRead, be64(1000), be32(1<<32-1)), "do not lie"},
		{"empty data", s, chunkBytes(s, 0, chunkOffsetData, replyRead, be64(1000)), "0 bytes at 1000"},
		{"empty hole", s, chunkBytes(s, 0, chunkOffsetHole, replyRead, be64(1000), be32(0)), "0 bytes at 1000"},
		{"overlap", s, slices.Concat(chunkBytes(s, 0, chunkOffsetData, replyRead, be64(1000), ten[:6]),
			chunkBytes(s, done, chunkOffsetData, replyRead, be64(1005), ten[5:])), "came twice"},
		{"overlap before", s, slices.Concat(chunkBytes(s, 0, chunkOffsetData, replyRead, be64(1005), ten[5:]),
			chunkBytes(s, done, chunkOffsetHole, replyRead, be64(1000), be32(6))), "came twice"},
		{"all twice", s, slices.Concat(chunkBytes(s, 0, chunkOffsetData, replyRead, be64(1000), ten),
			chunkBytes(s, done, chunkOffsetData, replyRead, be64(1000), ten)), "came twice"},
		{"data chunk without offset", s, chunkBytes(s, done, chunkOffsetData, replyRead, be32(0)), "type 0x1 with 4 bytes"},
		{"hole chunk with more", s, chunkBytes(s, done, chunkOffsetHole, replyRead, be64(1000), be32(10), ten), "type 0x2"},
		{"data for a write", s, chunkBytes(s, done, chunkOffsetData, replyWrite, be64(1000), ten), "reply to write"},
		{"hole for a flush", s, chunkBytes(s, done, chunkOffsetHole, replyFlush, be64(0), be32(1)), "reply to flush"},
		{"status for a read", s, chunkBytes(s, done, chunkBlockStatus, replyRead, be32(7), pair), "reply to read"},
		{"status of another context", s, chunkBytes(s, done, chunkBlockStatus, replyStatus, be32(8), pair), "context 8"},
		{"status twice", s, slices.Concat(chunkBytes(s, 0, chunkBlockStatus, replyStatus, be32(7), pair),
			chunkBytes(s, done, chunkBlockStatus, replyStatus, be32(7), pair)), "context 7"},
		{"no status", s, chunkBytes(s, done, chunkNone, replyStatus), "without a status"},
		{"empty status", s, chunkBytes(s, done, chunkBlockStatus, replyStatus, be32(7)), "0 descriptors"},
		{"half a descriptor", s, chunkBytes(s, done, chunkBlockStatus, replyStatus, be32(7), pair, be32(1)), "4 bytes"},
		{"extent of no bytes", s, chunkBytes(s, done, chunkBlockStatus, replyStatus, be32(7), be64(0)), "status of 0 bytes"},
		{"extents beyond the request", s, chunkBytes(s, done, chunkBlockStatus, replyStatus, be32(7), be32(64<<10), be32(0), pair), "65536 of 65536"},
		{"64-bit status, not agreed", s, chunkBytes(s, done, chunkBlockStatusExt, replyStatus, be32(7), be32(1), be64(512), be64(0)), "type 0x6"},
		{"32-bit status after extended", x, chunkBytes(x, done, chunkBlockStatus, replyStatus, be32(7), pair), "type 0x5"},
		{"status count lies", x, chunkBytes(x, done, chunkBlockStatusExt, replyStatus, be32(7), be32(1<<32-1), be64(512), be64(0)), "4294967295 descriptors"},
		{"status of 2^60 bytes", x, slices.Concat(be32(magicExtendedReply), be16(done), be16(chunkBlockStatusExt), be64(1<<32|3), be64(4096), be64(1<<60), be32(7), be32(1)), "1 descriptors"},
		{"more descriptors than possible", s, slices.Concat(be32(magicStructuredReply), be16(done), be16(chunkBlockStatus), be64(1<<32|3), be32(4+8<<20+8), be32(7)), "1048577 descriptors"},
		{"unknown chunk", s, chunkBytes(s, done, 3, replyRead, ten), "type 0x3"},
		{"huge error", s, slices.Concat(be32(magicStructuredReply), be16(done), be16(chunkError), be64(1<<32), be32(1<<30), be32(5), be16(0)), "type 0x8001"},
		{"short error", s, chunkBytes(s, done, chunkError, replyRead, be32(5)), "type 0x8001 with 4 bytes"},
	} {
		for _, step := range []int{1, 5, 1 << 20} {
			calls := testCalls()
			p := newParser(test.form, calls, 64)
			answered, err := feed(p, test.b, step)
			if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%s, %d bytes at a time: %v, want %q", test.name, step, err, test.says)
			}
			if len(answered) > 0 && test.name != "answered twice" {
				t.Errorf("%s: answered %s", test.name, answered[0].Command)
			}
			if call, _, again := p.next(); call != nil || again == nil {
				t.Errorf("%s: the parser goes on after the error", test.name)
			}
			if calls[0].Err != syscall.EINPROGRESS {
				t.Errorf("%s: the read has error %v", test.name, calls[0].Err)
			}
		}
	}
}

// A read that comes in too many separate pieces is refused before they take much memory.
func TestRepliesScattered(t *testing.T) {
	calls := []Call{{Command: CmdRead, Data: make([]byte, 1<<20)}}
	var b []byte
	for i := range maxRuns + 1 {
		b = append(b, chunkBytes(ReplyStructured, 0, chunkOffsetHole, &fakeRequest{cookie: 1 << 32}, be64(uint64(2*i)), be32(1))...)
	}
	p := newParser(ReplyStructured, calls, 4096)
	if _, err := feed(p, b[:maxRuns*32], 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := feed(p, b[maxRuns*32:], 1<<20); !errors.Is(err, ErrProtocol) {
		t.Fatalf("%d pieces: %v", maxRuns+1, err)
	}
}

// Whatever comes, in whatever pieces: no panic, a read that succeeds was covered exactly once, and the outcome does not
// depend on the pieces.
func FuzzReplies(f *testing.F) {
	done := chunkFlagDone
	for _, form := range []ReplyFormat{ReplyExtended, ReplyStructured} {
		f.Add(uint8(form), uint8(3), slices.Concat(
			chunkBytes(form, 0, chunkOffsetData, replyRead, be64(1008), []byte("89")),
			chunkBytes(form, done, chunkNone, replyWrite),
			chunkBytes(form, 0, chunkOffsetHole, replyRead, be64(1002), be32(6)),
			chunkBytes(form, done, chunkError, replyFlush, be32(5), be16(4), []byte("disk")),
			chunkBytes(form, done, chunkOffsetData, replyRead, be64(1000), []byte("01"))))
	}
	f.Add(uint8(ReplyExtended), uint8(9), chunkBytes(ReplyExtended, done, chunkBlockStatusExt, replyStatus, be32(7), be32(2), be64(512), be64(0), be64(1<<40), be64(3)))
	f.Add(uint8(ReplyStructured), uint8(9), chunkBytes(ReplyStructured, done, chunkBlockStatus, replyStatus, be32(7), be32(512), be32(0), be32(4096), be32(3)))
	f.Add(uint8(ReplySimple), uint8(1), slices.Concat(simpleBytes(replyFlush, 0, nil), simpleBytes(replyRead, 0, []byte("0123456789"))))
	f.Fuzz(func(t *testing.T, form, step uint8, b []byte) {
		run := func(step, bufferBytes int) ([]Call, int, bool) {
			calls := testCalls()
			answered, err := feed(newParser(ReplyFormat(form%3), calls, bufferBytes), b, step)
			return calls, len(answered), err != nil
		}
		calls, n, failed := run(1<<20, 1<<16)
		again, m, failedAgain := run(int(step%64)+1, 64)
		if n != m || failed != failedAgain {
			t.Fatalf("%d answered, failed %t; in pieces %d, %t", n, failed, m, failedAgain)
		}
		for i := range calls {
			if calls[i].Err != again[i].Err || calls[i].Err == 0 && (!bytes.Equal(calls[i].Data, again[i].Data) || !slices.Equal(calls[i].Extents, again[i].Extents)) {
				t.Fatalf("%s: %+v, in pieces %+v", calls[i].Command, calls[i], again[i])
			}
		}
		if calls[3].Err == 0 && len(calls[3].Extents) == 0 {
			t.Fatal("block status without extents")
		}
		if calls[0].Err == 0 && !contains(b, calls[0].Data) {
			t.Fatalf("read %q succeeded; it did not come", calls[0].Data)
		}
	})
}

// contains tells whether every byte of data is in b, or 0 where b may tell of a hole.
func contains(b, data []byte) bool {
	for _, c := range data {
		if c != 0 && bytes.IndexByte(b, c) < 0 {
			return false
		}
	}
	return true
}

// The bytes of requests, alone and in a batch.
func TestRequestGolden(t *testing.T) {
	calls := []Call{
		{Command: CmdRead, Offset: 0x1000, Data: make([]byte, 512)},
		{Command: CmdWrite, Flags: CmdFlagFUA, Offset: 0x2000, Data: []byte("ab"), Pieces: [][]byte{[]byte("c"), []byte("d")}},
		{Command: CmdFlush},
		{Command: CmdBlockStatus, Flags: CmdFlagReqOne, Offset: 0x3000, Length: 0x4000},
	}
	for _, test := range []struct {
		form   ReplyFormat
		golden string
	}{
		{ReplyStructured, `
			25609513 0000 0000 0000000100000000 0000000000001000 00000200
			25609513 0001 0001 0000000100000001 0000000000002000 00000004 61626364
			25609513 0000 0003 0000000100000002 0000000000000000 00000000
			25609513 0008 0007 0000000100000003 0000000000003000 00004000`},
		{ReplyExtended, `
			21e41c71 0000 0000 0000000100000000 0000000000001000 0000000000000200
			21e41c71 0021 0001 0000000100000001 0000000000002000 0000000000000004 61626364
			21e41c71 0000 0003 0000000100000002 0000000000000000 0000000000000000
			21e41c71 0008 0007 0000000100000003 0000000000003000 0000000000004000`},
	} {
		c := &Conn{info: Info{Replies: test.form, BlockStatus: true}, depth: 4}
		c.makeBuffers(4096)
		for i := range calls {
			if err := c.Queue(&calls[i]); err != nil {
				t.Fatal(err)
			}
		}
		if got, want := slices.Concat(c.batch...), unhex(t, test.golden); !bytes.Equal(got, want) {
			t.Errorf("%s:\n%x, want\n%x", test.form, got, want)
		}
		if disc := c.disc(); binary.BigEndian.Uint16(disc[6:]) != 2 || len(disc) != 28 && test.form != ReplyExtended {
			t.Errorf("%s: DISC is %x", test.form, disc)
		}
	}
	// What cannot be sent is refused.
	c := &Conn{info: Info{Replies: ReplyStructured}, depth: 4}
	c.makeBuffers(4096)
	for _, call := range []Call{
		{Command: CmdDisc}, {Command: 99}, {Command: CmdBlockStatus, Length: 1}, {Command: CmdTrim, Length: 1 << 32},
	} {
		if err := c.Queue(&call); !errors.Is(err, errBadCall) {
			t.Errorf("%s of %d bytes: %v", call.Command, call.Length, err)
		}
	}
}
