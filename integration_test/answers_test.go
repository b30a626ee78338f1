package integration

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// hidden is what a failing handler says; no caller may ever read it.
const hidden = "text-that-only-the-log-may-hold"

// guardedAPI is one Caddy with a site for each way to write errors.
type guardedAPI struct {
	*server
	sites   map[string]string // by name: address
	keys    map[string]string // by tier
	arrived chan struct{}     // a request reached /hold
	release chan struct{}     // lets it go
}

// apiRoutes fail in every way that a handler behind the guard can.
const apiRoutes = `
	request_body {
		max_size 1KB
	}
	handle /status/400 {
		error "HIDDEN" 400
	}
	handle /status/403 {
		error "HIDDEN" 403
	}
	handle /status/404 {
		error "HIDDEN" 404
	}
	handle /status/500 {
		error "HIDDEN" 500
	}
	handle /status/503 {
		error "HIDDEN" 503
	}
	handle /status/504 {
		error "HIDDEN" 504
	}
	handle /panic {
		misbehave panic HIDDEN
	}
	handle /plain-error {
		misbehave error HIDDEN
	}
	handle /dead {
		reverse_proxy 127.0.0.1:DEAD
	}
	handle {
		reverse_proxy BACKEND
	}
`

func startAPI(t *testing.T) *guardedAPI {
	t.Helper()
	a := &guardedAPI{
		sites: make(map[string]string), keys: make(map[string]string),
		arrived: make(chan struct{}, 1), release: make(chan struct{}),
	}
	target := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hold" {
			a.arrived <- struct{}{}
			hold(r, a.release)
		}
		fmt.Fprint(w, "ok")
	})
	for _, name := range []string{"roomy", "minute", "hour", "single", "expired", "revoked", "unknown"} {
		a.keys[name] = newKey(t)
	}
	file := filepath.Join(t.TempDir(), "keys.json")
	records := fmt.Sprintf(`{"keys": [
		{"name": "old", "tier": "roomy", "secrets": [{"hash": %q}], "expires_at": "2020-01-01T00:00:00Z"},
		{"name": "leaked", "tier": "roomy", "secrets": [{"hash": %q}], "revoked_at": "2020-01-01T00:00:00Z"}
	]}`, digestOf(a.keys["expired"]), digestOf(a.keys["revoked"]))
	if err := os.WriteFile(file, []byte(records), 0o600); err != nil {
		t.Fatal(err)
	}

	config := preamble(t, `
	zejzl {
		keys env
		keys file `+file+`
		tier roomy 100000/1m
		tier minute 1/1m
		tier hour 1/1h
		tier single 100000/1m {
			concurrent 1
		}
	}`)
	routes := strings.NewReplacer("HIDDEN", hidden, "BACKEND", target, "DEAD", strconv.Itoa(freePort(t))).Replace(apiRoutes)
	for _, name := range []string{"zejzl", "openai", "anthropic", "gemini", "problem", "auto", "caddy", "handled"} {
		errors, more := name, ""
		if name == "handled" {
			errors, more = "caddy", "\thandle_errors {\n\t\trespond \"own page {err.status_code}\"\n\t}\n"
		}
		guard := fmt.Sprintf("\tzejzl_auth {\n\t\tzone %s\n\t\terrors %s\n\t}\n", name, errors)
		site, addr := plainSite(t, guard+routes+more)
		config += site
		a.sites[name] = addr
	}
	var env []string
	for _, tier := range []string{"roomy", "minute", "hour", "single"} {
		env = append(env, fmt.Sprintf("ZEJZL_API_KEY_%s=%s:%s:key of %s", tier, a.keys[tier], tier, tier))
	}
	a.server = start(t, config, env...)
	return a
}

// refusalCase is a row of the table of answers.
type refusalCase struct {
	name     string
	method   string // default GET
	path     string
	key      string   // name of the key to send
	headers  []string // further ones
	body     string
	before   string // key whose tier is to be filled first: by one request, or by one that is held
	status   int
	code     string
	sentence string    // of the zejzl dialect, where it is laid down
	openAI   [2]string // type, code
	words    [2]string // anthropic's type, gemini's status
	behind   bool      // an error of a handler: the request was admitted
	also     map[string]string
}

var (
	noKey  = [2]string{"invalid_request_error", "invalid_api_key"}
	noAuth = [2]string{"authentication_error", "UNAUTHENTICATED"}
	badReq = [2]string{"invalid_request_error", "INVALID_ARGUMENT"}
	denied = [2]string{"permission_error", "PERMISSION_DENIED"}
	tooFar = [2]string{"rate_limit_error", "RESOURCE_EXHAUSTED"}
	full   = [2]string{"requests", "rate_limit_exceeded"}
	broken = [2]string{"api_error", "INTERNAL"}
	down   = [2]string{"api_error", "UNAVAILABLE"}

	challenge = map[string]string{"WWW-Authenticate": `Bearer realm="zejzl"`}
	invalid   = map[string]string{"WWW-Authenticate": `Bearer realm="zejzl", error="invalid_token"`}
)

func refusalCases() []refusalCase {
	invalidKey := func(name, key string, headers ...string) refusalCase {
		return refusalCase{
			name: name, path: "/x", key: key, headers: headers, status: 401, code: "invalid_key",
			sentence: "Invalid API key", openAI: noKey, words: noAuth, also: invalid,
		}
	}
	request := func(name, path string, status int, code string, words [2]string) refusalCase {
		return refusalCase{
			name: name, path: path, key: "roomy", status: status, code: code,
			openAI: [2]string{"invalid_request_error", code}, words: words,
		}
	}
	behind := func(path string, status int, code string, words [2]string) refusalCase {
		c := request(path, path, status, code, words)
		c.behind = true
		if status >= 500 {
			c.openAI[0] = "server_error"
		}
		return c
	}
	twoLines := request("two lines", "/x", 400, "ambiguous_key", badReq)
	twoLines.headers = []string{"X-API-Key: something-else-that-is-no-key"}
	twoKeys := request("two keys", "/x", 400, "ambiguous_key", badReq)
	twoKeys.headers = []string{"Authorization: Bearer something-else-that-is-no-key"}
	method := func(name string) refusalCase {
		c := request("method "+name, "/x", 405, "method_not_allowed", badReq)
		c.method, c.also = name, map[string]string{"Allow": "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"}
		return c
	}
	preflight := request("preflight", "/x", 403, "forbidden", denied)
	preflight.method, preflight.key = http.MethodOptions, ""
	preflight.headers = []string{"Origin: https://evil.example", "Access-Control-Request-Method: POST"}
	tooLarge := behind("/large", 413, "request_too_large", [2]string{"request_too_large", "INVALID_ARGUMENT"})
	tooLarge.method, tooLarge.body = http.MethodPost, strings.Repeat("x", 2048)

	return []refusalCase{
		{
			name: "no key", path: "/x", status: 401, code: "missing_key",
			sentence: "Authentication required", openAI: noKey, words: noAuth, also: challenge,
		},
		{
			name: "another scheme", path: "/x", headers: []string{"Authorization: Basic dTpw"}, status: 401,
			code: "missing_key", sentence: "Authentication required", openAI: noKey, words: noAuth, also: challenge,
		},
		invalidKey("unknown", "unknown"),
		invalidKey("expired", "expired"),
		invalidKey("revoked", "revoked"),
		invalidKey("too short", "", "X-API-Key: short"),
		invalidKey("too long", "", "X-API-Key: "+strings.Repeat("a", 257)),
		invalidKey("other characters", "", "Authorization: Bearer "+strings.Repeat("é", 20)),
		invalidKey("other header", "", "X-Goog-Api-Key: "+strings.Repeat("k", 30)),
		twoLines, twoKeys,
		request("dot segment", "/a/../b", 400, "invalid_path", badReq),
		request("encoded dot segment", "/a/%2E%2e/b", 400, "invalid_path", badReq),
		request("encoded control character", "/a%00b", 400, "invalid_path", badReq),
		method("TRACE"), method("TRACK"), method("get"),
		preflight,
		{
			name: "window full", path: "/x", key: "minute", before: "minute", status: 429,
			code: "rate_limited", sentence: "Rate limit exceeded", openAI: full, words: tooFar,
		},
		{
			name: "long window full", path: "/x", key: "hour", before: "hour", status: 429,
			code: "rate_limited", sentence: "Rate limit exceeded", openAI: full, words: tooFar,
		},
		{
			name: "too many at once", path: "/x", key: "single", before: "single", status: 429,
			code: "concurrency_limited", openAI: full, words: tooFar, also: map[string]string{"Retry-After": "1"},
		},
		behind("/status/400", 400, "bad_request", badReq),
		behind("/status/403", 403, "forbidden", denied),
		behind("/status/404", 404, "not_found", [2]string{"not_found_error", "NOT_FOUND"}),
		tooLarge,
		behind("/panic", 500, "internal_error", broken),
		behind("/plain-error", 500, "internal_error", broken),
		behind("/status/500", 500, "internal_error", broken),
		behind("/dead", 502, "upstream_error", down),
		behind("/status/503", 503, "upstream_error", down),
		behind("/status/504", 504, "upstream_error", [2]string{"timeout_error", "DEADLINE_EXCEEDED"}),
	}
}

// run provokes the case at a site and returns the answer.
func (a *guardedAPI) run(t *testing.T, c refusalCase, addr string) *reply {
	t.Helper()
	switch c.before {
	case "":
	case "single":
		held := make(chan int)
		go func() {
			resp, err := plainClient.Do(newRequest(t, http.MethodGet, "http://"+addr+"/hold", "", "X-API-Key: "+a.keys[c.before]))
			if err != nil {
				held <- 0
				return
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			held <- resp.StatusCode
		}()
		<-a.arrived
		defer func() {
			a.release <- struct{}{}
			if status := <-held; status != http.StatusOK {
				t.Errorf("the held request ended with %d", status)
			}
		}()
	default:
		ask(t, http.MethodGet, "http://"+addr+"/x", "X-API-Key: "+a.keys[c.before]).wantStatus(t, 200)
	}
	method := c.method
	if method == "" {
		method = http.MethodGet
	}
	headers := c.headers
	if c.key != "" {
		headers = append([]string{"X-API-Key: " + a.keys[c.key]}, headers...)
	}
	return do(t, plainClient, newRequest(t, method, "http://"+addr+c.path, c.body, headers...))
}

var uuid = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// wantRefusal checks all of a refusal but its body.
func (c *refusalCase) wantRefusal(t *testing.T, got *reply, changed ...string) {
	t.Helper()
	got.wantStatus(t, c.status)
	got.wantHeader(t, "Cache-Control", "no-store")
	if id := got.Header["X-Request-Id"]; len(id) != 1 || !uuid.MatchString(id[0]) {
		t.Errorf("X-Request-Id %q, want one UUID", id)
	}
	for _, name := range []string{"WWW-Authenticate", "Allow", "Retry-After", "Retry-After-Ms", "X-Should-Retry"} {
		if c.code == "rate_limited" && strings.Contains(strings.ToLower(name), "retry") {
			continue // they have a test of their own
		}
		if want, ok := c.also[name]; ok {
			got.wantHeader(t, name, want)
		} else {
			got.wantHeader(t, name)
		}
	}
	if limited := c.behind || c.status == http.StatusTooManyRequests; limited != hasLimitHeaders(got.Header) {
		t.Errorf("rate-limit headers: %v, want them: %v", got.Header, limited)
	}
	for name := range got.Header {
		if strings.HasPrefix(name, "Access-Control-") {
			t.Errorf("%s, though no origin is allowed", name)
		}
	}
	if strings.Contains(got.text, hidden) {
		t.Errorf("the body tells what failed inside: %s", got.text)
	}
	checkSecurityHeaders(t, got.Header, changed...)
}

func hasLimitHeaders(h http.Header) bool {
	for name := range h {
		lower := strings.ToLower(name)
		if strings.HasPrefix(lower, "x-ratelimit") || strings.HasPrefix(lower, "ratelimit") || strings.Contains(lower, "-ratelimit-") {
			return true
		}
	}
	return false
}

// TestAnswers: every refusal and every error of section 7, in every dialect.
func TestAnswers(t *testing.T) {
	a := startAPI(t)
	for _, name := range []string{"zejzl", "openai", "anthropic", "gemini", "problem"} {
		t.Run(name, func(t *testing.T) {
			for _, c := range refusalCases() {
				t.Run(c.name, func(t *testing.T) {
					got := a.run(t, c, a.sites[name])
					c.wantRefusal(t, got)
					got.wantHeader(t, "Content-Length", strconv.Itoa(len(got.text)))
					checkBody[name](t, &c, got)
					a.wantLogged(t, &c, got)
				})
			}
		})
	}
}

// wantLogged checks that the request id leads to the one line that says why.
func (a *guardedAPI) wantLogged(t *testing.T, c *refusalCase, got *reply) {
	t.Helper()
	lines := a.logLines(`"request_id":"`+got.Header.Get("X-Request-Id")+`"`, `"reason":`)
	for _, line := range lines {
		if line["reason"] != c.code || line["status"] != float64(c.status) || line["client_ip"] != "127.0.0.1" {
			t.Errorf("log line %v, want %d %s", line, c.status, c.code)
		}
		if level := line["level"]; c.behind && (level == "error") != (c.status >= 500) {
			t.Errorf("logged at %v: %v", level, line)
		}
	}
	if len(lines) != 1 {
		t.Errorf("%d log lines give a reason for one refusal: %v", len(lines), lines)
	}
}

// TestAnswersByCaddy: with `errors caddy` the site's own pages answer, and the
// guard's headers stay.
func TestAnswersByCaddy(t *testing.T) {
	a := startAPI(t)
	for name, page := range map[string]string{"caddy": "", "handled": "own page %d"} {
		t.Run(name, func(t *testing.T) {
			for _, c := range refusalCases() {
				t.Run(c.name, func(t *testing.T) {
					got := a.run(t, c, a.sites[name])
					want, changed := page, []string{}
					if page != "" { // a page may have styles
						want, changed = fmt.Sprintf(page, c.status), []string{pageCSP}
					}
					c.wantRefusal(t, got, changed...)
					if got.text != want {
						t.Errorf("body %q, want %q", got.text, want)
					}
					if c.path == "/panic" { // which Caddy can't know any more
						a.logLines(`"request_id":"`+got.Header.Get("X-Request-Id")+`"`, `"panic":"`+hidden+`"`)
					}
				})
			}
		})
	}
}

// TestAnswersHead: a refused HEAD has the headers of the GET and no body.
func TestAnswersHead(t *testing.T) {
	a := startAPI(t)
	url := "http://" + a.sites["zejzl"] + "/x"
	get, head := ask(t, http.MethodGet, url), ask(t, http.MethodHead, url)
	head.wantStatus(t, get.StatusCode)
	for _, r := range []*reply{get, head} {
		r.Header.Del("X-Request-Id")
		r.Header.Del("Date")
	}
	for name, lines := range get.Header {
		head.wantHeader(t, name, lines...)
	}
	if head.text != "" || get.text == "" {
		t.Errorf("bodies: HEAD %q, GET %q", head.text, get.text)
	}
}
