package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/cmd/internal/host"
)

func newServe() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Serve the volumes of a file, or one volume described by flags",
		Args:  cobra.NoArgs,
	}
	source := config.Bind(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d, err := source.Load()
		if err != nil {
			return err
		}
		return serve(d, cmd.OutOrStdout(), cmd.ErrOrStderr())
	}
	return cmd
}

// serve runs the daemon until SIGTERM or SIGINT, and drains it.
func serve(c *config.Daemon, stdout, stderr io.Writer) error {
	log, closeLog := host.Log(stderr, c.LogFormat == config.LogJSON, logLevel(c.LogLevel))
	defer closeLog()
	tmpfs, err := c.CheckShm()
	if err != nil {
		return err
	}
	if !tmpfs {
		log.Warn("--shm is not on a tmpfs: the cache is only as fast as its file system", "path", c.Shm)
	}
	ctx, power, release := watchSignals(log)
	defer release()

	host.Umask()
	host.RaiseLimits()
	d := &daemon{config: c, log: log}
	if err := host.BecomeIOFlusher(); err != nil {
		log.Warn("not an I/O flusher: do not attach the volume on this host while memory is short", "err", err)
	} else {
		d.ioFlusher = true
	}
	if err := d.open(ctx); err != nil {
		d.abandon()
		if ctx.Err() != nil {
			log.Info("stopped before serving")
			return nil
		}
		return err
	}
	return d.run(ctx, power, stdout)
}

func logLevel(l config.LogLevel) slog.Level {
	switch l {
	case config.LogDebug:
		return slog.LevelDebug
	case config.LogWarn:
		return slog.LevelWarn
	case config.LogError:
		return slog.LevelError
	}
	return slog.LevelInfo
}

// watchSignals gives a context that ends with the first SIGTERM or SIGINT. The second ends the process at once:
// what is not home stays in the memory file, for the next start. SIGPWR puts a token into power, where it waits
// until the volumes are open. A reader of our output that goes away must not end the daemon, so SIGPIPE is ignored.
func watchSignals(log *slog.Logger) (ctx context.Context, power <-chan struct{}, release func()) {
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, unix.SIGPWR)
	ctx, cancel := context.WithCancel(context.Background())
	failing := make(chan struct{}, 1)
	go runSignals(ctx, signals, failing, cancel, log)
	return ctx, failing, func() {
		signal.Stop(signals)
		close(signals)
		cancel()
	}
}

func runSignals(ctx context.Context, signals <-chan os.Signal, power chan<- struct{}, stop func(), log *slog.Logger) {
	for s := range signals {
		switch {
		case s == unix.SIGPWR:
			log.Warn("the power fails: emergency", "signal", s.String())
			select {
			case power <- struct{}{}:
			default: // one is waiting already
			}
		case s == syscall.SIGHUP:
			log.Warn("SIGHUP: reload lands later; nothing was changed")
		case ctx.Err() == nil:
			log.Info("stopping", "signal", s.String())
			stop()
		default:
			// The log may be what is stuck.
			fmt.Fprintln(os.Stderr, "ramshelf: second signal: stopped without draining; start again with the same --shm")
			os.Exit(int(control.ExitFailed))
		}
	}
}
