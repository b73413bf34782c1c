package node

import (
	"fmt"
	"maps"
	"slices"
	"sync"
)

// deed is one request of a client: what it did, when it began and when it was answered, on a clock that counts events.
type deed struct {
	id        uint32
	zero      bool
	from, to  uint32 // units
	begin     int
	end       int  // it was answered then; 0: never, or with an error
	dead      int  // without an answer it took effect before then, or never; 0: nobody knows
	must      bool // it may not be missing
	committed bool // its answer, if there is one, said that it is committed
}

// before tells whether a had its effect before b began, if it had any.
func (a *deed) before(b *deed) bool {
	return a.end > 0 && a.end < b.begin || a.dead > 0 && a.dead < b.begin
}

// history is what clients did since a state of the volume that is known. Writes of them carry stamps; zeroes cannot, so
// the clients let nothing overlap a zero while it is under way.
type history struct {
	mu    sync.Mutex
	clock int
	base  []uint32 // by unit: who wrote it
	first uint32   // id of deeds[0]
	deeds []*deed
	seals []glance
	phase int
	seen  map[uint32]int // blocks that anybody touched lately, and in which phase
}

// view is who wrote each unit of some blocks last, ascending.
type view struct {
	blocks []uint32
	ids    []uint32 // by unit of the volume; what is not of blocks means nothing
}

// units gives all of them until give refuses.
func (v *view) units(give func(unit, id uint32) bool) {
	for _, b := range v.blocks {
		for unit := b * unitsPerBlock; unit < (b+1)*unitsPerBlock; unit++ {
			if !give(unit, v.ids[unit]) {
				return
			}
		}
	}
}

// glance is a look at the status: the newest seal and the newest committed one.
type glance struct {
	at              int
	open, committed uint64
}

func newHistory(volumeBytes int64) *history {
	h := &history{base: make([]uint32, volumeBytes/unitBytes), first: 2, seen: map[uint32]int{}}
	for i := range h.base {
		h.base[i] = 1
	}
	return h
}

func (h *history) begin(d *deed) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clock++
	d.begin, d.id = h.clock, h.first+uint32(len(h.deeds))
	h.deeds = append(h.deeds, d)
	for b := d.from / unitsPerBlock; b*unitsPerBlock < d.to; b++ {
		h.seen[b] = h.phase
	}
}

const unitsPerBlock = 4096 / unitBytes

// now is the time of an event.
func (h *history) now() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clock++
	return h.clock
}

// ended notes the answer.
func (h *history) ended(d *deed, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clock++
	if ok {
		d.end = h.clock
		d.must = d.must || d.committed
	} else {
		d.dead = h.clock
	}
}

// never notes that a request did not get as far as the volume.
func (h *history) never(d *deed) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d.to = d.from
}

// flushed notes that everything that was answered before at is committed.
func (h *history) flushed(at int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, d := range h.deeds {
		d.must = d.must || d.end > 0 && d.end < at
	}
}

// read notes that a read whose answer promises a commit has returned what a request wrote.
func (h *history) read(id uint32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if id >= h.first {
		h.deeds[id-h.first].must = true
	}
}

// killed notes that the process is gone: what it had not answered either took effect or never will.
func (h *history) killed() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clock++
	for _, d := range h.deeds {
		if d.end == 0 && d.dead == 0 {
			d.dead = h.clock
		}
	}
	h.seals = nil
}

// revealed notes which zeroes without an answer took effect before a kill.
func (h *history) revealed(shown *view) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, d := range h.deeds {
		if !d.zero || d.end > 0 {
			continue
		}
		if written := slices.ContainsFunc(shown.ids[d.from:d.to], func(id uint32) bool { return id != 0 && id < d.id }); written {
			d.to = d.from
		} else {
			d.end = d.dead
		}
	}
}

// sawSeals notes a look at the status: a seal above the newest one of an earlier look covers all that was answered before that.
func (h *history) sawSeals(open, committed uint64) {
	h.mu.Lock()
	h.clock++
	h.seals = append(h.seals, glance{h.clock, open, committed})
	at := 0
	for _, g := range h.seals {
		if g.open < committed {
			at = g.at
		}
	}
	h.mu.Unlock()
	h.flushed(at)
}

// answered are the requests that were.
func (h *history) answered() []uint32 {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []uint32
	for _, d := range h.deeds {
		if d.end > 0 {
			all = append(all, d.id)
		}
	}
	return all
}

// settle makes shown the new base.
func (h *history) settle(shown *view) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for unit, id := range shown.units {
		h.base[unit] = id
	}
	maps.DeleteFunc(h.seen, func(_ uint32, phase int) bool { return phase < h.phase })
	h.phase++
	h.first += uint32(len(h.deeds))
	h.deeds, h.seals = nil, nil
}

// judge tells why shown, the writer of each unit of the blocks that were touched, is not the base with a prefix of the history:
// some order of the requests that real time allows, cut somewhere, with all that must be there. Each request is whole or
// absent. It returns "" if it is. must are further requests that may not be missing.
func (h *history) judge(shown *view, must []uint32) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	in := make([]bool, len(h.deeds))
	for _, d := range h.deeds {
		in[d.id-h.first] = d.must
	}
	for _, id := range must {
		in[id-h.first] = true
	}
	for unit, id := range shown.units {
		switch {
		case id >= h.first+uint32(len(h.deeds)):
			return fmt.Sprintf("unit %d is of request %d, which never was", unit, id)
		case id >= h.first:
			in[id-h.first] = true
		case id != h.base[unit] && id != 0:
			return fmt.Sprintf("unit %d is of request %d, before the last known state with %d", unit, id, h.base[unit])
		case id == 0 && h.base[unit] != 0 && !slices.ContainsFunc(h.deeds, func(d *deed) bool { return d.zero && d.covers(unit) }):
			return fmt.Sprintf("unit %d is zero and nobody zeroed it", unit)
		}
	}
	edges := make([][]int, len(h.deeds))
	for again := true; again; {
		again = false
		latest := 0
		for i, d := range h.deeds {
			if in[i] {
				latest = max(latest, d.begin)
			}
		}
		for i, d := range h.deeds {
			if !in[i] && d.end > 0 && d.end < latest {
				in[i], again = true, true
			}
		}
		// A unit that is zero although its base and the last write of it are not: some zero has come.
		for unit, id := range shown.units {
			if id != 0 || h.base[unit] == 0 {
				continue
			}
			if !slices.ContainsFunc(h.deeds, func(d *deed) bool { return d.zero && d.covers(unit) && in[d.id-h.first] }) {
				i := slices.IndexFunc(h.deeds, func(d *deed) bool { return d.zero && d.covers(unit) })
				in[i], again = true, true
			}
		}
		for i, d := range h.deeds {
			if !in[i] {
				continue
			}
			edges[i] = edges[i][:0]
			last := -1
			for unit := d.from; unit < d.to; unit++ {
				id := shown.ids[unit]
				switch {
				case id == d.id || id == 0 && d.zero:
					continue
				case id == 0:
					z := slices.IndexFunc(h.deeds, func(z *deed) bool { return z.zero && z.covers(unit) && !z.before(d) && z.id != d.id && d.before(z) })
					if z < 0 {
						return fmt.Sprintf("unit %d is zero, request %d wrote it last", unit, d.id)
					}
					again = again || !in[z]
					in[z] = true
				case id < h.first:
					return fmt.Sprintf("unit %d is as before, but request %d (begun %d, answered %d, must %v) is there", unit, d.id, d.begin, d.end, d.must)
				default:
					other := h.deeds[id-h.first]
					if other.before(d) {
						return fmt.Sprintf("unit %d is of request %d, which was over before %d began, which is there", unit, id, d.id)
					}
					if o := int(id - h.first); o != last {
						edges[i] = append(edges[i], o)
						last = o
					}
				}
			}
		}
	}
	return h.cycle(in, edges)
}

func (a *deed) covers(unit uint32) bool { return unit >= a.from && unit < a.to }

// cycle tells whether the requests that are there have no order in which each follows those that were over before it began, and
// those that it overwrote.
func (h *history) cycle(in []bool, edges [][]int) string {
	state := make([]byte, len(in))
	var visit func(i int) bool
	visit = func(i int) bool {
		state[i] = 1
		follow := func(o int) bool { return state[o] == 1 || state[o] == 0 && visit(o) }
		for _, o := range edges[i] {
			if follow(o) {
				return true
			}
		}
		for o := range in {
			if in[o] && h.deeds[i].before(h.deeds[o]) && follow(o) {
				return true
			}
		}
		state[i] = 2
		return false
	}
	for i := range in {
		if in[i] && state[i] == 0 && visit(i) {
			return fmt.Sprintf("no order of the requests explains what is there (request %d)", h.deeds[i].id)
		}
	}
	return ""
}
