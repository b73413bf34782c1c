package system

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// sqlite is SQLite in WAL mode, synchronous=FULL. Its log is brought into the database every 100 pages, so that cuts meet
// that as well.
type sqlite struct {
	t    testing.TB
	path string
}

func newSQLite(t testing.TB, dir string) *sqlite {
	return &sqlite{t: t, path: dir + "/judge.db"}
}

func (d *sqlite) begin() string         { return "BEGIN IMMEDIATE" }
func (d *sqlite) client() command       { return command{} }
func (d *sqlite) start()                {}
func (d *sqlite) stop()                 {}
func (d *sqlite) processes() []*process { return nil }

func (d *sqlite) create() {
	d.t.Helper()
	for _, sql := range []string{"PRAGMA journal_mode=WAL", "CREATE TABLE empty (x)"} {
		mustQuery(d.t, d, sql)
	}
}

func (d *sqlite) shell() []string {
	return []string{
		"sqlite3", "-batch", "-bail", "-separator", "\t", "-cmd", ".timeout 60000",
		"-cmd", "PRAGMA synchronous=FULL", "-cmd", ".output /dev/null", "-cmd", "PRAGMA wal_autocheckpoint=100",
		"-cmd", ".output stdout", d.path,
	}
}

func (d *sqlite) query(sql string) (string, error) {
	args := d.shell()
	r := command{}.try(d.t, args[0], append(args[1:], sql)...)
	if r.code != 0 {
		return "", fmt.Errorf("sqlite3: %.60s: exit code %d: %s%s", sql, r.code, r.stdout, r.stderr)
	}
	return r.stdout, nil
}

func (d *sqlite) check(_, _ []int) error {
	for _, row := range []struct{ sql, want string }{
		{"PRAGMA journal_mode", "wal"}, {"PRAGMA synchronous", "2"}, {"PRAGMA integrity_check", "ok"},
	} {
		out, err := d.query(row.sql)
		if err != nil {
			return err
		}
		if got := strings.TrimSpace(out); got != row.want {
			return errors.New("sqlite: " + row.sql + ": " + got)
		}
	}
	return nil
}

// TestSQLite has SQLite judge power cuts, and spoils what it judged.
func TestSQLite(t *testing.T) {
	for _, kind := range []cutKind{
		{ack: "ram", journal: "internal", cache: "writeback"},
		{ack: "disk", journal: "internal"},
		{ack: "disk", journal: "none", cache: "writeback"},
	} {
		t.Run(kind.String(), func(t *testing.T) {
			m := newMachine(t, kind, volume{size: 128 * mib})
			db := newSQLite(t, m.point)
			at := powerCuts(t, kind, m, db)
			if kind.ack == "disk" && kind.cache != "" {
				spoilSQLite(t, m, db, at)
			}
		})
	}
}

// spoilSQLite are the negative controls.
func spoilSQLite(t *testing.T, m *machine, db *sqlite, at []int) {
	t.Helper()
	at = checkLieIsFound(t, m, db, at)

	mustQuery(t, db, fmt.Sprintf("UPDATE entry SET payload = 'older' WHERE conn = 0 AND id = %d", at[0]))
	_, err := state(db)
	checkObjects(t, err, "older")
	mustQuery(t, db, undo(0, at[0]))
	mustQuery(t, db, transaction(db.begin(), 1, at[1]+1))
	now, err := state(db)
	if err != nil || now[0] != at[0]-1 || now[1] != at[1]+1 {
		t.Errorf("a transaction back and one on, the state is %v after %v: %v", now, at, err)
	}
	mustQuery(t, db, "PRAGMA wal_checkpoint(TRUNCATE)")
	root, err := db.query("SELECT rootpage - 1 FROM sqlite_schema WHERE name = 'entry'")
	if err != nil {
		t.Fatal(err)
	}
	run(t, "dd", "if=/dev/urandom", "of="+db.path, "bs=4k", "seek="+strings.TrimSpace(root), "count=1", "conv=notrunc", "status=none")
	checkObjects(t, db.check(at, at), "integrity_check")
}

// TestRolledBack loses all that was answered since the volume was flushed: without a commit in an hour, ack = ram promises no more
// to a power cut. The judge must say so, and that what is left is a prefix.
func TestRolledBack(t *testing.T) {
	m := newMachine(t, cutKind{ack: "ram", journal: "none"}, volume{
		size: 128 * mib, memory: 256 * mib, extra: []string{"--staleness", "1h"},
	})
	db := newSQLite(t, m.point)
	before := populate(t, m, db)
	m.s.flush()
	l := loadAndCut(t, m, db, before, func(l *commits) bool { return l.answers() > 300 })
	now, err := found(m, db, before)
	if err != nil {
		t.Fatal(err)
	}
	lost, err := l.judge(now)
	if err != nil {
		t.Fatal(err)
	}
	if lost.commits != l.answers() || lost.age <= 0 {
		t.Errorf("%d commits were answered, %d lost of %v: want all", l.answers(), lost.commits, lost.age)
	}
}
