package config

import (
	"encoding"
	"fmt"
	"io/fs"
	"math/big"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// SectorBytes is what every size is a multiple of.
const SectorBytes = 512

// Size is a number of bytes. Its text is a number and a unit of 1024 (4M, 4MiB), or of 1000 where the unit ends
// in a B without i (4MB); a bare number counts bytes. Zero means that it was not given.
type Size int64

// sizeUnits are the exponents of the letters of a unit.
const sizeUnits = "kmgtpe"

// maxSizeText bounds the text of a size: enough for every int64 with a fraction and a unit.
const maxSizeText = 40

// UnmarshalText parses a size. It refuses what is negative, zero, too large or no whole number of sectors.
func (s *Size) UnmarshalText(text []byte) error {
	number, unit, err := splitSize(string(text))
	if err != nil {
		return err
	}
	value, ok := new(big.Rat).SetString(number)
	if !ok {
		return fmt.Errorf("size %q is not a number with a unit, such as 512K, 64MiB or 1.5G", text)
	}
	value.Mul(value, new(big.Rat).SetInt(unit))
	sectors := new(big.Rat).Quo(value, big.NewRat(SectorBytes, 1))
	whole := new(big.Int).Quo(sectors.Num(), sectors.Denom())
	bytes := new(big.Int).Mul(whole, big.NewInt(SectorBytes))
	switch {
	case !bytes.IsInt64():
		return fmt.Errorf("size %q is larger than any device", text)
	case value.Sign() == 0:
		return fmt.Errorf("size %q is nothing; it must be positive", text)
	case !sectors.IsInt():
		return fmt.Errorf("size %q is no whole number of %d-byte sectors; the nearest are %s", text, SectorBytes,
			nearest(bytes.Int64(), SectorBytes))
	}
	*s = Size(bytes.Int64())
	return nil
}

// splitSize parts the text of a size into its decimal number and the bytes of its unit.
func splitSize(text string) (number string, unit *big.Int, err error) {
	if len(text) > maxSizeText {
		return "", nil, fmt.Errorf("size of %d characters is not a size", len(text))
	}
	end := strings.LastIndexAny(text, "0123456789.") + 1
	number, suffix := text[:end], strings.ToLower(strings.Trim(text[end:], " "))
	if strings.Trim(number, "0123456789.") != "" || strings.Trim(number, ".") == "" {
		return "", nil, fmt.Errorf("size %q is not a number with a unit, such as 512K, 64MiB or 1.5G", text)
	}
	if suffix == "" || suffix == "b" {
		return number, big.NewInt(1), nil
	}
	base := int64(1024)
	exponent := strings.IndexByte(sizeUnits, suffix[0]) + 1
	switch suffix[1:] {
	case "", "i", "ib":
	case "b":
		base = 1000
	default:
		exponent = 0
	}
	if exponent == 0 {
		return "", nil, fmt.Errorf("size %q has the unknown unit %q; units are K M G T (1024) and kB MB GB TB (1000)", text, suffix)
	}
	return number, new(big.Int).Exp(big.NewInt(base), big.NewInt(int64(exponent)), nil), nil
}

// nearest names the multiples of unit around bytes that are good sizes.
func nearest(bytes, unit int64) string {
	below := bytes / unit * unit
	if below == 0 {
		return strconv.FormatInt(unit, 10)
	}
	return fmt.Sprintf("%d and %d", below, below+unit)
}

// String prints the size as people read it, such as 4.0 MiB; empty when it was not given.
func (s Size) String() string {
	if s == 0 {
		return ""
	}
	return FormatBytes(int64(s))
}

// FormatBytes prints a number of bytes as people read it, such as 4.0 MiB.
func FormatBytes(n int64) string {
	if n < 0 {
		return "-" + humanize.IBytes(uint64(-n))
	}
	return humanize.IBytes(uint64(n))
}

// Duration is a span of time. Its text has a unit, such as 250ms or 3s. Zero means that it was not given.
type Duration time.Duration

// UnmarshalText parses a duration. It refuses what is negative or zero.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("duration %q is not a number with a unit, such as 250ms or 3s", text)
	}
	if v <= 0 {
		return fmt.Errorf("duration %q must be positive", text)
	}
	*d = Duration(v)
	return nil
}

// String prints the duration as Go does; empty when it was not given.
func (d Duration) String() string {
	if d == 0 {
		return ""
	}
	return time.Duration(d).String()
}

// FileMode is the mode of a file in octal digits. Zero means that it was not given.
type FileMode fs.FileMode

// UnmarshalText parses an octal mode, with or without a leading 0 or 0o.
func (m *FileMode) UnmarshalText(text []byte) error {
	v, err := strconv.ParseUint(strings.TrimPrefix(string(text), "0o"), 8, 32)
	if err != nil || v == 0 || v > 0o777 {
		return fmt.Errorf("mode %q is not an octal file mode from 1 to 777, such as 0660", text)
	}
	*m = FileMode(v)
	return nil
}

// String prints the mode in octal digits; empty when it was not given.
func (m FileMode) String() string {
	if m == 0 {
		return ""
	}
	return fmt.Sprintf("%04o", uint32(m))
}

// Ack says when a write is answered.
type Ack string

// The levels of a promise, weakest first.
const (
	AckRAM  Ack = "ram"  // in this node's RAM
	AckPeer Ack = "peer" // in the RAM of both nodes
	AckDisk Ack = "disk" // committed on the backing
)

// UnmarshalText parses a level.
func (a *Ack) UnmarshalText(text []byte) error { return choose(a, text, AckRAM, AckPeer, AckDisk) }

// FlushMode says what FLUSH and FUA wait for.
type FlushMode string

// What FLUSH and FUA wait for.
const (
	FlushAck  FlushMode = "ack"  // nothing beyond the promise of Ack
	FlushDisk FlushMode = "disk" // a commit on the backing
)

// UnmarshalText parses a flush mode.
func (f *FlushMode) UnmarshalText(text []byte) error { return choose(f, text, FlushAck, FlushDisk) }

// Role is the part of a node in a pair.
type Role string

// The roles.
const (
	RolePrimary   Role = "primary"
	RoleSecondary Role = "secondary"
)

// UnmarshalText parses a role.
func (r *Role) UnmarshalText(text []byte) error { return choose(r, text, RolePrimary, RoleSecondary) }

// OnPeerLoss says what a node does that has lost its peer.
type OnPeerLoss string

// UnmarshalText parses what to do on the loss of a peer.
func (o *OnPeerLoss) UnmarshalText(text []byte) error {
	return choose(o, text, "step-down", "continue", "stop")
}

// LogFormat is the form of a line of the log.
type LogFormat string

// The forms of the log.
const (
	LogText LogFormat = "text"
	LogJSON LogFormat = "json"
)

// UnmarshalText parses a log format.
func (l *LogFormat) UnmarshalText(text []byte) error { return choose(l, text, LogText, LogJSON) }

// LogLevel is the least level that is logged.
type LogLevel string

// The log levels.
const (
	LogDebug LogLevel = "debug"
	LogInfo  LogLevel = "info"
	LogWarn  LogLevel = "warn"
	LogError LogLevel = "error"
)

// UnmarshalText parses a log level.
func (l *LogLevel) UnmarshalText(text []byte) error {
	return choose(l, text, LogDebug, LogInfo, LogWarn, LogError)
}

// choose sets dst to text where that is one of the words.
func choose[T ~string](dst *T, text []byte, words ...T) error {
	for _, w := range words {
		if string(text) == string(w) {
			*dst = w
			return nil
		}
	}
	return fmt.Errorf("%q is none of %v", text, words)
}

// flagValue makes a flag of a type that reads itself from text. Defaults stand in the usage of the flag.
type flagValue struct {
	target encoding.TextUnmarshaler
	kind   string
}

func (f flagValue) Set(text string) error { return f.target.UnmarshalText([]byte(text)) }
func (f flagValue) Type() string          { return f.kind }
func (f flagValue) String() string        { return "" }
