package system

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// crashLoad is what the clients do while the server is killed: small and large writes at any sector, half of them
// to the first MiB so that they overlap, with some zeroing and reading.
var crashLoad = load{
	connections: 4, depths: []int{1, 8, 32, 64}, maxSectors: 128, hotSectors: 2048, readPercent: 10, zeroPercent: 3,
}

// crash runs the load, kills the server at a random moment and starts it again, several times. After every
// restart each answered write must be there, and each write as a whole or not at all.
func crash(t *testing.T, s server, l *ledger, rounds int, whole bool) {
	t.Helper()
	for round := range rounds {
		stop, ended := make(chan struct{}), make(chan struct{})
		go func() { defer close(ended); crashLoad.run(s, l, stop, nil) }()
		time.Sleep(50*time.Millisecond + rand.N(600*time.Millisecond))
		s.kill()
		close(stop)
		select {
		case <-ended:
		case <-time.After(time.Minute):
			t.Fatal("a connection of a killed server does not end")
		}
		if r, ok := s.(*ramshelf); ok {
			crashAgain(t, r, round%2 == 1)
		}
		s.start()
		before := l.faults.Load()
		l.verify(t, s, whole)
		t.Logf("round %d: %d writes sent, %d answered", round, len(l.writes)-1, l.answers)
		if n := l.faults.Load(); n != before {
			t.Fatalf("round %d: %d faults", round, n)
		}
	}
	if l.answers < 100*rounds {
		t.Errorf("only %d writes were answered in %d rounds: the load does not load", l.answers, rounds)
	}
}

// crashAgain kills the daemon while it starts, or while it brings home what the crash left.
func crashAgain(t *testing.T, s *ramshelf, draining bool) {
	t.Helper()
	if draining {
		s.start()
		s.p.signal(syscall.SIGTERM)
		time.Sleep(rand.N(60 * time.Millisecond))
		s.p.kill()
		s.p.wait(t, 30*time.Second)
		return
	}
	for range 2 {
		s.launch()
		time.Sleep(rand.N(60 * time.Millisecond))
		s.p.kill()
		s.p.wait(t, 30*time.Second)
	}
}

const crashBytes = 192 * mib // three times the memory, so that blocks come and go

func TestCrashStamps(t *testing.T) {
	for _, row := range []struct {
		ack    string
		rounds int
	}{{"ram", count("RAMSHELF_KILLS", 6, 30)}, {"disk", count("RAMSHELF_KILLS", 2, 10)}} {
		t.Run(row.ack, func(t *testing.T) {
			s := serveRamshelf(t, volume{size: crashBytes, ack: row.ack, extra: []string{"--staleness", "200ms"}})
			l := newLedger(t, crashBytes)
			crash(t, s, l, row.rounds, true)
			checkRSS(t, s, s.v.memory)
			checkCleanStop(t, s, l)
			checkZeroedIsFound(t, l, s.home())
		})
	}
	t.Run("nbdkit file", func(t *testing.T) {
		s := nbdkitFile(t, crashBytes)
		s.start()
		l := newLedger(t, crashBytes)
		quiet := crashLoad
		quiet.readPercent = 0 // nbdkit does not promise whole blocks to readers
		stop := time.AfterFunc(300*time.Millisecond, s.kill)
		defer stop.Stop()
		quiet.run(s, l, make(chan struct{}), nil)
		s.start()
		l.restarted()
		checkDurable(t, l, readAll(t, s, 0, crashBytes))
		if l.answers < 100 {
			t.Errorf("only %d writes were answered", l.answers)
		}
	})
	t.Run("nbdkit memory loses", func(t *testing.T) {
		s := nbdkitMemory(t, crashBytes)
		s.start()
		l := newLedger(t, crashBytes)
		l.report = func(string) {}
		stop := time.AfterFunc(200*time.Millisecond, s.kill)
		defer stop.Stop()
		crashLoad.run(s, l, make(chan struct{}), nil)
		if n := l.faults.Load(); n != 0 {
			t.Errorf("%d faults before the server was killed", n)
		}
		s.start()
		l.verify(t, s, true)
		if l.faults.Load() == 0 {
			t.Error("a server that lost everything passes")
		}
	})
}

// checkDurable judges only that no answered write is lost, for servers that promise no more.
func checkDurable(t *testing.T, l *ledger, data []byte) {
	t.Helper()
	lost := 0
	for s := range l.floor {
		p := data[s*sectorBytes:][:sectorBytes]
		if done := l.doneOf(l.owner(int64(s), p), int64(s)); done < l.floor[s] {
			lost++
		}
	}
	if lost > 0 {
		t.Errorf("%d sectors lost an answered write", lost)
	}
}

// checkZeroedIsFound is the negative control: the ledger must object to a region of zeros.
func checkZeroedIsFound(t *testing.T, l *ledger, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(make([]byte, 256*kib), 128*kib)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	report := l.report
	defer func() { l.report = report }()
	l.report = func(string) {}
	before := l.faults.Load()
	l.verifyFile(t, path)
	if l.faults.Load() == before {
		t.Error("a zeroed region is not found")
	}
}

// fioCrash are the two halves of recipe R3. The check needs rw=randread in the job file, and a queue depth of 1:
// where fio stops checking it counts the reads that have ended, so with more in flight it runs past the end.
func fioCrash(s server, write bool) string {
	job := fmt.Sprintf(`[global]
ioengine=nbd
uri=%s
bs=4k
verify=crc32c
serialize_overlap=1
size=96m
offset_increment=96m
numjobs=2
thread=1
randseed=42
`, s.uri())
	if write {
		return job + "[crash]\nrw=randwrite\niodepth=16\nrate_iops=8000\ndo_verify=0\nverify_state_save=1\n"
	}
	return job + "[crash]\nrw=randread\niodepth=1\nverify_fatal=1\nverify_state_load=1\n"
}

// fioRound lets fio write, stops the server at a random moment, lets fio save what was answered by then, and
// kills the server at the instruction where it stood. It reports false when fio had not begun.
func fioRound(t *testing.T, s server, dir string) bool {
	t.Helper()
	states, _ := filepath.Glob(dir + "/*.state")
	for _, path := range append(states, dir+"/trigger") {
		os.Remove(path)
	}
	writeFile(t, dir+"/write.fio", fioCrash(s, true))
	// fio ends on the trigger; what it says of a server that is gone is of no interest and much.
	fio := command{dir: dir}.start(t, "sh", "-c",
		"exec fio --trigger-file=trigger --trigger=true --output=write.out write.fio >/dev/null 2>&1")
	time.Sleep(600*time.Millisecond + rand.N(1200*time.Millisecond))
	syscall.Kill(s.pid(), syscall.SIGSTOP)
	writeFile(t, dir+"/trigger", "")
	// A fio that has not connected yet waits for the stopped server and saves nothing.
	saved := false
	for wait := time.Now(); !saved && time.Since(wait) < 20*time.Second; time.Sleep(20 * time.Millisecond) {
		states, _ := filepath.Glob(dir + "/*-verify.state")
		saved = len(states) == 2 && complete(states[0]) && complete(states[1])
	}
	s.kill()
	fio.kill()
	fio.wait(t, 10*time.Second)
	if !saved {
		return false
	}
	states, _ = filepath.Glob(dir + "/*-verify.state")
	for _, path := range states {
		state, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if binary.LittleEndian.Uint64(state[40:]) < 100 { // thread_io_list.numberio
			return false
		}
	}
	return true
}

// complete reports whether fio has written all of a state file: its header gives the size of what follows.
func complete(path string) bool {
	state, err := os.ReadFile(path)
	return err == nil && len(state) >= 48 && uint64(len(state)) == 24+binary.LittleEndian.Uint64(state[8:])
}

func fioCheck(t *testing.T, s server, dir string) (result, string) {
	t.Helper()
	writeFile(t, dir+"/read.fio", fioCrash(s, false))
	r := command{dir: dir}.try(t, "sh", "-c", "exec fio --output=read.out read.fio >/dev/null 2>&1")
	return r, slurp(dir + "/read.out")
}

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func crashFio(t *testing.T, s server, rounds int) {
	t.Helper()
	dir := t.TempDir()
	idle := 0
	for done := 0; done < rounds; {
		if fioRound(t, s, dir) {
			done++
		} else if idle++; idle > 5 {
			t.Fatal("fio never begins to write")
		} else {
			s.start()
			continue
		}
		s.start()
		if r, out := fioCheck(t, s, dir); r.code != 0 {
			t.Fatalf("kill %d: answered writes are missing\n%s", done, strings.Join(strings.SplitN(out, "\n", 20), "\n"))
		}
	}
	// The negative control: fio must object to a region of zeros.
	c := mustDial(t, s)
	for off := int64(0); off < 96*mib; off += mib {
		if err := c.do(cmdWrite, 0, off, make([]byte, mib)); err != nil {
			t.Fatal(err)
		}
	}
	if r, out := fioCheck(t, s, dir); r.code == 0 || !strings.Contains(out, "bad magic header") {
		t.Errorf("fio does not find a zeroed region: exit code %d\n%s", r.code, out)
	}
}

func TestCrashFio(t *testing.T) {
	t.Run("ramshelf", func(t *testing.T) {
		s := serveRamshelf(t, volume{size: crashBytes, extra: []string{"--staleness", "300ms"}})
		crashFio(t, s, count("RAMSHELF_KILLS", 6, 30))
		cleanStop(t, s)
	})
	t.Run("nbdkit file", func(t *testing.T) {
		s := nbdkitFile(t, crashBytes)
		s.start()
		crashFio(t, s, count("RAMSHELF_KILLS", 1, 3))
	})
}

// TestWarmRestart checks what an upgrade that keeps RAM needs: the same flags again after kill -9 serve at once,
// with what was not home.
func TestWarmRestart(t *testing.T) {
	const size = 512 * mib
	s := serveRamshelf(t, volume{size: size, memory: 768 * mib, extra: []string{"--staleness", "1h"}})
	block := func(n int, p []byte) {
		for i := 0; i < blockBytes; i += sectorBytes {
			putStamp(p[i:][:sectorBytes], int64(n)*8+int64(i/sectorBytes), 7, 0, 1, 7)
		}
	}
	order := rand.Perm(32 * mib / blockBytes)
	got, want := make([]byte, blockBytes), make([]byte, blockBytes)
	// dirty writes what must then be found only in memory.
	dirty := func() {
		t.Helper()
		fillRandomly(t, s, size, 2, 32, order, block)
		if dirty := s.status().UncommittedBytes; dirty != 32*mib {
			t.Errorf("uncommitted_bytes is %d after 32 MiB of writes that nothing made go home, want %d", dirty, 32*mib)
		}
		s.kill()
	}
	check := func() {
		t.Helper()
		c := mustDial(t, s)
		defer c.close()
		for _, n := range order {
			if err := c.do(cmdRead, 0, int64(n)*blockBytes, got); err != nil {
				t.Fatal(err)
			}
			if block(n, want); string(got) != string(want) {
				t.Fatalf("block %d is lost", n)
			}
		}
	}
	dirty()
	if home := slurp(s.home()); !allZero([]byte(home[:32*mib])) {
		t.Fatal("something went home before the daemon was killed: the test proves nothing")
	}
	begin := time.Now()
	s.start()
	c := mustDial(t, s)
	if err := c.do(cmdRead, 0, int64(order[0])*blockBytes, got); err != nil {
		t.Fatal(err)
	}
	t.Logf("first answered read %v after the start", time.Since(begin))
	check()

	// Other flags over the same memory file: refused in words, or handled without loss.
	for _, row := range []struct {
		name string
		v    volume
	}{
		{"memory halved", volume{size: size, memory: 384 * mib}},
		{"memory doubled", volume{size: size, memory: 1536 * mib}},
		{"size halved", volume{size: size / 2, memory: 768 * mib}},
		{"size doubled", volume{size: size * 2, memory: 768 * mib}},
	} {
		t.Run(row.name, func(t *testing.T) {
			kept := s.v
			dirty()
			s.v.size, s.v.memory = row.v.size, row.v.memory
			s.launch()
			serves := false
			eventually(t, startLimit, "the daemon serves or refuses", func() bool {
				if s.p.ended() {
					return true
				}
				c, err := dialNBD(s.socket(), s.export())
				if err == nil {
					c.close()
				}
				serves = err == nil
				return serves
			})
			if !serves {
				log := s.p.stderr()
				if c := s.p.code(); c != 1 && c != 5 && c != 64 {
					t.Errorf("refused with %d, want 1, 5 or 64", c)
				}
				t.Logf("refused with %d: %s", s.p.code(), strings.TrimSpace(log))
				if strings.Contains(log, "panic") || strings.Contains(log, "goroutine ") {
					t.Errorf("the refusal is a crash:\n%s", log)
				}
				s.v = kept
				s.start()
			}
			check()
		})
	}
	cleanStop(t, s)
	home := slurp(s.home())
	for _, n := range order {
		if block(n, want); home[n*blockBytes:][:blockBytes] != string(want) {
			t.Fatalf("block %d is not home after SIGTERM", n)
		}
	}
}
