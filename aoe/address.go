package aoe

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
)

// MAC is an Ethernet address.
type MAC [6]byte

// Broadcast is the MAC of everybody.
var Broadcast = MAC{0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF}

// String is the MAC as aa:bb:cc:dd:ee:ff.
func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// ParseMAC reads aa:bb:cc:dd:ee:ff, also with dashes or without anything between (as aoetools write it).
func ParseMAC(s string) (m MAC, err error) {
	plain := strings.NewReplacer(":", "", "-", "").Replace(s)
	if b, err := hex.DecodeString(plain); err == nil && len(b) == len(m) {
		return MAC(b), nil
	}
	return m, fmt.Errorf("parse MAC %q: write it as 02:00:00:00:00:01", s)
}

// Limits of addresses. Linux rejects shelves 4095 and 65535; 65535 and slot 255 stand for all.
const (
	AllShelves = 0xFFFF
	AllSlots   = 0xFF
	MaxSlot    = 254
	linuxShelf = 0xFFF
)

// Address names a target: eSHELF.SLOT.
type Address struct {
	Shelf uint16
	Slot  uint8
}

// All is the address of a frame that every target shall answer.
var All = Address{Shelf: AllShelves, Slot: AllSlots}

// String is eSHELF.SLOT.
func (a Address) String() string { return fmt.Sprintf("e%d.%d", a.Shelf, a.Slot) }

// Matches reports whether a target of address a is meant by a frame for b.
func (a Address) Matches(b Address) bool {
	return (b.Shelf == a.Shelf || b.Shelf == AllShelves) && (b.Slot == a.Slot || b.Slot == AllSlots)
}

// ParseAddress reads eSHELF.SLOT: shelf 0..65534 without 4095, slot 0..254.
func ParseAddress(s string) (a Address, err error) {
	shelf, slot, ok := strings.Cut(strings.TrimPrefix(s, "e"), ".")
	if !ok || !strings.HasPrefix(s, "e") {
		return a, fmt.Errorf("parse AoE address %q: write it as eSHELF.SLOT, e1.0", s)
	}
	n, err := number(shelf, AllShelves-1)
	if err != nil || n == linuxShelf {
		return a, fmt.Errorf("parse AoE address %q: the shelf must be 0..65534 and not 4095, which Linux rejects", s)
	}
	a.Shelf = uint16(n)
	if n, err = number(slot, MaxSlot); err != nil {
		return Address{}, fmt.Errorf("parse AoE address %q: the slot must be 0..254", s)
	}
	a.Slot = uint8(n)
	return a, nil
}

// number reads decimal digits without a sign and without leading zeroes, so that a name has one spelling.
func number(s string, limit uint64) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n > limit || strconv.FormatUint(n, 10) != s {
		return 0, errors.New("out of range")
	}
	return n, nil
}

// MaxInterfaces is how many interfaces an endpoint can name.
const MaxInterfaces = 8

// interfaceNameBytes is the longest name of an interface, IFNAMSIZ without the zero (net/if.h).
const interfaceNameBytes = 15

// Endpoint is a target and the interfaces on which it is looked for, or served: eSHELF.SLOT@IF[+IF…].
type Endpoint struct {
	Address    Address
	Interfaces []string // 1..MaxInterfaces, none twice
}

// String is eSHELF.SLOT@IF[+IF…].
func (e Endpoint) String() string { return e.Address.String() + "@" + strings.Join(e.Interfaces, "+") }

// ParseEndpoint reads eSHELF.SLOT@IF[+IF…].
func ParseEndpoint(s string) (e Endpoint, err error) {
	address, interfaces, ok := strings.Cut(s, "@")
	if !ok {
		return e, fmt.Errorf("parse AoE endpoint %q: name the interface, e1.0@eth1", s)
	}
	if e.Address, err = ParseAddress(address); err != nil {
		return Endpoint{}, err
	}
	e.Interfaces = strings.Split(interfaces, "+")
	if len(e.Interfaces) > MaxInterfaces {
		return Endpoint{}, fmt.Errorf("parse AoE endpoint %q: %d interfaces, at most %d", s, len(e.Interfaces), MaxInterfaces)
	}
	for i, name := range e.Interfaces {
		if err := checkInterface(name); err != nil {
			return Endpoint{}, fmt.Errorf("parse AoE endpoint %q: %w", s, err)
		}
		if slices.Contains(e.Interfaces[:i], name) {
			return Endpoint{}, fmt.Errorf("parse AoE endpoint %q: interface %s is there twice", s, name)
		}
	}
	return e, nil
}

// checkInterface holds the kernel's rule for names (dev_valid_name in net/core/dev.c).
func checkInterface(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("interface %q has no name", name)
	case len(name) > interfaceNameBytes:
		return fmt.Errorf("interface name %q is longer than %d bytes", name, interfaceNameBytes)
	case strings.ContainsAny(name, "/: \t\n\v\f\r"):
		return fmt.Errorf("interface name %q has a character that no interface has", name)
	}
	return nil
}
