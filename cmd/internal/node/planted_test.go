//go:build planted

package node

import (
	"bytes"
	"os"
	"os/exec"
	"testing"
)

// TestPlantedVolumeBugs: the power cuts of whole volumes catch the planted bugs of the journal in every part of it.
func TestPlantedVolumeBugs(t *testing.T) {
	for bug, check := range map[string]string{
		"commit-skips":                "TestVolumePowerCuts",
		"ack-before-commit":           "TestVolumePowerCuts",
		"unsafe-read":                 "TestVolumePowerCuts",
		"commit-without-sync":         "TestVolumePowerCuts",
		"tail-early":                  "TestVolumePowerCuts",
		"commit-marks-clean-on-error": "TestVolumePowerCuts",
		"recovery-stops-early":        "TestVolumePowerCuts",
		"torn-run-replayed":           "TestVolumePowerCuts",
		"lost-not-recorded":           "TestVolumeBitFlips",
	} {
		t.Run(bug, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], "-test.run", "^"+check+"$", "-test.count=1", "-test.failfast", "-test.timeout=4m")
			cmd.Env = append(os.Environ(), "RAMSHELF_PLANT="+bug, "SIM_SEEDS=10")
			out, err := cmd.CombinedOutput()
			if err == nil {
				t.Fatalf("%s did not notice the bug", check)
			}
			if !bytes.Contains(out, []byte("--- FAIL: "+check)) {
				t.Fatalf("%s did not run to its end:\n%s", check, out)
			}
			t.Logf("%s", out[:min(len(out), 600)])
		})
	}
}
