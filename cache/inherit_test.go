package cache_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/cache"
)

// TestReadOfInherited: what an earlier process committed may be read at once, although this one has committed nothing and has
// nothing to commit.
func TestReadOfInherited(t *testing.T) {
	v := newVolume(t, testSize, testMemory, func(cfg *cache.Config) { cfg.Journaled = true })
	mustWrite(t, v.client(), 0, 3)
	v.commit()
	v.cfg.Commits = true
	v.restart()
	c := v.client()
	done := make(chan []byte, 1)
	go func() {
		p, _ := c.read(0, 4096)
		done <- p
	}()
	select {
	case p := <-done:
		if !bytes.Equal(p, bytes.Repeat([]byte{3}, 4096)) {
			t.Errorf("read % x", p[:8])
		}
	case <-time.After(10 * time.Second):
		t.Error("the read waits for a commit that has nothing to do")
		v.Cut()
	}
}
