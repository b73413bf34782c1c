package aoe

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var (
	client = MAC{2, 0, 0, 0, 0, 1}
	server = MAC{2, 0, 0, 0, 0, 2}
	other  = MAC{2, 0, 0, 0, 0, 3}
)

// golden are the frames recorded from vblade.
func golden(t testing.TB) [][]byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", "vblade.hex"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var frames [][]byte
	for s := bufio.NewScanner(f); s.Scan(); {
		if strings.HasPrefix(s.Text(), "#") {
			continue
		}
		frame, err := hex.DecodeString(s.Text())
		if err != nil {
			t.Fatal(err)
		}
		frames = append(frames, frame)
	}
	return frames
}

// encodeAgain decodes a frame and encodes what came out; rest is what follows the argument.
func encodeAgain(frame, into []byte) (out []byte, err error) {
	h, err := ParseHeader(frame)
	if err != nil {
		return nil, err
	}
	out = h.Append(into)
	switch h.Command {
	case CommandATA:
		a, data, err := ParseATA(frame)
		if err != nil {
			return nil, err
		}
		return append(a.Append(out), data...), nil
	case CommandConfig:
		c, err := ParseConfig(frame)
		if err != nil {
			return nil, err
		}
		return c.Append(out)
	case CommandMask:
		m, d, err := ParseMask(frame)
		if err != nil {
			return nil, err
		}
		var all [255]Directive
		for i := range d.Len() {
			all[i] = d.At(i)
		}
		return m.Append(out, all[:d.Len()]...)
	case CommandReserve:
		r, m, err := ParseReserve(frame)
		if err != nil {
			return nil, err
		}
		var all [255]MAC
		for i := range m.Len() {
			all[i] = m.At(i)
		}
		return r.Append(out, all[:m.Len()]...)
	}
	return append(out, frame[HeaderBytes:]...), nil
}

func TestGoldenFramesEncodeToThemselves(t *testing.T) {
	frames := golden(t)
	if len(frames) != 31 {
		t.Fatalf("%d frames, want 31", len(frames))
	}
	for i, frame := range frames {
		out, err := encodeAgain(frame, nil)
		if err != nil {
			t.Errorf("frame %d: %v", i, err)
			continue
		}
		if rest, ok := bytes.CutPrefix(frame, out); !ok || len(bytes.Trim(rest, "\x00")) > 0 {
			t.Errorf("frame %d:\n got %x\nwant %x", i, out, frame)
		}
	}
}

func TestGoldenFrames(t *testing.T) {
	frames := golden(t)
	header := func(i int, want Header) {
		t.Helper()
		if h, err := ParseHeader(frames[i]); err != nil || h != want {
			t.Errorf("frame %d: %+v, %v, want %+v", i, h, err, want)
		}
	}
	ata := func(i int, want ATA, bytes int) {
		t.Helper()
		if a, data, err := ParseATA(frames[i]); err != nil || a != want || len(data) != bytes {
			t.Errorf("frame %d: %+v, %d bytes, %v, want %+v, %d bytes", i, a, len(data), err, want, bytes)
		}
	}
	target := Address{Shelf: 1}
	header(0, Header{Dst: Broadcast, Src: server, Flags: FlagResponse, Address: target, Command: CommandConfig})
	header(1, Header{Dst: Broadcast, Src: client, Version: 1, Address: All, Command: CommandConfig, Tag: UserTag | 1})
	header(2, Header{Dst: client, Src: server, Version: 1, Flags: FlagResponse, Address: target, Command: CommandConfig, Tag: UserTag | 1})
	header(20, Header{Dst: client, Src: server, Version: 1, Flags: FlagResponse | FlagError, Error: ErrorArgument, Address: target,
		Tag: UserTag | 0xa})
	header(30, Header{Dst: client, Src: server, Version: 1, Flags: FlagResponse | FlagError, Error: ErrorCommand, Address: target,
		Command: 9, Tag: UserTag | 0xf})
	if c, err := ParseConfig(frames[2]); err != nil || c.Buffers != 16 || c.MaxSectorsPerFrame() != 2 || c.Version != 1 || len(c.String) != 0 {
		t.Errorf("config: %+v, %v", c, err)
	}
	if c, err := ParseConfig(frames[6]); err != nil || string(c.String) != "shelf" {
		t.Errorf("config: %+v, %v", c, err)
	}
	ata(9, ATA{Flags: ATAExtended | ATAWrite, Count: 2, Command: ATAWriteExt, LBA: 5}, 1024)
	ata(12, ATA{Flags: ATAExtended, Command: StatusReady, LBA: 5}, 1024)
	ata(14, ATA{Flags: ATAExtended, Feature: ErrorIDNotFound, Count: 2, Command: StatusReady | StatusError, LBA: 2047}, 0)
	ata(16, ATA{Feature: ErrorIDNotFound}, MinFrameBytes-ATABytes) // FLUSH: no status, and the error register of the frame before
	ata(7, ATA{Command: ATAIdentify, Count: 1, Device: 0xA0}, MinFrameBytes-ATABytes)
	ata(18, ATA{Flags: ATAExtended, Feature: ErrorAborted, Command: StatusReady | StatusError}, MinFrameBytes-ATABytes)

	_, data, err := ParseATA(frames[8])
	if err != nil {
		t.Fatal(err)
	}
	id, err := ParseIdentity(data)
	if err != nil || id.Sectors != 2048 || !id.LBA48 || !id.Flush || id.FlushExt || id.WriteCache ||
		!strings.HasPrefix(id.Serial, "1.0:") || id.Model != "Coraid EtherDrive vblade" {
		t.Errorf("identity %+v, %v", id, err)
	}

	m, d, err := ParseMask(frames[21])
	if err != nil || m != (Mask{Command: MaskEdit, Count: 2}) || d.Len() != 2 || d.At(1) != (Directive{Command: DirectiveAdd, MAC: other}) {
		t.Errorf("mask %+v %v %v", m, d, err)
	}
	r, macs, err := ParseReserve(frames[25])
	if err != nil || r != (Reserve{Command: ReserveSet, Count: 1}) || macs.Len() != 1 || macs.At(0) != client {
		t.Errorf("reserve %+v %v %v", r, macs, err)
	}
}

func TestFailed(t *testing.T) {
	for status, want := range map[ATACommand]bool{0x40: false, 0x41: true, 0xC0: true, 0x60: true, 0x48: true, 0: false, 0x50: false} {
		if a := (ATA{Command: status}); a.Failed() != want {
			t.Errorf("status %#x: failed %v", status, !want)
		}
	}
}

func TestLBA(t *testing.T) {
	for _, c := range []struct {
		flags      ATAFlags
		give, want uint64
		bytes      string
	}{
		{ATAExtended, 0x0605_0403_0201, 0x0605_0403_0201, "010203040506"},
		{ATAExtended, 1<<48 - 1, 1<<48 - 1, "ffffffffffff"},
		{ATAExtended, 1 << 48, 0, "000000000000"},
		{0, 0x0403_0201, 0x0403_0201, "010203e40000"},
		{0, 1<<28 - 1, 1<<28 - 1, "ffffffef0000"},
		{0, 1 << 28, 0, "000000e00000"},
	} {
		h := Header{Version: 1}
		a := ATA{Flags: c.flags, LBA: c.give, Device: DeviceLBA}
		frame := a.Append(h.Append(nil))
		if got := hex.EncodeToString(frame[28:34]); got != c.bytes {
			t.Errorf("LBA %#x: bytes %s, want %s", c.give, got, c.bytes)
		}
		if got, _, err := ParseATA(frame); err != nil || got.LBA != c.want {
			t.Errorf("LBA %#x: got %#x, %v, want %#x", c.give, got.LBA, err, c.want)
		}
	}
}

func TestLengths(t *testing.T) {
	frame := func(c Command, argument string) []byte {
		h := Header{Version: 1, Command: c}
		b, err := hex.DecodeString(argument)
		if err != nil {
			t.Fatal(err)
		}
		return append(h.Append(nil), b...)
	}
	long := strings.Repeat("00", MaxConfigBytes)
	for name, c := range map[string]struct {
		frame []byte
		parse func([]byte) error
		want  error
	}{
		"empty":              {nil, header, ErrShort},
		"header minus one":   {frame(0, "")[:23], header, ErrShort},
		"header":             {frame(0, ""), header, nil},
		"type":               {append(make([]byte, 12), frame(0, "")[:12]...), header, ErrType},
		"ATA short":          {frame(0, "0000000000000000000000"), ataArgument, ErrShort},
		"ATA":                {frame(0, "000000000000000000000000"), ataArgument, nil},
		"ATA command":        {frame(1, "000000000000000000000000"), ataArgument, ErrCommand},
		"config short":       {frame(1, "00000000000000"), config, ErrShort},
		"config":             {frame(1, "0000000000000000"), config, nil},
		"config command":     {frame(0, "0000000000000000"), config, ErrCommand},
		"config lies":        {frame(1, "0000000000000001"), config, ErrShort},
		"config 1024":        {frame(1, "0000000000000400"+long), config, nil},
		"config 1025":        {frame(1, "0000000000000401"+long+"00"), config, ErrLength},
		"mask short":         {frame(2, "000000"), mask, ErrShort},
		"mask":               {frame(2, "00000000"), mask, nil},
		"mask command":       {frame(3, "00000000"), mask, ErrCommand},
		"mask lies":          {frame(2, "00000001"+"00000000000000"), mask, ErrShort},
		"mask one":           {frame(2, "00000001"+"0000000000000000"), mask, nil},
		"mask padded":        {frame(2, "00000001"+"0000000000000000"+"0000"), mask, nil},
		"reserve short":      {frame(3, "00"), reserve, ErrShort},
		"reserve":            {frame(3, "0000"), reserve, nil},
		"reserve command":    {frame(2, "00000000"), reserve, ErrCommand},
		"reserve lies":       {frame(3, "00ff"+"0000000000"), reserve, ErrShort},
		"reserve one":        {frame(3, "0001"+"000000000000"), reserve, nil},
		"identity short":     {make([]byte, 511), identity, ErrShort},
		"identity of size 0": {make([]byte, 512), identity, ErrLength},
	} {
		if err := c.parse(c.frame); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if _, err := (&Config{String: make([]byte, MaxConfigBytes+1)}).Append(nil); !errors.Is(err, ErrLength) {
		t.Errorf("config string too long: %v", err)
	}
	if _, err := (&Mask{}).Append(nil, make([]Directive, 256)...); !errors.Is(err, ErrLength) {
		t.Errorf("mask too long: %v", err)
	}
	if _, err := (&Reserve{}).Append(nil, make([]MAC, 256)...); !errors.Is(err, ErrLength) {
		t.Errorf("reserve too long: %v", err)
	}
}

func header(b []byte) error      { _, err := ParseHeader(b); return err }
func ataArgument(b []byte) error { _, _, err := ParseATA(b); return err }
func config(b []byte) error      { _, err := ParseConfig(b); return err }
func mask(b []byte) error        { _, _, err := ParseMask(b); return err }
func reserve(b []byte) error     { _, _, err := ParseReserve(b); return err }
func identity(b []byte) error    { _, err := ParseIdentity(b); return err }

func TestIdentity(t *testing.T) {
	for _, want := range []Identity{
		{Serial: "1.0:host", Firmware: "V1.0", Model: "ramshelf", Sectors: 1 << 40, LBA48: true, Flush: true, FlushExt: true, WriteCache: true},
		{Serial: strings.Repeat("s", 20), Firmware: strings.Repeat("f", 8), Model: strings.Repeat("m", 40), Sectors: 1<<28 - 1},
		{Sectors: 1<<48 - 1, LBA48: true, FlushExt: true},
	} {
		data := bytes.Repeat([]byte{0xAA}, SectorBytes)
		want.Put(data)
		if got, err := ParseIdentity(data); err != nil || got != want {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	data := make([]byte, SectorBytes)
	(&Identity{Sectors: 1 << 48, LBA48: true}).Put(data)
	if id, err := ParseIdentity(data); err != nil || id.Sectors != 1<<48 {
		t.Errorf("2^48 sectors: %+v, %v", id, err)
	}
	binary.LittleEndian.PutUint64(data[2*wordLBA48:], 1<<48+1)
	if err := identity(data); !errors.Is(err, ErrLength) {
		t.Errorf("more than 2^48 sectors: %v", err)
	}
}

func TestSectorsIn(t *testing.T) {
	for mtu, want := range map[int]int{0: 0, 547: 0, 548: 1, 1500: 2, 4200: 8, 9000: 17, 65536: 127, 1 << 20: 255} {
		if got := SectorsIn(mtu); got != want {
			t.Errorf("MTU %d: %d sectors, want %d", mtu, got, want)
		}
	}
}

func TestPad(t *testing.T) {
	if got := Pad([]byte{1}); len(got) != 60 || got[0] != 1 || len(bytes.Trim(got[1:], "\x00")) > 0 {
		t.Errorf("padded to %x", got)
	}
	if got := Pad(make([]byte, 61)); len(got) != 61 {
		t.Errorf("61 bytes became %d", len(got))
	}
}

func TestAddress(t *testing.T) {
	for s, want := range map[string]Address{
		"e0.0": {}, "e1.0": {Shelf: 1}, "e7.254": {Shelf: 7, Slot: 254}, "e65534.1": {Shelf: 65534, Slot: 1}, "e4094.0": {Shelf: 4094},
	} {
		if got, err := ParseAddress(s); err != nil || got != want || got.String() != s {
			t.Errorf("%s: %v, %v, want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"", "e", "e1", "1.0", "e1.", "e.0", "e1.255", "e65535.0", "e4095.0", "e-1.0", "e+1.0", "e01.0", "e1.00",
		"e1.0.0", "ee1.0", "e1.0 ", "e4294967296.0", "E1.0"} {
		if got, err := ParseAddress(s); err == nil || got != (Address{}) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, c := range []struct {
		frame Address
		want  bool
	}{{All, true}, {Address{1, 2}, true}, {Address{1, AllSlots}, true}, {Address{AllShelves, 2}, true}, {Address{1, 3}, false},
		{Address{2, 2}, false}, {Address{AllShelves, 3}, false}} {
		if got := (Address{1, 2}).Matches(c.frame); got != c.want {
			t.Errorf("e1.2 is meant by %v: %v", c.frame, got)
		}
	}
}

func TestEndpoint(t *testing.T) {
	for s, want := range map[string]int{"e1.0@eth1": 1, "e1.0@eth1+eth2": 2, "e1.0@a+b+c+d+e+f+g+h": 8, "e1.0@eth0.100": 1} {
		if e, err := ParseEndpoint(s); err != nil || len(e.Interfaces) != want || e.String() != s {
			t.Errorf("%s: %v, %v", s, e, err)
		}
	}
	for _, s := range []string{"", "e1.0", "e1.0@", "@eth1", "e1.0@eth1+", "e1.0@+eth1", "e1.0@eth1+eth1", "e1.0@a/b", "e1.0@a b", "e1.0@.",
		"e1.0@..", "e1.0@a:1", "e1.0@abcdefghijklmnop", "e1.0@a+b+c+d+e+f+g+h+i", "e1.0@eth1@eth2+", "x1.0@eth1"} {
		if e, err := ParseEndpoint(s); err == nil || len(e.Interfaces) > 0 && s != "e1.0@eth1@eth2+" {
			t.Errorf("%q: %v, %v", s, e, err)
		}
	}
}

func TestMAC(t *testing.T) {
	for _, s := range []string{"02:00:00:00:00:01", "020000000001", "02-00-00-00-00-01"} {
		if m, err := ParseMAC(s); err != nil || m != client || m.String() != "02:00:00:00:00:01" {
			t.Errorf("%s: %v, %v", s, m, err)
		}
	}
	for _, s := range []string{"", "02:00:00:00:00", "02:00:00:00:00:01:02", "zz:00:00:00:00:01"} {
		if m, err := ParseMAC(s); err == nil {
			t.Errorf("%q: %v", s, m)
		}
	}
}

func TestNothingIsAllocated(t *testing.T) {
	frames := golden(t)
	buf := make([]byte, 0, 4096)
	for i, frame := range frames {
		if n := testing.AllocsPerRun(100, func() { _, _ = encodeAgain(frame, buf[:0]) }); n != 0 {
			t.Errorf("frame %d: %v allocations", i, n)
		}
	}
}

// built are frames of every kind that this package builds, padded as they go out.
func built(t testing.TB) [][]byte {
	var frames [][]byte
	for _, flags := range []Flags{0, FlagResponse, FlagResponse | FlagError} {
		head := func(c Command) []byte {
			h := Header{Dst: server, Src: client, Version: 1, Flags: flags, Address: Address{Shelf: 7, Slot: 1}, Command: c, Tag: UserTag | 77}
			if flags&FlagError != 0 {
				h.Error = ErrorArgument
			}
			return h.Append(nil)
		}
		add := func(b []byte, err error) {
			if err != nil {
				t.Fatal(err)
			}
			frames = append(frames, Pad(b))
		}
		for _, a := range []ATA{
			{Command: ATAIdentify, Count: 1, Device: 0xA0}, {Flags: ATAExtended, Command: ATAReadExt, Count: 16, LBA: 1 << 40},
			{Command: ATARead, Count: 2, LBA: 1<<28 - 1}, {Command: ATAFlush, Device: DeviceLBA}, {Flags: ATAExtended, Command: ATAFlushExt},
		} {
			add(a.Append(head(CommandATA)), nil)
		}
		w := ATA{Flags: ATAExtended | ATAWrite, Command: ATAWriteExt, Count: 16, LBA: 12345}
		add(append(w.Append(head(CommandATA)), make([]byte, 16*SectorBytes)...), nil)
		probe := ATA{Flags: ATAExtended, Command: ATAReadExt, Count: 2}
		add(append(probe.Append(head(CommandATA)), make([]byte, 2*SectorBytes)...), nil)
		for command := ConfigRead; command <= ConfigForce; command++ {
			c := Config{Buffers: 16, Firmware: 1, Sectors: 16, Version: 1, Command: command, String: []byte("ramshelf vol")}
			add(c.Append(head(CommandConfig)))
		}
		add((&Mask{Command: MaskEdit}).Append(head(CommandMask), Directive{DirectiveAdd, client}, Directive{DirectiveDelete, other}))
		add((&Reserve{Command: ReserveSet}).Append(head(CommandReserve), client, other))
	}
	return frames
}

// tshark, the only other decoder at hand, must take every frame for AoE and complain about none.
func TestTsharkDecodes(t *testing.T) {
	frames := built(t)
	path := filepath.Join(t.TempDir(), "built.pcap")
	if err := os.WriteFile(path, pcap(frames), 0o600); err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd := exec.Command("tshark", "-n", "-r", path, "-T", "fields", "-E", "separator=,",
		"-e", "aoe.tag", "-e", "aoe.major", "-e", "aoe.minor", "-e", "_ws.malformed", "-e", "_ws.expert.message")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark: %v\n%s", err, stderr.String())
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != len(frames) {
		t.Fatalf("tshark tells of %d frames, %d were built", len(lines), len(frames))
	}
	for i, line := range lines {
		if line != "0x8000004d,0x0007,0x01,," {
			t.Errorf("frame %d: tshark says %q: %x", i, line, frames[i])
		}
	}
}

// pcap is a capture file of the frames (pcap-savefile(5), LINKTYPE_ETHERNET).
func pcap(frames [][]byte) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, 0xA1B2C3D4)
	b = le.AppendUint16(le.AppendUint16(b, 2), 4)
	b = le.AppendUint32(append(b, make([]byte, 8)...), 65535)
	b = le.AppendUint32(b, 1)
	for _, f := range frames {
		b = append(b, make([]byte, 8)...)
		b = le.AppendUint32(le.AppendUint32(b, uint32(len(f))), uint32(len(f)))
		b = append(b, f...)
	}
	return b
}

// FuzzDecode: no frame makes decoding panic, and what is decoded encodes to the beginning of the frame, where the format
// has no bytes to ignore.
func FuzzDecode(f *testing.F) {
	for _, frame := range append(golden(f), built(f)...) {
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		_, _ = ParseIdentity(frame)
		out, err := encodeAgain(frame, nil)
		if err != nil {
			return
		}
		if len(out) > len(frame) {
			t.Fatalf("%d bytes were decoded from %d", len(out), len(frame))
		}
		again, err := encodeAgain(out, nil)
		if err != nil || !bytes.Equal(again, out) {
			t.Fatalf("not stable: %v\n%x\n%x", err, out, again)
		}
	})
}
