package bench

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Host names the machine and the software that a measurement was made on.
type Host struct {
	Processor string
	Cores     int
	MemoryMiB int64
	Kernel    string
	Go        string
	Commit    string // of the repository in the working directory; "+" behind it: with changes
}

// ThisHost finds out about the machine that it runs on. What cannot be found is "unknown".
func ThisHost() Host {
	return Host{
		Processor: processorName(),
		Cores:     runtime.NumCPU(),
		MemoryMiB: memoryMiB(),
		Kernel:    kernelRelease(),
		Go:        runtime.Version(),
		Commit:    commit(),
	}
}

// String gives the facts in one line.
func (h Host) String() string {
	return fmt.Sprintf("%s, %d cores, %d MiB, Linux %s, %s, commit %s",
		h.Processor, h.Cores, h.MemoryMiB, h.Kernel, h.Go, h.Commit)
}

// LoadAverage is how many threads wanted to run in the last minute, on average, "unknown" where that cannot be
// found.
func LoadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return unknown
	}
	first, _, _ := strings.Cut(string(text), " ")
	return first
}

const unknown = "unknown"

func processorName() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return unknown
	}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func memoryMiB() int64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return int64(info.Totalram) * int64(info.Unit) >> 20
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return unknown
	}
	return unix.ByteSliceToString(u.Release[:])
}

func commit() string {
	out, err := exec.Command("git", "rev-parse", "--short=12", "HEAD").Output()
	if err != nil {
		return "none"
	}
	id := strings.TrimSpace(string(out))
	if changes, err := exec.Command("git", "status", "--porcelain", "--untracked-files=no", ":!docs/BENCHMARKS.md").Output(); err != nil || len(changes) > 0 {
		id += "+"
	}
	return id
}

// blockBytes is the space that a file takes, holes not counted (stat(2), st_blocks).
func blockBytes(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}
