package home

import (
	"fmt"
	"io"
	"unsafe"
)

// bounceBytes is the length of a bounce buffer: what an unaligned operation moves at a time.
const bounceBytes = 256 << 10

// defaultBounceBuffers is how many there are.
const defaultBounceBuffers = 4

// bouncePool lends aligned buffers. Its size is fixed; who finds none waits.
type bouncePool struct {
	buffers chan []byte // nil where one was not needed yet
}

func (p *bouncePool) init(n int) {
	if n <= 0 {
		n = defaultBounceBuffers
	}
	p.buffers = make(chan []byte, n)
	for range n {
		p.buffers <- nil
	}
}

func (p *bouncePool) take() []byte {
	b := <-p.buffers
	if b == nil {
		b = alignedBytes(bounceBytes)
	}
	return b
}

func (p *bouncePool) put(b []byte) { p.buffers <- b }

// alignedBytes returns n bytes of memory that begin on a multiple of the largest sector.
func alignedBytes(n int) []byte {
	p := make([]byte, n+maxSectorBytes)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(p))) % maxSectorBytes
	return p[skip:][:n:n]
}

// readBounced reads whole sectors around what is wanted.
func (f *File) readBounced(p []byte, off int64) (n int, err error) {
	buf := f.bounce.take()
	defer f.bounce.put(buf)
	for n < len(p) {
		at := off + int64(n)
		s := f.cover(at, int64(min(len(p)-n, bounceBytes-f.align.offset)))
		if err := f.readFull(buf[:s.to-s.from], s.from); err != nil {
			return n, err
		}
		n += copy(p[n:], buf[at-s.from:s.to-s.from])
	}
	return n, nil
}

func (f *File) readFull(p []byte, off int64) error {
	n, err := f.f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d of backing %s: %w", len(p), off, f.path, err)
}

// writeBounced writes n bytes of bufs at off in whole sectors. The first and the last sector are read first
// where only a part of them is written; the caller has their range locked.
func (f *File) writeBounced(bufs [][]byte, off, n int64) error {
	buf := f.bounce.take()
	defer f.bounce.put(buf)
	from := gather{bufs: bufs}
	for n > 0 {
		part := min(n, int64(bounceBytes-f.align.offset))
		s := f.cover(off, part)
		p := buf[:s.to-s.from]
		if err := f.readEdges(p, s, off, off+part); err != nil {
			return err
		}
		from.read(p[off-s.from:][:part])
		one := [1][]byte{p}
		if err := f.writeVectors(one[:], s.from); err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}

// readEdges reads into p, which is to hold the sectors of s, those of which only a part lies in from..to.
func (f *File) readEdges(p []byte, s span, from, to int64) error {
	sector := int64(f.align.offset)
	last := s.to - sector
	if from > s.from {
		if err := f.readFull(p[:sector], s.from); err != nil {
			return err
		}
	}
	if to < s.to && (last > s.from || from == s.from) {
		return f.readFull(p[last-s.from:], last)
	}
	return nil
}

// gather reads the concatenation of bufs.
type gather struct{ bufs [][]byte }

func (g *gather) read(p []byte) {
	for len(p) > 0 {
		n := copy(p, g.bufs[0])
		p = p[n:]
		if n == len(g.bufs[0]) {
			g.bufs = g.bufs[1:]
		} else {
			// The caller's slice of buffers is not to change.
			g.bufs = append([][]byte{g.bufs[0][n:]}, g.bufs[1:]...)
		}
	}
}
