package flush

import "fmt"

// Intent keeps on the backing which parts of the volume this node is changing. Without a journal they are marked before the home
// writes of a pass, all of it in one goroutine; with one before they are committed, by the goroutine of the commits, and Store comes from
// that of the way home.
type Intent interface {
	// Mark says that n bytes at off get a version or an extent with that number. It must not wait.
	Mark(off, n int64, number uint64)
	// Store makes durable what was marked: it writes and then calls sync, unless nothing needs to be written. Everything up to
	// number was marked before. What was marked before the Store before, and not again since, is home and synced where there is
	// no journal.
	Store(number uint64, sync func() error) error
}

// Planner is what a Source must do besides where there is an Intent and no journal.
type Planner interface {
	// Plan gives the ranges that the sweep will zero or write, in no order, and maybe some that it will not. It comes before
	// Zeroes and Next, at the beginning of every pass.
	Plan(give func(off, n int64))
}

// intents lets Options.Intent go before what is written home. It belongs to the goroutine of the way home.
type intents struct {
	keep Intent
	lane lane    // to the backing where the metadata lie; it has no jobs
	plan Planner // nil with a journal
	seal uint64  // without a journal: the one that goes home
}

// newIntents returns nil where nothing is kept.
func newIntents(f *Flusher) (*intents, error) {
	if f.o.Intent == nil {
		return nil, nil
	}
	i := &intents{keep: f.o.Intent}
	if f.commits != nil {
		i.lane.init(f, f.commits.lane.out.dev, f.commits.lane.disk)
		return i, nil
	}
	i.lane.init(f, f.homeLane.out.dev, f.homeLane.disk)
	plan, ok := f.src.(Planner)
	if !ok {
		return nil, fmt.Errorf("the source cannot tell what a sweep will write")
	}
	i.plan = plan
	return i, nil
}

// before makes durable what the pass that begins is going to change, or with a journal what was committed before it.
func (i *intents) before(f *Flusher) error {
	if i == nil {
		return nil
	}
	number := i.seal
	if i.plan != nil {
		i.plan.Plan(func(off, n int64) { i.keep.Mark(off, n, number) })
	} else {
		number = f.commits.state().Committed
	}
	i.lane.begins()
	i.lane.progress.begin()
	defer i.lane.progress.end()
	if err := i.keep.Store(number, i.lane.sync); err != nil {
		f.counters.errors.Add(1)
		return err
	}
	return nil
}
