package zejzlauth

import (
	"context"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

func TestAdmitted(t *testing.T) {
	r := newRig(t, new(Guard))
	before := testutil.ToFloat64(metrics.requests.WithLabelValues("admitted", "", "pro"))
	req := newRequest(http.MethodPost, "/api/chat", "Authorization", "bearer "+r.secret,
		"X-Api-Key", r.secret, "X_Zejzl_Tier", "enterprise", "X-Zejzl-Key-Id", "admin",
		"Connection", "keep-alive, X-Zejzl-Key-Id", "X-Zejzl.Other", "x")
	resp := r.must(t, http.StatusOK, req, func(w http.ResponseWriter, behind *http.Request) error {
		for _, name := range []string{"Authorization", "X-Api-Key", "X_Zejzl_Tier", "X-Zejzl.Other"} {
			if _, there := behind.Header[name]; there {
				t.Errorf("%s reached the backend", name)
			}
		}
		for name, want := range map[string]string{
			idHeader: r.id, nameHeader: "CI runner", tierHeader: "pro", "Connection": "keep-alive",
		} {
			if got := behind.Header[name]; !slices.Equal(got, []string{want}) {
				t.Errorf("%s to the backend: %q, want %q", name, got, want)
			}
		}
		repl := behind.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		for name, want := range map[string]string{
			"http.auth.user.id": r.id, "http.zejzl_auth.key.id": r.id,
			"http.zejzl_auth.key.name": "CI runner", "http.zejzl_auth.key.tier": "pro",
		} {
			if got, _ := repl.GetString(name); got != want {
				t.Errorf("{%s}: %q, want %q", name, got, want)
			}
		}
		if got := repl.ReplaceKnown("{http.zejzl_auth.key.secret}", "-"); got == r.secret {
			t.Error("a placeholder tells the secret")
		}
		if got := r.inFlight(t); got != 1 {
			t.Errorf("in flight behind the guard: %d, want 1", got)
		}
		if got := testutil.ToFloat64(metrics.inFlight.WithLabelValues("pro")); got < 1 {
			t.Errorf("in_flight gauge: %v", got)
		}
		return respondOK(w, behind)
	})
	if got := bodyOf(t, resp); got != "ok" {
		t.Errorf("body %q", got)
	}
	if got := r.inFlight(t); got != 0 {
		t.Errorf("in flight at the end: %d", got)
	}
	if got := testutil.ToFloat64(metrics.requests.WithLabelValues("admitted", "", "pro")) - before; got != 1 {
		t.Errorf("admitted grew by %v", got)
	}
}

func TestOneAnswerToBadCredentials(t *testing.T) {
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	path := writeKeyFile(t, `{"keys": [
		{"name": "expired", "tier": "pro", "secrets": [{"hash": "`+key.Sum(secretOf("expired")).String()+`"}], "expires_at": "`+now.Format(time.RFC3339)+`"},
		{"name": "revoked", "tier": "pro", "secrets": [{"hash": "`+key.Sum(secretOf("revoked")).String()+`"}], "revoked_at": "2029-01-01T00:00:00Z"},
		{"name": "early", "tier": "pro", "secrets": [{"hash": "`+key.Sum(secretOf("early")).String()+`"}], "not_before": "2031-01-01T00:00:00Z"},
		{"name": "rotated", "tier": "pro", "secrets": [{"hash": "`+key.Sum(secretOf("rotated")).String()+`", "not_after": "2029-01-01T00:00:00Z"}]}
	]}`)
	r := newRigIn(t, provisionedApp(t, &App{Sources: []Source{{Source: sourceFile, Path: path}}}), new(Guard))
	var want string
	for _, secret := range []string{
		key.Generate(), secretOf("expired"), secretOf("revoked"), secretOf("early"), secretOf("rotated"),
		"short", strings.Repeat("a", 257), r.secret + "\x80", key.Sum(r.secret).String(),
		strings.TrimPrefix(key.Sum(r.secret).String(), "sha256:"), r.secret[:len(r.secret)-1],
	} {
		resp := r.must(t, http.StatusUnauthorized, newRequest("POST", "/api/chat", "X-Api-Key", secret), notReached(t))
		resp.Header.Del("X-Request-Id")
		got := bodyOf(t, resp)
		for _, name := range slices.Sorted(maps.Keys(resp.Header)) {
			got += "\n" + name + ": " + strings.Join(resp.Header[name], " | ")
		}
		if want == "" {
			want = got
		}
		if got != want {
			t.Errorf("another answer:\n%s\nwant\n%s", got, want)
		}
	}
	if !strings.Contains(want, `"code":"invalid_key"`) {
		t.Errorf("answer %s", want)
	}

	// A second before its end the key still opens.
	r.wall = now.Add(-time.Second)
	r.must(t, http.StatusOK, newRequest("POST", "/api/chat", "X-Api-Key", secretOf("expired")), respondOK)
}

// secretOf is a secret of the accepted foreign form.
func secretOf(name string) string { return "foreign-secret.0123456789/" + name }

func TestPublicPath(t *testing.T) {
	r := newRig(t, &Guard{Public: []string{"/api/status"}, Tiers: map[string]Tier{"pro": oneIn(time.Minute)}})
	for name, header := range map[string][]string{
		"no key":         nil,
		"unknown key":    {"X-Api-Key", key.Generate()},
		"malformed":      {"Authorization", "Bearer ?"},
		"two of a kind":  {"X-Api-Key", key.Generate(), "X-Api-Key", key.Generate()},
		"method tunnel":  {"X-Http-Method-Override", "DELETE"},
		"path tunnel":    {"X_Original_Url", "/api/chat"},
		"forged caller":  {"X-Zejzl-Tier", "enterprise"},
		"foreign scheme": {"Authorization", "Basic dXNlcjpwYXNz"},
	} {
		t.Run(name, func(t *testing.T) {
			resp := r.must(t, http.StatusOK, newRequest("GET", "/api/status", header...), func(w http.ResponseWriter, behind *http.Request) error {
				for _, gone := range []string{"X-Api-Key", "X-Http-Method-Override", "X_original_url", "X-Zejzl-Tier", idHeader} {
					if _, there := behind.Header[gone]; there {
						t.Errorf("%s reached the backend", gone)
					}
				}
				return respondOK(w, behind)
			})
			if _, there := resp.Header["X-Ratelimit-Limit"]; there {
				t.Error("limit headers without a key")
			}
		})
	}

	withKey := func() *http.Request {
		return newRequest("GET", "/api/status", "X-Api-Key", r.secret, "X-Http-Method-Override", "DELETE")
	}
	resp := r.must(t, http.StatusOK, withKey(), func(w http.ResponseWriter, behind *http.Request) error {
		if behind.Header.Get("X-Http-Method-Override") != "" {
			t.Error("a public path passes method-override headers with a key")
		}
		if behind.Header.Get(idHeader) != r.id {
			t.Error("a valid key on a public path is not introduced")
		}
		return respondOK(w, behind)
	})
	if got := resp.Header.Get("X-Ratelimit-Remaining"); got != "0" {
		t.Errorf("X-RateLimit-Remaining %q", got)
	}
	r.must(t, http.StatusTooManyRequests, withKey(), notReached(t))
	r.must(t, http.StatusUnauthorized, newRequest("POST", "/api/status"), notReached(t))
}

// oneIn is a tier of one request.
func oneIn(d time.Duration) Tier {
	return Tier{Requests: []RequestLimit{{Limit: 1, Window: caddy.Duration(d)}}}
}

func TestRefusedBeforeTheKey(t *testing.T) {
	r := newRig(t, &Guard{CORS: &CORS{Origins: []string{corsTestOrigin}}})
	for _, c := range []struct {
		method, target string
		header         []string
		status         int
	}{
		{"TRACE", "/api", nil, 405},
		{"TRACK", "/api", nil, 405},
		{"gEt", "/api", nil, 405},
		{"CONNECT", "/api", nil, 405},
		{"GET", "/api/../x", nil, 400},
		{"GET", `/api%5Cx`, nil, 400},
		{"GET", "/api/%252e%252e/x", nil, 400},
		{"OPTIONS", "/api", []string{"Origin", "https://evil.example", "Access-Control-Request-Method", "POST"}, 403},
		{"OPTIONS", "/api", []string{"Origin", corsTestOrigin, "Access-Control-Request-Method", "POST"}, 204},
		{"PROPFIND", "/api", []string{"X-Api-Key", "SECRET"}, 200},
		{"OPTIONS", "/api", []string{"X-Api-Key", "SECRET"}, 200},
		{"OPTIONS", "/api", nil, 401},
		{"GET", "/a;b//c", []string{"X-Api-Key", "SECRET"}, 200},
	} {
		req := newRequest(c.method, c.target, c.header...)
		next := notReached(t)
		if req.Header.Get("X-Api-Key") != "" {
			req.Header.Set("X-Api-Key", r.secret)
			next = respondOK
		}
		resp, err := r.serve(req, next)
		if err != nil || resp.StatusCode != c.status {
			t.Errorf("%s %s: %d, %v; want %d", c.method, c.target, resp.StatusCode, err, c.status)
		}
		if _, there := resp.Header["Access-Control-Allow-Origin"]; there != (c.status == 204) {
			t.Errorf("%s %s: Access-Control-Allow-Origin %v", c.method, c.target, there)
		}
	}
}

func TestRateLimited(t *testing.T) {
	r := newRig(t, &Guard{Tiers: map[string]Tier{"pro": {
		Requests: []RequestLimit{{Limit: 2, Window: caddy.Duration(time.Minute)}, {Limit: 3, Window: caddy.Duration(time.Hour)}},
	}}})
	r.must(t, http.StatusOK, r.chat(), respondOK)
	r.wait(10 * time.Second)
	r.must(t, http.StatusOK, r.chat(), respondOK)
	r.wait(100 * time.Millisecond)
	resp := r.must(t, http.StatusTooManyRequests, r.chat(), notReached(t))
	for name, want := range map[string]string{
		"Retry-After": "50", "Retry-After-Ms": "49900", "X-Ratelimit-Remaining": "0", "X-Ratelimit-Limit": "2",
		"X-Ratelimit-Reset": "50", "X-Ratelimit-Tier": "pro", "Ratelimit": `"1m";r=0;t=50`,
		"Ratelimit-Policy": `"1m";q=2;w=60, "1h";q=3;w=3600`, "Cache-Control": "no-store",
	} {
		if got := resp.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}

	// Waiting exactly as long as told is enough, and then the hour is full.
	r.wait(49900 * time.Millisecond)
	r.must(t, http.StatusOK, r.chat(), respondOK)
	resp = r.must(t, http.StatusTooManyRequests, r.chat(), notReached(t))
	if got := resp.Header.Get("Retry-After"); got != "3540" {
		t.Errorf("Retry-After %q", got)
	}
	if resp.Header.Get("X-Should-Retry") != "false" || resp.Header.Get("Retry-After-Ms") != "" {
		t.Errorf("a long wait: %v", resp.Header)
	}
}

func TestConcurrencyLimited(t *testing.T) {
	tier := Tier{Requests: []RequestLimit{{Limit: 100, Window: caddy.Duration(time.Minute)}}, Concurrent: 1}
	r := newRig(t, &Guard{Tiers: map[string]Tier{"pro": tier}})
	r.must(t, http.StatusOK, r.chat(), func(w http.ResponseWriter, behind *http.Request) error {
		resp := r.must(t, http.StatusTooManyRequests, r.chat(), notReached(t))
		if resp.Header.Get("Retry-After") != "1" || !strings.Contains(bodyOf(t, resp), "concurrency_limited") {
			t.Errorf("refusal %v", resp.Header)
		}
		if resp.Header.Get("X-Ratelimit-Remaining") != "99" {
			t.Errorf("a refused request was charged: %q remain", resp.Header.Get("X-Ratelimit-Remaining"))
		}
		return respondOK(w, behind)
	})
	r.must(t, http.StatusOK, r.chat(), respondOK)
}

func TestShadow(t *testing.T) {
	r := newRig(t, &Guard{Shadow: true, Tiers: map[string]Tier{"pro": oneIn(time.Minute)}})
	shadow := metrics.requests.WithLabelValues("shadow", "rate_limited", "pro")
	admitted := metrics.requests.WithLabelValues("admitted", "", "pro")
	beforeShadow, beforeAdmitted := testutil.ToFloat64(shadow), testutil.ToFloat64(admitted)
	for range 3 {
		r.must(t, http.StatusOK, r.chat(), respondOK)
	}
	if got := testutil.ToFloat64(shadow) - beforeShadow; got != 2 {
		t.Errorf("shadow grew by %v", got)
	}
	if got := testutil.ToFloat64(admitted) - beforeAdmitted; got != 1 {
		t.Errorf("admitted grew by %v", got)
	}
	if got := r.logs.FilterMessage("request would be refused").FilterField(zap.String("reason", "rate_limited")).Len(); got != 2 {
		t.Errorf("%d lines", got) // one at INFO, one at DEBUG
	}
	r.wait(time.Minute) // nothing was charged beyond the first
	r.must(t, http.StatusOK, r.chat(), respondOK)
	if got := testutil.ToFloat64(shadow) - beforeShadow; got != 2 {
		t.Errorf("shadow grew by %v after the window", got)
	}
	if got := r.inFlight(t); got != 0 {
		t.Errorf("in flight: %d", got)
	}
}

func TestAwaitStart(t *testing.T) {
	t.Setenv("ENVIRONMENT", "development")
	synctest.Test(t, func(t *testing.T) {
		app := provisionedApp(t, new(App))
		g := &Guard{Zone: "await start"}
		if err := g.provision(app.ctx, app); err != nil {
			t.Fatal(err)
		}
		r := &rig{Guard: g}
		start := time.Now()
		with := func() *http.Request { return newRequest("POST", "/x", "X-Api-Key", key.Generate()) }
		resp := r.must(t, http.StatusServiceUnavailable, with(), notReached(t))
		if got := time.Since(start); got != 5*time.Second {
			t.Errorf("waited %s, want 5s", got)
		}
		if body := bodyOf(t, resp); !strings.Contains(body, `"code":"starting"`) || resp.Header.Get("Retry-After") != "1" {
			t.Errorf("%s %v", body, resp.Header)
		}
		start = time.Now()
		r.must(t, http.StatusUnauthorized, newRequest("POST", "/x"), notReached(t)) // no key: nothing to wait for
		gone, leave := context.WithCancel(context.Background())
		leave()
		r.must(t, http.StatusServiceUnavailable, with().WithContext(gone), notReached(t))
		if time.Since(start) != 0 {
			t.Error("waited without need")
		}
		time.AfterFunc(2*time.Second, func() { close(app.started) })
		r.must(t, http.StatusUnauthorized, with(), notReached(t)) // unknown, but decided
		if got := time.Since(start); got != 2*time.Second {
			t.Errorf("waited %s for Start", got)
		}
		r.must(t, http.StatusUnauthorized, with(), notReached(t))
		if got := time.Since(start); got != 2*time.Second {
			t.Error("waited after Start")
		}
	})
}
