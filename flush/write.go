package flush

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// maxFills bounds the blocks of one write that are read from home first, and so the memory for them. Such
// blocks are rare: the cache completes them before they go home.
const maxFills = 64

// zeroBufferBytes is the length of the buffer of zeroes for backings without Zero.
const zeroBufferBytes = 1 << 20

// job is one operation on the backing: a write of adjoining pieces, or a range to be zeroed. A fixed number
// of them is used again and again.
type job struct {
	seq       uint64 // its place in the ascending order, from 1
	off       int64
	zeroBytes int64 // not 0: zero this many bytes, there are no bufs
	length    int64
	bufs      [][]byte
	fills     []fill
	filled    []byte      // memory of the fills, aligned to BlockBytes; made when first needed
	gather    []byte      // memory for backings without WritevAt; made when first needed
	heads     []byte      // memory for the headers of a journal's chunks; made when first needed
	written   func(error) // ends the job after an asynchronous write; made once
}

// fill is a block of a job that is completed from home before it is written: the sectors in mask come from
// data, the others from home.
type fill struct {
	off  int64
	data []byte
	mask uint8
}

// add appends p to the write.
func (j *job) add(p *piece) {
	data := p.data
	if p.fill != 0 {
		if j.filled == nil {
			j.filled = alignedBytes(maxFills * BlockBytes)
		}
		data = j.filled[len(j.fills)*BlockBytes:][:BlockBytes]
		j.fills = append(j.fills, fill{p.off, p.data, p.fill})
	}
	j.bufs = append(j.bufs, data)
	j.length += int64(len(data))
}

// head is memory for the i-th header of a chunk in the write.
func (j *job) head(i int) []byte {
	if j.heads == nil {
		j.heads = alignedBytes(headsPerJob * BlockBytes)
	}
	return j.heads[i*BlockBytes:][:BlockBytes]
}

// reset lets go of all borrowed memory.
func (j *job) reset() {
	clear(j.bufs)
	clear(j.fills)
	*j = job{bufs: j.bufs[:0], fills: j.fills[:0], filled: j.filled, gather: j.gather, heads: j.heads, written: j.written}
}

// lane is the way to one backing for one goroutine, its owner: it runs jobs, several at a time, started in the order in
// which they were given, and syncs them.
type lane struct {
	f   *Flusher
	out output
	progress
	disk   *disk
	since  uint64        // failed syncs of the disk when the first write after the last good sync began; belongs to the owner
	jobs   chan *job     // unbuffered; closed by close, when the owner has ended
	free   chan *job     // Depth jobs in flight and one that is being planned
	bytes  atomic.Uint64 // written
	issued uint64        // seq of the last job; belongs to the owner
	async  int           // asynchronous writes in flight; belongs to the owner

	mu      sync.Mutex // protects what follows
	changed sync.Cond
	turn    uint64 // seq of the last job that was started
	running int    // jobs given and not ended
	err     error  // the first since the last wait
}

// disk is a device that several lanes may lead to. A sync that fails takes with it what the others have not synced yet: the
// next sync may succeed and their writes be lost all the same.
type disk struct {
	failedSyncs atomic.Uint64
	// syncing holds one element while a sync is under way. They come one after another: with two at a time the one that
	// succeeds, although the other took its writes, might return before that one has said so.
	syncing chan struct{}
}

func newDisk() *disk { return &disk{syncing: make(chan struct{}, 1)} }

func (w *lane) init(f *Flusher, dev Backing, d *disk) {
	w.f, w.out, w.disk = f, newOutput(dev), d
	w.progress.base = time.Now()
	f.health.lanes = append(f.health.lanes, &w.progress)
	w.changed.L = &w.mu
	w.jobs = make(chan *job)
	w.free = make(chan *job, f.o.Depth+1)
	for range f.o.Depth + 1 {
		j := &job{bufs: make([][]byte, 0, f.o.WriteBytes/BlockBytes), fills: make([]fill, 0, maxFills)}
		j.written = func(err error) {
			w.async--
			w.finish(j, w.written(j, err))
		}
		w.free <- j
	}
}

func (w *lane) close() { close(w.jobs) }

// take returns an empty job, to be given to start.
func (w *lane) take() *job { return <-w.free }

// start starts j, or gives it to a writer, as soon as fewer than Depth jobs are running. It reports false, and
// drops j, when an earlier job has failed or the flusher stops; wait tells the error.
func (w *lane) start(j *job) bool {
	w.await(w.f.o.Depth - 1)
	w.mu.Lock()
	if w.err == nil && w.f.stopping() {
		w.err = ErrStopped
	}
	ok := w.err == nil
	if ok {
		w.running++
	}
	w.mu.Unlock()
	if !ok {
		j.reset()
		w.free <- j
		return false
	}
	w.issued++
	j.seq = w.issued
	if w.out.starter == nil || j.zeroBytes > 0 || len(j.fills) > 0 {
		w.jobs <- j
	} else if w.startTurn(j.seq) {
		w.async++
		w.progress.begin()
		w.out.starter.StartWritev(j.bufs, j.off, j.written)
	} else {
		w.finish(j, nil)
	}
	return true
}

// wait returns when no job is running, with the first error since it was last called.
func (w *lane) wait() error {
	w.await(0)
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.err
	w.err = nil
	return err
}

// await returns when no more than n jobs are running.
func (w *lane) await(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.running > n {
		if w.async == 0 {
			w.changed.Wait()
			continue
		}
		w.mu.Unlock()
		w.out.starter.Reap()
		w.mu.Lock()
	}
}

// runWriter runs jobs until there are no more. Reads that a write needs are done beforehand, out of order;
// writes themselves start in order.
func (w *lane) runWriter() {
	for j := range w.jobs {
		err := w.fill(j)
		if w.startTurn(j.seq) && err == nil {
			err = w.write(j)
		}
		w.finish(j, err)
	}
}

// startTurn waits for the turn of job seq. It reports false when an earlier job has failed: the attempt is lost
// and this one need not be done. It cannot wait for ever, since every earlier job has a writer already.
func (w *lane) startTurn(seq uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.turn+1 != seq {
		w.changed.Wait()
	}
	w.turn = seq
	w.changed.Broadcast()
	return w.err == nil
}

// finish takes back j, which ended with err.
func (w *lane) finish(j *job, err error) {
	if err != nil && planted("drop-on-error") {
		err = nil
	}
	j.reset()
	w.free <- j
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running--
	if w.err == nil {
		w.err = err
	}
	w.changed.Broadcast()
}

// output is the backing with its optional abilities.
type output struct {
	dev    Backing
	vector vectorWriter // nil without
	zeroer zeroer       // nil without
	sector int          // bytes; 1 where any length is right

	starter starter // nil where writes cannot be asynchronous
}

func newOutput(dev Backing) output {
	o := output{dev: dev, sector: 1}
	o.vector, _ = dev.(vectorWriter)
	o.zeroer, _ = dev.(zeroer)
	if s, ok := dev.(sectored); ok {
		o.sector = s.SectorBytes()
	}
	if s, ok := dev.(starter); ok && s.Async() {
		o.starter = s
	}
	return o
}

// fill completes the blocks of j from home. Neighbors are read together.
func (w *lane) fill(j *job) error {
	for i := 0; i < len(j.fills); {
		n := 1
		for i+n < len(j.fills) && j.fills[i+n].off == j.fills[i].off+int64(n)*BlockBytes {
			n++
		}
		buf := j.filled[i*BlockBytes : (i+n)*BlockBytes]
		if err := w.read(buf, j.fills[i].off); err != nil {
			return err
		}
		for k := range n {
			j.fills[i+k].apply(buf[k*BlockBytes:])
		}
		i += n
	}
	return nil
}

// apply copies the sectors of the mask over a block as it is at home.
func (l *fill) apply(block []byte) {
	for i := range BlockBytes / SectorBytes {
		if l.mask&(1<<i) != 0 {
			copy(block[i*SectorBytes:(i+1)*SectorBytes], l.data[i*SectorBytes:])
		}
	}
}

func (w *lane) read(p []byte, off int64) error {
	w.progress.begin()
	n, err := w.out.dev.ReadAt(p, off)
	w.progress.end()
	if n == len(p) {
		err = nil
	} else if err == nil {
		err = io.ErrUnexpectedEOF
	}
	w.f.counters.filledBlocks.Add(uint64(len(p) / BlockBytes))
	return w.f.counters.failure(err, "read", off, int64(len(p)))
}

// write does what j says.
func (w *lane) write(j *job) error {
	if j.zeroBytes > 0 {
		return w.zero(j.off, j.zeroBytes)
	}
	w.progress.begin()
	return w.written(j, w.out.write(j))
}

// written counts the write of j, which ended with err.
func (w *lane) written(j *job, err error) error {
	w.progress.end()
	w.f.counters.writes.Add(1)
	if err == nil {
		w.f.counters.writtenBytes.Add(uint64(j.length))
		w.bytes.Add(uint64(j.length))
	}
	return w.f.counters.failure(err, "write", j.off, j.length)
}

func (o *output) write(j *job) error {
	if o.vector != nil {
		return o.vector.WritevAt(j.bufs, j.off)
	}
	if len(j.bufs) == 1 {
		return writeFull(o.dev, j.bufs[0], j.off)
	}
	if j.gather == nil {
		j.gather = alignedBytes(cap(j.bufs) * BlockBytes)
	}
	n := 0
	for _, b := range j.bufs {
		n += copy(j.gather[n:], b)
	}
	return writeFull(o.dev, j.gather[:n], j.off)
}

// writeFull writes p and makes an error of a short write, which io.WriterAt forbids without one.
func writeFull(dev io.WriterAt, p []byte, off int64) error {
	n, err := dev.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}

// zeroBuffer is only ever read.
var zeroBuffer = alignedBytes(zeroBufferBytes)

// zero zeroes a range: by the backing's own means if it has any, else by writing zeroes.
func (w *lane) zero(off, n int64) error {
	w.progress.begin()
	defer w.progress.end()
	err := error(syscall.EOPNOTSUPP)
	if w.out.zeroer != nil {
		err = w.out.zeroer.Zero(off, n)
	}
	if errors.Is(err, syscall.EOPNOTSUPP) {
		err = w.writeZeroes(off, n)
	}
	if err == nil {
		w.f.counters.zeroedBytes.Add(uint64(n))
	}
	return w.f.counters.failure(err, "zero", off, n)
}

func (w *lane) writeZeroes(off, n int64) error {
	for n > 0 {
		p := zeroBuffer[:min(n, zeroBufferBytes)]
		if err := writeFull(w.out.dev, p, off); err != nil {
			return err
		}
		w.progress.completed()
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

// sync makes all completed writes durable.
func (w *lane) sync() error {
	select {
	case w.disk.syncing <- struct{}{}:
	case <-w.f.stop:
		return ErrStopped
	}
	defer func() { <-w.disk.syncing }()
	w.progress.begin()
	err := w.out.dev.Sync()
	w.progress.end()
	w.f.counters.syncs.Add(1)
	if err != nil {
		w.disk.failedSyncs.Add(1)
		w.f.counters.errors.Add(1)
		return fmt.Errorf("sync backing: %w", err)
	}
	if w.disk.failedSyncs.Load() != w.since && !planted("ignore-other-sync") {
		return errSyncLost
	}
	return nil
}

// errSyncLost: this sync succeeded, but another one failed since the writes that it was for began.
var errSyncLost = errors.New("sync backing: another sync failed meanwhile and may have taken the writes with it")

// begins notes that the first write after a good sync, or after a failure, comes next.
func (w *lane) begins() { w.since = w.disk.failedSyncs.Load() }

// alignedBytes returns n bytes of memory that begin on a multiple of BlockBytes, as direct I/O wants them.
func alignedBytes(n int) []byte {
	p := make([]byte, n+BlockBytes)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(p))) % BlockBytes
	return p[skip:][:n:n]
}
