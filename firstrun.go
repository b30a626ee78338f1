package zejzlauth

import (
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/rewrite"
	"github.com/caddyserver/caddy/v2/modules/caddypki"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
	"github.com/caddyserver/certmagic"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

// developmentKey is the key of a process in development mode that has no
// other. It lives until the process ends; its secret is printed once and kept
// as its digest only. No fixed key exists anywhere.
var developmentKey struct {
	sync.Mutex
	digest key.Digest
	made   bool
}

const developmentKeyName = "development"

func (a *App) wantsDevelopmentKey() bool {
	return a.development && len(a.env) == 0 && len(a.guardKeys) == 0 && len(a.files) == 0
}

// addDevelopmentKey makes the process's development key, unless an earlier
// configuration did, and lets it in.
func (a *App) addDevelopmentKey(sites []guardSite) {
	developmentKey.Lock()
	defer developmentKey.Unlock()
	if !developmentKey.made {
		secret := key.Generate()
		developmentKey.digest, developmentKey.made = key.Sum(secret), true
		// Should another app yet fail to start, a new process ends with its key,
		// and one that lives on takes the key that it printed.
		url, rootCert := firstTry(a.ctx, sites)
		printDevelopmentKey(os.Stderr, secret, url, rootCert)
	}
	set := key.NewSet(1)
	k, err := set.Add(key.Located{
		Record: key.Record{Name: developmentKeyName, Secrets: []key.Secret{{Digest: developmentKey.digest}}},
		Place:  key.Place{Source: "development mode", Index: -1},
	})
	if err != nil { // one key can't contradict itself
		panic(err)
	}
	a.keyring.Replace(set, []*key.Key{k})
	a.keyState.Store(&keyState{development: 1})
}

const (
	firstPath = "/v1/chat/completions"
	firstBody = `{"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}`
)

// printDevelopmentKey shows the key with a line that works as it stands. It
// goes to the terminal past the logs, which keep what they are given.
func printDevelopmentKey(w io.Writer, secret, url, rootCert string) {
	fmt.Fprintf(w, "\nzejzl_auth: development mode. This key works until the process ends and is not shown again:\n\n  %s\n", secret)
	if url != "" {
		trust := ""
		if rootCert != "" {
			trust = " --cacert " + shellQuote(rootCert)
		}
		fmt.Fprintf(w, "\nTry it:\n\n  curl%s -i %s -H 'X-API-Key: %s' -H 'Content-Type: application/json' -d '%s'\n",
			trust, shellQuote(url), secret, firstBody)
	}
	fmt.Fprintln(w)
}

func shellQuote(s string) string {
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/:._-") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// firstTry finds the first site with a URL to try, and the root certificate
// that curl needs for it: with one, curl trusts no other.
func firstTry(ctx caddy.Context, sites []guardSite) (url, rootCert string) {
	for _, site := range sites {
		url := site.firstURL()
		if url == "" {
			continue
		}
		if site.scheme == "https" && locallyIssued(ctx, site.host) {
			rootCert = rootCertificate(ctx)
		}
		return url, rootCert
	}
	return "", ""
}

// locallyIssued tells whether a certificate for the host comes from Caddy's
// local authority. Automatic HTTPS has made its policies by now.
func locallyIssued(ctx caddy.Context, host string) bool {
	app, err := ctx.AppIfConfigured("tls")
	if err != nil {
		return false
	}
	automation := app.(*caddytls.TLS).Automation
	if automation == nil {
		return false
	}
	for _, policy := range automation.Policies {
		subjects := policy.Subjects()
		covers := func(subject string) bool { return certmagic.MatchWildcard(host, subject) }
		if len(subjects) > 0 && !slices.ContainsFunc(subjects, covers) {
			continue
		}
		if len(policy.Issuers) == 0 {
			return false
		}
		issuer, ok := policy.Issuers[0].(*caddytls.InternalIssuer)
		return ok && issuer.CA == caddypki.DefaultCAID
	}
	return false
}

// rootCertificate is the file of Caddy's local certificate authority, if the
// storage is made of files.
func rootCertificate(ctx caddy.Context) string {
	storage, ok := ctx.Storage().(*certmagic.FileStorage)
	if !ok {
		return ""
	}
	return filepath.Join(storage.Path, "pki", "authorities", caddypki.DefaultCAID, "root.crt")
}

// guardSite is a site with a guard.
type guardSite struct {
	scheme, host string
	port         uint // 0: none to tell
	loopback     bool // by its name, or its listeners
	accessLogs   bool

	server *caddyhttp.Server
	route  *caddyhttp.Route // of the server
}

func (s guardSite) url() string {
	address := net.JoinHostPort(strings.Trim(s.host, "[]"), strconv.FormatUint(uint64(s.port), 10))
	if s.scheme == "https" {
		return "https://" + strings.TrimSuffix(address, ":443")
	}
	return "http://" + strings.TrimSuffix(address, ":80")
}

// guardSites finds the guards of the running configuration, in the order of
// its servers and routes.
func guardSites(ctx caddy.Context) []guardSite {
	app, err := ctx.AppIfConfigured("http")
	if err != nil {
		return nil
	}
	servers := app.(*caddyhttp.App).Servers
	var sites []guardSite
	for _, name := range slices.Sorted(maps.Keys(servers)) {
		server := servers[name]
		if len(server.Listen) == 0 {
			continue
		}
		addr, err := caddy.ParseNetworkAddress(server.Listen[0])
		if err != nil {
			continue
		}
		site := guardSite{scheme: "http", host: addr.Host, port: addr.StartPort, accessLogs: server.Logs != nil, server: server}
		site.loopback = !slices.ContainsFunc(server.Listen, beyondLoopback)
		if len(server.TLSConnPolicies) > 0 {
			site.scheme = "https"
		}
		for i := range server.Routes {
			site.route = &server.Routes[i]
			if _, ok := pathsToGuards(*site.route, server.NamedRoutes); ok {
				sites = append(sites, site.named(routeHosts(*site.route))...)
			}
		}
	}
	return sites
}

func beyondLoopback(listen string) bool {
	addr, err := caddy.ParseNetworkAddress(listen)
	return err != nil || !isLoopback(addr.Host)
}

// named makes a site of each host that the route serves. A name of the
// machine itself counts as loopback wherever the site listens, as every site
// localhost of Caddy does.
func (s guardSite) named(hosts []string) []guardSite {
	if len(hosts) == 0 {
		if s.host == "" {
			s.host = "localhost"
		}
		return []guardSite{s}
	}
	bound := s.loopback
	var sites []guardSite
	for _, host := range hosts {
		s.host, s.loopback = host, bound || isLoopback(host)
		sites = append(sites, s)
	}
	return sites
}

func isLoopback(host string) bool {
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && addr.IsLoopback()
}

func routeHosts(route caddyhttp.Route) []string {
	for _, set := range route.MatcherSets {
		for _, matcher := range set {
			if hosts, ok := matcher.(*caddyhttp.MatchHost); ok {
				return *hosts
			}
		}
	}
	return nil
}

// pathsToGuards collects the path patterns of the guards in a route and of the
// matchers on the way to them; ok: there are guards.
func pathsToGuards(route caddyhttp.Route, named map[string]*caddyhttp.Route) (patterns []string, ok bool) {
	for _, handler := range route.Handlers {
		if g, is := handler.(*Guard); is {
			patterns, ok = append(patterns, g.Protect...), true
		}
		routes, named := routesIn(handler, named)
		for _, inner := range routes {
			if found, has := pathsToGuards(inner, named); has {
				patterns, ok = append(patterns, found...), true
			}
		}
	}
	if !ok {
		return nil, false
	}
	for _, set := range route.MatcherSets {
		for _, matcher := range set {
			if paths, is := matcher.(*caddyhttp.MatchPath); is {
				patterns = append(patterns, *paths...)
			}
		}
	}
	return patterns, true
}

// routesIn are the routes that a handler sends requests through, and the named
// routes left to those. A guard in a handle_response is none to start with: it
// comes after the backend has answered.
func routesIn(handler caddyhttp.MiddlewareHandler, named map[string]*caddyhttp.Route) ([]caddyhttp.Route, map[string]*caddyhttp.Route) {
	switch h := handler.(type) {
	case *caddyhttp.Subroute:
		return h.Routes, named
	case *caddyhttp.Invoke:
		if route := named[h.Name]; route != nil {
			left := maps.Clone(named)
			delete(left, h.Name) // it may invoke itself
			return []caddyhttp.Route{*route}, left
		}
	}
	return nil, named
}

// firstURL is a URL of the site that certainly needs a key, or empty.
func (s guardSite) firstURL() string {
	if s.port == 0 || strings.ContainsAny(s.host, "*{") {
		return ""
	}
	patterns, _ := pathsToGuards(*s.route, s.server.NamedRoutes)
	for _, pattern := range append([]string{firstPath}, patterns...) {
		path, subtree := strings.CutSuffix(pattern, "*")
		if subtree {
			path = strings.TrimSuffix(strings.TrimSuffix(path, "/"), "/v1") + firstPath
		}
		if shellQuote(path) == path && s.needsKey(path) {
			return s.url() + path
		}
	}
	return ""
}

// needsKey tells whether the request of the curl line meets a guard that asks
// for a key.
func (s guardSite) needsKey(path string) bool {
	r, err := http.NewRequest(http.MethodPost, s.url()+path, strings.NewReader(firstBody))
	if err != nil {
		return false
	}
	r.RequestURI, r.RemoteAddr = path, "127.0.0.1:1"
	if s.scheme == "https" {
		r.TLS = &tls.ConnectionState{HandshakeComplete: true, ServerName: s.host}
	}
	repl := caddy.NewReplacer()
	try := tryout{path, caddyhttp.PrepareRequest(r, repl, nil, s.server), repl, make(map[string]bool)}
	guarded, _ := try.routes(s.server.Routes, s.server.NamedRoutes)
	return guarded
}

// tryout leads a request through routes as Caddy would. Of the handlers only
// rewrites run: matchers behind them see what they did.
type tryout struct {
	path  string // as sent
	r     *http.Request
	repl  *caddy.Replacer
	taken map[string]bool // groups of routes
}

func (t *tryout) routes(routes []caddyhttp.Route, named map[string]*caddyhttp.Route) (guarded, ended bool) {
	for _, route := range routes {
		if t.taken[route.Group] {
			continue
		}
		matched, err := route.MatcherSets.AnyMatchWithError(t.r)
		if err != nil {
			return false, true
		}
		if !matched {
			continue
		}
		t.taken[route.Group] = route.Group != ""
		for _, handler := range route.Handlers {
			if guarded, ended := t.handler(handler, named); ended {
				return guarded, true
			}
		}
		if route.Terminal {
			return false, true
		}
	}
	return false, false
}

func (t *tryout) handler(handler caddyhttp.MiddlewareHandler, named map[string]*caddyhttp.Route) (guarded, ended bool) {
	switch h := handler.(type) {
	case *Guard:
		// GET, since a public path is no place to show a key.
		decision, _ := h.paths.classify(http.MethodGet, t.path)
		return decision == protected, decision == protected
	case *rewrite.Rewrite:
		h.Rewrite(t.r, t.repl)
	}
	return t.routes(routesIn(handler, named))
}
