package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/bench"
)

// paced sends batches of requests at fixed instants, whether or not earlier ones have been answered, and counts each from the
// instant at which it was due: a server that stops for a while is charged with all requests that came due meanwhile, and not only with
// those that a client that waits for it had in flight. It belongs to one goroutine.
type paced struct {
	fd          int
	blocks      uint64 // of the export
	interval    time.Duration
	readPercent int

	due    [pacedDepth]time.Duration // of the requests in flight, by cookie
	write  [pacedDepth]bool
	free   []uint16
	out    []byte // requests that the socket has not taken; sent is how much of them it has
	sent   int
	in     []byte
	filled int // bytes at the start of in that are not parsed
	skip   int // bytes of the read reply that are still to come
	cookie uint16

	reads, writes bench.Histogram
}

// pacedDepth bounds what is in flight. Requests for which there is no room wait until there is, and this counts.
const pacedDepth = 4096

// The bytes of the protocol (NBD's doc/proto.md).
const (
	nbdGreeting    = 0x4e42444d41474943
	nbdOption      = 0x49484156454f5054
	nbdRequest     = 0x25609513
	nbdSimpleReply = 0x67446698
	nbdExportName  = 1
	nbdFlags       = 3 // fixed newstyle, no zeroes
	nbdRead        = 0
	nbdWrite       = 1
	nbdRequestSize = 28
	nbdReplySize   = 16
)

// pacedTimeout bounds the handshake and the wait for any answer.
const pacedTimeout = 30 * time.Second

// dialPaced connects to the export at a unix socket. iops is the rate.
func dialPaced(socket, export string, iops float64, readPercent int) (*paced, error) {
	nc, err := net.DialTimeout("unix", socket, pacedTimeout)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(pacedTimeout))
	size, err := greet(nc, export)
	if err != nil {
		return nil, fmt.Errorf("negotiate: %w", err)
	}
	raw, err := nc.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	p := &paced{
		blocks: size / blockBytes, interval: time.Duration(batchSize / iops * float64(time.Second)), readPercent: readPercent,
		in: make([]byte, mib),
	}
	err = raw.Control(func(fd uintptr) { p.fd, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		return nil, err
	}
	for i := range pacedDepth {
		p.free = append(p.free, uint16(i))
	}
	return p, nil
}

func (p *paced) close() error { return unix.Close(p.fd) }

// greet asks for an export by the shortest of handshakes.
func greet(rw io.ReadWriter, export string) (size uint64, err error) {
	var greeting [18]byte
	if _, err := io.ReadFull(rw, greeting[:]); err != nil {
		return 0, err
	}
	if binary.BigEndian.Uint64(greeting[:]) != nbdGreeting || binary.BigEndian.Uint64(greeting[8:]) != nbdOption {
		return 0, fmt.Errorf("greeting % x is not that of a newstyle NBD server", greeting)
	}
	b := binary.BigEndian.AppendUint32(nil, nbdFlags)
	b = binary.BigEndian.AppendUint64(b, nbdOption)
	b = binary.BigEndian.AppendUint32(b, nbdExportName)
	b = binary.BigEndian.AppendUint32(b, uint32(len(export)))
	if _, err := rw.Write(append(b, export...)); err != nil {
		return 0, err
	}
	var answer [10]byte
	if _, err := io.ReadFull(rw, answer[:]); err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(answer[:]), nil
}

// run sends until done is closed and takes the answers to all that was due until then. reads and writes hold the latencies of
// this run alone.
func (p *paced) run(done <-chan struct{}) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// The thread is to wake when a batch is due, and not up to 50 µs later (prctl(2)).
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set timer slack: %w", err)
	}
	p.reads, p.writes = bench.Histogram{}, bench.Histogram{}
	start := time.Now()
	heard := time.Duration(0)
	next, end := time.Duration(0), time.Duration(-1)
	for {
		now := time.Since(start)
		if end < 0 && closed(done) {
			end = now
		}
		for next <= now && (end < 0 || next <= end) && len(p.free) >= batchSize {
			p.batch(next)
			next += p.interval
		}
		if err := p.send(); err != nil {
			return err
		}
		if end >= 0 && next > end && len(p.free) == pacedDepth {
			return nil
		}
		switch {
		case len(p.free) == pacedDepth:
			heard = now
		case now-heard > pacedTimeout:
			return fmt.Errorf("no answer for %s", pacedTimeout)
		}
		wait := max(0, next-now)
		if len(p.free) < batchSize || end >= 0 {
			wait = time.Millisecond
		}
		if err := p.wait(min(wait, time.Millisecond)); err != nil {
			return err
		}
		n, err := p.receive(start)
		if err != nil {
			return err
		}
		if n > 0 {
			heard = time.Since(start)
		}
	}
}

func closed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// batch makes the requests that are due at an instant.
func (p *paced) batch(due time.Duration) {
	for range batchSize {
		cookie := p.free[len(p.free)-1]
		p.free = p.free[:len(p.free)-1]
		write := rand.IntN(100) >= p.readPercent
		p.due[cookie], p.write[cookie] = due, write
		command := uint16(nbdRead)
		if write {
			command = nbdWrite
		}
		b := binary.BigEndian.AppendUint32(p.out, nbdRequest)
		b = binary.BigEndian.AppendUint16(b, 0)
		b = binary.BigEndian.AppendUint16(b, command)
		b = binary.BigEndian.AppendUint64(b, uint64(cookie))
		b = binary.BigEndian.AppendUint64(b, rand.Uint64N(p.blocks)*blockBytes)
		b = binary.BigEndian.AppendUint32(b, blockBytes)
		if write {
			b = append(b, pacedPayload[:]...)
		}
		p.out = b
	}
}

// pacedPayload is what is written.
var pacedPayload = func() (p [blockBytes]byte) {
	for i := range p {
		p[i] = byte(i * 7)
	}
	return p
}()

// send gives the socket as much as it takes.
func (p *paced) send() error {
	for p.sent < len(p.out) {
		n, err := unix.SendmsgN(p.fd, p.out[p.sent:], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			return fmt.Errorf("send requests: %w", err)
		}
		p.sent += max(n, 0)
	}
	p.out, p.sent = p.out[:0], 0
	return nil
}

// wait waits for d, for an answer, or for room in the socket where something waits for that.
func (p *paced) wait(d time.Duration) error {
	poll := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
	if p.sent < len(p.out) {
		poll[0].Events |= unix.POLLOUT
	}
	limit := unix.NsecToTimespec(int64(d))
	if _, err := unix.Ppoll(poll, &limit, nil); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("wait for answers: %w", err)
	}
	return nil
}

// receive takes what has arrived. It reports how many bytes.
func (p *paced) receive(start time.Time) (int, error) {
	n, _, err := unix.Recvfrom(p.fd, p.in[p.filled:], unix.MSG_DONTWAIT)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("receive answers: %w", err)
	case n == 0:
		return 0, fmt.Errorf("receive answers: %w", io.ErrUnexpectedEOF)
	}
	return n, p.parse(p.in[:p.filled+n], time.Since(start))
}

// parse takes the answers in data; what is not complete stays.
func (p *paced) parse(data []byte, now time.Duration) error {
	for {
		if p.skip > 0 {
			n := min(p.skip, len(data))
			p.skip, data = p.skip-n, data[n:]
			if p.skip > 0 {
				break
			}
			p.answered(p.cookie, now)
		}
		if len(data) < nbdReplySize {
			break
		}
		cookie := binary.BigEndian.Uint64(data[8:])
		if binary.BigEndian.Uint32(data) != nbdSimpleReply || binary.BigEndian.Uint32(data[4:]) != 0 || cookie >= pacedDepth {
			return fmt.Errorf("answer % x is an error, or none", data[:nbdReplySize])
		}
		data = data[nbdReplySize:]
		if p.cookie = uint16(cookie); p.write[cookie] {
			p.answered(p.cookie, now)
		} else {
			p.skip = blockBytes
		}
	}
	p.filled = copy(p.in, data)
	return nil
}

func (p *paced) answered(cookie uint16, now time.Duration) {
	h := &p.reads
	if p.write[cookie] {
		h = &p.writes
	}
	h.Record(now - p.due[cookie])
	p.free = append(p.free, cookie)
}

// latency gives reads and writes together.
func (p *paced) latency() *bench.Histogram {
	all := p.reads
	all.Add(&p.writes)
	return &all
}
