package node

import (
	"context"
	"sync"
	"time"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
)

// stepUpAfter is how long an emergency must be over before writes are answered before their commit again: power that comes
// and goes must not let the promise flutter.
const stepUpAfter = 3 * time.Second

// stepDown is whether a volume answers writes only once they are committed, although less was asked for.
type stepDown struct {
	mu        sync.Mutex
	emergency bool
	down      bool        // until stepUpAfter has passed
	up        *time.Timer // ends down; nil while it is not set
	closed    bool
}

// inForce is the promise as it holds now.
func (s *stepDown) inForce(ack config.Ack) config.Ack {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return config.AckDisk
	}
	return ack
}

// on reports whether an emergency was turned on and not off.
func (s *stepDown) on() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.emergency
}

func (s *stepDown) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.up != nil {
		s.up.Stop()
	}
}

// Emergency commits everything at once and from then on answers writes only once they are committed; it returns when that is so,
// and everything else goes home meanwhile. Off ends it: some seconds later writes are answered as asked for again.
func (v *Volume) Emergency(ctx context.Context, on bool) error {
	s := &v.stepDown
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	if on != s.emergency {
		v.log.Warn("emergency", "on", on)
	}
	s.emergency = on
	if s.up != nil {
		s.up.Stop()
		s.up = nil
	}
	if !on {
		if s.down {
			s.up = time.AfterFunc(stepUpAfter, v.stepUp)
		}
		return nil
	}
	s.down = true
	v.cache.Commits(true)
	s.mu.Unlock()
	err := v.flusher.Commit(ctx)
	s.mu.Lock()
	return err
}

// stepUp goes back to what was asked for.
func (v *Volume) stepUp() {
	s := &v.stepDown
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.emergency || !s.down {
		return
	}
	s.down = false
	v.cache.Commits(v.config.Ack == config.AckDisk)
	v.log.Info("the emergency is over", "ack", string(v.config.Ack))
}
