package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"math/bits"
)

// The bytes of a page of the intent bitmap; docs/FORMAT.md, "Intent bitmap".
const (
	pageMagic       = "RSHELFBM"
	pageVersion     = 1
	pageHeaderBytes = 64
	pageReserved    = 48
	pageCRC         = BlockBytes - 4
	// regionsPerPage is how many bits a page holds.
	regionsPerPage = (pageCRC - pageHeaderBytes) * 8
)

// Intent is the set of regions of a volume that this node has committed and its peer has not yet reported
// committed. It takes 4 bytes of memory for each region. An Intent is for one goroutine.
type Intent struct {
	volumeBytes int64
	regionBytes int64
	stamp       uint64
	last        []uint32 // per region: its last number - base + 1; 0: not in the set; unknown
	base        uint64
	pages       []page
}

// unknown is the last number of a region of which nobody knows: only Clear takes it out.
const unknown = math.MaxUint32

// page is the state of a page and its two copies on disk.
type page struct {
	set      int    // regions in the set
	oldest   uint64 // none of them has a last number below this one
	sequence uint64 // of the copy that holds, 0: neither does
	holds    int    // that copy
	changed  bool   // not as it is on disk
	anew     bool   // both copies are to be written, whatever they hold
	pending  bool   // written and not known to be stored
}

// NewIntent returns the empty bitmap of a volume of which nothing is on disk yet: the first Pages writes every page, both
// copies, over whatever is there. stamp is Superblock.IntentStamp.
func NewIntent(volumeBytes, regionBytes int64, stamp uint64) *Intent {
	t := newIntent(volumeBytes, regionBytes, stamp)
	for i := range t.pages {
		t.pages[i].changed, t.pages[i].anew = true, true
	}
	return t
}

func newIntent(volumeBytes, regionBytes int64, stamp uint64) *Intent {
	regions := ceilDiv(volumeBytes, regionBytes)
	return &Intent{
		volumeBytes: volumeBytes, regionBytes: regionBytes, stamp: stamp,
		last: make([]uint32, regions), pages: make([]page, ceilDiv(regions, regionsPerPage)),
	}
}

// IntentStamp is what the pages of the bitmap of this volume carry: the first 8 bytes of its UUID.
func (s *Superblock) IntentStamp() uint64 { return binary.BigEndian.Uint64(s.UUID[:8]) }

// Mark puts the regions into the set that n bytes from off on touch: a version or an extent with that number, committed
// here.
func (t *Intent) Mark(off, n int64, number uint64) {
	if n <= 0 {
		return
	}
	rel := t.relative(number)
	for i := off / t.regionBytes; i <= (off+n-1)/t.regionBytes; i++ {
		t.mark(int(i), number, rel)
	}
}

func (t *Intent) mark(region int, number uint64, rel uint32) {
	p := &t.pages[region/regionsPerPage]
	p.changed = true // also where the bit was set: the page names the number up to which it is true
	old := t.last[region]
	if old == 0 {
		if p.set++; p.set == 1 || number < p.oldest {
			p.oldest = number
		}
	}
	t.last[region] = max(old, rel)
}

// relative is number as last has it. What is too far from base is moved: numbers of old regions go up, which keeps them
// in the set for longer than need be, never for less.
func (t *Intent) relative(number uint64) uint32 {
	if number < t.base {
		return 1 // as old as can be
	}
	if number-t.base >= unknown-1 {
		base := number - unknown/2
		for i, l := range t.last {
			if l != 0 && l != unknown {
				t.last[i] = uint32(max(t.base+uint64(l), base+1) - base)
			}
		}
		for i := range t.pages {
			t.pages[i].oldest = max(t.pages[i].oldest, base)
		}
		t.base = base
	}
	return uint32(number-t.base) + 1
}

// Reported says that the peer has committed everything up to number: regions whose last number that covers leave the
// set.
func (t *Intent) Reported(number uint64) {
	for i := range t.pages {
		p := &t.pages[i]
		if p.set == 0 || p.oldest > number {
			continue
		}
		oldest := uint64(math.MaxUint64)
		for r := i * regionsPerPage; r < min((i+1)*regionsPerPage, len(t.last)); r++ {
			switch l := t.last[r]; {
			case l == 0 || l == unknown:
			case t.base+uint64(l)-1 <= number:
				t.clear(r)
			default:
				oldest = min(oldest, t.base+uint64(l)-1)
			}
		}
		p.oldest = oldest
	}
}

// Clear takes the regions out of the set that lie wholly in the n bytes from off on: they were transferred or verified.
func (t *Intent) Clear(off, n int64) {
	end := off + n
	if end >= t.volumeBytes {
		end = int64(len(t.last)) * t.regionBytes // the last region may be a short one
	}
	for i := ceilDiv(off, t.regionBytes); i < end/t.regionBytes; i++ {
		if t.last[i] != 0 {
			t.clear(int(i))
		}
	}
}

func (t *Intent) clear(region int) {
	t.last[region] = 0
	p := &t.pages[region/regionsPerPage]
	p.set--
	p.changed = true
}

// Regions calls fn for the ranges of the volume that are in the set, in bytes, ascending, neighbors as one, until it
// returns false.
func (t *Intent) Regions(fn func(off, n int64) bool) {
	for i := 0; i < len(t.last); i++ {
		if t.pages[i/regionsPerPage].set == 0 {
			i += regionsPerPage - 1 - i%regionsPerPage
			continue
		}
		if t.last[i] == 0 {
			continue
		}
		from := i
		for i < len(t.last) && t.last[i] != 0 {
			i++
		}
		off := int64(from) * t.regionBytes
		if !fn(off, min(int64(i)*t.regionBytes, t.volumeBytes)-off) {
			return
		}
	}
}

// Bytes is the length of all ranges of Regions together.
func (t *Intent) Bytes() int64 {
	n := int64(0)
	for i := range t.pages {
		n += int64(t.pages[i].set) * t.regionBytes
	}
	if t.last[len(t.last)-1] != 0 {
		n -= int64(len(t.last))*t.regionBytes - t.volumeBytes
	}
	return n
}

// Pages encodes the pages that changed since they were last stored into dst, BlockBytes long, one after the other, and
// has each written at its offset in the bitmap area. They say that they are true up to number, in that generation: the
// caller has marked all that was committed up to there. The caller then syncs and calls Stored, or Failed if that or
// Pages fails.
func (t *Intent) Pages(dst []byte, number, generation uint64, write func(off int64, page []byte) error) error {
	t.Failed() // an outcome that nobody told
	b := dst[:BlockBytes]
	for i := range t.pages {
		p := &t.pages[i]
		if !p.changed {
			continue
		}
		p.changed, p.pending = false, true
		copies := [2]int{1 - p.holds, p.holds}
		for j, c := range copies {
			if j == 1 && !p.anew {
				break
			}
			// With both copies the first is the one that holds from now on.
			t.encode(b, i, p.sequence+2-uint64(j), number, generation)
			if err := write(int64(c*len(t.pages)+i)*BlockBytes, b); err != nil {
				return fmt.Errorf("write page %d of the intent bitmap, copy %c: %w", i, 'A'+c, err)
			}
		}
	}
	return nil
}

// Stored says that what Pages wrote is durable.
func (t *Intent) Stored() {
	for i := range t.pages {
		if p := &t.pages[i]; p.pending {
			p.pending, p.anew = false, false
			p.holds = 1 - p.holds
			p.sequence += 2
		}
	}
}

// Failed says that it is not known to be: it is written again, to the same copies.
func (t *Intent) Failed() {
	for i := range t.pages {
		if p := &t.pages[i]; p.pending {
			p.pending, p.changed = false, true
		}
	}
}

func (t *Intent) encode(b []byte, index int, sequence, number, generation uint64) {
	clear(b)
	be := binary.BigEndian
	copy(b, pageMagic)
	be.PutUint32(b[8:], pageVersion)
	be.PutUint32(b[12:], uint32(index))
	be.PutUint64(b[16:], t.stamp)
	be.PutUint64(b[24:], sequence)
	be.PutUint64(b[32:], generation)
	be.PutUint64(b[40:], number)
	first := index * regionsPerPage
	for i, l := range t.last[first:min(first+regionsPerPage, len(t.last))] {
		if l != 0 {
			b[pageHeaderBytes+i/8] |= 1 << (i % 8)
		}
	}
	be.PutUint32(b[pageCRC:], crc32.Checksum(b[:pageCRC], castagnoli))
}

// Errors of a page that is not used.
var (
	errNoPage = errors.New("no page was ever written here")
	errPage   = errors.New("page is damaged")
)

// pageCopy is a copy of a page as it was read.
type pageCopy struct {
	sequence, number uint64
	bits             []byte
}

// decode reads a copy of a page. Zeroes, and a page of another volume, are no page.
func (t *Intent) decode(b []byte, index int) (pageCopy, error) {
	be := binary.BigEndian
	regions := min(len(t.last)-index*regionsPerPage, regionsPerPage)
	switch {
	case isZero(b):
		return pageCopy{}, errNoPage
	case string(b[:8]) != pageMagic:
		return pageCopy{}, fmt.Errorf("%w: it is none", errPage)
	case be.Uint32(b[pageCRC:]) != crc32.Checksum(b[:pageCRC], castagnoli):
		return pageCopy{}, fmt.Errorf("%w: wrong checksum", errPage)
	case be.Uint64(b[16:]) != t.stamp:
		return pageCopy{}, errNoPage
	case be.Uint32(b[8:]) != pageVersion:
		return pageCopy{}, fmt.Errorf("%w: version %d", errPage, be.Uint32(b[8:]))
	case be.Uint32(b[12:]) != uint32(index):
		return pageCopy{}, fmt.Errorf("%w: it is page %d", errPage, be.Uint32(b[12:]))
	case be.Uint64(b[24:]) == 0 || be.Uint64(b[24:]) == math.MaxUint64:
		return pageCopy{}, fmt.Errorf("%w: sequence number %d", errPage, be.Uint64(b[24:]))
	case !isZero(b[pageReserved:pageHeaderBytes]):
		return pageCopy{}, fmt.Errorf("%w: reserved bytes are not zero", errPage)
	}
	set := b[pageHeaderBytes:pageCRC]
	for i := regions; i < regionsPerPage; i++ {
		if set[i/8]&(1<<(i%8)) != 0 {
			return pageCopy{}, fmt.Errorf("%w: region %d is not in the volume", errPage, i)
		}
	}
	return pageCopy{be.Uint64(b[24:]), be.Uint64(b[40:]), set}, nil
}

// LoadIntent reads the bitmap of s. Regions have the number up to which their page is true as their last one; the
// caller marks what later records name. A page of which a copy cannot be used counts as all set, since nobody can tell
// whether that copy is the one that held, and is written anew; warnings say so, one for each. An error means that s has no
// such bitmap.
func LoadIntent(r io.ReaderAt, s *Superblock) (t *Intent, warnings []error, err error) {
	if s.RegionBytes <= 0 || s.BitmapBytes != 2*BlockBytes*ceilDiv(ceilDiv(s.VolumeBytes, s.RegionBytes), regionsPerPage) {
		return nil, nil, fmt.Errorf("load intent bitmap: %d bytes do not go with a volume of %d", s.BitmapBytes, s.VolumeBytes)
	}
	t = newIntent(s.VolumeBytes, s.RegionBytes, s.IntentStamp())
	b := make([]byte, 2*BlockBytes)
	for i := range t.pages {
		if err := t.load(r, s, i, b); err != nil {
			warnings = append(warnings, fmt.Errorf("page %d of the intent bitmap, all of its regions count as set: %w", i, err))
		}
	}
	return t, warnings, nil
}

// load reads both copies of a page and takes up the one that holds.
func (t *Intent) load(r io.ReaderAt, s *Superblock, index int, b []byte) error {
	p := &t.pages[index]
	var copies [2]pageCopy
	var bad error
	for c := range copies {
		block := b[c*BlockBytes:][:BlockBytes]
		err := readFull(r, block, s.BitmapOffset+int64(c*len(t.pages)+index)*BlockBytes)
		if err == nil {
			copies[c], err = t.decode(block, index)
		}
		if err != nil && !errors.Is(err, errNoPage) {
			bad = errors.Join(bad, fmt.Errorf("copy %c: %w", 'A'+c, err))
		}
	}
	if copies[1].sequence > copies[0].sequence {
		p.holds = 1
	}
	holds := copies[p.holds]
	p.sequence = holds.sequence
	if bad == nil && holds.sequence != 0 && copies[0].sequence == copies[1].sequence {
		bad = fmt.Errorf("both copies have sequence number %d", holds.sequence)
	}
	first := index * regionsPerPage
	if bad != nil {
		for r := first; r < min(first+regionsPerPage, len(t.last)); r++ {
			t.last[r] = unknown
			p.set++
		}
		p.oldest, p.changed, p.anew = math.MaxUint64, true, true
		return bad
	}
	rel := t.relative(holds.number)
	for i, eight := range holds.bits {
		for ; eight != 0; eight &= eight - 1 {
			t.mark(first+i*8+bits.TrailingZeros8(eight), holds.number, rel)
		}
	}
	p.changed = false
	return nil
}
