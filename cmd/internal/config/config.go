// Package config turns TOML files and command lines into checked settings. Everything that can be known to be
// wrong is refused here, before anything is touched, with the value and the remedy.
package config

import (
	"os"
	"path/filepath"

	"github.com/spf13/pflag"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

// Where things lie when nothing else is said.
const (
	DefaultControl = "/run/ramshelf/control.sock"
	DefaultShm     = "/dev/shm/ramshelf"
)

// Daemon is what one process serves.
type Daemon struct {
	Control   string    `toml:"control"`    // path of the control socket
	Shm       string    `toml:"shm"`        // folder of the memory files
	LogFormat LogFormat `toml:"log_format"` // form of the log
	LogLevel  LogLevel  `toml:"log_level"`  // least level that is logged
	Volumes   []*Volume `toml:"volume"`     // at least one
}

// Volume is one volume. After Load every field holds a checked value; what was not given has its default.
type Volume struct {
	Name           string    `toml:"name"`            // fit for a file name
	Backing        Backing   `toml:"backing"`         // where the content is kept
	Size           Size      `toml:"size"`            // zero: what the backing gives
	Memory         Size      `toml:"memory"`          // of the slots; a multiple of BlockBytes
	MaxDirty       Size      `toml:"max_dirty"`       // bound of what is uncommitted
	Ack            Ack       `toml:"ack"`             // when a write is answered
	Flush          FlushMode `toml:"flush"`           // what FLUSH and FUA wait for
	Staleness      Duration  `toml:"staleness"`       // longest epoch while the backing keeps up
	Journal        Journal   `toml:"journal"`         // where the journal lies; zero: as the backing says, internal on a new one
	JournalSize    Size      `toml:"journal_size"`    // of a new journal; zero: twice MaxDirty
	Holdup         Duration  `toml:"holdup"`          // how long the power lasts; zero: nobody knows
	BackingTimeout Duration  `toml:"backing_timeout"` // silence after which the backing has failed
	Listen         []Listen  `toml:"listen"`          // at least one
	SocketMode     FileMode  `toml:"socket_mode"`     // of the unix sockets of Listen
	Force          bool      `toml:"force"`           // do what is otherwise refused for safety
	Role           Role      `toml:"role"`            // empty: not given

	// What follows has no function yet; using it is refused.

	Peer          string     `toml:"peer"`
	PeerListen    string     `toml:"peer_listen"`
	PeerTimeout   Duration   `toml:"peer_timeout"`
	OnPeerLoss    OnPeerLoss `toml:"on_peer_loss"`
	OnArbiterLoss OnPeerLoss `toml:"on_arbiter_loss"`
	OnIOError     string     `toml:"on_io_error"`
}

// MaxPayloadBytes is the largest payload of one request: a power of two, so small that its slots can always be
// reserved at once.
func (v *Volume) MaxPayloadBytes() uint32 {
	const most = 32 << 20
	p := uint32(BlockBytes)
	for p < most && int64(p)*2 <= min(int64(v.Memory)/4, int64(v.MaxDirty)) {
		p *= 2
	}
	return p
}

// MemorySuffix ends the name of every memory file.
const MemorySuffix = ".mem"

// MemoryFile is the path of the memory file of v.
func (d *Daemon) MemoryFile(v *Volume) string { return filepath.Join(d.Shm, v.Name+MemorySuffix) }

// Source is a command line from which a Daemon is loaded.
type Source struct {
	file   string // of --config
	flags  Daemon // what the flags of the daemon say
	volume Volume // what the flags of the volume say

	volumeFlags *pflag.FlagSet
}

// Bind adds the flags of serve to fs. Load is called after fs was parsed.
func Bind(fs *pflag.FlagSet) *Source {
	s := &Source{volumeFlags: pflag.NewFlagSet("volume", pflag.ContinueOnError)}
	fs.SortFlags = false
	fs.StringVar(&s.file, "config", "", "TOML `FILE` with one or several volumes")
	s.volume.addFlags(s.volumeFlags)
	s.volumeFlags.SortFlags = false
	fs.AddFlagSet(s.volumeFlags)
	s.flags.addFlags(fs)
	return s
}

func (d *Daemon) addFlags(fs *pflag.FlagSet) {
	fs.StringVar(&d.Control, "control", "", "`SOCKET` of status and flush (default "+DefaultControl+")")
	fs.StringVar(&d.Shm, "shm", "", "`DIR` of the memory files, on a tmpfs (default "+DefaultShm+")")
	fs.Var(flagValue{&d.LogFormat, "text|json"}, "log-format", "form of the log (default text)")
	fs.Var(flagValue{&d.LogLevel, "debug|info|warn|error"}, "log-level", "least level that is logged (default info)")
}

func (v *Volume) addFlags(fs *pflag.FlagSet) {
	text := func(target interface{ UnmarshalText([]byte) error }, kind, name, usage string) {
		fs.Var(flagValue{target, kind}, name, usage)
	}
	fs.StringVar(&v.Name, "name", "", "name of the volume")
	text(&v.Backing, "BACKING", "backing", "where the content is kept: file:PATH, /dev/X, nbd://…, nbd+unix://…, aoe:eSHELF.SLOT@IF")
	text(&v.Size, "SIZE", "size", "size of the volume; creates a missing file (default: what the backing gives)")
	text(&v.Memory, "SIZE", "memory", "RAM for the hot set (default 256MiB)")
	text(&v.MaxDirty, "SIZE", "max-dirty", "bound of what is uncommitted (default a third of --memory)")
	text(&v.Ack, "ram|peer|disk", "ack", "when a write is answered (default disk, with a peer: peer)")
	text(&v.Flush, "ack|disk", "flush", "what FLUSH and FUA wait for (default ack)")
	text(&v.Staleness, "DURATION", "staleness", "longest time between two commits (default 1s)")
	text(&v.Journal, "internal|none|BACKING", "journal", "where the journal lies (default as the backing says, internal on a new one)")
	text(&v.JournalSize, "SIZE", "journal-size", "size of a new journal (default twice --max-dirty)")
	text(listenList{&v.Listen}, "LISTEN", "listen", "nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH (repeatable)")
	text(&v.SocketMode, "MODE", "socket-mode", "mode of unix sockets (default 0660)")
	fs.BoolVar(&v.Force, "force", false, "do what is otherwise refused for safety")
	text(&v.Role, "primary|secondary", "role", "wished role in a pair (default the stored one)")
	fs.StringVar(&v.Peer, "peer", "", "`HOST:PORT` of the peer (lands later)")
	fs.StringVar(&v.PeerListen, "peer-listen", "", "`HOST:PORT` where the peer connects (lands later)")
	text(&v.PeerTimeout, "DURATION", "peer-timeout", "silence after which the peer is lost (lands later)")
	text(&v.OnPeerLoss, "step-down|continue|stop", "on-peer-loss", "what to do without the peer (lands later)")
	text(&v.OnArbiterLoss, "step-down|continue|stop", "on-arbiter-loss", "what to do without the arbiter (lands later)")
	text(&v.Holdup, "DURATION", "holdup", "time that the battery bridges: bounds what is uncommitted (default none)")
	text(&v.BackingTimeout, "DURATION", "backing-timeout", "silence after which the backing has failed (default 30s)")
	fs.StringVar(&v.OnIOError, "on-io-error", "", "what to do when the backing fails (lands later)")
}

// Load reads the file of --config, or the volume from the flags, and checks everything. Its errors are
// control.Failures. Nothing is created or changed.
func (s *Source) Load() (*Daemon, error) {
	d := &Daemon{Volumes: []*Volume{&s.volume}}
	if s.file != "" {
		if err := s.refuseVolumeFlags(); err != nil {
			return nil, err
		}
		var err error
		if d, err = readFile(s.file); err != nil {
			return nil, err
		}
	}
	d.override(&s.flags)
	if err := d.complete(); err != nil {
		return nil, err
	}
	return d, nil
}

// refuseVolumeFlags holds that a volume is described in one place.
func (s *Source) refuseVolumeFlags() error {
	var name string
	s.volumeFlags.VisitAll(func(f *pflag.Flag) {
		if f.Changed {
			name = f.Name
		}
	})
	if name == "" {
		return nil
	}
	return control.Usage("write it into the file, or leave --config out", "--%s and --config exclude one another", name)
}

// override takes from flags what they say.
func (d *Daemon) override(flags *Daemon) {
	setIfGiven(&d.Control, flags.Control)
	setIfGiven(&d.Shm, flags.Shm)
	setIfGiven(&d.LogFormat, flags.LogFormat)
	setIfGiven(&d.LogLevel, flags.LogLevel)
}

func setIfGiven[T comparable](dst *T, v T) {
	var none T
	if v != none {
		*dst = v
	}
}

func setDefault[T comparable](dst *T, v T) {
	var none T
	if *dst == none {
		*dst = v
	}
}

// complete fills in the defaults and checks all.
func (d *Daemon) complete() error {
	setDefault(&d.Control, DefaultControl)
	setDefault(&d.Shm, DefaultShm)
	setDefault(&d.LogFormat, LogText)
	setDefault(&d.LogLevel, LogInfo)
	for _, v := range d.Volumes {
		v.setDefaults()
	}
	if err := d.validate(); err != nil {
		return err
	}
	for _, v := range d.Volumes {
		if err := v.refuseLater(); err != nil {
			return err
		}
	}
	return nil
}

func (v *Volume) setDefaults() {
	setDefault(&v.Memory, 256<<20)
	setDefault(&v.MaxDirty, v.Memory/3/BlockBytes*BlockBytes)
	setDefault(&v.Flush, FlushAck)
	setDefault(&v.Staleness, Duration(defaultStaleness))
	setDefault(&v.BackingTimeout, Duration(defaultBackingTimeout))
	setDefault(&v.SocketMode, 0o660)
	if v.Peer != "" {
		setDefault(&v.Ack, AckPeer)
	}
	setDefault(&v.Ack, AckDisk)
	for i := range v.Listen {
		setDefault(&v.Listen[i].Export, v.Name)
	}
}

// sameFile reports whether both paths lead to one existing file.
func sameFile(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}
