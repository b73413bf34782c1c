package nbd

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// limitLog returns a logger that writes to l at a bounded rate, so that clients cannot fill a disk or slow the
// server by what they make it log. What is left out is counted in the next line.
func limitLog(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(&limitedHandler{l.Handler(), &logBucket{tokens: logBurst, filled: time.Now()}})
}

type limitedHandler struct {
	slog.Handler
	bucket *logBucket
}

// logBucket is a token bucket.
type logBucket struct {
	mu      sync.Mutex
	tokens  float64
	filled  time.Time
	dropped int
}

// take reports whether a line may be written at now, and how many were left out since the last one.
func (b *logBucket) take(now time.Time) (bool, int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tokens = min(logBurst, b.tokens+now.Sub(b.filled).Seconds()*logPerSecond)
	b.filled = now
	if b.tokens < 1 {
		b.dropped++
		return false, 0
	}
	b.tokens--
	n := b.dropped
	b.dropped = 0
	return true, n
}

// Handle writes r, unless too much was written lately.
func (h *limitedHandler) Handle(ctx context.Context, r slog.Record) error {
	ok, dropped := h.bucket.take(time.Now())
	if !ok {
		return nil
	}
	if dropped > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("left_out", dropped))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs shares the bucket.
func (h *limitedHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &limitedHandler{h.Handler.WithAttrs(attrs), h.bucket}
}

// WithGroup shares the bucket.
func (h *limitedHandler) WithGroup(name string) slog.Handler {
	return &limitedHandler{h.Handler.WithGroup(name), h.bucket}
}
