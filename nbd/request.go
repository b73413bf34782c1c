package nbd

import "syscall"

// Device is the store behind an export, as the server needs it. The server has checked every request that
// reaches it: command, flags and range are valid, and the payload is within MaxPayload.
//
// Reserve, Submit, Abort and Release are called by the readers of all connections at once and must not wait:
// not for memory, disk, peer or another request.
type Device interface {
	// Size is the length of the export in bytes.
	Size() int64
	// Reserve finds room for the payload of the write r. When there is room now it appends to r.Dest pieces
	// whose lengths add up to r.Length and reports true; the server fills them and calls Submit, or Abort
	// where the payload never comes. When it reports false, Submit gets the payload in r.Payload instead.
	Reserve(r *Request) bool
	// Submit starts r and sees to it that r.Done is called exactly once: before it returns (the reply then
	// leaves with the batch) or later, from any goroutine.
	Submit(r *Request)
	// Abort gives back what Reserve took.
	Abort(r *Request)
	// Release is called once for every r that was done or cut, when its reply has left or its connection is
	// gone: the pieces that the device lent are no longer looked at. It is never called from within Done or
	// Cut.
	Release(r *Request)
}

// Extent is a range of a metadata context, in bytes from the end of the extent before it.
type Extent struct {
	Length uint64
	Flags  uint32
}

// A Request is one command of a client, from its header to its reply. The server makes a bounded number of
// them per connection and uses them again, so handling one allocates nothing. It is owned by the device
// from Submit to Done or Cut, by the server otherwise.
type Request struct {
	Command Command
	Flags   CommandFlags
	Offset  uint64 // in bytes
	Length  uint64 // in bytes; the effect length for commands without payload

	// Dest are the pieces that Reserve lent for the payload.
	Dest [][]byte
	// Payload is the payload where Reserve had no room. It is valid until Done.
	Payload []byte

	// Contexts tells which of the export's contexts a BLOCK_STATUS asks for: bit i for Export.Contexts[i].
	Contexts uint32
	// Extents is the answer to BLOCK_STATUS: for every bit of Contexts at least one extent, of which the
	// first MaxExtents count. The last may overrun the request, and all may end before it. Without one the
	// request fails with EIO.
	Extents [maxContexts][]Extent

	// Device is the device's own part. It stays with the Request when that is used again.
	Device any

	conn      *conn
	cookie    uint64
	err       syscall.Errno
	submitted bool // the device has it, or had it
	ended     bool // Done or Cut was called
	held      int64
	staged    []byte // of the server's staging memory; Payload is its start
	pieces    []piece
	status    []byte // the encoded answer to BLOCK_STATUS
}

// maxContexts is how many metadata contexts an export may have.
const maxContexts = 4

// piece is a part of the data of a READ: bytes of the device, or a hole.
type piece struct {
	data []byte
	hole uint64 // length in bytes where data is nil
}

// AddData appends p to the data that answer a READ. p is lent until Release.
func (r *Request) AddData(p []byte) {
	if len(p) > 0 {
		r.pieces = append(r.pieces, piece{data: p})
	}
}

// AddHole appends n zero bytes to the data that answer a READ.
func (r *Request) AddHole(n uint64) {
	if n > 0 {
		r.pieces = append(r.pieces, piece{hole: n})
	}
}

// Done ends r: it succeeded where err is 0, else it failed. It is called exactly once for every submitted
// request, from any goroutine, and does not wait. ESHUTDOWN is Cut: no request is answered with it, because an
// error is final for a kernel client while a cut request is sent again elsewhere.
func (r *Request) Done(err syscall.Errno) {
	if err == syscall.ESHUTDOWN {
		r.Cut()
		return
	}
	r.err = err
	r.conn.finish(r)
}

// Cut ends r in place of Done, without an answer: its connection is closed. It is for a request whose wait cannot
// end.
func (r *Request) Cut() {
	r.conn.kill(errCut)
	r.conn.finish(r)
}

// reset makes r ready for the request of h. What its slices hold is kept for use, except what only a rare
// request needs.
func (r *Request) reset(h *header) {
	r.Command, r.Flags, r.Offset, r.Length = h.command, h.flags&^CmdFlagPayloadLen, h.offset, h.length
	r.Contexts = h.contexts
	r.Dest, r.Payload, r.pieces = r.Dest[:0], nil, r.pieces[:0]
	r.cookie, r.err, r.submitted, r.ended = h.cookie, 0, false, false
	if r.Command == CmdBlockStatus {
		for i := range r.Extents {
			r.Extents[i] = r.Extents[i][:0]
		}
	}
}

// shrink lets go of what r holds beyond what an ordinary request needs.
func (r *Request) shrink() {
	if cap(r.Dest) > maxKeptPieces {
		r.Dest = nil
	}
	if cap(r.pieces) > maxKeptPieces {
		r.pieces = nil
	}
	if r.Command == CmdBlockStatus {
		r.status = nil
		r.Extents = [maxContexts][]Extent{}
	}
}

// maxKeptPieces is for how many pieces a Request keeps room: more than 1 MiB of 4 KiB blocks.
const maxKeptPieces = 512
