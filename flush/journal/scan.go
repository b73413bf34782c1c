package journal

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// readBytes is the length of a large read of the ring.
const readBytes = 1 << 20

// maxUnreadable is how many blocks of a ring may be unreadable before Scan gives up on it.
const maxUnreadable = 1024

// Recovered is what Scan finds in a ring: the runs that are committed and may not be home.
type Recovered struct {
	State      RingState // for Reset and Find: the head lies behind the last whole run
	Seal       uint64    // of the last whole run: the volume is as it was then; 0: damage hides which it is
	Generation uint64    // of that run
	Runs       int       // whole ones from the tail on
	BlockBytes int64     // of the blocks that Replay writes
	ZeroBytes  int64     // of the extents that Replay zeroes
	Lost       []LostBlock
	Torn       bool // a run that was never committed lies behind the last whole one

	ring        ring
	volumeBytes int64
	blocks      []live // EntryBlock and EntryLost, by block, number and kind
	extents     []live // EntryZero, by first block
}

// LostBlock is a block whose content is lost: it cannot be read until it is written anew.
type LostBlock struct{ Block, Number uint64 }

// ring is where a ring lies.
type ring struct {
	offset int64
	blocks uint64
}

func (s *Superblock) ring() ring { return ring{s.RingOffset, uint64(s.RingBytes) / BlockBytes} }

// Scan reads the ring of s, all of it once and the part from the tail to the head again, and finds what is committed. It
// writes nothing. progress, which may be nil, is told bytes. The memory that it takes, and Recovered holds, is 24 bytes for
// every block of data from tail to head, a few times that for every other entry, and 2 MiB.
//
// A run counts if all of it is there and every checksum is right. The first that is not ends what is found; it was
// never committed if nothing says otherwise. A *RefusedError says that something does: a run begins behind it, or a
// seal is named as committed that is not found, or it cannot be read or does not fit the volume. With that error
// Scan returns what lies before the damage all the same, which is what an operator who forces it is left with.
func Scan(ctx context.Context, r io.ReaderAt, s *Superblock, progress func(done, total int64)) (*Recovered, error) {
	rec := &Recovered{ring: s.ring(), volumeBytes: s.VolumeBytes, Seal: s.Committed}
	rec.State = RingState{Stamp: s.RingStamp, Committed: s.Committed}
	switch {
	case s.Journal == KindNone:
		return nil, fmt.Errorf("scan journal of volume %s: it has none", s.Name)
	case s.RingStamp == 0:
		return rec, nil
	}
	found, err := surveyRing(ctx, r, s, progress)
	if err != nil {
		return nil, fmt.Errorf("scan journal of volume %s: %w", s.Name, err)
	}
	if found.chunks == 0 {
		return rec, &RefusedError{
			Reason: fmt.Sprintf("journal of volume %s holds no run of its ring", s.Name),
			Remedy: "restore the journal, or --force to take the backing as it is without it",
			Err:    found.unreadable,
		}
	}
	w := newWalker(r, s)
	tail := max(found.tail, found.below)
	rec.State.Head, rec.Seal = tail, 0
	if found.start == tail { // everything before the run that names the tail is home
		rec.Seal, rec.Generation = found.committed, found.generation
	}
	broken := error(nil)
	for {
		run, err := w.walk(ctx, rec.State.Head)
		if ctx.Err() != nil {
			return nil, fmt.Errorf("scan journal of volume %s: %w", s.Name, ctx.Err())
		}
		if broken = err; err != nil {
			break
		}
		if planted("recovery-stops-early") && rec.Runs > 0 {
			break
		}
		rec.Runs++
		rec.State.Head, rec.Seal, rec.Generation = run.end(), run.Seal, run.Generation
		if progress != nil {
			done := int64(rec.State.Head-tail) * BlockBytes
			progress(s.RingBytes+done, s.RingBytes+max(done, int64(found.start-tail)*BlockBytes))
		}
	}
	rec.Torn = found.start == rec.State.Head
	rec.State.Tail = found.durableTail(rec)
	if rec.Torn && rec.State.Tail < tail {
		// Only the run that goes names that tail, and it lists again what is lost: so what lies before is needed after all.
		w = newWalker(r, s)
		if err := rec.walkAgain(ctx, w); err != nil {
			broken = err
		}
	}
	rec.State.Committed = rec.Seal
	rec.resolve(w.found)
	return rec, found.judge(s, rec, broken)
}

// walkAgain reads the whole runs from the tail to the head.
func (rec *Recovered) walkAgain(ctx context.Context, w *walker) error {
	rec.Runs = 0
	for pos := rec.State.Tail; pos < rec.State.Head; {
		run, err := w.walk(ctx, pos)
		if err != nil {
			return fmt.Errorf("%w: run at %d, which is home but may list what is lost: %w", errDamagedRun, pos, err)
		}
		rec.Runs++
		pos, rec.Seal, rec.Generation = run.end(), run.Seal, run.Generation
	}
	return nil
}

// judge refuses what was found if the run that ends it, broken because of err, must have been committed.
func (f *survey) judge(s *Superblock, rec *Recovered, err error) error {
	if planted("recovery-stops-early") {
		return nil
	}
	why := ""
	switch named := max(f.committed, s.Committed); {
	case f.start > rec.State.Head:
		why = fmt.Sprintf("another one begins behind it at %d", f.start)
	case named > rec.Seal:
		why = fmt.Sprintf("seal %d is known to be committed", named)
	// A clean volume has nothing behind its last seal, so that a place there does not matter.
	case errors.Is(err, errDamagedRun) && !(s.Clean && !rec.Torn):
		why = "what it holds may be committed"
	default:
		return nil
	}
	return &RefusedError{
		Reason: fmt.Sprintf("journal of volume %s is damaged in run %d from the tail, at position %d behind seal %d, and %s",
			s.Name, rec.Runs+1, rec.State.Head, rec.Seal, why),
		Remedy: "restore the backing or the journal from elsewhere, or --force to give up what that run and those behind it hold",
		Err:    err,
	}
}

// survey is what the headers say that lie in a ring, in whatever order.
type survey struct {
	chunks     int
	start      uint64 // the highest start of a run
	generation uint64 // of that run
	tail       uint64 // the highest that a chunk of that run names
	below      uint64 // the highest that a chunk of any other run names
	committed  uint64 // the highest that is named
	unreadable error  // the first
	bad        int    // blocks
}

// add takes a chunk into account. Every header that is valid was true when it was written: also one of a run that
// was never committed says what was home and what was committed before it.
func (f *survey) add(c *Chunk) {
	f.chunks++
	f.committed = max(f.committed, c.Committed)
	switch {
	case f.chunks == 1:
		f.start, f.generation, f.tail = c.Start, c.Generation, c.Tail
	case c.Start > f.start:
		f.below = max(f.below, f.tail)
		f.start, f.generation, f.tail = c.Start, c.Generation, c.Tail
	case c.Start == f.start:
		f.tail = max(f.tail, c.Tail)
	default:
		f.below = max(f.below, c.Tail)
	}
}

// durableTail is the tail that bounds what the ring needs if the broken run behind its head, and with it the tail
// that only that run names, goes. It is bounded by what a Ring leaves free in any case.
func (f *survey) durableTail(rec *Recovered) uint64 {
	tail := max(f.tail, f.below)
	if rec.Torn {
		tail = f.below
	}
	if used := rec.ring.blocks - reserveBlocks(rec.ring.blocks)/2; rec.State.Head > used {
		tail = max(tail, rec.State.Head-used)
	}
	return min(tail, rec.State.Head)
}

// surveyRing reads the whole ring and collects every header that lies where it says that it does.
func surveyRing(ctx context.Context, r io.ReaderAt, s *Superblock, progress func(done, total int64)) (*survey, error) {
	f := new(survey)
	buf := make([]byte, min(readBytes, s.RingBytes))
	var c Chunk
	blocks := s.ring().blocks
	take := func(b []byte, place uint64) {
		if c.decode(b, s.RingStamp) == nil && c.Position%blocks == place {
			f.add(&c)
		}
	}
	for at := int64(0); at < s.RingBytes; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		b := buf[:min(int64(len(buf)), s.RingBytes-at)]
		whole := readFull(r, b, s.RingOffset+at) == nil
		for i := int64(0); i < int64(len(b)); i += BlockBytes {
			block := b[i:][:BlockBytes]
			if !whole {
				if err := readFull(r, block, s.RingOffset+at+i); err != nil {
					if f.bad++; f.unreadable == nil {
						f.unreadable = fmt.Errorf("read block %d of the ring: %w", (at+i)/BlockBytes, err)
					}
					if f.bad > maxUnreadable {
						return nil, fmt.Errorf("%d blocks cannot be read: %w", f.bad, f.unreadable)
					}
					continue
				}
			}
			take(block, uint64(at+i)/BlockBytes)
		}
		at += int64(len(b))
		if progress != nil {
			progress(at, s.RingBytes)
		}
	}
	return f, nil
}

// What ends a walk. A run that is not whole looks as one does of which the power cut took a part; errDamagedRun is what no
// power cut leaves behind.
var (
	errNotWhole   = errors.New("run is not whole")
	errDamagedRun = errors.New("run is damaged")
)

// walker follows the runs of a ring from one to the next.
type walker struct {
	r            io.ReaderAt
	stamp        uint64
	ring         ring
	volumeBlocks uint64
	seal         uint64 // of the run before

	found found
	chunk Chunk  // the one that was read last
	buf   []byte // a large read
	first uint64 // the position of its first block
	valid int    // how many of its blocks are
}

func newWalker(r io.ReaderAt, s *Superblock) *walker {
	return &walker{
		r: r, stamp: s.RingStamp, ring: s.ring(), volumeBlocks: uint64(ceilDiv(s.VolumeBytes, BlockBytes)),
		buf: make([]byte, min(readBytes, s.RingBytes)),
	}
}

// walk reads the run that begins at start, collects its entries and returns its last chunk, which is valid until the
// next call. Its error is errNotWhole or errDamagedRun, wrapped, or that of ctx, and then nothing is collected.
func (w *walker) walk(ctx context.Context, start uint64) (*Chunk, error) {
	mark := w.found.mark()
	c, before := &w.chunk, Chunk{}
	for pos := start; ; pos = c.end() {
		err := ctx.Err()
		if err == nil {
			err = w.header(c, pos)
		}
		if err == nil && !c.follows(&before, start) {
			err = fmt.Errorf("%w: chunk at %d does not continue it", errNotWhole, pos)
		}
		if err == nil && c.end()-c.Tail > w.ring.blocks {
			err = fmt.Errorf("%w: it ends at %d, more than %d blocks behind its tail at %d", errDamagedRun, c.end(), w.ring.blocks, c.Tail)
		}
		if err == nil && c.Seal < w.seal {
			err = fmt.Errorf("%w: seal %d after %d", errDamagedRun, c.Seal, w.seal)
		}
		if err == nil {
			err = w.entries(c)
		}
		if err != nil {
			w.found.cut(mark)
			return nil, err
		}
		if c.Last {
			w.seal = c.Seal
			return c, nil
		}
		before = *c // but for its entries, whose memory is used again
	}
}

// follows reports whether c is the chunk behind before in the run that begins at start; before is the zero value for
// the first.
func (c *Chunk) follows(before *Chunk, start uint64) bool {
	if c.Position == start {
		return c.Start == start
	}
	return c.Start == start && c.Index == before.Index+1 && c.Link == before.Sum && c.Seal == before.Seal &&
		c.Generation == before.Generation && c.Committed == before.Committed && c.Tail == before.Tail
}

// header reads the header block at pos.
func (w *walker) header(c *Chunk, pos uint64) error {
	b, err := w.block(pos)
	if err != nil {
		return err
	}
	if err := c.decode(b, w.stamp); err != nil {
		return fmt.Errorf("%w: position %d: %w", errNotWhole, pos, err)
	}
	if c.Position != pos {
		return fmt.Errorf("%w: position %d holds that of %d", errNotWhole, pos, c.Position)
	}
	return nil
}

// entries verifies the data of c and collects its entries.
func (w *walker) entries(c *Chunk) error {
	pos := c.Position
	for i := range c.Entries {
		e := &c.Entries[i]
		if e.Block >= w.volumeBlocks || e.Blocks > w.volumeBlocks-e.Block {
			return fmt.Errorf("%w: block %d and %d behind it are not in the volume", errDamagedRun, e.Block, e.Blocks)
		}
		if e.Kind == EntryBlock {
			pos++
			b, err := w.block(pos)
			if err != nil {
				return err
			}
			if got := crc32.Checksum(b, castagnoli); got != e.CRC && !planted("torn-run-replayed") {
				return fmt.Errorf("%w: position %d, block %d has checksum %08x instead of %08x", errNotWhole, pos, e.Block, got, e.CRC)
			}
		}
		w.found.add(e, uint32(pos%w.ring.blocks))
	}
	return nil
}

// block returns the block at pos, until the next call.
func (w *walker) block(pos uint64) ([]byte, error) {
	if pos < w.first || pos >= w.first+uint64(w.valid) {
		place := pos % w.ring.blocks
		n := min(uint64(len(w.buf))/BlockBytes, w.ring.blocks-place)
		at := w.ring.offset + int64(place)*BlockBytes
		if readFull(w.r, w.buf[:n*BlockBytes], at) != nil {
			n = 1
			if err := readFull(w.r, w.buf[:BlockBytes], at); err != nil {
				w.valid = 0
				return nil, fmt.Errorf("%w: read position %d: %w", errDamagedRun, pos, err)
			}
		}
		w.first, w.valid = pos, int(n)
	}
	return w.buf[(pos-w.first)*BlockBytes:][:BlockBytes], nil
}

// syncJournal makes durable what was read and may lie in a cache.
func syncJournal(r io.ReaderAt) error {
	if j, ok := r.(interface{ Sync() error }); ok {
		if err := j.Sync(); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
	}
	return nil
}

// Find looks in the ring, from tail to head of st, for the data of the entry of that block with that number, and reads
// the BlockBytes of dst if it is there. It reads one block for every chunk. An error says that a header or the data
// cannot be read or are damaged.
func Find(ctx context.Context, r io.ReaderAt, s *Superblock, st RingState, block, number uint64, dst []byte) (bool, error) {
	w := newWalker(r, s)
	w.buf = make([]byte, BlockBytes)
	var c Chunk
	for pos := st.Tail; pos < st.Head; pos = c.end() {
		err := ctx.Err()
		if err == nil {
			err = w.header(&c, pos)
		}
		if err != nil {
			return false, fmt.Errorf("find block %d in the journal: %w", block, err)
		}
		at := pos
		for _, e := range c.Entries {
			if e.Kind != EntryBlock {
				continue
			}
			at++
			if e.Block != block || e.Number != number {
				continue
			}
			b, err := w.block(at)
			if err == nil && crc32.Checksum(b, castagnoli) != e.CRC {
				err = fmt.Errorf("%w: wrong checksum at position %d", errDamagedRun, at)
			}
			if err != nil {
				return false, fmt.Errorf("find block %d in the journal: %w", block, err)
			}
			copy(dst[:BlockBytes], b)
			return true, nil
		}
	}
	return false, nil
}

// readFull reads all of p, or says why not.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF
	}
	return err
}

// writeFull writes all of p, or says why not.
func writeFull(w io.WriterAt, p []byte, off int64) error {
	n, err := w.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}
