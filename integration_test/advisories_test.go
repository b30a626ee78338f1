package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// advisories are holes that other proxies, gateways and limiters had, each
// with the test that this guard does not have it. Not among them, for want of
// the thing itself: 11, Caddy CVE-2026-27589 (a page posts to the admin
// endpoint), since the guard adds no admin endpoint yet; the SQL half of 32,
// LiteLLM CVE-2026-42208, since there is no database yet; the HTTP/3 half of 10,
// since it has a suite of its own.
var advisories = []struct {
	name string
	test func(t *testing.T, a *advisory)
}{
	{"01 Caddy CVE-2026-27587 escapes skip folding", neverPublic(caseAndEscape("/api/status")...)},
	{"02 Caddy CVE-2026-27588 long lists compare otherwise", longLists},
	{"03 Caddy CVE-2026-30851 the client's identity stays", forgedIdentity},
	{"04 Caddy CVE-2026-52845 underscores alias", aliases("X_Zejzl_Key_Id", "x_zejzl_tier", "X-Zejzl_Key-Id", "X_Zejzl-Key-Name", "X_Zejzl.Key_Id")},
	{"05 Caddy GHSA-49wc-4hcv-v58q dots alias", aliases("X.Zejzl.Key.Id", "x.zejzl.tier", "X-Zejzl.Key-Id", "X.Zejzl-Key-Name")},
	{"06 Caddy GHSA-qrp7 backslash", neverPublic("/api%5cstatus", "/api%5Cstatus", `/api\status`, `\api\status`, `/x\..\api/status`, "/x%5c..%5capi/status")},
	{"07 Caddy 7941 escaped slash traversal", neverPublic("/api/status%2f..%2fchat", "/api/status/..%2fchat", "/api%2fstatus", "/%2fapi/status")},
	{"08 Caddy 7828 a pattern matches longer paths", neverPublic(suffixes("/api/status")...)},
	{"09 Caddy CVE-2026-27586 a missing file opens", badKeyFiles},
	{"10 Caddy 7953 a rule for one protocol only", overHTTP2},
	{"12 Caddy CVE-2026-77281 placeholders of the client", placeholders},
	{"13 Caddy 7934 HTTPoxy", proxyHeader},
	{"14 Coraza CVE-2025-29914 two slashes", neverPublic("//bar/api/status", "//api/status", "///api/status", "/api//status", "//127.0.0.1/api/status")},
	{"15 caddy-security CVE-2024-21499 X-Forwarded-Proto", forwardedProto},
	{"16 Traefik CVE-2021-32813 Connection drops identity", connectionDropsIdentity},
	{"17 Traefik CVE-2024-45410 Connection drops X-Forwarded", connectionDropsForwarded},
	{"18 Traefik CVE-2026-39858 aliases of X-Forwarded-For", clientAddress},
	{"19 Traefik CVE-2026-35051 X-Forwarded-Prefix", forwardedPrefix},
	{"20 Traefik CVE-2026-40912 traversal after a strip", strippedTraversal},
	{"21 Envoy CVE-2019-9901 dot segments", neverPublic("/api/status/../chat", "/api/./status", "/x/../api/status", "/../api/status", "/api/status/.")},
	{"22 Envoy CVE-2021-29492 escaped slashes", neverPublic("/api%2Fstatus", "/%2Fapi/status", "/api/%5Cstatus", "/api/status%2F", "/api/status%5C..%5Cchat")},
	{"23 Envoy CVE-2021-32779 fragment", neverPublic("/api/status#/../chat", "/api/status#x", "/api/status#", "/#/api/status")},
	{"24 Envoy CVE-2021-32777 repeated headers", repeatedHeaders},
	{"25 Envoy CVE-2026-73511 path parameters", neverPublic("/api/status;/../chat", "/..;/api/status", "/api/..;/api/status", "/api;x/status", "/api/status;x=y")},
	{"26 Envoy CVE-2026-73548 early data of an upgrade", earlyData},
	{"27 Envoy CVE-2026-73547 CONNECT without a path", oddTargets},
	{"28 Envoy CVE-2026-26330 the client leaves", clientLeaves},
	{"29 APISIX CVE-2021-43557 guard and backend disagree", gullibleBackend},
	{"30 APISIX CVE-2022-24112 default key and X-Real-IP", noDefaultKey},
	{"31 Tyk 7671 the stored hash is a key", storedHash},
	{"32 LiteLLM CVE-2026-42208 the key is a command", keyIsData},
	{"33 rs/cors CVE-2018-20744, gin CVE-2019-25211, fiber CVE-2024-25124 origins", origins},
	{"34 Go GO-2026-4341 and HTTP/2 rapid reset", huge},
}

// advisory is the site that most of the tests share.
type advisory struct {
	*site
	k, nameless string
}

func TestAdvisories(t *testing.T) {
	a := &advisory{k: newKey(t), nameless: newKey(t)}
	a.site = guarded(t, roomy, `
http://:PORT0 {
	bind 127.0.0.1
	zejzl_auth {
		public /api/status
		key {env.K} roomy alice
		key {env.NAMELESS} roomy
		cors https://app.example.com
	}
	reverse_proxy BACKEND
}`, "K="+a.k, "NAMELESS="+a.nameless)
	for _, tc := range advisories {
		t.Run(tc.name, func(t *testing.T) {
			tc.test(t, a)
			a.none(t)
		})
	}
}

// neverPublic checks that none of the targets passes without a key.
func neverPublic(targets ...string) func(*testing.T, *advisory) {
	return func(t *testing.T, a *advisory) {
		for _, target := range targets {
			if r := a.ask(t, "GET "+target); r.StatusCode != 401 && r.StatusCode != 400 {
				t.Errorf("GET %q: status %d, want 401 or 400", target, r.StatusCode)
			}
			a.none(t)
		}
	}
}

func caseAndEscape(p string) (out []string) {
	for i := 1; i < len(p); i++ {
		c, folded := p[i], p[i]
		if c != '/' {
			folded ^= 0x20
			out = append(out, p[:i]+string(folded)+p[i+1:])
		}
		for _, b := range []byte{c, folded} {
			out = append(out, fmt.Sprintf("%s%%%02x%s", p[:i], b, p[i+1:]), fmt.Sprintf("%s%%%02X%s", p[:i], b, p[i+1:]),
				fmt.Sprintf("%s%%%02x%s", strings.ToUpper(p[:i]), b, p[i+1:]), fmt.Sprintf("%s%%%02x%s", p[:i], b, strings.ToUpper(p[i+1:])))
		}
	}
	return out
}

// suffixes returns p with one more byte of each sort but the question mark,
// which ends a path, and the space, which ends a request line.
func suffixes(p string) (out []string) {
	for c := '!'; c < 0x7f; c++ {
		if c != '?' {
			out = append(out, p+string(c), p+string(c)+"x", p+string(c)+"/x")
		}
	}
	for c := range 256 {
		out = append(out, fmt.Sprintf("%s%%%02x", p, c))
	}
	return out
}

func longLists(t *testing.T, _ *advisory) {
	for _, n := range []int{1, 100, 101, 10_000} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			var paths, allowed strings.Builder
			salt, hashes, records := newKey(t), make([]string, n), make([]string, n)
			for i := range n {
				fmt.Fprintf(&paths, " /list/p%dx", i)
				fmt.Fprintf(&allowed, " https://o%d.example.com", i)
				sum := sha256.Sum256(fmt.Appendf(nil, "%s%d", salt, i))
				hashes[i] = hex.EncodeToString(sum[:])
				records[i] = fmt.Sprintf(`{"name":"k%d","tier":"roomy","secrets":[{"hash":"sha256:%s"}]}`, i, hashes[i])
			}
			file := filepath.Join(t.TempDir(), "keys.json")
			if err := os.WriteFile(file, []byte(`{"keys":[`+strings.Join(records, ",")+`]}`), 0o600); err != nil {
				t.Fatal(err)
			}
			g := guarded(t, strings.Replace(roomy, "zejzl {", "zejzl {\n\t\tkeys file "+file, 1), `
http://:PORT0 {
	bind 127.0.0.1
	zejzl_auth {
		public`+paths.String()+`
		cors`+allowed.String()+`
	}
	reverse_proxy BACKEND
}`)
			for _, i := range []int{0, n / 2, n - 1} {
				p, origin, secret := fmt.Sprintf("/list/p%dx", i), fmt.Sprintf("https://o%d.example.com", i), fmt.Sprintf("%s%d", salt, i)
				r := g.ask(t, "GET "+p, "Origin: "+origin)
				r.wants(t, 200, "")
				if got := r.Header.Get("Access-Control-Allow-Origin"); got != origin {
					t.Errorf("origin %d of %d is not allowed: %q", i, n, got)
				}
				g.one(t)
				g.ask(t, "POST /x", "X-API-Key: "+secret).wants(t, 200, "")
				if id := g.one(t).get("X-Zejzl-Key-Id"); !slices.Equal(id, []string{hashes[i][:12]}) {
					t.Errorf("key %d of %d is %q", i, n, id)
				}
				for _, other := range append(caseAndEscape(p), p+"x", p+"/", "/"+p) {
					if r := g.ask(t, "GET "+other); r.StatusCode != 401 && r.StatusCode != 400 {
						t.Errorf("GET %s: status %d", other, r.StatusCode)
					}
				}
				for _, other := range []string{strings.ToUpper(origin), origin + ".", origin + ":443", origin + ".evil.example"} {
					if got := g.ask(t, "GET /x", "Origin: "+other).Header.Get("Access-Control-Allow-Origin"); got != "" {
						t.Errorf("origin %s got %q", other, got)
					}
				}
				for _, other := range []string{strings.ToLower(secret), secret + "0", "sha256:" + hashes[i], hashes[i]} {
					g.ask(t, "GET /x", "X-API-Key: "+other).wants(t, 401, "invalid_key")
				}
			}
			g.ask(t, fmt.Sprintf("GET /list/p%dx", n)).wants(t, 401, "missing_key")
			g.ask(t, "GET /x", fmt.Sprintf("X-API-Key: %s%d", salt, n)).wants(t, 401, "invalid_key")
			g.none(t)
		})
	}
}

// forgedIdentity sends the guard's own headers in all places of a request.
func forgedIdentity(t *testing.T, a *advisory) {
	for _, name := range []string{"X-Zejzl-Key-Id", "x-zejzl-key-id", "X-ZEJZL-TIER", "X-Zejzl-Key-Name", "X-Zejzl-", "X-Zejzl-Anything"} {
		forged := []string{name + ": forged", name + ": forged again"}
		for _, line := range []string{"POST /api/chat", "GET /api/status"} {
			for _, key := range []string{a.k, a.nameless} {
				a.ask(t, line, append(forged, "X-API-Key: "+key)...).wants(t, 200, "")
				want := []string{"X-Zejzl-Key-Id: " + idOf(key), "X-Zejzl-Tier: roomy"}
				if key == a.k {
					want = slices.Insert(want, 1, "X-Zejzl-Key-Name: alice")
				}
				got := a.one(t).folded("x-zejzl-")
				if slices.Sort(got); !slices.Equal(got, want) {
					t.Errorf("%s: the backend was told %q, want %q", name, got, want)
				}
			}
		}
		for _, line := range []string{"GET /api/status", "HEAD /api/status"} {
			a.ask(t, line, forged...).wants(t, 200, "")
			if got := a.one(t).folded("x-zejzl-"); len(got) > 0 {
				t.Errorf("nobody reached the backend as %q", got)
			}
		}
		for _, announced := range []string{name, "X-Checksum", "X-Checksum, " + name} {
			r := a.ask(t, "POST /api/chat", "X-API-Key: "+a.nameless, "Transfer-Encoding: chunked", "Trailer: "+announced,
				"", "4\r\nbody\r\n0\r\nX-Checksum: 1\r\n"+name+": forged")
			r.wants(t, 200, "")
			if s := a.one(t); strings.Contains(s.tail, "forged") || !strings.HasPrefix(s.tail, "body") {
				t.Errorf("with Trailer: %s the backend was sent %q", announced, s.tail)
			}
		}
	}
}

// aliases lets headers past Caddy, which would drop them, as an operator may.
func aliases(names ...string) func(*testing.T, *advisory) {
	return func(t *testing.T, a *advisory) {
		g := guarded(t, roomy+`
	servers {
		expected_underscore_headers x_zejzl_* x-zejzl_* x_zejzl-* x_zejzl.key_id
		expected_dot_headers x.zejzl.* x-zejzl.* x.zejzl-*
	}`, `
http://:PORT0 {
	bind 127.0.0.1
	zejzl_auth {
		protect /api/*
		public /api/status
		key {env.K} roomy
	}
	reverse_proxy BACKEND
}
http://:PORT1 {
	bind 127.0.0.1
	reverse_proxy BACKEND
}`, "K="+a.k)
		for _, name := range names {
			forged := name + ": forged"
			g.askAt(t, 1, "GET /api/chat", forged).wants(t, 200, "")
			if got := g.one(t).folded("x-zejzl-"); len(got) != 1 {
				t.Fatalf("%s never gets past Caddy itself: the test shows nothing", name)
			}
			for _, line := range []string{"POST /api/chat", "GET /api/status", "POST /open"} {
				for _, key := range []string{"X-API-Key: " + a.k, "X-API-Key: unknown"} {
					r := g.ask(t, line, forged, key)
					if r.StatusCode == 401 {
						g.none(t)
						continue
					}
					for _, got := range g.one(t).folded("x-zejzl-") {
						if got != "X-Zejzl-Key-Id: "+idOf(a.k) && got != "X-Zejzl-Tier: roomy" {
							t.Errorf("%s: the backend was told %q", line, got)
						}
					}
				}
			}
		}
	}
}

// badKeyFiles starts and reloads with key files that can't be read.
func badKeyFiles(t *testing.T, a *advisory) {
	config := func(file string) string {
		return fmt.Sprintf("{\n\tadmin off\n\thttp_port %d\n\thttps_port %d\n\tskip_install_trust\n\tzejzl {\n\t\tkeys file %s\n\t}\n}\nhttp://127.0.0.1:%d {\n\tzejzl_auth\n\trespond open\n}\n",
			freePort(t), freePort(t), file, freePort(t))
	}
	dir := t.TempDir()
	for name, content := range map[string]string{
		"missing": "", "empty": "", "directory": "", "truncated": `{"keys": [`, "no-json": "secret-text", "wrong-field": `{"keys": [], "key": 1}`,
		"no-tier": `{"keys": [{"name": "x", "secrets": [{"hash": "sha256:` + strings.Repeat("ab", 32) + `"}]}]}`,
		"clear":   `{"keys": [{"name": "x", "tier": "pro", "secrets": [{"hash": "` + a.k + `"}]}]}`,
	} {
		file := filepath.Join(dir, name)
		switch name {
		case "missing":
		case "directory":
			_ = os.Mkdir(file, 0o700)
		default:
			if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		cmd := exec.CommandContext(ctx, binary, "run", "--config", "-", "--adapter", "caddyfile")
		cmd.Env, cmd.Dir = []string{"HOME=" + dir}, dir
		cmd.Stdin = strings.NewReader(config(file))
		out, err := cmd.CombinedOutput()
		switch {
		case ctx.Err() != nil, err == nil:
			t.Errorf("%s: Caddy started with it", name)
		case !bytes.Contains(out, []byte(file)):
			t.Errorf("%s: the error does not name the file:\n%s", name, out)
		case bytes.Contains(out, []byte(a.k)), bytes.Contains(out, []byte("secret-text")):
			t.Errorf("%s: the error shows what is in the file", name)
		}
		cancel()
		status, _ := a.reload(strings.Replace(config(file), "admin off", "admin ADMIN", 1))
		if status == http.StatusOK {
			t.Fatalf("%s: the reload was taken", name)
		}
		a.ask(t, "POST /api/chat").wants(t, 401, "missing_key")
		a.ask(t, "POST /api/chat", "X-API-Key: "+a.k).wants(t, 200, "")
		a.one(t)
	}
}

// http2 is a client that speaks HTTP/2 without TLS.
func http2(t testing.TB) *http.Client {
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 20 * time.Second}
}

func overHTTP2(t *testing.T, _ *advisory) {
	k, other, long := newKey(t), newKey(t), longKey(t, 256)
	g := guarded(t, roomy+"\n\tservers {\n\t\tprotocols h1 h2c\n\t}", `
http://:PORT0 {
	bind 127.0.0.1
	zejzl_auth {`+guardKeys+`
	}
	reverse_proxy BACKEND
}`, "K="+k, "OTHER="+other, "LONG="+long, "TIGHT="+newKey(t))
	client := http2(t)
	call := func(method, path string, fields []string) (*http.Response, string) {
		req, err := http.NewRequest(method, "http://"+g.addr[0]+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range fields {
			name, value, _ := strings.Cut(f, ":")
			req.Header.Add(name, strings.TrimSpace(value))
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		if resp.ProtoMajor != 2 {
			t.Fatalf("the answer came over %s", resp.Proto)
		}
		return resp, string(body)
	}
	for _, tc := range credentialCases(k, other, long) {
		if strings.Contains(strings.Join(tc.fields, ""), "\n") {
			continue // HTTP/2 has no folded lines
		}
		resp, body := call("POST", "/api/chat", tc.fields)
		(&verdict{resp, body}).wants(t, tc.status, tc.code)
		for _, s := range g.take() {
			s.noSecret(t, k, other, long)
			if id := s.get("X-Zejzl-Key-Id"); tc.status != 200 || !slices.Equal(id, []string{tc.id}) {
				t.Errorf("%s: the backend was reached by %q", tc.name, id)
			}
		}
	}
	for _, path := range []string{"/api/statusx", "/API/status", "/api/%73tatus", "//api/status", "/api/status/../chat", "/api/status%2f..%2fchat", "/api/status;x"} {
		if resp, _ := call("GET", path, nil); resp.StatusCode != 401 && resp.StatusCode != 400 {
			t.Errorf("GET %s: status %d", path, resp.StatusCode)
		}
	}
	if resp, _ := call("TRACE", "/api/chat", []string{"X-API-Key: " + k}); resp.StatusCode != 405 {
		t.Errorf("TRACE: status %d", resp.StatusCode)
	}
	g.none(t)
}

// placeholders sends what would be a placeholder if the operator wrote it.
func placeholders(t *testing.T, _ *advisory) {
	k, canary := newKey(t), "canary"+newKey(t)[8:20]
	g := guarded(t, roomy+"\n\tdebug", `
http://:PORT0 {
	bind 127.0.0.1
	log
	zejzl_auth {
		key {env.K} roomy "braces {env.CANARY}"
		cors https://app.example.com
	}
	reverse_proxy BACKEND {
		header_up X-Key-Name {http.zejzl_auth.key.name}
	}
}`, "K="+k, "CANARY="+canary)
	for _, p := range []string{"{env.CANARY}", "{http.vars.x}{env.CANARY}", "{$CANARY}", "{{env.CANARY}}", `{file./proc/self/environ}`} {
		for _, key := range []string{"X-API-Key: " + k, "X-API-Key: " + p, "Authorization: Bearer " + p} {
			r := g.ask(t, "POST /api/"+p+"?"+p, key, "Origin: https://"+p, "X-Request-Id: "+p, "User-Agent: "+p, "Referer: "+p)
			if strings.Contains(r.body+fmt.Sprint(r.Header), canary) {
				t.Errorf("%s was filled in on the way to the client", p)
			}
		}
	}
	g.take()
	if strings.Contains(g.bytes(), canary) {
		t.Error("a placeholder was filled in on the way to the backend")
	}
	if strings.Contains(g.log.String(), canary) {
		t.Error("a placeholder was filled in on the way to the log")
	}
}
