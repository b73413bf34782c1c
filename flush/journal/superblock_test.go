package journal_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// sample is a superblock with a value of its own in every field.
func sample() *journal.Superblock {
	began := time.Date(2026, 11, 21, 10, 0, 0, 5, time.UTC)
	return &journal.Superblock{
		Sequence:      7,
		UUID:          journal.UUID{0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0x4d, 0xef, 0x81, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef},
		Name:          "redo-log",
		VolumeBytes:   1 << 30,
		MetadataBytes: 8192 + 4<<20 + 1<<20,
		AreaOffset:    1<<30 + 8192 + 4<<20,
		Incarnation:   journal.Incarnation{Counter: 3, Stamp: 0xfeedface12345678},
		Journal:       journal.KindInternal,
		Clean:         true,
		Volatile:      true,
		WrittenAt:     began.Add(time.Hour),
		Generations: []journal.Generation{
			{ID: 0x11, Began: began},
			{ID: 0x22, Parent: 0x11, Fork: 12345, Began: began.Add(time.Minute), Rollback: true},
		},
		RingOffset: 1<<30 + 8192, RingBytes: 4 << 20, RingStamp: 0xabcdef0123456789,
		BitmapOffset: 1 << 30, BitmapBytes: 8192, RegionBytes: 64 << 10,
		ZeroOffset: 8192, ZeroBytes: 1 << 20, Committed: 54321,
	}
}

// golden reads 4096 bytes from a file in testdata: lines of "offset: bytes  # field"; what is not named is zero.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, journal.SuperblockBytes)
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		at, digits, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			continue
		}
		offset := 0
		for _, c := range at {
			offset = offset*10 + int(c-'0')
		}
		data, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		copy(b[offset:], data)
	}
	return b
}

func TestSuperblockGolden(t *testing.T) {
	want := golden(t, "superblock.hex")
	got := sample().Encode()
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("byte %d is %#02x, want %#02x; checksum %x", i, got[i], want[i], got[journal.SuperblockBytes-4:])
		}
	}
	s, err := journal.Decode(want)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(s.Encode(), want) || s.Name != "redo-log" || len(s.Generations) != 2 || !reflect.DeepEqual(s, sample()) {
		t.Errorf("decoded %+v", s)
	}
	if s.MetadataOffset() != 1<<30 {
		t.Errorf("metadata at %d", s.MetadataOffset())
	}
	if got := s.UUID.String(); got != "01234567-89ab-4def-8123-456789abcdef" {
		t.Errorf("uuid %s", got)
	}
}

// TestSuperblockBitFlips: every single flipped bit is found.
func TestSuperblockBitFlips(t *testing.T) {
	b := sample().Encode()
	for i := range b {
		for bit := range 8 {
			b[i] ^= 1 << bit
			_, err := journal.Decode(b)
			if i < 8 && !errors.Is(err, journal.ErrNoMagic) || i >= 8 && !errors.Is(err, journal.ErrDamaged) {
				t.Fatalf("bit %d of byte %d: %v", bit, i, err)
			}
			b[i] ^= 1 << bit
		}
	}
}

// reseal puts the right checksum on b, so that only the fields themselves can be found wrong.
func reseal(b []byte) []byte {
	journal.PutChecksum(b)
	return b
}

func TestDecodeRefuses(t *testing.T) {
	change := func(at int, v ...byte) []byte {
		b := sample().Encode()
		copy(b[at:], v)
		return reseal(b)
	}
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"short":               {sample().Encode()[:4095], journal.ErrDamaged},
		"zeroes":              {make([]byte, journal.SuperblockBytes), journal.ErrNoMagic},
		"newer":               {change(8, 0, 0, 0, 2), journal.ErrNewer},
		"newer with flags":    {change(8, 0, 0, 1, 0, 0xff, 0xff, 0xff, 0xff), journal.ErrNewer},
		"version 0":           {change(8, 0, 0, 0, 0), journal.ErrDamaged},
		"unknown flag":        {change(12, 0, 0, 0, 4), journal.ErrDamaged},
		"no uuid":             {change(24, make([]byte, 16)...), journal.ErrDamaged},
		"no name":             {change(40, make([]byte, 64)...), journal.ErrDamaged},
		"name with gap":       {change(40, 'a', 0, 'b'), journal.ErrDamaged},
		"name not UTF-8":      {change(40, 0xff, 0, 0, 0, 0, 0, 0, 0), journal.ErrDamaged},
		"volume size 0":       {change(104, make([]byte, 8)...), journal.ErrDamaged},
		"odd volume size":     {change(111, 1), journal.ErrDamaged},
		"negative size":       {change(104, 0x80), journal.ErrDamaged},
		"volume too large":    {change(104, 0x40), journal.ErrDamaged},
		"metadata small":      {change(112, 0, 0, 0, 0, 0, 0, 0x10, 0), journal.ErrDamaged},
		"metadata negative":   {change(112, 0xff), journal.ErrDamaged},
		"area negative":       {change(120, 0xff), journal.ErrDamaged},
		"area overflows":      {change(120, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xf0, 0), journal.ErrDamaged},
		"area odd":            {change(127, 1), journal.ErrDamaged},
		"journal kind":        {change(155, 3), journal.ErrDamaged},
		"generations":         {change(159, 33), journal.ErrDamaged},
		"many generations":    {change(156, 0xff), journal.ErrDamaged},
		"generation id 0":     {change(159, 3), journal.ErrDamaged},
		"generation hidden":   {change(159, 1), journal.ErrDamaged},
		"volume over 40 bits": {change(104, 0, 0x20), journal.ErrDamaged},
		"ring offset":         {change(160, 0, 0, 0, 0, 0x40, 0, 0x10, 0), journal.ErrDamaged},
		"ring offset high":    {change(160, 0x80), journal.ErrDamaged},
		"ring small":          {change(168, 0, 0, 0, 0, 0, 0x3f, 0xf0, 0), journal.ErrDamaged},
		"ring odd":            {change(175, 1), journal.ErrDamaged},
		"ring negative":       {change(168, 0xff), journal.ErrDamaged},
		"ring huge":           {change(168, 0x7f), journal.ErrDamaged},
		"bitmap offset":       {change(184, 0, 0, 0, 0, 0x40, 0, 0x10, 0), journal.ErrDamaged},
		"bitmap bytes":        {change(192, 0, 0, 0, 0, 0, 0, 0x40, 0), journal.ErrDamaged},
		"bitmap negative":     {change(192, 0xff), journal.ErrDamaged},
		"region":              {change(200, 0, 0, 0, 0, 0, 2, 0, 0), journal.ErrDamaged},
		"region 0":            {change(200, make([]byte, 8)...), journal.ErrDamaged},
		"data bytes":          {change(208, 0, 0, 0, 0, 0x40, 0, 0, 0), journal.ErrDamaged},
		"zero offset":         {change(216, 0, 0, 0, 0, 0x40, 0, 2, 0), journal.ErrDamaged},
		"zero odd":            {change(223, 1), journal.ErrDamaged},
		"zero bytes":          {change(224, 0, 0, 0, 0, 0x40, 0, 0, 0), journal.ErrDamaged},
		"zero overflows":      {change(224, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0), journal.ErrDamaged},
		"zero negative":       {change(224, 0xff), journal.ErrDamaged},
		"generation flag":     {change(256+39, 2), journal.ErrDamaged},
		"reserved 240":        {change(240, 1), journal.ErrDamaged},
		"reserved 255":        {change(255, 1), journal.ErrDamaged},
		"reserved 1536":       {change(1536, 1), journal.ErrDamaged},
		"reserved 4091":       {change(4091, 1), journal.ErrDamaged},
	} {
		if _, err := journal.Decode(c.b); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// TestValidateKinds: what goes with which kind of journal.
func TestValidateKinds(t *testing.T) {
	none := func(s *journal.Superblock) {
		s.Journal, s.RingOffset, s.RingBytes, s.RingStamp = journal.KindNone, 0, 0, 0
		s.AreaOffset, s.MetadataBytes = 1<<30+8192, 8192+1<<20
	}
	external := func(s *journal.Superblock) {
		s.Journal, s.DataBytes = journal.KindExternal, 1<<30
		s.BitmapOffset, s.RingOffset, s.AreaOffset = 0, 8192, 8192+4<<20
	}
	for name, c := range map[string]struct {
		change []func(*journal.Superblock)
		ok     bool
	}{
		"internal":          {nil, true},
		"ring never used":   {[]func(*journal.Superblock){func(s *journal.Superblock) { s.RingStamp = 0 }}, true},
		"none":              {[]func(*journal.Superblock){none}, true},
		"none with stamp":   {[]func(*journal.Superblock){none, func(s *journal.Superblock) { s.RingStamp = 1 }}, false},
		"none with ring":    {[]func(*journal.Superblock){func(s *journal.Superblock) { s.Journal = journal.KindNone }}, false},
		"none with data":    {[]func(*journal.Superblock){none, func(s *journal.Superblock) { s.DataBytes = 1 << 30 }}, false},
		"external":          {[]func(*journal.Superblock){external}, true},
		"external, odd":     {[]func(*journal.Superblock){external, func(s *journal.Superblock) { s.DataBytes = 1<<30 + 512 }}, true},
		"external, no data": {[]func(*journal.Superblock){external, func(s *journal.Superblock) { s.DataBytes = 0 }}, false},
		"external, small":   {[]func(*journal.Superblock){external, func(s *journal.Superblock) { s.DataBytes = 1<<30 - 512 }}, false},
		"internal at 0":     {[]func(*journal.Superblock){external, func(s *journal.Superblock) { s.Journal, s.DataBytes = journal.KindInternal, 0 }}, false},
	} {
		s := sample()
		for _, change := range c.change {
			change(s)
		}
		if err := s.Validate(); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEncodePanicsOnInvalid(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	(&journal.Superblock{}).Encode()
}

func TestFullSuperblock(t *testing.T) {
	s := sample()
	s.Name = strings.Repeat("ä", journal.MaxNameBytes/2)
	s.Generations = nil
	for i := range uint64(journal.MaxGenerations) {
		s.Generations = append(s.Generations, journal.Generation{ID: i + 1, Parent: i, Fork: ^uint64(0), Began: time.Unix(0, 0).UTC()})
	}
	got, err := journal.Decode(s.Encode())
	if err != nil || got.Name != s.Name || len(got.Generations) != journal.MaxGenerations || got.Generations[31] != s.Generations[31] {
		t.Errorf("%v: %+v", err, got)
	}
	s.Generations = append(s.Generations, journal.Generation{ID: 1})
	if s.Validate() == nil {
		t.Error("33 generations are valid")
	}
}

func TestValidateName(t *testing.T) {
	for name, ok := range map[string]bool{
		"vol": true, "": false, strings.Repeat("x", 64): true, strings.Repeat("x", 65): false, "a\x00": false, "\xff": false,
	} {
		if err := journal.ValidateName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestBegin(t *testing.T) {
	s := sample()
	before := s.Incarnation
	s.Begin()
	if s.Incarnation.Counter != before.Counter+1 || s.Incarnation.Stamp == before.Stamp || s.Clean {
		t.Errorf("%+v clean %v after %+v", s.Incarnation, s.Clean, before)
	}
}

func TestNewUUID(t *testing.T) {
	a, b := journal.NewUUID(), journal.NewUUID()
	if a == b || a[6]>>4 != 4 || a[8]>>6 != 2 {
		t.Errorf("%s, %s", a, b)
	}
}

// FuzzDecode: nothing panics, and what is accepted is written back as it was.
func FuzzDecode(f *testing.F) {
	f.Add(golden(f, "superblock.hex"))
	f.Add(make([]byte, journal.SuperblockBytes))
	f.Add([]byte("RSHELFSB"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == journal.SuperblockBytes {
			b = reseal(bytes.Clone(b))
		}
		s, err := journal.Decode(b)
		if err == nil && !bytes.Equal(s.Encode(), b) {
			t.Errorf("%+v is written back differently", s)
		}
		known := errors.Is(err, journal.ErrNoMagic) || errors.Is(err, journal.ErrDamaged) || errors.Is(err, journal.ErrNewer)
		if err != nil && !known {
			t.Errorf("error %v is of no kind", err)
		}
	})
}
