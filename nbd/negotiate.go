package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"
)

var (
	errAborted      = errors.New("client aborted the negotiation")
	errClientFlags  = errors.New("client flags unknown or not offered")
	errOptionMagic  = errors.New("no option where one must begin")
	errOptionLong   = fmt.Errorf("option longer than %d bytes", maxDiscardBytes)
	errOptions      = errors.New("too many options")
	errNotFixed     = errors.New("option other than EXPORT_NAME without fixed newstyle")
	errExportName   = errors.New("EXPORT_NAME cannot be answered")
	errOptionSyntax = errors.New("malformed option")
)

// negotiation is the state of the handshake phase of a connection.
type negotiation struct {
	*conn
	fixed    bool
	noZeroes bool
	mode     replyMode
	deadline time.Time
	options  int // that the client may still send
	listed   bool

	metaExport *export // of the last SET_META_CONTEXT
	contexts   uint32  // that it selected
	chosen     *export // set where the handshake has succeeded

	out []byte // the answer that is being made
}

// refusal is an error reply to an option.
type refusal struct {
	reply optionReply
	text  string
}

func (r *refusal) Error() string { return r.text }

func refuse(reply optionReply, format string, args ...any) error {
	return &refusal{reply, fmt.Sprintf(format, args...)}
}

// negotiate runs the handshake phase (proto.md, "Handshake phase"). When it returns nil, c.export and c.terms are
// what the client chose.
func (c *conn) negotiate() error {
	n := &negotiation{conn: c, options: maxOptions, deadline: time.Now().Add(c.srv.options.HandshakeTimeout)}
	c.nc.SetDeadline(n.deadline)
	if err := n.greet(); err != nil {
		return fmt.Errorf("negotiate: %w", err)
	}
	for n.chosen == nil {
		if err := n.handleOption(); err != nil {
			return fmt.Errorf("negotiate: %w", err)
		}
	}
	c.export = n.chosen
	c.terms = n.terms(n.chosen)
	c.log.Debug("client entered transmission", "export", printable(c.export.Name))
	return nil
}

// terms are those of a connection that chooses x. The selected contexts count only where they are of x.
func (n *negotiation) terms(x *export) terms {
	if n.metaExport != x {
		return x.terms(n.mode, 0)
	}
	return x.terms(n.mode, n.contexts)
}

func (n *negotiation) greet() error {
	b := binary.BigEndian.AppendUint64(nil, magicGreeting)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	if _, err := n.nc.Write(b); err != nil {
		return err
	}
	p, err := n.next(4)
	if err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(p)
	if flags&^uint32(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("%w: %#x", errClientFlags, flags)
	}
	n.fixed = flags&uint32(flagFixedNewstyle) != 0
	n.noZeroes = flags&uint32(flagNoZeroes) != 0
	return nil
}

// next returns the next k bytes that the client sends. They are valid until it is called again.
func (n *negotiation) next(k int) ([]byte, error) {
	if n.end-n.start < k {
		if n.end = copy(n.buffer, n.buffer[n.start:n.end]); k > len(n.buffer) {
			b := make([]byte, k)
			copy(b, n.buffer[:n.end])
			n.buffer = b
		}
		n.start = 0
		m, err := io.ReadAtLeast(n.nc, n.buffer[n.end:], k-n.end)
		n.end += m
		if err != nil {
			return nil, n.receiveError(err)
		}
	}
	p := n.buffer[n.start : n.start+k]
	n.start += k
	return p, nil
}

// skip throws away the next k bytes that the client sends.
func (n *negotiation) skip(k int) error {
	for k > 0 {
		m := min(k, smallBufferBytes)
		if _, err := n.next(m); err != nil {
			return err
		}
		k -= m
	}
	return nil
}

// handleOption reads one option and answers it. An error ends the connection.
func (n *negotiation) handleOption() error {
	p, err := n.next(sizeOption)
	if err != nil {
		return err
	}
	magic, opt, length := binary.BigEndian.Uint64(p), Option(binary.BigEndian.Uint32(p[8:])), binary.BigEndian.Uint32(p[12:])
	n.options--
	switch {
	case magic != magicOption:
		return errOptionMagic
	case n.options < 0:
		return errOptions
	case length > maxDiscardBytes:
		return errOptionLong
	case !n.fixed && opt != OptExportName:
		return errNotFixed
	}
	n.out = n.out[:0]
	if length > maxOptionBytes {
		if err := n.skip(int(length)); err != nil {
			return err
		}
		err = refuse(repErrTooBig, "option is longer than %d bytes", maxOptionBytes)
	} else {
		data, e := n.next(int(length))
		if e != nil {
			return e
		}
		err = n.dispatch(opt, data)
	}
	return n.finishOption(opt, err)
}

// finishOption sends the answer that was made, with the error reply that belongs to err.
func (n *negotiation) finishOption(opt Option, err error) error {
	var r *refusal
	if errors.As(err, &r) && opt != OptExportName {
		n.reply(opt, r.reply, []byte(r.text[:min(len(r.text), maxString)]))
		n.log.Debug("option refused", "option", uint32(opt), "reason", r.text)
		err = nil
	}
	if err != nil && err != errAborted {
		return err
	}
	if n.chosen != nil {
		n.srv.entered(n.conn)
	}
	if _, werr := n.nc.Write(n.out); werr != nil && err == nil {
		return werr
	}
	return err
}

// reply adds a reply to opt with the parts of data.
func (n *negotiation) reply(opt Option, kind optionReply, data ...[]byte) {
	length := 0
	for _, d := range data {
		length += len(d)
	}
	n.out = binary.BigEndian.AppendUint64(n.out, magicOptionReply)
	n.out = binary.BigEndian.AppendUint32(n.out, uint32(opt))
	n.out = binary.BigEndian.AppendUint32(n.out, uint32(kind))
	n.out = binary.BigEndian.AppendUint32(n.out, uint32(length))
	for _, d := range data {
		n.out = append(n.out, d...)
	}
}

// dispatch makes the answer to an option; a refusal where it is refused.
func (n *negotiation) dispatch(opt Option, data []byte) error {
	if n.srv.isStopping() && opt != OptAbort {
		return refuse(repErrShutdown, "server is shutting down")
	}
	switch opt {
	case OptExportName:
		return n.exportName(string(data))
	case OptAbort:
		n.reply(opt, repAck)
		return errAborted
	case OptInfo, OptGo:
		return n.info(opt, data)
	case OptListMetaContext, OptSetMetaContext:
		return n.metaContext(opt, data)
	case OptSession:
		return n.openSession(data)
	case OptList, OptStartTLS, OptStructuredReply, OptExtendedHeaders:
		if len(data) > 0 {
			return refuse(repErrInvalid, "this option has no data")
		}
	}
	switch opt {
	case OptList:
		n.list()
	case OptStartTLS:
		return refuse(repErrPolicy, "TLS is not configured")
	case OptStructuredReply:
		if n.mode == repliesExtended {
			return refuse(repErrExtHeaderReqd, "extended headers are in use")
		}
		n.mode = repliesStructured
	case OptExtendedHeaders:
		n.mode = repliesExtended
	default:
		return refuse(repErrUnsup, "option %d is not known", uint32(opt))
	}
	n.reply(opt, repAck)
	return nil
}

// exportName answers the one option of old clients, which has no error reply.
func (n *negotiation) exportName(name string) error {
	x, err := n.choose(name)
	if err == nil && n.mode == repliesExtended {
		err = errors.New("extended headers are in use")
	}
	if err != nil {
		return fmt.Errorf("%w: %v", errExportName, err)
	}
	t := n.terms(x)
	n.out = binary.BigEndian.AppendUint64(n.out, t.size)
	n.out = binary.BigEndian.AppendUint16(n.out, uint16(t.flags))
	if !n.noZeroes {
		n.out = append(n.out, make([]byte, 124)...)
	}
	n.chosen = x
	return nil
}

// choose finds the export of that name if it serves now.
func (n *negotiation) choose(name string) (*export, error) {
	x, err := n.lookup(name)
	if err != nil {
		return nil, err
	}
	if err := x.ready(); err != nil {
		return nil, refuse(repErrShutdown, "export does not serve: %v", err)
	}
	if n.session != nil && n.export != x {
		return nil, refuse(repErrInvalid, "the session of this connection is on another export")
	}
	return x, nil
}

func (n *negotiation) lookup(name string) (*export, error) {
	if len(name) > maxString {
		return nil, refuse(repErrTooBig, "name is longer than %d bytes", maxString)
	}
	x := n.srv.findExport(name)
	if x == nil {
		n.log.Info("unknown export asked for", "export", printable(name))
		return nil, refuse(repErrUnknown, "there is no export of that name")
	}
	return x, nil
}

// list answers LIST: one reply for each export.
func (n *negotiation) list() {
	xs := n.srv.listExports()
	for _, x := range xs {
		n.reply(OptList, repServer, binary.BigEndian.AppendUint32(nil, uint32(len(x.Name))), []byte(x.Name), []byte(x.Description))
	}
	if !n.listed {
		n.listed = true
		n.options += maxOptions * len(xs)
	}
}

// info answers INFO and GO, which tell about an export; GO chooses it.
func (n *negotiation) info(opt Option, data []byte) error {
	name, asked, err := parseInfo(data)
	if err != nil {
		return err
	}
	x, err := n.choose(name)
	if err != nil {
		return err
	}
	t := n.terms(x)
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, t.size)
	n.reply(opt, repInfo, binary.BigEndian.AppendUint16(b, uint16(t.flags)))
	for _, kind := range asked {
		b := binary.BigEndian.AppendUint16(nil, kind)
		switch kind {
		case infoName:
			n.reply(opt, repInfo, b, []byte(x.Name))
		case infoDescription:
			n.reply(opt, repInfo, b, []byte(x.Description))
		case infoBlockSize:
			b = binary.BigEndian.AppendUint32(b, 1)
			b = binary.BigEndian.AppendUint32(b, x.PreferredBlock)
			n.reply(opt, repInfo, binary.BigEndian.AppendUint32(b, x.MaxPayload))
		}
	}
	n.reply(opt, repAck)
	if opt == OptGo {
		n.chosen = x
	}
	return nil
}

// parseInfo reads the data of INFO and GO: the name and the informations asked for.
func parseInfo(data []byte) (string, []uint16, error) {
	p := parser{data: data}
	name, count := p.string(p.uint32()), int(p.uint16())
	if p.failed || len(p.data) != 2*count {
		return "", nil, refuse(repErrInvalid, "%v", errOptionSyntax)
	}
	if count > maxInfoRequests {
		return "", nil, refuse(repErrTooBig, "more than %d informations asked for", maxInfoRequests)
	}
	var asked []uint16
	for range count {
		kind := p.uint16()
		for _, k := range asked {
			if k == kind {
				return "", nil, refuse(repErrInvalid, "information %d is asked for twice", kind)
			}
		}
		asked = append(asked, kind)
	}
	return name, asked, nil
}

// openSession answers our own option: it fences the connections that this one replaces.
func (n *negotiation) openSession(data []byte) error {
	s, err := parseSession(data)
	if err != nil {
		return refuse(repErrInvalid, "%v", err)
	}
	if n.session != nil {
		return refuse(repErrInvalid, "this connection has a session already")
	}
	x, err := n.choose(s.Export)
	if err != nil {
		return err
	}
	if g := x.generation(); s.Generation != 0 && s.Generation != g {
		reply := repErrPolicy
		if s.Generation > g {
			reply = repErrShutdown // this server is the one that is behind
		}
		return refuse(reply, "session began in generation %d, the volume is in %d", s.Generation, g)
	}
	if err := n.attach(x, s, n.deadline); err != nil {
		if errors.Is(err, errOvertaken) {
			return refuse(repErrPolicy, "%v", err)
		}
		return err
	}
	n.reply(OptSession, repSession, sessionReply{x.generation(), x.incarnation()}.append(nil))
	n.reply(OptSession, repAck)
	return nil
}

// parser takes an option apart. After a failure everything it returns is zero.
type parser struct {
	data   []byte
	failed bool
}

func (p *parser) take(n uint32) []byte {
	if p.failed || uint64(n) > uint64(len(p.data)) {
		p.failed = true
		return nil
	}
	b := p.data[:n]
	p.data = p.data[n:]
	return b
}

func (p *parser) uint32() uint32 {
	if b := p.take(4); !p.failed {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (p *parser) uint16() uint16 {
	if b := p.take(2); !p.failed {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (p *parser) string(n uint32) string { return string(p.take(n)) }

// printable makes a client's string fit for a log: printable ASCII, and not long.
func printable(s string) string {
	const most = 128
	cut := ""
	if len(s) > most {
		s, cut = s[:most], "..."
	}
	q := strconv.QuoteToASCII(s)
	return q[1:len(q)-1] + cut
}
