package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"unicode/utf8"
)

// Bounds of the negotiation.
const (
	maxOptionReply = 64 << 10 // bytes of one reply of a server
	maxReplies     = 64       // replies to one option
	maxMinBlock    = 64 << 10 // proto.md, "Block size constraints"
)

// What holds where a server names no block sizes (proto.md, "Block size constraints").
const (
	assumedMinBlock   = 512
	assumedPreferred  = 4096
	allocationContext = "base:allocation"
)

const magicOldstyle uint64 = 0x00420281861253

// Errors of the negotiation that a caller may want to tell apart. An OptionError is one of them where it says so.
var (
	// ErrUnsupported says that the server does not know an option.
	ErrUnsupported = errors.New("option is not supported by the server")
	// ErrShutdown says that the server, or the export, does not serve now; it may later.
	ErrShutdown = errors.New("server does not serve now")
	// ErrUnknownExport says that the server has no export of that name.
	ErrUnknownExport = errors.New("server has no such export")
	// ErrRefused says that the server refuses by policy; to OptSession this is final.
	ErrRefused = errors.New("server refuses")
	// ErrTLSRequired says that the server insists on TLS.
	ErrTLSRequired = errors.New("server insists on TLS, which is not there yet; export without it over a trusted network")
)

// OptionError is the refusal of an option by a server.
type OptionError struct {
	Option Option
	Text   string // the server's words; may be empty, and hostile
	reply  optionReply
}

// Error tells the option and the reason.
func (e *OptionError) Error() string {
	reason := fmt.Sprintf("error %#x", uint32(e.reply))
	if err := e.Unwrap(); err != nil {
		reason = err.Error()
	}
	if e.Text == "" {
		return fmt.Sprintf("option %d: %s", e.Option, reason)
	}
	return fmt.Sprintf("option %d: %s: %q", e.Option, reason, e.Text)
}

// Unwrap gives the sentinel of the reply, nil if there is none.
func (e *OptionError) Unwrap() error {
	switch e.reply {
	case repErrUnsup:
		return ErrUnsupported
	case repErrShutdown:
		return ErrShutdown
	case repErrUnknown:
		return ErrUnknownExport
	case repErrPolicy:
		return ErrRefused
	case repErrTLSReqd:
		return ErrTLSRequired
	}
	return nil
}

// Info is what was negotiated for a connection.
type Info struct {
	Size  int64 // of the export, in bytes
	Flags TransmissionFlags
	// MinBlock, PreferredBlock and MaxPayload are the block sizes in bytes: what the server named, else 512, 4096
	// and 32 MiB. MaxPayload is a multiple of MinBlock and at most 32 MiB.
	MinBlock, PreferredBlock, MaxPayload uint32
	Replies                              ReplyFormat
	BlockStatus                          bool // base:allocation can be asked for

	allocation uint32 // id of base:allocation
	session    bool   // the server knows OptSession
	volume     sessionReply
}

// negotiator speaks the handshake. It reads no byte beyond it.
type negotiator struct {
	rw       io.ReadWriter
	export   string
	noZeroes bool
	data     []byte // of the last option reply
	info     Info
}

// negotiate goes from the greeting to the transmission phase.
func negotiate(rw io.ReadWriter, export string, o ConnOptions) (Info, error) {
	if len(export) > maxString || !utf8.ValidString(export) {
		return Info{}, fmt.Errorf("export name %.80q: it must be UTF-8 of at most %d bytes", export, maxString)
	}
	n := &negotiator{rw: rw, export: export}
	n.info = Info{MinBlock: assumedMinBlock, PreferredBlock: assumedPreferred, MaxPayload: maxPayloadBytes, Replies: ReplySimple}
	if err := n.greeting(); err != nil {
		return Info{}, fmt.Errorf("greeting: %w", err)
	}
	err := n.options(o)
	if err == nil {
		return n.info, nil
	}
	var refused *OptionError
	if errors.As(err, &refused) {
		_ = n.send(OptAbort, nil) // a courtesy
	}
	return Info{}, err
}

// greeting reads the server's and answers with the client flags.
func (n *negotiator) greeting() error {
	var b [sizeGreeting]byte
	if _, err := io.ReadFull(n.rw, b[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(b[:]) != magicGreeting {
		return fmt.Errorf("%w: %q is no NBD server's greeting; is it the right port?", ErrProtocol, b[:8])
	}
	flags := binary.BigEndian.Uint16(b[16:])
	switch magic := binary.BigEndian.Uint64(b[8:]); {
	case magic == magicOldstyle:
		return fmt.Errorf("%w: server speaks the old style only; let it name an export", ErrProtocol)
	case magic != magicOption:
		return fmt.Errorf("%w: greeting ends with %#x", ErrProtocol, magic)
	case flags&flagFixedNewstyle == 0:
		return fmt.Errorf("%w: server does not speak fixed newstyle; use a newer one", ErrProtocol)
	}
	n.noZeroes = flags&flagNoZeroes != 0
	_, err := n.rw.Write(binary.BigEndian.AppendUint32(nil, uint32(flags&(flagFixedNewstyle|flagNoZeroes))))
	return err
}

// options goes through the options in the order in which they depend on one another.
func (n *negotiator) options(o ConnOptions) error {
	if o.session != nil {
		if err := n.session(*o.session); err != nil {
			return err
		}
	}
	if err := n.replies(o.Replies); err != nil {
		return err
	}
	if n.info.Replies != ReplySimple {
		if err := n.metaContext(); err != nil {
			return err
		}
	}
	err := n.goExport()
	if errors.Is(err, ErrUnsupported) && n.info.Replies != ReplyExtended {
		return n.exportName()
	}
	return err
}

// session says which session the connection belongs to. A server that does not know the option is no error.
func (n *negotiator) session(s session) error {
	s.Export = n.export
	err := n.option(OptSession, s.append(nil), func(reply optionReply, data []byte) (err error) {
		if reply == repSession {
			n.info.session = true
			n.info.volume, err = parseSessionReply(data)
		}
		return err
	})
	if errors.Is(err, ErrUnsupported) {
		return nil
	}
	return err
}

// replies agrees on the best form of replies that both sides know, not better than best.
func (n *negotiator) replies(best ReplyFormat) error {
	for _, form := range []struct {
		replies ReplyFormat
		option  Option
	}{{ReplyExtended, OptExtendedHeaders}, {ReplyStructured, OptStructuredReply}} {
		if form.replies < best {
			continue
		}
		err := n.option(form.option, nil, nil)
		var refused *OptionError
		if err == nil {
			n.info.Replies = form.replies
			return nil
		} else if !errors.As(err, &refused) || errors.Is(err, ErrTLSRequired) {
			return err
		}
	}
	return nil
}

// metaContext asks for base:allocation. A server without it is no error.
func (n *negotiator) metaContext() error {
	b := n.appendName(nil)
	b = binary.BigEndian.AppendUint32(b, 1)
	b = binary.BigEndian.AppendUint32(b, uint32(len(allocationContext)))
	err := n.option(OptSetMetaContext, append(b, allocationContext...), func(reply optionReply, data []byte) error {
		if reply != repMetaContext {
			return nil
		}
		if len(data) < 4 || string(data[4:]) != allocationContext || n.info.BlockStatus {
			return fmt.Errorf("%w: context %.80q was not asked for, or twice", ErrProtocol, data)
		}
		n.info.BlockStatus, n.info.allocation = true, binary.BigEndian.Uint32(data)
		return nil
	})
	var refused *OptionError
	if errors.As(err, &refused) {
		n.info.BlockStatus = false
		return nil
	}
	return err
}

// goExport enters the transmission phase, with block sizes.
func (n *negotiator) goExport() error {
	b := n.appendName(nil)
	b = binary.BigEndian.AppendUint16(b, 1)
	b = binary.BigEndian.AppendUint16(b, infoBlockSize)
	haveExport := false
	err := n.option(OptGo, b, func(reply optionReply, data []byte) error {
		if reply != repInfo {
			return nil
		}
		if len(data) < 2 {
			return fmt.Errorf("%w: information of %d bytes", ErrProtocol, len(data))
		}
		kind, data := binary.BigEndian.Uint16(data), data[2:]
		switch {
		case kind == infoExport && len(data) == 10:
			haveExport = true
			return n.exportInfo(data)
		case kind == infoBlockSize && len(data) == 12:
			return n.blockSizes(data)
		case kind == infoExport || kind == infoBlockSize:
			return fmt.Errorf("%w: information %d of %d bytes", ErrProtocol, kind, len(data))
		}
		return nil
	})
	if err == nil && !haveExport {
		return fmt.Errorf("%w: server tells no size", ErrProtocol)
	}
	return err
}

// exportName enters the transmission phase in the old way, which has no replies: a server that refuses hangs up.
func (n *negotiator) exportName() error {
	if err := n.send(OptExportName, []byte(n.export)); err != nil {
		return err
	}
	var b [10 + 124]byte
	answer := b[:]
	if n.noZeroes {
		answer = b[:10]
	}
	if _, err := io.ReadFull(n.rw, answer); err != nil {
		return fmt.Errorf("export %q, which the server may not have: %w", n.export, err)
	}
	return n.exportInfo(b[:10])
}

// exportInfo reads size and transmission flags.
func (n *negotiator) exportInfo(b []byte) error {
	size := binary.BigEndian.Uint64(b)
	if size > math.MaxInt64 {
		return fmt.Errorf("%w: export of %d bytes, more than 2^63", ErrProtocol, size)
	}
	n.info.Size = int64(size)
	n.info.Flags = TransmissionFlags(binary.BigEndian.Uint16(b[8:]))
	if n.info.Flags&FlagHasFlags == 0 {
		n.info.Flags = 0 // proto.md, "Transmission flags": then none of them counts
	}
	return nil
}

// blockSizes reads INFO_BLOCK_SIZE.
func (n *negotiator) blockSizes(b []byte) error {
	least, preferred, most := binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])
	if bits.OnesCount32(least) != 1 || least > maxMinBlock || preferred < least || most < least || most < assumedMinBlock {
		return fmt.Errorf("%w: block sizes %d, %d, %d (minimum, preferred, maximum)", ErrProtocol, least, preferred, most)
	}
	n.info.MinBlock, n.info.PreferredBlock = least, preferred
	n.info.MaxPayload = min(most, maxPayloadBytes) / least * least
	return nil
}

// appendName adds the name of the export as INFO, GO and SET_META_CONTEXT have it.
func (n *negotiator) appendName(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(n.export)))
	return append(b, n.export...)
}

// option sends an option and takes its replies: each one before the ACK goes to each, if there is one. A refusal is
// an *OptionError; after any other error the connection is of no use.
func (n *negotiator) option(option Option, data []byte, each func(optionReply, []byte) error) error {
	if err := n.send(option, data); err != nil {
		return fmt.Errorf("option %d: %w", option, err)
	}
	for range maxReplies {
		reply, err := n.reply(option)
		switch {
		case err != nil:
			return fmt.Errorf("option %d: %w", option, err)
		case reply == repAck:
			return nil
		case reply&repError != 0:
			return &OptionError{Option: option, reply: reply, Text: string(n.data[:min(len(n.data), maxString)])}
		case each == nil:
			return fmt.Errorf("option %d: %w: reply of type %d", option, ErrProtocol, reply)
		}
		if err := each(reply, n.data); err != nil {
			return fmt.Errorf("option %d: %w", option, err)
		}
	}
	return fmt.Errorf("option %d: %w: more than %d replies", option, ErrProtocol, maxReplies)
}

func (n *negotiator) send(option Option, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(option))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := n.rw.Write(append(b, data...))
	return err
}

// reply reads one reply to option; its data are in n.data until the next.
func (n *negotiator) reply(option Option) (optionReply, error) {
	var b [sizeOptionReply]byte
	if _, err := io.ReadFull(n.rw, b[:]); err != nil {
		return 0, err
	}
	magic, echo, length := binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[16:])
	if magic != magicOptionReply || Option(echo) != option || length > maxOptionReply {
		return 0, fmt.Errorf("%w: reply with magic %#x, option %d, %d bytes", ErrProtocol, magic, echo, length)
	}
	if cap(n.data) < int(length) {
		n.data = make([]byte, length)
	}
	n.data = n.data[:length]
	_, err := io.ReadFull(n.rw, n.data)
	return optionReply(binary.BigEndian.Uint32(b[12:])), err
}
