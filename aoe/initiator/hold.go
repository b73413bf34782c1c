package initiator

// hold keeps newer writes off a range of sectors while a write to it may be on its way.
type hold struct {
	lba, sectors uint64
	reasons      int // fragments that are not finished and copies that may be on their way
	live         bool
}

// holds are the ranges that are held, by region.
type holds struct {
	regions map[uint64][]*hold
	count   int
}

// regionSectors: a frame of at most 255 sectors lies in two regions at most.
const regionSectors = 256

func (s *holds) init() { s.regions = map[uint64][]*hold{} }

func (h *hold) overlaps(lba, sectors uint64) bool {
	return lba < h.lba+h.sectors && h.lba < lba+sectors
}

// overlapping is any hold on one of the sectors, or nil.
func (s *holds) overlapping(lba, sectors uint64) *hold {
	for region := lba / regionSectors; region <= (lba+sectors-1)/regionSectors; region++ {
		for _, h := range s.regions[region] {
			if h.overlaps(lba, sectors) {
				return h
			}
		}
	}
	return nil
}

// add holds the range, for one reason. Nothing may hold it yet.
func (s *holds) add(lba, sectors uint64) *hold {
	h := &hold{lba: lba, sectors: sectors, reasons: 1, live: true}
	for region := lba / regionSectors; region <= (lba+sectors-1)/regionSectors; region++ {
		s.regions[region] = append(s.regions[region], h)
	}
	s.count++
	return h
}

// remove lets the range go. A second call does nothing.
func (s *holds) remove(h *hold) {
	if !h.live {
		return
	}
	h.live = false
	s.count--
	for region := h.lba / regionSectors; region <= (h.lba+h.sectors-1)/regionSectors; region++ {
		list := s.regions[region]
		for i, other := range list {
			if other == h {
				list[i] = list[len(list)-1]
				list[len(list)-1] = nil
				list = list[:len(list)-1]
				break
			}
		}
		if len(list) == 0 {
			delete(s.regions, region)
		} else {
			s.regions[region] = list
		}
	}
}
