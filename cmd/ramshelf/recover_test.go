package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/cmd/internal/node"
	"github.com/ramshelf/ramshelf/nbd"
)

// killed is a volume that was killed after something was written and committed.
func killed(t *testing.T, args ...string) (at place, content []byte) {
	t.Helper()
	at = newPlace(t)
	d := start(t, at.args(args...)...)
	d.ready()
	content = bytes.Repeat([]byte("ramshelf"), 1<<14)
	transfer(t, at, func(c *nbd.Client) error {
		if _, err := c.WriteAt(content, 8192); err != nil {
			return err
		}
		return c.Sync()
	})
	d.signal(syscall.SIGKILL)
	d.wait()
	return at, content
}

// expect runs a command line that must end with the code and say every word.
func expect(t *testing.T, args []string, code control.ExitCode, words ...string) (stdout string) {
	t.Helper()
	got, stdout, stderr := cli(args...)
	if got != code {
		t.Errorf("ramshelf %v: exit code %d, want %d\n%s%s", args, got, code, stdout, stderr)
	}
	for _, word := range words {
		if !strings.Contains(stdout+stderr, word) {
			t.Errorf("ramshelf %v does not say %q:\n%s%s", args, word, stdout, stderr)
		}
	}
	return stdout
}

func TestRecover(t *testing.T) {
	at, content := killed(t)
	verb := []string{"recover", "--backing", "file:" + at.backing, "--shm", at.shm}
	before, err := os.ReadFile(at.backing)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, verb, control.ExitRefused, at.shm+"/vol.mem", "hint: start ramshelf serve")
	if err := os.Remove(at.shm + "/vol.mem"); err != nil {
		t.Fatal(err)
	}
	expect(t, append(verb, "--dry-run"), control.ExitDone, "volume vol size:16 MiB journal:internal seal:", "to write:128 KiB to zero:0 B", "nothing was changed")
	if now, err := os.ReadFile(at.backing); err != nil || !bytes.Equal(now, before) {
		t.Errorf("refused and dry: the backing was changed (%v)", err)
	}

	var r node.Recovery
	if err := json.Unmarshal([]byte(expect(t, append(verb, "--json"), control.ExitDone)), &r); err != nil || !r.Recovered || r.WriteBytes != int64(len(content)) {
		t.Errorf("%+v, %v", r, err)
	}
	if now, err := os.ReadFile(at.backing); err != nil || !bytes.Equal(now[8192:8192+len(content)], content) {
		t.Errorf("what was committed is not home (%v)", err)
	}
	expect(t, verb, control.ExitDone, "it was stopped cleanly: nothing to do")

	d := start(t, at.args()...)
	d.ready()
	expect(t, verb, control.ExitRefused, at.backing, "in use", "hint: stop the daemon")
	transfer(t, at, func(c *nbd.Client) error {
		got := make([]byte, len(content))
		_, err := c.ReadAt(got, 8192)
		if err == nil && !bytes.Equal(got, content) {
			t.Error("the volume is not what it was")
		}
		return err
	})
	d.signal(syscall.SIGTERM)
	if code := d.wait(); code != control.ExitDone {
		t.Errorf("exit code %d\n%s", code, d.stderr)
	}
}

func TestRecoverWithExternalJournal(t *testing.T) {
	dir := newPlace(t).dir
	at, content := killed(t, "--journal", "file:"+dir+"/journal.img")
	if err := os.Remove(at.shm + "/vol.mem"); err != nil {
		t.Fatal(err)
	}
	verb := []string{"recover", "--backing", "file:" + at.backing, "--shm", at.shm}
	expect(t, verb, control.ExitFailed, at.backing+" holds no volume", "hint: ", "--journal")
	expect(t, []string{"recover", "--backing", "file:" + dir + "/journal.img"}, control.ExitRefused, "is the journal of volume vol", "--journal")
	expect(t, append(verb, "--journal", "file:"+dir+"/journal.img"), control.ExitDone, "journal:external", "recovered")
	if now, err := os.ReadFile(at.backing); err != nil || !bytes.Equal(now[8192:8192+len(content)], content) {
		t.Errorf("what was committed is not home (%v)", err)
	}
}

func TestRecoverRefuses(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string][]byte{
		"none.img":   make([]byte, 4<<20),
		"broken.img": append(make([]byte, 3<<20), append([]byte("RSHELFSB"), make([]byte, 1<<20-8)...)...),
		"small.img":  make([]byte, 4096),
	} {
		if err := os.WriteFile(dir+"/"+name, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args  []string
		code  control.ExitCode
		words []string
	}{
		{nil, control.ExitUsage, []string{"--backing is required", "hint: "}},
		{[]string{"vol"}, control.ExitUsage, []string{`unknown command "vol"`}},
		{[]string{"--backing", dir}, control.ExitUsage, []string{"file:" + dir}},
		{[]string{"--backing", "file:" + dir, "--size", "1G"}, control.ExitUsage, []string{"unknown flag: --size"}},
		{[]string{"--backing", "stripe:(file:/a,file:/b)"}, control.ExitFailed, []string{"stripe:", "lands later"}},
		{[]string{"--backing", "file:" + dir + "/x", "--journal", "mirror:(a,b)"}, control.ExitFailed, []string{"--journal mirror:(a,b)", "lands later"}},
		{[]string{"--backing", "file:" + dir + "/x", "--journal", "file:" + dir + "/x"}, control.ExitUsage, []string{dir + "/x", "hint: leave --journal out"}},
		{[]string{"--backing", "file:" + dir + "/missing"}, control.ExitFailed, []string{dir + "/missing", "does not exist"}},
		{[]string{"--backing", "file:" + dir + "/none.img"}, control.ExitFailed, []string{dir + "/none.img", "holds no volume", "hint: ", "--journal"}},
		{[]string{"--backing", "file:" + dir + "/small.img"}, control.ExitFailed, []string{dir + "/small.img", "holds no volume"}},
		{[]string{"--backing", "file:" + dir + "/broken.img"}, control.ExitRefused, []string{dir + "/broken.img", "superblock is damaged", "hint: restore one of the copies"}},
		{[]string{"--backing", "nbd+unix:///?socket=" + dir + "/nobody"}, control.ExitFailed, []string{dir + "/nobody"}},
	} {
		expect(t, append([]string{"recover"}, c.args...), c.code, c.words...)
		gone(t, dir+"/missing")
	}
}

func TestDescribeRecovery(t *testing.T) {
	r := node.Recovery{
		Volume: "vol", SizeBytes: 1 << 30, Journal: "none", Seal: 7, Runs: 3, WriteBytes: 1 << 20, ZeroBytes: 1 << 30, LostBlocks: 1, Lost: []uint64{2},
		Torn: true, Damage: "a seal is missing", PendingZeroBytes: 4096, SuspectBytes: 2 << 20, Suspect: []control.Range{{OffsetBytes: 65536, LengthBytes: 2 << 20}},
		Recovered: true,
	}
	const want = `volume vol size:1.0 GiB journal:none seal:7
  runs:3 to write:1.0 MiB to zero:1.0 GiB
  the last run was never committed
  damaged: a seal is missing
  left by a resize to zero:4.0 KiB
  lost blocks:1
    4.0 KiB at 8192
  suspect:2.0 MiB, which may hold a mixture of older and newer blocks
    2.0 MiB at 65536
  recovered: the backing can be used without ramshelf
`
	if got := describeRecovery(&r); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	r.Suspect = make([]control.Range, fewRanges+1)
	if got := describeRecovery(&r); !strings.Contains(got, "    and more, which --json lists\n") {
		t.Errorf("got\n%s", got)
	}
}

// A volume without journal that was being written says where, whoever is asked, until it is stopped cleanly.
func TestSuspectRegions(t *testing.T) {
	at, content := killed(t, "--journal", "none")
	if err := os.Remove(at.shm + "/vol.mem"); err != nil {
		t.Fatal(err)
	}
	verb := []string{"recover", "--backing", "file:" + at.backing, "--shm", at.shm, "--dry-run"}
	expect(t, verb, control.ExitDone, "journal:none", "suspect:192 KiB, which may hold a mixture", "192 KiB at 0", "nothing was changed")
	d := start(t, at.args("--journal", "none")...)
	d.ready()
	waitFor(t, d, "regions may hold a mixture of older and newer blocks")
	expect(t, []string{"status", "--control", at.control}, control.ExitDone, "if this node loses power now: nothing is lost", "suspect:192 KiB", "192 KiB at 0")
	if v := volumes(t, at)[0]; v.SuspectBytes != 192<<10 || len(v.Suspect) != 1 || v.Suspect[0] != (control.Range{LengthBytes: 192 << 10}) {
		t.Errorf("status --json after %d bytes were written at 8192: %d bytes, %v", len(content), v.SuspectBytes, v.Suspect)
	}
	d.signal(syscall.SIGTERM)
	if code := d.wait(); code != control.ExitDone {
		t.Errorf("exit code %d\n%s", code, d.stderr)
	}
	expect(t, verb, control.ExitDone, "nothing to do")
}
