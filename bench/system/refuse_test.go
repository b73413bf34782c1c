package system

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// refusal is a wrong start and how it must end: a code, and words that name the value and the remedy.
type refusal struct {
	name  string
	setup func(t *testing.T, w *wrong)
	codes []int
	words []string // each must be in what the daemon says; alternatives are separated by |
}

// wrong is a start to be made wrong: flags, the place it may touch, and how it is run.
type wrong struct {
	flags    map[string]string
	extra    []string
	dir      string // everything here must stay as it is
	shm      string
	toml     string
	prefix   []string // a command that runs the daemon
	binary   string
	neighbor *ramshelf
}

func set(flag, value string) func(*testing.T, *wrong) {
	return func(_ *testing.T, w *wrong) { w.flags[flag] = value }
}

func unset(flag string) func(*testing.T, *wrong) {
	return func(_ *testing.T, w *wrong) { delete(w.flags, flag) }
}

func extra(args ...string) func(*testing.T, *wrong) {
	return func(_ *testing.T, w *wrong) { w.extra = args }
}

func config(format string) func(*testing.T, *wrong) {
	return func(_ *testing.T, w *wrong) {
		w.toml = strings.ReplaceAll(format, "DIR", w.dir)
	}
}

const twoVolumes = `[[volume]]
name = "one"
backing = "file:DIR/one.img"
size = "16MiB"
memory = "16MiB"
listen = ["nbd+unix:///%s?socket=DIR/s.sock"]
[[volume]]
name = "%s"
backing = "file:DIR/%s.img"
size = "16MiB"
memory = "16MiB"
listen = ["nbd+unix:///%s?socket=DIR/s.sock"]
`

var refusals = []refusal{
	{"size in furlongs", set("size", "12furlongs"), []int{64}, []string{"12furlongs", "KiB|MiB|unit"}},
	{"size zero", set("size", "0"), []int{64}, []string{"positive"}},
	{"size negative", set("size", "-4096"), []int{64}, []string{"-4096"}},
	{"size odd", set("size", "1000000001"), []int{64}, []string{"1000000001", "1000000000|1000000512|512"}},
	{"size not of blocks", set("size", "67109376"), []int{1, 5, 64}, []string{"67109376", "67108864|4096"}},
	{"size beyond any device", set("size", "9E"), []int{64}, []string{"9E"}},
	{"memory too small", set("memory", "4KiB"), []int{64}, []string{"memory", "4096|4.0 KiB|4 KiB", "at least|least|MiB"}},
	{"memory beyond the machine", set("memory", "1PiB"), []int{1, 64}, []string{"1PiB|1.0 PiB|1 PiB|1125899906842624", "memory|shm"}},
	{"ack unknown", set("ack", "maybe"), []int{64}, []string{"maybe", "ram", "disk"}},
	{"ack peer alone", set("ack", "peer"), []int{64}, []string{"--peer|peer"}},
	{"flush unknown", set("flush", "never"), []int{64}, []string{"never", "disk"}},
	{"staleness zero", set("staleness", "0s"), []int{64}, []string{"0s"}},
	{"staleness a number", set("staleness", "5"), []int{64}, []string{`5`, "5s|1s|unit|ms"}},
	{"name with a slash", set("name", "../vol"), []int{64}, []string{"../vol"}},
	{"no name", unset("name"), []int{64}, []string{"--name"}},
	{"no backing", unset("backing"), []int{64}, []string{"--backing"}},
	{"no listen", unset("listen"), []int{64}, []string{"--listen"}},
	{"backing without kind", set("backing", "/srv/vol.img"), []int{64}, []string{"file:/srv/vol.img"}},
	{"listen without socket", set("listen", "nbd+unix:///vol"), []int{64}, []string{"socket"}},
	{"listen nowhere", set("listen", "nbd+unix:///vol?socket=/nonexistent/dir/s"), []int{1, 64}, []string{"/nonexistent/dir/s"}},
	{"unknown flag", extra("--frobnicate"), []int{64}, []string{"frobnicate"}},
	{"argument", extra("vol"), []int{64}, []string{"vol"}},
	{"peer lands later", extra("--peer", "host:1"), []int{1}, []string{"peer", "later"}},
	{"journal without a kind", set("journal", "/tmp/x"), []int{64}, []string{"journal", "file:/tmp/x"}},

	{"missing disk", set("backing", "/dev/no-such-disk"), []int{1}, []string{"/dev/no-such-disk", "no such|not exist|missing"}},
	{"character device", set("backing", "/dev/null"), []int{1, 5, 64}, []string{"/dev/null", "block device|disk"}},
	{"missing file without size", unset("size"), []int{1, 64}, []string{"--size|give a size"}},
	{"missing folder", set("backing", "file:/nonexistent/dir/vol.img"), []int{1}, []string{"/nonexistent/dir"}},
	{"a directory", func(t *testing.T, w *wrong) {
		w.flags["backing"] = "file:" + w.dir
	}, []int{1, 5, 64}, []string{"DIR", "directory"}},
	{"file smaller than size", func(t *testing.T, w *wrong) {
		sparse(t, w.dir+"/vol.img", 16*mib)
	}, []int{1, 5, 64}, []string{"16 MiB|16.0 MiB|16777216", "32 MiB|32.0 MiB|33554432", "--size|smaller size"}},
	{"disk smaller than size", func(t *testing.T, w *wrong) {
		w.flags["backing"] = loop(t, sparse(t, w.dir+"/disk.img", 16*mib))
	}, []int{1, 5, 64}, []string{"/dev/loop", "--size|smaller size"}},
	{"disk without room for metadata", func(t *testing.T, w *wrong) {
		w.flags["backing"] = loop(t, sparse(t, w.dir+"/disk.img", 32*mib))
	}, []int{1, 5, 64}, []string{"/dev/loop", "--size|--journal"}},
	{"mounted disk", func(t *testing.T, w *wrong) {
		dev := loop(t, sparse(t, w.dir+"/disk.img", 64*mib))
		run(t, "mkfs.ext4", "-q", "-F", dev)
		mount(t, "-r", dev, t.TempDir())
		w.flags["backing"] = dev
	}, []int{5}, []string{"/dev/loop", "busy|in use|used", "umount|unmount|stop|another"}},
	{"disk in use", func(t *testing.T, w *wrong) {
		dev := loop(t, sparse(t, w.dir+"/disk.img", 64*mib))
		f, err := os.OpenFile(dev, os.O_RDWR|os.O_EXCL, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		w.flags["backing"] = dev
	}, []int{5}, []string{"/dev/loop", "busy|in use|used"}},
	{"data at the tail", func(t *testing.T, w *wrong) {
		f := create(t, w.dir+"/disk.img")
		defer f.Close()
		f.Write(bytes.Repeat([]byte("precious"), 64*mib/8))
		w.flags["backing"] = loop(t, w.dir+"/disk.img")
	}, []int{5}, []string{"/dev/loop", "--journal", "--force"}},
	{"backend of nobody", set("backing", "nbd+unix:///?socket=/nonexistent/s"), []int{1}, []string{"/nonexistent/s"}},
	{"no permission", func(t *testing.T, w *wrong) {
		asNobody(t, w)
		sparse(t, w.dir+"/vol.img", 48*mib)
		os.Chmod(w.dir+"/vol.img", 0o600)
	}, []int{1}, []string{"vol.img", "permission"}},
	{"no permission for the folder", func(t *testing.T, w *wrong) { asNobody(t, w) }, []int{1}, []string{"vol.img", "permission"}},

	{"too little shared memory", func(t *testing.T, w *wrong) {
		mount(t, "-t", "tmpfs", "-o", "size=8m", "tmpfs", w.shm)
	}, []int{1, 5, 64}, []string{"--shm|shared memory|SHM", "--memory|memory", "8.0 MiB|8 MiB|8388608|space|room"}},
	{"shm is a file", func(t *testing.T, w *wrong) {
		writeFile(t, w.dir+"/file", "x")
		w.shm = w.dir + "/file"
	}, []int{1, 64}, []string{"/file", "directory|folder"}},
	{"socket in use", func(t *testing.T, w *wrong) {
		w.neighbor = serveRamshelf(t, volume{size: 16 * mib, memory: 16 * mib})
		w.flags["listen"] = nbdURI("vol", w.neighbor.socket())
	}, []int{5}, []string{"nbd.sock", "--listen"}},
	{"control socket in use", func(t *testing.T, w *wrong) {
		w.neighbor = serveRamshelf(t, volume{size: 16 * mib, memory: 16 * mib})
		w.flags["control"] = w.neighbor.control
	}, []int{5}, []string{"control.sock", "--control"}},
	{"volume in use", func(t *testing.T, w *wrong) {
		w.neighbor = serveRamshelf(t, volume{size: 32 * mib, memory: 16 * mib})
		w.flags["backing"] = w.neighbor.v.backing
	}, []int{5}, []string{"home.img", "lock|in use|busy|used"}},
	{"memory file in use", func(t *testing.T, w *wrong) {
		w.neighbor = serveRamshelf(t, volume{size: 32 * mib, memory: 16 * mib})
		w.shm = w.neighbor.shm
	}, []int{5}, []string{"vol", "lock|in use|busy|used"}},
	{"another volume's backing", func(t *testing.T, w *wrong) {
		s := serveRamshelf(t, volume{size: 32 * mib, memory: 16 * mib})
		cleanStop(t, s)
		run(t, "cp", s.home(), w.dir+"/vol.img")
		w.flags["name"] = "other"
	}, []int{5}, []string{"vol.img", "vol", "other|--name", "--force|--name"}},
	{"another size than the backing's", func(t *testing.T, w *wrong) {
		s := serveRamshelf(t, volume{size: 16 * mib, memory: 16 * mib})
		cleanStop(t, s)
		run(t, "cp", s.home(), w.dir+"/vol.img")
	}, []int{1, 5, 64}, []string{"16777216|16 MiB|16.0 MiB", "--size"}},

	{"file that has grown", func(t *testing.T, w *wrong) {
		grown(t, w.dir+"/vol.img")
	}, []int{5}, []string{"vol.img", "has grown", "ramshelf resize", "33554432", "--force"}},
	{"disk that has grown", func(t *testing.T, w *wrong) {
		w.flags["backing"] = loop(t, grown(t, w.dir+"/disk.img"))
	}, []int{5}, []string{"/dev/loop", "has grown", "ramshelf resize", "33554432", "--force"}},

	{"config and flags", extra("--config", "/nonexistent/ramshelf.toml"), []int{64}, []string{"--config", "exclude"}},
	{"unknown key", config("[[volume]]\nname = \"vol\"\nbacking = \"file:DIR/vol.img\"\nsize = \"16MiB\"\nmemmory = \"1MiB\"\nlisten = [\"nbd://127.0.0.1:1/vol\"]\n"),
		[]int{64}, []string{"memmory", "memory|line|:5"}},
	{"broken TOML", config("[[volume]\nname = vol\n"), []int{64}, []string{"ramshelf.toml", "1"}},
	{"two exports of one name", config(fmt.Sprintf(twoVolumes, "same", "two", "two", "same")), []int{64}, []string{"same", "export|name"}},
	{"two volumes of one name", config(fmt.Sprintf(twoVolumes, "a", "one", "two", "b")), []int{64}, []string{"one", "twice|two|name|same"}},
	{"two volumes on one backing", config(fmt.Sprintf(twoVolumes, "a", "two", "one", "b")), []int{64}, []string{"one.img"}},
	{"no volumes", config("control = \"DIR/c.sock\"\n"), []int{64}, []string{"volume"}},
}

// grown makes a backing of a volume that has become longer since the volume was in use.
func grown(t *testing.T, path string) string {
	t.Helper()
	s := serveRamshelf(t, volume{size: 32 * mib, memory: 16 * mib})
	cleanStop(t, s)
	run(t, "cp", s.home(), path)
	run(t, "truncate", "-s", "+64M", path)
	return path
}

// asNobody has the daemon run as a user who may read and write nothing but the shared memory.
func asNobody(t *testing.T, w *wrong) {
	t.Helper()
	dir := shortDir(t)
	os.Chmod(dir, 0o755)
	run(t, "cp", w.binary, dir+"/ramshelf")
	os.Chmod(dir+"/ramshelf", 0o755)
	w.binary = dir + "/ramshelf"
	w.prefix = []string{tool(t, "setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups"}
	os.Chmod(w.dir, 0o755)
	for parent := filepath.Dir(w.dir); parent != "/tmp" && parent != "/"; parent = filepath.Dir(parent) {
		os.Chmod(parent, 0o755)
	}
	sockets := shortDir(t)
	for _, path := range []string{w.shm, sockets} {
		if err := os.Chown(path, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	w.flags["listen"], w.flags["control"] = nbdURI("vol", sockets+"/s"), sockets+"/c"
}

func TestRefused(t *testing.T) {
	binary, err := ramshelfBinary()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range refusals {
		t.Run(r.name, func(t *testing.T) {
			w := &wrong{dir: t.TempDir(), shm: shmDir(t), binary: binary}
			sockets := shortDir(t)
			w.flags = map[string]string{
				"name": "vol", "backing": "file:" + w.dir + "/vol.img", "size": "32MiB", "memory": "16MiB", "ack": "ram",
				"journal": "none", "listen": nbdURI("vol", sockets+"/s.sock"), "control": sockets + "/c.sock",
			}
			r.setup(t, w)
			w.check(t, r)
		})
	}
}

func (w *wrong) args(t *testing.T) []string {
	args := []string{"serve", "--shm", w.shm}
	if w.toml != "" {
		path := filepath.Join(w.dir, "ramshelf.toml")
		writeFile(t, path, w.toml)
		return append(args, "--config", path, "--control", w.flags["control"])
	}
	for name, value := range w.flags {
		args = append(args, "--"+name, value)
	}
	return append(args, w.extra...)
}

func (w *wrong) check(t *testing.T, r refusal) {
	t.Helper()
	argv := slices.Concat(w.prefix, []string{w.binary}, w.args(t))
	before := fingerprints(t, w.dir, w.shm)
	p := command{dir: "/"}.start(t, argv[0], argv[1:]...)
	code := p.wait(t, 30*time.Second)
	said := p.stderr()
	t.Logf("%d: %s", code, strings.TrimSpace(said))
	if !slices.Contains(r.codes, code) {
		t.Errorf("exit code %d, want one of %v", code, r.codes)
	}
	for _, word := range r.words {
		word = strings.ReplaceAll(word, "DIR", w.dir)
		if !slices.ContainsFunc(strings.Split(word, "|"), func(alternative string) bool { return strings.Contains(said, alternative) }) {
			t.Errorf("the message does not name %q", word)
		}
	}
	if strings.Contains(said, "goroutine ") || strings.Contains(said, "panic") {
		t.Error("the refusal is a crash")
	}
	if w.neighbor != nil { // its own files change while it runs
		if c, err := dialNBD(w.neighbor.socket(), "vol"); err != nil {
			t.Errorf("the daemon that was there first does not serve any more: %v", err)
		} else {
			c.close()
		}
		cleanStop(t, w.neighbor)
		return
	}
	if after := fingerprints(t, w.dir, w.shm); after != before {
		t.Errorf("the refused start has touched files:\nbefore:\n%safter:\n%s", before, after)
	}
}

// fingerprints are the names, sizes and contents of all files below the directories.
func fingerprints(t *testing.T, dirs ...string) string {
	t.Helper()
	var b strings.Builder
	for _, dir := range dirs {
		info, err := os.Stat(dir)
		if err != nil || !info.IsDir() {
			continue
		}
		for _, path := range files(t, dir) {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintln(&b, path, info.Size(), hashFile(t, path, info.Size()))
		}
	}
	return b.String()
}

// memoryFiles are the files in the shared memory of a daemon.
func memoryFiles(t *testing.T, s *ramshelf) []string {
	t.Helper()
	return files(t, s.shm)
}

// TestForeignMemoryFile checks that a file in --shm that is not ours, or not whole, is set aside and kept.
func TestForeignMemoryFile(t *testing.T) {
	s := serveRamshelf(t, volume{size: 32 * mib, memory: 16 * mib, extra: []string{"--staleness", "1h"}})
	memory := memoryFiles(t, s)
	if len(memory) != 1 {
		t.Fatalf("a daemon with one volume has the memory files %q", memory)
	}
	if info, err := os.Stat(memory[0]); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("memory file: mode %v, %v, want 0600", info.Mode(), err)
	}
	c := mustDial(t, s)
	if err := c.do(cmdWrite, 0, 4096, bytes.Repeat([]byte("only in memory  "), 256)); err != nil {
		t.Fatal(err)
	}
	s.kill()
	whole := slurp(memory[0])
	header := []byte(whole)
	for i := range 4096 {
		header[i] ^= 0x5a
	}
	for _, row := range []struct {
		name, content string
	}{
		{"foreign", strings.Repeat("somebody else's file ", 1000)},
		{"empty", ""},
		{"short", whole[:1000]},
		{"header overwritten", string(header)},
		{"truncated", whole[:len(whole)/2]},
	} {
		t.Run(row.name, func(t *testing.T) {
			for _, path := range memoryFiles(t, s) {
				os.Remove(path)
			}
			writeFile(t, memory[0], row.content)
			s.launch()
			eventually(t, startLimit, "the daemon serves or refuses", func() bool {
				if s.p.ended() {
					return true
				}
				c, err := dialNBD(s.socket(), s.export())
				if err == nil {
					c.close()
				}
				return err == nil
			})
			log := s.p.stderr()
			t.Logf("%s", log)
			kept := ""
			for _, path := range memoryFiles(t, s) {
				if path != memory[0] && slurp(path) == row.content {
					kept = path
				}
			}
			switch {
			case s.p.ended() && s.p.code() == 5:
				if slurp(memory[0]) != row.content && kept == "" {
					t.Error("the refused start has changed the file")
				}
			case s.p.ended():
				t.Errorf("the daemon ended with %d", s.p.code())
			case kept == "" && row.content != "":
				t.Errorf("the file is not kept under another name: %q", memoryFiles(t, s))
			case !strings.Contains(log, kept) || !strings.Contains(log, "WARN") && !strings.Contains(log, "ERROR"):
				t.Error("the log does not say where the file was put")
			}
			if !s.p.ended() {
				cleanStop(t, s)
			}
		})
	}
}

// TestDamagedSlot flips a bit of a block that is only in memory, between kill and restart: the block is never
// served nor written home as good.
func TestDamagedSlot(t *testing.T) {
	s := serveRamshelf(t, volume{size: 32 * mib, memory: 16 * mib, extra: []string{"--staleness", "1h"}})
	c := mustDial(t, s)
	good, bad := bytes.Repeat([]byte("a sound block   "), 256), bytes.Repeat([]byte("a damaged block "), 256)
	for off, p := range map[int64][]byte{4096: good, 8192: bad} {
		if err := c.do(cmdWrite, 0, off, p); err != nil {
			t.Fatal(err)
		}
	}
	s.kill()
	memory := memoryFiles(t, s)[0]
	content := []byte(slurp(memory))
	at := bytes.Index(content, bad)
	if at < 0 {
		t.Fatal("the block is not in the memory file")
	}
	content[at+1234] ^= 4
	if err := os.WriteFile(memory, content, 0o600); err != nil {
		t.Fatal(err)
	}
	s.launch()
	eventually(t, startLimit, "the daemon serves or refuses", func() bool {
		if s.p.ended() {
			return true
		}
		c, err := dialNBD(s.socket(), s.export())
		if err == nil {
			c.close()
		}
		return err == nil
	})
	if s.p.ended() {
		t.Fatalf("the daemon ended with %d for one damaged block:\n%s", s.p.code(), s.p.stderr())
	}
	c = mustDial(t, s)
	got := make([]byte, blockBytes)
	if err := c.do(cmdRead, 0, 4096, got); err != nil || !bytes.Equal(got, good) {
		t.Errorf("the sound block: %v", err)
	}
	if err := c.do(cmdRead, 0, 8192, got); err == nil {
		t.Errorf("the damaged block is served: %q…", got[:16])
	}
	s.cli("flush")
	home := slurp(s.home())
	if strings.Contains(home[8192:12288], "a damaged block") {
		t.Error("the damaged block went home")
	}
	// Rewriting it heals it.
	if err := c.do(cmdWrite, 0, 8192, good); err != nil {
		t.Fatal(err)
	}
	if err := c.do(cmdRead, 0, 8192, got); err != nil || !bytes.Equal(got, good) {
		t.Errorf("the rewritten block: %v", err)
	}
	cleanStop(t, s)
	if home := slurp(s.home()); home[4096:12288] != string(good)+string(good) {
		t.Error("the blocks are not home")
	}
}

// TestIncarnation lets something else write the backing while a memory file lies there: dirty memory is refused
// and kept, clean memory dropped.
func TestIncarnation(t *testing.T) {
	for _, dirty := range []bool{true, false} {
		t.Run(fmt.Sprintf("dirty %v", dirty), func(t *testing.T) {
			s := serveRamshelf(t, volume{size: 32 * mib, memory: 16 * mib, extra: []string{"--staleness", "1h"}})
			old, newer := bytes.Repeat([]byte("old "), 1024), bytes.Repeat([]byte("new "), 1024)
			if err := mustDial(t, s).do(cmdWrite, 0, 0, old); err != nil {
				t.Fatal(err)
			}
			if !dirty {
				s.flush()
			}
			s.kill()

			other := serveRamshelf(t, volume{size: 32 * mib, memory: 16 * mib, backing: s.v.backing})
			if err := mustDial(t, other).do(cmdWrite, 0, 0, newer); err != nil {
				t.Fatal(err)
			}
			cleanStop(t, other)

			before := fingerprints(t, s.shm)
			home := hashFile(t, s.home(), 32*mib)
			if !dirty {
				s.start()
				got := make([]byte, blockBytes)
				if err := mustDial(t, s).do(cmdRead, 0, 0, got); err != nil || !bytes.Equal(got, newer) {
					t.Errorf("read gives %q…, %v, want what the other daemon wrote", got[:8], err)
				}
				cleanStop(t, s)
				return
			}
			s.launch()
			if code := s.p.wait(t, startLimit); code != 5 {
				t.Errorf("a dirty memory file of another incarnation: exit code %d, want 5", code)
			}
			said := s.p.stderr()
			t.Log(said)
			if !strings.Contains(said, "--force") || !strings.Contains(said, memoryFiles(t, s)[0]) {
				t.Error("the message does not name the file and the remedy")
			}
			if fingerprints(t, s.shm) != before || hashFile(t, s.home(), 32*mib) != home {
				t.Error("the refused start has touched the memory file or the backing")
			}
			// Forced, the writes are set aside and kept, and the backing is served as it is.
			s.v.extra = append(s.v.extra, "--force")
			s.start()
			got := make([]byte, blockBytes)
			if err := mustDial(t, s).do(cmdRead, 0, 0, got); err != nil || !bytes.Equal(got, newer) {
				t.Errorf("read gives %q…, %v, want what the other daemon wrote", got[:8], err)
			}
			cleanStop(t, s)
			if len(memoryFiles(t, s)) == 0 {
				t.Error("--force has deleted the only copy of answered writes")
			}
		})
	}
}
