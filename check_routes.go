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
// guards that a rewrite lets them past: a request whose path no guard minds is
// rewritten, and comes to a backend that a guard was to protect.
type routeWalk struct {
	guards   []string // places
	caddy    []string // of them, without an answer to errors caddy
	evasions []evasion
	behind   map[string]bool // backends that a guard stands in front of
	err      error

	// of the server and site being walked
	named       map[string]caddyhttp.Route
	invoking    []string
	errorRoutes bool
	site        string
}

// evasion is a way past a guard to backends.
type evasion struct {
	guard string
	miss
	backends []string
}

// miss is a request that a guard let pass or did not see.
type miss struct {
	narrowed  bool   // by protect; else by the matcher of a route
	rewritten string // where its path was changed, so that it may be another's
}

// flow is what requests may have gone through when they come to a place.
type flow struct {
	ended     bool // none comes here
	guarded   bool // all have a key, or sent a public path
	passed    bool // some went through a guard
	rewritten string
	missed    map[string]miss // by guard
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
	missed := maps.Clone(o.missed)
	if missed == nil {
		missed = make(map[string]miss)
	}
	for guard, m := range f.missed {
		m.rewritten = firstOf(m.rewritten, missed[guard].rewritten)
		missed[guard] = m
	}
	f.missed = missed
	return f
}

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// past is the flow of the requests that did not meet these guards.
func (f flow) past(m miss, guards ...string) flow {
	if f.guarded || len(guards) == 0 {
		return f
	}
	missed := make(map[string]miss)
	for _, guard := range guards {
		missed[guard] = m
	}
	return f.join(flow{missed: missed})
}

func (f flow) rewrite(at string) flow {
	f.rewritten = firstOf(f.rewritten, at)
	f.missed = maps.Clone(f.missed)
	for guard, m := range f.missed {
		m.rewritten = firstOf(m.rewritten, at)
		f.missed[guard] = m
	}
	return f
}

func (w *routeWalk) server(name string, s *checkedServer) {
	w.named, w.errorRoutes = s.NamedRoutes, len(s.Errors.Routes) > 0
	first := len(w.caddy)
	var f flow
	for i, route := range s.Routes {
		w.site = siteOf(route)
		f = w.route(route, place(name, i), f)
	}
	w.site = ""
	w.routes(s.Errors.Routes, name+".errors", flow{})
	for _, named := range slices.Sorted(maps.Keys(s.NamedRoutes)) {
		w.route(s.NamedRoutes[named], name+".named_routes."+named, flow{})
	}
	if w.errorRoutes {
		w.caddy = w.caddy[:first]
	}
}

func place(at string, i int) string { return fmt.Sprintf("%s.routes[%d]", at, i) }
