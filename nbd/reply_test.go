package nbd_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/ramshelf/ramshelf/nbd"
	"github.com/ramshelf/ramshelf/nbd/nbdtest"
)

// TestReplies has the exact bytes of the replies to requests over data, a hole and data.
func TestReplies(t *testing.T) {
	a, b := pattern(1, 4096), pattern(2, 4096)
	zero := make([]byte, 4096)
	tests := []struct {
		sentence string
		mode     int
		command  uint16
		flags    uint16
		offset   uint64
		length   uint64
		want     []any
	}{
		{"a simple read is a header and the data, holes as zeroes", 0, cmdRead, 0, 0, 12288, []any{
			simpleMagic, uint32(0), uint64(1), a, zero, b}},
		{"a read of data is one chunk", 1, cmdRead, 0, 1, 4000, []any{
			chunkMagic, chunkDone, chunkData, uint64(1), uint32(4008), uint64(1), a[1:4001]}},
		{"holes are told by OFFSET_HOLE", 1, cmdRead, 0, 0, 12288, []any{
			chunkMagic, uint16(0), chunkData, uint64(1), uint32(4104), uint64(0), a,
			chunkMagic, uint16(0), chunkHole, uint64(1), uint32(12), uint64(4096), uint32(4096),
			chunkMagic, chunkDone, chunkData, uint64(1), uint32(4104), uint64(8192), b}},
		{"a hole may be the last chunk", 1, cmdRead, 0, 12000, 8000, []any{
			chunkMagic, uint16(0), chunkData, uint64(1), uint32(296), uint64(12000), b[3808:],
			chunkMagic, chunkDone, chunkHole, uint64(1), uint32(12), uint64(12288), uint32(7712)}},
		{"DF gives one chunk with the zeroes present", 1, cmdRead, flagDF, 0, 12288, []any{
			chunkMagic, chunkDone, chunkData, uint64(1), uint32(12296), uint64(0), a, zero, b}},
		{"a read of nothing is a NONE chunk", 1, cmdRead, 0, 5, 0, []any{
			chunkMagic, chunkDone, chunkNone, uint64(1), uint32(0)}},
		{"a failed read is an error chunk", 1, cmdRead, 0, testSize, 1, []any{
			chunkMagic, chunkDone, chunkErr, uint64(1), uint32(6), uint32(22), uint16(0)}},
		{"other commands may have simple replies", 1, cmdCache, 0, 0, 512, []any{simpleMagic, uint32(0), uint64(1)}},
		{"a failed block status is an error chunk", 1, cmdStatus, 0, testSize, 1, []any{
			chunkMagic, chunkDone, chunkErr, uint64(1), uint32(6), uint32(22), uint16(0)}},
		{"block status has one chunk per context", 1, cmdStatus, 0, 0, 16384, []any{
			chunkMagic, uint16(0), chunkStatus, uint64(1), uint32(36), uint32(1),
			uint32(4096), uint32(0), uint32(4096), uint32(3), uint32(4096), uint32(0), uint32(4096), uint32(3),
			chunkMagic, uint16(0), chunkStatus, uint64(1), uint32(36), uint32(2),
			uint32(4096), uint32(1), uint32(4096), uint32(0), uint32(4096), uint32(1), uint32(4096), uint32(0),
			chunkMagic, chunkDone, chunkStatus, uint64(1), uint32(36), uint32(3),
			uint32(4096), uint32(1), uint32(4096), uint32(0), uint32(4096), uint32(1), uint32(4096), uint32(0)}},
		{"REQ_ONE gives one extent within the request", 1, cmdStatus, flagReqOne, 100, 200, []any{
			chunkMagic, uint16(0), chunkStatus, uint64(1), uint32(12), uint32(1), uint32(200), uint32(0),
			chunkMagic, uint16(0), chunkStatus, uint64(1), uint32(12), uint32(2), uint32(200), uint32(1),
			chunkMagic, chunkDone, chunkStatus, uint64(1), uint32(12), uint32(3), uint32(200), uint32(1)}},
		{"every extended reply has the offset of its request", 2, cmdRead, 0, 0, 12288, []any{
			extReplyMagic, uint16(0), chunkData, uint64(1), uint64(0), uint64(4104), uint64(0), a,
			extReplyMagic, uint16(0), chunkHole, uint64(1), uint64(0), uint64(12), uint64(4096), uint32(4096),
			extReplyMagic, chunkDone, chunkData, uint64(1), uint64(0), uint64(4104), uint64(8192), b}},
		{"extended success is a NONE chunk", 2, cmdTrim, 0, 1 << 20, 4096, []any{
			extReplyMagic, chunkDone, chunkNone, uint64(1), uint64(1 << 20), uint64(0)}},
		{"extended errors are error chunks", 2, cmdZeroes, 0, testSize, 4096, []any{
			extReplyMagic, chunkDone, chunkErr, uint64(1), uint64(testSize), uint64(6), uint32(28), uint16(0)}},
		{"extended block status counts its extents", 2, cmdStatus, flagReqOne, 4096, 4096, []any{
			extReplyMagic, uint16(0), chunkStatusExt, uint64(1), uint64(4096), uint64(24), uint32(1), uint32(1), uint64(4096), uint64(3),
			extReplyMagic, uint16(0), chunkStatusExt, uint64(1), uint64(4096), uint64(24), uint32(2), uint32(1), uint64(4096), uint64(0),
			extReplyMagic, chunkDone, chunkStatusExt, uint64(1), uint64(4096), uint64(24), uint32(3), uint32(1), uint64(4096), uint64(0)}},
	}
	s := serve(t, newDevice(), nbd.Options{})
	w := s.dial().enter(0, "vol")
	w.mustWrite(0, a)
	w.mustWrite(8192, b)
	for _, tt := range tests {
		t.Run(tt.sentence, func(t *testing.T) {
			p := s.dial()
			p.t = t
			contexts := nbdtest.Contexts
			if tt.mode == 0 {
				contexts = nil
			}
			p.enter(tt.mode, "vol", contexts...)
			p.send(p.request(tt.command, tt.flags, tt.offset, tt.length))
			p.expect(tt.want...)
			p.send(p.request(cmdDisc, 0, 0, 0))
			p.expectClosed()
		})
	}
}

// TestStatusLimits has what a device may say about extents and what a client is told of it.
func TestStatusLimits(t *testing.T) {
	d := &extentDevice{Memory: nbdtest.NewMemory(0)}
	s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "vol", Device: d, Contexts: nbdtest.Contexts[:1]})
	compact := s.dial().enter(1, "vol", nbdtest.Contexts[0])
	extended := s.dial().enter(2, "vol", nbdtest.Contexts[0])
	many := make([]nbd.Extent, 5000)
	for i := range many {
		many[i] = nbd.Extent{Length: 512, Flags: uint32(i & 1)}
	}
	tests := []struct {
		name   string
		p      *peer
		flags  uint16
		length uint64
		from   []nbd.Extent
		want   []nbd.Extent
	}{
		{"empty extents are left out", compact, 0, 1024, []nbd.Extent{{0, 3}, {512, 1}, {0, 3}, {512, 0}}, []nbd.Extent{{512, 1}, {512, 0}}},
		{"only the last overruns the request", compact, 0, 1024, []nbd.Extent{{512, 1}, {4096, 0}, {512, 1}}, []nbd.Extent{{512, 1}, {4096, 0}}},
		{"an extent that ends with the request is the last", compact, 0, 1024, []nbd.Extent{{1024, 1}, {4096, 0}}, []nbd.Extent{{1024, 1}}},
		{"REQ_ONE clips", compact, flagReqOne, 1024, []nbd.Extent{{4096, 1}, {512, 0}}, []nbd.Extent{{1024, 1}}},
		{"no more than the most extents", compact, 0, 1 << 30, many, many[:nbd.MaxExtents]},
		{"32 bits end a compact answer", compact, 0, 1 << 31, []nbd.Extent{{1 << 40, 3}, {512, 0}}, []nbd.Extent{{1<<32 - 1<<16, 3}}},
		{"extended answers have 64 bits", extended, 0, 1 << 45, []nbd.Extent{{1 << 40, 3}, {1 << 44, 0}}, []nbd.Extent{{1 << 40, 3}, {1 << 44, 0}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d.extents.Store(&tt.from)
			tt.p.t = t
			tt.p.send(tt.p.request(cmdStatus, tt.flags, 0, tt.length))
			if got := parseExtents(tt.p, tt.p.chunk()); fmt.Sprint(got) != fmt.Sprint(tt.want) {
				t.Errorf("told %v, want %v", head32(got), head32(tt.want))
			}
		})
	}
}

func head32(e []nbd.Extent) []nbd.Extent { return e[:min(len(e), 32)] }

func parseExtents(p *peer, c chunk) []nbd.Extent {
	p.t.Helper()
	var extents []nbd.Extent
	switch c.kind {
	case chunkStatus:
		for b := c.payload[4:]; len(b) > 0; b = b[8:] {
			extents = append(extents, nbd.Extent{Length: uint64(binary.BigEndian.Uint32(b)), Flags: binary.BigEndian.Uint32(b[4:])})
		}
	case chunkStatusExt:
		b := c.payload[8:]
		if int(binary.BigEndian.Uint32(c.payload[4:]))*16 != len(b) {
			p.t.Fatalf("descriptor count %d for %d bytes", binary.BigEndian.Uint32(c.payload[4:]), len(b))
		}
		for ; len(b) > 0; b = b[16:] {
			extents = append(extents, nbd.Extent{Length: binary.BigEndian.Uint64(b), Flags: uint32(binary.BigEndian.Uint64(b[8:]))})
		}
	default:
		p.t.Fatalf("block status answered by %+v", c)
	}
	return extents
}

// extentDevice answers BLOCK_STATUS with extents.
type extentDevice struct {
	*nbdtest.Memory
	extents atomic.Pointer[[]nbd.Extent]
}

func (d *extentDevice) Size() int64 { return 1 << 50 }

func (d *extentDevice) Submit(r *nbd.Request) {
	r.Extents[0] = append(r.Extents[0], *d.extents.Load()...)
	r.Done(0)
}

func (d *extentDevice) Release(*nbd.Request) {}

// TestStatusWithoutExtent: a device that tells nothing of a context fails the request, not the server.
func TestStatusWithoutExtent(t *testing.T) {
	d := &extentDevice{Memory: nbdtest.NewMemory(0)}
	s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "vol", Device: d, Contexts: nbdtest.Contexts[:2]})
	compact := s.dial().enter(1, "vol", nbdtest.Contexts[:2]...)
	extended := s.dial().enter(2, "vol", nbdtest.Contexts[:2]...)
	for _, from := range [][]nbd.Extent{{}, {{0, 3}}} { // of the second context, whose place the device leaves empty
		d.extents.Store(&from)
		for _, p := range []*peer{compact, extended} {
			for range 2 { // the connection goes on
				p.send(p.request(cmdStatus, 0, 0, 512))
				if c := p.chunk(); c.flags != chunkDone || c.kind != chunkErr || binary.BigEndian.Uint32(c.payload) != 5 {
					t.Errorf("answered by %+v, want EIO", c)
				}
			}
		}
	}
	one := []nbd.Extent{{512, 1}}
	d.extents.Store(&one)
	compact.send(compact.request(cmdStatus, 0, 0, 512))
	if c := compact.chunk(); c.kind != chunkErr {
		t.Errorf("one context of two answered by %+v, want EIO alone", c)
	}
}

// TestDeviceErrors: what a device says becomes an error of the protocol, and the connection goes on.
func TestDeviceErrors(t *testing.T) {
	tests := []struct {
		command uint16
		flags   uint16
		err     syscall.Errno
		want    syscall.Errno
	}{
		{cmdRead, 0, syscall.EIO, syscall.EIO},
		{cmdRead, 0, syscall.ENXIO, syscall.EIO},
		{cmdWrite, 0, syscall.EDQUOT, syscall.ENOSPC},
		{cmdWrite, 0, syscall.EROFS, syscall.EPERM},
		{cmdFlush, 0, syscall.EREMOTEIO, syscall.EIO},
		{cmdZeroes, flagFastZero, syscall.ENOTSUP, syscall.ENOTSUP},
		{cmdZeroes, 0, syscall.ENOTSUP, syscall.EIO},
		{cmdTrim, 0, syscall.ENOTSUP, syscall.EIO},
		{cmdStatus, 0, syscall.EIO, syscall.EIO},
	}
	for mode := range 3 {
		for _, tt := range tests {
			if mode == 0 && tt.command == cmdStatus {
				continue
			}
			t.Run(fmt.Sprintf("mode %d command %d %v", mode, tt.command, tt.err), func(t *testing.T) {
				d := newDevice()
				var fail atomic.Bool
				fail.Store(true)
				d.Fault = func(*nbd.Request) syscall.Errno {
					if fail.Load() {
						return tt.err
					}
					return 0
				}
				s := serve(t, d, nbd.Options{})
				p := s.dial().enter(mode, "vol", map[bool][]string{true: nbdtest.Contexts}[mode > 0]...)
				length, payload := uint64(4096), []byte(nil)
				switch tt.command {
				case cmdWrite:
					payload = make([]byte, 4096)
				case cmdFlush:
					length = 0
				}
				if got := p.outcome(tt.command, tt.flags, 0, length, payload); got != tt.want {
					t.Errorf("answered %v, want %v", got, tt.want)
				}
				fail.Store(false)
				p.mustRead(0, make([]byte, 4096))
			})
		}
	}
}

// TestCut: a request that is cut, or answered with ESHUTDOWN, closes its connection without an answer and leaves the
// others alone.
func TestCut(t *testing.T) {
	for _, how := range []string{"cut", "ESHUTDOWN"} {
		t.Run(how, func(t *testing.T) {
			d := newDevice()
			d.Defer = func(r *nbd.Request, _ func()) bool {
				if r.Command != nbd.CmdCache {
					return false
				}
				if how == "cut" {
					r.Cut()
				} else {
					r.Done(syscall.ESHUTDOWN)
				}
				d.Ended.Add(1)
				return true
			}
			s := serve(t, d, nbd.Options{})
			p, other := s.dial().enter(0, "vol"), s.dial().enter(0, "vol")
			p.send(p.request(cmdCache, 0, 0, 4096))
			p.expectClosed()
			other.mustRead(0, make([]byte, 4096))
		})
	}
}

func TestUnalignedReadsAndWrites(t *testing.T) {
	for mode := range 3 {
		s := serve(t, newDevice(), nbd.Options{})
		p := s.dial().enter(mode, "vol")
		model := make([]byte, 3<<20)
		for i, n := range []int{1, 511, 513, 4095, 4097, 8193, 65537, 327679, 327680, 327681, 1048577} {
			off := i * 1237
			data := pattern(byte(i), n)
			copy(model[off:], data)
			p.mustWrite(uint64(off), data)
			p.mustRead(uint64(off), data)
		}
		p.mustRead(0, model)
		if !bytes.Equal(s.device.Bytes(0, int64(len(model))), model) {
			t.Error("the device has other data")
		}
	}
}
