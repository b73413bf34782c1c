package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

// childEnv makes this test binary be ramshelf.
const childEnv = "RAMSHELF_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// cli runs a command line in this process.
func cli(args ...string) (code control.ExitCode, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = execute(args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestExitCodes(t *testing.T) {
	nobody := filepath.Join(t.TempDir(), "control.sock")
	for _, c := range []struct {
		args []string
		code control.ExitCode
		want string // of stdout and stderr
	}{
		{[]string{}, control.ExitDone, "Usage:"},
		{[]string{"--help"}, control.ExitDone, "serve"},
		{[]string{"version"}, control.ExitDone, "ramshelf devel go1."},
		{[]string{"promote", "--help"}, control.ExitDone, "promote"},

		{[]string{"frobnicate"}, control.ExitUsage, `ramshelf: unknown command "frobnicate"`},
		{[]string{"--frobnicate"}, control.ExitUsage, "unknown flag: --frobnicate"},
		{[]string{"status", "--frobnicate"}, control.ExitUsage, "unknown flag: --frobnicate"},
		{[]string{"status", "a", "b"}, control.ExitUsage, "accepts at most 1 arg"},
		{[]string{"version", "a"}, control.ExitUsage, ""},
		{[]string{"serve"}, control.ExitUsage, "name is missing\nhint: --name, --backing and one --listen are required\n"},
		{[]string{"serve", "vol"}, control.ExitUsage, ""},
		{[]string{"serve", "--size", "1,5G"}, control.ExitUsage, `size "1,5G" is not a number`},
		{[]string{"serve", "--ack", "none"}, control.ExitUsage, `"none" is none of [ram peer disk]`},
		{[]string{"serve", "--backing", "/srv/x"}, control.ExitUsage, "say file:/srv/x"},
		{[]string{"serve", "--name", "v", "--backing", "file:/x", "--listen", "nbd://127.0.0.1/v", "--ack", "peer"},
			control.ExitUsage, "--ack peer without --peer"},
		{[]string{"serve", "--name", "v", "--backing", "file:/x", "--listen", "nbd://127.0.0.1/v", "--peer", "b:1"},
			control.ExitFailed, "--peer: lands later"},
		{[]string{"serve", "--name", "v", "--backing", "file:/x", "--listen", "nbd://127.0.0.1/v", "--memory", "60T"},
			control.ExitFailed, " free, and the memory of all volumes with its metadata takes 61 TiB"},
		{[]string{"serve", "--config", "/nowhere.toml"}, control.ExitFailed, "open /nowhere.toml: no such file"},

		{[]string{"status", "--control", nobody}, control.ExitUnreachable, "hint: is it running"},
		{[]string{"flush", "--control", nobody}, control.ExitUnreachable, "no such file"},
		{[]string{"emergency"}, control.ExitUsage, "accepts between 1 and 2 arg(s)"},
		{[]string{"emergency", "now"}, control.ExitUsage, `emergency "now" is neither on nor off`},
		{[]string{"emergency", "on", "a", "b"}, control.ExitUsage, "accepts between 1 and 2 arg(s)"},
		{[]string{"emergency", "on", "--control", nobody}, control.ExitUnreachable, "no such file"},
		{[]string{"emergency", "off", "vol", "--control", nobody}, control.ExitUnreachable, "no such file"},
		{[]string{"flush", "vol", "--control", nobody}, control.ExitUnreachable, "no such file"},
	} {
		code, stdout, stderr := cli(c.args...)
		if code != c.code || !strings.Contains(stdout+stderr, c.want) {
			t.Errorf("ramshelf %v: exit code %d\n%s%swant %d with %q", c.args, code, stdout, stderr, c.code, c.want)
		}
		lines := strings.SplitAfter(stderr, "\n")
		if code != control.ExitDone && (!strings.HasPrefix(stderr, "ramshelf: ") || len(lines) > 3 ||
			len(lines) == 3 && !strings.HasPrefix(lines[1], "hint: ")) {
			t.Errorf("ramshelf %v: the error is not one line and a hint:\n%s", c.args, stderr)
		}
		if code == control.ExitDone && stderr != "" {
			t.Errorf("ramshelf %v: prints to stderr: %s", c.args, stderr)
		}
	}
}

// The verbs whose function lands later have their names already.
func TestLaterVerbs(t *testing.T) {
	for _, args := range [][]string{
		{"promote", "--force"}, {"demote"}, {"verify"}, {"resolve", "--discard-mine", "--dry-run"},
		{"attach", "nbd://h/v", "/dev/nbd0"}, {"detach", "/dev/nbd0"}, {"aoe", "discover"},
		{"bench", "--compare"}, {"check"}, {"events"}, {"top"},
	} {
		code, _, stderr := cli(args...)
		if want := "ramshelf: " + args[0] + ": lands later\n"; code != control.ExitFailed || stderr != want {
			t.Errorf("ramshelf %v: exit code %d, %q; want %d, %q", args, code, stderr, control.ExitFailed, want)
		}
	}
}

func TestDescribe(t *testing.T) {
	v := control.VolumeStatus{
		Name: "vol", Role: "primary", State: "degraded", Ack: "peer", AckInForce: "disk", Clients: 2,
		SizeBytes: 1 << 30, DirtyBytes: 4 << 20, UncommittedBytes: 8192, UncommittedAgeSeconds: 0.31,
		Epoch:       control.Epoch{Open: 7, Committed: 6},
		MemoryBytes: 256 << 20, ResidentBytes: 1 << 20, FreeBytes: 255 << 20, Journal: control.JournalStatus{Kind: "none"},
		Backing: control.BackingStatus{State: "failed", Address: "/dev/sdb", WrittenBytes: 1 << 20, Error: "write: EIO"},
		Exports: []string{"nbd://127.0.0.1:10809/vol"}, DrainRemainingBytes: 4 << 20, LostBlocks: 1,
		Peer: &control.Peer{State: "Connecting", OutOfSyncBytes: 4096},
	}
	const want = `vol role:Primary state:degraded ack:peer (in force: disk) clients:2
  disk:Failed size:1.0 GiB dirty:4.0 MiB uncommitted:8.0 KiB (oldest 0.3s) epoch:7 committed:6
  memory:256 MiB resident:1.0 MiB free:255 MiB journal:none
  backing:/dev/sdb state:failed written:1.0 MiB error:"write: EIO"
  draining: 4.0 MiB left
  lost blocks:1
  peer link:Connecting out-of-sync:4.0 KiB
  export:nbd://127.0.0.1:10809/vol
`
	var b strings.Builder
	describe(&b, &v)
	if got := b.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
