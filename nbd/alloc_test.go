package nbd_test

import (
	"io"
	"runtime"
	"testing"

	"github.com/ramshelf/ramshelf/nbd"
	"github.com/ramshelf/ramshelf/nbd/nbdtest"
)

// TestAllocs: in steady state a request allocates nothing.
func TestAllocs(t *testing.T) {
	const requests, batches = 32, 400
	tests := []struct {
		name          string
		mode          int
		noRoom, async bool
		request       func(p *peer) []byte
		reply         int // bytes
	}{
		{"reads", 0, false, false, func(p *peer) []byte { return p.request(cmdRead, 0, 0, 4096) }, 16 + 4096},
		{"structured reads", 1, false, false, func(p *peer) []byte { return p.request(cmdRead, 0, 0, 4096) }, 28 + 4096},
		{"extended reads", 2, false, false, func(p *peer) []byte { return p.request(cmdRead, 0, 512, 7000) }, 40 + 7000},
		{"writes", 0, false, false, func(p *peer) []byte { return p.request(cmdWrite, 0, 0, 4096, make([]byte, 4096)) }, 16},
		{"writes in place", 0, false, false, func(p *peer) []byte { return p.request(cmdWrite, 0, 0, 64<<10, make([]byte, 64<<10)) }, 16},
		{"large writes", 0, false, false, func(p *peer) []byte { return p.request(cmdWrite, 0, 0, 1<<20, make([]byte, 1<<20)) }, 16},
		{"staged writes", 1, true, false, func(p *peer) []byte { return p.request(cmdWrite, 0, 0, 4096, make([]byte, 4096)) }, 16},
		{"flushes", 1, false, false, func(p *peer) []byte { return p.request(cmdFlush, 0, 0, 0) }, 16},
		{"zeroes", 2, false, false, func(p *peer) []byte { return p.request(cmdZeroes, 0, 1<<20, 1<<20) }, 32},
		{"errors", 1, false, false, func(p *peer) []byte { return p.request(cmdRead, 0, testSize, 1) }, 26},
		{"reads answered later", 1, false, true, func(p *peer) []byte { return p.request(cmdRead, 0, 0, 4096) }, 28 + 4096},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := &laterDevice{Memory: newDevice()}
			d.NoRoom = func(*nbd.Request) bool { return tt.noRoom }
			if tt.async {
				d.queue = make(chan *nbd.Request, requests)
				go d.run()
				defer close(d.queue)
			}
			s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "vol", Device: d})
			p := s.dial().enter(tt.mode, "vol")
			p.mustWrite(0, pattern(1, 8192))
			var batch []byte
			k := requests
			if tt.reply < 1024 && tt.name == "large writes" {
				k = 2
			}
			for range k {
				batch = append(batch, tt.request(p)...)
			}
			replies := make([]byte, k*tt.reply)
			round := func() {
				go p.Write(batch)
				if _, err := io.ReadFull(p, replies); err != nil {
					t.Fatal(err)
				}
			}
			for range 50 {
				round()
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range batches {
				round()
			}
			runtime.ReadMemStats(&after)
			// The test's own goroutine costs an allocation or two per batch; one per request would be k.
			if per := float64(after.Mallocs-before.Mallocs) / batches; per > 4 && k > 4 || per > 8 {
				t.Errorf("%.1f allocations per batch of %d requests", per, k)
			}
		})
	}
}

// laterDevice completes requests on a goroutine of its own.
type laterDevice struct {
	*nbdtest.Memory
	queue chan *nbd.Request
}

func (d *laterDevice) Submit(r *nbd.Request) {
	if d.queue == nil {
		d.Memory.Submit(r)
		return
	}
	d.queue <- r
}

func (d *laterDevice) run() {
	for r := range d.queue {
		d.Memory.Submit(r)
	}
}
