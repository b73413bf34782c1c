package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/ramshelf/ramshelf/aoe"
	"github.com/ramshelf/ramshelf/aoe/ether"
	"github.com/ramshelf/ramshelf/aoe/initiator"
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

// backingTimeout is how long a server may take for one request before its connections are cut and the request is sent again.
const backingTimeout = 30 * time.Second

// openBacking opens and locks the backing of v. A missing file is made if v says how large it shall be.
func openBacking(ctx context.Context, v *config.Volume, log *slog.Logger) (backing, error) {
	create := int64(0)
	if v.Size > 0 {
		switch v.Journal.Kind {
		case config.JournalNone:
			create = journal.CreateBytes(int64(v.Size), 0)
		case config.JournalBacking:
			create = int64(v.Size)
		default:
			create = journal.CreateBytes(int64(v.Size), ringBytes(v))
		}
	}
	return openAt(ctx, v.Backing, "backing", v.Journal.Kind == config.JournalBacking, create, log)
}

// openJournal opens and locks the backing of the journal of v, whose content lies on data. A missing file is made.
func openJournal(ctx context.Context, v *config.Volume, data backing, log *slog.Logger) (backing, error) {
	volume := int64(v.Size)
	if volume == 0 {
		volume = data.Size()
	}
	return openAt(ctx, v.Journal.Backing, "journal", false, journal.ExternalBytes(volume, ringBytes(v)), log)
}

// openAt opens and locks b; what names it in errors. A missing file is made of createBytes, unless that is 0. Of a backing whose
// state is not told by its own superblock, unclean says that it may not have been stopped cleanly.
func openAt(ctx context.Context, b config.Backing, what string, unclean bool, createBytes int64, log *slog.Logger) (backing, error) {
	if b.Kind == config.BackingNBD {
		c, err := dialBacking(ctx, b.URI, unclean, log)
		if err != nil {
			return nil, fmt.Errorf("open %s %s: %w", what, b, err)
		}
		return c, nil
	}
	if b.Kind == config.BackingAoE {
		return openShelf(ctx, b.AoE, unclean, log)
	}
	if b.Kind != config.BackingFile {
		createBytes = 0
	}
	f, err := home.Open(b.Path, home.Options{Direct: true, CreateBytes: createBytes})
	if errors.Is(err, home.ErrBusy) {
		return nil, control.Refused(err, "stop the daemon that serves it, or unmount it")
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// dialBacking connects to a backing over NBD. Where the volume was not stopped cleanly, writes of the process before may still be
// on their way to the server: the first write then waits until they cannot land any more. A backing whose metadata lie elsewhere
// does not tell: for it unclean says that they may be.
func dialBacking(ctx context.Context, uri string, unclean bool, log *slog.Logger) (*nbd.Client, error) {
	probe, err := nbd.Dial(ctx, uri, nbd.ClientOptions{Timeout: backingTimeout, Log: log})
	if err != nil {
		return nil, err
	}
	clean := stoppedCleanly(probe, unclean)
	if err := probe.Close(); err != nil {
		return nil, err
	}
	o := nbd.ClientOptions{Connections: backingConnections, Timeout: backingTimeout, Unclean: !clean, Log: log}
	_, _ = rand.Read(o.Session[:]) // never fails (crypto/rand)
	return nbd.Dial(ctx, uri, o)
}

// stoppedCleanly reports whether who wrote to the backing before has waited for all of its writes. One whose metadata lie elsewhere
// does not tell: for it unclean says that they may not have been waited for.
func stoppedCleanly(b backing, unclean bool) bool {
	s, err := journal.Load(b, journal.AreaOffset(b.Size()))
	return !unclean && (errors.Is(err, journal.ErrNoMagic) || err == nil && s.Clean)
}

// openShelf finds an AoE target. As over NBD, the first write waits where the writes of the process before may still be on their way.
func openShelf(ctx context.Context, target string, unclean bool, log *slog.Logger) (backing, error) {
	endpoint, err := aoe.ParseEndpoint(target)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, backingTimeout)
	defer cancel()
	quiet := slog.New(slog.DiscardHandler)
	probe, err := discover(ctx, endpoint, initiator.Options{}, quiet)
	if err != nil {
		return nil, err
	}
	o := initiator.Options{Clean: stoppedCleanly(probe, unclean)}
	identity := probe.Status().Identity
	o.Identity = &identity
	if err := probe.Close(); err != nil {
		return nil, err
	}
	return discover(ctx, endpoint, o, log)
}

// discover opens the interfaces and finds the target on them.
func discover(ctx context.Context, e aoe.Endpoint, o initiator.Options, log *slog.Logger) (*initiator.Initiator, error) {
	var wires []initiator.Wire
	for _, name := range e.Interfaces {
		w, err := ether.Open(name, ether.Options{Responses: true})
		if err != nil {
			for _, w := range wires {
				err = errors.Join(err, w.Close())
			}
			return nil, fmt.Errorf("open backing aoe:%s: %w", e, err)
		}
		wires = append(wires, w)
	}
	o.Address = e.Address
	i, err := initiator.Open(ctx, wires, initiator.Config{Options: o, Log: log})
	if err != nil {
		return nil, fmt.Errorf("open backing aoe:%s: %w", e, err)
	}
	return i, nil
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
	case *initiator.Initiator:
		return b.Status().Durability
	}
	return ""
}
