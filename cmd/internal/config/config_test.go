package config

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

const mib = 1 << 20

// load loads from a command line.
func load(args ...string) (*Daemon, error) {
	fs := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	s := Bind(fs)
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	return s.Load()
}

// minimal are the required flags, before args.
func minimal(args ...string) []string {
	return append([]string{"--name", "vol", "--backing", "file:/srv/vol.img", "--listen", "nbd://127.0.0.1:10809/vol"}, args...)
}

// loadTOML loads from a file.
func loadTOML(t *testing.T, text string, args ...string) (*Daemon, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ramshelf.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return load(append([]string{"--config", path}, args...)...)
}

func TestSize(t *testing.T) {
	for text, want := range map[string]Size{
		"4M": 4 * mib, "4MiB": 4 * mib, "4m": 4 * mib, "4mib": 4 * mib, "4Mi": 4 * mib, "4 MiB": 4 * mib, "4096K": 4 * mib,
		"1.5G": 1536 * mib, "0.5K": 512, "512": 512, "512B": 512, "1T": 1 << 40, "2P": 2 << 50, "7E": 7 << 60,
		"512kB": 512000, "1.024MB": 1024000, "1024kb": 1024000,
	} {
		var got Size
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want {
			t.Errorf("size %q = %d, %v; want %d", text, got, err, want)
		}
	}
}

func TestSizeRefused(t *testing.T) {
	for text, want := range map[string]string{
		"":                      "is not a number",
		"M":                     "is not a number",
		".M":                    "is not a number",
		"-4M":                   "is not a number",
		"+4M":                   "is not a number",
		"1,5G":                  "is not a number",
		"1.5.5G":                "is not a number",
		"1e9":                   "is not a number",
		"0x1000":                "is not a number",
		"4MiBB":                 `unknown unit "mibb"`,
		"4X":                    `unknown unit "x"`,
		"4bK":                   `unknown unit "bk"`,
		"0":                     "must be positive",
		"0.0G":                  "must be positive",
		"1000":                  "the nearest are 512 and 1024",
		"100":                   "the nearest are 512",
		"0.3K":                  "the nearest are 512",
		"1kB":                   "the nearest are 512 and 1024",
		"8E":                    "larger than any device",
		"99999999999999999999T": "larger than any device",
		strings.Repeat("9", 41): "is not a size",
		"4\u00a0M":              "unknown unit",
	} {
		var got Size
		if err := got.UnmarshalText([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("size %q = %d, %v; want an error with %q", text, got, err, want)
		}
	}
}

func TestFormatBytes(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 4 * mib: "4.0 MiB", 1 << 30: "1.0 GiB", -4096: "-4.0 KiB"} {
		if got := FormatBytes(n); got != want {
			t.Errorf("FormatBytes(%d) = %q, want %q", n, got, want)
		}
	}
}

func FuzzSize(f *testing.F) {
	for _, s := range []string{"4M", "1.5GiB", "1,5G", "0.3K", "-1", "999E"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var v Size
		if v.UnmarshalText([]byte(s)) == nil && (v <= 0 || v%SectorBytes != 0) {
			t.Errorf("size %q = %d", s, v)
		}
	})
}

func TestDuration(t *testing.T) {
	var d Duration
	if err := d.UnmarshalText([]byte("1.5s")); err != nil || time.Duration(d) != 1500*time.Millisecond {
		t.Errorf("1.5s = %v, %v", d, err)
	}
	for _, text := range []string{"", "1", "0s", "-1s", "soon"} {
		if err := d.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("duration %q was taken", text)
		}
	}
}

func TestFileMode(t *testing.T) {
	for text, want := range map[string]FileMode{"0660": 0o660, "600": 0o600, "0o777": 0o777} {
		var m FileMode
		if err := m.UnmarshalText([]byte(text)); err != nil || m != want {
			t.Errorf("mode %q = %v, %v; want %v", text, m, err, want)
		}
	}
	for _, text := range []string{"", "0", "1777", "rw", "688"} {
		var m FileMode
		if err := m.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("mode %q was taken", text)
		}
	}
}

func TestBacking(t *testing.T) {
	here, err := filepath.Abs(".")
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]Backing{
		"file:/srv/vol.img":             {Kind: BackingFile, Path: "/srv/vol.img"},
		"file:./vol.img":                {Kind: BackingFile, Path: here + "/vol.img"},
		"file:/dev/shm/vol.img":         {Kind: BackingFile, Path: "/dev/shm/vol.img"},
		"/dev/sdb":                      {Kind: BackingDevice, Path: "/dev/sdb"},
		"nbd://store:10810/vol":         {Kind: BackingNBD, URI: "nbd://store:10810/vol"},
		"nbd+unix:///vol?socket=/tmp/s": {Kind: BackingNBD, URI: "nbd+unix:///vol?socket=/tmp/s"},
		"aoe:e1.0@eth1":                 {Kind: BackingAoE, AoE: "e1.0@eth1"},
		"aoe:e1.0@eth1+eth2":            {Kind: BackingAoE, AoE: "e1.0@eth1+eth2"},
		"stripe:(/dev/sdb,/dev/sdc)":    {Kind: BackingLayout},
	} {
		want.text = text
		var got Backing
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want {
			t.Errorf("backing %q = %+v, %v; want %+v", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"/srv/vol.img":     "say file:/srv/vol.img",
		"vol.img":          "say file:vol.img",
		"/dev/shm/vol.img": "say file:/dev/shm/vol.img",
		"file:":            "has no path",
		"":                 "is none of",
		"ftp://x":          "is none of",
		"aoe:e1.0":         "name the interface",
		"aoe:1.0@eth1":     "eSHELF.SLOT",
		"aoe:e4095.0@eth1": "the shelf must be",
		"nbds://store/vol": "TLS",
		"nbd+unix:///vol":  "socket",
	} {
		var got Backing
		if err := got.UnmarshalText([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("backing %q = %+v, %v; want an error with %q", text, got, err, want)
		}
	}
}

func TestListen(t *testing.T) {
	for text, want := range map[string]Listen{
		"nbd://127.0.0.1:10810/vol":          {Network: "tcp", Address: "127.0.0.1:10810", Export: "vol"},
		"nbd://0.0.0.0/a/b":                  {Network: "tcp", Address: "0.0.0.0:10809", Export: "a/b"},
		"nbd://[::1]:10809":                  {Network: "tcp", Address: "[::1]:10809"},
		"nbd+unix:///vol?socket=/run/x.sock": {Network: "unix", Address: "/run/x.sock", Export: "vol"},
		"nbd+unix:///?socket=x.sock":         {Network: "unix", Address: "x.sock"},
		"aoe:e7.1@eth0":                      {Network: "aoe", Address: "e7.1@eth0"},
	} {
		want.text = text
		var got Listen
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want {
			t.Errorf("listen %q = %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", "127.0.0.1:10809", "tcp://127.0.0.1/vol", "nbd+unix:///vol", "nbds://h/vol", "nbd://h/vol?socket=/x",
		"nbd+unix:///vol?socket=/" + strings.Repeat("x", 107), "nbd://h:99999/vol", "nbd://user@h/vol",
	} {
		var got Listen
		if err := got.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("listen %q = %+v, want an error", text, got)
		}
	}
}

func TestDefaults(t *testing.T) {
	d, err := load(minimal()...)
	if err != nil {
		t.Fatal(err)
	}
	v := d.Volumes[0]
	if d.Control != "/run/ramshelf/control.sock" || d.Shm != "/dev/shm/ramshelf" || d.LogFormat != LogText || d.LogLevel != LogInfo {
		t.Errorf("daemon = %+v", d)
	}
	if v.Memory != 256*mib || v.MaxDirty != 89477120 || v.Ack != AckDisk || v.Flush != FlushAck ||
		time.Duration(v.Staleness) != time.Second || v.Journal != (Journal{}) || time.Duration(v.BackingTimeout) != 30*time.Second || v.SocketMode != 0o660 || v.Size != 0 {
		t.Errorf("volume = %+v", v)
	}
	if got := d.MemoryFile(v); got != "/dev/shm/ramshelf/vol.mem" {
		t.Errorf("memory file = %s", got)
	}
}

func TestExportIsNamedAfterTheVolume(t *testing.T) {
	d, err := load("--name", "vol", "--backing", "file:/x", "--listen", "nbd://127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	if l := d.Volumes[0].Listen[0]; l.Export != "vol" || l.URI() != "nbd://127.0.0.1:10809/vol" {
		t.Errorf("export %q at %s", l.Export, l.URI())
	}
}

func TestMaxPayload(t *testing.T) {
	for _, c := range []struct {
		memory, maxDirty Size
		want             uint32
	}{
		{8 * mib, 2 * mib, 2 * mib},
		{64 * mib, 20 * mib, 16 * mib},
		{256 * mib, 85 * mib, 32 * mib},
		{1 << 40, 1 << 30, 32 * mib},
		{64 * mib, 3 * mib, 2 * mib},
	} {
		v := Volume{Memory: c.memory, MaxDirty: c.maxDirty}
		if got := v.MaxPayloadBytes(); got != c.want {
			t.Errorf("memory %v, max_dirty %v: %d, want %d", c.memory, c.maxDirty, got, c.want)
		}
	}
}

// failure is the exit code and the text of an error, hint included.
func failure(err error) (control.ExitCode, string) {
	var f *control.Failure
	if errors.As(err, &f) {
		return f.Code, f.Error() + " HINT " + f.Hint
	}
	return -1, ""
}

func TestRefusedFlags(t *testing.T) {
	for _, c := range []struct {
		args []string
		code control.ExitCode
		want string
	}{
		{[]string{}, control.ExitUsage, "name is missing"},
		{[]string{"--name", "v"}, control.ExitUsage, "backing is missing"},
		{[]string{"--name", "v", "--backing", "file:/x"}, control.ExitUsage, "listen is missing"},
		{minimal("--name", "../x"), control.ExitUsage, "does not fit a file name"},
		{minimal("--name", ".hidden"), control.ExitUsage, "does not fit a file name"},
		{minimal("--name", strings.Repeat("n", 65)), control.ExitUsage, "does not fit a file name"},
		{minimal("--memory", "4M"), control.ExitUsage, "memory 4.0 MiB (4194304) is less than 8.0 MiB"},
		{minimal("--memory", "8389120"), control.ExitUsage, "the nearest are 8388608 and 8392704"},
		{minimal("--size", "512"), control.ExitUsage, "less than 4.0 KiB"},
		{minimal("--size", "1049088"), control.ExitUsage, "size 1049088 is no multiple of 4096; the nearest are 1048576 and 1052672"},
		{minimal("--size", "65T"), control.ExitUsage, "more than 64 TiB"},
		{minimal("--max-dirty", "512K"), control.ExitUsage, "less than 1.0 MiB"},
		{minimal("--max-dirty", "128M"), control.ExitUsage, "more than 85 MiB"},
		{minimal("--staleness", "100us"), control.ExitUsage, "outside 1ms to 1h0m0s"},
		{minimal("--ack", "peer"), control.ExitUsage, "--ack peer without --peer"},
		{minimal("--listen", "nbd://127.0.0.1:10809/vol"), control.ExitUsage, `both export "vol" at 127.0.0.1:10809`},
		{minimal("--control", strings.Repeat("x", 108)), control.ExitUsage, "longer than 107 bytes"},
		{minimal("--config", "/nowhere"), control.ExitUsage, "--config exclude one another"},
		{[]string{"--config", "/nowhere"}, control.ExitFailed, "no such file"},

		{minimal("--peer", "b:7000"), control.ExitFailed, "--peer: lands later"},
		{minimal("--ack", "peer", "--peer", "b:7000"), control.ExitFailed, "--peer: lands later"},
		{minimal("--peer-listen", "a:7000"), control.ExitFailed, "lands later"},
		{minimal("--peer-timeout", "3s"), control.ExitFailed, "lands later"},
		{minimal("--on-peer-loss", "continue"), control.ExitFailed, "lands later"},
		{minimal("--on-arbiter-loss", "continue"), control.ExitFailed, "lands later"},
		{minimal("--role", "secondary"), control.ExitFailed, "lands later"},
		{minimal("--holdup", "25h"), control.ExitUsage, "holdup 25h0m0s is outside"},
		{minimal("--backing-timeout", "1ms"), control.ExitUsage, "backing_timeout 1ms is outside"},
		{minimal("--journal-size", "1M"), control.ExitUsage, "journal_size 1.0 MiB (1048576) is less than 4.0 MiB"},
		{minimal("--on-io-error", "stop"), control.ExitFailed, "lands later"},
		{minimal("--journal", "mirror:(/dev/sdb,/dev/sdc)"), control.ExitFailed, "--journal mirror:(/dev/sdb,/dev/sdc): lands later"},
		{minimal("--backing", "mirror:(/dev/sdb,/dev/sdc)"), control.ExitFailed, "lands later"},
		{minimal("--listen", "aoe:e7.1@eth0"), control.ExitFailed, "lands later"},
	} {
		code, text := failure(second(load(c.args...)))
		if code != c.code || !strings.Contains(text, c.want) {
			t.Errorf("%v: exit code %d, %s; want %d with %q", c.args, code, text, c.code, c.want)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestFile(t *testing.T) {
	d, err := loadTOML(t, `
control = "/run/a.sock"
shm = "/dev/shm/a"

[[volume]]
name = "redo"
backing = "file:/srv/redo.img"
size = "1GiB"
memory = 67108864
ack = "disk"
flush = "disk"
staleness = "250ms"
socket_mode = 0o600
listen = ["nbd+unix:///redo?socket=/run/redo.sock", "nbd://127.0.0.1/redo"]

[[volume]]
name = "data"
backing = "/dev/sdb"
ack = "ram"
max_dirty = "16MiB"
force = true
listen = ["nbd://127.0.0.1/data"]
`, "--control", "/run/b.sock")
	if err != nil {
		t.Fatal(err)
	}
	if d.Control != "/run/b.sock" || d.Shm != "/dev/shm/a" || len(d.Volumes) != 2 {
		t.Fatalf("daemon = %+v", d)
	}
	redo, data := d.Volumes[0], d.Volumes[1]
	if redo.Name != "redo" || redo.Size != 1<<30 || redo.Memory != 64*mib || redo.Ack != AckDisk || redo.Flush != FlushDisk ||
		time.Duration(redo.Staleness) != 250*time.Millisecond || redo.SocketMode != 0o600 || len(redo.Listen) != 2 || redo.Force {
		t.Errorf("redo = %+v", redo)
	}
	if data.Ack != AckRAM || data.MaxDirty != 16*mib || data.Memory != 256*mib || !data.Force || data.Backing.Path != "/dev/sdb" {
		t.Errorf("data = %+v", data)
	}
}

func TestFileOfOneVolume(t *testing.T) {
	d, err := loadTOML(t, "shm = \"/dev/shm/a\"\nname = \"vol\"\nbacking = \"file:/x\"\nlisten = [\"nbd://127.0.0.1/vol\"]\n")
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Volumes) != 1 || d.Volumes[0].Name != "vol" || d.Shm != "/dev/shm/a" {
		t.Errorf("daemon = %+v", d)
	}
}

func TestRefusedFiles(t *testing.T) {
	volume := func(name, backing, listen string) string {
		return "[[volume]]\nname = \"" + name + "\"\nbacking = \"" + backing + "\"\nlisten = [\"" + listen + "\"]\n"
	}
	link := filepath.Join(t.TempDir(), "link")
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(image, link); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ text, want string }{
		"unknown key": {volume("a", "file:/a", "nbd://h/a") + "memroy = \"1G\"\n",
			`:5: unknown key "volume.memroy" in: memroy = "1G" HINT the keys are ack backing`},
		"unknown key of the daemon": {"verbose = true\n", `:1: unknown key "verbose" in: verbose = true`},
		"dash for underscore":       {"[[volume]]\nmax-dirty = \"1G\"\n", `unknown key "volume.max-dirty"`},
		"unknown table":             {"[volumes.a]\nname = \"a\"\n", "unknown key"},
		"broken size":               {"[[volume]]\nname = \"a\"\nmemory = \"1,5G\"\n", `:3: size "1,5G" is not a number with a unit, such as 512K, 64MiB or 1.5G in: memory = "1,5G"`},
		"broken word":               {volume("a", "file:/a", "nbd://h/a") + "ack = \"none\"\n", `volume "a": ack: "none" is none of [ram peer disk]`},
		"broken word of the daemon": {"log_level = \"loud\"\n" + volume("a", "file:/a", "nbd://h/a"), `log_level: "loud" is none of`},
		"broken backing":            {"[[volume]]\nbacking = \"/srv/a\"\n", "say file:/srv/a"},
		"negative memory":           {volume("a", "file:/a", "nbd://h/a") + "memory = -1\n", "less than 8.0 MiB"},
		"staleness without a unit":  {volume("a", "file:/a", "nbd://h/a") + "staleness = 1\n", "outside"},
		"decimal mode":              {volume("a", "file:/a", "nbd://h/a") + "socket_mode = 660\n", "is no file mode"},
		"syntax":                    {"[[volume]]\nname = vol\n", ":2: "},
		"wrong type":                {"[[volume]]\nname = 5\n", ":2: "},
		"no volume":                 {"shm = \"/x\"\n", "names no volume"},
		"both forms":                {"name = \"a\"\n" + volume("b", "file:/b", "nbd://h/b"), "stand before the first [[volume]]"},
		"same name":                 {volume("a", "file:/a", "nbd://h/a") + volume("a", "file:/b", "nbd://h/b"), `two volumes are called "a"`},
		"same backing":              {volume("a", "file:/x/../a", "nbd://h/a") + volume("b", "file:/a", "nbd://h/b"), "have the same backing"},
		"same file":                 {volume("a", "file:"+image, "nbd://h/a") + volume("b", "file:"+link, "nbd://h/b"), "have the same backing"},
		"same NBD backing":          {volume("a", "nbd://h/z", "nbd://h/a") + volume("b", "nbd://h/z", "nbd://h/b"), "have the same backing"},
		"same export":               {volume("a", "file:/a", "nbd://h/x") + volume("b", "file:/b", "nbd://h:10809/x"), `volumes "a" and "b" both export "x" at h:10809`},
		"same export on a socket": {volume("a", "file:/a", "nbd+unix:///x?socket=/run/s") + volume("b", "file:/b", "nbd+unix:///x?socket=/run/../run/s"),
			"both export"},
		"two modes": {volume("a", "file:/a", "nbd+unix:///a?socket=/s") + "socket_mode=\"600\"\n" + volume("b", "file:/b", "nbd+unix:///b?socket=/s"),
			"cannot have the modes 0600 and 0660"},
	} {
		code, text := failure(second(loadTOML(t, c.text)))
		if code != control.ExitUsage || !strings.Contains(text, c.want) {
			t.Errorf("%s: exit code %d, %s; want %d with %q", name, code, text, control.ExitUsage, c.want)
		}
		if strings.Contains(text, "\n") {
			t.Errorf("%s: the error has several lines: %s", name, text)
		}
	}
	if code, text := failure(second(load("--config", t.TempDir()))); code != control.ExitFailed {
		t.Errorf("folder as a file: exit code %d, %s", code, text)
	}
	if _, text := failure(second(loadTOML(t, strings.Repeat("#\n", maxFileBytes)))); !strings.Contains(text, "is larger than 1.0 MiB") {
		t.Errorf("huge file: %s", text)
	}
}

// Every flag but --config is a key, and every key a flag.
func TestFlagsAreKeys(t *testing.T) {
	fs := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	Bind(fs)
	flags := map[string]bool{}
	fs.VisitAll(func(f *pflag.Flag) { flags[strings.ReplaceAll(f.Name, "-", "_")] = true })
	delete(flags, "config")
	fields := map[string]bool{}
	for _, k := range keys() {
		fields[k] = true
	}
	delete(fields, "volume")
	if !reflect.DeepEqual(flags, fields) {
		t.Errorf("flags %v\nkeys  %v", flags, fields)
	}
}

func TestCheckShm(t *testing.T) {
	d := &Daemon{Shm: filepath.Join(t.TempDir(), "not", "yet"), Volumes: []*Volume{{Name: "vol", Memory: 8 * mib}}}
	if _, err := d.CheckShm(); err != nil {
		t.Errorf("8 MiB: %v", err)
	}
	d.Volumes[0].Memory = 1 << 60
	code, text := failure(second(d.CheckShm()))
	if code != control.ExitFailed || !strings.Contains(text, " free, and the memory of all volumes") || !strings.Contains(text, "EiB") {
		t.Errorf("1 EiB: exit code %d, %s", code, text)
	}
	d.Shm, d.Volumes[0].Memory = "/dev/shm/ramshelf-not-there", 8*mib
	if tmpfs, err := d.CheckShm(); err != nil || !tmpfs {
		t.Errorf("/dev/shm: tmpfs %v, %v", tmpfs, err)
	}
}
