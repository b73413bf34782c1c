package load

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ramshelf/ramshelf/bench"
)

// Bounds of a Config.
const (
	maxConnections = 1024
	maxDepth       = 4096
	maxBatch       = 256
	maxBlockBytes  = 32 << 20
)

// Config says what load to generate.
type Config struct {
	Target      Target
	Connections int // default 1
	Depth       int // requests in flight on each connection; default 16
	// Batch is how many requests leave with one system call: they are held back until so many fit into
	// Depth. Default 16, at most Depth.
	Batch      int
	BlockBytes int // of a request; default 4096
	// ReadPercent is the share of reads, 0 to 100; the rest is writes.
	ReadPercent int
	// Sequential goes through the export from its begin to its end and again, each connection through its
	// own part of it. Otherwise offsets are random, evenly spread, multiples of BlockBytes.
	Sequential bool
	// Order, if not nil, lists the blocks to visit, as multiples of BlockBytes, from its begin to its end and
	// again. It wants one connection.
	Order []uint64
	// Structured negotiates structured replies; Open returns ErrStructured when the server has none.
	Structured bool
	// Stamp marks every 4 KiB block that is written with its offset. Check has every read compared with
	// those marks, which costs the client a look into each block and a copy of replies cut by a receive.
	Stamp, Check bool
	Seed         uint64
}

// withDefaults gives c with the zero values filled in, or says what is wrong with it.
func (c Config) withDefaults() (Config, error) {
	for _, d := range []struct {
		field *int
		value int
	}{{&c.Connections, 1}, {&c.Depth, 16}, {&c.BlockBytes, 4096}} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	if c.Batch == 0 {
		c.Batch = min(16, c.Depth)
	}
	for _, b := range []struct {
		name          string
		value, lo, hi int
	}{
		{"connections", c.Connections, 1, maxConnections},
		{"depth", c.Depth, 1, maxDepth},
		{"batch", c.Batch, 1, min(maxBatch, c.Depth)},
		{"block size", c.BlockBytes, 1, maxBlockBytes},
		{"percentage of reads", c.ReadPercent, 0, 100},
	} {
		if b.value < b.lo || b.value > b.hi {
			return c, fmt.Errorf("%s is %d; want %d to %d", b.name, b.value, b.lo, b.hi)
		}
	}
	if (c.Stamp || c.Check) && c.BlockBytes%stampBytes != 0 {
		return c, fmt.Errorf("block size is %d; stamps want a multiple of %d", c.BlockBytes, stampBytes)
	}
	if c.Order != nil && (len(c.Order) == 0 || c.Connections > 1 || c.Sequential) {
		return c, fmt.Errorf("an order of %d blocks on %d connections, sequential %v; want at least one block, one connection, not sequential",
			len(c.Order), c.Connections, c.Sequential)
	}
	return c, nil
}

// Result is what one Run measured.
type Result struct {
	Requests uint64
	Bytes    uint64
	Elapsed  time.Duration // from the first send to the last reply
	Reads    bench.Histogram
	Writes   bench.Histogram
	CPU      time.Duration // of the generator itself
	Calls    uint64        // system calls of the generator
}

// IOPS is requests per second.
func (r *Result) IOPS() float64 { return float64(r.Requests) / r.Elapsed.Seconds() }

// Latency gives reads and writes together: the time from the call that sent a request to the return of the
// call that brought the end of its reply.
func (r *Result) Latency() *bench.Histogram {
	all := r.Reads
	all.Add(&r.Writes)
	return &all
}

func (r *Result) add(o *Result) {
	r.Requests += o.Requests
	r.Bytes += o.Bytes
	r.Elapsed = max(r.Elapsed, o.Elapsed)
	r.Reads.Add(&o.Reads)
	r.Writes.Add(&o.Writes)
	r.CPU += o.CPU
	r.Calls += o.Calls
}

// Load is a set of open connections. It is not safe for concurrent use.
type Load struct {
	config      Config
	size        uint64
	connections []*connection
	stop        atomic.Bool
}

// Open connects and negotiates. Nothing is requested until Run.
func Open(ctx context.Context, c Config) (*Load, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("configure load: %w", err)
	}
	l := &Load{config: c}
	for i := range c.Connections {
		fd, size, err := dial(ctx, c.Target, c.Structured)
		if err != nil {
			return nil, errors.Join(err, l.Close())
		}
		l.size = size
		l.connections = append(l.connections, newConnection(fd, c, i, &l.stop))
	}
	blocks := l.size / uint64(c.BlockBytes)
	if blocks < uint64(c.Connections) {
		return nil, errors.Join(fmt.Errorf("export of %d bytes is too small for %d connections with blocks of %d",
			l.size, c.Connections, c.BlockBytes), l.Close())
	}
	for _, b := range c.Order {
		if b >= blocks {
			return nil, errors.Join(fmt.Errorf("order visits block %d of %d", b, blocks), l.Close())
		}
	}
	for i, conn := range l.connections {
		conn.spread(blocks, i, c.Connections)
	}
	return l, nil
}

// Size is the length of the export in bytes.
func (l *Load) Size() int64 { return int64(l.size) }

// Run generates load for d and waits for the last reply. Any error that a server answers ends it: figures of
// failed requests mean nothing. After an error only Close is left to do.
func (l *Load) Run(ctx context.Context, d time.Duration) (Result, error) { return l.run(ctx, d, 0) }

// Pass sends n requests on each connection and waits for the last reply; with Sequential and a Size that
// Connections × BlockBytes divides, Size ÷ (Connections × BlockBytes) requests visit every block once.
func (l *Load) Pass(ctx context.Context, n uint64) (Result, error) { return l.run(ctx, 0, n) }

// run starts every connection in a thread of its own at the same instant and adds up what they measured.
func (l *Load) run(ctx context.Context, d time.Duration, requests uint64) (Result, error) {
	l.stop.Store(false)
	defer context.AfterFunc(ctx, func() { l.stop.Store(true) })()

	errs := make([]error, len(l.connections))
	var ready, done sync.WaitGroup
	start := make(chan time.Time)
	ready.Add(len(l.connections))
	for i, c := range l.connections {
		done.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			ready.Done()
			errs[i] = c.run(<-start, d, requests)
		})
	}
	ready.Wait()
	now := time.Now()
	for range l.connections {
		start <- now
	}
	done.Wait()

	var total Result
	for _, c := range l.connections {
		total.add(&c.result)
	}
	return total, errors.Join(errors.Join(errs...), ctx.Err())
}

// Close disconnects. It is idempotent.
func (l *Load) Close() error {
	var errs []error
	for _, c := range l.connections {
		errs = append(errs, c.close())
	}
	l.connections = nil
	return errors.Join(errs...)
}
