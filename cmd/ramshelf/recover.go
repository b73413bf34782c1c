package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/cmd/internal/host"
	"github.com/ramshelf/ramshelf/cmd/internal/node"
)

func newRecover() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "recover --backing BACKING",
		Short: "Bring home what a journal holds of a volume that nobody serves, so that its backing can be used without ramshelf",
		Args:  cobra.NoArgs,
	}
	o := config.BindRecover(cmd.Flags())
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON (docs/OPERATIONS.md, \"Recover\")")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := o.Check(); err != nil {
			return err
		}
		return recoverVolume(cmd.Context(), o, asJSON, cmd.OutOrStdout(), cmd.ErrOrStderr())
	}
	return cmd
}

func recoverVolume(ctx context.Context, o *config.Offline, asJSON bool, stdout, stderr io.Writer) error {
	log, closeLog := host.Log(stderr, false, logLevel(config.LogInfo))
	defer closeLog()
	r, err := node.Recover(ctx, o, log)
	if r != nil {
		printRecovery(stdout, r, asJSON)
	}
	return err
}

// printRecovery tells what was found. Whoever does not read it has the exit code.
func printRecovery(out io.Writer, r *node.Recovery, asJSON bool) {
	if asJSON {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		_ = e.Encode(r)
		return
	}
	_, _ = io.WriteString(out, describeRecovery(r))
}

func describeRecovery(r *node.Recovery) string {
	var b strings.Builder
	fmt.Fprintf(&b, "volume %s size:%s journal:%s seal:%d\n", r.Volume, config.FormatBytes(r.SizeBytes), r.Journal, r.Seal)
	if r.Clean {
		b.WriteString("  it was stopped cleanly: nothing to do\n")
		return b.String()
	}
	if r.Runs > 0 {
		fmt.Fprintf(&b, "  runs:%d to write:%s to zero:%s\n", r.Runs, config.FormatBytes(r.WriteBytes), config.FormatBytes(r.ZeroBytes))
	}
	if r.Torn {
		b.WriteString("  the last run was never committed\n")
	}
	if r.Damage != "" {
		fmt.Fprintf(&b, "  damaged: %s\n", r.Damage)
	}
	if r.PendingZeroBytes > 0 {
		fmt.Fprintf(&b, "  left by a resize to zero:%s\n", config.FormatBytes(r.PendingZeroBytes))
	}
	if r.LostBlocks > 0 {
		fmt.Fprintf(&b, "  lost blocks:%d\n", r.LostBlocks)
		blocks := make([]control.Range, len(r.Lost))
		for i, block := range r.Lost {
			blocks[i] = control.Range{OffsetBytes: int64(block) * config.BlockBytes, LengthBytes: config.BlockBytes}
		}
		describeRanges(&b, blocks)
	}
	if r.SuspectBytes > 0 {
		fmt.Fprintf(&b, "  suspect:%s, which may hold a mixture of older and newer blocks\n", config.FormatBytes(r.SuspectBytes))
		describeRanges(&b, r.Suspect)
	}
	switch {
	case r.Recovered:
		b.WriteString("  recovered: the backing can be used without ramshelf\n")
	case r.DryRun:
		b.WriteString("  nothing was changed\n")
	}
	return b.String()
}

// fewRanges is how many ranges are told to a person.
const fewRanges = 16

func describeRanges(b *strings.Builder, list []control.Range) {
	for _, r := range list[:min(len(list), fewRanges)] {
		fmt.Fprintf(b, "    %s at %d\n", config.FormatBytes(r.LengthBytes), r.OffsetBytes)
	}
	if len(list) > fewRanges {
		b.WriteString("    and more, which --json lists\n")
	}
}
