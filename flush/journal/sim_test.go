package journal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// media is a disk of which the power may go: what was written since the last sync is kept, dropped or torn sector by
// sector.
type media struct {
	durable []byte
	now     []byte
	open    map[int64]struct{} // sectors written since the last sync, by their offset
	calls   int                // reads, writes, syncs and zeroes so far
	failAt  int                // the call that fails, and all after it if dead; 0: none
	dead    bool
	bad     map[int64]bool // blocks that cannot be read, by their offset
	sector  int
}

func newMedia(n int64) *media {
	return &media{durable: make([]byte, n), now: make([]byte, n), open: map[int64]struct{}{}, bad: map[int64]bool{}, sector: 512}
}

var errMedia = errors.New("input/output error")

func (m *media) call() error {
	m.calls++
	if m.calls == m.failAt || m.failAt > 0 && m.dead && m.calls > m.failAt {
		return errMedia
	}
	return nil
}

func (m *media) ReadAt(p []byte, off int64) (int, error) {
	if err := m.call(); err != nil {
		return 0, err
	}
	for at := range m.bad {
		if at < off+int64(len(p)) && off < at+4096 {
			return 0, errMedia
		}
	}
	return bytes.NewReader(m.now).ReadAt(p, off)
}

// WriteAt, where it fails, has written a part.
func (m *media) WriteAt(p []byte, off int64) (int, error) {
	err := m.call()
	if len(p)%m.sector != 0 || off%int64(m.sector) != 0 || off < 0 || off+int64(len(p)) > int64(len(m.now)) {
		return 0, fmt.Errorf("write of %d bytes at %d", len(p), off)
	}
	if err != nil {
		p = p[:len(p)/2/512*512]
	}
	copy(m.now[off:], p)
	for i := int64(0); i < int64(len(p)); i += 512 {
		m.open[off+i] = struct{}{}
	}
	return len(p), err
}

func (m *media) Zero(off, n int64) error {
	_, err := m.WriteAt(make([]byte, n), off)
	return err
}

func (m *media) SectorBytes() int { return m.sector }

func (m *media) Sync() error {
	if err := m.call(); err != nil {
		return err
	}
	for at := range m.open {
		copy(m.durable[at:][:512], m.now[at:])
	}
	clear(m.open)
	return nil
}

// plain is a media without optional abilities.
type plain struct{ m *media }

func (p plain) ReadAt(b []byte, off int64) (int, error)  { return p.m.ReadAt(b, off) }
func (p plain) WriteAt(b []byte, off int64) (int, error) { return p.m.WriteAt(b, off) }
func (p plain) Sync() error                              { return p.m.Sync() }

// cut is the media after the power went: choose says for every open sector, ascending, what became of it.
func (m *media) cut(choose func() fate) *media {
	c := newMedia(int64(len(m.durable)))
	c.sector = m.sector
	copy(c.now, m.durable)
	var open []int64
	for at := range m.open {
		open = append(open, at)
	}
	slices.Sort(open)
	for _, at := range open {
		switch choose() {
		case kept:
			copy(c.now[at:][:512], m.now[at:])
		case torn:
			copy(c.now[at:][:256], m.now[at:])
		case dropped:
		}
	}
	copy(c.durable, c.now)
	return c
}

type fate int

const (
	kept fate = iota
	dropped
	torn
)

// cutAtRandom keeps most, drops most or tears some, as rng will.
func (m *media) cutAtRandom(rng *rand.Rand) *media {
	keep := []float64{0, 0.1, 0.5, 0.9, 0.97, 1}[rng.IntN(6)]
	tears := rng.IntN(2) == 0 && m.sector == 512
	return m.cut(func() fate {
		switch {
		case tears && rng.IntN(20) == 0:
			return torn
		case rng.Float64() < keep:
			return kept
		}
		return dropped
	})
}

// state is the content of a volume: 512 bytes say all of a sector; a lost block has a number here.
type state struct {
	data []byte
	lost map[uint64]uint64
}

func (s *state) clone() *state {
	c := &state{data: bytes.Clone(s.data), lost: map[uint64]uint64{}}
	for b, n := range s.lost {
		c.lost[b] = n
	}
	return c
}

// engine is what the flusher does, in small: it writes, seals, commits, checkpoints. It is the model that recovery is
// compared with.
type engine struct {
	rng    *rand.Rand
	s      *journal.Superblock
	ring   *journal.Ring
	log    *media // journal
	home   *media
	blocks uint64

	number  uint64
	ram     *state
	dirty   []uint8  // per block: sectors that are not home and synced
	version []uint64 // per block: number of the newest version that is not home, 0: none
	fresh   []bool   // per block: written since the last commit
	extents []extent // not home
	states  map[uint64]*state
	durable uint64 // the newest seal whose sync returned
	pending uint64 // the seal that is being committed
	runs    []runNote
}

type extent struct {
	block, blocks, number uint64
	fresh                 bool // since the last commit
}

// runNote is what has to be home before the tail may pass a run.
type runNote struct {
	end     uint64
	blocks  []uint64
	extents []uint64 // numbers
}

// newEngine is a new volume. ringBlocks may be less than a real ring has.
func newEngine(rng *rand.Rand, blocks uint64, ringBlocks int64) *engine {
	s := &journal.Superblock{
		UUID: journal.NewUUID(), Name: "vol", Journal: journal.KindExternal, VolumeBytes: int64(blocks) * 4096, DataBytes: int64(blocks) * 4096,
		RingOffset: 8192, RingBytes: ringBlocks * 4096,
	}
	e := &engine{
		rng: rng, s: s, log: newMedia(8192 + s.RingBytes), home: newMedia(s.VolumeBytes), blocks: blocks, number: 1,
		dirty: make([]uint8, blocks), version: make([]uint64, blocks), fresh: make([]bool, blocks), states: map[uint64]*state{},
		ram: &state{data: make([]byte, s.VolumeBytes), lost: map[uint64]uint64{}},
	}
	e.reset(journal.RingState{}, nil)
	return e
}

// reset begins a new ring with everything home.
func (e *engine) reset(old journal.RingState, lost []journal.LostBlock) {
	st, err := journal.Reset(e.log, e.s, e.number, 1, lost, old)
	if err != nil {
		panic(err)
	}
	e.ring = journal.NewRing(e.s.RingOffset, e.s.RingBytes, st)
	e.durable, e.pending = e.number, e.number
	e.states = map[uint64]*state{e.number: e.ram.clone()}
	e.runs = []runNote{{end: st.Head}}
}

// write writes sectors of a block with new content.
func (e *engine) write(b uint64, mask uint8) {
	if _, is := e.ram.lost[b]; is {
		mask = 0xff // a lost block is written whole or not at all
	}
	e.number++
	for i := range 8 {
		if mask&(1<<i) != 0 {
			p := e.ram.data[b*4096+uint64(i)*512:][:512]
			copy(p, fmt.Sprintf("block %d sector %d number %d;", b, i, e.number))
			p[300], p[511] = byte(e.number), byte(e.number)
		}
	}
	for _, x := range e.extents {
		if b >= x.block && b < x.block+x.blocks {
			mask = 0xff // what the extent zeroed is not home either
		}
	}
	delete(e.ram.lost, b)
	e.dirty[b] |= mask
	e.version[b], e.fresh[b] = e.number, true
}

func (e *engine) zero(b, n uint64) {
	e.number++
	clear(e.ram.data[b*4096 : (b+n)*4096])
	for i := b; i < b+n; i++ {
		e.dirty[i], e.version[i], e.fresh[i] = 0, 0, false
		delete(e.ram.lost, i)
	}
	e.extents = append(e.extents, extent{b, n, e.number, true})
}

func (e *engine) lose(b uint64) {
	e.number++
	e.dirty[b], e.version[b], e.fresh[b] = 0, 0, false
	e.ram.lost[b] = e.number
}

// entries are those of the next run, with their data.
func (e *engine) entries() (list []journal.Entry, data [][]byte) {
	for b := range e.blocks {
		if e.fresh[b] && e.version[b] != 0 {
			d := bytes.Clone(e.ram.data[b*4096:][:4096])
			for i := range 8 {
				if e.dirty[b]&(1<<i) == 0 { // what does not hold may be anything
					copy(d[i*512:][:512], bytes.Repeat([]byte{0xee}, 512))
				}
			}
			list = append(list, journal.Entry{Kind: journal.EntryBlock, Block: b, Mask: e.dirty[b], Number: e.version[b], CRC: crc32.Checksum(d, crc32.MakeTable(crc32.Castagnoli))})
			data = append(data, d)
		}
	}
	for i, x := range e.extents {
		// One that is listed again must not zero a newer block whose run the tail may have passed by then.
		if again := e.rng.IntN(3) == 0 && !e.overwritten(x); x.fresh || again {
			list = append(list, journal.Entry{Kind: journal.EntryZero, Block: x.block, Number: x.number, Blocks: x.blocks})
			e.extents[i].fresh = false
		}
	}
	for b := range e.blocks {
		if n, is := e.ram.lost[b]; is {
			list = append(list, journal.Entry{Kind: journal.EntryLost, Block: b, Number: n})
		}
	}
	return list, data
}

func (e *engine) overwritten(x extent) bool {
	for b := x.block; b < x.block+x.blocks; b++ {
		if e.version[b] > x.number || e.ram.lost[b] > x.number {
			return true
		}
	}
	return false
}

// commit writes a run of all that is new; chunk is the most entries of one. It returns before the sync if the power
// is to go then.
func (e *engine) commit(chunk int, powerGoes bool) {
	e.number++
	seal := e.number
	e.states[seal] = e.ram.clone()
	e.pending = seal
	list, data := e.entries()
	note := runNote{}
	e.ring.Begin(seal, 1)
	header := make([]byte, 4096)
	for {
		n := min(len(list), chunk)
		pos := e.ring.Chunk(header, list[:n], n == len(list))
		e.put(pos, header)
		for _, x := range list[:n] {
			switch x.Kind {
			case journal.EntryBlock:
				pos++
				e.put(pos, data[0])
				data = data[1:]
				note.blocks = append(note.blocks, x.Block)
			case journal.EntryZero:
				note.extents = append(note.extents, x.Number)
			}
		}
		if list = list[n:]; len(list) == 0 {
			break
		}
	}
	if powerGoes {
		return
	}
	if err := e.log.Sync(); err != nil {
		panic(err)
	}
	e.ring.Commit()
	e.durable = seal
	clear(e.fresh)
	note.end = e.ring.State().Head
	e.runs = append(e.runs, note)
}

func (e *engine) put(pos uint64, b []byte) {
	if _, err := e.log.WriteAt(b, e.ring.Offset(pos)); err != nil {
		panic(err)
	}
}

// checkpoint brings home what the first n runs hold, or newer versions of that, all of it committed. It returns before
// the sync if the power is to go then.
func (e *engine) checkpoint(n int, powerGoes bool) {
	blocks, extents := map[uint64]bool{}, map[uint64]bool{}
	for _, r := range e.runs[:n] {
		for _, b := range r.blocks {
			blocks[b] = true
		}
		for _, x := range r.extents {
			extents[x] = true
		}
	}
	// Extents are home before any newer block over them is, and whatever they go over follows them.
	for grown := true; grown; {
		grown = false
		for _, x := range e.extents {
			touched := extents[x.number]
			for b := x.block; b < x.block+x.blocks; b++ {
				touched = touched || blocks[b]
			}
			for b := x.block; touched && b < x.block+x.blocks; b++ {
				grown = grown || !blocks[b]
				blocks[b] = true
			}
			extents[x.number] = touched
		}
	}
	for _, x := range e.extents {
		if extents[x.number] {
			if err := e.home.Zero(int64(x.block)*4096, int64(x.blocks)*4096); err != nil {
				panic(err)
			}
		}
	}
	if !powerGoes {
		e.extents = slices.DeleteFunc(e.extents, func(x extent) bool { return extents[x.number] })
	}
	for b := range e.blocks {
		for i := uint64(0); i < 4096; i += uint64(e.home.sector) {
			if at := b*4096 + i; blocks[b] && (e.dirty[b]&(1<<(i/512)) != 0 || e.dirty[b] != 0 && e.home.sector == 4096) {
				if _, err := e.home.WriteAt(e.ram.data[at:][:e.home.sector], int64(at)); err != nil {
					panic(err)
				}
			}
		}
		if blocks[b] && !powerGoes {
			e.dirty[b], e.version[b] = 0, 0
		}
	}
	if powerGoes {
		return
	}
	if err := e.home.Sync(); err != nil {
		panic(err)
	}
	for i := range e.runs[:n] {
		e.runs[i].blocks, e.runs[i].extents = nil, nil
	}
}

// advance lets the tail pass the runs that are home, or some of them.
func (e *engine) advance() {
	for e.ring.State().Head != e.runs[0].end && len(e.runs[0].blocks)+len(e.runs[0].extents) == 0 && e.rng.IntN(8) != 0 {
		e.ring.Advance(e.runs[0].end)
		e.runs = e.runs[1:]
	}
}

// step does something at random between two commits.
func (e *engine) step() {
	b := e.rng.Uint64N(e.blocks)
	switch k := e.rng.IntN(20); {
	case k < 13:
		e.write(b, uint8(1+e.rng.IntN(255)))
	case k < 16:
		e.write(b, 0xff)
	case k < 19:
		e.zero(b, 1+e.rng.Uint64N(e.blocks-b))
	default:
		e.lose(b)
	}
}

// verify compares a volume with the state at a seal.
func verify(home *media, rec *journal.Recovered, want *state) error {
	got := map[uint64]uint64{}
	for _, l := range rec.Lost {
		got[l.Block] = l.Number
	}
	for b, n := range want.lost {
		if got[b] != n {
			return fmt.Errorf("block %d was lost with number %d, recovered %d", b, n, got[b])
		}
	}
	if len(got) != len(want.lost) {
		return fmt.Errorf("lost %v, want %v", got, want.lost)
	}
	for at := 0; at < len(want.data); at += 512 {
		if _, is := want.lost[uint64(at/4096)]; is {
			continue
		}
		if !bytes.Equal(home.now[at:][:512], want.data[at:][:512]) {
			return fmt.Errorf("block %d, sector %d holds %.40q, want %.40q", at/4096, at%4096/512, home.now[at:][:40], want.data[at:][:40])
		}
	}
	for at := range home.open {
		return fmt.Errorf("sector at %d is not synced", at)
	}
	return nil
}

// recover scans log and replays into home, and checks that the outcome is the state at the newest durable seal or at the
// one that was being committed.
func (e *engine) recover(log, home *media) (*journal.Recovered, error) {
	rec, err := journal.Scan(context.Background(), log, e.s, nil)
	if err != nil {
		return nil, err
	}
	if rec.Seal != e.durable && rec.Seal != e.pending {
		return nil, fmt.Errorf("recovered seal %d, durable is %d, pending %d", rec.Seal, e.durable, e.pending)
	}
	if rec.Seal == e.durable && rec.State.Head != e.ring.State().Head {
		return nil, fmt.Errorf("head %d, want %d", rec.State.Head, e.ring.State().Head)
	}
	if err := journal.Replay(context.Background(), rec, log, home, nil); err != nil {
		return nil, err
	}
	return rec, verify(home, rec, e.states[rec.Seal])
}

// resume goes on with what was recovered.
func (e *engine) resume(rec *journal.Recovered, log, home *media) {
	e.log, e.home = log, home
	e.ram = e.states[rec.Seal].clone()
	clear(e.dirty)
	clear(e.version)
	clear(e.fresh)
	e.extents = nil
	e.reset(rec.State, rec.Lost)
}

var _ io.ReaderAt = (*media)(nil)

func describe(t *testing.T, e *engine) {
	t.Helper()
	t.Logf("ring %+v, durable %d, pending %d", e.ring.State(), e.durable, e.pending)
}
