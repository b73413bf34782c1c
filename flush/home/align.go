package home

import (
	"fmt"
	"io"
	"io/fs"

	"golang.org/x/sys/unix"
)

// findSize is the length in bytes. A device tells it by its end.
func (f *File) findSize(info fs.FileInfo) (int64, error) {
	if !f.device {
		return info.Size(), nil
	}
	return f.f.Seek(0, io.SeekEnd)
}

// findAlignment finds the sector and what direct I/O asks for. A file that can have no direct I/O is used
// without.
func (f *File) findAlignment() error {
	f.sector, f.align = minSectorBytes, alignment{1, 1}
	if f.device {
		if err := f.checkWritable(); err != nil {
			return explain(err)
		}
		var err error
		if f.sector, err = f.deviceSector(); err != nil {
			return err
		}
	}
	if f.sector > maxSectorBytes {
		return fmt.Errorf("%w: %d bytes, the largest are %d", ErrSector, f.sector, maxSectorBytes)
	}
	if !f.direct {
		return nil
	}
	a, ok := f.statAlignment()
	if !ok {
		a = f.probeAlignment()
	}
	if f.device {
		a.offset = max(a.offset, f.sector)
	}
	if a.offset < minSectorBytes || a.offset > maxSectorBytes || a.memory > maxSectorBytes {
		return f.giveUpDirect()
	}
	f.sector, f.align = a.offset, a
	return nil
}

// checkWritable refuses a device that is set read-only: the system lets it be opened all the same.
func (f *File) checkWritable() error {
	return f.control("find access to", func(fd int) error {
		readOnly, err := unix.IoctlGetInt(fd, unix.BLKROGET)
		if err == nil && readOnly != 0 {
			err = unix.EROFS
		}
		return err
	})
}

func (f *File) deviceSector() (n int, err error) {
	err = f.control("find sector of", func(fd int) error {
		n, err = unix.IoctlGetInt(fd, unix.BLKSSZGET)
		return err
	})
	return n, err
}

// statAlignment asks statx(2), STATX_DIOALIGN: Linux 6.1, and not every file system. An offset of 0 means
// that the file can have no direct I/O.
func (f *File) statAlignment() (a alignment, ok bool) {
	var st unix.Statx_t
	err := f.control("find alignment of", func(fd int) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	})
	if err != nil || st.Mask&unix.STATX_DIOALIGN == 0 {
		return a, false
	}
	return alignment{offset: int(st.Dio_offset_align), memory: max(1, int(st.Dio_mem_align))}, true
}

// probeAlignment reads at growing offsets until that is not refused. Memory is given the same alignment:
// kernels that cannot tell want it. An offset of 0 means that no read was right.
func (f *File) probeAlignment() alignment {
	if f.device {
		return alignment{f.sector, f.sector}
	}
	buf := alignedBytes(maxSectorBytes)
	for n := minSectorBytes; n <= maxSectorBytes; n *= 2 {
		err := f.control("probe", func(fd int) error {
			_, err := unix.Pread(fd, buf[:n], int64(n))
			return err
		})
		if err == nil {
			return alignment{n, n}
		}
	}
	return alignment{}
}

// giveUpDirect goes on through the page cache.
func (f *File) giveUpDirect() error {
	f.direct = false
	return f.control("turn off direct I/O of", func(fd int) error { return setFlags(fd, 0) })
}
