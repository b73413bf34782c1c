package node

import (
	"syscall"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/nbd"
)

// device is the cache as the NBD server sees it.
type device struct {
	cache *cache.Cache
	size  int64
	// prefetchBlocks bounds what one CACHE command reads.
	prefetchBlocks uint64
	surveys        surveys
}

func newDevice(c *cache.Cache, b backing, sizeBytes, memoryBytes int64) *device {
	mapper, _ := b.(extentMapper)
	return &device{
		cache: c, size: sizeBytes,
		prefetchBlocks: uint64(memoryBytes / cache.BlockBytes / 8),
		surveys:        surveys{cache: c, home: mapper, size: sizeBytes},
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
		d.surveys.submit(r)
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
