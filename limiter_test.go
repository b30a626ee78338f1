package zejzlauth

import (
	"encoding/json"
	"hash/maphash"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
	"github.com/zejzl/caddy-zejzl-auth/internal/window"
)

func TestWindowLabel(t *testing.T) {
	for d, want := range map[time.Duration]string{
		time.Second: "1s", 90 * time.Second: "90s", time.Minute: "1m", 90 * time.Minute: "90m", time.Hour: "1h", 36 * time.Hour: "36h",
		24 * time.Hour: "1d", 30 * 24 * time.Hour: "30d", 24*time.Hour + time.Second: "86401s",
	} {
		if got := windowLabel(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}

func TestBuiltinTiers(t *testing.T) {
	app := provisionedApp(t, new(App))
	for name, limit := range map[string]int{"free": 10, "pro": 100, "enterprise": 1000} {
		requests := app.tiers[name].limits.Requests()
		if want := []window.Limit{{Requests: limit, Window: time.Minute}}; !slices.Equal(requests, want) {
			t.Errorf("%s: %v, want %v", name, requests, want)
		}
	}
	if len(app.tiers) != 3 || app.defaultTier != "free" {
		t.Errorf("%s, default %s", tierNames(app.tiers), app.defaultTier)
	}
}

func TestTierErrors(t *testing.T) {
	minute := caddy.Duration(time.Minute)
	for want, tiers := range map[string]map[string]Tier{
		"expected a tier of 1 to 32 characters": {"No Such": oneIn(time.Minute)},
		`tier "a": no request limit`:            {"a": {}},
		`tier "b": 0 requests`:                  {"b": {Requests: []RequestLimit{{Window: minute}}}},
		`tier "c": 1 requests in 0s`:            {"c": {Requests: []RequestLimit{{Limit: 1}}}},
		`tier "d": window 1m0s is limited`:      {"d": {Requests: []RequestLimit{{Limit: 1, Window: minute}, {Limit: 2, Window: minute}}}},
		`tier "e": concurrent -1`:               {"e": {Requests: []RequestLimit{{Limit: 1, Window: minute}}, Concurrent: -1}},
		`tier "g": 1 requests in 1.5s`:          {"g": oneIn(1500 * time.Millisecond)},
	} {
		if _, err := mergeTiers(nil, tiers); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	_, err := mergeTiers(nil, map[string]Tier{"a": {}, "b": {}})
	if err == nil || !strings.Contains(err.Error(), `"a"`) || !strings.Contains(err.Error(), `"b"`) {
		t.Errorf("two bad tiers, one error: %v", err)
	}
}

func TestMergeTiers(t *testing.T) {
	app := provisionedApp(t, &App{Tiers: map[string]Tier{"free": oneIn(time.Hour), "team": oneIn(time.Minute)}})
	g := newRigIn(t, app, &Guard{Tiers: map[string]Tier{"team": twoIn(time.Minute)}, DefaultTier: "team"})
	if got := g.tiers["free"]; got != app.tiers["free"] || got.policy != `"1h";q=1;w=3600` {
		t.Errorf("a tier the guard does not change: %+v", got)
	}
	if g.tiers["team"] == app.tiers["team"] || app.tiers["team"].policy != `"1m";q=1;w=60` || g.tiers["team"].policy != `"1m";q=2;w=60` {
		t.Errorf("a tier the guard changes: %q, in the app %q", g.tiers["team"].policy, app.tiers["team"].policy)
	}
	if got := g.tierOf(&key.Key{Tier: ""}).name; got != "team" {
		t.Errorf("a key without a tier has %q", got)
	}
	if got := g.tierOf(&key.Key{Tier: "pro"}).name; got != "pro" {
		t.Errorf("a pro key has %q", got)
	}
	for _, g := range []*Guard{{DefaultTier: "none"}, {Tiers: map[string]Tier{"x": {}}}} {
		if err := g.provision(app.ctx, app); err == nil {
			t.Errorf("accepted %+v", g)
		}
	}
	if err := (&App{DefaultTier: "none"}).Provision(bareContext(t)); err == nil ||
		!strings.Contains(err.Error(), `default_tier: unknown tier "none", expected one of enterprise, free, pro`) {
		t.Errorf("error %v", err)
	}
}

// references tells how many guards hold a zone.
func references(name string) int {
	n, _ := zones.References(name)
	return n
}

func TestZoneReferences(t *testing.T) {
	app := provisionedApp(t, new(App))
	const name = "references"
	provision := func(g *Guard) (*Guard, error) {
		g.Zone = name
		return g, g.provision(app.ctx, app)
	}
	first, err := provision(new(Guard))
	if err != nil || references(name) != 1 {
		t.Fatalf("%v, %d references", err, references(name))
	}
	second, err := provision(new(Guard))
	if err != nil || references(name) != 2 || first.zone != second.zone {
		t.Fatalf("%v, %d references", err, references(name))
	}
	for _, bad := range []*Guard{
		{Errors: "none"}, {Public: []string{"x"}}, {DefaultTier: "none"}, {Keys: []GuardKey{{Secret: "literal"}}}, {LogSuccess: "none"},
	} {
		if _, err := provision(bad); err == nil {
			t.Fatalf("accepted %+v", bad)
		}
		if err := bad.Cleanup(); err != nil { // as Caddy does after a failed Provision
			t.Error(err)
		}
		if got := references(name); got != 2 {
			t.Fatalf("%d references after a failed Provision", got)
		}
	}
	for want, g := range []*Guard{second, first} {
		if err := g.Cleanup(); err != nil || references(name) != 1-want {
			t.Errorf("%v, %d references", err, references(name))
		}
	}
	if first.zone == nil || first.app == nil {
		t.Error("requests that still run have lost their guard")
	}
}

// The same through Caddy: a configuration that fails leaves no reference, and
// one that is dropped gives all back.
func TestZoneReferencesThroughCaddy(t *testing.T) {
	config := func(guards ...string) *caddy.Config {
		var routes []string
		for _, g := range guards {
			routes = append(routes, `{"handle": [{"handler": "zejzl_auth", "zone": "through caddy"`+g+`}]}`)
		}
		cfg := new(caddy.Config)
		text := `{"admin": {"disabled": true}, "logging": {"logs": {"default": {"writer": {"output": "discard"}}}}, "apps": {
			"zejzl": {"sources": [{"source": "env", "prefix": "ZEJZL_NO_SUCH_KEY_"}]},
			"http": {"servers": {"a": {"listen": ["127.0.0.1:0"], "routes": [` + strings.Join(routes, ",") + `]}}}}}`
		if err := json.Unmarshal([]byte(text), cfg); err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	kept, err := acquireZone("through caddy")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = zones.Delete("through caddy") }()
	for guards, want := range map[string]string{
		``: "", `,"errors":"none"`: `errors "none": expected auto`, `,"unheard":1`: `unknown field "unheard"`,
		`,"tiers":{"x":{"requests":[{"limit":1,"window":"1m","per":1}]}}`: `unknown field "per"`,
		`,"cors":{"origins":["https://*.example.com"]}`:                   "cors",
	} {
		err := caddy.Validate(config("", guards))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("error %v, want %q", err, want)
		}
		if got := references("through caddy"); got != 1 {
			t.Errorf("%q: %d references", guards, got)
		}
		if again, _, _ := zones.LoadOrNew("through caddy", nil); again != any(kept) {
			t.Error("another zone")
		}
		_, _ = zones.Delete("through caddy")
	}
}

// A key keeps its windows and slots over configurations, whatever they change.
func TestAccountsOutliveConfigurations(t *testing.T) {
	digest := key.Sum(key.Generate()).String()
	guard := func(tier string) *Guard {
		g := &Guard{Zone: t.Name(), Keys: []GuardKey{{Secret: digest, Tier: tier, Name: tier}}}
		app := provisionedApp(t, new(App))
		if err := g.provision(app.ctx, app); err != nil {
			t.Fatal(err)
		}
		return g
	}
	account := func(g *Guard) *account {
		d, _ := key.ParseDigest(digest)
		entry, _ := g.lookup(d)
		a := g.zone.account(entry.Key)
		if g.zone.account(entry.Key) != a {
			t.Error("a second look finds another account")
		}
		return a
	}
	old := guard("free")
	acc := account(old)
	now := guard("pro")
	_ = old.Cleanup()
	if account(now) != acc {
		t.Error("a reload gives a fresh account")
	}
	if account(old) != acc {
		t.Error("requests of the old configuration lost the account")
	}
	_ = now.Cleanup()
	last := guard("free")
	defer func() { _ = last.Cleanup() }()
	if account(last) == acc {
		t.Error("windows without any guard live on")
	}
}

func TestAccountsByZone(t *testing.T) {
	app := provisionedApp(t, new(App))
	a := newRigIn(t, app, &Guard{Zone: t.Name() + "/a"})
	b := newRigIn(t, app, &Guard{Zone: t.Name() + "/b", Keys: []GuardKey{{Secret: key.Sum(a.secret).String(), Tier: "pro", Name: "CI runner"}}})
	entry, _ := a.lookup(key.Sum(a.secret))
	other, _ := b.lookup(key.Sum(a.secret))
	if entry.Key != other.Key {
		t.Fatal("the same secret with tier and name is one key")
	}
	one, two := a.zone.account(entry.Key), b.zone.account(entry.Key)
	if one == two || a.zone.account(entry.Key) != one || b.zone.account(entry.Key) != two {
		t.Error("zones mix their accounts")
	}
}

// The caches of a key are filled by any number of requests at once.
func TestAccountRace(t *testing.T) {
	k := &key.Key{ID: "raced"}
	zs := []*zone{new(zone), new(zone), new(zone)}
	var wg sync.WaitGroup
	got := make([][3]*account, 16)
	for i := range got {
		wg.Go(func() {
			for j, z := range zs {
				got[i][j] = z.account(k)
			}
		})
	}
	wg.Wait()
	for i := range got {
		if got[i] != got[0] {
			t.Fatal("two accounts for one key and zone")
		}
	}
}

// Of calls at the same instant exactly as many pass as the limit says.
func TestExactUnderConcurrency(t *testing.T) {
	for _, limit := range []int{1, 10, 100} {
		g := &Guard{Zone: t.Name(), Tiers: map[string]Tier{"pro": {Requests: []RequestLimit{{Limit: limit, Window: caddy.Duration(time.Hour)}}}}}
		r := newRig(t, g)
		r.observe(t)
		var mu sync.Mutex
		statuses := make(map[int]int)
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				resp, err := r.serve(r.chat(), respondOK)
				if err != nil {
					t.Error(err)
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				mu.Lock()
				defer mu.Unlock()
				statuses[resp.StatusCode]++
			})
		}
		wg.Wait()
		if want := map[int]int{http.StatusOK: limit, http.StatusTooManyRequests: 200 - limit}; !maps.Equal(statuses, want) {
			t.Errorf("limit %d: %v", limit, statuses)
		}
	}
}

func TestSuccessLog(t *testing.T) {
	var s successLog
	for _, c := range []struct {
		at    window.Tick
		count int64
		due   bool
	}{
		{0, 1, true}, {1, 0, false}, {59_999_999, 0, false}, {60_000_000, 3, true}, {60_000_001, 0, false}, {200_000_000, 2, true},
	} {
		if count, due := s.due(c.at); count != c.count || due != c.due {
			t.Errorf("at %d: %d %v, want %d %v", c.at, count, due, c.count, c.due)
		}
	}
}

func TestThinner(t *testing.T) {
	thin := &thinner{seed: maphash.MakeSeed()}
	for _, c := range []struct {
		who   string
		why   reason
		at    int64
		count int64
		due   bool
	}{
		{"a", reasonInvalidKey, 0, 1, true},
		{"a", reasonInvalidKey, 1, 0, false},
		{"a", reasonInvalidKey, logInterval - 1, 0, false},
		{"a", reasonInvalidKey, logInterval, 3, true},
		{"a", reasonInvalidKey, 3 * logInterval, 1, true},
	} {
		if count, due := thin.due(c.why, c.who, c.at); count != c.count || due != c.due {
			t.Errorf("%+v: %d %v", c, count, due)
		}
	}
	// Any number of callers write at most one line a slot and minute, and each event is counted once.
	thin = &thinner{seed: maphash.MakeSeed()}
	const events = 100_000
	var lines, counted int64
	for i := range events {
		if count, due := thin.due(reasonMissingKey, strings.Repeat("x", i%7)+string(rune(i)), 0); due {
			lines, counted = lines+1, counted+count
		}
	}
	if lines > int64(len(thin.slots)) || lines < int64(len(thin.slots))/2 {
		t.Errorf("%d lines", lines)
	}
	for i := range thin.slots {
		counted += thin.slots[i].unlogged.Load()
	}
	if counted != events {
		t.Errorf("%d of %d counted", counted, events)
	}
}
