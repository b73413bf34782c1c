package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write testdata anew")

// full is a status in which every field has a value of its own.
func full() Status {
	return Status{
		Schema: Schema, Version: "v1.2.3", PID: 42, IOFlusher: true,
		Volumes: []VolumeStatus{{
			Name: "vol", Role: RolePrimary, State: StateOK, Ack: "peer", AckInForce: "disk", Emergency: true, Flush: "ack",
			Exports:   []string{"nbd://127.0.0.1:10809/vol"},
			SizeBytes: 1 << 30, MemoryBytes: 256 << 20, ResidentBytes: 100 << 20, FreeBytes: 156 << 20,
			DirtyBytes: 8192, UncommittedBytes: 4096, UncommittedAgeSeconds: 0.25, UncommittedLimitBytes: 85 << 20, CommitSeconds: 0.5,
			FillRemainingBytes: 12288, DrainRemainingBytes: 16384, LostBlocks: 3, Generation: 9,
			Epoch: Epoch{Open: 7, Committed: 6},
			Peer:  &Peer{State: "Connected", OutOfSyncBytes: 20480},
			Backing: BackingStatus{State: BackingSlow, Kind: "file", Address: "file:/srv/vol.img", Error: "write: EIO",
				WrittenBytes: 24576, Writes: 2, Syncs: 1, Durability: "O_DIRECT, fdatasync"},
			Journal: JournalStatus{
				Kind: "external", Address: "/dev/nvme0n1p4", Bytes: 28672, UsedBytes: 8192, WrittenBytes: 36864, BytesPerSecond: 200, SlowestBytesPerSecond: 100,
			},
			Clients: 4, Reads: Traffic{10, 40960}, Writes: Traffic{11, 45056}, Zeroes: Traffic{12, 49152},
			Flushes: 13, Hits: 14, Misses: 15,
		}},
	}
}

// The JSON is a promise to scripts: names and nesting never change.
func TestStatusGolden(t *testing.T) {
	got, err := json.MarshalIndent(full(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	path := filepath.Join("testdata", "status.json")
	if *update {
		if err := os.WriteFile(path, got, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("status is\n%s\nwant\n%s", got, want)
	}
}

// These names are fixed by the interface, whatever else is added.
func TestStatusFixedNames(t *testing.T) {
	text, err := json.Marshal(full())
	if err != nil {
		t.Fatal(err)
	}
	var s struct {
		Schema  int              `json:"schema"`
		Volumes []map[string]any `json:"volumes"`
	}
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"name", "role", "state", "ack", "ack_in_force", "size_bytes", "memory_bytes", "dirty_bytes", "uncommitted_bytes",
		"uncommitted_age_seconds", "epoch.open", "epoch.committed", "peer.state", "peer.out_of_sync_bytes", "backing.state",
	} {
		var at any = s.Volumes[0]
		for part := range strings.SplitSeq(name, ".") {
			at = at.(map[string]any)[part]
		}
		if at == nil {
			t.Errorf("volumes[].%s is missing", name)
		}
	}
	if s.Schema != 1 {
		t.Errorf("schema %d", s.Schema)
	}
	alone, err := json.Marshal(VolumeStatus{})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(alone, []byte(`"peer":null`)) {
		t.Errorf("peer is not null without one: %s", alone)
	}
}

// fake is a daemon of one volume.
type fake struct {
	flush     func(ctx context.Context) error
	emergency func(on bool) error
}

func (f *fake) Status() Status { return full() }

func (f *fake) Flush(ctx context.Context, volume string) error {
	if volume != "vol" {
		return &Failure{Code: ExitNoVolume, Err: fmt.Errorf("volume %q: the daemon serves no such volume", volume), Hint: "it serves vol"}
	}
	if f.flush != nil {
		return f.flush(ctx)
	}
	return nil
}

func (f *fake) Emergency(_ context.Context, volume string, on bool) error {
	if volume != "vol" {
		return &Failure{Code: ExitNoVolume, Err: fmt.Errorf("volume %q: the daemon serves no such volume", volume), Hint: "it serves vol"}
	}
	return f.emergency(on)
}

// serve answers for d on a socket until the test ends.
func serve(t *testing.T, d Daemon) (path string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "control")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "control.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(d, slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return path
}

func TestStatusRoundTrip(t *testing.T) {
	got, err := NewClient(serve(t, &fake{})).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := full(); !reflect.DeepEqual(*got, want) {
		t.Errorf("got %+v, want %+v", *got, want)
	}
}

func TestFlush(t *testing.T) {
	for _, c := range []struct {
		name, volume string
		err          error
		code         ExitCode
		want, hint   string
	}{
		{name: "done", volume: "vol"},
		{name: "no volume", volume: "other/volume", code: ExitNoVolume, want: `volume "other/volume": the daemon serves no such volume`, hint: "it serves vol"},
		{name: "failed", volume: "vol", err: errors.New("write: EIO"), code: ExitFailed, want: "write: EIO"},
		{name: "refused", volume: "vol", err: Refused(errors.New("too dirty"), "say --force"), code: ExitRefused, want: "too dirty", hint: "say --force"},
	} {
		t.Run(c.name, func(t *testing.T) {
			client := NewClient(serve(t, &fake{flush: func(context.Context) error { return c.err }}))
			err := client.Flush(t.Context(), c.volume)
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			var f *Failure
			if !errors.As(err, &f) || f.Code != c.code || f.Error() != c.want || f.Hint != c.hint {
				t.Errorf("got %#v", err)
			}
		})
	}
}

func TestEmergency(t *testing.T) {
	var asked []bool
	result := error(nil)
	client := NewClient(serve(t, &fake{emergency: func(on bool) error {
		asked = append(asked, on)
		return result
	}}))
	for _, on := range []bool{true, false} {
		if err := client.Emergency(t.Context(), "vol", on); err != nil {
			t.Errorf("%v: %v", on, err)
		}
	}
	var f *Failure
	if err := client.Emergency(t.Context(), "other", true); !errors.As(err, &f) || f.Code != ExitNoVolume || f.Hint != "it serves vol" {
		t.Errorf("other volume: %v", err)
	}
	result = errors.New("write: EIO")
	if err := client.Emergency(t.Context(), "vol", true); !errors.As(err, &f) || f.Code != ExitFailed || f.Error() != "write: EIO" {
		t.Errorf("failed: %v", err)
	}
	if want := []bool{true, false, true}; !reflect.DeepEqual(asked, want) {
		t.Errorf("the daemon was asked %v, want %v", asked, want)
	}
}

// A client that gives up ends its flush in the daemon.
func TestFlushEndsWithItsClient(t *testing.T) {
	began, ended := make(chan struct{}), make(chan error, 1)
	path := serve(t, &fake{flush: func(ctx context.Context) error {
		close(began)
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-began
		cancel()
	}()
	if err := NewClient(path).Flush(ctx, "vol"); !errors.Is(err, context.Canceled) {
		t.Errorf("flush: %v", err)
	}
	if err := <-ended; err == nil {
		t.Error("the flush of the daemon went on")
	}
}

func TestUnreachable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	var f *Failure
	if _, err := NewClient(path).Status(t.Context()); !errors.As(err, &f) || f.Code != ExitUnreachable {
		t.Errorf("no socket: %v", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	f = nil
	if err := NewClient(path).Flush(t.Context(), "vol"); !errors.As(err, &f) || f.Code != ExitUnreachable {
		t.Errorf("stale socket: %v", err)
	} else if strings.Contains(f.Error(), "http") {
		t.Errorf("the error speaks of HTTP: %v", f)
	}
}

// A daemon of another schema is not misread.
func TestOtherSchema(t *testing.T) {
	path := serve(t, &other{})
	var f *Failure
	if _, err := NewClient(path).Status(t.Context()); !errors.As(err, &f) || !strings.Contains(f.Error(), "schema 99") {
		t.Errorf("got %v", err)
	}
}

type other struct{ fake }

func (*other) Status() Status { return Status{Schema: 99} }

// raw sends text and gives all that comes back until the daemon closes the connection.
func raw(t *testing.T, path, text string) string {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(c)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%.40q: the connection stays open: %v", text, err)
	}
	return string(answer)
}

func TestHostileRequests(t *testing.T) {
	path := serve(t, &fake{})
	for name, c := range map[string]struct{ request, want string }{
		"body":         {"POST /v1/volumes/vol/flush HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", "400 Bad Request"},
		"chunked body": {"GET /v1/status HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", "400 Bad Request"},
		"long header":  {"GET /v1/status HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 20<<10) + "\r\n\r\n", "431 "},
		"path":         {"GET /v1/volumes HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "404 Not Found"},
		"neither":      {"POST /v1/volumes/vol/emergency/now HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "404 Not Found"},
		"method":       {"POST /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "405 Method Not Allowed"},
		"not HTTP":     {"hello\r\n\r\n", "400 Bad Request"},
	} {
		if answer := raw(t, path, c.request); !strings.Contains(answer, c.want) {
			t.Errorf("%s: answered %.200q, want %q", name, answer, c.want)
		}
	}
	if _, err := NewClient(path).Status(t.Context()); err != nil {
		t.Errorf("status afterwards: %v", err)
	}
}

// As many connections as there may be hold up the next one, until one of them goes.
func TestConnectionsAreBounded(t *testing.T) {
	path := serve(t, &fake{})
	var held []net.Conn
	for range maxConnections {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		held = append(held, c)
	}
	// The request of one is answered, so all before it were accepted.
	last := held[maxConnections-1]
	if _, err := io.WriteString(last, "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := last.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := NewClient(path).Status(ctx); err == nil {
		t.Error("one connection too many was answered")
	}
	held[0].Close()
	if _, err := NewClient(path).Status(t.Context()); err != nil {
		t.Errorf("after one had gone: %v", err)
	}
}

func TestFailureIsAnError(t *testing.T) {
	cause := errors.New("cause")
	if !errors.Is(Refused(cause, "hint"), cause) {
		t.Error("the cause is hidden")
	}
	if got := Usage("", "wrong %d", 5).Error(); got != "wrong 5" {
		t.Error(got)
	}
	if f := Later("promote"); f.Code != ExitFailed || f.Error() != "promote: lands later" {
		t.Errorf("%+v", f)
	}
}
