package main

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/spf13/cobra"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

func newEmergency() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "emergency on|off [VOLUME]",
		Short: "Commit now and answer as ack=disk, of all volumes where none is named; go back",
		Args:  cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			on := args[0] == "on"
			if !on && args[0] != "off" {
				return control.Usage("say ramshelf emergency on, or ramshelf emergency off", "emergency %q is neither on nor off", args[0])
			}
			return emergency(cmd.Context(), control.NewClient(socket), on, args[1:])
		},
	}
	addControl(cmd, &socket)
	return cmd
}

// emergency turns it on or off for the volume of names, or for all that the daemon serves: at once, since each may take as long
// as its backing.
func emergency(ctx context.Context, c *control.Client, on bool, names []string) error {
	if len(names) == 0 {
		s, err := c.Status(ctx)
		if err != nil {
			return err
		}
		names = volumeNames(s.Volumes)
	}
	return atOnce(names, func(name string) error {
		if err := c.Emergency(ctx, name, on); err != nil {
			return fmt.Errorf("volume %q: %w", name, err)
		}
		return nil
	})
}

// atOnce does something with all of list at the same time and joins the errors.
func atOnce[T any](list []T, do func(of T) error) error {
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for i, of := range list {
		wg.Go(func() { errs[i] = do(of) })
	}
	wg.Wait()
	return errors.Join(errs...)
}
