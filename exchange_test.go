package zejzlauth

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
	"github.com/zejzl/caddy-zejzl-auth/internal/window"
)

// rig is a guard in process, with a clock that only the test moves and a zone
// that no other test shares.
type rig struct {
	*Guard
	now    window.Tick
	wall   time.Time
	logs   *observer.ObservedLogs
	secret string // of a key "CI runner" with the tier pro
	id     string
}

// bareContext is a context without a configuration around it.
func bareContext(t testing.TB) caddy.Context {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	return ctx
}

// provisionedApp has no keys but those of a, whatever the environment holds.
func provisionedApp(t testing.TB, a *App) *App {
	t.Helper()
	if len(a.Sources) == 0 {
		a.Sources = []Source{{Source: sourceEnv, Prefix: "ZEJZL_NO_SUCH_KEY_"}}
	}
	if err := a.Provision(bareContext(t)); err != nil {
		t.Fatal(err)
	}
	return a
}

func newRig(t testing.TB, g *Guard) *rig {
	t.Helper()
	return newRigIn(t, provisionedApp(t, new(App)), g)
}

func newRigIn(t testing.TB, app *App, g *Guard) *rig {
	t.Helper()
	r := &rig{Guard: g, wall: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC), secret: key.Generate()}
	digest := key.Sum(r.secret)
	r.id = digest.ID()
	g.Keys = append(g.Keys, GuardKey{Secret: digest.String(), Tier: "pro", Name: "CI runner"})
	if g.Zone == "" {
		g.Zone = t.Name()
	}
	if err := g.provision(app.ctx, app); err != nil {
		t.Fatal(err)
	}
	g.clock = clock{
		tick: func() window.Tick { return r.now },
		wall: func() time.Time { return r.wall },
	}
	r.observe(t)
	return r
}

// observe collects what the guard logs. The thinner belongs to the process,
// so each test gets one that no other has filled.
func (r *rig) observe(t testing.TB) {
	var core zapcore.Core
	core, r.logs = observer.New(zapcore.DebugLevel)
	r.logger = zap.New(core)
	old := refusalLog
	refusalLog = &thinner{seed: old.seed}
	t.Cleanup(func() { refusalLog = old })
}

func (r *rig) wait(d time.Duration) {
	r.now += window.Tick(d / time.Microsecond)
	r.wall = r.wall.Add(d)
}

// newRequest makes a request from headers given as pairs of name and value.
func newRequest(method, target string, headers ...string) *http.Request {
	r := httptest.NewRequest(method, target, nil)
	r.Host = "api.example.com"
	for pair := range slices.Chunk(headers, 2) {
		r.Header.Add(pair[0], pair[1])
	}
	return r
}

// serve runs the request through the guard as Caddy's server would.
func (r *rig) serve(req *http.Request, next caddyhttp.HandlerFunc) (*http.Response, error) {
	w := httptest.NewRecorder()
	w.Header()["Server"] = []string{caddyhttp.ServerHeader}
	return r.serveTo(w, req, next)
}

func (r *rig) serveTo(w *httptest.ResponseRecorder, req *http.Request, next caddyhttp.HandlerFunc) (*http.Response, error) {
	req = caddyhttp.PrepareRequest(req, caddy.NewReplacer(), w, new(caddyhttp.Server))
	err := r.ServeHTTP(w, req, next)
	return w.Result(), err
}

// must serves a request that the guard answers or passes without an error.
func (r *rig) must(t testing.TB, want int, req *http.Request, next caddyhttp.HandlerFunc) *http.Response {
	t.Helper()
	resp, err := r.serve(req, next)
	if err != nil {
		t.Fatalf("%s %s: %v", req.Method, req.RequestURI, err)
	}
	if resp.StatusCode != want {
		t.Fatalf("%s %s: status %d, want %d", req.Method, req.RequestURI, resp.StatusCode, want)
	}
	return resp
}

func (r *rig) chat() *http.Request {
	return newRequest(http.MethodPost, "/api/chat", "X-Api-Key", r.secret)
}

// inFlight tells the slots that the key of the rig holds.
func (r *rig) inFlight(t testing.TB) int {
	t.Helper()
	entry, ok := r.lookup(key.Sum(r.secret))
	if !ok {
		t.Fatal("the key is not in the keyring")
	}
	return r.zone.account(entry.Key).InFlight()
}

func respondOK(w http.ResponseWriter, _ *http.Request) error {
	_, err := io.WriteString(w, "ok")
	return err
}

func notReached(t testing.TB) caddyhttp.HandlerFunc {
	return func(http.ResponseWriter, *http.Request) error {
		t.Error("the backend was reached")
		return nil
	}
}

func bodyOf(t testing.TB, resp *http.Response) string {
	t.Helper()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func TestOpenPath(t *testing.T) {
	r := newRig(t, &Guard{Protect: []string{"/api/*"}})
	foreign := key.Generate()[:30] + ".not.ours" // neither our shape nor in the keyring
	for _, header := range []string{"X-Api-Key", "Authorization", "X-Goog-Api-Key", "Api-Key"} {
		for value, stays := range map[string]bool{r.secret: false, key.Generate(): false, foreign: true} {
			if header == "Authorization" {
				value = "Bearer " + value
			}
			req := newRequest("DELETE", "/other", header, value, "X_Zejzl_Name", "x", "X-Http-Method-Override", "PUT")
			resp := r.must(t, http.StatusOK, req, func(w http.ResponseWriter, behind *http.Request) error {
				if got := behind.Header.Get(header) != ""; got != stays {
					t.Errorf("%s is passed: %v, want %v", header, got, stays)
				}
				if _, there := behind.Header["X_zejzl_name"]; there {
					t.Error("an identity header passed")
				}
				if behind.Header.Get("X-Http-Method-Override") != "PUT" {
					t.Error("an open path lost another header")
				}
				w.Header().Set("X-Powered-By", "backend")
				w.Header().Set("Access-Control-Allow-Origin", "*")
				return respondOK(w, behind)
			})
			want := http.Header{
				"Server": {"Caddy"}, "X-Powered-By": {"backend"},
				"Access-Control-Allow-Origin": {"*"}, "X-Content-Type-Options": {"nosniff"},
				"X-Frame-Options": {"DENY"}, "X-Xss-Protection": {"1; mode=block"},
			}
			if !maps.EqualFunc(resp.Header, want, slices.Equal) {
				t.Errorf("headers %v, want %v", resp.Header, want)
			}
		}
	}
	failed := errors.New("behind")
	if _, err := r.serve(newRequest("GET", "/other"), func(http.ResponseWriter, *http.Request) error { return failed }); !errors.Is(err, failed) {
		t.Errorf("an error on an open path became %v", err)
	}
}

func TestPreflightLeftToTheBackend(t *testing.T) {
	r := newRig(t, &Guard{CORS: &CORS{Backend: true}})
	req := newRequest("OPTIONS", "/api/chat", "Origin", "https://any.example", "Access-Control-Request-Method", "POST",
		"X-Http-Method-Override", "DELETE", "X-Zejzl-Key-Id", "admin", "Upgrade", "h2c", "Connection", "upgrade")
	resp := r.must(t, http.StatusNoContent, req, func(w http.ResponseWriter, behind *http.Request) error {
		for _, gone := range []string{"X-Http-Method-Override", idHeader, "Upgrade", "Connection"} {
			if _, there := behind.Header[gone]; there {
				t.Errorf("%s reached the backend without a key", gone)
			}
		}
		w.Header().Set("Access-Control-Allow-Origin", "*")
		w.WriteHeader(http.StatusNoContent)
		return nil
	})
	if got := resp.Header.Get("Access-Control-Allow-Origin"); got != "*" {
		t.Errorf("Access-Control-Allow-Origin of the backend became %q", got)
	}
}

func TestPanicBehind(t *testing.T) {
	r := newRig(t, new(Guard))
	resp := r.must(t, http.StatusInternalServerError, r.chat(), func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Encoding", "br")
		w.Header().Set("Etag", `"x"`)
		panic("with the key " + r.secret)
	})
	if got := bodyOf(t, resp); !strings.Contains(got, `"code":"internal_error"`) || strings.Contains(got, "with the key") {
		t.Errorf("body %s", got)
	}
	if resp.Header.Get("Content-Encoding") != "" || resp.Header.Get("Etag") != "" {
		t.Error("headers of the body that will not come")
	}
	if resp.Header.Get("X-Frame-Options") != "DENY" || resp.Header.Get("X-Ratelimit-Limit") != "100" {
		t.Errorf("headers %v", resp.Header)
	}
	if got := r.inFlight(t); got != 0 {
		t.Errorf("in flight: %d", got)
	}
	line := r.logs.FilterMessage("request failed behind the guard").All()
	if len(line) != 1 || line[0].Level != zapcore.ErrorLevel {
		t.Fatalf("log %v", r.logs.All())
	}
	fields := line[0].ContextMap()
	if got := fields["panic"].(string); !strings.HasPrefix(got, "with the key ") || strings.Contains(got, r.secret) {
		t.Errorf("panic in the log: %s", got)
	}
	if !strings.Contains(fields["stack"].(string), "TestPanicBehind") {
		t.Errorf("stack %s", fields["stack"])
	}
}

func TestPanicThatCannotBeAnswered(t *testing.T) {
	r := newRig(t, new(Guard))
	for name, next := range map[string]caddyhttp.HandlerFunc{
		"abort": func(http.ResponseWriter, *http.Request) error { panic(http.ErrAbortHandler) },
		"late": func(w http.ResponseWriter, req *http.Request) error {
			_ = respondOK(w, req)
			panic("late")
		},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("the panic did not reach net/http, which ends the connection")
				}
				if got := r.inFlight(t); got != 0 {
					t.Errorf("in flight: %d", got)
				}
			}()
			_, _ = r.serve(r.chat(), next)
		})
	}
}

func TestErrorBehind(t *testing.T) {
	r := newRig(t, new(Guard))
	behind := errors.New("dial tcp: refused, key " + r.secret)
	for _, c := range []struct {
		err    error
		status int
		code   string
		level  zapcore.Level
	}{
		{caddyhttp.Error(502, behind), 502, "upstream_error", zapcore.ErrorLevel},
		{caddyhttp.Error(404, behind), 404, "not_found", zapcore.DebugLevel},
		{behind, 500, "internal_error", zapcore.ErrorLevel},
	} {
		r.observe(t)
		start := r.now
		req := r.chat()
		req.RequestURI += "?api_key=" + r.secret
		resp := r.must(t, c.status, req, func(http.ResponseWriter, *http.Request) error {
			r.now = start + 1500
			return c.err
		})
		if got := bodyOf(t, resp); !strings.Contains(got, `"code":"`+c.code+`"`) || strings.Contains(got, "dial") {
			t.Errorf("body %s", got)
		}
		lines := r.logs.FilterMessage("request failed behind the guard").All()
		if len(lines) != 1 || lines[0].Level != c.level {
			t.Fatalf("%d: log %v", c.status, lines)
		}
		fields := lines[0].ContextMap()
		for name, want := range map[string]any{
			"status": int64(c.status), "reason": c.code, "method": "POST", "path": "/api/chat", "key_id": r.id,
			"key_name": "CI runner", "tier": "pro", "duration": 1500 * time.Microsecond, "client_ip": "192.0.2.1",
			"request_id": resp.Header.Get("X-Request-Id"),
		} {
			if fields[name] != want {
				t.Errorf("%d: %s is %v, want %v", c.status, name, fields[name], want)
			}
		}
		if got := fields["error"].(string); strings.Contains(got, r.secret) || !strings.Contains(got, "dial tcp") {
			t.Errorf("error in the log: %s", got)
		}
	}
	resp, err := r.serve(r.chat(), func(w http.ResponseWriter, req *http.Request) error {
		_ = respondOK(w, req)
		return behind
	})
	if !errors.Is(err, behind) || bodyOf(t, resp) != "ok" {
		t.Errorf("after the response began: %v", err)
	}
}

func TestErrorsCaddy(t *testing.T) {
	r := newRig(t, &Guard{Errors: "caddy", Tiers: map[string]Tier{"pro": oneIn(time.Minute)}})
	behind := caddyhttp.Error(http.StatusBadGateway, errors.New("behind"))
	w := httptest.NewRecorder()
	if _, err := r.serveTo(w, r.chat(), func(http.ResponseWriter, *http.Request) error { return behind }); !errors.Is(err, error(behind)) {
		t.Errorf("an error from behind became %v", err)
	}
	if w.Header().Get("X-Frame-Options") != "DENY" || r.logs.FilterMessage("request failed behind the guard").Len() != 0 {
		t.Errorf("headers %v, log %v", w.Header(), r.logs.All())
	}
	for want, req := range map[int]*http.Request{
		http.StatusTooManyRequests: r.chat(), http.StatusUnauthorized: newRequest("GET", "/x"), http.StatusBadRequest: newRequest("GET", "/.."),
	} {
		w := httptest.NewRecorder()
		_, err := r.serveTo(w, req, notReached(t))
		var handlerErr caddyhttp.HandlerError
		if !errors.As(err, &handlerErr) || handlerErr.StatusCode != want {
			t.Errorf("%d: returned %v", want, err)
		}
		if w.Body.Len() != 0 || w.Header().Get("Cache-Control") != "no-store" || w.Header().Get("X-Request-Id") == "" {
			t.Errorf("%d: %v %s", want, w.Header(), w.Body)
		}
	}
}

func TestNestedGuards(t *testing.T) {
	app := provisionedApp(t, new(App))
	outer := newRigIn(t, app, &Guard{Zone: t.Name() + "/outer", Tiers: map[string]Tier{"pro": twoIn(time.Minute)}})
	nest := func(zone string, tier Tier) *rig {
		inner := newRigIn(t, app, &Guard{Zone: zone, Tiers: map[string]Tier{"pro": tier}})
		inner.clock = outer.clock
		return inner
	}
	same := nest(outer.Zone, oneIn(time.Hour))
	other := nest(t.Name()+"/inner", oneIn(time.Hour))
	through := func(inner *rig, next caddyhttp.HandlerFunc) caddyhttp.HandlerFunc {
		return func(w http.ResponseWriter, req *http.Request) error {
			if req.Header.Get(idHeader) != outer.id {
				t.Error("the identity is not there")
			}
			return inner.ServeHTTP(w, req, next)
		}
	}
	keepsIdentity := func(w http.ResponseWriter, req *http.Request) error {
		if req.Header.Get(idHeader) != outer.id {
			t.Error("the inner guard took the identity away")
		}
		return respondOK(w, req)
	}

	// One zone is charged once, by the first.
	resp := outer.must(t, http.StatusOK, outer.chat(), through(same, keepsIdentity))
	if got := resp.Header.Get("X-Ratelimit-Remaining"); got != "1" {
		t.Errorf("same zone: %q remain", got)
	}
	// Another zone is charged too; the headers speak of the fewest.
	resp = outer.must(t, http.StatusOK, outer.chat(), through(other, keepsIdentity))
	if got := resp.Header.Get("X-Ratelimit-Remaining"); got != "0" {
		t.Errorf("other zone: %q remain", got)
	}
	outer.wait(time.Minute)
	// The inner zone is full: all or nothing, so the outer one gets its charge back.
	for range 3 {
		resp = outer.must(t, http.StatusTooManyRequests, outer.chat(), through(other, notReached(t)))
		if got := resp.Header.Get("Retry-After"); got != "3540" {
			t.Errorf("Retry-After %q", got)
		}
	}
	resp = outer.must(t, http.StatusOK, outer.chat(), respondOK)
	if got := resp.Header.Get("X-Ratelimit-Remaining"); got != "1" {
		t.Errorf("after refusals further in: %q remain, want 1", got)
	}
	if got := outer.inFlight(t); got != 0 {
		t.Errorf("in flight: %d", got)
	}
	outer.wait(time.Hour)
	outer.must(t, http.StatusOK, outer.chat(), through(other, keepsIdentity)) // its slot was freed too
}

func twoIn(d time.Duration) Tier {
	return Tier{Requests: []RequestLimit{{Limit: 2, Window: caddy.Duration(d)}}}
}

// A guard behind trusts the decision of the first: it asks for no key.
func TestNestedGuardAsksForNoKey(t *testing.T) {
	outer := newRig(t, &Guard{Public: []string{"/api/status"}})
	inner := newRig(t, &Guard{Zone: "another"})
	resp := outer.must(t, http.StatusOK, newRequest("GET", "/api/status"), func(w http.ResponseWriter, req *http.Request) error {
		return inner.ServeHTTP(w, req, caddyhttp.HandlerFunc(respondOK))
	})
	if got := bodyOf(t, resp); got != "ok" {
		t.Errorf("body %s", got)
	}
}

// The decision is about the URI as the client sent it, whatever rewrote it.
func TestOriginalURIDecides(t *testing.T) {
	r := newRig(t, &Guard{Public: []string{"/api/status"}, Protect: []string{"/api/*"}})
	for target, want := range map[string]int{"/api/chat": 401, "/api/status": 200, "/other": 200} {
		req := newRequest("GET", target)
		w := httptest.NewRecorder()
		req = caddyhttp.PrepareRequest(req, caddy.NewReplacer(), w, new(caddyhttp.Server))
		for _, rewritten := range []string{"/api/status", "/other", "/api/chat"} {
			req.RequestURI, req.URL.Path = rewritten, rewritten
			w := httptest.NewRecorder()
			if err := r.ServeHTTP(w, req.Clone(req.Context()), caddyhttp.HandlerFunc(respondOK)); err != nil || w.Code != want {
				t.Errorf("%s rewritten to %s: %d %v, want %d", target, rewritten, w.Code, err, want)
			}
			caddyhttp.SetVar(req.Context(), exchangeVar, nil)
		}
	}
}

// What an outer guard removed of a request outside its paths is what the inner
// guard judges: two keys stay two keys.
func TestOpenCredential(t *testing.T) {
	app := provisionedApp(t, new(App))
	outer := newRigIn(t, app, &Guard{Protect: []string{"/admin/*"}, Zone: t.Name() + "/outer"})
	foreign := "a-foreign-key-of-another-make-0123456789"
	inner := newRigIn(t, app, &Guard{Zone: t.Name() + "/inner", Keys: []GuardKey{
		{Secret: key.Sum(foreign).String(), Tier: "pro"}, {Secret: key.Sum(outer.secret).String(), Tier: "pro", Name: "CI runner"},
	}})
	behind := func(w http.ResponseWriter, r *http.Request) error {
		return inner.ServeHTTP(w, r, caddyhttp.HandlerFunc(respondOK))
	}
	for _, c := range []struct {
		want    int
		headers []string
	}{
		{http.StatusOK, []string{"X-Api-Key", outer.secret}},
		{http.StatusOK, []string{"X-Api-Key", foreign}},
		{http.StatusUnauthorized, nil},
		{http.StatusBadRequest, []string{"X-Api-Key", outer.secret, "Authorization", "Bearer " + foreign}},
		{http.StatusBadRequest, []string{"X-Api-Key", outer.secret, "Authorization", "Bearer " + key.Generate()}},
	} {
		outer.must(t, c.want, newRequest(http.MethodGet, "/x", c.headers...), behind)
	}
}
