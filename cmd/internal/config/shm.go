package config

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

// CheckShm refuses to start when the file system of d.Shm has too little room for the memory of all volumes.
// What their memory files occupy already counts as room. It reports whether that file system is a tmpfs.
func (d *Daemon) CheckShm() (tmpfs bool, err error) {
	var st unix.Statfs_t
	if err := statfsUp(d.Shm, &st); err != nil {
		return false, fmt.Errorf("look at --shm %s: %w", d.Shm, err)
	}
	free := int64(st.Bavail) * st.Bsize
	var need int64
	for _, v := range d.Volumes {
		need += int64(v.Memory) + int64(v.Memory)/100
		var file unix.Stat_t
		if unix.Stat(d.MemoryFile(v), &file) == nil {
			free += file.Blocks * 512
		}
	}
	if free < need {
		return false, &control.Failure{
			Code: control.ExitFailed,
			Err: fmt.Errorf("--shm %s has %s free, and the memory of all volumes with its metadata takes %s",
				d.Shm, FormatBytes(free), FormatBytes(need)),
			Hint: "give less --memory, or a larger tmpfs: mount -o remount,size=… /dev/shm",
		}
	}
	return st.Type == unix.TMPFS_MAGIC, nil
}

// statfsUp looks at the file system on which path is or would be made.
func statfsUp(path string, st *unix.Statfs_t) error {
	for {
		err := unix.Statfs(path, st)
		if !errors.Is(err, fs.ErrNotExist) || path == "/" || path == "." {
			return err
		}
		path = filepath.Dir(path)
	}
}
