package flush

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
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

// modelBacking is a disk with a volatile cache. It knows which writes a power cut could undo, and watches how
// it is used.
type modelBacking struct {
	mu     sync.Mutex
	rng    *rand.Rand
	sector int

	cache   []byte    // what reads return
	durable []byte    // what is there after a power cut, without any of unsynced
	pending []modelOp // unsynced: a power cut keeps any subset of them

	inFlight []modelOp
	lastDone map[string]int64 // highest offset of a completed operation of the pass, by kind

	fault    func(kind string, n int) string // which fault hits the n-th operation of its kind, from 1
	count    map[string]int
	problems []string
}

// modelOp is an operation on a range; data is nil for an operation that is in flight.
type modelOp struct {
	kind string
	off  int64
	n    int64
	data []byte
}

func newModelBacking(size int64, sector int, rng *rand.Rand) *modelBacking {
	b := &modelBacking{
		rng: rng, sector: sector, cache: make([]byte, size),
		lastDone: map[string]int64{}, count: map[string]int{},
		fault: func(string, int) string { return "" },
	}
	fillRandom(rng, b.cache)
	b.durable = bytes.Clone(b.cache)
	return b
}

// fillRandom fills whole sectors.
func fillRandom(rng *rand.Rand, p []byte) {
	for ; len(p) >= 8; p = p[8:] {
		binary.LittleEndian.PutUint64(p, rng.Uint64())
	}
}

func (b *modelBacking) problem(format string, args ...any) {
	if len(b.problems) < 10 {
		b.problems = append(b.problems, fmt.Sprintf(format, args...))
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
	b.mu.Lock()
	defer b.mu.Unlock()
	b.count[kind]++
	if off < 0 || off+n > int64(len(b.cache)) || off%int64(b.sector) != 0 || n%int64(b.sector) != 0 {
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
	if last, ok := b.lastDone[kind]; ok && kind != opRead && kind != opSync && off <= last {
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
	b.latency(fault)
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.leave(kind, off, n)
	if fault == faultFail {
		return syscall.EIO
	}
	for i := int64(0); i < n; i += SectorBytes {
		if fault == faultTear && b.rng.IntN(2) == 0 {
			continue
		}
		sector := bytes.Clone(data[i : i+SectorBytes])
		copy(b.cache[off+i:], sector)
		b.pending = append(b.pending, modelOp{kind: kind, off: off + i, n: SectorBytes, data: sector})
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
	covered := len(b.pending)
	b.mu.Unlock()
	b.latency(fault)
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.leave(opSync, 0, 0)
	failed := fault == faultFail || fault == faultTear
	for _, o := range b.pending[:covered] {
		// A sync that failed has dropped what it did not write: a later one does not bring it back.
		if !failed || fault == faultTear && b.rng.IntN(2) == 0 {
			copy(b.durable[o.off:], o.data)
		}
	}
	b.pending = slices.Delete(b.pending, 0, covered)
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

	volume   []byte // logical content
	resident []bool // block is whole in memory

	open, sealed map[uint64]*modelVersion
	openZeroes   []Zero
	zeroes       []Zero // of the seal, not synced
	next         uint64 // where Next goes on
	given        []Block
	zeroesGiven  []Zero

	settled map[int64][]byte // sector offset: content that the flusher said is durable and that nothing changes now

	seals, committed uint64
	failed           int
	pressed          bool
}

// modelVersion is a version of a block.
type modelVersion struct {
	valid, dirty uint8
	data         []byte
}

func newModelSource(b *modelBacking, rng *rand.Rand) *modelSource {
	s := &modelSource{
		rng: rng, backing: b, volume: bytes.Clone(b.cache), resident: make([]bool, len(b.cache)/BlockBytes),
		open: map[uint64]*modelVersion{}, sealed: map[uint64]*modelVersion{}, settled: map[int64][]byte{},
		wake: func() {},
	}
	for off := int64(0); off < int64(len(b.cache)); off += SectorBytes {
		s.settled[off] = bytes.Clone(b.cache[off:][:SectorBytes])
	}
	return s
}

// publish writes random data to a run of sectors of one block.
func (s *modelSource) publish(number uint64, first, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	mask := sectorMask(first, n)
	off := int64(number) * BlockBytes
	fillRandom(s.rng, s.volume[off+int64(first)*SectorBytes:][:n*SectorBytes])
	v := s.open[number]
	if v == nil {
		v = &modelVersion{}
		s.open[number] = v
		// A version covers the one that it supersedes.
		if old := s.sealed[number]; old != nil {
			v.valid, v.dirty = old.valid, old.dirty
		}
	}
	v.valid, v.dirty = v.valid|mask, v.dirty|mask
	if s.resident[number] || v.valid == allSectors {
		v.valid, s.resident[number] = allSectors, true
	}
	v.data = bytes.Clone(s.volume[off:][:BlockBytes])
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
}

func (s *modelSource) dirty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)+len(s.sealed)+len(s.openZeroes)+len(s.zeroes) > 0
}

func (s *modelSource) problem(format string, args ...any) {
	s.backing.mu.Lock()
	defer s.backing.mu.Unlock()
	s.backing.problem(format, args...)
}

func (s *modelSource) Seal() (uint64, int64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seals != s.committed || len(s.sealed)+len(s.zeroes)+len(s.given) > 0 {
		s.problem("seal %d before seal %d is committed, %d blocks left", s.seals+1, s.seals, len(s.sealed))
	}
	s.seals++
	s.sealed, s.open = s.open, map[uint64]*modelVersion{}
	s.zeroes, s.openZeroes = s.openZeroes, nil
	return s.seals, int64(len(s.sealed)) * BlockBytes, len(s.sealed)+len(s.zeroes) > 0
}

func (s *modelSource) Sweep() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sealed)+len(s.zeroes) > 0
}

func (s *modelSource) Refuse(bool) {}

func (s *modelSource) Zeroes(dst []Zero) []Zero {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.backing.newOrder()
	if len(s.given) > 0 {
		s.problem("pass begins with %d blocks neither synced nor given back", len(s.given))
	}
	s.next = 0
	s.zeroesGiven = slices.Clone(s.zeroes)
	for _, z := range s.zeroes {
		s.unsettle(z.Off, z.Bytes, 0xff)
	}
	return append(dst, s.zeroes...)
}

func (s *modelSource) Next(dst []Block) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next == 0 {
		s.backing.newOrder()
	}
	n := 0
	for ; n < len(dst) && s.next < uint64(len(s.resident)); s.next++ {
		if v := s.sealed[s.next]; v != nil {
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
		if !s.resident[i] || s.open[i] != nil || s.sealed[i] != nil || s.zeroed(i) {
			break
		}
		dst[n] = s.lend(i, allSectors, 0, s.volume[i*BlockBytes:][:BlockBytes])
	}
	return n
}

func (s *modelSource) zeroed(number uint64) bool {
	off := int64(number) * BlockBytes
	in := func(z Zero) bool { return off >= z.Off && off < z.Off+z.Bytes }
	return slices.ContainsFunc(s.zeroes, in) || slices.ContainsFunc(s.openZeroes, in)
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
	s.given, s.zeroesGiven = s.given[:0], nil
}

func (s *modelSource) Synced() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.backing.mu.Lock()
	for _, z := range s.zeroesGiven {
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
			delete(s.sealed, b.Number)
		}
	}
	if len(s.zeroesGiven) > 0 {
		s.zeroes = nil
	}
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
	defer s.mu.Unlock()
	if seal != s.seals || len(s.sealed)+len(s.zeroes) > 0 {
		s.problem("seal %d of %d committed with %d blocks left", seal, s.seals, len(s.sealed))
	}
	s.committed = seal
}

func (s *modelSource) Failed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed++
	if !errors.Is(err, syscall.EIO) && !errors.Is(err, io.ErrUnexpectedEOF) {
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
	if !bytes.Equal(s.backing.durable, s.volume) {
		s.backing.problem("backing differs from the volume after the drain")
	}
	return s.backing.problems
}
