package flush

import (
	"context"
	"errors"
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
//	any ─► failed  an attempt to commit or to bring something home has failed, or nothing has completed for GiveUpAfter
//	failed ─► ok   attempts succeed again
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

// progress is what one lane has in flight. begin, end and completed are called around every operation.
type progress struct {
	base        time.Time    // at is nanoseconds since base, on the monotonic clock
	outstanding atomic.Int32 // operations in flight
	at          atomic.Int64 // time of the last completion, or of the first start after none was in flight
	attempts    atomic.Int64 // consecutive failed attempts
}

func (p *progress) begin() {
	if p.outstanding.Add(1) == 1 {
		p.completed()
	}
}

func (p *progress) completed() { p.at.Store(int64(time.Since(p.base))) }

func (p *progress) end() {
	p.completed()
	p.outstanding.Add(-1)
}

// stalled is how long nothing has completed although an operation is in flight.
func (p *progress) stalled() time.Duration {
	if p.outstanding.Load() == 0 {
		return 0
	}
	return time.Since(p.base) - time.Duration(p.at.Load())
}

// health keeps the state of the backing: that of the lane that is worst off.
type health struct {
	f     *Flusher
	lanes []*progress

	state atomic.Uint32         // State
	err   atomic.Pointer[error] // last error, nil in StateOK and StateSlow
	hung  bool                  // the source refuses writes; belongs to runWatch
	mu    sync.Mutex            // held by become, so that changes are logged and emitted in order
}

func (h *health) stalled() (longest time.Duration) {
	for _, p := range h.lanes {
		longest = max(longest, p.stalled())
	}
	return longest
}

func (h *health) attempts() (most int64) {
	for _, p := range h.lanes {
		most = max(most, p.attempts.Load())
	}
	return most
}

// errHung: the backing does nothing any more.
var errHung = errors.New("no operation of the backing has ended for a long time")

// runWatch looks whether operations complete. It only looks: an operation that hangs is never given up,
// since a second one for its range could be overtaken by it. But nobody is left waiting for it for ever.
func (h *health) runWatch() {
	o := &h.f.o
	ticker := time.NewTicker(max(min(o.SlowAfter, o.GiveUpAfter)/4, time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-h.f.stop:
			return
		case <-ticker.C:
		}
		stalled := h.stalled()
		if stalled >= o.GiveUpAfter {
			h.become(func(State) State { return StateFailed }, errHung)
			h.hung = true
			h.f.src.Refuse(true)
			h.f.src.Failed(errHung)
			h.f.waiting.fail(errHung)
			continue
		}
		if h.hung {
			h.hung = false
			h.f.src.Refuse(false)
			h.settle()
		}
		h.become(func(now State) State {
			switch {
			case now == StateOK && stalled >= o.SlowAfter:
				return StateSlow
			case now == StateSlow && stalled < o.SlowAfter:
				return StateOK
			}
			return now
		}, nil)
	}
}

func (h *health) attemptFailed(p *progress, attempts int, err error) {
	p.attempts.Store(int64(attempts))
	h.become(func(State) State { return StateFailed }, err)
}

func (h *health) attemptDone(p *progress) {
	p.attempts.Store(0)
	h.settle()
}

// settle makes the state ok where no lane fails.
func (h *health) settle() {
	h.become(func(now State) State {
		if h.attempts() > 0 || h.stalled() >= h.f.o.GiveUpAfter {
			return now
		}
		return StateOK
	}, nil)
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
	if h.f.o.Event != nil {
		h.f.o.Event(Event{From: from, To: to, Err: err})
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
	h.f.o.Log.LogAttrs(context.Background(), level, "backing changed state", attrs...)
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

	LastCommit                                  time.Duration // from the last committed seal to its end
	JournalBytes                                uint64        // written into the journal, headers included
	JournalUsedBytes                            int64         // of the ring
	JournalSizeBytes                            int64
	CommitBytesPerSecond, SlowestBytesPerSecond float64 // median and first percentile of the last large commits; 0: there was none
	SweepBytesPerSecond                         float64 // of the last pass that wrote something, syncs included
}

// Status returns the counters and the state. It waits for nothing.
func (f *Flusher) Status() Status {
	c, h := &f.counters, &f.health
	s := Status{
		State:               State(h.state.Load()),
		FailedAttempts:      int(h.attempts()),
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
	if j := f.commits; j != nil {
		st := j.state()
		s.JournalBytes = j.lane.bytes.Load()
		s.JournalUsedBytes = int64(st.Head-st.Tail) * BlockBytes
		s.JournalSizeBytes = int64(j.ring.Blocks()) * BlockBytes
		s.CommitBytesPerSecond, s.SlowestBytesPerSecond = j.rate.median(), j.rate.lowest()
	}
	return s
}

// waiting lets callers of Flush and Commit wait for a seal that was taken after they came. Callers are numbered; a seal
// covers all that came before it.
type waiting struct {
	mu        sync.Mutex // protects all of it
	came      uint64     // number of the last caller
	wants     uint64     // of the last caller who waits for the way home
	sealed    uint64     // callers up to here are covered by the seal being committed
	committed uint64     // callers up to here are covered by a committed seal
	sweeping  uint64     // by the sweep under way
	done      uint64     // by one that ended
	failures  uint64     // attempts that failed for good
	err       error      // the last of them
	ended     error      // not nil: nobody will be answered any more
	changed   chan struct{}
}

// wait waits until what was published before is committed, or home.
func (w *waiting) wait(ctx context.Context, wake func(), commit bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.came++
	me, failures := w.came, w.failures
	reached := &w.committed
	if !commit {
		w.wants, reached = me, &w.done
	}
	for first := true; ; first = false {
		switch {
		case *reached >= me:
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
		if *reached < me && ctx.Err() != nil {
			return fmt.Errorf("wait for flush: %w", context.Cause(ctx))
		}
	}
}

// wantsHome reports whether somebody waits for the way home of what is committed.
func (w *waiting) wantsHome() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return min(w.wants, w.committed) > w.done
}

// seal is called before a seal is taken.
func (w *waiting) seal() { w.update(func() { w.sealed = w.came }) }

func (w *waiting) commit() { w.update(func() { w.committed = w.sealed }) }

// sweep is called before a sweep begins.
func (w *waiting) sweep() { w.update(func() { w.sweeping = w.committed }) }

func (w *waiting) home() { w.update(func() { w.done = w.sweeping }) }

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
