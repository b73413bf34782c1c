package host

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of the log: lines that wait for a slow reader, and how long the end of the process waits for them.
const (
	logQueueLines = 1024
	logCloseWait  = 2 * time.Second
)

// Log makes the logger of a daemon. A reader of w that is slow or stuck costs lines, never the daemon; how many
// were dropped is logged when it reads again. Under journald lines have its priority prefix and no time. Close
// writes out what waits.
func Log(w io.Writer, json bool, level slog.Level) (log *slog.Logger, closeLog func()) {
	q := newLineQueue(w)
	options := &slog.HandlerOptions{Level: level}
	switch {
	case json:
		return slog.New(slog.NewJSONHandler(q, options)), q.close
	case underJournal():
		options.ReplaceAttr = dropTime
		return slog.New(slog.NewTextHandler(priorityWriter{q}, options)), q.close
	}
	return slog.New(slog.NewTextHandler(q, options)), q.close
}

// underJournal reports whether stderr is the stream that systemd connected to its journal (systemd.exec(5),
// $JOURNAL_STREAM).
func underJournal() bool {
	var st unix.Stat_t
	if unix.Fstat(unix.Stderr, &st) != nil {
		return false
	}
	return os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

func dropTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

// priorityWriter turns the level that begins a line into the priority that journald reads (sd-daemon(3)).
type priorityWriter struct{ w io.Writer }

var priorities = map[string]string{"DEBUG": "<7>", "INFO": "<6>", "WARN": "<4>", "ERROR": "<3>"}

func (p priorityWriter) Write(line []byte) (int, error) {
	level, rest, _ := bytes.Cut(bytes.TrimPrefix(line, []byte("level=")), []byte(" "))
	if prefix, known := priorities[string(level)]; known {
		_, err := p.w.Write(append([]byte(prefix), rest...))
		return len(line), err
	}
	return p.w.Write(line)
}

// lineQueue writes lines to a writer that may block, and drops them while it does.
type lineQueue struct {
	lines   chan []byte
	done    chan struct{} // closed when the last line is written
	dropped atomic.Uint64
}

func newLineQueue(w io.Writer) *lineQueue {
	q := &lineQueue{lines: make(chan []byte, logQueueLines), done: make(chan struct{})}
	go q.run(w)
	return q
}

// Write takes one line. It never waits.
func (q *lineQueue) Write(p []byte) (int, error) {
	select {
	case q.lines <- append([]byte(nil), p...):
	default:
		q.dropped.Add(1)
	}
	return len(p), nil
}

func (q *lineQueue) run(w io.Writer) {
	defer close(q.done)
	for line := range q.lines {
		if line == nil {
			return
		}
		// Where the log itself cannot be written there is nobody to tell.
		_, _ = w.Write(line)
		if n := q.dropped.Swap(0); n > 0 {
			_, _ = fmt.Fprintf(w, "level=WARN msg=\"dropped log lines\" lines=%d\n", n)
		}
	}
}

// close ends the queue after what waits in it, for a bounded time. Lines written later are lost.
func (q *lineQueue) close() {
	deadline := time.After(logCloseWait)
	select {
	case q.lines <- nil:
	case <-deadline:
		return
	}
	select {
	case <-q.done:
	case <-deadline:
	}
}
