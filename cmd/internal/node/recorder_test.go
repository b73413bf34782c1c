package node

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/ramshelf/ramshelf/cache"
)

// sectorBytes is what a power cut leaves whole.
const sectorBytes = 512

// supply is the power of a machine. It counts the operations of all its backings.
type supply struct {
	mu       sync.Mutex
	fate     *rand.Rand
	off      bool
	ops      int
	cutAt    int // the operation at which the power goes; 0: it stays
	faultAt  int // the operation that fails; 0: none
	hangs    bool
	faulty   int // of so many operations one fails; 0: none
	problems []string

	syncsFail bool
	cutFrom   int64 // not 0: the power goes when something is written into the volume from here on
}

// errPower is what operations end with once the power is gone.
var errPower = fmt.Errorf("no power: %w", syscall.EIO)

// hangTime is how long a hanging operation takes.
const hangTime = 40 * time.Second

// begin counts an operation and tells how it ends.
func (s *supply) begin() (wait time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	wait = time.Duration(1+s.fate.IntN(300)) * time.Microsecond
	if s.off {
		return wait, errPower
	}
	s.ops++
	switch {
	case s.ops == s.cutAt:
		s.off = true // under way when the power goes
	case s.ops == s.faultAt && s.hangs:
		wait += hangTime
	case s.ops == s.faultAt || s.faulty > 0 && s.fate.IntN(s.faulty) == 0:
		err = syscall.EIO
	}
	return wait, err
}

// count is how many operations there were.
func (s *supply) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ops
}

func (s *supply) gone() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.off
}

// again turns the power on and lets it go at the n-th operation from now; 0: it stays.
func (s *supply) again(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.off, s.cutAt, s.faultAt, s.faulty, s.syncsFail, s.cutFrom = false, 0, 0, 0, false, 0
	if n > 0 {
		s.cutAt = s.ops + n
	}
}

// fail lets the n-th operation from now fail, or hang.
func (s *supply) fail(n int, hangs bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faultAt, s.hangs = s.ops+n, hangs
}

type page = [cache.BlockBytes]byte

// recorder is a disk in memory that keeps what was not synced yet, sector by sector.
type recorder struct {
	*supply
	sector  int
	stamped int64   // so many bytes have their stamps at first; the others are zero
	now     []*page // nil: as at first
	durable []*page
	pending []piece // written and not synced, in order
	dropped []piece // given up by a sync that failed: read as before until the power goes
	written uint64
	flying  []piece // begun
	shared  bool    // others have the pages too
}

// piece is a write of whole sectors.
type piece struct {
	off    int64
	data   []byte
	number uint64
}

func newRecorder(s *supply, bytes, stamped int64, sector int) *recorder {
	pages := (bytes + cache.BlockBytes - 1) / cache.BlockBytes
	return &recorder{supply: s, sector: sector, stamped: stamped, now: make([]*page, pages), durable: make([]*page, pages)}
}

// look reads one page as it is in list.
func (r *recorder) look(list []*page, i int64, dst *page) {
	switch {
	case list[i] != nil:
		*dst = *list[i]
	case (i+1)*cache.BlockBytes <= r.stamped:
		for at := 0; at < len(dst); at += unitBytes {
			putStamp(dst[at:], 1, uint32((i*cache.BlockBytes+int64(at))/unitBytes))
		}
	default:
		clear(dst[:])
	}
}

// put writes data to list.
func (r *recorder) put(list []*page, off int64, data []byte) {
	for len(data) > 0 {
		i, at := off/cache.BlockBytes, off%cache.BlockBytes
		if list[i] == nil || r.shared {
			p := new(page)
			r.look(list, i, p)
			list[i] = p
		}
		n := copy(list[i][at:], data)
		data, off = data[n:], off+int64(n)
	}
}

func (r *recorder) ReadAt(p []byte, off int64) (int, error) {
	wait, err := r.begin()
	time.Sleep(wait)
	if err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.copyOut(p, off)
}

func (r *recorder) copyOut(p []byte, off int64) (int, error) {
	n := 0
	var whole page
	for n < len(p) && off < r.Size() {
		i, at := off/cache.BlockBytes, off%cache.BlockBytes
		r.look(r.now, i, &whole)
		m := copy(p[n:], whole[at:])
		n, off = n+m, off+int64(m)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	if err := r.write(p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (r *recorder) WritevAt(bufs [][]byte, off int64) error {
	return r.write(slices.Concat(bufs...), off)
}

func (r *recorder) Zero(off, n int64) error { return r.write(make([]byte, n), off) }

// write is in the cache of the disk when it ends, and durable who knows when. One that fails has written a part.
func (r *recorder) write(data []byte, off int64) error {
	data = slices.Clone(data)
	wait, err := r.begin()
	if err == errPower {
		return err
	}
	r.mu.Lock()
	if off < 0 || off+int64(len(data)) > r.Size() || off%int64(r.sector) != 0 || len(data)%r.sector != 0 {
		r.problems = append(r.problems, fmt.Sprintf("write of %d bytes at %d", len(data), off))
	}
	for _, p := range r.flying {
		if off < p.off+int64(len(p.data)) && p.off < off+int64(len(data)) {
			r.problems = append(r.problems, fmt.Sprintf("write of %d bytes at %d while another is under way at %d", len(data), off, p.off))
		}
	}
	r.off = r.off || r.cutFrom > 0 && off >= r.cutFrom && off < simSize
	r.flying = append(r.flying, piece{off: off, data: data})
	r.mu.Unlock()
	time.Sleep(wait)
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.flying, func(p piece) bool { return p.off == off && len(p.data) == len(data) })
	r.flying = slices.Delete(r.flying, i, i+1)
	if err != nil {
		data = data[:r.fate.IntN(len(data)/sectorBytes+1)*sectorBytes]
	}
	r.written++
	r.put(r.now, off, data)
	r.pending = append(r.pending, piece{off, data, r.written})
	if err == nil && r.off {
		err = errPower
	}
	return err
}

// Sync makes durable what was written before it began. One that fails drops a part of that for good.
func (r *recorder) Sync() error {
	r.mu.Lock()
	covered := r.written
	r.mu.Unlock()
	wait, err := r.begin()
	time.Sleep(wait)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.off {
		return errPower
	}
	if r.syncsFail {
		return syscall.EIO
	}
	r.pending = slices.DeleteFunc(r.pending, func(p piece) bool {
		if p.number > covered {
			return false
		}
		if err == nil || r.fate.IntN(2) == 0 {
			r.put(r.durable, p.off, p.data)
		} else {
			r.dropped = append(r.dropped, p)
		}
		return true
	})
	return err
}

func (r *recorder) Size() int64      { return int64(len(r.now)) * cache.BlockBytes }
func (r *recorder) Close() error     { return nil }
func (r *recorder) SectorBytes() int { return r.sector }

// lose ends what a power cut does: of every sector some write since the last sync may be there, or none. No operation is
// under way any more.
func (r *recorder) lose() {
	keep := []float64{0, 0.1, 0.5, 0.9, 1}[r.fate.IntN(5)]
	whole := r.fate.IntN(2) == 0 // writes are there or not as a whole
	for _, p := range r.pending {
		all := r.fate.Float64() < keep
		for at := 0; at < len(p.data); at += sectorBytes {
			if whole && all || !whole && r.fate.Float64() < keep {
				r.put(r.durable, p.off+int64(at), p.data[at:at+sectorBytes])
			}
		}
	}
	r.settle()
}

// settle makes the durable content that which is read.
func (r *recorder) settle() {
	for _, p := range append(r.pending, r.dropped...) {
		for i := p.off / cache.BlockBytes; i*cache.BlockBytes < p.off+int64(len(p.data)); i++ {
			r.now[i] = nil
			if r.durable[i] != nil {
				r.now[i] = new(page)
				*r.now[i] = *r.durable[i]
			}
		}
	}
	r.pending, r.dropped = nil, nil
}

// unitBytes is what one stamp is long: writes of the client are multiples of it.
const unitBytes = 64

// putStamp marks a unit as written by a request.
func putStamp(p []byte, request, unit uint32) {
	word := uint64(request)<<32 | uint64(unit)
	for i := range unitBytes / 8 {
		binary.LittleEndian.PutUint64(p[i*8:], word*(2*uint64(i)+1))
	}
}

// stampOf is the request that wrote a unit, 0 where it is zero.
func stampOf(p []byte, unit uint32) (request uint32, ok bool) {
	word := binary.LittleEndian.Uint64(p)
	for i := range unitBytes / 8 {
		if binary.LittleEndian.Uint64(p[i*8:]) != word*(2*uint64(i)+1) {
			return 0, false
		}
	}
	return uint32(word >> 32), word == 0 || uint32(word) == unit
}
