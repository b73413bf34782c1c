package load

import (
	"fmt"
	"net"
	"net/url"
	"strings"
)

// defaultPort is the port of NBD by IANA.
const defaultPort = "10809"

// Target is an NBD export and the way to its server.
type Target struct {
	Network string // "unix" or "tcp"
	Address string // the path of the socket, or host:port
	Export  string // its name; "" is the default export
}

// ParseURI reads nbd://HOST[:PORT]/EXPORT and nbd+unix:///EXPORT?socket=PATH (NBD's doc/uri.md).
func ParseURI(uri string) (Target, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return Target{}, fmt.Errorf("parse NBD URI: %w", err)
	}
	export := strings.TrimPrefix(u.Path, "/")
	switch u.Scheme {
	case "nbd":
		if u.Hostname() == "" {
			return Target{}, fmt.Errorf("NBD URI %q names no host; want nbd://HOST[:PORT]/EXPORT", uri)
		}
		port := u.Port()
		if port == "" {
			port = defaultPort
		}
		return Target{Network: "tcp", Address: net.JoinHostPort(u.Hostname(), port), Export: export}, nil
	case "nbd+unix":
		path := u.Query().Get("socket")
		if path == "" {
			return Target{}, fmt.Errorf("NBD URI %q names no socket; want nbd+unix:///EXPORT?socket=PATH", uri)
		}
		return Target{Network: "unix", Address: path, Export: export}, nil
	}
	return Target{}, fmt.Errorf("NBD URI %q has scheme %q; want nbd or nbd+unix", uri, u.Scheme)
}

// URI is the inverse of ParseURI.
func (t Target) URI() string {
	u := url.URL{Scheme: "nbd", Host: t.Address, Path: "/" + t.Export}
	if t.Network == "unix" {
		u.Scheme, u.Host = "nbd+unix", ""
		u.RawQuery = "socket=" + strings.ReplaceAll(url.QueryEscape(t.Address), "%2F", "/")
		return "nbd+unix://" + u.EscapedPath() + "?" + u.RawQuery
	}
	return u.String()
}
