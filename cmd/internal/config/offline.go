package config

import (
	"fmt"

	"github.com/spf13/pflag"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

// Offline names a volume that no daemon serves, for the verbs that work on its backing. Name, size and layout are read there.
type Offline struct {
	Backing Backing // where the content is kept
	Journal Journal // zero: on Backing, or none
	Shm     string  // folder of the memory files that must not hold anything of the volume
	Force   bool    // do what is otherwise refused for safety
	DryRun  bool    // change nothing
	Size    Size    // that the volume is to have
	sized   bool    // Size must be given
}

func (o *Offline) addFlags(fs *pflag.FlagSet, force string) {
	fs.SortFlags = false
	fs.Var(flagValue{&o.Backing, "BACKING"}, "backing", "where the content is kept: file:PATH, /dev/X, nbd://…, nbd+unix://…")
	fs.StringVar(&o.Shm, "shm", DefaultShm, "`DIR` of the memory files of the daemon that served the volume")
	fs.BoolVar(&o.Force, "force", false, force)
}

// BindRecover adds the flags of recover to fs. Check is called after fs was parsed.
func BindRecover(fs *pflag.FlagSet) *Offline {
	o := new(Offline)
	o.addFlags(fs, "give up what lies behind a damage of the journal, and what is lost")
	fs.Var(flagValue{&o.Journal, "BACKING"}, "journal", "where the journal lies, if it has a backing of its own")
	fs.BoolVar(&o.DryRun, "dry-run", false, "tell what would be done, and change nothing")
	return o
}

// BindResize adds the flags of resize to fs. Check is called after fs was parsed.
func BindResize(fs *pflag.FlagSet) *Offline {
	o := new(Offline)
	o.addFlags(fs, "overwrite what lies where the metadata go, and recover as recover --force")
	fs.Var(flagValue{&o.Size, "SIZE"}, "size", "size that the volume is to have")
	o.sized = true
	return o
}

// Check refuses what can be known to be wrong. Its errors are control.Failures.
func (o *Offline) Check() error {
	if o.Backing == (Backing{}) {
		return control.Usage("give the one that the volume is served with", "--backing is required")
	}
	switch {
	case !o.sized:
	case o.Size == 0:
		return control.Usage("give the size that the volume is to have, such as --size 2TiB", "--size is required")
	case o.Size%BlockBytes != 0 || o.Size > maxSize:
		return control.Usage(fmt.Sprintf("the nearest are %s", nearest(min(int64(o.Size), maxSize), BlockBytes)),
			"--size %d is no multiple of %d up to %d", o.Size, BlockBytes, int64(maxSize))
	}
	for _, b := range []struct {
		flag    string
		backing Backing
	}{{"--backing", o.Backing}, {"--journal", o.Journal.Backing}} {
		if b.backing.later() {
			return control.Later(fmt.Sprintf("%s %s", b.flag, b.backing))
		}
	}
	if o.Journal.Kind == JournalBacking && o.Journal.Backing.key() == o.Backing.key() {
		return control.Usage("leave --journal out where the journal is on the backing itself", "--journal and --backing are both %s", o.Backing)
	}
	return nil
}

// Volume is the setting of the volume as far as it is known.
func (o *Offline) Volume() *Volume {
	return &Volume{Backing: o.Backing, Journal: o.Journal, Force: o.Force}
}
