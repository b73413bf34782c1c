package nbd

import (
	"fmt"
	"io"
	"syscall"
	"unsafe"
)

// handleRequests reads and handles requests until the client, the server or an error ends it.
func (c *conn) handleRequests() error {
	for {
		if err := c.handleBatch(); err != nil {
			return err
		}
		if err := c.receive(c.end > c.start); err != nil {
			return err
		}
	}
}

// handleBatch handles every complete request of the buffer.
func (c *conn) handleBatch() error {
	c.batching.Store(true)
	h := &c.header
	c.want = c.terms.requestBytes()
	for c.end-c.start >= c.want {
		if !c.terms.decodeHeader(c.buffer[c.start:c.end], h) {
			return errMagic
		}
		if h.command == CmdDisc {
			return errDisconnect
		}
		var err error
		if n := c.terms.payloadBytes(h); n > 0 {
			err = c.handlePayload(h, n)
		} else {
			c.start += c.terms.requestBytes()
			err = c.handle(h)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// handle does a request without payload, or refuses it.
func (c *conn) handle(h *header) error {
	err := c.terms.validate(h)
	if err != 0 || h.length == 0 && h.command != CmdFlush {
		return c.answer(h, err)
	}
	r, e := c.take(h)
	if e != nil {
		return e
	}
	return c.submit(r)
}

// handlePayload does a request that n bytes of payload follow, or refuses it. When the payload must be in the
// buffer and is not, it only sets want.
func (c *conn) handlePayload(h *header, n uint64) error {
	if n > maxDiscardPayloadBytes {
		return errPayloadLong
	}
	head := c.terms.requestBytes()
	whole := head + int(n)
	if h.command == CmdBlockStatus && n <= maxStatusPayload {
		if c.end-c.start < whole {
			c.want = whole
			return nil
		}
		c.terms.decodeStatusPayload(h, c.buffer[c.start+head:c.start+whole])
		c.advance(whole)
		return c.handle(h)
	}
	if err := c.terms.validate(h); err != 0 {
		c.start += head
		if err := c.discard(int(n)); err != nil {
			return err
		}
		return c.answer(h, err)
	}
	switch {
	case c.end-c.start >= whole:
		return c.writeBuffered(h, c.buffer[c.start+head:c.start+whole])
	case whole > receiveBufferBytes:
		return c.writeLarge(h)
	case n >= inPlaceBytes && c.quota(heldBytes(h)) && c.export.receiving.tryAcquire(int64(n)):
		r, err := c.take(h) // without waiting: the quota has room
		if err != nil {
			return err
		}
		return c.writeInPlace(r)
	}
	c.want = whole
	return nil
}

// advance passes the first n bytes of the buffer.
func (c *conn) advance(n int) {
	c.start += n
	c.want = c.terms.requestBytes()
}

// writeBuffered does a WRITE whose payload has been received: a client that trickles holds no room of the device.
func (c *conn) writeBuffered(h *header, payload []byte) error {
	r, err := c.take(h)
	if err != nil {
		return err
	}
	reserved := c.export.Device.Reserve(r)
	if reserved {
		copyPieces(r, payload)
	} else if err := c.stage(r); err != nil {
		return err
	} else {
		copy(r.Payload, payload)
	}
	c.advance(c.terms.requestBytes() + len(payload))
	if err := c.submit(r); err != nil {
		c.abandon(r, reserved)
		return err
	}
	return nil
}

// copyPieces fills the room that the device lent.
func copyPieces(r *Request, payload []byte) {
	for _, d := range r.Dest {
		n := copy(d, payload)
		if n < len(d) {
			panic(fmt.Sprintf("nbd: device lent more than the %d bytes of a write", r.Length))
		}
		payload = payload[n:]
	}
	if len(payload) > 0 {
		panic(fmt.Sprintf("nbd: device lent %d bytes less than the %d of a write", len(payload), r.Length))
	}
}

// stage takes memory of the server for the payload of r, for which the device had no room.
func (c *conn) stage(r *Request) error {
	c.pause()
	r.staged = c.srv.staging.get(int(r.Length), c.stopped)
	c.resume()
	if r.staged == nil {
		return errStopped
	}
	r.Payload = r.staged
	return nil
}

// abandon gives back what was taken for a write that is not submitted.
func (c *conn) abandon(r *Request, reserved bool) {
	if reserved {
		c.export.Device.Abort(r)
	}
	if r.staged != nil {
		c.srv.staging.put(r.staged)
		r.staged = nil
	}
}

// writeLarge does a WRITE whose payload does not fit the buffer: it waits for its turn to be received in place.
func (c *conn) writeLarge(h *header) error {
	r, err := c.take(h)
	if err != nil {
		return err
	}
	if n := int64(h.length); !c.export.receiving.tryAcquire(n) {
		c.pause()
		if !c.export.receiving.acquire(n, c.stopped) {
			return errStopped
		}
		c.resume()
	}
	return c.writeInPlace(r)
}

// writeInPlace does a WRITE whose payload is received straight into the room of the device: what of it is in the buffer
// is copied, the rest is not. Its bytes have been taken of the export's budget for that, which bounds the room that clients
// hold while they send, and are given back.
func (c *conn) writeInPlace(r *Request) error {
	n := int(r.Length)
	defer c.export.receiving.release(int64(n))
	c.start += c.terms.requestBytes()
	reserved := c.export.Device.Reserve(r)
	pieces := r.Dest
	if !reserved {
		if err := c.stage(r); err != nil {
			return err
		}
		pieces = [][]byte{r.Payload}
	}
	err := c.receivePieces(pieces, n)
	if err == nil {
		c.gathered += n
		err = c.submit(r)
	}
	if err != nil {
		c.abandon(r, reserved)
	}
	return err
}

// receivePieces fills pieces with the n bytes that come next. What has arrived behind them goes into the buffer by the
// same read.
func (c *conn) receivePieces(pieces [][]byte, n int) error {
	c.watch.startPayload(c.srv.now())
	defer c.watch.endPayload()
	at := payloadCursor{pieces: pieces}
	// Not all of the payload is in the buffer, so all that is in the buffer belongs to it.
	at.copy(c.buffer[c.start:c.end])
	left := n - (c.end - c.start)
	c.start, c.end = 0, 0
	for left > 0 {
		c.read.iovecs = at.appendIovecs(c.read.iovecs[:0])
		if len(at.pieces) <= maxReadPieces {
			c.read.iovecs = append(c.read.iovecs, iovec(c.buffer))
		}
		got, err := c.readOnce(true)
		if err != nil {
			return err
		}
		direct := min(got, left)
		c.watch.received(direct)
		at.skip(direct)
		left -= direct
		c.filled(got - direct)
	}
	return nil
}

// payloadCursor is a place in the pieces that a payload is received into. The pieces themselves belong to the device and
// stay as they are.
type payloadCursor struct {
	pieces [][]byte
	filled int // bytes of pieces[0]
}

// maxReadPieces is how many pieces one read fills: more than a stock socket buffer holds, of 4 KiB each.
const maxReadPieces = 128

// copy puts b behind what has been filled.
func (p *payloadCursor) copy(b []byte) {
	for len(b) > 0 {
		n := copy(p.pieces[0][p.filled:], b)
		p.skip(n)
		b = b[n:]
	}
}

// skip passes n bytes that have been filled.
func (p *payloadCursor) skip(n int) {
	p.filled += n
	for len(p.pieces) > 0 && p.filled >= len(p.pieces[0]) {
		p.filled -= len(p.pieces[0])
		p.pieces = p.pieces[1:]
	}
}

// appendIovecs appends the next pieces to fill to v.
func (p *payloadCursor) appendIovecs(v []syscall.Iovec) []syscall.Iovec {
	filled := p.filled
	for _, d := range p.pieces[:min(len(p.pieces), maxReadPieces)] {
		v = append(v, iovec(d[filled:]))
		filled = 0
	}
	return v
}

// discard reads n bytes and throws them away.
func (c *conn) discard(n int) error {
	for {
		k := min(n, c.end-c.start)
		c.start += k
		n -= k
		if n == 0 {
			return nil
		}
		if err := c.receive(true); err != nil {
			return err
		}
	}
}

// receive sends what has been gathered, then waits for more bytes behind what is in the buffer; within says that a
// message has begun.
func (c *conn) receive(within bool) error {
	c.pause()
	c.makeRoom()
	c.read.iovecs = append(c.read.iovecs[:0], iovec(c.buffer[c.end:]))
	n, err := c.readOnce(within)
	if err != nil {
		return err
	}
	c.filled(n)
	return nil
}

// filled takes note of n bytes that were received behind what is in the buffer. A full one was too small.
func (c *conn) filled(n int) {
	c.end += n
	if c.end == len(c.buffer) && len(c.buffer) < receiveBufferBytes {
		c.growBuffer()
	}
}

// makeRoom moves what has not been handled to the start of the buffer, which grows where more is wanted.
func (c *conn) makeRoom() {
	switch {
	case c.start == c.end:
		c.start, c.end = 0, 0
	case c.start > 0:
		c.end = copy(c.buffer, c.buffer[c.start:c.end])
		c.start = 0
	}
	if c.want > len(c.buffer) {
		c.growBuffer()
	}
}

// growBuffer gives a connection that has much to say the full receive buffer.
func (c *conn) growBuffer() {
	b := make([]byte, receiveBufferBytes)
	c.end = copy(b, c.buffer[c.start:c.end])
	c.start = 0
	c.buffer = b
}

// readOrFlush is c.read.readv, and sends what has been gathered where it has to wait.
func (c *conn) readOrFlush(fd uintptr) bool {
	if c.read.readv(fd) {
		return true
	}
	c.flush()
	return false
}

// readOnce waits for bytes and reads them into c.read.iovecs. Within a message the client must not stall. It
// returns io.EOF where the client has ended its direction.
func (c *conn) readOnce(within bool) (int, error) {
	if c.stopping.Load() {
		return 0, errStopped
	}
	if within {
		c.watch.waits(c.srv.now())
	}
	err := c.raw.Read(c.readFunc)
	c.watch.goesOn()
	c.resume()
	switch {
	case err != nil:
		return 0, c.receiveError(err)
	case c.read.errno != 0:
		return 0, c.receiveError(c.read.errno)
	case c.read.n == 0 && within:
		return 0, fmt.Errorf("read requests: %w", io.ErrUnexpectedEOF)
	case c.read.n == 0:
		return 0, io.EOF
	}
	return c.read.n, nil
}

// pause sends what has been gathered before the reader waits for something.
func (c *conn) pause() { c.flush() }

// resume follows on pause. What was known about the client may have changed meanwhile.
func (c *conn) resume() {
	c.batching.Store(true)
	c.alive = false
}

// take gets a Request for h, waiting for the quota.
func (c *conn) take(h *header) (*Request, error) {
	bytes := heldBytes(h)
	if !c.quota(bytes) {
		c.pause()
		if !c.awaitQuota(bytes) {
			return nil, errStopped
		}
		c.resume()
	}
	r := c.next()
	r.held = bytes
	c.taken += bytes
	r.reset(h)
	return r, nil
}

// heldBytes is what a request takes of the quota of bytes.
func heldBytes(h *header) int64 {
	switch h.command {
	case CmdRead, CmdWrite:
		return int64(min(h.length, maxPayloadBytes))
	case CmdBlockStatus:
		return maxContexts * MaxExtents * 2 * int64(unsafe.Sizeof(Extent{}))
	}
	return 0
}

// next returns an unused Request.
func (c *conn) next() *Request {
	if len(c.free) == 0 {
		c.made++
		return &Request{conn: c}
	}
	r := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	return r
}

// quota reports whether one more request of so many bytes may be begun. A request that is alone always may.
func (c *conn) quota(bytes int64) bool {
	if len(c.free) == 0 || !c.fits(bytes) {
		c.mu.Lock()
		c.collect()
		c.mu.Unlock()
	}
	return c.fits(bytes)
}

// collect takes over what the sender gave back. c.mu is held.
func (c *conn) collect() {
	c.free = append(c.free, c.freed...)
	c.freed = c.freed[:0]
	c.taken -= c.returned
	c.returned = 0
}

func (c *conn) fits(bytes int64) bool {
	inFlight := c.made - len(c.free)
	return inFlight == 0 || inFlight < maxInFlight && c.taken+bytes <= maxInFlightBytes ||
		planted("unbounded-inflight")
}

// awaitQuota waits until one more request of so many bytes may be begun. It reports false when c was stopped.
func (c *conn) awaitQuota(bytes int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.stopping.Load() {
		c.collect()
		if c.fits(bytes) {
			return true
		}
		c.room.Wait()
	}
	return false
}

// submit gives r to the device, unless c was stopped or the client has closed the connection: what a client that
// went elsewhere sent here before must not be applied over what it wrote there.
func (c *conn) submit(r *Request) error {
	if writing(r.Command) && !c.alive {
		if c.closed() {
			return errHungUp
		}
		c.alive = true
	}
	if c.stopping.Load() {
		return errStopped
	}
	c.begun++
	r.submitted = true
	c.export.Device.Submit(r)
	if r.Command == CmdRead {
		c.gathered += int(r.held)
	}
	if c.gathered >= gatherBytes {
		c.pause()
		c.batching.Store(true)
	}
	return nil
}

// answer answers h without the device.
func (c *conn) answer(h *header, errno syscall.Errno) error {
	h.length = 0
	r, err := c.take(h)
	if err != nil {
		return err
	}
	r.err = errno
	r.ended = true
	c.begun++
	c.mu.Lock()
	wake := c.queue(r)
	c.mu.Unlock()
	if wake {
		c.wake.Signal()
	}
	return nil
}
