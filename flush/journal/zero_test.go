package journal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// written is a disk in memory that counts its writes.
type written struct {
	data   []byte
	writes int
	fails  error
}

func (p *written) WriteAt(b []byte, off int64) (int, error) {
	p.writes++
	return copy(p.data[off:], b), p.fails
}

// zeroed is one that can zero, or says that it cannot.
type zeroed struct {
	written
	zeroes int
	zero   error
}

func (z *zeroed) Zero(off, n int64) error {
	if z.zeroes++; z.zero == nil {
		clear(z.data[off : off+n])
	}
	return z.zero
}

func TestZero(t *testing.T) {
	full := bytes.Repeat([]byte{1}, 3<<20)
	const off, n = 512, 2<<20 + 1024
	want := bytes.Clone(full)
	clear(want[off : off+n])
	check := func(name string, got []byte, done, writes, wantWrites int, err error) {
		t.Helper()
		if err != nil || !bytes.Equal(got, want) || done != n || writes != wantWrites {
			t.Errorf("%s: %v, %d bytes told, %d writes, right %v", name, err, done, writes, bytes.Equal(got, want))
		}
	}
	done := 0
	count := func(n int64) { done += int(n) }

	p := &written{data: bytes.Clone(full)}
	err := journal.Zero(context.Background(), p, off, n, count)
	check("without", p.data, done, p.writes, 3, err)
	for name, c := range map[string]struct {
		zero   error
		writes int
	}{"with": {}, "refusing": {fmt.Errorf("zero: %w", syscall.EOPNOTSUPP), 3}} {
		z := &zeroed{written: written{data: bytes.Clone(full)}, zero: c.zero}
		done = 0
		err := journal.Zero(context.Background(), z, off, n, count)
		check(name, z.data, done, z.writes, c.writes, err)
		if z.zeroes != 1 {
			t.Errorf("%s: asked %d times", name, z.zeroes)
		}
	}

	failing := errors.New("failing")
	if err := journal.Zero(context.Background(), &written{data: full, fails: failing}, off, n, nil); !errors.Is(err, failing) {
		t.Errorf("write fails: %v", err)
	}
	if err := journal.Zero(context.Background(), &zeroed{zero: failing}, off, n, nil); !errors.Is(err, failing) {
		t.Errorf("zero fails: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	p = &written{data: bytes.Clone(full)}
	if err := journal.Zero(ctx, p, off, n, nil); !errors.Is(err, context.Canceled) || p.writes > 0 {
		t.Errorf("canceled: %v after %d writes", err, p.writes)
	}
}
