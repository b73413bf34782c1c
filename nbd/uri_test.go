package nbd

import (
	"strings"
	"testing"
)

func TestParseURI(t *testing.T) {
	long := strings.Repeat("p", 107)
	for _, test := range []struct {
		uri  string
		want URI
	}{
		{"nbd://example.com:10809/export", URI{"tcp", "example.com:10809", "export"}},
		{"nbd://example.com/disk", URI{"tcp", "example.com:10809", "disk"}},
		{"nbd://example.com/", URI{"tcp", "example.com:10809", ""}},
		{"nbd://example.com", URI{"tcp", "example.com:10809", ""}},
		{"nbd://example.com//disk", URI{"tcp", "example.com:10809", "/disk"}},
		{"nbd://example.com/hello%20world", URI{"tcp", "example.com:10809", "hello world"}},
		{"nbd://example.com/a%2Fb/c", URI{"tcp", "example.com:10809", "a/b/c"}},
		{"nbd://example.com/50%25%3F%23", URI{"tcp", "example.com:10809", "50%?#"}},
		{"nbd:///disk", URI{"tcp", "localhost:10809", "disk"}},
		{"nbd://:1234/disk", URI{"tcp", "localhost:1234", "disk"}},
		{"nbd://127.0.0.1:1", URI{"tcp", "127.0.0.1:1", ""}},
		{"nbd://[::1]", URI{"tcp", "[::1]:10809", ""}},
		{"nbd://[2001:db8::7]:65535/x", URI{"tcp", "[2001:db8::7]:65535", "x"}},
		{"nbd://[fe80::1%25eth0]/x", URI{"tcp", "[fe80::1%eth0]:10809", "x"}},
		{"nbd+unix:///disk?socket=sock", URI{"unix", "sock", "disk"}},
		{"nbd+unix:///?socket=/run/a+b%20c.sock", URI{"unix", "/run/a+b c.sock", ""}},
		{"nbd+unix://?socket=/run/a.sock", URI{"unix", "/run/a.sock", ""}},
		{"nbd+unix:///?socket=/run/a%26b.sock", URI{"unix", "/run/a&b.sock", ""}},
		{"nbd+unix:///?socket=%00/abstract", URI{"unix", "@/abstract", ""}},
		{"nbd+unix:///?socket=@file", URI{"unix", "./@file", ""}},
		{"nbd+unix:///?socket=" + long, URI{"unix", long, ""}},
	} {
		got, err := ParseURI(test.uri)
		if err != nil {
			t.Errorf("%s: %v", test.uri, err)
			continue
		}
		if got != test.want {
			t.Errorf("%s = %+v, want %+v", test.uri, got, test.want)
		}
		again, err := ParseURI(got.String())
		if err != nil || again != got {
			t.Errorf("%s: String %s reads as %+v, %v", test.uri, got, again, err)
		}
	}
}

// Every refusal names the value and what to write instead.
func TestParseURIRefuses(t *testing.T) {
	for _, test := range []struct{ uri, value, remedy string }{
		{"http://host/x", `scheme "http"`, "use nbd://"},
		{"/dev/sda", `scheme ""`, "use nbd://"},
		{"", `scheme ""`, "use nbd://"},
		{"nbd:host/x", `"host/x"`, "use nbd://HOST"},
		{"nbds://host/x", `scheme "nbds"`, "TLS is not there yet"},
		{"nbds+unix:///x?socket=s", `scheme "nbds+unix"`, "TLS is not there yet"},
		{"nbd://host/x?tls-type=psk", `"tls-type"`, "TLS is not there yet"},
		{"nbd://host/x?sock=a", `"sock"`, "socket=PATH"},
		{"nbd://host/x?socket=a", `socket "a"`, "use nbd+unix"},
		{"nbd+unix:///x", "socket is missing", "?socket=PATH"},
		{"nbd+unix:///x?socket=", "socket is missing", "?socket=PATH"},
		{"nbd+unix:///x?socket=a&socket=b", "twice", "give one"},
		{"nbd+unix://run/x.sock", `host "run"`, "three slashes"},
		{"nbd+unix:///x?socket=" + strings.Repeat("p", 108), "108 bytes", "at most 107"},
		{"nbd+unix:///x?socket=a%00b", `"a\x00b"`, "first byte"},
		{"nbd+unix:///x?socket=%zz", `"%zz"`, "invalid URL escape"},
		{"nbd://host:0/x", `port "0"`, "1 to 65535"},
		{"nbd://host:65536/x", `port "65536"`, "1 to 65535"},
		{"nbd://host:nbd/x", `"`, "invalid port"},
		{"nbd://user@host/x", `user "user"`, "leave it out"},
		{"nbd://host/x#y", `fragment "y"`, "%23"},
		{"nbd://host/%00", `"\x00"`, "without NUL"},
		{"nbd://host/%ff", `"\xff"`, "UTF-8"},
		{"nbd://host/" + strings.Repeat("n", 4097), "4097 bytes", "at most 4096"},
		{"nbd://[::1/x", "[::1", "missing ']'"},
	} {
		_, err := ParseURI(test.uri)
		if err == nil {
			t.Errorf("%s: accepted", test.uri)
			continue
		}
		for _, want := range []string{test.value, test.remedy} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q does not say %q", test.uri, err, want)
			}
		}
	}
}

func FuzzParseURI(f *testing.F) {
	f.Add("nbd://[fe80::1%25eth0]:10809//a%20b")
	f.Add("nbd+unix:///x?socket=%00/a+b")
	f.Add("nbd+unix:///?socket=@a&")
	f.Add("nBd://]")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		again, err := ParseURI(u.String())
		if err != nil || again != u {
			t.Fatalf("%q = %+v; String %q reads as %+v, %v", s, u, u.String(), again, err)
		}
	})
}
