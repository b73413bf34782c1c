package config

import (
	"encoding"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

// BlockBytes is the unit of the cache; volumes and memory are multiples of it.
const BlockBytes = 4096

// Bounds of the settings.
const (
	minMemory        = 8 << 20
	maxSize          = 64 << 40
	minMaxDirty      = 1 << 20
	defaultStaleness = time.Second
	minStaleness     = time.Millisecond
	maxStaleness     = time.Hour
	minJournal       = 4 << 20
	maxJournal       = 8 << 40

	defaultBackingTimeout = 30 * time.Second
	minBackingTimeout     = time.Second
	maxHoldup             = 24 * time.Hour
)

// volumeName is what a volume may be called: names are parts of file names, URIs and metrics.
var volumeName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// validate checks every volume, and all of them together.
func (d *Daemon) validate() error {
	if err := checkSocketPath(d.Control); err != nil {
		return control.Usage("", "--control: %w", err)
	}
	if len(d.Volumes) == 0 {
		return control.Usage("begin it with [[volume]]", "the configuration names no volume")
	}
	if err := errors.Join(checkWord("log_format", &d.LogFormat), checkWord("log_level", &d.LogLevel)); err != nil {
		return control.Usage("", "%w", err)
	}
	for _, v := range d.Volumes {
		if err := v.validate(); err != nil {
			return err
		}
	}
	for i, v := range d.Volumes {
		for _, other := range d.Volumes[:i] {
			if err := v.clash(other); err != nil {
				return err
			}
		}
	}
	return d.checkExports()
}

func (v *Volume) validate() error {
	for _, required := range []struct {
		missing bool
		flag    string
	}{
		{v.Name == "", "name"},
		{v.Backing == (Backing{}), "backing"},
		{len(v.Listen) == 0, "listen"},
	} {
		if required.missing {
			return control.Usage("--name, --backing and one --listen are required", "volume %q: %s is missing", v.Name, required.flag)
		}
	}
	if !volumeName.MatchString(v.Name) {
		return control.Usage("use letters, digits, dot, dash and underscore, at most 64, the first a letter or digit",
			"volume %q: the name does not fit a file name", v.Name)
	}
	if err := v.validateWords(); err != nil {
		return control.Usage("", "volume %q: %w", v.Name, err)
	}
	if err := v.validateSizes(); err != nil {
		return control.Usage("", "volume %q: %w", v.Name, err)
	}
	if s := time.Duration(v.Staleness); s < minStaleness || s > maxStaleness {
		return control.Usage("", "volume %q: staleness %v is outside %v to %v", v.Name, s, minStaleness, maxStaleness)
	}
	if t := time.Duration(v.BackingTimeout); t < minBackingTimeout || t > maxStaleness {
		return control.Usage("", "volume %q: backing_timeout %v is outside %v to %v", v.Name, t, minBackingTimeout, maxStaleness)
	}
	if h := time.Duration(v.Holdup); h < 0 || h > maxHoldup {
		return control.Usage("", "volume %q: holdup %v is outside 0 to %v", v.Name, h, maxHoldup)
	}
	if v.SocketMode > 0o777 {
		return control.Usage("write it as a string", "volume %q: socket_mode %v is no file mode", v.Name, v.SocketMode)
	}
	if v.Ack == AckPeer && v.Peer == "" {
		return control.Usage("name the peer by --peer HOST:PORT, or choose --ack ram or --ack disk",
			"volume %q: --ack peer without --peer", v.Name)
	}
	return nil
}

func (v *Volume) validateWords() error {
	return errors.Join(checkWord("ack", &v.Ack), checkWord("flush", &v.Flush), checkWord("role", &v.Role),
		checkWord("on_peer_loss", &v.OnPeerLoss), checkWord("on_arbiter_loss", &v.OnArbiterLoss))
}

// checkWord checks a word that go-toml has set: it writes strings into types of kind string as they are.
func checkWord[T ~string, P interface {
	*T
	encoding.TextUnmarshaler
}](key string, word P) error {
	if *word == "" {
		return nil
	}
	if err := word.UnmarshalText([]byte(*word)); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

func (v *Volume) validateSizes() error {
	for _, s := range []struct {
		what          string
		value         Size
		least, most   int64
		mayBeNotGiven bool
	}{
		{"size", v.Size, BlockBytes, maxSize, true},
		{"memory", v.Memory, minMemory, maxSize, false},
		{"max_dirty", v.MaxDirty, minMaxDirty, int64(v.Memory) / 3, false},
		{"journal_size", v.JournalSize, minJournal, maxJournal, true},
	} {
		n := int64(s.value)
		switch {
		case s.mayBeNotGiven && n == 0:
		case n < s.least:
			return fmt.Errorf("%s %s (%d) is less than %s", s.what, s.value, n, FormatBytes(s.least))
		case n > s.most:
			return fmt.Errorf("%s %s (%d) is more than %s (%d)", s.what, s.value, n, FormatBytes(s.most), s.most)
		case n%BlockBytes != 0:
			return fmt.Errorf("%s %d is no multiple of %d; the nearest are %s", s.what, n, BlockBytes, nearest(n, BlockBytes))
		}
	}
	return nil
}

// clash tells what two volumes have in common that they must not.
func (v *Volume) clash(other *Volume) error {
	if v.Name == other.Name {
		return control.Usage("give each volume a name of its own", "two volumes are called %q", v.Name)
	}
	same := v.Backing.key() == other.Backing.key()
	if !same && v.Backing.Path != "" && other.Backing.Path != "" {
		same = sameFile(v.Backing.Path, other.Backing.Path)
	}
	if same {
		return control.Usage("give each volume a backing of its own", "volumes %q and %q have the same backing %s",
			other.Name, v.Name, v.Backing)
	}
	return nil
}

// checkExports holds that an address has an export of each name once, and one mode.
func (d *Daemon) checkExports() error {
	type export struct{ address, name string }
	owners := map[export]string{}
	modes := map[string]FileMode{}
	for _, v := range d.Volumes {
		for _, l := range v.Listen {
			e := export{l.Key(), l.Export}
			if owner, taken := owners[e]; taken {
				return control.Usage("end one of the addresses in another /NAME",
					"volumes %q and %q both export %q at %s", owner, v.Name, l.Export, l.Address)
			}
			owners[e] = v.Name
			if mode, set := modes[l.Key()]; set && l.Network == "unix" && mode != v.SocketMode {
				return control.Usage("give the volumes of one socket the same socket_mode",
					"%s cannot have the modes %v and %v", l.Address, mode, v.SocketMode)
			}
			modes[l.Key()] = v.SocketMode
		}
	}
	return nil
}

// refuseLater refuses settings that have a name but no function yet, so that nobody relies on them.
func (v *Volume) refuseLater() error {
	for _, s := range []struct {
		used bool
		what string
	}{
		{v.Peer != "", "--peer"},
		{v.PeerListen != "", "--peer-listen"},
		{v.PeerTimeout != 0, "--peer-timeout"},
		{v.OnPeerLoss != "", "--on-peer-loss"},
		{v.OnArbiterLoss != "", "--on-arbiter-loss"},
		{v.Role == RoleSecondary, "--role secondary"},
		{v.OnIOError != "", "--on-io-error"},
		{v.Journal.Backing.Kind == BackingLayout, "--journal " + v.Journal.String()},
		{v.Backing.Kind == BackingLayout, "--backing " + v.Backing.String()},
	} {
		if s.used {
			return control.Later(fmt.Sprintf("volume %q: %s", v.Name, s.what))
		}
	}
	for _, l := range v.Listen {
		if l.Network == "aoe" {
			return control.Later(fmt.Sprintf("volume %q: --listen %s", v.Name, l))
		}
	}
	return nil
}
