package zejzlauth

import (
	"slices"
	"strings"
	"testing"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

func TestGuardSites(t *testing.T) {
	const guard = `{"handler": "zejzl_auth", "zone": "guard sites"}`
	for name, c := range map[string]struct {
		server string
		want   []guardSite
	}{
		"no guard":    {`{"listen": [":8080"], "routes": [{"handle": [{"handler": "static_response"}]}]}`, nil},
		"no listener": {`{"routes": [{"handle": [` + guard + `]}]}`, nil},
		"any host":    {`{"listen": [":8080"], "routes": [{"handle": [` + guard + `]}]}`, []guardSite{{scheme: "http", host: "localhost", port: 8080}}},
		"address":     {`{"listen": ["127.0.0.1:8080"], "routes": [{"handle": [` + guard + `]}]}`, []guardSite{{scheme: "http", host: "127.0.0.1", port: 8080, loopback: true}}},
		"IPv6":        {`{"listen": ["[::1]:8080"], "routes": [{"handle": [` + guard + `]}]}`, []guardSite{{scheme: "http", host: "::1", port: 8080, loopback: true}}},
		"access logs": {`{"listen": ["127.0.0.1:8080"], "logs": {}, "routes": [{"handle": [` + guard + `]}]}`, []guardSite{{scheme: "http", host: "127.0.0.1", port: 8080, loopback: true, accessLogs: true}}},
		"hosts": {
			`{"listen": [":8443"], "tls_connection_policies": [{}], "routes": [
			{"handle": [{"handler": "static_response"}]},
			{"match": [{"host": ["localhost", "api.example.com"]}], "handle": [{"handler": "subroute", "routes": [
				{"handle": [{"handler": "headers"}]}, {"handle": [` + guard + `]}]}]}]}`,
			[]guardSite{{scheme: "https", host: "localhost", port: 8443, loopback: true}, {scheme: "https", host: "api.example.com", port: 8443}},
		},
		"path matcher": {
			`{"listen": [":8080"], "routes": [{"match": [{"path": ["/api/*"]}], "handle": [` + guard + `]}]}`,
			[]guardSite{{scheme: "http", host: "localhost", port: 8080}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := strings.Replace(c.server, `{"`, `{"automatic_https": {"disable": true}, "`, 1)
			ctx, err := provisionConfig(t, siteConfig(server, noKeys))
			if err != nil {
				t.Fatal(err)
			}
			if got := guardSites(ctx); !slices.Equal(got, c.want) {
				t.Errorf("%+v, want %+v", got, c.want)
			}
		})
	}
	if got := guardSites(bareContext(t)); got != nil {
		t.Errorf("without an http app: %+v", got)
	}
}

func TestIsLoopback(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "a.localhost": true, "127.0.0.1": true, "127.8.8.8": true, "::1": true, "[::1]": true,
		"": false, "0.0.0.0": false, "::": false, "192.168.0.1": false, "example.com": false, "localhost.example.com": false, "*.example.com": false,
	} {
		if got := isLoopback(host); got != want {
			t.Errorf("%q: %v", host, got)
		}
	}
}

func TestSiteURL(t *testing.T) {
	for want, site := range map[string]guardSite{
		"https://localhost:8443":    {scheme: "https", host: "localhost", port: 8443},
		"https://api.example.com":   {scheme: "https", host: "api.example.com", port: 443},
		"http://api.example.com":    {scheme: "http", host: "api.example.com", port: 80},
		"http://localhost:443":      {scheme: "http", host: "localhost", port: 443},
		"http://[::1]:8080":         {scheme: "http", host: "::1", port: 8080},
		"https://[2001:db8::1]:999": {scheme: "https", host: "[2001:db8::1]", port: 999},
		"http://[::1]":              {scheme: "http", host: "::1", port: 80},
	} {
		if got := site.url(); got != want {
			t.Errorf("%+v: %s, want %s", site, got, want)
		}
	}
}

func TestPrintDevelopmentKey(t *testing.T) {
	secret := key.Generate()
	https := guardSite{scheme: "https", host: "localhost", port: 8443}
	for name, c := range map[string]struct {
		sites []guardSite
		cert  string
		want  string
	}{
		"https":    {[]guardSite{https, {scheme: "http", host: "other"}}, "/data/root.crt", "\n  curl --cacert /data/root.crt -i https://localhost:8443/v1/chat/completions -H 'X-API-Key: " + secret + "' "},
		"quoted":   {[]guardSite{https}, "/a dir/it's/root.crt", `curl --cacert '/a dir/it'\''s/root.crt' -i`},
		"no files": {[]guardSite{https}, "", "curl -i https://localhost:8443/"},
		"http":     {[]guardSite{{scheme: "http", host: "localhost", port: 8080}}, "/data/root.crt", "curl -i http://localhost:8080/"},
		"no site":  {nil, "/data/root.crt", ""},
	} {
		var out strings.Builder
		printDevelopmentKey(&out, secret, c.sites, c.cert)
		got := out.String()
		if !strings.Contains(got, c.want) || !strings.Contains(got, "\n  "+secret+"\n") || strings.Contains(got, "curl") != (c.sites != nil) {
			t.Errorf("%s: printed %s", name, got)
		}
	}
}
