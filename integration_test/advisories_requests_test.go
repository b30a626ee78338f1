package integration

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func proxyHeader(t *testing.T, a *advisory) {
	for _, line := range []string{"POST /api/chat", "GET /api/status"} {
		for _, key := range []string{a.k, "unknown"} {
			r := a.ask(t, line, "Proxy: http://evil.example", "proxy: http://evil.example", "X-API-Key: "+key)
			if r.StatusCode == 401 {
				continue
			}
			if got := a.one(t).folded("proxy"); len(got) > 0 {
				t.Errorf("%s: the backend was sent %q", line, got)
			}
		}
	}
}

func forwardedProto(t *testing.T, a *advisory) {
	for _, value := range []string{"https", "https\" onload=\"x", "javascript", "https, http"} {
		for _, line := range []string{"GET /api/status", "POST /api/chat", "OPTIONS /api/chat"} {
			r := a.ask(t, line, "Host: api.example.com", "X-Forwarded-Proto: "+value, "X-Forwarded-Host: evil.example", "X-Forwarded-Port: 31337", "Forwarded: proto="+value)
			all := fmt.Sprint(r.Header) + r.body
			if strings.Contains(all, "evil.example") || strings.Contains(all, "31337") || strings.Contains(all, value) && value != "https" {
				t.Errorf("a forwarded header came back: %s", all)
			}
			if hsts := r.Header.Get("Strict-Transport-Security"); hsts != "" {
				t.Errorf("HSTS %q on the word of a client over plain HTTP", hsts)
			}
		}
	}
	a.take()
}

func connectionDropsIdentity(t *testing.T, a *advisory) {
	for _, connection := range []string{
		"Connection: close, X-Zejzl-Key-Id", "Connection: x-zejzl-key-id, x-zejzl-tier, X-ZEJZL-KEY-NAME", "Connection: X-Zejzl-Tier",
		"Connection: keep-alive\r\nConnection: X-Zejzl-Key-Id\r\nConnection: X-Zejzl-Tier,X-Zejzl-Key-Name", "Connection:\tX-Zejzl-Key-Id\t,\tX-Zejzl-Tier ,, X-Zejzl-Key-Name",
		"Proxy-Connection: X-Zejzl-Key-Id", "Keep-Alive: X-Zejzl-Key-Id\r\nConnection: Keep-Alive, X-Zejzl-Key-Id", "Connection: X_Zejzl_Key_Id, X.Zejzl.Tier, X-Zejzl-Key-Id",
	} {
		for _, line := range []string{"POST /api/chat", "GET /api/status"} {
			a.ask(t, line, "X-API-Key: "+a.k, connection).wants(t, 200, "")
			got := a.one(t).folded("x-zejzl-")
			slices.Sort(got)
			if want := []string{"X-Zejzl-Key-Id: " + idOf(a.k), "X-Zejzl-Key-Name: alice", "X-Zejzl-Tier: roomy"}; !slices.Equal(got, want) {
				t.Errorf("%s, %q: the backend was told %q, want %q", line, connection, got, want)
			}
		}
	}
	// The credential is read before the proxy looks at Connection, and is gone for the backend either way.
	a.ask(t, "POST /api/chat", "X-API-Key: "+a.k, "Connection: X-API-Key, Authorization").wants(t, 200, "")
	a.one(t).noSecret(t, a.k)
}

func connectionDropsForwarded(t *testing.T, a *advisory) {
	r := a.ask(t, "POST /api/chat", "X-API-Key: "+a.k, "Connection: X-Forwarded-For, X-Forwarded-Proto, X-Forwarded-Host, X-Request-Id")
	r.wants(t, 200, "")
	s := a.one(t)
	for name, want := range map[string]string{"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http", "X-Forwarded-Host": a.addr[0]} {
		if got := s.get(name); !slices.Equal(got, []string{want}) {
			t.Errorf("%s: %q, want %s", name, got, want)
		}
	}
	if r := a.ask(t, "POST /api/chat", "Connection: X-Request-Id, X-Content-Type-Options, Cache-Control"); r.Header.Get("X-Request-Id") == "" ||
		r.Header.Get("X-Content-Type-Options") == "" || r.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("Connection of the request took headers from the answer: %v", r.Header)
	}
}

// clientAddress tells a false address in every header that ever carried one.
func clientAddress(t *testing.T, a *advisory) {
	const forged = "203.0.113.9"
	var fields []string
	for _, name := range []string{
		"X-Forwarded-For", "X_Forwarded_For", "X.Forwarded.For", "x-forwarded_for", "X-Real-IP", "X_Real_IP", "True-Client-IP", "CF-Connecting-IP", "X-Client-IP",
		"X-Cluster-Client-IP", "X-Originating-IP", "X-Remote-Addr", "Client-IP", "Fastly-Client-IP",
	} {
		fields = append(fields, name+": "+forged)
	}
	fields = append(fields, "Forwarded: for="+forged)
	g := guarded(t, roomy, `
http://:PORT0 {
	bind 127.0.0.1
	zejzl_auth {
		key {env.K} roomy
		log_success all
	}
	reverse_proxy BACKEND
}`, "K="+a.k)
	g.ask(t, "POST /api/chat", fields...).wants(t, 401, "missing_key")
	g.ask(t, "POST /api/chat", append(fields, "X-API-Key: "+a.k)...).wants(t, 200, "")
	if got := g.one(t).get("X-Forwarded-For"); !slices.Equal(got, []string{"127.0.0.1"}) {
		t.Errorf("X-Forwarded-For: %q", got)
	}
	g.waitUntil("log lines", func() bool {
		return strings.Contains(g.log.String(), "request refused") && strings.Contains(g.log.String(), `"authenticated"`)
	})
	if log := g.log.String(); strings.Contains(log, forged) || !strings.Contains(log, `"client_ip":"127.0.0.1"`) {
		t.Errorf("the client chose its address:\n%s", log)
	}
}

func forwardedPrefix(t *testing.T, a *advisory) {
	fields := []string{"X-Forwarded-Prefix: /api/status", "X-Forwarded-Uri: /api/status", "X-Forwarded-Port: 443", "X-Forwarded-Path: /api/status", "X-Script-Name: /api/status"}
	a.ask(t, "GET /api/chat", fields...).wants(t, 401, "missing_key")
	a.ask(t, "GET /chat", fields...).wants(t, 401, "missing_key")
	a.none(t)
	r := a.ask(t, "GET /api/status", append(fields, "Host: api.example.com")...)
	r.wants(t, 200, "")
	a.one(t)
	if hsts := r.Header.Get("Strict-Transport-Security"); hsts != "" {
		t.Errorf("HSTS %q", hsts)
	}
}

// strippedTraversal is the guard behind a strip: TestRewrites has the table.
func strippedTraversal(t *testing.T, a *advisory) {
	g := guarded(t, roomy, `
http://:PORT0 {
	bind 127.0.0.1
	route {
		uri strip_prefix /pre
		zejzl_auth {
			public /api/status
			key {env.K} roomy
		}
		reverse_proxy BACKEND
	}
}`, "K="+a.k)
	for _, uri := range []string{"/pre/api/status", "/pre/../api/status", "/pre..%2fapi/status", "/pre%2f..%2fapi/status", "/pre/..;/api/status", "/pre//api/status", "/pre/pre/api/status"} {
		if r := g.ask(t, "GET "+uri); r.StatusCode != 401 && r.StatusCode != 400 {
			t.Errorf("GET %s: status %d", uri, r.StatusCode)
		}
	}
	g.none(t)
	g.ask(t, "GET /api/status").wants(t, 200, "")
	g.one(t)
}

func repeatedHeaders(t *testing.T, a *advisory) {
	const origin = "Origin: https://app.example.com"
	for name, fields := range map[string][]string{
		"origins":                {origin, "Origin: https://evil.example"},
		"origins, foreign first": {"Origin: https://evil.example", origin},
		"equal origins":          {origin, origin},
	} {
		for header := range a.ask(t, "POST /api/chat", fields...).Header {
			if strings.HasPrefix(header, "Access-Control-") {
				t.Errorf("%s: the answer has %s", name, header)
			}
		}
		a.ask(t, "OPTIONS /api/chat", append(fields, "Access-Control-Request-Method: POST")...).wants(t, 403, "forbidden")
	}
	a.ask(t, "OPTIONS /api/chat", origin, "Access-Control-Request-Method: POST", "Access-Control-Request-Method: GET").wants(t, 403, "forbidden")
	a.ask(t, "POST /api/chat", "X-API-Key: "+a.k, "X-API-Key: "+a.nameless).wants(t, 400, "ambiguous_key")
	a.none(t)
	a.ask(t, "POST /api/chat", "X-API-Key: "+a.k, "X-Zejzl-Tier: a", "X-Zejzl-Tier: b", "Vary: x").wants(t, 200, "")
	if got := a.one(t).get("X-Zejzl-Tier"); !slices.Equal(got, []string{"roomy"}) {
		t.Errorf("tier %q", got)
	}
}

// earlyData is one row of TestEarlyBytes.
func earlyData(t *testing.T, a *advisory) {
	before := len(a.bytes())
	for _, upgrade := range []string{"websocket", "h2c"} {
		resp, body := rawUpgrade(t, a.addr[0], "GET /ws/yes HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: "+upgrade+"\r\n\r\n", "GET /ws/yes HTTP/1.1\r\nHost: a\r\n\r\n")
		if resp.StatusCode != 401 || strings.Contains(body, " 200 ") {
			t.Errorf("status %d, then %q", resp.StatusCode, body)
		}
	}
	if sent := a.bytes()[before:]; sent != "" {
		t.Errorf("the backend was sent %q", sent)
	}
}

func oddTargets(t *testing.T, a *advisory) {
	for _, line := range []string{
		"CONNECT backend:443", "CONNECT /api/status", "CONNECT *", "CONNECT http://inside/", "CONNECT :443", "GET *", "HEAD *", "OPTIONS *", "OPTIONS http://inside", "GET http://",
		"GET ?", "GET //", "GET http:///api/status", "GET http:/api/status", "GET urn:x", "GET a:b@c", "GET %", "GET #",
	} {
		for _, fields := range [][]string{nil, {"Host:"}} {
			if r := a.ask(t, line, fields...); r.StatusCode < 400 && line != "OPTIONS *" || r.StatusCode >= 500 {
				t.Errorf("%s: status %d", line, r.StatusCode)
			}
		}
	}
	a.none(t)
}

// clientLeaves closes the connection at every byte of the answer of a key that
// has one slot: each time the slot is free again, and only once.
func clientLeaves(t *testing.T, a *advisory) {
	g := guarded(t, "\tzejzl {\n\t\ttier single 100000/1m {\n\t\t\tconcurrent 1\n\t\t}\n\t}\n\tservers {\n\t\tprotocols h1 h2c\n\t}", `
http://:PORT0 {
	bind 127.0.0.1
	zejzl_auth {
		key {env.K} single
	}
	reverse_proxy BACKEND
}`, "K="+a.k)
	request := "POST /api/chat HTTP/1.1\r\nHost: a\r\nX-API-Key: " + a.k + "\r\n\r\n"
	free := func() {
		t.Helper()
		g.waitUntil("a free slot", func() bool {
			resp, _ := raw(t, g.addr[0], "POST", request)
			return resp.StatusCode == 200
		})
	}
	dial := func(text string) net.Conn {
		conn, err := net.Dial("tcp", g.addr[0])
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	last := strings.Replace(request, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1)
	probe := dial(last)
	whole, _ := io.ReadAll(probe)
	probe.Close()
	for n := 0; n <= len(whole); n++ {
		if n > 40 && n < len(whole)-40 && n%16 != 0 {
			continue
		}
		free()
		conn := dial(last)
		got := make([]byte, n)
		_, _ = io.ReadFull(conn, got)
		_ = conn.(*net.TCPConn).SetLinger(0) // a reset, not a polite end
		conn.Close()
		if n >= 12 && string(got[9:12]) == "429" {
			n-- // the slot was given back only after the answer to free had left
		}
	}
	free()
	client := http2(t)
	for range 50 { // streams that are reset while the backend waits for the body
		ctx, cancel := context.WithCancel(context.Background())
		body, hold := io.Pipe()
		req, _ := http.NewRequestWithContext(ctx, "POST", "http://"+g.addr[0]+"/api/chat", body)
		req.Header.Set("X-API-Key", a.k)
		done := make(chan struct{})
		go func() {
			defer close(done)
			if resp, err := client.Do(req); err == nil {
				resp.Body.Close()
			}
		}()
		_, _ = hold.Write([]byte("begun"))
		cancel()
		hold.Close()
		<-done
		free()
	}
	// Freed twice, the slot would now let two in.
	var held net.Conn
	g.waitUntil("a held slot", func() bool {
		held = dial(strings.Replace(request, "\r\n\r\n", "\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n", 1))
		status := make([]byte, len("HTTP/1.1 100 Continue\r\n\r\n"))
		_, err := io.ReadFull(held, status)
		return err == nil && string(status[9:12]) == "100"
	})
	defer held.Close()
	g.ask(t, "POST /api/chat", "X-API-Key: "+a.k).wants(t, 429, "concurrency_limited")
	_, _ = io.WriteString(held, "body")
	if resp, _ := readResponse(t, held, "POST"); resp.StatusCode != 200 {
		t.Errorf("the held request ended with %d", resp.StatusCode)
	}
	free()
}

// gullibleBackend is a backend that normalises whatever it can before it
// chooses a route. No spelling leads from a public path to a protected route.
func gullibleBackend(t *testing.T, a *advisory) {
	var secret, calls atomic.Int64
	normal := func(uri string) string {
		p, _, _ := strings.Cut(uri, "?")
		p, _, _ = strings.Cut(p, "#")
		for range 2 {
			if decoded, err := url.PathUnescape(p); err == nil {
				p = decoded
			}
		}
		p, _, _ = strings.Cut(strings.ToLower(strings.ReplaceAll(p, `\`, "/")), "\x00")
		segments := strings.Split(p, "/")
		for i := range segments {
			segments[i], _, _ = strings.Cut(segments[i], ";")
		}
		return path.Clean("/" + strings.Join(segments, "/"))
	}
	backend := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		if normal(r.RequestURI) != "/api/status" && !strings.HasPrefix(normal(r.RequestURI), "/static/") {
			secret.Add(1)
		}
	}))
	t.Cleanup(backend.Close)
	g := guarded(t, roomy, `
http://:PORT0 {
	bind 127.0.0.1
	zejzl_auth {
		public /api/status /static/*
		key {env.K} roomy
	}
	reverse_proxy `+backend.Listener.Addr().String()+`
}`, "K="+a.k)
	for _, base := range []string{"/api/chat", "/api/status", "/static/x", "/static/x/y", "/api/status/chat", "/static/../api/chat", "/static/..%2f..%2fapi/chat"} {
		for _, uri := range append(spellings(base), base) {
			g.ask(t, "GET "+uri)
			if n := secret.Swap(0); n > 0 {
				t.Errorf("GET %q led to a protected route without a key", uri)
			}
		}
	}
	if calls.Load() == 0 {
		t.Error("no request reached the backend at all: the test shows nothing")
	}
}

func noDefaultKey(t *testing.T, a *advisory) {
	g := guarded(t, "", "http://:PORT0 {\n\tbind 127.0.0.1\n\tzejzl_auth\n\treverse_proxy BACKEND\n}")
	for _, k := range []string{
		"dev_test_key_insecure", "edd1c9f034335f136f87ad84b625c8f1", "admin", "secret", "zejzl", "zejzl_", "zejzl_" + strings.Repeat("A", 32), "zejzl_" + strings.Repeat("0", 32),
		"zejzl_dev_key_0123456789abcdefghijklmno", strings.Repeat("0", 24), "sk-" + strings.Repeat("0", 45), a.k,
		// What the documentation shows is the hash of a well-known word.
		"test", "sha256:" + hex.EncodeToString(make([]byte, 32)),
	} {
		g.ask(t, "GET /", "X-API-Key: "+k, "X-Real-IP: 127.0.0.1", "X-Forwarded-For: 127.0.0.1").wants(t, 401, "invalid_key")
		g.ask(t, "GET /", "Authorization: Bearer "+k, "X-Real-IP: ::1").wants(t, 401, "invalid_key")
	}
	g.none(t)
}

func storedHash(t *testing.T, a *advisory) {
	sum := sha256.Sum256([]byte(a.k))
	digits := hex.EncodeToString(sum[:])
	for _, k := range []string{
		digits, strings.ToUpper(digits), "sha256:" + digits, "SHA256:" + digits, "zejzl_" + digits[:32], digits[:12], "zejzl_" + base64.RawURLEncoding.EncodeToString(sum[:24]),
		base64.StdEncoding.EncodeToString(sum[:]), base64.RawURLEncoding.EncodeToString(sum[:]), string(sum[:8]),
	} {
		for _, field := range []string{"X-API-Key: ", "Authorization: Bearer "} {
			if strings.ContainsAny(k, "\x00\r\n\x7f") {
				continue
			}
			if r := a.ask(t, "POST /api/chat", field+k); r.StatusCode != 401 && r.StatusCode != 400 {
				t.Errorf("status %d for a form of the stored hash", r.StatusCode)
			}
		}
	}
}

// keyIsData sends keys that mean something to an interpreter.
func keyIsData(t *testing.T, a *advisory) {
	const marker = "Injected4711"
	for _, k := range []string{
		"' OR '1'='1' -- " + marker, "x'; DROP TABLE keys; -- " + marker, `" UNION SELECT secret FROM keys -- ` + marker, "zejzl_' OR 1=1 --" + marker + strings.Repeat("A", 9),
		`redis.call("FLUSHALL") -- ` + marker, "*1 $8 FLUSHALL " + marker, "{zjl:x} EVAL return 1 0 " + marker, `${jndi:ldap://x/` + marker + `}`, "{{" + marker + "}}",
		"$(touch " + marker + ")", "`touch " + marker + "`", "../../" + marker + "/keys.json", "%00" + marker, `\u0000` + marker, "<script>" + marker + "</script>", "\x1b[31m"[1:] + marker,
	} {
		for _, field := range []string{"X-API-Key: " + k, "Authorization: Bearer " + k} {
			r := a.ask(t, "POST /api/chat", field)
			r.wants(t, 401, "invalid_key")
			if strings.Contains(fmt.Sprint(r.Header)+r.body, marker) {
				t.Error("the answer shows the key that was sent")
			}
		}
	}
	if strings.Contains(a.log.String(), marker) {
		t.Error("the log shows the key that was sent")
	}
}

// huge sends as much as Caddy lets through, and more.
func huge(t *testing.T, a *advisory) {
	var many, forged []string
	for i := range 1000 {
		many = append(many, fmt.Sprintf("X-Name-%d: value", i))
		forged = append(forged, fmt.Sprintf("X-Zejzl-%d: value", i))
	}
	// Caddy's own limit of 16 KB stands before the guard.
	a.ask(t, "GET /api/chat?"+strings.Repeat("a", 40<<10), "X-API-Key: "+a.k).wants(t, 431, "")
	a.none(t)

	g := guarded(t, roomy+"\n\tservers {\n\t\tmax_header_size 4MB\n\t}", `
http://:PORT0 {
	bind 127.0.0.1
	zejzl_auth {
		protect /api/*
		public /api/status
		key {env.K} roomy
		cors https://app.example.com
	}
	reverse_proxy BACKEND
}`, "K="+a.k)
	key := "X-API-Key: " + a.k
	for _, query := range []string{strings.Repeat("a", 1<<20), strings.Repeat("a&", 1<<19), strings.Repeat("a=%61&", 1<<17), strings.Repeat("%", 1<<20), strings.Repeat("key=x&", 1<<17)} {
		g.ask(t, "GET /api/chat?"+query).wants(t, 401, "missing_key")
		g.none(t)
		for _, uri := range []string{"/api/chat?", "/api/status?", "/open?"} {
			g.ask(t, "GET "+uri+query, key).wants(t, 200, "")
			if got := g.one(t).uri; got != uri+query {
				t.Errorf("%s reached the backend with a query of %d bytes, want %d", uri, len(got)-len(uri), len(query))
			}
		}
	}
	for _, long := range []string{strings.Repeat("/a", 1<<19), "/api/status" + strings.Repeat("/", 1<<20), "/api/status" + strings.Repeat(";a", 1<<19), strings.Repeat("/%2e", 1<<18), "/api/" + strings.Repeat("%61", 1<<18)} {
		if r := g.ask(t, "GET "+long); r.StatusCode >= 500 {
			t.Errorf("a path of %d bytes: status %d", len(long), r.StatusCode)
		}
		g.take()
	}
	for _, fields := range [][]string{many, forged} {
		g.ask(t, "POST /api/chat", fields...).wants(t, 401, "missing_key")
		g.none(t)
		for _, line := range []string{"POST /api/chat", "GET /api/status", "POST /open"} {
			g.ask(t, line, append(fields, key)...).wants(t, 200, "")
			s := g.one(t)
			if got := len(s.folded("x-name-")); got != 1000 && &fields[0] == &many[0] {
				t.Errorf("%s: %d of 1000 headers reached the backend", line, got)
			}
			if got := s.folded("x-zejzl-"); len(got) > 2 {
				t.Errorf("%s: the backend was told %d identities", line, len(got))
			}
		}
	}
	for _, field := range []string{"Authorization: Bearer" + strings.Repeat(" ", 1<<20) + "x", "X-API-Key: " + strings.Repeat("a", 1<<20), "Connection: " + strings.Repeat("X-Zejzl-Tier,", 1<<16)} {
		g.ask(t, "POST /api/chat", field).wants(t, 401, "")
	}
	asked := "Access-Control-Request-Headers: " + strings.Repeat("x-stainless-a,", 10_000)
	g.ask(t, "OPTIONS /api/chat", "Origin: https://app.example.com", "Access-Control-Request-Method: POST", asked).wants(t, 403, "forbidden")
	g.none(t)

	before := residentKB(t, g)
	for range 100 {
		g.ask(t, "GET /api/chat?"+strings.Repeat("a&", 1<<19), "X-API-Key: unknown").wants(t, 401, "invalid_key")
	}
	if grown := residentKB(t, g) - before; grown > 200<<10 {
		t.Errorf("100 refused requests of 1 MB left the process %d KB larger", grown)
	}
}

// residentKB reads the memory of the Caddy process.
func residentKB(t testing.TB, g *site) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", g.cmd.Process.Pid))
	if err != nil {
		t.Skipf("no /proc here: %v", err)
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kb, err := strconv.Atoi(strings.Fields(rest + " ?")[0])
	if err != nil {
		t.Fatalf("VmRSS: %v", err)
	}
	return kb
}
