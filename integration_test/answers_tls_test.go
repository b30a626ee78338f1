package integration

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// TestHSTS: over TLS for names of the network, never for this machine's.
func TestHSTS(t *testing.T) {
	target := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/modest" {
			w.Header().Set("Strict-Transport-Security", "max-age=1")
		}
	})
	port := freePort(t)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	key := newKey(t)
	config := preamble(t, "")
	hosts := []string{"example.test", "localhost", "api.localhost", "127.0.0.1"}
	for _, host := range hosts {
		config += fmt.Sprintf(`https://%s:%d {
	bind 127.0.0.1
	tls internal
	zejzl_auth {
		protect /api/*
		public /api/status
	}
	handle /api/missing {
		error "no" 404
	}
	handle /api/panic {
		misbehave panic
	}
	reverse_proxy %s
}
`, host, port, target)
	}
	s := start(t, config, "ZEJZL_API_KEY_A="+key+":enterprise")
	h2 := s.client(addr)
	h1 := s.client(addr)
	h1.Transport.(*http.Transport).ForceAttemptHTTP2 = false
	h1.Transport.(*http.Transport).TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}

	s.waitForCertificates(addr, hosts...)
	for proto, client := range map[int]*http.Client{1: h1, 2: h2} {
		for _, host := range hosts {
			want := []string{"max-age=31536000; includeSubDomains"}
			if host != "example.test" {
				want = nil
			}
			for _, tc := range []struct {
				path   string
				key    bool
				status int
			}{
				{"/api/modest", false, 401},
				{"/api/status", false, 200},
				{"/api/modest/..", true, 400},
				{"/api/missing", true, 404},
				{"/api/panic", true, 500},
				{"/modest", false, 200},
				{"/api/x", true, 200},
			} {
				if want == nil && tc.status == 200 && tc.path != "/modest" {
					continue // the backend's own word
				}
				req := newRequest(t, http.MethodGet, fmt.Sprintf("https://%s:%d%s", host, port, tc.path), "")
				if tc.key {
					req.Header.Set("X-API-Key", key)
				}
				r := do(t, client, req).wantStatus(t, tc.status)
				if r.ProtoMajor != proto {
					t.Fatalf("HTTP/%d, want %d", r.ProtoMajor, proto)
				}
				if got := r.Header["Strict-Transport-Security"]; !slices.Equal(got, want) {
					t.Errorf("HTTP/%d %s%s: Strict-Transport-Security %q, want %q", proto, host, tc.path, got, want)
				}
			}
		}
	}
}

// waitForCertificates: `tls internal` makes them after the server is up.
func (s *server) waitForCertificates(addr string, hosts ...string) {
	s.t.Helper()
	for _, host := range hosts {
		s.waitUntil("a certificate for "+host, func() bool {
			conn, err := tls.Dial("tcp", addr, &tls.Config{RootCAs: s.roots(), ServerName: host})
			if err != nil {
				return false
			}
			return conn.Close() == nil
		})
	}
}

// TestHSTSBehindProxy: X-Forwarded-Proto counts only from a trusted proxy.
func TestHSTSBehindProxy(t *testing.T) {
	site := func() (string, string) {
		port := freePort(t)
		return fmt.Sprintf("http://:%d {\n\tbind 127.0.0.1\n\tzejzl_auth\n\trespond ok\n}\n", port), fmt.Sprintf("127.0.0.1:%d", port)
	}
	behind, behindAddr := site()
	direct, directAddr := site()
	start(t, preamble(t, "servers "+behindAddr+" {\n\t\ttrusted_proxies static 127.0.0.1/32\n\t}")+behind+direct)
	for _, tc := range []struct {
		addr, host, proto string
		want              bool
	}{
		{behindAddr, "example.test", "https", true},
		{behindAddr, "example.test", "HTTPS", true},
		{behindAddr, "example.test", "http", false},
		{behindAddr, "example.test", "", false},
		{behindAddr, "localhost", "https", false},
		{behindAddr, "127.0.0.1:80", "https", false},
		{behindAddr, "[::1]:80", "https", false},
		{directAddr, "example.test", "https", false},
	} {
		r := ask(t, http.MethodGet, "http://"+tc.addr+"/", "Host: "+tc.host, "X-Forwarded-Proto: "+tc.proto).wantStatus(t, 401)
		if got := len(r.Header["Strict-Transport-Security"]); got > 1 || (got == 1) != tc.want {
			t.Errorf("%+v: %d HSTS headers", tc, got)
		}
	}
}

// TestCORSOnEveryAnswer: a page of an allowed origin can read refusals and
// errors too, and a page of another can read nothing.
func TestCORSOnEveryAnswer(t *testing.T) {
	const origin, foreign = "https://app.example.test", "https://evil.example"
	target := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		boast(w.Header())
		w.Header().Set("Vary", "Accept")
	})
	key, slow := newKey(t), newKey(t)
	site, addr := plainSite(t, fmt.Sprintf(`
	zejzl_auth {
		public /status
		cors %s {
			credentials
			expose X-Model
		}
		tier slow 1/1h
	}
	request_body {
		max_size 1KB
	}
	handle /forbidden {
		error "no" 403
	}
	handle /missing {
		error "no" 404
	}
	handle /panic {
		misbehave panic
	}
	handle /dead {
		reverse_proxy 127.0.0.1:%d
	}
	handle {
		reverse_proxy %s
	}`, origin, freePort(t), target))
	start(t, preamble(t, "zejzl {\n\t\ttier slow 1/1h\n\t}")+site, "ZEJZL_API_KEY_A="+key+":enterprise", "ZEJZL_API_KEY_B="+slow+":slow")
	url := "http://" + addr

	for _, tc := range []struct {
		name, method, path, key, body string
		status                        int
	}{
		{"backend", "GET", "/x", key, "", 200},
		{"public", "GET", "/status", "", "", 200},
		{"no key", "GET", "/x", "", "", 401},
		{"bad key", "GET", "/x", "no-key-of-anybody-at-all-1", "", 401},
		{"bad path", "GET", "/a/../x", key, "", 400},
		{"forbidden", "GET", "/forbidden", key, "", 403},
		{"missing", "GET", "/missing", key, "", 404},
		{"method", "TRACE", "/x", key, "", 405},
		{"large", "POST", "/x", key, strings.Repeat("x", 2048), 413},
		{"full", "GET", "/x", slow, "", 429},
		{"panic", "GET", "/panic", key, "", 500},
		{"dead", "GET", "/dead", key, "", 502},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.status == 429 {
				ask(t, "GET", url+tc.path, "X-API-Key: "+tc.key).wantStatus(t, 200)
			}
			for _, from := range []string{origin, foreign, "null", ""} {
				req := newRequest(t, tc.method, url+tc.path, tc.body)
				if tc.key != "" {
					req.Header.Set("X-API-Key", tc.key)
				}
				if from != "" {
					req.Header.Set("Origin", from)
				}
				r := do(t, plainClient, req).wantStatus(t, tc.status)
				checkSecurityHeaders(t, r.Header)
				wantVary(t, r.Header, "Origin")
				if tc.name == "backend" {
					wantVary(t, r.Header, "Accept", "X-API-Key", "Authorization")
				}
				wantCORS(t, r, map[bool]string{true: origin}[from == origin])
			}
		})
	}

	t.Run("preflight", func(t *testing.T) {
		asks := []string{"Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization,content-type,x-stainless-os"}
		r := ask(t, "OPTIONS", url+"/x", append(asks, "Origin: "+origin)...).wantStatus(t, 204)
		checkSecurityHeaders(t, r.Header)
		r.wantHeader(t, "Access-Control-Allow-Origin", origin)
		r.wantHeader(t, "Access-Control-Allow-Credentials", "true")
		r.wantHeader(t, "Access-Control-Max-Age", "3600")
		r.wantHeader(t, "Content-Length")
		wantVary(t, r.Header, "Origin")
		if hasLimitHeaders(r.Header) || r.text != "" {
			t.Errorf("a preflight told more than it should: %v %q", r.Header, r.text)
		}
		r = ask(t, "OPTIONS", url+"/x", append(asks, "Origin: "+foreign)...).wantStatus(t, 403)
		checkSecurityHeaders(t, r.Header)
		wantVary(t, r.Header, "Origin")
		wantCORS(t, r, "")
	})
}

// wantCORS: the origin and what its pages may read, or nothing at all.
func wantCORS(t *testing.T, r *reply, origin string) {
	t.Helper()
	if origin == "" {
		for name, lines := range r.Header {
			if strings.HasPrefix(name, "Access-Control-") {
				t.Errorf("%s: %q for an origin that is not allowed", name, lines)
			}
		}
		return
	}
	r.wantHeader(t, "Access-Control-Allow-Origin", origin)
	r.wantHeader(t, "Access-Control-Allow-Credentials", "true")
	exposed := strings.ToLower(strings.Join(r.Header["Access-Control-Expose-Headers"], ","))
	for _, name := range []string{"retry-after", "retry-after-ms", "x-should-retry", "x-request-id", "x-ratelimit-remaining", "ratelimit", "x-model"} {
		if !slices.Contains(strings.Split(strings.ReplaceAll(exposed, " ", ""), ","), name) {
			t.Errorf("%s is not exposed: %s", name, exposed)
		}
	}
}

// TestCORSOfBackend: with `cors backend` both the preflight and the headers
// are the backend's.
func TestCORSOfBackend(t *testing.T) {
	target := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Access-Control-Allow-Origin", "https://own.example")
		w.Header().Set("X-Method", r.Method)
	})
	site, addr := plainSite(t, "\tzejzl_auth {\n\t\tcors backend\n\t}\n\treverse_proxy "+target)
	start(t, preamble(t, "")+site)
	r := ask(t, "OPTIONS", "http://"+addr+"/x", "Origin: https://own.example", "Access-Control-Request-Method: POST").wantStatus(t, 200)
	r.wantHeader(t, "Access-Control-Allow-Origin", "https://own.example")
	r.wantHeader(t, "X-Method", "OPTIONS")
	checkSecurityHeaders(t, r.Header)
	ask(t, "POST", "http://"+addr+"/x", "Origin: https://own.example").wantStatus(t, 401)
}
