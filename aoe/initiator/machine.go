package initiator

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"time"

	"github.com/ramshelf/ramshelf/aoe"
)

// Errors of requests. They come wrapped.
var (
	// ErrDead: the target has answered nothing for Options.DeadAfter.
	ErrDead = errors.New("the target does not answer")
	// ErrRefused: the target answered that the command failed.
	ErrRefused = errors.New("the target refused")
	// ErrRestarted: the target may have restarted since the last Sync, and may have lost what it had answered. Everything written
	// since then must be written again.
	ErrRestarted = errors.New("the target may have restarted since the last sync")
	// ErrClosed: the initiator was closed.
	ErrClosed = errors.New("the initiator is closed")
)

// Bounds of the machine.
const (
	// maxPaths bounds the pairs of interface and target MAC.
	maxPaths = 16
	// maxLate bounds the copies that were given up and may still arrive; with that many nothing more is sent.
	maxLate = 1 << 16
	// maxHolds bounds the ranges that are fenced; with that many no further write is sent.
	maxHolds = 1 << 16

	// defaultWindow is how many frames are in flight on a path at most, however many the target takes.
	defaultWindow = 128

	// DefaultQuarantine is how long a frame may be on its way at most: no less than 2 s, and 8 times the longest time-out.
	DefaultQuarantine = 8 * maxTimeout

	// deadlineNever is later than any time.
	deadlineNever = time.Duration(1<<63 - 1)
)

// Op is what a Request asks for.
type Op uint8

// Operations.
const (
	Read Op = iota
	Write
	Flush
)

// Request is one operation, of any length. It and Data belong to the machine from its submission until it is among Effects.Done.
type Request struct {
	Op   Op
	LBA  uint64
	Data []byte // whole sectors; nil for Flush
	Err  error  // set when it is done

	next, end uint64 // sectors that are in no fragment yet
	cut       bool   // a Flush is in its fragment
	open      []*fragment
	index     int   // among the pending ones
	waits     *hold // in the way of the next fragment; nil: look
	finished  bool
}

// whole reports whether all of the request is in fragments.
func (r *Request) whole() bool {
	if r.Op == Flush {
		return r.cut
	}
	return r.next == r.end
}

// fragment is what one frame carries of a request. It is finished when any copy of it is answered.
type fragment struct {
	request *Request
	lba     uint64
	sectors int
	data    []byte
	path    *path // of the last copy
	copies  int   // that were sent
	done    bool
	hold    *hold // of a write
}

// transmission is one copy of a fragment, or a question about a path, under a tag of its own.
type transmission struct {
	tag     uint32
	kind    kind
	path    *path
	of      *fragment // nil for questions
	lba     uint64
	sectors int
	hold    *hold

	sent, deadline, lost time.Duration
	passed               int  // copies that were sent after this one on the path and are answered
	flying               bool // counted in the window
	early                bool // given up because others had passed it
}

type kind uint8

const (
	kindIO kind = iota
	kindIdentify
	kindProbe
)

// Interface is one of this host.
type Interface struct {
	Name string
	MAC  aoe.MAC
	MTU  int // bytes
}

// Options of a Machine. Address and Interfaces are required.
type Options struct {
	Address    aoe.Address
	Interfaces []Interface
	// Identity is what the target must be, by serial and size; nil: the one found first.
	Identity *aoe.Identity
	// Clean says that nobody's writes to the target are on their way any more: what wrote before was closed. Otherwise the first
	// write waits for one Quarantine.
	Clean bool
	// Quarantine is how long a frame may be on its way; 0 means DefaultQuarantine.
	Quarantine time.Duration
	// FenceAll says that the network may deliver one frame twice, the second time late: then every write fences its range for
	// one Quarantine, and not only one that was sent again.
	FenceAll bool
	// DeadAfter is how long the target may be silent until requests fail with ErrDead; 0: they wait for ever.
	DeadAfter time.Duration
	// Window is how many frames are in flight on a path at most; 0 means 128. The target's own bound always holds.
	Window int
	// DurableWrites is the operator's word that the target answers writes when they are durable.
	DurableWrites bool
	// Seed makes the tags hard to guess.
	Seed uint64
}

// EventKind is what happened.
type EventKind uint8

// Events.
const (
	// EventTick: time has passed.
	EventTick EventKind = iota
	// EventSubmit: Request is to be done.
	EventSubmit
	// EventFrame: Frame came in on Interface.
	EventFrame
	// EventStop: all requests fail with ErrClosed. Copies of their writes may still be on their way.
	EventStop
)

// Event is one input of the machine.
type Event struct {
	Kind      EventKind
	Request   *Request
	Interface int
	Frame     []byte // need not stay valid
}

// Effects is what the machine wants done: first all of Send, then Done, then Notes. Steps append to it.
type Effects struct {
	Send  []Send
	Done  []*Request
	Notes []Note
}

// Reset empties it for reuse.
func (e *Effects) Reset() {
	clear(e.Send)
	clear(e.Done)
	e.Send, e.Done, e.Notes = e.Send[:0], e.Done[:0], e.Notes[:0]
}

// Send is a frame for an interface. Data refers into a Request.
type Send struct {
	Interface int
	head      [aoe.ATABytes]byte
	length    int
	Data      []byte
}

// Head is the frame in front of Data.
func (s *Send) Head() []byte { return s.head[:s.length] }

// Note is something for the log.
type Note struct {
	Bad  bool
	Text string
}

// Machine is the initiator of one target without goroutines, clocks and sockets: time and frames come in by Step, frames and
// finished requests go out as Effects. Times are since any origin and never go back. It is not safe for concurrent use.
//
// It keeps the promise of invariant 14: a write is not sent while a copy of an older write to one of its sectors may still be on
// its way. Each copy has a tag of its own; a copy is on its way until it is answered or one Quarantine has passed. Overlapping
// requests that are submitted at the same time are done in any order, sector by sector.
type Machine struct {
	o        Options
	started  bool
	now      time.Duration
	fx       *Effects
	paths    []*path
	identity *aoe.Identity

	pending []*Request  // not finished
	queue   []*Request  // not wholly in fragments, in the order of submission
	resend  []*fragment // whose copies are given up
	copies  map[uint32]*transmission
	late    []*transmission // copies given up, in that order; some of them are answered by now
	holds   holds
	expiry  []expiringHold // with FenceAll, in the order of their end

	tag        uint32
	queryTags  [4]uint32
	queries    int
	queryAt    time.Duration
	writeAfter time.Duration // end of the quarantine after the start

	waiting  bool          // for an answer to anything pending
	since    time.Duration // when waiting began, or the last answer came
	unsynced bool          // writes were answered since the last good Flush
	doubt    bool          // the target may have lost them

	counters Counters
}

// Counters tell what became of frames.
type Counters struct {
	Frames    uint64 // I/O frames sent, copies included
	Resent    uint64 // copies after the first
	Timeouts  uint64 // copies given up because no answer came in time
	Passed    uint64 // copies given up because later ones were answered
	Late      uint64 // answers to copies that were given up
	Expired   uint64 // copies given up that were never answered
	Fenced    uint64 // writes that had to wait for an older copy
	Foreign   uint64 // frames that are not for us, or of a MAC that has no path
	Unknown   uint64 // answers to nothing that was asked
	Malformed uint64
	Restarts  uint64 // announcements of the target, and silences of more than a second
}

// NewMachine makes a machine. Its first Step is its start.
func NewMachine(o Options) *Machine {
	if o.Quarantine == 0 {
		o.Quarantine = DefaultQuarantine
	}
	if o.Window == 0 {
		o.Window = defaultWindow
	}
	m := &Machine{o: o, copies: map[uint32]*transmission{}}
	m.holds.init()
	// 7 bits for the incarnation and 24 that grow.
	m.tag = aoe.UserTag | uint32(o.Seed)&^aoe.UserTag
	return m
}

// newTag is a tag that nothing carries which may still be on its way.
func (m *Machine) newTag() uint32 {
	const counter = 1<<24 - 1
	for {
		m.tag = m.tag&^counter | (m.tag+1)&counter
		if m.copies[m.tag] == nil && !slices.Contains(m.queryTags[:], m.tag) {
			return m.tag
		}
	}
}

// Step lets one event happen at the time now, and appends what is to be done to fx.
func (m *Machine) Step(now time.Duration, ev Event, fx *Effects) {
	m.now, m.fx = max(now, m.now), fx
	if !m.started {
		m.started = true
		if !m.o.Clean {
			m.writeAfter = m.now + m.o.Quarantine
		}
		m.queryAt = m.now
	}
	switch ev.Kind {
	case EventSubmit:
		m.submit(ev.Request)
	case EventFrame:
		m.receive(ev.Interface, ev.Frame)
	case EventStop:
		m.fail(ErrClosed)
	}
	m.tick()
	m.dispatch()
	m.fx = nil
}

func (m *Machine) note(bad bool, format string, args ...any) {
	m.fx.Notes = append(m.fx.Notes, Note{Bad: bad, Text: fmt.Sprintf(format, args...)})
}

// submit takes a request. Its range was checked by the caller, against the size of the identity, which is known.
func (m *Machine) submit(r *Request) {
	r.next, r.end = r.LBA, r.LBA+uint64(len(r.Data)/aoe.SectorBytes)
	r.index = len(m.pending)
	m.pending = append(m.pending, r)
	m.queue = append(m.queue, r)
	if !m.waiting {
		m.waiting, m.since = true, m.now
	}
	if r.Op == Flush && !m.identity.Flush && !m.identity.FlushExt {
		r.Err, r.cut = m.flushed(nil), true
	}
	if r.whole() {
		m.finish(r) // nothing is to be sent
	}
}

// heard notes that the target is alive.
func (m *Machine) heard() {
	m.waiting, m.since = len(m.pending) > 0, m.now
}

// tick does what its time has come for.
func (m *Machine) tick() {
	m.expire()
	if m.now >= m.queryAt {
		m.query()
	}
	for _, p := range m.paths {
		m.tickPath(p)
	}
	if m.dead() {
		m.fail(fmt.Errorf("%w for %s", ErrDead, m.o.DeadAfter))
	}
}

// fail finishes all requests. What was sent of them stays fenced.
func (m *Machine) fail(err error) {
	for len(m.pending) > 0 {
		r := m.pending[0]
		r.Err = err
		m.finish(r)
	}
}

func (m *Machine) dead() bool {
	return m.o.DeadAfter > 0 && m.waiting && m.now-m.since >= m.o.DeadAfter
}

// expire ends the fences of copies that cannot arrive any more.
func (m *Machine) expire() {
	for len(m.late) > 0 {
		tx := m.late[0]
		answered := m.copies[tx.tag] != tx
		if !answered && m.now < tx.lost+m.o.Quarantine {
			break
		}
		m.late[0] = nil
		m.late = m.late[1:]
		if !answered {
			delete(m.copies, tx.tag)
			m.counters.Expired++
			m.unref(tx.hold)
		}
	}
	for len(m.expiry) > 0 && m.now >= m.expiry[0].at {
		m.holds.remove(m.expiry[0].hold)
		m.expiry[0].hold = nil
		m.expiry = m.expiry[1:]
	}
}

type expiringHold struct {
	hold *hold
	at   time.Duration
}

// unref takes back one reason for a fence.
func (m *Machine) unref(h *hold) {
	if h == nil {
		return
	}
	h.reasons--
	if h.reasons > 0 {
		return
	}
	if m.o.FenceAll && !planted("no-ghost-fence") {
		m.expiry = append(m.expiry, expiringHold{h, m.now + m.o.Quarantine})
		return
	}
	m.holds.remove(h)
}

// dispatch sends what the windows have room for: first what was lost, then what is new.
func (m *Machine) dispatch() {
	for len(m.resend) > 0 {
		f := m.resend[0]
		if !f.done {
			p := m.choose(f)
			if p == nil {
				return
			}
			m.resend[0] = nil
			m.resend = m.resend[1:]
			m.split(f, p.sectors)
			m.transmit(f, p)
			continue
		}
		m.resend[0] = nil
		m.resend = m.resend[1:]
	}
	kept := m.queue[:0]
	room := true
	for _, r := range m.queue {
		for room && !r.finished && !r.whole() {
			p := m.choose(nil)
			if p == nil {
				room = false
				break
			}
			f := m.cutNext(r, p)
			if f == nil {
				break
			}
			m.transmit(f, p)
		}
		if !r.finished && !r.whole() {
			kept = append(kept, r)
		}
	}
	clear(m.queue[len(kept):])
	m.queue = kept
}

// cutNext takes the next fragment out of the request, as large as the path carries; nil where an older write is in the way.
func (m *Machine) cutNext(r *Request, p *path) *fragment {
	if r.Op == Flush {
		r.cut = true
		return m.newFragment(r, 0, 0, nil)
	}
	sectors := cutLength(r.next, r.end, p.sectors)
	if r.Op == Write && m.fenced(r, sectors) {
		return nil
	}
	at := (r.next - r.LBA) * aoe.SectorBytes
	f := m.newFragment(r, r.next, sectors, r.Data[at:at+uint64(sectors)*aoe.SectorBytes])
	r.next += uint64(sectors)
	if r.Op == Write {
		f.hold = m.holds.add(f.lba, uint64(sectors))
	}
	return f
}

// fenced reports whether the write's next sectors must wait. This is where invariant 14 is kept.
func (m *Machine) fenced(r *Request, sectors int) bool {
	if r.waits != nil && r.waits.live {
		return true
	}
	if m.now < m.writeAfter || m.holds.count >= maxHolds {
		return true
	}
	first := r.waits == nil
	if r.waits = m.holds.overlapping(r.next, uint64(sectors)); r.waits == nil {
		return false
	}
	if first {
		m.counters.Fenced++
	}
	return true
}

// cutLength is how many sectors from next on go into a frame of at most limit: it ends at a block of 4 KiB, or at what is left of
// one, unless the request ends.
func cutLength(next, end uint64, limit int) int {
	stop := next + uint64(limit)
	if stop >= end {
		return int(end - next)
	}
	align := uint64(min(limit, blockSectors))
	if aligned := stop / align * align; aligned > next {
		stop = aligned
	}
	return int(stop - next)
}

// blockSectors are the 4 KiB that frames are aligned to.
const blockSectors = 8

// usable is the largest number of sectors, at most n, with which frames stay aligned.
func usable(n int) int {
	if n >= blockSectors {
		return n / blockSectors * blockSectors
	}
	return 1 << (bits.Len(uint(max(n, 1))) - 1)
}

func (m *Machine) newFragment(r *Request, lba uint64, sectors int, data []byte) *fragment {
	f := &fragment{request: r, lba: lba, sectors: sectors, data: data}
	r.open = append(r.open, f)
	return f
}

// split makes the fragment small enough for a path that carries less than the one it was made for.
func (m *Machine) split(f *fragment, limit int) {
	if f.sectors <= limit {
		return
	}
	n := cutLength(f.lba, f.lba+uint64(f.sectors), limit)
	rest := m.newFragment(f.request, f.lba+uint64(n), f.sectors-n, f.data[n*aoe.SectorBytes:])
	rest.path, rest.copies = f.path, f.copies
	if rest.hold = f.hold; rest.hold != nil {
		rest.hold.reasons++
	}
	f.sectors, f.data = n, f.data[:n*aoe.SectorBytes]
	m.resend = slices.Insert(m.resend, 0, rest)
}

// transmit sends a copy of the fragment on the path.
func (m *Machine) transmit(f *fragment, p *path) {
	tx := &transmission{
		tag: m.newTag(), path: p, of: f, lba: f.lba, sectors: f.sectors, hold: f.hold,
		sent: m.now, deadline: m.now + p.timeout(f.copies), flying: true,
	}
	if f.request.Op == Flush {
		tx.deadline = m.now + maxTimeout // it may take long
	}
	if tx.hold != nil {
		tx.hold.reasons++
	}
	m.copies[tx.tag] = tx
	p.sent(tx)
	if f.copies > 0 {
		m.counters.Resent++
	}
	m.counters.Frames++
	f.copies++
	f.path = p
	a := m.command(f)
	m.send(p, tx.tag, &a, f.request.Op == Write, f.data)
}

// command is the ATA command of a fragment.
func (m *Machine) command(f *fragment) aoe.ATA {
	a := aoe.ATA{LBA: f.lba, Count: uint8(f.sectors)}
	extended := m.identity.LBA48
	switch f.request.Op {
	case Read:
		a.Command = aoe.ATARead
		if extended {
			a.Command = aoe.ATAReadExt
		}
	case Write:
		a.Command, a.Flags = aoe.ATAWriteSectors, aoe.ATAWrite
		if extended {
			a.Command = aoe.ATAWriteExt
		}
	case Flush:
		a.Command = aoe.ATAFlush
		if extended = extended && m.identity.FlushExt; extended {
			a.Command = aoe.ATAFlushExt
		}
	}
	if extended {
		a.Flags |= aoe.ATAExtended
	} else {
		a.Device = aoe.DeviceLBA
	}
	return a
}

// send makes an ATA frame.
func (m *Machine) send(p *path, tag uint32, a *aoe.ATA, withData bool, data []byte) {
	h := aoe.Header{
		Dst: p.mac, Src: m.o.Interfaces[p.iface].MAC, Version: aoe.Version, Address: m.o.Address, Command: aoe.CommandATA, Tag: tag,
	}
	m.fx.Send = append(m.fx.Send, Send{Interface: p.iface})
	s := &m.fx.Send[len(m.fx.Send)-1]
	s.length = len(a.Append(h.Append(s.head[:0])))
	if withData {
		s.Data = data
	}
}

// answered takes the answer to a copy of a fragment. Any copy will do: they ask for the same, or, sent before the fragment was
// split, for that and more behind it.
func (m *Machine) answered(tx *transmission, h aoe.Header, a aoe.ATA, data []byte) {
	f := tx.of
	err := refusal(h, a)
	if f.request.Op == Read && err == nil && len(data) < tx.sectors*aoe.SectorBytes {
		m.counters.Malformed++ // and not answered
		return
	}
	m.settle(tx)
	if f.done {
		return // by another copy
	}
	if f.request.Op == Read && err == nil {
		copy(f.data, data)
	}
	if f.request.Op == Write {
		m.unsynced = true
	}
	if f.request.Op == Flush {
		err = m.flushed(err)
	}
	m.finishFragment(f, err)
}

// settle notes that a copy was answered: it is not on its way any more.
func (m *Machine) settle(tx *transmission) {
	delete(m.copies, tx.tag)
	m.heard()
	p := tx.path
	p.heard(m.now)
	if tx.flying {
		for _, lost := range p.answered(tx, m.now, m.windowOf(p)) {
			m.counters.Passed++
			lost.early = true
			m.giveUp(lost)
		}
	} else {
		m.counters.Late++
		p.late(tx, m.now)
	}
	m.unref(tx.hold)
}

// refusal is the error that an answer tells of, nil if it is good.
func refusal(h aoe.Header, a aoe.ATA) error {
	if h.Flags&aoe.FlagError != 0 {
		return fmt.Errorf("%w: %s", ErrRefused, h.Error)
	}
	if a.Failed() {
		return fmt.Errorf("%w: ATA status %#02x, error %#02x", ErrRefused, uint8(a.Command), a.Feature)
	}
	return nil
}

// flushed decides what a FLUSH that was answered is worth.
func (m *Machine) flushed(err error) error {
	if m.doubt {
		// Told once: the caller writes everything again.
		m.doubt, m.unsynced = false, false
		return errors.Join(err, ErrRestarted)
	}
	if err == nil {
		m.unsynced = false
	}
	return err
}

// suspectRestart notes that the target may have lost what it answered.
func (m *Machine) suspectRestart() {
	m.counters.Restarts++
	m.doubt = m.doubt || m.unsynced && !m.o.DurableWrites
}

// giveUp stops waiting for a copy. It may still arrive.
func (m *Machine) giveUp(tx *transmission) {
	tx.flying, tx.lost = false, m.now
	m.late = append(m.late, tx)
	f := tx.of
	// At most one copy of a fragment is in flight: it is sent again only when the last one is given up.
	if f != nil && !f.done {
		m.resend = append(m.resend, f)
	}
}

// finishFragment ends a fragment. The request fails by its first failure, when nothing of it is in flight any more.
func (m *Machine) finishFragment(f *fragment, err error) {
	r := f.request
	m.close(f)
	r.open = slices.DeleteFunc(r.open, func(o *fragment) bool { return o == f })
	if err != nil {
		r.next, r.cut = r.end, true
		if r.Err == nil {
			r.Err = err
		}
	}
	if r.whole() && len(r.open) == 0 {
		m.finish(r)
	}
}

// close ends what a fragment holds. Its copies may still hold the range.
func (m *Machine) close(f *fragment) {
	f.done = true
	if planted("no-ghost-fence") && f.hold != nil {
		m.holds.remove(f.hold)
	}
	m.unref(f.hold)
}

// finish gives a request back.
func (m *Machine) finish(r *Request) {
	for _, f := range r.open {
		m.close(f)
	}
	r.open, r.finished = nil, true
	last := len(m.pending) - 1
	m.pending[r.index], m.pending[last].index = m.pending[last], r.index
	m.pending[last] = nil
	m.pending = m.pending[:last]
	m.fx.Done = append(m.fx.Done, r)
	if last == 0 {
		m.waiting = false
	}
}

// Next is when Step must be called at the latest, with EventTick; the largest Duration if nothing waits for time.
func (m *Machine) Next() time.Duration {
	next := m.queryAt
	for _, p := range m.paths {
		next = min(next, p.next())
	}
	if len(m.late) > 0 {
		next = min(next, m.late[0].lost+m.o.Quarantine)
	}
	if len(m.expiry) > 0 {
		next = min(next, m.expiry[0].at)
	}
	if m.writeAfter > m.now && len(m.queue) > 0 {
		next = min(next, m.writeAfter)
	}
	if m.o.DeadAfter > 0 && m.waiting {
		next = min(next, m.since+m.o.DeadAfter)
	}
	return next
}

// Fenced reports whether copies of writes may still be on their way. A caller that waits until there are none, or for one
// Quarantine, can tell the next Machine of this target that it is Clean.
func (m *Machine) Fenced() bool { return m.holds.count > 0 }
