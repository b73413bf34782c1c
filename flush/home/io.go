package home

import (
	"fmt"
	"io"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxVectors is the most buffers that one pwritev takes (IOV_MAX, include/uapi/linux/uio.h).
const maxVectors = 1024

// idleVectors is how many vectors are kept for later writes: as many as a flusher has in flight by default,
// twice.
const idleVectors = 8

// ReadAt reads len(p) bytes from off on. It ends early only at the end of the backing, with io.EOF.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	size := f.Size()
	if off < 0 {
		return 0, fmt.Errorf("read backing %s: offset %d is negative", f.path, off)
	}
	if off >= size {
		return 0, io.EOF
	}
	atEnd := error(nil)
	if int64(len(p)) > size-off {
		p, atEnd = p[:size-off], io.EOF
	}
	n, err := 0, error(nil)
	if f.aligned(off, len(p)) && f.alignedMemory(p) {
		n, err = f.f.ReadAt(p, off)
	} else {
		n, err = f.readBounced(p, off)
	}
	if err == nil {
		err = atEnd
	}
	return n, err
}

// WriteAt writes p at off. A write that would reach past the end is refused. After an error any part of the
// range may have been written.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	bufs := [1][]byte{p}
	if err := f.WritevAt(bufs[:], off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WritevAt writes bufs, one after the other, from off on, in as few writes as the system allows. It is
// WriteAt otherwise.
func (f *File) WritevAt(bufs [][]byte, off int64) error {
	n, direct := f.measure(bufs)
	if err := f.inside("write", off, n); err != nil {
		return err
	}
	s := f.lockRange(off, n)
	defer f.ranges.unlock(s)
	if direct && f.aligned(off, 0) {
		return f.writeVectors(bufs, off)
	}
	return f.writeBounced(bufs, off, n)
}

// measure is the length of bufs in all, and whether each may be written without a bounce.
func (f *File) measure(bufs [][]byte) (n int64, direct bool) {
	direct = true
	for _, b := range bufs {
		n += int64(len(b))
		direct = direct && f.aligned(0, len(b)) && f.alignedMemory(b)
	}
	return n, direct
}

func (f *File) inside(verb string, off, n int64) error {
	if off < 0 || n < 0 || off > f.Size()-n {
		return fmt.Errorf("%s backing %s: %d bytes at %d reach past its end at %d", verb, f.path, n, off, f.Size())
	}
	return nil
}

func (f *File) aligned(off int64, n int) bool {
	return (off|int64(n))&int64(f.align.offset-1) == 0
}

func (f *File) alignedMemory(p []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))&uintptr(f.align.memory-1) == 0
}

// vector is the argument of one pwritev, and its result. It is used again, so a write allocates nothing.
type vector struct {
	iov   [maxVectors]unix.Iovec
	n     int // in use
	used  int // have been in use since it was taken
	off   int64
	wrote int
	errno unix.Errno
	call  func(fd uintptr) // pwritev, bound once
}

func (f *File) takeVector() *vector {
	select {
	case v := <-f.vectors:
		return v
	default:
		v := new(vector)
		v.call = v.pwritev
		return v
	}
}

func (f *File) putVector(v *vector) {
	clear(v.iov[:v.used])
	v.used = 0
	select {
	case f.vectors <- v:
	default:
	}
}

// pwritev writes what is in v once; part of it may remain. pos_h is 0, since an offset fits pos_l on 64 bits.
func (v *vector) pwritev(fd uintptr) {
	for {
		n, _, errno := unix.Syscall6(unix.SYS_PWRITEV, fd, uintptr(unsafe.Pointer(&v.iov)), uintptr(v.n), uintptr(v.off), 0, 0)
		if errno == unix.EINTR {
			continue
		}
		v.wrote, v.errno = int(n), errno
		return
	}
}

// set makes v the write of bufs, at most maxVectors, at off.
func (v *vector) set(bufs [][]byte, off int64) {
	v.n, v.off, v.wrote = 0, off, 0
	for _, b := range bufs {
		if len(b) > 0 {
			v.iov[v.n].Base = unsafe.SliceData(b)
			v.iov[v.n].SetLen(len(b))
			v.n++
		}
	}
	v.used = max(v.used, v.n)
}

// writeVectors writes aligned buffers, at most maxVectors in a call.
func (f *File) writeVectors(bufs [][]byte, off int64) error {
	v := f.takeVector()
	defer f.putVector(v)
	for len(bufs) > 0 {
		n := min(len(bufs), maxVectors)
		v.set(bufs[:n], off)
		if err := f.writeRest(v); err != nil {
			return err
		}
		bufs, off = bufs[n:], v.off
	}
	return nil
}

// writeRest writes what is left of v after v.wrote bytes, going on where a partial write ended.
func (f *File) writeRest(v *vector) error {
	for v.advance(); v.n > 0; v.advance() {
		err := f.raw.Control(v.call)
		if err == nil && v.errno != 0 {
			err = v.errno
		}
		if err == nil && v.wrote == 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			return f.writeError(err)
		}
	}
	return nil
}

func (f *File) writeError(err error) error {
	return fmt.Errorf("write backing %s: %w", f.path, err)
}

// advance takes what was written off the front.
func (v *vector) advance() {
	v.off += int64(v.wrote)
	first, left := 0, uint64(v.wrote)
	for ; first < v.n && left >= v.iov[first].Len; first++ {
		left -= v.iov[first].Len
	}
	if left > 0 {
		v.iov[first].Base = (*byte)(unsafe.Add(unsafe.Pointer(v.iov[first].Base), left))
		v.iov[first].Len -= left
	}
	if first > 0 {
		v.n = copy(v.iov[:], v.iov[first:v.n])
	}
	v.wrote = 0
}

// span is a range in bytes.
type span struct{ from, to int64 }

// rangeLock keeps operations whose ranges overlap apart. Few are held at a time, one per writer.
type rangeLock struct {
	mu   sync.Mutex // protects held
	gone sync.Cond
	held []span
}

func (l *rangeLock) init() { l.gone.L = &l.mu }

func (l *rangeLock) lock(s span) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.overlaps(s) {
		l.gone.Wait()
	}
	l.held = append(l.held, s)
}

func (l *rangeLock) overlaps(s span) bool {
	for _, h := range l.held {
		if s.from < h.to && h.from < s.to {
			return true
		}
	}
	return false
}

func (l *rangeLock) unlock(s span) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, h := range l.held {
		if h == s {
			l.held[i] = l.held[len(l.held)-1]
			l.held = l.held[:len(l.held)-1]
			break
		}
	}
	l.gone.Broadcast()
}

// lockRange locks the sectors that n bytes at off touch.
func (f *File) lockRange(off, n int64) span {
	s := f.cover(off, n)
	f.ranges.lock(s)
	return s
}

// cover is the range of whole sectors around n bytes at off.
func (f *File) cover(off, n int64) span {
	sector := int64(f.align.offset)
	return span{off &^ (sector - 1), (off + n + sector - 1) &^ (sector - 1)}
}
