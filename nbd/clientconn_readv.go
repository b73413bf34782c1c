package nbd

import (
	"syscall"
	"unsafe"
)

// tryReadv receives into c.iovecs. False: nothing is there yet. It is bound once per connection, so that a receive
// allocates nothing; package net has no readv.
func (c *Conn) tryReadv(fd uintptr) bool {
	for {
		n, _, err := syscall.Syscall(syscall.SYS_READV, fd, uintptr(unsafe.Pointer(&c.iovecs)), uintptr(c.iovecN))
		switch err {
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			return false
		case 0:
			c.readN, c.readErr = int(n), 0
		default:
			c.readN, c.readErr = 0, err
		}
		return true
	}
}
