package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

// watchInterval is the pause between two looks of status --watch.
const watchInterval = time.Second

// statusOptions say what status prints.
type statusOptions struct {
	control string
	json    bool
	watch   bool
}

func newStatus() *cobra.Command {
	var o statusOptions
	cmd := &cobra.Command{
		Use:   "status [VOLUME]",
		Short: "Show the volumes and what would be lost right now",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return status(cmd.Context(), cmd.OutOrStdout(), o, args)
		},
	}
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON (docs/OPERATIONS.md, \"Status\")")
	cmd.Flags().BoolVar(&o.watch, "watch", false, "print it again every second")
	addControl(cmd, &o.control)
	return cmd
}

func status(ctx context.Context, out io.Writer, o statusOptions, args []string) error {
	client := control.NewClient(o.control)
	for {
		s, err := client.Status(ctx)
		if err != nil {
			return err
		}
		if len(args) > 0 {
			if err := selectVolume(s, args[0]); err != nil {
				return err
			}
		}
		if o.watch {
			clearScreen(out)
		}
		if err := printStatus(out, s, o.json); err != nil || !o.watch {
			return err
		}
		time.Sleep(watchInterval)
	}
}

// selectVolume leaves only the volume of that name in s.
func selectVolume(s *control.Status, name string) error {
	for _, v := range s.Volumes {
		if v.Name == name {
			s.Volumes = []control.VolumeStatus{v}
			return nil
		}
	}
	return noVolume(name, volumeNames(s.Volumes))
}

func noVolume(name string, names []string) error {
	return &control.Failure{
		Code: control.ExitNoVolume,
		Err:  fmt.Errorf("volume %q: the daemon serves no such volume", name),
		Hint: "it serves " + strings.Join(names, " "),
	}
}

func printStatus(out io.Writer, s *control.Status, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(s)
	}
	var b strings.Builder
	for i := range s.Volumes {
		describe(&b, &s.Volumes[i])
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// describe prints a volume in DRBD's words.
func describe(b *strings.Builder, v *control.VolumeStatus) {
	fmt.Fprintf(b, "%s role:%s state:%s ack:%s", v.Name, title(string(v.Role)), v.State, v.Ack)
	if v.AckInForce != v.Ack {
		fmt.Fprintf(b, " (in force: %s)", v.AckInForce)
	}
	if v.Emergency {
		b.WriteString(" emergency:on")
	}
	fmt.Fprintf(b, " clients:%d\n", v.Clients)
	fmt.Fprintf(b, "  disk:%s size:%s dirty:%s uncommitted:%s (oldest %.1fs) epoch:%d committed:%d\n",
		diskWord(v), config.FormatBytes(v.SizeBytes), config.FormatBytes(v.DirtyBytes),
		config.FormatBytes(v.UncommittedBytes), v.UncommittedAgeSeconds, v.Epoch.Open, v.Epoch.Committed)
	fmt.Fprintf(b, "  memory:%s resident:%s free:%s journal:%s\n", config.FormatBytes(v.MemoryBytes),
		config.FormatBytes(v.ResidentBytes), config.FormatBytes(v.FreeBytes), v.Journal.Kind)
	fmt.Fprintf(b, "  backing:%s state:%s written:%s", v.Backing.Address, v.Backing.State,
		config.FormatBytes(v.Backing.WrittenBytes))
	if v.Backing.Error != "" {
		fmt.Fprintf(b, " error:%q", v.Backing.Error)
	}
	b.WriteByte('\n')
	for _, left := range []struct {
		what  string
		bytes int64
	}{{"filling", v.FillRemainingBytes}, {"draining", v.DrainRemainingBytes}} {
		if left.bytes > 0 {
			fmt.Fprintf(b, "  %s: %s left\n", left.what, config.FormatBytes(left.bytes))
		}
	}
	if v.LostBlocks > 0 {
		fmt.Fprintf(b, "  lost blocks:%d\n", v.LostBlocks)
	}
	if v.Peer != nil {
		fmt.Fprintf(b, "  peer link:%s out-of-sync:%s\n", v.Peer.State, config.FormatBytes(v.Peer.OutOfSyncBytes))
	}
	for _, uri := range v.Exports {
		fmt.Fprintf(b, "  export:%s\n", uri)
	}
}

func title(s string) string {
	if s == "" {
		return "Unknown"
	}
	return strings.ToUpper(s[:1]) + s[1:]
}

// diskWord is the state of the content at home.
func diskWord(v *control.VolumeStatus) string {
	switch {
	case v.Backing.State == control.BackingFailed:
		return "Failed"
	case v.State == control.StateRecovering:
		return "Consistent"
	}
	return "UpToDate"
}

// clearScreen begins a page anew on a terminal.
func clearScreen(out io.Writer) {
	f, ok := out.(*os.File)
	if !ok {
		return
	}
	if _, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
		_, _ = io.WriteString(out, "\x1b[H\x1b[2J")
	}
}
