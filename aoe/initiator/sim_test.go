package initiator

import (
	"bytes"
	"container/heap"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/aoe"
)

// The simulator: one Machine, one target with an address on each of two networks, and what lies between them. Time and chance come
// from the seed alone. Checkers look at frames and at the target's disk, never into the machine.

var shelf = aoe.Address{Shelf: 1}

const (
	ms         = time.Millisecond
	simSectors = 96
)

// knobs are drawn anew for each seed.
type knobs struct {
	networks   int
	mtu        int
	carries    int // bytes of the longest frame that arrives, 0: as promised
	loss       float64
	duplicate  float64 // of any frame but writes; of those only with fenceAll
	fenceAll   bool
	jitter     time.Duration
	delayed    float64 // chance that a frame is on its way for up to 2 s
	cuts       bool
	restarts   bool // of the target
	crashes    bool // of the initiator
	lba28      bool
	flush      bool
	deadAfter  time.Duration
	service    time.Duration // that the target needs for a frame
	operations int
}

func drawKnobs(r *rand.Rand) knobs {
	maybe := func(p float64) float64 {
		if r.IntN(2) == 0 {
			return 0
		}
		return p * r.Float64()
	}
	k := knobs{
		networks: 1 + r.IntN(2), mtu: []int{1500, 4200, 9000}[r.IntN(3)], loss: maybe(0.2), duplicate: maybe(0.2), fenceAll: r.IntN(3) == 0,
		jitter: time.Duration(r.IntN(3)) * ms, delayed: maybe(0.1), cuts: r.IntN(2) == 0, restarts: r.IntN(2) == 0, crashes: r.IntN(2) == 0,
		lba28: r.IntN(4) == 0, flush: r.IntN(2) == 0, operations: 150,
	}
	if r.IntN(3) == 0 && k.mtu > 1500 {
		k.carries = 1514
	}
	if r.IntN(4) == 0 {
		k.deadAfter = time.Second
	}
	return k
}

type simEvent struct {
	at    time.Duration
	order int
	run   func()
}

type simQueue []simEvent

func (q simQueue) Len() int { return len(q) }
func (q simQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].order < q[j].order
}
func (q simQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *simQueue) Push(x any)   { *q = append(*q, x.(simEvent)) }
func (q *simQueue) Pop() any {
	last := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return last
}

// version is one write of a sector.
type version struct {
	token                uint64
	sent, answered       time.Duration
	isAnswered, isFailed bool
}

type sim struct {
	r      *rand.Rand
	k      knobs
	now    time.Duration
	order  int
	events simQueue
	m      *Machine

	disk     [simSectors]uint64
	history  [simSectors][]version
	busy     [simSectors]bool                // a write of the load is under way
	onWay    map[uint64]int                  // copies of each token in the network
	tokensAt [simSectors]map[uint64]struct{} // tokens with copies on their way
	token    uint64

	down      [2][2]bool // direction, network
	targetUp  bool
	wire      bool // the checker of frames is on
	healed    bool
	began     map[*Request]time.Duration // when each request was submitted
	inFlight  int
	served    time.Duration // until when the target is busy
	done      int
	submitted int
	notes     []Note
	problems  []string
	crashes   int
	ghosts    int // copies of writes that arrived after their write was answered
	failed    int
}

func newSim(seed uint64, k knobs, r *rand.Rand) *sim {
	s := &sim{r: r, k: k, targetUp: true, onWay: map[uint64]int{}, began: map[*Request]time.Duration{}}
	s.begin(seed, true)
	for i := range s.tokensAt {
		s.tokensAt[i] = map[uint64]struct{}{}
	}
	return s
}

// begin starts a machine.
func (s *sim) begin(seed uint64, clean bool) {
	o := Options{Address: shelf, Clean: clean, FenceAll: s.k.fenceAll, DeadAfter: s.k.deadAfter, Seed: seed}
	for i := range s.k.networks {
		o.Interfaces = append(o.Interfaces, Interface{Name: fmt.Sprintf("if%d", i), MAC: hostMAC(i), MTU: s.k.mtu})
	}
	s.m = NewMachine(o)
}

// crash ends the machine, with all that was asked of it, and starts another one, which knows nothing of what is on its way.
func (s *sim) crash() {
	if s.healed {
		return
	}
	for r := range s.began {
		r.Err = ErrClosed
		s.finished(r)
	}
	s.crashes++
	s.begin(s.r.Uint64(), false)
	s.step(Event{Kind: EventTick})
	s.after(time.Duration(s.r.Int64N(int64(20*time.Second))), s.crash)
}

func hostMAC(i int) aoe.MAC   { return aoe.MAC{2, 0, 0, 0, 1, byte(i)} }
func targetMAC(i int) aoe.MAC { return aoe.MAC{2, 0, 0, 0, 2, byte(i)} }

func (s *sim) problem(format string, args ...any) {
	if len(s.problems) < 5 {
		s.problems = append(s.problems, fmt.Sprintf("%s: ", s.now)+fmt.Sprintf(format, args...))
	}
}

func (s *sim) after(d time.Duration, run func()) {
	s.order++
	heap.Push(&s.events, simEvent{s.now + d, s.order, run})
}

func (s *sim) step(ev Event) {
	fx := Effects{}
	s.m.Step(s.now, ev, &fx)
	for i := range fx.Send {
		f := &fx.Send[i]
		frame := append(bytes.Clone(f.Head()), f.Data...)
		s.sentByUs(frame)
		s.carry(0, f.Interface, frame)
	}
	for _, r := range fx.Done {
		s.finished(r)
	}
	s.notes = append(s.notes, fx.Notes...)
}

// writeOf gives the sectors of a WRITE, and the tokens in them.
func writeOf(frame []byte) (lba uint64, tokens []uint64) {
	h, err := aoe.ParseHeader(frame)
	if err != nil || h.Command != aoe.CommandATA || h.Flags != 0 {
		return 0, nil
	}
	a, data, err := aoe.ParseATA(frame)
	if err != nil || a.Command != aoe.ATAWriteExt && a.Command != aoe.ATAWriteSectors {
		return 0, nil
	}
	for i := range int(a.Count) {
		tokens = append(tokens, binary.BigEndian.Uint64(data[i*aoe.SectorBytes:]))
	}
	return a.LBA, tokens
}

// sentByUs is the checker of invariant 14: at the time a write is sent, no copy of another write to the same sectors is on its way.
func (s *sim) sentByUs(frame []byte) {
	if len(frame) > s.k.mtu+aoe.EthernetBytes {
		s.problem("a frame of %d bytes was sent", len(frame))
	}
	lba, tokens := writeOf(frame)
	for i, token := range tokens {
		for other := range s.tokensAt[lba+uint64(i)] {
			if other != token && s.wire {
				s.problem("write %d of sector %d was sent while write %d is on its way", token, lba+uint64(i), other)
			}
		}
	}
}

func (s *sim) track(frame []byte, by int) {
	lba, tokens := writeOf(frame)
	for i, token := range tokens {
		s.onWay[token] += by
		if s.onWay[token] > 0 {
			s.tokensAt[lba+uint64(i)][token] = struct{}{}
		} else {
			delete(s.tokensAt[lba+uint64(i)], token)
			delete(s.onWay, token)
		}
	}
}

// carry moves a frame across a network: to the target (0) or to us (1).
func (s *sim) carry(direction, network int, frame []byte) {
	copies := 1
	isWrite := false
	if _, tokens := writeOf(frame); len(tokens) > 0 {
		isWrite = true
	}
	if !s.healed {
		if s.r.Float64() < s.k.duplicate && (!isWrite || s.k.fenceAll) {
			copies++
		}
		if s.r.Float64() < s.k.loss {
			copies--
		}
	}
	if s.down[direction][network] || s.k.carries > 0 && len(frame) > s.k.carries {
		copies = 0
	}
	for range copies {
		delay := ms/10 + time.Duration(s.r.Int64N(int64(s.k.jitter)+1))
		if !s.healed && s.r.Float64() < s.k.delayed {
			delay = time.Duration(s.r.Int64N(int64(2 * time.Second)))
		}
		s.track(frame, 1)
		s.after(delay, func() {
			s.track(frame, -1)
			if direction == 0 {
				s.arrived(network, frame)
			} else {
				s.step(Event{Kind: EventFrame, Interface: network, Frame: frame})
			}
		})
	}
}

// arrived is the target: serial, like vblade.
func (s *sim) arrived(network int, frame []byte) {
	h, err := aoe.ParseHeader(frame)
	if err != nil {
		s.problem("bad frame: %v", err)
		return
	}
	if !s.targetUp || !shelf.Matches(h.Address) {
		return
	}
	h.Dst, h.Src, h.Flags, h.Address = h.Src, targetMAC(network), aoe.FlagResponse, shelf
	s.served = max(s.served, s.now) + s.k.service
	out := h.Append(nil)
	switch h.Command {
	case aoe.CommandConfig:
		out = s.config(h)
	case aoe.CommandATA:
		a, data, err := aoe.ParseATA(frame)
		if err != nil {
			s.problem("bad ATA frame: %v", err)
			return
		}
		out = s.execute(out, a, data)
	}
	s.after(s.served-s.now, func() { s.carry(1, network, aoe.Pad(out)) })
}

func (s *sim) config(h aoe.Header) []byte {
	out, _ := (&aoe.Config{Buffers: 16, Sectors: uint8(aoe.SectorsIn(s.k.mtu)), Version: 1}).Append(h.Append(nil))
	return out
}

func (s *sim) execute(out []byte, a aoe.ATA, data []byte) []byte {
	answer := a
	answer.Command, answer.Feature, answer.Count = aoe.StatusReady, 0, 0
	if a.Command != aoe.ATAIdentify && a.LBA+uint64(a.Count) > simSectors {
		s.problem("%d sectors at %d are past the end", a.Count, a.LBA)
	}
	switch a.Command {
	case aoe.ATAIdentify:
		id := aoe.Identity{Serial: "sim", Model: "sim", Sectors: simSectors, LBA48: !s.k.lba28, Flush: s.k.flush}
		out = answer.Append(out)
		out = append(out, make([]byte, aoe.SectorBytes)...)
		id.Put(out[aoe.ATABytes:])
		return out
	case aoe.ATARead, aoe.ATAReadExt:
		out = answer.Append(out)
		for i := range uint64(a.Count) {
			sector := [aoe.SectorBytes]byte{}
			binary.BigEndian.PutUint64(sector[:], s.disk[a.LBA+i])
			out = append(out, sector[:]...)
		}
		return out
	case aoe.ATAWriteSectors, aoe.ATAWriteExt:
		for i := range uint64(a.Count) {
			token := binary.BigEndian.Uint64(data[i*aoe.SectorBytes:])
			h := s.history[a.LBA+i]
			for k := range h {
				if h[k].token == token && h[k].isAnswered {
					s.ghosts++
				}
			}
			s.disk[a.LBA+i] = token
		}
	case aoe.ATAFlush:
		if !s.k.flush {
			s.problem("FLUSH was sent to a target that has none")
		}
	default:
		s.problem("command %#x", a.Command)
	}
	return answer.Append(out)
}

// submit lets the load ask for something: reads anywhere, writes where none of its own is under way.
func (s *sim) submit() {
	lba := s.r.IntN(simSectors)
	if s.r.IntN(2) == 0 {
		lba = s.r.IntN(16) // hot
	}
	n := 1 + s.r.IntN(min(40, simSectors-lba))
	r := &Request{LBA: uint64(lba), Data: make([]byte, n*aoe.SectorBytes)}
	switch s.r.IntN(8) {
	case 0:
		r = &Request{Op: Flush}
	case 1, 2:
		r.Op = Read
	default:
		r.Op = Write
		for i := range n {
			if s.busy[lba+i] {
				return
			}
		}
		for i := range n {
			s.token++
			binary.BigEndian.PutUint64(r.Data[i*aoe.SectorBytes:], s.token)
			s.busy[lba+i] = true
			s.history[lba+i] = append(s.history[lba+i], version{token: s.token, sent: s.now})
		}
	}
	s.send(r)
}

func (s *sim) send(r *Request) {
	s.inFlight++
	s.submitted++
	s.began[r] = s.now
	s.step(Event{Kind: EventSubmit, Request: r})
}

func (s *sim) finished(r *Request) {
	s.inFlight--
	s.done++
	start := s.began[r]
	delete(s.began, r)
	if r.Err != nil {
		s.failed++
	}
	for i := range len(r.Data) / aoe.SectorBytes {
		sector := int(r.LBA) + i
		switch {
		case r.Op == Write:
			h := s.history[sector]
			last := &h[len(h)-1]
			last.answered, last.isAnswered, last.isFailed = s.now, r.Err == nil, r.Err != nil
			s.busy[sector] = false
		case r.Err == nil:
			s.checkRead(sector, binary.BigEndian.Uint64(r.Data[i*aoe.SectorBytes:]), start)
		}
	}
}

// checkRead: a read that began then returns the last write that was answered before, or one that was not answered yet.
func (s *sim) checkRead(sector int, token uint64, began time.Duration) {
	h := s.history[sector]
	for i := len(h) - 1; i >= 0; i-- {
		if h[i].token == token {
			return
		}
		if h[i].isAnswered && h[i].answered < began {
			s.problem("a read of sector %d gave %d, but %d was answered before it", sector, token, h[i].token)
			return
		}
	}
	if token != 0 {
		s.problem("a read of sector %d gave %d, which was never written there", sector, token)
	}
}

// disturb cuts networks and restarts the target.
func (s *sim) disturb() {
	if s.healed {
		return
	}
	if s.k.cuts {
		d, n := s.r.IntN(2), s.r.IntN(s.k.networks)
		s.down[d][n] = true
		s.after(time.Duration(s.r.Int64N(int64(1500*ms))), func() { s.down[d][n] = false })
	}
	if s.k.restarts && s.targetUp {
		s.targetUp = false
		s.after(time.Duration(s.r.Int64N(int64(2*time.Second))), func() {
			s.targetUp = true
			for n := range s.k.networks {
				s.carry(1, n, aoe.Pad(s.config(aoe.Header{Dst: aoe.Broadcast, Src: targetMAC(n), Flags: aoe.FlagResponse, Address: shelf, Command: aoe.CommandConfig})))
			}
		})
	}
	s.after(time.Duration(s.r.Int64N(int64(4*time.Second))), s.disturb)
}

// advance goes to the next event, or lets the machine have its time.
func (s *sim) advance() {
	next := s.m.Next()
	if len(s.events) > 0 && s.events[0].at <= next {
		e := heap.Pop(&s.events).(simEvent)
		s.now = e.at
		e.run()
		return
	}
	s.now = max(s.now, next)
	s.step(Event{Kind: EventTick})
}

func (s *sim) until(what string, limit time.Duration, ready func() bool) {
	end := s.now + limit
	for !ready() && len(s.problems) == 0 {
		if s.now > end {
			s.problem("%s did not happen in %s: %+v", what, limit, s.m.Status(s.now))
			return
		}
		s.advance()
	}
}

func (s *sim) run() {
	s.step(Event{Kind: EventTick})
	s.until("discovery", time.Minute, s.m.Ready)
	s.after(0, s.disturb)
	if s.k.crashes {
		s.after(time.Duration(s.r.Int64N(int64(2*time.Second))), s.crash)
	}
	var load func()
	load = func() {
		if s.submitted < s.k.operations {
			for s.m.Status(s.now).Identity.Sectors > 0 && s.inFlight < 8 && s.r.IntN(4) > 0 {
				s.submit()
			}
			s.after(time.Duration(s.r.Int64N(int64(20*ms))), load)
		}
	}
	s.after(0, load)
	s.until("the load", 10*time.Minute, func() bool { return s.submitted >= s.k.operations })
	s.healed = true
	s.until("the end of all requests", time.Minute, func() bool { return s.inFlight == 0 && s.targetUp && s.down == [2][2]bool{} })
	// What may still be on its way is, after that, a ghost if it does anything.
	s.until("the end of all fences", 20*time.Second, func() bool { return !s.m.Fenced() })
	end := s.now + 3*time.Second
	s.until("three seconds", time.Minute, func() bool { return s.now > end })
	for sector, h := range s.history {
		want, sure := uint64(0), true
		for _, v := range h {
			if v.isAnswered {
				want, sure = v.token, true
			} else {
				sure = false
			}
		}
		if sure && s.disk[sector] != want {
			s.problem("sector %d has %d at the end, and %d was answered last", sector, s.disk[sector], want)
		}
	}
	r := &Request{Op: Read, Data: make([]byte, simSectors*aoe.SectorBytes)}
	s.send(r)
	s.until("the last read", 20*time.Second, func() bool { return s.inFlight == 0 })
}

// runSeed runs the history of a seed. With wire, writes are judged when they are sent, else only by what they do.
func runSeed(seed uint64, wire bool) *sim {
	r := rand.New(rand.NewPCG(seed, 14))
	s := newSim(seed, drawKnobs(r), r)
	s.wire = wire
	s.run()
	return s
}

func seeds(t *testing.T, n uint64) uint64 {
	if text := os.Getenv("RAMSHELF_SEEDS"); text != "" {
		v, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	return n
}

// TestSimulation: whatever the network and the target do, every sector has what was answered last. The campaign must have met what it
// is about.
func TestSimulation(t *testing.T) {
	var sum Counters
	ghosts, failed, crashes := 0, 0, 0
	n := uint64(150)
	if testing.Short() {
		n = 40
	}
	for seed := range seeds(t, n) {
		s := runSeed(seed, true)
		if len(s.problems) > 0 {
			t.Errorf("seed %d, %+v:", seed, s.k)
			for _, p := range s.problems {
				t.Errorf("  %s", p)
			}
			if t.Failed() {
				break
			}
		}
		c := s.m.Status(s.now).Counters
		ghosts += s.ghosts
		failed += s.failed
		crashes += s.crashes
		sum.Resent += c.Resent
		sum.Timeouts += c.Timeouts
		sum.Passed += c.Passed
		sum.Late += c.Late
		sum.Expired += c.Expired
		sum.Fenced += c.Fenced
		sum.Restarts += c.Restarts
	}
	t.Logf("ghosts %d, failed %d, %+v", ghosts, failed, sum)
	for what, n := range map[string]uint64{
		"a copy of an answered write arrived": uint64(ghosts), "a request failed": uint64(failed), "the initiator crashed": uint64(crashes), "a time-out": sum.Timeouts,
		"a copy was passed": sum.Passed, "a late answer": sum.Late, "a copy expired": sum.Expired, "a write was fenced": sum.Fenced,
		"a restart": sum.Restarts,
	} {
		if n == 0 {
			t.Errorf("it never happened that %s", what)
		}
	}
}
