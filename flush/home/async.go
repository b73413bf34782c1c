package home

import (
	"io"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// asyncDepth is how many asynchronous writes may be in flight; further ones are done at once.
const asyncDepth = 64

// async is Linux native AIO (io_submit(2)): with O_DIRECT it keeps many writes in flight without a thread
// blocked in each, starts them in the order in which they are given, and costs no switch between goroutines
// where the one that starts them reaps them too.
type async struct {
	f        *File
	ctx      uintptr // aio_context_t
	writes   [asyncDepth]asyncWrite
	free     chan *asyncWrite
	inFlight atomic.Int32
}

// asyncWrite is a write in flight.
type asyncWrite struct {
	cb     iocb
	index  uint64 // in async.writes
	vector *vector
	total  int64
	span   span
	done   func(error)
	submit func(fd uintptr) // io_submit, bound once
	errno  unix.Errno       // of submit
}

// iocb is struct iocb of include/uapi/linux/aio_abi.h on a little-endian machine.
type iocb struct {
	data   uint64
	_      uint32 // key
	_      uint32 // rw_flags
	opcode uint16
	_      int16 // reqprio
	fd     uint32
	buf    uint64
	nbytes uint64
	offset int64
	_      uint64
	_      uint32 // flags
	_      uint32 // resfd
}

// ioEvent is struct io_event of the same file.
type ioEvent struct {
	data uint64 // of the iocb
	_    uint64 // obj
	res  int64
	_    int64 // res2
}

// iocbPwritev is IOCB_CMD_PWRITEV: buf is an array of nbytes iovecs.
const iocbPwritev = 8

// newAsync makes asynchronous writes possible, where the system has them and with direct I/O: without, they would be done
// before io_submit returns. Else it is nil.
func (f *File) newAsync() *async {
	if !f.direct {
		return nil
	}
	a := &async{f: f, free: make(chan *asyncWrite, asyncDepth)}
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, asyncDepth, uintptr(unsafe.Pointer(&a.ctx)), 0); errno != 0 {
		return nil
	}
	for i := range a.writes {
		w := &a.writes[i]
		w.index = uint64(i)
		w.submit = func(fd uintptr) { w.errno = a.submit(w, fd) }
		a.free <- w
	}
	return a
}

// Queue is a File with asynchronous writes of its own: what one goroutine began here no other reaps.
type Queue struct {
	*File
	async *async
}

// Queue returns a second way to f. Close it before f.
func (f *File) Queue() *Queue { return &Queue{f, f.newAsync()} }

// Async reports whether StartWritev returns before its write has ended.
func (q *Queue) Async() bool { return q.async != nil }

// StartWritev is File.StartWritev.
func (q *Queue) StartWritev(bufs [][]byte, off int64, done func(error)) {
	q.startWritev(q.async, bufs, off, done)
}

// Reap is File.Reap for the writes that were begun here.
func (q *Queue) Reap() { q.async.reapAny() }

// Close gives the queue back. The File stays open. No write may be in flight.
func (q *Queue) Close() error {
	if q.async != nil {
		q.async.close()
		q.async = nil
	}
	return nil
}

// close gives the context back to the kernel, which waits for what is in flight.
func (a *async) close() { _, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, a.ctx, 0, 0) }

// Async reports whether StartWritev returns before its write has ended.
func (f *File) Async() bool { return f.async != nil }

// StartWritev begins WritevAt(bufs, off) and returns. done is called with its result, by Reap or, for a write
// that cannot be asynchronous, before StartWritev returns. bufs and what they point to are lent until then.
// Writes begin in the order of the calls. A write must not overlap one that the same goroutine has begun and
// not reaped: it would wait for ever. Close must not be called before every done.
func (f *File) StartWritev(bufs [][]byte, off int64, done func(error)) {
	f.startWritev(f.async, bufs, off, done)
}

func (f *File) startWritev(a *async, bufs [][]byte, off int64, done func(error)) {
	if a == nil || !a.start(bufs, off, done) {
		done(f.WritevAt(bufs, off))
	}
}

// Reap waits until a write begun by StartWritev has ended, unless none is in flight, and calls done for each
// that has.
func (f *File) Reap() { f.async.reapAny() }

func (a *async) reapAny() {
	if a != nil && a.inFlight.Load() > 0 {
		a.reap()
	}
}

// start reports false, having done nothing, where the write cannot be asynchronous.
func (a *async) start(bufs [][]byte, off int64, done func(error)) bool {
	f := a.f
	n, direct := f.measure(bufs)
	if !direct || !f.aligned(off, 0) || n == 0 || len(bufs) > maxVectors || f.inside("write", off, n) != nil {
		return false
	}
	var w *asyncWrite
	select {
	case w = <-a.free:
	default:
		return false
	}
	w.vector, w.done, w.total = f.takeVector(), done, n
	w.vector.set(bufs, off)
	w.span = f.lockRange(off, n)
	a.inFlight.Add(1)
	if err := f.raw.Control(w.submit); err != nil || w.errno != 0 {
		a.release(w)
		return false
	}
	return true
}

func (a *async) submit(w *asyncWrite, fd uintptr) unix.Errno {
	w.cb = iocb{
		data: w.index, opcode: iocbPwritev, fd: uint32(fd), offset: w.vector.off,
		buf: uint64(uintptr(unsafe.Pointer(&w.vector.iov))), nbytes: uint64(w.vector.n),
	}
	list := [1]*iocb{&w.cb}
	_, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, a.ctx, 1, uintptr(unsafe.Pointer(&list)))
	return errno
}

// release gives back everything that w holds.
func (a *async) release(w *asyncWrite) {
	a.f.ranges.unlock(w.span)
	a.f.putVector(w.vector)
	w.vector, w.done = nil, nil
	a.inFlight.Add(-1)
	a.free <- w
}

func (a *async) reap() {
	var events [asyncDepth]ioEvent
	for {
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, a.ctx, 1, asyncDepth, uintptr(unsafe.Pointer(&events)), 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			panic("home: io_getevents: " + errno.Error()) // the arguments are wrong
		}
		for _, e := range events[:n] {
			a.end(&a.writes[e.data], e.res)
		}
		return
	}
}

// end reports the result of w, a negative errno or the bytes written, after writing what a partial write has
// left.
func (a *async) end(w *asyncWrite, res int64) {
	err := error(nil)
	switch {
	case res < 0:
		err = a.f.writeError(unix.Errno(-res))
	case res == 0:
		err = a.f.writeError(io.ErrShortWrite)
	case res < w.total:
		w.vector.wrote = int(res)
		err = a.f.writeRest(w.vector)
	}
	done := w.done
	a.release(w)
	done(err)
}
