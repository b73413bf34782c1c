package main

import (
	"slices"

	"github.com/spf13/cobra"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

// laterVerbs are the verbs whose names are fixed and whose functions land later: each says so and exits 1.
func laterVerbs() []*cobra.Command {
	verbs := []struct{ use, short string }{
		{"promote [VOLUME] [--force]", "Make this node the primary"},
		{"demote [VOLUME]", "Make this node the secondary"},
		{"verify [VOLUME]", "Compare the copies of both nodes"},
		{"resolve [VOLUME] --discard-mine [--dry-run]", "End a split brain"},
		{"attach NBD-URI[,NBD-URI…] /dev/nbdN", "Make a kernel device of an export"},
		{"detach /dev/nbdN", "Remove a kernel device"},
		{"aoe discover [IF…]", "List the AoE targets of a network"},
		{"bench URI | --compare …", "Measure a server"},
		{"check [VOLUME]", "Alarm in the manner of Nagios"},
		{"events [VOLUME]", "Follow what happens"},
		{"top", "Show who does what"},
	}
	commands := make([]*cobra.Command, len(verbs))
	for i, v := range verbs {
		commands[i] = &cobra.Command{
			Use:                v.use,
			Short:              v.short + " (lands later)",
			DisableFlagParsing: true,
			RunE: func(cmd *cobra.Command, args []string) error {
				if slices.Contains(args, "--help") || slices.Contains(args, "-h") {
					return cmd.Help()
				}
				return control.Later(cmd.Name())
			},
		}
	}
	return commands
}
