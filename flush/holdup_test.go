package flush

import (
	"testing"
	"time"
)

// limited is a source that knows what may be uncommitted.
type limited struct {
	Journaled
	bytes int64
}

func (s *limited) Limit(bytes int64) { s.bytes = bytes }

// TestHoldUpRecovers: one commit that a stall of the backing made slow lowers what may be uncommitted to less than what a commit
// needs to tell its speed. It rises again when the commits are fast again.
func TestHoldUpRecovers(t *testing.T) {
	src := new(limited)
	c := &commits{f: &Flusher{o: Options{HoldUp: 10 * time.Second}}, src: src}
	c.measure(1<<20, time.Minute)
	low := src.bytes
	if low >= 1<<20 {
		t.Fatalf("%d bytes may be uncommitted after a commit of 1 MiB in a minute", low)
	}
	for range 2 * rateSamples {
		c.measure(src.bytes/2, time.Duration(src.bytes)) // 500 MB/s
	}
	if src.bytes < 1<<30 {
		t.Errorf("%d bytes may be uncommitted long after the stall, %d after it", src.bytes, low)
	}
	for range 2 * rateSamples {
		c.measure(4096, time.Second)
	}
	if src.bytes < 1<<30 {
		t.Errorf("%d bytes may be uncommitted after short commits, which tell nothing", src.bytes)
	}
}
