package system

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A power cut of a node is kill -9 of its daemon and the loss of its shared memory. What the daemon has written is in the
// page cache of the test's host and stays: whether it is synced when it must be is tested elsewhere.

// cutMode is a volume whose power is cut: what it promises, and what makes cuts fall into commits, checkpoints and recovery.
type cutMode struct {
	name      string
	journal   string // none, internal or external
	ack       string
	flush     string // ack where empty
	staleness string // the default where empty
	size      int64
	slow      bool // writes take 1 ms and more
	shelf     bool // the backing is an AoE target
}

// cutModes are the volumes of TestPowerCut. Memory is a quarter of the smallest, so that blocks come and go.
var cutModes = []cutMode{
	{name: "disk", journal: "internal", ack: "disk", size: 256 * mib},
	{name: "disk slow", journal: "internal", ack: "disk", staleness: "20ms", size: 256 * mib, slow: true},
	{name: "disk external", journal: "external", ack: "disk", size: gib},
	{name: "flush", journal: "internal", ack: "ram", flush: "disk", staleness: "20ms", size: 256 * mib},
	{name: "flush slow", journal: "external", ack: "ram", flush: "disk", size: 256 * mib, slow: true},
	{name: "ram", journal: "internal", ack: "ram", staleness: "10ms", size: gib},
	{name: "ram slow", journal: "internal", ack: "ram", size: 256 * mib, slow: true},
	{name: "ram external", journal: "external", ack: "ram", staleness: "50ms", size: 256 * mib},
	{name: "none", journal: "none", ack: "disk", size: 256 * mib},
}

const cutMemory = 64 * mib

// mustWrite is why an answered write must survive, "" if it need not.
func (m cutMode) mustWrite(fua bool) string {
	switch {
	case m.ack == "disk":
		return "it was answered under ack = disk"
	case m.flush == "disk" && fua:
		return "it was answered with FUA under flush = disk"
	}
	return ""
}

// mustFlush is why what a FLUSH covers must survive, "" if it need not.
func (m cutMode) mustFlush() string {
	if m.ack == "disk" || m.flush == "disk" {
		return "it was answered"
	}
	return ""
}

// mustRead is why what a read returned must survive, "" if it need not.
func (m cutMode) mustRead() string {
	if m.ack == "disk" {
		return "it was answered under ack = disk"
	}
	return ""
}

// judge judges a volume by what the mode promises.
func (m cutMode) judge(h *history, shown []uint64) string {
	if m.journal == "none" {
		return h.judgeSectors(shown)
	}
	return h.judge(shown)
}

// powerCut is a volume under load whose power is cut again and again.
type powerCut struct {
	t     testing.TB
	m     cutMode
	s     *ramshelf
	h     *history
	file  string // where its content arrives
	hot   int64  // the first of the sectors that most requests go to
	tally tally

	evidence string // path of a file for the history that no cut explains; "" where nobody asks
}

// tally is what was done, and the worst that was seen.
type tally struct {
	Cuts       int           `json:"cuts"`
	Writes     int           `json:"writes"`      // answered, zeroings included
	Marks      int           `json:"marks"`       // FLUSHes and looks at the status that told what must survive
	RolledBack time.Duration `json:"rolled_back"` // nanoseconds before a cut, of the oldest answered write that was lost
}

// newPowerCut starts a volume of the mode.
func newPowerCut(t testing.TB, m cutMode, v volume) *powerCut {
	t.Helper()
	v.size, v.memory, v.journal, v.ack = m.size, cutMemory, m.journal, m.ack
	p := &powerCut{t: t, m: m, h: newHistory(m.size), file: filepath.Join(t.TempDir(), "home.img")}
	v.backing = "file:" + p.file
	if m.shelf {
		s := newShelf(t, p.file, m.size+128*mib)
		v.backing, v.binary = s.backing(), s.binary
	}
	if m.slow {
		v.backing = "file:" + slowDisk(t, p.file, m.size+128*mib)
	}
	if m.journal == "external" {
		v.journal = "file:" + filepath.Join(t.TempDir(), "journal.img")
	}
	if m.flush != "" {
		v.extra = append(v.extra, "--flush", m.flush)
	}
	if m.staleness != "" {
		v.extra = append(v.extra, "--staleness", m.staleness)
	}
	p.s = serveRamshelf(t, v)
	return p
}

// slowDisk shows the file, made with the size, as one whose writes take a millisecond and a bandwidth.
func slowDisk(t testing.TB, path string, bytes int64) string {
	t.Helper()
	sparse(t, path, bytes)
	disk := newNBDKit(t, path, "--filter=delay", "--filter=rate", "file", path, "wdelay=1ms", "rate=1600M")
	disk.start()
	file, _ := fuseDisk(t, disk.uri())
	return file
}

// The load: connections with the queue depths, and what they do.
var cutDepths = []int{1, 8, 32, 64}

const (
	cutMaxSectors = 256 * kib / sectorBytes
	cutHotSectors = mib / sectorBytes // half of the requests go here
)

// load begins to load the volume and returns a function that waits until the daemon has cut every connection.
func (p *powerCut) load() (wait func()) {
	p.hot = rand.Int64N(int64(len(p.h.base)) - cutHotSectors)
	var wg sync.WaitGroup
	var answers atomic.Int64
	for _, depth := range cutDepths {
		wg.Go(func() { p.client(depth, &answers) })
	}
	wg.Go(p.poll)
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	return func() {
		p.t.Helper()
		select {
		case <-ended:
		case <-time.After(time.Minute):
			p.t.Fatal("a connection of a dead daemon does not end")
		}
		p.tally.Writes += int(answers.Load())
	}
}

func (p *powerCut) client(depth int, answers *atomic.Int64) {
	c, err := dialNBD(p.s.socket(), p.s.export())
	if err != nil {
		return // killed already
	}
	defer c.Conn.Close()
	rng := rand.New(rand.NewPCG(rand.Uint64(), 1))
	pipe := newPipe(c, depth, func(o *operation, errno syscall.Errno) {
		if p.answer(o, errno) {
			answers.Add(1)
		}
	})
	for pipe.submit(func(o *operation) { p.next(o, rng) }) {
	}
	<-pipe.readEnd
}

// next fills an operation: of a hundred 10 are reads, 2 FLUSHes, 5 zeroings, of which some are long, the rest writes.
func (p *powerCut) next(o *operation, rng *rand.Rand) {
	if o.data == nil {
		o.data = make([]byte, cutMaxSectors*sectorBytes)
	}
	total := int64(len(p.h.base))
	sectors := 1 + rng.Int64N([]int64{8, 16, 64, cutMaxSectors}[rng.IntN(4)])
	dice := rng.IntN(100)
	if dice >= 95 && rng.IntN(8) == 0 {
		sectors = 1 + rng.Int64N(total>>(1+rng.IntN(12)))
	}
	first := rng.Int64N(total - sectors + 1)
	if sectors <= cutHotSectors && rng.IntN(2) == 0 {
		first = p.hot + rng.Int64N(cutHotSectors-sectors+1)
	}
	if rng.IntN(3) == 0 && sectors >= 8 { // blocks, as most clients write them
		first, sectors = first&^7, sectors&^7
	}
	o.flags, o.off, o.length = 0, first*sectorBytes, int(sectors*sectorBytes)
	switch {
	case dice < 10:
		o.cmd, o.sent = cmdRead, p.h.sending()
		return
	case dice < 12:
		o.cmd, o.off, o.length = cmdFlush, 0, 0
		o.id = p.h.send(opMark, 0, 0)
		return
	case dice < 95:
		o.cmd, o.id = cmdWrite, p.h.send(opWrite, first, sectors)
		for i := range sectors {
			putStamp(o.data[i*sectorBytes:][:sectorBytes], first+i, o.id, first, int(sectors), p.h.run)
		}
	default:
		o.cmd, o.id = []uint16{cmdWriteZeroes, cmdTrim}[rng.IntN(2)], p.h.send(opZero, first, sectors)
	}
	if rng.IntN(40) == 0 {
		o.flags = flagFUA
	}
}

// answer records an answer and reports whether it is that of a write or zeroing.
func (p *powerCut) answer(o *operation, errno syscall.Errno) bool {
	if errno != 0 {
		p.h.fault("command %d at %d+%d: %v", o.cmd, o.off, o.length, errno)
		return false
	}
	switch o.cmd {
	case cmdRead:
		first := o.off / sectorBytes
		saw := make([]uint64, o.length/sectorBytes)
		if p.h.readStamps(first, o.data[:o.length], saw) {
			p.h.read(first, saw, o.sent, p.m.mustRead())
		}
		return false
	case cmdFlush:
		p.h.answered(o.id, p.m.mustFlush())
		return false
	}
	p.h.answered(o.id, p.m.mustWrite(o.flags&flagFUA != 0))
	return true
}

// readStamps reads which writes the sectors show, and reports whether their stamps are sound.
func (h *history) readStamps(first int64, data []byte, shown []uint64) bool {
	sound := true
	for i := range shown {
		var fault string
		if shown[i], fault = readStamp(first+int64(i), data[i*sectorBytes:][:sectorBytes], h.run); fault != "" {
			h.fault("%s", fault)
			sound = false
		}
	}
	return sound
}

// pollInterval is the pause between two looks at the status.
const pollInterval = 5 * time.Millisecond

// poll looks at the status until the daemon is gone, over HTTP: starting a program each time would be most of the load.
func (p *powerCut) poll() {
	control := p.s.control
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", control)
	}}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport, Timeout: 30 * time.Second}
	for ; ; time.Sleep(pollInterval) {
		id := p.h.send(opMark, 0, 0)
		r, err := client.Get("http://ramshelf/v1/status")
		if err != nil {
			return
		}
		var all struct{ Volumes []volumeStatus }
		err = json.NewDecoder(r.Body).Decode(&all)
		r.Body.Close()
		if err != nil {
			return
		}
		if len(all.Volumes) != 1 {
			p.h.fault("the status names %d volumes", len(all.Volumes))
			return
		}
		p.h.polled(id, all.Volumes[0].Epoch.Open, all.Volumes[0].Epoch.Committed)
	}
}

// lose kills the daemon and takes its memory.
func (p *powerCut) lose() {
	p.t.Helper()
	p.s.kill()
	p.wipe()
}

func (p *powerCut) wipe() {
	p.t.Helper()
	for _, path := range memoryFilesIn(p.t, p.s.shm) {
		if err := os.Remove(path); err != nil {
			p.t.Fatal(err)
		}
	}
}

func memoryFilesIn(t testing.TB, dir string) []string {
	t.Helper()
	paths, err := filepath.Glob(dir + "/*")
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// The ways in which power is cut.
const (
	cutUnderLoad  = iota
	cutInDrain    // while a clean stop is under way; it may be over
	cutInRecovery // again, while the daemon starts
	cutTwice      // again, under load that began at once
	cutWays
)

// loadTime is how long a load works before the power is cut: shorter than an epoch, and now and then some epochs.
func loadTime() time.Duration {
	d := 30*time.Millisecond + rand.N(300*time.Millisecond)
	if rand.IntN(8) == 0 {
		d *= 6
	}
	return d
}

// cut loads the volume, cuts the power in the given way, and returns what the volume shows then.
func (p *powerCut) cut(way int) []uint64 {
	p.t.Helper()
	for range 1 + btoi(way == cutTwice) {
		if p.s.p.ended() {
			p.s.start()
		}
		wait := p.load()
		time.Sleep(loadTime())
		if way == cutInDrain {
			p.s.p.signal(syscall.SIGTERM)
			time.Sleep(rand.N(100 * time.Millisecond))
		}
		clean := way == cutInDrain && p.s.p.ended() && p.s.p.code() == 0
		if clean {
			p.wipe()
		} else {
			p.lose()
		}
		wait()
		if clean {
			p.h.settle("the daemon stopped cleanly")
		}
		p.h.power()
		p.tally.Cuts++
	}
	for range btoi(way == cutInRecovery) * (1 + rand.IntN(2)) {
		p.s.launch()
		time.Sleep(rand.N(80 * time.Millisecond))
		p.lose()
		p.tally.Cuts++
	}
	p.s.start()
	return p.read()
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// read reads which writes the whole volume shows.
func (p *powerCut) read() []uint64 {
	p.t.Helper()
	shown := make([]uint64, len(p.h.base))
	var wg sync.WaitGroup
	var next atomic.Int64
	for range 2 {
		wg.Go(func() {
			c, err := dialNBD(p.s.socket(), p.s.export())
			if err != nil {
				p.h.fault("connect: %v", err)
				return
			}
			defer c.close()
			c.SetDeadline(time.Now().Add(commandLimit))
			data := make([]byte, mib)
			for {
				off := next.Add(mib) - mib
				if off >= p.m.size {
					return
				}
				if err := c.do(cmdRead, 0, off, data); err != nil {
					p.h.fault("read at %d: %v", off, err)
					return
				}
				p.h.readStamps(off/sectorBytes, data, shown[off/sectorBytes:][:mib/sectorBytes])
			}
		})
	}
	wg.Wait()
	return shown
}

// readHome reads which writes the backing shows after a clean stop.
func (p *powerCut) readHome() []uint64 {
	p.t.Helper()
	f, err := os.Open(p.file)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	shown := make([]uint64, len(p.h.base))
	data := make([]byte, mib)
	for off := int64(0); off < p.m.size; off += mib {
		if _, err := io.ReadFull(io.NewSectionReader(f, off, mib), data); err != nil {
			p.t.Fatal(err)
		}
		p.h.readStamps(off/sectorBytes, data, shown[off/sectorBytes:][:mib/sectorBytes])
	}
	return shown
}

// judge judges what the volume shows, and begins a new history with it.
func (p *powerCut) judge(what string, shown []uint64, judge func(*history, []uint64) string) {
	p.t.Helper()
	for _, fault := range p.h.faults {
		p.t.Errorf("%s: %s", what, fault)
	}
	if len(p.h.faults) == 0 {
		begin := time.Now()
		if fault := judge(p.h, shown); fault != "" {
			p.t.Errorf("%s: %s", what, fault)
			p.keepEvidence(fault, shown)
		}
		lost := p.h.rolledBack(shown)
		p.tally.RolledBack = max(p.tally.RolledBack, lost)
		p.tally.Marks += p.h.marks()
		p.t.Logf("%s: %d requests, judged in %v, rolled back %v", what, len(p.h.requests), time.Since(begin).Round(time.Millisecond), lost)
	}
	if p.t.Failed() {
		p.t.FailNow()
	}
	p.h.advance(shown)
}

// keepEvidence writes down the history and what the volume shows, for who has to find out why.
func (p *powerCut) keepEvidence(fault string, shown []uint64) {
	p.t.Helper()
	if p.evidence == "" {
		return
	}
	f := create(p.t, p.evidence)
	defer f.Close()
	w := bufio.NewWriter(f)
	defer w.Flush()
	fmt.Fprintf(w, "%+v\n%s\n\nid kind sectors sent done answered life why it must be there, or what it returned\n", p.m, fault)
	for i, r := range p.h.requests {
		fmt.Fprintln(w, p.h.past+1+uint64(i), r.kind, fmt.Sprintf("%d+%d", r.first, r.sectors), r.sent, r.done, r.answered, r.life, r.must, r.saw)
	}
	fmt.Fprintln(w, "\nsectors, what they show, and what they showed before")
	for s := 0; s < len(shown); {
		n := 1
		for s+n < len(shown) && shown[s+n] == shown[s] && p.h.base[s+n] == p.h.base[s] {
			n++
		}
		fmt.Fprintf(w, "%d+%d %d %d\n", s, n, shown[s], p.h.base[s])
		s += n
	}
	p.t.Logf("the history is in %s", p.evidence)
}

// run cuts the power until the tally has the number of cuts or the time is over, and stops the daemon under load.
func (p *powerCut) run(cuts int, deadline time.Time) {
	p.t.Helper()
	for way := rand.IntN(cutWays); p.tally.Cuts < cuts && time.Now().Before(deadline); way = (way + 1) % cutWays {
		shown := p.cut(way)
		p.judge(fmt.Sprintf("cut %d, way %d", p.tally.Cuts, way), shown, p.m.judge)
	}
	wait := p.load()
	time.Sleep(100 * time.Millisecond)
	cleanStop(p.t, p.s)
	wait()
	p.h.settle("the daemon stopped cleanly")
	p.h.power()
	p.judge("clean stop", p.readHome(), (*history).judge)
}

// campaign is what was done of a soak by this call and those before, per mode, in a file.
type campaign struct {
	path  string // "" where nothing is kept
	modes map[string]tally
}

// outDir is where the tests of this repository leave what outlives them.
func outDir(t testing.TB) string {
	t.Helper()
	dir, err := filepath.Abs("../../out")
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func openCampaign(t testing.TB, name string) *campaign {
	t.Helper()
	c := &campaign{modes: make(map[string]tally)}
	if !soak {
		return c
	}
	c.path = filepath.Join(outDir(t), "soak", name+".json")
	if err := os.MkdirAll(filepath.Dir(c.path), 0o755); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(c.path)
	if err == nil {
		err = json.Unmarshal(text, &c.modes)
	}
	if err != nil && !os.IsNotExist(err) {
		t.Fatalf("take up the soak of %s: %v", c.path, err)
	}
	return c
}

func (c *campaign) add(t testing.TB, mode string, a tally) {
	t.Helper()
	sum := c.modes[mode]
	c.modes[mode] = tally{sum.Cuts + a.Cuts, sum.Writes + a.Writes, sum.Marks + a.Marks, max(sum.RolledBack, a.RolledBack)}
	if c.path == "" {
		return
	}
	text, err := json.MarshalIndent(c.modes, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, c.path+".new", string(text))
	if err := os.Rename(c.path+".new", c.path); err != nil {
		t.Fatal(err)
	}
}

// TestPowerCut cuts the power of every kind of volume at random moments. A soak takes up where the last one stopped, and
// ends when all is done or its time, RAMSHELF_SOAK_MINUTES, is over.
func TestPowerCut(t *testing.T) {
	cuts := (count("RAMSHELF_CUTS", 40, 2000) + len(cutModes) - 1) / len(cutModes)
	deadline := time.Now().Add(time.Duration(count("RAMSHELF_SOAK_MINUTES", 90, 90)) * time.Minute)
	chunk := 40 // of one volume: more than a superblock remembers
	c := openCampaign(t, "powercut")
	for again := true; again && time.Now().Before(deadline); {
		again = false
		for _, m := range cutModes {
			left := cuts - c.modes[m.name].Cuts
			if left <= 0 || time.Now().After(deadline) {
				continue
			}
			again = true
			t.Run(m.name, func(t *testing.T) {
				p := newPowerCut(t, m, volume{})
				p.evidence = filepath.Join(outDir(t), "powercut-"+strings.ReplaceAll(m.name, " ", "-")+".txt")
				p.run(min(left, chunk), deadline)
				c.add(t, m.name, p.tally)
			})
			if t.Failed() {
				return
			}
		}
	}
	for _, m := range cutModes {
		a := c.modes[m.name]
		t.Logf("%-12s %5d cuts, %9d writes answered, %6d marks, rolled back %v at most", m.name, a.Cuts, a.Writes, a.Marks, a.RolledBack.Round(time.Millisecond))
		if a.Writes < 10*a.Cuts || a.Marks == 0 && a.Cuts > 0 {
			t.Errorf("%s: the load does not load, or nothing tells what must survive", m.name)
		}
	}
}

// TestPowerCutControls shows that the oracle is content with what it must be content with and nothing else: a daemon that is
// killed and keeps its memory rolls nothing back and tears nothing; without a journal a power cut leaves a mixture.
func TestPowerCutControls(t *testing.T) {
	t.Run("memory is kept", func(t *testing.T) {
		p := newPowerCut(t, cutMode{journal: "none", ack: "ram", staleness: "50ms", size: 256 * mib}, volume{})
		for i := range 3 {
			wait := p.load()
			time.Sleep(loadTime())
			p.s.kill()
			wait()
			p.h.settle("it was answered and the memory is there")
			p.h.power()
			p.s.start()
			p.judge(fmt.Sprintf("kill %d", i), p.read(), (*history).judge)
		}
	})
	t.Run("no journal", func(t *testing.T) {
		p := newPowerCut(t, cutMode{journal: "none", ack: "ram", staleness: "10ms", size: 256 * mib}, volume{})
		for range 20 {
			shown := p.cut(cutUnderLoad)
			if fault := p.h.judge(shown); fault != "" {
				t.Logf("found: %.1000s", fault)
				return
			}
			p.h.advance(shown)
		}
		t.Error("a mixture of older and newer blocks passes")
	})
}

// cutPlants are the bugs of a planted build that cuts of the power must find, and the volumes that show them.
var cutPlants = []struct {
	bug string
	m   cutMode
}{
	{"drain-skips", cutMode{journal: "none", ack: "disk", size: 64 * mib}},
	{"commit-skips", cutMode{journal: "internal", ack: "disk", size: 64 * mib}},
	{"ack-before-commit", cutMode{journal: "internal", ack: "disk", size: 64 * mib}},
	{"tail-early", cutMode{journal: "internal", ack: "disk", size: 64 * mib}},
	{"home-before-commit", cutMode{journal: "internal", ack: "ram", staleness: "100ms", size: 64 * mib}},
}

// TestPowerCutPlanted cuts the power of a build with a bug until it is found, and of the same build without it.
func TestPowerCutPlanted(t *testing.T) {
	binary, err := plantedBinary()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range cutPlants {
		for _, bug := range []string{"", row.bug} {
			t.Run(row.bug+"="+bug, func(t *testing.T) {
				p := newPowerCut(t, row.m, volume{binary: binary, env: []string{"RAMSHELF_PLANT=" + bug}})
				limit := 60 // cuts to find the bug; far fewer show that there is none to find
				if bug == "" {
					limit = 2
				}
				probe := &probe{TB: t}
				done := make(chan struct{})
				go func() {
					defer close(done)
					p.t, p.s.t = probe, probe
					for way := 0; p.tally.Cuts < limit; way = (way + 1) % cutWays {
						shown := p.cut(way)
						p.judge(fmt.Sprintf("cut %d, way %d", p.tally.Cuts, way), shown, p.m.judge)
					}
				}()
				<-done
				p.s.t = t
				switch found := probe.found(); {
				case bug == "" && found != "":
					t.Errorf("without the bug:\n%s", found)
				case bug != "" && found == "":
					t.Errorf("%d cuts do not find %s", p.tally.Cuts, bug)
				case bug != "":
					t.Logf("found after %d cuts: %.300s", p.tally.Cuts, found)
				}
			})
		}
	}
}
