package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/nbd"
	"github.com/ramshelf/ramshelf/nbd/nbdtest"
)

// fuzzed plays bytes to a server and returns what it answered. The client closes its direction behind them, so the
// server always comes to an end.
func fuzzed(t *testing.T, before, data []byte) []byte {
	d := nbdtest.NewMemory(1 << 20)
	var dice atomic.Uint32
	d.NoRoom = func(*nbd.Request) bool { return dice.Add(1)%3 == 0 }
	d.Defer = func(_ *nbd.Request, complete func()) bool {
		if dice.Add(1)%3 == 0 {
			go complete()
			return true
		}
		return false
	}
	s := nbd.NewServer(nbd.Options{})
	if err := s.AddExport(&nbd.Export{Name: "vol", Description: "fuzz", Device: d, Contexts: nbdtest.Contexts, MaxPayload: 1 << 18}); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	nc, err := net.Dial("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	nc.SetDeadline(time.Now().Add(patience))
	go func() {
		nc.Write(append(before, data...))
		nc.(*net.UnixConn).CloseWrite()
	}()
	answer, err := io.ReadAll(nc)
	if os.IsTimeout(err) {
		t.Fatal("the server does not come to an end")
	}
	nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	if err := d.Settled(); err != nil {
		t.Fatal(err)
	}
	if d.Reserved.Load() > d.Aborted.Load()+d.Submitted.Load() {
		t.Fatal("a reserved write was neither submitted nor aborted")
	}
	return answer
}

// FuzzNegotiation plays any bytes behind the greeting.
func FuzzNegotiation(f *testing.F) {
	f.Add(conversation())
	f.Add(pack(uint32(0), option(optExportName, "vol"), (&peer{}).request(cmdRead, 0, 0, 512)))
	f.Add(pack(uint32(3), option(optExtended), option(optSession, sessionData(1, 1, 0, "vol")), option(optGo, goData("vol"))))
	f.Add(pack(uint32(3), option(optListMeta, metaData("vol", "base:")), option(optAbort)))
	f.Fuzz(func(t *testing.T, data []byte) {
		if answer := fuzzed(t, nil, data); !bytes.HasPrefix(answer, pack(nbdMagic, iHaveOpt, uint16(3))) {
			t.Fatalf("greeting %x", head(answer))
		}
	})
}

// FuzzTransmission plays any bytes as requests, in each form of replies, and takes the replies apart.
func FuzzTransmission(f *testing.F) {
	for mode := range 3 {
		p := &peer{mode: mode}
		f.Add(byte(mode), pack(p.request(cmdWrite, 0, 1, 5000, make([]byte, 5000)), p.request(cmdRead, 0, 0, 9000),
			p.request(cmdStatus, flagReqOne, 0, 1<<20), p.request(cmdZeroes, 0, 4096, 4096), p.request(cmdFlush, 0, 0, 0)))
		f.Add(byte(mode), p.request(cmdWrite, 0, 0, 200_000, make([]byte, 100)))
	}
	f.Add(byte(2), pack(extReqMagic, flagPayload, cmdStatus, uint64(1), uint64(0), uint64(12), uint64(4096), uint32(2)))
	f.Fuzz(func(t *testing.T, mode byte, data []byte) {
		mode %= 3
		before := pack(uint32(3))
		skip := 18
		if mode > 0 {
			before = append(before, option([]uint32{optStructured, optExtended}[mode-1])...)
			before = append(before, option(optSetMeta, metaData("vol", "base:allocation", "x-ramshelf:dirty"))...)
			skip += 20 + 20 + 4 + 15 + 20 + 4 + 16 + 20
		}
		before = append(before, option(optGo, goData("vol"))...)
		skip += 20 + 12 + 20
		answer := fuzzed(t, before, data)
		if len(answer) < skip {
			t.Fatalf("handshake answered with %d bytes, want %d", len(answer), skip)
		}
		if mode > 0 {
			checkChunks(t, mode, answer[skip:])
		}
	})
}

// checkChunks takes replies apart. Only the last may be cut, by the end of the connection.
func checkChunks(t *testing.T, mode byte, b []byte) {
	for len(b) >= 4 {
		var size, length uint64
		switch magic := binary.BigEndian.Uint32(b); {
		case magic == simpleMagic && mode == 1:
			size = 16
		case magic == chunkMagic && mode == 1 && len(b) >= 20:
			size, length = 20, uint64(binary.BigEndian.Uint32(b[16:]))
		case magic == extReplyMagic && mode == 2 && len(b) >= 32:
			size, length = 32, binary.BigEndian.Uint64(b[24:])
		case len(b) < 32:
			return
		default:
			t.Fatalf("no reply where one must begin: %x", head(b))
		}
		if length > 1<<20 {
			t.Fatalf("chunk of %d bytes", length)
		}
		if size+length > uint64(len(b)) {
			return
		}
		b = b[size+length:]
	}
}
