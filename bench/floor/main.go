// Floor is the NBD server that does nothing but what no NBD server can leave out: it parses requests, copies
// each payload once between the socket and one buffer, and sends the replies of all requests that arrived
// together with one system call. It has no cache, checksum, order, durability or protection against hostile
// clients. What it reaches is the floor of cost on a machine; nobody should keep data in it.
//
// Usage:
//
//	floor -listen unix:PATH|tcp:HOST:PORT -size-mib 512
//
// It serves until it is killed.
package main

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	listen := flag.String("listen", "", "unix:PATH or tcp:HOST:PORT")
	sizeMiB := flag.Int64("size-mib", 512, "size of the device in MiB")
	flag.Parse()
	if err := run(*listen, *sizeMiB<<20); err != nil {
		fmt.Fprintln(os.Stderr, "floor:", err)
		os.Exit(1)
	}
}

func run(listen string, sizeBytes int64) error {
	network, address, ok := strings.Cut(listen, ":")
	if !ok || network != "unix" && network != "tcp" {
		return fmt.Errorf("-listen is %q; want unix:PATH or tcp:HOST:PORT", listen)
	}
	device, err := newDevice(sizeBytes)
	if err != nil {
		return err
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return accept(l, device)
}

// newDevice gives the buffer: zeroed memory, in huge pages where the kernel has them.
func newDevice(sizeBytes int64) ([]byte, error) {
	if sizeBytes <= 0 {
		return nil, fmt.Errorf("size is %d bytes; want at least 1 MiB", sizeBytes)
	}
	device, err := unix.Mmap(-1, 0, int(sizeBytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map device: %w", err)
	}
	// A hint that a kernel without huge pages refuses; the device works all the same.
	_ = unix.Madvise(device, unix.MADV_HUGEPAGE)
	return device, nil
}

// accept serves every connection of l in a goroutine of its own until l is closed.
func accept(l net.Listener, device []byte) error {
	for {
		nc, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			if err := serve(nc, device); err != nil {
				fmt.Fprintln(os.Stderr, "floor:", err)
			}
		}()
	}
}
