package initiator

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/aoe"
)

// calm is a simulation with a machine that has found its target, and without any faults but those of k.
func calm(t *testing.T, k knobs) *sim {
	t.Helper()
	k.networks = max(k.networks, 1)
	if k.mtu == 0 {
		k.mtu = 9000
	}
	s := newSim(1, k, rand.New(rand.NewPCG(1, 2)))
	s.wire = true
	s.step(Event{Kind: EventTick})
	s.until("discovery", time.Minute, s.m.Ready)
	t.Cleanup(func() {
		for _, p := range s.problems {
			t.Error(p)
		}
	})
	return s
}

// alone has a machine that has found its target and whose frames the test answers itself.
type alone struct {
	t   *testing.T
	m   *Machine
	now time.Duration
	fx  Effects
}

func newAlone(t *testing.T, o Options, id aoe.Identity, c aoe.Config) *alone {
	t.Helper()
	o.Address, o.Interfaces = shelf, []Interface{{Name: "if0", MAC: hostMAC(0), MTU: 9000}}
	a := &alone{t: t, m: NewMachine(o)}
	a.step(Event{})
	query := a.fx.Send[0].Head()
	config, err := c.Append(a.header(query, aoe.FlagResponse))
	if err != nil {
		t.Fatal(err)
	}
	a.frame(config)
	ask := a.sent(1)[0]
	data := make([]byte, aoe.SectorBytes)
	id.Put(data)
	a.answer(ask, aoe.StatusReady, data)
	probe := a.sent(1)[0]
	if parse(t, probe).Count > 0 {
		a.answer(probe, aoe.StatusReady, make([]byte, int(parse(t, probe).Count)*aoe.SectorBytes))
	}
	if !a.m.Ready() {
		t.Fatal("the target is not ready")
	}
	return a
}

var plain = aoe.Identity{Serial: "plain", Sectors: 1 << 20, LBA48: true}

func (a *alone) step(ev Event) {
	a.fx.Reset()
	a.m.Step(a.now, ev, &a.fx)
}

func (a *alone) frame(f []byte) { a.step(Event{Kind: EventFrame, Frame: f}) }

// sent are the ATA frames of the last step, which must be so many.
func (a *alone) sent(n int) (frames [][]byte) {
	a.t.Helper()
	for i := range a.fx.Send {
		frame := append(bytes.Clone(a.fx.Send[i].Head()), a.fx.Send[i].Data...)
		if h, _ := aoe.ParseHeader(frame); h.Command == aoe.CommandATA {
			frames = append(frames, frame)
		}
	}
	if len(frames) != n {
		a.t.Fatalf("%d frames were sent, want %d", len(frames), n)
	}
	return frames
}

func parse(t *testing.T, frame []byte) aoe.ATA {
	t.Helper()
	a, _, err := aoe.ParseATA(frame)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// header is the beginning of the answer to a frame.
func (a *alone) header(to []byte, flags aoe.Flags) []byte {
	h, err := aoe.ParseHeader(to)
	if err != nil {
		a.t.Fatal(err)
	}
	h.Dst, h.Src, h.Flags, h.Address = h.Src, targetMAC(0), flags, shelf
	return h.Append(nil)
}

func (a *alone) response(to []byte, status uint8, data []byte) []byte {
	ata := parse(a.t, to)
	ata.Command, ata.Count, ata.Feature = aoe.ATACommand(status), 0, 0
	return append(ata.Append(a.header(to, aoe.FlagResponse)), data...)
}

func (a *alone) answer(to []byte, status uint8, data []byte) { a.frame(a.response(to, status, data)) }

func (a *alone) submit(r *Request) *Request {
	a.step(Event{Kind: EventSubmit, Request: r})
	return r
}

func TestCutLength(t *testing.T) {
	for _, c := range []struct {
		next, end uint64
		limit     int
		want      int
	}{
		{0, 100, 16, 16}, {8, 100, 16, 16}, {1, 100, 16, 15}, {7, 100, 16, 9}, {15, 100, 16, 9}, {0, 16, 16, 16}, {5, 21, 16, 16}, {5, 20, 16, 15},
		{0, 100, 8, 8}, {3, 100, 8, 5}, {0, 100, 2, 2}, {1, 100, 2, 1}, {99, 100, 2, 1}, {3, 100, 1, 1}, {1, 100, 4, 3}, {8, 100, 24, 24},
	} {
		if got := cutLength(c.next, c.end, c.limit); got != c.want {
			t.Errorf("from %d to %d in frames of %d: %d, want %d", c.next, c.end, c.limit, got, c.want)
		}
	}
	for n, want := range map[int]int{0: 1, 1: 1, 2: 2, 3: 2, 7: 4, 8: 8, 15: 8, 16: 16, 17: 16, 255: 248} {
		if got := usable(n); got != want {
			t.Errorf("of %d sectors %d are used, want %d", n, got, want)
		}
	}
}

func TestCommands(t *testing.T) {
	old := plain
	old.LBA48 = false
	flush, both := plain, plain
	flush.Flush, both.Flush, both.FlushExt = true, true, true
	data := make([]byte, 2*aoe.SectorBytes)
	for _, c := range []struct {
		id   aoe.Identity
		op   Op
		want aoe.ATA
	}{
		{plain, Read, aoe.ATA{Flags: aoe.ATAExtended, Command: aoe.ATAReadExt, Count: 2, LBA: 7}},
		{plain, Write, aoe.ATA{Flags: aoe.ATAExtended | aoe.ATAWrite, Command: aoe.ATAWriteExt, Count: 2, LBA: 7}},
		{old, Read, aoe.ATA{Command: aoe.ATARead, Count: 2, LBA: 7, Device: aoe.DeviceLBA}},
		{old, Write, aoe.ATA{Flags: aoe.ATAWrite, Command: aoe.ATAWriteSectors, Count: 2, LBA: 7, Device: aoe.DeviceLBA}},
		{flush, Flush, aoe.ATA{Command: aoe.ATAFlush, Device: aoe.DeviceLBA}},
		{both, Flush, aoe.ATA{Flags: aoe.ATAExtended, Command: aoe.ATAFlushExt}},
	} {
		a := newAlone(t, Options{Clean: true}, c.id, aoe.Config{Buffers: 16, Sectors: 17})
		r := &Request{Op: c.op, LBA: 7, Data: data}
		if c.op == Flush {
			r = &Request{Op: Flush}
		}
		a.submit(r)
		f := a.sent(1)[0]
		if got := parse(t, f); got != c.want {
			t.Errorf("%+v, want %+v", got, c.want)
		}
		if h, _ := aoe.ParseHeader(f); h.Tag&aoe.UserTag == 0 || h.Dst != targetMAC(0) || h.Src != hostMAC(0) || h.Address != shelf || h.Version != 1 {
			t.Errorf("header %+v", h)
		}
		a.answer(f, aoe.StatusReady, data)
		if !slices.Contains(a.fx.Done, r) || r.Err != nil {
			t.Errorf("%+v is not done: %v", c.want, r.Err)
		}
	}
	// Where there is no FLUSH none is sent.
	a := newAlone(t, Options{Clean: true}, plain, aoe.Config{Buffers: 16, Sectors: 17})
	if r := a.submit(&Request{Op: Flush}); r.Err != nil || len(a.fx.Done) != 1 {
		t.Errorf("a flush of a target that has none: %v", r.Err)
	}
	a.sent(0)
}

// Answers that do not fit in every respect have no effect.
func TestForeignAnswers(t *testing.T) {
	a := newAlone(t, Options{Clean: true}, plain, aoe.Config{Buffers: 16, Sectors: 2})
	data := bytes.Repeat([]byte{0x55}, 2*aoe.SectorBytes)
	r := a.submit(&Request{Op: Read, Data: make([]byte, len(data))})
	f := a.sent(1)[0]
	good := a.response(f, aoe.StatusReady, data)
	change := func(at int, b byte) []byte {
		c := bytes.Clone(good)
		c[at] ^= b
		return c
	}
	for name, bad := range map[string][]byte{
		"to another host": change(5, 1), "from another target": change(11, 1), "type": change(13, 1), "version": change(14, 0x20),
		"request": change(14, 8), "shelf": change(17, 1), "slot": change(18, 1), "command": change(19, 1), "vendor command": change(19, 0xF0),
		"tag": change(23, 1), "tag of the kernel": change(20, 0x80), "short data": good[:len(good)-1], "no data": good[:aoe.ATABytes],
		"runt": good[:20], "no argument": good[:aoe.HeaderBytes], "nothing": nil,
	} {
		if a.frame(bad); len(a.fx.Done) > 0 || len(a.fx.Send) > 0 {
			t.Errorf("%s: %d done, %d sent", name, len(a.fx.Done), len(a.fx.Send))
		}
	}
	if c := a.m.Status(a.now).Counters; c.Foreign == 0 || c.Malformed == 0 || c.Unknown == 0 {
		t.Errorf("counters %+v", c)
	}
	a.frame(append(good, 1, 2, 3)) // padding is none of them
	if len(a.fx.Done) != 1 || r.Err != nil || !bytes.Equal(r.Data, data) {
		t.Errorf("the answer: %v", r.Err)
	}
	clear(r.Data)
	if a.frame(good); r.Data[0] != 0 || len(a.fx.Done) > 0 {
		t.Error("an answer was taken twice")
	}
}

func TestRefusals(t *testing.T) {
	a := newAlone(t, Options{Clean: true}, plain, aoe.Config{Buffers: 2, Sectors: 16})
	r := a.submit(&Request{Op: Write, Data: make([]byte, 100*aoe.SectorBytes)})
	a.answer(a.sent(1)[0], aoe.StatusReady, nil) // the window opens
	frames := a.sent(2)
	a.answer(frames[0], aoe.StatusReady|aoe.StatusError, nil)
	a.sent(0) // nothing more of it
	if len(a.fx.Done) > 0 {
		t.Fatal("it failed while a frame was in flight")
	}
	a.answer(frames[1], aoe.StatusReady, nil)
	if len(a.fx.Done) != 1 || !errors.Is(r.Err, ErrRefused) || !strings.Contains(r.Err.Error(), "0x41") {
		t.Errorf("%v", r.Err)
	}
	// A reservation may pass, a bad argument does not.
	for code, final := range map[aoe.ErrorCode]bool{aoe.ErrorReserved: false, aoe.ErrorUnavailable: false, aoe.ErrorArgument: true} {
		r := a.submit(&Request{Op: Read, Data: make([]byte, aoe.SectorBytes)})
		f := a.sent(1)[0]
		refused := a.response(f, 0, nil)
		refused[14] |= byte(aoe.FlagError)
		refused[15] = byte(code)
		a.frame(refused)
		if (len(a.fx.Done) > 0) != final || final && (!errors.Is(r.Err, ErrRefused) || !strings.Contains(r.Err.Error(), code.String())) {
			t.Errorf("%s: %d done, %v", code, len(a.fx.Done), r.Err)
		}
		if !final {
			a.now = a.m.Next()
			a.step(Event{})
			a.answer(a.sent(1)[0], aoe.StatusReady, make([]byte, aoe.SectorBytes))
			if len(a.fx.Done) != 1 || r.Err != nil {
				t.Errorf("%s is not overcome: %v", code, r.Err)
			}
		}
	}
}

// Before the first write after a start a Quarantine passes; reads need not wait.
func TestQuarantineAfterStart(t *testing.T) {
	a := newAlone(t, Options{}, plain, aoe.Config{Buffers: 16, Sectors: 16})
	w := a.submit(&Request{Op: Write, Data: make([]byte, aoe.SectorBytes)})
	a.sent(0)
	r := a.submit(&Request{Op: Read, Data: make([]byte, aoe.SectorBytes)})
	a.answer(a.sent(1)[0], aoe.StatusReady, make([]byte, aoe.SectorBytes))
	if !slices.Contains(a.fx.Done, r) {
		t.Error("the read waits")
	}
	for a.now = a.m.Next(); a.now < DefaultQuarantine; a.now = a.m.Next() {
		a.step(Event{})
		for i := range a.fx.Send {
			if _, tokens := writeOf(append(bytes.Clone(a.fx.Send[i].Head()), a.fx.Send[i].Data...)); tokens != nil {
				t.Fatalf("a write was sent after %s", a.now)
			}
		}
	}
	a.step(Event{})
	a.answer(a.sent(1)[0], aoe.StatusReady, nil)
	if !slices.Contains(a.fx.Done, w) || w.Err != nil {
		t.Errorf("the write is not done: %v", w.Err)
	}
}

// W1 is slow and sent again; the copy is answered. W2 waits until W1 is answered as well, or a Quarantine has passed.
func TestFence(t *testing.T) {
	for _, late := range []bool{true, false} {
		a := newAlone(t, Options{Clean: true}, plain, aoe.Config{Buffers: 16, Sectors: 16})
		a.submit(&Request{Op: Write, LBA: 4, Data: make([]byte, 8*aoe.SectorBytes)})
		first := a.sent(1)[0]
		a.now = a.m.Next()
		a.step(Event{})
		again := a.sent(1)[0]
		lost := a.now
		a.answer(again, aoe.StatusReady, nil)
		if len(a.fx.Done) != 1 {
			t.Fatal("the copy was answered, and the write is not done")
		}
		beside := a.submit(&Request{Op: Write, LBA: 12, Data: make([]byte, aoe.SectorBytes)})
		a.answer(a.sent(1)[0], aoe.StatusReady, nil)
		if !slices.Contains(a.fx.Done, beside) {
			t.Fatal("a write beside the fence waits")
		}
		a.submit(&Request{Op: Write, LBA: 11, Data: make([]byte, 4*aoe.SectorBytes)})
		a.sent(0)
		if !a.m.Fenced() {
			t.Error("there is no fence")
		}
		if late {
			a.answer(first, aoe.StatusReady, nil)
		} else {
			a.now = lost + DefaultQuarantine - 1
			a.step(Event{})
			a.sent(0)
			if next := a.m.Next(); next != a.now+1 {
				t.Errorf("the end of the fence is expected at %s, not %s", next, a.now+1)
			}
			a.now++
			a.step(Event{})
		}
		a.answer(a.sent(1)[0], aoe.StatusReady, nil)
		if len(a.fx.Done) != 1 || a.m.Fenced() {
			t.Errorf("the write after the fence: %d done", len(a.fx.Done))
		}
	}
}

// A write whose frames must become smaller stays fenced by the large one, and by all of the small ones.
func TestFenceOfSplitFrame(t *testing.T) {
	a := newAlone(t, Options{Clean: true}, plain, aoe.Config{Buffers: 16, Sectors: 16})
	w := a.submit(&Request{Op: Write, Data: make([]byte, 16*aoe.SectorBytes)})
	large := a.sent(1)[0]
	a.m.paths[0].sectors = 4
	a.now = a.m.Next()
	a.step(Event{})
	small := a.sent(4)
	for i, f := range small {
		if got := parse(t, f); got.LBA != uint64(4*i) || got.Count != 4 {
			t.Errorf("frame %d: %+v", i, got)
		}
	}
	newer := a.submit(&Request{Op: Write, LBA: 15, Data: make([]byte, aoe.SectorBytes)})
	a.answer(large, aoe.StatusReady, nil) // of which the first small one is a part
	a.sent(0)
	for i, f := range small {
		if len(a.fx.Done) > 0 {
			t.Errorf("the write is done before frame %d was answered", i)
		}
		if a.answer(f, aoe.StatusReady, nil); i < 3 {
			a.sent(0)
		}
	}
	if !slices.Contains(a.fx.Done, w) || w.Err != nil {
		t.Errorf("the write: %v", w.Err)
	}
	a.answer(a.sent(1)[0], aoe.StatusReady, nil)
	if !slices.Contains(a.fx.Done, newer) || a.m.Fenced() {
		t.Error("the newer write is not done, or a fence stays")
	}
}

// Where frames may be delivered twice every write fences.
func TestFenceAll(t *testing.T) {
	a := newAlone(t, Options{Clean: true, FenceAll: true}, plain, aoe.Config{Buffers: 16, Sectors: 16})
	a.submit(&Request{Op: Write, Data: make([]byte, aoe.SectorBytes)})
	a.answer(a.sent(1)[0], aoe.StatusReady, nil)
	a.submit(&Request{Op: Write, Data: make([]byte, aoe.SectorBytes)})
	a.sent(0)
	a.now += DefaultQuarantine - 1
	a.step(Event{})
	a.sent(0)
	a.now++
	a.step(Event{})
	a.sent(1)
}

// Later answers show that a frame is lost, long before its time is over; the window is halved once, and not more.
func TestFastRetransmit(t *testing.T) {
	a := newAlone(t, Options{Clean: true}, plain, aoe.Config{Buffers: 16, Sectors: 1})
	p := a.m.paths[0]
	p.rtt, p.window, p.thresh = ms, 16, 16
	for i := range 16 {
		a.submit(&Request{Op: Read, LBA: uint64(i), Data: make([]byte, aoe.SectorBytes)})
	}
	// The frames are in flight; all but the first two are answered.
	tags := slices.Clone(p.flight)
	a.now += 3 * ms / 2
	resent := 0
	for n, tx := range tags[2:] {
		h := aoe.Header{Dst: hostMAC(0), Src: targetMAC(0), Version: 1, Flags: aoe.FlagResponse, Address: shelf, Tag: tx.tag}
		ata := aoe.ATA{Flags: aoe.ATAExtended, Command: aoe.StatusReady}
		a.frame(append(ata.Append(h.Append(nil)), make([]byte, aoe.SectorBytes)...))
		resent += len(a.fx.Send)
		if n == minReorder-1 && p.window != 8 {
			t.Errorf("the window is %v", p.window)
		}
	}
	if resent != 2 || p.window < 8 {
		t.Errorf("%d frames were sent again, the window is %v", resent, p.window)
	}
	late := aoe.Header{Dst: hostMAC(0), Src: targetMAC(0), Version: 1, Flags: aoe.FlagResponse, Address: shelf, Tag: tags[0].tag}
	ata := aoe.ATA{Flags: aoe.ATAExtended, Command: aoe.StatusReady}
	if a.frame(append(ata.Append(late.Append(nil)), make([]byte, aoe.SectorBytes)...)); p.reorder != 2*minReorder {
		t.Errorf("a frame was only overtaken, and still %d later ones make it lost", p.reorder)
	}
	if c := a.m.Status(a.now).Counters; c.Passed != 2 || c.Timeouts != 0 || c.Resent != 2 {
		t.Errorf("counters %+v", c)
	}
}

func TestDeadAfter(t *testing.T) {
	s := calm(t, knobs{deadAfter: time.Second})
	s.targetUp = false
	r := &Request{Op: Read, Data: make([]byte, aoe.SectorBytes)}
	began := s.now
	s.send(r)
	s.until("the failure", time.Minute, func() bool { return s.inFlight == 0 })
	if !errors.Is(r.Err, ErrDead) || s.now != began+time.Second {
		t.Errorf("%v after %s", r.Err, s.now-began)
	}
	if st := s.m.Status(s.now); st.State != StateSilent {
		t.Errorf("state %q", st.State)
	}
	s.targetUp = true
	s.until("the return", time.Second, s.m.Ready)
	r = &Request{Op: Read, Data: make([]byte, aoe.SectorBytes)}
	s.send(r)
	s.until("a read", time.Second, func() bool { return s.inFlight == 0 })
	if r.Err != nil {
		t.Error(r.Err)
	}
}

// A network that does not carry what the interface promises is told about, and used; when it is repaired, that is found.
func TestJumboThatDoesNotArrive(t *testing.T) {
	s := calm(t, knobs{carries: 1514})
	sectors := func() int { return s.m.Status(s.now).Paths[0].Sectors }
	if sectors() != 2 {
		t.Errorf("%d sectors per frame", sectors())
	}
	if !slices.ContainsFunc(s.notes, func(n Note) bool {
		return n.Bad && strings.Contains(n.Text, "frames of 16 sectors do not arrive") && strings.Contains(n.Text, "MTU of 9000")
	}) {
		t.Errorf("notes %v", s.notes)
	}
	s.k.carries = 0
	s.until("the use of jumbo frames", 2*queryUp, func() bool { return sectors() == 16 })
	// And when it breaks again, writes go on in smaller frames, under the fences of the larger ones.
	s.k.carries = 1514
	w := &Request{Op: Write, Data: make([]byte, simSectors*aoe.SectorBytes)}
	for i := range s.history {
		s.token++
		w.Data[i*aoe.SectorBytes+7] = byte(s.token)
		s.history[i] = append(s.history[i], version{token: s.token})
	}
	s.send(w)
	s.until("the write", time.Minute, func() bool { return s.inFlight == 0 })
	if w.Err != nil || sectors() != 2 || s.disk[simSectors-1] != s.token {
		t.Errorf("%v, %d sectors per frame", w.Err, sectors())
	}
}

func TestExpectedIdentity(t *testing.T) {
	for _, c := range []struct {
		serial  string
		sectors uint64
		state   string
	}{{"sim", simSectors, StateUp}, {"other", simSectors, StateRefused}, {"sim", simSectors + 1, StateRefused}} {
		s := newSim(1, knobs{networks: 1, mtu: 1500}, rand.New(rand.NewPCG(1, 2)))
		s.m.o.Identity = &aoe.Identity{Serial: c.serial, Sectors: c.sectors}
		s.step(Event{})
		s.until("a verdict", time.Second, func() bool { return s.m.Status(s.now).State != StateDiscovering && s.now > 100*ms })
		if got := s.m.Status(s.now).State; got != c.state {
			t.Errorf("serial %s, %d sectors: %q", c.serial, c.sectors, got)
		}
	}
}

// The target is gone for 4 s; from its return until requests are answered no second passes, with a cold estimate of the round trip
// and with a warm one, with and without an announcement.
func TestReturn(t *testing.T) {
	for _, warm := range []bool{true, false} {
		s := calm(t, knobs{service: ms})
		for range 100 {
			if warm {
				s.send(&Request{Op: Read, Data: make([]byte, aoe.SectorBytes)})
				s.until("a read", time.Second, func() bool { return s.inFlight == 0 })
			}
		}
		s.targetUp = false
		s.send(&Request{Op: Read, Data: make([]byte, aoe.SectorBytes)})
		gone := s.now
		s.until("four seconds", time.Minute, func() bool { return s.now >= gone+4*time.Second })
		if st := s.m.Status(s.now); st.Trouble() != "shelf e1.0 not answering for 4s" {
			t.Errorf("trouble %q, %+v", st.Trouble(), st)
		}
		s.targetUp = true
		s.until("an answer after the return", time.Second, func() bool { return s.inFlight == 0 })
		st := s.m.Status(s.now)
		if st.Counters.Resent > 8 || st.Trouble() != "" {
			t.Errorf("%d copies were sent of one frame; trouble %q", st.Counters.Resent, st.Trouble())
		}
	}
}

// TestGoodput: 1 % loss in each direction costs less than 30 % of what a clean link gives.
func TestGoodput(t *testing.T) {
	took := func(loss float64) time.Duration {
		s := calm(t, knobs{loss: loss, service: ms / 20})
		began := s.now
		for s.done < 4000 && len(s.problems) == 0 {
			for s.inFlight < 32 {
				s.send(&Request{Op: Read, LBA: uint64(s.r.IntN(simSectors - 16)), Data: make([]byte, 16*aoe.SectorBytes)})
			}
			s.advance()
		}
		return s.now - began
	}
	clean, lossy := took(0), took(0.01)
	t.Logf("clean %s, 1 %% loss %s: %.0f %%", clean, lossy, 100*float64(clean)/float64(lossy))
	if float64(clean)/float64(lossy) < 0.7 {
		t.Errorf("4000 frames took %s, and %s with 1 %% loss", clean, lossy)
	}
}

// FuzzReceive: whatever comes in, the machine does not panic, and nothing is done that was not answered under a tag in use.
func FuzzReceive(f *testing.F) {
	base := func(t *testing.T) (*alone, [][]byte) {
		a := newAlone(t, Options{Clean: true, Seed: 1}, plain, aoe.Config{Buffers: 16, Sectors: 2})
		a.submit(&Request{Op: Read, Data: make([]byte, 2*aoe.SectorBytes)})
		frames := a.sent(1)
		a.submit(&Request{Op: Write, LBA: 8, Data: make([]byte, 2*aoe.SectorBytes)})
		return a, append(frames, a.sent(1)...)
	}
	h := aoe.Header{Dst: hostMAC(0), Src: targetMAC(0), Version: 1, Flags: aoe.FlagResponse, Address: shelf, Tag: aoe.UserTag | 4}
	ata := aoe.ATA{Flags: aoe.ATAExtended, Command: aoe.StatusReady}
	f.Add(append(ata.Append(h.Append(nil)), make([]byte, 1024)...))
	h.Command = aoe.CommandConfig
	config, _ := (&aoe.Config{Buffers: 1}).Append(h.Append(nil))
	f.Add(config)
	f.Fuzz(func(t *testing.T, frame []byte) {
		a, frames := base(t)
		used := false
		for _, sent := range frames {
			used = used || len(frame) >= aoe.HeaderBytes && bytes.Equal(frame[20:24], sent[20:24])
		}
		a.frame(frame)
		if len(a.fx.Done) > 0 && !used {
			t.Fatalf("done by %x", frame)
		}
		for range 20 {
			a.now = max(a.now, a.m.Next())
			a.step(Event{})
		}
		if len(a.m.paths) > 2 || len(a.m.copies) > 64 {
			t.Fatalf("%d paths, %d copies", len(a.m.paths), len(a.m.copies))
		}
	})
}
