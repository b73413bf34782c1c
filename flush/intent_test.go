package flush

import (
	"os"
	"strings"
	"testing"
)

// unplanned is a source that cannot tell what a sweep will write.
type unplanned struct{ Source }

// marks is an intent that keeps nothing.
type marks struct{}

func (marks) Mark(_, _ int64, _ uint64)            {}
func (marks) Store(_ uint64, _ func() error) error { return nil }

func TestIntentNeedsPlan(t *testing.T) {
	f, err := os.Create(t.TempDir() + "/home")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := New(unplanned{}, f, Options{Intent: marks{}}); err == nil || !strings.Contains(err.Error(), "what a sweep will write") {
		t.Errorf("New: %v", err)
	}
}
