package nbd

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"
)

// DefaultPort is the TCP port of NBD (IANA).
const DefaultPort = 10809

// maxSocketPath is the longest path of a Unix socket, in bytes (unix(7): sun_path without its NUL).
const maxSocketPath = 107

// A URI says where an export is (the NBD project's doc/uri.md).
type URI struct {
	// Network is "tcp" or "unix", as for net.Dial.
	Network string
	// Address is "host:port", the path of a Unix socket, or "@name" for one in the abstract namespace.
	Address string
	// Export is the name of the export; "" is the server's default.
	Export string
}

// ParseURI reads nbd://host[:port]/export or nbd+unix:///export?socket=PATH. A missing host is localhost, a missing
// port 10809, a socket that begins with %00 is in the abstract namespace. Everything not understood is an error
// that names the value and the remedy.
func ParseURI(s string) (URI, error) {
	u, err := parseURI(s)
	if err != nil {
		return URI{}, fmt.Errorf("NBD URI %q: %w", s, err)
	}
	return u, nil
}

func parseURI(s string) (URI, error) {
	p, err := url.Parse(s)
	if err != nil {
		var inner *url.Error
		if errors.As(err, &inner) {
			err = inner.Err // the URI is named already
		}
		return URI{}, err
	}
	name, err := exportName(p)
	if err != nil {
		return URI{}, err
	}
	query, err := parseQuery(p.RawQuery)
	if err != nil {
		return URI{}, err
	}
	switch p.Scheme {
	case "nbd":
		return tcpURI(p, query, name)
	case "nbd+unix":
		return unixURI(p, query, name)
	case "nbds", "nbds+unix":
		return URI{}, fmt.Errorf("scheme %q: TLS is not there yet; use %q over a trusted network",
			p.Scheme, strings.Replace(p.Scheme, "nbds", "nbd", 1))
	}
	return URI{}, fmt.Errorf("scheme %q: use nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH", p.Scheme)
}

// exportName is the path without its first slash.
func exportName(p *url.URL) (string, error) {
	if p.Opaque != "" {
		return "", fmt.Errorf("%q has no slashes; use %s://HOST/EXPORT", p.Opaque, p.Scheme)
	}
	if p.User != nil {
		return "", fmt.Errorf("user %q: there is nothing to log in to; leave it out", p.User.Username())
	}
	if p.Fragment != "" {
		return "", fmt.Errorf("fragment %q: write # in a name as %%23", p.Fragment)
	}
	name := strings.TrimPrefix(p.Path, "/")
	if strings.ContainsRune(name, 0) || !utf8.ValidString(name) {
		return "", fmt.Errorf("export name %q: it must be UTF-8 without NUL", name)
	}
	if len(name) > maxString {
		return "", fmt.Errorf("export name of %d bytes: at most %d are possible", len(name), maxString)
	}
	return name, nil
}

// parseQuery gives the socket of the query; "" if there is none. It is not url.ParseQuery because '+' stands for
// itself here.
func parseQuery(q string) (socket string, err error) {
	for field := range strings.SplitSeq(q, "&") {
		if field == "" {
			continue
		}
		key, value, _ := strings.Cut(field, "=")
		if strings.HasPrefix(key, "tls-") {
			return "", fmt.Errorf("parameter %q: TLS is not there yet; leave it out", key)
		}
		if key != "socket" {
			return "", fmt.Errorf("parameter %q is unknown; only socket=PATH is possible", key)
		}
		if socket != "" {
			return "", errors.New("parameter \"socket\" is there twice; give one")
		}
		if socket, err = url.PathUnescape(value); err != nil {
			return "", err
		}
	}
	return socket, nil
}

func tcpURI(p *url.URL, socket, name string) (URI, error) {
	if socket != "" {
		return URI{}, fmt.Errorf("socket %q does not go with nbd://; use nbd+unix:///EXPORT?socket=PATH", socket)
	}
	host, port := p.Hostname(), p.Port()
	if host == "" {
		host = "localhost"
	}
	if strings.ContainsAny(host, " \t\r\n\x00/@[]") {
		return URI{}, fmt.Errorf("host %q: use a name or an address", host)
	}
	if port == "" {
		port = strconv.Itoa(DefaultPort)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return URI{}, fmt.Errorf("port %q: use 1 to 65535", port)
	}
	return URI{Network: "tcp", Address: net.JoinHostPort(host, port), Export: name}, nil
}

func unixURI(p *url.URL, socket, name string) (URI, error) {
	if p.Host != "" {
		return URI{}, fmt.Errorf("host %q does not go with nbd+unix; use nbd+unix:///EXPORT?socket=PATH (three slashes)", p.Host)
	}
	if socket == "" {
		return URI{}, errors.New("the socket is missing; add ?socket=PATH")
	}
	if len(socket) > maxSocketPath {
		return URI{}, fmt.Errorf("socket path of %d bytes: at most %d are possible", len(socket), maxSocketPath)
	}
	if socket[0] == 0 {
		socket = "@" + socket[1:]
	} else if socket[0] == '@' {
		socket = "./" + socket // a file; net.Dial takes a leading @ for the abstract namespace
	}
	if strings.ContainsRune(socket, 0) {
		return URI{}, fmt.Errorf("socket %q: NUL can only be the first byte", socket)
	}
	return URI{Network: "unix", Address: socket, Export: name}, nil
}

// String gives the URI that ParseURI reads as u.
func (u URI) String() string {
	name := strings.ReplaceAll(url.PathEscape(u.Export), "%2F", "/")
	if u.Network != "unix" {
		host, port, _ := net.SplitHostPort(u.Address)
		return (&url.URL{Scheme: "nbd", Host: net.JoinHostPort(host, port)}).String() + "/" + name
	}
	socket := u.Address
	if strings.HasPrefix(socket, "@") {
		socket = "\x00" + socket[1:]
	}
	socket = strings.NewReplacer("%2F", "/", "&", "%26").Replace(url.PathEscape(socket))
	return "nbd+unix:///" + name + "?socket=" + socket
}
