package system

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A stamp certifies a sector: it names the write that put it there and the range of that write, so that one
// sector tells torn, misdirected, stale and foreign data apart.
//
//	0 magic u64 · 8 sector u64 · 16 write u64 · 24 first sector u64 · 32 sectors u32 · 36 run u32
//	40 fill of the write and sector · 508 CRC32C of bytes 0 to 508
const stampMagic = 0x5253_7374_616d_7031

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func putStamp(p []byte, sector int64, id uint64, first int64, sectors int, run uint32) {
	binary.LittleEndian.PutUint64(p[0:], stampMagic)
	binary.LittleEndian.PutUint64(p[8:], uint64(sector))
	binary.LittleEndian.PutUint64(p[16:], id)
	binary.LittleEndian.PutUint64(p[24:], uint64(first))
	binary.LittleEndian.PutUint32(p[32:], uint32(sectors))
	binary.LittleEndian.PutUint32(p[36:], run)
	x := id*0x9e3779b97f4a7c15 + uint64(sector)
	for i := 40; i < 504; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[i:], x)
	}
	binary.LittleEndian.PutUint32(p[504:], run)
	binary.LittleEndian.PutUint32(p[508:], crc32.Checksum(p[:508], castagnoli))
}

const (
	never = math.MaxInt64 // the time of an answer that did not come
	zero  = 0             // the write that a sector of zeros is ascribed to
)

// entry is one write: its range and when it was sent and answered, by the ledger's own clock.
type entry struct {
	first      int64
	sectors    int
	sent, done int64
}

// ledger knows every write that was sent and answered, and judges what is read. It checks, per sector, that a
// value was written and is no older than any write answered before the read was sent (which for a read after a
// restart is durability); and per block that each write is there as a whole or not at all.
type ledger struct {
	run    uint32
	faults atomic.Int64
	report func(string)

	mu      sync.Mutex
	clock   int64
	writes  []entry // the id is the index
	floor   []int64 // per sector: when the latest of the answered writes was sent
	zeroed  []int64 // per sector: when the latest zeroing was answered
	zeroing []int16 // per sector: how many zeroings are not answered
	answers int
}

func newLedger(t testing.TB, size int64) *ledger {
	l := &ledger{
		run:     rand.Uint32(),
		writes:  make([]entry, 1),
		floor:   make([]int64, size/sectorBytes),
		zeroed:  make([]int64, size/sectorBytes),
		zeroing: make([]int16, size/sectorBytes),
	}
	l.report = func(msg string) { t.Error(msg) }
	l.clock = 1
	return l
}

// fault reports a violation, a few times.
func (l *ledger) fault(format string, args ...any) {
	if l.faults.Add(1) <= 10 {
		l.report(fmt.Sprintf(format, args...))
	}
}

func (l *ledger) now() int64 {
	l.clock++
	return l.clock
}

// send records that a write, or a zeroing, goes out.
func (l *ledger) send(first int64, sectors int, zeroing bool) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writes = append(l.writes, entry{first, sectors, l.now(), never})
	if zeroing {
		for s := first; s < first+int64(sectors); s++ {
			l.zeroing[s]++
		}
	}
	return uint64(len(l.writes) - 1)
}

// answered records that the write was answered.
func (l *ledger) answered(id uint64, zeroing bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := &l.writes[id]
	w.done = l.now()
	l.answers++
	for s := w.first; s < w.first+int64(w.sectors); s++ {
		l.floor[s] = max(l.floor[s], w.sent)
		if zeroing {
			l.zeroing[s]--
			l.zeroed[s] = w.done
		}
	}
}

// restarted records that every connection is gone: what was not answered until now is there or is not.
func (l *ledger) restarted() {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.now()
	for i := range l.writes {
		if l.writes[i].done == never {
			l.writes[i].done = at
		}
	}
	for s := range l.zeroing {
		if l.zeroing[s] > 0 {
			l.zeroing[s], l.zeroed[s] = 0, at
		}
	}
}

// floors is what a read of the range must not fall behind, taken before it is sent.
func (l *ledger) floors(dst []int64, first int64, sectors int) []int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append(dst[:0], l.floor[first:first+int64(sectors)]...)
}

// check judges data read from the sectors at first; floors is what floors returned before the read was sent.
// whole says that a write must be there as a whole or not at all in all of data, else in each block of it.
func (l *ledger) check(first int64, data []byte, floors []int64, whole bool) {
	owners := make([]uint64, len(data)/sectorBytes)
	for i := range owners {
		owners[i] = l.owner(first+int64(i), data[i*sectorBytes:][:sectorBytes])
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, id := range owners {
		if done := l.doneOf(id, first+int64(i)); done < floors[i] {
			l.fault("sector %d holds write %d (answered at %d), but a write sent later, at %d, had been answered: an answered write is lost",
				first+int64(i), id, done, floors[i])
		}
	}
	if whole {
		l.checkWhole(first, owners)
		return
	}
	const perBlock = blockBytes / sectorBytes
	for i := 0; i < len(owners); {
		n := min(perBlock-int(first+int64(i))%perBlock, len(owners)-i)
		l.checkWhole(first+int64(i), owners[i:i+n])
		i += n
	}
}

// owner is the write that the stamp of a sector names.
func (l *ledger) owner(sector int64, p []byte) uint64 {
	id, fault := readStamp(sector, p, l.run)
	if fault != "" {
		l.fault("%s", fault)
	}
	return id
}

// readStamp is the write of the run that the stamp of a sector names, zero where the sector is zeros, and what is wrong with it.
func readStamp(sector int64, p []byte, run uint32) (id uint64, fault string) {
	if binary.LittleEndian.Uint64(p) == 0 && allZero(p) {
		return zero, ""
	}
	id = binary.LittleEndian.Uint64(p[16:])
	switch {
	case binary.LittleEndian.Uint64(p) != stampMagic:
		fault = fmt.Sprintf("sector %d holds bytes that nobody wrote: %x…", sector, p[:40])
	case crc32.Checksum(p[:508], castagnoli) != binary.LittleEndian.Uint32(p[508:]):
		fault = fmt.Sprintf("sector %d is torn: its stamp names write %d and its checksum is wrong", sector, id)
	case binary.LittleEndian.Uint64(p[8:]) != uint64(sector):
		fault = fmt.Sprintf("sector %d holds the content of sector %d", sector, binary.LittleEndian.Uint64(p[8:]))
	case binary.LittleEndian.Uint32(p[36:]) != run:
		fault = fmt.Sprintf("sector %d holds content of another run", sector)
	default:
		return id, ""
	}
	return zero, fault
}

// doneOf is when the owner of a sector was answered, never if it was not.
func (l *ledger) doneOf(id uint64, sector int64) int64 {
	if id == zero {
		if l.zeroing[sector] > 0 {
			return never
		}
		return l.zeroed[sector]
	}
	return l.writes[id].done
}

// checkWhole checks that no write is there in part: where its range holds something else, that must have been
// able to come after it.
func (l *ledger) checkWhole(first int64, owners []uint64) {
	end := first + int64(len(owners))
	var last uint64
	for _, a := range owners {
		if a == zero || a == last {
			continue
		}
		last = a
		w := l.writes[a]
		lo, hi := max(w.first, first), min(w.first+int64(w.sectors), end)
		seen := a
		for s := lo; s < hi; s++ {
			x := owners[s-first]
			if x == a || x == seen {
				continue
			}
			if l.doneOf(x, s) < w.sent {
				l.fault("write %d (sectors %d+%d) is torn: it is there in part, and sector %d holds the older write %d",
					a, w.first, w.sectors, s, x)
				return
			}
			if x == zero {
				continue
			}
			seen = x
			y := l.writes[x]
			for both := max(lo, y.first); both < min(hi, y.first+int64(y.sectors)); both++ {
				if owners[both-first] == a {
					l.fault("writes %d (%d+%d) and %d (%d+%d) are mixed: sector %d holds the one and sector %d the other",
						a, w.first, w.sectors, x, y.first, y.sectors, both, s)
					return
				}
			}
		}
	}
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// load is a number of clients that stamp, zero and read a volume at random until they are stopped.
type load struct {
	connections int
	depths      []int // of the connections, in turn
	maxSectors  int
	hotSectors  int64 // half of the requests go to the first of the volume, so that they overlap
	readPercent int
	zeroPercent int
}

// run works on the server until stop is closed or every connection is lost. Errors that allowed permits leave the
// outcome of a write unknown.
func (d load) run(s server, l *ledger, stop <-chan struct{}, allowed func(syscall.Errno) bool) {
	var wg sync.WaitGroup
	for i := range d.connections {
		wg.Go(func() { d.client(s, l, d.depths[i%len(d.depths)], stop, allowed) })
	}
	wg.Wait()
}

func (d load) client(s server, l *ledger, depth int, stop <-chan struct{}, allowed func(syscall.Errno) bool) {
	c, err := dialNBD(s.socket(), s.export())
	if err != nil {
		return // killed already
	}
	defer c.Conn.Close()
	p := newPipe(c, depth, func(o *operation, errno syscall.Errno) { d.answer(l, o, errno, allowed) })
	rng := rand.New(rand.NewPCG(rand.Uint64(), 1))
	for {
		select {
		case <-stop:
			c.SetDeadline(time.Now().Add(30 * time.Second))
			if !p.drain() {
				<-p.readEnd
				if os.IsTimeout(p.err) {
					l.fault("requests were not answered for 30 s")
				}
			}
			return
		default:
		}
		if !p.submit(func(o *operation) { d.next(l, o, rng) }) {
			return
		}
	}
}

func (d load) next(l *ledger, o *operation, rng *rand.Rand) {
	if o.data == nil {
		o.data = make([]byte, d.maxSectors*sectorBytes)
	}
	sectors := 1 + rng.IntN(d.maxSectors)
	if rng.IntN(4) > 0 {
		sectors = 1 + rng.IntN(min(d.maxSectors, 16))
	}
	span := int64(len(l.floor))
	if d.hotSectors > 0 && rng.IntN(2) == 0 {
		span = d.hotSectors
	}
	first := rng.Int64N(span - int64(sectors) + 1)
	o.flags, o.off, o.length = 0, first*sectorBytes, sectors*sectorBytes
	switch dice := rng.IntN(100); {
	case dice < d.readPercent:
		o.cmd = cmdRead
		o.floors = l.floors(o.floors, first, sectors)
	case dice < d.readPercent+d.zeroPercent:
		o.cmd = cmdWriteZeroes
		o.id = l.send(first, sectors, true)
	default:
		o.cmd = cmdWrite
		if rng.IntN(50) == 0 {
			o.flags = flagFUA
		}
		o.id = l.send(first, sectors, false)
		for i := range sectors {
			putStamp(o.data[i*sectorBytes:][:sectorBytes], first+int64(i), o.id, first, sectors, l.run)
		}
	}
}

func (d load) answer(l *ledger, o *operation, errno syscall.Errno, allowed func(syscall.Errno) bool) {
	if errno != 0 {
		if allowed == nil || !allowed(errno) {
			l.fault("command %d at %d+%d: %v", o.cmd, o.off, o.length, errno)
		}
		return
	}
	switch o.cmd {
	case cmdRead:
		l.check(o.off/sectorBytes, o.data[:o.length], o.floors, false)
	case cmdWrite, cmdWriteZeroes:
		l.answered(o.id, o.cmd == cmdWriteZeroes)
	}
}

// verify reads the whole volume after a restart and judges it.
func (l *ledger) verify(t testing.TB, s server, whole bool) {
	t.Helper()
	l.restarted()
	l.verifyData(readAll(t, s, 0, int64(len(l.floor))*sectorBytes), whole)
}

// verifyFile judges the content of the file after a clean stop, in chunks.
func (l *ledger) verifyFile(t testing.TB, path string) {
	t.Helper()
	l.restarted()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, int64(len(l.floor))*sectorBytes)
	if _, err := f.ReadAt(data, 0); err != nil {
		t.Fatal(err)
	}
	l.verifyData(data, false)
}

func (l *ledger) verifyData(data []byte, whole bool) {
	l.check(0, data, l.floors(nil, 0, len(l.floor)), whole)
}
