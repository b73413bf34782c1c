package bench

import (
	"fmt"
	"io"
	"math"
	"strings"
	"unicode/utf8"
)

// Table is a table of text whose first column is aligned left and all others right.
type Table struct {
	Header []string
	rows   [][]string
}

// Row appends a row. Missing cells are empty, surplus ones a programmer's error.
func (t *Table) Row(cells ...string) {
	if len(cells) > len(t.Header) {
		panic(fmt.Sprintf("table row has %d cells, header %d", len(cells), len(t.Header)))
	}
	row := make([]string, len(t.Header))
	copy(row, cells)
	t.rows = append(t.rows, row)
}

// Text writes the table in aligned columns for a terminal.
func (t *Table) Text(w io.Writer) error { return t.write(w, "", "  ", "") }

// Markdown writes the table as a pipe table whose source is aligned too.
func (t *Table) Markdown(w io.Writer) error { return t.write(w, "| ", " | ", " |") }

func (t *Table) write(w io.Writer, left, between, right string) error {
	widths := t.widths()
	var b strings.Builder
	line := func(cells []string) {
		b.WriteString(left)
		for i, cell := range cells {
			if i > 0 {
				b.WriteString(between)
			}
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if i == 0 {
				b.WriteString(cell + pad)
			} else {
				b.WriteString(pad + cell)
			}
		}
		b.WriteString(right + "\n")
	}
	line(t.Header)
	line(rule(widths, right != ""))
	for _, row := range t.rows {
		line(row)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (t *Table) widths() []int {
	widths := make([]int, len(t.Header))
	for _, row := range append([][]string{t.Header}, t.rows...) {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell), 3)
		}
	}
	return widths
}

// rule is the line below the header; the colons of markdown align columns right.
func rule(widths []int, markdown bool) []string {
	cells := make([]string, len(widths))
	for i, n := range widths {
		cells[i] = strings.Repeat("-", n)
		if markdown && i > 0 {
			cells[i] = strings.Repeat("-", n-1) + ":"
		}
	}
	return cells
}

// Count prints a number of requests per second as fio does: 987, 45.3k, 1.27M. NaN is "-".
func Count(v float64) string {
	switch {
	case math.IsNaN(v):
		return "-"
	case v >= 999_500:
		return fmt.Sprintf("%.2fM", v/1e6)
	case v >= 999.5:
		return fmt.Sprintf("%.1fk", v/1e3)
	}
	return fmt.Sprintf("%.0f", v)
}

// Number prints v with about three digits. NaN is "-".
func Number(v float64) string {
	switch {
	case math.IsNaN(v):
		return "-"
	case v >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case v >= 9.995:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
