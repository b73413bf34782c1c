package main

import (
	"bytes"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/nbd"
)

func TestResize(t *testing.T) {
	at, content := killed(t)
	verb := []string{"resize", "--backing", "file:" + at.backing, "--shm", at.shm}
	expect(t, append(verb, "--size", "40M"), control.ExitRefused, at.shm+"/vol.mem", "hint: start ramshelf serve")
	if err := os.Remove(at.shm + "/vol.mem"); err != nil {
		t.Fatal(err)
	}
	expect(t, append(verb, "--size", "8M"), control.ExitRefused, "volume vol has 16777216 bytes and cannot shrink to 8388608", "hint: make a volume of that size")
	expect(t, append(verb, "--size", "40M"), control.ExitDone, "recovered", "volume vol had 16 MiB and has 40 MiB, on a backing of ")
	expect(t, append(verb, "--size", "40M"), control.ExitDone, "volume vol has 40 MiB: nothing to do")

	// The file grows by itself.
	info, err := os.Stat(at.backing)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(at.backing, info.Size()+10<<20); err != nil {
		t.Fatal(err)
	}
	d := start(t, at.args("--size", "40M")...)
	if code := d.wait(); code != control.ExitRefused || !strings.Contains(d.stderr.String(), at.backing+" has grown: the metadata of volume vol, of 41943040 bytes") ||
		!strings.Contains(d.stderr.String(), "hint: run ramshelf resize --backing file:"+at.backing) {
		t.Errorf("serve on a backing that has grown: exit code %d\n%s", code, d.stderr)
	}
	expect(t, []string{"recover", "--backing", "file:" + at.backing, "--shm", at.shm}, control.ExitRefused, "has grown", "hint: run ramshelf resize")
	if left, err := os.ReadDir(at.shm); err != nil || len(left) > 0 {
		t.Errorf("left in --shm: %v, %v", left, err)
	}
	expect(t, append(verb, "--size", "40M"), control.ExitDone, "looking for one before it", "had 40 MiB and has 40 MiB")

	d = start(t, at.args("--size", "41M")...)
	if code := d.wait(); code != control.ExitRefused || !strings.Contains(d.stderr.String(), "ramshelf resize makes it larger") {
		t.Errorf("serve with a larger size: exit code %d\n%s", code, d.stderr)
	}
	d = start(t, at.args("--size", "40M")...)
	d.ready()
	expect(t, append(verb, "--size", "50M"), control.ExitRefused, at.backing, "in use", "hint: stop the daemon")
	transfer(t, at, func(c *nbd.Client) error {
		want := make([]byte, c.Size())
		copy(want[8192:], content)
		got := make([]byte, c.Size())
		_, err := c.ReadAt(got, 0)
		if len(got) != 40<<20 || !bytes.Equal(got, want) {
			t.Errorf("the volume of %d bytes is not what it was, and zeroes", len(got))
		}
		return err
	})
	d.signal(syscall.SIGTERM)
	if code := d.wait(); code != control.ExitDone {
		t.Errorf("exit code %d\n%s", code, d.stderr)
	}
}

func TestResizeRefuses(t *testing.T) {
	dir := newPlace(t).dir
	external, _ := killed(t, "--journal", "file:"+dir+"/journal.img")
	none := t.TempDir() + "/none.img"
	if err := os.WriteFile(none, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args  []string
		code  control.ExitCode
		words []string
	}{
		{nil, control.ExitUsage, []string{"--backing is required", "hint: "}},
		{[]string{"--backing", "file:/x"}, control.ExitUsage, []string{"--size is required", "hint: "}},
		{[]string{"--backing", "file:/x", "--size", "10k5"}, control.ExitUsage, []string{"10k5"}},
		{[]string{"--backing", "file:/x", "--size", "1048064"}, control.ExitUsage, []string{"1048064", "4096", "hint: the nearest are 1044480 and 1048576"}},
		{[]string{"--backing", "file:/x", "--size", "1P"}, control.ExitUsage, []string{"1125899906842624", "70368744177664"}},
		{[]string{"--backing", "file:/x", "--size", "1G", "--journal", "file:/y"}, control.ExitUsage, []string{"unknown flag: --journal"}},
		{[]string{"--backing", "stripe:(a,b)", "--size", "1G"}, control.ExitFailed, []string{"stripe:(a,b)", "lands later"}},
		{[]string{"--backing", "file:" + none + ".missing", "--size", "1G"}, control.ExitFailed, []string{none + ".missing", "does not exist"}},
		{[]string{"--backing", "file:" + none, "--size", "1G"}, control.ExitFailed, []string{none, "holds no volume"}},
		{[]string{"--backing", "file:" + external.backing, "--size", "1G"}, control.ExitFailed, []string{external.backing, "holds no volume"}},
		{[]string{"--backing", "file:" + dir + "/journal.img", "--size", "1G"}, control.ExitRefused, []string{"is the journal of volume vol"}},
	} {
		expect(t, append([]string{"resize"}, c.args...), c.code, c.words...)
		gone(t, none+".missing")
	}
}
