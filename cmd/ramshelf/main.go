// Ramshelf is a block device whose working set lives in RAM and whose data survives: the daemon and its client in
// one binary.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ramshelf/ramshelf/cmd/internal/config"
	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

func main() {
	os.Exit(int(execute(os.Args[1:], os.Stdout, os.Stderr)))
}

// execute runs one command line and gives the exit code. An error is one line, and where a next step is known a
// second one with the hint.
func execute(args []string, stdout, stderr io.Writer) control.ExitCode {
	running := false
	root := newRoot()
	root.PersistentPreRun = func(*cobra.Command, []string) { running = true }
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.Execute()
	if err == nil {
		return control.ExitDone
	}
	code, hint := control.ExitFailed, ""
	if !running {
		code, hint = control.ExitUsage, "ramshelf --help tells the verbs, ramshelf VERB --help the flags"
	}
	var f *control.Failure
	if errors.As(err, &f) {
		code, hint = f.Code, f.Hint
	}
	fmt.Fprintln(stderr, "ramshelf:", oneLine(err.Error()))
	if hint != "" {
		fmt.Fprintln(stderr, "hint:", oneLine(hint))
	}
	return code
}

// oneLine joins the lines of s.
func oneLine(s string) string {
	return strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ")
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:                "ramshelf",
		Short:              "A block device whose working set lives in RAM and whose data survives",
		SilenceUsage:       true,
		SilenceErrors:      true,
		DisableSuggestions: true,
	}
	root.AddCommand(newServe(), newStatus(), newFlush(), newEmergency(), newRecover(), newResize(), newVersion())
	root.AddCommand(laterVerbs()...)
	return root
}

// addControl adds the flag that all client verbs have.
func addControl(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVar(path, "control", config.DefaultControl, "`SOCKET` of the daemon")
}
