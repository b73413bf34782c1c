package node

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cache/arena"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

// memoryFile opens the memory of a volume. What an earlier process left in it is kept if it belongs to the backing as
// this is now; otherwise it is dropped where it holds nothing that the backing has not, and refused where it does.
type memoryFile struct {
	path  string
	id    arena.Identity
	stamp uint64 // incarnation of the backing
	clean bool   // that was stopped cleanly, and may have been used without us since
	force bool
	log   *slog.Logger

	// What open made of the file.

	kept  bool   // what an earlier process left in it is there again
	lost  bool   // that held writes that the backing has not, and is given up
	aside string // where that is now; empty if nothing was set aside
}

// open opens the file, or an empty one in its place.
func (m *memoryFile) open() (*arena.Arena, error) {
	if err := os.MkdirAll(filepath.Dir(m.path), 0o700); err != nil {
		return nil, fmt.Errorf("make folder of memory files: %w", err)
	}
	a, warm, err := arena.Open(m.path, m.id)
	var mismatch *arena.MismatchError
	switch {
	case errors.Is(err, arena.ErrBusy):
		return nil, control.Refused(err, "another daemon serves this volume: stop it")
	case errors.Is(err, arena.ErrForeign):
		return m.setAside(err)
	case errors.As(err, &mismatch):
		return m.replace(mismatch)
	case err != nil:
		return nil, err
	case warm && (m.clean || !a.BelongsTo(m.stamp)):
		if err := a.Close(); err != nil {
			return nil, err
		}
		why := "the backing was opened by something else since the memory file was written"
		if m.clean {
			why = "the volume was stopped cleanly since the memory file was written"
		}
		return m.replace(errors.New(why))
	case warm:
		m.kept = true
		m.log.Info("memory file found", "path", m.path, "dirty", cache.Holds(a, 0))
	}
	return a, nil
}

// undo closes the memory of an opening that failed before the backing had its stamp. The file is again as it was found,
// save that one that held nothing of worth is not made again.
func (m *memoryFile) undo(a *arena.Arena) error {
	if m.kept {
		return a.Close()
	}
	err := a.Remove()
	if m.aside != "" {
		err = errors.Join(err, os.Rename(m.aside, m.path))
	}
	return err
}

// replace puts an empty memory file in the place of one that does not belong to the backing.
func (m *memoryFile) replace(why error) (*arena.Arena, error) {
	old, _, err := arena.Inspect(m.path)
	if err != nil {
		return nil, err
	}
	dirty := cache.Holds(old, 0)
	switch {
	case dirty && !m.force:
		refusal := control.Refused(fmt.Errorf("memory file %s holds writes that are not on the backing, and %w", m.path, why),
			"start with the backing, --size and --memory that it was written with, or --force to set the writes aside and go on without them")
		return nil, errors.Join(refusal, old.Close())
	case dirty:
		if err := old.Close(); err != nil {
			return nil, err
		}
		m.lost = true
		return m.setAside(why)
	}
	m.log.Warn("memory file dropped; it held nothing that is not on the backing", "path", m.path, "why", why.Error())
	if err := old.Remove(); err != nil {
		return nil, fmt.Errorf("remove memory file: %w", err)
	}
	a, _, err := arena.Open(m.path, m.id)
	return a, err
}

// setAside keeps a file that is not ours, or not to be lost, under another name.
func (m *memoryFile) setAside(why error) (*arena.Arena, error) {
	to := fmt.Sprintf("%s.set-aside-%s", m.path, time.Now().UTC().Format("20060102T150405.000000000Z"))
	if err := os.Rename(m.path, to); err != nil {
		return nil, fmt.Errorf("set memory file aside: %w", err)
	}
	m.log.Error("memory file set aside", "path", m.path, "to", to, "why", why.Error())
	a, _, err := arena.Open(m.path, m.id)
	if err != nil {
		return nil, errors.Join(err, os.Rename(to, m.path))
	}
	m.aside = to
	return a, nil
}
