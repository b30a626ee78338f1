package zejzlauth

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

func TestLogSuccess(t *testing.T) {
	for level, want := range map[string]struct{ info, debug int }{
		"": {2, 5}, "info": {2, 5}, "all": {5, 5}, "debug": {0, 5}, "off": {0, 0},
	} {
		r := newRig(t, &Guard{LogSuccess: level, Zone: t.Name() + level})
		for i := range 5 {
			if i == 4 {
				r.wait(time.Minute)
			}
			r.must(t, http.StatusOK, r.chat(), respondOK)
		}
		info := r.logs.FilterMessage("authenticated").FilterLevelExact(zapcore.InfoLevel).All()
		debug := r.logs.FilterMessage("request admitted").FilterLevelExact(zapcore.DebugLevel).All()
		if len(info) != want.info || len(debug) != want.debug || r.logs.Len() != want.info+want.debug {
			t.Errorf("%q: %d and %d lines of %d", level, len(info), len(debug), r.logs.Len())
		}
		var calls int64
		for _, line := range info {
			fields := line.ContextMap()
			calls += fields["count"].(int64)
			wantFields(t, fields, map[string]any{
				"key_id": r.id, "key_name": "CI runner", "tier": "pro", "client_ip": "192.0.2.1", "method": "POST", "path": "/api/chat",
			})
			if len(fields["request_id"].(string)) != 36 {
				t.Errorf("request id %v", fields["request_id"])
			}
		}
		if len(info) > 0 && calls != 5 {
			t.Errorf("%q: the lines stand for %d calls", level, calls)
		}
		for i, line := range debug {
			want := int64(0)
			if i == 4 {
				want = 60_000_000
			}
			if got := line.ContextMap()["admitted_at"]; got != want {
				t.Errorf("%q: admitted_at %v, want %d", level, got, want)
			}
		}
	}
}

func wantFields(t *testing.T, got map[string]any, want map[string]any) {
	t.Helper()
	for name, value := range want {
		if got[name] != value {
			t.Errorf("%s: %v, want %v", name, got[name], value)
		}
	}
}

func TestRefusalLog(t *testing.T) {
	r := newRig(t, &Guard{Tiers: map[string]Tier{"pro": oneIn(time.Hour)}})
	r.must(t, http.StatusOK, r.chat(), respondOK)
	r.logs.TakeAll()
	r.wait(10 * time.Second)
	resp := r.must(t, http.StatusTooManyRequests, r.chat(), notReached(t))
	line := r.logs.TakeAll()
	if len(line) != 1 || line[0].Level != zapcore.InfoLevel || line[0].Message != "request refused" {
		t.Fatalf("%v", line)
	}
	wantFields(t, line[0].ContextMap(), map[string]any{
		"reason": "rate_limited", "status": int64(429), "key_id": r.id, "key_name": "CI runner", "tier": "pro", "count": int64(1),
		"client_ip": "192.0.2.1", "request_id": resp.Header.Get("X-Request-Id"), "wait": 59*time.Minute + 50*time.Second, "path": "/api/chat",
	})

	unknown := key.Generate()
	req := newRequest("POST", "/api/"+unknown+"?key="+unknown, "X-Api-Key", unknown)
	r.must(t, http.StatusUnauthorized, req, notReached(t))
	line = r.logs.TakeAll()
	if len(line) != 1 {
		t.Fatalf("%v", line)
	}
	fields := line[0].ContextMap()
	wantFields(t, fields, map[string]any{"reason": "invalid_key", "status": int64(401), "client_ip": "192.0.2.1"})
	if strings.Contains(fmt.Sprint(fields), unknown) {
		t.Errorf("a key in the log: %v", fields)
	}
	if _, there := fields["key_id"]; there {
		t.Error("an unknown key has an id")
	}
}

// A flood at INFO writes one line a minute, that tells how many it stands for.
func TestRefusalFlood(t *testing.T) {
	r := newRig(t, new(Guard))
	core, logs := observer.New(zapcore.InfoLevel)
	r.logger = zap.New(core)
	flood := func() {
		for range 1000 {
			r.must(t, http.StatusUnauthorized, newRequest("GET", "/x", "X-Api-Key", key.Generate()), notReached(t))
		}
	}
	flood()
	r.wait(time.Minute)
	flood()
	lines := logs.All()
	if len(lines) != 2 || lines[0].ContextMap()["count"] != int64(1) || lines[1].ContextMap()["count"] != int64(1000) {
		t.Errorf("%d lines: %v", len(lines), lines)
	}
}

// The caller of a key that is known but not active is told to the log alone.
func TestRejectedKeyIsNamed(t *testing.T) {
	path := writeKeyFile(t, strings.Replace(keysJSON(literalSecret), `"tier"`, `"id": "k_old", "revoked_at": "2020-01-01T00:00:00Z", "tier"`, 1))
	r := newRigIn(t, provisionedApp(t, &App{Sources: []Source{{Source: "file", Path: path}}}), new(Guard))
	resp := r.must(t, http.StatusUnauthorized, newRequest("GET", "/x", "X-Api-Key", literalSecret), notReached(t))
	if body := bodyOf(t, resp); strings.Contains(body, "k_old") || strings.Contains(body, "revoked") {
		t.Errorf("the caller is told: %s", body)
	}
	lines := r.logs.FilterMessage("request refused").All()
	if len(lines) != 1 {
		t.Fatalf("%v", r.logs.All())
	}
	wantFields(t, lines[0].ContextMap(), map[string]any{"key_id": "k_old", "key_name": "key 0", "tier": "pro", "key_status": "revoked"})
}

func TestClientNet(t *testing.T) {
	for ip, want := range map[string]string{
		"192.0.2.1": "192.0.2.1", "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64", "::1": "::/64", "fe80::1%eth0": "fe80::/64",
		"::ffff:192.0.2.1": "::ffff:192.0.2.1", "@": "@", "": "",
	} {
		r := caddyhttp.PrepareRequest(newRequest("GET", "/"), caddy.NewReplacer(), httptest.NewRecorder(), new(caddyhttp.Server))
		caddyhttp.SetVar(r.Context(), caddyhttp.ClientIPVarKey, ip)
		x := &exchange{request: r}
		if got := x.clientNet(); got != want {
			t.Errorf("%q: %q, want %q", ip, got, want)
		}
	}
}

// With access logs on, the key's name and tier stand beside user_id.
func TestAccessLogFields(t *testing.T) {
	r := newRig(t, new(Guard))
	for logged, server := range map[bool]*caddyhttp.Server{true: {Logs: new(caddyhttp.ServerLogConfig)}, false: {}} {
		w := httptest.NewRecorder()
		req := caddyhttp.PrepareRequest(r.chat(), caddy.NewReplacer(), w, server)
		if err := r.ServeHTTP(w, req, caddyhttp.HandlerFunc(respondOK)); err != nil {
			t.Fatal(err)
		}
		extra := fmt.Sprint(req.Context().Value(caddyhttp.ExtraLogFieldsCtxKey))
		for _, part := range []string{"key_name", "CI runner", "tier", "pro"} {
			if strings.Contains(extra, part) != logged {
				t.Errorf("access log %v: fields %s", logged, extra)
			}
		}
	}
}

// A caller can't blank out its own log line with a short "key".
func TestShortCredentialHidesNothing(t *testing.T) {
	x := &exchange{path: "/v1/admin/delete", secret: "e"}
	if got := x.loggedPath(); got != x.path {
		t.Errorf("logged as %q", got)
	}
}
