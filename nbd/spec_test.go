package nbd_test

import (
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/ramshelf/ramshelf/nbd"
	"github.com/ramshelf/ramshelf/nbd/nbdtest"
)

// step is one act of a scripted negotiation.
type step func(p *peer)

func sends(opt uint32, data ...any) step { return func(p *peer) { p.option(opt, data...) } }
func raw(parts ...any) step              { return func(p *peer) { p.send(parts...) } }
func gets(opt, kind uint32, data ...any) step {
	return func(p *peer) { p.expectReply(opt, kind, data...) }
}
func refused(opt, kind uint32) step { return func(p *peer) { p.expectRefused(opt, kind) } }
func closed(p *peer)                { p.expectClosed() }

// alive shows that the negotiation goes on.
func alive(p *peer) {
	p.option(0x7777)
	p.expectRefused(0x7777, errUnsup)
}

const (
	plainFlags = uint16(0x0d6d) // HAS_FLAGS FLUSH FUA TRIM WRITE_ZEROES MULTI_CONN CACHE FAST_ZERO
	dfFlags    = plainFlags | 1<<7
)

func exportInfo(flags uint16) []byte { return pack(uint16(0), uint64(testSize), flags) }

func TestNegotiation(t *testing.T) {
	long := strings.Repeat("n", 4096)
	tests := []struct {
		sentence string
		flags    uint32
		steps    []step
	}{
		{"a client flag that was not offered drops the connection", 7, []step{closed}},
		{"all client flags set drop the connection", 0xffffffff, []step{closed}},
		{"EXPORT_NAME answers size, flags and 124 zero bytes", 1, []step{
			sends(optExportName, "vol"), func(p *peer) { p.expect(uint64(testSize), plainFlags, make([]byte, 124)) },
			func(p *peer) { p.mustRead(0, make([]byte, 512)) }}},
		{"EXPORT_NAME without zero padding where NO_ZEROES was agreed", 3, []step{
			sends(optExportName, "vol"), func(p *peer) { p.expect(uint64(testSize), plainFlags) },
			func(p *peer) { p.mustRead(0, make([]byte, 512)) }}},
		{"EXPORT_NAME works without fixed newstyle", 0, []step{
			sends(optExportName, "vol"), func(p *peer) { p.expect(uint64(testSize), plainFlags, make([]byte, 124)) }}},
		{"EXPORT_NAME of an unknown export disconnects", 3, []step{sends(optExportName, "other"), closed}},
		{"EXPORT_NAME after structured replies offers DF", 3, []step{
			sends(optStructured), gets(optStructured, repAck),
			sends(optExportName, ""), func(p *peer) { p.expect(uint64(testSize), dfFlags) }}},
		{"EXPORT_NAME after extended headers is forbidden", 3, []step{
			sends(optExtended), gets(optExtended, repAck), sends(optExportName, "vol"), closed}},
		{"other options without fixed newstyle disconnect", 2, []step{sends(optList), closed}},
		{"ABORT is acknowledged and ends the connection", 3, []step{sends(optAbort), gets(optAbort, repAck), closed}},
		{"ABORT ignores data", 3, []step{sends(optAbort, "because"), gets(optAbort, repAck), closed}},
		{"LIST names every export with its description", 3, []step{
			sends(optList), gets(optList, repServer, uint32(3), "vol", "a volume"), gets(optList, repAck), alive}},
		{"LIST with data is invalid", 3, []step{sends(optList, "x"), refused(optList, errInvalid), alive}},
		{"STARTTLS is refused by policy, never with TLS_REQD", 3, []step{
			sends(optStartTLS), refused(optStartTLS, errPolicy), alive}},
		{"STARTTLS with data is invalid", 3, []step{sends(optStartTLS, "x"), refused(optStartTLS, errInvalid), alive}},
		{"option 0 is unknown", 3, []step{sends(0, "data"), refused(0, errUnsup), alive}},
		{"PEEK_EXPORT is unknown", 3, []step{sends(4, "data"), refused(4, errUnsup), alive}},
		{"option 0xffffffff is unknown and its data is consumed", 3, []step{
			sends(0xffffffff, long), refused(0xffffffff, errUnsup), alive}},
		{"INFO tells about the export and stays in the negotiation", 3, []step{
			sends(optInfo, goData("vol")), gets(optInfo, repInfo, exportInfo(plainFlags)), gets(optInfo, repAck), alive}},
		{"INFO answers what was asked and ignores what is unknown", 3, []step{
			sends(optInfo, goData("", 1, 2, 3, 77)), gets(optInfo, repInfo, exportInfo(plainFlags)),
			gets(optInfo, repInfo, uint16(1), "vol"), gets(optInfo, repInfo, uint16(2), "a volume"),
			gets(optInfo, repInfo, uint16(3), uint32(1), uint32(4096), uint32(32<<20)), gets(optInfo, repAck), alive}},
		{"GO gives the same answer as INFO and enters transmission without padding", 1, []step{
			sends(optInfo, goData("vol")), gets(optInfo, repInfo, exportInfo(plainFlags)), gets(optInfo, repAck),
			sends(optGo, goData("vol")), gets(optGo, repInfo, exportInfo(plainFlags)), gets(optGo, repAck),
			func(p *peer) { p.mustRead(5, make([]byte, 3)) }}},
		{"GO to an unknown export", 3, []step{sends(optGo, goData("other")), refused(optGo, errUnknown), alive}},
		{"GO with a name longer than its data", 3, []step{
			sends(optGo, uint32(100), "vol", uint16(0)), refused(optGo, errInvalid), alive}},
		{"GO with a name length of 2^31", 3, []step{
			sends(optGo, uint32(1<<31), "vol", uint16(0)), refused(optGo, errInvalid), alive}},
		{"GO with a name length of 2^32-1", 3, []step{
			sends(optGo, uint32(1<<32-1), "vol", uint16(0)), refused(optGo, errInvalid), alive}},
		{"GO with more informations announced than sent", 3, []step{
			sends(optGo, uint32(3), "vol", uint16(2), uint16(3)), refused(optGo, errInvalid), alive}},
		{"GO with data behind the informations", 3, []step{
			sends(optGo, goData("vol"), "x"), refused(optGo, errInvalid), alive}},
		{"GO with less data than its fixed fields", 3, []step{
			sends(optGo, uint32(0)), refused(optGo, errInvalid), sends(optGo), refused(optGo, errInvalid), alive}},
		{"GO with an information asked for twice", 3, []step{
			sends(optGo, goData("vol", 3, 3)), refused(optGo, errInvalid), alive}},
		{"GO with very many informations", 3, []step{
			sends(optGo, uint32(3), "vol", uint16(20000), make([]byte, 40000)), refused(optGo, errTooBig), alive}},
		{"STRUCTURED_REPLY adds DF to the flags", 3, []step{
			sends(optStructured), gets(optStructured, repAck),
			sends(optInfo, goData("vol")), gets(optInfo, repInfo, exportInfo(dfFlags)), gets(optInfo, repAck)}},
		{"STRUCTURED_REPLY with data is invalid and changes nothing", 3, []step{
			sends(optStructured, "x"), refused(optStructured, errInvalid),
			sends(optInfo, goData("vol")), gets(optInfo, repInfo, exportInfo(plainFlags)), gets(optInfo, repAck)}},
		{"STRUCTURED_REPLY after extended headers", 3, []step{
			sends(optExtended), gets(optExtended, repAck),
			sends(optStructured), refused(optStructured, errExtHeaderReq), alive}},
		{"EXTENDED_HEADERS works without structured replies", 3, []step{
			sends(optExtended), gets(optExtended, repAck),
			sends(optInfo, goData("vol")), gets(optInfo, repInfo, exportInfo(dfFlags)), gets(optInfo, repAck)}},
		{"EXTENDED_HEADERS with data is invalid", 3, []step{
			sends(optExtended, "x"), refused(optExtended, errInvalid), alive}},
		{"BLOCK_STATUS_PAYLOAD is offered with extended headers and contexts", 3, []step{
			sends(optExtended), gets(optExtended, repAck),
			sends(optSetMeta, metaData("vol", "base:allocation")), gets(optSetMeta, repMeta, uint32(1), "base:allocation"),
			gets(optSetMeta, repAck),
			sends(optInfo, goData("vol")), gets(optInfo, repInfo, exportInfo(dfFlags|1<<12)), gets(optInfo, repAck)}},
		{"LIST_META_CONTEXT without queries lists all with the reserved id 0", 3, []step{
			sends(optStructured), gets(optStructured, repAck), sends(optListMeta, metaData("vol")),
			gets(optListMeta, repMeta, uint32(0), "base:allocation"), gets(optListMeta, repMeta, uint32(0), "x-ramshelf:dirty"),
			gets(optListMeta, repMeta, uint32(0), "x-ramshelf:resident"), gets(optListMeta, repAck), alive}},
		{"LIST_META_CONTEXT knows the wildcard base:", 3, []step{
			sends(optListMeta, metaData("vol", "base:")), gets(optListMeta, repMeta, uint32(0), "base:allocation"),
			gets(optListMeta, repAck)}},
		{"LIST_META_CONTEXT knows the wildcard x-ramshelf:", 3, []step{
			sends(optListMeta, metaData("vol", "x-ramshelf:")), gets(optListMeta, repMeta, uint32(0), "x-ramshelf:dirty"),
			gets(optListMeta, repMeta, uint32(0), "x-ramshelf:resident"), gets(optListMeta, repAck)}},
		{"LIST_META_CONTEXT ignores unknown namespaces and leaves, and repeats nothing", 3, []step{
			sends(optListMeta, metaData("vol", "qemu:dirty-bitmap:b", "base:nothing", "base:allocation", "base:", "x", "")),
			gets(optListMeta, repMeta, uint32(0), "base:allocation"), gets(optListMeta, repAck)}},
		{"LIST_META_CONTEXT of an unknown export", 3, []step{
			sends(optListMeta, metaData("other")), refused(optListMeta, errUnknown), alive}},
		{"SET_META_CONTEXT before structured replies is invalid", 3, []step{
			sends(optSetMeta, metaData("vol", "base:allocation")), refused(optSetMeta, errInvalid), alive}},
		{"SET_META_CONTEXT gives unique ids", 3, []step{
			sends(optStructured), gets(optStructured, repAck),
			sends(optSetMeta, metaData("vol", "x-ramshelf:resident", "base:allocation")),
			gets(optSetMeta, repMeta, uint32(1), "base:allocation"), gets(optSetMeta, repMeta, uint32(3), "x-ramshelf:resident"),
			gets(optSetMeta, repAck)}},
		{"SET_META_CONTEXT without queries selects nothing", 3, []step{
			sends(optStructured), gets(optStructured, repAck),
			sends(optSetMeta, metaData("vol")), gets(optSetMeta, repAck)}},
		{"SET_META_CONTEXT has no wildcards", 3, []step{
			sends(optStructured), gets(optStructured, repAck),
			sends(optSetMeta, metaData("vol", "base:", "x-ramshelf:")), gets(optSetMeta, repAck)}},
		{"a query length past the option is invalid", 3, []step{
			sends(optListMeta, uint32(3), "vol", uint32(1), uint32(100), "base:"), refused(optListMeta, errInvalid), alive}},
		{"2^32-1 queries announced are invalid", 3, []step{
			sends(optListMeta, uint32(3), "vol", uint32(1<<32-1), uint32(0)), refused(optListMeta, errInvalid), alive}},
		{"data behind the queries is invalid", 3, []step{
			sends(optListMeta, metaData("vol", "base:"), "x"), refused(optListMeta, errInvalid), alive}},
		{"a query longer than 4096 bytes is too big", 3, []step{
			sends(optListMeta, metaData("vol", long+"x")), refused(optListMeta, errTooBig), alive}},
		{"a wrong option magic disconnects", 3, []step{raw(nbdMagic, optList, uint32(0)), closed}},
	}
	for _, tt := range tests {
		t.Run(tt.sentence, func(t *testing.T) {
			s := serve(t, newDevice(), nbd.Options{})
			p := s.dial().greet(tt.flags)
			for _, do := range tt.steps {
				do(p)
			}
		})
	}
}

func TestSeveralExports(t *testing.T) {
	small := nbdtest.NewMemory(12345)
	recovers := errors.New("the volume recovers")
	var broken atomic.Pointer[error]
	broken.Store(&recovers)
	s := serveExports(t, nbd.Options{},
		&nbd.Export{Name: "a", Device: newDevice(), MaxPayload: 1 << 20, PreferredBlock: 65536},
		&nbd.Export{Name: "b/c", Device: small, ReadOnly: true, Rotational: true},
		&nbd.Export{Name: "d", Device: newDevice(), Ready: func() error { return *broken.Load() }})
	p := s.dial().greet(3)
	p.option(optList)
	for _, name := range []string{"a", "b/c", "d"} {
		p.expectReply(optList, repServer, uint32(len(name)), name)
	}
	p.expectReply(optList, repAck)
	p.option(optGo, goData(""))
	p.expectRefused(optGo, errUnknown)
	p.option(optInfo, goData("d"))
	if text := p.expectRefused(optInfo, errShutdown); !strings.Contains(text, recovers.Error()) {
		t.Errorf("refused with %q, want %q in it", text, recovers)
	}
	p.option(optGo, goData("d"))
	p.expectRefused(optGo, errShutdown)
	p.option(optInfo, goData("a", 3))
	p.expectReply(optInfo, repInfo, exportInfo(plainFlags))
	p.expectReply(optInfo, repInfo, uint16(3), uint32(1), uint32(65536), uint32(1<<20))
	p.expectReply(optInfo, repAck)
	p.option(optGo, goData("b/c"))
	p.expectReply(optGo, repInfo, uint16(0), uint64(12345), uint16(0x051f)) // HAS_FLAGS READ_ONLY FLUSH FUA ROTATIONAL MULTI_CONN CACHE
	p.expectReply(optGo, repAck)
	p.mustRead(12340, make([]byte, 5))

	broken.Store(new(error))
	s.dial().enter(0, "d").mustRead(0, make([]byte, 1))
	refusedName := s.dial().greet(3)
	broken.Store(&recovers)
	refusedName.option(optExportName, "d")
	refusedName.expectClosed()
}

func TestContextsOfAnotherExport(t *testing.T) {
	s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "a", Device: newDevice(), Contexts: nbdtest.Contexts},
		&nbd.Export{Name: "b", Device: newDevice(), Contexts: nbdtest.Contexts})
	tests := []struct {
		name string
		last []byte // data of the last SET_META_CONTEXT
		want syscall.Errno
	}{
		{"the last SET counts", metaData("a", "base:allocation"), 0},
		{"a SET for another export", metaData("b", "base:allocation"), syscall.EINVAL},
		{"a SET that fails", metaData("c", "base:allocation"), syscall.EINVAL},
		{"a malformed SET", pack(uint32(99)), syscall.EINVAL},
		{"a SET of nothing", metaData("a"), syscall.EINVAL},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := s.dial().greet(3)
			p.t = t
			p.agree(1, "a", "base:allocation")
			p.option(optSetMeta, tt.last)
			for kind := repMeta; kind == repMeta; {
				kind, _ = p.reply(optSetMeta)
			}
			p.enterGo("a")
			if got := p.status(cmdStatus, 0, 0, 4096); got != tt.want {
				t.Errorf("BLOCK_STATUS: %v, want %v", got, tt.want)
			}
		})
	}
}

func TestAddExportRefuses(t *testing.T) {
	d := newDevice()
	five := []string{"a:1", "a:2", "a:3", "a:4", "a:5"}
	tests := []struct {
		name   string
		export nbd.Export
	}{
		{"no device", nbd.Export{Name: "x"}},
		{"duplicate name", nbd.Export{Name: "have", Device: d}},
		{"name with NUL", nbd.Export{Name: "a\x00b", Device: d}},
		{"name not UTF-8", nbd.Export{Name: "\xff", Device: d}},
		{"name too long", nbd.Export{Name: strings.Repeat("n", 4097), Device: d}},
		{"description too long", nbd.Export{Name: "x", Description: strings.Repeat("n", 4097), Device: d}},
		{"payload no power of two", nbd.Export{Name: "x", Device: d, MaxPayload: 3 << 20}},
		{"payload above 32 MiB", nbd.Export{Name: "x", Device: d, MaxPayload: 64 << 20}},
		{"payload below the block", nbd.Export{Name: "x", Device: d, MaxPayload: 2048, PreferredBlock: 4096}},
		{"block below 512", nbd.Export{Name: "x", Device: d, PreferredBlock: 256}},
		{"five contexts", nbd.Export{Name: "x", Device: d, Contexts: five}},
		{"context without namespace", nbd.Export{Name: "x", Device: d, Contexts: []string{"allocation"}}},
		{"context without name", nbd.Export{Name: "x", Device: d, Contexts: []string{"base:"}}},
		{"negative size", nbd.Export{Name: "x", Device: negativeSize{d}}},
	}
	s := nbd.NewServer(nbd.Options{})
	if err := s.AddExport(&nbd.Export{Name: "have", Device: d}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := s.AddExport(&tt.export); err == nil {
				t.Error("accepted")
			}
		})
	}
}

type negativeSize struct{ *nbdtest.Memory }

func (negativeSize) Size() int64 { return -1 }

// TestErrors has a row for every reason to refuse a request, with its error in every form of replies.
func TestErrors(t *testing.T) {
	const end = uint64(testSize)
	none, inval, nospc, perm, overflow := syscall.Errno(0), syscall.EINVAL, syscall.ENOSPC, syscall.EPERM, syscall.EOVERFLOW
	block := make([]byte, 4096)
	big := make([]byte, 2<<20)
	tests := []struct {
		name           string
		command, flags uint16
		offset, length uint64
		payload        []byte
		plain          syscall.Errno // without structured replies
		rich           syscall.Errno // with structured replies or extended headers
		readOnly       syscall.Errno // with structured replies
	}{
		{"read of the last byte", cmdRead, 0, end - 1, 1, nil, none, none, none},
		{"read past the end", cmdRead, 0, end - 1, 2, nil, inval, inval, inval},
		{"read behind the end", cmdRead, 0, end + 1, 1, nil, inval, inval, inval},
		{"read that wraps", cmdRead, 0, 1<<64 - 1, 2, nil, inval, inval, inval},
		{"read of nothing", cmdRead, 0, 0, 0, nil, none, none, none},
		{"read longer than the maximum", cmdRead, 0, 0, 1<<20 + 1, nil, overflow, overflow, overflow},
		{"read of 2^32-1 bytes", cmdRead, 0, 0, 1<<32 - 1, nil, inval, inval, inval},
		{"read with FUA", cmdRead, flagFUA, 0, 512, nil, none, none, none},
		{"read with DF", cmdRead, flagDF, 0, 512, nil, inval, none, none},
		{"read with NO_HOLE", cmdRead, flagNoHole, 0, 512, nil, inval, inval, inval},
		{"read with REQ_ONE", cmdRead, flagReqOne, 0, 512, nil, inval, inval, inval},
		{"read with FAST_ZERO", cmdRead, flagFastZero, 0, 512, nil, inval, inval, inval},
		{"read with an unknown flag", cmdRead, 1 << 6, 0, 512, nil, inval, inval, inval},
		{"read with flag 15", cmdRead, 1 << 15, 0, 512, nil, inval, inval, inval},

		{"write of the last block", cmdWrite, 0, end - 4096, 4096, block, none, none, perm},
		{"write past the end", cmdWrite, 0, end - 4095, 4096, block, nospc, nospc, nospc},
		{"write that wraps", cmdWrite, 0, 1<<64 - 4096, 4096, block, nospc, nospc, nospc},
		{"write of nothing", cmdWrite, 0, 0, 0, nil, none, none, perm},
		{"write longer than the maximum", cmdWrite, 0, 0, 2 << 20, big, inval, inval, inval},
		{"write longer than the maximum past the end", cmdWrite, 0, end, 2 << 20, big, nospc, nospc, nospc},
		{"write with FUA", cmdWrite, flagFUA, 0, 4096, block, none, none, perm},
		{"write with DF", cmdWrite, flagDF, 0, 4096, block, inval, inval, inval},
		{"write with an unknown flag past the end", cmdWrite, 1 << 7, end, 4096, block, nospc, nospc, nospc},
		{"write with an unknown flag", cmdWrite, 1 << 7, 0, 4096, block, inval, inval, inval},

		{"flush", cmdFlush, 0, 0, 0, nil, none, none, none},
		{"flush with FUA", cmdFlush, flagFUA, 0, 0, nil, none, none, none},
		{"flush with an offset", cmdFlush, 0, 1, 0, nil, inval, inval, inval},
		{"flush with a length", cmdFlush, 0, 0, 1, nil, inval, inval, inval},
		{"flush with NO_HOLE", cmdFlush, flagNoHole, 0, 0, nil, inval, inval, inval},

		{"trim of everything", cmdTrim, 0, 0, end, nil, none, none, perm},
		{"trim past the end", cmdTrim, 0, 1, end, nil, inval, inval, inval},
		{"trim with FUA", cmdTrim, flagFUA, 0, 512, nil, none, none, perm},
		{"trim with NO_HOLE", cmdTrim, flagNoHole, 0, 512, nil, inval, inval, inval},
		{"trim of nothing", cmdTrim, 0, 0, 0, nil, none, none, perm},

		{"cache", cmdCache, 0, 0, end, nil, none, none, none},
		{"cache past the end", cmdCache, 0, 0, end + 1, nil, inval, inval, inval},
		{"cache with an unknown flag", cmdCache, 1 << 8, 0, 512, nil, inval, inval, inval},

		{"zeroes over everything", cmdZeroes, 0, 0, end, nil, none, none, perm},
		{"zeroes past the end", cmdZeroes, 0, end - 1, 2, nil, nospc, nospc, nospc},
		{"zeroes with NO_HOLE and FUA", cmdZeroes, flagNoHole | flagFUA, 0, 512, nil, none, none, perm},
		{"zeroes with FAST_ZERO", cmdZeroes, flagFastZero, 0, 512, nil, none, none, perm},
		{"zeroes with DF", cmdZeroes, flagDF, 0, 512, nil, inval, inval, inval},
		{"zeroes of nothing", cmdZeroes, 0, 0, 0, nil, none, none, perm},

		{"block status", cmdStatus, 0, 0, 4096, nil, inval, none, none},
		{"block status of everything", cmdStatus, 0, 0, end, nil, inval, none, none},
		{"block status past the end", cmdStatus, 0, 0, end + 1, nil, inval, inval, inval},
		{"block status of 0xfffffe00 bytes", cmdStatus, 0, 0, 0xfffffe00, nil, inval, inval, inval},
		{"block status at the end", cmdStatus, 0, end, 1, nil, inval, inval, inval},
		{"block status of nothing", cmdStatus, 0, 0, 0, nil, inval, inval, inval},
		{"block status with NO_HOLE", cmdStatus, flagNoHole, 0, 4096, nil, inval, inval, inval},

		{"resize", 8, 0, 0, 4096, nil, inval, inval, inval},
		{"command 9", 9, 0, 0, 4096, nil, inval, inval, inval},
		{"command 0xffff", 0xffff, 0, 0, 0, nil, inval, inval, inval},
	}
	s := serveExports(t, nbd.Options{},
		&nbd.Export{Name: "vol", Device: newDevice(), Contexts: nbdtest.Contexts, MaxPayload: 1 << 20},
		&nbd.Export{Name: "ro", Device: newDevice(), Contexts: nbdtest.Contexts, MaxPayload: 1 << 20, ReadOnly: true})
	contexts := [][]string{nil, nbdtest.Contexts[:1], nbdtest.Contexts[:1]}
	for mode, form := range []string{"simple", "structured", "extended"} {
		p := s.dial().enter(mode, "vol", contexts[mode]...)
		ro := s.dial().enter(mode, "ro", contexts[mode]...)
		for _, tt := range tests {
			t.Run(form+"/"+tt.name, func(t *testing.T) {
				want, wantRO := tt.rich, tt.readOnly
				if mode == 0 {
					want = tt.plain
					if wantRO == 0 || wantRO == overflow {
						wantRO = tt.plain
					}
				}
				for _, try := range []struct {
					p    *peer
					want syscall.Errno
				}{{p, want}, {ro, wantRO}} {
					try.p.t = t
					if got := try.p.outcome(tt.command, tt.flags, tt.offset, tt.length, tt.payload); got != try.want {
						t.Errorf("answered %v, want %v", got, try.want)
					}
					try.p.mustRead(0, make([]byte, 1)) // in step
				}
			})
		}
	}
}

// outcome does one request whatever its answer is made of.
func (p *peer) outcome(command, flags uint16, offset, length uint64, payload []byte) syscall.Errno {
	p.t.Helper()
	if command == cmdRead {
		_, err := p.read(flags, offset, length)
		return err
	}
	return p.status(command, flags, offset, length, payload)
}

func TestPayloadFlag(t *testing.T) {
	s := serve(t, newDevice(), nbd.Options{})
	block := make([]byte, 4096)
	compact := s.dial().enter(1, "vol", nbdtest.Contexts...)
	p := s.dial().enter(2, "vol", nbdtest.Contexts...)
	plain := s.dial().enter(2, "vol")
	tests := []struct {
		name string
		p    *peer
		send []any
		want syscall.Errno
	}{
		{"compact write with the flag", compact, []any{reqMagic, flagPayload, cmdWrite, uint64(1), uint64(0), uint32(4096), block}, syscall.EINVAL},
		{"extended write without the flag, as qemu sends it", p, []any{extReqMagic, uint16(0), cmdWrite, uint64(1), uint64(0), uint64(4096), block}, 0},
		{"extended read with a payload", p, []any{extReqMagic, flagPayload, cmdRead, uint64(1), uint64(0), uint64(4096), block}, syscall.EINVAL},
		{"extended zeroes with a payload past the end", p, []any{extReqMagic, flagPayload, cmdZeroes, uint64(1), uint64(testSize), uint64(4096), block}, syscall.EINVAL},
		{"extended flush with a payload", p, []any{extReqMagic, flagPayload, cmdFlush, uint64(1), uint64(0), uint64(4096), block}, syscall.EINVAL},
		{"unknown command with a payload", p, []any{extReqMagic, flagPayload, uint16(99), uint64(1), uint64(0), uint64(4096), block}, syscall.EINVAL},
		{"write of 32 MiB and a byte", p, []any{extReqMagic, flagPayload, cmdWrite, uint64(1), uint64(0), uint64(32<<20 + 1), make([]byte, 32<<20+1)}, syscall.ENOSPC},
		{"block status of one context", p, []any{extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(12), uint64(4096), uint32(2)}, 0},
		{"block status of an unknown context", p, []any{extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(12), uint64(4096), uint32(4)}, syscall.EINVAL},
		{"block status of context 0", p, []any{extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(12), uint64(4096), uint32(0)}, syscall.EINVAL},
		{"block status of a context twice", p, []any{extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(16), uint64(4096), uint32(2), uint32(2)}, syscall.EINVAL},
		{"block status of no context", p, []any{extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(8), uint64(4096)}, syscall.EINVAL},
		{"block status with a short payload", p, []any{extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(7), make([]byte, 7)}, syscall.EINVAL},
		{"block status with an odd payload", p, []any{extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(13), uint64(4096), uint32(2), uint8(0)}, syscall.EINVAL},
		{"block status with an empty payload", p, []any{extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(0)}, syscall.EINVAL},
		{"block status with a long payload", p, []any{extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(4096), block}, syscall.EINVAL},
		{"block status past the end by payload", p, []any{extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(12), uint64(testSize + 1), uint32(1)}, syscall.EINVAL},
		{"block status with a payload not offered", plain, []any{extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(12), uint64(4096), uint32(1)}, syscall.EINVAL},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.p.t = t
			tt.p.send(tt.send...)
			tt.p.cookie = 1
			if got := tt.p.expectStatus(); got != tt.want {
				t.Errorf("answered %v, want %v", got, tt.want)
			}
			tt.p.mustRead(0, make([]byte, 1))
		})
	}
	p.send(extReqMagic, flagPayload, cmdRead, uint64(1), uint64(0), uint64(64<<20+1))
	p.expectClosed()
}
