// Package arena is the memory of a volume: one file under tmpfs, mapped and locked, that holds the slots, a header
// per slot and the zero extents. It lies outside Go's heap and outlives the process, so a daemon that is killed or
// upgraded finds every answered write again.
//
// The package knows the bytes of the file and nothing of their meaning: what may be stored in which order is the
// business of package cache. Layout, all words little-endian and naturally aligned:
//
//	0        file header, 4096 bytes
//	4096     zero extents, 32 bytes each, one for 32 slots, at most 2048
//	...      slot headers, 24 bytes each, from the next multiple of 4096
//	...      slots, 4096 bytes each, from the next multiple of 4096; of 2 MiB where the slots take 1 GiB or more
package arena

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// SlotBytes is the size of a slot and of a block.
const SlotBytes = 4096

// zeroEntries is how many zero extents a memory file has room for. A file system that discards its free space sends a few
// hundred at a time; the flusher takes them all with the next seal.
func zeroEntries(memoryBytes int64) int64 {
	const most, slotsEach = 2048, 32
	return min(most, memoryBytes/SlotBytes/slotsEach)
}

const (
	fileMagic     = "RAMSHELF"
	formatVersion = 1
	headBytes     = 4096
	zeroBytes     = 32
	headerBytes   = 24

	// hugeFrom is the memory from which on huge pages are worth the memory that their alignment costs.
	hugeFrom = 1 << 30
	hugePage = 2 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Header describes one slot. The word Number is stored last to publish the slot and is zero while the slot is free.
type Header struct {
	Block  atomic.Uint64 // bits 0-39: block number; bits 40-47: valid sectors; bits 48-63: checksum of the others
	Number atomic.Uint64 // sequence number; 0: free
	Check  atomic.Uint64 // bits 0-31: checksum; bits 32-39: sectors not yet home and synced; bit 40: lost
}

// Zero is one zero extent. The word Number is stored last to publish it and is zero while the entry is free.
type Zero struct {
	First  atomic.Uint64 // block number
	Blocks atomic.Uint64
	Number atomic.Uint64 // sequence number; 0: free
	Check  atomic.Uint64 // checksum over the three
}

// Identity is what a memory file belongs to.
type Identity struct {
	Volume      [16]byte // UUID
	SizeBytes   int64    // of the volume
	MemoryBytes int64    // slots × SlotBytes
}

// head is the first page of the file.
type head struct {
	magic   [8]byte
	version uint32
	check   uint32 // CRC32C of the identity that follows
	volume  [16]byte
	size    int64
	memory  int64
	zeroes  int64
	_       [8]byte

	// What follows changes while the file is in use; each word is whole by itself.
	stamp     atomic.Uint64 // incarnation of the backing that this memory belongs to
	nextStamp atomic.Uint64 // incarnation that is being stamped into the backing
	published atomic.Uint64 // every number up to this one was issued whole

	turn  atomic.Uint64 // which of the journals below holds
	rings [2][journalWords]atomic.Uint64
}

// journalWords are the words of a Journal and their checksum.
const journalWords = 5

// Journal is where the journal of the volume has got to. What the words mean is the business of those who write it.
type Journal struct{ Stamp, Head, Tail, Committed uint64 }

func (j Journal) words() [journalWords]uint64 {
	w := [journalWords]uint64{j.Stamp, j.Head, j.Tail, j.Committed}
	b := make([]byte, 0, 8*journalWords)
	for _, x := range w[:journalWords-1] {
		b = binary.LittleEndian.AppendUint64(b, x)
	}
	w[journalWords-1] = uint64(crc32.Checksum(b, castagnoli)) | 1<<32
	return w
}

// Arena is a mapped memory file. Its words may be used by several goroutines; Close must come last.
type Arena struct {
	Headers []Header // one per slot
	Zeroes  []Zero

	file *os.File
	mem  []byte
	data []byte
	head *head
}

// Errors of Open.
var (
	// ErrForeign says that a file is no memory file of ours, or a damaged one.
	ErrForeign = errors.New("not a memory file of ramshelf, or a damaged one")
	// ErrBusy says that another process has the file open.
	ErrBusy = errors.New("the memory file is in use by another process")
)

// MismatchError says that a memory file belongs to something else than was expected.
type MismatchError struct{ Have, Want Identity }

func (e *MismatchError) Error() string {
	switch {
	case e.Have.Volume != e.Want.Volume:
		return fmt.Sprintf("the memory file belongs to volume %x, not to %x", e.Have.Volume, e.Want.Volume)
	case e.Have.SizeBytes != e.Want.SizeBytes:
		return fmt.Sprintf("the memory file is of a volume of %d bytes, not %d", e.Have.SizeBytes, e.Want.SizeBytes)
	}
	return fmt.Sprintf("the memory file holds %d bytes of slots, not %d", e.Have.MemoryBytes, e.Want.MemoryBytes)
}

// FileBytes is the length of a memory file for memoryBytes of slots.
func FileBytes(memoryBytes int64) int64 {
	_, data := offsets(memoryBytes)
	return data + memoryBytes
}

func offsets(memoryBytes int64) (headers, data int64) {
	headers = roundUp(headBytes+zeroEntries(memoryBytes)*zeroBytes, SlotBytes)
	align := int64(SlotBytes)
	if memoryBytes >= hugeFrom {
		align = hugePage
	}
	return headers, roundUp(headers+memoryBytes/SlotBytes*headerBytes, align)
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

// Open maps the memory file at path and locks it against other processes; where there is none it makes an empty one.
// A file that is not ours is ErrForeign, one of another volume or size a MismatchError; both leave it untouched.
// The second result tells whether the file was there before.
func Open(path string, id Identity) (*Arena, bool, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, false, fmt.Errorf("open memory file: %w", err)
	}
	a, warm, err := open(f, id)
	if err != nil {
		return nil, false, errors.Join(err, f.Close())
	}
	return a, warm, nil
}

func open(f *os.File, id Identity) (*Arena, bool, error) {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, false, fmt.Errorf("lock %s: %w", f.Name(), ErrBusy)
	}
	have, err := readIdentity(f)
	if errors.Is(err, errEmpty) {
		a, err := create(f, id)
		return a, false, err
	}
	if err != nil {
		return nil, false, err
	}
	if have != id {
		return nil, false, &MismatchError{Have: have, Want: id}
	}
	a, err := mapFile(f, id)
	return a, true, err
}

// errEmpty says that a file was made but never finished: nothing was ever stored in it.
var errEmpty = errors.New("empty memory file")

// Inspect maps an existing memory file as it is, whatever it belongs to. ErrForeign where it is none of ours.
func Inspect(path string) (*Arena, Identity, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, Identity{}, fmt.Errorf("open memory file: %w", err)
	}
	a, id, err := inspect(f)
	if err != nil {
		return nil, Identity{}, errors.Join(err, f.Close())
	}
	return a, id, nil
}

// Identify tells what the memory file at path belongs to, whoever has it open. ErrForeign where it is none of ours.
func Identify(path string) (Identity, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return Identity{}, fmt.Errorf("open memory file: %w", err)
	}
	id, err := readIdentity(f)
	if errors.Is(err, errEmpty) {
		err = ErrForeign
	}
	return id, errors.Join(err, f.Close())
}

func inspect(f *os.File) (*Arena, Identity, error) {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, Identity{}, fmt.Errorf("lock %s: %w", f.Name(), ErrBusy)
	}
	id, err := readIdentity(f)
	if errors.Is(err, errEmpty) {
		err = ErrForeign
	}
	if err != nil {
		return nil, Identity{}, err
	}
	a, err := mapFile(f, id)
	return a, id, err
}

func readIdentity(f *os.File) (Identity, error) {
	info, err := f.Stat()
	if err != nil {
		return Identity{}, fmt.Errorf("stat memory file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return Identity{}, fmt.Errorf("%s: %w", f.Name(), ErrForeign)
	}
	b := make([]byte, unsafe.Sizeof(head{}))
	if n, _ := f.ReadAt(b, 0); n < len(b) {
		if info.Size() == 0 {
			return Identity{}, errEmpty
		}
		return Identity{}, fmt.Errorf("%s: %w", f.Name(), ErrForeign)
	}
	if allZero(b) {
		return Identity{}, errEmpty
	}
	h := (*head)(unsafe.Pointer(&b[0]))
	id := Identity{Volume: h.volume, SizeBytes: h.size, MemoryBytes: h.memory}
	if string(h.magic[:]) != fileMagic || h.version != formatVersion || h.check != identityCheck(id, h.zeroes) ||
		h.zeroes != zeroEntries(h.memory) || info.Size() != FileBytes(id.MemoryBytes) {
		return Identity{}, fmt.Errorf("%s: %w", f.Name(), ErrForeign)
	}
	return id, nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

func identityCheck(id Identity, zeroes int64) uint32 {
	b := append([]byte(fileMagic), id.Volume[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(id.SizeBytes))
	b = binary.LittleEndian.AppendUint64(b, uint64(id.MemoryBytes))
	b = binary.LittleEndian.AppendUint64(b, uint64(zeroes))
	return crc32.Checksum(b, castagnoli)
}

// create sizes the file and takes its pages now: a full tmpfs is an error here and would be a SIGBUS later.
func create(f *os.File, id Identity) (*Arena, error) {
	n := FileBytes(id.MemoryBytes)
	if err := unix.Fallocate(int(f.Fd()), 0, 0, n); err != nil {
		err = errors.Join(err, os.Remove(f.Name()))
		return nil, fmt.Errorf("allocate %d bytes of shared memory in %s: %w; give less --memory or another --shm", n, filepath.Dir(f.Name()), err)
	}
	if err := f.Truncate(n); err != nil {
		return nil, fmt.Errorf("size memory file: %w", err)
	}
	a, err := mapFile(f, id)
	if err != nil {
		return nil, err
	}
	h := a.head
	h.volume, h.size, h.memory, h.zeroes = id.Volume, id.SizeBytes, id.MemoryBytes, zeroEntries(id.MemoryBytes)
	h.version, h.check = formatVersion, identityCheck(id, h.zeroes)
	copy(h.magic[:], fileMagic)
	return a, nil
}

func mapFile(f *os.File, id Identity) (*Arena, error) {
	n := FileBytes(id.MemoryBytes)
	mem, err := unix.Mmap(int(f.Fd()), 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map memory file of %d bytes: %w", n, err)
	}
	headers, data := offsets(id.MemoryBytes)
	slots := int(id.MemoryBytes / SlotBytes)
	a := &Arena{file: f, mem: mem, data: mem[data:n:n], head: (*head)(unsafe.Pointer(&mem[0]))}
	a.Headers = unsafe.Slice((*Header)(unsafe.Pointer(&mem[headers])), slots)
	a.Zeroes = unsafe.Slice((*Zero)(unsafe.Pointer(&mem[headBytes])), zeroEntries(id.MemoryBytes))
	// Both are hints: without huge pages it is slower, with dumps a core file is larger.
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	_ = unix.Madvise(mem, unix.MADV_DONTDUMP)
	return a, nil
}

// Data is the content of slot s.
func (a *Arena) Data(s uint32) []byte {
	at := int64(s) * SlotBytes
	return a.data[at : at+SlotBytes : at+SlotBytes]
}

// Published is the highest number that was issued whole.
func (a *Arena) Published() uint64 { return a.head.published.Load() }

// SetPublished says that number and all before it were issued whole.
func (a *Arena) SetPublished(number uint64) { a.head.published.Store(number) }

// SetJournal records where the journal has got to: the one before holds until all of it is stored. It must not be called by
// two at a time.
func (a *Arena) SetJournal(j Journal) {
	next := 1 - a.head.turn.Load()&1
	for i, w := range j.words() {
		a.head.rings[next][i].Store(w)
	}
	a.head.turn.Store(next)
}

// Journal is what SetJournal recorded last, false where nothing was.
func (a *Arena) Journal() (Journal, bool) {
	r := &a.head.rings[a.head.turn.Load()&1]
	j := Journal{r[0].Load(), r[1].Load(), r[2].Load(), r[3].Load()}
	return j, j.words()[journalWords-1] == r[journalWords-1].Load()
}

// BelongsTo tells whether the memory goes with a backing of the incarnation stamp: it was used with it last, or was
// about to be when the process ended between the two stamps.
func (a *Arena) BelongsTo(stamp uint64) bool {
	return stamp != 0 && (a.head.stamp.Load() == stamp || a.head.nextStamp.Load() == stamp)
}

// Announce records the incarnation that is about to be stamped into the backing.
func (a *Arena) Announce(stamp uint64) { a.head.nextStamp.Store(stamp) }

// Stamp records the incarnation that the backing now has.
func (a *Arena) Stamp(stamp uint64) {
	a.head.stamp.Store(stamp)
	a.head.nextStamp.Store(0)
}

// lockStep is how much is locked at once, so that a large memory is pinned without stopping the process.
const lockStep = 16 << 20

// Lock pins the memory into RAM, step by step, until it is done or stop tells it to end.
func (a *Arena) Lock(stop <-chan struct{}) error {
	for at := 0; at < len(a.mem); at += lockStep {
		select {
		case <-stop:
			return nil
		default:
		}
		if err := unix.Mlock(a.mem[at:min(at+lockStep, len(a.mem))]); err != nil {
			return fmt.Errorf("lock %d bytes of memory: %w", len(a.mem), err)
		}
	}
	return nil
}

// Close unmaps the memory and leaves the file for the next process.
func (a *Arena) Close() error {
	err := unix.Munmap(a.mem)
	a.mem, a.data, a.Headers, a.Zeroes, a.head = nil, nil, nil, nil, nil
	return errors.Join(err, a.file.Close())
}

// Remove unmaps the memory and deletes its file: nothing in it is needed any more.
func (a *Arena) Remove() error {
	err := os.Remove(a.file.Name())
	return errors.Join(err, a.Close())
}

// Make returns n zeroed elements outside Go's heap; T must not hold pointers.
func Make[T any](n int) ([]T, error) {
	var t T
	b, err := unix.Mmap(-1, 0, max(1, n)*int(unsafe.Sizeof(t)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", n*int(unsafe.Sizeof(t)), err)
	}
	return unsafe.Slice((*T)(unsafe.Pointer(&b[0])), n), nil
}

// Free gives back what Make returned.
func Free[T any](s []T) {
	if cap(s) == 0 {
		return
	}
	s = s[:cap(s)]
	_ = unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(s))), len(s)*int(unsafe.Sizeof(s[0]))))
}
