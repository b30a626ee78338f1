package zejzlauth

import (
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// decision is what became of a request, as a metric label.
type decision string

const (
	decisionAdmitted decision = "admitted"
	decisionRefused  decision = "refused"
	decisionPublic   decision = "public"
	decisionOpen     decision = "open"
	decisionShadow   decision = "shadow"
)

// The collectors belong to the process, so counters go on over reloads; every
// configuration registers them in its own registry. Labels are bounded by the
// configuration: no key, path or address is ever one.
var metrics = struct {
	requests  *prometheus.CounterVec
	inFlight  *prometheus.GaugeVec
	decisions prometheus.Histogram
}{
	requests: prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricsNamespace, Name: "requests_total",
		Help: "Requests by what the guard decided, why, and for which tier.",
	}, []string{"decision", "reason", "tier"}),
	inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: metricsNamespace, Name: "in_flight",
		Help: "Admitted requests under way.",
	}, []string{"tier"}),
	decisions: prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: metricsNamespace, Name: "decision_seconds",
		Help:    "Time from a request's arrival at the guard to its decision.",
		Buckets: []float64{1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1},
	}),
}

const metricsNamespace = "zejzl_auth"

func registerMetrics(registry *prometheus.Registry) error {
	for _, c := range []prometheus.Collector{
		metrics.requests, metrics.inFlight, metrics.decisions, keyGauges{},
	} {
		err := registry.Register(c)
		if _, again := errors.AsType[prometheus.AlreadyRegisteredError](err); err != nil && !again {
			return fmt.Errorf("registering metrics: %w", err)
		}
	}
	return nil
}

// keyGauges tell of the keys of the running configuration.
type keyGauges struct{}

var (
	keysDesc = prometheus.NewDesc(prometheus.BuildFQName(metricsNamespace, "", "keys"),
		"Keys of the running configuration by source.", []string{"source"}, nil)
	keyFileOKDesc = prometheus.NewDesc(prometheus.BuildFQName(metricsNamespace, "", "key_file_ok"),
		"1 if the key files are in use as they stand, 0 while their last good keys are.", nil, nil)
)

// Describe implements prometheus.Collector.
func (keyGauges) Describe(ch chan<- *prometheus.Desc) {
	ch <- keysDesc
	ch <- keyFileOKDesc
}

// Collect implements prometheus.Collector.
func (keyGauges) Collect(ch chan<- prometheus.Metric) {
	a := runningApp()
	if a == nil {
		return
	}
	state := a.keyState.Load()
	for source, n := range map[string]int{
		sourceEnv: state.env, sourceFile: state.file, "config": state.config, "development": state.development,
	} {
		ch <- prometheus.MustNewConstMetric(keysDesc, prometheus.GaugeValue, float64(n), source)
	}
	ok := 1.0
	if state.failed {
		ok = 0
	}
	ch <- prometheus.MustNewConstMetric(keyFileOKDesc, prometheus.GaugeValue, ok)
}

// tierMetrics are the counters of a tier's admitted requests.
type tierMetrics struct {
	admitted prometheus.Counter
	inFlight prometheus.Gauge
}

// counters are looked up when the first request needs them, and only then
// exist: a tier that is only adapted or validated leaves no series behind.
func (t *tier) counters() *tierMetrics {
	if m := t.metrics.Load(); m != nil {
		return m
	}
	m := &tierMetrics{
		admitted: metrics.requests.WithLabelValues(string(decisionAdmitted), "", t.name),
		inFlight: metrics.inFlight.WithLabelValues(t.name),
	}
	t.metrics.Store(m)
	return m
}

var (
	publicRequests = metrics.requests.WithLabelValues(string(decisionPublic), "", "")
	openRequests   = metrics.requests.WithLabelValues(string(decisionOpen), "", "")
)

func countDecision(d decision, why reason, tierName string) {
	metrics.requests.WithLabelValues(string(d), string(why), tierName).Inc()
}

func observeDecision(d time.Duration) { metrics.decisions.Observe(d.Seconds()) }

// Interface guards
var _ prometheus.Collector = keyGauges{}
