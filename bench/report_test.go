package bench_test

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ramshelf/ramshelf/bench"
)

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   bench.Spread
	}{
		{[]float64{3}, bench.Spread{Median: 3, Min: 3, Max: 3}},
		{[]float64{9, 1, 5}, bench.Spread{Median: 5, Min: 1, Max: 9}},
		{[]float64{4, 1, 2, 9}, bench.Spread{Median: 3, Min: 1, Max: 9}},
	} {
		if got := bench.SpreadOf(c.values); got != c.want {
			t.Errorf("spread of %v is %v, want %v", c.values, got, c.want)
		}
	}
	if s := bench.SpreadOf(nil); !math.IsNaN(s.Median) {
		t.Errorf("median of nothing is %v, want NaN", s.Median)
	}
	if got := (bench.Spread{Median: 100, Min: 90, Max: 120}).Noise(); got != 15 {
		t.Errorf("noise is %v %%, want 15", got)
	}
}

// A machine that runs at half speed in some rounds changes no ratio of pairs.
func TestRatioComparesPairs(t *testing.T) {
	a, b := []float64{200, 100, 20, 1}, []float64{100, 50, 10}
	if got := bench.RatioOf(a, b); got != (bench.Spread{Median: 2, Min: 2, Max: 2}) {
		t.Errorf("ratio is %v, want 2 throughout", got)
	}
	if got := bench.RatioOf(a, []float64{0, 50}); got.Median != 2 {
		t.Errorf("ratio with a failed round is %v, want that of the others", got)
	}
}

func TestTable(t *testing.T) {
	table := bench.Table{Header: []string{"server", "IOPS", "p99 µs"}}
	table.Row("nbdkit", "45.3k", "1.5")
	table.Row("ä", "9")
	for _, c := range []struct {
		name  string
		write func(*strings.Builder) error
		want  string
	}{
		{"text", func(b *strings.Builder) error { return table.Text(b) }, "" +
			"server   IOPS  p99 µs\n" +
			"------  -----  ------\n" +
			"nbdkit  45.3k     1.5\n" +
			"ä           9        \n"},
		{"markdown", func(b *strings.Builder) error { return table.Markdown(b) }, "" +
			"| server |  IOPS | p99 µs |\n" +
			"| ------ | ----: | -----: |\n" +
			"| nbdkit | 45.3k |    1.5 |\n" +
			"| ä      |     9 |        |\n"},
	} {
		var b strings.Builder
		if err := c.write(&b); err != nil {
			t.Fatal(err)
		}
		if b.String() != c.want {
			t.Errorf("%s:\n%swant:\n%s", c.name, b.String(), c.want)
		}
	}
}

func TestNumbers(t *testing.T) {
	for _, c := range []struct {
		got, want string
	}{
		{bench.Count(987.4), "987"}, {bench.Count(45_250), "45.2k"}, {bench.Count(999_900), "1.00M"},
		{bench.Count(1_274_000), "1.27M"}, {bench.Count(999.7), "1.0k"}, {bench.Count(math.NaN()), "-"},
		{bench.Number(0.987), "0.99"}, {bench.Number(9.996), "10.0"}, {bench.Number(123.4), "123"}, {bench.Number(math.NaN()), "-"},
	} {
		if c.got != c.want {
			t.Errorf("got %s, want %s", c.got, c.want)
		}
	}
}

const document = "# Title\n\n<!-- bench:other begin -->\nkept\n<!-- bench:other end -->\n\ntext\n\n" +
	"<!-- bench:compare begin -->\nold\n<!-- bench:compare end -->\n\nlast line without newline"

func TestReplaceSectionKeepsEverythingElse(t *testing.T) {
	got, err := bench.ReplaceSection([]byte(document), "compare", []byte("new\nlines\n\n"))
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Replace(document, "old\n", "new\nlines\n", 1); string(got) != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	again, err := bench.ReplaceSection(got, "compare", []byte("old"))
	if err != nil || string(again) != document {
		t.Errorf("replacing back gives %v\n%s", err, again)
	}
}

func TestReplaceSectionAppendsAMissingOne(t *testing.T) {
	got, err := bench.ReplaceSection([]byte("# T\n\n"), "flush", []byte("x"))
	if want := "# T\n\n<!-- bench:flush begin -->\nx\n<!-- bench:flush end -->\n"; err != nil || string(got) != want {
		t.Errorf("got %v\n%s", err, got)
	}
}

func TestReplaceSectionRefusesBrokenMarkers(t *testing.T) {
	begin, end := "<!-- bench:a begin -->\n", "<!-- bench:a end -->\n"
	for _, doc := range []string{begin, end, end + begin, begin + end + begin + end, begin + begin + end} {
		if got, err := bench.ReplaceSection([]byte(doc), "a", nil); err == nil {
			t.Errorf("%q became %q", doc, got)
		}
	}
}

func TestWriteSection(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report.md")
	for _, name := range []string{"a", "b", "a"} {
		if err := bench.WriteSection(path, name, []byte("of "+name)); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	want := "<!-- bench:a begin -->\nof a\n<!-- bench:a end -->\n\n<!-- bench:b begin -->\nof b\n<!-- bench:b end -->\n"
	if err != nil || string(got) != want {
		t.Errorf("got %v\n%s", err, got)
	}
	if err := bench.WriteSection(t.TempDir(), "a", nil); err == nil {
		t.Error("a directory was taken as report")
	}
}
