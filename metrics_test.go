package zejzlauth

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

func newRegistry(t *testing.T) *prometheus.Registry {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	for range 2 { // two apps of one configuration can't be, but a second look must not fail
		if err := registerMetrics(registry); err != nil {
			t.Fatal(err)
		}
	}
	return registry
}

func TestMetricsGoOnOverConfigurations(t *testing.T) {
	admitted := func(registry *prometheus.Registry) float64 {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range families {
			if family.GetName() != "zejzl_auth_requests_total" {
				continue
			}
			for _, m := range family.GetMetric() {
				var labels []string
				for _, label := range m.GetLabel() {
					labels = append(labels, label.GetName()+"="+label.GetValue())
				}
				if strings.Join(labels, " ") == "decision=admitted reason= tier=metered" {
					return m.GetCounter().GetValue()
				}
			}
		}
		return 0
	}
	start := admitted(newRegistry(t))
	for i := range 2 {
		registry := newRegistry(t)
		r := newRig(t, &Guard{Tiers: map[string]Tier{"metered": oneIn(time.Hour)}})
		r.tiers["metered"].counters().admitted.Inc()
		if got := admitted(registry) - start; got != float64(i+1) {
			t.Errorf("configuration %d: %v, want %d", i, got, i+1)
		}
	}
}

// seriesOf counts the series that speak of a tier.
func seriesOf(t *testing.T, tierName string) int {
	t.Helper()
	families, err := newRegistry(t).Gather()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, family := range families {
		for _, m := range family.GetMetric() {
			for _, label := range m.GetLabel() {
				if label.GetName() == "tier" && label.GetValue() == tierName {
					n++
				}
			}
		}
	}
	return n
}

// A tier has no series before its first admitted request: not of the many
// configurations that are only adapted, validated or refused.
func TestTierMetricsBeginWithTheFirstRequest(t *testing.T) {
	unheard := key.Generate()
	name := strings.ToLower(key.Sum(unheard).ID()) // no test before this one has used it
	tiers := `"tiers": {"` + name + `": {"requests": [{"limit": 1, "window": "1h"}]}}`
	for guard, ok := range map[string]bool{tiers: true, tiers + `, "errors": "none"`: false, `"zone": "{env.ZEJZL_TEST_UNSET}", ` + tiers: false} {
		_, err := provisionConfig(t, siteConfig(`{"listen": ["127.0.0.1:0"], "routes": [{"handle": [{"handler": "zejzl_auth", `+guard+`}]}]}`, noKeys))
		if (err == nil) != ok {
			t.Fatalf("%s: %v", guard, err)
		}
	}
	r := newRig(t, &Guard{Tiers: map[string]Tier{name: oneIn(time.Hour)}})
	g := newRig(t, &Guard{Tiers: map[string]Tier{name: oneIn(time.Hour)}, Keys: []GuardKey{{Secret: key.Sum(unheard).String(), Tier: name}}})
	r.must(t, http.StatusOK, r.chat(), respondOK)
	g.must(t, http.StatusUnauthorized, newRequest("GET", "/x"), notReached(t))
	if got := seriesOf(t, name); got != 0 {
		t.Errorf("%d series before any request of the tier", got)
	}
	g.must(t, http.StatusOK, newRequest("GET", "/x", "X-Api-Key", unheard), respondOK)
	if got := seriesOf(t, name); got != 2 {
		t.Errorf("%d series after the first request, want requests_total and in_flight", got)
	}
}

// keyMetrics is what the metrics say of keys, as "source=number" and "ok=0 or 1".
func keyMetrics(t *testing.T) string {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(keyGauges{})
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	for _, family := range families {
		for _, m := range family.GetMetric() {
			name := "ok"
			for _, label := range m.GetLabel() {
				name = label.GetValue()
			}
			said = append(said, fmt.Sprintf("%s=%v", name, m.GetGauge().GetValue()))
		}
	}
	slices.Sort(said)
	return strings.Join(said, " ")
}

func mustSay(t *testing.T, when, want string) {
	t.Helper()
	if got := keyMetrics(t); got != want {
		t.Errorf("%s: %q, want %q", when, got, want)
	}
}

// The metrics of keys speak for the newest app that runs, however it comes to
// be the newest.
func TestKeyGauges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		filed, env := key.Generate(), key.Generate()
		path := writeKeyFile(t, keysJSON(filed, key.Generate()))
		t.Setenv("ZEJZL_TEST_GAUGES_A", env+":pro")
		t.Setenv("ZEJZL_TEST_GAUGES_B", key.Sum(env).String()+":pro")
		t.Setenv("ZEJZL_TEST_GAUGES_C", filed+":pro:key 0")
		mustSay(t, "no app runs", "")
		old := newReloadingFrom(t, Source{Source: "env", Prefix: "ZEJZL_TEST_GAUGES_"}, Source{Source: "file", Path: path})
		newRigIn(t, old.App, &Guard{Keys: []GuardKey{
			{key.Sum(filed).String(), "pro", "key 0"}, {Secret: key.Sum(env).String(), Tier: "pro"},
		}})
		mustSay(t, "provisioned only", "")
		started(t, old.App)
		const ofOld = "config=1 development=0 env=1 file=2 ok=1" // the rig's own key; a key stated twice is one
		mustSay(t, "started", ofOld)

		failed := started(t, provisionedApp(t, new(App)))
		mustSay(t, "while another one loads", "config=0 development=0 env=0 file=0 ok=1")
		stopped(t, failed)
		mustSay(t, "after it failed", ofOld)

		old.write(path, "{", time.Now().Add(-time.Minute))
		time.Sleep(1100 * time.Millisecond)
		mustSay(t, "a bad file", strings.Replace(ofOld, "ok=1", "ok=0", 1))
		old.write(path, keysJSON(filed), time.Now().Add(-time.Minute))
		time.Sleep(1100 * time.Millisecond)
		mustSay(t, "mended", strings.Replace(ofOld, "file=2", "file=1", 1))

		t.Setenv("ENVIRONMENT", "development")
		forgetDevelopmentKey(t)
		next := provisionedApp(t, new(App))
		capturedStderr(t, func() { started(t, next) })
		stopped(t, old.App)
		mustSay(t, "after a reload", "config=0 development=1 env=0 file=0 ok=1")
		stopped(t, next)
		mustSay(t, "all stopped", "")
	})
}

func TestMetricsConflict(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "zejzl_auth", Name: "keys", Help: "another"}))
	if err := registerMetrics(registry); err == nil || !strings.Contains(err.Error(), "registering metrics: ") {
		t.Errorf("error %v", err)
	}
}

// Every request is counted once, by labels that the configuration bounds.
func TestDecisionsAreCounted(t *testing.T) {
	r := newRig(t, &Guard{
		Public: []string{"/status"}, Protect: []string{"/api/*", "/status"}, Tiers: map[string]Tier{"pro": oneIn(time.Hour)},
		CORS: &CORS{Origins: []string{corsTestOrigin}},
	})
	for _, c := range []struct {
		request                func() *http.Request
		status                 int
		decision, reason, tier string
	}{
		{r.chat, 200, "admitted", "", "pro"},
		{r.chat, 429, "refused", "rate_limited", "pro"},
		{func() *http.Request { return newRequest("GET", "/status") }, 200, "public", "", ""},
		{func() *http.Request { return newRequest("GET", "/other") }, 200, "open", "", ""},
		{func() *http.Request { return newRequest("GET", "/api/x") }, 401, "refused", "missing_key", ""},
		{func() *http.Request { return newRequest("GET", "/api/x", "Api-Key", "wrong") }, 401, "refused", "invalid_key", ""},
		{func() *http.Request { return newRequest("GET", "/api/../x") }, 400, "refused", "invalid_path", ""},
		{func() *http.Request { return newRequest("TRACE", "/api/x") }, 405, "refused", "method_not_allowed", ""},
	} {
		counter := metrics.requests.WithLabelValues(c.decision, c.reason, c.tier)
		before, total := testutil.ToFloat64(counter), sumOfRequests()
		r.must(t, c.status, c.request(), respondOK)
		if got := testutil.ToFloat64(counter) - before; got != 1 {
			t.Errorf("%s %s %s grew by %v", c.decision, c.reason, c.tier, got)
		}
		if got := sumOfRequests() - total; got != 1 {
			t.Errorf("%s %s %s: all counters together grew by %v", c.decision, c.reason, c.tier, got)
		}
	}
	if got := testutil.ToFloat64(metrics.inFlight.WithLabelValues("pro")); got != 0 {
		t.Errorf("in_flight %v at the end", got)
	}
}

func sumOfRequests() float64 {
	ch := make(chan prometheus.Metric, 1<<12)
	metrics.requests.Collect(ch)
	close(ch)
	var sum float64
	for m := range ch {
		sum += testutil.ToFloat64(collectorOf{m})
	}
	return sum
}

// collectorOf makes a collector of one metric.
type collectorOf struct{ prometheus.Metric }

func (c collectorOf) Describe(ch chan<- *prometheus.Desc) { ch <- c.Desc() }
func (c collectorOf) Collect(ch chan<- prometheus.Metric) { ch <- c.Metric }
