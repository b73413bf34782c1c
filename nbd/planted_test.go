//go:build planted

package nbd_test

import "testing"

// TestPlanted shows that each checker catches the bug that it is there for.
func TestPlanted(t *testing.T) {
	tests := []struct {
		plant string
		check func(t *testing.T) error
	}{
		{"zombie-connection", func(t *testing.T) error { return checkFencing(t, true) }},
		{"zombie-connection", func(t *testing.T) error { return checkFencing(t, false) }},
		{"closed-connection", func(t *testing.T) error { return checkClosed(t, true, false) }},
		{"closed-connection", func(t *testing.T) error { return checkClosed(t, true, true) }},
		{"unbounded-inflight", checkQuota},
	}
	for _, tt := range tests {
		t.Run(tt.plant, func(t *testing.T) {
			t.Setenv("RAMSHELF_PLANT", tt.plant)
			err := tt.check(t)
			if err == nil {
				t.Fatal("not caught")
			}
			t.Log(err)
		})
	}
}
