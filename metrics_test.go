package zejzlauth

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
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
		r.tiers["metered"].metrics.admitted.Inc()
		if got := admitted(registry) - start; got != float64(i+1) {
			t.Errorf("configuration %d: %v, want %d", i, got, i+1)
		}
	}
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
