package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/nbd"
	"github.com/ramshelf/ramshelf/nbd/nbdtest"
)

// TestTogether has our client and our server talk to each other, over a session.
func TestTogether(t *testing.T) {
	d := newDevice()
	generation := uint64(1)
	s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "vol", Device: d, Contexts: nbdtest.Contexts,
		Generation: func() uint64 { return generation }})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := nbd.Dial(ctx, "nbd+unix:///vol?socket="+s.socket, nbd.ClientOptions{Connections: 3, Session: [16]byte{1},
		ReconnectDelay: time.Millisecond, Timeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	data := pattern(1, 3<<20)
	if _, err := c.WriteAt(data, 4096); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.Zero(8192, 65536), c.Trim(1<<20, 4096), c.Sync()); err != nil {
		t.Fatal(err)
	}
	clear(data[4096 : 4096+65536])
	clear(data[1<<20-4096 : 1<<20])
	got := make([]byte, len(data))
	if _, err := c.ReadAt(got, 4096); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read back: %v, equal %v", err, bytes.Equal(got, data))
	}
	var holes int64
	if err := c.Extents(0, c.Size(), func(_, n int64, flags uint32) bool {
		if flags&nbd.StateHole != 0 {
			holes += n
		}
		return true
	}); err != nil || holes != testSize-3<<20+65536+4096 {
		t.Errorf("%d bytes of holes, %v", holes, err)
	}
	second, err := nbd.Dial(ctx, "nbd+unix:///vol?socket="+s.socket, nbd.ClientOptions{Session: [16]byte{1}, Attach: 100})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if _, err := second.WriteAt(data[:4096], 0); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteAt(data[:4096], 0); err == nil {
		t.Error("a client that was replaced still writes")
	}
}
