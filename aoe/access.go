package aoe

import "slices"

// MaskCommand is what a mask frame asks for.
type MaskCommand uint8

// Mask commands.
const (
	MaskRead MaskCommand = 0
	MaskEdit MaskCommand = 1
)

// MaskError is why a target refused a directive.
type MaskError uint8

// Mask errors.
const (
	MaskUnspecified  MaskError = 1
	MaskBadDirective MaskError = 2
	MaskFull         MaskError = 3
)

// Mask is the fixed argument of a mask frame, the list of MACs that a target listens to. Count directives follow it.
type Mask struct {
	Command MaskCommand
	Error   MaskError
	Count   uint8
}

// DirectiveCommand is what a directive does with its MAC.
type DirectiveCommand uint8

// Directive commands.
const (
	DirectiveNone   DirectiveCommand = 0
	DirectiveAdd    DirectiveCommand = 1
	DirectiveDelete DirectiveCommand = 2
)

// Directive is one change of a mask.
type Directive struct {
	Command DirectiveCommand
	MAC     MAC
}

// Directives are those of a frame, as they came.
type Directives []byte

// Len is their number.
func (d Directives) Len() int { return len(d) / directiveBytes }

// At is the directive with that index, 0..Len()-1.
func (d Directives) At(i int) Directive {
	d = d[i*directiveBytes : (i+1)*directiveBytes]
	return Directive{Command: DirectiveCommand(d[1]), MAC: MAC(d[2:])}
}

// Append appends the argument with the directives; Count is theirs. ErrLength, with b unchanged, where they are above 255.
func (m *Mask) Append(b []byte, directives ...Directive) ([]byte, error) {
	if len(directives) > 255 {
		return b, ErrLength
	}
	b = append(b, 0, uint8(m.Command), uint8(m.Error), uint8(len(directives)))
	b = slices.Grow(b, len(directives)*directiveBytes)
	for _, d := range directives {
		b = append(append(b, 0, uint8(d.Command)), d.MAC[:]...)
	}
	return b, nil
}

// ParseMask reads a mask frame. The directives refer into it; there are Count of them. ErrShort, ErrCommand.
func ParseMask(frame []byte) (m Mask, d Directives, err error) {
	if err := argument(frame, CommandMask, MaskBytes); err != nil {
		return m, nil, err
	}
	m = Mask{Command: MaskCommand(frame[25]), Error: MaskError(frame[26]), Count: frame[27]}
	d, err = list(frame[MaskBytes:], int(m.Count)*directiveBytes)
	return m, d, err
}

// ReserveCommand is what a reserve frame asks for.
type ReserveCommand uint8

// Reserve commands. Setting an empty list releases.
const (
	ReserveRead  ReserveCommand = 0
	ReserveSet   ReserveCommand = 1
	ReserveForce ReserveCommand = 2
)

// Reserve is the fixed argument of a reserve frame. Count MACs follow it.
type Reserve struct {
	Command ReserveCommand
	Count   uint8
}

// MACs are those of a frame, as they came.
type MACs []byte

// Len is their number.
func (m MACs) Len() int { return len(m) / len(MAC{}) }

// At is the MAC with that index, 0..Len()-1.
func (m MACs) At(i int) MAC { return MAC(m[i*len(MAC{}):]) }

// Append appends the argument with the MACs; Count is theirs. ErrLength, with b unchanged, where they are above 255.
func (r *Reserve) Append(b []byte, macs ...MAC) ([]byte, error) {
	if len(macs) > 255 {
		return b, ErrLength
	}
	b = append(b, uint8(r.Command), uint8(len(macs)))
	for _, m := range macs {
		b = append(b, m[:]...)
	}
	return b, nil
}

// ParseReserve reads a reserve frame. The MACs refer into it; there are Count of them. ErrShort, ErrCommand.
func ParseReserve(frame []byte) (r Reserve, m MACs, err error) {
	if err := argument(frame, CommandReserve, ReserveBytes); err != nil {
		return r, nil, err
	}
	r = Reserve{Command: ReserveCommand(frame[24]), Count: frame[25]}
	m, err = list(frame[ReserveBytes:], int(r.Count)*len(MAC{}))
	return r, m, err
}

// list is the first n bytes of b: the count of a list is believed only as far as the frame goes.
func list(b []byte, n int) ([]byte, error) {
	if n > len(b) {
		return nil, ErrShort
	}
	return b[:n], nil
}
