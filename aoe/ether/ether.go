// Package ether carries AoE frames over an Ethernet interface: an AF_PACKET socket (packet(7)) with a filter in the
// kernel, that sends and receives many frames per system call.
//
// A frame may be lost at any place and nobody is told: a full socket, an interface that is down and a link that is cut all look
// the same, are counted, and end by themselves. Nothing of that is an error of a Wire.
package ether

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/aoe"
)

const (
	// batchFrames is how many frames a system call moves at most.
	batchFrames = 64
	// defaultBufferBytes is what the socket may hold in each direction. The kernel counts a frame of 9 KiB as 16 KiB, so this
	// is some 250 of them.
	defaultBufferBytes = 4 << 20
	// spareBytes is room behind the MTU in a receive buffer, so that a frame that is too long is seen to be.
	spareBytes = 64
)

// Options say what a Wire receives.
type Options struct {
	// Responses: only frames of targets are received, else only frames of initiators.
	Responses bool
	// BufferBytes is the size of the socket's buffers; 0 means 4 MiB. A process without CAP_NET_ADMIN gets no more than
	// the system's net.core.rmem_max and wmem_max.
	BufferBytes int
}

// Counters tell what became of frames since the Wire was opened.
type Counters struct {
	Received, Sent uint64
	// Overrun frames found the receive buffer of the socket full.
	Overrun uint64
	// Unsent frames found the socket full or the interface down.
	Unsent uint64
	// Truncated frames were longer than the MTU, and thrown away.
	Truncated uint64
	// Down is how often the interface was found to be down.
	Down uint64
}

// Wire is an open interface. Send and Counters are safe for concurrent use; Receive has one caller at a time.
type Wire struct {
	name string
	mac  aoe.MAC
	mtu  int

	file   *os.File
	conn   syscall.RawConn
	closed atomic.Bool

	received, sent, overrun, unsent, truncated, down atomic.Uint64

	in batch // of Receive

	mu  sync.Mutex // serializes Send
	out batch
}

// Open opens the interface of that name.
func Open(name string, o Options) (*Wire, error) {
	w, err := open(name, o)
	if err != nil {
		return nil, fmt.Errorf("open interface %s: %w", name, err)
	}
	return w, nil
}

func open(name string, o Options) (*Wire, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	w := &Wire{name: name, mtu: i.MTU}
	if len(i.HardwareAddr) != len(w.mac) {
		return nil, errors.New("it is not Ethernet")
	}
	copy(w.mac[:], i.HardwareAddr)
	// Protocol 0 receives nothing until bind names one, when the filter is there.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w (opening packet sockets needs CAP_NET_RAW)", err)
	}
	w.file = os.NewFile(uintptr(fd), "packet:"+name)
	if err := prepare(fd, i.Index, o); err != nil {
		return nil, errors.Join(err, w.file.Close())
	}
	if w.conn, err = w.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, w.file.Close())
	}
	w.in.init(2 * batchFrames)
	w.out.init(3 * batchFrames)
	room := aoe.EthernetBytes + i.MTU + spareBytes
	buffers := make([]byte, batchFrames*room)
	for k := range batchFrames {
		w.in.add(buffers[k*room:(k+1)*room], nil, nil)
	}
	return w, nil
}

// prepare sets buffers and filter, then binds.
func prepare(fd, index int, o Options) error {
	bytes := o.BufferBytes
	if bytes == 0 {
		bytes = defaultBufferBytes
	}
	for _, b := range []struct{ force, plain int }{{unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}, {unix.SO_SNDBUFFORCE, unix.SO_SNDBUF}} {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, b.force, bytes) == nil {
			continue
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, b.plain, bytes); err != nil {
			return fmt.Errorf("set buffers: %w", err)
		}
	}
	program := filter(o.Responses)
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}); err != nil {
		return fmt.Errorf("set filter: %w", err)
	}
	protocol := uint16(aoe.EtherType<<8&0xFF00 | aoe.EtherType>>8) // in network order
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: index}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	return nil
}

// Extensions of the filter machine (linux/filter.h).
const (
	ancillary  = 0xFFFFF000 // SKF_AD_OFF
	packetType = 4          // SKF_AD_PKTTYPE
)

// filter takes frames of AoE with a whole header, for this host or for all, and of one direction. Frames of a VLAN count as
// another host's on the interface below it (__netif_receive_skb_core in net/core/dev.c), what this host sends as outgoing.
func filter(responses bool) []unix.SockFilter {
	statement := func(code int, k uint32) unix.SockFilter { return unix.SockFilter{Code: uint16(code), K: k} }
	jump := func(code int, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: uint16(code), Jt: yes, Jf: no, K: k}
	}
	drop, take := uint8(1), uint8(0) // how far it is from the last test to either end
	if !responses {
		drop, take = take, drop
	}
	return []unix.SockFilter{
		statement(unix.BPF_LD|unix.BPF_W|unix.BPF_LEN, 0),
		jump(unix.BPF_JMP|unix.BPF_JGE|unix.BPF_K, aoe.HeaderBytes, 0, 7),
		statement(unix.BPF_LD|unix.BPF_B|unix.BPF_ABS, ancillary+packetType),
		jump(unix.BPF_JMP|unix.BPF_JGE|unix.BPF_K, unix.PACKET_OTHERHOST, 5, 0),
		statement(unix.BPF_LD|unix.BPF_H|unix.BPF_ABS, 12),
		jump(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, aoe.EtherType, 0, 3),
		statement(unix.BPF_LD|unix.BPF_B|unix.BPF_ABS, 14),
		jump(unix.BPF_JMP|unix.BPF_JSET|unix.BPF_K, uint32(aoe.FlagResponse), take, drop),
		statement(unix.BPF_RET|unix.BPF_K, 0x7FFFFFFF),
		statement(unix.BPF_RET|unix.BPF_K, 0),
	}
}

// Name is the name of the interface.
func (w *Wire) Name() string { return w.name }

// MAC is the address of the interface.
func (w *Wire) MAC() aoe.MAC { return w.mac }

// MTU is that of the interface, in bytes, when it was opened.
func (w *Wire) MTU() int { return w.mtu }

// Counters are the counters of now.
func (w *Wire) Counters() Counters {
	w.readStatistics()
	return Counters{
		Received: w.received.Load(), Sent: w.sent.Load(), Overrun: w.overrun.Load(),
		Unsent: w.unsent.Load(), Truncated: w.truncated.Load(), Down: w.down.Load(),
	}
}

// failed is the error of a call on the socket, with its verb.
func (w *Wire) failed(verb string, err error) error {
	switch {
	case err == nil:
		return nil
	case w.closed.Load():
		err = os.ErrClosed
	}
	return fmt.Errorf("%s on interface %s: %w", verb, w.name, err)
}

// readStatistics adds the kernel's count of drops, which reading sets to zero.
func (w *Wire) readStatistics() {
	_ = w.conn.Control(func(fd uintptr) {
		if s, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			w.overrun.Add(uint64(s.Drops))
		}
	})
}

// Close ends a Receive that waits. Frames that were sent may still be on their way. A second call does nothing.
func (w *Wire) Close() error {
	if w.closed.Swap(true) {
		return nil
	}
	if err := w.file.Close(); err != nil {
		return fmt.Errorf("close interface %s: %w", w.name, err)
	}
	return nil
}
