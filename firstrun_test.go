package zejzlauth

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

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
		"a name on loopback": {
			`{"listen": ["127.0.0.1:8080", "[::1]:8080"], "routes": [{"match": [{"host": ["api.example.com"]}], "handle": [` + guard + `]}]}`,
			[]guardSite{{scheme: "http", host: "api.example.com", port: 8080, loopback: true}},
		},
		"not only on loopback": {
			`{"listen": ["127.0.0.1:8080", "192.0.2.1:8080"], "routes": [{"handle": [` + guard + `]}]}`,
			[]guardSite{{scheme: "http", host: "127.0.0.1", port: 8080}},
		},
		"path matcher": {
			`{"listen": [":8080"], "routes": [{"match": [{"path": ["/api/*"]}], "handle": [` + guard + `]}]}`,
			[]guardSite{{scheme: "http", host: "localhost", port: 8080}},
		},
		"named route": {
			`{"listen": [":8080"], "named_routes": {"a": {"handle": [{"handler": "invoke", "name": "b"}]}, "b": {"handle": [` + guard + `]}},
			"routes": [{"handle": [{"handler": "invoke", "name": "a"}]}]}`,
			[]guardSite{{scheme: "http", host: "localhost", port: 8080}},
		},
		"named route in itself": {
			`{"listen": [":8080"], "named_routes": {"a": {"handle": [{"handler": "invoke", "name": "a"}]}},
			"routes": [{"handle": [{"handler": "invoke", "name": "a"}, {"handler": "invoke", "name": "none"}]}]}`, nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := strings.Replace(c.server, `{"`, `{"automatic_https": {"disable": true}, "`, 1)
			ctx, err := provisionConfig(t, siteConfig(server, noKeys))
			if err != nil {
				t.Fatal(err)
			}
			got := guardSites(ctx)
			for i := range got {
				got[i].server, got[i].route = nil, nil
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("%+v, want %+v", got, c.want)
			}
		})
	}
	if got := guardSites(bareContext(t)); got != nil {
		t.Errorf("without an http app: %+v", got)
	}
}

// The curl line asks for what a guard certainly protects, or there is none.
func TestFirstURL(t *testing.T) {
	for text, want := range map[string]string{
		`zejzl_auth`:                                       "/v1/chat/completions",
		`zejzl_auth /api/*`:                                "/api/v1/chat/completions",
		`handle /api/* { zejzl_auth }`:                     "/api/v1/chat/completions",
		`handle /api* { zejzl_auth }`:                      "/api/v1/chat/completions",
		`handle /api/v1/* { zejzl_auth }`:                  "/api/v1/chat/completions",
		`handle /v1/* { zejzl_auth }`:                      "/v1/chat/completions",
		`handle /v1/chat/* { zejzl_auth }`:                 "/v1/chat/completions",
		`handle /ask { zejzl_auth }`:                       "/ask",
		`handle_path /api/* { zejzl_auth }`:                "/api/v1/chat/completions",
		`handle_path /a/* { handle /v1/* { zejzl_auth } }`: "/a/v1/chat/completions",
		`handle /a/* { handle /a/b/* { zejzl_auth } }`:     "/a/b/v1/chat/completions",
		`handle /a/* { handle /b/* { zejzl_auth } }`:       "",
		`zejzl_auth { protect /api/* }`:                    "/api/v1/chat/completions",
		`zejzl_auth { protect /x/* /v1/* }`:                "/v1/chat/completions",
		`zejzl_auth { protect /api }`:                      "/api",
		`handle /b/* { zejzl_auth { protect /a/* } }`:      "",
		`zejzl_auth { public /v1/* }`:                      "",
		`zejzl_auth { public /v1/*; protect /v1/* /a/* }`:  "/a/v1/chat/completions",
		// Another route takes the request first.
		`handle /v1/* { respond yes }; handle { zejzl_auth }`:               "",
		`handle /v1/* { respond yes }; handle /a/* { zejzl_auth }`:          "/a/v1/chat/completions",
		`@get method GET; zejzl_auth @get`:                                  "",
		`@post method POST; zejzl_auth @post`:                               "/v1/chat/completions",
		`@not not path /v1/*; zejzl_auth @not`:                              "",
		`@re path_regexp ^/a; zejzl_auth @re`:                               "",
		`@two path *.json /two/*; zejzl_auth @two`:                          "/two/v1/chat/completions",
		`zejzl_auth { zone one; protect /a/* }; handle /b/* { zejzl_auth }`: "/a/v1/chat/completions",
		`handle /a/* { zejzl_auth { protect /b/* }; route { zejzl_auth } }`: "/a/v1/chat/completions",
		`handle "/it's & more/*" { zejzl_auth }`:                            "",
		`handle /n/* { invoke named }`:                                      "/n/v1/chat/completions",
	} {
		t.Run(text, func(t *testing.T) {
			if want != "" {
				want = "http://api.test:8080" + want
			}
			text = strings.NewReplacer("{ ", "{\n", " }", "\n}", "; ", "\n").Replace(text)
			sites := adaptedSites(t, "&(named) {\nzejzl_auth\n}\nhttp://api.test:8080 {\n"+text+"\n}\n")
			if len(sites) != 1 {
				t.Fatalf("sites: %+v", sites)
			}
			if got := sites[0].firstURL(); got != want {
				t.Errorf("%q, want %q", got, want)
			}
		})
	}
}

func TestFirstURLHosts(t *testing.T) {
	for address, want := range map[string]string{
		"http://*.example.com:8080": "",
		"http://{env.NONE}.test:80": "",
		"http://:8080":              "http://localhost:8080/v1/chat/completions",
		"http://[::1]:8080":         "http://[::1]:8080/v1/chat/completions",
		"http://api.example.com":    "http://api.example.com/v1/chat/completions",
	} {
		sites := adaptedSites(t, address+" {\nzejzl_auth\n}\n")
		if len(sites) != 1 || sites[0].firstURL() != want {
			t.Errorf("%s: %+v, want %q", address, sites, want)
		}
	}
	sites := adaptedSites(t, "http://:8080 {\nbind unix//run/none.sock\nzejzl_auth\n}\n")
	if len(sites) != 1 || sites[0].firstURL() != "" {
		t.Errorf("unix socket: %+v", sites)
	}
}

// Caddy's root helps with a certificate that Caddy's own authority issued;
// with any other, curl would trust nothing else.
func TestLocallyIssued(t *testing.T) {
	const local, notLocal = true, false
	for site, want := range map[string]bool{
		"localhost {":                        local,
		"api.localhost {":                    local,
		"printer.local {":                    local,
		"api.corp.internal {":                local,
		"box.home.arpa {":                    local,
		"https://192.168.0.7 {":              local,
		"https://203.0.113.7 {":              local,
		"https://[::1] {":                    local,
		"api.example.com {":                  notLocal,
		"api.example.com {\ntls internal":    local,
		"*.example.com {\ntls internal":      local,
		"localhost {\ntls {\nissuer acme\n}": notLocal,
		"localhost {\ntls you@example.com":   notLocal,
		"http://localhost {":                 notLocal,
	} {
		ctx := adaptedContext(t, site+"\nzejzl_auth\n}\n")
		sites := guardSites(ctx)
		if len(sites) != 1 {
			t.Fatalf("%s: %+v", site, sites)
		}
		host := strings.Replace(sites[0].host, "*", "a", 1)
		if got := locallyIssued(ctx, host); got != want {
			t.Errorf("%s: %v", site, got)
		}
	}
	ctx := adaptedContext(t, "{\npki {\nca other\n}\n}\nlocalhost {\ntls {\nissuer internal {\nca other\n}\n}\nzejzl_auth\n}\n")
	if locallyIssued(ctx, "localhost") || locallyIssued(bareContext(t), "localhost") {
		t.Error("another authority, or no tls app")
	}
}

func TestFirstTry(t *testing.T) {
	const site = " {\nzejzl_auth\n}\n"
	for text, want := range map[string]string{
		"*.example.com {\ntls internal\nzejzl_auth\n}\nlocalhost:8443" + site: "https://localhost:8443/v1/chat/completions with root.crt",
		"api.example.com" + site:                         "https://api.example.com/v1/chat/completions with .",
		"http://localhost" + site:                        "http://localhost/v1/chat/completions with .",
		"*.example.com {\ntls internal\nzejzl_auth\n}\n": " with .",
	} {
		ctx := adaptedContext(t, text)
		url, rootCert := firstTry(ctx, guardSites(ctx))
		if got := url + " with " + filepath.Base(rootCert); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

func adaptedSites(t *testing.T, text string) []guardSite {
	t.Helper()
	return guardSites(adaptedContext(t, text))
}

func adaptedContext(t *testing.T, text string) caddy.Context {
	t.Helper()
	ctx, err := caddy.ProvisionContext(harmless(t, adaptText(t, string(caddyfile.Format([]byte(text))))))
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return ctx
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
	const url = "https://localhost:8443/v1/chat/completions"
	for name, c := range map[string]struct{ url, cert, want string }{
		"certificate": {url, "/data/root.crt", "\n  curl --cacert /data/root.crt -i " + url + " -H 'X-API-Key: " + secret + "' "},
		"quoted":      {url, "/a dir/it's/root.crt", `curl --cacert '/a dir/it'\''s/root.crt' -i`},
		"none":        {url, "", "curl -i https://localhost:8443/"},
		"IPv6":        {"http://[::1]:8080/", "", "curl -i 'http://[::1]:8080/' -H"},
		"no site":     {"", "", ""},
	} {
		var out strings.Builder
		printDevelopmentKey(&out, secret, c.url, c.cert)
		got := out.String()
		if !strings.Contains(got, c.want) || !strings.Contains(got, "\n  "+secret+"\n") || strings.Contains(got, "curl") != (c.url != "") {
			t.Errorf("%s: printed %s", name, got)
		}
	}
}
