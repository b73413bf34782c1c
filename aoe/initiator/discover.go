package initiator

import (
	"slices"
	"time"

	"github.com/ramshelf/ramshelf/aoe"
)

// Times of questions.
const (
	// queryFirst, doubled up to queryLost, is between broadcasts while no path is up; queryUp while one is.
	queryFirst = 100 * time.Millisecond
	queryLost  = time.Second
	queryUp    = 30 * time.Second
	// askFirst, doubled up to askLast, is between questions to one MAC.
	askFirst = 50 * time.Millisecond
	askLast  = 250 * time.Millisecond
	// probeTries of one size without an answer mean that the size does not arrive.
	probeTries = 5
)

// query asks everybody on all interfaces for the target.
func (m *Machine) query() {
	tag := m.newTag()
	m.queryTags[m.queries%len(m.queryTags)] = tag
	wait := min(queryFirst<<min(m.queries, 8), queryLost)
	m.queries++
	if slices.ContainsFunc(m.paths, func(p *path) bool { return p.state == pathUp }) {
		wait = queryUp
	}
	m.queryAt = m.now + wait
	for _, p := range m.paths {
		if p.state == pathUp && p.sectors < p.full(m.identity) {
			m.sendProbe(p, p.full(m.identity)) // perhaps somebody has repaired the network
		}
	}
	for i, iface := range m.o.Interfaces {
		h := aoe.Header{
			Dst: aoe.Broadcast, Src: iface.MAC, Version: aoe.Version, Address: m.o.Address, Command: aoe.CommandConfig, Tag: tag,
		}
		m.fx.Send = append(m.fx.Send, Send{Interface: i})
		s := &m.fx.Send[len(m.fx.Send)-1]
		frame, _ := (&aoe.Config{Version: aoe.Version}).Append(h.Append(s.head[:0])) // has no string that could be too long
		s.length = len(frame)
	}
}

// receive takes a frame. What is not an answer of this target to us, by address, MAC, tag, command and length, has no effect.
func (m *Machine) receive(iface int, frame []byte) {
	h, err := aoe.ParseHeader(frame)
	switch {
	case err != nil || h.Version > aoe.Version || h.Flags&aoe.FlagResponse == 0:
		m.counters.Malformed++
		return
	case h.Address != m.o.Address || h.Dst != m.o.Interfaces[iface].MAC && h.Dst != aoe.Broadcast:
		m.counters.Foreign++
		return
	}
	switch h.Command {
	case aoe.CommandConfig:
		if c, err := aoe.ParseConfig(frame); err != nil || h.Flags&aoe.FlagError != 0 {
			m.counters.Malformed++
		} else {
			m.configured(iface, h, c)
		}
	case aoe.CommandATA:
		a, data, err := aoe.ParseATA(frame)
		tx := m.copies[h.Tag]
		switch {
		case err != nil:
			m.counters.Malformed++
		case tx == nil:
			m.counters.Unknown++
		case m.path(iface, h.Src) == nil: // any path will do: targets may answer by another one
			m.counters.Foreign++
		case h.Flags&aoe.FlagError != 0 && (h.Error == aoe.ErrorUnavailable || h.Error == aoe.ErrorReserved):
			// It may pass. The copy was answered, and is sent again when its time is over.
			m.postpone(tx)
		default:
			m.reply(tx, h, a, data)
		}
	default:
		m.counters.Unknown++
	}
}

// postpone: the target is there and does nothing now.
func (m *Machine) postpone(tx *transmission) {
	p := tx.path
	p.heard(m.now)
	if tx.kind == kindProbe && p.state == pathProbing {
		p.asked = 0 // it is not for its size
	}
}

func (m *Machine) reply(tx *transmission, h aoe.Header, a aoe.ATA, data []byte) {
	switch tx.kind {
	case kindIO:
		m.answered(tx, h, a, data)
	case kindIdentify:
		m.identified(tx, h, a, data)
	case kindProbe:
		m.probed(tx, h, a, data)
	}
}

func (m *Machine) path(iface int, mac aoe.MAC) *path {
	for _, p := range m.paths {
		if p.iface == iface && p.mac == mac {
			return p
		}
	}
	return nil
}

// configured takes a configuration. Only from these new paths are learned.
func (m *Machine) configured(iface int, h aoe.Header, c aoe.Config) {
	// A target that starts announces itself with tag 0.
	if h.Tag != 0 && !slices.Contains(m.queryTags[:], h.Tag) {
		m.counters.Unknown++
		return
	}
	p := m.path(iface, h.Src)
	if p == nil {
		if len(m.paths) == maxPaths {
			m.counters.Foreign++
			return
		}
		p = &path{iface: iface, mac: h.Src, reorder: minReorder, askAt: m.now}
		m.paths = append(m.paths, p)
		m.note(false, "shelf %s: found %s on %s", m.o.Address, h.Src, m.o.Interfaces[iface].Name)
	}
	p.buffers = max(1, int(c.Buffers))
	p.promise = usable(min(c.MaxSectorsPerFrame(), aoe.SectorsIn(m.o.Interfaces[iface].MTU)))
	if h.Tag == 0 {
		m.suspectRestart()
	}
	if h.Tag == 0 || p.state == pathRefused {
		// It may be another device now. If it has started, it has forgotten what was in flight.
		m.silence(p)
	}
}

// ask sends the question of the path's state.
func (m *Machine) ask(p *path) {
	if p.state == pathProbing && p.asked == probeTries {
		if p.asked = 0; p.probe == 1 {
			p.state = pathAsking
		} else {
			p.probe = usable(p.probe - 1)
		}
	}
	p.askAt = m.now + max(min(askFirst<<min(p.asked, 8), askLast), p.timeout(0))
	p.asked++
	if p.state == pathProbing {
		m.sendProbe(p, p.probe)
		return
	}
	m.sendQuestion(p, kindIdentify, 0, aoe.ATA{Command: aoe.ATAIdentify, Count: 1, Device: 0xA0})
}

// sendProbe sends a READ that carries as much as it asks for, which goes the whole way in both directions. Linux does the same.
func (m *Machine) sendProbe(p *path, sectors int) {
	m.sendQuestion(p, kindProbe, sectors, m.command(&fragment{request: &Request{Op: Read}, sectors: sectors}))
}

// sendQuestion sends a frame that counts in no window, with as many sectors of zeroes.
func (m *Machine) sendQuestion(p *path, k kind, sectors int, a aoe.ATA) {
	tx := &transmission{tag: m.newTag(), kind: k, path: p, sectors: sectors, sent: m.now, lost: m.now}
	m.copies[tx.tag] = tx
	m.late = append(m.late, tx) // it is forgotten as they are
	m.send(p, tx.tag, &a, true, zeroes[:sectors*aoe.SectorBytes])
}

var zeroes [aoe.MaxSectors * aoe.SectorBytes]byte

// full is the most sectors that a frame on the path can have.
func (p *path) full(id *aoe.Identity) int { return usable(int(min(uint64(p.promise), id.Sectors))) }

// identified takes the answer to IDENTIFY.
func (m *Machine) identified(tx *transmission, h aoe.Header, a aoe.ATA, data []byte) {
	p := tx.path
	id, err := aoe.ParseIdentity(data)
	if refusal(h, a) != nil || err != nil {
		m.counters.Malformed++
		return
	}
	delete(m.copies, tx.tag)
	p.measure(m.now - tx.sent)
	if p.state != pathAsking {
		return
	}
	expected := m.identity
	if expected == nil {
		expected = m.o.Identity
	}
	if expected != nil && (expected.Serial != id.Serial || expected.Sectors != id.Sectors) {
		p.state = pathRefused
		if p.told {
			return
		}
		p.told = true
		m.note(true, "shelf %s: %s on %s is another device: serial %q and %d sectors, not %q and %d; not used",
			m.o.Address, p.mac, m.o.Interfaces[p.iface].Name, id.Serial, id.Sectors, expected.Serial, expected.Sectors)
		return
	}
	if p.quiet && m.now-p.since >= restartAfter {
		m.suspectRestart()
	}
	p.heard(m.now)
	m.identity = &id
	p.state, p.askAt, p.asked = pathProbing, m.now, 0
	p.probe = p.full(&id)
	if p.sectors > 0 {
		p.probe = min(p.probe, p.sectors) // what was known to arrive; larger ones are tried again in time
	}
}

// probed takes the answer to a probe: frames of that size arrive.
func (m *Machine) probed(tx *transmission, h aoe.Header, a aoe.ATA, data []byte) {
	p := tx.path
	delete(m.copies, tx.tag)
	switch err := refusal(h, a); {
	case p.state == pathUp:
		if err == nil && tx.sectors > p.sectors && len(data) >= tx.sectors*aoe.SectorBytes {
			p.sectors = tx.sectors
			m.note(false, "shelf %s: frames of %d sectors arrive now from %s", m.o.Address, p.sectors, p.mac)
		}
		return
	case p.state != pathProbing:
		return
	case h.Flags&aoe.FlagError != 0: // it takes less than it says
		p.asked, p.askAt = probeTries, m.now
		return
	case err == nil && len(data) < tx.sectors*aoe.SectorBytes:
		m.counters.Malformed++
		return
	}
	p.measure(m.now - tx.sent)
	p.sectors, p.state = tx.sectors, pathUp
	p.heard(m.now)
	p.window = max(1, float64(m.windowOf(p))/2)
	p.thresh = float64(m.windowOf(p))
	m.heard()
	name := m.o.Interfaces[p.iface].Name
	if p.sectors < p.full(m.identity) {
		m.note(true, "shelf %s: frames of %d sectors do not arrive from %s on %s, of %d they do: its MTU of %d is not carried all the way; "+
			"set it on every switch, or lower it here", m.o.Address, p.promise, p.mac, name, p.sectors, m.o.Interfaces[p.iface].MTU)
	}
	m.note(false, "shelf %s: %s on %s is up, %d sectors per frame, %d frames in flight", m.o.Address, p.mac, name, p.sectors, m.windowOf(p))
}
