package nbd

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"
)

// randomBytes gives n bytes that are the same in every run.
func randomBytes(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = r.Read(b)
	return b
}

// What one batch writes, another reads, at any length and in every form of replies, with payload that fits the
// receive buffer and payload that does not.
func TestConnBatch(t *testing.T) {
	k := nbdkit(t, "memory", "64M")
	for _, form := range []ReplyFormat{ReplyExtended, ReplyStructured, ReplySimple} {
		for _, size := range []int{1, 512, 4096, 100_000, 3 << 20} {
			c := k.conn(ConnOptions{Replies: form, BufferBytes: 64 << 10, Depth: 8})
			want := randomBytes(8*size, uint64(size))
			var writes, reads [8]Call
			var all []*Call
			for i := range writes {
				p := want[i*size : (i+1)*size]
				writes[i] = Call{Command: CmdWrite, Offset: uint64(i * size), Data: p[:size/3], Pieces: [][]byte{p[size/3 : size/2], nil, p[size/2:]}}
				all = append(all, &writes[i])
			}
			roundTrip(t, c, all...)
			got := make([]byte, 8*size)
			all = all[:0]
			for i := range reads {
				reads[i] = Call{Command: CmdRead, Offset: uint64(i * size), Data: got[i*size : (i+1)*size]}
				all = append(all, &reads[i])
			}
			roundTrip(t, c, all...)
			for i := range reads {
				if writes[i].Err != 0 || reads[i].Err != 0 {
					t.Fatalf("%s, %d bytes: write %v, read %v", form, size, writes[i].Err, reads[i].Err)
				}
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("%s, %d bytes: read differs from what was written", form, size)
			}
			_ = c.Close()
		}
	}
}

// A connection takes Depth calls, and again as many when they are answered.
func TestConnDepth(t *testing.T) {
	c := nbdkit(t, "memory", "1M").conn(ConnOptions{Depth: 3})
	calls := make([]Call, 4)
	for range 3 {
		for i := range 3 {
			calls[i] = Call{Command: CmdFlush}
			if err := c.Queue(&calls[i]); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Queue(&calls[3]); !errors.Is(err, ErrFull) {
			t.Fatalf("fourth call: %v, want ErrFull", err)
		}
		if err := c.Send(); err != nil {
			t.Fatal(err)
		}
		done := make([]*Call, 4)
		for n := 0; n < 3; {
			k, err := c.Receive(done)
			if err != nil {
				t.Fatal(err)
			}
			n += k
		}
	}
}

// A cookie is good for one use of its slot: an answer to an earlier use is refused.
func TestConnOldCookie(t *testing.T) {
	f := fake(t, func(_ int, p *fakePeer) {
		if p.handshake() != nil {
			return
		}
		first, err := p.request()
		if err != nil {
			return
		}
		p.answer(first, 0, nil)
		if _, err := p.request(); err == nil {
			p.answer(first, 0, nil)
		}
		_, _ = p.read(1)
	})
	u, _ := ParseURI(f.uri)
	c, err := DialConn(t.Context(), u, ConnOptions{Depth: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	call := Call{Command: CmdFlush}
	roundTrip(t, c, &call)
	if err := errors.Join(c.Queue(&call), c.Send()); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Receive(make([]*Call, 1)); n != 0 || !errors.Is(err, ErrProtocol) {
		t.Errorf("%d answered, %v", n, err)
	}
	if calls := c.Unanswered(); len(calls) != 1 || calls[0] != &call || call.Err != syscall.EINPROGRESS {
		t.Errorf("unanswered %v", calls)
	}
}

// batch4K is a batch of 16 random reads or writes of 4 KiB.
func batch4K(command Command) (*[16]Call, func()) {
	var calls [16]Call
	data := randomBytes(16*4096, 1)
	for i := range calls {
		calls[i] = Call{Command: command, Data: data[i*4096 : (i+1)*4096]}
	}
	r := rand.New(rand.NewPCG(1, 2))
	return &calls, func() {
		for i := range calls {
			if command == CmdFlush {
				continue // it has neither offset nor length
			}
			calls[i].Offset = uint64(r.IntN(1024)) * 4096
		}
	}
}

// runBatch sends calls and receives all of them.
func runBatch(c *Conn, calls *[16]Call, done *[16]*Call) error {
	for i := range calls {
		if err := c.Queue(&calls[i]); err != nil {
			return err
		}
	}
	if err := c.Send(); err != nil {
		return err
	}
	for n := 0; n < len(calls); {
		k, err := c.Receive(done[:])
		if err != nil {
			return err
		}
		for _, call := range done[:k] {
			if call.Err != 0 {
				return call.Err
			}
		}
		n += k
	}
	return nil
}

// Nothing is allocated per request in steady state.
func TestConnBatchAllocatesNothing(t *testing.T) {
	k := nbdkit(t, "memory", "4M")
	for _, form := range []ReplyFormat{ReplyStructured, ReplySimple} {
		for _, bufferBytes := range []int{256 << 10, 8 << 10} {
			c := k.conn(ConnOptions{Replies: form, BufferBytes: bufferBytes})
			for _, command := range []Command{CmdRead, CmdWrite, CmdFlush} {
				calls, shuffle := batch4K(command)
				var done [16]*Call
				allocations := testing.AllocsPerRun(100, func() {
					shuffle()
					if err := runBatch(c, calls, &done); err != nil {
						t.Fatal(err)
					}
				})
				if allocations != 0 {
					t.Errorf("%s with %s replies: %v allocations per batch, want 0", command, form, allocations)
				}
			}
		}
	}
}

func BenchmarkConn(b *testing.B) {
	k := nbdkit(b, "memory", "64M")
	for _, form := range []ReplyFormat{ReplyStructured, ReplySimple} {
		for _, command := range []Command{CmdRead, CmdWrite} {
			b.Run(form.String()+"/"+command.String(), func(b *testing.B) {
				c := k.conn(ConnOptions{Replies: form})
				calls, shuffle := batch4K(command)
				var done [16]*Call
				b.ReportAllocs()
				b.SetBytes(16 * 4096)
				for b.Loop() {
					shuffle()
					if err := runBatch(c, calls, &done); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(b.N)*16/b.Elapsed().Seconds(), "requests/s")
			})
		}
	}
}
