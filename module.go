// Package zejzlauth is the guard in front of an AI API: it knows callers by
// API key, holds each key to its tier's limits, puts security and CORS headers
// on every answer, and lets no key reach a log or the backend.
package zejzlauth

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
	"github.com/zejzl/caddy-zejzl-auth/internal/window"
)

func init() {
	caddy.RegisterModule(new(Guard))
}

// Guard is an HTTP handler that lets through who has an API key, within the
// limits of the key's tier. All fields are optional: with keys in the
// environment, the empty guard is a complete and safe configuration.
//
// It belongs in front of all other handlers of a site. What needs a key is
// decided by the path as the client sent it, whatever a handler rewrites.
type Guard struct {
	// Paths that pass without a key, for GET and HEAD: exact paths, or with
	// /* at the end all that is strictly below. They are compared byte by
	// byte with the path as sent. Default: none. Example: `["/api/status"]`.
	Public []string `json:"public,omitempty"`

	// Paths that need a key, exact or with /* at the end. What lies outside,
	// without doubt, is left to others but for four security headers.
	// Default: `["/*"]`. Example: `["/api/*", "/v1/*"]`.
	Protect []string `json:"protect,omitempty"`

	// Keys that hold for this guard only. Default: none; the keys of the
	// zejzl app hold for every guard.
	// Example: `[{"secret": "{env.PROD_KEY}", "tier": "pro", "name": "CI runner"}]`.
	Keys []GuardKey `json:"keys,omitempty"`

	// Tiers that this guard adds or changes, by name. Default: the tiers of
	// the zejzl app. Example: `{"free": {"requests": [{"limit": 5, "window": "1m"}]}}`.
	Tiers map[string]Tier `json:"tiers,omitempty"`

	// The tier of keys that name none. Default: that of the zejzl app.
	// Example: `"pro"`.
	DefaultTier string `json:"default_tier,omitempty"`

	// Guards with the same zone share the windows and slots of a key.
	// Default: `"default"`, one zone for the process. Example: `"chat"`.
	Zone string `json:"zone,omitempty"`

	// Which origins browsers may call from. Default: none; preflights get
	// 403 and CORS headers of the backend are removed.
	// Example: `{"origins": ["https://app.example.com"]}`.
	CORS *CORS `json:"cors,omitempty"`

	// Changes to the security headers. Default: none.
	// Example: `{"set": {"X-Frame-Options": "SAMEORIGIN"}}`.
	Headers *HeaderOps `json:"headers,omitempty"`

	// How errors look: auto (as the caller's SDK expects), zejzl, openai,
	// anthropic, gemini, problem (RFC 9457), or caddy, which leaves refusals
	// and errors to the site's handle_errors. Default: `"auto"`.
	// Example: `"openai"`.
	Errors string `json:"errors,omitempty"`

	// Keep the client's key in the request to the backend. Default: `false`,
	// it is removed. Example: `true`.
	ForwardCredentials bool `json:"forward_credentials,omitempty"`

	// Log of successful calls: info (at most one line a key and minute, with
	// the number of calls since the last), all, debug, or off.
	// Default: `"info"`. Example: `"all"`.
	LogSuccess string `json:"log_success,omitempty"`

	// Count and log what the limits would refuse, but refuse and charge
	// nothing. Default: `false`. Example: `true`.
	Shadow bool `json:"shadow,omitempty"`

	app         *App
	zone        *zone
	keyring     *key.Ring // nil: no keys of its own
	tiers       map[string]*tier
	defaultTier string
	paths       pathRules
	cors        *corsPolicy // nil: no origin is allowed
	corsBackend bool        // CORS is the backend's
	header      headerRules
	vary        [3]string // by route
	errors      dialect
	logSuccess  successLevel
	logger      *zap.Logger
	clock       clock
}

// GuardKey is a key stated in the configuration of a guard.
type GuardKey struct {
	// The secret's hash, `sha256:` and 64 hex digits, or one placeholder such
	// as `{env.PROD_KEY}` that holds the hash or the secret. A literal secret
	// is refused: configuration is shown by the admin API and kept on disk.
	// Required. Example: `"{env.PROD_KEY}"`.
	Secret string `json:"secret,omitempty"`

	// The tier. Default: the guard's default tier. Example: `"pro"`.
	Tier string `json:"tier,omitempty"`

	// A name for logs and the backend. Default: none. Example: `"CI runner"`.
	Name string `json:"name,omitempty"`
}

// clock is the time a guard lives by.
type clock struct {
	tick func() window.Tick // for limits: monotonic
	wall func() time.Time   // for expiry
}

// CaddyModule returns the Caddy module information.
func (*Guard) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.zejzl_auth",
		New: func() caddy.Module { return new(Guard) },
	}
}

// Provision implements caddy.Provisioner. It changes no live state, since the
// configuration may yet be dropped, and takes nothing that Cleanup would have
// to give back: requests of an old configuration still run after its Cleanup.
func (g *Guard) Provision(ctx caddy.Context) error {
	app, err := ctx.App("zejzl")
	if err != nil {
		return fmt.Errorf("loading the zejzl app: %w", err)
	}
	return g.provision(ctx, app.(*App))
}

func (g *Guard) provision(ctx caddy.Context, app *App) (err error) {
	g.app, g.logger = app, ctx.Logger()
	g.clock = clock{tick: monotonicTick, wall: time.Now}
	if err := errors.Join(g.provisionTiers(), g.provisionRules()); err != nil {
		return err
	}
	if g.keyring, err = g.app.addGuard(g); err != nil {
		return err
	}

	zoneName := defaultZone
	if g.Zone != "" {
		if zoneName, err = caddy.NewReplacer().ReplaceOrErr(g.Zone, true, true); err != nil {
			return fmt.Errorf("zone: %w", err)
		}
	}
	g.zone = zoneOf(zoneName)
	return nil
}

func (g *Guard) provisionTiers() error {
	var err error
	if g.tiers, err = mergeTiers(g.app.tiers, g.Tiers); err != nil {
		return err
	}
	if g.defaultTier = g.DefaultTier; g.defaultTier == "" {
		g.defaultTier = g.app.defaultTier
	}
	if g.tiers[g.defaultTier] == nil {
		return fmt.Errorf("default_tier: unknown tier %q, expected one of %s", scrub(g.defaultTier), tierNames(g.tiers))
	}
	return nil
}

func (g *Guard) provisionRules() error {
	var errs [5]error
	var known bool
	g.paths, errs[0] = newPathRules(g.Protect, g.Public)
	g.cors, errs[1] = newCORSPolicy(g.CORS, g.app.development)
	g.header, errs[2] = newHeaderRules(g.Headers)
	if g.errors, known = dialects[g.Errors]; !known {
		errs[3] = fmt.Errorf("errors %q: expected %s", g.Errors, dialectNames)
	}
	if g.logSuccess, known = successLevels[g.LogSuccess]; !known {
		errs[4] = fmt.Errorf("log_success %q: expected %s", g.LogSuccess, successLevelNames)
	}
	g.vary[protected] = "Authorization, X-API-Key, X-Goog-Api-Key, Api-Key"
	g.corsBackend = g.CORS != nil && g.CORS.Backend
	if g.cors != nil {
		g.vary[protected] += ", Origin"
		g.vary[public] = "Origin"
	}
	return errors.Join(errs[:]...)
}

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (g *Guard) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	earlier := caddyhttp.GetVar(r.Context(), exchangeVar)
	if outer, ok := earlier.(*exchange); ok {
		return g.serveInner(outer, w, r, next)
	}
	method, uri := originalTarget(r)
	rt, badPath := g.paths.classify(method, uri)
	x := newExchange(g, w, r, rt, uri)
	x.left, _ = earlier.(*openCredential)
	x.begin(w.Header())
	if rt == open {
		return x.passOpen(next)
	}
	return g.serve(x, badPath, next)
}

// serve runs a request for a protected or public path through the rules.
// However that ends, end answers what failed and frees the slots.
func (g *Guard) serve(x *exchange, badPath bool, next caddyhttp.Handler) (err error) {
	defer x.end(&err)
	r := x.request
	switch {
	case !methodAllowed(r):
		return refuse(reasonMethodNotAllowed)
	case badPath:
		return refuse(reasonInvalidPath)
	case isPreflight(r):
		return x.servePreflight(next)
	}
	if isForeignUpgrade(r.Header) {
		removeUpgrade(r.Header)
	}
	if f := g.decide(x); f != nil {
		return f
	}
	return x.forward(next)
}

// decide finds who calls, and whether the key may call now.
func (g *Guard) decide(x *exchange) *refusal {
	h := x.request.Header
	secret, why := readCredential(h)
	if x.left != nil {
		secret, why = x.left.secret, x.left.why
	}
	if why == reasonNone {
		x.secret = secret
		if !g.app.awaitStart(x.request.Context()) {
			why = reasonStarting
		} else if k, status := g.authenticate(secret); k != nil && status == key.Active {
			return g.admitKey(x, k)
		} else {
			why = reasonInvalidKey
			x.rejected, x.status = k, status
		}
	}
	if x.route == protected {
		return refuse(why)
	}
	publicRequests.Inc()
	x.observe()
	removeUpgrade(h) // a tunnel would outlive every rule of a public path
	g.cleanRequest(h, public, false)
	return nil
}

// admitKey holds a key to its limits and introduces it to the backend.
func (g *Guard) admitKey(x *exchange, k *key.Key) *refusal {
	x.identified(k)
	f := g.admit(x)
	if f != nil {
		return f
	}
	x.meter()
	x.observe()
	g.cleanRequest(x.request.Header, x.route, true)
	x.identify(x.tier.name)
	g.logAdmitted(x)
	return nil
}

// tierOf finds the key's tier; every tier was checked when its key was loaded.
func (g *Guard) tierOf(k *key.Key) *tier {
	if t := g.tiers[k.Tier]; t != nil {
		return t
	}
	return g.tiers[g.defaultTier]
}

// admit charges the key in the guard's zone, or says why not.
func (g *Guard) admit(x *exchange) *refusal {
	t := g.tierOf(x.key)
	acc := g.zone.account(x.key)
	v := acc.Admit(g.clock.tick(), t.limits)
	for v.Outcome == window.Retired { // swept since it was looked up
		acc = g.zone.account(x.key)
		v = acc.Admit(g.clock.tick(), t.limits)
	}
	if x.tier == nil || v.Outcome != window.Admitted || v.Remaining < x.verdict.Remaining {
		x.tier, x.verdict = t, v
	}
	if v.Outcome == window.Admitted {
		x.charges = append(x.charges, charge{zone: g.zone, account: acc, limits: t.limits, at: v.At})
		return nil
	}
	f := refuse(reasonConcurrencyLimited)
	if v.Outcome == window.WindowFull {
		f = refuse(reasonRateLimited)
		f.wait, f.policy = v.Wait, t.words[v.Limit].label
	}
	if !g.Shadow {
		return f
	}
	countDecision(decisionShadow, f.reason, t.name)
	g.logRefusal(x, f, "request would be refused")
	return nil
}

// serveInner is a guard behind another guard of the same chain: who calls is
// decided, and only a zone of its own is still to be charged.
func (g *Guard) serveInner(x *exchange, w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	// In handle_errors the exchange has ended: nobody would free another slot.
	if x.key != nil && !x.ended && !x.charged(g.zone) {
		if f := g.admit(x); f != nil {
			x.refund()
			return caddyhttp.Error(f.status, f) // so that handlers between see the status
		}
	}
	return next.ServeHTTP(w, r)
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Guard)(nil)
	_ caddyhttp.MiddlewareHandler = (*Guard)(nil)
)
