package host

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrInUse says that somebody serves on an address already.
var ErrInUse = errors.New("somebody else serves there")

// Bounds of the look at a socket that exists.
const (
	probeTimeout = time.Second
	lockAttempts = 20
	lockPause    = 50 * time.Millisecond
)

// Listen binds a TCP address or a unix socket. A unix socket gets the mode; one that nobody serves any more is
// replaced, one that somebody serves is ErrInUse, and anything that is no socket is left alone. Closing the
// listener removes the socket.
func Listen(network, address string, mode fs.FileMode) (net.Listener, error) {
	if network != "unix" || strings.HasPrefix(address, "@") {
		l, err := net.Listen(network, address)
		return l, inUse(err)
	}
	unlock, err := lockFolder(filepath.Dir(address))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	defer unlock()
	if err := removeStale(address); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	l, err := net.Listen("unix", address)
	if err != nil {
		return nil, inUse(err)
	}
	if err := os.Chmod(address, mode); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	return l, nil
}

func inUse(err error) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%w: %w", ErrInUse, err)
	}
	return err
}

// removeStale removes the socket at path if nobody answers on it.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errors.New("a file is there that is no socket; remove it or choose another path")
	}
	c, err := net.DialTimeout("unix", path, probeTimeout)
	if err == nil {
		_ = c.Close()
		return ErrInUse
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%w: %w", ErrInUse, err)
	}
	return os.Remove(path)
}

// lockFolder keeps two daemons from each taking the other's fresh socket for a stale one. Nothing is left behind.
func lockFolder(path string) (unlock func(), err error) {
	folder, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	for range lockAttempts {
		err = unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = folder.Close() }, nil
		}
		time.Sleep(lockPause)
	}
	_ = folder.Close()
	return nil, fmt.Errorf("lock %s: %w", path, err)
}
