package system

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The janitor is a second process of the test binary. It is told of everything that would outlive this process
// (daemons, mounts, loop devices, directories in /dev/shm), and removes what is left of it when its input ends,
// however this process ended: a test timeout and a kill run no cleanup of ours.
const janitorEnv = "RAMSHELF_SYSTEM_JANITOR"

// Kinds of things that the janitor can remove.
const (
	keepPID   = "pid"   // PID START: a process, named with its start time so that a reused number is left alone
	keepMount = "mount" // a mount point
	keepFuse  = "fuse"  // a FUSE mount point
	keepLoop  = "loop"  // a loop device
	keepDir   = "dir"   // a directory
)

var janitor struct {
	sync.Mutex
	pipe *os.File
	cmd  *exec.Cmd
}

func startJanitor() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), janitorEnv+"=1")
	cmd.Stdin = r
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	janitor.pipe, janitor.cmd = w, cmd
	return nil
}

// stopJanitor lets the janitor remove what is left and waits for it.
func stopJanitor() {
	janitor.pipe.Close()
	janitor.cmd.Wait()
}

// keep tells the janitor of a thing; the function that it returns takes it off the list again.
func keep(kind, what string) (drop func()) {
	say := func(sign string) {
		janitor.Lock()
		defer janitor.Unlock()
		fmt.Fprintf(janitor.pipe, "%s%s %s\n", sign, kind, what)
	}
	say("+")
	return sync.OnceFunc(func() { say("-") })
}

func keepProcess(pid int) (drop func()) {
	return keep(keepPID, fmt.Sprintf("%d %s", pid, startTime(pid)))
}

// startTime is field 22 of /proc/PID/stat, "" when there is no such process.
func startTime(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	if fields := strings.Fields(rest); len(fields) > 19 {
		return fields[19]
	}
	return ""
}

// janitorMain is the janitor's life.
func janitorMain() {
	var things []string
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		line := lines.Text()
		if strings.HasPrefix(line, "+") {
			things = append(things, line[1:])
			continue
		}
		for i := len(things) - 1; i >= 0; i-- {
			if things[i] == line[1:] {
				things = append(things[:i], things[i+1:]...)
				break
			}
		}
	}
	// Dead servers turn what hangs into errors, so the rest can let go.
	for _, kind := range []string{keepPID, keepMount, keepFuse, keepLoop, keepDir} {
		for i := len(things) - 1; i >= 0; i-- {
			if what, ok := strings.CutPrefix(things[i], kind+" "); ok {
				discard(kind, what)
			}
		}
	}
}

func discard(kind, what string) {
	switch kind {
	case keepPID:
		number, start, _ := strings.Cut(what, " ")
		if pid, err := strconv.Atoi(number); err == nil && start != "" && startTime(pid) == start {
			syscall.Kill(pid, syscall.SIGCONT)
			syscall.Kill(pid, syscall.SIGKILL)
		}
	case keepMount, keepFuse:
		if quietly("umount", what) != nil {
			quietly("umount", "-l", what)
		}
	case keepLoop:
		quietly("losetup", "-d", what)
	case keepDir:
		os.RemoveAll(what)
	}
}

// quietly runs a command for at most 10 seconds.
func quietly(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	return cmd.Run()
}

// TestJanitor checks that what a killed test leaves behind goes away.
func TestJanitor(t *testing.T) {
	dir := t.TempDir()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	victim := exec.Command("sleep", "1000")
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	go func() { victim.Wait(); close(gone) }()
	bystander := exec.Command("sleep", "1000")
	if err := bystander.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { bystander.Process.Kill(); bystander.Wait() }()
	if err := os.Mkdir(dir+"/left", 0o700); err != nil {
		t.Fatal(err)
	}

	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), janitorEnv+"=1")
	cmd.Stdin = r
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.Close()
	fmt.Fprintf(w, "+dir %s/left\n", dir)
	fmt.Fprintf(w, "+pid %d %s\n", victim.Process.Pid, startTime(victim.Process.Pid))
	fmt.Fprintf(w, "+pid %d %s\n", bystander.Process.Pid, startTime(bystander.Process.Pid))
	fmt.Fprintf(w, "-pid %d %s\n", bystander.Process.Pid, startTime(bystander.Process.Pid))
	w.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-gone:
	case <-time.After(10 * time.Second):
		victim.Process.Kill()
		t.Error("the janitor left a process running")
	}
	if _, err := os.Stat(dir + "/left"); !os.IsNotExist(err) {
		t.Errorf("the janitor left a directory: %v", err)
	}
	if bystander.Process.Signal(syscall.Signal(0)) != nil || startTime(bystander.Process.Pid) == "" {
		t.Error("the janitor killed a process that was taken off its list")
	}
}
