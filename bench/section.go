package bench

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// ReplaceSection puts body between the markers "<!-- bench:NAME begin -->" and "<!-- bench:NAME end -->" of
// doc and leaves every other byte as it is. Without the markers the section is appended. It refuses a doc
// that has one marker without the other, several of one, or both in the wrong order.
func ReplaceSection(doc []byte, name string, body []byte) ([]byte, error) {
	begin := fmt.Appendf(nil, "<!-- bench:%s begin -->\n", name)
	end := fmt.Appendf(nil, "<!-- bench:%s end -->\n", name)
	section := bytes.Join([][]byte{begin, bytes.TrimRight(body, "\n"), []byte("\n"), end}, nil)

	begins, ends := bytes.Count(doc, begin), bytes.Count(doc, end)
	from, to := bytes.Index(doc, begin), bytes.Index(doc, end)
	switch {
	case begins == 0 && ends == 0:
		return appendSection(doc, section), nil
	case begins != 1 || ends != 1 || to < from:
		return nil, fmt.Errorf("section %q has %d begin and %d end markers; want one of each, in order", name, begins, ends)
	}
	return bytes.Join([][]byte{doc[:from], section, doc[to+len(end):]}, nil), nil
}

func appendSection(doc, section []byte) []byte {
	doc = bytes.TrimRight(doc, "\n")
	if len(doc) == 0 {
		return section
	}
	return bytes.Join([][]byte{doc, []byte("\n\n"), section}, nil)
}

// WriteSection replaces the section name of the file at path, which is created when there is none. The file
// is replaced as a whole, so a reader never sees half of it.
func WriteSection(path, name string, body []byte) error {
	doc, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read report: %w", err)
	}
	doc, err = ReplaceSection(doc, name, body)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	temporary := path + ".new"
	if err := os.WriteFile(temporary, doc, 0o644); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	if err := os.Rename(temporary, path); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}
