package arena_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/cache/arena"
)

var id = arena.Identity{Volume: [16]byte{1, 2, 3}, SizeBytes: 64 << 20, MemoryBytes: 1 << 20}

func path(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "arena-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "v.mem")
}

func open(t testing.TB, p string, id arena.Identity) *arena.Arena {
	a, _, err := arena.Open(p, id)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestKeepsWhatWasStored(t *testing.T) {
	p := path(t)
	a := open(t, p, id)
	copy(a.Data(7), "content")
	a.Headers[7].Number.Store(42)
	a.Zeroes[3].Blocks.Store(9)
	a.SetPublished(42)
	a.Announce(5)
	if !a.BelongsTo(5) || a.BelongsTo(0) {
		t.Error("an announced stamp belongs, none does not")
	}
	a.Stamp(6)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(p)
	if err != nil || info.Mode().Perm() != 0o600 || info.Size() != arena.FileBytes(id.MemoryBytes) {
		t.Errorf("memory file is %v, %v", info, err)
	}
	a, warm, err := arena.Open(p, id)
	if err != nil || !warm {
		t.Fatal(warm, err)
	}
	if string(a.Data(7)[:7]) != "content" || a.Headers[7].Number.Load() != 42 || a.Zeroes[3].Blocks.Load() != 9 || a.Published() != 42 {
		t.Error("what was stored is not there")
	}
	if a.BelongsTo(5) || !a.BelongsTo(6) {
		t.Error("the stamp is not the last one")
	}
	if err := a.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); !errors.Is(err, os.ErrNotExist) {
		t.Error("the file is still there after Remove")
	}
}

func TestRefuses(t *testing.T) {
	other := func(change func(*arena.Identity)) arena.Identity {
		o := id
		change(&o)
		return o
	}
	mismatch := new(*arena.MismatchError)
	for name, c := range map[string]struct {
		id     arena.Identity
		damage func(p string) error
		as     any
		is     error
	}{
		"another volume": {id: other(func(o *arena.Identity) { o.Volume[0] = 9 }), as: mismatch},
		"another size":   {id: other(func(o *arena.Identity) { o.SizeBytes *= 2 }), as: mismatch},
		"another memory": {id: other(func(o *arena.Identity) { o.MemoryBytes *= 2 }), as: mismatch},
		"foreign":        {id: id, is: arena.ErrForeign, damage: func(p string) error { return os.WriteFile(p, []byte("something else entirely"), 0o600) }},
		"cut":            {id: id, is: arena.ErrForeign, damage: func(p string) error { return os.Truncate(p, 8192) }},
		"damaged": {id: id, is: arena.ErrForeign, damage: func(p string) error {
			f, err := os.OpenFile(p, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte{0xff}, 20)
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p := path(t)
			if err := open(t, p, id).Close(); err != nil {
				t.Fatal(err)
			}
			if c.damage != nil {
				if err := c.damage(p); err != nil {
					t.Fatal(err)
				}
			}
			before, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = arena.Open(p, c.id)
			if c.is != nil && !errors.Is(err, c.is) || c.as != nil && !errors.As(err, c.as) {
				t.Errorf("got %v", err)
			}
			after, err := os.ReadFile(p)
			if err != nil || string(after) != string(before) {
				t.Error("the file was changed")
			}
		})
	}
}

func TestOneProcessAtATime(t *testing.T) {
	p := path(t)
	a := open(t, p, id)
	defer a.Close()
	if _, _, err := arena.Open(p, id); !errors.Is(err, arena.ErrBusy) {
		t.Errorf("second Open gave %v", err)
	}
	if _, _, err := arena.Inspect(p); !errors.Is(err, arena.ErrBusy) {
		t.Errorf("Inspect of an open file gave %v", err)
	}
}

// TestIdentify tells whose a file is, also while it is open, and whatever lies there.
func TestIdentify(t *testing.T) {
	p := path(t)
	a := open(t, p, id)
	if got, err := arena.Identify(p); err != nil || got != id {
		t.Errorf("of an open file: %+v, %v", got, err)
	}
	a.Close()
	if got, err := arena.Identify(p); err != nil || got != id {
		t.Errorf("of a closed file: %+v, %v", got, err)
	}
	if _, err := arena.Identify(p + ".none"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of none: %v", err)
	}
	for name, make := range map[string]func(p string) error{
		"text":   func(p string) error { return os.WriteFile(p, []byte("something else"), 0o600) },
		"empty":  func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"folder": func(p string) error { return os.Mkdir(p, 0o700) },
		"pipe":   func(p string) error { return unix.Mkfifo(p, 0o600) },
	} {
		if err := make(p + name); err != nil {
			t.Fatal(err)
		}
		if _, err := arena.Identify(p + name); !errors.Is(err, arena.ErrForeign) {
			t.Errorf("of a %s: %v", name, err)
		}
	}
}

// TestUnfinished opens a file that a process had made but not begun to use when it died.
func TestUnfinished(t *testing.T) {
	for _, n := range []int64{0, 1 << 20, arena.FileBytes(id.MemoryBytes)} {
		p := path(t)
		if err := os.WriteFile(p, make([]byte, n), 0o600); err != nil {
			t.Fatal(err)
		}
		a, warm, err := arena.Open(p, id)
		if err != nil || warm {
			t.Fatalf("%d zero bytes: warm %v, %v", n, warm, err)
		}
		a.Close()
	}
}

func TestTooLittleSharedMemory(t *testing.T) {
	p := path(t)
	huge := id
	huge.MemoryBytes = 1 << 50
	if _, _, err := arena.Open(p, huge); err == nil {
		t.Error("a petabyte of shared memory was had")
	}
	if _, err := os.Stat(p); !errors.Is(err, os.ErrNotExist) {
		t.Error("the file is still there")
	}
}

// FuzzOpen gives Inspect any head: it is ours and whole, or ErrForeign.
func FuzzOpen(f *testing.F) {
	p := path(f)
	a := open(f, p, id)
	a.Close()
	good, err := os.ReadFile(p)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good[:128])
	f.Add([]byte("RAMSHELF"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, head []byte) {
		p := path(t)
		b := make([]byte, arena.FileBytes(id.MemoryBytes))
		copy(b, head[:min(len(head), 4096)])
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		a, got, err := arena.Inspect(p)
		if err != nil {
			if !errors.Is(err, arena.ErrForeign) {
				t.Fatal(err)
			}
			return
		}
		if arena.FileBytes(got.MemoryBytes) != int64(len(b)) {
			t.Fatalf("accepted %d bytes of memory in a file of %d", got.MemoryBytes, len(b))
		}
		a.Close()
	})
}
