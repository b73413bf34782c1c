package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush/home"
	"github.com/ramshelf/ramshelf/flush/journal"
	"github.com/ramshelf/ramshelf/nbd"
)

// backing is where the content of a volume is kept.
type backing interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	Size() int64
	Close() error
}

// extentMapper is a backing that knows its holes.
type extentMapper interface {
	Extents(off, n int64, fn func(off, n int64, flags uint32) bool) error
}

// backingConnections is how many connections a backing over NBD has, where its server can share one export among several.
const backingConnections = 4

// openBacking opens and locks the backing of v. A missing file is made if v says how large it shall be.
func openBacking(ctx context.Context, v *config.Volume, log *slog.Logger) (backing, error) {
	if v.Backing.Kind == config.BackingNBD {
		c, err := nbd.Dial(ctx, v.Backing.URI, nbd.ClientOptions{Connections: backingConnections, Log: log})
		if err != nil {
			return nil, fmt.Errorf("open backing %s: %w", v.Backing, err)
		}
		return c, nil
	}
	o := home.Options{Direct: true}
	if v.Backing.Kind == config.BackingFile && v.Size > 0 {
		o.CreateBytes = journal.CreateBytes(int64(v.Size))
	}
	f, err := home.Open(v.Backing.Path, o)
	if errors.Is(err, home.ErrBusy) {
		return nil, control.Refused(err, "stop the daemon that serves it, or unmount it")
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// undo takes back that the backing was made, and closes it.
func undo(b backing) error {
	if f, ok := b.(*home.File); ok && f.Created() {
		return f.Discard()
	}
	return b.Close()
}

// durability says what a sync of the backing is worth.
func durability(b backing) string {
	switch b := b.(type) {
	case *home.File:
		if b.Direct() {
			return "synced, O_DIRECT"
		}
		return "synced, through the page cache"
	case *nbd.Client:
		if b.CanFlush() {
			return "flushed by the server"
		}
		return "server acknowledges without flush"
	}
	return ""
}
