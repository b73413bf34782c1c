package node

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/flush"
	"github.com/ramshelf/ramshelf/nbd"
)

// layout is a naive model of what is known of every byte of a volume.
type layout struct {
	home  []uint32 // flags at home
	write []bool   // blocks written since
	zero  []bool   // blocks zeroed since
}

// randomLayout has extents at home that begin and end at multiples of grain, and blocks in memory here and there.
func randomLayout(fate *rand.Rand, size, grain int) *layout {
	blocks := (size + cache.BlockBytes - 1) / cache.BlockBytes
	l := &layout{home: make([]uint32, size), write: make([]bool, blocks), zero: make([]bool, blocks)}
	kinds := []uint32{0, 3, 3, 0, 1, 2}
	for at := 0; at < size; {
		n := min(grain*(1+fate.IntN(24)), size-at)
		flags := kinds[fate.IntN(len(kinds))]
		for i := range n {
			l.home[at+i] = flags
		}
		at += n
	}
	for i := range l.write {
		l.write[i] = fate.IntN(4) == 0
		l.zero[i] = !l.write[i] && fate.IntN(6) == 0
	}
	return l
}

// extents tells of home like a backing, in pieces that need not be the longest possible.
func (l *layout) extents(fate *rand.Rand) func(off, n int64, fn func(off, n int64, flags uint32) bool) error {
	return func(off, n int64, fn func(off, n int64, flags uint32) bool) error {
		for end := min(off+n, int64(len(l.home))); off < end; {
			to := off + 1
			for pieceEnd := off + 1 + fate.Int64N(3*cache.BlockBytes); to < min(end, pieceEnd) && l.home[to] == l.home[off]; {
				to++
			}
			if fate.IntN(8) == 0 && to == end {
				to = min(to+cache.BlockBytes, int64(len(l.home))) // overruns what was asked for
			}
			if !fn(off, to-off, l.home[off]) {
				return nil
			}
			if fate.IntN(50) == 0 {
				return errDrive
			}
			off = to
		}
		return nil
	}
}

// right tells whether flags may be said of byte at in context i: dirty and resident are exact, what home knows may also be
// told as data.
func (l *layout) right(i, at int, flags uint32) bool {
	block := at / cache.BlockBytes
	switch {
	case i != 0:
		return flags == 1 == (l.write[block] || l.zero[block])
	case l.write[block]:
		return flags == cache.Data
	case l.zero[block]:
		return flags == cache.HoleZero
	}
	return flags == l.home[at] || flags == cache.Data
}

// surveyRig is a volume whose memory and home are as l says.
func surveyRig(t *testing.T, l *layout) (*Volume, *drive) {
	t.Helper()
	r := newRig(t)
	v := r.open()
	for i := range l.write {
		if l.write[i] {
			write(t, v, int64(i)*cache.BlockBytes, pattern(byte(i)))
		}
		if l.zero[i] {
			done := make(ended, 1)
			v.cache.Zero(&cache.Op{Off: int64(i) * cache.BlockBytes, Len: cache.BlockBytes, Owner: done})
			<-done
		}
	}
	t.Cleanup(func() { closeVolume(t, v) })
	return v, r.drive
}

// TestSurveyAgainstModel asks about random ranges of random layouts and looks at every byte of the answers.
func TestSurveyAgainstModel(t *testing.T) {
	const size = 48*cache.BlockBytes - 1536 // volume that the surveys see
	fate := rand.New(rand.NewPCG(1, 2))
	for _, grain := range []int{1, 512, 1024, 4096, 65536} {
		for range 3 {
			l := randomLayout(fate, size, grain)
			v, d := surveyRig(t, l)
			d.extents = l.extents(fate)
			s := surveys{cache: v.cache, home: d, size: size}
			for range 100 {
				from := fate.IntN(size)
				if fate.IntN(3) == 0 {
					from -= from % cache.BlockBytes
				}
				r := &nbd.Request{Command: nbd.CmdBlockStatus, Contexts: 7, Offset: uint64(from)}
				r.Length = uint64(1 + fate.IntN(size-from))
				if fate.IntN(2) == 0 {
					r.Flags = nbd.CmdFlagReqOne
				}
				s.answer(r, fate.IntN(10) != 0)
				for i := range contexts {
					l.check(t, r, i)
				}
				if t.Failed() {
					t.Fatalf("grain %d, request of %d bytes at %d, flags %v: %v", grain, r.Length, r.Offset, r.Flags, r.Extents[:3])
				}
			}
		}
	}
}

// check holds the answer to context i against the model.
func (l *layout) check(t *testing.T, r *nbd.Request, i int) {
	t.Helper()
	extents := r.Extents[i]
	if len(extents) == 0 || len(extents) > nbd.MaxExtents || r.Flags&nbd.CmdFlagReqOne != 0 && len(extents) != 1 {
		t.Errorf("context %d: %d extents", i, len(extents))
	}
	at := int(r.Offset)
	for j, e := range extents {
		if e.Length == 0 || at+int(e.Length) > len(l.home) {
			t.Errorf("context %d: extent %d of %d bytes at %d in a volume of %d", i, j, e.Length, at, len(l.home))
			return
		}
		if j > 0 && extents[j-1].Flags == e.Flags {
			t.Errorf("context %d: extents %d and %d are one", i, j-1, j)
		}
		for end := at + int(e.Length); at < end; at++ {
			if !l.right(i, at, e.Flags) {
				t.Errorf("context %d: byte %d has flags %d", i, at, e.Flags)
				return
			}
		}
	}
	if end := int(r.Offset + r.Length); at < end && len(extents) < nbd.MaxExtents && r.Flags&nbd.CmdFlagReqOne == 0 {
		t.Errorf("context %d: answer ends at %d, request at %d", i, at, end)
	}
}

// TestSurveyIsExact: where home is asked and answers, nothing is told as data that is a hole.
func TestSurveyIsExact(t *testing.T) {
	l := randomLayout(rand.New(rand.NewPCG(3, 4)), 64*cache.BlockBytes, 1024)
	v, d := surveyRig(t, l)
	d.extents = func(off, n int64, fn func(off, n int64, flags uint32) bool) error {
		for at := off; at < off+n; at += 512 {
			if !fn(at, 512, l.home[at]) {
				break
			}
		}
		return nil
	}
	s := surveys{cache: v.cache, home: d, size: int64(len(l.home))}
	r := &nbd.Request{Command: nbd.CmdBlockStatus, Contexts: 1, Offset: 3000, Length: uint64(len(l.home) - 3000)}
	s.answer(r, true)
	l.check(t, r, 0)
	at := int(r.Offset)
	for _, e := range r.Extents[0] {
		for end := at + int(e.Length); at < end; at++ {
			if block := at / cache.BlockBytes; !l.write[block] && !l.zero[block] && e.Flags != l.home[at] {
				t.Fatalf("byte %d has flags %d, home says %d", at, e.Flags, l.home[at])
			}
		}
	}
}

// TestSurveyReqOneWithinBlock: a request that begins in the middle of a block, behind the first extent of home there.
func TestSurveyReqOneWithinBlock(t *testing.T) {
	v, d := surveyRig(t, &layout{})
	d.extents = func(off, _ int64, fn func(off, n int64, flags uint32) bool) error {
		_ = fn(off, 1024, 3) && fn(off+1024, 3072, 0)
		return nil
	}
	s := surveys{cache: v.cache, home: d, size: testSize}
	r := &nbd.Request{Command: nbd.CmdBlockStatus, Flags: nbd.CmdFlagReqOne, Contexts: 1, Offset: 3000, Length: 1096}
	s.answer(r, true)
	if want := []nbd.Extent{{Length: 1096}}; !slices.Equal(r.Extents[0], want) {
		t.Errorf("told %v, want %v", r.Extents[0], want)
	}
}

// serveVolume serves v over a socket and connects to it.
func serveVolume(t *testing.T, v *Volume, connections int) (*nbd.Server, *nbd.Client) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := nbd.NewServer(nbd.Options{})
	if err := server.AddExport(v.Export("v")); err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(l); err != nil {
			t.Error(err)
		}
	})
	client, err := nbd.Dial(context.Background(), "nbd+unix:///v?socket="+path, nbd.ClientOptions{Connections: connections})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client.Close()
		server.Shutdown(context.Background())
		serving.Wait()
	})
	return server, client
}

// TestSurveysAreBounded: when as many are answered as may be, the next one waits for one of them to end.
func TestSurveysAreBounded(t *testing.T) {
	s := surveys{running: surveyCount}
	if !s.enter(new(nbd.Request)) || s.running != surveyCount || len(s.queue) != 1 {
		t.Errorf("%d run and %d wait, want %d and 1", s.running, len(s.queue), surveyCount)
	}
}

// TestSurveyPassesHangingHome: when home hangs, those surveys wait that asked it, and no others. A stop does not wait for
// them without bound, and lets nothing go that they use.
func TestSurveyPassesHangingHome(t *testing.T) {
	r := newRig(t)
	v := r.open()
	hang, asked := make(chan struct{}), make(chan struct{}, askCount)
	r.drive.extents = func(off, n int64, fn func(off, n int64, flags uint32) bool) error {
		asked <- struct{}{}
		<-hang
		fn(off, n, cache.HoleZero)
		return nil
	}
	server, client := serveVolume(t, v, 2)
	survey := func() (flags uint32, err error) {
		err = client.Extents(0, testSize, func(_, _ int64, f uint32) bool {
			flags = f
			return false
		})
		return flags, err
	}
	var hanging sync.WaitGroup
	for range askCount {
		hanging.Go(func() { _, _ = survey() }) // their connections will be cut
	}
	for range askCount {
		<-asked
	}
	var others sync.WaitGroup
	for range 3 * surveyCount {
		others.Go(func() {
			if flags, err := survey(); err != nil || flags != cache.Data {
				t.Errorf("told %d, %v, want data", flags, err)
			}
		})
	}
	others.Wait()

	soon, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if err := server.Shutdown(soon); err == nil {
		t.Error("the server ended while requests hang")
	}
	if err := v.close(soon); !errors.Is(err, flush.ErrInFlight) {
		t.Errorf("close: %v, want %v", err, flush.ErrInFlight)
	}
	close(hang)
	client.Close()
	hanging.Wait()
	v.device.surveys.close()
	if v.device.surveys.enter(new(nbd.Request)) {
		t.Error("a survey began after the end")
	}
}
