package nbd

import (
	"encoding/binary"
	"strings"
)

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT (proto.md, "Metadata querying"). SET replaces what was
// selected before even where it fails.
func (n *negotiation) metaContext(opt Option, data []byte) error {
	set := opt == OptSetMetaContext
	if set {
		n.metaExport, n.contexts = nil, 0
		if n.mode == repliesSimple {
			return refuse(repErrInvalid, "structured replies are not in use")
		}
	}
	name, queries, err := parseMetaContext(data)
	if err != nil {
		return err
	}
	x, err := n.lookup(name)
	if err != nil {
		return err
	}
	selected := x.matchContexts(queries, !set)
	for i, context := range x.Contexts {
		if selected>>i&1 == 0 {
			continue
		}
		id := uint32(i + 1)
		if !set {
			id = 0 // reserved
		}
		n.reply(opt, repMetaContext, binary.BigEndian.AppendUint32(nil, id), []byte(context))
	}
	if set {
		n.metaExport, n.contexts = x, selected
	}
	n.reply(opt, repAck)
	return nil
}

// parseMetaContext reads the data of LIST_META_CONTEXT and SET_META_CONTEXT: the export and the queries.
func parseMetaContext(data []byte) (string, []string, error) {
	p := parser{data: data}
	name, count := p.string(p.uint32()), p.uint32()
	if p.failed || uint64(count)*4 > uint64(len(p.data)) {
		return "", nil, refuse(repErrInvalid, "%v", errOptionSyntax)
	}
	queries := make([]string, 0, count)
	for range count {
		q := p.string(p.uint32())
		if len(q) > maxString {
			return "", nil, refuse(repErrTooBig, "query is longer than %d bytes", maxString)
		}
		queries = append(queries, q)
	}
	if p.failed || len(p.data) > 0 {
		return "", nil, refuse(repErrInvalid, "%v", errOptionSyntax)
	}
	return name, queries, nil
}

// matchContexts returns the contexts of x that the queries mean, bit i for Contexts[i]. LIST may ask for all of
// a namespace by its name and a colon, and for everything by no query.
func (x *export) matchContexts(queries []string, list bool) uint32 {
	var selected uint32
	for i, context := range x.Contexts {
		if list && len(queries) == 0 {
			selected |= 1 << i
		}
		for _, q := range queries {
			if q == context || list && strings.HasSuffix(q, ":") && strings.HasPrefix(context, q) {
				selected |= 1 << i
			}
		}
	}
	return selected
}
