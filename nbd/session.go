package nbd

import (
	"encoding/binary"
	"errors"
)

// Sizes of the messages of OptSession, in bytes.
const (
	sizeSession      = 36 // and the name of the export
	sizeSessionReply = 16
)

var (
	errSessionLength      = errors.New("session option has the wrong length")
	errSessionReplyLength = errors.New("session reply has the wrong length")
)

// session is the content of OptSession: session (16 bytes), attach number (u64), generation (u64), length of the
// name (u32) and name of the export. Bytes in docs/FORMAT.md.
//
// The server fences every connection of the session that has a lower attach number before it answers: none of
// their requests is applied after that. It answers repSession and ACK; ERR_UNKNOWN where there is no such export;
// ERR_SHUTDOWN while the export does not serve; ERR_POLICY, which is final, where the session is older than a
// rollback of the volume or the attach number is lower than one already seen.
//
// All numbers are big-endian. The option comes once per connection and before GO, which must name the same export,
// else it is answered by ERR_INVALID. Connections of a session with the same attach number belong together and do not
// fence one another. The server remembers the highest attach number of a session for as long as it has connections,
// and for 4096 sessions without; waiting for requests of fenced connections ends with the handshake's time.
type session struct {
	ID         [16]byte
	Attach     uint64 // grows with every replacement of the connections of the session
	Generation uint64 // of the volume when the session began; 0 = it begins here
	Export     string
}

// sessionReply is the content of repSession: generation (u64) and incarnation (u64) of the volume; 0 = unknown.
// While the generation is the same, nothing that was answered has been lost.
type sessionReply struct {
	Generation, Incarnation uint64
}

// append adds the option data of s to b.
func (s session) append(b []byte) []byte {
	b = append(b, s.ID[:]...)
	b = binary.BigEndian.AppendUint64(b, s.Attach)
	b = binary.BigEndian.AppendUint64(b, s.Generation)
	b = binary.BigEndian.AppendUint32(b, uint32(len(s.Export)))
	return append(b, s.Export...)
}

// parseSession reads the option data of OptSession.
func parseSession(b []byte) (session, error) {
	if len(b) < sizeSession || uint64(len(b)) != sizeSession+uint64(binary.BigEndian.Uint32(b[32:])) ||
		len(b) > sizeSession+maxString {
		return session{}, errSessionLength
	}
	return session{
		ID:         [16]byte(b),
		Attach:     binary.BigEndian.Uint64(b[16:]),
		Generation: binary.BigEndian.Uint64(b[24:]),
		Export:     string(b[sizeSession:]),
	}, nil
}

// append adds the data of r to b.
func (r sessionReply) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, r.Generation)
	return binary.BigEndian.AppendUint64(b, r.Incarnation)
}

// parseSessionReply reads the data of repSession.
func parseSessionReply(b []byte) (sessionReply, error) {
	if len(b) != sizeSessionReply {
		return sessionReply{}, errSessionReplyLength
	}
	return sessionReply{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}, nil
}
