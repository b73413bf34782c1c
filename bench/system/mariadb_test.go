package system

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// mariadb is a MariaDB with the settings under which it promises that a COMMIT that returned survives a power cut, and little memory
// and log, so that pages go out all the time.
type mariadb struct {
	t      testing.TB
	dir    string
	socket string
	p      *process
}

func newMariaDB(t testing.TB, dir string) *mariadb {
	return &mariadb{t: t, dir: dir + "/mariadb", socket: shortDir(t) + "/m.sock"}
}

func (d *mariadb) begin() string         { return "BEGIN" }
func (d *mariadb) client() command       { return command{env: []string{"HOME=" + d.dir}} }
func (d *mariadb) processes() []*process { return []*process{d.p} }

func (d *mariadb) create() {
	d.t.Helper()
	run(d.t, "mariadb-install-db", "--no-defaults", "--user=root", "--datadir="+d.dir, "--skip-test-db",
		"--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=2")
	d.start()
	if _, err := d.sql("", "CREATE DATABASE judge"); err != nil {
		d.t.Fatal(err)
	}
	d.stop()
}

func (d *mariadb) start() {
	d.t.Helper()
	d.p = command{}.start(d.t, "mariadbd", "--no-defaults", "--user=root", "--datadir="+d.dir, "--socket="+d.socket,
		"--pid-file="+d.socket+".pid", "--skip-networking", "--skip-name-resolve", "--performance-schema=OFF",
		"--innodb-flush-log-at-trx-commit=1", "--innodb-doublewrite=ON", "--innodb-log-file-size=8M",
		"--innodb-buffer-pool-size=8M", "--log-bin=bin", "--sync-binlog=1", "--binlog-format=MIXED")
	eventually(d.t, time.Minute, "MariaDB serves", func() bool {
		if d.p.ended() {
			d.t.Fatalf("mariadbd ended with %d:\n%s", d.p.code(), tail(d.p.stderr(), 60))
		}
		_, err := d.sql("", "SELECT 1")
		return err == nil
	})
}

func (d *mariadb) stop() {
	d.t.Helper()
	run(d.t, "kill", strconv.Itoa(d.p.pid()))
	if code := d.p.wait(d.t, time.Minute); code != 0 {
		d.t.Fatalf("mariadbd stopped with %d:\n%s", code, tail(d.p.stderr(), 60))
	}
}

// args are those of a client; --quick hands on rows that come before an error.
func (d *mariadb) args(name, database string) []string {
	return []string{
		name, "--no-defaults", "--socket=" + d.socket, "--batch", "--skip-column-names", "--unbuffered", "--quick",
		"--skip-reconnect", database,
	}
}

func (d *mariadb) shell() []string { return d.args("mariadb", "judge") }

func (d *mariadb) query(sql string) (string, error) { return d.sql("judge", sql) }

func (d *mariadb) sql(database, sql string) (string, error) {
	args := append(d.args("mariadb", database), "-e", sql)
	r := d.client().try(d.t, args[0], args[1:]...)
	if r.code != 0 {
		return r.stdout, fmt.Errorf("mariadb: %.60s: exit code %d: %s", sql, r.code, r.stderr)
	}
	return r.stdout, nil
}

// check checks every table, MariaDB's own included, and the binlog against the tables: it holds exactly the transactions
// between from and to, each of a connection after the one before. What was checked of the binlog is then deleted.
func (d *mariadb) check(from, to []int) error {
	r := d.client().try(d.t, "mariadb-check", "--no-defaults", "--socket="+d.socket, "--all-databases", "--check", "--extended")
	if r.code != 0 {
		return fmt.Errorf("mariadb-check: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	for line := range strings.Lines(r.stdout) {
		if fields := strings.Fields(line); len(fields) != 2 || fields[1] != "OK" {
			return fmt.Errorf("mariadb-check:\n%s", r.stdout)
		}
	}
	if !strings.Contains(r.stdout, "judge.entry ") {
		return fmt.Errorf("mariadb-check leaves out our tables:\n%s", r.stdout)
	}
	return d.checkBinlog(from, to)
}

var inserted = regexp.MustCompile(`INSERT INTO entry VALUES \((\d+), (\d+), `)

func (d *mariadb) checkBinlog(from, to []int) error {
	out, err := d.query("SHOW BINARY LOGS")
	if err != nil {
		return err
	}
	var logs []string
	for line := range strings.Lines(out) {
		logs = append(logs, strings.Fields(line)[0])
	}
	at := slices.Clone(from)
	for i, log := range logs {
		events, err := d.query("SHOW BINLOG EVENTS IN '" + log + "'")
		// A cut leaves half an event where the binlog was being written; MariaDB goes on with the next file. The events before
		// it are there all the same, and have to hold all that the tables have.
		if err != nil && (i == len(logs)-1 || !strings.Contains(err.Error(), "ERROR 1220 ")) {
			return err
		}
		if err := follow(at, events); err != nil {
			return fmt.Errorf("binlog %s: %w", log, err)
		}
	}
	if !slices.Equal(at, to) {
		return fmt.Errorf("the binlog comes to transactions %v, the tables to %v", at, to)
	}
	_, err = d.query("PURGE BINARY LOGS TO '" + logs[len(logs)-1] + "'")
	return err
}

// follow takes the connections on by the transactions that are whole in the events of a binlog.
func follow(at []int, events string) error {
	conn, id := 0, 0
	for event := range strings.Lines(events) {
		fields := strings.SplitN(event, "\t", 6) // Log_name, Pos, Event_type, Server_id, End_log_pos, Info
		if m := inserted.FindStringSubmatch(fields[len(fields)-1]); m != nil {
			conn, _ = strconv.Atoi(m[1])
			id, _ = strconv.Atoi(m[2])
		}
		if len(fields) < 6 || fields[2] != "Xid" || id == 0 {
			continue
		}
		if conn >= len(at) || id != at[conn]+1 {
			return fmt.Errorf("transaction %d of connection %d comes after %v", id, conn, at)
		}
		at[conn], id = id, 0
	}
	return nil
}

// TestMariaDB has MariaDB judge power cuts, and spoils what it judged.
func TestMariaDB(t *testing.T) {
	for _, kind := range []cutKind{
		{ack: "ram", journal: "internal", cache: "writeback"},
		{ack: "disk", journal: "internal", cache: "writeback"},
	} {
		t.Run(kind.String(), func(t *testing.T) {
			m := newMachine(t, kind, volume{size: 512 * mib})
			db := newMariaDB(t, m.point)
			at := powerCuts(t, kind, m, db)
			if kind.ack == "disk" {
				spoilMariaDB(t, m, db, at)
			}
		})
	}
}

// spoilMariaDB are the negative controls.
func spoilMariaDB(t *testing.T, m *machine, db *mariadb, at []int) {
	t.Helper()
	at = checkLieIsFound(t, m, db, at)

	next := slices.Clone(at)
	next[0]++
	mustQuery(t, db, "SET sql_log_bin = 0; "+transaction(db.begin(), 0, next[0]))
	checkObjects(t, db.check(at, next), "the binlog comes to")
	mustQuery(t, db, "SET sql_log_bin = 0; "+undo(0, next[0]))
	if err := db.check(at, at); err != nil {
		t.Fatal(err)
	}
	mustQuery(t, db, transaction(db.begin(), 0, next[0]))
	mustQuery(t, db, "SET sql_log_bin = 0; "+undo(0, next[0]))
	checkObjects(t, db.check(at, at), "the binlog comes to")

	// The binlog ends with Xid (31 bytes) and Stop (23).
	mustQuery(t, db, "RESET MASTER")
	mustQuery(t, db, transaction(db.begin(), 0, next[0])+transaction(db.begin(), 1, next[1]+1))
	next[1]++
	db.stop()
	run(t, "truncate", "-s", "-40", db.dir+"/bin.000001")
	db.start()
	checkObjects(t, db.check(at, next), fmt.Sprintf("the binlog comes to transactions [%d %d ", next[0], at[1]))

	// Page 3 is the root of the table.
	db.stop()
	run(t, "dd", "if=/dev/urandom", "of="+db.dir+"/judge/entry.ibd", "bs=16k", "seek=3", "count=1", "conv=notrunc", "status=none")
	db.start()
	checkObjects(t, db.check(at, at), "mariadb-check")
}
