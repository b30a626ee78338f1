package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// badInput is a configuration that must not load, with the secret that no
// error may repeat.
type badInput struct {
	name   string
	guard  string // lines of the guard in a Caddyfile
	app    string // lines of the global option
	json   string // a handler in JSON, instead of a Caddyfile
	env    string // value of a variable BAD_<n>_KEY
	more   string // value of a variable BAD_<n>_MORE
	file   string // content of a key file FILE
	secret string
	wants  []string // what and where; N stands for the case's number
	parse  bool     // the adapter sees it, and names the line
}

func badInputs() []badInput {
	secret, foreign := randomSecret, foreignSecret
	var list []badInput
	add := func(b badInput) { list = append(list, b) }
	withSecret := func(make func() string, b badInput) {
		b.secret = make()
		for _, field := range []*string{&b.guard, &b.app, &b.json, &b.env, &b.more, &b.file} {
			*field = strings.NewReplacer("SECRET", b.secret, "HASH", hashOf(b.secret)).Replace(*field)
		}
		add(b)
	}
	for _, make := range []func() string{secret, foreign} {
		kind := map[bool]string{true: "own: ", false: "foreign: "}[keyShape.MatchString(make())]
		each := func(b badInput) { b.name = kind + b.name; withSecret(make, b) }

		each(badInput{name: "env without tier", env: "SECRET", wants: []string{"BAD_N_KEY", "expected"}})
		each(badInput{name: "env with unknown tier", env: "SECRET:nosuch", wants: []string{"BAD_N_KEY", "unknown tier", "enterprise, free, pro"}})
		each(badInput{name: "env in wrong order", env: "pro:SECRET", wants: []string{"BAD_N_KEY", "24 to 256 characters"}})
		each(badInput{name: "env with tier in capitals", env: "SECRET:PRO", wants: []string{"BAD_N_KEY", "expected a tier"}})
		each(badInput{name: "env with control character in name", env: "SECRET:pro:a\tb\x01", wants: []string{"BAD_N_KEY", "expected a name"}})
		each(badInput{name: "env with secret as name", env: "SECRET:pro:SECRET", wants: []string{"BAD_N_KEY"}})
		each(badInput{name: "same secret twice in env", env: "SECRET:pro", more: "SECRET:free", wants: []string{"BAD_N_KEY", "BAD_N_MORE", "tier"}})
		each(badInput{name: "same secret in env and guard", env: "SECRET:pro", guard: "key SECRET free", wants: []string{"BAD_N_KEY", "zejzl_auth key", "tier"}})
		each(badInput{
			name: "same secret in env and file", env: "SECRET:pro", file: `{"keys": [{"name": "n", "tier": "free", "secrets": [{"hash": "HASH"}]}]}`,
			wants: []string{"BAD_N_KEY", "FILE", "keys[0]"},
		})

		each(badInput{
			name: "file with a literal secret", file: "{\"keys\": [\n{\"name\": \"n\", \"tier\": \"pro\", \"secrets\": [{\"hash\": \"SECRET\"}]}]}",
			wants: []string{"FILE", "keys[0].secrets[0].hash", "line 2", "sha256:"},
		})
		each(badInput{
			name: "file with unknown field", file: `{"keys": [{"name": "n", "tier": "pro", "secret": "SECRET"}]}`,
			wants: []string{"FILE", "keys[0]", "unknown field"},
		})
		each(badInput{name: "file that ends early", file: `{"keys": [{"name": "n", "tier": "SECRET`, wants: []string{"FILE", "keys[0].tier", "line 1"}})

		each(badInput{name: "key with too many arguments", guard: "key SECRET pro CI runner", parse: true, wants: []string{"key: expected"}})
		each(badInput{name: "key in wrong order", guard: "key pro SECRET", parse: true, wants: []string{"key:", "24 to 256 characters"}})
		each(badInput{name: "key without its word", guard: "SECRET pro", parse: true, wants: []string{"unrecognized subdirective"}})
		each(badInput{name: "app key without its word", app: "SECRET pro", parse: true, wants: []string{"unrecognized option"}})
		each(badInput{name: "key misspelt", guard: "kee SECRET pro", parse: true, wants: []string{"unrecognized subdirective", "kee"}})
		each(badInput{name: "key with unknown tier", guard: "key SECRET nosuch", wants: []string{"keys[0]", "unknown tier"}})
		each(badInput{name: "secret in app keys", app: "keys SECRET pro", parse: true, wants: []string{"keys: expected"}})
		each(badInput{name: "placeholder with a bad value", env: "", more: "two words SECRET", guard: "key {env.BAD_N_MORE} pro", wants: []string{"keys[0]", "24 to 256 characters"}})

		each(badInput{name: "literal secret in JSON", json: `{"handler": "zejzl_auth", "keys": [{"secret": "SECRET"}]}`, wants: []string{"zejzl_auth", "keys[0]", "secret: expected sha256:"}})
		each(badInput{name: "string for a list in JSON", json: `{"handler": "zejzl_auth", "keys": "SECRET"}`, wants: []string{"zejzl_auth", "keys"}})
		each(badInput{name: "unknown field in JSON", json: `{"handler": "zejzl_auth", "key": "SECRET"}`, wants: []string{"zejzl_auth", `unknown field \"key\"`}})
	}
	// Only a shape can be told from a word that is quoted with good reason.
	withSecret(secret, badInput{name: "secret as zone's second argument", guard: "zone chat SECRET", parse: true, wants: []string{"wrong argument count"}})
	withSecret(secret, badInput{name: "secret as default tier", guard: "default_tier SECRET", wants: []string{"default_tier"}})
	withSecret(secret, badInput{name: "secret as limit", guard: "tier x SECRET/1m", parse: true, wants: []string{"expected <N>/<window>"}})
	withSecret(secret, badInput{name: "secret as origin", guard: "cors SECRET", wants: []string{"cors"}})

	secretless := []badInput{
		{name: "unset placeholder", guard: "key {env.BAD_NOSUCH} pro", wants: []string{"keys[0]", "env.BAD_NOSUCH"}},
		{name: "no key file", app: "keys file DIR/nosuch.json", wants: []string{"nosuch.json"}},
		{name: "file with unknown tier", file: keyFileJSON(fileKey{name: "n", tier: "nosuch", secret: secret()}), wants: []string{"FILE", "keys[0]", "unknown tier"}},
		{
			name: "file with a bad time", file: `{"keys": [{"name": "n", "tier": "pro", "secrets": [{"hash": "` + hashOf(secret()) + `"}], "expires_at": "tomorrow"}]}`,
			wants: []string{"FILE", "keys[0].expires_at", "RFC 3339"},
		},
		{name: "unknown tier", guard: "default_tier nosuch", wants: []string{"default_tier", "nosuch", "enterprise, free, pro"}},
		{name: "limit without a window", app: "tier x 10", parse: true, wants: []string{`limit \"10\"`, "expected <N>/<window>"}},
		{name: "window of no time", guard: "tier x 10/0s", parse: true, wants: []string{`tier \"x\"`}},
		{name: "unknown dialect", guard: "errors xml", parse: true, wants: []string{"errors: expected auto"}},
		{name: "unknown subdirective", guard: "nosuch", parse: true, wants: []string{"unrecognized subdirective", "nosuch"}},
		{name: "subdirective twice", guard: "shadow\n\t\tshadow", parse: true, wants: []string{"shadow is already given"}},
		{name: "unknown source", app: "keys redis x", parse: true, wants: []string{"keys: expected env"}},
	}
	return append(list, secretless...)
}

// caddyfile puts the case into a Caddyfile that is good otherwise.
func (b *badInput) caddyfile(t testing.TB, n int, file string, port int) string {
	app := fmt.Sprintf("keys env BAD_%d_\n\t\t%s", n, b.app)
	if b.guardEnvOnly() {
		app = b.app
	}
	if b.file != "" {
		app += "\n\t\tkeys file " + file
	}
	return globalBlock(t, "\tzejzl {\n\t\t"+app+"\n\t}") + fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	zejzl_auth {
		%s
	}
	respond ok
}`, port, strings.ReplaceAll(b.guard, "BAD_N_", fmt.Sprintf("BAD_%d_", n)))
}

// guardEnvOnly: the variable is for a placeholder, not for a source of keys.
func (b *badInput) guardEnvOnly() bool { return b.env == "" && b.more != "" }

// caddyCommand runs the binary to its end in a home of its own.
func caddyCommand(t testing.TB, dir string, env []string, args ...string) (output string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Dir = dir
	cmd.Env = append([]string{
		"HOME=" + dir, "XDG_DATA_HOME=" + dir + "/data", "XDG_CONFIG_HOME=" + dir + "/config",
		"PATH=" + os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0",
	}, env...)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		t.Fatalf("caddy %s did not end: %s", args[0], out)
	}
	if _, failed := err.(*exec.ExitError); err != nil && !failed { //nolint:errorlint // as exec returns it
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// atLine is where a Caddyfile error is said to be.
var atLine = regexp.MustCompile(`Caddyfile:\d+`)

func (b *badInput) check(t *testing.T, where, output string, n int, file string) {
	t.Helper()
	wants := b.wants
	if b.parse && where != "POST /load of JSON" {
		if !atLine.MatchString(output) {
			t.Errorf("%s: no Caddyfile:<line> in %s", where, output)
		}
	}
	for _, want := range wants {
		want = strings.NewReplacer("_N_", fmt.Sprintf("_%d_", n), "FILE", file).Replace(want)
		// Commands print an error as it is, or in a JSON log line, as the admin endpoint does.
		if !strings.Contains(output, want) && !strings.Contains(output, strings.ReplaceAll(want, `\"`, `"`)) {
			t.Errorf("%s: the error does not say %q: %s", where, want, output)
		}
	}
	if b.secret != "" && strings.Contains(output, b.secret[8:28]) {
		t.Errorf("%s: the error repeats the secret: %s", where, output)
	}
}

func TestBadInputIsNamedAndKeepsItsSecret(t *testing.T) {
	inputs := badInputs()
	dir := t.TempDir()
	var env []string
	for n, b := range inputs {
		if b.env != "" {
			env = append(env, fmt.Sprintf("BAD_%d_KEY=%s", n, b.env))
		}
		if b.more != "" {
			env = append(env, fmt.Sprintf("BAD_%d_MORE=%s", n, b.more))
		}
	}
	secret, port := randomSecret(), freePort(t)
	good := globalBlock(t, "") + fmt.Sprintf("http://127.0.0.1:%d {\n\tbind 127.0.0.1\n\tzejzl_auth\n\trespond ok\n}\n", port)
	s := start(t, good, append(env, "ZEJZL_API_KEY_GOOD="+secret+":enterprise")...)
	client := loadClient(t)

	for n, b := range inputs {
		t.Run(b.name, func(t *testing.T) {
			file := filepath.Join(dir, fmt.Sprintf("keys-%d.json", n))
			if err := os.WriteFile(file, []byte(b.file), 0o600); err != nil {
				t.Fatal(err)
			}
			logged := len(s.log.String())
			config, mediaType, adapter := s.fill(b.caddyfile(t, n, file, port)), "text/caddyfile", "caddyfile"
			name := filepath.Join(dir, "Caddyfile")
			if b.json != "" {
				config = fmt.Sprintf(`{"admin": {"listen": %q}, "apps": {"http": {"servers": {"a": {"listen": ["127.0.0.1:%d"], "routes": [{"handle": [%s]}]}}}}}`,
					s.admin, port, b.json)
				mediaType, adapter = "application/json", ""
				name = filepath.Join(dir, "caddy.json")
			}
			resp, err := http.Post("http://"+s.admin+"/load", mediaType, strings.NewReader(config))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var answer struct{ Error string }
			if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || resp.StatusCode != http.StatusBadRequest {
				_, _ = s.reload(good)
				t.Fatalf("POST /load: status %d, %v, want 400 with JSON", resp.StatusCode, err)
			}
			b.check(t, "POST /load", answer.Error, n, file)
			if b.secret != "" && strings.Contains(s.log.String()[logged:], b.secret[8:28]) {
				t.Errorf("the server's log repeats the secret: %s", s.log.String()[logged:])
			}
			if got := mustFetch(t, client, fmt.Sprintf("http://127.0.0.1:%d/", port), secret); got.status != http.StatusOK {
				t.Errorf("status %d from the old configuration", got.status)
			}

			if err := os.WriteFile(name, []byte(config), 0o600); err != nil {
				t.Fatal(err)
			}
			commands := []string{"validate", "run"}
			if b.parse { // both ways begin with the adapter
				commands = []string{"validate", "adapt"}
			}
			for _, command := range commands {
				args := []string{command, "--config", name}
				if adapter != "" {
					args = append(args, "--adapter", adapter)
				}
				output, code := caddyCommand(t, dir, env, args...)
				if code == 0 {
					t.Errorf("caddy %s: no error", command)
				}
				b.check(t, "caddy "+command, output, n, file)
			}
		})
	}
}

func TestValidateOnlyReads(t *testing.T) {
	secret, fileSecret := randomSecret(), randomSecret()
	config := func(sources string) string {
		// Without TLS of any kind: Caddy itself makes its authority while it validates.
		return fmt.Sprintf("{\n\tadmin 127.0.0.1:%d\n\tauto_https off\n%s\n}\n", freePort(t), sources) +
			fmt.Sprintf("http://127.0.0.1:%d {\n\tbind 127.0.0.1\n\tzejzl_auth\n\trespond ok\n}\n", freePort(t))
	}
	tests := []struct {
		name, caddyfile string
		env             []string
	}{
		{"keys of environment and file", config("\tzejzl {\n\t\tkeys env\n\t\tkeys file keys.json\n\t}"), []string{"ZEJZL_API_KEY_A=" + secret + ":pro"}},
		// The key of development mode is made by a start, not by a look.
		{"development without a key", config(""), []string{"ENVIRONMENT=development"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, content := range map[string]string{
				"Caddyfile": tt.caddyfile, "keys.json": keyFileJSON(fileKey{name: "f", tier: "pro", secret: fileSecret}),
			} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			output, code := caddyCommand(t, dir, tt.env, "validate", "--config", "Caddyfile")
			if code != 0 || !strings.Contains(output, "Valid configuration") {
				t.Fatalf("caddy validate: exit status %d: %s", code, output)
			}
			if strings.Contains(output, "zejzl_auth: development mode") || keyShape.MatchString(output) || strings.Contains(output, "curl") {
				t.Errorf("caddy validate prints a key: %s", output)
			}
			err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
				if err == nil && path != dir && d.Name() != "Caddyfile" && d.Name() != "keys.json" {
					t.Errorf("caddy validate created %s", path)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}
