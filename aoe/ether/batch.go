package ether

import (
	"errors"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/aoe"
)

// mmsghdr is struct mmsghdr of recvmmsg(2), on 64-bit systems.
type mmsghdr struct {
	hdr   unix.Msghdr
	bytes uint32
	_     [4]byte
}

// batch is the argument of one recvmmsg or sendmmsg, made once.
type batch struct {
	n       int
	headers [batchFrames]mmsghdr
	vectors []unix.Iovec
	used    int // vectors
}

func (b *batch) init(vectors int) { b.vectors = make([]unix.Iovec, vectors) }

// reset forgets the frames, so that nothing of the caller's is held.
func (b *batch) reset() {
	clear(b.headers[:b.n])
	clear(b.vectors[:b.used])
	b.n, b.used = 0, 0
}

// add adds a frame of up to three parts, of which the first is not empty.
func (b *batch) add(parts ...[]byte) {
	first := b.used
	for _, p := range parts {
		if len(p) > 0 {
			b.vectors[b.used].Base = &p[0]
			b.vectors[b.used].SetLen(len(p))
			b.used++
		}
	}
	h := &b.headers[b.n].hdr
	h.Iov = &b.vectors[first]
	h.SetIovlen(b.used - first)
	b.n++
}

// call is recvmmsg or sendmmsg of the frames from first on; how many were moved.
func (b *batch) call(trap uintptr, fd uintptr, first int) (int, unix.Errno) {
	for {
		n, _, errno := unix.Syscall6(trap, fd, uintptr(unsafe.Pointer(&b.headers[first])), uintptr(b.n-first), unix.MSG_DONTWAIT, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		runtime.KeepAlive(b)
		if errno != 0 {
			return 0, errno
		}
		return int(n), 0
	}
}

var padding [aoe.MinFrameBytes]byte

// Send hands the frames to the interface, in order, padded, and does not wait. What the socket has no room for, or finds the
// interface down for, is dropped and counted: it is lost like any other frame. All frames may be reused when it returns. The
// error is os.ErrClosed, or one that will not pass.
func (w *Wire) Send(frames []aoe.Frame) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(frames) > 0 {
		n := min(len(frames), batchFrames)
		for _, f := range frames[:n] {
			w.out.add(f.Head, f.Data, padding[:max(0, aoe.MinFrameBytes-len(f.Head)-len(f.Data))])
		}
		err := w.flush()
		w.out.reset()
		if err != nil {
			return w.failed("send", err)
		}
		frames = frames[n:]
	}
	return nil
}

// flush sends the batch. A frame that cannot be sent is passed over.
func (w *Wire) flush() error {
	failure := error(nil)
	err := w.conn.Control(func(fd uintptr) {
		for first := 0; first < w.out.n; {
			n, errno := w.out.call(unix.SYS_SENDMMSG, fd, first)
			switch errno {
			case 0:
				w.sent.Add(uint64(n))
				first += n
			case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
				w.unsent.Add(uint64(w.out.n - first))
				return
			case unix.ENETDOWN, unix.ENXIO, unix.ENODEV:
				w.down.Add(1)
				w.unsent.Add(uint64(w.out.n - first))
				return
			case unix.EMSGSIZE: // the MTU has become smaller
				w.unsent.Add(1)
				first++
			default:
				failure = errno
				return
			}
		}
	})
	return errors.Join(err, failure)
}

// Receive waits for frames and calls take for each that came, in order; the frame is valid during the call. It returns after
// one batch. The error is os.ErrClosed, or one that will not pass.
func (w *Wire) Receive(take func(frame []byte)) error {
	n, failure := 0, error(nil)
	err := w.conn.Read(func(fd uintptr) bool {
		for i := range w.in.n {
			w.in.headers[i].hdr.Flags = 0
		}
		count, errno := w.in.call(unix.SYS_RECVMMSG, fd, 0)
		switch errno {
		case 0:
			n = count
		case unix.EAGAIN:
			return false
		case unix.ENETDOWN: // told once; frames come again when the interface is up
			w.down.Add(1)
			return false
		default:
			failure = errno
		}
		return true
	})
	if err = errors.Join(err, failure); err != nil {
		return w.failed("receive", err)
	}
	for i := range n {
		h := &w.in.headers[i]
		frame := unsafe.Slice(h.hdr.Iov.Base, int(h.bytes))
		if h.hdr.Flags&unix.MSG_TRUNC != 0 || len(frame) > aoe.EthernetBytes+w.mtu {
			w.truncated.Add(1)
			continue
		}
		w.received.Add(1)
		take(frame)
	}
	return nil
}
