package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// dial connects a Client for a test.
func dial(t testing.TB, uri string, o ClientOptions) *Client {
	t.Helper()
	c, err := Dial(context.Background(), uri, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// Random operations on the servers of others agree with a byte array, from several goroutines at once.
func TestClientServers(t *testing.T) {
	const size = 24<<20 + 512
	for _, server := range []struct {
		name  string
		start func() *tool
	}{
		{"nbdkit", func() *tool { return nbdkit(t, "memory", fmt.Sprint(size)) }},
		{"nbdkit without structured replies", func() *tool { return nbdkit(t, "--no-sr", "memory", fmt.Sprint(size)) }},
		{"qemu-nbd", func() *tool { return qemuNBD(t, size, "-e", "4", "--discard=unmap") }},
		{"nbd-server", func() *tool { return nbdServer(t, size, "flush=true\nfua=true\ntrim=true\n") }},
	} {
		t.Run(server.name, func(t *testing.T) {
			c := dial(t, server.start().uri, ClientOptions{Connections: 3, InFlight: 5})
			if c.Size() != size {
				t.Fatalf("size %d, want %d", c.Size(), size)
			}
			model := make([]byte, size)
			const workers = 4
			part := size / workers / 4096 * 4096
			var wg sync.WaitGroup
			for i := range workers {
				from, to := i*part, (i+1)*part
				if i == workers-1 {
					to = size
				}
				wg.Go(func() { operate(t, c, model, from, to, uint64(i)) })
			}
			wg.Wait()
			if err := c.Sync(); err != nil {
				t.Error(err)
			}
			got := make([]byte, size)
			if n, err := c.ReadAt(got, 0); err != nil || n != size {
				t.Fatal(n, err)
			}
			if !bytes.Equal(got, model) {
				t.Error("the export differs from the model")
			}
			checkExtents(t, c, model)
		})
	}
}

// operate does random operations in [from, to) of c and model.
func operate(t *testing.T, c *Client, model []byte, from, to int, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	step := c.SectorBytes()
	for range 60 {
		off := from + r.IntN(to-from)/step*step
		n := min((1+r.IntN(600<<10))/step*step+step, to-off)
		p := randomBytes(n, r.Uint64())
		var err error
		switch r.IntN(6) {
		case 0:
			_, err = c.WriteAt(p, int64(off))
			copy(model[off:], p)
		case 1:
			cut := r.IntN(n)
			err = c.WritevAt([][]byte{p[:cut/2], nil, p[cut/2 : cut], p[cut:]}, int64(off))
			copy(model[off:], p)
		case 2:
			if err = c.Zero(int64(off), int64(n)); errors.Is(err, syscall.EOPNOTSUPP) {
				_, err = c.WriteAt(make([]byte, n), int64(off))
			}
			clear(model[off : off+n])
		case 3:
			err = c.Sync()
		default:
			if _, err = c.ReadAt(p, int64(off)); err == nil && !bytes.Equal(p, model[off:off+n]) {
				err = fmt.Errorf("%d bytes at %d differ", n, off)
			}
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
}

// checkExtents sees that the extents tile the export and that what is said to be zero is zero.
func checkExtents(t *testing.T, c *Client, model []byte) {
	t.Helper()
	at := int64(0)
	err := c.Extents(0, c.Size(), func(off, n int64, flags uint32) bool {
		if off != at || n <= 0 {
			t.Errorf("extent of %d bytes at %d, want one at %d", n, off, at)
		}
		at = off + n
		if flags&StateZero != 0 && bytes.Count(model[off:off+n], []byte{0}) != int(n) {
			t.Errorf("%d bytes at %d are said to be zero", n, off)
		}
		return true
	})
	if err != nil || at != c.Size() {
		t.Errorf("extents end at %d of %d, %v", at, c.Size(), err)
	}
}

func TestClientExtents(t *testing.T) {
	c := dial(t, nbdkit(t, "memory", "8G").uri, ClientOptions{})
	if _, err := c.WriteAt(randomBytes(64<<10, 9), 6<<30); err != nil {
		t.Fatal(err)
	}
	var got []string
	note := func(off, n int64, flags uint32) bool {
		got = append(got, fmt.Sprint(off>>15, n>>15, flags))
		return len(got) < 3
	}
	if err := c.Extents(5<<30, 3<<30, note); err != nil {
		t.Fatal(err)
	}
	if want := []string{"163840 32768 3", "196608 2 0", "196610 65534 3"}; strings.Join(got, ";") != strings.Join(want, ";") {
		t.Errorf("extents %q, want %q", got, want)
	}
	// More than one BLOCK_STATUS can say, and an end on demand.
	var total int64
	if err := c.Extents(0, c.Size(), func(_, n int64, _ uint32) bool { total += n; return true }); err != nil || total != 8<<30 {
		t.Errorf("%d bytes, %v", total, err)
	}
	calls := 0
	if err := c.Extents(0, c.Size(), func(int64, int64, uint32) bool { calls++; return false }); err != nil || calls != 1 {
		t.Errorf("%d calls after false, %v", calls, err)
	}
	// Operations are possible within fn, even with a single one at a time.
	one := dial(t, nbdkit(t, "memory", "1M").uri, ClientOptions{InFlight: 1})
	err := one.Extents(0, one.Size(), func(int64, int64, uint32) bool { _, err := one.ReadAt(make([]byte, 512), 0); return err == nil })
	if err != nil {
		t.Error(err)
	}
	// Without block status nothing is known.
	plain := dial(t, nbdkit(t, "--no-sr", "memory", "1M").uri, ClientOptions{})
	got = nil
	if err := plain.Extents(0, 1<<20, note); err != nil || strings.Join(got, ";") != "0 32 0" {
		t.Errorf("%q, %v", got, err)
	}
}

// Every error of the server arrives as what it is, and says what failed.
func TestClientServerErrors(t *testing.T) {
	for name, want := range map[string]syscall.Errno{
		"EPERM": syscall.EPERM, "EIO": syscall.EIO, "ENOMEM": syscall.ENOMEM, "EINVAL": syscall.EINVAL,
		"ENOSPC": syscall.ENOSPC, "ESHUTDOWN": syscall.ESHUTDOWN,
	} {
		k := nbdkit(t, "--filter=error", "memory", "1M", "error="+name, "error-rate=100%")
		c := dial(t, k.uri, ClientOptions{ReconnectDelay: 1, Quarantine: 1})
		check := func(what string, err error) {
			t.Helper()
			if !errors.Is(err, want) || !strings.Contains(err.Error(), what) {
				t.Errorf("%s: %v; want %v and %q", name, err, want, what)
			}
		}
		n, err := c.ReadAt(make([]byte, 4096), 512)
		check("nbd read of 4096 bytes at 512: server: ", err)
		if n != 0 {
			t.Errorf("%d bytes read", n)
		}
		_, err = c.WriteAt(make([]byte, 4096), 512)
		check("nbd write of 4096 bytes at 512", err)
		check("nbd write-zeroes", c.Zero(0, 4096))
		check("nbd trim", c.Trim(0, 4096))
		check("nbd block-status", c.Extents(0, 4096, func(int64, int64, uint32) bool { return true }))
	}
}

// A FLUSH that fails fails Sync.
func TestClientSyncFails(t *testing.T) {
	k := nbdkit(t, "eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null", "can_write=exit 0",
		"can_flush=exit 0", "flush=echo EIO no >&2; exit 1")
	c := dial(t, k.uri, ClientOptions{})
	if err := c.Sync(); !errors.Is(err, syscall.EIO) || !c.CanFlush() {
		t.Errorf("Sync: %v; CanFlush %t", err, c.CanFlush())
	}
}

// What a server does not offer is said, not tried.
func TestClientNotOffered(t *testing.T) {
	c := dial(t, nbdServer(t, 1<<20, "").uri, ClientOptions{Connections: 4})
	if c.CanFlush() {
		t.Fatal("nbd-server offers FLUSH by default")
	}
	if err := c.Sync(); err != nil {
		t.Errorf("Sync: %v", err)
	}
	if err := c.Trim(0, 4096); !errors.Is(err, syscall.EOPNOTSUPP) {
		t.Errorf("Trim: %v", err)
	}
	noZero := dial(t, nbdkit(t, "--filter=nozero", "memory", "1M").uri, ClientOptions{})
	if err := noZero.Zero(0, 4096); !errors.Is(err, syscall.EOPNOTSUPP) {
		t.Errorf("Zero: %v", err)
	}
	readOnly := dial(t, nbdkit(t, "-r", "memory", "1M").uri, ClientOptions{})
	if _, err := readOnly.WriteAt(make([]byte, 512), 0); !errors.Is(err, syscall.EPERM) || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("WriteAt: %v", err)
	}
	if readOnly.Flags()&FlagReadOnly == 0 {
		t.Errorf("flags %#x", readOnly.Flags())
	}
}

// The block sizes of the server are kept: nothing larger, nothing between, and an error that says so.
func TestClientBlockSizes(t *testing.T) {
	store := make([]byte, 1<<20+100)
	var largest, requests atomic.Int64
	f := fake(t, func(_ int, p *fakePeer) {
		p.size, p.blocks, p.best = uint64(len(store)), []uint32{4096, 4096, 16 << 10}, ReplyStructured
		if p.handshake() != nil {
			return
		}
		for {
			r, err := p.request()
			if err != nil {
				return
			}
			largest.Store(max(largest.Load(), int64(r.length)))
			requests.Add(1)
			p.apply(r, store)
		}
	})
	c := dial(t, f.uri, ClientOptions{})
	if c.SectorBytes() != 4096 {
		t.Fatalf("SectorBytes %d", c.SectorBytes())
	}
	want := randomBytes(len(store)-4096, 4)
	if err := c.WritevAt([][]byte{want[:10_000], want[10_000:50_000], want[50_000:]}, 4096); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want)+10)
	if n, err := c.ReadAt(got, 4096); n != len(want) || err != io.EOF || !bytes.Equal(got[:n], want) {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	if largest.Load() != 16<<10 || requests.Load() != 2*64 {
		t.Errorf("%d requests of up to %d bytes; want 128 of 16384", requests.Load(), largest.Load())
	}
	for _, bad := range []struct{ off, n int64 }{{512, 4096}, {0, 512}, {0, 4097}, {4096, 1}} {
		for name, err := range map[string]error{
			"read":  second(c.ReadAt(make([]byte, bad.n), bad.off)),
			"write": second(c.WriteAt(make([]byte, bad.n), bad.off)),
			"zero":  c.Zero(bad.off, bad.n),
		} {
			if !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), "multiples of 4096") {
				t.Errorf("%s of %d at %d: %v", name, bad.n, bad.off, err)
			}
		}
	}
}

func second(_ int, err error) error { return err }

// The ends of an export, as io.ReaderAt and io.WriterAt say.
func TestClientBounds(t *testing.T) {
	c := dial(t, nbdkit(t, "memory", "1M").uri, ClientOptions{})
	const size = 1 << 20
	for _, test := range []struct {
		off, n int64
		read   error
		got    int
		write  error
	}{
		{0, 0, nil, 0, nil},
		{size, 0, nil, 0, nil},
		{size + 512, 0, nil, 0, nil},
		{size - 512, 512, nil, 512, nil},
		{size - 512, 1024, io.EOF, 512, syscall.ENOSPC},
		{size, 512, io.EOF, 0, syscall.ENOSPC},
		{1 << 62, 512, io.EOF, 0, syscall.ENOSPC},
		{1<<63 - 512, 512, io.EOF, 0, syscall.ENOSPC},
		{-512, 512, syscall.EINVAL, 0, syscall.EINVAL},
	} {
		if n, err := c.ReadAt(make([]byte, test.n), test.off); n != test.got || !errors.Is(err, test.read) {
			t.Errorf("read of %d at %d: %d, %v; want %d, %v", test.n, test.off, n, err, test.got, test.read)
		}
		if n, err := c.WriteAt(make([]byte, test.n), test.off); !errors.Is(err, test.write) || err == nil && n != int(test.n) {
			t.Errorf("write of %d at %d: %d, %v; want %v", test.n, test.off, n, err, test.write)
		} else if test.write == syscall.ENOSPC && !strings.Contains(err.Error(), "the export has 1048576 bytes") {
			t.Errorf("write of %d at %d: %v; it does not say where the end is", test.n, test.off, err)
		}
		if err := c.Zero(test.off, test.n); !errors.Is(err, test.write) {
			t.Errorf("zero of %d at %d: %v; want %v", test.n, test.off, err, test.write)
		}
	}
	if err := c.Zero(0, -512); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("zero of -512: %v", err)
	}
}

// Several connections only where the server says that a FLUSH covers all of them.
func TestClientConnections(t *testing.T) {
	for _, test := range []struct {
		flags TransmissionFlags
		want  int
	}{{FlagHasFlags | FlagSendFlush, 1}, {FlagHasFlags | FlagSendFlush | FlagCanMultiConn, 3}} {
		var accepted atomic.Int32
		f := fake(t, func(_ int, p *fakePeer) {
			accepted.Add(1)
			p.flags = test.flags
			p.serve(make([]byte, 1<<20))
		})
		c := dial(t, f.uri, ClientOptions{Connections: 3})
		if got := int(accepted.Load()); got != test.want {
			t.Errorf("flags %#x: %d connections, want %d", test.flags, got, test.want)
		}
		_ = c.Close()
	}
}

// A server with extended headers gets them, also for what is longer than 32 bits.
func TestClientExtendedHeaders(t *testing.T) {
	store := make([]byte, 1<<20)
	f := fake(t, func(_ int, p *fakePeer) {
		p.best = ReplyExtended
		p.serve(store)
		if p.replies != ReplyExtended {
			t.Errorf("%s replies", p.replies)
		}
	})
	c := dial(t, f.uri, ClientOptions{})
	want := randomBytes(300_032, 5)
	got := make([]byte, len(want))
	if _, err := c.WriteAt(want, 1024); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ReadAt(got, 1024); err != nil || !bytes.Equal(got, want) {
		t.Fatal("read differs", err)
	}
	if err := c.Zero(0, 1<<20); err != nil || bytes.Count(store, []byte{0}) != 1<<20 {
		t.Error("not zeroed", err)
	}
	calls := 0
	if err := c.Extents(0, 1<<20, func(off, n int64, flags uint32) bool { calls++; return off == 0 && n == 1<<20 && flags == 0 }); err != nil || calls != 1 {
		t.Error(calls, err)
	}
	if err := c.Sync(); err != nil {
		t.Error(err)
	}
}

// Errors of Dial name the export and what to do.
func TestDialRefused(t *testing.T) {
	none := fake(t, func(_ int, p *fakePeer) { p.size = 0; p.serve(nil) })
	for _, test := range []struct{ uri, says string }{
		{"nbd+unix:///x?socket=/nonexistent/s", "connect to nbd+unix:///x?socket=/nonexistent/s"},
		{"nbds://host/", "TLS is not there yet"},
		{none.uri, "no bytes"},
		{strings.Replace(qemuNBD(t, 1<<20).uri, "disk", "other", 1), "no such export"},
	} {
		if _, err := Dial(context.Background(), test.uri, ClientOptions{}); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v; want %q", test.uri, err, test.says)
		}
	}
	stuck := fake(t, func(_ int, p *fakePeer) { _, _ = p.read(1) })
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Dial(ctx, stuck.uri, ClientOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// Operations of a Client allocate nothing in steady state.
func TestClientAllocatesNothing(t *testing.T) {
	c := dial(t, nbdkit(t, "memory", "1M").uri, ClientOptions{Timeout: 1 << 40})
	p := make([]byte, 4096)
	bufs := [][]byte{p[:512], p[512:]}
	run := func() {
		_, err := c.ReadAt(p, 0)
		err = errors.Join(err, c.WritevAt(bufs, 4096), c.Zero(0, 4096), c.Sync())
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 600 { // every slot once
		run()
	}
	if n := testing.AllocsPerRun(100, run); n >= 1 {
		t.Errorf("%v allocations", n)
	}
}
