package zejzlauth

import (
	"crypto/tls"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/zejzl/caddy-zejzl-auth/internal/window"
)

// overTLS makes a request that HSTS may answer.
func overTLS(r *http.Request) *http.Request {
	r.TLS = new(tls.ConnectionState)
	return r
}

func wantHeaders(t *testing.T, got http.Header, want map[string][]string) {
	t.Helper()
	for name, values := range want {
		if !slices.Equal(got[name], values) {
			t.Errorf("%s: %q, want %q", name, got[name], values)
		}
	}
}

func TestSecurityHeaders(t *testing.T) {
	r := newRig(t, &Guard{Public: []string{"/status"}, CORS: &CORS{Origins: []string{corsTestOrigin}}})
	every := map[string][]string{
		"X-Content-Type-Options": {"nosniff"}, "X-Frame-Options": {"DENY"}, "X-Xss-Protection": {"1; mode=block"},
		"Strict-Transport-Security": {"max-age=31536000; includeSubDomains"}, "Referrer-Policy": {"no-referrer"},
		"Content-Security-Policy":      {"default-src 'none'; frame-ancestors 'none'"},
		"Cross-Origin-Resource-Policy": {"same-origin"}, "Server": nil, "Via": nil, "X-Powered-By": nil,
	}
	for name, req := range map[string]*http.Request{
		"admitted": r.chat(), "public": newRequest("GET", "/status"), "refused": newRequest("GET", "/x"),
		"bad path": newRequest("GET", "/.."), "method": newRequest("TRACE", "/x"),
		"preflight refused": newRequest("OPTIONS", "/x", "Origin", "https://evil.example", "Access-Control-Request-Method", "GET"),
		"preflight":         newRequest("OPTIONS", "/x", "Origin", corsTestOrigin, "Access-Control-Request-Method", "GET"),
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := r.serve(overTLS(req), func(w http.ResponseWriter, _ *http.Request) error {
				w.Header().Set("Server", "uvicorn")
				w.Header().Add("Via", "1.1 Caddy")
				w.Header().Add("X-Powered-By", "Express")
				w.WriteHeader(http.StatusNoContent)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			wantHeaders(t, resp.Header, every)
			vary := strings.Join(resp.Header["Vary"], ", ")
			if !strings.Contains(vary, "Origin") || strings.Contains(vary, "Authorization, X-API-Key") != (name != "public") {
				t.Errorf("Vary: %q", vary)
			}
		})
	}
	resp := r.must(t, 200, r.chat(), respondOK)
	wantHeaders(t, resp.Header, map[string][]string{"Strict-Transport-Security": nil, "Cache-Control": {"no-store"}})
	resp = r.must(t, 200, newRequest("GET", "/status"), respondOK)
	wantHeaders(t, resp.Header, map[string][]string{"Cache-Control": nil})
}

// Reverse proxies add the backend's headers to those that are there.
func TestBackendHeaders(t *testing.T) {
	r := newRig(t, &Guard{CORS: &CORS{Origins: []string{corsTestOrigin}}})
	req := r.chat()
	req.Header.Set("Origin", corsTestOrigin)
	resp := r.must(t, 200, overTLS(req), func(w http.ResponseWriter, req *http.Request) error {
		for name, value := range map[string]string{
			"X-Content-Type-Options": "sniff", "X-Frame-Options": "SAMEORIGIN", "X-XSS-Protection": "0", "Referrer-Policy": "origin",
			"Strict-Transport-Security": "max-age=0", "Content-Security-Policy": "default-src 'self'", "Cross-Origin-Resource-Policy": "cross-origin",
			"Cache-Control": "private", "Vary": "Accept-Encoding", "Access-Control-Allow-Origin": "*", "Access-Control-Allow-Credentials": "true",
			"X-RateLimit-Limit-Tokens": "1", "X-RateLimit-Limit": "9", "RateLimit": "x", "RateLimit-Reset": "x", "Ratelimit-Policy": "x",
			"Anthropic-Ratelimit-Tokens-Limit": "1", "Openai-Organization": "org", "OpenAI-Project": "p", "Anthropic-Organization-Id": "o",
			"X-Zejzl-Key-Id": "backend", "X_Zejzl_Tier": "backend",
			"Retry-After": "7", "Retry-After-Ms": "7000", "X-Should-Retry": "true", "Request-Id": "req_1", "Openai-Processing-Ms": "5",
		} {
			w.Header().Add(name, value)
		}
		w.Header()["x-ratelimit-reset"] = []string{"not canonical"}
		return respondOK(w, req)
	})
	wantHeaders(t, resp.Header, map[string][]string{
		"X-Content-Type-Options": {"nosniff"}, "X-Frame-Options": {"DENY"}, "X-Xss-Protection": {"1; mode=block"}, "Referrer-Policy": {"no-referrer"},
		"Strict-Transport-Security": {"max-age=31536000; includeSubDomains"}, "Content-Security-Policy": {"default-src 'self'"},
		"Cross-Origin-Resource-Policy": {"cross-origin"}, "Cache-Control": {"private"},
		"Vary":                        {"Authorization, X-API-Key, X-Goog-Api-Key, Api-Key, Origin", "Accept-Encoding"},
		"Access-Control-Allow-Origin": {corsTestOrigin}, "Access-Control-Allow-Credentials": nil,
		"X-Ratelimit-Limit-Tokens": nil, "X-Ratelimit-Limit": {"100"}, "Ratelimit": {`"1m";r=99;t=60`}, "Ratelimit-Reset": nil,
		"Ratelimit-Policy": {`"1m";q=100;w=60`}, "Anthropic-Ratelimit-Tokens-Limit": nil, "Openai-Organization": nil, "Openai-Project": nil,
		"Anthropic-Organization-Id": nil, "X-Zejzl-Key-Id": nil, "X_zejzl_tier": nil, "x-ratelimit-reset": nil, "X-Ratelimit-Reset": {"60"},
		"Retry-After": {"7"}, "Retry-After-Ms": {"7000"}, "X-Should-Retry": {"true"}, "Request-Id": {"req_1"}, "Openai-Processing-Ms": {"5"},
	})
}

// What the operator set in front of the guard stays, whatever the backend says.
func TestOperatorHeaders(t *testing.T) {
	r := newRig(t, new(Guard))
	w := httptest.NewRecorder()
	h := w.Header()
	vary := []string{"Accept", "not of this answer"}
	h["Server"], h["Vary"], h["Cache-Control"] = []string{"edge"}, vary[:1], []string{"max-age=1"}
	h["X-Frame-Options"], h["Referrer-Policy"] = []string{"SAMEORIGIN"}, []string{"origin", "no-referrer"}
	resp, err := r.serveTo(w, r.chat(), func(w http.ResponseWriter, req *http.Request) error {
		w.Header()["Server"] = []string{"uvicorn"}
		w.Header().Add("X-Frame-Options", "ALLOWALL")
		w.Header().Del("Referrer-Policy")
		w.Header().Set("Vary", "Accept-Language") // over what begin wrote
		return respondOK(w, req)
	})
	if err != nil {
		t.Fatal(err)
	}
	wantHeaders(t, resp.Header, map[string][]string{
		"Server": {"edge"}, "X-Frame-Options": {"SAMEORIGIN"}, "Referrer-Policy": {"origin", "no-referrer"}, "Cache-Control": {"max-age=1"},
		"Vary": {"Accept-Language", "Authorization, X-API-Key, X-Goog-Api-Key, Api-Key"},
	})
	if vary[1] != "not of this answer" {
		t.Error("the guard wrote behind the end of another handler's slice")
	}
}

// Caddy's header directive replaces within values in place. No slice may be
// the guard's own, or one request would change the answers to all later ones.
func TestHeaderValuesAreNotShared(t *testing.T) {
	r := newRig(t, &Guard{CORS: &CORS{Origins: []string{corsTestOrigin}}, Headers: &HeaderOps{Set: map[string]string{"X-Custom": "v"}}})
	request := func() *http.Request {
		req := overTLS(r.chat())
		req.Header.Set("Origin", corsTestOrigin)
		req.Header.Set("Anthropic-Version", "2023-06-01")
		return req
	}
	spoil := func(h http.Header) {
		for _, values := range h {
			for i := range values {
				values[i] = "spoiled"
			}
			_ = append(values, "spoiled") // must not write into a neighbour
		}
	}
	first := r.must(t, 200, request(), respondOK).Header
	for range 2 {
		w := httptest.NewRecorder()
		if _, err := r.serveTo(w, request(), func(w http.ResponseWriter, req *http.Request) error {
			for _, values := range w.Header() {
				_ = append(values, "spoiled")
			}
			spoil(req.Header) // identity headers
			return respondOK(w, req)
		}); err != nil {
			t.Fatal(err)
		}
		spoil(w.Header())
		r.must(t, 401, newRequest("GET", "/x"), notReached(t))
		second := r.must(t, 200, request(), respondOK).Header
		for name := range first {
			if strings.Contains(name, "Remaining") || name == "Ratelimit" {
				continue // counts down
			}
			if !slices.Equal(first[name], second[name]) {
				t.Errorf("%s: %q, before %q", name, second[name], first[name])
			}
		}
		if len(first) != len(second) {
			t.Errorf("%d headers, before %d", len(second), len(first))
		}
	}
}

func TestHeaderOps(t *testing.T) {
	t.Setenv("ZEJZL_TEST_POLICY", "default-src 'self'")
	r := newRig(t, &Guard{Protect: []string{"/api/*"}, Headers: &HeaderOps{
		Set: map[string]string{
			"content-security-policy": "{env.ZEJZL_TEST_POLICY}", "X-Frame-Options": "SAMEORIGIN", "Permissions-Policy": "camera=()",
			"Strict-Transport-Security": "max-age=60", "Server": "edge",
		},
		Delete: []string{"x-xss-protection", "Cross-Origin-Resource-Policy", "cache-control"},
	}})
	resp := r.must(t, 200, overTLS(r.chat()), func(w http.ResponseWriter, req *http.Request) error {
		w.Header().Add("Content-Security-Policy", "backend")
		w.Header().Add("Permissions-Policy", "backend")
		return respondOK(w, req)
	})
	wantHeaders(t, resp.Header, map[string][]string{
		"Content-Security-Policy": {"default-src 'self'"}, "X-Frame-Options": {"SAMEORIGIN"}, "Permissions-Policy": {"camera=()"},
		"Strict-Transport-Security": {"max-age=60"}, "Server": {"edge"},
		"X-Xss-Protection": nil, "Cross-Origin-Resource-Policy": nil, "Cache-Control": nil,
	})
	// An open path gets the article's headers, as the operator changed them, and no others.
	resp = r.must(t, 200, overTLS(newRequest("GET", "/other")), respondOK)
	wantHeaders(t, resp.Header, map[string][]string{
		"X-Frame-Options": {"SAMEORIGIN"}, "Strict-Transport-Security": {"max-age=60"}, "X-Content-Type-Options": {"nosniff"},
		"Content-Security-Policy": nil, "Permissions-Policy": nil, "X-Xss-Protection": nil,
	})
}

func TestHeaderRuleErrors(t *testing.T) {
	t.Setenv("ZEJZL_TEST_EMPTY", "")
	for want, ops := range map[string]HeaderOps{
		"-X-Foo: expected one of the guard's security headers": {Delete: []string{"X-Foo"}},
		`"bad name": expected a header name`:                   {Set: map[string]string{"bad name": "x"}},
		`"": expected a header name`:                           {Set: map[string]string{"": "x"}},
		"X-Custom: expected a valid header value":              {Set: map[string]string{"X-Custom": "a\r\nb"}},
		"X-Custom: ":                                                   {Set: map[string]string{"x-custom": "{env.ZEJZL_TEST_EMPTY}"}},
		"Vary is set by the guard":                                     {Set: map[string]string{"vary": "x"}},
		"X-Ratelimit-Limit is set by the guard":                        {Set: map[string]string{"X-RateLimit-Limit": "x"}},
		"X-Zejzl-Tier is set by the guard":                             {Set: map[string]string{"X-Zejzl-Tier": "x"}},
		"Access-Control-Allow-Origin is set by the guard":              {Set: map[string]string{"Access-Control-Allow-Origin": "*"}},
		"Retry-After is set by the guard":                              {Set: map[string]string{"Retry-After": "1"}},
		"Content-Length is set by the guard":                           {Set: map[string]string{"content-length": "1"}},
		"Openai-Organization is set by the guard":                      {Set: map[string]string{"OpenAI-Organization": "1"}},
		`"+x-Foo": expected a plain name, whose value replaces others`: {Set: map[string]string{"+X-Foo": "1"}},
		`">X-Foo": expected a plain name`:                              {Set: map[string]string{">X-Foo": "1"}},
		`"?x-foo": expected a plain name`:                              {Set: map[string]string{"?x-foo": "1"}},
		`"-X-Foo": expected a plain name`:                              {Set: map[string]string{"-X-Foo": "1"}},
		"-REDACTED: expected one of the guard's security headers":      {Delete: []string{"zejzl_auth-secret-in-its-place"}},
		`"REDACTED": expected a header name`:                           {Set: map[string]string{"foreign-secret.0123456789/abc": "1"}},
		"X-Custom is listed twice":                                     {Set: map[string]string{"x-custom": "1", "X-Custom": "2"}},
		"X-Frame-Options is listed twice":                              {Delete: []string{"X-Frame-Options", "x-frame-options"}},
		"Cache-Control is listed twice":                                {Delete: []string{"cache-control", "Cache-Control"}},
		"X-Content-Type-Options is listed twice":                       {Delete: []string{"X-Content-Type-Options"}, Set: map[string]string{"x-content-type-options": "a"}},
		"Strict-Transport-Security is listed twice":                    {Delete: []string{"strict-transport-security"}, Set: map[string]string{hstsHeader: "max-age=1"}},
	} {
		if _, err := newHeaderRules(&ops); err == nil || !strings.Contains(err.Error(), "headers: "+want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

func TestPagePolicy(t *testing.T) {
	r := newRig(t, new(Guard))
	for contentType, want := range map[string]string{
		"text/html": pagePolicy, "text/html; charset=utf-8": pagePolicy, " TEXT/HTML ;x": pagePolicy, "application/xhtml+xml": pagePolicy,
		"image/svg+xml": pagePolicy, "application/json": apiPolicy, "text/plain": apiPolicy, "text/htmlx": apiPolicy, "": apiPolicy,
	} {
		resp := r.must(t, 200, r.chat(), func(w http.ResponseWriter, req *http.Request) error {
			if contentType != "" {
				w.Header().Set("Content-Type", contentType)
			}
			return respondOK(w, req)
		})
		if got := resp.Header.Get("Content-Security-Policy"); got != want {
			t.Errorf("%q: %q", contentType, got)
		}
	}
}

func TestIsSecure(t *testing.T) {
	for _, c := range []struct {
		tls, trusted bool
		proto, host  string
		want         bool
	}{
		{true, false, "", "api.example.com", true},
		{true, false, "", "api.example.com:8443", true},
		{false, false, "", "api.example.com", false},
		{false, false, "https", "api.example.com", false},
		{false, true, "https", "api.example.com", true},
		{false, true, "HTTPS", "api.example.com", true},
		{false, true, "http", "api.example.com", false},
		{true, true, "http", "api.example.com", true},
		{true, false, "", "localhost", false},
		{false, true, "https", "10.0.0.1", false},
	} {
		r := newRequest("GET", "/")
		r.Host = c.host
		if c.tls {
			overTLS(r)
		}
		if c.proto != "" {
			r.Header.Set("X-Forwarded-Proto", c.proto)
		}
		r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), httptest.NewRecorder(), new(caddyhttp.Server))
		caddyhttp.SetVar(r.Context(), caddyhttp.TrustedProxyVarKey, c.trusted)
		if got := isSecure(r); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

func TestIsLocalName(t *testing.T) {
	for host, want := range map[string]bool{
		"": true, "localhost": true, "LOCALHOST:8443": true, "localhost.": true, "localhost.:80": true, "app.localhost": true,
		"a.b.localhost:1": true, "127.0.0.1": true, "192.168.1.2:443": true, "1.2.3.4.": true, "[::1]": true, "[2001:db8::1]:443": true,
		"api.example.com": false, "api.example.com:8443": false, "localhost.evil.example": false, "notlocalhost": false,
		"localhost1": false, "1.example": false, "127.0.0.1.nip.io": false, "xn--bcher-kva.example": false, "intranet": false,
	} {
		if got := isLocalName(host); got != want {
			t.Errorf("%q: %v", host, got)
		}
	}
}

func TestLimitHeaders(t *testing.T) {
	limited, err := newTier("team", Tier{Requests: []RequestLimit{
		{Limit: 5000, Window: caddy.Duration(24 * time.Hour)}, {Limit: 100, Window: caddy.Duration(time.Minute)},
	}})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.FixedZone("", 3600))
	for _, c := range []struct {
		verdict              window.Verdict
		wall                 time.Time
		seconds, goTime, rfc string
	}{
		{window.Verdict{Remaining: 99, Reset: time.Minute}, now, "60", "1m0s", "2030-01-02T02:05:05Z"},
		{window.Verdict{Remaining: 99, Reset: time.Microsecond}, now, "1", "1ms", "2030-01-02T02:04:06Z"},
		{window.Verdict{Remaining: 0, Reset: 11*time.Second + time.Microsecond}, now, "12", "11.001s", "2030-01-02T02:04:17Z"},
		{window.Verdict{Remaining: 7}, now, "0", "0s", "2030-01-02T02:04:05Z"},
		{window.Verdict{Remaining: 7, Reset: time.Second}, now.Add(time.Nanosecond), "1", "1s", "2030-01-02T02:04:07Z"},
		{window.Verdict{Remaining: 7, Reset: 6 * time.Minute}, now, "360", "6m0s", "2030-01-02T02:10:05Z"},
	} {
		for d, suffixes := range map[dialect]int{dialectZejzl: 0, dialectOpenAI: 1, dialectAnthropic: 2, dialectGemini: 0, dialectProblem: 0} {
			a := answer{guard: &Guard{clock: clock{wall: func() time.Time { return c.wall }}}, tier: limited, verdict: c.verdict, dialect: d}
			h := make(http.Header)
			a.setLimits(h)
			r := strings.TrimPrefix(strings.Split(h.Get("Ratelimit"), ";")[1], "r=")
			want := map[string][]string{
				"X-Ratelimit-Limit": {"100"}, "X-Ratelimit-Remaining": {r}, "X-Ratelimit-Reset": {c.seconds}, "X-Ratelimit-Tier": {"team"},
				"Ratelimit-Policy": {`"1m";q=100;w=60, "1d";q=5000;w=86400`}, "Ratelimit": {`"1m";r=` + r + `;t=` + c.seconds},
				"X-Ratelimit-Limit-Requests": nil, "Anthropic-Ratelimit-Requests-Limit": nil,
			}
			switch suffixes {
			case 1:
				want["X-Ratelimit-Limit-Requests"], want["X-Ratelimit-Remaining-Requests"] = []string{"100"}, []string{r}
				want["X-Ratelimit-Reset-Requests"] = []string{c.goTime}
			case 2:
				want["Anthropic-Ratelimit-Requests-Limit"], want["Anthropic-Ratelimit-Requests-Remaining"] = []string{"100"}, []string{r}
				want["Anthropic-Ratelimit-Requests-Reset"] = []string{c.rfc}
			}
			wantHeaders(t, h, want)
			if len(h) != 6+3*min(suffixes, 1) {
				t.Errorf("dialect %d: %v", d, h)
			}
		}
	}
	a := answer{guard: new(Guard), tier: limited, verdict: window.Verdict{Limit: 1, Remaining: 12, Reset: time.Hour}, dialect: dialectZejzl}
	h := make(http.Header)
	a.setLimits(h)
	wantHeaders(t, h, map[string][]string{"X-Ratelimit-Limit": {"5000"}, "X-Ratelimit-Remaining": {"12"}, "Ratelimit": {`"1d";r=12;t=3600`}})
}

// Header maps of other code may hold any name.
func TestDropsOddNames(t *testing.T) {
	a := answer{guard: new(Guard)}
	for name, want := range map[string]bool{
		"": false, "s": false, "SERVER": true, "via": true, "Viaduct": false, "ACCESS_CONTROL_ALLOW_ORIGIN": true, "Access": false,
		"x-powered-BY": true, "X_RateLimit.Foo": true, "RateLimit": true, "RateLimits": false, "X-Ratelimit": false,
	} {
		if got := a.drops(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
}

// A writer outside that deletes a header, as Caddy's `header -Name` does, hides
// no trailer.
func TestTrailersBesideDeletedHeaders(t *testing.T) {
	r := newRig(t, new(Guard))
	resp := r.must(t, http.StatusOK, r.chat(), func(w http.ResponseWriter, _ *http.Request) error {
		w.WriteHeader(http.StatusOK)
		h := w.Header()
		h.Del("Referrer-Policy")
		h.Set(http.TrailerPrefix+"X-Ratelimit-Limit", "7")
		h.Set(http.TrailerPrefix+"Digest", "d")
		return nil
	})
	if resp.Trailer.Get("X-Ratelimit-Limit") != "" || resp.Trailer.Get("Digest") != "d" {
		t.Errorf("trailers %v", resp.Trailer)
	}
}
