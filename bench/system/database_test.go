package system

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A database is a database engine as a judge: its files lie in a directory of the volume.
type database interface {
	create()               // makes an empty database with the tables entry and tally
	start()                // recovers and serves
	stop()                 // ends in order
	processes() []*process // those that run and are not clients
	begin() string         // the statement that begins a transaction
	client() command       // how a client that reads SQL is started
	shell() []string       // and its arguments
	query(sql string) (string, error)
	// check runs the engine's own checks over everything. from and to are what tally held when check or create was last
	// called, and what it holds now.
	check(from, to []int) error
}

// tables are the same for every engine. Each connection writes rows of its own; tally holds how far it came. A transaction adds a
// row, takes the oldest away and counts, so all that a connection left behind follows from the last number.
var tables = []string{
	"CREATE TABLE entry (conn INTEGER NOT NULL, id INTEGER NOT NULL, payload TEXT NOT NULL, PRIMARY KEY (conn, id))",
	"CREATE TABLE tally (conn INTEGER NOT NULL PRIMARY KEY, last INTEGER NOT NULL, commits INTEGER NOT NULL)",
}

// kept is how many rows a connection keeps.
const kept = 30

// transaction is the SQL of a connection's transaction, on one line. It prints its number once COMMIT has returned.
func transaction(begin string, conn, id int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s; INSERT INTO entry VALUES (%d, %d, '%s'); ", begin, conn, id, payload(conn, id))
	if id > kept {
		fmt.Fprintf(&b, "DELETE FROM entry WHERE conn = %d AND id = %d; ", conn, id-kept)
	}
	fmt.Fprintf(&b, "UPDATE tally SET last = %d, commits = commits + 1 WHERE conn = %d; COMMIT; SELECT %d;\n", id, conn, id)
	return b.String()
}

// payload is what the row holds: mostly some hundred bytes, sometimes some pages.
func payload(conn, id int) string {
	rng := rand.New(rand.NewPCG(uint64(conn), uint64(id)))
	b := make([]byte, 20+rng.IntN(400))
	if rng.IntN(16) == 0 {
		b = make([]byte, 4000+rng.IntN(12000))
	}
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return hex.EncodeToString(b)
}

// state reads the last transaction of each connection, and checks that every row is what these leave.
func state(db database) ([]int, error) {
	out, err := db.query("SELECT conn, last, commits FROM tally ORDER BY conn")
	if err != nil {
		return nil, err
	}
	var found []int
	for line := range strings.Lines(out) {
		var conn, last, commits int
		if _, err := fmt.Sscan(line, &conn, &last, &commits); err != nil || conn != len(found) || commits != last {
			return nil, fmt.Errorf("tally holds conn, last, commits = %q for connection %d", strings.TrimSpace(line), len(found))
		}
		found = append(found, last)
	}
	if out, err = db.query("SELECT conn, id, payload FROM entry ORDER BY conn, id"); err != nil {
		return nil, err
	}
	rest := out
	for conn, last := range found {
		for id := max(1, last-kept+1); id <= last; id++ {
			var line string
			line, rest, _ = strings.Cut(rest, "\n")
			if want := fmt.Sprintf("%d\t%d\t%s", conn, id, payload(conn, id)); line != want {
				return nil, fmt.Errorf("entry holds %.60q… where tally (%d) wants %.60q…", line, last, want)
			}
		}
	}
	if rest != "" {
		return nil, fmt.Errorf("entry holds rows that tally knows nothing of: %.60q…", rest)
	}
	return found, nil
}

// commits is the ledger of a load: which transactions were sent, and which COMMITs had returned when the power was cut.
type commits struct {
	mu     sync.Mutex
	base   []int         // what each connection had before
	sent   [][]time.Time // by connection, from the transaction base+1 on
	done   [][]time.Time
	closed time.Time // the cut; zero before
	faults []error   // of clients before the cut
}

func newCommits(base []int) *commits {
	return &commits{base: base, sent: make([][]time.Time, len(base)), done: make([][]time.Time, len(base))}
}

// send gives the number of the connection's next transaction, which goes out now.
func (l *commits) send(conn int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent[conn] = append(l.sent[conn], time.Now())
	return l.base[conn] + len(l.sent[conn])
}

// answered notes that the transaction sent last has returned. After the cut it counts no more: it is there or is not.
func (l *commits) answered(conn int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed.IsZero() {
		l.done[conn] = append(l.done[conn], time.Now())
	}
}

func (l *commits) fault(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed.IsZero() {
		l.faults = append(l.faults, err)
	}
}

func (l *commits) failed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.faults) > 0
}

// close ends the ledger, before anything is killed.
func (l *commits) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = time.Now()
}

// answers is how many COMMITs returned before the cut.
func (l *commits) answers() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, done := range l.done {
		n += len(done)
	}
	return n
}

// loss is what a power cut took of what had been answered.
type loss struct {
	commits int
	age     time.Duration // from the answer of the oldest to the cut
}

// judge compares what is found with the ledger, which is closed. What is found must be a prefix: no transaction is there that was
// sent after the answer of one that is not. It tells what was answered and is gone.
func (l *commits) judge(found []int) (loss, error) {
	var lost loss
	if len(l.faults) > 0 {
		return lost, fmt.Errorf("a client failed before the cut: %w", l.faults[0])
	}
	if len(found) != len(l.base) {
		return lost, fmt.Errorf("%d connections are found, want %d", len(found), len(l.base))
	}
	var newest time.Time
	for conn, last := range found {
		n := last - l.base[conn]
		if n < 0 {
			return lost, fmt.Errorf("connection %d is back at transaction %d, and had recovered with %d", conn, last, l.base[conn])
		}
		if n > len(l.sent[conn]) {
			return lost, fmt.Errorf("connection %d has transaction %d, which was not sent", conn, last)
		}
		if n > 0 && l.sent[conn][n-1].After(newest) {
			newest = l.sent[conn][n-1]
		}
	}
	for conn, last := range found {
		gone := l.done[conn][min(last-l.base[conn], len(l.done[conn])):]
		if len(gone) == 0 {
			continue
		}
		if gone[0].Before(newest) {
			return lost, fmt.Errorf("transaction %d of connection %d is gone, and one is there that was sent %v after its answer",
				last+1, conn, newest.Sub(gone[0]))
		}
		lost.commits += len(gone)
		lost.age = max(lost.age, l.closed.Sub(gone[0]))
	}
	return lost, nil
}

// session is a client that runs transactions, one after the other.
type session struct {
	*process
	in    *os.File
	lines *bufio.Scanner
}

func openSession(t testing.TB, db database) *session {
	t.Helper()
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := db.client()
	c.stdin, c.stdout = inR, outW
	args := db.shell()
	s := &session{process: c.start(t, args[0], args[1:]...), in: inW, lines: bufio.NewScanner(outR)}
	inR.Close()
	outW.Close()
	t.Cleanup(func() { inW.Close(); outR.Close() })
	return s
}

// run runs transactions until the client dies.
func (s *session) run(begin string, conn int, l *commits) {
	for {
		id := l.send(conn)
		if _, err := s.in.WriteString(transaction(begin, conn, id)); err != nil {
			l.fault(fmt.Errorf("connection %d: %w: %s", conn, err, s.stderr()))
			return
		}
		if !s.lines.Scan() {
			l.fault(fmt.Errorf("connection %d ended: %s", conn, s.stderr()))
			return
		}
		if got := s.lines.Text(); got != strconv.Itoa(id) {
			l.fault(fmt.Errorf("connection %d: transaction %d printed %q: %s", conn, id, got, s.stderr()))
			return
		}
		l.answered(conn)
	}
}

// connections is how many clients load a database.
const connections = 4

// loadAndCut lets clients commit until ready says so, and cuts the power.
func loadAndCut(t testing.TB, m *machine, db database, base []int, ready func(l *commits) bool) *commits {
	t.Helper()
	l := newCommits(base)
	users := db.processes()
	var wg sync.WaitGroup
	for conn := range base {
		s := openSession(t, db)
		users = append(users, s.process)
		wg.Go(func() { s.run(db.begin(), conn, l) })
	}
	eventually(t, commandLimit, "the load has come far enough", func() bool { return l.failed() || ready(l) })
	l.close()
	m.cut(users...)
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Fatal("a client outlives the cut")
	}
	return l
}

// during is a load of a random time.
func during(least, most time.Duration) func(*commits) bool {
	end := time.Now().Add(least + rand.N(most-least))
	return func(l *commits) bool { return time.Now().After(end) && l.answers() > 0 }
}

// found starts machine and database after a cut and has everything checked but the ledger: the file system, the database
// by its own means, the rows. before is what the database held before the load.
func found(m *machine, db database, before []int) ([]int, error) {
	m.t.Helper()
	m.on()
	m.recover()
	db.start()
	now, err := state(db)
	if err != nil {
		return nil, err
	}
	return now, db.check(before, now)
}

// populate makes the file system and the database, which then runs.
func populate(t testing.TB, m *machine, db database) []int {
	t.Helper()
	m.on()
	m.format()
	db.create()
	db.start()
	for _, sql := range tables {
		mustQuery(t, db, sql)
	}
	base := make([]int, connections)
	for conn := range base {
		mustQuery(t, db, fmt.Sprintf("INSERT INTO tally VALUES (%d, 0, 0)", conn))
	}
	if err := db.check(base, base); err != nil {
		t.Fatal(err)
	}
	// MariaDB's tables without transactions, its help for one, are synced by nobody.
	run(t, "sync", "-f", m.point)
	m.s.flush() // with ack = ram that is in RAM until then
	return base
}

func mustQuery(t testing.TB, db database, sql string) {
	t.Helper()
	if _, err := db.query(sql); err != nil {
		t.Fatal(err)
	}
}

// cutKind is a volume whose power is cut.
type cutKind struct {
	ack, journal string
	cache        string // of the disk, see newMachine
}

func (k cutKind) String() string {
	disk := "file"
	if k.cache != "" {
		disk = "disk"
	}
	return fmt.Sprintf("ack-%s-journal-%s-%s", k.ack, k.journal, disk)
}

// powerCuts cuts the power under load, several times, and has the database judge. With ack = disk nothing that was answered may
// be gone; else what is there must be a prefix. The database runs when it returns, and stands at what is returned.
func powerCuts(t *testing.T, kind cutKind, m *machine, db database) (at []int) {
	t.Helper()
	at = populate(t, m, db)
	answers, worst := 0, loss{}
	rounds(t, strings.ReplaceAll(t.Name(), "/", "-"), count("RAMSHELF_DATABASE_CUTS", 3, 50), func(round int) {
		l := loadAndCut(t, m, db, at, during(time.Second, 3*time.Second))
		answers += l.answers()
		began := time.Now()
		now, err := found(m, db, at)
		if err != nil {
			t.Fatalf("cut %d: %v", round, err)
		}
		lost, err := l.judge(now)
		if err != nil {
			t.Fatalf("cut %d: %v", round, err)
		}
		t.Logf("cut %d: %d commits answered, %d lost (%.2f s), recovered and checked in %.1f s",
			round, l.answers(), lost.commits, lost.age.Seconds(), time.Since(began).Seconds())
		if kind.ack == "disk" && lost.commits > 0 {
			t.Fatalf("cut %d: %d commits were answered and are gone", round, lost.commits)
		}
		worst.commits, worst.age, at = max(worst.commits, lost.commits), max(worst.age, lost.age), now
	})
	t.Logf("%d commits answered; at worst %d were lost, of %.2f s", answers, worst.commits, worst.age.Seconds())
	return at
}

// checkLieIsFound is the negative control: over a disk that lies about flushes a power cut takes answered commits, and the
// judge must see it. All else is in order, since the disk falls back to what it held when it was started.
func checkLieIsFound(t *testing.T, m *machine, db database, at []int) []int {
	t.Helper()
	db.stop()
	m.off()
	m.diskCache("unsafe")
	now, err := found(m, db, at)
	if err != nil {
		t.Fatal(err)
	}
	l := loadAndCut(t, m, db, now, func(l *commits) bool { return l.answers() > 100 })
	m.diskCache("writeback")
	if now, err = found(m, db, at); err != nil {
		t.Fatal(err)
	}
	lost, err := l.judge(now)
	if err != nil {
		t.Fatal(err)
	}
	if lost.commits == 0 {
		t.Error("a disk that lies about flushes passes")
	}
	return now
}

// checkObjects is a negative control: what the checks said of a database that was spoilt must hold the word.
func checkObjects(t *testing.T, err error, word string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), word) {
		t.Errorf("the checks say %v of a spoilt database, want: %s", err, word)
	}
}

// undo is the SQL that takes back a connection's last transaction.
func undo(conn, id int) string {
	sql := fmt.Sprintf("DELETE FROM entry WHERE conn = %d AND id = %d; ", conn, id)
	if id > kept {
		sql += fmt.Sprintf("INSERT INTO entry VALUES (%d, %d, '%s'); ", conn, id-kept, payload(conn, id-kept))
	}
	return sql + fmt.Sprintf("UPDATE tally SET last = %d, commits = commits - 1 WHERE conn = %d", id-1, conn)
}

// TestCommitLedger judges by hand-made ledgers of two connections.
func TestCommitLedger(t *testing.T) {
	start := time.Now()
	at := func(seconds ...int) []time.Time {
		var times []time.Time
		for _, s := range seconds {
			times = append(times, start.Add(time.Duration(s)*time.Second))
		}
		return times
	}
	// Connection 0: 11 sent at 1, answered at 3; 12 from 4 to 6; 13 sent at 7. Connection 1: 21 from 2 to 5; 22 sent at 8.
	l := &commits{
		base: []int{10, 20}, closed: start.Add(10 * time.Second),
		sent: [][]time.Time{at(1, 4, 7), at(2, 8)}, done: [][]time.Time{at(3, 6), at(5)},
	}
	for _, row := range []struct {
		found []int
		lost  loss
		fault string
	}{
		{found: []int{12, 21}},
		{found: []int{13, 22}},
		{found: []int{12, 22}},
		{found: []int{10, 20}, lost: loss{3, 7 * time.Second}},
		{found: []int{11, 20}, lost: loss{2, 5 * time.Second}},
		{found: []int{10, 21}, lost: loss{2, 7 * time.Second}},
		{found: []int{12, 20}, lost: loss{1, 5 * time.Second}},
		{found: []int{11, 21}, lost: loss{1, 4 * time.Second}},
		{found: []int{13, 20}, fault: "transaction 21 of connection 1 is gone, and one is there that was sent 2s after"},
		{found: []int{10, 22}, fault: "transaction 11 of connection 0 is gone"},
		{found: []int{14, 21}, fault: "not sent"},
		{found: []int{9, 21}, fault: "had recovered with 10"},
		{found: []int{12}, fault: "1 connections"},
	} {
		lost, err := l.judge(row.found)
		switch {
		case row.fault == "" && err != nil:
			t.Errorf("%v: %v", row.found, err)
		case row.fault == "" && lost != row.lost:
			t.Errorf("%v: lost %+v, want %+v", row.found, lost, row.lost)
		case row.fault != "" && (err == nil || !strings.Contains(err.Error(), row.fault)):
			t.Errorf("%v: %v, want: %s", row.found, err, row.fault)
		}
	}
	l.answered(0)
	l.fault(errors.New("late"))
	if _, err := l.judge([]int{12, 21}); err != nil || l.answers() != 3 {
		t.Errorf("what comes after the cut counts: %v", err)
	}
	l.faults = []error{errors.New("gone")}
	if _, err := l.judge([]int{12, 21}); err == nil {
		t.Error("a client that failed before the cut passes")
	}
}
