// Package host is the daemon's side of the machine that it runs on: sockets, systemd, limits of the process, the
// log.
package host

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Umask makes files that are created without a mode of their own private to the user of the daemon.
func Umask() { unix.Umask(0o077) }

// RaiseLimits raises the limits of open files and locked memory as far as the kernel lets it: both to the hard
// limit, locked memory to no limit where the process may. What it cannot raise is for the locking of memory to
// find.
func RaiseLimits() {
	for resource, wish := range map[int]uint64{
		unix.RLIMIT_NOFILE:  0,
		unix.RLIMIT_MEMLOCK: unix.RLIM_INFINITY,
	} {
		var limit unix.Rlimit
		if unix.Getrlimit(resource, &limit) != nil {
			continue
		}
		if wish != 0 && unix.Setrlimit(resource, &unix.Rlimit{Cur: wish, Max: wish}) == nil {
			continue
		}
		limit.Cur = limit.Max
		_ = unix.Setrlimit(resource, &limit)
	}
}

// BecomeIOFlusher tells the kernel that this process writes back for a block device (PR_SET_IO_FLUSHER, Linux
// 5.6), so that it does not wait in memory reclaim for a device of the same host that it serves itself. The
// setting is per thread: it is made on all of them, and later ones inherit it. It needs CAP_SYS_RESOURCE and a
// binary without cgo.
func BecomeIOFlusher() error {
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0)
	if errno != 0 {
		return fmt.Errorf("prctl PR_SET_IO_FLUSHER: %w", errno)
	}
	return nil
}
