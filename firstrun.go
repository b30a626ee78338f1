package zejzlauth

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
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
	return a.development && len(a.stated) == 0 && len(a.files) == 0
}

// addDevelopmentKey makes the process's development key, unless an earlier
// configuration did, and lets it in.
func (a *App) addDevelopmentKey(sites []guardSite) {
	developmentKey.Lock()
	defer developmentKey.Unlock()
	if !developmentKey.made {
		secret := key.Generate()
		developmentKey.digest, developmentKey.made = key.Sum(secret), true
		printDevelopmentKey(os.Stderr, secret, sites, rootCertificate(a.ctx))
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
	metrics.keys.WithLabelValues("development").Set(1)
}

// printDevelopmentKey shows the key with a line that works as it stands. It
// goes to the terminal past the logs, which keep what they are given.
func printDevelopmentKey(w io.Writer, secret string, sites []guardSite, rootCert string) {
	fmt.Fprintf(w, "\nzejzl_auth: development mode. This key works until the process ends and is not shown again:\n\n  %s\n", secret)
	if len(sites) > 0 {
		trust := ""
		if sites[0].scheme == "https" && rootCert != "" {
			trust = " --cacert " + shellQuote(rootCert)
		}
		fmt.Fprintf(w, "\nTry it:\n\n  curl%s -i %s/v1/chat/completions -H 'X-API-Key: %s' -H 'Content-Type: application/json' -d '%s'\n",
			trust, sites[0].url(), secret, `{"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}`)
	}
	fmt.Fprintln(w)
}

func shellQuote(s string) string {
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/:._-") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// rootCertificate is the file of Caddy's local certificate authority, if the
// storage is made of files.
func rootCertificate(ctx caddy.Context) string {
	storage, ok := ctx.Storage().(*certmagic.FileStorage)
	if !ok {
		return ""
	}
	return filepath.Join(storage.Path, "pki", "authorities", "local", "root.crt")
}

// guardSite is a site with a guard.
type guardSite struct {
	scheme, host string
	port         uint
	loopback     bool
	accessLogs   bool
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
		site := guardSite{scheme: "http", host: addr.Host, port: addr.StartPort, accessLogs: server.Logs != nil}
		if len(server.TLSConnPolicies) > 0 {
			site.scheme = "https"
		}
		for _, route := range server.Routes {
			if hasGuard(route.Handlers) {
				sites = append(sites, site.named(routeHosts(route))...)
			}
		}
	}
	return sites
}

// named makes a site of each host that the route serves.
func (s guardSite) named(hosts []string) []guardSite {
	if len(hosts) == 0 {
		s.loopback = isLoopback(s.host)
		if s.host == "" {
			s.host = "localhost"
		}
		return []guardSite{s}
	}
	var sites []guardSite
	for _, host := range hosts {
		s.host, s.loopback = host, isLoopback(host)
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

func hasGuard(handlers []caddyhttp.MiddlewareHandler) bool {
	for _, handler := range handlers {
		switch h := handler.(type) {
		case *Guard:
			return true
		case *caddyhttp.Subroute:
			for _, route := range h.Routes {
				if hasGuard(route.Handlers) {
					return true
				}
			}
		}
	}
	return false
}
