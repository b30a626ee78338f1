package integration

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// apiHeaders are the security headers of an API answer over plain HTTP to
// which a key was sent; an empty value stands for none.
var apiHeaders = map[string]string{
	"X-Content-Type-Options":       "nosniff",
	"X-Frame-Options":              "DENY",
	"X-XSS-Protection":             "1; mode=block",
	"Strict-Transport-Security":    "",
	"Referrer-Policy":              "no-referrer",
	"Content-Security-Policy":      "default-src 'none'; frame-ancestors 'none'",
	"Cross-Origin-Resource-Policy": "same-origin",
	"Server":                       "",
	"Via":                          "",
	"X-Powered-By":                 "",
}

const (
	pageCSP = "Content-Security-Policy: frame-ancestors 'none'"
	hsts    = "Strict-Transport-Security: max-age=31536000; includeSubDomains"
)

// checkSecurityHeaders fails the test unless each header is there exactly
// once; changed names those that differ, as "Name: value" or "Name: ".
func checkSecurityHeaders(t *testing.T, h http.Header, changed ...string) {
	t.Helper()
	want := maps.Clone(apiHeaders)
	for _, header := range changed {
		name, value, _ := strings.Cut(header, ": ")
		want[name] = value
	}
	for name, value := range want {
		got := h[http.CanonicalHeaderKey(name)]
		if value == "" && len(got) > 0 || value != "" && !slices.Equal(got, []string{value}) {
			t.Errorf("%s: got %q, want %q", name, got, value)
		}
	}
}

// wantVary fails the test unless Vary has all the names.
func wantVary(t *testing.T, h http.Header, names ...string) {
	t.Helper()
	var got []string
	for name := range strings.SplitSeq(strings.Join(h["Vary"], ","), ",") {
		got = append(got, strings.ToLower(strings.TrimSpace(name)))
	}
	for _, name := range names {
		if !slices.Contains(got, strings.ToLower(name)) {
			t.Errorf("Vary: got %q, want %s in it", h["Vary"], name)
		}
	}
}

// boast puts on an answer all that a guard must not let through.
func boast(h http.Header) {
	for _, header := range []string{
		"X-Content-Type-Options: sniff", "X-Frame-Options: SAMEORIGIN", "X-Frame-Options: ALLOWALL",
		"X-XSS-Protection: 0", "Referrer-Policy: unsafe-url",
		"Server: uvicorn", "Via: 1.1 inner", "X-Powered-By: Express",
		"X-RateLimit-Limit: 7777", "x-ratelimit-remaining-tokens: 7777", "RateLimit: 7777", "RateLimit-Policy: 7777",
		"RateLimit-Reset: 7777", "anthropic-ratelimit-tokens-limit: 7777", "anthropic-organization-id: org-7777",
		"openai-organization: org-7777", "openai-project: 7777", "X-Zejzl-Key-Id: 7777", "X-Zejzl-Other: 7777",
		"X_Zejzl_Tier: 7777", "Access-Control-Allow-Origin: *", "Access-Control-Allow-Credentials: true",
		"Access-Control-Expose-Headers: X-Secret",
		"Retry-After: 17", "Retry-After-Ms: 17001", "x-should-retry: true", "request-id: req-17", "X-Custom: kept",
	} {
		name, value, _ := strings.Cut(header, ": ")
		h[http.CanonicalHeaderKey(name)] = append(h[http.CanonicalHeaderKey(name)], value)
	}
}

// wantModest checks an answer of a backend that boasts.
func wantModest(t *testing.T, r *reply) {
	t.Helper()
	for name, lines := range r.Header {
		if strings.Contains(strings.Join(lines, " "), "7777") {
			t.Errorf("%s: %q came through", name, lines)
		}
		if strings.HasPrefix(name, "Access-Control-") {
			t.Errorf("%s: %q came through", name, lines)
		}
	}
	r.wantHeader(t, "Retry-After", "17")
	r.wantHeader(t, "Retry-After-Ms", "17001")
	r.wantHeader(t, "X-Should-Retry", "true")
	r.wantHeader(t, "Request-Id", "req-17")
	r.wantHeader(t, "X-Custom", "kept")
}

// TestSecurityHeadersOfBackend: whatever status and header a backend sends.
func TestSecurityHeadersOfBackend(t *testing.T) {
	target := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		boast(w.Header())
		switch r.URL.Path {
		case "/early":
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
		case "/json":
			w.Header().Set("Content-Type", "application/json")
		case "/own":
			w.Header().Set("Content-Security-Policy", "default-src 'self'")
			w.Header().Set("Cross-Origin-Resource-Policy", "cross-origin")
			w.Header().Set("Cache-Control", "public, max-age=60")
		case "/html":
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
		case "/xhtml":
			w.Header().Set("Content-Type", "Application/XHTML+xml")
		case "/svg":
			w.Header().Set("Content-Type", "image/svg+xml")
		case "/401", "/404", "/429", "/500", "/304", "/204":
			w.WriteHeader(map[string]int{"/401": 401, "/404": 404, "/429": 429, "/500": 500, "/304": 304, "/204": 204}[r.URL.Path])
		}
	})
	key := newKey(t)
	site, addr := plainSite(t, "\tzejzl_auth\n\treverse_proxy "+target)
	start(t, preamble(t, "")+site, "ZEJZL_API_KEY_A="+key+":enterprise")

	for _, tc := range []struct {
		method, path string
		status       int
		changed      []string
	}{
		{"GET", "/", 200, nil},
		{"HEAD", "/", 200, nil},
		{"POST", "/json", 200, nil},
		{"OPTIONS", "/", 200, nil},
		{"GET", "/204", 204, nil},
		{"GET", "/304", 304, nil},
		{"GET", "/401", 401, nil},
		{"GET", "/404", 404, nil},
		{"GET", "/429", 429, nil},
		{"GET", "/500", 500, nil},
		{"GET", "/early", 200, nil},
		{"GET", "/html", 200, []string{pageCSP}},
		{"GET", "/xhtml", 200, []string{pageCSP}},
		{"GET", "/svg", 200, []string{pageCSP}},
		{"GET", "/own", 200, []string{"Content-Security-Policy: default-src 'self'", "Cross-Origin-Resource-Policy: cross-origin"}},
	} {
		t.Run(tc.method+tc.path, func(t *testing.T) {
			r := ask(t, tc.method, "http://"+addr+tc.path, "X-API-Key: "+key).wantStatus(t, tc.status)
			checkSecurityHeaders(t, r.Header, tc.changed...)
			wantModest(t, r)
			wantVary(t, r.Header, "Authorization", "X-API-Key")
			if !hasLimitHeaders(r.Header) {
				t.Error("no limit headers")
			}
			if tc.path == "/own" {
				r.wantHeader(t, "Cache-Control", "public, max-age=60")
			} else {
				r.wantHeader(t, "Cache-Control", "no-store")
			}
		})
	}
}

// TestSecurityHeadersOfHandlers: also where no backend answers, and where the
// one behind misbehaves.
func TestSecurityHeadersOfHandlers(t *testing.T) {
	key := newKey(t)
	site, addr := plainSite(t, `
	zejzl_auth {
		public /public
	}
	redir /old /new 301
	handle /respond {
		respond "hello" 201
	}
	handle /public {
		respond "hello"
	}
	handle /copy {
		misbehave copy "copied text"
	}
	handle /flush {
		misbehave flush "flushed text"
	}
	handle /nothing {
		misbehave nothing
	}
	handle /error-late {
		misbehave error-late later
	}
	handle /proxied-page {
		header Content-Type text/html
		respond "<p>"
	}
	handle /encoded {
		encode gzip
		header Content-Type text/plain
		respond "`+strings.Repeat("long enough to compress ", 100)+`"
	}
	handle {
		root DIR
		file_server
	}`)
	s := start(t, preamble(t, "")+site, "ZEJZL_API_KEY_A="+key+":enterprise")
	s.write("notes.txt", "0123456789")
	s.write("page.html", "<p>")
	s.write("image.svg", "<svg/>")
	url, with := "http://"+addr, "X-API-Key: "+key
	modified := ask(t, "GET", url+"/notes.txt", with).wantStatus(t, 200).Header

	for _, tc := range []struct {
		path    string
		status  int
		text    string
		headers []string
		changed []string
	}{
		{"/respond", 201, "hello", nil, nil},
		{"/copy", 200, "copied text", nil, nil},
		{"/flush", 200, "flushed text", nil, nil},
		{"/nothing", 200, "", nil, nil},
		{"/error-late", 200, "begun", nil, nil},
		{"/old", 301, "", nil, nil},
		{"/proxied-page", 200, "<p>", nil, []string{pageCSP}},
		{"/notes.txt", 200, "0123456789", nil, nil},
		{"/notes.txt", 206, "234", []string{"Range: bytes=2-4"}, nil},
		{"/notes.txt", 416, "", []string{"Range: bytes=99-100"}, nil},
		{"/notes.txt", 304, "", []string{"If-None-Match: " + modified.Get("Etag")}, nil},
		{"/page.html", 200, "<p>", nil, []string{pageCSP}},
		{"/image.svg", 200, "<svg/>", nil, []string{pageCSP}},
		{"/missing.txt", 404, "", nil, nil},
		{"/encoded", 200, "", []string{"Accept-Encoding: gzip"}, nil},
	} {
		t.Run(tc.path, func(t *testing.T) {
			r := ask(t, "GET", url+tc.path, append(tc.headers, with)...).wantStatus(t, tc.status)
			checkSecurityHeaders(t, r.Header, tc.changed...)
			wantVary(t, r.Header, "Authorization", "X-API-Key")
			r.wantHeader(t, "Cache-Control", "no-store")
			if tc.text != "" && r.text != tc.text {
				t.Errorf("body %q, want %q", r.text, tc.text)
			}
			if !hasLimitHeaders(r.Header) {
				t.Error("no limit headers")
			}
			if tc.path == "/encoded" {
				wantVary(t, r.Header, "Accept-Encoding")
				r.wantHeader(t, "Content-Encoding", "gzip")
			}
		})
	}
	t.Run("public", func(t *testing.T) {
		r := ask(t, "GET", url+"/public").wantStatus(t, 200)
		checkSecurityHeaders(t, r.Header)
		r.wantHeader(t, "Cache-Control") // nobody's answer: the backend may say that it can be stored
		r.wantHeader(t, "Vary")
		ask(t, "GET", url+"/public", with).wantStatus(t, 200).wantHeader(t, "Cache-Control", "no-store")
	})
}

// TestSecurityHeadersOfOperator: what the operator set before the guard stays,
// what is deferred comes last, and the guard's own block does as it says.
func TestSecurityHeadersOfOperator(t *testing.T) {
	target := newBackend(t, func(w http.ResponseWriter, _ *http.Request) { boast(w.Header()) })
	key := newKey(t)
	front, frontAddr := plainSite(t, `
	header X-Frame-Options SAMEORIGIN
	header Content-Security-Policy "default-src https:"
	header Server mine
	header Referrer-Policy origin
	zejzl_auth
	reverse_proxy `+target)
	deferred, deferredAddr := plainSite(t, `
	header {
		X-Frame-Options SAMEORIGIN
		-X-XSS-Protection
		X-Deferred yes
		defer
	}
	zejzl_auth
	reverse_proxy `+target)
	block, blockAddr := plainSite(t, `
	zejzl_auth {
		headers {
			Content-Security-Policy "default-src 'self'"
			Permissions-Policy "geolocation=()"
			X-Frame-Options SAMEORIGIN
			-X-XSS-Protection
			-Referrer-Policy
			-Cross-Origin-Resource-Policy
			-Cache-Control
		}
	}
	reverse_proxy `+target)
	start(t, preamble(t, "")+front+deferred+block, "ZEJZL_API_KEY_A="+key+":enterprise")

	for _, tc := range []struct {
		name, addr string
		changed    []string
	}{
		{"front", frontAddr, []string{
			"X-Frame-Options: SAMEORIGIN", "Content-Security-Policy: default-src https:", "Server: mine", "Referrer-Policy: origin",
		}},
		{"deferred", deferredAddr, []string{"X-Frame-Options: SAMEORIGIN", "X-XSS-Protection: ", "X-Deferred: yes"}},
	} {
		for _, headers := range [][]string{{"X-API-Key: " + key}, nil} {
			r := ask(t, "GET", "http://"+tc.addr+"/", headers...)
			t.Logf("%s: %d", tc.name, r.StatusCode)
			checkSecurityHeaders(t, r.Header, tc.changed...)
			if headers != nil {
				wantModest(t, r.wantStatus(t, 200))
			} else {
				r.wantStatus(t, 401)
			}
		}
	}

	own := []string{
		"Content-Security-Policy: default-src 'self'", "Permissions-Policy: geolocation=()", "X-Frame-Options: SAMEORIGIN",
		"X-XSS-Protection: ", "Cross-Origin-Resource-Policy: ",
	}
	// What the block leaves out is the backend's again.
	r := ask(t, "GET", "http://"+blockAddr+"/", "X-API-Key: "+key).wantStatus(t, 200)
	checkSecurityHeaders(t, r.Header, append(own, "X-XSS-Protection: 0", "Referrer-Policy: unsafe-url")...)
	r.wantHeader(t, "Cache-Control")
	r = ask(t, "GET", "http://"+blockAddr+"/").wantStatus(t, 401)
	checkSecurityHeaders(t, r.Header, append(own, "Referrer-Policy: ")...)
	r.wantHeader(t, "Cache-Control", "no-store") // of every refusal
}

// TestOpenPathHeaders: outside protect an answer gets the article's headers
// and nothing else.
func TestOpenPathHeaders(t *testing.T) {
	target := newBackend(t, func(w http.ResponseWriter, _ *http.Request) { boast(w.Header()) })
	site, addr := plainSite(t, "\tzejzl_auth {\n\t\tprotect /api/*\n\t}\n\treverse_proxy "+target)
	start(t, preamble(t, "")+site, "ZEJZL_API_KEY_A="+newKey(t)+":free")
	r := ask(t, "GET", "http://"+addr+"/page").wantStatus(t, 200)
	r.wantHeader(t, "X-Content-Type-Options", "nosniff")
	r.wantHeader(t, "X-Frame-Options", "DENY")
	r.wantHeader(t, "X-XSS-Protection", "1; mode=block")
	for name, lines := range map[string][]string{
		"Referrer-Policy": {"unsafe-url"}, "Access-Control-Allow-Origin": {"*"}, "X-Powered-By": {"Express"},
		"Content-Security-Policy": nil, "Cross-Origin-Resource-Policy": nil, "Cache-Control": nil, "Vary": nil,
		"X-RateLimit-Limit": {"7777"},
	} {
		r.wantHeader(t, name, lines...)
	}
	ask(t, "GET", "http://"+addr+"/api/page").wantStatus(t, 401)
}
