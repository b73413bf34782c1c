package node

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/flush/journal"
)

const (
	simSize   = 24 << 20
	simMemory = 8 << 20 // a third of the volume, so that blocks come and go
	simRing   = 4 << 20 // goes round all the time
)

// simMode is a volume by its promises.
type simMode struct {
	journal config.JournalKind
	ack     config.Ack
	flush   config.FlushMode
	sector  int
}

var simModes = []simMode{
	{config.JournalInternal, config.AckRAM, config.FlushAck, 512},
	{config.JournalInternal, config.AckDisk, config.FlushAck, 4096},
	{config.JournalInternal, config.AckRAM, config.FlushDisk, 4096},
	{config.JournalBacking, config.AckRAM, config.FlushAck, 4096},
	{config.JournalBacking, config.AckDisk, config.FlushAck, 512},
	{config.JournalBacking, config.AckRAM, config.FlushDisk, 512},
	{config.JournalNone, config.AckRAM, config.FlushDisk, 512},
	{config.JournalNone, config.AckDisk, config.FlushAck, 4096},
}

func (m simMode) String() string {
	return fmt.Sprintf("journal %s, ack %s, flush %s, sectors of %d", m.journal, m.ack, m.flush, m.sector)
}

// sim is a machine with a volume, whose power is cut and whose daemon is killed.
type sim struct {
	t       *testing.T
	mode    simMode
	fate    *rand.Rand
	power   *supply
	data    *recorder
	meta    *recorder // data, or the backing of the journal
	daemon  *config.Daemon
	config  *config.Volume
	history *history
	view    view
	volume  *Volume

	gate    sync.RWMutex // held while a request is started
	closed  bool
	dead    bool // the machine has no power, or its daemon was killed
	cuts    int
	opens   int
	visited []string // what happened, for the report of a failure
}

func newSim(t *testing.T, mode simMode, seed uint64) *sim {
	s := &sim{
		t: t, mode: mode, fate: rand.New(rand.NewPCG(seed, 11)), power: &supply{fate: rand.New(rand.NewPCG(seed, 12))},
		daemon: &config.Daemon{Shm: shmDir(t)}, history: newHistory(simSize),
		view: view{ids: make([]uint32, simSize/unitBytes)},
	}
	s.config = &config.Volume{
		Name: "v", Size: simSize, Memory: simMemory, MaxDirty: simMemory / 4, Ack: mode.ack, Flush: mode.flush, JournalSize: simRing,
		Staleness: config.Duration(time.Duration(2+s.fate.IntN(30)) * time.Millisecond), Journal: config.Journal{Kind: mode.journal},
	}
	ring := int64(simRing)
	switch mode.journal {
	case config.JournalNone:
		ring = 0
		fallthrough
	case config.JournalInternal:
		s.data = newRecorder(s.power, journal.CreateBytes(simSize, ring), simSize, mode.sector)
		s.meta = s.data
	default:
		s.data = newRecorder(s.power, simSize, simSize, mode.sector)
		s.meta = newRecorder(s.power, journal.ExternalBytes(simSize, ring), 0, mode.sector)
	}
	return s
}

func (s *sim) note(format string, args ...any) {
	s.visited = append(s.visited, fmt.Sprintf(format, args...))
}

func (s *sim) fatal(format string, args ...any) {
	s.t.Helper()
	if s.volume != nil {
		s.shut()
	}
	s.t.Fatalf("%v: %s\n%v", s.mode, fmt.Sprintf(format, args...), s.visited)
}

// tryOpen opens the volume.
func (s *sim) tryOpen() error {
	c := *s.config
	v := &Volume{config: &c, log: slog.New(slog.DiscardHandler), backing: s.data, meta: s.meta, stop: make(chan struct{})}
	if err := v.open(context.Background(), s.daemon); err != nil {
		return err
	}
	s.opens++
	s.volume, s.closed, s.dead = v, false, false
	v.flusher.Start()
	v.flusher.Wake()
	return nil
}

// shut ends the daemon as a kill does: nothing is brought home.
func (s *sim) shut() {
	s.gate.Lock()
	s.closed = true
	s.gate.Unlock()
	v := s.volume
	s.volume = nil
	if err := v.Close(); err != nil {
		s.t.Errorf("%v: close: %v", s.mode, err)
	}
}

// cut ends the power: what RAM holds is gone, and what the disks had not synced as far as chance will.
func (s *sim) cut() {
	s.cuts++
	s.forget()
	s.data.lose()
	if s.meta != s.data {
		s.meta.lose()
	}
}

// forget removes the memory file.
func (s *sim) forget() {
	if err := os.Remove(s.daemon.MemoryFile(s.config)); err != nil && !os.IsNotExist(err) {
		s.t.Fatal(err)
	}
}

// reopen opens the volume again, while the power may go again, or something fail, and after that for good.
func (s *sim) reopen(calm bool) {
	for range s.fate.IntN(4) {
		if calm {
			break
		}
		if s.fate.IntN(3) > 0 {
			s.power.again(1 + s.fate.IntN(60))
			err := s.tryOpen()
			s.note("open, power goes: %v", err)
			if err == nil {
				time.Sleep(time.Duration(s.fate.IntN(20)) * time.Millisecond)
				s.shut()
			}
			s.cut()
			continue
		}
		s.power.again(0)
		s.power.fail(1+s.fate.IntN(40), false)
		if err := s.tryOpen(); err == nil {
			s.note("open, a failure")
			s.power.again(0)
			return
		}
	}
	s.power.again(0)
	if err := s.tryOpen(); err != nil {
		s.fatal("open after %d cuts: %v", s.cuts, err)
	}
}

// asker owns an operation and takes the data of a read while they are there.
type asker struct {
	done  chan syscall.Errno
	cache *cache.Cache
	read  bool
	data  []byte
}

func (a *asker) Ended(op *cache.Op) {
	if a.read && op.Err == 0 {
		a.data = make([]byte, 0, op.Len)
		for i := range op.Pieces() {
			p, n := a.cache.Piece(op, i)
			if p == nil {
				p = make([]byte, n)
			}
			a.data = append(a.data, p...)
		}
		a.cache.Release(op)
	}
	a.done <- op.Err
}

// ask reads.
func (s *sim) ask(off, length int64) (data []byte, errno syscall.Errno, started bool) {
	a := &asker{done: make(chan syscall.Errno, 1), read: true}
	op := &cache.Op{Off: off, Len: length, Owner: a}
	s.gate.RLock()
	if s.closed || s.power.gone() {
		s.gate.RUnlock()
		return nil, 0, false
	}
	a.cache = s.volume.cache
	a.cache.Read(op)
	s.gate.RUnlock()
	errno = <-a.done
	return a.data, errno, true
}

// do is one operation of a client that is not a read.
func (s *sim) do(op *cache.Op, start func()) (errno syscall.Errno, started bool) {
	done := make(ended, 1)
	op.Owner = done
	s.gate.RLock()
	if s.closed || s.power.gone() {
		s.gate.RUnlock()
		return 0, false
	}
	start()
	s.gate.RUnlock()
	return <-done, true
}

// answered tells whether the answer of an operation counts: the client got it before the end.
func (s *sim) answered() bool {
	s.gate.RLock()
	defer s.gate.RUnlock()
	return !s.closed && !s.dead && !s.power.gone()
}

// client does n random operations, one after the other, or fewer where the volume ends. Ranges lie within its spread.
func (s *sim) client(fate *rand.Rand, n int, ranges *exclusions, small bool) {
	var op cache.Op
	for range n {
		if s.power.gone() {
			return
		}
		off, length := s.place(fate, small)
		var ok bool
		switch k := fate.IntN(20); {
		case k < 12:
			ok = s.write(&op, fate, off, length, ranges)
		case k < 15:
			ok = s.zero(&op, fate, off, length, ranges)
		case k < 17:
			ok = s.flush(&op)
		default:
			ok = s.read(off, min(length, 64<<10))
		}
		if !ok {
			return
		}
		if fate.IntN(4) == 0 {
			time.Sleep(time.Duration(fate.IntN(3000)) * time.Microsecond)
		}
	}
}

// place is a random range in bytes: often in a small hot part, so that requests meet.
func (s *sim) place(fate *rand.Rand, small bool) (off, length int64) {
	switch k := fate.IntN(10); {
	case small || k < 5:
		length = 512 * (1 + fate.Int64N(20))
	case k < 8:
		length = 4096 * (1 + fate.Int64N(24))
	default:
		length = 4096 * (1 + fate.Int64N(256))
	}
	span := int64(256 << 10)
	if fate.IntN(3) == 0 && !small {
		span = simSize
	}
	length = min(length, span)
	off = fate.Int64N(span - length + 1)
	switch fate.IntN(4) {
	case 0:
		off -= off % unitBytes
		length = min(length+fate.Int64N(8)*unitBytes, simSize-off)
	case 1:
		off -= off % sectorBytes
	default:
		off -= off % cache.BlockBytes
	}
	return off, length
}

// exclusions let nothing overlap a zero while it is under way.
type exclusions struct {
	mu    sync.Mutex
	held  []*deed
	freed chan struct{}
}

// take waits until d may go; it gives up when give reports true.
func (x *exclusions) take(d *deed) {
	for {
		x.mu.Lock()
		if x.freed == nil {
			x.freed = make(chan struct{})
		}
		freed := x.freed
		if !slices.ContainsFunc(x.held, func(o *deed) bool { return o.from < d.to && d.from < o.to && (o.zero || d.zero) }) {
			x.held = append(x.held, d)
			x.mu.Unlock()
			return
		}
		x.mu.Unlock()
		<-freed
	}
}

func (x *exclusions) free(d *deed) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.held = slices.DeleteFunc(x.held, func(o *deed) bool { return o == d })
	if x.freed != nil {
		close(x.freed)
		x.freed = nil
	}
}

func (s *sim) write(op *cache.Op, fate *rand.Rand, off, length int64, ranges *exclusions) bool {
	fua := fate.IntN(8) == 0
	d := &deed{from: uint32(off / unitBytes), to: uint32((off + length) / unitBytes)}
	d.committed = s.mode.ack == config.AckDisk || fua && s.mode.flush == config.FlushDisk
	ranges.take(d)
	defer ranges.free(d)
	s.history.begin(d)
	p := make([]byte, length)
	for u := d.from; u < d.to; u++ {
		putStamp(p[int64(u-d.from)*unitBytes:], d.id, u)
	}
	*op = cache.Op{Off: off, Len: length, FUA: fua}
	errno, started := s.do(op, func() {
		if rest := p; s.volume.cache.Reserve(op) {
			for i := range op.Parts() {
				rest = rest[copy(s.volume.cache.Dest(op, i), rest):]
			}
		} else {
			op.Payload = p
		}
		s.volume.cache.Write(op)
	})
	return s.close(d, errno, started)
}

// close notes the end of a request.
func (s *sim) close(d *deed, errno syscall.Errno, started bool) bool {
	if !started {
		s.history.never(d)
	}
	if !started || !s.answered() {
		return false
	}
	s.history.ended(d, errno == 0)
	return errno != syscall.ESHUTDOWN
}

func (s *sim) zero(op *cache.Op, fate *rand.Rand, off, length int64, ranges *exclusions) bool {
	if fate.IntN(6) == 0 {
		length = min(simSize-off, length*16)
	}
	fua := fate.IntN(8) == 0
	d := &deed{zero: true, from: uint32(off / unitBytes), to: uint32((off + length) / unitBytes)}
	d.committed = s.mode.ack == config.AckDisk || fua && s.mode.flush == config.FlushDisk
	ranges.take(d)
	defer ranges.free(d)
	// Nobody can tell one zero from another. So after one that failed, and may have taken effect, the same is asked for again
	// before anything else in its range.
	for {
		again := *d
		s.history.begin(&again)
		*op = cache.Op{Off: off, Len: length, FUA: fua}
		errno, started := s.do(op, func() { s.volume.cache.Zero(op) })
		if ok := s.close(&again, errno, started); !ok || errno == 0 {
			return ok
		}
		time.Sleep(time.Millisecond)
	}
}

func (s *sim) flush(op *cache.Op) bool {
	at := s.history.now()
	*op = cache.Op{}
	errno, started := s.do(op, func() { s.volume.cache.Flush(op) })
	if !started || !s.answered() {
		return false
	}
	if errno == 0 && (s.mode.ack == config.AckDisk || s.mode.flush == config.FlushDisk) {
		s.history.flushed(at)
	}
	return errno != syscall.ESHUTDOWN
}

// read looks whether nothing is older than what was answered before, and notes what may not vanish any more.
func (s *sim) read(off, length int64) bool {
	at := s.history.now()
	data, errno, started := s.ask(off, length)
	if !started {
		return false
	}
	if errno != 0 {
		if errno != syscall.ESHUTDOWN && s.answered() && s.power.faulty == 0 {
			s.t.Errorf("%v: read of %d bytes at %d: %v", s.mode, length, off, errno)
		}
		return errno != syscall.ESHUTDOWN
	}
	if !s.answered() {
		return false
	}
	for i := int64(0); i < length; i += unitBytes {
		unit := uint32((off + i) / unitBytes)
		id, ok := stampOf(data[i:], unit)
		if !ok {
			s.t.Errorf("%v: unit %d reads as something nobody wrote", s.mode, unit)
			return false
		}
		if why := s.history.stale(unit, id, at); why != "" {
			s.t.Errorf("%v: %s", s.mode, why)
			return false
		}
		if s.mode.ack == config.AckDisk {
			s.history.read(id)
		}
	}
	return true
}

// stale tells why a read that began at that time may not have found that a request wrote a unit last.
func (h *history) stale(unit, id uint32, at int) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, d := range h.deeds {
		if d.end == 0 || d.end > at || !d.covers(unit) || id == d.id || id == 0 && d.zero {
			continue
		}
		if id == 0 && slices.ContainsFunc(h.deeds, func(z *deed) bool { return z.zero && z.covers(unit) && d.before(z) }) {
			continue
		}
		if id < h.first || h.deeds[id-h.first].before(d) {
			return fmt.Sprintf("a read after request %d finds unit %d as request %d left it", d.id, unit, id)
		}
	}
	return ""
}

// live lets clients and an observer at the volume, until all of them have ended or the power is gone.
func (s *sim) live(operations int, small bool) {
	depth := []int{1, 1, 2, 4, 8, 16}[s.fate.IntN(6)]
	var clients, observer sync.WaitGroup
	stop := make(chan struct{})
	ranges := new(exclusions)
	for range depth {
		fate := rand.New(rand.NewPCG(s.fate.Uint64(), 13))
		clients.Go(func() { s.client(fate, max(1, operations/depth), ranges, small) })
	}
	pause := time.Duration(1+s.fate.IntN(5)) * time.Millisecond
	v := s.volume
	observer.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(pause):
			}
			e := v.Status().Epoch
			if s.answered() {
				s.history.sawSeals(e.Open-1, e.Committed)
			}
		}
	})
	ended := make(chan struct{})
	go func() {
		clients.Wait()
		close(ended)
	}()
	for over := false; !over && !s.power.gone(); {
		select {
		case <-ended:
			over = true
		case <-time.After(time.Millisecond):
		}
	}
	s.gate.Lock()
	s.dead = true
	s.gate.Unlock()
	close(stop)
	observer.Wait()
	s.shut()
	<-ended
}

// shown reads all blocks that were ever touched, and some more, or everything.
func (s *sim) shown(everything bool) *view {
	sorted := slices.Collect(maps.Keys(s.history.seen))
	for range 20 {
		sorted = append(sorted, uint32(s.fate.IntN(simSize/cache.BlockBytes)))
	}
	if everything {
		for b := range uint32(simSize / cache.BlockBytes) {
			sorted = append(sorted, b)
		}
	}
	slices.Sort(sorted)
	sorted = slices.Compact(sorted)
	s.view.blocks = sorted
	for i := 0; i < len(sorted); {
		j := i + 1
		for j < len(sorted) && sorted[j] == sorted[j-1]+1 && j-i < 64 {
			j++
		}
		data, errno, _ := s.ask(int64(sorted[i])*cache.BlockBytes, int64(j-i)*cache.BlockBytes)
		if errno != 0 {
			s.fatal("read of block %d: %v", sorted[i], errno)
		}
		s.see(sorted[i], data)
		i = j
	}
	return &s.view
}

// see notes who wrote the units of data.
func (s *sim) see(block uint32, data []byte) {
	for at := 0; at < len(data); at += unitBytes {
		unit := block*unitsPerBlock + uint32(at/unitBytes)
		id, ok := stampOf(data[at:], unit)
		if !ok {
			s.fatal("unit %d holds what nobody wrote: %x", unit, data[at:at+unitBytes])
		}
		s.view.ids[unit] = id
	}
}

// round lets the machine live until its power is cut or its daemon is killed, and judges what is there afterwards.
func (s *sim) round(operations int, small bool) {
	kill, forgets := s.fate.IntN(5) == 0, false
	if kill {
		forgets = s.fate.IntN(4) == 0 // the daemon is killed and its memory file removed, and the power stays
	}
	horizon := 1 + s.fate.IntN(2*operations)
	s.power.again(horizon)
	if s.fate.IntN(4) == 0 {
		s.power.mu.Lock()
		s.power.faulty = 15 + s.fate.IntN(40)
		s.power.mu.Unlock()
	}
	s.note("live, power goes in %d operations of the disks", horizon)
	s.live(operations, small)
	if kill && !forgets {
		s.note("kill")
		s.history.killed()
		s.power.again(0)
		if err := s.tryOpen(); err != nil {
			s.fatal("warm start: %v", err)
		}
		shown := s.shown(false)
		if why := s.history.judge(shown, s.history.answered()); why != "" {
			s.fatal("after a kill: %s", why)
		}
		s.history.revealed(shown)
		return
	}
	if forgets {
		s.note("memory lost")
		s.forget()
	} else {
		s.note("cut")
		s.cut()
	}
	s.reopen(false)
	shown := s.shown(s.fate.IntN(30) == 0)
	if s.mode.journal == config.JournalNone {
		if why := s.history.judgeUnordered(shown); why != "" {
			s.fatal("after a power cut: %s", why)
		}
	} else if why := s.history.judge(shown, nil); why != "" {
		s.fatal("after a power cut: %s", why)
	}
	s.history.settle(shown)
}

// judgeUnordered is judge where there is no journal: what may not be missing is there or something that came after it, and
// nothing is there that nobody wrote.
func (h *history) judgeUnordered(shown *view) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, d := range h.deeds {
		for unit := d.from; d.must && unit < d.to; unit++ {
			id := shown.ids[unit]
			switch {
			case id == d.id || id == 0 && d.zero:
			case id == 0:
				if !slices.ContainsFunc(h.deeds, func(z *deed) bool { return z.zero && z.covers(unit) && d.before(z) }) {
					return fmt.Sprintf("unit %d is zero, request %d wrote it last and was committed", unit, d.id)
				}
			case id < h.first || h.deeds[id-h.first].before(d):
				return fmt.Sprintf("unit %d is of request %d, but request %d was committed", unit, id, d.id)
			}
		}
	}
	return ""
}

// simSeeds is how many machines a test has: n, a quarter of that with -short, or as many times more as SIM_SEEDS says.
func simSeeds(n uint64) uint64 {
	times := uint64(1)
	if testing.Short() {
		n = (n + 3) / 4
	}
	fmt.Sscan(os.Getenv("SIM_SEEDS"), &times)
	return n * times
}

// TestVolumePowerCuts lets machines live and lose their power or their daemon, again and again.
func TestVolumePowerCuts(t *testing.T) {
	cuts, opens := 0, 0
	for seed := range simSeeds(16) {
		mode := simModes[int(seed)%len(simModes)]
		t.Run(fmt.Sprintf("%d %v", seed, mode), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSim(t, mode, seed)
				s.reopen(true)
				for range 12 {
					s.round(10+s.fate.IntN(80), s.fate.IntN(3) == 0)
				}
				s.shut()
				for _, p := range s.power.problems {
					t.Error(p)
				}
				cuts, opens = cuts+s.cuts, opens+s.opens
			})
		})
	}
	t.Logf("%d power cuts, %d starts", cuts, opens)
}
