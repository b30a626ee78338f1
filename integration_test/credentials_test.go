package integration

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func idOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:6])
}

// longKey makes a foreign key of n characters that use every allowed sort.
func longKey(t testing.TB, n int) string {
	t.Helper()
	return strings.Repeat(newKey(t)+".~+/=-", n/44+1)[:n]
}

const roomy = `
	zejzl {
		tier roomy 100000/1m
		tier tight 2/1m
	}`

const guardKeys = `
		key {env.K} roomy alice
		key {env.OTHER} roomy
		key {env.LONG} roomy
		key {env.TIGHT} tight
		public /api/status`

// credentialCases is the credential table, for a path that needs a key: id is
// whom the backend must see; without one the answer is code.
func credentialCases(k, other, long string) []struct {
	name   string
	fields []string
	id     string
	status int
	code   string
} {
	type c = struct {
		name   string
		fields []string
		id     string
		status int
		code   string
	}
	ok := func(name, id string, fields ...string) c { return c{name, fields, id, 200, ""} }
	missing := func(name string, fields ...string) c { return c{name, fields, "", 401, "missing_key"} }
	invalid := func(name string, fields ...string) c { return c{name, fields, "", 401, "invalid_key"} }
	ambiguous := func(name string, fields ...string) c { return c{name, fields, "", 400, "ambiguous_key"} }
	sum := sha256.Sum256([]byte(k))
	hash := hex.EncodeToString(sum[:])
	basic := "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("user:password"))
	return []c{
		ok("X-API-Key", idOf(k), "X-API-Key: "+k),
		ok("x-api-key in lower case", idOf(k), "x-api-key: "+k),
		ok("X-Goog-Api-Key", idOf(k), "X-Goog-Api-Key: "+k),
		ok("Api-Key", idOf(k), "api-key: "+k),
		ok("Bearer", idOf(k), "Authorization: Bearer "+k),
		ok("bearer", idOf(k), "authorization: bearer "+k),
		ok("BEARER", idOf(k), "Authorization: BEARER "+k),
		ok("Bearer, many spaces", idOf(k), "Authorization: Bearer     "+k),
		ok("spaces and tabs around", idOf(k), "X-API-Key: \t "+k+" \t"),
		ok("256 bytes", idOf(long), "X-API-Key: "+long),
		ok("equal in two headers", idOf(k), "X-API-Key: "+k, "Authorization: Bearer "+k),
		ok("equal in four headers", idOf(k), "Api-Key: "+k, "X-Goog-Api-Key: "+k, "X-API-Key: "+k, "Authorization: Bearer "+k),
		ok("empty beside a key", idOf(k), "X-API-Key:", "Api-Key: "+k),
		ok("Basic beside a key", idOf(k), basic, "X-API-Key: "+k),
		ok("query beside a key", idOf(k), "X-API-Key: "+k),

		missing("nothing"),
		missing("empty value", "X-API-Key:"),
		missing("empty Bearer", "Authorization: Bearer"),
		missing("Basic", basic),
		missing("no scheme", "Authorization: "+k),
		missing("another scheme", "Authorization: Token "+k),
		missing("scheme glued to the key", "Authorization: Bearer"+k),
		missing("cookie", "Cookie: X-API-Key="+k+"; api_key="+k),
		missing("Proxy-Authorization", "Proxy-Authorization: Bearer "+k),
		missing("underscores", "X_API_Key: "+k),
		missing("dots", "X.API.Key: "+k),
		missing("websocket subprotocol", "Sec-WebSocket-Protocol: "+k),

		invalid("unknown, in our shape", "X-API-Key: "+k[:len(k)-4]+"AAAA"),
		invalid("another case", "X-API-Key: "+strings.ToUpper(k)),
		invalid("a byte short", "X-API-Key: "+k[:len(k)-1]),
		invalid("a byte more", "X-API-Key: "+k+"x"),
		invalid("257 bytes", "X-API-Key: "+long+"x"),
		invalid("8 KB", "X-API-Key: "+strings.Repeat("a", 8<<10)),
		invalid("Bearer and tab", "Authorization: Bearer\t"+k),
		invalid("Bearer, space, tab", "Authorization: Bearer \t"+k),
		invalid("two in one Bearer line", "Authorization: Bearer "+k+", Bearer "+other),
		invalid("two in one line", "X-API-Key: "+k+", "+other),
		invalid("two in one line, equal", "X-API-Key: "+k+","+k),
		invalid("quoted", `X-API-Key: "`+k+`"`),
		invalid("Bearer in X-API-Key", "X-API-Key: Bearer "+k),
		invalid("folded line", "X-API-Key: "+k[:20]+"\r\n "+k[20:]),
		invalid("folded Bearer line", "Authorization: Bearer "+k[:20]+"\r\n\t"+k[20:]),
		invalid("inner tab", "X-API-Key: "+k[:20]+"\t"+k[20:]),
		invalid("inner space", "X-API-Key: "+k[:20]+" "+k[20:]),
		invalid("UTF-8", "X-API-Key: "+k+"é"),
		invalid("Latin-1", "X-API-Key: "+k+"\xe9"),
		invalid("percent escape", fmt.Sprintf("X-API-Key: %%%02X%s", k[0], k[1:])),
		invalid("stored hash", "X-API-Key: "+hash),
		invalid("stored hash, upper case", "X-API-Key: "+strings.ToUpper(hash)),
		invalid("stored hash as configured", "X-API-Key: sha256:"+hash),
		invalid("stored hash as Bearer", "Authorization: Bearer sha256:"+hash),
		invalid("stored hash, base64", "X-API-Key: "+base64.StdEncoding.EncodeToString(sum[:])),
		invalid("stored hash, base64url", "X-API-Key: "+base64.RawURLEncoding.EncodeToString(sum[:])),
		invalid("key id", "X-API-Key: "+idOf(k)),
		invalid("name", "X-API-Key: alice"),

		ambiguous("two lines", "X-API-Key: "+k, "X-API-Key: "+other),
		ambiguous("two lines, equal", "X-API-Key: "+k, "x-api-key: "+k),
		ambiguous("two lines, one empty", "X-API-Key:", "X-API-Key: "+k),
		ambiguous("two Authorization lines", "Authorization: Bearer "+k, "Authorization: Bearer "+k),
		ambiguous("Basic and Bearer lines", basic, "Authorization: Bearer "+k),
		ambiguous("two X-Goog-Api-Key lines", "X-Goog-Api-Key: "+k, "X-Goog-Api-Key: "+k),
		ambiguous("two Api-Key lines", "Api-Key: "+k, "Api-Key: "+k),
		ambiguous("different, both valid", "X-API-Key: "+k, "Authorization: Bearer "+other),
		ambiguous("different, one invalid", "X-API-Key: "+k, "Api-Key: nonsense"),
		ambiguous("different in case", "X-API-Key: "+k, "X-Goog-Api-Key: "+strings.ToUpper(k)),
	}
}

func TestCredentials(t *testing.T) {
	k, other, long, tight := newKey(t), newKey(t), longKey(t, 256), newKey(t)
	g := guarded(t, roomy, `
http://:PORT0 {
	bind 127.0.0.1
	zejzl_auth {`+guardKeys+`
	}
	reverse_proxy BACKEND
}
http://:PORT1 {
	bind 127.0.0.1
	zejzl_auth {
		forward_credentials`+guardKeys+`
	}
	reverse_proxy BACKEND
}`, "K="+k, "OTHER="+other, "LONG="+long, "TIGHT="+tight)
	secrets := []string{k, other, long}

	for _, tc := range credentialCases(k, other, long) {
		t.Run("protected/"+tc.name, func(t *testing.T) {
			// A key in the query is never read, whatever it is beside.
			r := g.ask(t, "POST /api/chat?model=x", tc.fields...)
			r.wants(t, tc.status, tc.code)
			if tc.status != http.StatusOK {
				g.none(t)
				return
			}
			s := g.one(t)
			s.noSecret(t, secrets...)
			if id := s.get("X-Zejzl-Key-Id"); !slices.Equal(id, []string{tc.id}) {
				t.Errorf("key id %q, want %q", id, tc.id)
			}
			if tier := s.get("X-Zejzl-Tier"); !slices.Equal(tier, []string{"roomy"}) {
				t.Errorf("tier %q", tier)
			}
			wantBasic := slices.ContainsFunc(tc.fields, func(f string) bool { return strings.HasPrefix(f, "Authorization: Basic") })
			if basic := s.get("Authorization"); (len(basic) == 1) != wantBasic {
				t.Errorf("Authorization %q reached the backend, want it only for Basic", basic)
			}
			if r.Header.Get("X-Ratelimit-Limit") != "100000" {
				t.Errorf("limit %q", r.Header.Get("X-Ratelimit-Limit"))
			}
		})
		t.Run("public/"+tc.name, func(t *testing.T) {
			r := g.ask(t, "GET /api/status", tc.fields...)
			r.wants(t, http.StatusOK, "")
			s := g.one(t)
			// What was no credential of ours on the wire is none here either.
			if tc.code != "missing_key" {
				s.noSecret(t, secrets...)
			}
			for _, name := range []string{"X-Api-Key", "X-Goog-Api-Key", "Api-Key"} {
				if v := s.folded(strings.ToLower(name)); len(v) > 0 {
					t.Errorf("the backend was sent %q", v)
				}
			}
			if limit := r.Header.Get("X-Ratelimit-Limit"); (limit != "") != (tc.id != "") {
				t.Errorf("limit %q for key id %q: only a valid key is counted", limit, tc.id)
			}
			if id := strings.Join(s.get("X-Zejzl-Key-Id"), ","); id != tc.id {
				t.Errorf("key id %q, want %q", id, tc.id)
			}
		})
	}
	t.Run("in the query", func(t *testing.T) {
		for _, query := range []string{"key=", "api_key=", "api-key=", "apikey=", "access_token=", "token=", "X-API-Key=", "authorization=Bearer%20"} {
			g.ask(t, "GET /api/chat?"+query+k).wants(t, 401, "missing_key")
		}
		g.none(t)
		r := g.ask(t, "GET /api/status?key="+k)
		r.wants(t, 200, "")
		if r.Header.Get("X-Ratelimit-Limit") != "" || g.one(t).get("X-Zejzl-Key-Id") != nil {
			t.Error("a key in the query was read on a public path")
		}
	})
	t.Run("refused by the HTTP server", func(t *testing.T) { refusedByServer(t, g, k) })
	t.Run("a valid key is limited on a public path", func(t *testing.T) {
		for want := 1; want >= 0; want-- {
			r := g.ask(t, "GET /api/status", "X-API-Key: "+tight)
			r.wants(t, 200, "")
			if left := r.Header.Get("X-Ratelimit-Remaining"); left != strconv.Itoa(want) {
				t.Errorf("remaining %s, want %d", left, want)
			}
		}
		g.take()
		r := g.ask(t, "GET /api/status", "X-API-Key: "+tight)
		r.wants(t, 429, "rate_limited")
		if r.Header.Get("X-Ratelimit-Remaining") != "0" || r.Header.Get("Retry-After") == "" {
			t.Errorf("429 with %v", r.Header)
		}
		g.none(t)
		g.ask(t, "GET /api/status").wants(t, 200, "")
		g.take()
	})
	t.Run("forward_credentials", func(t *testing.T) {
		for _, field := range []string{"X-Api-Key: " + k, "X-Goog-Api-Key: " + k, "Api-Key: " + k, "Authorization: Bearer " + k} {
			for _, line := range []string{"POST /api/chat", "GET /api/status"} {
				g.askAt(t, 1, line, field).wants(t, 200, "")
				s := g.one(t)
				name, value, _ := strings.Cut(field, ": ")
				if got := s.get(name); !slices.Equal(got, []string{value}) || !slices.Equal(s.get("X-Zejzl-Key-Id"), []string{idOf(k)}) {
					t.Errorf("%s, %s: %d values forwarded beside identity %q", line, name, len(got), s.get("X-Zejzl-Key-Id"))
				}
			}
		}
		g.askAt(t, 1, "POST /api/chat", "X-API-Key: "+k+"x").wants(t, 401, "invalid_key")
		g.none(t)
	})
}

// refusedByServer keeps an eye on what net/http does before the guard: if it
// ever lets one of these pass, the guard's own rules are asked.
func refusedByServer(t *testing.T, g *site, k string) {
	for name, field := range map[string]string{
		"NUL":                   "X-API-Key: " + k + "\x00",
		"DEL":                   "X-API-Key: " + k + "\x7f",
		"bare CR":               "X-API-Key: " + k[:20] + "\r" + k[20:],
		"space before colon":    "X-API-Key : " + k,
		"non-ASCII name":        "X-API-K\u00e9y: " + k,
		"no name":               ": " + k,
		"two Host lines":        "Host: a\r\nHost: b\r\nX-API-Key: " + k,
		"two Content-Lengths":   "Content-Length: 1\r\nContent-Length: 2\r\nX-API-Key: " + k,
		"a transfer of its own": "Transfer-Encoding: xchunked\r\nX-API-Key: " + k,
	} {
		t.Run(name, func(t *testing.T) {
			if r := g.ask(t, "POST /api/chat", field); r.StatusCode/100 == 2 {
				t.Errorf("status %d", r.StatusCode)
			}
			g.none(t)
		})
	}
	t.Run("bare LF ends a line", func(t *testing.T) {
		// net/http allows it (RFC 9112, 2.2); what passes must not be read in two ways.
		resp, _ := raw(t, g.addr[0], "GET", "GET /api/chat HTTP/1.1\nHost: a\nX-API-Key: "+k+"\n\n")
		if resp.StatusCode != http.StatusOK {
			t.Errorf("status %d", resp.StatusCode)
		}
		g.one(t).noSecret(t, k)
	})
}

func TestOpenPaths(t *testing.T) {
	k, stranger, foreign := newKey(t), newKey(t), longKey(t, 40)
	g := guarded(t, roomy, `
http://:PORT0 {
	bind 127.0.0.1
	zejzl_auth {
		protect /api/* /v1
		public /api/status
		key {env.K} roomy
		key {env.FOREIGN} roomy
	}
	reverse_proxy BACKEND
}
http://:PORT1 {
	bind 127.0.0.1
	reverse_proxy BACKEND
}`, "K="+k, "FOREIGN="+foreign)

	t.Run("four headers and nothing else", func(t *testing.T) {
		guarded, plain := g.ask(t, "GET /about", "Origin: https://app.example.com"), g.askAt(t, 1, "GET /about", "Origin: https://app.example.com")
		g.take()
		want := slices.Sorted(maps.Keys(plain.Header))
		// HSTS, the fourth, belongs to TLS.
		want = append(want, "X-Content-Type-Options", "X-Frame-Options", "X-Xss-Protection")
		slices.Sort(want)
		if names := slices.Sorted(maps.Keys(guarded.Header)); !slices.Equal(names, want) || guarded.StatusCode != 200 {
			t.Errorf("status %d, headers %v, want %v", guarded.StatusCode, names, want)
		}
	})
	for _, secret := range []string{k, stranger, foreign} { // known, of our shape only, known only
		for _, name := range []string{"X-API-Key", "X-Goog-Api-Key", "Api-Key", "Authorization"} {
			field := name + ": " + secret
			if name == "Authorization" {
				field = name + ": bearer  " + secret
			}
			r := g.ask(t, "POST /about", field, "X-ZEJZL-Key-Id: admin", "Connection: x-zejzl-tier, X-Custom", "X-Zejzl-Tier: x")
			r.wants(t, 200, "")
			if r.Header.Get("X-Ratelimit-Limit") != "" {
				t.Error("a key was counted on an open path")
			}
			s := g.one(t)
			s.noSecret(t, secret)
			if ids := s.folded("x-zejzl-"); len(ids) > 0 {
				t.Errorf("identity %q reached an open path", ids)
			}
		}
	}
	t.Run("what is not ours stays", func(t *testing.T) {
		fields := []string{
			"Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.e30.c2lnbmF0dXJl", "X-Api-Key: some-other-service-key-0123456789",
			"Api-Key: short", "X-Http-Method-Override: DELETE", "Proxy: http://proxy.example", "Cookie: a=b",
		}
		g.ask(t, "POST /about?key=value", fields...).wants(t, 200, "")
		s := g.one(t)
		for _, field := range fields {
			name, value, _ := strings.Cut(field, ": ")
			if got := s.get(name); !slices.Equal(got, []string{value}) {
				t.Errorf("%s reached the backend as %q, want %q", name, got, value)
			}
		}
		g.ask(t, "POST /about", "Authorization: Basic dXNlcjpwYXNz").wants(t, 200, "")
		if got := g.one(t).get("Authorization"); !slices.Equal(got, []string{"Basic dXNlcjpwYXNz"}) {
			t.Errorf("Basic reached the backend as %q", got)
		}
		g.ask(t, "TRACK /about", "Upgrade: h2c", "Connection: Upgrade").wants(t, 200, "")
		if got := g.one(t).method; got != "TRACK" {
			t.Errorf("method %s", got)
		}
	})
	t.Run("doubt is protected", func(t *testing.T) {
		for _, path := range []string{
			"/api/chat", "/API/chat", "/Api/Chat", "/%61pi/chat", "/%41PI/chat", "/api", "/API", "/api/", "//api/chat", "/x//api/chat",
			"/about//x", "/about%2fx", "/about;x", "/about%3bx", "/about#x", "/ab%2561", "/v1", "/V1", "/v1/", "/%761", "http://other/about",
			"http://127.0.0.1/v1", "/about%zz", "/ab%", "/caf\xe9", "/about%80", "/about%ff",
		} {
			if r := g.ask(t, "GET "+path); r.StatusCode != 401 && r.StatusCode != 400 {
				t.Errorf("%s: status %d", path, r.StatusCode)
			}
		}
		for _, path := range []string{"/about/../api/chat", "/about/..", "/./about", "/about/%2e%2e/api", "/about\\x", "/about%5cx", "/about%00", "/about%7f"} {
			g.ask(t, "GET "+path).wants(t, 400, "invalid_path")
			g.ask(t, "GET "+path, "X-API-Key: "+k).wants(t, 400, "invalid_path")
		}
		g.none(t)
	})
	t.Run("plainly outside is open", func(t *testing.T) {
		for _, path := range []string{"/", "/about", "/apix", "/apis/x", "/v1/models", "/v10", "/x/api/chat", "/caf%C3%A9", "/a%20b", "/.well-known/x", "/..."} {
			g.ask(t, "GET "+path).wants(t, 200, "")
			if got := g.one(t).uri; got != path {
				t.Errorf("%s reached the backend as %s", path, got)
			}
		}
	})
}
