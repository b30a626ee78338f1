package zejzlauth

import (
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

func init() {
	httpcaddyfile.RegisterHandlerDirective("zejzl_auth", parseDirective)
	// The guard is the outer ring: redirects, rewrites and body limits run
	// inside it, so nothing they answer goes out unguarded.
	httpcaddyfile.RegisterDirectiveOrder("zejzl_auth", httpcaddyfile.After, "header")
	httpcaddyfile.RegisterGlobalOption("zejzl", parseGlobalOption)
}

func parseDirective(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	g := new(Guard)
	if err := g.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, errors.New(scrub(err.Error())) // it may quote a key in the wrong place
	}
	return g, nil
}

func parseGlobalOption(d *caddyfile.Dispenser, existing any) (any, error) {
	if existing != nil {
		d.Next() // the error tells where
		return nil, d.Err("the zejzl option is already given")
	}
	a := new(App)
	if err := a.UnmarshalCaddyfile(d); err != nil {
		return nil, errors.New(scrub(err.Error()))
	}
	return httpcaddyfile.App{Name: "zejzl", Value: caddyconfig.JSON(a, nil)}, nil
}

// UnmarshalCaddyfile sets up the guard from Caddyfile tokens:
//
//	zejzl_auth [<matcher>] {
//		protect <paths...>
//		public <paths...>
//		key <secret> [<tier> [<name>]]
//		tier <name> [<N>/<window>] {
//			requests <N>/<window> ...
//			concurrent <N>
//		}
//		default_tier <name>
//		zone <name>
//		cors <origins...> {
//			dev_origins <origins...>
//			methods <methods...>
//			headers <names...>
//			expose <names...>
//			max_age <duration>
//			credentials
//		}
//		cors backend
//		headers {
//			<name> <value>
//			-<name>
//		}
//		errors auto|zejzl|openai|anthropic|gemini|problem|caddy
//		forward_credentials
//		shadow
//		log_success info|all|debug|off
//	}
//
// A secret is a sha256: hash, a placeholder such as {env.PROD_KEY}, or a
// literal, which the adapter hashes so that no configuration holds it.
func (g *Guard) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive
	if d.NextArg() {
		return argErr(d, "zejzl_auth [<matcher>] without further arguments")
	}
	seen := make(map[string]bool)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name := d.Val()
		if err := once(d, seen, name, "key", "tier"); err != nil {
			return err
		}
		if err := g.unmarshalOption(d, name); err != nil {
			return err
		}
	}
	return nil
}

func (g *Guard) unmarshalOption(d *caddyfile.Dispenser, name string) (err error) {
	switch name {
	case "protect":
		g.Protect, err = pathArgs(d, "protect <paths...>")
	case "public":
		g.Public, err = pathArgs(d, "public <paths...>")
	case "key":
		err = g.unmarshalKey(d)
	case "tier":
		err = unmarshalTier(d, &g.Tiers)
	case "default_tier":
		g.DefaultTier, err = tierArg(d)
	case "zone":
		g.Zone, err = oneArg(d, "zone <name>")
	case "cors":
		g.CORS, err = unmarshalCORS(d)
	case "headers":
		g.Headers, err = unmarshalHeaders(d)
	case "errors":
		if g.Errors, err = oneArg(d, "errors <dialect>"); err == nil {
			if _, known := dialects[g.Errors]; !known {
				err = d.Errf("errors: expected %s", dialectNames)
			}
		}
	case "forward_credentials":
		g.ForwardCredentials, err = true, noArgs(d)
	case "shadow":
		g.Shadow, err = true, noArgs(d)
	case "log_success":
		if g.LogSuccess, err = oneArg(d, "log_success <level>"); err == nil {
			if _, known := successLevels[g.LogSuccess]; !known {
				err = d.Errf("log_success: expected %s", successLevelNames)
			}
		}
	default:
		return d.Errf("unrecognized subdirective %q, expected protect, public, key, tier, default_tier, zone, "+
			"cors, headers, errors, forward_credentials, log_success or shadow", hide(name))
	}
	return err
}

// unmarshalKey never quotes its arguments in errors: any may be a secret.
func (g *Guard) unmarshalKey(d *caddyfile.Dispenser) error {
	args := d.RemainingArgs()
	if len(args) < 1 || len(args) > 3 {
		return d.Err("key: expected <secret> [<tier> [<name>]]; a name with spaces needs quotes")
	}
	if len(args) < 3 && readsLikeTier(args[0]) {
		return d.Err("key: expected a secret of 24 to 256 characters, as its sha256: hash if it reads like a tier; is a {$VARIABLE} empty?")
	}
	k := GuardKey{Secret: args[0]}
	if !isPlaceholder(k.Secret) {
		digest, err := key.ParseSecret(k.Secret)
		if err != nil {
			return d.Errf("key: %w", err)
		}
		k.Secret = digest.String()
	}
	if len(args) > 1 {
		k.Tier = args[1]
		if err := key.ValidateTierName(k.Tier); err != nil {
			return d.Errf("key: %w", err)
		}
	}
	if len(args) > 2 {
		k.Name = args[2]
		if err := key.ValidateName(k.Name); err != nil {
			return d.Errf("key: %w", err)
		}
		if strings.Contains(k.Name, args[0]) {
			return d.Err("key: expected a name that does not contain the secret")
		}
	}
	g.Keys = append(g.Keys, k)
	return nil
}

// readsLikeTier tells a tier that an empty {$VARIABLE} moved to the secret's
// place, where it would be a key that anybody can guess. A valid tier name is
// taken for one unless some run of 16 letters and digits in it has a digit:
// hex and other generated secrets have, names made of words do not.
func readsLikeTier(s string) bool {
	runs := strings.FieldsFunc(s, func(r rune) bool { return r == '-' || r == '_' })
	return key.ValidateTierName(s) == nil && !slices.ContainsFunc(runs, func(run string) bool {
		return len(run) >= 16 && strings.ContainsAny(run, "0123456789")
	})
}

// unmarshalTier reads a tier, in a guard or in the global option:
//
//	tier <name> [<N>/<window>] {
//		requests <N>/<window> ...
//		concurrent <N>
//	}
func unmarshalTier(d *caddyfile.Dispenser, tiers *map[string]Tier) error {
	args := d.RemainingArgs()
	if len(args) < 1 || len(args) > 2 {
		return d.Err("tier: expected <name> [<N>/<window>], such as: tier team 300/1m")
	}
	name := args[0]
	if err := key.ValidateTierName(name); err != nil {
		return d.Errf("tier: %w", err)
	}
	if _, again := (*tiers)[name]; again {
		return d.Errf("tier %q is already given", hide(name))
	}
	var t Tier
	if err := appendLimits(d, &t, args[1:]); err != nil {
		return err
	}
	seen := make(map[string]bool)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		option := d.Val()
		if err := once(d, seen, option, "requests"); err != nil {
			return err
		}
		switch option {
		case "requests":
			limits, err := someArgs(d, "requests <N>/<window> ...")
			if err != nil {
				return err
			}
			if err := appendLimits(d, &t, limits); err != nil {
				return err
			}
		case "concurrent":
			number, err := oneArg(d, "concurrent <N>")
			if err != nil {
				return err
			}
			if t.Concurrent, err = strconv.Atoi(number); err != nil || t.Concurrent < 1 {
				return d.Errf("concurrent %q: expected a whole number from 1", hide(number))
			}
		default:
			return d.Errf("unrecognized subdirective %q of tier, expected requests or concurrent", hide(option))
		}
	}
	if _, err := newTier(name, t); err != nil {
		return d.WrapErr(hideIn(err, name))
	}
	if *tiers == nil {
		*tiers = make(map[string]Tier)
	}
	(*tiers)[name] = t
	return nil
}

func appendLimits(d *caddyfile.Dispenser, t *Tier, limits []string) error {
	for _, s := range limits {
		number, length, _ := strings.Cut(s, "/")
		limit, errLimit := strconv.Atoi(number)
		duration, errWindow := caddy.ParseDuration(length)
		if errLimit != nil || errWindow != nil {
			return d.Errf("limit %q: expected <N>/<window>, such as 100/1m", hide(s))
		}
		t.Requests = append(t.Requests, RequestLimit{Limit: limit, Window: caddy.Duration(duration)})
	}
	return nil
}

func unmarshalCORS(d *caddyfile.Dispenser) (*CORS, error) {
	c := new(CORS)
	c.Origins = d.RemainingArgs()
	if len(c.Origins) == 1 && c.Origins[0] == "backend" {
		c.Origins, c.Backend = nil, true
	}
	seen := make(map[string]bool)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		option := d.Val()
		if err := once(d, seen, option); err != nil {
			return nil, err
		}
		var err error
		switch option {
		case "dev_origins":
			c.DevOrigins, err = someArgs(d, "dev_origins <origins...>")
		case "methods":
			c.Methods, err = someArgs(d, "methods <methods...>")
		case "headers":
			c.Headers, err = someArgs(d, "headers <names...>")
		case "expose":
			c.Expose, err = someArgs(d, "expose <names...>")
		case "max_age":
			c.MaxAge, err = maxAgeArg(d)
		case "credentials":
			c.Credentials, err = true, noArgs(d)
		default:
			err = d.Errf("unrecognized subdirective %q of cors, expected dev_origins, methods, headers, expose, max_age or credentials", hide(option))
		}
		if err != nil {
			return nil, err
		}
	}
	if len(c.Origins) == 0 && len(c.DevOrigins) == 0 && !c.Backend {
		return nil, d.Err("cors: expected origins such as https://app.example.com, or: cors backend")
	}
	if err := checkCORS(*c); err != nil {
		return nil, d.WrapErr(err)
	}
	return c, nil
}

// checkCORS checks what can be known before placeholders have values.
func checkCORS(c CORS) error {
	c.Origins = slices.DeleteFunc(slices.Clone(c.Origins), hasPlaceholder)
	c.DevOrigins = slices.DeleteFunc(slices.Clone(c.DevOrigins), hasPlaceholder)
	if len(c.Origins)+len(c.DevOrigins) == 0 && !c.Backend {
		c.Origins = []string{"https://example.com"} // in place of those not known
	}
	_, err := newCORSPolicy(&c, true)
	return err
}

func hasPlaceholder(s string) bool { return strings.Contains(s, "{") }

func unmarshalHeaders(d *caddyfile.Dispenser) (*HeaderOps, error) {
	if err := noArgs(d); err != nil {
		return nil, err
	}
	ops := &HeaderOps{Set: make(map[string]string)}
	seen := make(map[string]bool)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name, leaveOut := strings.CutPrefix(d.Val(), "-")
		if err := once(d, seen, strings.ToLower(name)); err != nil {
			return nil, err
		}
		var line HeaderOps
		var err error
		if leaveOut {
			line.Delete, err = []string{name}, noArgs(d)
			ops.Delete = append(ops.Delete, name)
		} else {
			ops.Set[name], err = oneArg(d, "<name> <value>, or -<name> to leave it out")
			line.Set = map[string]string{name: ops.Set[name]}
			if hasPlaceholder(ops.Set[name]) {
				line.Set[name] = ""
			}
		}
		if err != nil {
			return nil, err
		}
		if _, err := newHeaderRules(&line); err != nil {
			return nil, d.WrapErr(err)
		}
	}
	return ops, nil
}

// UnmarshalCaddyfile sets up the app from the global option:
//
//	zejzl {
//		keys env [<prefix>]
//		keys file <path>
//		tier <name> [<N>/<window>] {
//			requests <N>/<window> ...
//			concurrent <N>
//		}
//		default_tier <name>
//	}
func (a *App) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the option
	if err := noArgs(d); err != nil {
		return err
	}
	seen := make(map[string]bool)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		option := d.Val()
		if err := once(d, seen, option, "keys", "tier"); err != nil {
			return err
		}
		var err error
		switch option {
		case "keys":
			err = a.unmarshalSource(d)
		case "tier":
			err = unmarshalTier(d, &a.Tiers)
		case "default_tier":
			a.DefaultTier, err = tierArg(d)
		default:
			err = d.Errf("unrecognized option %q, expected keys, tier or default_tier", hide(option))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *App) unmarshalSource(d *caddyfile.Dispenser) error {
	args := d.RemainingArgs()
	var s Source
	switch {
	case len(args) == 1 && args[0] == sourceEnv:
		s = Source{Source: sourceEnv}
	case len(args) == 2 && args[0] == sourceEnv:
		s = Source{Source: sourceEnv, Prefix: args[1]}
	case len(args) == 2 && args[0] == sourceFile:
		s = Source{Source: sourceFile, Path: args[1]}
	default:
		return d.Err("keys: expected env [<prefix>] or file <path>")
	}
	a.Sources = append(a.Sources, s)
	return nil
}

// once refuses a second line of a subdirective, but for those repeatable.
func once(d *caddyfile.Dispenser, seen map[string]bool, name string, repeatable ...string) error {
	if slices.Contains(repeatable, name) {
		return nil
	}
	if seen[name] {
		return d.Errf("%s is already given", hide(name))
	}
	seen[name] = true
	return nil
}

// argErr is Dispenser.ArgErr without the argument that it quotes.
func argErr(d *caddyfile.Dispenser, usage string) error {
	return d.Err("wrong argument count, expected: " + usage)
}

// hide masks what could be a secret in the wrong place. None is shorter than 24
// characters, and hardly any other word is as long.
func hide(word string) string {
	if len(word) < 24 {
		return word
	}
	return redacted
}

// hideIn is hide for a word that an error quotes. A path is shown, however long.
func hideIn(err error, word string) error {
	if hide(word) == word || strings.HasPrefix(word, "/") {
		return err
	}
	return errors.New(strings.ReplaceAll(err.Error(), word, redacted))
}

func noArgs(d *caddyfile.Dispenser) error {
	option := d.Val()
	if d.NextArg() {
		return argErr(d, hide(option)+" without arguments")
	}
	return nil
}

func oneArg(d *caddyfile.Dispenser, usage string) (string, error) {
	var arg string
	if !d.AllArgs(&arg) {
		return "", argErr(d, usage)
	}
	return arg, nil
}

func someArgs(d *caddyfile.Dispenser, usage string) ([]string, error) {
	args := d.RemainingArgs()
	if len(args) == 0 {
		return nil, argErr(d, usage)
	}
	return args, nil
}

// pathArgs reads path patterns and refuses a bad one where it stands.
func pathArgs(d *caddyfile.Dispenser, usage string) ([]string, error) {
	args, err := someArgs(d, usage)
	if err != nil {
		return nil, err
	}
	for _, arg := range args {
		if _, err := parsePathPattern(arg); err != nil {
			return nil, d.WrapErr(hideIn(err, arg))
		}
	}
	return args, nil
}

func tierArg(d *caddyfile.Dispenser) (string, error) {
	name, err := oneArg(d, "default_tier <name>")
	if err == nil && key.ValidateTierName(name) != nil {
		err = d.Errf("default_tier: %w", key.ValidateTierName(name))
	}
	return name, err
}

func maxAgeArg(d *caddyfile.Dispenser) (caddy.Duration, error) {
	s, err := oneArg(d, "max_age <duration>")
	if err != nil {
		return 0, err
	}
	duration, err := caddy.ParseDuration(s)
	if err != nil { // it quotes s
		return 0, d.Errf("max_age %q: expected a duration, such as 10m", hide(s))
	}
	return caddy.Duration(duration), nil
}

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*Guard)(nil)
	_ caddyfile.Unmarshaler = (*App)(nil)
)
