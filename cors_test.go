package zejzlauth

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/caddyserver/caddy/v2"
	"pgregory.net/rapid"
)

const corsTestOrigin = "https://app.example.com"

func corsPolicyOf(t testing.TB, c CORS) *corsPolicy {
	t.Helper()
	p, err := newCORSPolicy(&c, false)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func preflightOf(origin, method string, headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodOptions, "/v1/chat/completions", nil)
	r.Header["Origin"] = []string{origin}
	r.Header["Access-Control-Request-Method"] = []string{method}
	if headers != nil {
		r.Header["Access-Control-Request-Headers"] = headers
	}
	return r
}

func TestCORSOriginIsExact(t *testing.T) {
	p := corsPolicyOf(t, CORS{Origins: []string{
		corsTestOrigin, "http://localhost:3000", "https://zejzl.example", "https://xn--bcher-kva.example",
		"https://192.0.2.1:8443", "http://[2001:db8::1]:8080", "http://[::1]",
	}})
	for o := range p.origins {
		if got := p.origin(http.Header{"Origin": {o}}); got != o {
			t.Errorf("origin %q: got %q", o, got)
		}
	}
	for name, lines := range map[string][]string{
		"absent":                   nil,
		"empty":                    {""},
		"null":                     {"null"},
		"star":                     {"*"},
		"upper-case host":          {"https://APP.example.com"},
		"upper-case scheme":        {"HTTPS://app.example.com"},
		"default port":             {"https://app.example.com:443"},
		"port of the other scheme": {"https://app.example.com:80"},
		"http default port":        {"http://app.example.com:80"},
		"other port":               {"http://localhost:3001"},
		"no port":                  {"http://localhost"},
		"empty port":               {"https://app.example.com:"},
		"trailing slash":           {"https://app.example.com/"},
		"trailing dot":             {"https://app.example.com."},
		"trailing space":           {"https://app.example.com "},
		"leading space":            {" https://app.example.com"},
		"tab":                      {"https://app.example.com\t"},
		"two in one line":          {corsTestOrigin + " " + corsTestOrigin},
		"two with comma":           {corsTestOrigin + ", " + corsTestOrigin},
		"two lines":                {corsTestOrigin, corsTestOrigin},
		"second line foreign":      {corsTestOrigin, "https://evil.example"},
		"first line foreign":       {"https://evil.example", corsTestOrigin},
		"empty second line":        {corsTestOrigin, ""},
		"userinfo":                 {"https://user@app.example.com"},
		"userinfo as the host":     {"https://app.example.com@evil.example"},
		"suffix":                   {"https://app.example.com.evil.example"},
		"prefix":                   {"https://evilapp.example.com"},
		"subdomain":                {"https://x.zejzl.example"},
		"parent":                   {"https://example.com"},
		"look-alike":               {"https://evilzejzl.example"},
		"other scheme":             {"http://app.example.com"},
		"websocket scheme":         {"wss://app.example.com"},
		"no scheme":                {"app.example.com"},
		"scheme relative":          {"//app.example.com"},
		"localhost suffix":         {"http://localhost.evil.example:3000"},
		"localhost by number":      {"http://127.0.0.1:3000"},
		"encoded NUL":              {"https://app.example.com%00"},
		"NUL":                      {"https://app.example.com\x00"},
		"fragment":                 {"https://evil.example#app.example.com"},
		"path":                     {"https://evil.example/app.example.com"},
		"query":                    {"https://app.example.com?x"},
		"backslash":                {"https://evil.example\\app.example.com"},
		"homoglyph":                {"https://аpp.example.com"},
		"Unicode of punycode":      {"https://bücher.example"},
		"other punycode":           {"https://xn--bcher-kvb.example"},
		"IPv6 zone":                {"http://[2001:db8::1%25eth0]:8080"},
		"IPv6 in full":             {"http://[2001:db8:0:0:0:0:0:1]:8080"},
		"IPv4 as a number":         {"https://3221225985:8443"},
		"8 KB":                     {"https://" + strings.Repeat("a", 8<<10) + ".example.com"},
		"8 KB after a match":       {corsTestOrigin + strings.Repeat("a", 8<<10)},
		"invalid UTF-8":            {"https://app.example.com\xff"},
	} {
		h := http.Header{"Origin": lines}
		if got := p.origin(h); got != "" {
			t.Errorf("%s: got %q, want none", name, got)
		}
		r := preflightOf("", "GET")
		r.Header["Origin"] = lines
		out := http.Header{}
		if p.preflight(r, out) || len(out) != 0 {
			t.Errorf("%s: preflight allowed, or headers left behind: %v", name, out)
		}
	}
}

func TestCORSOriginIsThePolicysOwnString(t *testing.T) {
	p := corsPolicyOf(t, CORS{Origins: []string{corsTestOrigin}})
	sent := strings.Clone(corsTestOrigin)
	got := p.origin(http.Header{"Origin": {sent}})
	if got != corsTestOrigin || unsafe.StringData(got) == unsafe.StringData(sent) {
		t.Errorf("got %q in the client's memory, want the configuration's string", got)
	}
}

func TestCORSNilPolicy(t *testing.T) {
	p, err := newCORSPolicy(nil, true)
	if p != nil || err != nil {
		t.Fatalf("got %v, %v, want neither policy nor error", p, err)
	}
	h := http.Header{}
	if p.origin(http.Header{"Origin": {corsTestOrigin}}) != "" || p.preflight(preflightOf(corsTestOrigin, "GET"), h) || len(h) != 0 {
		t.Error("a nil policy allowed something")
	}
}

func TestIsPreflight(t *testing.T) {
	for _, tc := range []struct {
		name, method, origin, requested string
		want                            bool
	}{
		{"preflight", "OPTIONS", corsTestOrigin, "POST", true},
		{"foreign origin", "OPTIONS", "https://evil.example", "POST", true},
		{"odd requested method", "OPTIONS", corsTestOrigin, "*", true},
		{"no requested method", "OPTIONS", corsTestOrigin, "", false},
		{"no origin", "OPTIONS", "", "POST", false},
		{"not OPTIONS", "POST", corsTestOrigin, "POST", false},
		{"lower case", "options", corsTestOrigin, "POST", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/", nil)
			r.Method = tc.method
			if tc.origin != "" {
				r.Header.Set("Origin", tc.origin)
			}
			if tc.requested != "" {
				r.Header.Set("Access-Control-Request-Method", tc.requested)
			}
			if got := isPreflight(r); got != tc.want {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
	r := preflightOf("", "POST")
	if isPreflight(r) {
		t.Error("an empty Origin line counts as an origin")
	}
}

// What the SDKs of OpenAI and Anthropic ask for in a browser.
const corsSDKHeaders = "anthropic-beta,anthropic-dangerous-direct-browser-access,anthropic-version,authorization,content-type," +
	"idempotency-key,openai-organization,openai-project,x-api-key,x-stainless-arch,x-stainless-helper-method,x-stainless-lang," +
	"x-stainless-os,x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout"

const defaultHeaderList = "Content-Type, Authorization, X-API-Key, X-Goog-Api-Key, Idempotency-Key"

func TestCORSPreflight(t *testing.T) {
	own := CORS{Origins: []string{corsTestOrigin}, Methods: []string{"GET", "OPTIONS"}, Headers: []string{"X-Own", "x-other"}}
	std := CORS{Origins: []string{corsTestOrigin}}
	names := func(n int, name string) string { return strings.TrimSuffix(strings.Repeat(name+",", n), ",") }
	for _, tc := range []struct {
		name      string
		cors      CORS
		method    string
		requested []string
		want      bool
		granted   string // Access-Control-Allow-Headers
	}{
		{"no headers", std, "POST", nil, true, ""},
		{"empty line", std, "POST", []string{""}, true, ""},
		{"only separators", std, "POST", []string{" ,\t, ,", ""}, true, ""},
		{"each default method", std, "DELETE", nil, true, ""},
		{"PATCH", std, "PATCH", nil, true, ""},
		{"HEAD with GET", std, "HEAD", nil, true, ""},
		{"lower-case post", std, "post", nil, false, ""},
		{"lower-case patch", std, "patch", nil, false, ""},
		{"method star", std, "*", nil, false, ""},
		{"method with space", std, "POST ", nil, false, ""},
		{"method list", std, "GET, POST", nil, false, ""},
		{"CONNECT", std, "CONNECT", nil, false, ""},
		{"OPTIONS unlisted", std, "OPTIONS", nil, false, ""},
		{"OPTIONS listed", own, "OPTIONS", nil, true, ""},
		{"POST unlisted", own, "POST", nil, false, ""},
		{"HEAD with own list", own, "HEAD", nil, true, ""},

		{"one default", std, "POST", []string{"content-type"}, true, defaultHeaderList},
		{"upper case and unsorted", std, "POST", []string{"X-API-KEY,Content-Type,AUTHORIZATION"}, true, defaultHeaderList},
		{"spaces", std, "POST", []string{" x-api-key ,\tauthorization"}, true, defaultHeaderList},
		{"several lines", std, "POST", []string{"x-api-key", "authorization, content-type", ""}, true, defaultHeaderList},
		{"family", std, "POST", []string{"X-Stainless-Lang,x-api-key,openai-beta"}, true, defaultHeaderList + ", x-stainless-lang, openai-beta"},
		{"SDK", std, "POST", []string{corsSDKHeaders}, true, defaultHeaderList +
			", anthropic-beta, anthropic-dangerous-direct-browser-access, anthropic-version, openai-organization, openai-project" +
			", x-stainless-arch, x-stainless-helper-method, x-stainless-lang, x-stainless-os, x-stainless-package-version" +
			", x-stainless-retry-count, x-stainless-runtime, x-stainless-runtime-version, x-stainless-timeout"},
		{"unlisted", std, "POST", []string{"x-own"}, false, ""},
		{"one of many unlisted", std, "POST", []string{corsSDKHeaders + ",x-own"}, false, ""},
		{"unlisted in second line", std, "POST", []string{"x-api-key", "x-own"}, false, ""},
		{"identity header", std, "POST", []string{"x-zejzl-tier"}, false, ""},
		{"family inside a name", std, "POST", []string{"x-anthropic-beta"}, false, ""},
		{"star", std, "POST", []string{"*"}, false, ""},
		{"space inside", std, "POST", []string{"x-api-key authorization"}, false, ""},
		{"semicolon", std, "POST", []string{"x-api-key;authorization"}, false, ""},
		{"line break in family", std, "POST", []string{"openai-x\r\nset-cookie: a=b"}, false, ""},
		{"NUL in family", std, "POST", []string{"openai-\x00"}, false, ""},
		{"Unicode folding to ASCII", std, "POST", []string{"x-api-\u212aey"}, false, ""},
		{"no-break space", std, "POST", []string{"\u00a0x-api-key"}, false, ""},

		{"own", own, "GET", []string{"x-own,X-OTHER"}, true, "X-Own, x-other"},
		{"own replaces default", own, "GET", []string{"authorization"}, false, ""},
		{"own replaces families", own, "GET", []string{"openai-beta"}, false, ""},

		{"10,000 names", std, "POST", []string{names(10_000, "x-api-key")}, false, ""},
		{"10,000 lines", std, "POST", slices.Repeat([]string{"x-api-key"}, 10_000), false, ""},
		{"10,000 empty lines", std, "POST", make([]string, 10_000), false, ""},
		{"10,000 separators", std, "POST", []string{strings.Repeat(",", 10_000)}, false, ""},
		{"long name of a family", std, "POST", []string{"openai-" + strings.Repeat("a", 10_000)}, false, ""},
		{"at the bound", std, "POST", []string{names(409, "x-api-key") + ",,,,,,"}, true, defaultHeaderList},
		{"past the bound", std, "POST", []string{names(409, "x-api-key") + ",,,,,,,"}, false, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := http.Header{}
			ok := corsPolicyOf(t, tc.cors).preflight(preflightOf(corsTestOrigin, tc.method, tc.requested...), h)
			if ok != tc.want {
				t.Fatalf("allowed %v, want %v; headers %v", ok, tc.want, h)
			}
			if !ok && len(h) != 0 {
				t.Errorf("refused, yet headers were set: %v", h)
			}
			if got := strings.Join(h["Access-Control-Allow-Headers"], "|"); got != tc.granted {
				t.Errorf("granted %q, want %q", got, tc.granted)
			}
			if _, set := h["Access-Control-Allow-Headers"]; set != (tc.granted != "") {
				t.Errorf("Access-Control-Allow-Headers set: %v, though it grants %q", set, tc.granted)
			}
		})
	}

	r := preflightOf(corsTestOrigin, "POST")
	r.Header.Add("Access-Control-Request-Method", "DELETE")
	if corsPolicyOf(t, std).preflight(r, http.Header{}) {
		t.Error("two requested methods were allowed")
	}
}

func TestCORSPreflightAnswer(t *testing.T) {
	for _, tc := range []struct {
		name string
		cors CORS
		want http.Header
	}{
		{"default", CORS{}, http.Header{
			"Access-Control-Allow-Origin":  {corsTestOrigin},
			"Access-Control-Allow-Methods": {"GET, POST, PUT, PATCH, DELETE"},
			"Access-Control-Allow-Headers": {defaultHeaderList},
			"Access-Control-Max-Age":       {"3600"},
		}},
		{"all set", CORS{
			Methods: []string{"POST", "PUT"}, Headers: []string{"x-api-key"}, Expose: []string{"X-Model"},
			MaxAge: caddy.Duration(24 * time.Hour), Credentials: true,
		}, http.Header{
			"Access-Control-Allow-Origin":      {corsTestOrigin},
			"Access-Control-Allow-Methods":     {"POST, PUT"},
			"Access-Control-Allow-Headers":     {"x-api-key"},
			"Access-Control-Max-Age":           {"86400"},
			"Access-Control-Allow-Credentials": {"true"},
		}},
		{"part of a second", CORS{MaxAge: caddy.Duration(90*time.Second + time.Millisecond)}, http.Header{
			"Access-Control-Allow-Origin":  {corsTestOrigin},
			"Access-Control-Allow-Methods": {"GET, POST, PUT, PATCH, DELETE"},
			"Access-Control-Allow-Headers": {defaultHeaderList},
			"Access-Control-Max-Age":       {"90"},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.cors.Origins = []string{corsTestOrigin}
			r := preflightOf(corsTestOrigin, "POST", "x-api-key")
			// Asked for by older browsers; granting it opens private networks.
			r.Header.Set("Access-Control-Request-Private-Network", "true")
			h := http.Header{}
			if !corsPolicyOf(t, tc.cors).preflight(r, h) {
				t.Fatal("refused")
			}
			wantCORSHeaders(t, h, tc.want)
		})
	}
}

func wantCORSHeaders(t *testing.T, got, want http.Header) {
	t.Helper()
	if !maps.EqualFunc(got, want, slices.Equal) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	for name := range got {
		if name != http.CanonicalHeaderKey(name) {
			t.Errorf("%s is not canonical: Header.Get won't find it", name)
		}
	}
}

func TestCORSActual(t *testing.T) {
	const exposed = "Retry-After, Retry-After-Ms, x-should-retry, " +
		"X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, X-RateLimit-Tier, RateLimit, RateLimit-Policy, " +
		"X-Request-Id, Request-Id, " +
		"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, " +
		"anthropic-ratelimit-requests-limit, anthropic-ratelimit-requests-remaining, anthropic-ratelimit-requests-reset"
	for _, tc := range []struct {
		name string
		cors CORS
		want http.Header
	}{
		{"default", CORS{}, http.Header{
			"Access-Control-Allow-Origin":   {corsTestOrigin},
			"Access-Control-Expose-Headers": {exposed},
		}},
		{"credentials, expose adds", CORS{Credentials: true, Expose: []string{"X-REQUEST-ID", "X-Model"}}, http.Header{
			"Access-Control-Allow-Origin":      {corsTestOrigin},
			"Access-Control-Expose-Headers":    {exposed + ", X-Model"},
			"Access-Control-Allow-Credentials": {"true"},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.cors.Origins = []string{corsTestOrigin}
			h := http.Header{"Access-Control-Allow-Origin": {"*", "https://evil.example"}}
			corsPolicyOf(t, tc.cors).actual(corsTestOrigin, h)
			wantCORSHeaders(t, h, tc.want)
		})
	}
}

// Caddy's header handler replaces values in place and appends to them; neither
// may reach another header or another answer.
func TestCORSAnswersShareNothing(t *testing.T) {
	p := corsPolicyOf(t, CORS{Origins: []string{corsTestOrigin}, Credentials: true})
	fill := map[string]func(http.Header){
		"actual":    func(h http.Header) { p.actual(corsTestOrigin, h) },
		"preflight": func(h http.Header) { p.preflight(preflightOf(corsTestOrigin, "POST", corsSDKHeaders), h) },
	}
	for name, set := range fill {
		t.Run(name, func(t *testing.T) {
			first, want := http.Header{}, http.Header{}
			set(want)
			for header := range want {
				set(first)
				first.Add(header, "added")
				first[header][0] = "changed"
				delete(first, header)
				rest := want.Clone()
				delete(rest, header)
				wantCORSHeaders(t, first, rest)
			}
			second := http.Header{}
			set(second)
			wantCORSHeaders(t, second, want)
		})
	}
}

func TestCORSConfigErrors(t *testing.T) {
	t.Setenv("TEST_CORS_EMPTY", "")
	t.Setenv("TEST_CORS_BLANK", " , ")
	t.Setenv("TEST_CORS_BAD", corsTestOrigin+", https://hidden.example/path")
	t.Setenv("TEST_CORS_TWICE", corsTestOrigin+" "+corsTestOrigin)
	origins := map[string]struct{ origin, want string }{
		"star":                     {"*", "wildcards"},
		"null":                     {"null", "null is not allowed"},
		"subdomain wildcard":       {"https://*.example.com", "wildcards"},
		"port wildcard":            {"http://localhost:*", "wildcards"},
		"regex":                    {"^https://.+$", "expected http://"},
		"path":                     {"https://example.com/app", `("https://example.com"): expected no slash`},
		"trailing slash":           {"https://example.com/", "expected no slash"},
		"upper-case host":          {"https://Example.com", "lower case"},
		"upper-case scheme":        {"HTTPS://example.com", "lower case"},
		"default https port":       {"https://example.com:443", "no :443"},
		"default http port":        {"http://example.com:80", "no :80"},
		"default port of an IPv6":  {"http://[::1]:80", "no :80"},
		"query":                    {"https://example.com?x=1", "query"},
		"fragment":                 {"https://example.com#x", "fragment"},
		"websocket":                {"wss://example.com", "expected http://"},
		"file":                     {"file:///x", "expected http://"},
		"browser extension":        {"chrome-extension://abc", "expected http://"},
		"no scheme":                {"example.com", "expected http://"},
		"no host":                  {"https://", "expected http://"},
		"empty":                    {"", "expected http://"},
		"Unicode":                  {"https://bücher.example", "xn--"},
		"invalid UTF-8":            {"https://a\xff.example", "ASCII"},
		"two in one entry":         {"https://a.example,https://b.example", "one origin per entry"},
		"space":                    {" https://a.example", "one origin per entry"},
		"trailing dot":             {"https://example.com.", "single dots"},
		"leading dot":              {"https://.example.com", "single dots"},
		"two dots":                 {"https://example..com", "single dots"},
		"percent":                  {"https://example.com%00", "letters, digits"},
		"backslash":                {"https://example.com\\x", "letters, digits"},
		"control character":        {"https://example.com\x00", "letters, digits"},
		"long label":               {"https://" + strings.Repeat("a", 64) + ".com", "letters, digits"},
		"long host":                {"https://" + strings.Repeat("a.", 130) + "com", "253"},
		"port 0":                   {"https://example.com:0", "port from 1"},
		"port too high":            {"https://example.com:65536", "port from 1"},
		"port with zero in front":  {"https://example.com:08443", "port from 1"},
		"port with sign":           {"https://example.com:+8443", "port from 1"},
		"empty port":               {"https://example.com:", "port from 1"},
		"two ports":                {"https://example.com:8443:8443", "letters, digits"},
		"IPv4 as a number":         {"http://3221225985", "IPv4"},
		"IPv4 in hexadecimal":      {"http://0xc0.0.2.0x1", "IPv4"},
		"IPv4 with leading zeros":  {"http://192.0.02.1", "IPv4"},
		"IPv4 too short":           {"http://127.1", "IPv4"},
		"name that ends in number": {"http://example.123", "IPv4"},
		"IPv6 zone":                {"http://[fe80::1%25eth0]", "zone"},
		"IPv6 in full":             {"http://[2001:db8:0:0:0:0:0:1]", "shortest form"},
		"IPv6 that holds IPv4":     {"http://[::ffff:192.0.2.1]", "shortest form"},
		"IPv6 without brackets":    {"http://2001:db8::1", "letters, digits"},
		"IPv6 unclosed":            {"http://[::1", "shortest form"},
		"IPv6 closed twice":        {"http://[::1]]", "shortest form"},
		"IPv4 in brackets":         {"http://[192.0.2.1]", "shortest form"},
		"unclosed placeholder":     {"https://{env.x", "letters, digits"},
		"unset":                    {"{env.TEST_CORS_UNSET}", `("{env.TEST_CORS_UNSET}"): evaluated`},
		"empty variable":           {"{env.TEST_CORS_EMPTY}", "is empty"},
		"blank variable":           {"{env.TEST_CORS_BLANK}", "got none"},
		"bad variable":             {"{env.TEST_CORS_BAD}", `("{env.TEST_CORS_BAD}"): expected no slash`},
		"twice in a variable":      {"{env.TEST_CORS_TWICE}", "twice"},
		"unknown placeholder":      {"{http.request.host}", "unrecognized placeholder"},
	}
	for name, tc := range origins {
		t.Run(name, func(t *testing.T) {
			wantCORSError(t, CORS{Origins: []string{tc.origin}}, "cors origins: entry 1", tc.want)
			wantCORSError(t, CORS{Origins: []string{corsTestOrigin + ":8443"}, DevOrigins: []string{"http://localhost:3000", tc.origin}}, "cors dev_origins: ", tc.want)
		})
	}

	with := func(c CORS) CORS { c.Origins = []string{corsTestOrigin}; return c }
	for name, tc := range map[string]struct {
		cors CORS
		want string
	}{
		"no origin":                 {CORS{}, "at least one origin"},
		"no origin but others":      {CORS{Methods: []string{"GET"}}, "at least one origin"},
		"twice":                     {CORS{Origins: []string{corsTestOrigin, corsTestOrigin}}, `entry 2 ("https://app.example.com"): the origin is listed twice`},
		"twice in two lists":        {with(CORS{DevOrigins: []string{corsTestOrigin}}), "cors dev_origins: entry 1"},
		"lower-case method":         {with(CORS{Methods: []string{"GET", "post"}}), "cors methods: entry 2"},
		"mixed-case method":         {with(CORS{Methods: []string{"Get"}}), "upper case"},
		"method star":               {with(CORS{Methods: []string{"*"}}), "cors methods: entry 1"},
		"empty method":              {with(CORS{Methods: []string{""}}), "cors methods: entry 1"},
		"methods in one entry":      {with(CORS{Methods: []string{"GET,POST"}}), "cors methods: entry 1"},
		"non-ASCII method":          {with(CORS{Methods: []string{"GÉT"}}), "cors methods: entry 1"},
		"CONNECT":                   {with(CORS{Methods: []string{"CONNECT"}}), "CONNECT is never allowed"},
		"TRACE":                     {with(CORS{Methods: []string{"TRACE"}}), "TRACE is never allowed"},
		"TRACK":                     {with(CORS{Methods: []string{"TRACK"}}), "TRACK is never allowed"},
		"method twice":              {with(CORS{Methods: []string{"GET", "GET"}}), "GET is listed twice"},
		"header star":               {with(CORS{Headers: []string{"*"}}), "cors headers: entry 1"},
		"empty header":              {with(CORS{Headers: []string{""}}), "cors headers: entry 1"},
		"header with a value":       {with(CORS{Headers: []string{"X-Own", "X-Other: 1"}}), "cors headers: entry 2"},
		"header twice":              {with(CORS{Headers: []string{"X-Own", "x-own"}}), "cors headers: entry 2"},
		"expose star":               {with(CORS{Expose: []string{"*"}}), "cors expose: entry 1"},
		"expose twice":              {with(CORS{Expose: []string{"X-Own", "X-OWN"}}), "cors expose: entry 2"},
		"expose line break":         {with(CORS{Expose: []string{"X-Own\r\nX: y"}}), "cors expose: entry 1"},
		"negative max_age":          {with(CORS{MaxAge: caddy.Duration(-time.Second)}), "1s to 24h"},
		"max_age below a second":    {with(CORS{MaxAge: caddy.Duration(time.Millisecond)}), "1s to 24h"},
		"max_age too long":          {with(CORS{MaxAge: caddy.Duration(24*time.Hour + 1)}), "1s to 24h"},
		"backend with origins":      {with(CORS{Backend: true}), "cors backend"},
		"backend with dev_origins":  {CORS{Backend: true, DevOrigins: []string{corsTestOrigin}}, "cors backend"},
		"backend with methods":      {CORS{Backend: true, Methods: []string{"GET"}}, "cors backend"},
		"backend with headers":      {CORS{Backend: true, Headers: []string{"X-Own"}}, "cors backend"},
		"backend with expose":       {CORS{Backend: true, Expose: []string{"X-Own"}}, "cors backend"},
		"backend with max_age":      {CORS{Backend: true, MaxAge: 1}, "cors backend"},
		"backend with credentials":  {CORS{Backend: true, Credentials: true}, "cors backend"},
		"userinfo":                  {CORS{Origins: []string{"https://user:canary@example.com"}}, "entry 1: user and password"},
		"userinfo with placeholder": {CORS{Origins: []string{"https://user:canary@{env.TEST_CORS_TWICE}"}}, "entry 1"},
		"secret in a query":         {CORS{Origins: []string{"https://example.com?key=canary"}}, "entry 1: expected no slash"},
		"secret in a path":          {CORS{Origins: []string{"https://example.com/canary"}}, "expected no slash"},
		"secret alone":              {CORS{Origins: []string{"zejzl_canary"}}, "entry 1: expected http://"},
		"secret in headers":         {with(CORS{Headers: []string{"Authorization: Bearer canary"}}), "cors headers: entry 1"},
	} {
		t.Run(name, func(t *testing.T) { wantCORSError(t, tc.cors, tc.want) })
	}
}

func wantCORSError(t *testing.T, c CORS, want ...string) {
	t.Helper()
	for _, development := range []bool{false, true} {
		p, err := newCORSPolicy(&c, development)
		if err == nil || p != nil {
			t.Fatalf("got policy %v and error %v, want an error alone", p, err)
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("error %q lacks %q", err, w)
			}
		}
		if strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), "hidden") {
			t.Errorf("error %q shows what may be a secret", err)
		}
	}
}

func TestCORSConfigAccepted(t *testing.T) {
	t.Setenv("TEST_CORS_LIST", "https://a.example,https://b.example  http://c.example:8080,\n")
	t.Setenv("TEST_CORS_HOST", "d.example")
	for name, tc := range map[string]struct {
		cors      CORS
		prod, dev []string
	}{
		"intranet": {CORS{Origins: []string{"http://wiki", "http://my_host.corp:8080"}}, []string{"http://my_host.corp:8080", "http://wiki"}, nil},
		"crossed ports": {
			CORS{Origins: []string{"http://a.example:443", "https://a.example:80"}},
			[]string{"http://a.example:443", "https://a.example:80"},
			nil,
		},
		"addresses": {
			CORS{Origins: []string{"http://192.0.2.1", "https://192.0.2.1:8443", "http://[::1]", "http://[2001:db8::1]:65535"}},
			[]string{"http://192.0.2.1", "http://[2001:db8::1]:65535", "http://[::1]", "https://192.0.2.1:8443"},
			nil,
		},
		"names that only look like numbers": {
			CORS{Origins: []string{"http://0b1", "http://a1", "http://0xyz", "http://1.2.3.a"}},
			[]string{"http://0b1", "http://0xyz", "http://1.2.3.a", "http://a1"},
			nil,
		},
		"punycode": {CORS{Origins: []string{"https://xn--bcher-kva.example"}}, []string{"https://xn--bcher-kva.example"}, nil},
		"placeholders": {
			CORS{Origins: []string{"{env.TEST_CORS_LIST}", "https://{env.TEST_CORS_HOST}:1"}},
			[]string{"http://c.example:8080", "https://a.example", "https://b.example", "https://d.example:1"},
			nil,
		},
		"dev": {
			CORS{Origins: []string{corsTestOrigin}, DevOrigins: []string{"http://localhost:3000"}},
			[]string{corsTestOrigin},
			[]string{"http://localhost:3000", corsTestOrigin},
		},
		"only dev": {CORS{DevOrigins: []string{"http://localhost:3000"}}, nil, []string{"http://localhost:3000"}},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.dev == nil {
				tc.dev = tc.prod
			}
			for development, want := range map[bool][]string{false: tc.prod, true: tc.dev} {
				p, err := newCORSPolicy(&tc.cors, development)
				if err != nil {
					t.Fatal(err)
				}
				if got := slices.Sorted(maps.Keys(p.origins)); !slices.Equal(got, want) {
					t.Errorf("development %v: got %v, want %v", development, got, want)
				}
			}
		})
	}

	if p, err := newCORSPolicy(&CORS{Backend: true}, false); p != nil || err != nil {
		t.Errorf("backend: got %v, %v, want neither policy nor error", p, err)
	}
}

func TestCORSFromJSON(t *testing.T) {
	const in = `{"origins":["https://a.example"],"dev_origins":["http://localhost:3000"],"methods":["GET"],` +
		`"headers":["X-API-Key"],"expose":["X-Model"],"max_age":600000000000,"credentials":true}`
	var c CORS
	if err := caddy.StrictUnmarshalJSON([]byte(strings.Replace(in, "600000000000", `"10m"`, 1)), &c); err != nil {
		t.Fatal(err)
	}
	if out, err := json.Marshal(c); err != nil || string(out) != in {
		t.Errorf("got %s, %v\nwant %s", out, err, in)
	}
	if p, err := newCORSPolicy(&c, true); err != nil || p.maxAge != "600" {
		t.Errorf("got %v, %v, want a max_age of 600 s", p, err)
	}
}

func TestCORSOriginAllocatesNothing(t *testing.T) {
	p := corsPolicyOf(t, CORS{Origins: manyOrigins(10_000)})
	known, foreign := http.Header{"Origin": {"https://app-9999.example.com"}}, http.Header{"Origin": {"https://evil.example"}}
	if p.origin(known) != "https://app-9999.example.com" || p.origin(foreign) != "" {
		t.Fatal("10,000 origins: wrong answer")
	}
	if n := testing.AllocsPerRun(100, func() { p.origin(known); p.origin(foreign) }); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

func manyOrigins(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("https://app-%d.example.com", i)
	}
	return out
}

// Whatever is configured, only an origin of the list is ever sent back.
func TestCORSForeignOriginIsNeverEchoed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		host := rapid.StringMatching(`https?://[a-c]{1,3}(\.[a-c]{1,2}){0,2}(:[1-9]{2,3})?`)
		list := rapid.SliceOfNDistinct(host, 1, 8, rapid.ID).Draw(t, "list")
		p, err := newCORSPolicy(&CORS{Origins: list}, false)
		if err != nil {
			t.Fatal(err) // the pattern makes no :80, :443 or host that is a number
		}
		near := rapid.Custom(func(t *rapid.T) string {
			o := rapid.SampledFrom(list).Draw(t, "base")
			cut := rapid.IntRange(0, len(o)).Draw(t, "cut")
			return o[:cut] + rapid.SampledFrom([]string{"", "a", ".", "/", "@", " ", "A", ":1", "\x00"}).Draw(t, "insert") + o[cut:]
		})
		sent := rapid.SliceOfN(rapid.OneOf(host, near, rapid.String()), 0, 2).Draw(t, "sent")

		want := ""
		if len(sent) == 1 && slices.Contains(list, sent[0]) {
			want = sent[0]
		}
		r := preflightOf("", "GET")
		r.Header["Origin"] = sent
		h := http.Header{}
		ok := p.preflight(r, h)
		if got := p.origin(r.Header); got != want || ok != (want != "") || h.Get("Access-Control-Allow-Origin") != want {
			t.Fatalf("origin %q, allowed %v, headers %v; want %q", got, ok, h, want)
		}
	})
}

func FuzzOrigin(f *testing.F) {
	for _, s := range []string{
		corsTestOrigin, "null", "*", "", "http://[::1]:3000", "http://[fe80::1%25eth0]", "http://[", "http://]:1", "https://:443",
		"https://a.example:", "{env.X}", "{", "\\{", "https://user@a.example", "https://0x.0x1", "https://xn--a",
	} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, entry, sent string) {
		p := corsPolicyOf(t, CORS{Origins: []string{corsTestOrigin, "http://[::1]:3000"}})
		if got := p.origin(http.Header{"Origin": {sent}}); got != "" && got != sent {
			t.Errorf("origin %q: got %q", sent, got)
		}
		if strings.Contains(entry, "{file.") { // would read files
			return
		}
		p, err := newCORSPolicy(&CORS{Origins: []string{entry}}, false)
		if err != nil {
			return
		}
		for o := range p.origins {
			scheme, host, _ := strings.Cut(o, "://")
			if scheme != "http" && scheme != "https" || strings.ToLower(o) != o || strings.ContainsAny(host, "/?#@*% ,{}\\") {
				t.Errorf("%q was accepted as %q", entry, o)
			}
		}
	})
}

func FuzzPreflight(f *testing.F) {
	for _, s := range []string{corsSDKHeaders, "", ",", "x-api-key , content-type", "openai-\r\nx: y", "X-API-\u212aey", strings.Repeat("openai-a,", 400)} {
		f.Add("POST", s, s)
	}
	p := corsPolicyOf(f, CORS{Origins: []string{corsTestOrigin}})
	f.Fuzz(func(t *testing.T, method, line1, line2 string) {
		h := http.Header{}
		ok := p.preflight(preflightOf(corsTestOrigin, method, line1, line2), h)
		if ok != (len(h) != 0) {
			t.Fatalf("allowed %v, headers %v", ok, h)
		}
		granted := h.Get("Access-Control-Allow-Headers")
		if len(granted) > 2*corsMaxRequested || strings.Trim(strings.ToLower(granted), "abcdefghijklmnopqrstuvwxyz0123456789-, !#$%&'*+.^_`|~") != "" {
			t.Errorf("granted %q", granted)
		}
		if !ok {
			return
		}
		// The browser's own check: every name it asked for is in the answer.
		list := strings.Split(strings.ToLower(granted), ", ")
		for name := range strings.SplitSeq(line1+","+line2, ",") {
			if name = strings.ToLower(strings.Trim(name, " \t")); name != "" && !slices.Contains(list, name) {
				t.Errorf("allowed, but %q is not in %q", name, granted)
			}
		}
	})
}

func BenchmarkCORS(b *testing.B) {
	p := corsPolicyOf(b, CORS{Origins: manyOrigins(10_000)})
	const origin = "https://app-5000.example.com"
	request := http.Header{"Origin": {strings.Clone(origin)}}
	h := make(http.Header, 16)

	b.Run("origin", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			p.origin(request)
		}
	})
	b.Run("actual", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			p.actual(origin, h)
		}
	})
	for name, requested := range map[string]string{
		"preflight": "content-type,x-api-key", "preflight_sdk": corsSDKHeaders,
		"preflight_10000_names": strings.Repeat("x-api-key,", 10_000),
		"preflight_worst":       strings.Repeat("openai-,", corsMaxRequested/8-1),
	} {
		r := preflightOf(origin, "POST", requested)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.preflight(r, h)
			}
		})
	}
}
