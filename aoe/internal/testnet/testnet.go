// Package testnet gives tests a network of their own: a network namespace that ends with the test binary, so that whatever a
// test makes of interfaces leaves nothing behind.
package testnet

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// inside says in the environment that the process is in its namespace.
const inside = "RAMSHELF_TESTNET"

// Main is TestMain of a package that needs a network: it runs the tests in a new namespace, and exits.
func Main(m *testing.M) {
	if os.Getenv(inside) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	err := cmd.Run()
	exit := (*exec.ExitError)(nil)
	switch {
	case err == nil:
		os.Exit(0)
	case errors.As(err, &exit) && exit.Exited():
		os.Exit(exit.ExitCode())
	}
	fmt.Fprintln(os.Stderr, "run the tests in a network namespace:", err)
	os.Exit(1)
}

// Pair makes two interfaces that are joined by a cable and up, with the MTU in bytes. They go with the test.
func Pair(t testing.TB, a, b string, mtu int) {
	t.Helper()
	m := strconv.Itoa(mtu)
	IP(t, "link", "add", a, "mtu", m, "type", "veth", "peer", "name", b, "mtu", m)
	t.Cleanup(func() { IP(t, "link", "del", a) })
	for _, name := range []string{a, b} {
		IP(t, "link", "set", name, "addrgenmode", "none", "up")
	}
	Await(t, a)
	Await(t, b)
}

// Await waits until the interface carries frames: the kernel loses them for a moment after it was set up.
func Await(t testing.TB, name string) {
	t.Helper()
	for range 3000 {
		out, err := exec.Command("ip", "-o", "link", "show", "dev", name).Output()
		if err != nil {
			t.Fatalf("ip link show %s: %v", name, err)
		}
		if bytes.Contains(out, []byte(" state UP ")) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("interface %s does not come up", name)
}

// IP runs ip(8).
func IP(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %v: %v\n%s", args, err, out)
	}
}
