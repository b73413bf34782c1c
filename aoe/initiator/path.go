package initiator

import (
	"slices"
	"time"

	"github.com/ramshelf/ramshelf/aoe"
)

// Times of a path.
const (
	minTimeout   = 5 * time.Millisecond
	maxTimeout   = 400 * time.Millisecond
	firstTimeout = 200 * time.Millisecond // before anything was measured

	// silentStrikes time-outs in a row, over at least silentAfter, make a path silent.
	silentStrikes = 3
	silentAfter   = 200 * time.Millisecond
	// restartAfter is how long a silence must be for the target's host to have restarted in it.
	restartAfter = time.Second

	// minReorder later answers make a copy count as lost; it grows where answers overtake one another, up to maxReorder.
	minReorder = 3
	maxReorder = 64
)

// pathState is what a path is good for.
//
//	asking ──IDENTIFY answered──► probing ──size found──► up
//	   ▲ └──another identity──► refused      │             │
//	   └──────────no answer──────────────────┴─────────────┘
type pathState uint8

const (
	pathAsking  pathState = iota // IDENTIFY is sent again and again
	pathProbing                  // frames of some size are
	pathUp                       // I/O is
	pathRefused                  // nothing is: it leads to another device
)

var pathStates = [...]string{"not answering", "probing", "up", "another device"}

// path is one way to the target: an interface and a MAC that told us a configuration.
type path struct {
	iface   int
	mac     aoe.MAC
	buffers int // that the target holds
	promise int // sectors per frame that interface and target promise
	sectors int // that were seen to arrive

	state   pathState
	askAt   time.Duration // of the next question
	asked   int           // how often the present one was sent
	probe   int           // sectors of the question, while probing
	told    bool          // that it leads to another device
	suspect bool          // a frame was lost again and again: its size may be the reason

	flight []*transmission // in the order in which they were sent
	window float64         // frames that may be in flight
	thresh float64         // below it the window grows by the frame, above by the round trip
	before float64         // the window before that, 0 once it was taken back
	halved time.Duration   // when the window was halved last: what was sent before tells nothing new

	measured       bool
	rtt, deviation time.Duration
	reorder        int

	strikes int
	quiet   bool          // something was sent and nothing answered since
	since   time.Duration // when quiet began
}

// timeout is how long to wait for the answer to a copy, when as many were sent before.
func (p *path) timeout(copies int) time.Duration {
	if !p.measured {
		return firstTimeout
	}
	t := min(max(p.rtt+4*p.deviation, minTimeout), maxTimeout)
	return min(t<<min(copies, 8), maxTimeout)
}

// sent counts a copy.
func (p *path) sent(tx *transmission) {
	p.flight = append(p.flight, tx)
	if !p.quiet {
		p.quiet, p.since = true, tx.sent
	}
}

// heard notes an answer of any kind.
func (p *path) heard(now time.Duration) {
	p.strikes = 0
	p.quiet, p.since = len(p.flight) > 0, now
}

// measure takes a round trip (Jacobson and Karels 1988). Tags are never used twice, so that each answer belongs to one copy.
func (p *path) measure(d time.Duration) {
	if !p.measured {
		p.measured, p.rtt, p.deviation = true, d, d/2
		return
	}
	off := d - p.rtt
	p.rtt += off / 8
	p.deviation += (max(off, -off) - p.deviation) / 4
}

// answered takes a copy out of flight, lets the window grow up to limit, and returns those that it has passed and that are taken for
// lost, out of flight as well.
func (p *path) answered(tx *transmission, now time.Duration, limit int) (lost []*transmission) {
	if tx.sectors > 0 { // the time of a FLUSH tells nothing of the next READ
		p.measure(now - tx.sent)
	}
	i := slices.Index(p.flight, tx)
	kept := p.flight[:0]
	for k, other := range p.flight {
		switch {
		case k == i:
			continue
		case k < i && other.sectors > 0:
			if other.passed++; other.passed >= p.reorder && now-other.sent > p.rtt {
				lost = append(lost, other)
				continue
			}
		}
		kept = append(kept, other)
	}
	clear(p.flight[len(kept):])
	p.flight = kept
	if p.window < p.thresh {
		p.window++
	} else {
		p.window += 1 / p.window
	}
	p.window = min(p.window, float64(limit))
	for _, l := range lost {
		p.congested(l, now)
	}
	p.quiet = len(p.flight) > 0
	return lost
}

// congested halves the window, once for all copies that were in flight at the same time.
func (p *path) congested(tx *transmission, now time.Duration) {
	if tx.sent < p.halved {
		return
	}
	p.before = p.window
	p.window = max(p.window/2, 1)
	p.thresh, p.halved = p.window, now
}

// late takes the answer to a copy that was given up, wrongly so: it was only slow, or overtaken.
func (p *path) late(tx *transmission, now time.Duration) {
	if tx.early {
		p.reorder = min(2*p.reorder, maxReorder)
	} else if tx.sectors > 0 {
		p.measure(now - tx.sent)
	}
	p.window, p.thresh = max(p.window, p.before), max(p.thresh, p.before)
	p.before = 0
}

// next is when the path needs a tick.
func (p *path) next() time.Duration {
	switch p.state {
	case pathAsking, pathProbing:
		return p.askAt
	case pathRefused:
		return deadlineNever
	}
	next := deadlineNever
	for _, tx := range p.flight {
		next = min(next, tx.deadline)
	}
	return next
}

// windowOf is how many frames may be in flight on a path: paths to one MAC share its buffers.
func (m *Machine) windowOf(p *path) int {
	sharers := 0
	for _, other := range m.paths {
		if other.mac == p.mac && other.state == pathUp {
			sharers++
		}
	}
	return max(1, min(m.o.Window, p.buffers/max(sharers, 1)))
}

// choose is the path for a frame, nil if none has room. The first repetition stays on its path, whose order is kept; later ones
// go elsewhere if they can. Otherwise it is the path on which the frame should be answered first.
func (m *Machine) choose(f *fragment) *path {
	if len(m.late) >= maxLate {
		return nil
	}
	best := (*path)(nil)
	cost := 0.0
	for _, p := range m.paths {
		if p.state != pathUp || len(p.flight) >= max(1, min(int(p.window), m.windowOf(p))) {
			continue
		}
		c := float64(max(p.rtt, time.Microsecond)) * float64(len(p.flight)+1) / p.window
		if f != nil && f.path != nil && (f.copies == 1) == (p == f.path) {
			return p
		}
		if best == nil || c < cost {
			best, cost = p, c
		}
	}
	return best
}

// tickPath gives up what is overdue, and asks.
func (m *Machine) tickPath(p *path) {
	switch p.state {
	case pathAsking, pathProbing:
		if m.now >= p.askAt {
			m.ask(p)
		}
	case pathUp:
		m.timeouts(p)
	}
}

// timeouts gives up the copies whose time is over.
func (m *Machine) timeouts(p *path) {
	overdue := 0
	kept := p.flight[:0]
	for _, tx := range p.flight {
		if tx.deadline > m.now {
			kept = append(kept, tx)
			continue
		}
		overdue++
		m.counters.Timeouts++
		p.congested(tx, m.now)
		p.suspect = p.suspect || !tx.of.done && tx.of.copies >= suspectCopies && tx.sectors > 1
		m.giveUp(tx)
	}
	clear(p.flight[len(kept):])
	p.flight = kept
	if overdue == 0 {
		return
	}
	p.strikes++
	switch silence := m.now - p.since; {
	case p.strikes >= silentStrikes && silence >= silentAfter:
		m.note(true, "shelf %s: no answer from %s on %s for %s", m.o.Address, p.mac, m.o.Interfaces[p.iface].Name, silence.Round(time.Millisecond))
		m.silence(p)
	case p.suspect:
		m.silence(p)
	}
}

// suspectCopies lost in a row make one wonder whether frames of that size arrive at all.
const suspectCopies = 6

// silence takes a path out of use until it answers IDENTIFY again. What is in flight on it is given up.
func (m *Machine) silence(p *path) {
	for _, tx := range p.flight {
		m.giveUp(tx)
	}
	clear(p.flight)
	p.flight = p.flight[:0]
	p.state, p.askAt, p.asked, p.suspect = pathAsking, m.now, 0, false
}
