package initiator

import (
	"fmt"
	"time"

	"github.com/ramshelf/ramshelf/aoe"
)

// Words for State.
const (
	StateDiscovering = "discovering" // no path yet
	StateUp          = "up"
	StateSilent      = "not answering"
	StateRefused     = "another device" // all paths lead to another one
)

// Status is what can be told of a target.
type Status struct {
	Address aoe.Address
	State   string
	// Silent is for how long requests have been waiting since the last answer.
	Silent   time.Duration
	Identity aoe.Identity // zero while unknown
	Paths    []PathStatus
	Counters Counters
	// Durability says what Sync is worth.
	Durability string
}

// troubleAfter is how long a target may be silent before that is a trouble.
const troubleAfter = time.Second

// Trouble says in words what keeps requests waiting; "" where nothing does.
func (s *Status) Trouble() string {
	switch {
	case s.State == StateRefused:
		return fmt.Sprintf("shelf %s is another device now", s.Address)
	case s.Silent >= troubleAfter:
		return fmt.Sprintf("shelf %s not answering for %s", s.Address, s.Silent.Truncate(time.Second))
	}
	return ""
}

// PathStatus is one path.
type PathStatus struct {
	Interface string
	MAC       aoe.MAC
	State     string
	Sectors   int // per frame; 0 while unknown
	Buffers   int // requests that the target holds
	Window    int // frames that may be in flight
	InFlight  int
	RTT       time.Duration
}

// Status is the status at the time now.
func (m *Machine) Status(now time.Duration) Status {
	s := Status{Address: m.o.Address, State: StateDiscovering, Counters: m.counters, Durability: m.durability()}
	if m.waiting {
		s.Silent = max(0, now-m.since)
	}
	if m.identity != nil {
		s.Identity = *m.identity
	}
	refused, up := 0, 0
	for _, p := range m.paths {
		switch p.state {
		case pathUp:
			up++
		case pathRefused:
			refused++
		}
		s.Paths = append(s.Paths, PathStatus{
			Interface: m.o.Interfaces[p.iface].Name, MAC: p.mac, State: pathStates[p.state], Sectors: p.sectors,
			Buffers: p.buffers, Window: int(p.window), InFlight: len(p.flight), RTT: p.rtt,
		})
	}
	switch {
	case up > 0:
		s.State = StateUp
	case refused > 0 && refused == len(m.paths):
		s.State = StateRefused
	case m.identity != nil:
		s.State = StateSilent
	}
	return s
}

// durability is honest about what the target promises.
func (m *Machine) durability() string {
	switch {
	case m.o.DurableWrites:
		return "declared durable when answered"
	case m.identity == nil:
		return "unknown"
	case m.identity.Flush || m.identity.FlushExt:
		return "flushed by the target, which is believed"
	}
	return "target acknowledges without flush"
}

// Ready reports whether the target was found and a path to it is up.
func (m *Machine) Ready() bool {
	for _, p := range m.paths {
		if p.state == pathUp {
			return true
		}
	}
	return false
}
