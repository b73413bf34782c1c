package node

import (
	"fmt"
	"log/slog"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// listRanges gives the regions of t, the first of them, and how many bytes all have.
func listRanges(t *journal.Intent) (list []control.Range, bytes int64) {
	list = []control.Range{}
	t.Regions(func(off, n int64) bool {
		list = append(list, control.Range{OffsetBytes: off, LengthBytes: n})
		return len(list) < maxListed
	})
	return list, t.Bytes()
}

// loadIntent reads the intent bitmap and logs what of it cannot be relied upon.
func (v *Volume) loadIntent() (*journal.Intent, error) {
	t, warnings, err := journal.LoadIntent(v.meta, v.superblock)
	if err != nil {
		return nil, fmt.Errorf("backing %s: %w", v.metaName(), err)
	}
	for _, w := range warnings {
		v.log.Warn("intent bitmap", "err", w)
	}
	return t, nil
}

// lookAtIntent tells which regions of a volume without journal were being written when it was last in use.
func (v *Volume) lookAtIntent(r *Recovery) error {
	t, err := v.loadIntent()
	if err != nil {
		return err
	}
	r.Suspect, r.SuspectBytes = listRanges(t)
	logSuspect(v.log, r.Suspect, r.SuspectBytes)
	return nil
}

// logSuspect says that regions may hold a mixture of older and newer blocks.
func logSuspect(log *slog.Logger, list []control.Range, bytes int64) {
	if bytes == 0 {
		return
	}
	log.Warn("the volume was being written when its memory was lost, and has no journal: regions may hold a mixture of older and newer blocks",
		"suspect", config.FormatBytes(bytes), "ranges", len(list), "first_offset", list[0].OffsetBytes, "first_bytes", list[0].LengthBytes)
}
