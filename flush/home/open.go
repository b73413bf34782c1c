package home

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of Open. All come wrapped, with the path, the value and what to do.
var (
	// ErrBusy: another process has the backing locked, or it is mounted.
	ErrBusy = errors.New("it is in use")
	// ErrKind: the path is neither a regular file nor a block device.
	ErrKind = errors.New("it is neither a regular file nor a block device")
	// ErrSize: the size is 0 or not whole sectors.
	ErrSize = errors.New("its size is wrong")
	// ErrSector: the sectors are larger than a block.
	ErrSector = errors.New("its sectors are not supported")
)

const (
	// createUnit is what the size of a created file is a multiple of: the largest sector there is.
	createUnit = maxSectorBytes
	// maxSectorBytes is the largest sector supported, a block of the cache.
	maxSectorBytes = 4096
	// minSectorBytes is the sector where the system tells none.
	minSectorBytes = 512
	// lockTries and lockPause bound the wait for a device's lock: udev holds it for moments, while it looks
	// at a device that somebody closed.
	lockTries = 10
	lockPause = 50 * time.Millisecond
)

// Options say how a backing is opened.
type Options struct {
	// CreateBytes, when not 0, lets Open create a missing file of that size: sparse, mode 0600. A file that
	// exists keeps its size.
	CreateBytes int64
	// Direct asks for O_DIRECT. Where a file system refuses that, the file is opened without.
	Direct bool
	// BounceBuffers is how many unaligned operations may run at a time, further ones wait; 0 means 4.
	BounceBuffers int
}

// Open opens the regular file or block device at path for reading and writing and locks it. Nothing is
// created or changed when it returns an error.
func Open(path string, o Options) (*File, error) {
	f, err := open(path, o)
	if err != nil {
		return nil, fmt.Errorf("open backing %s: %w", path, err)
	}
	return f, nil
}

func open(path string, o Options) (*File, error) {
	if o.CreateBytes < 0 || o.CreateBytes%createUnit != 0 {
		return nil, fmt.Errorf("%w: %d bytes to create; give a positive multiple of %d", ErrSize, o.CreateBytes, createUnit)
	}
	info, err := os.Stat(path)
	switch {
	case err == nil:
		return openExisting(path, info, o)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, explain(err)
	case o.CreateBytes == 0:
		return nil, fmt.Errorf("%w; name a file or device that exists, or give a size to create it", fs.ErrNotExist)
	}
	return create(path, o)
}

func openExisting(path string, info fs.FileInfo, o Options) (*File, error) {
	device, err := kind(info)
	if err != nil {
		return nil, err
	}
	flags := unix.O_RDWR
	if device {
		flags |= unix.O_EXCL // without O_CREAT: refused while mounted or claimed, open(2)
	}
	f, err := openFile(path, flags, 0, o)
	if err != nil {
		return nil, err
	}
	f.device = device
	if err := f.prepare(info, o); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// create makes the file. It is removed again when anything fails, and was nobody else's: it is created
// exclusively.
func create(path string, o Options) (*File, error) {
	f, err := openFile(path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600, o)
	if err != nil {
		return nil, err
	}
	f.created = true
	if err := f.initialize(o); err != nil {
		return nil, errors.Join(err, f.Discard())
	}
	return f, nil
}

// initialize gives a new file its size and makes its existence durable.
func (f *File) initialize(o Options) error {
	if err := f.lock(); err != nil {
		return err
	}
	if err := f.f.Truncate(o.CreateBytes); err != nil {
		return fmt.Errorf("%w: give a size that the file system can hold, %d bytes are too many", err, o.CreateBytes)
	}
	info, err := f.f.Stat()
	if err != nil {
		return err
	}
	if err := f.prepare(info, o); err != nil {
		return err
	}
	if err := f.control("sync", unix.Fsync); err != nil {
		return err
	}
	return syncDir(filepath.Dir(f.path))
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// kind tells devices from files and refuses the rest.
func kind(info fs.FileInfo) (device bool, err error) {
	what := ""
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return false, nil
	case mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0:
		return true, nil
	case mode.IsDir():
		what = "directory"
	case mode&fs.ModeNamedPipe != 0:
		what = "FIFO"
	case mode&fs.ModeSocket != 0:
		what = "socket"
	default:
		what = "character device"
	}
	return false, fmt.Errorf("%w but a %s; name a file or a disk", ErrKind, what)
}

// openFile opens path and turns direct I/O on if that is asked for and granted. O_NONBLOCK keeps a FIFO that
// has come into the place of a file from holding us up.
func openFile(path string, flags int, mode uint32, o Options) (*File, error) {
	fd, err := openRetry(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, mode)
	if err != nil {
		return nil, explain(err)
	}
	direct := o.Direct && setFlags(fd, unix.O_DIRECT) == nil
	if !direct {
		err = setFlags(fd, 0)
	}
	f := &File{f: os.NewFile(uintptr(fd), path), path: path, direct: direct, vectors: make(chan *vector, idleVectors)}
	f.ranges.init()
	f.bounce.init(o.BounceBuffers)
	if err == nil {
		f.raw, err = f.f.SyscallConn()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// setFlags sets the file status flags, all others are cleared. O_DIRECT is refused with EINVAL by file
// systems that do not have it (fcntl(2)).
func setFlags(fd, flags int) error {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags)
	return err
}

func openRetry(path string, flags int, mode uint32) (fd int, err error) {
	for {
		if fd, err = unix.Open(path, flags, mode); err != unix.EINTR {
			return fd, err
		}
	}
}

// explain adds the remedy to an error of the system.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: mounted, or claimed by another program; unmount it or stop that program (lsblk, fuser -v)", ErrBusy)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w; give this user read and write access, and search access to the directories above", err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w; make it (blockdev --setrw) or its file system (mount -o remount,rw) writable, or choose another backing", err)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w; create the directory first", err)
	}
	return err
}

// prepare locks f, unless it is locked, and finds its size and alignment. info is what was found at the path.
func (f *File) prepare(info fs.FileInfo, o Options) error {
	now, err := f.f.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(info, now) {
		return errors.New("another file took its place while it was being opened; try again")
	}
	if err := f.lock(); err != nil {
		return err
	}
	size, err := f.findSize(now)
	if err != nil {
		return err
	}
	f.size.Store(size)
	if err := f.findAlignment(); err != nil {
		return err
	}
	switch {
	case size == 0:
		return fmt.Errorf("%w: it is empty; remove it to have it created, or extend it (truncate -s SIZE)", ErrSize)
	case size%int64(f.sector) != 0:
		return fmt.Errorf("%w: %d bytes are not a multiple of its sector of %d; extend it to %d (truncate -s)",
			ErrSize, size, f.sector, (size/int64(f.sector)+1)*int64(f.sector))
	}
	f.async = f.newAsync()
	return nil
}

// lock takes the lock that a second opening is refused by. flock(2) is by open file, so a second opening by
// this process is refused too; the lock goes with the process.
func (f *File) lock() error {
	for try := 1; ; try++ {
		err := f.control("lock", func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if !f.device || try == lockTries {
			return fmt.Errorf("%w: another process holds its lock; stop that process (fuser -v)", ErrBusy)
		}
		time.Sleep(lockPause)
	}
}
