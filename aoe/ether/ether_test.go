package ether

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/aoe"
	"github.com/ramshelf/ramshelf/aoe/internal/testnet"
)

func TestMain(m *testing.M) { testnet.Main(m) }

func open2(t *testing.T, mtu int, o Options) (a, b *Wire) {
	t.Helper()
	testnet.Pair(t, "wire0", "wire1", mtu)
	wires := [2]*Wire{}
	for i, name := range []string{"wire0", "wire1"} {
		w, err := Open(name, o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { w.Close() })
		if w.Name() != name || w.MTU() != mtu || w.MAC() == (aoe.MAC{}) {
			t.Fatalf("%s: MTU %d, MAC %s", w.Name(), w.MTU(), w.MAC())
		}
		wires[i] = w
	}
	return wires[0], wires[1]
}

func frame(tag uint32, flags aoe.Flags, bytes int) aoe.Frame {
	h := aoe.Header{Dst: aoe.Broadcast, Src: aoe.MAC{2, 0, 0, 0, 0, 9}, Version: 1, Flags: flags, Tag: tag}
	data := make([]byte, bytes)
	for i := range data {
		data[i] = byte(i + int(tag))
	}
	return aoe.Frame{Head: h.Append(nil), Data: data}
}

// collect receives until n frames came.
func collect(t *testing.T, w *Wire, n int) [][]byte {
	t.Helper()
	watchdog := time.AfterFunc(30*time.Second, func() { w.Close() })
	defer watchdog.Stop()
	var frames [][]byte
	for len(frames) < n {
		if err := w.Receive(func(f []byte) { frames = append(frames, bytes.Clone(f)) }); err != nil {
			t.Fatalf("%d of %d frames came: %v", len(frames), n, err)
		}
	}
	return frames
}

func TestFramesArriveWholeAndInOrder(t *testing.T) {
	for _, mtu := range []int{1500, 9000} {
		t.Run(strconv.Itoa(mtu), func(t *testing.T) {
			a, b := open2(t, mtu, Options{Responses: true})
			var want []aoe.Frame
			for i := range 200 { // more than three batches
				size := []int{0, 8, 36, 512, mtu + aoe.EthernetBytes - aoe.HeaderBytes}[i%5]
				want = append(want, frame(uint32(i), aoe.FlagResponse, size))
			}
			if err := a.Send(want); err != nil {
				t.Fatal(err)
			}
			for i, f := range collect(t, b, len(want)) {
				if sent := aoe.Pad(append(bytes.Clone(want[i].Head), want[i].Data...)); !bytes.Equal(f, sent) {
					t.Fatalf("MTU %d: frame %d of %d bytes came as %d", mtu, i, len(sent), len(f))
				}
			}
			if ca, cb := a.Counters(), b.Counters(); ca != (Counters{Sent: 200}) || cb != (Counters{Received: 200}) {
				t.Errorf("counters %+v, %+v", ca, cb)
			}
		})
	}
}

func TestFilter(t *testing.T) {
	for _, responses := range []bool{true, false} {
		t.Run(map[bool]string{true: "responses", false: "requests"}[responses], func(t *testing.T) {
			a, b := open2(t, 1500, Options{Responses: responses})
			ours, theirs := aoe.FlagResponse, aoe.Flags(0)
			if !responses {
				ours, theirs = theirs, ours
			}
			other := frame(2, ours, 0)
			other.Head[12] = 0x08
			vlan := aoe.Frame{Head: append(append(bytes.Clone(other.Head[:12]), 0x81, 0, 0, 5), frame(3, ours, 0).Head[12:]...)}
			want := frame(4, ours|aoe.FlagError, 0)
			if err := a.Send([]aoe.Frame{frame(1, theirs, 0), other, vlan, want}); err != nil {
				t.Fatal(err)
			}
			for _, f := range collect(t, b, 1) {
				if h, err := aoe.ParseHeader(f); err != nil || h.Tag != 4 {
					t.Errorf("tag %d, %v", h.Tag, err)
				}
			}
		})
	}
}

func TestCloseEndsReceive(t *testing.T) {
	a, _ := open2(t, 1500, Options{})
	done := make(chan error)
	go func() { done <- a.Receive(func([]byte) {}) }()
	for range 2 {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("receive after close: %v", err)
	}
	if err := a.Send([]aoe.Frame{frame(1, 0, 0)}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("send after close: %v", err)
	}
}

// An interface that is down loses frames, and carries them again when it is up.
func TestInterfaceDown(t *testing.T) {
	a, b := open2(t, 1500, Options{})
	got := make(chan uint32, 10)
	go func() {
		for b.Receive(func(f []byte) {
			h, _ := aoe.ParseHeader(f)
			got <- h.Tag
		}) == nil {
		}
	}()
	for _, name := range []string{"wire0", "wire1"} {
		testnet.IP(t, "link", "set", name, "down")
	}
	if err := a.Send([]aoe.Frame{frame(1, 0, 0), frame(2, 0, 0)}); err != nil {
		t.Fatal(err)
	}
	if c := a.Counters(); c.Unsent != 2 || c.Down == 0 || c.Sent != 0 {
		t.Errorf("counters %+v", c)
	}
	for _, name := range []string{"wire0", "wire1"} {
		testnet.IP(t, "link", "set", name, "up")
	}
	// The first call after that may still be told that the interface was down.
	for tag := uint32(3); ; tag++ {
		if err := a.Send([]aoe.Frame{frame(tag, 0, 0)}); err != nil {
			t.Fatal(err)
		}
		select {
		case first := <-got:
			if first < 3 {
				t.Errorf("frame %d was sent while the interface was down", first)
			}
			return
		case <-time.After(10 * time.Millisecond):
			if tag > 1000 {
				t.Fatal("nothing came after the interface was up again")
			}
		}
	}
}

// What the sender cannot hold and what the receiver cannot hold is lost, and counted.
func TestOverrun(t *testing.T) {
	a, b := open2(t, 9000, Options{BufferBytes: 64 << 10})
	var frames []aoe.Frame
	for i := range 100 {
		frames = append(frames, frame(uint32(i), 0, 8192))
	}
	if err := a.Send(frames); err != nil {
		t.Fatal(err)
	}
	sent := a.Counters()
	if sent.Sent+sent.Unsent != 100 || sent.Sent == 0 {
		t.Errorf("sender's counters %+v", sent)
	}
	c := b.Counters()
	if c.Overrun == 0 {
		t.Errorf("receiver's counters %+v", c)
	}
	if again := b.Counters(); again.Overrun != c.Overrun {
		t.Errorf("drops were counted twice: %+v", again)
	}
	if frames := collect(t, b, 1); uint64(len(frames))+c.Overrun != sent.Sent {
		t.Errorf("%d frames came, %d were lost, of %d", len(frames), c.Overrun, sent.Sent)
	}
}

// A frame that is longer than the MTU of the receiver is thrown away, one that is too long for the sender's is passed over.
func TestTooLong(t *testing.T) {
	a, b := open2(t, 1500, Options{})
	testnet.IP(t, "link", "set", "wire0", "mtu", "4000")
	testnet.IP(t, "link", "set", "wire1", "mtu", "4000") // b was opened before and does not know
	if err := a.Send([]aoe.Frame{frame(1, 0, 1600), frame(2, 0, 5000), frame(3, 0, 100)}); err != nil {
		t.Fatal(err)
	}
	if f := collect(t, b, 1); len(f) != 1 || f[0][23] != 3 {
		t.Errorf("%d frames came", len(f))
	}
	if c := b.Counters(); c.Truncated != 1 || c.Received != 1 {
		t.Errorf("receiver's counters %+v", c)
	}
	if c := a.Counters(); c.Unsent != 1 || c.Sent != 2 {
		t.Errorf("sender's counters %+v", c)
	}
}

func TestOpenRefuses(t *testing.T) {
	if _, err := Open("nothere", Options{}); err == nil {
		t.Error("an interface that is not there was opened")
	}
}

func TestSendAllocatesNothingPerFrame(t *testing.T) {
	a, _ := open2(t, 1500, Options{})
	frames := slices.Repeat([]aoe.Frame{frame(1, 0, 100), frame(2, 0, 0)}, 30)
	// The two are for the closure that makes the system call, whatever the number of frames.
	if n := testing.AllocsPerRun(100, func() { _ = a.Send(frames) }); n > 2 {
		t.Errorf("%v allocations", n)
	}
}
