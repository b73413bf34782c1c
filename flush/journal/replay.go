package journal

import (
	"cmp"
	"context"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
)

// Home is a backing as Replay needs it; *os.File satisfies it. Optional abilities are found by themselves:
//
//	Zero(off, n int64) error   zeroes a range; else zeroes are written
//	SectorBytes() int          the smallest write in bytes that needs no reading; else 512
type Home interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// Bounds of Replay: 8 MiB for content, 1 MiB for reading the ring, 1 MiB of zeroes, and less than 1 MiB of lists.
const (
	windowBlocks  = 2048
	gatherBlocks  = readBytes / BlockBytes
	gatherGap     = 16 // blocks of the ring that are read for nothing rather than to begin another read
	writeBytes    = 1 << 20
	zeroStepBytes = 256 << 20
)

// Replay brings home what Scan found, and syncs: first the extents, then the blocks, both ascending, neighbors in writes
// of up to 1 MiB. Besides what rec holds it takes 11 MiB. Nothing of the ring changes, so it may end at any point, by an
// error, and be run again. progress, which may be nil, is told bytes.
//
// A journal that can Sync is synced before anything is written home: Scan may have found a run that the system or a disk
// holds in a cache. If the power took it after a part of it came home, nothing could tell which part.
//
// The data of every block are verified again: what does not match is an error. Of a block that is lost nothing is
// written (see Recovered.Lost).
func Replay(ctx context.Context, rec *Recovered, journal io.ReaderAt, home Home, progress func(done, total int64)) error {
	p := &replay{rec: rec, journal: journal, home: home, tell: progress}
	err := syncJournal(journal)
	if err == nil {
		err = p.zeroes(ctx)
	}
	if err == nil {
		err = p.blocks(ctx)
	}
	if err == nil {
		if err = home.Sync(); err != nil {
			err = fmt.Errorf("sync: %w", err)
		}
	}
	if err != nil {
		return fmt.Errorf("replay journal: %w", err)
	}
	return nil
}

// replay is the state of one Replay.
type replay struct {
	rec     *Recovered
	journal io.ReaderAt
	home    Home
	tell    func(done, total int64)
	done    int64

	content []byte   // of the window, BlockBytes for each of its blocks
	window  []target // ascending
	pieces  []piece
	gather  []byte
}

// target is a block of the window.
type target struct {
	block uint64
	mask  uint8 // sectors that are to be written
}

// piece is a version of which sectors go into the window.
type piece struct {
	version live
	slot    int // in the window
	sectors uint8
}

func (p *replay) progress(n int64) {
	p.done += n
	if p.tell != nil {
		p.tell(p.done, p.rec.ZeroBytes+p.rec.BlockBytes)
	}
}

// zeroes zeroes what extents cover. Blocks that are newer than an extent are in the ring too, so they follow.
func (p *replay) zeroes(ctx context.Context) error {
	for from, to := range p.rec.zeroed() {
		if err := Zero(ctx, p.home, from, to-from, p.progress); err != nil {
			return err
		}
	}
	return nil
}

// blocks brings blocks home, a window of them at a time.
func (p *replay) blocks(ctx context.Context) error {
	if len(p.rec.blocks) == 0 {
		return nil
	}
	p.content = make([]byte, min(windowBlocks, len(p.rec.blocks))*BlockBytes)
	p.gather = make([]byte, min(gatherBlocks, p.rec.ring.blocks)*BlockBytes)
	for o := range p.rec.outcomes() {
		if o.lost || o.mask == 0 {
			continue
		}
		slot := len(p.window)
		if o.zero {
			clear(p.content[slot*BlockBytes:][:BlockBytes])
		}
		for i, v := range o.versions {
			p.pieces = append(p.pieces, piece{v, slot, o.sectors[i]})
		}
		if p.window = append(p.window, target{o.block, o.mask}); len(p.window) == windowBlocks {
			if err := p.flush(ctx); err != nil {
				return err
			}
		}
	}
	return p.flush(ctx)
}

// flush reads the versions of the window, in the order of the ring, and writes its blocks.
func (p *replay) flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := p.read(); err != nil {
		return err
	}
	if err := p.complete(); err != nil {
		return err
	}
	if err := p.write(); err != nil {
		return err
	}
	p.progress(int64(len(p.window)) * BlockBytes)
	p.window, p.pieces = p.window[:0], p.pieces[:0]
	return nil
}

// read fills the window with the sectors of its pieces.
func (p *replay) read() error {
	slices.SortFunc(p.pieces, func(a, b piece) int { return cmp.Compare(a.version.place(), b.version.place()) })
	for i := 0; i < len(p.pieces); {
		first := p.pieces[i].version.place()
		last, j := first, i+1
		for ; j < len(p.pieces); j++ {
			next := p.pieces[j].version.place()
			if next-last > gatherGap || next-first >= gatherBlocks {
				break
			}
			last = next
		}
		b := p.gather[:(last-first+1)*BlockBytes]
		if err := readFull(p.journal, b, p.rec.ring.offset+int64(first)*BlockBytes); err != nil {
			return fmt.Errorf("read block %d of the ring: %w", first, err)
		}
		for ; i < j; i++ {
			v := p.pieces[i].version
			data := b[(v.place()-first)*BlockBytes:][:BlockBytes]
			if got := crc32.Checksum(data, castagnoli); got != v.crc() && !planted("torn-run-replayed") {
				return fmt.Errorf("block %d of the ring, for block %d of the volume, has checksum %08x instead of %08x", v.place(), v.block(), got, v.crc())
			}
			copySectors(p.content[p.pieces[i].slot*BlockBytes:], data, p.pieces[i].sectors)
		}
	}
	return nil
}

func copySectors(dst, src []byte, mask uint8) {
	for i := range 8 {
		if mask&(1<<i) != 0 {
			copy(dst[i*SectorBytes:][:SectorBytes], src[i*SectorBytes:])
		}
	}
}

// complete reads from home what the blocks of the window do not have, where home cannot write single sectors.
func (p *replay) complete() error {
	if s, ok := p.home.(interface{ SectorBytes() int }); !ok || s.SectorBytes() <= SectorBytes {
		return nil
	}
	data := p.gather[:BlockBytes]
	for i := range p.window {
		t := &p.window[i]
		if t.mask == 0xff {
			continue
		}
		off := int64(t.block) * BlockBytes
		if err := readFull(p.home, data[:min(BlockBytes, p.rec.volumeBytes-off)], off); err != nil {
			return fmt.Errorf("read home %d: %w", off, err)
		}
		copySectors(p.content[i*BlockBytes:], data, ^t.mask)
		t.mask = 0xff
	}
	return nil
}

// write writes the sectors of the window, neighbors together.
func (p *replay) write() error {
	from, to := 0, 0       // in content: what is to be written
	delta := int64(0)      // from there to the place at home
	emit := func() error { // writes it
		if from == to {
			return nil
		}
		if err := writeFull(p.home, p.content[from:to], int64(from)+delta); err != nil {
			return fmt.Errorf("write %d bytes home to %d: %w", to-from, int64(from)+delta, err)
		}
		from = to
		return nil
	}
	for i, t := range p.window {
		for s := range 8 {
			at := i*BlockBytes + s*SectorBytes
			off := int64(t.block)*BlockBytes + int64(s*SectorBytes)
			if t.mask&(1<<s) == 0 || off >= p.rec.volumeBytes {
				continue
			}
			if at != to || off-int64(at) != delta || to-from >= writeBytes {
				if err := emit(); err != nil {
					return err
				}
				from, delta = at, off-int64(at)
			}
			to = at + SectorBytes
		}
	}
	return emit()
}
