package nbd_test

import (
	"bufio"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/nbd"
	"github.com/ramshelf/ramshelf/nbd/nbdtest"
)

// TestGolden plays what real clients sent, byte by byte, and expects what they were content with. In the files a
// line is C and the bytes of the client, or S and those of the server, in hexadecimal.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/server/*.hex")
	if err != nil || len(files) < 3 {
		t.Fatalf("found %d recordings, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			s := serveExports(t, nbd.Options{}, &nbd.Export{Name: "mem", Description: "test memory",
				Device: nbdtest.NewMemory(1 << 20), Contexts: nbdtest.Contexts})
			p := s.dial()
			p.t = t
			play(p, file)
		})
	}
}

func play(p *peer, file string) {
	f, err := os.Open(file)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		side, text, _ := strings.Cut(lines.Text(), " ")
		if side == "#" {
			continue
		}
		b, err := hex.DecodeString(text)
		if err != nil {
			p.t.Fatalf("%s: %v", lines.Text(), err)
		}
		if side == "C" {
			p.send(b)
		} else {
			p.expect(b)
		}
	}
	p.expectClosed()
}
