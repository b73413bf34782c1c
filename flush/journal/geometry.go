package journal

import "fmt"

// Bounds of the layout, in bytes.
const (
	// BlockBytes is the length of a block: of the volume, and of the ring.
	BlockBytes = 4096
	// MinRingBytes is the smallest ring.
	MinRingBytes = 4 << 20
	// MaxRingBytes is the largest ring.
	MaxRingBytes = 1 << 43
	// MinRegionBytes is the smallest region of the intent bitmap.
	MinRegionBytes = 64 << 10
	// MaxRegions is how many regions a volume has at most: larger volumes have larger regions.
	MaxRegions = 1 << 20
)

// RegionBytes is what a bit of the intent bitmap of a volume stands for: the smallest power of two from
// MinRegionBytes on of which the volume has at most MaxRegions.
func RegionBytes(volumeBytes int64) int64 {
	region := int64(MinRegionBytes)
	for ceilDiv(volumeBytes, region) > MaxRegions {
		region *= 2
	}
	return region
}

// bitmapBytes is the length of both copies of the intent bitmap of a volume.
func bitmapBytes(volumeBytes int64) int64 {
	return 2 * BlockBytes * ceilDiv(ceilDiv(volumeBytes, RegionBytes(volumeBytes)), regionsPerPage)
}

func ceilDiv(a, b int64) int64 { return (a + b - 1) / b }

func roundUp(n int64) int64 { return (n + BlockBytes - 1) &^ (BlockBytes - 1) }

func roundDown(n int64) int64 { return n &^ (BlockBytes - 1) }

// Geometry is how a backing is divided. All values are in bytes.
type Geometry struct {
	VolumeBytes    int64 // the volume lies from 0 to here, with KindExternal on the backing with the data
	MetadataOffset int64 // the metadata from here to the end of the superblock area
	BackingBytes   int64 // what the backing must have: more than it has where a file is to be extended

	RingOffset, RingBytes     int64 // 0 with KindNone
	BitmapOffset, BitmapBytes int64 // both copies
	RegionBytes               int64 // what a bit of the bitmap stands for
}

// CreateBytes is the size of a file that is made for a volume and, behind it, its metadata with a ring of
// about ringBytes; 0 means without ring.
func CreateBytes(volumeBytes, ringBytes int64) int64 {
	return roundUp(volumeBytes) + ExternalBytes(volumeBytes, ringBytes)
}

// ExternalBytes is the size of a file that is made for the metadata of a volume with a ring of about ringBytes.
func ExternalBytes(volumeBytes, ringBytes int64) int64 {
	return bitmapBytes(volumeBytes) + ringSize(ringBytes) + AreaBytes
}

// ringSize makes a wanted size one that a ring can have; 0 remains 0, no ring.
func ringSize(wanted int64) int64 {
	if wanted <= 0 {
		return 0
	}
	return max(roundUp(min(wanted, MaxRingBytes)), MinRingBytes)
}

// Plan divides a backing without superblock for the volume that w asks for. With KindExternal it is the backing
// that holds the metadata alone. A volume size of 0 means all that the metadata leave of a device, or all of the
// backing with the data. Where a file (Wanted.Extendable) has no room for the ring it is extended; a device has
// a smaller ring, down to MinRingBytes.
func Plan(backingBytes int64, w Wanted) (Geometry, error) {
	if err := w.validate(backingBytes); err != nil {
		return Geometry{}, err
	}
	volume, ring, area := w.VolumeBytes, int64(0), AreaOffset(backingBytes)
	if w.Journal != KindNone {
		ring = ringSize(max(w.RingBytes, MinRingBytes))
	}
	if volume == 0 && w.Journal == KindExternal {
		volume = roundDown(w.DataBytes)
	}
	if volume == 0 {
		if w.Journal != KindNone {
			ring = max(MinRingBytes, min(ring, roundDown(backingBytes/8)))
		}
		if volume = volumeBefore(area - ring); volume == 0 {
			return Geometry{}, w.noRoom(backingBytes, volume, area)
		}
		return layout(volume, ring, backingBytes), nil
	}
	room := area - bitmapBytes(volume) // for the ring
	if w.Journal != KindExternal {
		room -= roundUp(volume)
	}
	if room < ring {
		switch {
		case w.Extendable && w.Journal == KindExternal:
			backingBytes = ExternalBytes(volume, ring)
		case w.Extendable:
			backingBytes = CreateBytes(volume, ring)
		case w.Journal == KindNone || room < MinRingBytes:
			return Geometry{}, w.noRoom(backingBytes, volume, area)
		default:
			ring = room
		}
	}
	return layout(volume, ring, backingBytes), nil
}

// validate reports sizes that do not go together.
func (w *Wanted) validate(backingBytes int64) error {
	external := w.Journal == KindExternal
	switch {
	case w.VolumeBytes < 0 || w.VolumeBytes > MaxVolumeBytes || w.VolumeBytes%SectorBytes != 0:
		return fmt.Errorf("volume size of %d bytes is not a multiple of %d up to %d; give one that is", w.VolumeBytes, SectorBytes, int64(MaxVolumeBytes))
	case external && w.VolumeBytes > w.DataBytes:
		return fmt.Errorf("volume of %d bytes is larger than its backing of %d; give a smaller size or a larger backing", w.VolumeBytes, w.DataBytes)
	case external && roundDown(w.DataBytes) == 0:
		return fmt.Errorf("backing of %d bytes has no room for a volume; give a larger one", w.DataBytes)
	case external:
		return nil
	case w.VolumeBytes == 0 && w.Extendable:
		return fmt.Errorf("file of %d bytes holds no volume yet; give the size of the volume in it (--size)", backingBytes)
	case w.VolumeBytes > backingBytes:
		return fmt.Errorf("volume of %d bytes is larger than its backing of %d; give a smaller size or a larger backing",
			w.VolumeBytes, backingBytes)
	}
	return nil
}

// noRoom says that the metadata do not fit a backing of fixed size, and what would.
func (w *Wanted) noRoom(backingBytes, volumeBytes, area int64) error {
	switch w.Journal {
	case KindExternal:
		return fmt.Errorf("%d bytes of metadata do not fit the journal backing of %d; give a larger one",
			ExternalBytes(volumeBytes, MinRingBytes), backingBytes)
	case KindNone:
		return fmt.Errorf("volume of %d bytes and %d bytes of metadata do not fit a device of %d; give at most %d (--size) or keep the metadata elsewhere (--journal BACKING)",
			volumeBytes, ExternalBytes(volumeBytes, 0), backingBytes, volumeBefore(area))
	}
	return fmt.Errorf("volume of %d bytes and %d bytes of metadata, with a ring of %d, do not fit a device of %d; give at most %d (--size), another backing for the journal (--journal BACKING) or do without (--journal none)",
		volumeBytes, ExternalBytes(volumeBytes, MinRingBytes), MinRingBytes, backingBytes, volumeBefore(area-MinRingBytes))
}

// volumeBefore is the largest volume that fits before end together with its bitmap, 0 if none does.
func volumeBefore(end int64) int64 {
	end = min(end, MaxVolumeBytes)
	if end <= 0 {
		return 0
	}
	volume := end - bitmapBytes(end)
	// A volume that is smaller by its bitmap may have smaller regions, and so the larger bitmap.
	if b := bitmapBytes(max(volume, 0)); volume+b > end {
		volume = end - b
	}
	return max(volume, 0)
}

// layout lays the metadata before the superblock area at the tail of a backing.
func layout(volumeBytes, ringBytes, backingBytes int64) Geometry {
	g := Geometry{
		VolumeBytes: volumeBytes, BackingBytes: backingBytes, RingBytes: ringBytes,
		RegionBytes: RegionBytes(volumeBytes), BitmapBytes: bitmapBytes(volumeBytes),
	}
	end := AreaOffset(backingBytes) - ringBytes
	if ringBytes > 0 {
		g.RingOffset = end
	}
	g.BitmapOffset = end - g.BitmapBytes
	g.MetadataOffset = g.BitmapOffset
	return g
}

// geometry is that of a backing that holds s.
func (s *Superblock) geometry(backingBytes int64) Geometry {
	return Geometry{
		VolumeBytes: s.VolumeBytes, MetadataOffset: s.MetadataOffset(), BackingBytes: backingBytes,
		RingOffset: s.RingOffset, RingBytes: s.RingBytes, BitmapOffset: s.BitmapOffset, BitmapBytes: s.BitmapBytes, RegionBytes: s.RegionBytes,
	}
}
