package journal

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
)

// Reset begins a new ring in the place of the old one, which has got to old (Recovered.State, or the zero value for a
// ring that was never used), and gives s its stamp and seal as committed. The first run of the new ring, a mark, says that seal is committed and
// home, and lists what is lost, at most MaxLost blocks. It is synced when Reset returns. After an error s is
// unchanged, and Reset may be called again.
//
// Until the caller has stored s the old ring counts. It must stay as good as it was: that everything in it is home by now
// does not help a start that finds it damaged, and refuses it. Therefore the new ring begins at the old head, in
// space that no committed run of the old one has, whichever of its tails counts: at most what is left there of a run that
// was never committed goes. A Ring always leaves that much free. Both rings then lie in one place, told apart by
// their stamps. Once s may have been stored, that is after a Store that failed, the new ring may count: store s again, do
// not Reset again.
func Reset(w Writer, s *Superblock, seal, generation uint64, lost []LostBlock, old RingState) (RingState, error) {
	var random [8]byte
	stamp := uint64(0)
	for stamp == 0 || stamp == s.RingStamp {
		_, _ = rand.Read(random[:]) // never fails (crypto/rand)
		stamp = binary.BigEndian.Uint64(random[:])
	}
	fail := func(err error) (RingState, error) {
		return RingState{}, fmt.Errorf("begin a new ring of the journal of volume %s: %w", s.Name, err)
	}
	if s.Journal == KindNone {
		return fail(fmt.Errorf("it has none"))
	}
	r := NewRing(s.RingOffset, s.RingBytes, RingState{Stamp: stamp, Head: old.Head, Tail: old.Head, Committed: seal})
	need := RunBlocks(0, len(lost))
	if len(lost) > MaxLost || need > r.reserve/2 {
		return fail(fmt.Errorf("%d lost blocks are more than it has room for, %d", len(lost), MaxLost))
	}
	entries := make([]Entry, len(lost))
	for i, l := range lost {
		if l.Number > seal {
			return fail(fmt.Errorf("lost block %d has number %d, which is newer than seal %d", l.Block, l.Number, seal))
		}
		entries[i] = Entry{Kind: EntryLost, Block: l.Block, Number: l.Number}
	}
	headers := make([]byte, need*BlockBytes)
	r.Begin(seal, generation)
	for b := headers; len(b) > 0; b = b[BlockBytes:] {
		n := min(len(entries), EntriesPerChunk)
		r.Chunk(b, entries[:n], len(b) == BlockBytes)
		entries = entries[n:]
	}
	// The run may go round the end of the ring.
	first := min(need, r.blocks-old.Head%r.blocks) * BlockBytes
	if err := writeFull(w, headers[:first], r.Offset(old.Head)); err != nil {
		return fail(fmt.Errorf("write: %w", err))
	}
	if rest := headers[first:]; len(rest) > 0 {
		if err := writeFull(w, rest, r.Offset(0)); err != nil {
			return fail(fmt.Errorf("write: %w", err))
		}
	}
	if err := w.Sync(); err != nil {
		return fail(fmt.Errorf("sync: %w", err))
	}
	r.Commit()
	s.RingStamp, s.Committed = stamp, seal
	return r.State(), nil
}
