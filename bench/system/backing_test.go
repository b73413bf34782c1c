package system

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// shadow is a volume with a copy of what it must hold: the answered writes of one client.
type shadow struct {
	t    testing.TB
	s    server
	rng  *rand.Rand
	want []byte
	c    *nbdConn
	last [][2]int64 // what the last write wrote: offset and bytes
}

func newShadow(t testing.TB, s server, size int64) *shadow {
	t.Helper()
	return &shadow{t: t, s: s, rng: rand.New(rand.NewPCG(1, 2)), want: make([]byte, size), c: mustDial(t, s)}
}

// write makes n random writes to the range, each of which must be answered well. Writes aligned to sectors need
// nothing from the backing.
func (h *shadow) write(n int, off, bytes, align int64) {
	h.t.Helper()
	h.last = h.last[:0]
	for range n {
		p := make([]byte, (1+h.rng.Int64N(64*kib/align))*align)
		for i := range p {
			p[i] = byte(h.rng.Uint32())
		}
		at := off + h.rng.Int64N((bytes-int64(len(p)))/align)*align
		h.last = append(h.last, [2]int64{at, int64(len(p))})
		if err := h.c.do(cmdWrite, 0, at, p); err != nil {
			h.t.Fatalf("write %d at %d: %v", len(p), at, err)
		}
		copy(h.want[at:], p)
	}
}

// check reads the range and compares it.
func (h *shadow) check(what string, off, length int64) {
	h.t.Helper()
	got := make([]byte, mib)
	for at := off; at < off+length; at += mib {
		if err := h.c.do(cmdRead, 0, at, got); err != nil {
			h.t.Fatalf("%s: read at %d: %v", what, at, err)
		}
		if !bytes.Equal(got, h.want[at:at+mib]) {
			h.t.Fatalf("%s: the MiB at %d is not what was written", what, at)
		}
	}
}

// checkLast reads back what the last write wrote, which is in memory.
func (h *shadow) checkLast(what string) {
	h.t.Helper()
	for _, w := range h.last {
		got := make([]byte, w[1])
		if err := h.c.do(cmdRead, 0, w[0], got); err != nil {
			h.t.Fatalf("%s: read %d at %d: %v", what, w[1], w[0], err)
		}
		if !bytes.Equal(got, h.want[w[0]:w[0]+w[1]]) {
			h.t.Fatalf("%s: %d bytes at %d are not what was written", what, w[1], w[0])
		}
	}
}

// checkFile compares the backing file after a clean stop.
func (h *shadow) checkFile(path string) {
	h.t.Helper()
	got := make([]byte, len(h.want))
	f, err := os.Open(path)
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(got, 0); err != nil {
		h.t.Fatal(err)
	}
	if !bytes.Equal(got, h.want) {
		h.t.Errorf("the backing file is not what was written")
	}
}

const backingBytes = 64 * mib

// faulty is a backing that can be broken and healed.
type faulty struct {
	*nbdkit
	file       string
	breakIt    func()
	heal       func()
	tellsFlush bool // a FLUSH is answered with an error meanwhile, rather than waiting
}

// errorFilter is a file behind nbdkit's error filter, whose operations fail while a trigger file exists.
func errorFilter(t testing.TB, tells bool, params ...string) *faulty {
	t.Helper()
	dir := t.TempDir()
	file, trigger := sparse(t, dir+"/backing.img", backingBytes+16*mib), dir+"/inject"
	args := []string{"--filter=error", "file", file}
	for _, p := range params {
		args = append(args, strings.ReplaceAll(p, "TRIGGER", trigger))
	}
	f := &faulty{nbdkit: newNBDKit(t, file, args...), file: file, tellsFlush: tells}
	f.breakIt = func() { writeFile(t, trigger, "") }
	f.heal = func() { os.Remove(trigger) }
	return f
}

// plainFile is a file behind nbdkit, to be stopped or killed.
func plainFile(t testing.TB) *faulty {
	t.Helper()
	file := sparse(t, filepath.Join(t.TempDir(), "backing.img"), backingBytes+16*mib)
	return &faulty{nbdkit: newNBDKit(t, file, "file", file), file: file}
}

// failingFlush is a file whose flush fails while a trigger file exists, which the error filter cannot do.
func failingFlush(t testing.TB) *faulty {
	t.Helper()
	dir := t.TempDir()
	file, trigger := sparse(t, dir+"/backing.img", backingBytes+16*mib), dir+"/inject"
	f := &faulty{file: file, tellsFlush: true}
	f.nbdkit = newNBDKit(t, file, "eval",
		fmt.Sprintf("get_size=echo %d", backingBytes+16*mib),
		"can_write=exit 0", "can_flush=exit 0", "thread_model=echo parallel",
		fmt.Sprintf("pread=dd if=%s iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=1M status=none", file),
		fmt.Sprintf("pwrite=dd of=%s iflag=fullblock oflag=seek_bytes seek=$4 bs=1M conv=notrunc status=none", file),
		fmt.Sprintf("flush=if [ -e %s ]; then echo EIO the disk is gone >&2; exit 1; fi", trigger))
	f.breakIt = func() { writeFile(t, trigger, "") }
	f.heal = func() { os.Remove(trigger) }
	return f
}

// TestBackingFaults breaks the backing in every way, and heals it: nothing is lost, what is in memory is served,
// the status tells, FLUSH tells, and in the end the backing is the volume.
func TestBackingFaults(t *testing.T) {
	for _, row := range []struct {
		name string
		make func(t *testing.T) *faulty
	}{
		{"writes fail", func(t *testing.T) *faulty {
			return errorFilter(t, true, "error-pwrite=EIO", "error-pwrite-rate=100%", "error-pwrite-file=TRIGGER")
		}},
		{"no space", func(t *testing.T) *faulty {
			return errorFilter(t, true, "error-pwrite=ENOSPC", "error-pwrite-rate=100%", "error-pwrite-file=TRIGGER")
		}},
		{"flush fails", func(t *testing.T) *faulty { return failingFlush(t) }},
		{"hangs", func(t *testing.T) *faulty {
			f := plainFile(t)
			f.breakIt = func() { syscall.Kill(f.pid(), syscall.SIGSTOP) }
			f.heal = func() { syscall.Kill(f.pid(), syscall.SIGCONT) }
			return f
		}},
		{"vanishes", func(t *testing.T) *faulty {
			f := plainFile(t)
			f.breakIt, f.heal = f.kill, f.start
			return f
		}},
	} {
		for _, journal := range []string{"internal", "none"} {
			t.Run(row.name+"/"+journal, func(t *testing.T) { backingFault(t, row.make(t), journal) })
		}
	}
}

func backingFault(t *testing.T, f *faulty, journal string) {
	f.start()
	s := serveRamshelf(t, volume{size: backingBytes, memory: 96 * mib, backing: f.uri(), journal: journal,
		extra: []string{"--flush", "disk", "--staleness", "200ms"}})
	h := newShadow(t, s, backingBytes)
	const half = backingBytes / 2
	h.write(100, 0, half/2, 1)
	if err := h.c.do(cmdFlush, 0, 0, nil); err != nil {
		t.Fatalf("flush of a sound backing: %v", err)
	}

	f.breakIt()
	h.write(100, half, half/2, sectorBytes)
	eventually(t, 30*time.Second, "the status tells that the backing is not well", func() bool {
		return s.status().Backing.State != "ok"
	})
	st := s.status()
	t.Logf("broken: backing %s, volume %s, %d bytes dirty", st.Backing.State, st.State, st.DirtyBytes)
	if st.DirtyBytes == 0 {
		t.Error("nothing is dirty while nothing can go home")
	}
	h.checkLast("while the backing is broken")

	// A second connection flushes; it is told, or waits until the backing is well.
	flusher := mustDial(t, s)
	flushed := make(chan error, 1)
	go func() { flushed <- flusher.do(cmdFlush, 0, 0, nil) }()
	if f.tellsFlush {
		select {
		case err := <-flushed:
			if err != syscall.EIO {
				t.Errorf("FLUSH over a broken backing: %v, want EIO", err)
			}
		case <-time.After(60 * time.Second):
			t.Fatal("FLUSH over a broken backing is not answered")
		}
		if r := s.cli("flush"); r.code != 1 || r.stderr == "" {
			t.Errorf("ramshelf flush over a broken backing: exit code %d, %s", r.code, r.stderr)
		}
	} else {
		select {
		case err := <-flushed:
			if err == nil {
				t.Error("FLUSH was answered well while the backing did not answer")
			}
			flushed <- err
		case <-time.After(time.Second):
		}
	}
	h.write(20, half, half/2, sectorBytes)
	if st := s.status(); st.DirtyBytes == 0 {
		t.Error("a failed write or sync turned something clean")
	}

	f.heal()
	eventually(t, 60*time.Second, "the backing is well again", func() bool { return s.status().Backing.State == "ok" })
	if !f.tellsFlush {
		<-flushed
	}
	if err := h.c.do(cmdFlush, 0, 0, nil); err != nil {
		t.Errorf("FLUSH after the backing has healed: %v", err)
	}
	s.flush()
	if st := s.status(); st.DirtyBytes != 0 || st.State != "ok" {
		t.Errorf("after the flush %d bytes are dirty and the state is %s", st.DirtyBytes, st.State)
	}
	h.write(20, 0, backingBytes, 1)
	h.check("after the backing has healed", 0, backingBytes)
	cleanStop(t, s)
	f.stop()
	h.checkFile(f.file)
}

// TestAckDiskTells checks that under ack=disk the write itself is told, and only after the commit answered.
func TestAckDiskTells(t *testing.T) {
	f := errorFilter(t, true, "error-pwrite=EIO", "error-pwrite-rate=100%", "error-pwrite-file=TRIGGER")
	f.start()
	s := serveRamshelf(t, volume{size: backingBytes, memory: 96 * mib, ack: "disk", journal: "none", backing: f.uri()})
	h := newShadow(t, s, backingBytes)
	h.write(20, 0, backingBytes, 1)
	// Answered means home where there is no journal: the file has it although nobody asked for a flush.
	h.checkFile(f.file)
	f.breakIt()
	p := bytes.Repeat([]byte("x"), 5000)
	if err := h.c.do(cmdWrite, 0, 12345, p); err != syscall.EIO {
		t.Errorf("write over a broken backing: %v, want EIO", err)
	}
	f.heal()
	eventually(t, 60*time.Second, "the backing is well again", func() bool { return s.status().Backing.State == "ok" })
	if err := h.c.do(cmdWrite, 0, 12345, p); err != nil {
		t.Errorf("write over a healed backing: %v", err)
	}
	copy(h.want[12345:], p)
	h.check("in the end", 0, backingBytes)
	cleanStop(t, s)
	h.checkFile(f.file)
}

// TestReadErrors fails the reads of the backing: what is in memory is served, the rest is an error and no zeros.
func TestReadErrors(t *testing.T) {
	f := errorFilter(t, false, "error-pread=EIO", "error-pread-rate=100%", "error-pread-file=TRIGGER")
	content := bytes.Repeat([]byte("backing "), backingBytes/8)
	if err := os.WriteFile(f.file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	os.Truncate(f.file, backingBytes+16*mib)
	f.start()
	s := serveRamshelf(t, volume{size: backingBytes, memory: 32 * mib, backing: f.uri()})
	c := mustDial(t, s)
	f.breakIt()
	p := bytes.Repeat([]byte("memory "), 4096)
	if err := c.do(cmdWrite, 0, 8*mib, p); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(p))
	if err := c.do(cmdRead, 0, 8*mib, got); err != nil || !bytes.Equal(got, p) {
		t.Errorf("read of what is in memory: %v", err)
	}
	if err := c.do(cmdRead, 0, 32*mib, got); err != syscall.EIO {
		t.Errorf("read of what cannot be read: %v, want EIO", err)
	}
	// A sector is written into a block whose rest cannot be read: it is answered, and completed later.
	if err := c.do(cmdWrite, 0, 40*mib+512, bytes.Repeat([]byte("s"), 512)); err != nil {
		t.Errorf("write of a sector: %v", err)
	}
	f.heal()
	eventually(t, 30*time.Second, "reads are served again", func() bool { return c.do(cmdRead, 0, 32*mib, got) == nil })
	if !bytes.Equal(got, content[32*mib:][:len(got)]) {
		t.Error("a read after the backing has healed gives something else")
	}
	cleanStop(t, s)
	copy(content[8*mib:], p)
	copy(content[40*mib+512:], bytes.Repeat([]byte("s"), 512))
	if home := slurp(f.file); home[:backingBytes] != string(content) {
		t.Error("the backing file is not what was written")
	}
}

// TestSlowAndFlaky works over a backing that is slow and fails one operation in ten, and is killed now and then.
func TestSlowAndFlaky(t *testing.T) {
	dir := t.TempDir()
	file := sparse(t, dir+"/backing.img", backingBytes+16*mib)
	trigger := dir + "/inject"
	f := newNBDKit(t, file, "--filter=error", "--filter=delay", "file", file, "wdelay=3ms", "rdelay=1ms",
		"error-pwrite=EIO", "error-pwrite-rate=10%", "error-pwrite-file="+trigger,
		"error-pread=EIO", "error-pread-rate=10%", "error-pread-file="+trigger)
	f.start()
	s := serveRamshelf(t, volume{size: backingBytes, memory: 48 * mib, backing: f.uri(), extra: []string{"--staleness", "100ms"}})
	l := newLedger(t, backingBytes)
	var failedReads atomic.Int64
	eio := func(e syscall.Errno) bool { failedReads.Add(1); return e == syscall.EIO }
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() { defer close(ended); crashLoad.run(s, l, stop, eio) }()
	time.Sleep(500 * time.Millisecond)
	writeFile(t, trigger, "")
	for range 2 {
		time.Sleep(500 * time.Millisecond)
		f.kill()
		time.Sleep(300 * time.Millisecond)
		f.start()
	}
	time.Sleep(500 * time.Millisecond)
	os.Remove(trigger)
	close(stop)
	<-ended
	eventually(t, 60*time.Second, "the backing is well again", func() bool { return s.status().Backing.State == "ok" })
	t.Logf("%d writes answered, %d requests failed", l.answers, failedReads.Load())
	l.restarted()
	l.verifyData(readAll(t, s, 0, backingBytes), false)
	cleanStop(t, s)
	l.verifyFile(t, file)
	if l.answers < 100 {
		t.Errorf("only %d writes were answered", l.answers)
	}
}
