package control

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Bounds of the control socket: whoever may open it must not be able to hold the daemon up.
const (
	maxConnections    = 64
	maxHeaderBytes    = 8 << 10
	readTimeout       = 5 * time.Second
	idleTimeout       = 30 * time.Second
	writeStallTimeout = 10 * time.Second
	closeTimeout      = 2 * time.Second
)

// Daemon is what the server asks. It is used by several goroutines at once.
type Daemon interface {
	// Status is a snapshot; it must not wait for a disk.
	Status() Status
	// Flush returns when all that was answered before it is committed and home. It ends with ctx.
	// A volume that is not served is a Failure with ExitNoVolume.
	Flush(ctx context.Context, volume string) error
	// Emergency returns, for on, when everything on the volume is committed and it answers writes only once they are; off
	// ends that. It ends with ctx. A volume that is not served is a Failure with ExitNoVolume.
	Emergency(ctx context.Context, volume string, on bool) error
}

// Server answers on the control socket.
type Server struct {
	http   http.Server
	daemon Daemon
}

// failureBody is the JSON of an error.
type failureBody struct {
	Error    string   `json:"error"`
	Hint     string   `json:"hint"`
	ExitCode ExitCode `json:"exit_code"`
}

// NewServer makes a server for d.
func NewServer(d Daemon, log *slog.Logger) *Server {
	s := &Server{daemon: d}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", s.status)
	volume := func(verb string, do func(ctx context.Context, volume string) error) {
		mux.HandleFunc("POST /v1/volumes/{name}/"+verb, func(w http.ResponseWriter, r *http.Request) {
			if err := do(r.Context(), r.PathValue("name")); err != nil {
				answerFailure(w, err)
				return
			}
			answer(w, http.StatusOK, struct{}{})
		})
	}
	volume("flush", d.Flush)
	volume("emergency/on", func(ctx context.Context, volume string) error { return d.Emergency(ctx, volume, true) })
	volume("emergency/off", func(ctx context.Context, volume string) error { return d.Emergency(ctx, volume, false) })
	s.http = http.Server{
		Handler:           refuseBody(mux),
		ReadHeaderTimeout: readTimeout, // no ReadTimeout: it would end the context of a long flush
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return s
}

// Serve answers until Close. It closes l.
func (s *Server) Serve(l net.Listener) error {
	err := s.http.Serve(&limitListener{Listener: l, room: make(chan struct{}, maxConnections)})
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Close lets what was asked end, for a bounded time, then ends every connection.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if s.http.Shutdown(ctx) == nil {
		return nil
	}
	return s.http.Close()
}

// refuseBody refuses requests with a body: none has any, and waiting for one has no bound.
func refuseBody(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			w.Header().Set("Connection", "close")
			// net/http would read the body in order to throw it away.
			_ = http.NewResponseController(w).SetReadDeadline(time.Now())
			answer(w, http.StatusBadRequest, failureBody{Error: "requests have no body", ExitCode: ExitUsage})
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (s *Server) status(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, s.daemon.Status())
}

func answerFailure(w http.ResponseWriter, err error) {
	body := failureBody{Error: err.Error(), ExitCode: ExitFailed}
	var f *Failure
	if errors.As(err, &f) {
		body.Hint, body.ExitCode = f.Hint, f.Code
	}
	code := http.StatusInternalServerError
	switch body.ExitCode {
	case ExitNoVolume:
		code = http.StatusNotFound
	case ExitRefused:
		code = http.StatusConflict
	case ExitUsage:
		code = http.StatusBadRequest
	}
	answer(w, code, body)
}

// answer sends body, to a client that reads it in time.
func answer(w http.ResponseWriter, code int, body any) {
	text, err := json.MarshalIndent(body, "", "  ")
	if err != nil {
		panic(err) // the types of this package have a JSON form
	}
	// A connection without deadlines is one of a test; there is nothing to bound then.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeStallTimeout))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// A client that has gone needs no answer.
	_, _ = w.Write(append(text, '\n'))
}

// limitListener holds at most cap(room) connections; further ones wait in the backlog of the kernel.
type limitListener struct {
	net.Listener
	room chan struct{}
}

func (l *limitListener) Accept() (net.Conn, error) {
	l.room <- struct{}{}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.room
		return nil, err
	}
	return &limitConn{Conn: c, room: l.room}, nil
}

// limitConn gives its place back when it is closed.
type limitConn struct {
	net.Conn
	room chan struct{}
	once sync.Once
}

func (c *limitConn) Close() error {
	defer c.once.Do(func() { <-c.room })
	return c.Conn.Close()
}
