package zejzlauth

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
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

	// The tier of keys that name none. Default: `"free"`. Example: `"pro"`.
	DefaultTier string `json:"default_tier,omitempty"`

	ctx         caddy.Context
	logger      *zap.Logger
	development bool // ENVIRONMENT=development
	tiers       map[string]*tier
	defaultTier string

	keyring   *key.Ring // keys of environment and files, which hold for every guard
	set       *key.Set  // all keys, while the configuration is loaded
	files     []*keyFile
	env       []key.Located
	guardKeys []key.Located // of all guards, to be held against files that change
	lastError string        // of the key files
	keyState  atomic.Pointer[keyState]
	started   chan struct{}
	stopPoll  context.CancelFunc
}

// keyState is what the metrics tell of an app's keys.
type keyState struct {
	env, file, config, development int
	failed                         bool // a key file is not in use as it stands
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
	set, keys, state, err := a.assemble()
	if err != nil {
		return err
	}
	a.set = set
	a.keepRecords()
	a.keyring.Replace(set, keys)
	a.keyState.Store(&state)
	return nil
}

// assemble joins the keys of all sources and refuses contradictions. keys are
// those of files and environment.
func (a *App) assemble() (set *key.Set, keys []*key.Key, state keyState, err error) {
	hint := len(a.env) + len(a.guardKeys)
	for _, f := range a.files {
		hint += len(f.records)
	}
	set, keys = key.NewSet(hint), make([]*key.Key, 0, hint)
	var errs []error
	add := func(l key.Located) {
		k, err := set.Add(l)
		switch {
		case err != nil:
			errs = append(errs, err)
		case a.tiers[k.Tier] == nil:
			errs = append(errs, fmt.Errorf("%s: unknown tier, expected one of %s", l.Place, tierNames(a.tiers)))
		default:
			keys = append(keys, k)
		}
	}
	for _, f := range a.files { // first: a file may give the key an id
		for i := range f.records {
			add(key.Located{Record: f.records[i], Place: key.Place{Source: "key file " + f.path, Index: i}})
		}
	}
	state.file = set.Len()
	for _, l := range a.env {
		add(l)
	}
	state.env = set.Len() - state.file
	shared := set.Len()
	for _, l := range a.guardKeys { // their tiers are their guards'
		if _, err := set.Add(l); err != nil {
			errs = append(errs, err)
		}
	}
	state.config = set.Len() - shared
	return set, keys, state, firstErrors(errs)
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
// The keyring holds nothing but the guard's own lines: what a file says of the
// same key is the app's to look up, since the file may change.
func (a *App) addGuard(g *Guard) (*key.Ring, error) {
	own := key.NewSet(len(g.Keys))
	var keys []*key.Key
	var errs []error
	for i := range g.Keys {
		located, err := g.Keys[i].locate(g)
		if err != nil {
			errs = append(errs, fmt.Errorf("keys[%d]: %w", i, err))
			continue
		}
		k, err := own.Add(located)
		if err == nil {
			_, err = a.set.Add(located)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		a.guardKeys = append(a.guardKeys, located)
		keys = append(keys, k)
	}
	if err := firstErrors(errs); err != nil || len(keys) == 0 {
		return nil, err
	}
	state := *a.keyState.Load()
	state.config = a.set.Len() - state.file - state.env
	a.keyState.Store(&state)
	ring := new(key.Ring)
	ring.Replace(own, keys)
	return ring, nil
}

// locate resolves the key and names it as its operator would: a place in the
// list of a guard means little in a Caddyfile.
func (k *GuardKey) locate(g *Guard) (key.Located, error) {
	record, err := k.record(g.defaultTier)
	if err != nil {
		return key.Located{}, err
	}
	if g.tiers[record.Tier] == nil {
		return key.Located{}, fmt.Errorf("unknown tier, expected one of %s", tierNames(g.tiers))
	}
	name := record.Name
	if name == "" {
		name = record.Secrets[0].Digest.ID()
	}
	return key.Located{Record: record, Place: key.Place{Source: fmt.Sprintf("zejzl_auth key %q", name), Index: -1}}, nil
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
	digest, err := key.ParseSecret(secret)
	record.Secrets = []key.Secret{{Digest: digest}}
	return record, err
}

// isPlaceholder takes one whole placeholder of the kinds that hold secrets. Any
// other text in braces may be a key, which an error would show.
func isPlaceholder(s string) bool {
	return (strings.HasPrefix(s, "{env.") || strings.HasPrefix(s, "{file.")) &&
		strings.IndexAny(s[1:], "{}") == len(s)-2 && scrub(s) == s
}

// Start implements caddy.App.
func (a *App) Start() error {
	sites := guardSites(a.ctx)
	if a.wantsDevelopmentKey() {
		a.addDevelopmentKey(sites)
	}
	a.warn(sites)
	sweepZones(monotonicTick(), a.set.Has)
	a.set = nil
	close(a.started)
	enterRunning(a)
	if len(a.files) > 0 {
		ctx, cancel := context.WithCancel(context.Background())
		a.stopPoll = cancel
		go a.pollFiles(ctx)
	}
	return nil
}

// Stop implements caddy.App. Requests under way keep the keyring. It does not
// wait for the poll: a dead file system would hold up the admin endpoint.
func (a *App) Stop() error {
	leaveRunning(a)
	if a.stopPoll != nil {
		a.stopPoll()
	}
	return nil
}

// running are the apps that were started and not stopped. There are two while
// a configuration is changed, and the newer one, which speaks for the process,
// is stopped again if the change fails.
var running struct {
	sync.Mutex
	apps []*App
}

func enterRunning(a *App) {
	running.Lock()
	defer running.Unlock()
	running.apps = append(running.apps, a)
}

func leaveRunning(a *App) {
	running.Lock()
	defer running.Unlock()
	running.apps = slices.DeleteFunc(running.apps, func(other *App) bool { return other == a })
}

func runningApp() *App {
	running.Lock()
	defer running.Unlock()
	if len(running.apps) == 0 {
		return nil
	}
	return running.apps[len(running.apps)-1]
}

// startTimeout bounds how long a request waits for Start.
const startTimeout = 5 * time.Second

// awaitStart holds a request with a key until Start, if only Start can know
// the key: Caddy may open the listeners first. It tells whether Start came.
func (a *App) awaitStart(ctx context.Context) bool {
	if !a.wantsDevelopmentKey() {
		return true
	}
	select {
	case <-a.started:
		return true
	default:
	}
	timer := time.NewTimer(startTimeout)
	defer timer.Stop()
	select {
	case <-a.started:
		return true
	case <-ctx.Done():
	case <-timer.C:
	}
	return false
}

// warn says what the operator should know before the first request does.
func (a *App) warn(sites []guardSite) {
	if a.keyring.Len() == 0 && len(a.guardKeys) == 0 {
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

// Interface guards
var (
	_ caddy.App         = (*App)(nil)
	_ caddy.Provisioner = (*App)(nil)
)
