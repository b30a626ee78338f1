package zejzlauth

import (
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

// provisionConfig runs a whole configuration through Caddy up to Start.
func provisionConfig(t *testing.T, text string) (caddy.Context, error) {
	t.Helper()
	cfg := new(caddy.Config)
	if err := json.Unmarshal([]byte(text), cfg); err != nil {
		t.Fatal(err)
	}
	return caddy.ProvisionContext(cfg)
}

// siteConfig is a configuration of one server, whose log goes nowhere.
func siteConfig(server, app string) string {
	return `{"admin": {"disabled": true}, "logging": {"logs": {"default": {"writer": {"output": "discard"}}}},
		"storage": {"module": "file_system", "root": "/nonexistent/zejzl"},
		"apps": {"http": {"servers": {"a": ` + server + `}}, "zejzl": ` + app + `}}`
}

const noKeys = `{"sources": [{"source": "env", "prefix": "ZEJZL_NO_SUCH_KEY_"}]}`

func TestGuardKeyRecord(t *testing.T) {
	digest := key.Sum(literalSecret)
	t.Setenv("ZEJZL_TEST_SECRET", literalSecret)
	t.Setenv("ZEJZL_TEST_HASH", digest.String())
	t.Setenv("ZEJZL_TEST_EMPTY", "")
	t.Setenv("ZEJZL_TEST_SHORT", "shortsecret")
	t.Setenv("ZEJZL_TEST_WEAK", strings.Repeat("abc", 20))
	for _, k := range []GuardKey{
		{Secret: digest.String()},
		{Secret: "sha256:" + strings.ToUpper(digest.String()[7:])},
		{Secret: "{env.ZEJZL_TEST_SECRET}"},
		{Secret: "{env.ZEJZL_TEST_HASH}"},
	} {
		record, err := k.record("free")
		if err != nil || len(record.Secrets) != 1 || record.Secrets[0].Digest != digest || record.Tier != "free" || record.Name != "" {
			t.Errorf("%+v: %+v, %v", k, record, err)
		}
	}
	if record, err := (&GuardKey{digest.String(), "pro", "CI runner"}).record("free"); err != nil || record.Tier != "pro" || record.Name != "CI runner" {
		t.Errorf("%+v, %v", record, err)
	}
	for _, c := range []struct {
		key  GuardKey
		want string
	}{
		{GuardKey{Secret: literalSecret}, "secret: expected sha256: and 64 hex digits, or one placeholder such as {env.PROD_KEY}"},
		{GuardKey{Secret: ""}, "secret: expected sha256:"},
		{GuardKey{Secret: "{" + literalSecret + "}"}, "secret: expected sha256:"},
		{GuardKey{Secret: "{env.ZEJZL_TEST_SECRET}{env.ZEJZL_TEST_SECRET}"}, "secret: expected sha256:"},
		{GuardKey{Secret: "{}"}, "secret: expected sha256:"},
		{GuardKey{Secret: "sha256:abc"}, `expected "sha256:" and 64 hex digits`},
		{GuardKey{Secret: "{env.ZEJZL_TEST_UNSET}"}, "secret: "},
		{GuardKey{Secret: "{env.ZEJZL_TEST_EMPTY}"}, "secret: "},
		{GuardKey{Secret: "{env.ZEJZL_TEST_SHORT}"}, "expected a secret of 24 to 256 characters"},
		{GuardKey{Secret: "{env.ZEJZL_TEST_WEAK}"}, "too easy to guess"},
		{GuardKey{Secret: "{http.request.header.X-Api-Key}"}, "secret: "},
		{GuardKey{Secret: digest.String(), Name: "a\r\nb"}, "expected a name without control characters"},
		{GuardKey{Secret: digest.String(), Name: literalSecret}, "expected a name that contains no secret"},
	} {
		_, err := c.key.record("free")
		mustNotTell(t, err, []string{literalSecret, "shortsecret", "abcabc"}, c.want)
	}
}

func TestFirstErrors(t *testing.T) {
	var errs []error
	for range 12 {
		errs = append(errs, errors.New("one"))
	}
	if got := firstErrors(errs[:10]); strings.Count(got.Error(), "one") != 10 || strings.Contains(got.Error(), "more") {
		t.Errorf("%v", got)
	}
	if got := firstErrors(errs); strings.Count(got.Error(), "one") != 10 || !strings.HasSuffix(got.Error(), "and 2 more") {
		t.Errorf("%v", got)
	}
	if got := firstErrors(nil); got != nil {
		t.Errorf("%v", got)
	}
}

func TestStrictJSON(t *testing.T) {
	for app, want := range map[string]string{
		`{"source": []}`: `unknown field "source"`,
		`{"sources": [{"source": "env", "suffix": 1}]}`:                      `unknown field "suffix"`,
		`{"default_tier": "none"}`:                                           `unknown tier "none"`,
		`{"tiers": {"a": {"requests": [{"limit": 1, "window": "1 week"}]}}}`: "week",
	} {
		_, err := provisionConfig(t, siteConfig(`{"listen": ["127.0.0.1:0"]}`, app))
		mustNotTell(t, err, nil, want)
	}
	for guard, want := range map[string]string{
		`{"handler": "zejzl_auth", "publik": []}`:                                             `unknown field "publik"`,
		`{"handler": "zejzl_auth", "keys": [{"secrets": ["x"]}]}`:                             `unknown field "secrets"`,
		`{"handler": "zejzl_auth", "keys": [{"secret": "` + literalSecret + `"}]}`:            "a literal secret would be shown",
		`{"handler": "zejzl_auth", "public": ["x"]}`:                                          `public: path "x"`,
		`{"handler": "zejzl_auth", "errors": "x"}`:                                            `errors "x": expected auto, zejzl`,
		`{"handler": "zejzl_auth", "log_success": "x"}`:                                       `log_success "x": expected info, all`,
		`{"handler": "zejzl_auth", "headers": {"delete": ["X-Foo"]}}`:                         "headers: -X-Foo",
		`{"handler": "zejzl_auth", "default_tier": "x"}`:                                      `default_tier: unknown tier "x"`,
		`{"handler": "zejzl_auth", "cors": {"origins": ["*"]}}`:                               "cors origins",
		`{"handler": "zejzl_auth", "errors": "x", "log_success": "y", "protect": ["z"]}`:      "log_success",
		`{"handler": "zejzl_auth", "errors": "x", "log_success": "y", "protect": ["zz"]}`:     `protect: path "zz"`,
		`{"handler": "zejzl_auth", "tiers": {"x": {"concurrent": 1}}, "zone": "strict json"}`: `tier "x": no request limit`,
	} {
		_, err := provisionConfig(t, siteConfig(`{"listen": ["127.0.0.1:0"], "routes": [{"handle": [`+guard+`]}]}`, noKeys))
		mustNotTell(t, err, []string{literalSecret}, want)
	}
}

// The first configuration makes the development key and prints it once; it
// opens every configuration after it.
func TestDevelopmentKey(t *testing.T) {
	t.Setenv("ENVIRONMENT", "development")
	forgetDevelopmentKey(t)
	server := `{"listen": ["127.0.0.1:8081"], "automatic_https": {"disable": true}, "routes": [
		{"match": [{"host": ["localhost"]}], "handle": [{"handler": "zejzl_auth", "zone": "development"}]}]}`
	var secret string
	for i := range 3 {
		ctx, err := provisionConfig(t, siteConfig(server, noKeys))
		if err != nil {
			t.Fatal(err)
		}
		printed := capturedStderr(t, func() { startApp(t, ctx) })
		if i == 0 {
			lines := strings.Split(printed, "\n")
			at := slices.IndexFunc(lines, func(line string) bool { return key.Shaped(strings.TrimSpace(line)) })
			if at < 0 {
				t.Fatalf("no key in %q", printed)
			}
			secret = strings.TrimSpace(lines[at])
			want := "curl -i http://localhost:8081/v1/chat/completions -H 'X-API-Key: " + secret + "'"
			if strings.Count(printed, secret) != 2 || !strings.Contains(printed, want) || strings.Contains(printed, "-k ") {
				t.Errorf("printed %s", printed)
			}
		} else if printed != "" {
			t.Errorf("printed again: %s", printed)
		}
		httpApp, _ := ctx.App("http")
		g := httpApp.(*caddyhttp.App).Servers["a"].Routes[0].Handlers[0].(*Guard)
		entry, ok := g.lookup(key.Sum(secret))
		if !ok || entry.Key.Name != "development" || g.tierOf(entry.Key).name != "free" {
			t.Errorf("configuration %d: the key is unknown", i)
		}
		if !g.app.awaitStart(t.Context()) {
			t.Error("a started app holds requests")
		}
	}
}

// With a key of any source, or without ENVIRONMENT=development, none is made.
func TestNoDevelopmentKey(t *testing.T) {
	t.Setenv("ZEJZL_TEST_DEV_A", literalSecret+":pro")
	path := writeKeyFile(t, `{"keys": []}`)
	for _, c := range []struct{ environment, app string }{
		{"", noKeys},
		{"production", noKeys},
		{"Development", noKeys},
		{"development", `{"sources": [{"source": "env", "prefix": "ZEJZL_TEST_DEV_"}]}`},
		{"development", `{"sources": [{"source": "file", "path": "` + path + `"}]}`},
	} {
		t.Setenv("ENVIRONMENT", c.environment)
		forgetDevelopmentKey(t)
		ctx, err := provisionConfig(t, siteConfig(`{"listen": ["127.0.0.1:0"]}`, c.app))
		if err != nil {
			t.Fatal(err)
		}
		if printed := capturedStderr(t, func() { startApp(t, ctx) }); printed != "" || developmentKey.made {
			t.Errorf("%+v: printed %q", c, printed)
		}
	}
	// Reading a configuration prints and makes nothing.
	t.Setenv("ENVIRONMENT", "development")
	if printed := capturedStderr(t, func() {
		if _, err := provisionConfig(t, siteConfig(`{"listen": ["127.0.0.1:0"]}`, noKeys)); err != nil {
			t.Error(err)
		}
	}); printed != "" || developmentKey.made {
		t.Errorf("printed %q", printed)
	}
}

func forgetDevelopmentKey(t *testing.T) {
	developmentKey.Lock()
	defer developmentKey.Unlock()
	developmentKey.made, developmentKey.digest = false, key.Digest{}
	t.Cleanup(func() { developmentKey.made = false })
}

func startApp(t *testing.T, ctx caddy.Context) *App {
	t.Helper()
	mod, err := ctx.App("zejzl")
	if err != nil {
		t.Fatal(err)
	}
	app := mod.(*App)
	if err := app.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = app.Stop() })
	return app
}

func capturedStderr(t *testing.T, do func()) string {
	t.Helper()
	file, err := os.CreateTemp(t.TempDir(), "stderr")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	old := os.Stderr
	os.Stderr = file
	defer func() { os.Stderr = old }()
	do()
	printed, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(printed)
}

func TestWarnings(t *testing.T) {
	const noKey, dev, logs = "no API key is configured", "development mode on a site that is not loopback", "access logs are on without the zejzl log encoder"
	loopback, outside := guardSite{host: "localhost", loopback: true}, guardSite{host: "api.example.com"}
	logged := guardSite{host: "localhost", loopback: true, accessLogs: true}
	for name, c := range map[string]struct {
		environment string
		keys        bool
		file        string
		encoder     bool
		sites       []guardSite
		want        []string
	}{
		"nothing to say":          {"", true, "", false, []guardSite{outside}, nil},
		"a key in a file":         {"", false, keysJSON(literalSecret), false, []guardSite{outside}, nil},
		"no key":                  {"", false, "", false, []guardSite{outside}, []string{noKey}},
		"an empty file":           {"development", false, `{"keys": []}`, false, nil, []string{noKey}},
		"development, loopback":   {"development", false, "", false, []guardSite{loopback}, nil},
		"development, outside":    {"development", true, "", false, []guardSite{loopback, outside, outside}, []string{dev, dev}},
		"access logs":             {"", true, "", false, []guardSite{logged, logged}, []string{logs}}, // once
		"access logs, safe":       {"", true, "", true, []guardSite{logged}, nil},
		"access logs off a guard": {"", true, "", false, nil, nil},
		"all of it":               {"development", true, "", false, []guardSite{logged, outside}, []string{dev, logs}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("ENVIRONMENT", c.environment)
			a := new(App)
			if c.keys {
				t.Setenv("ZEJZL_TEST_WARN_A", literalSecret+":pro")
				a.Sources = []Source{{Source: "env", Prefix: "ZEJZL_TEST_WARN_"}}
			}
			if c.file != "" {
				a.Sources = []Source{{Source: "file", Path: writeKeyFile(t, c.file)}}
			}
			if provisionedApp(t, a).wantsDevelopmentKey() { // as Start does
				forgetDevelopmentKey(t)
				capturedStderr(t, func() { a.addDevelopmentKey(nil) })
			}
			if c.encoder {
				noteLogEncoder(a.ctx)
				t.Cleanup(func() { forgetLogEncoders(a.ctx) })
			}
			core, seen := observer.New(zap.DebugLevel)
			a.logger = zap.New(core)
			a.warn(c.sites)
			var got []string
			for _, entry := range seen.All() {
				if entry.Level != zap.WarnLevel {
					t.Errorf("level %s", entry.Level)
				}
				got = append(got, entry.Message)
			}
			if !slices.EqualFunc(got, c.want, strings.HasPrefix) {
				t.Errorf("warned %q, want %q", got, c.want)
			}
		})
	}
}

// A key of a guard is a key: neither is a development key made, nor is the
// lack of one told.
func TestGuardKeyIsEnough(t *testing.T) {
	t.Setenv("ENVIRONMENT", "development")
	r := newRig(t, new(Guard))
	core, seen := observer.New(zap.DebugLevel)
	r.app.logger = zap.New(core)
	if printed := capturedStderr(t, func() { started(t, r.app) }); printed != "" || seen.Len() != 0 {
		t.Errorf("printed %q, logged %v", printed, seen.All())
	}
	if r.app.set != nil {
		t.Error("what only loading needs is kept")
	}
}

// Two keys that are not the same key have one id: that of the one is what the
// other's secret makes.
func TestGuardKeyTakesNoOthersID(t *testing.T) {
	secret := key.Sum(key.Generate())
	filed := strings.Replace(keysJSON(key.Generate()), `{"name"`, `{"id": "`+secret.ID()+`", "name"`, 1)
	app := provisionedApp(t, &App{Sources: []Source{{Source: "file", Path: writeKeyFile(t, filed)}}})
	g := &Guard{Zone: t.Name(), Keys: []GuardKey{{Secret: secret.String()}}}
	mustNotTell(t, g.provision(app.ctx, app), []string{secret.String()[7:]}, "key file ", `zejzl_auth key "`+secret.ID()+`"`, "are two keys with the same id")
}
