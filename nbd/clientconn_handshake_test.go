package nbd

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
)

// scripted is a server whose answers are written before it is asked.
type scripted struct {
	io.Reader
	sent bytes.Buffer
}

func (s *scripted) Write(p []byte) (int, error) { return s.sent.Write(p) }

// script joins what a server says.
func script(parts ...[]byte) *scripted {
	return &scripted{Reader: bytes.NewReader(slices.Concat(parts...))}
}

// goBytes answers GO: INFO_EXPORT, more, and the ACK.
func goBytes(size uint64, flags TransmissionFlags, more ...[]byte) []byte {
	return slices.Concat(optionReplyBytes(OptGo, repInfo, be16(infoExport), be64(size), be16(uint16(flags))),
		slices.Concat(more...), optionReplyBytes(OptGo, repAck))
}

func blockSizeBytes(least, preferred, most uint32) []byte {
	return optionReplyBytes(OptGo, repInfo, be16(infoBlockSize), be32(least), be32(preferred), be32(most))
}

func unhex(t testing.TB, s string) []byte {
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var (
	ackExtended   = optionReplyBytes(OptExtendedHeaders, repAck)
	ackStructured = optionReplyBytes(OptStructuredReply, repAck)
	noExtended    = optionReplyBytes(OptExtendedHeaders, repErrUnsup)
	noStructured  = optionReplyBytes(OptStructuredReply, repErrUnsup)
	noContext     = optionReplyBytes(OptSetMetaContext, repErrUnsup)
	haveContext   = slices.Concat(optionReplyBytes(OptSetMetaContext, repMetaContext, be32(5), []byte("base:allocation")),
		optionReplyBytes(OptSetMetaContext, repAck))
)

// The bytes of a client that knows everything, to a server that knows everything but extended headers.
func TestNegotiateGolden(t *testing.T) {
	s := script(greetingBytes(),
		optionReplyBytes(OptSession, repSession, be64(9), be64(4)), optionReplyBytes(OptSession, repAck),
		noExtended, ackStructured, haveContext,
		goBytes(1<<30, 0x56d, blockSizeBytes(1, 4096, 1<<20)))
	info, err := negotiate(s, "disk", ConnOptions{session: &session{
		ID: [16]byte([]byte("0123456789abcdef")), Attach: 2, Generation: 9,
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := Info{
		Size: 1 << 30, Flags: 0x56d, MinBlock: 1, PreferredBlock: 4096, MaxPayload: 1 << 20, Replies: ReplyStructured,
		BlockStatus: true, allocation: 5, session: true, volume: sessionReply{Generation: 9, Incarnation: 4},
	}
	if info != want {
		t.Errorf("negotiated %+v, want %+v", info, want)
	}
	golden := unhex(t, `
		00000003
		49484156454f5054 52534853 00000028 30313233343536373839616263646566 0000000000000002 0000000000000009 00000004 6469736b
		49484156454f5054 0000000b 00000000
		49484156454f5054 00000008 00000000
		49484156454f5054 0000000a 0000001f 00000004 6469736b 00000001 0000000f 626173653a616c6c6f636174696f6e
		49484156454f5054 00000007 0000000c 00000004 6469736b 0001 0003`)
	if !bytes.Equal(s.sent.Bytes(), golden) {
		t.Errorf("sent\n%x, want\n%x", s.sent.Bytes(), golden)
	}
}

func TestNegotiate(t *testing.T) {
	base := Info{Size: 4096, Flags: 1, MinBlock: 512, PreferredBlock: 4096, MaxPayload: 32 << 20, Replies: ReplySimple}
	change := func(f func(*Info)) Info { i := base; f(&i); return i }
	plain := slices.Concat(greetingBytes(), noExtended, noStructured)
	for _, test := range []struct {
		name string
		s    *scripted
		o    ConnOptions
		want Info
	}{
		{"simple", script(plain, goBytes(4096, 1)), ConnOptions{}, base},
		{"extended", script(greetingBytes(), ackExtended, haveContext, goBytes(4096, 1)), ConnOptions{},
			change(func(i *Info) { i.Replies, i.BlockStatus, i.allocation = ReplyExtended, true, 5 })},
		{"structured asked for", script(greetingBytes(), ackStructured, noContext, goBytes(4096, 1)), ConnOptions{Replies: ReplyStructured},
			change(func(i *Info) { i.Replies = ReplyStructured })},
		{"simple asked for", script(greetingBytes(), goBytes(4096, 1)), ConnOptions{Replies: ReplySimple}, base},
		{"no context of ours", script(greetingBytes(), ackExtended, optionReplyBytes(OptSetMetaContext, repAck), goBytes(4096, 1)), ConnOptions{},
			change(func(i *Info) { i.Replies = ReplyExtended })},
		{"session unknown", script(greetingBytes(), optionReplyBytes(OptSession, repErrUnsup), goBytes(4096, 1)),
			ConnOptions{Replies: ReplySimple, session: &session{}}, base},
		{"unknown information", script(plain, goBytes(4096, 1, optionReplyBytes(OptGo, repInfo, be16(999), []byte("x")))), ConnOptions{}, base},
		{"flags without HAS_FLAGS", script(plain, goBytes(4096, 0xfe)), ConnOptions{}, change(func(i *Info) { i.Flags = 0 })},
		{"no limit of payload", script(plain, goBytes(4096, 1, blockSizeBytes(4096, 4096, math.MaxUint32))), ConnOptions{},
			change(func(i *Info) { i.MinBlock = 4096 })},
		{"payload no multiple", script(plain, goBytes(4096, 1, blockSizeBytes(65536, 65536, 100_000))), ConnOptions{},
			change(func(i *Info) { i.MinBlock, i.PreferredBlock, i.MaxPayload = 65536, 65536, 65536 })},
		{"no bytes", script(plain, goBytes(0, 1)), ConnOptions{}, change(func(i *Info) { i.Size = 0 })},
		{"EXPORT_NAME", script(plain, optionReplyBytes(OptGo, repErrUnsup), be64(4096), be16(1)), ConnOptions{}, base},
		{"EXPORT_NAME with zeroes", script(be64(magicGreeting), be64(magicOption), be16(flagFixedNewstyle), noExtended, noStructured,
			optionReplyBytes(OptGo, repErrUnsup), be64(4096), be16(1), make([]byte, 124)), ConnOptions{}, base},
	} {
		info, err := negotiate(test.s, "disk", test.o)
		if err != nil || info != test.want {
			t.Errorf("%s: %+v, %v; want %+v", test.name, info, err, test.want)
		}
		if rest, _ := io.ReadAll(test.s); len(rest) != 0 {
			t.Errorf("%s: %d bytes not read", test.name, len(rest))
		}
	}
}

// A hostile or useless server is refused with an error that says why.
func TestNegotiateRefuses(t *testing.T) {
	plain := slices.Concat(greetingBytes(), noExtended, noStructured)
	session := ConnOptions{Replies: ReplySimple, session: &session{}}
	many := bytes.Repeat(optionReplyBytes(OptGo, repInfo, be16(999)), 65)
	for _, test := range []struct {
		name string
		s    *scripted
		o    ConnOptions
		is   error
		says string
	}{
		{"HTTP", script([]byte("HTTP/1.1 400 Bad Request")), ConnOptions{}, ErrProtocol, "right port"},
		{"old style", script(be64(magicGreeting), be64(magicOldstyle), make([]byte, 136)), ConnOptions{}, ErrProtocol, "old style"},
		{"magic", script(be64(magicGreeting), be64(1), be16(3)), ConnOptions{}, ErrProtocol, "0x1"},
		{"newstyle not fixed", script(be64(magicGreeting), be64(magicOption), be16(2)), ConnOptions{}, ErrProtocol, "fixed newstyle"},
		{"reply magic", script(greetingBytes(), make([]byte, 20)), ConnOptions{}, ErrProtocol, "magic 0x0"},
		{"reply to another option", script(greetingBytes(), ackStructured), ConnOptions{}, ErrProtocol, "option 8"},
		{"reply of 4 GiB", script(greetingBytes(), be64(magicOptionReply), be32(11), be32(1), be32(math.MaxUint32)), ConnOptions{}, ErrProtocol, "4294967295 bytes"},
		{"reply that is none", script(greetingBytes(), optionReplyBytes(OptExtendedHeaders, repServer)), ConnOptions{}, ErrProtocol, "type 2"},
		{"TLS at once", script(greetingBytes(), optionReplyBytes(OptExtendedHeaders, repErrTLSReqd)), ConnOptions{}, ErrTLSRequired, "TLS"},
		{"TLS for GO", script(plain, optionReplyBytes(OptGo, repErrTLSReqd)), ConnOptions{}, ErrTLSRequired, "TLS"},
		{"unknown export", script(plain, optionReplyBytes(OptGo, repErrUnknown, []byte("no \x1b[31mdisk"))), ConnOptions{}, ErrUnknownExport, `no \x1b[31mdisk`},
		{"stopping", script(plain, optionReplyBytes(OptGo, repErrShutdown)), ConnOptions{}, ErrShutdown, "not serve now"},
		{"policy", script(plain, optionReplyBytes(OptGo, repErrPolicy)), ConnOptions{}, ErrRefused, "refuses"},
		{"other error", script(plain, optionReplyBytes(OptGo, repErrPlatform)), ConnOptions{}, nil, "0x80000004"},
		{"GO unknown after extended headers", script(greetingBytes(), ackExtended, noContext, optionReplyBytes(OptGo, repErrUnsup)), ConnOptions{}, ErrUnsupported, "option 7"},
		{"EXPORT_NAME refused", script(plain, optionReplyBytes(OptGo, repErrUnsup)), ConnOptions{}, io.EOF, `"disk"`},
		{"no export information", script(plain, optionReplyBytes(OptGo, repAck)), ConnOptions{}, ErrProtocol, "no size"},
		{"short export information", script(plain, optionReplyBytes(OptGo, repInfo, be16(infoExport), be64(1))), ConnOptions{}, ErrProtocol, "of 8 bytes"},
		{"empty information", script(plain, optionReplyBytes(OptGo, repInfo)), ConnOptions{}, ErrProtocol, "of 0 bytes"},
		{"2^63 bytes", script(plain, goBytes(1<<63, 1)), ConnOptions{}, ErrProtocol, "2^63"},
		{"2^64-1 bytes", script(plain, goBytes(math.MaxUint64, 1)), ConnOptions{}, ErrProtocol, "2^63"},
		{"minimum block 0", script(plain, goBytes(1, 1, blockSizeBytes(0, 4096, 1<<20))), ConnOptions{}, ErrProtocol, "block sizes 0"},
		{"minimum block 3", script(plain, goBytes(1, 1, blockSizeBytes(3, 4096, 1<<20))), ConnOptions{}, ErrProtocol, "block sizes 3"},
		{"minimum block 128 KiB", script(plain, goBytes(1, 1, blockSizeBytes(1<<17, 1<<17, 1<<20))), ConnOptions{}, ErrProtocol, "block sizes 131072"},
		{"maximum payload 0", script(plain, goBytes(1, 1, blockSizeBytes(1, 4096, 0))), ConnOptions{}, ErrProtocol, "4096, 0"},
		{"maximum below minimum", script(plain, goBytes(1, 1, blockSizeBytes(4096, 4096, 2048))), ConnOptions{}, ErrProtocol, "2048"},
		{"endless replies", script(plain, many), ConnOptions{}, ErrProtocol, "more than 64"},
		{"context of another name", script(greetingBytes(), ackExtended, optionReplyBytes(OptSetMetaContext, repMetaContext, be32(1), []byte("qemu:x"))), ConnOptions{}, ErrProtocol, "qemu:x"},
		{"context twice", script(greetingBytes(), ackExtended, haveContext[:len(haveContext)-20], haveContext), ConnOptions{}, ErrProtocol, "twice"},
		{"context of 3 bytes", script(greetingBytes(), ackExtended, optionReplyBytes(OptSetMetaContext, repMetaContext, []byte("abc"))), ConnOptions{}, ErrProtocol, "abc"},
		{"session too old", script(greetingBytes(), optionReplyBytes(OptSession, repErrPolicy, []byte("rolled back"))), session, ErrRefused, "rolled back"},
		{"session reply of 3 bytes", script(greetingBytes(), optionReplyBytes(OptSession, repSession, []byte("abc"))), session, errSessionReplyLength, "length"},
	} {
		_, err := negotiate(test.s, "disk", test.o)
		if err == nil || test.is != nil && !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v; want %v and %q", test.name, err, test.is, test.says)
		}
		var refused *OptionError
		aborted := bytes.HasSuffix(test.s.sent.Bytes(), unhex(t, "49484156454f5054 00000002 00000000"))
		if errors.As(err, &refused) != aborted {
			t.Errorf("%s: ABORT sent: %t", test.name, aborted)
		}
	}
	for _, name := range []string{strings.Repeat("n", 4097), "\xff"} {
		if _, err := negotiate(script(greetingBytes()), name, ConnOptions{}); err == nil {
			t.Errorf("export name of %d bytes accepted", len(name))
		}
	}
}

// A server may die at every byte: never a connection, never a panic.
func TestNegotiateCut(t *testing.T) {
	whole := slices.Concat(greetingBytes(), optionReplyBytes(OptSession, repSession, be64(1), be64(2)), optionReplyBytes(OptSession, repAck),
		ackExtended, haveContext, goBytes(1<<20, 1, blockSizeBytes(1, 4096, 1<<20)))
	for n := range whole {
		if _, err := negotiate(script(whole[:n]), "disk", ConnOptions{session: &session{}}); err == nil {
			t.Fatalf("connected after %d of %d bytes", n, len(whole))
		}
	}
	if _, err := negotiate(script(whole), "disk", ConnOptions{session: &session{}}); err != nil {
		t.Fatal(err)
	}
}

func FuzzNegotiate(f *testing.F) {
	f.Add(slices.Concat(greetingBytes(), optionReplyBytes(OptSession, repSession, be64(1), be64(2)), optionReplyBytes(OptSession, repAck),
		ackExtended, haveContext, goBytes(1<<20, 1, blockSizeBytes(1, 4096, 1<<20))))
	f.Add(slices.Concat(greetingBytes(), optionReplyBytes(OptSession, repErrUnsup), noExtended, noStructured, optionReplyBytes(OptGo, repErrUnsup), be64(4096), be16(1)))
	f.Fuzz(func(t *testing.T, b []byte) {
		info, err := negotiate(script(b), "disk", ConnOptions{session: &session{}})
		if err != nil {
			return
		}
		if info.Size < 0 || info.MinBlock == 0 || info.MaxPayload < info.MinBlock || info.MaxPayload > 32<<20 || info.MaxPayload%info.MinBlock != 0 {
			t.Fatalf("negotiated %+v", info)
		}
	})
}

func TestSessionGolden(t *testing.T) {
	s := session{ID: [16]byte([]byte("0123456789abcdef")), Attach: 0x0102, Generation: 0x0304, Export: "vol"}
	want := unhex(t, "30313233343536373839616263646566 0000000000000102 0000000000000304 00000003 766f6c")
	if got := s.append(nil); !bytes.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
	if got, err := parseSession(want); err != nil || got != s {
		t.Errorf("parsed %+v, %v", got, err)
	}
	for _, bad := range [][]byte{nil, want[:35], want[:38], append(slices.Clone(want), 0),
		session{Export: strings.Repeat("n", 4097)}.append(nil)} {
		if _, err := parseSession(bad); !errors.Is(err, errSessionLength) {
			t.Errorf("%d bytes: %v", len(bad), err)
		}
	}
}

func FuzzSession(f *testing.F) {
	f.Add(session{Attach: 1, Export: "vol"}.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseSession(b); err == nil && !bytes.Equal(s.append(nil), b) {
			t.Fatalf("%x reads as %+v", b, s)
		}
	})
}
