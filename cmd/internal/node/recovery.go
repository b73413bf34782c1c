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
	warm  bool               // the memory has everything: nothing is replayed, and the ring goes on
	found *journal.Recovered // what was replayed; nil where nothing was

	gaveUp bool // the journal is damaged, and what was committed behind the damage is gone
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
	rec, damage, err := v.scan(ctx)
	if err != nil || damage != nil && !v.config.Force {
		return recovery{}, errors.Join(err, damage)
	}
	if damage != nil {
		v.log.Error("the journal is damaged; what lies behind the damage is given up", "err", damage, "seal", rec.Seal)
	}
	r, err := v.replay(ctx, rec)
	r.gaveUp = damage != nil
	return r, err
}

// scan finds what the journal holds that may not be home. damage refuses the journal: rec is then what lies before it.
func (v *Volume) scan(ctx context.Context) (rec *journal.Recovered, damage, err error) {
	p := progressLog{log: v.log, what: "scanning the journal"}
	rec, err = journal.Scan(ctx, v.meta, v.superblock, p.report)
	if err = v.refused(err); rec != nil {
		return rec, err, nil
	}
	return nil, nil, err
}

// replay brings home what was found.
func (v *Volume) replay(ctx context.Context, rec *journal.Recovered) (recovery, error) {
	began := time.Now()
	p := progressLog{log: v.log, what: "replaying the journal"}
	if err := journal.Replay(ctx, rec, v.meta, v.backing, p.report); err != nil {
		return recovery{}, err
	}
	v.log.Info("recovered from the journal", "seal", rec.Seal, "runs", rec.Runs, "blocks", config.FormatBytes(rec.BlockBytes),
		"zeroes", config.FormatBytes(rec.ZeroBytes), "lost", len(rec.Lost), "torn", rec.Torn, "dur", time.Since(began).Round(time.Millisecond))
	return recovery{state: rec.State, seal: rec.Seal, lost: rec.Lost, found: rec}, nil
}

// finishZero zeroes what a resize has left to be zeroed, which the superblock no longer says when it is stored next.
func (v *Volume) finishZero(ctx context.Context) error {
	s := v.superblock
	if s.ZeroBytes == 0 {
		return nil
	}
	p := progressLog{log: v.log, what: "zeroing what a resize has left"}
	done, total := int64(0), s.ZeroBytes
	err := journal.Zero(ctx, v.backing, s.ZeroOffset, total, func(n int64) {
		done += n
		p.report(done, total)
	})
	if err == nil {
		err = v.backing.Sync()
	}
	if err != nil {
		return fmt.Errorf("finish a resize: %w", err)
	}
	s.ZeroOffset, s.ZeroBytes = 0, 0
	return nil
}

// resume lets the ring go on where the memory says that it was. Where it says nothing a start before this one was killed when it
// had begun the ring and had not told the memory yet, nor maybe which blocks are lost: the ring knows. What lies
// behind that place is written over, also a run that is whole: nobody was answered for it, the memory has all of it, and if its
// sync failed it may be nowhere but in a cache from which no later sync would bring it to the disk.
func (v *Volume) resume(ctx context.Context) (recovery, error) {
	s := v.superblock
	noted, ok := v.arena.Journal()
	if ok && noted.Stamp == s.RingStamp {
		return recovery{state: journal.RingState(noted), seal: noted.Committed, warm: true}, nil
	}
	rec, err := journal.Scan(ctx, v.meta, s, nil)
	if err = v.refused(err); err != nil {
		return recovery{}, err
	}
	if err := v.meta.Sync(); err != nil {
		return recovery{}, fmt.Errorf("sync journal: %w", err)
	}
	return recovery{state: rec.State, seal: rec.Seal, lost: rec.Lost, warm: true}, nil
}

// beginRing begins a new ring where the old one is not needed any more.
func (v *Volume) beginRing(r *recovery) error {
	if v.superblock.Journal == journal.KindNone || r.warm {
		return nil
	}
	var err error
	r.state, err = journal.Reset(v.meta, v.superblock, r.seal, v.generation(), r.lost, r.state)
	return err
}

// noteRing tells the memory where the ring is, once it has all that it is to have of it.
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
