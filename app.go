package zejzlauth

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

func init() {
	caddy.RegisterModule(new(App))
}

// App is what all guards of a configuration share: the keys and the tiers.
type App struct {
	// Where keys come from. Default: environment variables that start with
	// ZEJZL_API_KEY_. A list replaces the default.
	// Example: `[{"source": "file", "path": "keys.json"}]`.
	Sources []Source `json:"sources,omitempty"`

	// Tiers added or changed, by name. Default: free 10, pro 100 and
	// enterprise 1000 requests a minute.
	// Example: `{"team": {"requests": [{"limit": 300, "window": "1m"}], "concurrent": 20}}`.
	Tiers map[string]Tier `json:"tiers,omitempty"`

	// The tier of keys that name none. Default: `"free"`.
	DefaultTier string `json:"default_tier,omitempty"`

	ctx         caddy.Context
	logger      *zap.Logger
	development bool // ENVIRONMENT=development
	tiers       map[string]*tier
	defaultTier string

	keyring  *key.Ring
	set      *key.Set // while the configuration is loaded
	files    []*keyFile
	stated   []key.Located // keys of environment and guards: they never change
	fromEnv  int           // of stated
	guards   int
	started  chan struct{}
	stopPoll context.CancelFunc
	pollDone chan struct{}
}

// CaddyModule returns the Caddy module information.
func (*App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "zejzl",
		New: func() caddy.Module { return new(App) },
	}
}

// Provision implements caddy.Provisioner. It reads what the configuration
// names and nothing else: `caddy validate` runs it too.
func (a *App) Provision(ctx caddy.Context) error {
	a.ctx, a.logger = ctx, ctx.Logger()
	a.development = os.Getenv("ENVIRONMENT") == "development"
	a.started = make(chan struct{})
	a.keyring = new(key.Ring)
	if err := registerMetrics(ctx.GetMetricsRegistry()); err != nil {
		return err
	}
	if err := a.provisionTiers(); err != nil {
		return err
	}
	return a.provisionKeys()
}

func (a *App) provisionTiers() error {
	builtin, err := mergeTiers(nil, builtinTiers)
	if err != nil {
		return err
	}
	if a.tiers, err = mergeTiers(builtin, a.Tiers); err != nil {
		return err
	}
	if a.defaultTier = a.DefaultTier; a.defaultTier == "" {
		a.defaultTier = builtinDefaultTier
	}
	if a.tiers[a.defaultTier] == nil {
		return fmt.Errorf("default_tier: unknown tier %q, expected one of %s", scrub(a.defaultTier), tierNames(a.tiers))
	}
	return nil
}

// provisionKeys loads all sources. Requests may come before Start, since
// Caddy starts apps in any order, so the keyring is whole when this ends.
func (a *App) provisionKeys() error {
	sources := a.Sources
	if len(sources) == 0 {
		sources = []Source{{Source: sourceEnv}}
	}
	var errs []error
	for i, source := range sources {
		if err := a.provisionSource(source); err != nil {
			errs = append(errs, fmt.Errorf("sources[%d]: %w", i, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	a.fromEnv = len(a.stated)
	set, keys, err := a.assemble()
	if err != nil {
		return err
	}
	a.set = set
	a.keyring.Replace(set, keys)
	return nil
}

// assemble joins the keys of all sources and refuses contradictions. keys are
// those of environment and files, which hold for every guard.
func (a *App) assemble() (set *key.Set, keys []*key.Key, err error) {
	hint := len(a.stated)
	for _, f := range a.files {
		hint += len(f.records)
	}
	set, keys = key.NewSet(hint), make([]*key.Key, 0, hint)
	var errs []error
	add := func(l key.Located, shared bool) {
		k, err := set.Add(l)
		switch {
		case err != nil:
			errs = append(errs, err)
		case shared && a.tiers[k.Tier] == nil:
			errs = append(errs, fmt.Errorf("%s: unknown tier, expected one of %s", l.Place, tierNames(a.tiers)))
		case shared:
			keys = append(keys, k)
		}
	}
	for _, f := range a.files { // first: a file may give the key an id
		for i := range f.records {
			add(key.Located{Record: f.records[i], Place: key.Place{Source: "key file " + f.path, Index: i}}, true)
		}
	}
	for i := range a.stated {
		add(a.stated[i], i < a.fromEnv)
	}
	return set, keys, firstErrors(errs)
}

// firstErrors joins errors, but not a million of them.
func firstErrors(errs []error) error {
	const most = 10
	if more := len(errs) - most; more > 0 {
		errs = append(errs[:most:most], fmt.Errorf("and %d more", more))
	}
	return errors.Join(errs...)
}

// addGuard takes a guard's own keys into the set, where a contradiction with
// any other key shows, and returns the guard's keyring; nil: it has no keys.
func (a *App) addGuard(g *Guard) (*key.Ring, error) {
	a.guards++
	var keys []*key.Key
	var errs []error
	for i := range g.Keys {
		record, err := g.Keys[i].record(g.defaultTier)
		if err == nil && g.tiers[record.Tier] == nil {
			err = fmt.Errorf("unknown tier, expected one of %s", tierNames(g.tiers))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("keys[%d]: %w", i, err))
			continue
		}
		located := key.Located{Record: record, Place: key.Place{Source: fmt.Sprintf("zejzl_auth guard %d", a.guards), Index: i}}
		k, err := a.set.Add(located)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		a.stated = append(a.stated, located)
		keys = append(keys, k)
	}
	if err := firstErrors(errs); err != nil || len(keys) == 0 {
		return nil, err
	}
	ring := new(key.Ring)
	ring.Replace(a.set, keys)
	return ring, nil
}

// record resolves a key of the configuration. Errors never tell its secret.
func (k *GuardKey) record(defaultTier string) (key.Record, error) {
	record := key.Record{Name: k.Name, Tier: k.Tier}
	if record.Tier == "" {
		record.Tier = defaultTier
	}
	if k.Name != "" {
		if err := key.ValidateName(k.Name); err != nil {
			return record, err
		}
	}
	secret := k.Secret
	if isPlaceholder(secret) {
		var err error
		if secret, err = caddy.NewReplacer().ReplaceOrErr(secret, true, true); err != nil {
			return record, fmt.Errorf("secret: %w", err)
		}
	} else if !isHash(secret) {
		return record, errors.New("secret: expected sha256: and 64 hex digits, or one placeholder such as {env.PROD_KEY}; " +
			"a literal secret would be shown by the admin API (caddy zejzl hash makes the hash)")
	}
	digest, err := digestOf(secret)
	record.Secrets = []key.Secret{{Digest: digest}}
	return record, err
}

// isPlaceholder takes exactly one placeholder, and no key in braces: what is
// in braces is kept and shown.
func isPlaceholder(s string) bool {
	return len(s) > 2 && s[0] == '{' && strings.IndexAny(s[1:], "{}") == len(s)-2 && scrub(s) == s
}

// Start implements caddy.App.
func (a *App) Start() error {
	a.set = nil
	a.reportKeys()
	sites := guardSites(a.ctx)
	if a.wantsDevelopmentKey() {
		a.addDevelopmentKey(sites)
	}
	a.warn(sites)
	close(a.started)
	if len(a.files) > 0 {
		ctx, cancel := context.WithCancel(context.Background())
		a.stopPoll, a.pollDone = cancel, make(chan struct{})
		go a.pollFiles(ctx)
	}
	return nil
}

// Stop implements caddy.App. Requests under way keep the keyring.
func (a *App) Stop() error {
	if a.stopPoll != nil {
		a.stopPoll()
		<-a.pollDone
	}
	return nil
}

// startTimeout bounds how long a request waits for Start.
const startTimeout = 5 * time.Second

// awaitStart holds a request with a key until Start, if only Start can know
// the key: Caddy may open the listeners first.
func (a *App) awaitStart(ctx context.Context) *refusal {
	if !a.wantsDevelopmentKey() {
		return nil
	}
	select {
	case <-a.started:
		return nil
	default:
	}
	timer := time.NewTimer(startTimeout)
	defer timer.Stop()
	select {
	case <-a.started:
		return nil
	case <-ctx.Done():
	case <-timer.C:
	}
	return refuse(reasonStarting)
}

// warn says what the operator should know before the first request does.
func (a *App) warn(sites []guardSite) {
	if !a.development && len(a.stated) == 0 && a.keyring.Len() == 0 {
		a.logger.Warn("no API key is configured: every protected path answers 401",
			zap.String("try", "caddy zejzl generate"))
	}
	accessLogs := false
	for _, site := range sites {
		accessLogs = accessLogs || site.accessLogs
		if a.development && !site.loopback {
			a.logger.Warn("development mode on a site that is not loopback: unset ENVIRONMENT in production",
				zap.String("site", site.host))
		}
	}
	if accessLogs && !hasLogEncoder(a.ctx) {
		a.logger.Warn("access logs are on without the zejzl log encoder: they hold API keys sent as X-API-Key",
			zap.String("fix", "log default { format zejzl }, and format zejzl in each log of a site"))
	}
}

// reportKeys sets the gauges to what this configuration holds.
func (a *App) reportKeys() {
	metrics.keys.Reset()
	metrics.keys.WithLabelValues(sourceEnv).Set(float64(a.fromEnv))
	metrics.keys.WithLabelValues("config").Set(float64(len(a.stated) - a.fromEnv))
	for _, f := range a.files {
		metrics.keys.WithLabelValues(sourceFile).Add(float64(f.count))
	}
	metrics.keyFileOK.Set(1)
}

// Interface guards
var (
	_ caddy.App         = (*App)(nil)
	_ caddy.Provisioner = (*App)(nil)
)
