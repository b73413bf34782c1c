package load

import (
	"encoding/binary"
	"fmt"
	"time"
)

// parser takes replies apart. It keeps what one receive brought of a message that the next one completes.
type parser struct {
	buffer []byte
	filled int // bytes at the start of buffer that are kept

	structured bool
	check      bool

	// The reply whose data are being passed over.
	skip   uint32 // bytes still to come
	number uint32
	done   bool // the request is answered when skip is 0
}

func newParser(c Config) parser {
	size := receiveBytes
	if c.Check {
		// A checked reply is looked at when all of it has arrived.
		size += c.BlockBytes
	}
	return parser{buffer: make([]byte, size), structured: c.Structured, check: c.Check}
}

// room is where the next receive goes.
func (p *parser) room() []byte { return p.buffer[p.filled:] }

// parse looks at the n bytes that were received into room.
func (p *parser) parse(n int, c *connection, now time.Duration) error {
	data := p.buffer[:p.filled+n]
	for len(data) > 0 {
		if p.skip > 0 {
			passed := min(p.skip, uint32(len(data)))
			data = data[passed:]
			if p.skip -= passed; p.skip == 0 && p.done {
				c.answered(p.number, now)
			}
			continue
		}
		used, err := p.header(data, c, now)
		if err != nil {
			return err
		}
		if used == 0 {
			break
		}
		data = data[used:]
	}
	p.filled = copy(p.buffer, data)
	return nil
}

// header takes one header, with its data where they are checked. It gives 0 when more bytes are needed.
func (p *parser) header(data []byte, c *connection, now time.Duration) (used int, err error) {
	if p.structured {
		return p.chunk(data, c, now)
	}
	if len(data) < sizeSimple {
		return 0, nil
	}
	if magic := binary.BigEndian.Uint32(data); magic != magicSimple {
		return 0, fmt.Errorf("simple reply begins with %#x", magic)
	}
	cookie := binary.BigEndian.Uint64(data[8:])
	s, err := c.inFlight(cookie)
	if err != nil {
		return 0, err
	}
	if code := binary.BigEndian.Uint32(data[4:]); code != 0 {
		return 0, fmt.Errorf("request at offset %d: server answered error %d", s.offset, code)
	}
	if p.check && s.left > 0 {
		if len(data) < sizeSimple+int(s.left) {
			return 0, nil
		}
		if err := checkStamps(data[sizeSimple:][:s.left], s.offset); err != nil {
			return 0, err
		}
	}
	p.pass(uint32(cookie), s.left, true, c, now)
	return sizeSimple, nil
}

// chunk takes the header of one chunk of a structured reply (proto.md, "Structured reply chunk message").
func (p *parser) chunk(data []byte, c *connection, now time.Duration) (used int, err error) {
	if len(data) >= sizeSimple && binary.BigEndian.Uint32(data) == magicSimple {
		// Legal for everything but reads (proto.md, "Structured replies").
		return p.simpleWrite(data, c, now)
	}
	if len(data) < sizeStructured {
		return 0, nil
	}
	if magic := binary.BigEndian.Uint32(data); magic != magicStructured {
		return 0, fmt.Errorf("structured reply begins with %#x", magic)
	}
	flags, kind := binary.BigEndian.Uint16(data[4:]), binary.BigEndian.Uint16(data[6:])
	cookie, length := binary.BigEndian.Uint64(data[8:]), binary.BigEndian.Uint32(data[16:])
	s, err := c.inFlight(cookie)
	if err != nil {
		return 0, err
	}
	content, err := p.content(kind, length, data[sizeStructured:], s)
	if content < 0 || err != nil {
		return 0, err
	}
	if uint32(content) > s.left {
		return 0, fmt.Errorf("request at offset %d: reply brings %d bytes more than asked for", s.offset, uint32(content)-s.left)
	}
	s.left -= uint32(content)
	done := flags&chunkDone != 0
	if done && s.left > 0 {
		return 0, fmt.Errorf("request at offset %d: reply ends %d bytes early", s.offset, s.left)
	}
	p.pass(uint32(cookie), length, done, c, now)
	return sizeStructured, nil
}

// content is how many bytes of the export a chunk of length bytes describes, -1 when more of it is needed.
func (p *parser) content(kind uint16, length uint32, payload []byte, s *slot) (int64, error) {
	switch {
	case kind == chunkNone:
		return 0, nil
	case kind == chunkOffsetData && length > 8:
		if !p.check {
			return int64(length - 8), nil
		}
		if uint32(len(payload)) < length {
			return -1, nil
		}
		return int64(length - 8), checkStamps(payload[8:length], binary.BigEndian.Uint64(payload))
	case kind == chunkOffsetHole && length == 12:
		if len(payload) < 12 {
			return -1, nil
		}
		if p.check {
			return 0, fmt.Errorf("request at offset %d: hole where data were written", s.offset)
		}
		return int64(binary.BigEndian.Uint32(payload[8:])), nil
	case kind&chunkError != 0 && len(payload) < 4:
		return -1, nil
	case kind&chunkError != 0:
		return 0, fmt.Errorf("request at offset %d: server answered error %d", s.offset, binary.BigEndian.Uint32(payload))
	}
	return 0, fmt.Errorf("request at offset %d: chunk of type %d with %d bytes", s.offset, kind, length)
}

func (p *parser) simpleWrite(data []byte, c *connection, now time.Duration) (used int, err error) {
	cookie := binary.BigEndian.Uint64(data[8:])
	s, err := c.inFlight(cookie)
	if err != nil {
		return 0, err
	}
	if code := binary.BigEndian.Uint32(data[4:]); code != 0 || !s.write {
		return 0, fmt.Errorf("request at offset %d: simple reply with error %d", s.offset, code)
	}
	p.pass(uint32(cookie), 0, true, c, now)
	return sizeSimple, nil
}

// pass goes over the next n bytes; after them the request is answered if done.
func (p *parser) pass(number, n uint32, done bool, c *connection, now time.Duration) {
	p.number, p.skip, p.done = number, n, done
	if n == 0 && done {
		c.answered(number, now)
	}
}

// stampBytes is the distance of the marks that tell where data belong.
const stampBytes = 4096

// stampOf is the mark of an offset; it is never 0, as a block that was never written is.
func stampOf(offset uint64) uint64 { return offset ^ 0x72616d7368656c66 } // "ramshelf"

// stamp marks every block of p, which goes to offset.
func stamp(p []byte, offset uint64) {
	for i := 0; i < len(p); i += stampBytes {
		binary.BigEndian.PutUint64(p[i:], stampOf(offset+uint64(i)))
	}
}

// checkStamps compares the marks of p, which came from offset. Blocks of which p has not the first bytes are
// passed over.
func checkStamps(p []byte, offset uint64) error {
	for i := -offset % stampBytes; i+8 <= uint64(len(p)); i += stampBytes {
		if got, want := binary.BigEndian.Uint64(p[i:]), stampOf(offset+i); got != want {
			return fmt.Errorf("block at offset %d begins with %#x, not with its mark %#x", offset+i, got, want)
		}
	}
	return nil
}
