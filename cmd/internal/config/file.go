package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"sort"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/ramshelf/ramshelf/cmd/internal/control"
)

// maxFileBytes bounds a configuration file.
const maxFileBytes = 1 << 20

// file is a configuration file: the daemon's keys and either [[volume]] tables or, for a single volume, its keys
// beside the daemon's.
type file struct {
	Daemon
	Volume
}

// readFile reads a configuration file strictly: an unknown key is an error that shows its line.
func readFile(path string) (*Daemon, error) {
	text, err := readBounded(path)
	if err != nil {
		return nil, &control.Failure{Code: control.ExitFailed, Err: fmt.Errorf("read configuration: %w", err)}
	}
	var f file
	decoder := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := decoder.Decode(&f); err != nil {
		return nil, decodeFailure(path, text, err)
	}
	single := !reflect.ValueOf(f.Volume).IsZero()
	if single && len(f.Volumes) > 0 {
		return nil, control.Usage("move them below one of the [[volume]] lines",
			"%s: keys of a volume stand before the first [[volume]]", path)
	}
	if single {
		f.Volumes = []*Volume{&f.Volume}
	}
	return &f.Daemon, nil
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err == nil && len(text) > maxFileBytes {
		err = fmt.Errorf("%s is larger than %s", path, FormatBytes(maxFileBytes))
	}
	return text, err
}

// decodeFailure tells where in the file the error is, and shows the line.
func decodeFailure(path string, text []byte, err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		e := strict.Errors[0]
		row, _ := e.Position()
		return control.Usage("the keys are "+strings.Join(keys(), " "), "%s:%d: unknown key %q in: %s",
			path, row, strings.Join(e.Key(), "."), line(text, row))
	}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		row, _ := decode.Position()
		return control.Usage("", "%s:%d: %s in: %s", path, row, strings.TrimPrefix(decode.Error(), "toml: "), line(text, row))
	}
	return control.Usage("", "%s: %w", path, err)
}

// line is line number row of text, counted from 1.
func line(text []byte, row int) string {
	lines := strings.Split(string(text), "\n")
	if row < 1 || row > len(lines) {
		return ""
	}
	return strings.TrimSpace(lines[row-1])
}

// keys are all keys of a configuration file, sorted.
func keys() []string {
	var names []string
	for _, t := range []reflect.Type{reflect.TypeFor[Daemon](), reflect.TypeFor[Volume]()} {
		for i := range t.NumField() {
			names = append(names, t.Field(i).Tag.Get("toml"))
		}
	}
	sort.Strings(names)
	return names
}
