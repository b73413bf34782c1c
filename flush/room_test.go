package flush

import (
	"testing"

	"github.com/ramshelf/ramshelf/flush/journal"
)

// roomy is a source that knows how much the journal can take.
type roomy struct {
	Journaled
	room int64
}

func (s *roomy) Room(blocks, _, _ int64) { s.room = blocks }

// TestRoomIsEnough: a ring of which all is home, but for a mark, has room for the largest seal that its room admits, with as many
// extents as a cache keeps: else the commit would wait for room for ever.
func TestRoomIsEnough(t *testing.T) {
	const extents = 2048
	for blocks := int64(1024); blocks < 1024+2*journal.EntriesPerChunk; blocks++ {
		src := new(roomy)
		c := &commits{src: src, ring: journal.NewRing(0, blocks*BlockBytes, journal.RingState{Stamp: 1, Head: 5, Tail: 5})}
		c.tellRoom()
		if need := 1 + journal.RunBlocks(int(src.room), extents) + slackBlocks/2; need > c.freeBlocks() {
			t.Errorf("ring of %d blocks: a seal of %d blocks needs %d, and %d are free", blocks, src.room, need, c.freeBlocks())
		}
	}
}
