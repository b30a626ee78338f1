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

// accountOf is what the process keeps of a secret's key in the guard's zone.
func accountOf(t *testing.T, g *Guard, secret string) *account {
	t.Helper()
	entry, ok := g.lookup(key.Sum(secret))
	if !ok {
		t.Fatal("the key is not in the keyring")
	}
	acc := g.zone.account(entry.Key)
	if g.zone.account(entry.Key) != acc {
		t.Error("a second look finds another account")
	}
	return acc
}

// newZoneName is a zone that the process does not know yet, however often a test is run.
func newZoneName() string { return "test " + key.Sum(key.Generate()).ID() }

// accounts counts what a zone keeps.
func (z *zone) accounts() int {
	n := 0
	for i := range z.shards {
		z.shards[i].mu.Lock()
		n += len(z.shards[i].accounts)
		z.shards[i].mu.Unlock()
	}
	return n
}

func provisionGuard(t *testing.T, g *Guard) *Guard {
	t.Helper()
	app := provisionedApp(t, new(App))
	if err := g.provision(app.ctx, app); err != nil {
		t.Fatal(err)
	}
	return g
}

// What fails to load touches nothing that is running.
func TestFailedProvisionChangesNothing(t *testing.T) {
	secret, zoneName := key.Generate(), newZoneName()
	running := provisionGuard(t, &Guard{Zone: zoneName, Keys: []GuardKey{{Secret: key.Sum(secret).String(), Tier: "pro"}}})
	acc := accountOf(t, running, secret)
	config := func(guard string) *caddy.Config {
		cfg := new(caddy.Config)
		text := siteConfig(`{"listen": ["127.0.0.1:0"], "routes": [{"handle": [{"handler": "zejzl_auth", "zone": "`+zoneName+`"`+guard+`}]}]}`, noKeys)
		if err := json.Unmarshal([]byte(text), cfg); err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	for guard, want := range map[string]string{
		``: "", `,"errors":"none"`: `errors "none": expected auto`, `,"unheard":1`: `unknown field "unheard"`,
		`,"tiers":{"x":{"requests":[{"limit":1,"window":"1m","per":1}]}}`: `unknown field "per"`,
		`,"cors":{"origins":["https://*.example.com"]}`:                   "cors",
		`,"keys":[{"secret":"literal"}]`:                                  "secret: expected sha256:",
		`,"default_tier":"none"`:                                          "default_tier",
	} {
		err := caddy.Validate(config(guard))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("error %v, want %q", err, want)
		}
		if accountOf(t, running, secret) != acc || zoneOf(zoneName) != running.zone || running.zone.accounts() != 1 {
			t.Errorf("%q touched the windows", guard)
		}
	}
}

func TestZonePlaceholder(t *testing.T) {
	t.Setenv("ZEJZL_TEST_ZONE", "a zone of the environment")
	t.Setenv("ZEJZL_TEST_EMPTY", "")
	for zone, want := range map[string]string{
		"": defaultZone, "{env.ZEJZL_TEST_ZONE}": "a zone of the environment", "a {env.ZEJZL_TEST_ZONE}": "a a zone of the environment",
	} {
		if g := provisionGuard(t, &Guard{Zone: zone}); g.zone != zoneOf(want) {
			t.Errorf("zone %q is not %q", zone, want)
		}
	}
	app := provisionedApp(t, new(App))
	for _, name := range []string{"ZEJZL_TEST_EMPTY", "ZEJZL_TEST_UNSET"} {
		err := (&Guard{Zone: "{env." + name + "}"}).provision(app.ctx, app)
		mustNotTell(t, err, nil, "zone: ", name)
	}
}

// A key keeps its windows and slots over configurations, whatever they change,
// also over one that has no guard and knows no key.
func TestAccountsOutliveConfigurations(t *testing.T) {
	secret := key.Generate()
	guard := func(tier string) *Guard {
		g := provisionGuard(t, &Guard{Zone: t.Name(), Keys: []GuardKey{{Secret: key.Sum(secret).String(), Tier: tier, Name: tier}}})
		started(t, g.app)
		return g
	}
	old := guard("free")
	acc := accountOf(t, old, secret)
	if v := acc.Admit(monotonicTick(), old.tiers["free"].limits); v.Remaining != 9 {
		t.Fatalf("%+v", v)
	}
	acc.Release()
	now := guard("pro")
	stopped(t, old.app)
	if accountOf(t, now, secret) != acc || accountOf(t, old, secret) != acc {
		t.Error("a reload gives a fresh account")
	}
	maintenance := started(t, provisionedApp(t, new(App)))
	stopped(t, now.app)
	back := guard("free")
	stopped(t, maintenance)
	if accountOf(t, back, secret) != acc {
		t.Error("a configuration without any guard gives a fresh account")
	}
	if v := accountOf(t, back, secret).Admit(monotonicTick(), back.tiers["free"].limits); v.Remaining != 8 {
		t.Errorf("after all reloads: %+v", v)
	}
}

// started starts an app and stops it with the test.
func started(t *testing.T, a *App) *App {
	t.Helper()
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopped(t, a) })
	return a
}

func stopped(t *testing.T, a *App) {
	t.Helper()
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
}

func TestSweep(t *testing.T) {
	minute, err := newTier("m", oneIn(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	const at, over = window.Tick(1_000_000), window.Tick(61_000_000)
	z := zoneOf(newZoneName())
	accounts := make(map[string]*account)
	for _, id := range []string{"idle", "idle but known", "in a window", "in flight", "refunded"} {
		accounts[id] = z.load(id)
	}
	for _, id := range []string{"in a window", "in flight", "refunded"} {
		accounts[id].Admit(at, minute.limits)
	}
	accounts["in a window"].Release()
	accounts["refunded"].Release()
	accounts["refunded"].Refund(at, minute.limits)
	known := func(id string) bool { return strings.HasSuffix(id, "known") }
	kept := func() string {
		var ids []string
		for i := range z.shards {
			ids = slices.AppendSeq(ids, maps.Keys(z.shards[i].accounts))
		}
		slices.Sort(ids)
		return strings.Join(ids, ", ")
	}
	for _, c := range []struct {
		now  window.Tick
		want string
	}{
		{at, "idle but known, in a window, in flight"},
		{over - 1, "idle but known, in a window, in flight"},
		{over, "idle but known, in flight"},
	} {
		sweepZones(c.now, known)
		if got := kept(); got != c.want {
			t.Errorf("at %d: %s, want %s", c.now, got, c.want)
		}
	}
	accounts["in flight"].Release()
	sweepZones(over, known)
	if got := kept(); got != "idle but known" || z.load("idle but known") != accounts["idle but known"] {
		t.Errorf("at last: %s", got)
	}
}

// Start sweeps, but a key that remembers a swept account is known to another
// app: it looks again, so that all apps go on with one account.
func TestFailedStartLeavesOneAccount(t *testing.T) {
	secret, zoneName := key.Generate(), newZoneName()
	config := func() *Guard {
		return provisionGuard(t, &Guard{Zone: zoneName, Keys: []GuardKey{{Secret: key.Sum(secret).String(), Tier: "pro"}}})
	}
	g := config()
	started(t, g.app)
	idle := accountOf(t, g, secret)
	stopped(t, started(t, provisionedApp(t, new(App)))) // as if another app of its configuration failed
	acc := accountOf(t, g, secret)
	if acc == idle || g.zone.accounts() != 1 {
		t.Fatal("Start does not sweep")
	}
	acc.Admit(monotonicTick(), g.tiers["pro"].limits)
	if next := config(); accountOf(t, next, secret) != acc || accountOf(t, g, secret) != acc {
		t.Error("the next reload gives a fresh account")
	}
}

// A file that changes its key a thousand times leaves one account.
func TestRotatedKeysLeaveNothing(t *testing.T) {
	path := writeKeyFile(t, keysJSON(key.Generate()))
	r := newReloading(t, path)
	own := key.Generate()
	g := &Guard{Zone: newZoneName(), Keys: []GuardKey{{Secret: key.Sum(own).String(), Tier: "pro"}}}
	if err := g.provision(r.ctx, r.App); err != nil {
		t.Fatal(err)
	}
	ofGuard := accountOf(t, g, own)
	busy := key.Generate()
	r.write(path, keysJSON(busy), time.Now().Add(-time.Hour))
	r.poll()
	charged := accountOf(t, g, busy)
	charged.Admit(monotonicTick(), r.tiers["pro"].limits)
	for i := range 1000 {
		secret := key.Generate()
		r.write(path, keysJSON(secret), time.Unix(int64(i), 0))
		if got := r.poll(); got != fileLoaded {
			t.Fatalf("rotation %d: logged %q", i, got)
		}
		accountOf(t, g, secret)
	}
	if got := g.zone.accounts(); got != 3 {
		t.Errorf("%d accounts, want those of the file's key, of the guard's, and of one whose window is not empty", got)
	}
	if ofGuard.Retired() || accountOf(t, g, own) != ofGuard {
		t.Error("a change of the file took the account of a guard's key")
	}
	r.write(path, keysJSON(busy), time.Now().Add(-time.Hour))
	r.poll()
	if accountOf(t, g, busy) != charged {
		t.Error("a key that comes back has a fresh window")
	}
}

func TestAccountsByZone(t *testing.T) {
	app := provisionedApp(t, new(App))
	a := newRigIn(t, app, &Guard{Zone: t.Name() + "/a"})
	b := newRigIn(t, app, &Guard{Zone: t.Name() + "/b", Keys: []GuardKey{{Secret: key.Sum(a.secret).String(), Tier: "pro", Name: "CI runner"}}})
	entry, _ := a.lookup(key.Sum(a.secret))
	other, _ := b.lookup(key.Sum(a.secret))
	if entry.Key.ID != other.Key.ID {
		t.Fatal("the same secret with tier and name is one key")
	}
	one, two := a.zone.account(entry.Key), b.zone.account(other.Key)
	if one == two || a.zone.account(entry.Key) != one || b.zone.account(other.Key) != two {
		t.Error("zones mix their accounts")
	}
	// Both zones are found by one key too, and a swept one is looked up again.
	if b.zone.account(entry.Key) != two || a.zone.account(entry.Key) != one {
		t.Error("a key mixes its zones")
	}
	a.zone.sweep(0, func(string) bool { return false })
	if again := a.zone.account(entry.Key); again == one || a.zone.account(entry.Key) != again || b.zone.account(entry.Key) != two {
		t.Error("a swept account is not replaced, or not alone")
	}
	if got := len(*entry.Key.Slots.Load()); got != 2 {
		t.Errorf("the key remembers %d accounts in two zones", got)
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
		if count, due := thin.due(c.why, c.who, c.at, 1); count != c.count || due != c.due {
			t.Errorf("%+v: %d %v", c, count, due)
		}
	}
	// Any number of callers write at most one line a slot and minute, and each event is counted once.
	thin = &thinner{seed: maphash.MakeSeed()}
	const events = 100_000
	var lines, counted int64
	for i := range events {
		if count, due := thin.due(reasonMissingKey, strings.Repeat("x", i%7)+string(rune(i)), 0, 1); due {
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
