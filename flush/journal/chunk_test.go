package journal_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"reflect"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

const ringStamp = 0xabcdef0123456789

// sampleChunk is the chunk of testdata/chunk.hex.
func sampleChunk() *journal.Chunk {
	return &journal.Chunk{
		Last: true, Position: 4774, Start: 4660, Index: 1, Seal: 54321, Generation: 0x22, Committed: 54320, Tail: 4096, Link: 0xdeadbeef,
		Entries: []journal.Entry{
			{Kind: journal.EntryBlock, Block: 0x123456789a, Mask: 0x0f, Number: 54319, CRC: 0xcafebabe},
			{Kind: journal.EntryZero, Block: 4096, Number: 54321, Blocks: 65536},
			{Kind: journal.EntryLost, Block: 1<<40 - 1, Number: 7},
		},
	}
}

func TestChunkGolden(t *testing.T) {
	b := golden(t, "chunk.hex")
	want := sampleChunk()
	want.Sum = binary.BigEndian.Uint32(b[4092:])
	got, err := journal.DecodeChunk(b, ringStamp)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%v: %+v, want %+v", err, got, want)
	}
	// A ring writes the same bytes: the chunk before it is made to have the checksum that it names.
	r := journal.NewRing(0, 1<<40, journal.RingState{Stamp: ringStamp, Head: 4660, Tail: 4096, Committed: 54320})
	r.Begin(54321, 0x22)
	first := make([]byte, journal.BlockBytes)
	if pos := r.Chunk(first, make113(), false); pos != 4660 {
		t.Fatalf("first chunk at %d", pos)
	}
	second := make([]byte, journal.BlockBytes)
	if pos := r.Chunk(second, want.Entries, true); pos != 4774 {
		t.Fatalf("second chunk at %d", pos)
	}
	if got := binary.BigEndian.Uint32(second[80:]); got != binary.BigEndian.Uint32(first[4092:]) {
		t.Errorf("second chunk names %#x before it", got)
	}
	binary.BigEndian.PutUint32(second[80:], 0xdeadbeef)
	journal.PutChunkChecksum(second)
	if !bytes.Equal(second, b) {
		t.Errorf("encoded %x", second[:256])
	}
}

// make113 is as many block entries.
func make113() []journal.Entry {
	var entries []journal.Entry
	for i := range uint64(113) {
		entries = append(entries, journal.Entry{Kind: journal.EntryBlock, Block: i, Mask: 0xff, Number: i + 1})
	}
	return entries
}

// TestChunkBitFlips: every single flipped bit is found.
func TestChunkBitFlips(t *testing.T) {
	b := golden(t, "chunk.hex")
	for i := range b {
		for bit := range 8 {
			b[i] ^= 1 << bit
			_, err := journal.DecodeChunk(b, ringStamp)
			foreign := i < 8 || i >= 16 && i < 24
			if foreign && !errors.Is(err, journal.ErrNoChunk) || !foreign && !errors.Is(err, journal.ErrChunk) {
				t.Fatalf("bit %d of byte %d: %v", bit, i, err)
			}
			b[i] ^= 1 << bit
		}
	}
}

// TestDecodeChunkRefuses: a right checksum does not make up for a wrong field.
func TestDecodeChunkRefuses(t *testing.T) {
	change := func(at int, v ...byte) []byte {
		b := golden(t, "chunk.hex")
		copy(b[at:], v)
		journal.PutChunkChecksum(b)
		return b
	}
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"short":                  {golden(t, "chunk.hex")[:4095], journal.ErrNoChunk},
		"zeroes":                 {make([]byte, 4096), journal.ErrNoChunk},
		"other ring":             {change(23, 0), journal.ErrNoChunk},
		"version 0":              {change(11, 0), journal.ErrChunk},
		"version 2":              {change(11, 2), journal.ErrChunk},
		"unknown flag":           {change(15, 3), journal.ErrChunk},
		"position too high":      {change(24, 0x40), journal.ErrChunk},
		"position before start":  {change(30, 0x12, 0x33), journal.ErrChunk},
		"start at position":      {change(38, 0x12, 0xa6), journal.ErrChunk},
		"index too high":         {change(42, 0, 115), journal.ErrChunk},
		"index 0 elsewhere":      {change(43, 0), journal.ErrChunk},
		"many entries":           {change(46, 0, 166), journal.ErrChunk},
		"hidden entry":           {change(46, 0, 2), journal.ErrChunk},
		"entry of zeroes":        {change(46, 0, 4), journal.ErrChunk},
		"huge number of entries": {change(44, 0xff), journal.ErrChunk},
		"seal below committed":   {change(48, make([]byte, 8)...), journal.ErrChunk},
		"tail behind start":      {change(78, 0x12, 0x35), journal.ErrChunk},
		"reserved 84":            {change(84, 1), journal.ErrChunk},
		"reserved 127":           {change(127, 1), journal.ErrChunk},
		"reserved 200":           {change(200, 1), journal.ErrChunk},
		"reserved 4091":          {change(4091, 1), journal.ErrChunk},
		"kind 0":                 {change(129, 0), journal.ErrChunk},
		"kind 4":                 {change(129, 4), journal.ErrChunk},
		"bits above the kind":    {change(128, 1), journal.ErrChunk},
		"bits above the kind, 2": {change(129, 0x11), journal.ErrChunk},
		"no sectors":             {change(130, 0), journal.ErrChunk},
		"number above seal":      {change(142, 0xd4, 0x32), journal.ErrChunk},
		"block with an extent":   {change(144, 1), journal.ErrChunk},
		"extent with sectors":    {change(154, 1), journal.ErrChunk},
		"empty extent":           {change(168, make([]byte, 8)...), journal.ErrChunk},
		"extent too long":        {change(170, 1), journal.ErrChunk},
		"extent overflows":       {change(168, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff), journal.ErrChunk},
		"lost with sectors":      {change(178, 1), journal.ErrChunk},
		"lost with an extent":    {change(199, 1), journal.ErrChunk},
	} {
		if _, err := journal.DecodeChunk(c.b, ringStamp); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	// The first chunk of a run names none before it.
	b := change(30, 0x12, 0x34)
	b[43] = 0
	journal.PutChunkChecksum(b)
	if _, err := journal.DecodeChunk(b, ringStamp); !errors.Is(err, journal.ErrChunk) {
		t.Errorf("first chunk with a link: %v", err)
	}
	clear(b[80:84])
	journal.PutChunkChecksum(b)
	if _, err := journal.DecodeChunk(b, ringStamp); err != nil {
		t.Errorf("first chunk: %v", err)
	}
}

// FuzzDecodeChunk: nothing panics, and what is accepted is what a ring writes.
func FuzzDecodeChunk(f *testing.F) {
	f.Add(golden(f, "chunk.hex"))
	f.Add(make([]byte, journal.BlockBytes))
	f.Add([]byte("RSHELFRN"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == journal.BlockBytes {
			b = bytes.Clone(b)
			journal.PutChunkChecksum(b)
		}
		stamp := uint64(0)
		if len(b) >= 24 {
			stamp = binary.BigEndian.Uint64(b[16:])
		}
		c, err := journal.DecodeChunk(b, stamp)
		if err != nil {
			if !errors.Is(err, journal.ErrNoChunk) && !errors.Is(err, journal.ErrChunk) {
				t.Errorf("error %v is of no kind", err)
			}
			return
		}
		if got := journal.EncodeChunk(c, stamp); !bytes.Equal(got, b) || crc32.Checksum(got[:4092], crc32.MakeTable(crc32.Castagnoli)) != c.Sum {
			t.Errorf("%+v is written back differently", c)
		}
	})
}
