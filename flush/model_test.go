package flush

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Kinds of operations of a backing.
const (
	opRead  = "read"
	opWrite = "write"
	opZero  = "zero"
	opSync  = "sync"
)

// Ways in which an operation goes wrong.
const (
	faultFail = "fail" // an error, nothing done
	faultTear = "tear" // any part done, then an error
	faultHang = "hang" // done, after a long time
)

// hangTime is how long a hanging operation takes on the clock of the bubble.
const hangTime = 10 * time.Second

// medium is a disk with a volatile cache. It knows which writes a power cut could undo.
type medium struct {
	mu  sync.Mutex
	rng *rand.Rand

	cache   []byte     // what reads return
	durable []byte     // what is there after a power cut, without any of what follows
	pending []modelOp  // unsynced: a power cut keeps any subset of them
	flying  []*modelOp // writes in flight: a power cut keeps any part of them
	written uint64     // number of the last of pending

	moment   func() // called, without lock, when something has changed; nil: nobody looks
	problems []string
}

// modelBacking is a way to a medium, for one lane. It watches how it is used.
type modelBacking struct {
	*medium
	from, to  int64 // the part of the medium that is its own
	sector    int
	unordered bool // writes need not ascend

	inFlight []modelOp
	lastDone map[string]int64 // highest offset of a completed operation of the pass, by kind

	fault func(kind string, n int) string // which fault hits the n-th operation of its kind, from 1
	count map[string]int
}

// modelOp is an operation on a range; data is nil for one that writes nothing.
type modelOp struct {
	kind   string
	off    int64
	n      int64
	data   []byte
	number uint64 // in the order in which they were done
}

func newModelBacking(size int64, sector int, rng *rand.Rand) *modelBacking {
	m := &medium{rng: rng, cache: make([]byte, size)}
	fillRandom(rng, m.cache)
	m.durable = bytes.Clone(m.cache)
	return m.way(0, size, sector)
}

// way is another way to the medium.
func (m *medium) way(from, to int64, sector int) *modelBacking {
	return &modelBacking{
		medium: m, from: from, to: to, sector: sector, lastDone: map[string]int64{}, count: map[string]int{},
		fault: func(string, int) string { return "" },
	}
}

// fillRandom fills whole sectors.
func fillRandom(rng *rand.Rand, p []byte) {
	for ; len(p) >= 8; p = p[8:] {
		binary.LittleEndian.PutUint64(p, rng.Uint64())
	}
}

// image is what a power cut leaves: of every sector the durable content or that of some write since. Callers hold mu.
func (m *medium) image(rng *rand.Rand) []byte {
	image := bytes.Clone(m.durable)
	keep := []float64{0, 0.1, 0.5, 0.9, 1}[rng.IntN(5)]
	for _, o := range m.pending {
		if rng.Float64() < keep {
			copy(image[o.off:], o.data)
		}
	}
	for _, o := range m.flying {
		for i := int64(0); i < o.n; i += SectorBytes {
			if rng.Float64() < keep {
				copy(image[o.off+i:], o.data[i:i+SectorBytes])
			}
		}
	}
	return image
}

func (m *medium) happened() {
	if m.moment != nil {
		m.moment()
	}
}

func (m *medium) problem(format string, args ...any) {
	if len(m.problems) < 10 {
		m.problems = append(m.problems, fmt.Sprintf(format, args...))
	}
}

// newOrder tells that zeroes or blocks are written from the lowest again.
func (b *modelBacking) newOrder() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.inFlight) > 0 {
		b.problem("zeroes or blocks begin with %d operations in flight", len(b.inFlight))
	}
	clear(b.lastDone)
}

// enter checks an operation against the ones in flight and says how it will end.
func (b *modelBacking) enter(kind string, off, n int64) string {
	defer b.happened()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.count[kind]++
	if kind != opSync && (off < b.from || off+n > b.to) || off%int64(b.sector) != 0 || n%int64(b.sector) != 0 {
		b.problem("%s of %d bytes at %d: not whole sectors inside the backing", kind, n, off)
	}
	for _, o := range b.inFlight {
		if off < o.off+o.n && o.off < off+n && (kind != opRead || o.kind != opRead) {
			b.problem("%s of %d bytes at %d while a %s of %d at %d is in flight", kind, n, off, o.kind, o.n, o.off)
		}
		if kind == opSync || o.kind == opSync {
			b.problem("%s while a %s is in flight", kind, o.kind)
		}
	}
	if last, ok := b.lastDone[kind]; ok && !b.unordered && kind != opRead && kind != opSync && off <= last {
		b.problem("%s at %d started after the one at %d had ended", kind, off, last)
	}
	b.inFlight = append(b.inFlight, modelOp{kind: kind, off: off, n: n})
	return b.fault(kind, b.count[kind])
}

func (b *modelBacking) leave(kind string, off, n int64) {
	i := slices.IndexFunc(b.inFlight, func(o modelOp) bool { return o.kind == kind && o.off == off && o.n == n })
	b.inFlight = slices.Delete(b.inFlight, i, i+1)
	if last, ok := b.lastDone[kind]; !ok || off > last {
		b.lastDone[kind] = off
	}
}

// latency lets operations overlap. It is never 0: time passes only when every goroutine waits, so no operation
// ends while a writer is between its turn and its call.
func (b *modelBacking) latency(fault string) {
	b.mu.Lock()
	d := time.Duration(1+b.rng.IntN(1000)) * time.Microsecond
	b.mu.Unlock()
	if fault == faultHang {
		d += hangTime
	}
	time.Sleep(d)
}

// change does a write: it is in the cache at once and durable who knows when.
func (b *modelBacking) change(kind string, off int64, data []byte) error {
	return b.finish(kind, off, data, b.enter(kind, off, int64(len(data))))
}

// finish is the rest of change after enter.
func (b *modelBacking) finish(kind string, off int64, data []byte, fault string) error {
	n := int64(len(data))
	flying := &modelOp{kind: kind, off: off, n: n, data: data}
	b.mu.Lock()
	if fault != faultFail {
		b.flying = append(b.flying, flying)
	}
	b.mu.Unlock()
	b.latency(fault)
	defer b.happened()
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.leave(kind, off, n)
	b.flying = slices.DeleteFunc(b.flying, func(o *modelOp) bool { return o == flying })
	if fault == faultFail {
		return syscall.EIO
	}
	for i := int64(0); i < n; i += SectorBytes {
		if fault == faultTear && b.rng.IntN(2) == 0 {
			continue
		}
		sector := bytes.Clone(data[i : i+SectorBytes])
		copy(b.cache[off+i:], sector)
		b.written++
		b.pending = append(b.pending, modelOp{kind: kind, off: off + i, n: SectorBytes, data: sector, number: b.written})
	}
	if fault == faultTear {
		return syscall.EIO
	}
	return nil
}

func (b *modelBacking) ReadAt(p []byte, off int64) (int, error) {
	fault := b.enter(opRead, off, int64(len(p)))
	b.latency(fault)
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.leave(opRead, off, int64(len(p)))
	switch fault {
	case faultFail:
		return 0, syscall.EIO
	case faultTear:
		return copy(p, b.cache[off:off+int64(len(p))/2]), io.ErrUnexpectedEOF
	}
	return copy(p, b.cache[off:]), nil
}

func (b *modelBacking) WriteAt(p []byte, off int64) (int, error) {
	if err := b.change(opWrite, off, bytes.Clone(p)); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (b *modelBacking) Sync() error {
	fault := b.enter(opSync, 0, 0)
	b.mu.Lock()
	covered := b.written
	b.mu.Unlock()
	b.latency(fault)
	b.mu.Lock()
	failed := fault == faultFail || fault == faultTear
	b.pending = slices.DeleteFunc(b.pending, func(o modelOp) bool {
		if o.number > covered {
			return false
		}
		// A sync that failed has dropped what it did not write: a later one does not bring it back.
		if !failed || fault == faultTear && b.rng.IntN(2) == 0 {
			copy(b.durable[o.off:], o.data)
		}
		return true
	})
	b.mu.Unlock()
	b.happened()
	b.latency("") // what it did is done before it says so
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.leave(opSync, 0, 0)
	if failed {
		return syscall.EIO
	}
	return nil
}

func (b *modelBacking) SectorBytes() int { return b.sector }

// richBacking is a modelBacking with every ability.
type richBacking struct{ *modelBacking }

func (b richBacking) WritevAt(bufs [][]byte, off int64) error {
	return b.change(opWrite, off, slices.Concat(bufs...))
}

func (b richBacking) Zero(off, n int64) error { return b.change(opZero, off, make([]byte, n)) }

// asyncBacking is a richBacking whose writes end in the background and are reaped.
type asyncBacking struct {
	richBacking
	ended chan func()
}

func newAsyncBacking(b *modelBacking) asyncBacking {
	return asyncBacking{richBacking{b}, make(chan func(), MaxDepth)}
}

func (b asyncBacking) Async() bool { return true }

func (b asyncBacking) StartWritev(bufs [][]byte, off int64, done func(error)) {
	data := slices.Concat(bufs...)
	fault := b.enter(opWrite, off, int64(len(data)))
	if fault == faultFail { // a write may also end at once
		done(b.finish(opWrite, off, data, fault))
		return
	}
	go func() {
		err := b.finish(opWrite, off, data, fault)
		b.ended <- func() { done(err) }
	}()
}

func (b asyncBacking) Reap() {
	(<-b.ended)()
	for {
		select {
		case done := <-b.ended:
			done()
		default:
			return
		}
	}
}

// modelSource is a cache with immutable versions, and the judge of what the flusher says about them.
type modelSource struct {
	mu      sync.Mutex
	rng     *rand.Rand
	backing *modelBacking
	wake    func()
	journal *modelJournal // nil: a seal is committed by being home

	volume   []byte // logical content
	resident []bool // block is whole in memory

	// Versions of the open epoch, of the seal being committed, committed ones, and those of the sweep.
	open, sealed, home, going                      map[uint64]*modelVersion
	openZeroes, sealedZeroes, homeZeroes, sweeping []Zero
	openNumbers, sealedNumbers                     []uint64 // of the zeroes
	next                                           uint64   // where Next goes on
	given                                          []Block
	zeroesGiven                                    bool

	settled map[int64][]byte // sector offset: content that the flusher said is durable and that nothing changes now

	number          uint64 // of the last write, zero or seal
	seal, committed uint64
	failed          int
	pressed         bool
}

// modelVersion is a version of a block.
type modelVersion struct {
	number       uint64
	valid, dirty uint8
	data         []byte
}

func newModelSource(b *modelBacking, rng *rand.Rand) *modelSource {
	s := &modelSource{
		rng: rng, backing: b, volume: bytes.Clone(b.cache[:b.to]), resident: make([]bool, b.to/BlockBytes),
		open: map[uint64]*modelVersion{}, sealed: map[uint64]*modelVersion{}, home: map[uint64]*modelVersion{},
		going: map[uint64]*modelVersion{}, settled: map[int64][]byte{}, wake: func() {},
	}
	for off := int64(0); off < b.to; off += SectorBytes {
		s.settled[off] = bytes.Clone(b.cache[off:][:SectorBytes])
	}
	return s
}

// publish writes random data to a run of sectors of one block.
func (s *modelSource) publish(number uint64, first, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.journal != nil && s.journal.lost[number] != 0 && s.open[number] == nil {
		first, n = 0, BlockBytes/SectorBytes // what is lost is written whole or not at all
	}
	mask := sectorMask(first, n)
	off := int64(number) * BlockBytes
	fillRandom(s.rng, s.volume[off+int64(first)*SectorBytes:][:n*SectorBytes])
	v := s.open[number]
	if v == nil {
		v = &modelVersion{}
		s.open[number] = v
		// A version covers the one that it supersedes.
		for _, older := range [3]map[uint64]*modelVersion{s.sealed, s.home, s.going} {
			if old := older[number]; old != nil {
				v.valid, v.dirty = v.valid|old.valid, v.dirty|old.dirty
			}
		}
	}
	v.valid, v.dirty = v.valid|mask, v.dirty|mask
	if s.resident[number] || v.valid == allSectors {
		v.valid, s.resident[number] = allSectors, true
	}
	v.data = bytes.Clone(s.volume[off:][:BlockBytes])
	s.number++
	v.number = s.number
}

// zero zeroes whole blocks.
func (s *modelSource) zero(first, n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := first; i < first+n; i++ {
		delete(s.open, i)
		clear(s.volume[i*BlockBytes:][:BlockBytes])
		s.resident[i] = true
	}
	s.openZeroes = append(s.openZeroes, Zero{int64(first) * BlockBytes, int64(n) * BlockBytes})
	s.number++
	s.openNumbers = append(s.openNumbers, s.number)
}

func (s *modelSource) dirty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)+len(s.openZeroes)+s.left() > 0
}

// left is how much of what is sealed is not home.
func (s *modelSource) left() int {
	return len(s.sealed) + len(s.sealedZeroes) + len(s.home) + len(s.homeZeroes) + len(s.going) + len(s.sweeping)
}

func (s *modelSource) problem(format string, args ...any) {
	s.backing.mu.Lock()
	defer s.backing.mu.Unlock()
	s.backing.problem(format, args...)
}

func (s *modelSource) Seal() (uint64, int64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seal != s.committed || len(s.sealed)+len(s.sealedZeroes) > 0 || s.journal == nil && s.left()+len(s.given) > 0 {
		s.problem("seal before seal %d is committed, %d blocks left", s.seal, len(s.sealed))
	}
	changed := s.number > s.seal
	s.number++
	s.seal = s.number
	s.sealed, s.open = s.open, map[uint64]*modelVersion{}
	s.sealedZeroes, s.openZeroes = s.openZeroes, nil
	s.sealedNumbers, s.openNumbers = s.openNumbers, nil
	if s.journal != nil {
		s.journal.sealed(s, changed)
	}
	return s.seal, int64(len(s.sealed)) * BlockBytes, changed
}

func (s *modelSource) Sweep() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.going)+len(s.sweeping)+len(s.given) > 0 {
		s.problem("sweep begins with %d blocks of the last one left", len(s.going))
	}
	from, zeroes := &s.home, &s.homeZeroes
	if s.journal == nil {
		from, zeroes = &s.sealed, &s.sealedZeroes
	}
	s.going, *from = *from, map[uint64]*modelVersion{}
	s.sweeping, *zeroes = *zeroes, nil
	return len(s.going)+len(s.sweeping) > 0
}

func (s *modelSource) Zeroes(dst []Zero) []Zero {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.backing.newOrder()
	if len(s.given) > 0 {
		s.problem("pass begins with %d blocks neither synced nor given back", len(s.given))
	}
	s.next = 0
	s.zeroesGiven = true
	for _, z := range s.sweeping {
		s.unsettle(z.Off, z.Bytes, 0xff)
	}
	return append(dst, s.sweeping...)
}

func (s *modelSource) Next(dst []Block) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next == 0 {
		s.backing.newOrder()
	}
	n := 0
	for ; n < len(dst) && s.next < uint64(len(s.resident)); s.next++ {
		if v := s.going[s.next]; v != nil {
			if s.home[s.next] != nil && s.rng.IntN(2) == 0 {
				delete(s.going, s.next) // a newer committed version covers it
				continue
			}
			dst[n] = s.lend(s.next, v.valid, v.dirty, v.data)
			s.unsettle(int64(s.next)*BlockBytes, BlockBytes, v.dirty)
			n++
		}
	}
	return n
}

func (s *modelSource) Bridge(first uint64, dst []Block) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for ; n < len(dst); n++ {
		i := first + uint64(n)
		older := s.sealed[i] != nil || s.home[i] != nil || s.going[i] != nil
		lost := s.journal != nil && (s.journal.lost[i] != 0 || s.journal.was[i] != 0)
		if !s.resident[i] || s.open[i] != nil || older || lost || s.zeroed(i) {
			break
		}
		dst[n] = s.lend(i, allSectors, 0, s.volume[i*BlockBytes:][:BlockBytes])
	}
	return n
}

func (s *modelSource) zeroed(number uint64) bool {
	off := int64(number) * BlockBytes
	in := func(z Zero) bool { return off >= z.Off && off < z.Off+z.Bytes }
	for _, list := range [4][]Zero{s.openZeroes, s.sealedZeroes, s.homeZeroes, s.sweeping} {
		if slices.ContainsFunc(list, in) {
			return true
		}
	}
	return false
}

// lend gives out a copy, which is spoilt when it is taken back.
func (s *modelSource) lend(number uint64, valid, dirty uint8, data []byte) Block {
	b := Block{Number: number, Valid: valid, Dirty: dirty, Data: bytes.Clone(data)}
	for i := range BlockBytes / SectorBytes {
		if valid&(1<<i) == 0 {
			fillRandom(s.rng, b.Data[i*SectorBytes:][:SectorBytes])
		}
	}
	s.given = append(s.given, b)
	return b
}

// unsettle says that the disk may have old or new content in these sectors of every block.
func (s *modelSource) unsettle(off, n int64, mask uint8) {
	s.backing.mu.Lock()
	defer s.backing.mu.Unlock()
	for i := int64(0); i < n; i += SectorBytes {
		if mask&(1<<(i/SectorBytes%8)) != 0 {
			delete(s.settled, off+i)
		}
	}
}

func (s *modelSource) takeBack() {
	for _, b := range s.given {
		for i := range b.Data {
			b.Data[i] = 0xdb
		}
	}
	s.given, s.zeroesGiven = s.given[:0], false
}

func (s *modelSource) Synced() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.backing.mu.Lock()
	for _, z := range s.sweeping {
		for i := int64(0); i < z.Bytes; i += SectorBytes {
			s.settled[z.Off+i] = make([]byte, SectorBytes)
		}
	}
	for _, b := range s.given {
		for i := range BlockBytes / SectorBytes {
			if b.Dirty&(1<<i) != 0 {
				s.settled[int64(b.Number)*BlockBytes+int64(i)*SectorBytes] = bytes.Clone(b.Data[i*SectorBytes:][:SectorBytes])
			}
		}
		if b.Dirty != 0 {
			delete(s.going, b.Number)
		}
	}
	if !s.zeroesGiven && len(s.sweeping) > 0 {
		s.backing.problem("synced without zeroes")
	}
	s.sweeping = nil
	s.checkSettled()
	s.backing.mu.Unlock()
	s.takeBack()
}

// checkSettled holds the disk against what the flusher has said, whichever unsynced writes a power cut keeps.
func (s *modelSource) checkSettled() {
	for off, want := range s.settled {
		if !bytes.Equal(s.backing.durable[off:][:SectorBytes], want) {
			s.backing.problem("sector at %d turned clean and is not durable", off)
		}
	}
	for _, o := range s.backing.pending {
		if want := s.settled[o.off]; want != nil && !bytes.Equal(o.data, want) {
			s.backing.problem("%s of other content is unsynced at clean sector %d", o.kind, o.off)
		}
	}
}

func (s *modelSource) Again() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.takeBack()
}

func (s *modelSource) Committed(seal uint64) {
	s.mu.Lock()
	if seal != s.seal || s.journal == nil && s.left() > 0 {
		s.problem("seal %d of %d committed with %d blocks left", seal, s.seal, s.left())
	}
	s.committed = seal
	if s.journal != nil {
		s.journal.committed()
		s.settle()
	}
	s.mu.Unlock()
	s.backing.happened()
}

// settle gives what was committed to the way home.
func (s *modelSource) settle() {
	for _, z := range s.sealedZeroes {
		for i := z.Off / BlockBytes; i < (z.Off+z.Bytes)/BlockBytes; i++ {
			delete(s.home, uint64(i))
		}
	}
	s.homeZeroes = append(s.homeZeroes, s.sealedZeroes...)
	maps.Copy(s.home, s.sealed)
	s.sealed, s.sealedZeroes = map[uint64]*modelVersion{}, nil
}

func (s *modelSource) Failed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed++
	if !errors.Is(err, errHung) && !errors.Is(err, syscall.EIO) && !errors.Is(err, io.ErrUnexpectedEOF) {
		s.problem("failed with %v", err)
	}
}

func (s *modelSource) PressedToCommit() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pressed
}

// finish compares the end of a run: nothing dirty, and the disk equals the volume.
func (s *modelSource) finish() []string {
	if s.dirty() {
		s.problem("something is dirty after the drain")
	}
	s.backing.mu.Lock()
	defer s.backing.mu.Unlock()
	s.checkSettled()
	for off := int64(0); off < s.backing.to; off += BlockBytes {
		lost := s.journal != nil && s.journal.lost[uint64(off/BlockBytes)] != 0
		if !lost && !bytes.Equal(s.backing.durable[off:][:BlockBytes], s.volume[off:][:BlockBytes]) {
			s.backing.problem("backing differs from the volume at %d after the drain", off)
		}
	}
	return s.backing.problems
}
