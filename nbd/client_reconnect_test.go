package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// quick reconnects at once.
var quick = ClientOptions{ReconnectDelay: time.Millisecond, Quarantine: time.Millisecond}

// A server that is killed again and again: every write is answered, and then there, or fails; reads always succeed.
func TestClientServerKilled(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	const blocks = 256
	sparse(t, image, blocks*4096)
	k := nbdkit(t, "--filter=delay", "file", image, "wdelay=1ms")
	o := quick
	o.Connections = 2
	c := dial(t, k.uri, o)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var answered, failed atomic.Int64
	var newest [blocks]uint64 // answered, per block
	for worker := range 4 {
		wg.Go(func() {
			p := make([]byte, 4096)
			for version := uint64(1); ; version++ {
				select {
				case <-stop:
					return
				default:
				}
				block := worker + 4*int(version%(blocks/4))
				binary.BigEndian.PutUint64(p, version)
				if _, err := c.WriteAt(p, int64(block)*4096); err != nil {
					failed.Add(1)
					continue
				}
				newest[block] = version
				answered.Add(1)
				if _, err := c.ReadAt(p, int64(block)*4096); err != nil || binary.BigEndian.Uint64(p) != version {
					t.Errorf("block %d reads as version %d, wrote %d, %v", block, binary.BigEndian.Uint64(p), version, err)
				}
			}
		})
	}
	for range 4 {
		before := answered.Load()
		for answered.Load() < before+100 {
			time.Sleep(time.Millisecond)
		}
		k.kill()
		k.start()
	}
	close(stop)
	wg.Wait()
	if failed.Load() == 0 {
		t.Error("no write was cut; the test shows nothing")
	}
	p := make([]byte, 4096)
	for block, version := range newest {
		if _, err := c.ReadAt(p, int64(block)*4096); err != nil || binary.BigEndian.Uint64(p) < version {
			t.Errorf("block %d is version %d, answered %d, %v", block, binary.BigEndian.Uint64(p), version, err)
		}
	}
	if err := c.Sync(); !errors.Is(err, ErrLostWrites) {
		t.Errorf("Sync after lost connections: %v", err)
	}
	if err := c.Sync(); err != nil {
		t.Errorf("second Sync: %v", err)
	}
}

// A write that was not answered fails and is not sent again; the next one goes to a new connection.
func TestClientUnansweredWrite(t *testing.T) {
	for name, write := range map[string]func(c *Client) error{
		"write":  func(c *Client) error { return second(c.WriteAt(make([]byte, 512), 0)) },
		"writev": func(c *Client) error { return c.WritevAt([][]byte{make([]byte, 512)}, 0) },
		"zero":   func(c *Client) error { return c.Zero(0, 512) },
		"trim":   func(c *Client) error { return c.Trim(0, 512) },
	} {
		var requests atomic.Int32
		f := fake(t, func(number int, p *fakePeer) {
			if p.handshake() != nil {
				return
			}
			for {
				r, err := p.request()
				if err != nil {
					return
				}
				if requests.Add(1); number == 0 {
					return // cut, without an answer
				}
				p.answer(r, 0, nil)
			}
		})
		c := dial(t, f.uri, quick)
		if err := write(c); err == nil || !strings.Contains(err.Error(), "connection lost") || requests.Load() != 1 {
			t.Errorf("%s: %v after %d requests", name, err, requests.Load())
		}
		if err := write(c); err != nil || requests.Load() != 2 {
			t.Errorf("%s again: %v after %d requests", name, err, requests.Load())
		}
	}
}

// A read that was not answered is sent again, but not for ever.
func TestClientUnansweredRead(t *testing.T) {
	var cuts atomic.Int32
	store := randomBytes(1<<20, 6)
	f := fake(t, func(_ int, p *fakePeer) {
		if p.handshake() != nil {
			return
		}
		for {
			r, err := p.request()
			if err != nil || cuts.Add(-1) >= 0 {
				return
			}
			p.apply(r, store)
		}
	})
	c := dial(t, f.uri, quick)
	p := make([]byte, 4096)
	cuts.Store(readAttempts - 1)
	if _, err := c.ReadAt(p, 512); err != nil || !bytes.Equal(p, store[512:512+4096]) {
		t.Errorf("read: %v", err)
	}
	cuts.Store(1)
	if err := c.Extents(0, 1<<20, func(int64, int64, uint32) bool { return true }); err != nil {
		t.Errorf("extents: %v", err)
	}
	cuts.Store(readAttempts)
	if _, err := c.ReadAt(p, 0); err == nil || cuts.Load() != 0 {
		t.Errorf("read of a server that dies of it: %v, %d cuts left", err, cuts.Load())
	}
	if _, err := c.ReadAt(p, 0); err != nil {
		t.Errorf("read afterwards: %v", err)
	}
}

// The replies cut at every byte, of a read, a write and a flush: the read succeeds with the right data, the others fail.
func TestClientCutEverywhere(t *testing.T) {
	store := randomBytes(4096, 7)
	for _, form := range []ReplyFormat{ReplyExtended, ReplyStructured, ReplySimple} {
		for _, command := range []Command{CmdRead, CmdWrite, CmdFlush} {
			for n := 0; ; n += 1 + n/40*40 {
				whole := false
				f := fake(t, func(number int, p *fakePeer) {
					p.size, p.best = uint64(len(store)), form
					if number > 0 {
						p.serve(store)
						return
					}
					if p.handshake() != nil {
						return
					}
					r, err := p.request()
					if err != nil {
						return
					}
					reply := replyBytes(form, r, store)
					if whole = n >= len(reply); !whole {
						reply = reply[:n]
					}
					p.send(reply)
					if whole {
						_, _ = p.read(1)
					}
				})
				c := dial(t, f.uri, quick)
				p := make([]byte, len(store))
				var err error
				switch command {
				case CmdRead:
					if _, err = c.ReadAt(p, 0); err == nil && !bytes.Equal(p, store) {
						t.Fatalf("%s, %s, cut at %d: wrong data", form, command, n)
					}
				case CmdWrite:
					_, err = c.WriteAt(store, 0)
				case CmdFlush:
					err = c.Sync() // nothing was written, so it can be sent again
				}
				_ = c.Close()
				_ = f.ln.Close()
				f.cut()
				f.wg.Wait()
				if (err == nil) != (whole || command != CmdWrite) {
					t.Fatalf("%s, %s, cut at %d: %v", form, command, n, err)
				}
				if whole {
					break
				}
			}
		}
	}
}

// replyBytes is the good answer to r, with the data of store for a read.
func replyBytes(form ReplyFormat, r *fakeRequest, store []byte) []byte {
	switch {
	case form == ReplySimple && r.command == CmdRead:
		return simpleBytes(r, 0, store[r.offset:r.offset+r.length])
	case form == ReplySimple:
		return simpleBytes(r, 0, nil)
	case r.command == CmdRead:
		return chunkBytes(form, chunkFlagDone, chunkOffsetData, r, be64(r.offset), store[r.offset:r.offset+r.length])
	}
	return chunkBytes(form, chunkFlagDone, chunkNone, r)
}

// A server that answers nonsense fails the operations at once; nothing is tried again.
func TestClientProtocolError(t *testing.T) {
	var connections atomic.Int32
	f := fake(t, func(_ int, p *fakePeer) {
		connections.Add(1)
		if p.handshake() != nil {
			return
		}
		r, err := p.request()
		if err != nil {
			return
		}
		r.cookie++
		p.answer(r, 0, make([]byte, r.length))
		_, _ = p.read(1)
	})
	c := dial(t, f.uri, quick)
	for name, do := range map[string]func() error{
		"read":  func() error { return second(c.ReadAt(make([]byte, 512), 0)) },
		"write": func() error { return second(c.WriteAt(make([]byte, 512), 0)) },
		"flush": c.Sync,
	} {
		connections.Store(0)
		if err := do(); !errors.Is(err, ErrProtocol) || connections.Load() > 1 {
			t.Errorf("%s: %v after %d connections", name, err, connections.Load())
		}
	}
}

// lossyServer is a fake that answers everything and whose peers are set up by prepare.
func lossyServer(t *testing.T, prepare func(number int, p *fakePeer)) *fakeServer {
	store := make([]byte, 1<<20)
	return fake(t, func(number int, p *fakePeer) {
		if prepare != nil {
			prepare(number, p)
		}
		p.serve(store)
	})
}

// Writes that were answered but not synced before the connection was lost fail the next Sync, once, unless the server
// says that nothing was lost.
func TestClientLostWrites(t *testing.T) {
	o := quick
	o.Session = [16]byte{1}
	for _, test := range []struct {
		name        string
		generations []uint64 // of the first and the second connection; 0 = it does not know OptSession
		flags       TransmissionFlags
		write, sync bool // before the loss
		want        error
	}{
		{"plain", []uint64{0, 0}, 0, true, false, ErrLostWrites},
		{"synced", []uint64{0, 0}, 0, true, true, nil},
		{"nothing written", []uint64{0, 0}, 0, false, false, nil},
		{"same generation", []uint64{3, 3}, FlagCanMultiConn, true, false, nil},
		{"same generation without multi-conn", []uint64{3, 3}, 0, true, false, ErrLostWrites},
		{"another generation", []uint64{3, 4}, FlagCanMultiConn, true, false, ErrLostWrites},
		{"generation not known any more", []uint64{3, 0}, FlagCanMultiConn, true, false, ErrLostWrites},
	} {
		f := lossyServer(t, func(number int, p *fakePeer) {
			if g := test.generations[min(number, 1)]; g != 0 {
				p.volume = &sessionReply{Generation: g}
			}
			p.flags |= test.flags
		})
		c := dial(t, f.uri, o)
		if test.write {
			if _, err := c.WriteAt(make([]byte, 512), 0); err != nil {
				t.Fatal(err)
			}
		}
		if test.sync {
			if err := c.Sync(); err != nil {
				t.Fatal(err)
			}
		}
		f.cut()
		if err := c.Sync(); !errors.Is(err, test.want) {
			t.Errorf("%s: Sync: %v, want %v", test.name, err, test.want)
		}
		if err := c.Sync(); err != nil {
			t.Errorf("%s: second Sync: %v", test.name, err)
		}
	}
}

// Every Sync that was under way when writes were lost fails, not only the first to notice.
func TestClientLostWritesToldToAll(t *testing.T) {
	flushes := make(chan struct{}, 2)
	f := fake(t, func(number int, p *fakePeer) {
		if p.handshake() != nil {
			return
		}
		for {
			r, err := p.request()
			if err != nil {
				return
			}
			if number == 0 && r.command == CmdFlush {
				flushes <- struct{}{}
				continue // no answer
			}
			p.answer(r, 0, nil)
		}
	})
	c := dial(t, f.uri, quick)
	if _, err := c.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	errs := make(chan error, 2)
	for range 2 {
		go func() { errs <- c.Sync() }()
	}
	<-flushes
	<-flushes
	f.cut()
	for range 2 {
		if err := <-errs; !errors.Is(err, ErrLostWrites) {
			t.Errorf("Sync: %v", err)
		}
	}
	if err := c.Sync(); err != nil {
		t.Errorf("Sync afterwards: %v", err)
	}
}

// After a loss with a write in flight nothing is written before the quarantine is over; reads need not wait.
func TestClientQuarantine(t *testing.T) {
	hold := func(number int, p *fakePeer) {
		if p.handshake() != nil {
			return
		}
		for {
			r, err := p.request()
			if err != nil || number == 0 && r.command == CmdWrite {
				return
			}
			if number > 0 && r.command == CmdWrite && r.offset == 0 {
				t.Error("a write came in the quarantine")
			}
			p.answer(r, 0, make([]byte, r.length))
		}
	}
	o := ClientOptions{Quarantine: time.Hour, Timeout: 300 * time.Millisecond}
	p := make([]byte, 512)
	write := func(c *Client) error { return second(c.WriteAt(p, 0)) }

	c := dial(t, fake(t, hold).uri, o)
	if err := write(c); err == nil {
		t.Fatal("the unanswered write succeeded")
	}
	if _, err := c.ReadAt(p, 0); err != nil {
		t.Errorf("read in the quarantine: %v", err)
	}
	if err := c.Sync(); err != nil {
		t.Errorf("Sync in the quarantine: %v", err)
	}
	for name, err := range map[string]error{"write": write(c), "zero": c.Zero(0, 512), "trim": c.Trim(0, 512)} {
		if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "quarantine") {
			t.Errorf("%s in the quarantine: %v", name, err)
		}
	}

	// A loss without a write in flight needs none.
	f := lossyServer(t, nil)
	c = dial(t, f.uri, o)
	if err := write(c); err != nil {
		t.Fatal(err)
	}
	f.cut()
	if _, err := c.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := write(c); err != nil {
		t.Errorf("write after a loss without writes in flight: %v", err)
	}

	// It ends.
	o.Quarantine, o.Timeout = 50*time.Millisecond, 0
	var lost atomic.Pointer[time.Time]
	f = fake(t, func(number int, p *fakePeer) {
		if p.handshake() != nil {
			return
		}
		for {
			r, err := p.request()
			if err != nil {
				return
			}
			now := time.Now()
			if number == 0 {
				lost.Store(&now)
				return
			}
			if early := o.Quarantine - now.Sub(*lost.Load()); early > 0 {
				t.Errorf("write came %v before the end of the quarantine", early)
			}
			p.answer(r, 0, nil)
		}
	})
	c = dial(t, f.uri, o)
	if err := write(c); err == nil {
		t.Fatal("the unanswered write succeeded")
	}
	if err := write(c); err != nil {
		t.Errorf("write after the quarantine: %v", err)
	}

	// After an unclean end of an earlier client the first write waits, too.
	o = ClientOptions{Quarantine: time.Hour, Timeout: 100 * time.Millisecond, Unclean: true}
	c = dial(t, lossyServer(t, nil).uri, o)
	if err := write(c); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("first write: %v", err)
	}
}

// The write in flight counts also if another connection of the same group is the first to be noticed dead.
func TestClientQuarantineOfTheOtherConnection(t *testing.T) {
	for range 100 {
		waiting := make(chan struct{}, 2)
		f := fake(t, func(number int, p *fakePeer) {
			p.flags |= FlagCanMultiConn
			if p.handshake() != nil {
				return
			}
			for {
				r, err := p.request()
				if err != nil {
					return
				}
				if number < 2 {
					waiting <- struct{}{}
					continue // no answer
				}
				if r.command == CmdWrite {
					t.Error("a write came in the quarantine")
				}
				p.answer(r, 0, make([]byte, r.length))
			}
		})
		c := dial(t, f.uri, ClientOptions{Connections: 2, Quarantine: time.Hour, ReconnectDelay: 1})
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = c.WriteAt(make([]byte, 512), 0) })
		<-waiting
		wg.Go(func() { _, _ = c.ReadAt(make([]byte, 512), 0) })
		<-waiting
		f.cut()
		wg.Wait()
		wg.Go(func() { _, _ = c.WriteAt(make([]byte, 512), 0) })
		time.Sleep(time.Millisecond)
		_ = c.Close()
		wg.Wait()
	}
}

// A server that knows OptSession fences the old connection, so no quarantine is needed.
func TestClientSession(t *testing.T) {
	var mu sync.Mutex
	var sessions []session
	generation := uint64(5)
	peer := func(number int, p *fakePeer) {
		p.volume = &sessionReply{Generation: generation + uint64(number)}
		err := p.handshake()
		mu.Lock()
		sessions = append(sessions, p.sessions...)
		mu.Unlock()
		if err != nil {
			return
		}
		for {
			r, err := p.request()
			if err != nil || number == 0 && r.command == CmdWrite {
				return
			}
			p.answer(r, 0, make([]byte, r.length))
		}
	}
	o := ClientOptions{Session: [16]byte{7}, Quarantine: time.Hour, Timeout: 10 * time.Second}
	c := dial(t, fake(t, peer).uri, o)
	p := make([]byte, 512)
	if _, err := c.WriteAt(p, 0); err == nil {
		t.Fatal("the unanswered write succeeded")
	}
	if _, err := c.WriteAt(p, 0); err != nil {
		t.Errorf("write on the new connection: %v", err)
	}
	want := []session{{ID: o.Session, Attach: 1, Export: "disk"}, {ID: o.Session, Attach: 2, Generation: generation, Export: "disk"}}
	if len(sessions) != 2 || sessions[0] != want[0] || sessions[1] != want[1] {
		t.Errorf("sessions %+v, want %+v", sessions, want)
	}

	// An attach number that goes on after an unclean end does the same; a new session does not.
	o.Unclean, o.Timeout = true, 200*time.Millisecond
	o.Attach = 17
	serve := func(_ int, p *fakePeer) { p.volume = &sessionReply{Generation: 1}; p.serve(make([]byte, 1<<20)) }
	c = dial(t, fake(t, serve).uri, o)
	if _, err := c.WriteAt(p, 0); err != nil {
		t.Errorf("write with an attach number: %v", err)
	}
	o.Attach = 0
	c = dial(t, fake(t, serve).uri, o)
	if _, err := c.WriteAt(p, 0); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("write of a new session after an unclean end: %v", err)
	}

	// Both servers must know the option: the one that has the old write, and the one that fences it.
	o = ClientOptions{Session: [16]byte{7}, Quarantine: time.Hour, Timeout: 200 * time.Millisecond}
	for _, knows := range []int{0, 1} {
		c = dial(t, fake(t, func(number int, p *fakePeer) {
			if number == knows {
				p.volume = &sessionReply{Generation: 1}
			}
			if p.handshake() != nil {
				return
			}
			_, _ = p.request()
		}).uri, o)
		if _, err := c.WriteAt(p, 0); err == nil {
			t.Error("the unanswered write succeeded")
		}
		if _, err := c.WriteAt(p, 0); err == nil || !strings.Contains(err.Error(), "quarantine") {
			t.Errorf("only connection %d knows the option, write on the second: %v", knows, err)
		}
	}
}

// What must not change over a reconnection makes the Client useless if it does.
func TestClientExportChanged(t *testing.T) {
	for name, change := range map[string]func(p *fakePeer){
		"larger":         func(p *fakePeer) { p.size *= 2 },
		"smaller":        func(p *fakePeer) { p.size /= 2 },
		"empty":          func(p *fakePeer) { p.size = 0 },
		"read-only":      func(p *fakePeer) { p.flags |= FlagReadOnly },
		"without flush":  func(p *fakePeer) { p.flags &^= FlagSendFlush },
		"larger blocks":  func(p *fakePeer) { p.blocks = []uint32{1024, 4096, 32 << 20} },
		"smaller limits": func(p *fakePeer) { p.blocks = []uint32{512, 4096, 1 << 20} },
	} {
		f := lossyServer(t, func(number int, p *fakePeer) {
			if number == 1 {
				change(p)
			}
		})
		c := dial(t, f.uri, quick)
		f.cut()
		for range 2 {
			if _, err := c.ReadAt(make([]byte, 512), 0); !errors.Is(err, ErrExportChanged) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// A session that the server refuses is refused for good; an export that does not serve now may serve later.
func TestClientRefusedLater(t *testing.T) {
	refuse := func(p *fakePeer, option Option, reply optionReply) {
		p.send(greetingBytes())
		_, _ = p.read(4 + sizeOption + sizeSession + len("disk"))
		if option != OptSession {
			p.send(optionReplyBytes(OptSession, repErrUnsup))
			_, _ = p.read(sizeOption)
			p.send(optionReplyBytes(OptExtendedHeaders, reply))
		} else {
			p.send(optionReplyBytes(option, reply, []byte("rolled back")))
		}
		_, _ = p.read(sizeOption)
	}
	o := quick
	o.Session = [16]byte{1}
	var connections atomic.Int32
	f := fake(t, func(number int, p *fakePeer) {
		if connections.Add(1); number == 0 {
			p.serve(make([]byte, 1<<20))
			return
		}
		refuse(p, OptSession, repErrPolicy)
	})
	c := dial(t, f.uri, o)
	f.cut()
	for range 2 {
		if _, err := c.ReadAt(make([]byte, 512), 0); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "rolled back") {
			t.Errorf("refused session: %v", err)
		}
	}
	if connections.Load() != 2 {
		t.Errorf("%d connections, want 2", connections.Load())
	}

	f = fake(t, func(number int, p *fakePeer) {
		if number == 0 || number > 3 {
			p.serve(make([]byte, 1<<20))
			return
		}
		refuse(p, OptSession, repErrShutdown)
	})
	c = dial(t, f.uri, o)
	f.cut()
	if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("read from a server that comes back: %v", err)
	}
}

// A server that says that it stops is left; the read goes to the next connection.
func TestClientServerStopping(t *testing.T) {
	goodbye := make(chan bool, 1)
	f := fake(t, func(number int, p *fakePeer) {
		if p.handshake() != nil {
			return
		}
		for {
			r, err := p.request()
			if err != nil {
				return
			}
			if number == 0 {
				p.answer(r, uint32(syscall.ESHUTDOWN), nil)
				b, err := p.read(sizeRequest)
				goodbye <- err == nil && Command(binary.BigEndian.Uint16(b[6:])) == CmdDisc
				return
			}
			p.answer(r, 0, make([]byte, r.length))
		}
	})
	c := dial(t, f.uri, quick)
	if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("read: %v", err)
	}
	if !<-goodbye {
		t.Error("no DISC to the server that stops")
	}
}

// hungServer takes the handshake and then answers nothing, or does not even read; later connections get nothing at all.
func hungServer(t *testing.T, read bool) *fakeServer {
	over := make(chan struct{})
	f := fake(t, func(number int, p *fakePeer) {
		if number > 0 || p.handshake() != nil || !read {
			<-over
			return
		}
		for {
			if _, err := p.request(); err != nil {
				return
			}
		}
	})
	t.Cleanup(func() { close(over) })
	return f
}

// No operation waits longer for a hung server than Timeout says, and none touches its buffers afterwards (which the race
// detector sees).
func TestClientHungServer(t *testing.T) {
	for name, do := range map[string]func(c *Client, p []byte) error{
		"read":    func(c *Client, p []byte) error { return second(c.ReadAt(p, 0)) },
		"write":   func(c *Client, p []byte) error { return second(c.WriteAt(p, 0)) },
		"writev":  func(c *Client, p []byte) error { return c.WritevAt([][]byte{p[:512], p[512:]}, 0) },
		"sync":    func(c *Client, _ []byte) error { return c.Sync() },
		"zero":    func(c *Client, _ []byte) error { return c.Zero(0, 512) },
		"extents": func(c *Client, _ []byte) error { return c.Extents(0, 512, nil) },
	} {
		for _, reads := range []bool{true, false} {
			f := hungServer(t, reads)
			c := dial(t, f.uri, ClientOptions{Timeout: 50 * time.Millisecond, InFlight: 1})
			var wg sync.WaitGroup
			for range 3 { // the first waits for an answer, the others for their turn, then for a connection
				wg.Go(func() {
					p := make([]byte, 1<<20)
					if err := do(c, p); !errors.Is(err, os.ErrDeadlineExceeded) {
						t.Errorf("%s, server reads %t: %v", name, reads, err)
					}
					for i := range p {
						p[i]++
					}
				})
			}
			wg.Wait()
			_ = c.Close()
		}
	}
}

// On TCP a connection that is given up is reset, so that the server drops what it has not read.
func TestClientResetsTCP(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ended := make(chan error, 1)
	go func() {
		nc, err := ln.Accept()
		if err != nil {
			ended <- err
			return
		}
		defer nc.Close()
		p := &fakePeer{t: t, Conn: nc, size: 1 << 20, flags: FlagHasFlags}
		if err := p.handshake(); err != nil {
			ended <- err
			return
		}
		for err == nil {
			_, err = nc.Read(make([]byte, 4096))
		}
		ended <- err
	}()
	c := dial(t, "nbd://"+ln.Addr().String(), ClientOptions{Timeout: 20 * time.Millisecond})
	if _, err := c.WriteAt(make([]byte, 512), 0); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("write: %v", err)
	}
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection ends with %v, want a reset", err)
	}
}

// Close ends whatever waits, wherever it waits.
func TestClientClose(t *testing.T) {
	p := make([]byte, 1<<20)
	read := func(c *Client) error { return second(c.ReadAt(p[:512], 0)) }
	write := func(c *Client) error { return second(c.WriteAt(p, 0)) }
	for _, test := range []struct {
		name string
		f    *fakeServer
		o    ClientOptions
		cut  bool
		do   func(c *Client) error
	}{
		{"waiting for an answer", hungServer(t, true), ClientOptions{}, false, read},
		{"sending", hungServer(t, false), ClientOptions{}, false, write},
		{"waiting for an operation", hungServer(t, true), ClientOptions{InFlight: 1}, false, read},
		{"dialing", hungServer(t, true), ClientOptions{}, true, read},
		{"in quarantine", lossyServer(t, nil), ClientOptions{Unclean: true, Quarantine: time.Hour}, false, write},
	} {
		c := dial(t, test.f.uri, test.o)
		if test.cut {
			test.f.cut()
		}
		errs := make(chan error, 2)
		for range 2 {
			go func() { errs <- test.do(c) }()
		}
		time.Sleep(20 * time.Millisecond)
		if err := c.Close(); err != nil {
			t.Errorf("%s: Close: %v", test.name, err)
		}
		for range 2 {
			if err := <-errs; !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s: %v", test.name, err)
			}
		}
		if err := test.do(c); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: after Close: %v", test.name, err)
		}
		if err := c.Close(); err != nil {
			t.Errorf("%s: second Close: %v", test.name, err)
		}
	}
}

// Close says goodbye.
func TestClientDisc(t *testing.T) {
	for _, form := range []ReplyFormat{ReplyExtended, ReplySimple} {
		disc := make(chan Command, 1)
		f := fake(t, func(_ int, p *fakePeer) {
			p.best = form
			if p.handshake() != nil {
				return
			}
			b, err := p.read(sizeRequest)
			if err != nil {
				t.Error("cut without DISC")
				disc <- 0
				return
			}
			disc <- Command(binary.BigEndian.Uint16(b[6:]))
		})
		_ = dial(t, f.uri, ClientOptions{}).Close()
		if got := <-disc; got != CmdDisc {
			t.Errorf("%s: last request is %s", form, got)
		}
	}
}
