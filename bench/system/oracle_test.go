package system

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The oracle of power cuts. A history says what clients sent and what was answered, when; a volume that is read after
// the power was cut shows, per sector, which write it holds. The oracle decides whether one cut through the history
// explains all of it: a set of requests, in one order, such that
//
//   - whatever was answered before a member was sent is a member, and comes before it;
//   - each request is a member as a whole or not at all, and executing the members in that order gives exactly what
//     the volume shows: so overlapping requests that were in flight together may have come in either order, but in the
//     same one in every sector;
//   - whatever must have survived is a member;
//   - a read that is a member returned, block by block, what the members before it had written.
//
// The least set that satisfies the first and the third rule is as good as any other: a request beyond it shows nowhere,
// and leaving it out breaks nothing. Given the set, the order exists if and only if what must come before what has no
// circle. Only zeros do not tell who wrote them: where that matters, the oracle tries one zeroing after the other. So
// it is exact, but that of a read it does not ask whether a write that no sector shows came before what it returned.

type requestKind uint8

const (
	opWrite requestKind = iota
	opZero
	opRead // of one block
	opMark // no data: it stands for all that was answered before it was sent, as a FLUSH does
)

func (k requestKind) String() string { return [...]string{"write", "zeroing", "read", "mark"}[k] }

// request is what a client sent. Times are those of the history's clock.
type request struct {
	kind     requestKind
	life     int32 // of the daemon
	first    int64 // sectors
	sectors  int64
	sent     int64
	done     int64 // when it was answered; else when the power was cut, for it cannot have come later; never before that
	answered bool
	must     string   // why it must have survived; "" if it need not
	saw      []uint64 // what a read returned, per sector
}

func (r *request) end() int64             { return r.first + r.sectors }
func (r *request) covers(s int64) bool    { return r.changes() && s >= r.first && s < r.end() }
func (r *request) changes() bool          { return r.kind == opWrite || r.kind == opZero }
func (r *request) before(o *request) bool { return r.done < o.sent }

// history is what was done to a volume since it was last read as a whole. A volume may lose power several times in one
// history: each time ends a life of the daemon, and each life has a cut of its own.
type history struct {
	run uint32

	mu       sync.Mutex
	began    time.Time
	clock    int64     // nanoseconds since then; no two events have the same
	base     []uint64  // per sector: the write that it showed when the history began
	past     uint64    // ids up to it are of histories before
	requests []request // the one at i has the id past+1+i
	life     int32
	died     int64 // when the life before ended
	polls    []poll
	faults   []string // what was seen to be wrong at once
}

// poll is a look at the status: everything answered before it was sent is in the seal that will have the number open,
// or in one before.
type poll struct {
	id   uint64
	open uint64
}

func newHistory(bytes int64) *history {
	return &history{run: rand.Uint32(), began: time.Now(), base: make([]uint64, bytes/sectorBytes)}
}

func (h *history) now() int64 {
	h.clock = max(h.clock+1, int64(time.Since(h.began)))
	return h.clock
}

func (h *history) request(id uint64) *request { return &h.requests[id-h.past-1] }

// send records a request that goes out.
func (h *history) send(kind requestKind, first, sectors int64) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.requests = append(h.requests, request{kind: kind, life: h.life, first: first, sectors: sectors, sent: h.now(), done: never})
	return h.past + uint64(len(h.requests))
}

// answered records that a request was answered; must is why it must survive from now on, if it must.
func (h *history) answered(id uint64, must string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.request(id)
	r.done, r.answered, r.must = h.now(), true, must
}

// sending is the time for read.
func (h *history) sending() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now()
}

// read records an answered read: what it returned per sector, and when it was sent. Blocks are read one by one.
func (h *history) read(first int64, saw []uint64, sent int64, must string) {
	const perBlock = blockBytes / sectorBytes
	h.mu.Lock()
	defer h.mu.Unlock()
	done := h.now()
	for len(saw) > 0 {
		n := min(perBlock-first%perBlock, int64(len(saw)))
		h.requests = append(h.requests, request{kind: opRead, life: h.life, first: first, sectors: n, sent: sent, done: done,
			answered: true, must: must, saw: saw[:n]})
		first, saw = first+n, saw[n:]
	}
}

// polled records the status that a mark returned: the number that the next seal will have, at least, and the last seal that
// was committed.
func (h *history) polled(id, open, committed uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.request(id)
	r.done, r.answered = h.now(), true
	h.polls = slices.DeleteFunc(h.polls, func(p poll) bool {
		if p.open <= committed {
			h.request(p.id).must = fmt.Sprintf("the status had said that seal %d was open, and later that %d was committed", p.open, committed)
		}
		return p.open <= committed
	})
	h.polls = append(h.polls, poll{id, open})
}

// settle records that everything answered in this life must have survived.
func (h *history) settle(must string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.requests {
		if r := &h.requests[i]; r.answered && r.life == h.life {
			r.must = must
		}
	}
}

// power records that the daemon died, after its last answer was recorded.
func (h *history) power() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.died = h.now()
	for i := range h.requests {
		r := &h.requests[i]
		r.done = min(r.done, h.died)
	}
	h.polls = h.polls[:0]
	h.life++
}

// advance begins the next history with what the volume showed at the end of this.
func (h *history) advance(shown []uint64) {
	h.past += uint64(len(h.requests))
	h.base, h.requests = shown, h.requests[:0]
}

// fault records what is wrong whatever the cut, a few times.
func (h *history) fault(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.faults) < 10 {
		h.faults = append(h.faults, fmt.Sprintf(format, args...))
	}
}

// node is a request in the search for a cut. Node 0 stands for everything before the history.
type node = int32

const zeros node = -1 // what a sector shows that holds zeros: they do not name their request

// node is the request that may show in the sector as the write with that id, or what is wrong with that.
func (h *history) node(sector int64, id uint64) (node, string) {
	switch {
	case id == zero:
		return zeros, ""
	case id <= h.past && id == h.base[sector]:
		return 0, ""
	case id <= h.past:
		return 0, fmt.Sprintf("shows write %d, which had been replaced by %d before this history began", id, h.base[sector])
	case id > h.past+uint64(len(h.requests)):
		return 0, fmt.Sprintf("shows write %d, which was never sent", id)
	}
	if r := h.request(id); r.kind != opWrite || !r.covers(sector) {
		return 0, fmt.Sprintf("shows write %d, which did not go there", id)
	}
	return node(id - h.past), ""
}

// cut is the search for a cut.
type cut struct {
	h     *history
	nodes []*request
	shown []node // per sector
	saw   [][]node
	spots []spot

	in     []bool
	why    []reason // of what is in
	forced []edge   // chosen among zeroings, or without a choice
	edges  []edge   // all, but those that follow from times
	open   []choice
	tries  int
}

// reason is why a request is in the cut: it must be, or a sector shows it, or it was answered before a member was sent, or
// a member read it.
type reason struct {
	verb string
	by   int64
}

// edge says that one request comes before another because of a sector, or because of times where that is negative.
type edge struct {
	from, to node
	sector   int64
}

// spot is a sector that shows zeros and was written. Neighbors of which the same is to be said are left out.
type spot struct {
	sector         int64
	writes, zeroes []node // those that cover it
}

// choice is a write that one of several zeroings must have followed.
type choice struct {
	write  node
	sector int64
	zeroes []node
}

// judge returns what in the volume no cut explains, "" if there is a cut.
func (h *history) judge(shown []uint64) string {
	c, fault := newCut(h, shown)
	if fault != "" {
		return fault
	}
	return c.solve()
}

func newCut(h *history, shown []uint64) (*cut, string) {
	c := &cut{h: h, nodes: make([]*request, len(h.requests)+1), shown: make([]node, len(shown)), in: make([]bool, len(h.requests)+1),
		why: make([]reason, len(h.requests)+1), saw: make([][]node, len(h.requests)+1)}
	c.nodes[0] = &request{sectors: int64(len(shown)), answered: true}
	c.in[0] = true
	for s, id := range shown {
		n, fault := h.node(int64(s), id)
		if fault != "" {
			return nil, fmt.Sprintf("sector %d %s", s, fault)
		}
		if c.shown[s] = n; n > 0 && !c.in[n] {
			c.in[n], c.why[n] = true, reason{"sector %d shows it", int64(s)}
		}
	}
	for i := range h.requests {
		r, n := &h.requests[i], node(i+1)
		c.nodes[n] = r
		if r.must != "" {
			c.in[n], c.why[n] = true, reason{verb: r.must}
		}
		for i, id := range r.saw {
			saw, fault := h.node(r.first+int64(i), id)
			if fault != "" {
				return nil, fmt.Sprintf("%s returned for sector %d what %s", c.name(n), r.first+int64(i), fault)
			}
			c.saw[n] = append(c.saw[n], saw)
		}
	}
	c.findSpots()
	return c, ""
}

// findSpots lists what covers the sectors that show zeros, where there is anything to explain.
func (c *cut) findSpots() {
	at := make([]int32, len(c.shown)) // per sector: its spot, counted from 1
	var spots []spot
	written := func(s int64, by node) {
		if c.shown[s] != zeros {
			return
		}
		if at[s] == 0 {
			spots = append(spots, spot{sector: s})
			at[s] = int32(len(spots))
		}
		spots[at[s]-1].writes = append(spots[at[s]-1].writes, by)
	}
	for s, id := range c.h.base {
		if id != zero {
			written(int64(s), 0)
		}
	}
	for n, r := range c.nodes[1:] {
		for s := r.first; r.kind == opWrite && s < r.end(); s++ {
			written(s, node(n+1))
		}
	}
	for n, r := range c.nodes {
		for s := r.first; r.kind == opZero && s < r.end(); s++ {
			if at[s] > 0 {
				spots[at[s]-1].zeroes = append(spots[at[s]-1].zeroes, node(n))
			}
		}
	}
	for _, i := range at {
		if i == 0 {
			continue
		}
		p, last := &spots[i-1], len(c.spots)-1
		if last < 0 || !slices.Equal(c.spots[last].writes, p.writes) || !slices.Equal(c.spots[last].zeroes, p.zeroes) {
			c.spots = append(c.spots, *p)
		}
	}
}

// solve adds to the cut what its members demand, and orders them.
func (c *cut) solve() string {
	for grown := true; grown; {
		c.complete()
		var fault string
		if fault, grown = c.constrain(); fault != "" {
			return fault
		}
	}
	if fault := c.disorder(); fault != "" {
		return fault
	}
	return c.choose(c.open)
}

// complete adds what was answered before a member was sent, and what members read.
func (c *cut) complete() {
	latest := make([]node, c.h.life+1) // per life: the member that was sent last
	for grown := true; grown; {
		grown = false
		add := func(n node, why reason) {
			if !c.in[n] {
				c.in[n], c.why[n], grown = true, why, true
			}
		}
		for n, r := range c.nodes {
			if c.in[n] && r.sent > c.nodes[latest[r.life]].sent {
				latest[r.life] = node(n)
			}
		}
		for n, r := range c.nodes {
			if by := latest[r.life]; r.before(c.nodes[by]) {
				add(node(n), reason{"it was answered before request %d was sent", int64(by)})
			}
			for _, saw := range c.saw[n] {
				if c.in[n] && saw > 0 {
					add(saw, reason{"request %d read it", int64(n)})
				}
			}
		}
	}
}

// before notes that a came before b, unless that follows from their times.
func (c *cut) before(a, b node, sector int64) {
	if !c.nodes[a].before(c.nodes[b]) {
		c.edges = append(c.edges, edge{a, b, sector})
	}
}

// constrain finds what must come before what, and where zeroings can be chosen. It reports what no choice can mend, and
// whether the cut has grown.
func (c *cut) constrain() (fault string, grown bool) {
	c.edges = append(c.edges[:0], c.forced...)
	c.open = c.open[:0:0]
	for n := node(1); int(n) < len(c.nodes); n++ {
		if c.in[n] {
			c.constrainBySectors(n)
		}
	}
	for _, p := range c.spots {
		f, g := c.constrainByZeros(p)
		if f != "" {
			return f, false
		}
		grown = grown || g
	}
	return "", grown
}

// constrainBySectors puts a member before what its sectors show, if that is something else. A read comes after what it
// returned, and before what its sectors show instead.
func (c *cut) constrainBySectors(n node) {
	r := c.nodes[n]
	last := zeros
	for s := r.first; s < r.end(); s++ {
		v := c.shown[s]
		if r.kind == opRead {
			saw := c.saw[n][s-r.first]
			if saw > 0 {
				c.before(saw, n, s)
			}
			if saw == v || v <= 0 {
				continue
			}
		}
		if v != zeros && v != n && v != last {
			c.before(n, v, s)
			last = v
		}
	}
}

// constrainByZeros has each member that wrote where zeros show be followed by a zeroing.
func (c *cut) constrainByZeros(p spot) (fault string, grown bool) {
	latest := int64(-1) // when the last of the zeroings that are members was sent
	for _, z := range p.zeroes {
		if c.in[z] {
			latest = max(latest, c.nodes[z].sent)
		}
	}
	for _, w := range p.writes {
		if !c.in[w] || c.nodes[w].done < latest || c.followed(w, p.zeroes) {
			continue
		}
		// A zeroing that was answered before the write was sent is of no use, nor one that another member is sure to have followed.
		zeroes := slices.DeleteFunc(slices.Clone(p.zeroes), func(z node) bool {
			return c.nodes[z].before(c.nodes[w]) || c.in[z] && c.nodes[z].done < latest
		})
		switch len(zeroes) {
		case 0:
			return fmt.Sprintf("sector %d shows zeros, and nothing can have zeroed it after %s, which is in the cut because %s",
				p.sector, c.name(w), c.because(w)), false
		case 1:
			grown = c.follow(w, zeroes[0], p.sector) || grown
		default:
			slices.SortFunc(zeroes, func(a, b node) int { return cmp.Compare(c.cost(a), c.cost(b)) })
			c.open = append(c.open, choice{w, p.sector, zeroes})
		}
	}
	return "", grown
}

// cost orders the zeroings of a choice: members first, of the others those that bring the least with them.
func (c *cut) cost(z node) int64 {
	if c.in[z] {
		return -c.nodes[z].sent
	}
	return c.nodes[z].sent
}

// followed tells whether one of the zeroings is known to come after the write.
func (c *cut) followed(w node, zeroes []node) bool {
	return slices.ContainsFunc(c.forced, func(e edge) bool { return e.from == w && slices.Contains(zeroes, e.to) })
}

// follow has a zeroing come after the write, and reports whether that makes it a member.
func (c *cut) follow(w, z node, sector int64) (grown bool) {
	e := edge{w, z, sector}
	c.forced, c.edges = append(c.forced, e), append(c.edges, e)
	if grown = !c.in[z]; grown {
		c.in[z], c.why[z] = true, reason{"zeros show in sector %d", sector}
	}
	return grown
}

// maxTries bounds the search. Loads are made so that it never comes near.
const maxTries = 2000

// choose goes through the zeroings that may have followed a write until one explains everything.
func (c *cut) choose(open []choice) string {
	for len(open) > 0 && c.followed(open[0].write, open[0].zeroes) {
		open = open[1:]
	}
	if len(open) == 0 {
		return ""
	}
	first := ""
	for _, z := range open[0].zeroes {
		if c.tries++; c.tries > maxTries {
			return fmt.Sprintf("undecided: no cut was found among %d; the first failed because %s", maxTries, first)
		}
		saved := *c
		saved.in, saved.edges, saved.forced = slices.Clone(c.in), slices.Clone(c.edges), slices.Clone(c.forced)
		var fault string
		if c.follow(open[0].write, z, open[0].sector) {
			fault = c.solve()
		} else if fault = c.disorder(); fault == "" {
			fault = c.choose(open[1:])
		}
		if fault == "" {
			return ""
		}
		saved.tries = c.tries
		*c = saved
		first = cmp.Or(first, fault)
	}
	return first
}

// disorder describes a circle in what comes before what, "" if there is none.
func (c *cut) disorder() string {
	circle := c.circle()
	if circle == nil {
		return ""
	}
	var b strings.Builder
	b.WriteString("no order of requests gives what the volume shows:")
	for _, e := range circle {
		if e.sector < 0 {
			fmt.Fprintf(&b, "\n  %s was answered before %s was sent;", c.name(e.from), c.name(e.to))
		} else {
			fmt.Fprintf(&b, "\n  %s comes before %s by sector %d;", c.name(e.from), c.name(e.to), e.sector)
		}
	}
	for _, e := range circle {
		if e.from != 0 {
			fmt.Fprintf(&b, "\n  %s is in the cut because %s;", c.name(e.from), c.because(e.from))
		}
	}
	return strings.TrimSuffix(b.String(), ";")
}

// circle finds a circle among the edges and the times, nil if there is none: it takes away, again and again, what nothing
// that is left comes before. What has no edge is in no circle.
func (c *cut) circle() []edge {
	at := make(map[node]int) // in bySent
	var bySent, byDone []node
	for _, e := range c.edges {
		for _, n := range [2]node{e.from, e.to} {
			if _, ok := at[n]; !ok {
				at[n] = 0
				bySent = append(bySent, n)
			}
		}
	}
	byDone = slices.Clone(bySent)
	slices.SortFunc(bySent, func(a, b node) int { return cmp.Compare(c.nodes[a].sent, c.nodes[b].sent) })
	slices.SortFunc(byDone, func(a, b node) int { return cmp.Compare(c.nodes[a].done, c.nodes[b].done) })
	for i, n := range bySent {
		at[n] = i
	}
	after := make([][]node, len(bySent))
	ahead := make([]int, len(bySent)) // edges from what is left
	for _, e := range c.edges {
		after[at[e.from]] = append(after[at[e.from]], e.to)
		ahead[at[e.to]]++
	}
	gone := make([]bool, len(bySent))
	var ready []node
	left, released := len(bySent), 0 // released: of bySent, sent before anything that is left was answered
	for done := 0; ; {
		for done < len(byDone) && gone[at[byDone[done]]] {
			done++
		}
		for released < len(bySent) && done < len(byDone) && c.nodes[bySent[released]].sent <= c.nodes[byDone[done]].done {
			if ahead[released] == 0 {
				ready = append(ready, bySent[released])
			}
			released++
		}
		if len(ready) == 0 {
			break
		}
		n := at[ready[len(ready)-1]]
		ready = ready[:len(ready)-1]
		gone[n] = true
		left--
		for _, to := range after[n] {
			if ahead[at[to]]--; ahead[at[to]] == 0 && at[to] < released {
				ready = append(ready, to)
			}
		}
	}
	if left == 0 {
		return nil
	}
	return c.shortCircle(func(n node) bool { return !gone[at[n]] }, bySent)
}

// shortCircle finds a circle among the nodes that are left, each of which has one that comes before it: by an edge, or else
// the one that was answered first. One edge against the times is the shortest; else walks back find others.
func (c *cut) shortCircle(left func(node) bool, nodes []node) []edge {
	ahead := make(map[node]edge)
	for _, e := range c.edges {
		if c.nodes[e.to].before(c.nodes[e.from]) {
			return []edge{e, {e.to, e.from, -1}}
		}
		if left(e.from) {
			ahead[e.to] = e
		}
	}
	nodes = slices.DeleteFunc(slices.Clone(nodes), func(n node) bool { return !left(n) })
	earliest := slices.MinFunc(nodes, func(a, b node) int { return cmp.Compare(c.nodes[a].done, c.nodes[b].done) })
	var best []edge
	for _, n := range nodes[:min(len(nodes), 1000)] {
		var walk []edge
		met := make(map[node]int)
		for _, again := met[n]; !again; _, again = met[n] {
			met[n] = len(walk)
			e, ok := ahead[n]
			if !ok {
				e = edge{earliest, n, -1}
			}
			walk = append(walk, e)
			n = e.from
		}
		if walk = walk[met[n]:]; best == nil || len(walk) < len(best) {
			best = walk
		}
	}
	slices.Reverse(best)
	return best
}

// name describes a request.
func (c *cut) name(n node) string {
	if n == 0 {
		return "what was there before"
	}
	r := c.nodes[n]
	s := fmt.Sprintf("%s %d (", r.kind, c.h.past+uint64(n))
	if r.kind != opMark {
		s += fmt.Sprintf("sectors %d+%d, ", r.first, r.sectors)
	}
	if r.answered {
		return s + fmt.Sprintf("sent %d, answered %d)", r.sent, r.done)
	}
	return s + fmt.Sprintf("sent %d, not answered)", r.sent)
}

// because says why a request is in the cut, and why what it is there for is.
func (c *cut) because(n node) string {
	why := c.why[n]
	switch {
	case n == 0:
		return "it was there"
	case !strings.Contains(why.verb, "%d"):
		return why.verb
	case strings.Contains(why.verb, "request %d"):
		by := node(why.by)
		return strings.Replace(why.verb, "request %d", c.name(by), 1) + ", which is in the cut because " + c.because(by)
	}
	return fmt.Sprintf(why.verb, why.by)
}

// judgeSectors returns what in the volume is wrong where only single sectors are promised to be atomic and nothing is
// promised about what was not told to be durable: no sector shows anything older than the newest write that must be there.
func (h *history) judgeSectors(shown []uint64) string {
	floor := make([]int64, len(shown))
	horizon := make([]int64, h.life+1) // per life: when the last mark was sent that must have survived
	for i := range h.requests {
		if r := &h.requests[i]; r.kind == opMark && r.must != "" {
			horizon[r.life] = max(horizon[r.life], r.sent)
		}
	}
	for i := range h.requests {
		r := &h.requests[i]
		for s := r.first; r.changes() && s < r.end(); s++ {
			if r.must != "" || r.done < horizon[r.life] {
				floor[s] = max(floor[s], r.sent)
			}
		}
		for i, id := range r.saw {
			if r.must != "" && id > h.past {
				floor[r.first+int64(i)] = max(floor[r.first+int64(i)], h.request(id).sent)
			}
		}
	}
	done := h.doneOf(shown)
	for s, id := range shown {
		if _, fault := h.node(int64(s), id); fault != "" {
			return fmt.Sprintf("sector %d %s", s, fault)
		}
		if id == zero && h.base[s] != zero && done[s] == 0 {
			return fmt.Sprintf("sector %d shows zeros, but it showed write %d before and nothing zeroed it", s, h.base[s])
		}
		if done[s] < floor[s] {
			return fmt.Sprintf("sector %d shows write %d (0: zeros) of %d at the latest, but what was sent at %d must be there",
				s, id, done[s], floor[s])
		}
	}
	return ""
}

// doneOf is, per sector, when the request was answered that it shows: 0 where it shows what was there before, the latest
// where it shows zeros.
func (h *history) doneOf(shown []uint64) []int64 {
	done := make([]int64, len(shown))
	for i := range h.requests {
		r := &h.requests[i]
		for s := r.first; r.changes() && s < r.end(); s++ {
			if r.kind == opWrite && shown[s] == h.past+1+uint64(i) || r.kind == opZero && shown[s] == zero {
				done[s] = max(done[s], r.done)
			}
		}
	}
	return done
}

// rolledBack is how long before the last power cut the oldest of the answered requests of that life was answered that is
// lost for sure; 0 where none is.
func (h *history) rolledBack(shown []uint64) time.Duration {
	oldest, done := h.died, h.doneOf(shown)
	for i := range h.requests {
		r := &h.requests[i]
		for s := r.first; r.changes() && r.answered && r.life == h.life-1 && s < r.end(); s++ {
			if done[s] < r.sent {
				oldest = min(oldest, r.done)
			}
		}
	}
	return time.Duration(h.died - oldest)
}

// marks counts the FLUSHes and looks at the status that say what must have survived.
func (h *history) marks() (n int) {
	for i := range h.requests {
		if r := &h.requests[i]; r.kind == opMark && r.must != "" {
			n++
		}
	}
	return n
}

// act is a request of a history made by hand. The writes of a history are called a, b, c and so on in their order.
type act struct {
	kind           requestKind
	first, sectors int64
	sent, done     int64 // done 0: not answered
	must           bool
	saw            string
	life           int32
}

// handmade is a history of a volume whose sectors showed the writes of before; "." is what was there, "0" zeros.
func handmade(base string, acts ...act) *history {
	h := &history{past: uint64(len(base)), base: make([]uint64, len(base))}
	for i := range base {
		if base[i] == '.' {
			h.base[i] = uint64(i + 1)
		}
	}
	for _, a := range acts {
		h.requests = append(h.requests, request{kind: a.kind, life: a.life, first: a.first, sectors: a.sectors, sent: a.sent,
			done: cmp.Or(a.done, never), answered: a.done != 0})
		if r := &h.requests[len(h.requests)-1]; a.must {
			r.must = "it must be"
		}
		h.life = max(h.life, a.life)
	}
	for i, a := range acts {
		h.requests[i].saw = h.ids(a.first, a.saw)
	}
	return h
}

// ids reads what sectors show: a letter for a write, "." for what was there, "0" for zeros, "!" for what is older.
func (h *history) ids(first int64, shown string) []uint64 {
	var ids []uint64
	for i, c := range []byte(shown) {
		switch c {
		case '.':
			ids = append(ids, h.base[int(first)+i])
		case '0':
			ids = append(ids, zero)
		case '!':
			ids = append(ids, h.past+1-h.base[int(first)+i]%h.past)
		default:
			ids = append(ids, h.past+1+uint64(c-'a'))
		}
	}
	return ids
}

// TestOracle has histories made by hand judged.
func TestOracle(t *testing.T) {
	w := func(first, sectors, sent, done int64) act {
		return act{first: first, sectors: sectors, sent: sent, done: done}
	}
	z := func(first, sectors, sent, done int64) act {
		return act{kind: opZero, first: first, sectors: sectors, sent: sent, done: done}
	}
	must := func(a act) act { a.must = true; return a }
	life := func(n int32, a act) act { a.life = n; return a }
	read := func(first int64, saw string, sent, done int64) act {
		return act{kind: opRead, first: first, sectors: int64(len(saw)), saw: saw, sent: sent, done: done}
	}
	mark := func(sent, done int64) act { return act{kind: opMark, sent: sent, done: done, must: true} }
	for _, row := range []struct {
		name  string
		acts  []act
		shown string
		fault string // words of it; "" where there is none
	}{
		{"nothing happened", nil, "........", ""},
		{"all are there", []act{w(0, 4, 1, 2), w(4, 4, 3, 4)}, "aaaabbbb", ""},
		{"the last is lost", []act{w(0, 4, 1, 2), w(4, 4, 3, 4)}, "aaaa....", ""},
		{"all are lost", []act{w(0, 4, 1, 2), w(4, 4, 3, 4)}, "........", ""},
		{"of an older history", nil, "...!....", "had been replaced"},
		{"never sent", []act{w(0, 4, 1, 2)}, "....z...", "never sent"},
		{"elsewhere", []act{w(0, 4, 1, 2)}, "aaaaa...", "did not go there"},

		{"one before is lost", []act{w(0, 4, 1, 2), w(4, 4, 3, 4)}, "....bbbb", "write 9 (sectors 0+4, sent 1, answered 2) is in the cut because it was answered before write 10"},
		{"one in flight is lost", []act{w(0, 4, 1, 5), w(4, 4, 3, 4)}, "....bbbb", ""},
		{"one before one not answered is lost", []act{w(0, 4, 1, 2), w(4, 4, 3, 0)}, "....bbbb", "answered before write 10"},
		{"one not answered is there", []act{w(0, 4, 1, 0)}, "aaaa....", ""},
		{"one before is overwritten", []act{w(0, 4, 1, 2), w(0, 4, 3, 4)}, "bbbb....", ""},
		{"an older one shows again", []act{w(0, 4, 1, 2), w(0, 4, 3, 4), w(4, 4, 5, 6)}, "aaaacccc", "write 9 (sectors 0+4, sent 1, answered 2) was answered before write 10"},
		{"two cuts in one volume", []act{w(0, 2, 1, 2), w(2, 2, 3, 4), w(4, 2, 5, 6), w(6, 2, 7, 8)}, "aa..cc..", "comes before"},

		{"torn, with what was there", []act{w(0, 8, 1, 0)}, "aaaa....", "what was there before"},
		{"torn, with an older one", []act{w(0, 8, 1, 2), w(0, 8, 3, 0)}, "aaaabbbb", "write 9 (sectors 0+8, sent 1, answered 2) was answered before write 10"},
		{"in part overwritten later", []act{w(0, 8, 1, 2), w(0, 4, 3, 4)}, "bbbbaaaa", ""},
		{"in part overwritten in flight", []act{w(0, 8, 1, 4), w(0, 4, 2, 3)}, "bbbbaaaa", ""},
		{"torn around what came between", []act{w(0, 8, 1, 2), w(0, 8, 3, 4), w(2, 4, 5, 6)}, "aaccccbb", "write 10 (sectors 0+8, sent 3, answered 4) comes before write 9"},

		{"both orders, the one", []act{w(0, 6, 1, 9), w(2, 6, 2, 8)}, "aaaaaabb", ""},
		{"both orders, the other", []act{w(0, 6, 1, 9), w(2, 6, 2, 8)}, "aabbbbbb", ""},
		{"both orders at once", []act{w(0, 6, 1, 9), w(2, 6, 2, 8)}, "aaaabbbb", "comes before"},
		{"a circle of three", []act{w(0, 4, 1, 9), w(2, 2, 2, 3), must(w(0, 2, 4, 5))}, "aabb....", "write 10 (sectors 2+2, sent 2, answered 3) was answered before write 11"},
		{"a circle through times", []act{w(0, 4, 1, 9), w(4, 4, 2, 3), w(0, 8, 4, 8), w(2, 4, 5, 10)}, "aaddbbcc", "comes before"},

		{"what must be is there", []act{must(w(0, 4, 1, 2))}, "aaaa....", ""},
		{"what must be is lost", []act{must(w(0, 4, 1, 2))}, "........", "it must be"},
		{"what must be is overwritten by one not answered", []act{must(w(0, 4, 1, 2)), w(0, 4, 3, 0)}, "bbbb....", ""},
		{"what must be holds what was before it", []act{w(0, 4, 1, 2), must(w(4, 4, 3, 4))}, "....bbbb", "answered before write 10"},
		{"flushed", []act{w(0, 4, 1, 2), mark(3, 4), w(4, 4, 5, 6)}, "aaaa....", ""},
		{"flushed and lost", []act{w(0, 4, 1, 2), mark(3, 4)}, "........", "answered before mark 10"},
		{"in flight at the flush", []act{w(0, 4, 1, 4), mark(3, 5)}, "........", ""},

		{"zeroed", []act{z(0, 4, 1, 2)}, "0000....", ""},
		{"zeroed and lost", []act{must(z(0, 4, 1, 2))}, "........", "zeroing 9"},
		{"torn zeroing", []act{z(0, 4, 1, 0)}, "00......", "what was there before"},
		{"zeros from nowhere", nil, "..0.....", "nothing can have zeroed it"},
		{"zeros of before the write", []act{z(0, 4, 1, 2), must(w(0, 4, 3, 4))}, "0000....", "nothing can have zeroed it"},
		{"zeros in flight with the write", []act{z(0, 4, 1, 4), must(w(0, 4, 3, 5))}, "0000....", ""},
		{"zeros in part", []act{z(0, 4, 1, 4), must(w(0, 4, 3, 5))}, "00aa....", "did not go there"},
		{"zeros and write mixed", []act{z(0, 4, 1, 4), must(w(0, 4, 3, 5))}, "00bb....", "comes before"},
		{"a zeroing that holds what was before it", []act{w(6, 2, 1, 2), z(0, 4, 3, 0)}, "0000....", "answered before zeroing 10"},
		{"one of two zeroings would bring what is lost", []act{z(0, 4, 1, 0), w(6, 2, 2, 3), z(0, 2, 4, 0)}, "0000....", ""},
		{"the only zeroing brings what is lost", []act{z(2, 2, 1, 0), w(6, 2, 2, 3), z(0, 2, 4, 0)}, "0000....", "answered before zeroing 11"},
		{"either zeroing contradicts", []act{must(w(0, 8, 1, 9)), must(z(0, 3, 2, 9)), must(z(2, 3, 2, 9))}, "0a000aaa", "comes before"},
		{"one zeroing of two explains", []act{must(w(0, 8, 1, 9)), must(z(0, 3, 2, 9)), must(z(2, 3, 2, 9))}, "000aaaaa", ""},
		{"two zeroings in flight explain", []act{must(w(0, 8, 1, 9)), must(z(0, 3, 2, 9)), must(z(2, 3, 2, 9))}, "00000aaa", ""},
		{"the second choice explains", []act{must(w(0, 4, 1, 9)), must(z(0, 4, 2, 9)), must(z(1, 2, 3, 9))}, "a00a....", ""},

		{"what was read is lost with the read", []act{w(0, 4, 1, 0), read(0, "aaaa", 2, 3)}, "........", ""},
		{"what was read is lost, what came later not", []act{w(0, 4, 1, 0), read(0, "aaaa", 2, 3), w(4, 4, 4, 5)}, "....cccc", "read 10"},
		{"what was read must be", []act{w(0, 4, 1, 0), must(read(0, "aaaa", 2, 3))}, "........", "read 10"},
		{"the order that was read", []act{w(0, 4, 1, 9), w(0, 4, 2, 9), read(0, "bbbb", 10, 11), w(4, 4, 12, 13)}, "bbbbdddd", ""},
		{"not the order that was read", []act{w(0, 4, 1, 9), w(0, 4, 2, 9), read(0, "bbbb", 10, 11), w(4, 4, 12, 13)}, "aaaadddd", "read 11"},
		{"what was read holds what was before it", []act{w(0, 4, 1, 0), w(0, 4, 5, 8), w(4, 4, 3, 4), must(read(0, "bbbb", 2, 9))}, "aaaa....", "read 12"},
		{"what was read comes later", []act{w(0, 4, 1, 9), read(0, "aa", 2, 3), must(w(2, 2, 4, 5))}, "aaaa....", "read 10"},
		{"a read of what is older", []act{read(0, "!...", 1, 2)}, "........", "had been replaced"},

		{"two lives", []act{w(0, 4, 1, 2), life(1, w(4, 4, 11, 12))}, "....bbbb", ""},
		{"two lives, the first whole", []act{w(0, 4, 1, 2), life(1, w(4, 4, 11, 12))}, "aaaa....", ""},
		{"a life before, in part", []act{w(0, 2, 1, 2), w(2, 2, 3, 4), life(1, w(4, 4, 11, 12))}, "..bbcccc", "answered before write 10"},
		{"a life before shows over this", []act{w(0, 4, 1, 10), life(1, must(w(0, 4, 11, 12)))}, "aaaa....", "must be"},
	} {
		t.Run(row.name, func(t *testing.T) {
			h := handmade("........", row.acts...)
			got := h.judge(h.ids(0, row.shown))
			if (got == "") != (row.fault == "") || !strings.Contains(got, row.fault) {
				t.Errorf("judged: %q, want %q", got, row.fault)
			}
		})
	}
}

// TestOracleSectors has histories made by hand judged where each sector stands for itself.
func TestOracleSectors(t *testing.T) {
	write := act{first: 0, sectors: 4, sent: 1, done: 2}
	told, later := write, act{first: 2, sectors: 4, sent: 3, done: 4}
	told.must = true
	for _, row := range []struct {
		name  string
		base  string
		acts  []act
		shown string
		fault string
	}{
		{"torn", "........", []act{write}, "a.a.....", ""},
		{"no prefix", "........", []act{write, later}, "..bbbb..", ""},
		{"told and there", "........", []act{told}, "aaaa....", ""},
		{"told and torn", "........", []act{told}, "aaa.....", "sector 3"},
		{"told and overwritten", "........", []act{told, later}, "aabbbb..", ""},
		{"told and zeroed", "........", []act{told, {kind: opZero, first: 2, sectors: 4, sent: 3}}, "aa00....", ""},
		{"told and zeros from nowhere", "........", []act{told}, "aa00....", "nothing zeroed it"},
		{"told and zeros of before", "00000000", []act{told}, "aa000000", "sector 2"},
		{"told zeroing and lost", "........", []act{{kind: opZero, first: 2, sectors: 4, sent: 3, done: 4, must: true}}, "..0.....", "sector 3"},
		{"flushed", "........", []act{write, {kind: opMark, sent: 3, done: 4, must: true}}, "aa......", "sector 2"},
		{"flushed before", "........", []act{write, {kind: opMark, sent: 1, done: 4, must: true}}, "aa......", ""},
		{"read for good", "........", []act{{sectors: 4, sent: 1}, {kind: opRead, sectors: 1, sent: 2, done: 3, saw: "a", must: true}}, "........", "sector 0"},
		{"of an older history", "........", nil, "!.......", "had been replaced"},
	} {
		t.Run(row.name, func(t *testing.T) {
			h := handmade(row.base, row.acts...)
			got := h.judgeSectors(h.ids(0, row.shown))
			if (got == "") != (row.fault == "") || !strings.Contains(got, row.fault) {
				t.Errorf("judged: %q, want %q", got, row.fault)
			}
		})
	}
}

// TestHistory records a history as clients do, and checks what must survive by what the status told.
func TestHistory(t *testing.T) {
	h := newHistory(4 * blockBytes)
	write := func(first int64) uint64 {
		id := h.send(opWrite, first, 4)
		h.answered(id, "")
		return id
	}
	early := write(0)
	look := h.send(opMark, 0, 0)
	during := write(4)
	h.polled(look, 7, 5)
	h.polled(h.send(opMark, 0, 0), 8, 6) // of the seals that were open at the first look none is committed
	shown := make([]uint64, len(h.base))
	if fault := h.judge(shown); fault != "" {
		t.Errorf("everything is lost and nothing was told: %s", fault)
	}
	late := write(8)
	h.polled(h.send(opMark, 0, 0), 9, 7)
	h.power()
	if fault := h.judge(shown); !strings.Contains(fault, "seal 7 was open") {
		t.Errorf("what was answered before seal 7 is lost and the oracle says: %q", fault)
	}
	copy(shown, []uint64{early, early, early, early})
	if fault := h.judge(shown); fault != "" {
		t.Errorf("what was answered before the look is there: %s", fault)
	}
	if got := h.rolledBack(shown); got != time.Duration(h.died-h.request(during).done) {
		t.Errorf("rolled back %v, want the time since write %d was answered", got, during)
	}
	h.advance(shown)
	again := write(8)
	if again <= late {
		t.Errorf("the id %d of a new history was used before", again)
	}
	h.settle("the daemon stopped cleanly")
	h.power()
	if fault := h.judge(shown); !strings.Contains(fault, "stopped cleanly") {
		t.Errorf("what a clean stop must keep is lost and the oracle says: %q", fault)
	}
	shown = slices.Clone(shown)
	copy(shown[8:], []uint64{again, again, again, again})
	if fault := h.judge(shown); fault != "" {
		t.Errorf("everything is there: %s", fault)
	}
}

// TestOracleIsExact compares the oracle with one that tries every set and every order, over small histories of all kinds:
// what they leave, and what they leave with some sectors changed.
func TestOracleIsExact(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	explained, refused := 0, 0
	for i := range count("RAMSHELF_HISTORIES", 20_000, 2_000_000) {
		h, shown := randomHistory(rng, i%4 == 3)
		fault, want := h.judge(shown), h.explainable(shown)
		if want && fault != "" || !want && fault == "" && !h.hasReads() {
			t.Fatalf("history %d: %+v\nwas %v, shows %v: explainable %v, judged: %s", i, h.requests, h.base, shown, want, fault)
		}
		if want {
			explained++
		} else {
			refused++
		}
	}
	t.Logf("%d explained, %d refused", explained, refused)
	if explained < 1000 || refused < 1000 {
		t.Errorf("%d histories explained and %d refused: the histories are of no use", explained, refused)
	}
}

func (h *history) hasReads() bool {
	return slices.ContainsFunc(h.requests, func(r request) bool { return r.kind == opRead })
}

// randomHistory makes a history of few requests, executes what came before a cut in an order that agrees with the times,
// and returns what the volume shows, sometimes with a sector changed.
func randomHistory(rng *rand.Rand, reads bool) (*history, []uint64) {
	const sectors = 4
	h := handmade([]string{"....", "0000", "..00"}[rng.IntN(3)])
	lives := int32(1 + rng.IntN(4)/3)
	for range 2 + rng.IntN(4) {
		r := request{kind: opWrite, first: rng.Int64N(sectors), life: rng.Int32N(lives)}
		r.sectors = 1 + rng.Int64N(sectors-r.first)
		r.sent = 100*int64(r.life) + 1 + rng.Int64N(12)
		r.done, r.answered = r.sent+1+rng.Int64N(8), rng.IntN(4) > 0
		switch dice := rng.IntN(12); {
		case dice < 4:
			r.kind = opZero
		case dice == 4:
			r.kind, r.sectors = opMark, 0
		}
		if !r.answered {
			r.done = 100 * int64(r.life+1)
		} else if rng.IntN(6) == 0 {
			r.must = "it must be"
		}
		h.requests = append(h.requests, r)
	}
	h.life = lives
	times, cuts := make([]int64, len(h.requests)), [2]int64{rng.Int64N(25), 100 + rng.Int64N(25)}
	for i, r := range h.requests {
		if times[i] = r.sent + rng.Int64N(min(r.done-r.sent, 20)); times[i] >= cuts[r.life] && r.must == "" {
			times[i] = -1
		}
	}
	shown := h.execute(times)
	if reads {
		r := request{kind: opRead, first: rng.Int64N(sectors), sectors: 1, sent: 1 + rng.Int64N(20), answered: true}
		r.done = r.sent + 1 + rng.Int64N(8)
		r.saw = shown[r.first : r.first+1]
		if writes := h.writesAt(r.first); rng.IntN(2) == 0 && len(writes) > 0 {
			r.saw = []uint64{writes[rng.IntN(len(writes))]}
		}
		h.requests = append(h.requests, r)
	}
	if s := rng.Int64N(sectors); rng.IntN(2) == 0 {
		choices := append(h.writesAt(s), h.base[s], zero)
		shown = slices.Clone(shown)
		shown[s] = choices[rng.IntN(len(choices))]
	}
	return h, shown
}

// writesAt are the ids of the writes that cover the sector.
func (h *history) writesAt(s int64) (ids []uint64) {
	for i := range h.requests {
		if r := &h.requests[i]; r.kind == opWrite && r.covers(s) {
			ids = append(ids, h.past+1+uint64(i))
		}
	}
	return ids
}

// execute has the requests act at the times and returns what the volume shows then; those with negative times do not act.
func (h *history) execute(times []int64) []uint64 {
	var order []int
	for i, at := range times {
		if at >= 0 {
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(times[a], times[b]) })
	shown := slices.Clone(h.base)
	for _, i := range order {
		h.apply(i, shown)
	}
	return shown
}

// apply executes one request and reports false if it is a read that returned something else.
func (h *history) apply(i int, shown []uint64) bool {
	r := &h.requests[i]
	for s := r.first; s < r.end(); s++ {
		switch r.kind {
		case opWrite:
			shown[s] = h.past + 1 + uint64(i)
		case opZero:
			shown[s] = zero
		case opRead:
			if shown[s] != r.saw[s-r.first] {
				return false
			}
		}
	}
	return true
}

// explainable tries every set of requests that a cut may take.
func (h *history) explainable(shown []uint64) bool {
	for set := range uint(1) << len(h.requests) {
		if h.allowed(set) && h.orderable(set, slices.Clone(h.base), shown) {
			return true
		}
	}
	return false
}

// allowed tells whether the set has all that must be, and all that was answered before its members were sent.
func (h *history) allowed(set uint) bool {
	for i := range h.requests {
		a := &h.requests[i]
		if set>>i&1 == 1 {
			continue
		}
		if a.must != "" {
			return false
		}
		for j := range h.requests {
			if b := &h.requests[j]; set>>j&1 == 1 && a.life == b.life && a.answered && a.before(b) {
				return false
			}
		}
	}
	return true
}

// orderable tries every order of the set that agrees with the times.
func (h *history) orderable(set uint, now, shown []uint64) bool {
	if set == 0 {
		return slices.Equal(now, shown)
	}
	for i := range h.requests {
		if set>>i&1 == 0 {
			continue
		}
		early := true
		for j := range h.requests {
			early = early && (set>>j&1 == 0 || !h.requests[j].before(&h.requests[i]))
		}
		if next := slices.Clone(now); early && h.apply(i, next) && h.orderable(set&^(1<<i), next, shown) {
			return true
		}
	}
	return false
}

// TestOracleAtSize has the oracle judge histories as large and as dense as those of the power cuts: what a cut leaves is
// explained, and it is not when one request is taken out of it or is there in part.
func TestOracleAtSize(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	missing, torn := 0, 0
	for i := range count("RAMSHELF_LARGE_HISTORIES", 2, 200) {
		h, times := denseHistory(rng, 20_000)
		begin := time.Now()
		shown := h.execute(times)
		if fault := h.judge(shown); fault != "" {
			t.Fatalf("history %d: %s", i, fault)
		}
		t.Logf("history %d: judged in %v", i, time.Since(begin))
		for range 60 {
			x := rng.IntN(len(h.requests))
			if !h.requests[x].changes() || times[x] < 0 {
				continue
			}
			without := slices.Clone(times)
			without[x] = -1
			other := h.execute(without)
			if h.missed(x, shown, other) {
				missing++
				if fault := h.judge(other); fault == "" {
					t.Errorf("history %d: request %d is missing and nobody objects", i, x)
				}
			}
			if s, ok := h.tearable(x, shown, other); ok {
				torn++
				part := slices.Clone(shown)
				part[s] = other[s]
				if fault := h.judge(part); fault == "" {
					t.Errorf("history %d: request %d is torn in sector %d and nobody objects", i, x, s)
				}
			}
		}
	}
	t.Logf("%d were missing and %d torn", missing, torn)
	if missing < 10 || torn < 10 {
		t.Errorf("only %d were missing and %d torn", missing, torn)
	}
}

// denseHistory makes a history of a hundred requests in flight at all times, half of them in one MiB, and gives the time at
// which each acts, before a cut.
func denseHistory(rng *rand.Rand, n int) (*history, []int64) {
	h := newHistory(64 * mib)
	flying := make([]int, 0, 100)
	clock := int64(1)
	for len(h.requests) < n || len(flying) > 0 {
		clock += 1 + rng.Int64N(3)
		if len(h.requests) < n && len(flying) < cap(flying) && rng.IntN(8) > 0 {
			r := request{sent: clock, done: never, sectors: 1 + rng.Int64N(64)}
			if r.first = rng.Int64N(int64(len(h.base)) - 2048); rng.IntN(2) == 0 {
				r.first = 5000 + rng.Int64N(2048)
			}
			if rng.IntN(10) == 0 {
				r.kind = opZero
			}
			flying = append(flying, len(h.requests))
			h.requests = append(h.requests, r)
		} else if len(flying) > 0 {
			i := rng.IntN(len(flying))
			r := &h.requests[flying[i]]
			r.done, r.answered = clock, true
			flying = slices.Delete(flying, i, i+1)
		}
	}
	cut := clock - rng.Int64N(1000)
	times := make([]int64, n)
	for i, r := range h.requests {
		if times[i] = r.sent + rng.Int64N(r.done-r.sent); times[i] >= cut {
			times[i] = -1
		}
	}
	return h, times
}

// missed tells whether the volume without the request cannot be what a cut leaves: a member was sent after its answer, and
// where it would show there is what came before it was sent, for sure.
func (h *history) missed(x int, shown, without []uint64) bool {
	r, later, older := &h.requests[x], false, false
	for _, id := range without {
		later = later || id > h.past && r.before(h.request(id))
	}
	for s := r.first; s < r.end(); s++ {
		older = older || shown[s] != without[s] && without[s] != zero && h.request(without[s]).before(r)
	}
	return later && older
}

// tearable finds a sector of a write that shows elsewhere as well, such that what was there before it cannot have come later.
func (h *history) tearable(x int, shown, without []uint64) (int64, bool) {
	r := &h.requests[x]
	var at []int64
	for s := r.first; s < r.end(); s++ {
		if shown[s] == h.past+1+uint64(x) {
			at = append(at, s)
		}
	}
	if len(at) < 2 {
		return 0, false
	}
	for _, s := range at {
		if without[s] != zero && h.request(without[s]).before(r) {
			return s, true
		}
	}
	return 0, false
}
