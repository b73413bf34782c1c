package nbd

import (
	"errors"
	"fmt"
	"math/bits"
	"strings"
	"sync/atomic"
	"unicode/utf8"
)

// Export is a Device under a name. It must not be changed after AddExport.
type Export struct {
	// Name is what clients ask for; UTF-8 without NUL, at most 4096 bytes. Clients that ask for the empty name
	// get the export of that name, else the only export.
	Name string
	// Description is shown by LIST and INFO.
	Description string
	// Device does the work.
	Device Device
	// ReadOnly refuses everything that writes with EPERM.
	ReadOnly bool
	// Rotational tells clients that seeks are expensive.
	Rotational bool
	// MaxPayload is the largest payload of a READ or a WRITE in bytes: a power of two, from PreferredBlock to
	// 32 MiB. A larger one is consumed and answered with an error. 0 means 32 MiB.
	MaxPayload uint32
	// PreferredBlock is the block size that clients should use, in bytes: a power of two, at least 512.
	// Smaller and unaligned requests work too. 0 means 4096.
	PreferredBlock uint32
	// Contexts are the names of the metadata contexts for which the Device answers BLOCK_STATUS, such as
	// "base:allocation"; at most four. In the protocol the id of Contexts[i] is i+1.
	Contexts []string
	// Ready refuses INFO and GO with ERR_SHUTDOWN and the text of the error while it returns one; nil means
	// that the export always serves. It may be called at any time, from any goroutine.
	Ready func() error
	// Generation grows whenever writes that were answered may have been lost, and only then; 0 = unknown, nil
	// means 0. A session that began in an older one is refused for good. It may be called at any time, from any
	// goroutine.
	Generation func() uint64
	// Incarnation is the current incarnation of the volume, told to our own clients; nil means 0, unknown.
	Incarnation func() uint64
}

// export is what the server keeps of an Export.
type export struct {
	Export
	// receiving bounds the payloads that are being received in pieces lent by the device, so that slow senders
	// cannot hold all its room: one largest payload.
	receiving budget
	sessions  sessions
	clients   atomic.Int64 // connections in the transmission phase
}

func newExport(e *Export) (*export, error) {
	x := &export{Export: *e}
	if x.MaxPayload == 0 {
		x.MaxPayload = maxPayloadBytes
	}
	if x.PreferredBlock == 0 {
		x.PreferredBlock = min(4096, x.MaxPayload)
	}
	if err := x.check(); err != nil {
		return nil, err
	}
	x.receiving.free = int64(x.MaxPayload)
	x.sessions.byID = make(map[[16]byte]*sessionState)
	return x, nil
}

func (x *export) check() error {
	switch {
	case !validString(x.Name) || !validString(x.Description):
		return fmt.Errorf("export %q: name and description must be UTF-8 without NUL, at most %d bytes", x.Name, maxString)
	case x.Device == nil:
		return fmt.Errorf("export %q: no device", x.Name)
	case x.Device.Size() < 0:
		return fmt.Errorf("export %q: size %d is negative", x.Name, x.Device.Size())
	case bits.OnesCount32(x.PreferredBlock) != 1 || x.PreferredBlock < 512:
		return fmt.Errorf("export %q: preferred block size %d is not a power of two of at least 512", x.Name, x.PreferredBlock)
	case bits.OnesCount32(x.MaxPayload) != 1 || x.MaxPayload < x.PreferredBlock || x.MaxPayload > maxPayloadBytes:
		return fmt.Errorf("export %q: maximum payload %d is not a power of two from %d to %d",
			x.Name, x.MaxPayload, x.PreferredBlock, maxPayloadBytes)
	case len(x.Contexts) > maxContexts:
		return fmt.Errorf("export %q: %d metadata contexts, at most %d are possible", x.Name, len(x.Contexts), maxContexts)
	}
	for _, name := range x.Contexts {
		if !validString(name) || strings.IndexByte(name, ':') < 1 || strings.HasSuffix(name, ":") {
			return fmt.Errorf("export %q: metadata context %q is not NAMESPACE:NAME", x.Name, name)
		}
	}
	return nil
}

// validString reports whether s may go over the wire (proto.md, "Values").
func validString(s string) bool {
	return len(s) <= maxString && utf8.ValidString(s) && strings.IndexByte(s, 0) < 0
}

// transmissionFlags are those of x in mode, with so many metadata contexts selected.
func (x *export) transmissionFlags(mode replyMode, contexts uint32) TransmissionFlags {
	f := FlagHasFlags | FlagSendFlush | FlagSendFUA | FlagCanMultiConn | FlagSendCache
	if x.ReadOnly {
		f |= FlagReadOnly
	} else {
		f |= FlagSendTrim | FlagSendWriteZeroes | FlagSendFastZero
	}
	if x.Rotational {
		f |= FlagRotational
	}
	if mode != repliesSimple {
		f |= FlagSendDF
	}
	if mode == repliesExtended && contexts != 0 {
		f |= FlagBlockStatusPayload
	}
	return f
}

// terms are those of a connection to x.
func (x *export) terms(mode replyMode, contexts uint32) terms {
	return terms{
		size:       uint64(x.Device.Size()),
		maxPayload: uint64(x.MaxPayload),
		flags:      x.transmissionFlags(mode, contexts),
		mode:       mode,
		contexts:   contexts,
	}
}

// ready tells why x does not serve now.
func (x *export) ready() error {
	if x.Ready == nil {
		return nil
	}
	return x.Ready()
}

func (x *export) generation() uint64 {
	if x.Generation == nil {
		return 0
	}
	return x.Generation()
}

func (x *export) incarnation() uint64 {
	if x.Incarnation == nil {
		return 0
	}
	return x.Incarnation()
}

// exports are those of a server, in the order in which they were added.
type exports []*export

var errDuplicateExport = errors.New("there is an export of that name already")

// find returns the export that a client means by name, or nil.
func (xs exports) find(name string) *export {
	for _, x := range xs {
		if x.Name == name {
			return x
		}
	}
	if name == "" && len(xs) == 1 {
		return xs[0]
	}
	return nil
}
