// Package home is files and disks as backings.
//
// A File is a regular file or a block device, opened with O_DIRECT where the system grants that, and locked
// against a second opening. Any offset and length may be read and written; what is not aligned to the
// backing's sectors goes through a bounded pool of aligned buffers. Nothing is cached here.
package home

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// File is an open backing. Its methods are safe for concurrent use. Writes that overlap run one after the
// other.
type File struct {
	f       *os.File
	raw     syscall.RawConn
	path    string
	device  bool // a block device, else a regular file
	created bool // by Open
	direct  bool
	sector  int
	align   alignment
	size    atomic.Int64
	zeroing atomic.Int32 // the zeroMethod that the system is known to have

	ranges  rangeLock
	bounce  bouncePool
	vectors chan *vector // idle ones
	async   *async       // nil where writes cannot be asynchronous
	close   sync.Once
}

// alignment is what direct I/O asks for, in bytes: powers of two, 1 where anything is right.
type alignment struct {
	offset int // of offsets and lengths
	memory int // of buffers
}

// Size is the length of the backing in bytes.
func (f *File) Size() int64 { return f.size.Load() }

// SectorBytes is the smallest write, in bytes, that needs no reading: the logical sector of a device, the
// alignment of direct I/O on a file, else 512.
func (f *File) SectorBytes() int { return f.sector }

// Direct reports whether I/O bypasses the page cache. It does not where Options.Direct was false or the file
// system refused O_DIRECT.
func (f *File) Direct() bool { return f.direct }

// Device reports whether the backing is a block device, whose size is fixed.
func (f *File) Device() bool { return f.device }

// Created reports whether Open made the file.
func (f *File) Created() bool { return f.created }

// Path is the path that Open was given.
func (f *File) Path() string { return f.path }

// Sync makes all completed writes durable. After an error nothing written since the last Sync that succeeded
// may be relied upon, also when a later Sync succeeds: it must be written again.
func (f *File) Sync() error {
	return f.control("sync", unix.Fdatasync)
}

// Grow extends a regular file to size bytes, durably. The new part reads as zeroes. It never shrinks.
func (f *File) Grow(size int64) error {
	switch {
	case f.device:
		return fmt.Errorf("grow backing %s: %w: a device has the size that it has", f.path, ErrKind)
	case size < f.Size() || size%int64(f.sector) != 0:
		return fmt.Errorf("grow backing %s from %d to %d bytes: %w: it must become longer by whole sectors of %d",
			f.path, f.Size(), size, ErrSize, f.sector)
	}
	err := f.control("grow", func(fd int) error { return unix.Ftruncate(fd, size) })
	if err == nil {
		err = f.control("sync", unix.Fsync)
	}
	if err == nil {
		f.size.Store(size)
	}
	return err
}

// Close releases the lock and closes the backing. It does not sync. No asynchronous write may be in flight. A
// second call does nothing.
func (f *File) Close() error {
	err := error(nil)
	f.close.Do(func() {
		if f.async != nil {
			f.async.close()
		}
		err = f.f.Close()
	})
	return err
}

// Discard closes f and removes the file if Open created it: the way back when something else turns out to be
// wrong. A file that existed before is left alone.
func (f *File) Discard() error {
	if !f.created {
		return f.Close()
	}
	return errors.Join(os.Remove(f.path), f.Close())
}

// control runs call with the descriptor, again when a signal interrupted it, and names what failed.
func (f *File) control(verb string, call func(fd int) error) error {
	var err error
	cerr := f.raw.Control(func(fd uintptr) {
		for {
			if err = call(int(fd)); err != unix.EINTR {
				return
			}
		}
	})
	if err = errors.Join(cerr, err); err != nil {
		return fmt.Errorf("%s backing %s: %w", verb, f.path, err)
	}
	return nil
}
