package zejzlauth

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// routeWalk follows requests through the routes of a configuration, to find
// the guards that they get past: requests without a key that come to a backend
// that the guard protects.
type routeWalk struct {
	guards     []string // their places
	unanswered []string // of them: errors caddy, and no error routes
	evasions   []evasion
	behind     map[backend][]string // guards in front
	logged     []string             // places of log_append with a credential
	err        error

	// of the server being walked
	name        string
	namedRoutes map[string]caddyhttp.Route
	invoking    []string
	errorRoutes bool
	failed      flow // what comes to the error routes
}

// backend is what answers requests: a handler, and the address of a proxy's
// upstream or the root of files.
type backend struct{ handler, address string }

// unknown tells a proxy that may send to any address.
func (b backend) unknown() bool {
	return b.handler == "reverse_proxy" && strings.Contains(b.address, "{")
}

// evasion is a way past a guard to backends.
type evasion struct {
	guard string
	miss
	backends []backend
}

// missKind is what let a request past a guard.
type missKind uint8

const (
	notMissed missKind = iota
	byProtect          // the guard itself, which judges strictly
	byMethod           // a matcher of method or query
	byRefusal          // errors caddy: an error route takes the request
	byMatcher          // a matcher of paths, which may read them otherwise than the backend
)

// miss is how requests without a key get past a guard.
type miss struct {
	kind      missKind
	rewritten string // where they are rewritten; empty: nowhere
}

// flow is what the requests that come to a place may have met.
type flow struct {
	ended     bool            // there are none
	failed    bool            // all of them come from an error
	guarded   bool            // all of them met a guard that protects every path
	met       []string        // guards that some met
	rewritten string          // where some are rewritten
	missed    map[string]miss // guards that some got past
	roots     []string        // of file servers
}

func (f flow) join(o flow) flow {
	if f.ended {
		return o
	}
	if o.ended {
		return f
	}
	f.failed = f.failed && o.failed
	f.guarded = f.guarded && o.guarded
	f.met = union(f.met, o.met...)
	f.rewritten = firstOf(f.rewritten, o.rewritten)
	f.roots = union(f.roots, o.roots...)
	for guard, m := range o.missed {
		f = f.past(m, guard)
	}
	return f
}

// past adds guards that some requests got past.
func (f flow) past(m miss, guards ...string) flow {
	if f.guarded || m.kind == notMissed || len(guards) == 0 {
		return f
	}
	missed := make(map[string]miss)
	maps.Copy(missed, f.missed)
	for _, guard := range guards {
		old := missed[guard]
		missed[guard] = miss{max(old.kind, m.kind), firstOf(old.rewritten, m.rewritten)}
	}
	f.missed = missed
	return f
}

// forget is the reverse of past.
func (f flow) forget(guards ...string) flow {
	f.missed = maps.Clone(f.missed)
	for _, guard := range guards {
		delete(f.missed, guard)
	}
	return f
}

func (f flow) rewrite(r *checkedRewrite, at string) flow {
	switch {
	case !r.changesPath():
		return f
	case f.failed && r.fixed():
		f.missed = nil // an error page
		return f
	}
	f.rewritten = firstOf(f.rewritten, at)
	for guard, m := range f.missed {
		f = f.past(miss{m.kind, at}, guard)
	}
	return f
}

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// union returns a new slice: flows share theirs.
func union(a []string, b ...string) []string {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

func (w *routeWalk) server(name string, s *checkedServer) {
	w.name, w.namedRoutes, w.errorRoutes = name, s.NamedRoutes, len(s.Errors.Routes) > 0
	before := w.unanswered
	roots := []string{"."}
	w.failed = flow{failed: true, roots: roots}
	w.routes(routeList{at: name, routes: s.Routes}, flow{roots: roots})
	w.routes(routeList{at: name + ".errors", routes: s.Errors.Routes}, w.failed)
	if w.errorRoutes {
		w.unanswered = before
	}
}

// fail notes requests that may come to the error routes.
func (w *routeWalk) fail(f flow) {
	f.failed, f.met = true, nil // error pages are not what a guard protects
	w.failed = w.failed.join(f)
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
	if hosts := hostsOf(l.routes[i]); len(hosts) > 0 {
		at += "(" + strings.Join(hosts, " ") + ")"
	}
	return at
}

func hostsOf(route caddyhttp.Route) []string {
	for _, set := range route.MatcherSetsRaw {
		var hosts []string
		if json.Unmarshal(set["host"], &hosts) == nil && len(hosts) > 0 {
			return hosts
		}
	}
	return nil
}

func (w *routeWalk) routes(l routeList, f flow) flow {
	for i, route := range l.routes {
		hit, later := w.taken(l, i, f)
		for j, handler := range route.HandlersRaw {
			hit = w.handler(handler, handlerPlace(l.place(i), j), hit)
		}
		hit.ended = hit.ended || route.Terminal
		if !hit.ended {
			hit = hit.forget(later...) // they come to these yet
		}
		first := route.Group == "" || !slices.ContainsFunc(l.routes[:i], func(r caddyhttp.Route) bool { return r.Group == route.Group })
		if first && len(route.MatcherSetsRaw) == 0 {
			f = hit
			continue
		}
		f = f.past(miss{kind: missKindOf(route.MatcherSetsRaw)}, w.guardsOf(route, l.place(i))...).join(hit)
	}
	return f
}

// taken is the flow into one route: what the other routes of its group, of
// which only one takes a request, leave over. It gets past their guards, and
// past those that come later unless it goes on.
func (w *routeWalk) taken(l routeList, i int, f flow) (hit flow, later []string) {
	route, hit := l.routes[i], f
	kind := missKindOf(route.MatcherSetsRaw)
	for j, other := range l.routes {
		peer := route.Group != "" && other.Group == route.Group
		switch {
		case j < i && peer:
			hit = hit.past(miss{kind: missKindOf(other.MatcherSetsRaw)}, w.guardsOf(other, l.place(j))...)
			hit.ended = hit.ended || len(other.MatcherSetsRaw) == 0
		case j > i && kind != notMissed && (peer || len(hostsOf(route)) == 0): // other hosts are other sites
			guards := w.guardsOf(other, l.place(j))
			if !peer {
				guards = slices.DeleteFunc(guards, func(guard string) bool { return f.missed[guard] != miss{} })
				later = append(later, guards...)
			}
			hit = hit.past(miss{kind: kind}, guards...)
		}
	}
	return hit, later
}

func handlerPlace(at string, i int) string { return fmt.Sprintf("%s.handle[%d]", at, i) }

// missKindOf tells whether matchers may leave out a request for what it or a
// rewrite chooses: its path, query or method.
func missKindOf(sets []caddy.ModuleMap) (kind missKind) {
	for _, set := range sets {
		for matcher, raw := range set {
			kind = max(kind, matcherMissKind(matcher, raw))
		}
	}
	return kind
}

func matcherMissKind(matcher string, raw json.RawMessage) missKind {
	switch matcher {
	case "host", "protocol", "tls", "remote_ip", "client_ip", "header", "header_regexp":
		return notMissed
	case "method", "query":
		return byMethod
	case "path":
		var paths []string
		if json.Unmarshal(raw, &paths) == nil && (slices.Contains(paths, "/*") || slices.Contains(paths, "*")) {
			return notMissed
		}
	case "not":
		var sets []caddy.ModuleMap
		if json.Unmarshal(raw, &sets) == nil {
			return missKindOf(sets)
		}
	}
	return byMatcher
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
		return w.subroute(h, at, f)
	case "rewrite":
		var r checkedRewrite
		if err := json.Unmarshal(raw, &r); err != nil && w.err == nil {
			w.err = fmt.Errorf("decoding %s: %w", at, err)
		}
		f = f.rewrite(&r, at)
	case "vars":
		if h.Root != "" {
			f.roots = []string{h.Root}
		}
	case "reverse_proxy":
		w.fail(f)
		subrequest := len(h.HandleResponse) > 0 && h.Rewrite.fixed() // nobody can steer it
		if !subrequest {
			w.backend(f.rewrite(h.Rewrite, at), proxied(h)...)
		}
		f.ended = f.ended || len(h.HandleResponse) == 0
	case "file_server":
		w.fail(f)
		w.backend(f, files(h, f.roots)...)
		f.ended = f.ended || !h.PassThru
	case "static_response", "error", "metrics":
		if h.Handler == "error" {
			w.fail(f)
		}
		w.protects(f, backend{handler: h.Handler})
		f.ended = true
	case "acme_server", "copy_response":
		w.protects(f, backend{handler: h.Handler})
	case "log_append":
		if namesCredential(h.Value) && !dropsField(h.Key, false) && !slices.Contains(w.logged, at) {
			w.logged = append(w.logged, at)
		}
	case "authentication":
		w.fail(f)
	case "copy_response_headers", "encode", "headers", "intercept", "map", "push", "request_body",
		"templates", "timeouts", "tracing": // none of them answers by itself
	default:
		w.fail(f)
		w.backend(f, backend{handler: h.Handler}) // it may
	}
	w.inner(h, at, func(l routeList) { f = f.join(w.routes(l, f)) })
	return f
}

// subroute walks the routes of a subroute or invoke. What fails in them comes
// to the subroute's error routes, if it has any, and goes on behind these.
func (w *routeWalk) subroute(h checkedHandler, at string, f flow) flow {
	var handlers struct {
		Routes []caddyhttp.Route `json:"routes"`
	}
	if len(h.Errors) == 0 {
		w.inner(h, at, func(l routeList) { f = w.routes(l, f) })
		return f
	}
	if err := json.Unmarshal(h.Errors, &handlers); err != nil && w.err == nil {
		w.err = fmt.Errorf("decoding %s.errors: %w", at, err)
	}
	w.errorRoutes = w.errorRoutes || len(handlers.Routes) > 0
	outer := w.failed
	w.failed = flow{ended: true}
	w.inner(h, at, func(l routeList) { f = w.routes(l, f) })
	failed := w.failed
	w.failed = outer
	return f.join(w.routes(routeList{at: at + ".errors", routes: handlers.Routes}, failed))
}

func (w *routeWalk) guard(h checkedHandler, at string, f flow) flow {
	if !slices.Contains(w.guards, at) { // a named route is walked more than once
		w.guards = append(w.guards, at)
		if string(h.Errors) == `"caddy"` {
			w.unanswered = append(w.unanswered, at)
		}
	}
	if string(h.Errors) == `"caddy"` {
		w.fail(f.past(miss{kind: byRefusal}, at))
	}
	f.met = union(f.met, at)
	if len(h.Protect) == 0 || slices.Contains(h.Protect, "/*") {
		f.guarded, f.missed = true, nil
		return f
	}
	// What it compares is the path as sent, so an earlier rewrite counts too.
	return f.forget(at).past(miss{byProtect, f.rewritten}, at)
}

// protects notes the guards in front of backends.
func (w *routeWalk) protects(f flow, backends ...backend) {
	if f.ended {
		return
	}
	for _, b := range backends {
		w.behind[b] = union(w.behind[b], f.met...)
	}
}

// backend notes what requests can do at backends.
func (w *routeWalk) backend(f flow, backends ...backend) {
	if f.ended {
		return
	}
	w.protects(f, backends...)
	for _, guard := range slices.Sorted(maps.Keys(f.missed)) {
		if m := f.missed[guard]; m.rewritten != "" || m.kind >= byRefusal {
			w.evasions = append(w.evasions, evasion{guard, m, backends})
		}
	}
}

// proxied returns the backends of a reverse_proxy in one spelling.
func proxied(h checkedHandler) []backend {
	if len(h.Upstreams) == 0 {
		return []backend{{h.Handler, "{" + string(h.DynamicUpstreams) + "}"}}
	}
	var backends []backend
	for _, upstream := range h.Upstreams {
		address := upstream.Dial
		host, port, err := net.SplitHostPort(address)
		switch {
		case strings.Contains(address, "{"): // names in it may differ by case
		case err == nil && (host == "" || isLoopback(host)):
			address = "localhost:" + port
		default:
			address = strings.ToLower(address)
		}
		backends = append(backends, backend{h.Handler, address})
	}
	return backends
}

// files returns the backends of a file_server, by its roots.
func files(h checkedHandler, roots []string) []backend {
	if h.Root != "" && h.Root != "{http.vars.root}" {
		roots = []string{h.Root}
	}
	var backends []backend
	for _, root := range roots {
		backends = append(backends, backend{h.Handler, filepath.Clean(root)})
	}
	return backends
}
