package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"syscall"
)

// ErrProtocol says that a server broke the protocol. The connection cannot be used any more: what follows on it
// means nothing.
var ErrProtocol = errors.New("server broke the NBD protocol")

// Bounds of what a server may send in one chunk.
const (
	maxErrorChunk  = 64 << 10 // bytes of an error chunk; the text in it is at most 4096
	maxDescriptors = 1 << 20  // descriptors of a block status (proto.md: a server SHOULD send no more)
	maxRuns        = 4096     // separate pieces of a read whose chunks come out of order
)

// slot is the place of a Call in flight. Its index and the number of its use are the cookie, so a cookie that is
// answered twice, or was never sent, is recognized.
type slot struct {
	cookie atomic.Uint64 // of the call in flight; 0 = none
	uses   uint32
	call   *Call

	command    Command
	offset     uint64
	length     uint64
	err        syscall.Errno
	runs       []run // what is there of a read, ascending, never touching one another
	haveStatus bool
}

// run is the part [from, to) of a read, in bytes from its begin.
type run struct{ from, to uint64 }

// reset makes s ready for call.
func (s *slot) reset(call *Call) {
	s.call, s.command, s.offset, s.length = call, call.Command, call.Offset, call.Length
	s.err, s.runs, s.haveStatus = 0, s.runs[:0], false
}

// complete tells whether all of a read is there.
func (s *slot) complete() bool {
	if s.length == 0 {
		return true
	}
	return len(s.runs) == 1 && s.runs[0] == run{0, s.length}
}

// cover notes that n bytes at offset have come, and gives their place within the read.
func (s *slot) cover(offset, n uint64) (run, error) {
	if n == 0 || offset < s.offset || offset-s.offset > s.length || n > s.length-(offset-s.offset) {
		return run{}, fmt.Errorf("%w: %d bytes at %d do not lie in the read of %d at %d",
			ErrProtocol, n, offset, s.length, s.offset)
	}
	r := run{offset - s.offset, offset - s.offset + n}
	i := len(s.runs)
	for i > 0 && s.runs[i-1].from >= r.from {
		i--
	}
	if i > 0 && s.runs[i-1].to > r.from || i < len(s.runs) && s.runs[i].from < r.to {
		return run{}, fmt.Errorf("%w: %d bytes at %d came twice", ErrProtocol, n, offset)
	}
	joinsLeft := i > 0 && s.runs[i-1].to == r.from
	joinsRight := i < len(s.runs) && s.runs[i].from == r.to
	switch {
	case joinsLeft && joinsRight:
		s.runs[i-1].to = s.runs[i].to
		s.runs = slices.Delete(s.runs, i, i+1)
	case joinsLeft:
		s.runs[i-1].to = r.to
	case joinsRight:
		s.runs[i].from = r.from
	case len(s.runs) == maxRuns:
		return run{}, fmt.Errorf("%w: a read came in more than %d separate pieces", ErrProtocol, maxRuns)
	default:
		s.runs = slices.Insert(s.runs, i, r)
	}
	return r, nil
}

// fail notes an error of the reply; the first one counts.
func (s *slot) fail(err syscall.Errno) {
	if s.err == 0 {
		s.err = err
	}
}

// verdict tells whether a reply that is over says all that it must.
func (s *slot) verdict() error {
	if s.err == 0 && s.command == CmdRead && !s.complete() {
		return fmt.Errorf("%w: reply to a read of %d at %d ends before all of it came", ErrProtocol, s.length, s.offset)
	}
	if s.err == 0 && s.command == CmdBlockStatus && !s.haveStatus {
		return fmt.Errorf("%w: reply to block-status without a status", ErrProtocol)
	}
	return nil
}

// finish frees s and gives back its call and its index.
func (s *slot) finish() (*Call, uint32) {
	call, i := s.call, uint32(s.cookie.Load())
	call.Err = s.err
	s.call = nil
	s.cookie.Store(0)
	return call, i
}

// replyParser makes completed calls of the bytes of a server. It does no I/O: its owner reads into space and says
// so with received. Nothing is allocated by a length that the server names; it is used by one goroutine.
type replyParser struct {
	format  ReplyFormat
	context uint32 // id of base:allocation
	status  bool   // base:allocation was agreed
	slots   []slot

	buffer []byte
	r, w   int // buffer[r:w] is received and not parsed

	// The chunk whose payload is being received. Exactly one of rest, skip and extents is not empty.
	chunk   *slot
	done    bool   // it is the last of its reply
	rest    []byte // its data go here
	skip    uint64 // bytes of it that are of no interest
	extents uint64 // descriptors of it to come
	covered uint64 // bytes that its descriptors cover so far

	broken error // nothing after this means anything
}

// space gives the two places where the next bytes go, one after the other: the rest of a read, straight into its
// destination, and the buffer.
func (p *replyParser) space() (rest, buffer []byte) {
	if p.r == p.w {
		p.r, p.w = 0, 0
	} else if len(p.buffer)-p.w < len(p.buffer)/4 {
		p.w = copy(p.buffer, p.buffer[p.r:p.w])
		p.r = 0
	}
	return p.rest, p.buffer[p.w:]
}

// received says that n bytes have been read into space.
func (p *replyParser) received(n int) {
	direct := min(n, len(p.rest))
	p.rest = p.rest[direct:]
	p.w += n - direct
}

// next gives the next call that is answered completely, and the index of its slot; nil if more bytes are needed
// first. An error is final.
func (p *replyParser) next() (*Call, uint32, error) {
	for p.broken == nil {
		ok := true
		if p.chunk == nil {
			ok, p.broken = p.header()
		}
		if ok && p.broken == nil {
			ok, p.broken = p.payload()
		}
		if !ok || p.broken != nil {
			break
		}
		s := p.chunk
		p.chunk = nil
		if !p.done {
			continue
		}
		if p.broken = s.verdict(); p.broken == nil {
			call, i := s.finish()
			return call, i, nil
		}
	}
	return nil, 0, p.broken
}

// header parses the header of a chunk, with the fixed part of its payload. False: not all of it is there, or err.
func (p *replyParser) header() (bool, error) {
	b := p.buffer[p.r:p.w]
	if len(b) < 4 {
		return false, nil
	}
	magic := binary.BigEndian.Uint32(b)
	switch {
	case magic == magicSimpleReply && p.format != ReplyExtended:
		return p.simple(b)
	case magic == magicStructuredReply && p.format == ReplyStructured:
		return p.structured(b)
	case magic == magicExtendedReply && p.format == ReplyExtended:
		return p.extended(b)
	}
	return false, fmt.Errorf("%w: reply begins with %#08x in a connection with %s replies", ErrProtocol, magic, p.format)
}

// find gives the slot of a cookie.
func (p *replyParser) find(cookie uint64) (*slot, error) {
	if i := cookie & 0xffffffff; i < uint64(len(p.slots)) && cookie != 0 {
		if s := &p.slots[i]; s.cookie.Load() == cookie {
			return s, nil
		}
	}
	return nil, fmt.Errorf("%w: reply to cookie %#x, which is not in flight", ErrProtocol, cookie)
}

func (p *replyParser) simple(b []byte) (bool, error) {
	if len(b) < sizeSimpleReply {
		return false, nil
	}
	s, err := p.find(binary.BigEndian.Uint64(b[8:]))
	if err != nil {
		return false, err
	}
	errno := replyErrno(binary.BigEndian.Uint32(b[4:]))
	if p.format != ReplySimple && (s.command == CmdRead || s.command == CmdBlockStatus && errno == 0) {
		return false, fmt.Errorf("%w: simple reply to %s after structured replies were agreed", ErrProtocol, s.command)
	}
	p.r += sizeSimpleReply
	p.chunk, p.done = s, true
	s.fail(errno)
	if s.command == CmdRead && errno == 0 && s.length > 0 {
		_, err = s.cover(s.offset, s.length)
		p.rest = s.call.Data
	}
	return err == nil, err
}

func (p *replyParser) structured(b []byte) (bool, error) {
	if len(b) < sizeStructuredReply {
		return false, nil
	}
	s, err := p.find(binary.BigEndian.Uint64(b[8:]))
	if err != nil {
		return false, err
	}
	return p.begin(s, b, sizeStructuredReply, uint64(binary.BigEndian.Uint32(b[16:])))
}

func (p *replyParser) extended(b []byte) (bool, error) {
	if len(b) < sizeExtendedReply {
		return false, nil
	}
	s, err := p.find(binary.BigEndian.Uint64(b[8:]))
	if err != nil {
		return false, err
	}
	if offset := binary.BigEndian.Uint64(b[16:]); offset != s.offset {
		return false, fmt.Errorf("%w: reply names offset %d of a request at %d", ErrProtocol, offset, s.offset)
	}
	return p.begin(s, b, sizeExtendedReply, binary.BigEndian.Uint64(b[24:]))
}

// fixedSize is the length of the part of a chunk's payload that is the same in all chunks of its type.
func fixedSize(chunk uint16) int {
	switch chunk {
	case chunkOffsetData, chunkBlockStatusExt:
		return 8
	case chunkOffsetHole:
		return 12
	case chunkBlockStatus:
		return 4
	case chunkError, chunkErrorOffset:
		return 6
	}
	return 0
}

// begin starts the chunk whose header, size bytes long, is at the begin of b. Its payload has length bytes.
func (p *replyParser) begin(s *slot, b []byte, size int, length uint64) (bool, error) {
	chunk := binary.BigEndian.Uint16(b[6:])
	fixed := fixedSize(chunk)
	if length < uint64(fixed) {
		return false, fmt.Errorf("%w: chunk of type %#x with %d bytes", ErrProtocol, chunk, length)
	}
	if len(b) < size+fixed {
		return false, nil
	}
	p.chunk, p.done = s, binary.BigEndian.Uint16(b[4:])&chunkFlagDone != 0
	if err := p.content(s, chunk, b[size:size+fixed], length-uint64(fixed)); err != nil {
		return false, err
	}
	p.r += size + fixed
	return true, nil
}

// content takes the fixed part of a chunk and prepares for the length bytes that follow.
func (p *replyParser) content(s *slot, chunk uint16, fixed []byte, length uint64) error {
	switch {
	case chunk == chunkNone && length == 0 && p.done:
		return nil
	case chunk == chunkOffsetData && s.command == CmdRead:
		r, err := s.cover(binary.BigEndian.Uint64(fixed), length)
		if err == nil {
			p.rest = s.call.Data[r.from:r.to]
		}
		return err
	case chunk == chunkOffsetHole && s.command == CmdRead && length == 0:
		r, err := s.cover(binary.BigEndian.Uint64(fixed), uint64(binary.BigEndian.Uint32(fixed[8:])))
		if err == nil {
			clear(s.call.Data[r.from:r.to])
		}
		return err
	case chunk == chunkBlockStatus && p.format == ReplyStructured:
		return p.blockStatus(s, binary.BigEndian.Uint32(fixed), length/8, length%8)
	case chunk == chunkBlockStatusExt && p.format == ReplyExtended:
		if count := binary.BigEndian.Uint32(fixed[4:]); uint64(count) != length/16 {
			return fmt.Errorf("%w: block status of %d descriptors in %d bytes", ErrProtocol, count, length)
		}
		return p.blockStatus(s, binary.BigEndian.Uint32(fixed), length/16, length%16)
	case chunk&0x8000 != 0 && length <= maxErrorChunk:
		p.skip = length
		s.fail(chunkErrno(fixed))
		return nil
	}
	return fmt.Errorf("%w: chunk of type %#x and %d bytes in a reply to %s", ErrProtocol, chunk, length, s.command)
}

func (p *replyParser) blockStatus(s *slot, context uint32, count, odd uint64) error {
	if s.command != CmdBlockStatus || !p.status || context != p.context || s.haveStatus {
		return fmt.Errorf("%w: block status of context %d in a reply to %s", ErrProtocol, context, s.command)
	}
	if count == 0 || count > maxDescriptors || odd != 0 {
		return fmt.Errorf("%w: block status of %d descriptors and %d bytes", ErrProtocol, count, odd)
	}
	s.haveStatus = true
	p.extents, p.covered = count, 0
	return nil
}

// payload takes what is there of the payload of the chunk. False: not all of it is there, or err.
func (p *replyParser) payload() (bool, error) {
	switch {
	case len(p.rest) > 0:
		n := copy(p.rest, p.buffer[p.r:p.w])
		p.r += n
		p.rest = p.rest[n:]
		return len(p.rest) == 0, nil
	case p.skip > 0:
		n := min(p.skip, uint64(p.w-p.r))
		p.r += int(n)
		p.skip -= n
		return p.skip == 0, nil
	case p.extents > 0:
		return p.descriptors()
	}
	return true, nil
}

// descriptors takes the descriptors of a block status that are there.
func (p *replyParser) descriptors() (bool, error) {
	size := 8
	if p.format == ReplyExtended {
		size = 16
	}
	s := p.chunk
	for ; p.extents > 0; p.extents-- {
		b := p.buffer[p.r:p.w]
		if len(b) < size {
			return false, nil
		}
		var e Extent
		if p.format == ReplyExtended {
			e = Extent{Length: binary.BigEndian.Uint64(b), Flags: binary.BigEndian.Uint32(b[12:])}
		} else {
			e = Extent{Length: uint64(binary.BigEndian.Uint32(b)), Flags: binary.BigEndian.Uint32(b[4:])}
		}
		// Only the last may overrun the request (proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS").
		if e.Length == 0 || p.covered >= s.length {
			return false, fmt.Errorf("%w: block status of %d bytes at %d of %d", ErrProtocol, e.Length, p.covered, s.length)
		}
		p.covered += min(e.Length, s.length-p.covered)
		s.call.Extents = append(s.call.Extents, e)
		p.r += size
	}
	return true, nil
}

// chunkErrno is the error of an error chunk with this fixed part.
func chunkErrno(fixed []byte) syscall.Errno {
	if len(fixed) == 0 {
		return syscall.EIO // a type that is not known: the reply has failed, nothing more can be said
	}
	if err := replyErrno(binary.BigEndian.Uint32(fixed)); err != 0 {
		return err
	}
	return syscall.EINVAL // it must not be 0
}

// replyErrno is the error of a reply (proto.md, "Error values": one that is not known counts as EINVAL).
func replyErrno(wire uint32) syscall.Errno {
	switch err := syscall.Errno(wire); err {
	case 0, syscall.EPERM, syscall.EIO, syscall.ENOMEM, syscall.EINVAL, syscall.ENOSPC, syscall.EOVERFLOW,
		syscall.ENOTSUP, syscall.ESHUTDOWN:
		return err
	}
	return syscall.EINVAL
}
