package zejzlauth

import (
	"fmt"
	"net/http"
	"strings"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"
)

// route is what the path rules make of a request.
type route uint8

const (
	// protected needs a key. It is the zero value, so what no rule decided needs one.
	protected route = iota
	// public passes without a key.
	public
	// open lies outside what the guard protects.
	open
)

// pathRules decides which requests need a key. It reads the URI as the client
// sent it: a cleaned or rewritten path is what the guard believes, not what
// the backend gets (CVE-2019-9901, CVE-2021-43557, CVE-2026-40912).
type pathRules struct {
	public  []pathPattern
	protect []pathPattern
	all     bool // protect holds /*: nothing is open
}

// pathPattern is an exact path, or with subtree all that lies below prefix.
type pathPattern struct {
	path    string // without the *
	subtree bool
}

func newPathRules(protect, publicPaths []string) (pathRules, error) {
	var rules pathRules
	if len(protect) == 0 {
		protect = []string{"/*"}
	}
	for _, s := range protect {
		p, err := parsePathPattern(s)
		if err != nil {
			return rules, fmt.Errorf("protect: %w", err)
		}
		rules.all = rules.all || p.subtree && p.path == "/"
		p.path = strings.ToLower(decode(p.path))
		rules.protect = append(rules.protect, p)
	}
	for _, s := range publicPaths {
		p, err := parsePathPattern(s)
		if err != nil {
			return rules, fmt.Errorf("public: %w", err)
		}
		rules.public = append(rules.public, p)
	}
	return rules, nil
}

func parsePathPattern(s string) (pathPattern, error) {
	path, subtree := strings.CutSuffix(s, "/*")
	if subtree {
		path += "/"
	}
	if path == "" || strings.ContainsAny(path, "*?{}") || inspectPath(path) != plainPath {
		return pathPattern{}, fmt.Errorf("path %q: expected an exact path such as /api/status, or one ending in /*, in plain spelling", s)
	}
	return pathPattern{path: path, subtree: subtree}, nil
}

// classify decides about one request. bad is true for a path that no key
// may send: what it names depends on who reads it.
func (p *pathRules) classify(method, uri string) (rt route, bad bool) {
	raw, _, _ := strings.Cut(uri, "?")
	oddity := inspectPath(raw)
	if oddity != badPath && (method == http.MethodGet || method == http.MethodHead) && p.isPublic(raw, oddity) {
		return public, false
	}
	if !p.all && oddity == plainPath && p.isOpen(raw) {
		return open, false
	}
	return protected, oddity == badPath
}

func (p *pathRules) isPublic(raw string, oddity pathOddity) bool {
	for i := range p.public {
		entry := &p.public[i]
		switch {
		case !entry.subtree:
			if raw == entry.path {
				return true
			}
		case oddity == plainPath && len(raw) > len(entry.path) && strings.HasPrefix(raw, entry.path):
			return true
		}
	}
	return false
}

// isOpen takes a path with nothing unusual in it: its normal form is the
// path decoded and in lower case. A backend that ignores letter case must
// not find a protected route behind an open one (CVE-2026-27587).
func (p *pathRules) isOpen(raw string) bool {
	normal := strings.ToLower(decode(raw))
	lower := strings.ToLower(raw)
	for i := range p.protect {
		if p.protect[i].covers(normal) || p.protect[i].covers(lower) {
			return false
		}
	}
	return true
}

// covers errs on the side of protection: /api/* covers /api too, and /api
// covers /api/, since many backends serve them alike.
func (p *pathPattern) covers(path string) bool {
	if !p.subtree {
		return strings.TrimSuffix(path, "/") == strings.TrimSuffix(p.path, "/")
	}
	return strings.HasPrefix(path, p.path) || path == strings.TrimSuffix(p.path, "/")
}

// pathOddity tells how far a path can be trusted to mean one thing.
type pathOddity uint8

const (
	plainPath pathOddity = iota
	// unusualPath may be read in two ways: it is never public or open.
	unusualPath
	// badPath holds a dot segment, a backslash or a control character, raw or encoded.
	badPath
)

// inspectPath reads a raw path, as sent, up to the question mark.
func inspectPath(raw string) pathOddity {
	if raw == "" || raw[0] != '/' {
		return max(unusualPath, inspectSegments(raw))
	}
	for i := 0; i < len(raw); i++ {
		switch c := raw[i]; {
		case c == '%' || c == '\\' || c == ';' || c == '#' || c <= ' ' || c >= 0x7f,
			c == '/' && i+1 < len(raw) && (raw[i+1] == '/' || raw[i+1] == '.'):
			return inspectSegments(raw)
		}
	}
	return plainPath
}

// inspectSegments is the slow half: it reads the path decoded, in the
// segments that any backend might see.
func inspectSegments(raw string) pathOddity {
	oddity := plainPath
	decoded := decode(raw)
	// Fullwidth dots, slashes and spaces are plain ones to a backend that normalizes.
	if hasOddEscape(raw) || !utf8.ValidString(decoded) || !norm.NFKC.IsNormalString(decoded) {
		oddity = unusualPath
	}
	start := 0
	for i := 0; i <= len(decoded); i++ {
		if i < len(decoded) && decoded[i] != '/' {
			if c := decoded[i]; c == '\\' || c < ' ' || c == 0x7f {
				return badPath
			}
			if c := decoded[i]; c == ';' || c == '#' {
				oddity = unusualPath
			}
			continue
		}
		segment := decoded[start:i]
		// /..;/ is a dot segment to a Java backend, which drops parameters (CVE-2026-73511); others trim spaces
		name, _, _ := strings.Cut(segment, ";")
		if name = strings.TrimSpace(name); name == "." || name == ".." {
			return badPath
		}
		if segment == "" && start > 0 && i < len(decoded) {
			oddity = unusualPath // //
		}
		start = i + 1
	}
	return oddity
}

// hasOddEscape finds an escape that hides a character with a meaning of its
// own: / \ . ; % # ? or a malformed one.
func hasOddEscape(raw string) bool {
	for i := 0; i < len(raw); i++ {
		if raw[i] != '%' {
			continue
		}
		c, ok := unescapeAt(raw, i)
		if !ok || strings.IndexByte(`/\.;%#?`, c) >= 0 {
			return true
		}
		i += 2
	}
	return false
}

// decode decodes percent escapes and those that decoding makes, since a backend
// may decode twice (%252e%252e); malformed ones stay as they stand.
func decode(raw string) string {
	if strings.IndexByte(raw, '%') < 0 {
		return raw
	}
	out := make([]byte, 0, len(raw))
	for i := 0; i < len(raw); i++ {
		out = append(out, raw[i])
		for n := len(out); n > 2; n = len(out) {
			c, ok := unescapeAt(out, n-3)
			if !ok {
				break
			}
			out = append(out[:n-3], c)
		}
	}
	return string(out)
}

func unescapeAt[S string | []byte](s S, i int) (byte, bool) {
	if s[i] != '%' || i+2 >= len(s) {
		return 0, false
	}
	hi, lo := unhex(s[i+1]), unhex(s[i+2])
	return hi<<4 | lo, hi < 16 && lo < 16
}

func unhex(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10
	}
	return 0xff
}

// allowedMethods is what a 405 tells.
const allowedMethods = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"

// methodAllowed refuses methods that no AI API serves and that confuse those
// between: CONNECT (but a websocket over HTTP/2 or 3, RFC 8441), TRACE, TRACK,
// and any with lower-case letters, which a backend might fold.
func methodAllowed(r *http.Request) bool {
	switch r.Method {
	case http.MethodGet, http.MethodPost:
		return true
	case http.MethodConnect:
		return isExtendedConnect(r)
	case http.MethodTrace, "TRACK":
		return false
	}
	for i := 0; i < len(r.Method); i++ {
		if c := r.Method[i]; 'a' <= c && c <= 'z' {
			return false
		}
	}
	return true
}

// isExtendedConnect tells a websocket over HTTP/2 or HTTP/3. net/http keeps
// the :protocol pseudo-header in the header map, quic-go puts it in Proto
// (reverseproxy.go looks for both in the same way).
func isExtendedConnect(r *http.Request) bool {
	switch r.ProtoMajor {
	case 2:
		return r.Header.Get(":protocol") == "websocket"
	case 3:
		return r.Proto == "websocket"
	}
	return false
}
