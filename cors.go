package zejzlauth

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/caddyserver/caddy/v2"
	"golang.org/x/net/http/httpguts"
)

// CORS configures which web pages may read the guard's answers. Origins are
// compared byte by byte: there are no wildcards and no patterns, because every
// one of those in the wild has let a look-alike origin through.
type CORS struct {
	// Origins that are allowed, as the browser sends them: scheme, host and
	// a port unless it is the scheme's default. An entry with a placeholder
	// is resolved when the configuration loads and split at commas and white
	// space; unset or empty is an error. No default: at least one entry here
	// or in dev_origins is needed, unless backend is on.
	// Example: `["https://app.example.com", "{env.CORS_ORIGINS}"]`.
	Origins []string `json:"origins,omitempty"`

	// DevOrigins are further origins, allowed only with
	// ENVIRONMENT=development. They are checked and resolved always.
	// Default: none. Example: `["http://localhost:3000"]`.
	DevOrigins []string `json:"dev_origins,omitempty"`

	// Methods that a page may use. HEAD is allowed where GET is.
	// Default: GET, POST, PUT, PATCH, DELETE. Example: `["GET", "POST"]`.
	Methods []string `json:"methods,omitempty"`

	// Headers that a page may send, in any case. A list replaces the default:
	// Content-Type, Authorization, X-API-Key, X-Goog-Api-Key, Idempotency-Key
	// and every name that starts anthropic-, openai- or x-stainless-.
	// Example: `["Content-Type", "X-API-Key"]`.
	Headers []string `json:"headers,omitempty"`

	// Expose names response headers that a page may read, in addition to the
	// limit, retry and request-id headers that are always exposed.
	// Default: none. Example: `["X-Model"]`.
	Expose []string `json:"expose,omitempty"`

	// MaxAge is how long a browser may remember the answer to a preflight,
	// sent in whole seconds: 1s to 24h. Default: `"1h"`. Example: `"10m"`.
	MaxAge caddy.Duration `json:"max_age,omitempty"`

	// Credentials lets pages send cookies and client certificates. API keys
	// in headers don't need it. Default: `false`. Example: `true`.
	Credentials bool `json:"credentials,omitempty"`

	// Backend leaves preflights and every Access-Control header to the
	// backend; no other field may be set beside it.
	// Default: `false`. Example: `true`.
	Backend bool `json:"backend,omitempty"`
}

const (
	corsDefaultMaxAge = time.Hour
	corsLongestMaxAge = 24 * time.Hour

	// corsMaxRequested bounds the bytes, and with them the number, of the
	// header names examined in a preflight, which anybody may send unasked.
	// The AI SDKs ask for about 400.
	corsMaxRequested = 4096

	corsAllowOrigin      = "Access-Control-Allow-Origin"
	corsAllowCredentials = "Access-Control-Allow-Credentials"
	corsRequestMethod    = "Access-Control-Request-Method"
)

var (
	corsMethods = []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete}
	corsHeaders = []string{"Content-Type", "Authorization", "X-API-Key", "X-Goog-Api-Key", "Idempotency-Key"}

	// The SDKs add headers of these families from release to release, so
	// the family is allowed instead of today's names.
	corsHeaderFamilies = []string{"anthropic-", "openai-", "x-stainless-"}

	corsExpose = []string{
		"Retry-After", "Retry-After-Ms", "x-should-retry",
		"X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "X-RateLimit-Tier",
		"RateLimit", "RateLimit-Policy",
		"X-Request-Id", "Request-Id",
		"x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests",
		"anthropic-ratelimit-requests-limit", "anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset",
	}
)

// corsPolicy answers cross-origin questions for one guard. It is immutable; a
// nil policy allows no origin.
type corsPolicy struct {
	// origins maps each origin to itself, so that what is sent back is the
	// configuration's string, never the client's.
	origins     map[string]string
	methods     map[string]bool
	headers     map[string]bool // lower case
	families    []string        // lower-case prefixes of further header names
	methodList  string
	headerList  string
	exposeList  string
	maxAge      string
	credentials bool
}

// newCORSPolicy checks c and resolves the placeholders in it. The policy is nil
// when c is nil, and when c leaves the matter to the backend: the guard asks
// c.Backend for that.
func newCORSPolicy(c *CORS, development bool) (*corsPolicy, error) {
	if c == nil {
		return nil, nil
	}
	if c.Backend {
		return nil, c.checkBackend()
	}
	origins, err := c.resolveOrigins(development)
	if err != nil {
		return nil, err
	}
	methods, headers := c.Methods, c.Headers
	var families []string
	if len(methods) == 0 {
		methods = corsMethods
	}
	if len(headers) == 0 {
		headers, families = corsHeaders, corsHeaderFamilies
	}
	methodSet, err := corsMethodSet(methods)
	if err != nil {
		return nil, err
	}
	headerSet, err := corsNameSet("headers", headers)
	if err != nil {
		return nil, err
	}
	if _, err = corsNameSet("expose", c.Expose); err != nil {
		return nil, err
	}
	age := time.Duration(c.MaxAge)
	if age == 0 {
		age = corsDefaultMaxAge
	}
	if age < time.Second || age > corsLongestMaxAge {
		return nil, fmt.Errorf("cors max_age: expected 1s to 24h, got %s", age)
	}

	return &corsPolicy{
		origins:     origins,
		methods:     methodSet,
		headers:     headerSet,
		families:    families,
		methodList:  strings.Join(methods, ", "),
		headerList:  strings.Join(headers, ", "),
		exposeList:  joinExpose(c.Expose),
		maxAge:      strconv.FormatInt(int64(age/time.Second), 10),
		credentials: c.Credentials,
	}, nil
}

// origin returns the allowed origin that a request with the header h comes
// from, or "": there is none, it is foreign, or there are several lines, of
// which the backend might believe another one than the guard.
func (p *corsPolicy) origin(h http.Header) string {
	if p == nil {
		return ""
	}
	lines := h["Origin"]
	if len(lines) != 1 {
		return ""
	}
	return p.origins[lines[0]]
}

// isPreflight reports whether r is the question that a browser asks before a
// cross-origin request. Any other OPTIONS is an ordinary request.
func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Origin") != "" && r.Header.Get(corsRequestMethod) != ""
}

// preflight decides on a preflight. If it is allowed, h has the headers of the
// 204; otherwise h is untouched and the caller answers 403.
func (p *corsPolicy) preflight(r *http.Request, h http.Header) bool {
	origin := p.origin(r.Header)
	if origin == "" {
		return false
	}
	method := r.Header[corsRequestMethod]
	if len(method) != 1 || !p.methods[method[0]] {
		return false
	}
	headers, ok := p.grant(r.Header["Access-Control-Request-Headers"])
	if !ok {
		return false
	}

	// Fresh slices, here and in actual: Caddy's header handler replaces
	// values in place, which in a shared slice would reach later answers.
	v := []string{origin, p.methodList, p.maxAge, headers, "true"}
	h[corsAllowOrigin] = v[0:1:1]
	h["Access-Control-Allow-Methods"] = v[1:2:2]
	h["Access-Control-Max-Age"] = v[2:3:3]
	if headers != "" {
		h["Access-Control-Allow-Headers"] = v[3:4:4]
	}
	if p.credentials {
		h[corsAllowCredentials] = v[4:5:5]
	}
	return true
}

// actual sets the headers that let a page at origin, a value of p.origin, read
// the answer.
func (p *corsPolicy) actual(origin string, h http.Header) {
	v := []string{origin, p.exposeList, "true"}
	h[corsAllowOrigin] = v[0:1:1]
	h["Access-Control-Expose-Headers"] = v[1:2:2]
	if p.credentials {
		h[corsAllowCredentials] = v[2:3:3]
	}
}

// grant returns the value of Access-Control-Allow-Headers for the requested
// names, "" if there are none. It is false unless every name is allowed.
func (p *corsPolicy) grant(lines []string) (string, bool) {
	size := 0
	for _, line := range lines {
		size += len(line) + 1
		if size > corsMaxRequested {
			return "", false
		}
	}
	asked := false
	var echo []string
	for _, line := range lines {
		for name := range strings.SplitSeq(line, ",") {
			name = strings.Trim(name, " \t")
			if name == "" { // RFC 9110 5.6.1: recipients ignore empty elements
				continue
			}
			// Before ToLower, which maps U+212A to k.
			if !httpguts.ValidHeaderFieldName(name) {
				return "", false
			}
			asked = true
			name = strings.ToLower(name)
			if p.headers[name] {
				continue
			}
			if !slices.ContainsFunc(p.families, func(f string) bool { return strings.HasPrefix(name, f) }) {
				return "", false
			}
			echo = append(echo, name)
		}
	}
	switch {
	case !asked:
		return "", true
	case len(echo) == 0:
		return p.headerList, true
	}
	return p.headerList + ", " + strings.Join(echo, ", "), true
}

func (c *CORS) checkBackend() error {
	if len(c.Origins)+len(c.DevOrigins)+len(c.Methods)+len(c.Headers)+len(c.Expose) > 0 || c.MaxAge != 0 || c.Credentials {
		return errors.New("cors backend: expected no other cors setting beside it")
	}
	return nil
}

func (c *CORS) resolveOrigins(development bool) (map[string]string, error) {
	if len(c.Origins)+len(c.DevOrigins) == 0 {
		return nil, errors.New("cors: expected at least one origin, such as https://app.example.com, or backend")
	}
	all := make(map[string]string, len(c.Origins)+len(c.DevOrigins))
	if err := addOrigins(all, "origins", c.Origins); err != nil {
		return nil, err
	}
	allowed := all
	if !development {
		allowed = maps.Clone(all)
	}
	if err := addOrigins(all, "dev_origins", c.DevOrigins); err != nil {
		return nil, err
	}
	return allowed, nil
}

// addOrigins resolves and checks one list of the configuration.
func addOrigins(all map[string]string, list string, entries []string) error {
	for i, entry := range entries {
		origins, err := resolveOrigin(entry)
		if err != nil {
			return fmt.Errorf("cors %s: %s: %w", list, originEntry(i, entry), err)
		}
		for _, o := range origins {
			if err = checkOrigin(o); err == nil && all[o] != "" {
				err = errors.New("the origin is listed twice")
			}
			if err != nil {
				return fmt.Errorf("cors %s: %s: %w", list, originEntry(i, entry), err)
			}
			all[o] = o
		}
	}
	return nil
}

func resolveOrigin(entry string) ([]string, error) {
	if !strings.Contains(entry, "{") {
		return []string{entry}, nil
	}
	s, err := caddy.NewReplacer().ReplaceOrErr(entry, true, true)
	if err != nil {
		return nil, err
	}
	origins := strings.FieldsFunc(s, func(r rune) bool { return r == ',' || unicode.IsSpace(r) })
	if len(origins) == 0 {
		return nil, errors.New("expected origins separated by commas or spaces, got none")
	}
	return origins, nil
}

// originEntry points to an entry in an error. It shows the entry as it is
// written, not resolved, and no user, path or query, for a URL pasted by mistake
// may carry a password or token there.
func originEntry(i int, entry string) string {
	n := "entry " + strconv.Itoa(i+1)
	if strings.ContainsAny(entry, "@?#") {
		return n
	}
	if strings.Contains(entry, "{") {
		return n + " (" + strconv.Quote(entry) + ")"
	}
	scheme, rest, ok := strings.Cut(entry, "://")
	if !ok {
		return n
	}
	host, _, _ := strings.Cut(rest, "/")
	return n + " (" + strconv.Quote(scheme+"://"+host) + ")"
}

// checkOrigin reports why no browser would send s as an origin, or nil.
func checkOrigin(s string) error {
	switch {
	case s == "null":
		return errors.New("null is not allowed: any sandboxed page can send it")
	case strings.Contains(s, "*"):
		return errors.New("wildcards are not allowed; expected each origin in full")
	case strings.ContainsFunc(s, func(r rune) bool { return r > unicode.MaxASCII }):
		return errors.New("expected ASCII; write an international name in its xn-- form")
	case strings.ContainsFunc(s, unicode.IsUpper):
		return errors.New("expected lower case, as browsers send it")
	case strings.ContainsAny(s, ", \t\r\n"):
		return errors.New("expected one origin per entry")
	}
	scheme, host, _ := strings.Cut(s, "://")
	port, ok := map[string]string{"http": "80", "https": "443"}[scheme]
	if !ok || host == "" {
		return errors.New("expected http:// or https:// and a host, such as https://app.example.com")
	}
	switch {
	case strings.Contains(host, "@"):
		return errors.New("user and password are not part of an origin")
	case strings.ContainsAny(host, "/?#"):
		return errors.New("expected no slash, path, query or fragment after the host")
	}
	return checkOriginHost(host, port)
}

func checkOriginHost(s, defaultPort string) error {
	host := s
	// The last colon of an IPv6 literal without port lies inside the brackets.
	if i := strings.LastIndexByte(s, ':'); i > strings.LastIndexByte(s, ']') {
		host = s[:i]
		port := s[i+1:]
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
			return errors.New("expected a port from 1 to 65535")
		}
		if port == defaultPort {
			return fmt.Errorf("expected no :%s, the default port, which browsers leave out", port)
		}
	}
	if strings.HasPrefix(host, "[") {
		return checkOriginIPv6(host)
	}
	return checkOriginName(host)
}

func checkOriginIPv6(host string) error {
	if strings.Contains(host, "%") {
		return errors.New("expected an IPv6 address without zone")
	}
	a, err := netip.ParseAddr(strings.TrimSuffix(host[1:], "]"))
	// Browsers write an IPv4 address inside IPv6 in hexadecimal, Go does not.
	if err != nil || !a.Is6() || a.Is4In6() || "["+a.String()+"]" != host {
		return errors.New("expected an IPv6 address in its shortest form, such as [2001:db8::1]")
	}
	return nil
}

func checkOriginName(host string) error {
	if len(host) > 253 {
		return errors.New("expected a host of at most 253 characters")
	}
	labels := strings.Split(host, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return errors.New("expected a host of letters, digits, '-' and '_' between single dots, such as app.example.com")
		}
	}
	// Browsers read a host that ends in a number as an IPv4 address, in any
	// of its spellings, and send it with four decimal numbers.
	last := labels[len(labels)-1]
	hex, isHex := strings.CutPrefix(last, "0x")
	if strings.Trim(last, "0123456789") == "" || isHex && strings.Trim(hex, "0123456789abcdef") == "" {
		if a, err := netip.ParseAddr(host); err != nil || a.String() != host {
			return errors.New("expected an IPv4 address of four decimal numbers, such as 192.0.2.1")
		}
	}
	return nil
}

// corsMethodSet checks the methods and makes them a set. HEAD comes with GET.
func corsMethodSet(methods []string) (map[string]bool, error) {
	set := make(map[string]bool, len(methods)+1)
	for i, m := range methods {
		switch {
		case m == "*" || !httpguts.ValidHeaderFieldName(m) || strings.ToUpper(m) != m:
			return nil, fmt.Errorf("cors methods: entry %d: expected a method in upper case, such as POST", i+1)
		case slices.Contains([]string{http.MethodConnect, http.MethodTrace, "TRACK"}, m):
			return nil, fmt.Errorf("cors methods: %s is never allowed", m)
		case set[m]:
			return nil, fmt.Errorf("cors methods: %s is listed twice", m)
		}
		set[m] = true
	}
	if set[http.MethodGet] {
		set[http.MethodHead] = true
	}
	return set, nil
}

// corsNameSet checks a list of header names and makes it a set in lower case.
func corsNameSet(list string, names []string) (map[string]bool, error) {
	set := make(map[string]bool, len(names))
	for i, n := range names {
		// "*" is a valid token, but excludes Authorization, and with
		// credentials it means a header called "*".
		if n == "*" || !httpguts.ValidHeaderFieldName(n) {
			return nil, fmt.Errorf("cors %s: entry %d: expected a header name, such as X-API-Key", list, i+1)
		}
		n = strings.ToLower(n)
		if set[n] {
			return nil, fmt.Errorf("cors %s: entry %d: the name is listed twice", list, i+1)
		}
		set[n] = true
	}
	return set, nil
}

// joinExpose adds the operator's names to the built-in ones.
func joinExpose(names []string) string {
	all := slices.Clone(corsExpose)
	for _, n := range names {
		if !slices.ContainsFunc(corsExpose, func(s string) bool { return strings.EqualFold(s, n) }) {
			all = append(all, n)
		}
	}
	return strings.Join(all, ", ")
}
