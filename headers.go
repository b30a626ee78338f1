package zejzlauth

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/http/httpguts"

	"github.com/zejzl/caddy-zejzl-auth/internal/window"
)

// HeaderOps changes the security headers that the guard puts on answers.
type HeaderOps struct {
	// Headers to set, over any value from the backend. Placeholders such as
	// {env.NAME} are replaced when the configuration loads. A name stands once,
	// here or in delete, without the + > ? of Caddy's header directive.
	// Default: the security headers listed in the README.
	// Example: `{"Content-Security-Policy": "default-src 'self'"}`.
	Set map[string]string `json:"set,omitempty"`

	// Security headers to leave out. Default: none.
	// Example: `["X-XSS-Protection"]`.
	Delete []string `json:"delete,omitempty"`
}

// headerScope tells on which answers a security header belongs.
type headerScope uint8

const (
	everyAnswer   headerScope = iota
	guardedAnswer             // protected and public paths
)

// enforcedHeader goes on the response before the backend is asked, so that
// it survives every error path, and is put right again at the final status.
type enforcedHeader struct {
	name, value string
	scope       headerScope
	secureOnly  bool // HSTS must never travel over plain HTTP (RFC 6797, 7.2)
}

const (
	hstsHeader  = "Strict-Transport-Security"
	cspHeader   = "Content-Security-Policy"
	corpHeader  = "Cross-Origin-Resource-Policy"
	cacheHeader = "Cache-Control"

	apiPolicy = "default-src 'none'; frame-ancestors 'none'"
	// A page of the backend has scripts and styles of its own: only framing is refused.
	pagePolicy = "frame-ancestors 'none'"
)

// headerRules is the guard's header configuration made ready.
type headerRules struct {
	enforced []enforcedHeader

	// Names of those set only where neither operator nor backend did.
	fallbacks []string
}

func newHeaderRules(ops *HeaderOps) (headerRules, error) {
	rules := headerRules{
		enforced: []enforcedHeader{
			{name: "X-Content-Type-Options", value: "nosniff"},
			{name: "X-Frame-Options", value: "DENY"},
			// The article's value. Browsers have dropped the filter; the policy below makes it void in old ones.
			{name: "X-Xss-Protection", value: "1; mode=block"},
			{name: hstsHeader, value: "max-age=31536000; includeSubDomains", secureOnly: true},
			{name: "Referrer-Policy", value: "no-referrer", scope: guardedAnswer},
		},
		fallbacks: []string{cspHeader, corpHeader, cacheHeader},
	}
	if ops == nil {
		return rules, nil
	}
	errs := []error{ops.checkTwice()}
	for _, name := range ops.Delete {
		errs = append(errs, rules.leaveOut(textproto.CanonicalMIMEHeaderKey(name)))
	}
	for _, name := range slices.Sorted(maps.Keys(ops.Set)) {
		errs = append(errs, rules.set(textproto.CanonicalMIMEHeaderKey(name), ops.Set[name]))
	}
	return rules, errors.Join(errs...)
}

// checkTwice refuses what would depend on the order of a map.
func (o *HeaderOps) checkTwice() error {
	seen := make(map[string]bool)
	for _, name := range slices.Concat(slices.Sorted(maps.Keys(o.Set)), o.Delete) {
		name = textproto.CanonicalMIMEHeaderKey(name)
		if seen[name] {
			return fmt.Errorf("headers: %s is listed twice: expected each name once, to set or to leave out", name)
		}
		seen[name] = true
	}
	return nil
}

func (h *headerRules) leaveOut(name string) error {
	enforced := slices.DeleteFunc(h.enforced, func(e enforcedHeader) bool { return e.name == name })
	fallbacks := slices.DeleteFunc(h.fallbacks, func(f string) bool { return f == name })
	if len(enforced) == len(h.enforced) && len(fallbacks) == len(h.fallbacks) {
		return fmt.Errorf("headers: -%s: expected one of the guard's security headers", hide(name))
	}
	h.enforced, h.fallbacks = enforced, fallbacks
	return nil
}

func (h *headerRules) set(name, value string) error {
	if strings.IndexAny(name, "+-?>") == 0 { // as in Caddy's header directive
		return fmt.Errorf("headers: %q: expected a plain name, whose value replaces others", hide(name))
	}
	if !httpguts.ValidHeaderFieldName(name) {
		return fmt.Errorf("headers: %q: expected a header name", hide(name))
	}
	if isGuardHeader(name) {
		return fmt.Errorf("headers: %s is set by the guard or the server and can't be changed here", name)
	}
	resolved, err := caddy.NewReplacer().ReplaceOrErr(value, true, true)
	if err != nil {
		return fmt.Errorf("headers: %s: %w", name, err)
	}
	if !httpguts.ValidHeaderFieldValue(resolved) {
		return fmt.Errorf("headers: %s: expected a valid header value", name)
	}
	for i := range h.enforced {
		if h.enforced[i].name == name {
			h.enforced[i].value = resolved
			return nil
		}
	}
	h.enforced = append(h.enforced, enforcedHeader{name: name, value: resolved, scope: guardedAnswer})
	return nil
}

// isGuardHeader tells names that `headers` must not touch: they are limits,
// identity or CORS, or belong to the connection.
func isGuardHeader(name string) bool {
	switch name {
	case "Connection", "Content-Length", "Date", "Keep-Alive", "Retry-After", "Retry-After-Ms", "Te", "Trailer",
		"Transfer-Encoding", "Upgrade", "Vary", "Www-Authenticate", "X-Request-Id", "X-Should-Retry":
		return true
	}
	return isUpstreamAccount(name) || strings.HasPrefix(name, "Access-Control-")
}

// answer is what the guard puts on one response.
type answer struct {
	guard   *Guard
	route   route
	dialect dialect // of the caller
	secure  bool    // HSTS may be sent
	keyed   bool    // a valid key was used
	origin  string  // allowed CORS origin
	tier    *tier   // with verdict: limit headers are due
	verdict window.Verdict

	finished   bool
	unseen     bool       // others write the body
	operator   [][]string // values that were there before the guard: of the enforced headers, then of the fallbacks
	serverName string     // operator's Server header

	// Header values, to the caller and to the backend, live in the request's own
	// memory: Caddy's header directives replace within slices in place, so none
	// may be shared between requests.
	arena [21]string
	used  int
}

func (a *answer) value(s string) []string {
	if a.used == len(a.arena) {
		return []string{s}
	}
	slot := a.arena[a.used : a.used+1 : a.used+1]
	a.used++
	slot[0] = s
	return slot
}

// begin puts the enforced headers on the response at once. A value that is
// there already was set by the operator in front of the guard, and stays.
func (a *answer) begin(h http.Header) {
	if server := h["Server"]; len(server) > 0 && a.route != open {
		if server[0] != caddyhttp.ServerHeader {
			a.serverName = server[0]
		}
		delete(h, "Server")
	}
	rules := a.guard.header.enforced
	for i := range rules {
		if there := h[rules[i].name]; len(there) > 0 {
			a.keep(i, there)
		} else if !a.skips(&rules[i]) {
			h[rules[i].name] = a.value(rules[i].value)
		}
	}
	if a.route == open {
		return
	}
	for i, name := range a.guard.header.fallbacks {
		if there := h[name]; len(there) > 0 {
			a.keep(len(rules)+i, there)
		}
	}
	a.appendVary(h)
}

// keep remembers what the operator set, against the backend's values that a
// proxy adds beside it.
func (a *answer) keep(i int, values []string) {
	if a.operator == nil {
		a.operator = make([][]string, len(a.guard.header.enforced)+len(a.guard.header.fallbacks))
	}
	a.operator[i] = slices.Clone(values)
}

// finish runs once, when the final status is known: it takes out what the
// backend must not tell, and puts right what it changed.
func (a *answer) finish(h http.Header) {
	if a.finished {
		return
	}
	a.finished = true
	if a.route != open {
		a.dropBackendHeaders(h)
		a.dropTrailerNames(h)
		if a.serverName != "" {
			h["Server"] = a.value(a.serverName)
		}
	}
	rules := a.guard.header.enforced
	for i := range rules {
		now := h[rules[i].name]
		switch {
		case a.operator != nil && a.operator[i] != nil:
			if !slices.Equal(now, a.operator[i]) {
				h[rules[i].name] = a.operator[i]
			}
		case a.skips(&rules[i]):
			if rules[i].secureOnly {
				delete(h, rules[i].name) // nor may the backend send it here
			}
		case len(now) != 1 || now[0] != rules[i].value:
			h[rules[i].name] = a.value(rules[i].value)
		}
	}
	if a.route == open {
		return
	}
	a.appendVary(h)
	a.setFallbacks(h)
	if a.tier != nil {
		a.setLimits(h)
	}
	if a.origin != "" {
		a.guard.cors.actual(a.origin, h)
	}
}

func (a *answer) dropBackendHeaders(h http.Header) {
	if a.route == open {
		return
	}
	for name := range h {
		if a.drops(name) {
			delete(h, name)
		}
	}
}

// dropTrailerNames keeps what may not be a header from being a trailer.
func (a *answer) dropTrailerNames(h http.Header) {
	lines, ok := h["Trailer"]
	if !ok {
		return
	}
	var kept []string
	for _, line := range lines {
		for name := range strings.SplitSeq(line, ",") {
			if name = strings.TrimSpace(name); name != "" && !a.drops(name) {
				kept = append(kept, name)
			}
		}
	}
	if len(kept) == 0 {
		delete(h, "Trailer")
		return
	}
	h["Trailer"] = []string{strings.Join(kept, ", ")}
}

// finishTrailers does the same for trailers that nobody announced, which
// handlers add to the header map after the body.
func (a *answer) finishTrailers(h http.Header) {
	if a.route == open {
		return
	}
	for name := range h {
		if trailer, ok := strings.CutPrefix(name, http.TrailerPrefix); ok && a.drops(trailer) {
			delete(h, name)
		}
	}
}

func (a *answer) skips(rule *enforcedHeader) bool {
	return rule.secureOnly && !a.secure || rule.scope == guardedAnswer && a.route == open
}

func (a *answer) setFallbacks(h http.Header) {
	for i, name := range a.guard.header.fallbacks {
		if a.operator != nil && a.operator[len(a.guard.header.enforced)+i] != nil {
			h[name] = a.operator[len(a.guard.header.enforced)+i]
			continue
		}
		if len(h[name]) > 0 {
			continue
		}
		switch {
		case name == cspHeader && (a.unseen || isPage(h["Content-Type"])):
			h[name] = a.value(pagePolicy)
		case name == cspHeader:
			h[name] = a.value(apiPolicy)
		case name == corpHeader:
			h[name] = a.value("same-origin")
		case a.keyed: // Cache-Control
			h[name] = a.value("no-store")
		}
	}
}

func isPage(contentType []string) bool {
	if len(contentType) == 0 {
		return false
	}
	mediaType, _, _ := strings.Cut(contentType[0], ";")
	switch strings.ToLower(strings.TrimSpace(mediaType)) {
	case "text/html", "application/xhtml+xml", "image/svg+xml":
		return true
	}
	return false
}

// appendVary adds to Vary, which others write too (encode appends to it).
func (a *answer) appendVary(h http.Header) {
	vary := a.guard.vary[a.route]
	there := h["Vary"]
	switch {
	case vary == "" || slices.Contains(there, vary):
	case len(there) == 0:
		h["Vary"] = a.value(vary)
	default:
		h["Vary"] = append(slices.Clip(there), vary)
	}
}

// setLimits writes the limit headers. They all speak of one window, the one
// with the fewest requests left, and of one reading of it.
func (a *answer) setLimits(h http.Header) {
	words := &a.tier.words[a.verdict.Limit]
	resetSeconds := ceilSeconds(a.verdict.Reset)

	// One string holds every number: an allocation a request, not five.
	var buf [96]byte
	text := strconv.AppendInt(buf[:0], int64(a.verdict.Remaining), 10)
	remaining := len(text)
	text = strconv.AppendInt(text, resetSeconds, 10)
	reset := len(text)
	text = append(text, '"')
	text = append(text, words.label...)
	text = append(text, `";r=`...)
	text = append(text, text[:remaining]...)
	text = append(text, ";t="...)
	text = append(text, text[remaining:reset]...)
	all := string(text)

	h["X-Ratelimit-Limit"] = a.value(words.limit)
	h["X-Ratelimit-Remaining"] = a.value(all[:remaining])
	h["X-Ratelimit-Reset"] = a.value(all[remaining:reset])
	h["X-Ratelimit-Tier"] = a.value(a.tier.name)
	h["Ratelimit-Policy"] = a.value(a.tier.policy)
	h["Ratelimit"] = a.value(all[reset:])

	switch a.dialect {
	case dialectOpenAI:
		h["X-Ratelimit-Limit-Requests"] = a.value(words.limit)
		h["X-Ratelimit-Remaining-Requests"] = a.value(all[:remaining])
		h["X-Ratelimit-Reset-Requests"] = a.value(ceilTo(a.verdict.Reset, time.Millisecond).String())
	case dialectAnthropic:
		// time.Add keeps sub-seconds; rounding up never promises a place too early.
		at := a.guard.clock.wall().Add(a.verdict.Reset + time.Second - 1).UTC()
		h["Anthropic-Ratelimit-Requests-Limit"] = a.value(words.limit)
		h["Anthropic-Ratelimit-Requests-Remaining"] = a.value(all[:remaining])
		h["Anthropic-Ratelimit-Requests-Reset"] = a.value(at.Format(time.RFC3339))
	}
}

func ceilTo(d, unit time.Duration) time.Duration { return (d + unit - 1).Truncate(unit) }

func ceilSeconds(d time.Duration) int64 { return int64(ceilTo(d, time.Second) / time.Second) }

// drops tells which headers of the backend do not reach the caller.
func (a *answer) drops(name string) bool {
	if name == "" {
		return false
	}
	switch name[0] | 0x20 {
	case 's':
		return strings.EqualFold(name, "Server")
	case 'v':
		return strings.EqualFold(name, "Via")
	case 'a':
		if hasFoldedPrefix(name, "access-control-") {
			// An Access-Control-Allow-Origin: * of the backend would undo the list.
			return !a.guard.corsBackend
		}
	}
	return isUpstreamAccount(name) || strings.EqualFold(name, "X-Powered-By")
}

// isUpstreamAccount tells headers that speak of the operator's account at a
// provider, or that a caller would take for the guard's own.
func isUpstreamAccount(name string) bool {
	switch name[0] | 0x20 {
	case 'a':
		return hasFoldedPrefix(name, "anthropic-ratelimit-") || strings.EqualFold(name, "anthropic-organization-id")
	case 'o':
		return strings.EqualFold(name, "openai-organization") || strings.EqualFold(name, "openai-project")
	case 'r':
		return strings.EqualFold(name, "ratelimit") || hasFoldedPrefix(name, "ratelimit-")
	case 'x':
		return hasFoldedPrefix(name, "x-ratelimit-") || hasFoldedPrefix(name, identityPrefix)
	}
	return false
}

// isSecure tells whether HSTS may be sent: over TLS, or over a trusted proxy
// that says so, and never for a name that means "this machine" to everyone.
func isSecure(r *http.Request) bool {
	if r.TLS == nil {
		trusted, _ := caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey).(bool)
		if !trusted || !strings.EqualFold(r.Header.Get("X-Forwarded-Proto"), "https") {
			return false
		}
	}
	return !isLocalName(r.Host)
}

// isLocalName tells localhost names and IP addresses, with or without a port.
func isLocalName(host string) bool {
	if host == "" || host[0] == '[' {
		return true
	}
	if i := strings.LastIndexByte(host, ':'); i >= 0 {
		host = host[:i]
	}
	host = strings.TrimSuffix(host, ".")
	label := host[strings.LastIndexByte(host, '.')+1:]
	if strings.EqualFold(label, "localhost") {
		return true
	}
	// No top-level domain is a number, so a last label of digits is IPv4.
	return strings.Trim(label, "0123456789") == ""
}

// hasFoldedPrefix compares with a lower-case prefix; `_` and `.` in name count
// as `-`, as CGI and WSGI servers fold them (GHSA-f59h-q822-g45g).
func hasFoldedPrefix(name, prefix string) bool {
	if len(name) < len(prefix) {
		return false
	}
	for i := 0; i < len(prefix); i++ {
		c := name[i]
		switch {
		case 'A' <= c && c <= 'Z':
			c |= 0x20
		case c == '_' || c == '.':
			c = '-'
		}
		if c != prefix[i] {
			return false
		}
	}
	return true
}
