package main

import (
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
	"github.com/ramshelf/ramshelf/cmd/internal/node"
)

// operations is docs/OPERATIONS.md.
func operations(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// section is the part of the text below a heading.
func section(t *testing.T, text, heading string) string {
	t.Helper()
	_, rest, found := strings.Cut(text, "\n## "+heading+"\n")
	if !found {
		t.Fatalf("docs/OPERATIONS.md has no section %q", heading)
	}
	rest, _, _ = strings.Cut(rest, "\n## ")
	return rest
}

// same reports what one sorted list has and the other has not.
func same(t *testing.T, what string, documented, existing []string) {
	t.Helper()
	for _, name := range documented {
		if !slices.Contains(existing, name) {
			t.Errorf("%s %s is documented and does not exist", what, name)
		}
	}
	for _, name := range existing {
		if !slices.Contains(documented, name) {
			t.Errorf("%s %s exists and is not documented", what, name)
		}
	}
}

func TestFlagsAreDocumented(t *testing.T) {
	row := regexp.MustCompile("(?m)^\\| `--([a-z-]+)[^|]*\\| (?:`([a-z_]+)`)?")
	var documented, existing []string
	for _, m := range row.FindAllStringSubmatch(section(t, operations(t), "Settings"), -1) {
		documented = append(documented, m[1])
		if want := strings.ReplaceAll(m[1], "-", "_"); m[2] != want && m[1] != "config" {
			t.Errorf("--%s has the key %q in the table, want %q", m[1], m[2], want)
		}
	}
	newServe().Flags().VisitAll(func(f *pflag.Flag) { existing = append(existing, f.Name) })
	same(t, "flag", documented, existing)
}

// The verbs that work on a backing have their flags, and the fields of their JSON, in a section of their own.
func TestOfflineVerbsAreDocumented(t *testing.T) {
	for heading, c := range map[string]struct {
		verb *cobra.Command
		json reflect.Type
	}{
		"Recover": {newRecover(), reflect.TypeFor[node.Recovery]()},
		"Resize":  {newResize(), reflect.TypeFor[struct{}]()},
	} {
		text := section(t, operations(t), heading)
		var flags, existing, names []string
		for _, m := range regexp.MustCompile("(?m)^\\| `--([a-z-]+)").FindAllStringSubmatch(text, -1) {
			flags = append(flags, m[1])
		}
		c.verb.Flags().VisitAll(func(f *pflag.Flag) { existing = append(existing, f.Name) })
		same(t, heading+": flag", flags, existing)
		_, table, _ := strings.Cut(text, "| field | meaning |")
		for line := range strings.Lines(table) {
			if cells := strings.Split(line, "|"); len(cells) > 2 {
				for _, m := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(cells[1], -1) {
					names = append(names, m[1])
				}
			}
		}
		same(t, heading+": field", names, fields(c.json, ""))
	}
}

func TestVerbsAreDocumented(t *testing.T) {
	var documented, existing []string
	span := regexp.MustCompile("`([a-z]+)[^`]*`")
	for line := range strings.Lines(section(t, operations(t), "Verbs")) {
		if cell, found := strings.CutPrefix(line, "| `"); found {
			cell, _, _ = strings.Cut(cell, " | ")
			for _, m := range span.FindAllStringSubmatch("`"+cell, -1) {
				documented = append(documented, m[1])
			}
		}
	}
	for _, c := range newRoot().Commands() {
		existing = append(existing, c.Name())
	}
	same(t, "verb", documented, existing)
}

func TestStatusFieldsAreDocumented(t *testing.T) {
	text := section(t, operations(t), "Status")
	_, table, _ := strings.Cut(text, "| field | meaning |")
	var documented []string
	name := regexp.MustCompile("`([a-z_.]+)`")
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 3 {
			continue
		}
		for _, m := range name.FindAllStringSubmatch(cells[1], -1) {
			documented = append(documented, m[1])
		}
		if strings.Contains(cells[1], "`peer`") {
			documented = append(documented, "peer.state", "peer.out_of_sync_bytes")
		}
	}
	existing := append(fields(reflect.TypeFor[control.VolumeStatus](), ""), "peer")
	same(t, "field", documented, existing)
	for _, top := range fields(reflect.TypeFor[control.Status](), "") {
		if first, _, _ := strings.Cut(top, "."); !strings.Contains(text, "`"+first+"`") {
			t.Errorf("field %s exists and is not documented", first)
		}
	}
}

// fields are the names of the leaves of a JSON type, nested at dots.
func fields(t reflect.Type, prefix string) []string {
	var names []string
	for i := range t.NumField() {
		f := t.Field(i)
		name := prefix + f.Tag.Get("json")
		switch kind := f.Type; {
		case kind.Kind() == reflect.Struct:
			names = append(names, fields(kind, name+".")...)
		case kind.Kind() == reflect.Pointer:
			names = append(names, fields(kind.Elem(), name+".")...)
		default:
			names = append(names, name)
		}
	}
	return names
}

func TestExitCodesAreDocumented(t *testing.T) {
	var documented []string
	for _, m := range regexp.MustCompile(`(?m)^\| (\d+) \|`).FindAllStringSubmatch(section(t, operations(t), "Exit codes"), -1) {
		documented = append(documented, m[1])
	}
	same(t, "exit code", documented, []string{"0", "1", "3", "4", "5", "64"})
}
