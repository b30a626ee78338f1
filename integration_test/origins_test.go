package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

const allowedOrigins = "https://app.example.com https://xn--mnchen-3ya.example https://app.example.com:8443 http://localhost:3000 http://[2001:db8::1]:8080"

// foreignOrigins are lines of an Origin header that must not be taken for one
// of allowedOrigins.
var foreignOrigins = []string{
	"https://APP.example.com", "HTTPS://app.example.com", "https://app.example.com:443", "http://app.example.com:80", "http://app.example.com",
	"https://app.example.com/", "https://app.example.com.", "https://app.example.com:8444", "https://app.example.com:", "https://app.example.com:08443",
	"https://app.example.com.evil.io", "https://evilapp.example.com", "https://evil.app.example.com", "https://example.com", "https://app-example.com",
	"https://user@app.example.com", "https://app.example.com@evil.io", "https://evil.io#app.example.com", "https://evil.io/app.example.com",
	"https://evil.io?https://app.example.com", "https://%00.app.example.com", "https://app.example.com%00.evil.io", "https://app.example.com%2eevil.io",
	"https://app.example.com, https://evil.io", "https://app.example.com https://evil.io", "https://evil.io,https://app.example.com",
	"https://app.example.com,", "https://app.example.com\tx", `https://app.example.com\.evil.io`, "https://app.example.com`", "https://app.example.com_.evil.io",
	"null", "NULL", "*", "https://*", "file://", "app.example.com", "//app.example.com", "https:app.example.com", "https:///app.example.com",
	"chrome-extension://app.example.com", "http://localhost.evil.io:3000", "http://localhost", "http://localhost:30000", "https://localhost:3000", "http://127.0.0.1:3000",
	"https://münchen.example", "https://m\xfcnchen.example", "https://app.exаmple.com", "https://xn--mnchen-3ya.example.evil.io", "https://xn--mnchen-3yaa.example",
	"http://[2001:db8::1%25eth0]:8080", "http://[2001:DB8::1]:8080", "http://[2001:db8:0::1]:8080", "http://[2001:db8::1]", "http://2001:db8::1:8080",
	"https://" + strings.Repeat("a.", 4<<10) + "example.com",
}

// accessControl returns the names of the CORS headers of an answer.
func (r *verdict) accessControl() (names []string) {
	for name := range r.Header {
		if strings.HasPrefix(name, "Access-Control-") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func (r *verdict) variesByOrigin(t testing.TB) {
	t.Helper()
	if vary := strings.Join(r.Header.Values("Vary"), ", "); !strings.Contains(vary, "Origin") {
		t.Errorf("status %d: Vary %q", r.StatusCode, vary)
	}
}

func origins(t *testing.T, a *advisory) {
	guard := func(cors string) string {
		return "zejzl_auth {\n\t\tpublic /api/status\n\t\tkey {env.K} roomy\n\t\t" + cors + "\n\t}"
	}
	var sites strings.Builder
	for i, cors := range []string{"cors " + allowedOrigins, "", "cors backend", "cors https://app.example.com {\n\t\tcredentials\n\t}"} {
		fmt.Fprintf(&sites, "http://:PORT%d {\n\tbind 127.0.0.1\n\t%s\n\treverse_proxy BACKEND\n}\n", i, guard(cors))
	}
	g := guarded(t, roomy, sites.String(), "K="+a.k)
	key := "X-API-Key: " + a.k

	t.Run("allowed", func(t *testing.T) {
		for origin := range strings.FieldsSeq(allowedOrigins) {
			field := "Origin: " + origin
			for _, r := range []*verdict{
				g.ask(t, "POST /api/chat", field, key), g.ask(t, "GET /api/status", field), g.ask(t, "POST /api/chat", field), g.ask(t, "TRACE /api/chat", field),
				g.ask(t, "GET /a/../b", field), g.ask(t, "POST /api/chat", field, key, "Api-Key: x"), g.ask(t, "OPTIONS /api/chat", field), g.ask(t, "OPTIONS /api/chat", field, key),
			} {
				r.variesByOrigin(t)
				if got := r.Header.Values("Access-Control-Allow-Origin"); !slices.Equal(got, []string{origin}) {
					t.Errorf("status %d: allowed origin %q, want %s", r.StatusCode, got, origin)
				}
				if got := r.accessControl(); !slices.Equal(got, []string{"Access-Control-Allow-Origin", "Access-Control-Expose-Headers"}) {
					t.Errorf("status %d: %q", r.StatusCode, got)
				}
			}
		}
		g.take()
	})
	t.Run("foreign", func(t *testing.T) {
		for _, origin := range append(foreignOrigins, "", "https://app.example.com\r\nOrigin: https://app.example.com", "https://app.example.com\r\nOrigin: https://evil.io") {
			field := "Origin: " + origin
			r := g.ask(t, "POST /api/chat", field, key) // CORS is no access control
			r.wants(t, 200, "")
			g.one(t)
			for _, r := range []*verdict{r, g.ask(t, "POST /api/chat", field), g.ask(t, "PUT /api/chat", field, key, key)} {
				r.variesByOrigin(t)
				if got := r.accessControl(); len(got) > 0 {
					t.Errorf("origin %.80q, status %d: %q", origin, r.StatusCode, got)
				}
			}
			if origin == "" {
				continue // without an origin it is no preflight
			}
			r = g.ask(t, "OPTIONS /api/chat", field, "Access-Control-Request-Method: POST", key)
			r.wants(t, 403, "forbidden")
			r.variesByOrigin(t)
			if got := r.accessControl(); len(got) > 0 {
				t.Errorf("preflight from %.80q: %q", origin, got)
			}
			g.none(t)
		}
	})
	t.Run("preflights", func(t *testing.T) { preflights(t, g, key) })
	t.Run("no cors line", func(t *testing.T) {
		for _, origin := range []string{"https://app.example.com", "http://127.0.0.1", "null"} {
			r := g.askAt(t, 1, "OPTIONS /api/chat", "Origin: "+origin, "Access-Control-Request-Method: POST", key)
			r.wants(t, 403, "forbidden")
			g.none(t)
			answers := []*verdict{r, g.askAt(t, 1, "POST /api/chat", "Origin: "+origin, key), g.askAt(t, 1, "GET /api/status", "Origin: "+origin), g.askAt(t, 1, "POST /api/chat", "Origin: "+origin)}
			for _, r := range answers {
				if got := r.accessControl(); len(got) > 0 {
					t.Errorf("status %d: %q", r.StatusCode, got)
				}
			}
			g.take()
		}
	})
	t.Run("cors backend", func(t *testing.T) { corsBackend(t, g, a.k) })
	t.Run("credentials", func(t *testing.T) {
		for _, line := range []string{"OPTIONS /api/chat", "POST /api/chat"} {
			r := g.askAt(t, 3, line, "Origin: https://app.example.com", "Access-Control-Request-Method: POST")
			if got := r.Header.Values("Access-Control-Allow-Credentials"); !slices.Equal(got, []string{"true"}) {
				t.Errorf("%s: allow credentials %q", line, got)
			}
			r = g.askAt(t, 3, line, "Origin: https://evil.example", "Access-Control-Request-Method: POST")
			if got := r.accessControl(); len(got) > 0 {
				t.Errorf("%s: %q", line, got)
			}
		}
		g.none(t)
	})
}

// preflights asks what a browser asks, and what none would.
func preflights(t *testing.T, g *site, key string) {
	const origin, method = "Origin: https://app.example.com", "Access-Control-Request-Method: "
	headers := func(names string) string { return "Access-Control-Request-Headers: " + names }
	many := strings.Repeat("x-stainless-a,", 200)
	for name, fields := range map[string][]string{
		"GET":                      {method + "GET"},
		"PATCH":                    {method + "PATCH"},
		"sorted headers":           {method + "POST", headers("authorization,content-type,x-api-key")},
		"unsorted, upper case":     {method + "POST", headers("X-API-KEY, Authorization , CONTENT-TYPE")},
		"split over lines":         {method + "POST", headers("x-api-key"), headers(""), headers("content-type,idempotency-key")},
		"of an SDK":                {method + "POST", headers("anthropic-version,openai-beta,x-stainless-lang,x-goog-api-key")},
		"hundreds":                 {method + "POST", headers(many)},
		"with a bad key":           {method + "POST", "X-API-Key: bad"},
		"with a good key":          {method + "POST", key},
		"with ambiguous keys":      {method + "POST", key, key},
		"with a websocket upgrade": {method + "GET", "Connection: Upgrade", "Upgrade: websocket"},
		"with an h2c upgrade":      {method + "GET", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA"},
		"with an override":         {method + "POST", "X-HTTP-Method-Override: DELETE"},
		"with a body":              {method + "POST", "Content-Length: 0"},
		"private network":          {method + "POST", "Access-Control-Request-Private-Network: true"},
	} {
		for _, path := range []string{"/api/chat", "/api/status", "/unknown", "/v1/chat/completions", "/a%2fb"} {
			r := g.ask(t, "OPTIONS "+path, append(fields, origin)...)
			r.wants(t, 204, "")
			r.variesByOrigin(t)
			if r.Header.Get("Access-Control-Allow-Origin") != "https://app.example.com" || r.Header.Get("Access-Control-Max-Age") != "3600" || r.body != "" {
				t.Errorf("%s, %s: %v %q", name, path, r.Header, r.body)
			}
			if r.Header.Get("X-Ratelimit-Limit") != "" || r.Header.Get("Access-Control-Allow-Private-Network") != "" {
				t.Errorf("%s, %s: %v", name, path, r.Header)
			}
			g.none(t)
		}
	}
	for name, fields := range map[string][]string{
		"post":                  {method + "post"},
		"*":                     {method + "*"},
		"TRACE":                 {method + "TRACE"},
		"CONNECT":               {method + "CONNECT"},
		"OPTIONS":               {method + "OPTIONS"},
		"two methods in a line": {method + "GET, POST"},
		"two method lines":      {method + "GET", method + "POST"},
		"foreign header":        {method + "POST", headers("x-api-key,x-evil")},
		"foreign in 2nd line":   {method + "POST", headers("x-api-key"), headers("x-evil")},
		"any header":            {method + "POST", headers("*")},
		"header with a space":   {method + "POST", headers("x-api key")},
		"header of identity":    {method + "POST", headers("x-zejzl-key-id")},
		"almost a family":       {method + "POST", headers("anthropicversion")},
		"non-ASCII header":      {method + "POST", headers("x-api-\u212aey")},
		"10 KB of headers":      {method + "POST", headers(many + many + many + many)},
	} {
		for _, path := range []string{"/api/chat", "/api/status", "/unknown"} {
			r := g.ask(t, "OPTIONS "+path, append(fields, origin, key)...)
			r.wants(t, 403, "forbidden")
			r.variesByOrigin(t)
			if got := r.accessControl(); len(got) > 0 {
				t.Errorf("%s, %s: %q", name, path, got)
			}
			g.none(t)
		}
	}
	// Bad paths and methods are refused before anybody looks for a preflight.
	g.ask(t, "OPTIONS /a/../b", origin, method+"GET").wants(t, 400, "invalid_path")
	g.ask(t, "options /api/chat", origin, method+"GET").wants(t, 405, "method_not_allowed")
	// Half a preflight is an ordinary request, and needs a key.
	g.ask(t, "OPTIONS /api/status", origin).wants(t, 401, "missing_key")
	g.ask(t, "OPTIONS /api/status", method+"GET").wants(t, 401, "missing_key")
	g.ask(t, "GET /api/chat", origin, method+"GET").wants(t, 401, "missing_key")
	g.none(t)
}

// corsBackend leaves preflights to the backend, which gets nothing else with
// them that needs a key.
func corsBackend(t *testing.T, g *site, k string) {
	for _, path := range []string{"/api/chat", "/api/status", "/unknown"} {
		r := g.askAt(t, 2, "OPTIONS "+path, "Origin: https://any.example", "Access-Control-Request-Method: POST", "X-API-Key: "+k, "X-Zejzl-Tier: forged",
			"X-HTTP-Method-Override: DELETE", "X-Original-URL: /api/admin", "Connection: Upgrade", "Upgrade: websocket")
		r.wants(t, 200, "")
		s := g.one(t)
		s.noSecret(t, k)
		for _, name := range []string{"x-zejzl-", "x-http-method-override", "x-original-url", "upgrade"} {
			if got := s.folded(name); len(got) > 0 {
				t.Errorf("the preflight reached the backend with %q", got)
			}
		}
		if r.Header.Get("Access-Control-Allow-Origin") != "*" || r.Header.Get("Access-Control-Allow-Credentials") != "true" {
			t.Errorf("the backend's CORS headers are gone: %v", r.Header)
		}
	}
	g.askAt(t, 2, "OPTIONS /a/../b", "Origin: https://any.example", "Access-Control-Request-Method: POST").wants(t, 400, "invalid_path")
	g.askAt(t, 2, "OPTIONS /api/chat", "Origin: https://any.example").wants(t, 401, "missing_key")
	g.askAt(t, 2, "POST /api/chat", "Origin: https://any.example", "Access-Control-Request-Method: POST").wants(t, 401, "missing_key")
	g.none(t)
	r := g.askAt(t, 2, "POST /api/chat", "Origin: https://any.example", "X-API-Key: "+k)
	r.wants(t, 200, "")
	g.one(t)
	if r.Header.Get("Access-Control-Allow-Origin") != "*" {
		t.Errorf("the backend's CORS headers are gone: %v", r.Header)
	}
}
