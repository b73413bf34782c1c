package host

import (
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/coreos/go-systemd/v22/activation"
)

// controlName is the FileDescriptorName= of the socket unit that holds the control socket.
const controlName = "control"

// Activated are the sockets that systemd passed (LISTEN_FDS), until they are taken.
type Activated struct {
	control net.Listener
	others  []net.Listener
}

// Inherit takes over the sockets that systemd passed to this process; without any the result is empty.
func Inherit() (*Activated, error) {
	a := &Activated{}
	for _, f := range activation.Files(true) {
		l, err := net.FileListener(f)
		_ = f.Close() // FileListener has a duplicate
		if err != nil {
			a.Close()
			return nil, fmt.Errorf("take over socket %s of LISTEN_FDS: %w", f.Name(), err)
		}
		if f.Name() == controlName {
			a.control = l
		} else {
			a.others = append(a.others, l)
		}
	}
	return a, nil
}

// Control takes the socket named "control"; nil without one.
func (a *Activated) Control() net.Listener {
	l := a.control
	a.control = nil
	return l
}

// Take takes the socket that is bound to an address; nil without one.
func (a *Activated) Take(network, address string) net.Listener {
	for i, l := range a.others {
		if bound(l.Addr(), network, address) {
			return a.remove(i)
		}
	}
	return nil
}

// Next takes the first socket that is left; nil without one.
func (a *Activated) Next() net.Listener {
	if len(a.others) == 0 {
		return nil
	}
	return a.remove(0)
}

// Left is how many sockets nobody took.
func (a *Activated) Left() int {
	n := len(a.others)
	if a.control != nil {
		n++
	}
	return n
}

// Close closes what nobody took.
func (a *Activated) Close() {
	for _, l := range a.others {
		_ = l.Close()
	}
	if a.control != nil {
		_ = a.control.Close()
	}
	*a = Activated{}
}

func (a *Activated) remove(i int) net.Listener {
	l := a.others[i]
	a.others = append(a.others[:i], a.others[i+1:]...)
	return l
}

// bound reports whether a socket is the one that an address names.
func bound(addr net.Addr, network, address string) bool {
	switch a := addr.(type) {
	case *net.UnixAddr:
		return network == "unix" && samePath(a.Name, address)
	case *net.TCPAddr:
		want, err := net.ResolveTCPAddr("tcp", address)
		return network == "tcp" && err == nil && want.Port == a.Port && want.IP.Equal(a.IP)
	}
	return false
}

func samePath(a, b string) bool {
	if filepath.Clean(a) == filepath.Clean(b) {
		return true
	}
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}
