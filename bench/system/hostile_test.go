package system

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A normal client that works beside the hostile ones, and counts what it gets done.
type bystander struct {
	done  atomic.Int64
	stop  chan struct{}
	ended chan struct{}
	err   error
}

// watch starts the client: it writes and reads blocks one after the other and checks them.
func watch(t *testing.T, s server) *bystander {
	t.Helper()
	b := &bystander{stop: make(chan struct{}), ended: make(chan struct{})}
	c := mustDial(t, s)
	go func() {
		defer close(b.ended)
		p, got := make([]byte, blockBytes), make([]byte, blockBytes)
		for n := 0; ; n++ {
			select {
			case <-b.stop:
				return
			default:
			}
			binary.LittleEndian.PutUint64(p, uint64(n))
			off := int64(n%1024) * blockBytes
			if b.err = c.do(cmdWrite, 0, off, p); b.err != nil {
				return
			}
			if b.err = c.do(cmdRead, 0, off, got); b.err != nil {
				return
			}
			if !bytes.Equal(p, got) {
				b.err = fmt.Errorf("read at %d is not what was written", off)
				return
			}
			b.done.Add(1)
		}
	}()
	return b
}

// goesOn checks that the client makes progress while something else happens.
func (b *bystander) goesOn(t *testing.T, during string) {
	t.Helper()
	const enough = 100
	before := b.done.Load()
	eventually(t, 20*time.Second, fmt.Sprintf("a normal client does %d round trips while %s", enough, during), func() bool {
		select {
		case <-b.ended:
			t.Fatalf("while %s the normal client fails: %v", during, b.err)
		default:
		}
		return b.done.Load() >= before+enough
	})
}

func (b *bystander) end(t *testing.T) {
	t.Helper()
	close(b.stop)
	<-b.ended
	if b.err != nil {
		t.Errorf("the normal client: %v", b.err)
	}
}

// raw is a connection that has said nothing yet, with small buffers.
func raw(t *testing.T, s server) *net.UnixConn {
	t.Helper()
	c, err := net.Dial("unix", s.socket())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

// TestHostile has clients that misbehave in each way do so together with a normal one.
func TestHostile(t *testing.T) {
	const memory = 64 * mib
	s := serveRamshelf(t, volume{size: 256 * mib, memory: memory})
	normal := watch(t, s)

	for _, row := range []struct {
		during string
		act    func(t *testing.T)
	}{
		{"clients do not read their replies", func(t *testing.T) {
			for range 8 {
				c := mustDial(t, s)
				c.SetWriteDeadline(time.Now().Add(time.Second))
				var msg []byte
				for i := range 2000 { // 2000 reads of 1 MiB: far beyond any buffer
					msg = appendRequest(msg, 0, cmdRead, uint64(i), rand.Int64N(255)*mib, mib)
				}
				c.Write(msg) // may stop half-way
			}
		}},
		{"clients send a byte now and then", func(t *testing.T) {
			for _, msg := range [][]byte{
				appendOption([]byte{0, 0, 0, 3}, 7, goData("vol")),
				append([]byte{0, 0, 0, 3}, bytes.Repeat([]byte{0}, 100)...),
			} {
				go trickle(raw(t, s), msg)
			}
			c := mustDial(t, s)
			go trickle(c.Conn, append(appendRequest(nil, 0, cmdWrite, 1, 200*mib, 4*mib), make([]byte, 1000)...))
		}},
		{"2000 connections say nothing", func(t *testing.T) {
			for range 2000 {
				c, err := net.Dial("unix", s.socket())
				if err != nil {
					continue // the backlog is full: the server's right
				}
				t.Cleanup(func() { c.Close() })
			}
			// Places are given back at the latest when the handshake has taken too long.
			eventually(t, 30*time.Second, "another client gets in", func() bool {
				c, err := dialNBD(s.socket(), s.export())
				if err == nil {
					c.close()
				}
				return err == nil
			})
		}},
		{"connections come and break off", func(t *testing.T) {
			for i := range 1000 {
				c, err := net.Dial("unix", s.socket())
				if err != nil {
					continue
				}
				msg := appendOption([]byte{0, 0, 0, 3}, 7, goData("vol"))
				msg = appendRequest(msg, 0, cmdRead, 1, 0, mib)
				c.Write(msg[:i%len(msg)])
				c.Close() // with the greeting unread: a reset
			}
		}},
		{"writes are cut in their payload", func(t *testing.T) {
			for i := range 100 {
				c := mustDial(t, s)
				c.Write(append(appendRequest(nil, 0, cmdWrite, 1, 128*mib, mib), bytes.Repeat([]byte("cut"), i*1000)...))
				c.Conn.Close()
			}
			checkCut(t, s, 128*mib)
		}},
		{"clients talk something else", func(t *testing.T) {
			for _, msg := range []string{
				"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "SSH-2.0-OpenSSH_9\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
				"\xff\xff\xff\xff", "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07\xff\xff\xff\xff",
				"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x0a\xff\xff\xff\xffvol\x00\x00\x00",
			} {
				raw(t, s).Write([]byte(msg))
			}
			c := mustDial(t, s)
			c.Write(bytes.Repeat([]byte{0xa5}, 4096))
		}},
		{"requests are out of all bounds", func(t *testing.T) {
			c := mustDial(t, s)
			for _, r := range []struct {
				cmd    uint16
				off    int64
				length int
				want   syscall.Errno
			}{
				{cmdRead, 256*mib - 1, 2, syscall.EINVAL},
				{cmdRead, -1, 2, syscall.EINVAL},
				{cmdWriteZeroes, 1, 256 * mib, syscall.ENOSPC},
				{cmdTrim, 1, 1<<32 - 1, syscall.EINVAL},
				{cmdCache, 256 * mib, 1, syscall.EINVAL},
				{99, 0, 0, syscall.EINVAL},
			} {
				if err := c.effect(r.cmd, 0, r.off, r.length, nil); err != r.want {
					t.Errorf("command %d at %d+%d: %v, want %v", r.cmd, r.off, r.length, err, r.want)
				}
			}
		}},
		{"zeroings, flushes and hints storm", func(t *testing.T) {
			c := mustDial(t, s)
			p := newPipe(c, 64, func(o *operation, errno syscall.Errno) {
				if errno != 0 {
					t.Errorf("command %d at %d+%d: %v", o.cmd, o.off, o.length, errno)
				}
			})
			for i := range 20000 {
				ok := p.submit(func(o *operation) {
					o.cmd = []uint16{cmdTrim, cmdWriteZeroes, cmdFlush, cmdCache}[i%4]
					o.off, o.length = 64*mib+int64(i), 128*mib
					if o.cmd == cmdFlush {
						o.off, o.length = 0, 0
					}
				})
				if !ok {
					t.Fatalf("connection lost: %v", p.err)
				}
			}
			if !p.drain() {
				t.Errorf("connection lost: %v", p.err)
			}
		}},
	} {
		row.act(t)
		normal.goesOn(t, row.during)
		checkRSS(t, s, memory)
	}

	normal.end(t)
	cleanStop(t, s)
}

// checkCut checks that of writes that were cut in their payload there is nothing, or whole blocks.
func checkCut(t *testing.T, s server, off int64) {
	t.Helper()
	got, want := make([]byte, mib), bytes.Repeat([]byte("cut"), mib/3+1)
	if err := mustDial(t, s).do(cmdRead, 0, off, got); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < mib; i += blockBytes {
		if p := got[i : i+blockBytes]; !allZero(p) && !bytes.Equal(p, want[i:i+blockBytes]) {
			t.Errorf("a write that was cut in its payload is there in part, in the block at %d", off+int64(i))
		}
	}
}

// trickle sends a byte every 100 ms, until the other side has had enough.
func trickle(c net.Conn, msg []byte) {
	for i := range msg {
		if _, err := c.Write(msg[i : i+1]); err != nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// TestStoppedClient stops a client that has much in flight; the others go on, and the daemon stops cleanly with it.
func TestStoppedClient(t *testing.T) {
	s := serveRamshelf(t, volume{size: 256 * mib})
	normal := watch(t, s)
	victim := command{}.start(t, "nbdcopy", "--connections=4", s.uri(), "null:")
	syscall.Kill(victim.pid(), syscall.SIGSTOP)
	normal.goesOn(t, "a client is stopped")
	normal.end(t)
	checkRSS(t, s, s.v.memory)
	cleanStop(t, s)
	victim.kill()
}
