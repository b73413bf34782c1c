package nbd

import (
	"sync/atomic"
	"time"
)

// watch is what the server's watcher needs to know of a connection to cut a client that stalls. Times are in ticks
// of the server, see Server.now; 0 means that nothing is going on. The goroutines of the connection only store, so
// watching costs a request next to nothing.
type watch struct {
	reading atomic.Int64 // the reader waits for the rest of a message since then
	writing atomic.Int64 // the writer waits for the client to read since then
	payload pace         // of a payload that is received in place
	unread  pace         // of replies, while the writer is at work without a break
}

// pace measures a transfer in windows.
type pace struct {
	since atomic.Int64 // start of the window
	bytes atomic.Int64 // moved in the window
}

func (w *watch) waits(now int64) { w.reading.Store(now) }

func (w *watch) goesOn() {
	if w.reading.Load() != 0 {
		w.reading.Store(0)
	}
}

func (w *watch) startPayload(now int64) { w.payload.start(now) }
func (w *watch) received(n int)         { w.payload.bytes.Add(int64(n)) }
func (w *watch) endPayload()            { w.payload.since.Store(0) }

func (w *watch) blocked(now int64) {
	if w.unread.since.Load() == 0 {
		w.unread.start(now)
	}
	w.writing.Store(now)
}

func (w *watch) sent(n int) {
	w.writing.Store(0)
	w.unread.bytes.Add(int64(n))
}

func (w *watch) unblocked() {
	if w.unread.since.Load() != 0 {
		w.unread.since.Store(0)
		w.writing.Store(0)
	}
}

func (p *pace) start(now int64) {
	p.bytes.Store(0)
	p.since.Store(now)
}

// slow reports, once per window of so many ticks, whether too little was moved in it.
func (p *pace) slow(now, window int64, tick time.Duration) bool {
	start := p.since.Load()
	if start == 0 || now-start < window {
		return false
	}
	bytes := p.bytes.Swap(0)
	p.since.CompareAndSwap(start, now)
	return float64(bytes) < (time.Duration(now-start)*tick).Seconds()*slowBytesPerSecond
}

// now is the time in ticks, from 1.
func (s *Server) now() int64 { return s.ticks.Load() }

// ticksOf is how many ticks d lasts, at least one.
func (s *Server) ticksOf(d time.Duration) int64 { return max(1, int64(d/s.tick)) }

// runWatch counts the ticks and cuts the clients that stall, until the server is closed.
func (s *Server) runWatch() {
	t := time.NewTicker(s.tick)
	defer t.Stop()
	for {
		select {
		case <-s.closed:
			return
		case <-t.C:
		}
		s.ticks.Add(1)
		s.cutStalled()
		s.staging.trim()
	}
}

// cutStalled cuts the connections that stall, and those that are slow where they hold what others need: room for
// payloads that others wait for, or more unread replies than the export can spare.
func (s *Server) cutStalled() {
	now := s.now()
	conns := s.connections()
	unread := make(map[*export]int64)
	for _, c := range conns {
		if c.watch.unread.since.Load() != 0 {
			c.mu.Lock()
			unread[c.export] += c.queued
			c.mu.Unlock()
		}
	}
	staging, window := s.staging.waiting(), s.ticksOf(s.options.SlowAfter)
	for _, c := range conns {
		slowPayload := c.watch.payload.slow(now, window, s.tick)
		slowUnread := c.watch.unread.slow(now, window, s.tick)
		switch {
		case s.passed(&c.watch.reading, now, s.options.StallTimeout):
			c.kill(errStalled)
		case s.passed(&c.watch.writing, now, s.options.UnreadTimeout):
			c.kill(errUnread)
		case slowPayload && (staging || c.export.receiving.waiting()),
			slowUnread && unread[c.export] > int64(c.export.MaxPayload):
			c.kill(errSlow)
		}
	}
}

// passed reports whether something goes on since start for longer than limit.
func (s *Server) passed(start *atomic.Int64, now int64, limit time.Duration) bool {
	t := start.Load()
	return t != 0 && now-t > s.ticksOf(limit)
}
