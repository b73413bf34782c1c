package node

import (
	"bytes"
	"context"
	"os"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/cache"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
)

// TestEmergency: what was answered before and what is answered during an emergency survives the loss of the memory; some
// time after it writes are answered as asked for again.
func TestEmergency(t *testing.T) {
	for _, kind := range []config.JournalKind{config.JournalInternal, config.JournalNone} {
		t.Run(string(kind), func(t *testing.T) {
			r := newRig(t)
			r.config.Journal.Kind = kind
			v := r.open()
			v.start()
			write(t, v, 0, pattern(1))
			for range 2 { // the second finds it on already
				if err := v.Emergency(context.Background(), true); err != nil {
					t.Fatal(err)
				}
			}
			if s := v.Status(); !s.Emergency || s.Ack != "ram" || s.AckInForce != "disk" || s.UncommittedBytes != 0 {
				t.Errorf("in the emergency: %+v", s)
			}
			write(t, v, cache.BlockBytes, pattern(2))
			if s := v.Status(); s.UncommittedBytes != 0 {
				t.Errorf("%d bytes are answered and uncommitted", s.UncommittedBytes)
			}
			closeVolume(t, v)
			if err := os.Remove(r.memoryFile()); err != nil {
				t.Fatal(err)
			}
			v = r.open()
			for block, want := range [][]byte{pattern(1), pattern(2)} {
				if got := read(t, v, int64(block)*cache.BlockBytes, cache.BlockBytes); !bytes.Equal(got, want) {
					t.Errorf("block %d did not survive", block)
				}
			}
			v.start()
			if err := v.Emergency(context.Background(), true); err != nil {
				t.Fatal(err)
			}
			if err := v.Emergency(context.Background(), false); err != nil {
				t.Fatal(err)
			}
			if s := v.Status(); s.Emergency || s.AckInForce != "disk" {
				t.Errorf("right after the emergency: %+v", s)
			}
			for end := time.Now().Add(time.Minute); v.Status().AckInForce != "ram"; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("the volume never answers as it was asked to again")
				}
			}
			closeVolume(t, v)
			if err := v.Emergency(context.Background(), true); err != nil {
				t.Errorf("of a volume that is closed: %v", err)
			}
		})
	}
}
