package config

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/ramshelf/ramshelf/aoe"
	"github.com/ramshelf/ramshelf/nbd"
)

// maxSocketPath is the longest path of a unix socket, in bytes (unix(7)).
const maxSocketPath = 107

// BackingKind is the form of a backing.
type BackingKind string

// The forms of a backing.
const (
	BackingFile   BackingKind = "file"
	BackingDevice BackingKind = "device"
	BackingNBD    BackingKind = "nbd"
	BackingAoE    BackingKind = "aoe"
	BackingLayout BackingKind = "layout"
)

// Backing names where a volume's content is kept. The zero value means that none was given.
type Backing struct {
	Kind BackingKind
	Path string // of a file or a device, absolute
	URI  string // of an NBD export, with its scheme
	AoE  string // of an AoE target: eSHELF.SLOT@IF[+IF…]
	text string
}

// layouts are the words that combine several backings into one.
var layouts = []string{"stripe:", "mirror:", "stagger:"}

// UnmarshalText parses file:PATH, /dev/X, nbd://…, nbd+unix://…, aoe:… and the layouts.
func (b *Backing) UnmarshalText(text []byte) error {
	v := Backing{text: string(text)}
	if err := v.parse(); err != nil {
		return err
	}
	*b = v
	return nil
}

func (b *Backing) parse() error {
	for _, l := range layouts {
		if strings.HasPrefix(b.text, l) {
			b.Kind = BackingLayout
			return nil
		}
	}
	path, isFile := strings.CutPrefix(b.text, "file:")
	target, isAoE := strings.CutPrefix(b.text, "aoe:")
	switch {
	case isFile:
		return b.setPath(BackingFile, path)
	case strings.HasPrefix(b.text, "/dev/") && !strings.HasPrefix(b.text, "/dev/shm/"):
		return b.setPath(BackingDevice, b.text)
	case isAoE:
		if _, err := aoe.ParseEndpoint(target); err != nil {
			return fmt.Errorf("backing: %w", err)
		}
		b.Kind, b.AoE = BackingAoE, target
		return nil
	case strings.HasPrefix(b.text, "nbd"):
		if _, err := nbd.ParseURI(b.text); err != nil {
			return fmt.Errorf("backing: %w", err)
		}
		b.Kind, b.URI = BackingNBD, b.text
		return nil
	case !strings.Contains(b.text, ":") && b.text != "":
		return fmt.Errorf("backing %q has no kind; for a file say file:%s", b.text, b.text)
	}
	return fmt.Errorf("backing %q is none of file:PATH, /dev/X, nbd://HOST[:PORT]/NAME, nbd+unix:///NAME?socket=PATH, aoe:eSHELF.SLOT@IF", b.text)
}

func (b *Backing) setPath(kind BackingKind, path string) error {
	if path == "" {
		return fmt.Errorf("backing %q has no path; say file:PATH", b.text)
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("backing %q: %w", b.text, err)
	}
	b.Kind, b.Path = kind, abs
	return nil
}

// String is the backing as it was given.
func (b Backing) String() string { return b.text }

// later reports a form that has a name but no function yet.
func (b Backing) later() bool { return b.Kind == BackingLayout }

// key is equal for two backings that are the same by name.
func (b Backing) key() string {
	if b.Path != "" {
		return b.Path
	}
	return b.text
}

// Listen is an address at which a volume is exported.
type Listen struct {
	Network string // "tcp", "unix" or "aoe"
	Address string // host and port, or the path of a socket
	Export  string // name of the export; empty where none was given
	text    string
}

// UnmarshalText parses nbd://HOST[:PORT][/NAME], nbd+unix:///[NAME]?socket=PATH and aoe:….
func (l *Listen) UnmarshalText(text []byte) error {
	s := string(text)
	if address, ok := strings.CutPrefix(s, "aoe:"); ok {
		*l = Listen{Network: "aoe", Address: address, text: s}
		return nil
	}
	u, err := nbd.ParseURI(s)
	if err != nil {
		return fmt.Errorf("listen address: %w", err)
	}
	*l = Listen{Network: u.Network, Address: u.Address, Export: u.Export, text: s}
	return nil
}

// String is the address as it was given.
func (l Listen) String() string { return l.text }

// URI is what a client gives to reach the export.
func (l Listen) URI() string {
	return nbd.URI{Network: l.Network, Address: l.Address, Export: l.Export}.String()
}

// Key is equal for two addresses that one socket serves.
func (l Listen) Key() string {
	address := l.Address
	if l.Network == "unix" && !strings.HasPrefix(address, "@") {
		if abs, err := filepath.Abs(address); err == nil {
			address = abs
		}
	}
	return l.Network + ":" + address
}

// checkSocketPath refuses what the kernel cannot bind.
func checkSocketPath(path string) error {
	if len(path) > maxSocketPath {
		return fmt.Errorf("socket path %q is longer than %d bytes", path, maxSocketPath)
	}
	if strings.ContainsRune(path, 0) {
		return fmt.Errorf("socket path %q has a zero byte", path)
	}
	return nil
}

// listenList is the value of a flag that may be repeated.
type listenList struct{ list *[]Listen }

func (l listenList) UnmarshalText(text []byte) error {
	var v Listen
	if err := v.UnmarshalText(text); err != nil {
		return err
	}
	*l.list = append(*l.list, v)
	return nil
}

// JournalKind is where a volume's journal lies.
type JournalKind string

// Where a journal lies.
const (
	JournalNone     JournalKind = "none"     // there is none: straight home
	JournalInternal JournalKind = "internal" // at the tail of the backing
	JournalBacking  JournalKind = "backing"  // on a backing of its own
)

// Journal says where a volume's journal lies. The zero value means that nothing was said.
type Journal struct {
	Kind    JournalKind
	Backing Backing // where Kind is JournalBacking
}

// UnmarshalText parses none, internal or a backing.
func (j *Journal) UnmarshalText(text []byte) error {
	switch s := string(text); s {
	case string(JournalNone), string(JournalInternal):
		*j = Journal{Kind: JournalKind(s)}
		return nil
	default:
		v := Journal{Kind: JournalBacking}
		if err := v.Backing.UnmarshalText(text); err != nil {
			return fmt.Errorf("journal is none of none, internal and a backing: %w", err)
		}
		*j = v
		return nil
	}
}

// String is the journal as it was given.
func (j Journal) String() string {
	if j.Kind == JournalBacking {
		return j.Backing.String()
	}
	return string(j.Kind)
}
