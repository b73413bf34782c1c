package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/host"
	"github.com/ramshelf/ramshelf/cmd/internal/node"
)

func newResize() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "resize --backing BACKING --size SIZE",
		Short: "Make a volume larger that nobody serves",
		Args:  cobra.NoArgs,
	}
	o := config.BindResize(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := o.Check(); err != nil {
			return err
		}
		return resize(cmd.Context(), o, cmd.OutOrStdout(), cmd.ErrOrStderr())
	}
	return cmd
}

func resize(ctx context.Context, o *config.Offline, stdout, stderr io.Writer) error {
	log, closeLog := host.Log(stderr, false, logLevel(config.LogInfo))
	defer closeLog()
	r, err := node.Resize(ctx, o, log)
	if r != nil && r.Recovery != nil {
		printRecovery(stdout, r.Recovery, false)
	}
	if err != nil {
		return err
	}
	if r.Moved {
		fmt.Fprintf(stdout, "volume %s had %s and has %s, on a backing of %s\n", r.Volume, config.FormatBytes(r.OldBytes),
			config.FormatBytes(r.SizeBytes), config.FormatBytes(r.BackingBytes))
	} else {
		fmt.Fprintf(stdout, "volume %s has %s: nothing to do\n", r.Volume, config.FormatBytes(r.OldBytes))
	}
	return nil
}
