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
	keys      *prometheus.GaugeVec
	keyFileOK prometheus.Gauge
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
	keys: prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: metricsNamespace, Name: "keys",
		Help: "Keys of the running configuration by source.",
	}, []string{"source"}),
	keyFileOK: prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: metricsNamespace, Name: "key_file_ok",
		Help: "1 if every key file is as it was last read, 0 if one went bad and its last good keys are in use.",
	}),
}

const metricsNamespace = "zejzl_auth"

func registerMetrics(registry *prometheus.Registry) error {
	for _, c := range []prometheus.Collector{
		metrics.requests, metrics.inFlight, metrics.decisions, metrics.keys, metrics.keyFileOK,
	} {
		err := registry.Register(c)
		if _, again := errors.AsType[prometheus.AlreadyRegisteredError](err); err != nil && !again {
			return fmt.Errorf("registering metrics: %w", err)
		}
	}
	return nil
}

// tierMetrics are the counters of a tier's admitted requests, looked up once.
type tierMetrics struct {
	admitted prometheus.Counter
	inFlight prometheus.Gauge
}

func newTierMetrics(name string) tierMetrics {
	return tierMetrics{
		admitted: metrics.requests.WithLabelValues(string(decisionAdmitted), "", name),
		inFlight: metrics.inFlight.WithLabelValues(name),
	}
}

var (
	publicRequests = metrics.requests.WithLabelValues(string(decisionPublic), "", "")
	openRequests   = metrics.requests.WithLabelValues(string(decisionOpen), "", "")
)

func countDecision(d decision, why reason, tierName string) {
	metrics.requests.WithLabelValues(string(d), string(why), tierName).Inc()
}

func observeDecision(d time.Duration) { metrics.decisions.Observe(d.Seconds()) }
