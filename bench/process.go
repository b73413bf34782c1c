package bench

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// clockTick is the unit of times in /proc/PID/stat: USER_HZ is 100 on every architecture that Go runs on.
const clockTick = 10 * time.Millisecond

// CPU is the processor time, user and system, that process pid has used so far, with all its threads, the
// children that it has waited for and the descendants that still run. The kernel counts exactly and rounds to
// 10 ms.
func CPU(pid int) (time.Duration, error) {
	const tries = 10
	for range tries {
		before, err := statOf(pid)
		if err != nil {
			return 0, err
		}
		descendants, err := descendantsOf(pid)
		if err != nil {
			return 0, err
		}
		own, err := statOf(pid)
		if err != nil {
			return 0, err
		}
		if own.reaped != before.reaped {
			// A child was waited for meanwhile: it would count twice, or not at all.
			continue
		}
		total := own.used + own.reaped
		for _, d := range descendants {
			total += d.used + d.reaped
		}
		return total, nil
	}
	return 0, fmt.Errorf("read processor time: process %d waited for a child in each of %d readings", pid, tries)
}

// stat is what this package needs of /proc/PID/stat (proc_pid_stat(5)).
type stat struct {
	pid, parent int
	used        time.Duration // utime + stime
	reaped      time.Duration // cutime + cstime: of children that were waited for
}

func statOf(pid int) (stat, error) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return stat{}, fmt.Errorf("read processor time: %w", err)
	}
	return parseStat(text)
}

// parseStat reads a line of /proc/PID/stat. The name of the program stands in parentheses and may hold
// spaces and parentheses itself, so the fields are counted from the last one.
func parseStat(text []byte) (stat, error) {
	open, end := bytes.IndexByte(text, '('), bytes.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return stat{}, fmt.Errorf("parse process stat: no program name in %.40q", text)
	}
	fields := strings.Fields(string(text[end+1:]))
	if len(fields) < 15 {
		return stat{}, fmt.Errorf("parse process stat: %d fields after the name, want at least 15", len(fields))
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text[:open])))
	if err != nil {
		return stat{}, fmt.Errorf("parse process stat: %w", err)
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		return stat{}, fmt.Errorf("parse process stat: %w", err)
	}
	s := stat{pid: pid, parent: parent}
	for i, total := range []*time.Duration{&s.used, &s.used, &s.reaped, &s.reaped} {
		ticks, err := strconv.ParseInt(fields[11+i], 10, 64)
		if err != nil {
			return stat{}, fmt.Errorf("parse process stat: %w", err)
		}
		*total += time.Duration(ticks) * clockTick
	}
	return s, nil
}

// descendantsOf gives every running process below root. A process that ends meanwhile is left out: its time
// is then in its parent's.
func descendantsOf(root int) ([]stat, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	children := map[int][]stat{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if s, err := statOf(pid); err == nil {
			children[s.parent] = append(children[s.parent], s)
		}
	}
	var found []stat
	for queue := []int{root}; len(queue) > 0; queue = queue[1:] {
		for _, s := range children[queue[0]] {
			found = append(found, s)
			queue = append(queue, s.pid)
		}
	}
	return found, nil
}

// Memory is what a process has resident, in bytes (proc_pid_status(5)).
type Memory struct {
	Resident  int64 // VmRSS: the sum of the others
	Anonymous int64 // heap and stacks
	File      int64 // the program itself
	Shared    int64 // shared memory, tmpfs files included
}

// MemoryOf gives the resident memory of process pid.
func MemoryOf(pid int) (Memory, error) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return Memory{}, fmt.Errorf("read process memory: %w", err)
	}
	return parseMemory(string(text))
}

func parseMemory(text string) (Memory, error) {
	var m Memory
	want := map[string]*int64{"VmRSS": &m.Resident, "RssAnon": &m.Anonymous, "RssFile": &m.File, "RssShmem": &m.Shared}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		field, ok := want[name]
		if !ok {
			continue
		}
		kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			return Memory{}, fmt.Errorf("parse process memory: %w", err)
		}
		*field = kib << 10
		delete(want, name)
	}
	if len(want) > 0 {
		return Memory{}, errors.New("parse process memory: VmRSS, RssAnon, RssFile or RssShmem is missing")
	}
	return m, nil
}

// DiskBytes is the space that the regular files below dir take, holes not counted.
func DiskBytes(dir string) (int64, error) {
	var total int64
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		total += blockBytes(info)
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("measure files: %w", err)
	}
	return total, nil
}
