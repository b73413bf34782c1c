package cache_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// FuzzRestore starts a cache on headers that say anything. It must not break, and must never serve what fails its checksum:
// a block reads as home has it, as it was written, as zeroes, or not at all.
func FuzzRestore(f *testing.F) {
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0xff}, 64))
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 1, 4, 9, 0, 0, 0, 0})
	f.Fuzz(restoreDamaged)
}

func TestRestoreDamaged(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	for range 30 {
		edits := make([]byte, 10*(1+r.IntN(40)))
		for i := range edits {
			edits[i] = byte(r.Uint32())
		}
		restoreDamaged(t, edits)
	}
}

func restoreDamaged(t *testing.T, edits []byte) {
	v := newVolume(t, testSize, testMemory, nil)
	copy(v.disk.data, bytes.Repeat([]byte{0x11}, testSize))
	c := v.client()
	written := bytes.Repeat([]byte{0x22}, 4096)
	for b := range int64(16) {
		if err := c.write(b*8192, written); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.zero(1<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	// An edit is a header (or, above them, an extent), a word of it, and what is XORed into it.
	for ; len(edits) >= 10; edits = edits[10:] {
		n := int(binary.LittleEndian.Uint16(edits))
		x := binary.LittleEndian.Uint64(edits[2:])
		word := int(edits[0]) % 4
		if n%8 == 0 {
			e := &v.arena.Zeroes[n/8%16]
			words := []interface {
				Load() uint64
				Store(uint64)
			}{&e.First, &e.Blocks, &e.Number, &e.Check}
			words[word].Store(words[word].Load() ^ x)
			continue
		}
		h := &v.arena.Headers[n%64]
		words := []interface {
			Load() uint64
			Store(uint64)
		}{&h.Block, &h.Number, &h.Check}
		words[word%3].Store(words[word%3].Load() ^ x)
	}
	v.restart()
	c = v.client()
	for b := range int64(512) {
		p, err := c.read(b*4096, 4096)
		if err != nil {
			continue
		}
		if x := p[0]; x != 0x11 && x != 0x22 && x != 0 || !bytes.Equal(p, bytes.Repeat(p[:1], 4096)) {
			t.Fatalf("block %d reads %x", b, p[:16])
		}
	}
	v.flush()
}

// TestRestartKeepsAll restarts a cache over and over between operations of several clients.
func TestRestartKeepsAll(t *testing.T) {
	v := newVolume(t, testSize, testMemory, nil)
	r := rand.New(rand.NewPCG(1, 2))
	model := make([]byte, testSize)
	for round := range 20 {
		c := v.client()
		for range 30 {
			off, n := randomRange(r)
			n = min(n, 40000)
			if r.IntN(5) == 0 {
				clear(model[off : off+n])
				if err := c.zero(off, n); err != nil {
					t.Fatal(err)
				}
				continue
			}
			fill(r, model[off:off+n])
			if err := c.write(off, model[off:off+n]); err != nil {
				t.Fatal(err)
			}
		}
		if round%3 == 0 {
			v.flush()
		}
		v.restart()
		got, err := v.client().read(0, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		compare(t, round, 0, got, model[:1<<20])
		if round%3 == 1 {
			v.flush()
		}
	}
	v.flush()
	compare(t, -1, 0, v.disk.data, model)
}
