package integration

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// canary is a secret that must sing nowhere.
type canary struct {
	secret string
	name   string // of its key; empty: no key has it
	shaped bool   // of the module's own shape, to be found in any text
}

// pieces are what no sink may hold: the secret, a part of it that is long
// enough to tell, and what becomes of it in Basic credentials.
func (c canary) pieces() []string {
	return []string{c.secret, c.secret[8:28], basicOf(c.secret)}
}

func basicOf(secret string) string {
	return base64.StdEncoding.EncodeToString([]byte("user:" + secret))
}

// foreignSecret has 40 characters and no shape to know it by.
func foreignSecret() string {
	return strings.NewReplacer("zejzl_", "", "-", "a", "_", "b").Replace(randomSecret() + randomSecret())[:40]
}

type probe struct {
	name    string
	anyKey  bool // the promise holds for keys of other makes too
	request func(url, secret string) *http.Request
}

func probes() []probe {
	inHeader := func(name string, value func(string) string) probe {
		return probe{"header " + name, true, func(url, secret string) *http.Request {
			r := newProbe(http.MethodGet, url)
			r.Header[name] = []string{value(secret)} // as it is spelled here
			return r
		}}
	}
	inURL := func(what, suffix string, anyKey bool) probe {
		return probe{what, anyKey, func(url, secret string) *http.Request {
			return newProbe(http.MethodGet, url+fmt.Sprintf(suffix, secret))
		}}
	}
	plain := func(secret string) string { return secret }
	bearer := func(secret string) string { return "Bearer " + secret }
	list := []probe{
		inHeader("X-Api-Key", plain),
		inHeader("X_Api_Key", plain),
		inHeader("x.api.key", plain),
		inHeader("Api-Key", plain),
		inHeader("X-Goog-Api-Key", plain),
		inHeader("Authorization", bearer),
		inHeader("authorization", func(s string) string { return "bearer   " + s }),
		inHeader("Authorization", plain),
		inHeader("Authorization", func(s string) string { return "Basic " + basicOf(s) }),
		inHeader("Proxy-Authorization", bearer),
		inHeader("Cookie", func(s string) string { return "session=" + s }),
		inHeader("Referer", func(s string) string { return "https://app.example/?a=1&api_key=" + s }),
		inHeader("X-Api-Key", func(s string) string { return s + "!" }),
		inHeader("X-Set-Cookie", func(s string) string { return "session=" + s }),
		inURL("?api_key=", "?api_key=%s", true),
		inURL("?key=", "?a=1&key=%s&b=2", true),
		inURL("?access_token=", "?access_token=%s#x", true),
		inURL("path", "/%s/x", false),
		{"escaped path", false, func(url, secret string) *http.Request {
			return newProbe(http.MethodGet, url+"/%7A"+secret[1:]+"/x")
		}},
		inURL("other query", "?x=%s", false),
		{"websocket protocol", true, func(url, secret string) *http.Request {
			r := newProbe(http.MethodGet, url)
			r.Header.Set("Connection", "Upgrade")
			r.Header.Set("Upgrade", "websocket")
			r.Header.Set("Sec-WebSocket-Version", "13")
			r.Header.Set("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==")
			r.Header.Set("Sec-WebSocket-Protocol", "realtime, openai-insecure-api-key."+secret)
			return r
		}},
		{"two lines", true, func(url, secret string) *http.Request {
			r := newProbe(http.MethodPost, url)
			r.Header["X-Api-Key"] = []string{secret, secret}
			return r
		}},
		{"two credentials", true, func(url, secret string) *http.Request {
			r := newProbe(http.MethodPost, url)
			r.Header["X-Api-Key"] = []string{secret}
			r.Header["Authorization"] = []string{"Bearer " + foreignSecret()}
			return r
		}},
		{"host", false, func(url, secret string) *http.Request {
			r := newProbe(http.MethodGet, url)
			r.Host = secret + ".example"
			return r
		}},
	}
	for _, name := range []string{"Referer", "User-Agent", "Origin", "X-Echo", "X-Forwarded-For", "Accept"} {
		p := inHeader(name, func(s string) string { return "https://" + s + ".example/" + s })
		p.anyKey = false
		list = append(list, p)
	}
	return list
}

func newProbe(method, url string) *http.Request {
	r, err := http.NewRequest(method, url, nil)
	if err != nil {
		panic(err) // methods, paths and queries here are valid
	}
	r.Header.Set("X-Probe", "probe")
	return r
}

// canarySites: a guard with everything, one that leaves errors to Caddy and
// forwards the key, and one with an open part.
func canarySites(ports []int, backend string, deadPort int, literal string) string {
	routes := fmt.Sprintf(`
	handle /dead* {
		reverse_proxy 127.0.0.1:%d
	}
	handle /panic* {
		misbehave panic boom
	}
	handle /late* {
		misbehave panic-late boom
	}
	handle /error* {
		misbehave error plain
	}
	handle {
		reverse_proxy %s
	}
`, deadPort, backend)
	keys := fmt.Sprintf(`
		key %s big literal
		key {env.CANARY_PLACEHOLDER} big placeholder
		key {$CANARY_DOLLAR} big dollar
		log_success all`, literal)
	site := func(port int, format, guard, rest string) string {
		return fmt.Sprintf(`
http://:%d {
	bind 127.0.0.1
	log {
		output file DIR/logs/access-%s.log
		format zejzl %s
	}
	zejzl_auth {
		%s%s
	}
%s%s}
`, port, format, format, guard, keys, routes, rest)
	}
	return site(ports[0], "json", "public /pub\n\t\tcors https://app.example", "") +
		strings.Replace(site(ports[1], "console", "errors caddy\n\t\tforward_credentials",
			"\thandle_errors {\n\t\trespond \"{err.status_code} {err.message}\"\n\t}\n"), "log_success all", "", 1) +
		strings.Replace(site(ports[2], "json", "protect /api/*", ""), "access-json", "access-open", 1)
}

func canaryGlobal(t *testing.T, keyFile string) string {
	return globalBlock(t, `
	log default {
		output stderr
		level DEBUG
		format zejzl console
	}
	log everything {
		output file DIR/logs/everything.json
		level DEBUG
		format zejzl json
	}
	log control {
		output file DIR/control.json
		level DEBUG
		format json
	}
	metrics
	servers {
		trace
		log_credentials
	}
	zejzl {
		keys env
		keys file `+keyFile+`
		tier big 1000000/1m
		tier small 1/1d
	}`)
}

// reflector gives back what it is sent in headers that access logs show.
func reflector(t *testing.T) (addr string) {
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if v := r.Header.Get("X-Echo"); v != "" {
			w.Header().Set("X-Echo", v)
			w.Header().Set("Location", "/?api_key="+v)
		}
		if v := r.Header.Get("X-Set-Cookie"); v != "" {
			w.Header().Set("Set-Cookie", v)
		}
		_, _ = io.WriteString(w, "ok")
	}))
	t.Cleanup(backend.Close)
	return strings.TrimPrefix(backend.URL, "http://")
}

func TestCanaryIsInNoSink(t *testing.T) {
	canaries := []canary{
		{randomSecret(), "literal", true},
		{randomSecret(), "placeholder", true},
		{randomSecret(), "dollar", true},
		{randomSecret(), "env", true},
		{randomSecret(), "file", true},
		{randomSecret(), "small", true},
		{randomSecret(), "", true},
		{foreignSecret(), "foreign", false},
		{foreignSecret(), "", false},
	}
	keyDir := t.TempDir()
	keyFile := filepath.Join(keyDir, "keys.json")
	err := os.WriteFile(keyFile, []byte(keyFileJSON(fileKey{name: "file", tier: "big", secret: canaries[4].secret})), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	ports := []int{freePort(t), freePort(t), freePort(t)}
	caddyfile := canaryGlobal(t, keyFile) + canarySites(ports, reflector(t), freePort(t), canaries[0].secret)
	s := start(t, caddyfile,
		"CANARY_PLACEHOLDER="+canaries[1].secret, "CANARY_DOLLAR="+canaries[2].secret,
		"ZEJZL_API_KEY_ENV="+canaries[3].secret+":big:env", "ZEJZL_API_KEY_SMALL="+canaries[5].secret+":small:small",
		"ZEJZL_API_KEY_FOREIGN="+canaries[7].secret+":big:foreign")

	s.checkKeysWork(fmt.Sprintf("http://127.0.0.1:%d/v1/ok", ports[0]), canaries)
	sendProbes(t, ports, canaries)
	answers := s.probeAdmin(t, caddyfile, canaries)
	sendProbes(t, ports[:1], canaries) // after the reloads too
	checkAccessLogTellsWho(t, filepath.Join(s.dir, "logs/access-json.log"))
	sinks := s.sinks(t, keyDir)
	sinks["admin answers"] = answers
	s.stop()
	sinks["output of the process"] = s.log.String()
	if got := strings.Count(s.log.String(), "received request"); got < len(canaries) {
		t.Errorf("%d lines of the admin log in the output of the process: the sink was not tried", got)
	}

	control := sinks["control.json"]
	delete(sinks, "control.json")
	for _, c := range canaries {
		// The same events without the encoder: if they held no canary, the
		// silence of the other sinks would prove nothing.
		if !strings.Contains(control, c.secret) {
			t.Errorf("canary %q: not even the log without the encoder has it", c.name)
		}
		for name, content := range sinks {
			for _, piece := range c.pieces() {
				if i := strings.Index(content, piece); i >= 0 {
					t.Errorf("canary %q (own shape: %v) is in %s: …%s…", c.name, c.shaped, name, content[max(0, i-300):min(len(content), i+100)])
					break
				}
			}
		}
	}
}

// checkKeysWork proves that the canaries are the keys that they are meant to be.
func (s *server) checkKeysWork(url string, canaries []canary) {
	s.t.Helper()
	client := loadClient(s.t)
	for _, c := range canaries {
		want := []int{http.StatusOK, http.StatusOK}
		switch c.name {
		case "":
			want = []int{http.StatusUnauthorized, http.StatusUnauthorized}
		case "small":
			want[1] = http.StatusTooManyRequests
		}
		for i := range want {
			if got := mustFetch(s.t, client, url, c.secret); got.status != want[i] {
				s.t.Fatalf("canary %q, call %d: status %d, want %d", c.name, i, got.status, want[i])
			}
		}
	}
}

func sendProbes(t *testing.T, ports []int, canaries []canary) {
	t.Helper()
	paths := []string{"/v1/ok", "/dead", "/panic", "/late", "/error", "/pub", "/api/x"}
	client := loadClient(t)
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	var wg sync.WaitGroup
	for site, port := range ports {
		wg.Go(func() {
			for _, c := range canaries {
				for _, p := range probes() {
					for _, path := range paths {
						// testcaddy puts the key, where it is forwarded, in the text of
						// a panic: only a shape can be found there.
						if !c.shaped && (!p.anyKey || site > 0 && path == "/panic") {
							continue
						}
						resp, err := client.Do(p.request(fmt.Sprintf("http://127.0.0.1:%d%s", port, path), c.secret))
						if err == nil {
							_, _ = io.Copy(io.Discard, resp.Body)
							resp.Body.Close()
						} else if path != "/late" && (path != "/panic" || site != 2) { // open there: net/http ends the connection
							t.Errorf("%s, %s: %v", p.name, path, err)
						}
					}
				}
			}
		})
	}
	wg.Wait()
}

// probeAdmin reloads, adapts and reads with canaries in reach, and returns
// all that the admin endpoint answered.
func (s *server) probeAdmin(t *testing.T, caddyfile string, canaries []canary) string {
	t.Helper()
	var answers bytes.Buffer
	ask := func(method, path, mediaType, body, secret string) int {
		req, err := http.NewRequest(method, "http://"+s.admin+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", mediaType)
		req.Header.Set("X-API-Key", secret)
		req.Header["X_Api_Key"] = []string{secret}
		req.Header.Set("Authorization", "Bearer "+secret)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		fmt.Fprintf(&answers, "%s %s: %d\n", method, strings.Split(path, "?")[0], resp.StatusCode)
		_ = resp.Header.Write(&answers)
		_, _ = io.Copy(&answers, resp.Body)
		return resp.StatusCode
	}
	caddyfile = s.fill(caddyfile)
	first := canaries[0].secret
	broken := strings.Replace(caddyfile, "big literal", "big literal and more", 1)
	for _, c := range canaries {
		for _, path := range []string{"/config/", "/metrics", "/reverse_proxy/upstreams", "/pki/ca/local", "/debug/vars", "/debug/pprof/cmdline", "/nosuch/"} {
			ask(http.MethodGet, path+"?api_key="+c.secret, "", "", c.secret)
		}
	}
	if got := ask(http.MethodPost, "/adapt", "text/caddyfile", caddyfile, first); got != http.StatusOK {
		t.Errorf("POST /adapt: status %d", got)
	}
	if got := ask(http.MethodPost, "/load", "text/caddyfile", broken, first); got != http.StatusBadRequest {
		t.Errorf("POST /load of a broken Caddyfile: status %d, want 400", got)
	}
	// Caddy takes over the default log of a configuration even if that fails
	// later: without these lines, its own would log what comes now.
	literal := `{"admin": {"listen": "` + s.admin + `"},
		"logging": {"logs": {"default": {"encoder": {"format": "zejzl", "wrap": {"format": "console"}}}}}, "apps": {"http": {"servers": {"a": {"routes": [{"handle": [{"handler": "zejzl_auth", "keys": [{"secret": "` + first + `"}]}]}]}}}}}`
	if got := ask(http.MethodPost, "/load", "application/json", literal, first); got != http.StatusBadRequest {
		t.Errorf("POST /load of JSON with a literal secret: status %d, want 400", got)
	}
	if got := ask(http.MethodPost, "/load", "text/caddyfile", caddyfile+"\n# changed\n", first); got != http.StatusOK {
		t.Errorf("POST /load: status %d", got)
	}
	ask(http.MethodGet, "/config/", "", "", first)
	return answers.String()
}

// filesBelow are all files of the process's directory and of more, by name.
func (s *server) filesBelow(t *testing.T, more ...string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	for _, dir := range append(more, s.dir) {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			content, err := os.ReadFile(path)
			name, _ := filepath.Rel(dir, path)
			files[name] = string(content)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// sinks are the files that the process wrote, by name, checked to hold what
// they are there for.
func (s *server) sinks(t *testing.T, more ...string) map[string]string {
	t.Helper()
	sinks := s.filesBelow(t, more...)
	delete(sinks, "Caddyfile") // what the operator wrote, the literal included
	for name, wants := range map[string][]string{
		"logs/everything.json": {
			`"logger":"http.log.access.log`, `"logger":"http.log.error`, `"logger":"http.handlers.zejzl_auth"`,
			`"logger":"http.handlers.reverse_proxy"`, `"logger":"http.log.trace"`, "REDACTED",
		},
		"logs/access-json.log":       {`"X-Probe":["probe"]`, `"status":401`, `"status":429`, `"status":502`, `"status":500`},
		"logs/access-console.log":    {"probe", "handled request"},
		"logs/access-open.log":       {`"X-Probe":["probe"]`},
		"config/caddy/autosave.json": {"zejzl_auth", "sha256:", "{env.CANARY_PLACEHOLDER}"},
	} {
		for _, want := range wants {
			if !strings.Contains(sinks[name], want) {
				t.Errorf("%s (%d bytes) has no %s: the sink was not tried", name, len(sinks[name]), want)
			}
		}
	}
	return sinks
}

// checkAccessLogTellsWho: the secret is hidden, the key is not.
func checkAccessLogTellsWho(t *testing.T, path string) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	who := make(map[string]bool)
	for line := range strings.Lines(string(content)) {
		var entry struct {
			Status  int    `json:"status"`
			User    string `json:"user_id"`
			KeyName string `json:"key_name"`
			Tier    string `json:"tier"`
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatalf("access log line %q: %v", line, err)
		}
		if entry.Status == http.StatusTooManyRequests && (entry.User == "" || entry.KeyName != "small" || entry.Tier != "small") {
			t.Errorf("access log of a 429 does not tell who: %s", line)
		}
		if entry.User != "" {
			who[entry.KeyName+" "+entry.Tier] = true
		}
	}
	for _, want := range []string{"literal big", "placeholder big", "dollar big", "env big", "file big", "foreign big", "small small"} {
		if !who[want] {
			t.Errorf("no access log line with user_id, key_name and tier of the key %q", want)
		}
	}
}
