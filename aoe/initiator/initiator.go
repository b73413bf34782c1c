package initiator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"github.com/ramshelf/ramshelf/aoe"
)

// ErrAlign tells that an offset or a length is not whole sectors of 512 bytes, or a write lies outside of the target.
var ErrAlign = errors.New("not whole sectors within the target")

// maxRequests bounds the calls that are under way; further ones wait.
const maxRequests = 256

// Wire carries the frames of one interface; ether.Wire is one. Send is not called twice at a time, Receive neither.
type Wire interface {
	Name() string
	MAC() aoe.MAC
	MTU() int
	// Send sends the frames, in order, without waiting. Those that cannot be sent are lost. They are not kept.
	Send(frames []aoe.Frame) error
	// Receive waits for frames and calls take for each. A frame is valid during the call only. The error is os.ErrClosed after
	// Close, or one that will not pass.
	Receive(take func(frame []byte)) error
	Close() error
}

// Config is how a target is opened. Options.Interfaces and Seed come from the wires and from chance.
type Config struct {
	Options
	Log *slog.Logger // nil: the default one
}

// Initiator is an open target. All methods are safe for concurrent use. Calls wait for as long as the target does not answer,
// unless Options.DeadAfter ends that.
type Initiator struct {
	wires []Wire
	log   *slog.Logger
	began time.Time
	size  int64
	slots chan struct{} // maxRequests
	all   sync.WaitGroup

	mu      sync.Mutex // guards what follows
	m       *Machine
	fx      Effects
	frames  []aoe.Frame
	timer   *time.Timer
	timerAt time.Duration
	calls   map[*Request]chan struct{}
	closed  bool          // calls are refused
	stopped bool          // nothing happens any more
	changed chan struct{} // closed and made anew by every step that somebody may wait for
	broken  error         // of the wires
}

// Open finds the target and waits until a path to it is up. It owns the wires from then on, also when it fails.
func Open(ctx context.Context, wires []Wire, c Config) (*Initiator, error) {
	i := &Initiator{
		wires: wires, log: c.Log, began: time.Now(), slots: make(chan struct{}, maxRequests),
		calls: map[*Request]chan struct{}{}, changed: make(chan struct{}),
	}
	if i.log == nil {
		i.log = slog.Default()
	}
	c.Interfaces, c.Seed = nil, rand.Uint64()
	for _, w := range wires {
		c.Interfaces = append(c.Interfaces, Interface{Name: w.Name(), MAC: w.MAC(), MTU: w.MTU()})
	}
	i.m = NewMachine(c.Options)
	i.mu.Lock()
	i.timer = time.AfterFunc(0, i.tick)
	i.mu.Unlock()
	for n := range wires {
		i.all.Go(func() { i.receive(n) })
	}
	if err := i.find(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open AoE target %s: %w", c.Address, err), i.stop())
	}
	return i, nil
}

// find waits until the target can be used.
func (i *Initiator) find(ctx context.Context) error {
	for {
		i.mu.Lock()
		ready, broken, changed, status := i.m.Ready(), i.broken, i.changed, i.m.Status(i.now())
		i.mu.Unlock()
		switch {
		case ready:
			i.size = int64(status.Identity.Sectors) * aoe.SectorBytes
			return nil
		case broken != nil:
			return broken
		case status.State == StateRefused:
			return errors.New("another device has its address; see the log")
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%w; it is %s: is it exported, and reachable on %s?", ctx.Err(), status.State, i.names())
		}
	}
}

func (i *Initiator) names() (s string) {
	for n, w := range i.wires {
		if n > 0 {
			s += ", "
		}
		s += w.Name()
	}
	return s
}

func (i *Initiator) now() time.Duration { return time.Since(i.began) }

// step lets one event happen. i.mu is held.
func (i *Initiator) step(ev Event) { i.m.Step(i.now(), ev, &i.fx) }

// perform does what the steps asked for: first what is to be sent, for a call that is done takes its memory away. i.mu is held.
func (i *Initiator) perform() {
	for n, w := range i.wires {
		i.frames = i.frames[:0]
		for k := range i.fx.Send {
			if s := &i.fx.Send[k]; s.Interface == n {
				i.frames = append(i.frames, aoe.Frame{Head: s.Head(), Data: s.Data})
			}
		}
		if len(i.frames) == 0 {
			continue
		}
		if err := w.Send(i.frames); err != nil && !i.closed {
			i.breaks(err)
		}
	}
	clear(i.frames[:cap(i.frames)])
	for _, r := range i.fx.Done {
		close(i.calls[r])
		delete(i.calls, r)
	}
	for _, n := range i.fx.Notes {
		level := slog.LevelInfo
		if n.Bad {
			level = slog.LevelWarn
		}
		i.log.Log(context.Background(), level, n.Text)
	}
	if len(i.fx.Notes) > 0 || i.closed {
		close(i.changed)
		i.changed = make(chan struct{})
	}
	i.fx.Reset()
	if next := i.m.Next(); next != i.timerAt {
		i.timerAt = next
		i.timer.Reset(max(0, next-i.now()))
	}
}

// breaks notes that a wire is of no use any more.
func (i *Initiator) breaks(err error) {
	if i.broken == nil {
		i.broken = err
		i.log.Warn("an interface of a shelf failed", "error", err)
		close(i.changed)
		i.changed = make(chan struct{})
	}
}

func (i *Initiator) tick() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.stopped {
		return
	}
	i.timerAt = -1
	i.step(Event{Kind: EventTick})
	i.perform()
}

// receive takes what comes in on a wire, batch by batch.
func (i *Initiator) receive(n int) {
	for {
		locked := false
		err := i.wires[n].Receive(func(frame []byte) {
			if !locked {
				i.mu.Lock()
				locked = true
			}
			i.step(Event{Kind: EventFrame, Interface: n, Frame: frame})
		})
		if !locked {
			i.mu.Lock()
		}
		if !i.stopped {
			i.perform()
		}
		if err != nil && !errors.Is(err, os.ErrClosed) {
			i.breaks(err)
		}
		i.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// do runs a request to its end.
func (i *Initiator) do(r *Request) error {
	i.slots <- struct{}{}
	defer func() { <-i.slots }()
	done := make(chan struct{})
	i.mu.Lock()
	if i.closed {
		i.mu.Unlock()
		return ErrClosed
	}
	i.calls[r] = done
	i.step(Event{Kind: EventSubmit, Request: r})
	i.perform()
	i.mu.Unlock()
	<-done
	return r.Err
}

// Size is that of the target in bytes.
func (i *Initiator) Size() int64 { return i.size }

// ReadAt reads whole sectors. io.EOF where p goes beyond the end; ErrAlign, ErrRefused, ErrDead, ErrClosed.
func (i *Initiator) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off%aoe.SectorBytes != 0 || len(p)%aoe.SectorBytes != 0 {
		return 0, fmt.Errorf("read %d bytes at %d of AoE target %s: %w", len(p), off, i.m.o.Address, ErrAlign)
	}
	n := int(min(int64(len(p)), max(0, i.size-off)))
	if n > 0 {
		if err := i.do(&Request{Op: Read, LBA: uint64(off) / aoe.SectorBytes, Data: p[:n]}); err != nil {
			return 0, fmt.Errorf("read %d bytes at %d of AoE target %s: %w", n, off, i.m.o.Address, err)
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt writes whole sectors. It returns when the target has answered; what that is worth, Status says. Writes that overlap and
// run at the same time leave each sector as one of them wrote it. After an error any sector may have either content, and
// may still change for one Quarantine, in which further writes to it wait. ErrAlign, ErrRefused, ErrDead, ErrClosed.
func (i *Initiator) WriteAt(p []byte, off int64) (int, error) {
	err := error(nil)
	switch {
	case off < 0 || off%aoe.SectorBytes != 0 || len(p)%aoe.SectorBytes != 0 || off > i.size || int64(len(p)) > i.size-off:
		err = ErrAlign
	case len(p) > 0:
		err = i.do(&Request{Op: Write, LBA: uint64(off) / aoe.SectorBytes, Data: p})
	}
	if err != nil {
		return 0, fmt.Errorf("write %d bytes at %d of AoE target %s: %w", len(p), off, i.m.o.Address, err)
	}
	return len(p), nil
}

// Sync flushes the target, if it says that it can. After an error nothing written since the last good Sync may be relied on: it must be
// written again. ErrRestarted is told once. A target that lost its power and came back while nothing was asked of it, and without
// announcing itself, goes unnoticed: the protocol has no sessions.
func (i *Initiator) Sync() error {
	if err := i.do(&Request{Op: Flush}); err != nil {
		return fmt.Errorf("flush AoE target %s: %w", i.m.o.Address, err)
	}
	return nil
}

// Status is the status of now.
func (i *Initiator) Status() Status {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.m.Status(i.now())
}

// Close ends all calls with ErrClosed, and waits until no copy of a write is on its way any more, for one Quarantine at most: who
// opens the target after that may say Clean. A second call does nothing.
func (i *Initiator) Close() error {
	i.mu.Lock()
	if i.closed {
		i.mu.Unlock()
		return nil
	}
	i.closed = true
	i.step(Event{Kind: EventStop})
	i.perform()
	for limit := i.now() + i.m.o.Quarantine; i.m.Fenced() && i.now() < limit; {
		changed := i.changed
		i.mu.Unlock()
		select {
		case <-changed:
		case <-time.After(limit - i.now()):
		}
		i.mu.Lock()
	}
	i.mu.Unlock()
	return i.stop()
}

// stop ends the goroutines and closes the wires.
func (i *Initiator) stop() error {
	i.mu.Lock()
	i.closed, i.stopped = true, true
	i.timer.Stop()
	i.mu.Unlock()
	err := error(nil)
	for _, w := range i.wires {
		err = errors.Join(err, w.Close())
	}
	i.all.Wait()
	if err != nil {
		return fmt.Errorf("close AoE target %s: %w", i.m.o.Address, err)
	}
	return nil
}
