package home

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// zeroOut has the kernel zero a range of a device (ioctl BLKZEROOUT, include/uapi/linux/fs.h: two 64-bit
// numbers, offset and length in bytes). It drops the range from the page cache.
func zeroOut(fd int, off, n int64) error {
	arg := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return errno
	}
	return nil
}
