package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

func newFlush() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "flush [VOLUME]",
		Short: "Return when all that was answered so far is committed and home",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return flush(cmd.Context(), control.NewClient(socket), args)
		},
	}
	addControl(cmd, &socket)
	return cmd
}

func flush(ctx context.Context, c *control.Client, args []string) error {
	name, err := chooseVolume(ctx, c, args)
	if err != nil {
		return err
	}
	return c.Flush(ctx, name)
}

// chooseVolume is the volume of args, or the only one that the daemon serves.
func chooseVolume(ctx context.Context, c *control.Client, args []string) (string, error) {
	if len(args) > 0 {
		return args[0], nil
	}
	s, err := c.Status(ctx)
	if err != nil {
		return "", err
	}
	if len(s.Volumes) == 1 {
		return s.Volumes[0].Name, nil
	}
	return "", control.Usage("name one of "+strings.Join(volumeNames(s.Volumes), " "),
		"the daemon serves %d volumes", len(s.Volumes))
}

func volumeNames(volumes []control.VolumeStatus) []string {
	names := make([]string, len(volumes))
	for i, v := range volumes {
		names[i] = v.Name
	}
	return names
}
