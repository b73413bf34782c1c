package nbd

import (
	"encoding/binary"
	"fmt"
	"syscall"
	"unsafe"
)

// outbox turns requests that are done into the pieces of gathered writes: headers of its own, data lent by the
// device. It belongs to the sender of the connection, see conn.send.
//
// 0 <= released <= next <= len(requests); iovecs[sent:] is what has to be written before more is encoded.
type outbox struct {
	mode     replyMode
	requests []*Request
	released int // up to here the replies have left and the requests have been released
	next     int // up to here the replies are in iovecs, or have left

	iovecs []syscall.Iovec
	sent   int
	heads  []byte // the headers that iovecs point to; never grown

	// Where the encoding of a READ stands whose reply does not fit into iovecs.
	begun  bool
	piece  int    // next piece
	runEnd int    // up to this piece the header is out
	offset uint64 // of the next piece in the export
	zeroed uint64 // bytes of the hole requests[next].pieces[piece] that are in iovecs
}

// headerRoom is more than the headers of any one chunk take.
const headerRoom = 64

// zeroes are sent for holes where a hole cannot be told.
var zeroes [64 << 10]byte

func (o *outbox) init(mode replyMode) {
	o.mode = mode
	o.iovecs = make([]syscall.Iovec, 0, maxIovecs)
	o.heads = make([]byte, 0, headerArenaBytes)
}

// fill encodes replies until iovecs is full or nothing is left. What was in iovecs before has been written.
func (o *outbox) fill() {
	o.iovecs, o.sent, o.heads = o.iovecs[:0], 0, o.heads[:0]
	for o.next < len(o.requests) && o.encode(o.requests[o.next]) {
		o.next++
		o.begun = false
	}
}

// wrote takes note that the first n bytes of iovecs[sent:] have left. An iovec may span several allocations, which
// checkptr does not understand.
//
//go:nocheckptr
func (o *outbox) wrote(n int) {
	for n > 0 {
		v := &o.iovecs[o.sent]
		if uint64(n) < uint64(v.Len) {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.SetLen(int(v.Len) - n)
			return
		}
		n -= int(v.Len)
		o.sent++
	}
}

// encode adds the reply to r. It reports false when there was no room for all of it; it then goes on from there
// when it is called again.
func (o *outbox) encode(r *Request) bool {
	switch {
	case r.Command == CmdRead && r.err == 0:
		return o.encodeRead(r)
	case !o.room():
		return false
	case r.err != 0:
		o.encodeError(r)
	case r.Command == CmdBlockStatus:
		o.encodeStatus(r)
	case o.mode == repliesExtended:
		o.chunk(r, chunkFlagDone, chunkNone, 0)
	default:
		o.simple(r, 0)
	}
	return true
}

// room reports whether a header and one more piece fit.
func (o *outbox) room() bool {
	return len(o.iovecs)+2 <= cap(o.iovecs) && len(o.heads)+headerRoom <= cap(o.heads)
}

// add appends p to what is to be written, as part of the iovec before where it continues that.
func (o *outbox) add(p []byte) {
	base := unsafe.SliceData(p)
	if k := len(o.iovecs); k > 0 {
		last := &o.iovecs[k-1]
		if uintptr(unsafe.Pointer(last.Base))+uintptr(last.Len) == uintptr(unsafe.Pointer(base)) {
			last.SetLen(int(last.Len) + len(p))
			return
		}
	}
	v := syscall.Iovec{Base: base}
	v.SetLen(len(p))
	o.iovecs = append(o.iovecs, v)
}

// head appends the bytes of a header that build adds to heads.
func (o *outbox) addHead(from int) { o.add(o.heads[from:]) }

// simple adds a simple reply without data.
func (o *outbox) simple(r *Request, errno uint32) {
	from := len(o.heads)
	h := binary.BigEndian.AppendUint32(o.heads, magicSimpleReply)
	h = binary.BigEndian.AppendUint32(h, errno)
	o.heads = binary.BigEndian.AppendUint64(h, r.cookie)
	o.addHead(from)
}

// chunk adds the header of a chunk with length bytes behind it.
func (o *outbox) chunk(r *Request, flags, kind uint16, length uint64) {
	from := len(o.heads)
	o.heads = appendChunk(o.heads, o.mode, r, flags, kind, length)
	o.addHead(from)
}

func appendChunk(h []byte, mode replyMode, r *Request, flags, kind uint16, length uint64) []byte {
	magic := magicStructuredReply
	if mode == repliesExtended {
		magic = magicExtendedReply
	}
	h = binary.BigEndian.AppendUint32(h, magic)
	h = binary.BigEndian.AppendUint16(h, flags)
	h = binary.BigEndian.AppendUint16(h, kind)
	h = binary.BigEndian.AppendUint64(h, r.cookie)
	if mode == repliesExtended {
		h = binary.BigEndian.AppendUint64(h, r.Offset)
		return binary.BigEndian.AppendUint64(h, length)
	}
	return binary.BigEndian.AppendUint32(h, uint32(length))
}

// encodeError adds the reply to a request that failed. With structured replies READ and BLOCK_STATUS must be
// answered by chunks, with extended headers everything.
func (o *outbox) encodeError(r *Request) {
	errno := r.wireError()
	if o.mode == repliesSimple || o.mode == repliesStructured && r.Command != CmdRead && r.Command != CmdBlockStatus {
		o.simple(r, errno)
		return
	}
	o.chunk(r, chunkFlagDone, chunkError, 6)
	from := len(o.heads)
	h := binary.BigEndian.AppendUint32(o.heads, errno)
	o.heads = binary.BigEndian.AppendUint16(h, 0) // length of the text
	o.addHead(from)
}

// wireError is the error of the reply to r. ENOTSUP is for FAST_ZERO alone (proto.md, "Error values").
func (r *Request) wireError() uint32 {
	if r.err == syscall.ENOTSUP && r.Flags&CmdFlagFastZero == 0 {
		return uint32(syscall.EIO)
	}
	return wireErrno(r.err)
}

// encodeRead adds the data of a READ, going on from where it stood.
func (o *outbox) encodeRead(r *Request) bool {
	if !o.begun {
		r.checkData()
		o.begun, o.piece, o.runEnd, o.offset, o.zeroed = true, 0, -1, r.Offset, 0
	}
	for {
		if o.piece == o.runEnd && o.piece == len(r.pieces) {
			return true
		}
		if !o.room() {
			return false
		}
		if o.runEnd < 0 || o.piece == o.runEnd {
			o.beginRun(r)
			continue
		}
		o.addPiece(&r.pieces[o.piece])
	}
}

// checkData holds the device to its promise: wrong amounts of data would put the client out of step.
func (r *Request) checkData() {
	var n uint64
	for i := range r.pieces {
		n += r.pieces[i].length()
	}
	if n != r.Length {
		panic(fmt.Sprintf("nbd: device answered a read of %d bytes at %d with %d bytes", r.Length, r.Offset, n))
	}
}

func (p *piece) length() uint64 { return uint64(len(p.data)) + p.hole }

// beginRun adds the header of the next pieces and sets runEnd behind them: all pieces for a simple reply and with
// DF, else those up to the next hole, or the holes up to the next data, which the header tells alone.
func (o *outbox) beginRun(r *Request) {
	if o.mode == repliesSimple {
		o.simple(r, 0)
		o.runEnd = len(r.pieces)
		return
	}
	if len(r.pieces) == 0 {
		o.chunk(r, chunkFlagDone, chunkNone, 0)
		o.runEnd = 0
		return
	}
	whole := r.Flags&CmdFlagDF != 0
	hole := r.pieces[o.piece].data == nil && !whole
	end, length := o.piece, uint64(0)
	for end < len(r.pieces) && (whole || (r.pieces[end].data == nil) == hole) {
		length += r.pieces[end].length()
		end++
	}
	var flags uint16
	if end == len(r.pieces) {
		flags = chunkFlagDone
	}
	o.runEnd = end
	if !hole {
		o.chunk(r, flags, chunkOffsetData, 8+length)
		o.addOffset(o.offset)
		return
	}
	o.chunk(r, flags, chunkOffsetHole, 12)
	o.addOffset(o.offset)
	from := len(o.heads)
	o.heads = binary.BigEndian.AppendUint32(o.heads, uint32(length))
	o.addHead(from)
	o.piece = end
	o.offset += length
}

func (o *outbox) addOffset(offset uint64) {
	from := len(o.heads)
	o.heads = binary.BigEndian.AppendUint64(o.heads, offset)
	o.addHead(from)
}

// addPiece adds the data of p; of a hole as much as one iovec takes.
func (o *outbox) addPiece(p *piece) {
	if p.data != nil {
		o.add(p.data)
		o.offset += uint64(len(p.data))
		o.piece++
		return
	}
	n := min(p.hole-o.zeroed, uint64(len(zeroes)))
	o.add(zeroes[:n])
	o.zeroed += n
	if o.zeroed == p.hole {
		o.offset += p.hole
		o.piece++
		o.zeroed = 0
	}
}

// encodeStatus adds the answer to BLOCK_STATUS: one chunk for every context that was asked for. The protocol has no
// answer without an extent: a device that tells none for one of them has failed.
func (o *outbox) encodeStatus(r *Request) {
	b := r.status[:0]
	for i := range maxContexts {
		if r.Contexts>>i&1 == 0 {
			continue
		}
		extents := r.clipExtents(r.Extents[i], o.mode)
		if len(extents) == 0 {
			r.err = syscall.EIO
			o.encodeError(r)
			return
		}
		var flags uint16
		if r.Contexts>>(i+1) == 0 {
			flags = chunkFlagDone
		}
		b = appendStatusChunk(b, o.mode, r, flags, uint32(i+1), extents)
	}
	r.status = b
	o.add(b)
}

func appendStatusChunk(b []byte, mode replyMode, r *Request, flags uint16, id uint32, extents []Extent) []byte {
	n := uint64(len(extents))
	if mode == repliesExtended {
		b = appendChunk(b, mode, r, flags, chunkBlockStatusExt, 8+16*n)
		b = binary.BigEndian.AppendUint32(b, id)
		b = binary.BigEndian.AppendUint32(b, uint32(n))
		for _, e := range extents {
			b = binary.BigEndian.AppendUint64(b, e.Length)
			b = binary.BigEndian.AppendUint64(b, uint64(e.Flags))
		}
		return b
	}
	b = appendChunk(b, mode, r, flags, chunkBlockStatus, 4+8*n)
	b = binary.BigEndian.AppendUint32(b, id)
	for _, e := range extents {
		b = binary.BigEndian.AppendUint32(b, uint32(e.Length))
		b = binary.BigEndian.AppendUint32(b, e.Flags)
	}
	return b
}

// maxCompactExtent is the longest extent of the 32-bit form that keeps the next one aligned to a block.
const maxCompactExtent = 1<<32 - 1<<16

// clipExtents cuts what the device said down to what the protocol allows: no empty extents, only the last may
// overrun the request, with REQ_ONE one within it (proto.md, NBD_REPLY_TYPE_BLOCK_STATUS).
func (r *Request) clipExtents(from []Extent, mode replyMode) []Extent {
	to, covered := from[:0], uint64(0)
	for _, e := range from {
		if e.Length == 0 {
			continue
		}
		short := mode == repliesStructured && e.Length > maxCompactExtent
		if short {
			e.Length = maxCompactExtent
		}
		if r.Flags&CmdFlagReqOne != 0 {
			e.Length = min(e.Length, r.Length)
		}
		to = append(to, e)
		covered += e.Length
		if short || r.Flags&CmdFlagReqOne != 0 || covered >= r.Length || len(to) == MaxExtents {
			break
		}
	}
	return to
}
