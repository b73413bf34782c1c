package flush

import (
	"errors"
	"time"
)

// runDirect takes one seal after another and brings each home, which commits it: there is no journal.
func (f *Flusher) runDirect() {
	timer := time.NewTimer(f.o.Staleness)
	defer timer.Stop()
	sealed := time.Now()
	moved := false
	for {
		// A Source that stays pressed although a seal found nothing dirty is not asked again at once.
		if !moved || !f.src.PressedToCommit() {
			timer.Reset(max(0, f.o.Staleness-time.Since(sealed)))
			select {
			case <-f.stop:
			case <-f.wake:
			case <-timer.C:
			}
		}
		if f.stopping() {
			return
		}
		unsignal(f.wake) // the seal that follows fulfills a wish made until here
		sealed = time.Now()
		f.waiting.seal()
		seal, dirtyBytes, _ := f.src.Seal()
		f.counters.seals.Add(1)
		f.src.Sweep()
		if f.intents != nil {
			f.intents.seal = seal
		}
		m, ok := f.bringHome()
		if !ok {
			return
		}
		moved = m || dirtyBytes > 0
		f.counters.committed(seal, time.Since(sealed))
		f.src.Committed(seal)
		f.waiting.commit()
		f.waiting.sweep()
		f.waiting.home()
	}
}

func unsignal(c chan struct{}) {
	select {
	case <-c:
	default:
	}
}

// runHome brings home what is committed, when memory or journal get short, when somebody waits for it, and otherwise once
// in SweepAfter. What was committed before a sweep began is not needed in the journal after it.
func (f *Flusher) runHome() {
	c := f.commits
	timer := time.NewTimer(f.o.SweepAfter)
	defer timer.Stop()
	swept := time.Now()
	moved := false
	for {
		if !moved || !c.src.PressedHome() && !f.waiting.wantsHome() {
			timer.Reset(max(0, f.o.SweepAfter-time.Since(swept)))
			due := false
			select {
			case <-f.stop:
			case <-c.wakeHome:
			case <-timer.C:
				due = true
			}
			if !f.stopping() && !due && !c.src.PressedHome() && !f.waiting.wantsHome() {
				continue
			}
		}
		if f.stopping() {
			return
		}
		unsignal(c.wakeHome)
		f.waiting.sweep()
		mark := c.mark.Load()
		if planted("tail-early") {
			c.advance(mark)
		}
		moved = f.src.Sweep()
		swept = time.Now()
		if moved || f.intents != nil { // before the tail passes what is lost, and does not go home, its region is kept too
			if _, ok := f.bringHome(); !ok {
				return
			}
		}
		moved = c.advance(mark) || moved
		f.waiting.home()
	}
}

// bringHome goes over the sweep until all of it is home and synced, however many attempts that takes. It reports whether there
// was anything to do; ok is false when Stop ended it early.
func (f *Flusher) bringHome() (moved, ok bool) {
	backoff := f.o.Backoff
	for attempt := 1; ; attempt++ {
		m, err := f.pass()
		moved = moved || m
		if err == nil {
			f.health.attemptDone(&f.homeLane.progress)
			return moved, true
		}
		f.src.Again()
		if !f.failed(&f.homeLane.progress, attempt, err, &backoff) {
			return moved, false
		}
	}
}

// failed deals with an attempt that failed: it tells who must know, and waits. It reports false when the flusher stops.
func (f *Flusher) failed(p *progress, attempt int, err error, backoff *time.Duration) bool {
	if errors.Is(err, ErrStopped) {
		return false
	}
	f.health.attemptFailed(p, attempt, err)
	if attempt >= f.o.FailAfter {
		commit := f.commits == nil || p == &f.commits.lane.progress
		if commit { // what waits for a commit does not care for the way home
			f.src.Failed(err)
		}
		f.waiting.fail(err, commit)
	}
	ok := f.pause(*backoff)
	*backoff = min(2**backoff, f.o.MaxBackoff)
	return ok
}

// pause waits for d. It reports false when the flusher stops meanwhile.
func (f *Flusher) pause(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-f.stop:
		return false
	}
}
