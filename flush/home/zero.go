package home

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// zeroMethod is a way to zero a range, the best first. A method that the system does not have is not tried
// again.
type zeroMethod = int32

const (
	// zeroPunch gives the space back: PUNCH_HOLE, which on a device (Linux block/fops.c, blkdev_fallocate)
	// zeroes by unmapping and is refused where that does not give zeroes.
	zeroPunch zeroMethod = iota
	// zeroRange zeroes by the system: ZERO_RANGE on a file, BLKZEROOUT on a device.
	zeroRange
	// zeroWrite writes zeroes.
	zeroWrite
)

// zeroes are what zeroWrite and edges write. Never written to.
var zeroes = alignedBytes(1 << 20)

// Zero makes n bytes from off on read as zeroes, and gives their space back where the system can. Like a
// write it is durable after Sync. After an error any part of the range may be zero.
func (f *File) Zero(off, n int64) error {
	if err := f.inside("zero", off, n); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	s := f.lockRange(off, n)
	defer f.ranges.unlock(s)
	// Whole sectors lie between from and to; what remains on either side is written.
	sector := int64(f.sector)
	from, to := (off+sector-1)&^(sector-1), (off+n)&^(sector-1)
	if from >= to {
		return f.writeZeroes(off, n)
	}
	return errors.Join(f.writeZeroes(off, from-off), f.zeroSectors(from, to-from), f.writeZeroes(to, off+n-to))
}

// zeroSectors zeroes whole sectors by the first method that the system has.
func (f *File) zeroSectors(off, n int64) error {
	for {
		method := f.zeroing.Load()
		if method == zeroWrite {
			return f.writeZeroes(off, n)
		}
		err := f.control("zero", func(fd int) error { return f.zeroBy(method, fd, off, n) })
		if !refused(err) {
			return err
		}
		f.zeroing.CompareAndSwap(method, method+1)
	}
}

func (f *File) zeroBy(method zeroMethod, fd int, off, n int64) error {
	switch {
	case method == zeroRange && f.device:
		return zeroOut(fd, off, n)
	case method == zeroRange:
		return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// refused tells a method that is not there from one that failed.
func refused(err error) bool {
	for _, errno := range []unix.Errno{unix.EOPNOTSUPP, unix.ENOSYS, unix.ENOTTY, unix.EINVAL} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// writeZeroes writes n zeroes at off; the caller has the range locked.
func (f *File) writeZeroes(off, n int64) error {
	for n > 0 {
		bufs := [1][]byte{zeroes[:min(n, int64(len(zeroes)))]}
		part := int64(len(bufs[0]))
		write := f.writeVectors
		if !f.aligned(off, len(bufs[0])) {
			write = func(b [][]byte, off int64) error { return f.writeBounced(b, off, part) }
		}
		if err := write(bufs[:], off); err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}

// Flags of Extents: the bits of the NBD context base:allocation (proto.md, "Metadata contexts").
const (
	extentData uint32 = 0
	extentHole uint32 = 3 // a hole, and reads as zeroes
)

// Extents calls fn for the extents of n bytes from off on, ascending and without gaps, until it returns
// false. flags is 3 for a hole, which reads as zeroes, and 0 for data. A device is one extent of data.
func (f *File) Extents(off, n int64, fn func(off, n int64, flags uint32) bool) error {
	if err := f.inside("map", off, n); err != nil {
		return err
	}
	for end := off + n; off < end; {
		next, flags, err := f.extent(off)
		if err != nil {
			return err
		}
		next = min(next, end)
		if !fn(off, next-off, flags) {
			return nil
		}
		off = next
	}
	return nil
}

// extent is the extent at off: where it ends, and what it is.
func (f *File) extent(off int64) (end int64, flags uint32, err error) {
	if f.device {
		return f.Size(), extentData, nil
	}
	data, err := f.seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no data behind off
		return f.Size(), extentHole, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return f.Size(), extentData, nil
	case err != nil:
		return 0, 0, err
	case data > off:
		return data, extentHole, nil
	}
	hole, err := f.seek(off, unix.SEEK_HOLE)
	if err == nil && hole <= off {
		err = fmt.Errorf("map backing %s: hole at %d found at %d", f.path, off, hole)
	}
	return hole, extentData, err
}

// seek moves the file's own position too, which nothing here uses.
func (f *File) seek(off int64, whence int) (at int64, err error) {
	err = f.control("map", func(fd int) error {
		at, err = unix.Seek(fd, off, whence)
		return err
	})
	return at, err
}
