package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"
)

// Bounds of the client.
const (
	dialTimeout      = 2 * time.Second
	statusTimeout    = 10 * time.Second
	maxResponseBytes = 16 << 20
)

// Client asks a daemon. Its errors are Failures. It is safe for concurrent use.
type Client struct {
	path string
	http http.Client
}

// NewClient makes a client for the control socket at path. Nothing is opened yet.
func NewClient(path string) *Client {
	c := &Client{path: path}
	dialer := net.Dialer{Timeout: dialTimeout}
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", path)
		},
		MaxIdleConns: 1,
	}
	return c
}

// Status asks for GET /v1/status.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	var s Status
	if err := c.do(ctx, http.MethodGet, "/v1/status", &s); err != nil {
		return nil, err
	}
	if s.Schema != Schema {
		return nil, &Failure{
			Code: ExitFailed,
			Err:  fmt.Errorf("the daemon at %s speaks schema %d, this program %d", c.path, s.Schema, Schema),
			Hint: "use the ramshelf that the daemon was started with",
		}
	}
	return &s, nil
}

// Flush returns when all that was answered before it on the volume is committed and home. It waits as long as ctx.
func (c *Client) Flush(ctx context.Context, volume string) error {
	return c.do(ctx, http.MethodPost, "/v1/volumes/"+url.PathEscape(volume)+"/flush", nil)
}

// Emergency turns the emergency of a volume on or off. On returns when the volume answers writes only once they are committed.
// It waits as long as ctx.
func (c *Client) Emergency(ctx context.Context, volume string, on bool) error {
	state := "off"
	if on {
		state = "on"
	}
	return c.do(ctx, http.MethodPost, "/v1/volumes/"+url.PathEscape(volume)+"/emergency/"+state, nil)
}

// do sends a request without a body and decodes the answer into dst where that is not nil.
func (c *Client) do(ctx context.Context, method, path string, dst any) error {
	r, err := http.NewRequestWithContext(ctx, method, "http://ramshelf"+path, nil)
	if err != nil {
		return &Failure{Code: ExitUsage, Err: err}
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return c.unreachable(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxResponseBytes))
	if err != nil {
		return c.unreachable(err)
	}
	if resp.StatusCode != http.StatusOK {
		return decodeFailure(resp.Status, text)
	}
	if dst == nil {
		return nil
	}
	if err := json.Unmarshal(text, dst); err != nil {
		return &Failure{Code: ExitFailed, Err: fmt.Errorf("decode the answer of %s: %w", c.path, err)}
	}
	return nil
}

func (c *Client) unreachable(err error) error {
	return &Failure{
		Code: ExitUnreachable,
		Err:  fmt.Errorf("ask the daemon at %s: %w", c.path, cause(err)),
		Hint: "is it running, and is this its --control?",
	}
}

// cause leaves out the URL that net/http puts before an error: there is only one place to ask.
func cause(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// decodeFailure makes the Failure again that the daemon answered.
func decodeFailure(status string, text []byte) error {
	var body failureBody
	if err := json.Unmarshal(text, &body); err != nil || body.Error == "" {
		return &Failure{Code: ExitFailed, Err: fmt.Errorf("the daemon answered %s", status)}
	}
	return &Failure{Code: body.ExitCode, Err: errors.New(body.Error), Hint: body.Hint}
}
