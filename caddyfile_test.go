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
		"unheard":                            `unrecognized subdirective "unheard", expected protect, public, key, tier, default_tier, zone, cors, headers, errors, forward_credentials, log_success or shadow, at Testfile:2`,
		"protect":                            `wrong argument count, expected: protect <paths...>, at Testfile:2`,
		"public":                             `wrong argument count, expected: public <paths...>, at Testfile:2`,
		"public status":                      `path "status": expected an exact path such as /api/status, or one ending in /*, in plain spelling, at Testfile:2`,
		"protect /api/* /a/../b":             `path "/a/../b": expected`,
		"protect /a\nprotect /b":             "protect is already given, at Testfile:3",
		"public /a\npublic /b":               "public is already given, at Testfile:3",
		"key":                                "key: expected <secret> [<tier> [<name>]]; a name with spaces needs quotes, at Testfile:2",
		"key a pro CI runner":                "key: expected <secret> [<tier> [<name>]]; a name with spaces needs quotes, at Testfile:2",
		"key short":                          `key: expected a secret of 24 to 256 characters, as its sha256: hash if it reads like a tier; is a {$VARIABLE} empty?, at Testfile:2`,
		"key AAAAAAAAAAAAAAAAAAAAAAAAAAAAAA": `key: the secret is too easy to guess`,
		"key sha256:abc":                     `key: expected "sha256:" and 64 hex digits, at Testfile:2`,
		"key {env.K} Pro":                    "key: expected a tier of 1 to 32 characters from a-z 0-9 _ -, at Testfile:2",
		"key {env.K} pro " + literalSecret:   "key: expected a name that contains no secret, at Testfile:2",
		"key {env.K} pro \" x\"":             "key: expected a name without spaces around it, at Testfile:2",
		"key foreign-secret.0123456789/abc pro foreign-secret.0123456789/abc": "key: expected a name that does not contain the secret",
		"key {" + literalSecret + "}":                                         "key: expected a secret of 24 to 256 characters",
		"key {env.A}{env.B}":                                                  "key: expected a secret of 24 to 256 characters",
		"tier":                                                                "tier: expected <name> [<N>/<window>], such as: tier team 300/1m, at Testfile:2",
		"tier a 1/1m 2/1h":                                                    "tier: expected <name> [<N>/<window>], such as: tier team 300/1m, at Testfile:2",
		"tier Team 1/1m":                                                      `tier: expected a tier of 1 to 32 characters from a-z 0-9 _ -, at Testfile:2`,
		"tier a":                                                              `tier "a": no request limit: want at least one, such as 100 in 1m, at Testfile:2`,
		"tier a 1/1m\ntier a 2/1m":                                            `tier "a" is already given, at Testfile:3`,
		"tier a 1":                                                            `limit "1": expected <N>/<window>, such as 100/1m, at Testfile:2`,
		"tier a x/1m":                                                         `limit "x/1m": expected <N>/<window>, such as 100/1m, at Testfile:2`,
		"tier a 1/fortnight":                                                  `limit "1/fortnight": expected <N>/<window>, such as 100/1m, at Testfile:2`,
		"tier a 0/1m":                                                         `tier "a": 0 requests in 1m0s: want 1 to`,
		"tier a 1/1ms":                                                        `tier "a": 1 requests in 1ms: want a window of whole seconds`,
		"tier a 1/1m {\nrequests\n}":                                          `wrong argument count, expected: requests <N>/<window> ..., at Testfile:3`,
		"tier a 1/1m {\nrequests 2/60s\n}":                                    `tier "a": window 1m0s is limited twice`,
		"tier a 1/1m {\nconcurrent\n}":                                        `wrong argument count, expected: concurrent <N>, at Testfile:3`,
		"tier a 1/1m {\nconcurrent 0\n}":                                      `concurrent "0": expected a whole number from 1, at Testfile:3`,
		"tier a 1/1m {\nconcurrent x\n}":                                      `concurrent "x": expected a whole number from 1, at Testfile:3`,
		"tier a 1/1m {\nconcurrent 1 2\n}":                                    `wrong argument count, expected: concurrent <N>, at Testfile:3`,
		"tier a 1/1m {\nconcurrent 1\nconcurrent 2\n}":                        "concurrent is already given, at Testfile:4",
		"tier a 1/1m {\nunheard\n}":                                           `unrecognized subdirective "unheard" of tier, expected requests or concurrent, at Testfile:3`,
		"default_tier":                                                        `wrong argument count, expected: default_tier <name>, at Testfile:2`,
		"default_tier Pro":                                                    `default_tier: expected a tier of 1 to 32 characters from a-z 0-9 _ -, at Testfile:2`,
		"headers {\n+X-A a\n}":                                                `headers: "+x-A": expected a plain name, whose value replaces others, at Testfile:3`,
		"headers {\n?X-A a\n}":                                                `headers: "?X-A": expected a plain name`,
		"headers {\n>X-A a\n}":                                                `headers: ">X-A": expected a plain name`,
		"default_tier a b":                                                    `wrong argument count, expected: default_tier <name>, at Testfile:2`,
		"default_tier a\ndefault_tier b":                                      "default_tier is already given, at Testfile:3",
		"zone":                                                                `wrong argument count, expected: zone <name>`,
		"zone a b":                                                            `wrong argument count, expected: zone <name>`,
		"zone a\nzone a":                                                      "zone is already given, at Testfile:3",
		"cors":                                                                "cors: expected origins such as https://app.example.com, or: cors backend, at Testfile:2",
		"cors *":                                                              "cors origins: entry 1",
		"cors https://a.example/":                                             "cors origins: entry 1",
		"cors https://a.example\ncors backend":                                "cors is already given, at Testfile:3",
		"cors {\ndev_origins\n}":                                              `wrong argument count, expected: dev_origins <origins...>`,
		"cors {\ndev_origins http://LOCALHOST\n}":                             "cors dev_origins: entry 1",
		"cors https://a.example {\nmethods\n}":                                `wrong argument count, expected: methods <methods...>`,
		"cors https://a.example {\nmethods get,post\n}":                       "cors methods",
		"cors https://a.example {\nheaders\n}":                                `wrong argument count, expected: headers <names...>`,
		"cors https://a.example {\nheaders X:\n}":                             "cors headers",
		"cors https://a.example {\nexpose\n}":                                 `wrong argument count, expected: expose <names...>`,
		"cors {env.ORIGINS} {\nexpose X:\n}":                                  "cors expose",
		"cors https://a.example {\nmax_age\n}":                                `wrong argument count, expected: max_age <duration>`,
		"cors https://a.example {\nmax_age soon\n}":                           `max_age "soon": expected a duration, such as 10m, at Testfile:3`,
		"cors https://a.example {\nmax_age 48h\n}":                            "cors max_age: expected 1s to 24h",
		"cors https://a.example {\ncredentials on\n}":                         `wrong argument count, expected: credentials without arguments`,
		"cors https://a.example {\nunheard\n}":                                `unrecognized subdirective "unheard" of cors, expected dev_origins, methods, headers, expose, max_age or credentials, at Testfile:3`,
		"cors https://a.example {\nmax_age 1h\nmax_age 2h\n}":                 "max_age is already given, at Testfile:4",
		"cors backend {\ncredentials\n}":                                      "cors backend: expected no other cors setting beside it",
		"headers x":                                                           `wrong argument count, expected: headers without arguments`,
		"headers {\nX-A\n}":                                                   `wrong argument count, expected: <name> <value>, or -<name> to leave it out, at Testfile:3`,
		"headers {\nX-A a b\n}":                                               `wrong argument count, expected: <name> <value>, or -<name> to leave it out, at Testfile:3`,
		"headers {\n-X-Frame-Options x\n}":                                    `wrong argument count, expected: -X-Frame-Options without arguments, at Testfile:3`,
		"headers {\n-X-Unknown\n}":                                            "headers: -X-Unknown: expected one of the guard's security headers, at Testfile:3",
		"headers {\nX-A a\nx-a b\n}":                                          "x-a is already given, at Testfile:4",
		"headers {\nX-Frame-Options a\n-x-frame-options\n}":                   "x-frame-options is already given, at Testfile:4",
		"headers {\nRetry-After 1\n}":                                         "headers: Retry-After is set by the guard or the server and can't be changed here, at Testfile:3",
		"headers {\nX: a\n}":                                                  `headers: "X:": expected a header name, at Testfile:3`,
		"errors":                                                              `wrong argument count, expected: errors <dialect>`,
		"errors json":                                                         "errors: expected auto, zejzl, openai, anthropic, gemini, problem or caddy, at Testfile:2",
		"errors auto openai":                                                  `wrong argument count, expected: errors <dialect>`,
		"errors auto\nerrors auto":                                            "errors is already given, at Testfile:3",
		"forward_credentials on":                                              `wrong argument count, expected: forward_credentials without arguments, at Testfile:2`,
		"forward_credentials\nforward_credentials":                            "forward_credentials is already given, at Testfile:3",
		"shadow off":                                                          `wrong argument count, expected: shadow without arguments, at Testfile:2`,
		"shadow\nshadow":                                                      "shadow is already given, at Testfile:3",
		"log_success":                                                         `wrong argument count, expected: log_success <level>`,
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
	// The matcher is taken off before; a second argument is too much.
	if _, err := parseGuard("zejzl_auth /api"); err == nil ||
		err.Error() != "wrong argument count, expected: zejzl_auth [<matcher>] without further arguments, at Testfile:1" {
		t.Errorf("an argument of the directive: error %v", err)
	}
}

// A secret in a wrong place is in no error, whoever made it.
func TestCaddyfileErrorsTellNoSecret(t *testing.T) {
	const hexSecret = "5eebe51f0a1b2c3d4e5f60718293a4b5" // would be a tier's name too
	for _, secret := range []string{literalSecret, "foreign-secret.0123456789/abc==", hexSecret, "Sec:" + hexSecret} {
		for _, text := range []string{
			"zejzl_auth %", "zejzl %", "zejzl_auth {\n%\n}", "zejzl_auth {\n% pro\n}", "zejzl {\n%\n}", "zejzl {\ndefault_tier % %\n}",
			"zejzl_auth {\nprotect %\n}", "zejzl_auth {\npublic /a %\n}", "zejzl_auth {\nkey a %\n}", "zejzl_auth {\nkey % pro CI runner\n}",
			"zejzl_auth {\nkey {env.K} PRO %\n}", "zejzl_auth {\nkey %! pro\n}", "zejzl_auth {\nkey % pro %\n}",
			"zejzl_auth {\ntier %\n}", "zejzl_auth {\ntier % pro\n}", "zejzl_auth {\ntier % 0/1m\n}", "zejzl_auth {\ntier a %\n}",
			"zejzl_auth {\ntier % 1/1m\ntier % 1/1m\n}", "zejzl_auth {\ntier a 1/%\n}", "zejzl_auth {\ntier a 1/1m {\n%\n}\n}",
			"zejzl_auth {\ntier a 1/1m {\nconcurrent %\n}\n}", "zejzl_auth {\ntier a {\nrequests %/1m\n}\n}",
			"zejzl_auth {\ntier a 1/1m {\nconcurrent 1 %\n}\n}",
			"zejzl_auth {\ndefault_tier a %\n}", "zejzl_auth {\nzone a %\n}", "zejzl_auth {\nerrors %\n}", "zejzl_auth {\nerrors auto %\n}",
			"zejzl_auth {\ncors %\n}", "zejzl_auth {\ncors {\n%\n}\n}", "zejzl_auth {\ncors https://a.example {\nmax_age %\n}\n}",
			"zejzl_auth {\ncors https://a.example {\ncredentials %\n}\n}", "zejzl_auth {\ncors https://a.example {\nmax_age 1h %\n}\n}",
			"zejzl_auth {\nheaders %\n}", "zejzl_auth {\nheaders {\n%\n}\n}", "zejzl_auth {\nheaders {\n-%\n}\n}", "zejzl_auth {\nheaders {\n+% x\n}\n}",
			"zejzl_auth {\nheaders {\n%: x\n}\n}", "zejzl_auth {\nheaders {\n% x\n% y\n}\n}", "zejzl_auth {\nheaders {\nX-A b %\n}\n}",
			"zejzl_auth {\nshadow %\n}", "zejzl_auth {\nforward_credentials %\n}", "zejzl_auth {\nlog_success %\n}", "zejzl_auth {\nlog_success all %\n}",
			"zejzl {\nkeys %\n}", "zejzl {\nkeys env A_ %\n}", "zejzl {\ntier %\n}",
		} {
			d := caddyfile.NewTestDispenser(strings.ReplaceAll(text, "%", secret))
			var err error
			if strings.HasPrefix(text, "zejzl_auth") {
				err = new(Guard).UnmarshalCaddyfile(d)
			} else {
				err = new(App).UnmarshalCaddyfile(d)
			}
			if err == nil || !strings.Contains(err.Error(), "xpected") && !strings.Contains(err.Error(), "already given") &&
				!strings.Contains(err.Error(), ": want ") || !strings.Contains(err.Error(), ", at Testfile:") {
				t.Errorf("%q: error %v does not say what was expected where", text, err)
				continue
			}
			folded := strings.ToLower(err.Error())
			if strings.Contains(folded, strings.ToLower(secret[:12])) || strings.Contains(folded, strings.ToLower(secret[len(secret)-12:])) {
				t.Errorf("%q with %q: the error tells the secret: %v", text, secret, err)
			}
		}
	}
}

// `key {$UNSET} <tier>` reads as `key <tier>`, of which no secret must be made
// that anybody can guess.
func TestKeyOfAnEmptyVariable(t *testing.T) {
	for args, want := range map[string]bool{ // true: a key
		"pro":                            false,
		"enterprise-production-europe-1": false,
		"enterprise-production-europe-1 production":        false,
		"enterprise_production_eu_2030":                    false,
		"enterpriseproductioneuropean":                     false,
		"team-2030-01-31-production":                       false,
		"0123456789abcdef01234567":                         true, // 24 hex digits
		"9f86d081884c7d659a2feaa0c55ad015":                 true, // 32
		"9f86d081884c7d659a2feaa0c55ad015 pro":             true,
		"x0mq7f2v9k3w8z5r1t6y4p2n":                         true, // base 36
		"sk-9f86d081884c7d659a2feaa0":                      true,
		"sk_live_9f86d081884c7d659a2feaa0 pro":             true,
		"9f86d081-884c-7d65-9a2f-eaa0c55ad015":             true, // a UUID is longer than a tier's name
		"Enterprise-Production-Europe-1":                   true,
		"sha256:" + strings.Repeat("0f", 32) + " pro":      true,
		"{env.PROD_KEY} enterprise":                        true,
		"enterprise-production-europe-1 pro \"CI runner\"": true, // all three are there
	} {
		g, err := parseGuard("zejzl_auth {\nkey " + args + "\n}")
		switch {
		case want && err != nil:
			t.Errorf("%s: %v", args, err)
		case !want && (err == nil || !strings.Contains(err.Error(), "key: expected a secret of 24 to 256 characters") ||
			!strings.Contains(err.Error(), "is a {$VARIABLE} empty?, at Testfile:2")):
			t.Errorf("%s: error %v (%+v)", args, err, g.Keys)
		}
	}
	t.Setenv("ZEJZL_TEST_EMPTY", "")
	_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt(
		[]byte("http://localhost {\n\tzejzl_auth {\n\t\tkey {$ZEJZL_TEST_EMPTY} enterprise-production-europe-1\n\t}\n}\n"),
		map[string]any{"filename": "Caddyfile"})
	if err == nil || !strings.Contains(err.Error(), "is a {$VARIABLE} empty?, at Caddyfile:3") {
		t.Errorf("error %v", err)
	}
}

func TestGlobalOptionErrors(t *testing.T) {
	for option, want := range map[string]string{
		"zejzl on":                                   "wrong argument count, expected: zejzl without arguments, at Caddyfile:2",
		"zejzl {\ndefault_tier Pro\n}":               "default_tier: expected a tier of 1 to 32 characters",
		"zejzl {\nunheard\n}":                        `unrecognized option "unheard", expected keys, tier or default_tier, at Caddyfile:3`,
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
