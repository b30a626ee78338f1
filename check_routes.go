package zejzlauth

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// routeWalk follows requests through the routes of a configuration, to find
// the guards that a rewrite lets them past: a request that a guard doesn't
// mind has its path changed, and comes to a backend that the guard protects.
type routeWalk struct {
	guards     []string // their places
	unanswered []string // of them: errors caddy, and no error routes
	evasions   []evasion
	behind     map[string]bool // backends that have a guard in front
	err        error

	// of the server being walked
	name        string
	namedRoutes map[string]caddyhttp.Route
	invoking    []string
	errorRoutes bool
}

// evasion is a way past a guard to backends.
type evasion struct {
	guard string
	miss
	backends []string
}

// miss is how requests without a key get past a guard.
type miss struct {
	narrowed  bool   // by protect; else by the matcher of a route
	rewritten string // where they are rewritten; empty: nowhere
}

// flow is what the requests that come to a place may have met.
type flow struct {
	ended     bool            // there are none
	guarded   bool            // all of them met a guard that protects every path
	passed    bool            // some met a guard
	rewritten string          // where some are rewritten
	missed    map[string]miss // guards that some got past
}

func (f flow) join(o flow) flow {
	if f.ended {
		return o
	}
	if o.ended {
		return f
	}
	f.guarded = f.guarded && o.guarded
	f.passed = f.passed || o.passed
	f.rewritten = firstOf(f.rewritten, o.rewritten)
	for guard, m := range o.missed {
		f = f.past(m, guard)
	}
	return f
}

// past adds guards that some requests got past.
func (f flow) past(m miss, guards ...string) flow {
	if f.guarded || len(guards) == 0 {
		return f
	}
	missed := make(map[string]miss)
	maps.Copy(missed, f.missed)
	for _, guard := range guards {
		m.rewritten = firstOf(missed[guard].rewritten, m.rewritten)
		missed[guard] = m
	}
	f.missed = missed
	return f
}

func (f flow) rewrite(at string) flow {
	f.rewritten = firstOf(f.rewritten, at)
	for guard, m := range f.missed {
		m.rewritten = at
		f = f.past(m, guard)
	}
	return f
}

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func (w *routeWalk) server(name string, s *checkedServer) {
	w.name, w.namedRoutes, w.errorRoutes = name, s.NamedRoutes, len(s.Errors.Routes) > 0
	before := w.unanswered
	w.routes(routeList{at: name, routes: s.Routes}, flow{})
	w.routes(routeList{at: name + ".errors", routes: s.Errors.Routes}, flow{})
	for _, route := range slices.Sorted(maps.Keys(s.NamedRoutes)) {
		w.routes(w.namedRoute(route), flow{})
	}
	if w.errorRoutes {
		w.unanswered = before
	}
}

// routeList is a list of routes, or one named route, and its place.
type routeList struct {
	at     string
	named  bool
	routes []caddyhttp.Route
}

func (w *routeWalk) namedRoute(name string) routeList {
	return routeList{w.name + ".named_routes." + name, true, []caddyhttp.Route{w.namedRoutes[name]}}
}

// place is that of a route in the adapted JSON, with its hosts.
func (l routeList) place(i int) string {
	if l.named {
		return l.at
	}
	at := fmt.Sprintf("%s.routes[%d]", l.at, i)
	for _, set := range l.routes[i].MatcherSetsRaw {
		var hosts []string
		if json.Unmarshal(set["host"], &hosts) == nil && len(hosts) > 0 {
			return at + "(" + strings.Join(hosts, " ") + ")"
		}
	}
	return at
}

func (w *routeWalk) routes(l routeList, f flow) flow {
	for i, route := range l.routes {
		hit := f
		if route.Group != "" { // only one route of a group takes a request
			for j, other := range l.routes {
				if j != i && other.Group == route.Group {
					hit = hit.past(miss{}, w.guardsOf(other, l.place(j))...)
				}
			}
		}
		for j, handler := range route.HandlersRaw {
			hit = w.handler(handler, handlerPlace(l.place(i), j), hit)
		}
		hit.ended = hit.ended || route.Terminal
		switch {
		case dependsOnPath(route):
			f = f.past(miss{}, w.guardsOf(route, l.place(i))...).join(hit)
		case route.Group != "" || len(route.MatcherSetsRaw) > 0:
			f = f.join(hit)
		default:
			f = hit
		}
	}
	return f
}

func handlerPlace(at string, i int) string { return fmt.Sprintf("%s.handle[%d]", at, i) }

// dependsOnPath tells whether the route may miss a request for what a rewrite
// changes: its path, query or method.
func dependsOnPath(route caddyhttp.Route) bool {
	for _, set := range route.MatcherSetsRaw {
		for matcher := range set {
			switch matcher {
			case "host", "protocol", "tls", "remote_ip", "client_ip", "header", "header_regexp":
			default:
				return true
			}
		}
	}
	return false
}

// guardsOf finds the guards in a route, at any depth.
func (w *routeWalk) guardsOf(route caddyhttp.Route, at string) []string {
	var guards []string
	for i, raw := range route.HandlersRaw {
		at := handlerPlace(at, i)
		h := w.decode(raw, at)
		if h.Handler == "zejzl_auth" {
			guards = append(guards, at)
		}
		w.inner(h, at, func(l routeList) {
			for j, route := range l.routes {
				guards = append(guards, w.guardsOf(route, l.place(j))...)
			}
		})
	}
	return guards
}

// checkedHandler is what the check reads of the handlers it knows.
type checkedHandler struct {
	Handler string `json:"handler"`

	Protect []string        `json:"protect"` // zejzl_auth
	Errors  json.RawMessage `json:"errors"`  // zejzl_auth: its dialect; subroute: routes

	Name           string            `json:"name"` // invoke
	Routes         []caddyhttp.Route `json:"routes"`
	HandleResponse []struct {
		Routes []caddyhttp.Route `json:"routes"`
	} `json:"handle_response"`

	Rewrite   *checkedRewrite `json:"rewrite"` // reverse_proxy
	Upstreams []struct {
		Dial string `json:"dial"`
	} `json:"upstreams"`

	PassThru bool `json:"pass_thru"` // file_server
}

// checkedRewrite is a rewrite without what changes only the query.
type checkedRewrite struct {
	Method          string            `json:"method"`
	URI             string            `json:"uri"`
	StripPathPrefix string            `json:"strip_path_prefix"`
	StripPathSuffix string            `json:"strip_path_suffix"`
	URISubstring    []json.RawMessage `json:"uri_substring"`
	PathRegexp      []json.RawMessage `json:"path_regexp"`
}

func (r *checkedRewrite) changesPath() bool {
	return r != nil && (r.Method != "" || r.URI != "" && r.URI[0] != '?' || r.StripPathPrefix != "" || r.StripPathSuffix != "" ||
		len(r.URISubstring) > 0 || len(r.PathRegexp) > 0)
}

// decode reads a handler. Handlers that the check doesn't know may use the
// same names for other things.
func (w *routeWalk) decode(raw json.RawMessage, at string) checkedHandler {
	var h checkedHandler
	err := json.Unmarshal(raw, &h)
	switch h.Handler {
	case "zejzl_auth", "rewrite", "subroute", "invoke", "reverse_proxy", "file_server", "intercept", "":
		if err != nil && w.err == nil {
			w.err = fmt.Errorf("decoding %s: %w", at, err)
		}
	}
	return h
}

// inner visits the routes within a handler.
func (w *routeWalk) inner(h checkedHandler, at string, visit func(routeList)) {
	visit(routeList{at: at, routes: h.Routes})
	for i, response := range h.HandleResponse {
		visit(routeList{at: fmt.Sprintf("%s.handle_response[%d]", at, i), routes: response.Routes})
	}
	if h.Handler == "invoke" && !slices.Contains(w.invoking, h.Name) {
		w.invoking = append(w.invoking, h.Name)
		visit(w.namedRoute(h.Name))
		w.invoking = w.invoking[:len(w.invoking)-1]
	}
}

func (w *routeWalk) handler(raw json.RawMessage, at string, f flow) flow {
	h := w.decode(raw, at)
	switch h.Handler {
	case "zejzl_auth":
		return w.guard(h, at, f)
	case "subroute", "invoke":
		w.inner(h, at, func(l routeList) { f = w.routes(l, f) })
		w.subrouteErrors(h, at)
		return f
	case "rewrite":
		var r checkedRewrite
		if err := json.Unmarshal(raw, &r); err != nil && w.err == nil {
			w.err = fmt.Errorf("decoding %s: %w", at, err)
		}
		if r.changesPath() {
			f = f.rewrite(at)
		}
	case "reverse_proxy":
		sent := f
		if h.Rewrite.changesPath() {
			sent = f.rewrite(at)
		}
		w.backend(sent, dials(h)...)
		f.ended = f.ended || len(h.HandleResponse) == 0
	case "file_server":
		w.backend(f, h.Handler)
		f.ended = f.ended || !h.PassThru
	case "static_response", "error":
		f.ended = true
	case "acme_server", "authentication", "copy_response", "copy_response_headers", "encode", "headers", "intercept", "log_append",
		"map", "metrics", "push", "request_body", "templates", "timeouts", "tracing", "vars": // none of them serves by path
	default:
		w.backend(f, h.Handler) // it may
	}
	w.inner(h, at, func(l routeList) { f = f.join(w.routes(l, f)) })
	return f
}

func (w *routeWalk) subrouteErrors(h checkedHandler, at string) {
	var handlers struct {
		Routes []caddyhttp.Route `json:"routes"`
	}
	if len(h.Errors) == 0 {
		return
	}
	if err := json.Unmarshal(h.Errors, &handlers); err != nil && w.err == nil {
		w.err = fmt.Errorf("decoding %s.errors: %w", at, err)
	}
	w.errorRoutes = w.errorRoutes || len(handlers.Routes) > 0
	w.routes(routeList{at: at + ".errors", routes: handlers.Routes}, flow{})
}

func (w *routeWalk) guard(h checkedHandler, at string, f flow) flow {
	if !slices.Contains(w.guards, at) { // a named route is walked more than once
		w.guards = append(w.guards, at)
		if string(h.Errors) == `"caddy"` {
			w.unanswered = append(w.unanswered, at)
		}
	}
	f.passed = true
	if len(h.Protect) == 0 || slices.Contains(h.Protect, "/*") {
		f.guarded, f.missed = true, nil
		return f
	}
	// What it compares is the path as sent, so an earlier rewrite counts too.
	return f.past(miss{narrowed: true, rewritten: f.rewritten}, at)
}

// backend notes what requests can do at a backend, known by names.
func (w *routeWalk) backend(f flow, names ...string) {
	if f.ended {
		return
	}
	for _, name := range names {
		w.behind[name] = w.behind[name] || f.passed
	}
	for _, guard := range slices.Sorted(maps.Keys(f.missed)) {
		if m := f.missed[guard]; m.rewritten != "" {
			w.evasions = append(w.evasions, evasion{guard, m, names})
		}
	}
}

const unknownBackend = ""

// dials returns the backends of a reverse_proxy in one spelling.
func dials(h checkedHandler) []string {
	if len(h.Upstreams) == 0 {
		return []string{unknownBackend}
	}
	var names []string
	for _, upstream := range h.Upstreams {
		host, port, err := net.SplitHostPort(upstream.Dial)
		switch {
		case strings.Contains(upstream.Dial, "{"):
			names = append(names, unknownBackend)
		case err == nil && (host == "" || isLoopback(host)):
			names = append(names, "localhost:"+port)
		default:
			names = append(names, strings.ToLower(upstream.Dial))
		}
	}
	return names
}

// reachesProtected tells whether one of the backends may have a guard in front.
func (w *routeWalk) reachesProtected(backends []string) bool {
	return w.behind[unknownBackend] || slices.ContainsFunc(backends, func(name string) bool {
		return name == unknownBackend || w.behind[name]
	})
}

const safeForm = "let the guard see all that the backend gets, with the rewrite inside: handle /api/* { zejzl_auth; reverse_proxy ... }"

func (w *routeWalk) report() []finding {
	if len(w.guards) == 0 {
		return []finding{{"configuration", "there is no zejzl_auth guard in it", "put zejzl_auth in front of what needs a key"}}
	}
	var findings []finding
	var reported []string
	for _, e := range w.evasions {
		if slices.Contains(reported, e.guard) || !w.reachesProtected(e.backends) {
			continue
		}
		reported = append(reported, e.guard)
		what := "requests of other paths don't meet this guard, and " + e.rewritten +
			" rewrites them: they can reach the same backend by a path that needs a key"
		if e.narrowed {
			what = "protect leaves paths open, and " + e.rewritten +
				" rewrites requests: what was open as sent can reach the backend by a path that needs a key"
		}
		findings = append(findings, finding{e.guard, what, safeForm})
	}
	for _, guard := range w.unanswered {
		findings = append(findings, finding{guard, "errors caddy leaves refusals to handle_errors, and there is none: they have no body", "add handle_errors, or drop errors caddy"})
	}
	return findings
}
