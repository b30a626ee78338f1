package integration

import (
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// echoBackend answers with what it was asked, so that a wrong body shows.
func echoBackend(t testing.TB) (addr string) {
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s", r.Method, r.URL.Path, body)
	}))
	t.Cleanup(backend.Close)
	return strings.TrimPrefix(backend.URL, "http://")
}

// reloadSeconds is how long the reloads go on; the promise speaks of 60.
func reloadSeconds(t testing.TB) time.Duration {
	s := os.Getenv("ZEJZL_RELOAD_SECONDS")
	if s == "" {
		if testing.Short() {
			return 8 * time.Second
		}
		return time.Minute
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("ZEJZL_RELOAD_SECONDS: expected a whole number from 1")
	}
	return time.Duration(n) * time.Second
}

// reloading is a server whose configuration changes five times a second.
type reloading struct {
	*server
	url       string
	caddyfile func(generation int) string

	mu      sync.Mutex
	reloads int
	calls   int
	faults  map[string]int // by what went wrong
	broken  map[int]int    // transport errors by the number of reloads before
}

func (r *reloading) count(fault string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls++
	if fault != "" {
		r.faults[fault]++
	}
	if fault == transportError {
		r.broken[r.reloads]++
	}
}

const transportError = "transport error"

// post sends a request that no client repeats by itself.
func (r *reloading) post(client *http.Client, secret, path string) {
	const payload = "payload"
	req, err := http.NewRequest(http.MethodPost, r.url+path, strings.NewReader(payload))
	if err != nil {
		r.count(err.Error())
		return
	}
	req.Header.Set("X-API-Key", secret)
	resp, err := client.Do(req)
	if err != nil {
		r.count(transportError)
		return
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		r.count(transportError)
	case resp.StatusCode != http.StatusOK:
		r.count(fmt.Sprintf("status %d", resp.StatusCode))
	case string(body) != "POST "+path+" "+payload:
		r.count("wrong body")
	case resp.Header.Get("X-Generation") == "":
		r.count("no header of the configuration")
	default:
		r.count("")
	}
}

// step loads the next configuration; it is not for the test's own goroutine.
func (r *reloading) step(t *testing.T) {
	r.mu.Lock()
	r.reloads++
	generation := r.reloads
	r.mu.Unlock()
	if status, body := r.reload(r.caddyfile(generation)); status != http.StatusOK {
		t.Errorf("reload %d: status %d: %s", generation, status, body)
	}
}

// TestReloadsUnderLoad measures again before it believes that reloads with the
// guard break more connections: a difference that is real shows twice.
func TestReloadsUnderLoad(t *testing.T) {
	for range 2 {
		if !reloadUnderLoad(t) {
			return
		}
	}
	t.Error("twice more transport errors than plain Caddy in the same run, beyond noise")
}

// reloadUnderLoad tells whether the guard had more transport errors than noise
// explains. Whatever else goes wrong fails the test at once.
func reloadUnderLoad(t *testing.T) (more bool) {
	t.Helper()
	const countLimit = 100
	loadSecret, fullSecret, countSecret := randomSecret(), randomSecret(), randomSecret()
	// Caddy closes a dropped configuration's idle connections to the backend at
	// once, but those in use then only when they have idled: two minutes by default.
	proxy := fmt.Sprintf("reverse_proxy %s {\n\t\ttransport http {\n\t\t\tkeepalive 2s\n\t\t}\n\t}", echoBackend(t))
	guardPort, plainPort := freePort(t), freePort(t)
	guardGlobal, plainGlobal := globalBlock(t, "ZEJZL"), globalBlock(t, "")

	guarded := &reloading{url: fmt.Sprintf("http://127.0.0.1:%d", guardPort), faults: make(map[string]int), broken: make(map[int]int)}
	guarded.caddyfile = func(generation int) string {
		// New limits each time: a new cap on slots, another tier's window, a header.
		tiers := fmt.Sprintf(`
	zejzl {
		tier load %d/1m
		tier full 2/1h {
			concurrent %d
		}
		tier count %d/1h {
			concurrent %d
		}
	}`, 1_000_000+generation, 50+generation, countLimit, 50+generation)
		return strings.Replace(guardGlobal, "ZEJZL", tiers, 1) + fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	zejzl_auth {
		headers {
			X-Generation %d
		}
	}
	%s
}`, guardPort, generation, proxy)
	}
	plain := &reloading{url: fmt.Sprintf("http://127.0.0.1:%d", plainPort), faults: make(map[string]int), broken: make(map[int]int)}
	plain.caddyfile = func(generation int) string {
		return plainGlobal + fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	header X-Generation %d
	%s
}`, plainPort, generation, proxy)
	}
	guarded.server = startBinary(t, realCaddy(t), guarded.caddyfile(0), "ZEJZL_API_KEY_L="+loadSecret+":load",
		"ZEJZL_API_KEY_F="+fullSecret+":full", "ZEJZL_API_KEY_C="+countSecret+":count")
	plain.server = startBinary(t, realCaddy(t), plain.caddyfile(0))

	client := loadClient(t)
	for range 2 {
		mustFetch(t, client, guarded.url, fullSecret)
	}
	for range 3 { // settle: what the first reloads start once is no leak
		guarded.step(t)
		plain.step(t)
	}
	client.CloseIdleConnections()
	before := guarded.resources()

	ctx, cancel := context.WithTimeout(t.Context(), reloadSeconds(t))
	defer cancel()
	var wg sync.WaitGroup
	for i := range 4 {
		// Both servers get the same request right after each other, by turns the
		// one or the other first, over clients of the same kind; every fourth
		// makes a new connection each time.
		toGuard, toPlain := loadClient(t), loadClient(t)
		if i == 3 {
			toGuard.Transport.(*http.Transport).DisableKeepAlives = true
			toPlain.Transport.(*http.Transport).DisableKeepAlives = true
		}
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				path := fmt.Sprintf("/%d/%d", i, n)
				if n%2 == 0 {
					guarded.post(toGuard, loadSecret, path)
					plain.post(toPlain, loadSecret, path)
				} else {
					plain.post(toPlain, loadSecret, path)
					guarded.post(toGuard, loadSecret, path)
				}
			}
			toGuard.CloseIdleConnections()
			toPlain.CloseIdleConnections()
		})
	}
	counted := 0
	wg.Go(func() {
		for ctx.Err() == nil {
			for range 2 { // the same to plain Caddy
				_, _ = fetch(client, plain.url, "")
			}
			if got, err := fetch(client, guarded.url, fullSecret); err == nil && got.status != http.StatusTooManyRequests {
				t.Errorf("status %d for a key with a full window of an hour: the window was lost", got.status)
			}
			if got, err := fetch(client, guarded.url, countSecret); err == nil && got.status == http.StatusOK {
				counted++
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	for first, second := guarded, plain; ctx.Err() == nil; first, second = second, first {
		var both sync.WaitGroup
		both.Go(func() { first.step(t) })
		both.Go(func() { second.step(t) })
		both.Wait()
		select {
		case <-ticker.C:
		case <-ctx.Done():
		}
	}
	wg.Wait()

	t.Logf("%d reloads of each; guard: %d calls, faults %v; plain Caddy: %d calls, faults %v",
		guarded.reloads, guarded.calls, guarded.faults, plain.calls, plain.faults)
	more = compareFaults(t, guarded, plain)
	if counted != countLimit {
		t.Errorf("%d calls admitted over all reloads, want exactly the limit %d", counted, countLimit)
	}
	if got := mustFetch(t, client, guarded.url, loadSecret).header.Get("X-Generation"); got != strconv.Itoa(guarded.reloads) {
		t.Errorf("generation %q is served after %d reloads", got, guarded.reloads)
	}
	client.CloseIdleConnections()
	guarded.resourcesReturnTo(before)
	return more
}

// compareFaults allows the guard no fault but transport errors, and of those no
// more than plain Caddy has. One reload breaks the connections of several
// clients or of none, so errors come in clusters; how much the difference of
// the two scatters is taken from the reloads themselves. Three standard
// deviations of its sum, and one error where there are hardly any, are noise.
func compareFaults(t *testing.T, guarded, plain *reloading) (more bool) {
	t.Helper()
	if guarded.calls < 100 || plain.calls < 100 {
		t.Errorf("%d and %d calls prove nothing", guarded.calls, plain.calls)
	}
	for fault, n := range guarded.faults {
		if fault != transportError {
			t.Errorf("guard: %d times %s", n, fault)
		}
	}
	g, p := float64(guarded.faults[transportError]), float64(plain.faults[transportError])
	n := float64(max(guarded.reloads, plain.reloads) + 1)
	var variance float64
	for i := range int(n) {
		d := float64(guarded.broken[i]-plain.broken[i]) - (g-p)/n
		variance += d * d / (n - 1)
	}
	noise := 1 + 3*math.Sqrt(n*variance)
	t.Logf("transport errors: guard %.0f, plain Caddy in the same run %.0f; noise of the difference %.1f", g, p, noise)
	return g-p > noise
}

// resources are what a configuration must give back when it ends.
type resources struct {
	goroutines, files int
	profile           string
}

var profileTotal = regexp.MustCompile(`^goroutine profile: total (\d+)`)

func (s *server) resources() resources {
	s.t.Helper()
	// The admin endpoint's connections are the tests' own.
	http.DefaultClient.CloseIdleConnections()
	r := resources{profile: s.adminGet("/debug/pprof/goroutine?debug=1")}
	total := profileTotal.FindStringSubmatch(r.profile)
	if total == nil {
		s.t.Fatal("no goroutine profile on the admin endpoint")
	}
	r.goroutines, _ = strconv.Atoi(total[1])
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
	if err != nil {
		s.t.Skipf("counting file handles needs /proc: %v", err)
	}
	r.files = len(files)
	return r
}

// resourcesReturnTo waits for what ends in the background, such as an old
// server's last connection.
func (s *server) resourcesReturnTo(before resources) {
	s.t.Helper()
	var now resources
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		now = s.resources()
		if now.goroutines <= before.goroutines && now.files <= before.files {
			s.t.Logf("goroutines %d before, %d after; file handles %d before, %d after",
				before.goroutines, now.goroutines, before.files, now.files)
			return
		}
	}
	s.t.Errorf("goroutines %d before, %d after; file handles %d before, %d after; those left:\n%s",
		before.goroutines, now.goroutines, before.files, now.files, now.profile)
}

func TestTwoHundredReloadsLeaveNothing(t *testing.T) {
	secret, fileSecret := randomSecret(), randomSecret()
	port := freePort(t)
	global := globalBlock(t, "\tzejzl {\n\t\tkeys env\n\t\tkeys file DIR/keys.json\n\t}")
	caddyfile := func(generation int, guard string) string {
		return global + fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	log {
		output file DIR/access.log
		format zejzl
	}
	zejzl_auth {
		zone zone-%d
		%s
	}
	respond ok
}`, port, generation%3, guard)
	}
	s := start(t, strings.Replace(caddyfile(0, ""), "\t\tkeys file DIR/keys.json\n", "", 1), "ZEJZL_API_KEY_A="+secret+":enterprise")
	s.write("keys.json", keyFileJSON(fileKey{name: "f", tier: "enterprise", secret: fileSecret}))
	client := loadClient(t)
	url := fmt.Sprintf("http://127.0.0.1:%d/", port)
	cycle := func(i int) {
		if status, body := s.reload(caddyfile(i, "")); status != http.StatusOK {
			t.Fatalf("reload %d: status %d: %s", i, status, body)
		}
		if i%4 == 0 { // a failed one provisions much of itself and must give it all back
			if status, _ := s.reload(caddyfile(i+1, "key "+hashOf(randomSecret())+" nosuchtier")); status != http.StatusBadRequest {
				t.Fatalf("reload %d with an unknown tier: status %d, want 400", i, status)
			}
		}
		for _, key := range []string{secret, fileSecret} {
			if got := mustFetch(t, client, url, key); got.status != http.StatusOK {
				t.Fatalf("status %d after reload %d: %s", got.status, i, got.body)
			}
		}
	}
	for i := range 12 {
		cycle(i)
	}
	client.CloseIdleConnections()
	before := s.resources()
	for i := range 200 {
		cycle(i)
	}
	client.CloseIdleConnections()
	s.resourcesReturnTo(before)
}

func TestFailedReloadChangesNothing(t *testing.T) {
	secret, fullSecret := randomSecret(), randomSecret()
	port, taken := freePort(t), echoBackend(t)
	_, takenPort, _ := strings.Cut(taken, ":")
	global := globalBlock(t, "\tzejzl {\n\t\ttier full 2/1h\n\t}")
	site := fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	zejzl_auth {
		headers {
			X-Generation good
		}
	}
	respond ok
}`, port)
	s := start(t, global+site, "ZEJZL_API_KEY_A="+secret+":enterprise", "ZEJZL_API_KEY_B="+fullSecret+":full")
	s.write("bad.json", `{"keys": [`)
	url := fmt.Sprintf("http://127.0.0.1:%d/", port)
	client := loadClient(t)
	for range 2 {
		mustFetch(t, client, url, fullSecret)
	}
	config := s.adminGet("/config/")
	json := func(handler string) string {
		return fmt.Sprintf(`{"admin": {"listen": %q}, "apps": {"http": {"servers": {"a": {"listen": ["127.0.0.1:%d"], "routes": [{"handle": [%s]}]}}}}}`,
			s.admin, port, handler)
	}
	withSource := func(line string) string {
		return strings.Replace(global, "\t\ttier full", line+"\n\t\ttier full", 1) + site
	}
	changed := strings.Replace(site, "good", "bad", 1)

	tests := []struct{ name, config, mediaType string }{
		{"Caddyfile that does not parse", global + changed + "}", "text/caddyfile"},
		{"unknown subdirective", global + strings.Replace(changed, "headers {", "nosuch x\n\t\theaders {", 1), "text/caddyfile"},
		{"JSON that does not parse", `{"apps": `, "application/json"},
		{"unknown JSON field", json(`{"handler": "zejzl_auth", "nosuch": 1}`), "application/json"},
		{"unknown tier", json(`{"handler": "zejzl_auth", "default_tier": "nosuch"}`), "application/json"},
		{"bad key file", withSource("\t\tkeys file DIR/bad.json"), "text/caddyfile"},
		{"no key file", withSource("\t\tkeys file DIR/nosuch.json"), "text/caddyfile"},
		{"unset placeholder", global + strings.Replace(changed, "headers {", "key {env.NOSUCH} pro\n\t\theaders {", 1), "text/caddyfile"},
		// This one fails at Start, when the guard was provisioned whole.
		{"port that is taken", global + changed + fmt.Sprintf("\nhttp://127.0.0.1:%s {\n\tbind 127.0.0.1\n\tzejzl_auth\n}", takenPort), "text/caddyfile"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			resp, err := http.Post("http://"+s.admin+"/load", tt.mediaType, strings.NewReader(s.fill(tt.config)))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusBadRequest {
				t.Errorf("POST /load: status %d, want 400", resp.StatusCode)
			}
			got := mustFetch(t, client, url, secret)
			if got.status != http.StatusOK || got.header.Get("X-Generation") != "good" {
				t.Errorf("status %d, generation %q, want 200 from the old configuration", got.status, got.header.Get("X-Generation"))
			}
			if got := mustFetch(t, client, url, fullSecret); got.status != http.StatusTooManyRequests {
				t.Errorf("status %d for a key with a full window: the window was lost", got.status)
			}
			if got := s.adminGet("/config/"); got != config {
				t.Errorf("GET /config/ changed to %s", got)
			}
		})
	}
}
