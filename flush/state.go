package flush

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// State is the condition of the backing as the flusher finds it:
//
//	ok ──► slow    an operation is in flight and none has completed for SlowAfter
//	slow ─► ok     one has completed
//	any ─► failed  an attempt to bring a seal home has failed
//	failed ─► ok   an attempt has succeeded
type State uint8

// The states of a backing.
const (
	StateOK State = iota
	StateSlow
	StateFailed
)

// String is the state's word in status, logs and metrics.
func (s State) String() string {
	switch s {
	case StateOK:
		return "ok"
	case StateSlow:
		return "slow"
	case StateFailed:
		return "failed"
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// Event is a change of state.
type Event struct {
	From, To State
	Err      error // why, when To is StateFailed
}

// health keeps the state of the backing. begin, end and progressed are called around every operation.
type health struct {
	o       *Options
	base    time.Time // times below are nanoseconds since base, on the monotonic clock
	stopped chan struct{}

	outstanding atomic.Int32 // operations in flight
	progress    atomic.Int64 // time of the last completion, or of the first start after none was in flight

	state    atomic.Uint32         // State
	err      atomic.Pointer[error] // last error, nil in StateOK and StateSlow
	attempts atomic.Int64          // consecutive failed attempts
	mu       sync.Mutex            // held by become, so that changes are logged and emitted in order
}

func (h *health) init(f *Flusher) {
	h.o = &f.o
	h.base = time.Now()
	h.stopped = make(chan struct{})
}

func (h *health) close() { close(h.stopped) }

func (h *health) begin() {
	if h.outstanding.Add(1) == 1 {
		h.progressed()
	}
}

func (h *health) progressed() { h.progress.Store(int64(time.Since(h.base))) }

func (h *health) end() {
	h.progressed()
	h.outstanding.Add(-1)
}

// stalled is how long nothing has completed although an operation is in flight.
func (h *health) stalled() time.Duration {
	if h.outstanding.Load() == 0 {
		return 0
	}
	return time.Since(h.base) - time.Duration(h.progress.Load())
}

// runWatch looks whether operations complete. It only looks: an operation that hangs is never given up,
// since a second one for its range could be overtaken by it.
func (h *health) runWatch() {
	ticker := time.NewTicker(max(h.o.SlowAfter/4, time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-h.stopped:
			return
		case <-ticker.C:
		}
		slow := h.stalled() >= h.o.SlowAfter
		h.become(func(now State) State {
			switch {
			case now == StateOK && slow:
				return StateSlow
			case now == StateSlow && !slow:
				return StateOK
			}
			return now
		}, nil)
	}
}

func (h *health) attemptFailed(attempts int, err error) {
	h.attempts.Store(int64(attempts))
	h.become(func(State) State { return StateFailed }, err)
}

func (h *health) attemptDone() {
	h.attempts.Store(0)
	h.become(func(State) State { return StateOK }, nil)
}

// become is the one place where the state changes: to what next makes of it. It logs and emits the change.
func (h *health) become(next func(State) State, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	from := State(h.state.Load())
	to := next(from)
	if to == StateFailed && err != nil {
		h.err.Store(&err)
	}
	if to == from {
		return
	}
	if to != StateFailed {
		h.err.Store(nil)
	}
	h.state.Store(uint32(to))
	h.log(from, to, err)
	if h.o.Event != nil {
		h.o.Event(Event{From: from, To: to, Err: err})
	}
}

func (h *health) log(from, to State, err error) {
	level, attrs := slog.LevelInfo, []slog.Attr{slog.String("state", to.String()), slog.String("from", from.String())}
	switch to {
	case StateSlow:
		level = slog.LevelWarn
		attrs = append(attrs, slog.Duration("stalled", h.stalled()))
	case StateFailed:
		level = slog.LevelError
		attrs = append(attrs, slog.Any("err", err))
	}
	h.o.Log.LogAttrs(context.Background(), level, "backing changed state", attrs...)
}

// counters are updated without locks and read at any time.
type counters struct {
	seals, writes, writtenBytes, bridgedBytes, zeroedBytes, filledBlocks, syncs, errors atomic.Uint64

	committedSeal atomic.Uint64
	commitNanos   atomic.Int64
	sweepRate     atomic.Uint64 // float64 bits
}

func (c *counters) committed(seal uint64, d time.Duration) {
	c.committedSeal.Store(seal)
	c.commitNanos.Store(int64(d))
}

// swept notes the speed of a pass. Passes too short to tell leave the last figure.
func (c *counters) swept(bytes uint64, d time.Duration) {
	if bytes > 0 && d > 0 {
		c.sweepRate.Store(math.Float64bits(float64(bytes) / d.Seconds()))
	}
}

// failure counts err, if any, and says which operation it is of.
func (c *counters) failure(err error, verb string, off, n int64) error {
	if err == nil {
		return nil
	}
	c.errors.Add(1)
	return fmt.Errorf("%s %d bytes at %d of backing: %w", verb, n, off, err)
}

// Status is the flusher at an instant. Counters begin at 0 with the process.
type Status struct {
	State          State
	Err            error         // why the last attempt failed, in StateFailed
	FailedAttempts int           // consecutive
	Stalled        time.Duration // how long nothing has completed although something is in flight

	Seals         uint64 // seals taken
	CommittedSeal uint64 // the last one that is home and synced
	Writes        uint64 // write operations, those of zeroes not counted
	WrittenBytes  uint64 // by writes that succeeded
	BridgedBytes  uint64 // the part of them that was clean, planned between dirty runs
	ZeroedBytes   uint64
	FilledBlocks  uint64 // blocks read from home to be completed
	Syncs         uint64
	Errors        uint64 // failed operations

	LastCommit          time.Duration // from the last committed seal to its end
	SweepBytesPerSecond float64       // of the last pass that wrote something, syncs included
}

// Status returns the counters and the state. It takes no lock.
func (f *Flusher) Status() Status {
	c, h := &f.counters, &f.health
	s := Status{
		State:               State(h.state.Load()),
		FailedAttempts:      int(h.attempts.Load()),
		Stalled:             h.stalled(),
		Seals:               c.seals.Load(),
		CommittedSeal:       c.committedSeal.Load(),
		Writes:              c.writes.Load(),
		WrittenBytes:        c.writtenBytes.Load(),
		BridgedBytes:        c.bridgedBytes.Load(),
		ZeroedBytes:         c.zeroedBytes.Load(),
		FilledBlocks:        c.filledBlocks.Load(),
		Syncs:               c.syncs.Load(),
		Errors:              c.errors.Load(),
		LastCommit:          time.Duration(c.commitNanos.Load()),
		SweepBytesPerSecond: math.Float64frombits(c.sweepRate.Load()),
	}
	if err := h.err.Load(); err != nil {
		s.Err = *err
	}
	return s
}

// waiting lets callers of Flush wait for a seal that was taken after they came. Callers are numbered; a seal
// covers all that came before it.
type waiting struct {
	mu       sync.Mutex // protects all of it
	came     uint64     // number of the last caller
	sealed   uint64     // callers up to here are covered by the seal being brought home
	done     uint64     // callers up to here are answered
	failures uint64     // attempts that failed for good
	err      error      // the last of them
	ended    error      // not nil: nobody will be answered any more
	changed  chan struct{}
}

func (w *waiting) wait(ctx context.Context, wake func()) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.came++
	me, failures := w.came, w.failures
	for first := true; ; first = false {
		switch {
		case w.done >= me:
			return nil
		case w.failures > failures:
			return w.err
		case w.ended != nil:
			return w.ended
		}
		if w.changed == nil {
			w.changed = make(chan struct{})
		}
		changed := w.changed
		w.mu.Unlock()
		if first {
			wake()
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
		w.mu.Lock()
		if w.done < me && ctx.Err() != nil {
			return fmt.Errorf("wait for flush: %w", context.Cause(ctx))
		}
	}
}

// seal is called before a seal is taken.
func (w *waiting) seal() { w.update(func() { w.sealed = w.came }) }

func (w *waiting) commit() { w.update(func() { w.done = w.sealed }) }

func (w *waiting) fail(err error) { w.update(func() { w.failures++; w.err = err }) }

func (w *waiting) finish(err error) { w.update(func() { w.ended = err }) }

// update changes something and lets the callers look at it.
func (w *waiting) update(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	if w.changed != nil {
		close(w.changed)
		w.changed = nil
	}
}
