package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Defaults and bounds of ClientOptions, and of what a Client sends.
const (
	defaultInFlight       = 64
	maxInFlightOperations = 4096
	maxConnections        = 64
	defaultReconnectDelay = 100 * time.Millisecond
	maxReconnectDelay     = 5 * time.Second
	defaultQuarantine     = 2 * time.Second

	window        = 8              // requests of one operation in flight
	readAttempts  = 5              // connections that a read may lose before it fails
	maxZeroBytes  = 1 << 30        // of one WRITE_ZEROES or TRIM
	maxStatusSpan = 1<<32 - 64<<10 // bytes of one BLOCK_STATUS; a multiple of every block size
	keptExtents   = 4096           // room for extents that an operation keeps for the next
)

// ErrLostWrites is the answer of Sync when a connection was lost with writes that had been answered but not synced:
// the server may have lost them. They must be written again.
var ErrLostWrites = errors.New("connection was lost after writes that were answered but not synced")

// ErrExportChanged says that a server serves something else after a reconnection. The Client is of no use any more.
var ErrExportChanged = errors.New("export is not the same after the connection was made again")

// ClientOptions say how a Client works. The zero value is good.
type ClientOptions struct {
	// Connections is how many connections to make if the server supports several (CAN_MULTI_CONN), else one is
	// made; 0 = 1, at most 64.
	Connections int
	// InFlight is how many operations are at work at once; further ones wait. 0 = 64, at most 4096.
	InFlight int
	// Session names the client to servers that know OptSession: they fence the connections that it has replaced.
	// Zero = not sent.
	Session [16]byte
	// Attach is the number before the first attach number of the session; it must be higher than any that was used
	// under this Session before. With a new random Session it is 0.
	Attach uint64
	// Unclean says that an earlier client of the export may have left writes on the way. The first write waits for
	// Quarantine, unless Attach is set and the server knows OptSession.
	Unclean bool
	// Timeout is the longest wait for the answer to a request, lost connections and dialing again included. It
	// cuts all connections and ends the operation with an error that is os.ErrDeadlineExceeded. 0 = wait for ever.
	Timeout time.Duration
	// ReconnectDelay is the wait after the first failed attempt to connect again; it doubles up to 5 s. 0 = 100 ms.
	ReconnectDelay time.Duration
	// Quarantine is the time after the loss of connections with unanswered writes in which nothing new is
	// written, so that a write that still is in a buffer of the dead connection does not land on top. It is not
	// needed with a server that knows OptSession. 0 = 2 s.
	Quarantine time.Duration
	// Log is told about lost and new connections; nil = nobody.
	Log *slog.Logger
}

// withDefaults fills in what is not set and cuts what is too large.
func (o ClientOptions) withDefaults() ClientOptions {
	set := func(d *time.Duration, value time.Duration) {
		if *d <= 0 {
			*d = value
		}
	}
	set(&o.ReconnectDelay, defaultReconnectDelay)
	set(&o.Quarantine, defaultQuarantine)
	o.Connections = min(max(o.Connections, 1), maxConnections)
	if o.InFlight <= 0 {
		o.InFlight = defaultInFlight
	}
	o.InFlight = min(o.InFlight, maxInFlightOperations)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// Client is an export of a server as a store. It is safe for concurrent use. Offsets and lengths must be multiples of
// SectorBytes; only the last sector may be cut by the end of the export.
//
// When a connection dies all connections are cut, and the next operation makes them anew. Reads that were not
// answered are sent again. Writes that were not answered fail: whether they happened is not known, so the caller keeps
// the data and writes them again. Writes that were answered but not synced make Sync fail once with ErrLostWrites,
// unless the server says that nothing was lost. Errors of the server are a syscall.Errno within.
type Client struct {
	uri     URI
	o       ClientOptions
	info    Info // as first negotiated; a reconnection does not change it
	context context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup // the goroutine that dials

	operations chan *operation // those not in use: the bound of what is in flight
	answered   atomic.Uint64   // writes that the server has answered

	mu         sync.Mutex
	current    *connGroup    // the last one; it may be dead
	dialing    chan struct{} // closed at the end of the attempt under way; nil = there is none
	dialErr    error         // of the last attempt
	failures   int           // attempts in a row that were of no use
	final      error         // why nothing works any more
	attach     uint64        // number of the last group
	generation uint64        // of the volume when the session began
	volume     sessionReply  // what the server said last
	writeAfter time.Time     // end of the quarantine
	unfenced   bool          // a server that does not know OptSession has the writes of the quarantine
	synced     uint64        // of answered: on stable storage, or told to be lost
	unsure     bool          // connections were lost since synced; the next server tells whether that matters
	losses     uint64        // how often writes were lost, or may have been
	told       uint64        // of losses: those that a Sync has reported
}

// Dial connects to the export at uri, see ParseURI. It tries once; later the Client connects again by itself. The
// connection does not end with ctx.
func Dial(ctx context.Context, uri string, o ClientOptions) (*Client, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	c := &Client{uri: u, o: o.withDefaults()}
	c.attach = c.o.Attach
	c.operations = make(chan *operation, c.o.InFlight)
	for range c.o.InFlight {
		c.operations <- newOperation()
	}
	if c.o.Unclean {
		c.writeAfter = time.Now().Add(c.o.Quarantine)
		c.unfenced = c.o.Attach == 0
	}
	c.context, c.cancel = context.WithCancel(context.Background())
	g, err := c.dial(ctx)
	if err != nil {
		c.cancel()
		return nil, err
	}
	c.info = g.info
	c.generation = g.info.volume.Generation
	c.publish(g)
	return c, nil
}

// Size is the length of the export in bytes.
func (c *Client) Size() int64 { return c.info.Size }

// SectorBytes is the minimum block size of the server, from 1 to 65536; 512 if it names none.
func (c *Client) SectorBytes() int { return int(c.info.MinBlock) }

// Flags tells what the export can do.
func (c *Client) Flags() TransmissionFlags { return c.info.Flags }

// CanFlush tells whether Sync makes data durable. A server that does not offer FLUSH says nothing about when they are.
func (c *Client) CanFlush() bool { return c.info.Flags&FlagSendFlush != 0 }

// ReadAt fills p with the data at off, as io.ReaderAt says.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if off >= c.info.Size {
		return 0, io.EOF
	}
	whole := p
	if off >= 0 {
		p = p[:min(int64(len(p)), c.info.Size-off)]
	}
	n, err := c.transfer(CmdRead, [][]byte{p}, off, int64(len(p)))
	if err == nil && len(p) < len(whole) {
		err = io.EOF
	}
	return int(n), err
}

// WriteAt writes p at off, as io.WriterAt says. The data are durable after Sync.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	n, err := c.transfer(CmdWrite, [][]byte{p}, off, int64(len(p)))
	return int(n), err
}

// WritevAt writes bufs one after the other at off.
func (c *Client) WritevAt(bufs [][]byte, off int64) error {
	var n int64
	for _, b := range bufs {
		n += int64(len(b))
	}
	_, err := c.transfer(CmdWrite, bufs, off, n)
	return err
}

// transfer reads or writes the n bytes of bufs at off and tells how many are done.
func (c *Client) transfer(command Command, bufs [][]byte, off, n int64) (done int64, err error) {
	if n == 0 {
		return 0, nil
	}
	if err := c.check(command, off, n); err != nil {
		return 0, err
	}
	o, err := c.acquire()
	if err != nil {
		return 0, describe(command, off, n, err)
	}
	defer c.release(o)
	at := bufferCursor{bufs: bufs}
	for done < n {
		size := o.fill(command, &at, off+done, n-done, int64(c.info.MaxPayload))
		if err := c.run(o); err != nil {
			return done, describe(command, off, n, err)
		}
		done += size
	}
	return done, nil
}

// Zero makes n bytes at off read as zeroes, by WRITE_ZEROES, which may leave holes. The error is syscall.EOPNOTSUPP
// where the server does not offer that: write zeroes then.
func (c *Client) Zero(off, n int64) error { return c.span(CmdWriteZeroes, FlagSendWriteZeroes, off, n) }

// Trim tells the server that n bytes at off are of no use any more; what they read as then is not defined. The error
// is syscall.EOPNOTSUPP where the server does not offer that.
func (c *Client) Trim(off, n int64) error { return c.span(CmdTrim, FlagSendTrim, off, n) }

// span does a command without payload, which the server offers by flag.
func (c *Client) span(command Command, flag TransmissionFlags, off, n int64) error {
	if c.info.Flags&flag == 0 {
		return describe(command, off, n, syscall.EOPNOTSUPP)
	}
	if n == 0 {
		return nil
	}
	if err := c.check(command, off, n); err != nil {
		return err
	}
	o, err := c.acquire()
	if err != nil {
		return describe(command, off, n, err)
	}
	defer c.release(o)
	for done := int64(0); done < n; {
		size := min(n-done, maxZeroBytes)
		o.single(Call{Command: command, Offset: uint64(off + done), Length: uint64(size)})
		if err := c.run(o); err != nil {
			return describe(command, off, n, err)
		}
		done += size
	}
	return nil
}

// Extents calls fn for the parts of the n bytes at off, in order, with the flags of base:allocation (StateHole,
// StateZero), until it returns false. Flags 0 says nothing about a part; a server without block status gives one part
// with flags 0.
func (c *Client) Extents(off, n int64, fn func(off, n int64, flags uint32) bool) error {
	if n == 0 {
		return nil
	}
	if err := c.check(CmdBlockStatus, off, n); err != nil {
		return err
	}
	if !c.info.BlockStatus {
		fn(off, n, 0)
		return nil
	}
	var extents []Extent
	for at, end := off, off+n; at < end; {
		var err error
		if extents, err = c.status(extents[:0], at, min(end-at, maxStatusSpan)); err != nil {
			return describe(CmdBlockStatus, off, n, err)
		}
		for _, e := range extents {
			size := int64(min(e.Length, uint64(end-at)))
			if size > 0 && !fn(at, size, e.Flags) {
				return nil
			}
			at += size
		}
	}
	return nil
}

// status appends the extents at off to extents.
func (c *Client) status(extents []Extent, off, n int64) ([]Extent, error) {
	o, err := c.acquire()
	if err != nil {
		return nil, err
	}
	defer c.release(o)
	o.single(Call{Command: CmdBlockStatus, Offset: uint64(off), Length: uint64(n), Extents: extents})
	err = c.run(o)
	return o.calls[0].Extents, err
}

// Sync returns when all writes that were answered before are on stable storage. ErrLostWrites, and any other error,
// says that some since the last good Sync may not be. Where CanFlush is false it does not wait for anything.
func (c *Client) Sync() error {
	c.mu.Lock()
	losses := c.losses
	c.mu.Unlock()
	o, err := c.acquire()
	if err != nil {
		return fmt.Errorf("nbd flush: %w", err)
	}
	defer c.release(o)
	o.single(Call{Command: CmdFlush})
	o.losses = losses
	if err := c.run(o); err != nil {
		return fmt.Errorf("nbd flush: %w", err)
	}
	c.mu.Lock()
	c.synced = max(c.synced, o.mark)
	c.mu.Unlock()
	return nil
}

// covered tells whether a Sync that began after `losses` losses can still be good, and how many answered writes it
// covers then.
func (c *Client) covered(losses uint64) (mark uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.losses != losses || c.losses != c.told {
		c.told = c.losses
		return 0, ErrLostWrites
	}
	return c.answered.Load(), nil
}

// Close ends all connections and every operation, with net.ErrClosed.
func (c *Client) Close() error {
	c.mu.Lock()
	c.cancel() // with c.mu, so that nobody begins to dial after this
	c.mu.Unlock()
	c.running.Wait()
	c.mu.Lock()
	g := c.current
	c.mu.Unlock()
	g.kill(net.ErrClosed)
	g.running.Wait()
	return nil
}

// check tells whether the export has the n bytes at off and can do command there.
func (c *Client) check(command Command, off, n int64) error {
	block := int64(c.info.MinBlock)
	switch {
	case off < 0 || n < 0:
		return describe(command, off, n, fmt.Errorf("%w: offset and length cannot be negative", syscall.EINVAL))
	case n > c.info.Size || off > c.info.Size-n:
		err := syscall.EINVAL
		if command == CmdWrite || command == CmdWriteZeroes {
			err = syscall.ENOSPC
		}
		return describe(command, off, n, fmt.Errorf("%w: the export has %d bytes", err, c.info.Size))
	case off%block != 0 || n%block != 0 && off+n != c.info.Size:
		return describe(command, off, n, fmt.Errorf("%w: the server wants multiples of %d bytes", syscall.EINVAL, block))
	case command.writes() && c.info.Flags&FlagReadOnly != 0:
		return describe(command, off, n, fmt.Errorf("%w: the export is read-only", syscall.EPERM))
	}
	return nil
}

// writes tells whether c changes data.
func (c Command) writes() bool { return c == CmdWrite || c == CmdTrim || c == CmdWriteZeroes }

// describe says what failed.
func describe(command Command, off, n int64, err error) error {
	return fmt.Errorf("nbd %s of %d bytes at %d: %w", command, n, off, err)
}

// acquire waits for an operation.
func (c *Client) acquire() (*operation, error) {
	if c.context.Err() != nil {
		return nil, net.ErrClosed
	}
	select {
	case o := <-c.operations:
		return o, nil
	default:
	}
	expired, stop := c.timer(c.deadline())
	defer stop()
	select {
	case o := <-c.operations:
		return o, nil
	case <-expired:
		return nil, fmt.Errorf("%w: %d operations are in flight and none has ended for %v",
			os.ErrDeadlineExceeded, c.o.InFlight, c.o.Timeout)
	case <-c.context.Done():
		return nil, net.ErrClosed
	}
}

// release gives o back, without the caller's buffers.
func (c *Client) release(o *operation) {
	o.clear()
	c.operations <- o
}

// deadline is when an operation that begins now must have ended; zero = never.
func (c *Client) deadline() time.Time {
	if c.o.Timeout <= 0 {
		return time.Time{}
	}
	return time.Now().Add(c.o.Timeout)
}

// timer gives a channel that fires at deadline; never, if it is zero.
func (c *Client) timer(deadline time.Time) (expired <-chan time.Time, stop func() bool) {
	if deadline.IsZero() {
		return nil, func() bool { return true }
	}
	t := time.NewTimer(time.Until(deadline))
	return t.C, t.Stop
}
