package nbd

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// sessions are those of an export: for every session of our own clients the highest attach number seen, and its
// connections. It outlives the connections, so that one that was overtaken on its way is refused when it arrives.
type sessions struct {
	mu    sync.Mutex
	byID  map[[16]byte]*sessionState
	clock uint64 // counts joins and leaves
}

// sessionState is what is known of a session.
type sessionState struct {
	number uint64 // highest seen
	conns  []*member
	used   uint64 // clock of the last join or leave
}

// member is a connection of a session; one with an old number is on its way out.
type member struct {
	conn   *conn
	number uint64
}

var (
	errOvertaken = errors.New("a newer attachment of this session was seen")
	errFenceLong = errors.New("requests of an older connection of this session do not end")
)

// join enters c into its session. It returns the connections that c replaces: all that have a lower attach number.
// Connections with the same number belong together. A lower number than the highest seen is refused.
func (s *sessions) join(id [16]byte, number uint64, c *conn) (*sessionState, []*conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.byID[id]
	if a == nil {
		s.forget()
		a = &sessionState{}
		s.byID[id] = a
	}
	if number < a.number {
		return nil, nil, fmt.Errorf("attach number %d: %w (%d)", number, errOvertaken, a.number)
	}
	var older []*conn
	for _, m := range a.conns {
		if m.number < number {
			older = append(older, m.conn)
		}
	}
	a.number = number
	a.conns = append(a.conns, &member{c, number})
	s.touch(a)
	return a, older, nil
}

// leave removes c from its session. Every request of c has been released.
func (s *sessions) leave(a *sessionState, c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, m := range a.conns {
		if m.conn == c {
			a.conns = append(a.conns[:i], a.conns[i+1:]...)
			break
		}
	}
	s.touch(a)
}

func (s *sessions) touch(a *sessionState) {
	s.clock++
	a.used = s.clock
}

// forget makes room for one more session: it drops the one that has had no connection for longest.
func (s *sessions) forget() {
	if len(s.byID) < maxIdleSessions {
		return
	}
	var oldest [16]byte
	used := ^uint64(0)
	for id, a := range s.byID {
		if len(a.conns) == 0 && a.used < used {
			oldest, used = id, a.used
		}
	}
	delete(s.byID, oldest)
}

// attach enters c into the session that its client named, and fences the connections that c replaces: when attach
// returns nil, none of them submits anything any more, and everything that they submitted has ended. It waits for
// that until deadline.
func (c *conn) attach(x *export, s session, deadline time.Time) error {
	a, older, err := x.sessions.join(s.ID, s.Attach, c)
	if err != nil {
		return err
	}
	c.export, c.session = x, a
	if planted("zombie-connection") {
		return nil
	}
	for _, o := range older {
		o.kill(errFenced)
	}
	timeout := time.NewTimer(time.Until(deadline))
	defer timeout.Stop()
	for _, o := range older {
		select {
		case <-o.gone:
		case <-timeout.C:
			return errFenceLong
		case <-c.stopped:
			return errStopped
		}
	}
	return nil
}
