package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ramshelf/ramshelf/cache/arena"
	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/flush/journal"
)

// recovery is what the journal of a volume comes to when it is opened.
type recovery struct {
	state journal.RingState
	seal  uint64 // the volume is as it was then, where the memory is lost
	lost  []journal.LostBlock
	warm  bool // the memory has everything: nothing is replayed, and the ring goes on
}

// recover finds what is committed. Without the memory everything that is goes home; with it the ring goes on where it was.
func (v *Volume) recover(ctx context.Context, found *journal.Found, memory *memoryFile) (recovery, error) {
	s := v.superblock
	switch {
	case s.Journal == journal.KindNone:
		return recovery{seal: s.Committed, warm: memory.kept}, nil
	case memory.kept:
		return v.resume(ctx)
	case found.Adopted || s.Clean:
		return recovery{seal: s.Committed}, nil
	}
	began := time.Now()
	p := progressLog{log: v.log, what: "scanning the journal"}
	rec, err := journal.Scan(ctx, v.meta, s, p.report)
	if err = v.refused(err); err != nil {
		if rec == nil || !v.config.Force {
			return recovery{}, err
		}
		v.log.Error("the journal is damaged; what lies behind the damage is given up", "err", err, "seal", rec.Seal)
	}
	// What was read may be in a cache of the disk only, where the memory was lost and the power was not. It has to be durable
	// before any of it is home, or the loss of the power would leave a part of a seal there.
	if err := v.meta.Sync(); err != nil {
		return recovery{}, fmt.Errorf("sync journal: %w", err)
	}
	p = progressLog{log: v.log, what: "replaying the journal"}
	if err := journal.Replay(ctx, rec, v.meta, v.backing, p.report); err != nil {
		return recovery{}, err
	}
	v.log.Info("recovered from the journal", "seal", rec.Seal, "runs", rec.Runs, "blocks", config.FormatBytes(rec.BlockBytes),
		"zeroes", config.FormatBytes(rec.ZeroBytes), "lost", len(rec.Lost), "torn", rec.Torn, "dur", time.Since(began).Round(time.Millisecond))
	return recovery{state: rec.State, seal: rec.Seal, lost: rec.Lost}, nil
}

// resume lets the ring go on where the memory says that it was, or where it is found where the memory does not say.
func (v *Volume) resume(ctx context.Context) (recovery, error) {
	s := v.superblock
	noted, ok := v.arena.Journal()
	if ok && noted.Stamp == s.RingStamp {
		// A run may lie behind that, written when the process ended. Nobody was answered for it, and what it holds is in the
		// memory. That it can be read does not make it durable: its sync may have failed. So it is written again.
		st := journal.RingState(noted)
		return recovery{state: st, seal: st.Committed, warm: true}, nil
	}
	rec, err := journal.Scan(ctx, v.meta, s, nil)
	if err = v.refused(err); err != nil {
		return recovery{}, err
	}
	if err := v.meta.Sync(); err != nil {
		return recovery{}, fmt.Errorf("sync journal: %w", err)
	}
	return recovery{state: rec.State, seal: rec.Seal, warm: true}, nil
}

// beginRing begins a new ring where the old one is not needed any more, and tells the memory where it is.
func (v *Volume) beginRing(r *recovery) error {
	if v.superblock.Journal == journal.KindNone || r.warm {
		return nil
	}
	var err error
	r.state, err = journal.Reset(v.meta, v.superblock, r.seal, v.generation(), r.lost, r.state)
	return err
}

// noteRing tells the memory where the ring is.
func (v *Volume) noteRing(st journal.RingState) { v.arena.SetJournal(arena.Journal(st)) }

// refused makes a control.Failure of a refusal.
func (v *Volume) refused(err error) error {
	var refused *journal.RefusedError
	if !errors.As(err, &refused) {
		return err
	}
	cause := errors.New(refused.Reason)
	if refused.Err != nil {
		cause = fmt.Errorf("%s: %w", refused.Reason, refused.Err)
	}
	return control.Refused(fmt.Errorf("backing %s: %w", v.config.Backing, cause), refused.Remedy)
}

// repair looks for a version of a block where it is written besides: in the journal, and at home, where it may have arrived.
// Whoever asked compares the checksum.
func (v *Volume) repair(block, number uint64, dst []byte) bool {
	if v.superblock.Journal != journal.KindNone {
		noted, ok := v.arena.Journal()
		found, err := false, error(nil)
		if ok {
			found, err = journal.Find(context.Background(), v.meta, v.superblock, journal.RingState(noted), block, number, dst)
		}
		if found && err == nil {
			return true
		}
	}
	n, _ := v.backing.ReadAt(dst, int64(block)*config.BlockBytes)
	return n == len(dst)
}

// progressLog logs how far something long is, once a second.
type progressLog struct {
	log  logger
	what string
	last time.Time
}

type logger interface{ Info(msg string, args ...any) }

func (p *progressLog) report(done, total int64) {
	now := time.Now()
	if p.last.IsZero() {
		p.last = now
	}
	if now.Sub(p.last) >= time.Second {
		p.last = now
		p.log.Info(p.what, "done", config.FormatBytes(done), "of", config.FormatBytes(total))
	}
}
