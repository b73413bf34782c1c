package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/cmd/internal/host"
	"github.com/ramshelf/ramshelf/cmd/internal/node"
	"github.com/ramshelf/ramshelf/nbd"
)

// Bounds of the stop.
const (
	shutdownTimeout  = 10 * time.Second // for requests in flight
	abandonTimeout   = 10 * time.Second // for emptying what was opened in vain
	progressInterval = time.Second
)

// controlMode is the mode of the control socket, and folderMode of the folder that is made for it.
const (
	controlMode = 0o660
	folderMode  = 0o750
)

// daemon is what one process serves. It is built by open and taken down by run or abandon, in reverse order.
type daemon struct {
	config    *config.Daemon
	log       *slog.Logger
	ioFlusher bool

	madeFolder string // that of the control socket, if this process made it
	control    net.Listener
	addresses  []*address
	volumes    []*volume
}

// address is one socket with the exports that it serves.
type address struct {
	key      string // config.Listen.Key
	listener net.Listener
	server   *nbd.Server
}

// volume is a volume that is open.
type volume struct {
	*node.Volume
	config  *config.Volume
	exports []string // as URIs
	served  []served

	mu   sync.RWMutex          // guards last, and that nobody asks Volume for its status once that is set
	last *control.VolumeStatus // what was known when the drain began
	left atomic.Int64          // bytes that the drain has still to bring home
}

// served is an export of a volume.
type served struct {
	server *nbd.Server
	name   string
}

// status is live until the drain begins, which ends with a volume that is no longer there to be asked.
func (v *volume) status() control.VolumeStatus {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.last == nil {
		s := v.Status()
		s.Exports = v.exports
		for _, x := range v.served {
			s.Clients += x.server.Clients(x.name)
		}
		return s
	}
	s, left := *v.last, v.left.Load()
	s.DrainRemainingBytes, s.DirtyBytes, s.UncommittedBytes = left, left, min(left, s.UncommittedBytes)
	return s
}

// beginDrain freezes the status of v.
func (v *volume) beginDrain() {
	s := v.status()
	v.left.Store(s.DirtyBytes)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.last = &s
}

// open binds every socket, then opens every volume: whatever is taken by somebody else is found before a volume
// is touched. After an error abandon takes down what was built.
func (d *daemon) open(ctx context.Context) error {
	inherited, err := host.Inherit()
	if err != nil {
		return err
	}
	defer inherited.Close()
	if err := d.bindControl(inherited); err != nil {
		return err
	}
	if err := d.bindAddresses(inherited); err != nil {
		return err
	}
	for _, c := range d.config.Volumes {
		v, err := node.Open(ctx, d.config, c, d.log.With("volume", c.Name))
		if err != nil {
			return fmt.Errorf("volume %q: %w", c.Name, err)
		}
		d.volumes = append(d.volumes, &volume{Volume: v, config: c})
	}
	for _, v := range d.volumes {
		if err := d.export(v); err != nil {
			return fmt.Errorf("volume %q: %w", v.config.Name, err)
		}
	}
	return nil
}

func (d *daemon) bindControl(inherited *host.Activated) error {
	if d.control = inherited.Control(); d.control != nil {
		return nil
	}
	folder := filepath.Dir(d.config.Control)
	if os.Mkdir(folder, folderMode) == nil {
		d.madeFolder = folder
		// Mkdir obeyed the umask; the group of the socket must come in.
		if err := os.Chmod(folder, folderMode); err != nil {
			return err
		}
	}
	var err error
	d.control, err = listen("unix", d.config.Control, controlMode, "--control SOCKET")
	return err
}

// bindAddresses makes an address of every socket that the volumes name. Sockets of systemd go to the addresses
// that they are bound to; those that fit none go to the remaining addresses in order.
func (d *daemon) bindAddresses(inherited *host.Activated) error {
	type wish struct {
		listen config.Listen
		mode   fs.FileMode
		to     *address
	}
	var wishes []wish
	for _, v := range d.config.Volumes {
		for _, l := range v.Listen {
			if d.address(l) != nil {
				continue
			}
			a := &address{key: l.Key(), listener: inherited.Take(l.Network, l.Address)}
			d.addresses = append(d.addresses, a)
			wishes = append(wishes, wish{l, fs.FileMode(v.SocketMode), a})
		}
	}
	for _, w := range wishes {
		if w.to.listener == nil {
			w.to.listener = inherited.Next()
		}
		if w.to.listener == nil {
			l, err := listen(w.listen.Network, w.listen.Address, w.mode, "--listen")
			if err != nil {
				return err
			}
			w.to.listener = l
		}
		w.to.server = nbd.NewServer(nbd.Options{Log: d.log})
	}
	if n := inherited.Left(); n > 0 {
		return control.Usage("give one --listen for each socket of the socket units",
			"systemd passed %d sockets that no listen address takes", n)
	}
	return nil
}

// listen binds a socket; one that somebody serves is refused.
func listen(network, address string, mode fs.FileMode, flag string) (net.Listener, error) {
	l, err := host.Listen(network, address, mode)
	switch {
	case errors.Is(err, host.ErrInUse):
		return nil, control.Refused(fmt.Errorf("listen on %s: %w", address, host.ErrInUse),
			"stop the daemon that serves there, or choose another "+flag)
	case err != nil:
		return nil, &control.Failure{Code: control.ExitFailed, Err: err, Hint: "choose another " + flag + ", or make its folder"}
	}
	return l, nil
}

// address is the one that serves l; nil while there is none.
func (d *daemon) address(l config.Listen) *address {
	for _, a := range d.addresses {
		if a.key == l.Key() {
			return a
		}
	}
	return nil
}

// export adds v to the servers of its addresses.
func (d *daemon) export(v *volume) error {
	for _, l := range v.config.Listen {
		server := d.address(l).server
		if err := server.AddExport(v.Export(l.Export)); err != nil {
			return err
		}
		v.served = append(v.served, served{server, l.Export})
		v.exports = append(v.exports, l.URI())
	}
	return nil
}

// abandon takes down what open built before it failed, so that nothing is left behind. A memory file that cannot
// be emptied soon was there before: it stays.
func (d *daemon) abandon() {
	ctx, cancel := context.WithTimeout(context.Background(), abandonTimeout)
	defer cancel()
	for _, v := range d.volumes {
		if err := v.Drain(ctx, func(int64) {}); err != nil {
			d.log.Warn("left the memory file as it is", "volume", v.config.Name, "err", err)
		}
		if err := v.Close(); err != nil {
			d.log.Error("close volume", "volume", v.config.Name, "err", err)
		}
	}
	for _, a := range d.addresses {
		if a.listener != nil {
			_ = a.listener.Close()
		}
	}
	if d.control != nil {
		_ = d.control.Close()
	}
	if d.madeFolder != "" {
		_ = os.Remove(d.madeFolder)
	}
}

// run serves until ctx ends or a socket fails, then stops cleanly. What comes from power turns the emergency on.
func (d *daemon) run(ctx context.Context, power <-chan struct{}, stdout io.Writer) error {
	failed := make(chan error, len(d.addresses)+1)
	asked := control.NewServer(d, d.log)
	go func() { failed <- asked.Serve(d.control) }()
	for _, a := range d.addresses {
		go func() { failed <- a.server.Serve(a.listener) }()
	}
	d.announce(stdout)
	serving, stopping := context.WithCancel(ctx)
	defer stopping()
	go d.obeyPower(serving, power)
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
		if err == nil {
			err = errors.New("a socket ended by itself")
		}
		d.log.Error("stopping", "err", err)
	}
	errs := []error{err, d.stop(), asked.Close()} // status tells how far the drain is
	for _, v := range d.volumes {
		errs = append(errs, v.Close())
	}
	return errors.Join(errs...)
}

// announce tells people, scripts and systemd that the daemon serves.
func (d *daemon) announce(stdout io.Writer) {
	var names []string
	for _, v := range d.volumes {
		names = append(names, v.config.Name)
		for _, uri := range v.exports {
			// Whoever does not read the lines has status.
			_, _ = fmt.Fprintln(stdout, "ready", v.config.Name, uri)
			d.log.Info("serving", "volume", v.config.Name, "export", uri)
		}
	}
	host.NotifyReady("serving " + strings.Join(names, " "))
}

// stop ends the requests in flight, closes all connections, and brings every volume home.
func (d *daemon) stop() error {
	host.NotifyStopping("stopping")
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, a := range d.addresses {
		wg.Go(func() {
			if err := a.server.Shutdown(ctx); err != nil {
				d.log.Warn("closed connections with requests in flight", "address", a.key, "err", err)
			}
		})
	}
	wg.Wait()
	return atOnce(d.volumes, d.drain)
}

// drain brings v home. It takes as long as the backing needs; a second signal ends it.
func (d *daemon) drain(v *volume) error {
	p := progress{volume: v, log: d.log, began: time.Now()}
	v.beginDrain()
	err := v.Drain(context.Background(), p.report)
	if err != nil {
		return &control.Failure{
			Code: control.ExitFailed,
			Err:  fmt.Errorf("drain volume %q: %w", v.config.Name, err),
			Hint: "what is not home is in the memory file: start again with the same --shm when the backing is well",
		}
	}
	v.left.Store(0)
	d.log.Info("drained", "volume", v.config.Name, "dur", time.Since(p.began).Round(time.Millisecond))
	return nil
}

// progress reports how far a drain is, once a second.
type progress struct {
	volume *volume
	log    *slog.Logger
	began  time.Time

	last     time.Time // of the last report
	lastLeft int64
}

// report is called by one goroutine at a time.
func (p *progress) report(left int64) {
	p.volume.left.Store(left)
	now := time.Now()
	passed := now.Sub(p.last)
	if p.last.IsZero() {
		p.last, p.lastLeft = now, left
		return
	}
	if passed < progressInterval {
		return
	}
	rate := int64(float64(p.lastLeft-left) / passed.Seconds())
	p.last, p.lastLeft = now, left
	p.log.Info("draining", "volume", p.volume.config.Name, "left", config.FormatBytes(left),
		"per_second", config.FormatBytes(rate))
	host.NotifyDraining(fmt.Sprintf("draining %s: %s left", p.volume.config.Name, config.FormatBytes(left)))
}

// Status is a snapshot of all volumes.
func (d *daemon) Status() control.Status {
	s := control.Status{
		Schema:    control.Schema,
		Version:   version,
		PID:       os.Getpid(),
		IOFlusher: d.ioFlusher,
		Volumes:   make([]control.VolumeStatus, len(d.volumes)),
	}
	for i, v := range d.volumes {
		s.Volumes[i] = v.status()
	}
	return s
}

// Flush brings all that was answered on a volume home.
func (d *daemon) Flush(ctx context.Context, name string) error {
	v, err := d.volume(name)
	if err != nil {
		return err
	}
	return v.Flush(ctx)
}

// Emergency turns the emergency of a volume on or off.
func (d *daemon) Emergency(ctx context.Context, name string, on bool) error {
	v, err := d.volume(name)
	if err != nil {
		return err
	}
	return v.Emergency(ctx, on)
}

// volume is the one of that name.
func (d *daemon) volume(name string) (*volume, error) {
	var names []string
	for _, v := range d.volumes {
		if v.config.Name == name {
			return v, nil
		}
		names = append(names, v.config.Name)
	}
	return nil, noVolume(name, names)
}

// obeyPower turns the emergency of all volumes on each time that power says so, until ctx ends.
func (d *daemon) obeyPower(ctx context.Context, power <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-power:
		}
		err := atOnce(d.volumes, func(v *volume) error {
			if err := v.Emergency(ctx, true); err != nil {
				return fmt.Errorf("volume %q: %w", v.config.Name, err)
			}
			return nil
		})
		if err != nil {
			d.log.Error("emergency: not everything is committed", "err", err)
		} else {
			d.log.Warn("emergency: all volumes are committed and answer as ack=disk")
		}
	}
}
