package zejzlauth

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

// Each file is a Caddyfile, a line of dashes, and the JSON that it means.
func TestAdapt(t *testing.T) {
	files, err := filepath.Glob("testdata/adapt/*.caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatal("no test data", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			config, want, ok := strings.Cut(string(text), "----------\n")
			if !ok {
				t.Fatal("no line of dashes")
			}
			adapted, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(config), map[string]any{"filename": "Caddyfile"})
			if err != nil || len(warnings) != 0 {
				t.Fatalf("%v, warnings %v", err, warnings)
			}
			var got bytes.Buffer
			if err := json.Indent(&got, adapted, "", "\t"); err != nil {
				t.Fatal(err)
			}
			if got := got.String() + "\n"; got != want {
				t.Errorf("adapted:\n%s", got)
			}
		})
	}
}

func parseGuard(text string) (*Guard, error) {
	g := new(Guard)
	return g, g.UnmarshalCaddyfile(caddyfile.NewTestDispenser(text))
}

const literalSecret = "zejzl_0123456789abcdefghijklmnopqrstuv"

func TestCaddyfileErrors(t *testing.T) {
	for body, want := range map[string]string{
		"unheard":                            `unrecognized subdirective "unheard", at Testfile:2`,
		"protect":                            "wrong argument count or unexpected line ending after 'protect', at Testfile:2",
		"public":                             "wrong argument count or unexpected line ending after 'public', at Testfile:2",
		"public status":                      `path "status": expected an exact path such as /api/status, or one ending in /*, in plain spelling, at Testfile:2`,
		"protect /api/* /a/../b":             `path "/a/../b": expected`,
		"protect /a\nprotect /b":             "protect is already given, at Testfile:3",
		"public /a\npublic /b":               "public is already given, at Testfile:3",
		"key":                                "key: expected <secret> [<tier> [<name>]]; a name with spaces needs quotes, at Testfile:2",
		"key a pro CI runner":                "key: expected <secret> [<tier> [<name>]]; a name with spaces needs quotes, at Testfile:2",
		"key short":                          "key: expected a secret of 24 to 256 characters",
		"key aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa": "key: the secret is too easy to guess",
		"key sha256:abc":                     `key: expected "sha256:" and 64 hex digits, at Testfile:2`,
		"key {env.K} Pro":                    "key: expected a tier of 1 to 32 characters from a-z 0-9 _ -, at Testfile:2",
		"key {env.K} pro " + literalSecret:   "key: expected a name that contains no secret, at Testfile:2",
		"key {env.K} pro \" x\"":             "key: expected a name without spaces around it, at Testfile:2",
		"key foreign-secret.0123456789/abc pro foreign-secret.0123456789/abc": "key: expected a name that does not contain the secret",
		"key {" + literalSecret + "}":                                         "key: expected a secret of 24 to 256 characters",
		"key {env.A}{env.B}":                                                  "key: expected a secret of 24 to 256 characters",
		"tier":                                                                "tier: expected <name> [<N>/<window>], such as: tier team 300/1m, at Testfile:2",
		"tier a 1/1m 2/1h":                                                    "tier: expected <name> [<N>/<window>], such as: tier team 300/1m, at Testfile:2",
		"tier Team 1/1m":                                                      "expected a tier of 1 to 32 characters from a-z 0-9 _ -, at Testfile:2",
		"tier a":                                                              `tier "a": no request limit: want at least one, such as 100 in 1m, at Testfile:2`,
		"tier a 1/1m\ntier a 2/1m":                                            `tier "a" is already given, at Testfile:3`,
		"tier a 1":                                                            `limit "1": expected <N>/<window>, such as 100/1m, at Testfile:2`,
		"tier a x/1m":                                                         `limit "x/1m": expected <N>/<window>, such as 100/1m, at Testfile:2`,
		"tier a 1/fortnight":                                                  `limit "1/fortnight": expected <N>/<window>, such as 100/1m: `,
		"tier a 0/1m":                                                         `tier "a": 0 requests in 1m0s: want 1 to`,
		"tier a 1/1ms":                                                        `tier "a": 1 requests in 1ms: want a window of whole seconds`,
		"tier a 1/1m {\nrequests\n}":                                          "wrong argument count or unexpected line ending after 'requests', at Testfile:3",
		"tier a 1/1m {\nrequests 2/60s\n}":                                    `tier "a": window 1m0s is limited twice`,
		"tier a 1/1m {\nconcurrent\n}":                                        "wrong argument count or unexpected line ending after 'concurrent', at Testfile:3",
		"tier a 1/1m {\nconcurrent 0\n}":                                      `concurrent "0": expected a whole number from 1, at Testfile:3`,
		"tier a 1/1m {\nconcurrent x\n}":                                      `concurrent "x": expected a whole number from 1, at Testfile:3`,
		"tier a 1/1m {\nconcurrent 1 2\n}":                                    "wrong argument count",
		"tier a 1/1m {\nconcurrent 1\nconcurrent 2\n}":                        "concurrent is already given, at Testfile:4",
		"tier a 1/1m {\nunheard\n}":                                           `unrecognized subdirective "unheard", at Testfile:3`,
		"default_tier":                                                        "wrong argument count or unexpected line ending after 'default_tier', at Testfile:2",
		"default_tier a b":                                                    "wrong argument count",
		"default_tier a\ndefault_tier b":                                      "default_tier is already given, at Testfile:3",
		"zone":                                                                "wrong argument count",
		"zone a b":                                                            "wrong argument count",
		"zone a\nzone a":                                                      "zone is already given, at Testfile:3",
		"cors":                                                                "cors: expected origins such as https://app.example.com, or: cors backend, at Testfile:2",
		"cors *":                                                              "cors origins: entry 1",
		"cors https://a.example/":                                             "cors origins: entry 1",
		"cors https://a.example\ncors backend":                                "cors is already given, at Testfile:3",
		"cors {\ndev_origins\n}":                                              "wrong argument count",
		"cors {\ndev_origins http://LOCALHOST\n}":                             "cors dev_origins: entry 1",
		"cors https://a.example {\nmethods\n}":                                "wrong argument count",
		"cors https://a.example {\nmethods get,post\n}":                       "cors methods",
		"cors https://a.example {\nheaders\n}":                                "wrong argument count",
		"cors https://a.example {\nheaders X:\n}":                             "cors headers",
		"cors https://a.example {\nexpose\n}":                                 "wrong argument count",
		"cors {env.ORIGINS} {\nexpose X:\n}":                                  "cors expose",
		"cors https://a.example {\nmax_age\n}":                                "wrong argument count",
		"cors https://a.example {\nmax_age soon\n}":                           "invalid duration",
		"cors https://a.example {\nmax_age 48h\n}":                            "cors max_age: expected 1s to 24h",
		"cors https://a.example {\ncredentials on\n}":                         "wrong argument count",
		"cors https://a.example {\nunheard\n}":                                `unrecognized subdirective "unheard", at Testfile:3`,
		"cors https://a.example {\nmax_age 1h\nmax_age 2h\n}":                 "max_age is already given, at Testfile:4",
		"cors backend {\ncredentials\n}":                                      "cors backend: expected no other cors setting beside it",
		"headers x":                                                           "wrong argument count",
		"headers {\nX-A\n}":                                                   "wrong argument count",
		"headers {\nX-A a b\n}":                                               "wrong argument count",
		"headers {\n-X-Frame-Options x\n}":                                    "wrong argument count",
		"headers {\n-X-Unknown\n}":                                            "headers: -X-Unknown: expected one of the guard's security headers, at Testfile:3",
		"headers {\nX-A a\nx-a b\n}":                                          "x-a is already given, at Testfile:4",
		"headers {\nX-Frame-Options a\n-x-frame-options\n}":                   "x-frame-options is already given, at Testfile:4",
		"headers {\nRetry-After 1\n}":                                         "headers: Retry-After is set by the guard or the server and can't be changed here, at Testfile:3",
		"headers {\nX: a\n}":                                                  `headers: "X:": expected a header name, at Testfile:3`,
		"errors":                                                              "wrong argument count",
		"errors json":                                                         "errors: expected auto, zejzl, openai, anthropic, gemini, problem or caddy, at Testfile:2",
		"errors auto openai":                                                  "wrong argument count",
		"errors auto\nerrors auto":                                            "errors is already given, at Testfile:3",
		"forward_credentials on":                                              "wrong argument count",
		"forward_credentials\nforward_credentials":                            "forward_credentials is already given, at Testfile:3",
		"shadow off":                                                          "wrong argument count",
		"shadow\nshadow":                                                      "shadow is already given, at Testfile:3",
		"log_success":                                                         "wrong argument count",
		"log_success some":                                                    "log_success: expected info, all, debug or off, at Testfile:2",
		"log_success off\nlog_success off":                                    "log_success is already given, at Testfile:3",
	} {
		g, err := parseGuard("zejzl_auth {\n" + body + "\n}")
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), ", at Testfile:") {
			t.Errorf("%q: error %v, want %q (%+v)", body, err, want, g)
		}
		if err != nil && (strings.Contains(err.Error(), literalSecret) || strings.Contains(err.Error(), "foreign-secret")) {
			t.Errorf("%q: the error tells the secret: %v", body, err)
		}
	}
	if _, err := parseGuard("zejzl_auth /api"); err == nil { // the matcher is taken off before; a second argument is too much
		t.Error("an argument of the directive passes")
	}
}

func TestGlobalOptionErrors(t *testing.T) {
	for option, want := range map[string]string{
		"zejzl on":                                   "wrong argument count or unexpected line ending after 'on', at Caddyfile:2",
		"zejzl {\nunheard\n}":                        `unrecognized option "unheard", at Caddyfile:3`,
		"zejzl {\nkeys\n}":                           "keys: expected env [<prefix>] or file <path>, at Caddyfile:3",
		"zejzl {\nkeys file\n}":                      "keys: expected env [<prefix>] or file <path>, at Caddyfile:3",
		"zejzl {\nkeys file a b\n}":                  "keys: expected env [<prefix>] or file <path>",
		"zejzl {\nkeys env A_ B_\n}":                 "keys: expected env [<prefix>] or file <path>",
		"zejzl {\nkeys vault x\n}":                   "keys: expected env [<prefix>] or file <path>",
		"zejzl {\ntier a\n}":                         `tier "a": no request limit`,
		"zejzl {\ntier a 1/1m\ntier a 1/1m\n}":       `tier "a" is already given, at Caddyfile:4`,
		"zejzl {\ndefault_tier\n}":                   "wrong argument count",
		"zejzl {\ndefault_tier a\ndefault_tier a\n}": "default_tier is already given, at Caddyfile:4",
		"zejzl {\nkeys env\n}\nzejzl {\nkeys env\n}": "the zejzl option is already given, at Caddyfile:5",
	} {
		_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte("{\n"+option+"\n}\n"), map[string]any{"filename": "Caddyfile"})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want %q", option, err, want)
		}
	}
}

// An error in a site names its file and line too.
func TestDirectiveErrorThroughCaddy(t *testing.T) {
	_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt(
		[]byte("http://localhost {\n\tzejzl_auth {\n\t\tkey short\n\t}\n}\n"), map[string]any{"filename": "Caddyfile"})
	if err == nil || !strings.Contains(err.Error(), "Caddyfile:3") {
		t.Errorf("error %v", err)
	}
}

// checkNoLiteral holds for every configuration that the adapter accepts.
func checkNoLiteral(t *testing.T, g *Guard) {
	t.Helper()
	for _, k := range g.Keys {
		switch {
		case strings.HasPrefix(k.Secret, "sha256:"):
			if _, err := key.ParseDigest(k.Secret); err != nil {
				t.Errorf("a hash that is none: %q", k.Secret)
			}
		case !strings.HasPrefix(k.Secret, "{") || !strings.HasSuffix(k.Secret, "}"):
			t.Errorf("a literal secret: %q", k.Secret)
		}
	}
	keys, err := json.Marshal(g.Keys)
	if err != nil {
		t.Fatal(err)
	}
	if scrub(string(keys)) != string(keys) {
		t.Errorf("a secret in %s", keys)
	}
}

func FuzzCaddyfile(f *testing.F) {
	files, _ := filepath.Glob("testdata/adapt/*.caddyfiletest")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		config, _, _ := strings.Cut(string(text), "----------\n")
		if _, after, ok := strings.Cut(config, "\tzejzl_auth {"); ok {
			f.Add("zejzl_auth {" + strings.TrimSuffix(strings.TrimSpace(after), "}"))
		}
	}
	f.Add("zejzl_auth {\nkey " + literalSecret + " pro x\nkey {" + literalSecret + "}\n}")
	f.Add("zejzl_auth {\nkey {env.X} " + literalSecret + " " + literalSecret + "\n}")
	f.Add("zejzl_auth {\nheaders {\n-X-XSS-Protection\nX {a}{b\n}\ntier a 1/1d {\nconcurrent 1\n}\n}")
	f.Add("zejzl {\nkeys env\nkeys file x\ntier a 1/1m\n}")
	f.Fuzz(func(t *testing.T, text string) {
		if g, err := parseGuard(text); err == nil {
			checkNoLiteral(t, g)
			if _, err := json.Marshal(g); err != nil {
				t.Error(err)
			}
		}
		a := new(App)
		if err := a.UnmarshalCaddyfile(caddyfile.NewTestDispenser(text)); err == nil {
			for name, tier := range a.Tiers { // what the adapter accepts can be provisioned
				if _, err := newTier(name, tier); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

// The design's example is not only read: it can be run.
func TestDesignExampleProvisions(t *testing.T) {
	text, err := os.ReadFile("testdata/adapt/design.caddyfiletest")
	if err != nil {
		t.Fatal(err)
	}
	_, adapted, _ := strings.Cut(string(text), "----------\n")
	var config struct {
		Apps struct {
			Zejzl json.RawMessage
			HTTP  struct {
				Servers map[string]struct {
					Routes []struct {
						Handle []struct {
							Routes []struct{ Handle []json.RawMessage }
						}
					}
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(adapted), &config); err != nil {
		t.Fatal(err)
	}
	t.Chdir(filepath.Dir(writeKeyFile(t, keysJSON(key.Generate()))))
	t.Setenv("PROD_KEY", literalSecret)
	handlers := config.Apps.HTTP.Servers["srv0"].Routes[0].Handle[0].Routes[0].Handle
	if _, err := provisionConfig(t, siteConfig(`{"listen": ["127.0.0.1:0"], "routes": [{"handle": [`+string(handlers[0])+`]}]}`,
		string(config.Apps.Zejzl))); err != nil {
		t.Error(err)
	}
	_ = os.Unsetenv("PROD_KEY")
	_, err = provisionConfig(t, siteConfig(`{"listen": ["127.0.0.1:0"], "routes": [{"handle": [`+string(handlers[0])+`]}]}`,
		string(config.Apps.Zejzl)))
	mustNotTell(t, err, nil, "keys[1]: secret: ", "PROD_KEY")
}
