package nbd

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
)

// fakeServer is a server that does what a test wants, right or wrong, with one goroutine per connection.
type fakeServer struct {
	uri      string
	ln       net.Listener
	wg       sync.WaitGroup
	mu       sync.Mutex
	accepted []net.Conn
}

// fake serves each connection by handle, which gets its number from 0.
func fake(t testing.TB, handle func(number int, p *fakePeer)) *fakeServer {
	socket := filepath.Join(shortDir(t), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeServer{uri: "nbd+unix:///disk?socket=" + socket, ln: ln}
	f.wg.Go(func() {
		for number := 0; ; number++ {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.accepted = append(f.accepted, nc)
			f.mu.Unlock()
			f.wg.Go(func() {
				defer nc.Close()
				handle(number, &fakePeer{t: t, Conn: nc, size: 1 << 20, flags: 0x1 | FlagSendFlush | FlagSendTrim | FlagSendWriteZeroes})
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		f.cut()
		f.wg.Wait()
	})
	return f
}

// cut ends all connections.
func (f *fakeServer) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, nc := range f.accepted {
		_ = nc.Close()
	}
	f.accepted = nil
}

// fakePeer is the server's end of one connection.
type fakePeer struct {
	net.Conn
	t      testing.TB
	size   uint64
	flags  TransmissionFlags
	best   ReplyFormat   // what it agrees to
	volume *sessionReply // it knows OptSession
	blocks []uint32      // answer to INFO_BLOCK_SIZE

	replies  ReplyFormat // agreed
	sessions []session
	context  bool
}

// fakeRequest is a request as it came.
type fakeRequest struct {
	flags          CommandFlags
	command        Command
	cookie, offset uint64
	length         uint64
	payload        []byte
}

var errPeerGone = errors.New("peer is gone")

func (p *fakePeer) read(n int) ([]byte, error) {
	b := make([]byte, n)
	if _, err := io.ReadFull(p.Conn, b); err != nil {
		return nil, errPeerGone
	}
	return b, nil
}

func (p *fakePeer) send(parts ...[]byte) { _, _ = p.Conn.Write(slices.Concat(parts...)) }

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// optionReplyBytes is one reply to an option.
func optionReplyBytes(o Option, reply optionReply, data ...[]byte) []byte {
	d := slices.Concat(data...)
	return slices.Concat(be64(magicOptionReply), be32(uint32(o)), be32(uint32(reply)), be32(uint32(len(d))), d)
}

// greetingBytes is the greeting of a good server.
func greetingBytes() []byte {
	return slices.Concat(be64(magicGreeting), be64(magicOption), be16(flagFixedNewstyle|flagNoZeroes))
}

// handshake is the negotiation of a good server.
func (p *fakePeer) handshake() error {
	p.send(greetingBytes())
	if _, err := p.read(4); err != nil {
		return err
	}
	p.replies = ReplySimple
	for {
		b, err := p.read(sizeOption)
		if err != nil {
			return err
		}
		o := Option(binary.BigEndian.Uint32(b[8:]))
		data, err := p.read(int(binary.BigEndian.Uint32(b[12:])))
		if err != nil {
			return err
		}
		if p.option(o, data); o == OptGo {
			return nil
		}
	}
}

func (p *fakePeer) option(o Option, data []byte) {
	ack := optionReplyBytes(o, repAck)
	switch {
	case o == OptSession && p.volume != nil:
		s, err := parseSession(data)
		if err != nil {
			p.t.Error(err)
		}
		p.sessions = append(p.sessions, s)
		p.send(optionReplyBytes(o, repSession, p.volume.append(nil)), ack)
	case o == OptExtendedHeaders && p.best == ReplyExtended:
		p.replies = ReplyExtended
		p.send(ack)
	case o == OptStructuredReply && p.best <= ReplyStructured:
		p.replies = ReplyStructured
		p.send(ack)
	case o == OptSetMetaContext:
		p.context = true
		p.send(optionReplyBytes(o, repMetaContext, be32(7), []byte("base:allocation")), ack)
	case o == OptGo:
		infos := optionReplyBytes(o, repInfo, be16(infoExport), be64(p.size), be16(uint16(p.flags)))
		if p.blocks != nil {
			infos = append(infos, optionReplyBytes(o, repInfo, be16(infoBlockSize), be32(p.blocks[0]), be32(p.blocks[1]), be32(p.blocks[2]))...)
		}
		p.send(infos, ack)
	default:
		p.send(optionReplyBytes(o, repErrUnsup))
	}
}

// request reads one request.
func (p *fakePeer) request() (*fakeRequest, error) {
	size := sizeRequest
	if p.replies == ReplyExtended {
		size = sizeExtendedRequest
	}
	b, err := p.read(size)
	if err != nil {
		return nil, err
	}
	r := &fakeRequest{
		flags: CommandFlags(binary.BigEndian.Uint16(b[4:])), command: Command(binary.BigEndian.Uint16(b[6:])),
		cookie: binary.BigEndian.Uint64(b[8:]), offset: binary.BigEndian.Uint64(b[16:]),
	}
	if p.replies == ReplyExtended {
		r.length = binary.BigEndian.Uint64(b[24:])
	} else {
		r.length = uint64(binary.BigEndian.Uint32(b[24:]))
	}
	if r.command == CmdDisc {
		return nil, errPeerGone
	}
	if r.command == CmdWrite {
		r.payload, err = p.read(int(r.length))
	}
	return r, err
}

// chunkBytes is one chunk in the form of replies.
func chunkBytes(form ReplyFormat, flags, kind uint16, r *fakeRequest, payload ...[]byte) []byte {
	d := slices.Concat(payload...)
	if form == ReplyExtended {
		return slices.Concat(be32(magicExtendedReply), be16(flags), be16(kind), be64(r.cookie), be64(r.offset), be64(uint64(len(d))), d)
	}
	return slices.Concat(be32(magicStructuredReply), be16(flags), be16(kind), be64(r.cookie), be32(uint32(len(d))), d)
}

// simpleBytes is a simple reply.
func simpleBytes(r *fakeRequest, errno uint32, data []byte) []byte {
	return slices.Concat(be32(magicSimpleReply), be32(errno), be64(r.cookie), data)
}

// answer is the reply of a good server to r: data for a read, nothing else, or an error.
func (p *fakePeer) answer(r *fakeRequest, errno uint32, data []byte) {
	switch {
	case p.replies == ReplySimple:
		p.send(simpleBytes(r, errno, data))
	case errno != 0:
		p.send(chunkBytes(p.replies, chunkFlagDone, chunkError, r, be32(errno), be16(0)))
	case r.command == CmdRead:
		p.send(chunkBytes(p.replies, chunkFlagDone, chunkOffsetData, r, be64(r.offset), data))
	default:
		p.send(chunkBytes(p.replies, chunkFlagDone, chunkNone, r))
	}
}

// serve answers from a store until the client goes.
func (p *fakePeer) serve(store []byte) {
	if p.handshake() != nil {
		return
	}
	for {
		r, err := p.request()
		if err != nil {
			return
		}
		p.apply(r, store)
	}
}

// apply does r on store and answers it.
func (p *fakePeer) apply(r *fakeRequest, store []byte) {
	switch r.command {
	case CmdRead:
		p.answer(r, 0, store[r.offset:r.offset+r.length])
	case CmdBlockStatus:
		if p.replies == ReplyExtended {
			p.send(chunkBytes(p.replies, chunkFlagDone, chunkBlockStatusExt, r, be32(7), be32(1), be64(r.length), be64(0)))
		} else {
			p.send(chunkBytes(p.replies, chunkFlagDone, chunkBlockStatus, r, be32(7), be32(uint32(r.length)), be32(0)))
		}
	case CmdWrite:
		copy(store[r.offset:], r.payload)
		p.answer(r, 0, nil)
	case CmdWriteZeroes:
		clear(store[r.offset : r.offset+r.length])
		p.answer(r, 0, nil)
	default:
		p.answer(r, 0, nil)
	}
}
