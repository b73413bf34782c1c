package node

import (
	"syscall"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/nbd"
)

// device is the cache as the NBD server sees it.
type device struct {
	cache   *cache.Cache
	backing backing
	size    int64
	// prefetchBlocks bounds what one CACHE command reads.
	prefetchBlocks uint64
	// surveys bounds the BLOCK_STATUS requests that are being answered at once.
	surveys chan struct{}
}

// surveyCount is how many BLOCK_STATUS requests run at once; each may walk the headers of the whole memory.
const surveyCount = 2

func newDevice(c *cache.Cache, b backing, sizeBytes, memoryBytes int64) *device {
	return &device{
		cache: c, backing: b, size: sizeBytes,
		prefetchBlocks: uint64(memoryBytes / cache.BlockBytes / 8),
		surveys:        make(chan struct{}, surveyCount),
	}
}

// request joins an NBD request and the operation of the cache that serves it. It stays with the request when that is used
// again.
type request struct {
	op  cache.Op
	nbd *nbd.Request
	dev *device
}

func (d *device) bind(r *nbd.Request) *request {
	q, _ := r.Device.(*request)
	if q == nil {
		q = &request{dev: d, nbd: r}
		q.op.Owner = q
		r.Device = q
	}
	q.op.Off, q.op.Len = int64(r.Offset), int64(r.Length)
	q.op.FUA = r.Flags&nbd.CmdFlagFUA != 0
	return q
}

// Size is the length of the volume in bytes.
func (d *device) Size() int64 { return d.size }

// Reserve finds slots for the payload of a write.
func (d *device) Reserve(r *nbd.Request) bool {
	q := d.bind(r)
	if !d.cache.Reserve(&q.op) {
		return false
	}
	for i := range q.op.Parts() {
		r.Dest = append(r.Dest, d.cache.Dest(&q.op, i))
	}
	return true
}

// Abort gives back what Reserve took.
func (d *device) Abort(r *nbd.Request) { d.cache.Abort(&r.Device.(*request).op) }

// Submit starts a request.
func (d *device) Submit(r *nbd.Request) {
	q := d.bind(r)
	switch r.Command {
	case nbd.CmdRead:
		d.cache.Read(&q.op)
	case nbd.CmdWrite:
		q.op.Payload = r.Payload
		d.cache.Write(&q.op)
	case nbd.CmdFlush:
		d.cache.Flush(&q.op)
	case nbd.CmdTrim, nbd.CmdWriteZeroes:
		d.cache.Zero(&q.op)
	case nbd.CmdCache:
		first := r.Offset / cache.BlockBytes
		end := (r.Offset + r.Length + cache.BlockBytes - 1) / cache.BlockBytes
		d.cache.Prefetch(first, min(end, first+d.prefetchBlocks))
		r.Done(0)
	case nbd.CmdBlockStatus:
		go d.survey(r)
	default:
		r.Done(syscall.EINVAL)
	}
}

// Release ends the loan of what answered a read.
func (d *device) Release(r *nbd.Request) {
	if r.Command == nbd.CmdRead {
		d.cache.Release(&r.Device.(*request).op)
	}
}

// Ended answers the request, or cuts its connection where it must not be answered.
func (q *request) Ended(op *cache.Op) {
	if op.Err == syscall.ESHUTDOWN {
		q.nbd.Cut()
		return
	}
	if op.Err == 0 && q.nbd.Command == nbd.CmdRead {
		for i := range op.Pieces() {
			if data, n := q.dev.cache.Piece(op, i); data != nil {
				q.nbd.AddData(data)
			} else {
				q.nbd.AddHole(uint64(n))
			}
		}
	}
	q.nbd.Done(op.Err)
}

// contexts are what a volume tells about its blocks, in the order of the bits of nbd.Request.Contexts.
var contexts = [...]struct {
	name string
	kind cache.Context
}{
	{"base:allocation", cache.Allocation},
	{"x-ramshelf:dirty", cache.Dirty},
	{"x-ramshelf:resident", cache.Resident},
}

// survey answers a BLOCK_STATUS.
func (d *device) survey(r *nbd.Request) {
	d.surveys <- struct{}{}
	defer func() { <-d.surveys }()
	for i, c := range contexts {
		if r.Contexts&(1<<i) == 0 {
			continue
		}
		s := surveyor{extents: r.Extents[i][:0], most: nbd.MaxExtents}
		if r.Flags&nbd.CmdFlagReqOne != 0 {
			s.most = 1
		}
		d.cache.Map(c.kind, int64(r.Offset), int64(r.Length), func(n int64, flags uint32) bool {
			if flags == cache.Unknown {
				return d.ask(&s, int64(r.Offset)+s.length, n)
			}
			return s.add(n, flags)
		})
		s.trim(int64(r.Offset), d.size)
		r.Extents[i] = s.extents
	}
	r.Done(0)
}

// ask tells what home knows of a range that is not resident.
func (d *device) ask(s *surveyor, off, n int64) bool {
	off -= off % cache.BlockBytes
	mapper, ok := d.backing.(extentMapper)
	if !ok {
		return s.add(n, cache.Data)
	}
	left, more := n, true
	err := mapper.Extents(off, n, func(_, m int64, flags uint32) bool {
		m = min(m, left)
		left -= m
		more = s.add(m, flags&cache.HoleZero)
		return more && left > 0
	})
	if more && left > 0 && (err != nil || left < n) {
		return s.add(left, cache.Data)
	}
	return more
}

// surveyor puts extents together.
type surveyor struct {
	extents []nbd.Extent
	length  int64 // of all
	most    int
}

// add appends n bytes and reports whether there is room for more.
func (s *surveyor) add(n int64, flags uint32) bool {
	if last := len(s.extents) - 1; last >= 0 && s.extents[last].Flags == flags {
		s.extents[last].Length += uint64(n)
		s.length += n
		return true
	}
	if len(s.extents) == s.most {
		return false
	}
	s.extents = append(s.extents, nbd.Extent{Length: uint64(n), Flags: flags})
	s.length += n
	return true
}

// trim takes off what lies before the request, since the cache tells about whole blocks, and what lies behind the volume.
func (s *surveyor) trim(off, size int64) {
	before := off % cache.BlockBytes
	for before > 0 && len(s.extents) > 0 {
		cut := min(before, int64(s.extents[0].Length))
		s.extents[0].Length -= uint64(cut)
		before -= cut
		if s.extents[0].Length == 0 {
			s.extents = s.extents[1:]
		}
	}
	start := off - off%cache.BlockBytes
	for over := start + s.length - size; over > 0 && len(s.extents) > 0; {
		last := &s.extents[len(s.extents)-1]
		cut := min(over, int64(last.Length))
		last.Length -= uint64(cut)
		over -= cut
		if last.Length == 0 {
			s.extents = s.extents[:len(s.extents)-1]
		}
	}
}
