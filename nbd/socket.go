package nbd

import (
	"net"
	"runtime"
	"syscall"
	"time"
	"unsafe"
)

var (
	noDeadline   = time.Time{}
	pastDeadline = time.Unix(1, 0)
)

// ioVector is one gathered read or write of a non-blocking socket and its outcome. Its methods are made for
// syscall.RawConn: they report false when the socket is not ready. The system calls bypass the scheduler, since
// they never block.
type ioVector struct {
	iovecs []syscall.Iovec
	n      int // bytes moved
	errno  syscall.Errno
}

// iovec describes p, which is not empty.
func iovec(p []byte) syscall.Iovec {
	v := syscall.Iovec{Base: unsafe.SliceData(p)}
	v.SetLen(len(p))
	return v
}

func (v *ioVector) readv(fd uintptr) bool  { return v.do(syscall.SYS_READV, fd) }
func (v *ioVector) writev(fd uintptr) bool { return v.do(syscall.SYS_WRITEV, fd) }

func (v *ioVector) do(call, fd uintptr) bool {
	for {
		n, _, errno := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(v.iovecs))), uintptr(len(v.iovecs)))
		switch errno {
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			return false
		}
		v.n, v.errno = int(n), errno
		runtime.KeepAlive(v)
		return true
	}
}

// pollFD is struct pollfd of poll(2).
type pollFD struct {
	fd      int32
	events  int16
	revents int16
}

const (
	pollErr = 0x8
	pollHup = 0x10
)

// pollClosed reports whether both directions of the socket are closed, or it was reset.
func pollClosed(fd int) bool {
	p := pollFD{fd: int32(fd)}
	var now syscall.Timespec
	_, _, _ = syscall.RawSyscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
	return p.revents&(pollErr|pollHup) != 0
}

// unacknowledged is how many bytes the other end of a TCP connection has not acknowledged.
func unacknowledged(fd int) int {
	var n int32
	_, _, _ = syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.TIOCOUTQ, uintptr(unsafe.Pointer(&n)))
	return int(n)
}

// tuneSocket sets what costs throughput otherwise. Errors are of no consequence.
func tuneSocket(nc net.Conn) {
	switch nc := nc.(type) {
	case *net.TCPConn:
		_ = nc.SetNoDelay(true)
		_ = nc.SetKeepAlive(true)
	case *net.UnixConn:
		_ = nc.SetReadBuffer(socketBufferBytes)
		_ = nc.SetWriteBuffer(socketBufferBytes)
	}
}

// peerName names the other end in logs.
func peerName(nc net.Conn) string {
	if a := nc.RemoteAddr(); a != nil && a.String() != "" && a.String() != "@" {
		return a.Network() + ":" + a.String()
	}
	return nc.LocalAddr().Network()
}
