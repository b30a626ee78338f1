package zejzlauth

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"pgregory.net/rapid"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

// TestAsCaddy is no test: runCaddy starts this binary again with it, to be Caddy.
func TestAsCaddy(t *testing.T) {
	args := os.Getenv("TEST_AS_CADDY")
	if args == "" {
		t.Skip("run by other tests")
	}
	os.Args = append([]string{"caddy"}, strings.Split(args, "\n")...)
	caddycmd.Main()
	os.Exit(0)
}

// runCaddy runs a command of Caddy in a process of its own.
func runCaddy(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestAsCaddy$")
	cmd.Env = append(os.Environ(), "TEST_AS_CADDY="+strings.Join(args, "\n"))
	cmd.Stdin = strings.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errOut.String()
}

var generateNames = []string{
	"", "Production", "CI runner", `a "quoted" name`, `back\slash`, `ends in \`, `\"`, `two \\`, "it's", "a `tick` and \"quotes\"", "tab\there",
	"a:b # c; $HOME $(id) &|<>*?~!", "<<EOF", "żółw 🐢",
}

func TestGenerate(t *testing.T) {
	for _, name := range generateNames {
		var out bytes.Buffer
		if err := generate(&out, "pro", name, true); err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		var made generatedKey
		if err := json.Unmarshal(out.Bytes(), &made); err != nil {
			t.Fatal(err)
		}
		checkGenerated(t, made, name)

		out.Reset()
		if err := generate(&out, "pro", name, false); err != nil {
			t.Fatal(err)
		}
		checkGenerated(t, parseGenerated(t, out.String()), name)
	}
}

// parseGenerated reads what generate prints for people.
func parseGenerated(t *testing.T, out string) generatedKey {
	t.Helper()
	parts := regexp.MustCompile(`(?m)^  (zejzl_\S+)$[^$]*^  environment  (.*)$\n^  Caddyfile    (.*)$`).FindStringSubmatch(out)
	if parts == nil {
		t.Fatalf("generate printed %s", out)
	}
	digest := key.Sum(parts[1])
	return generatedKey{Secret: parts[1], Hash: digest.String(), ID: digest.ID(), Env: parts[2], Caddyfile: parts[3]}
}

// checkGenerated takes the ready lines to where they are for.
func checkGenerated(t *testing.T, made generatedKey, name string) {
	t.Helper()
	digest := key.Sum(made.Secret)
	if !key.Shaped(made.Secret) || made.Hash != digest.String() || made.ID != digest.ID() {
		t.Errorf("generated %+v", made)
	}

	variable, _, _ := strings.Cut(made.Env, "=")
	shell := exec.Command("sh", "-c", made.Env+"; export "+variable+"; exec env")
	shell.Env = []string{"PATH=" + os.Getenv("PATH")}
	environ, err := shell.Output()
	if err != nil {
		t.Fatalf("%s: %v", made.Env, err)
	}
	keys, err := key.ParseEnv(strings.Split(strings.TrimSuffix(string(environ), "\n"), "\n"), defaultEnvPrefix)
	if err != nil || len(keys) != 1 || keys[0].Name != name || keys[0].Tier != "pro" || keys[0].Secrets[0].Digest != digest {
		t.Errorf("%s: read as %+v, %v", made.Env, keys, err)
	}

	var config struct {
		Apps struct {
			HTTP struct {
				Servers map[string]struct {
					Routes []struct {
						Handle []struct {
							Keys []GuardKey `json:"keys"`
						} `json:"handle"`
					} `json:"routes"`
				} `json:"servers"`
			} `json:"http"`
		} `json:"apps"`
	}
	if err := json.Unmarshal(adapt(t, ":8080 {\n\tzejzl_auth {\n\t\t"+made.Caddyfile+"\n\t}\n}\n"), &config); err != nil {
		t.Fatal(err)
	}
	got := config.Apps.HTTP.Servers["srv0"].Routes[0].Handle[0].Keys
	if want := (GuardKey{Secret: made.Hash, Tier: "pro", Name: name}); len(got) != 1 || got[0] != want {
		t.Errorf("%s: adapted to %+v, want %+v", made.Caddyfile, got, want)
	}
}

func TestGenerateErrors(t *testing.T) {
	secret := key.Generate()
	for _, tt := range []struct{ tier, name, want string }{
		{"", "", "--tier: expected"},
		{"Pro", "", "--tier: expected"},
		{secret, "", "--tier: expected"},
		{"pro", " x", "--name: expected"},
		{"pro", "two\nlines", "--name: expected"},
		{"pro", "for " + secret, "--name: expected"},
		{"pro", "{$HOME}", "--name: expected a name without {"},
		{"pro", "{host}", "--name: expected a name without {"},
		{"pro", "`\\", "--name: expected a name without {"},
	} {
		var out bytes.Buffer
		err := generate(&out, tt.tier, tt.name, false)
		if err == nil || !strings.Contains(err.Error(), tt.want) || out.Len() > 0 || strings.Contains(err.Error(), secret) {
			t.Errorf("tier %q, name %q: error %v, want one with %q; printed %q", tt.tier, tt.name, err, tt.want, out.String())
		}
	}
}

func TestCaddyfileQuote(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringOf(rapid.OneOf(rapid.SampledFrom([]rune("\"\\`<#{}$ a")), rapid.Rune())).Filter(func(s string) bool {
			return key.ValidateName(s) == nil
		}).Draw(t, "name")
		quoted, err := caddyfileQuote(name)
		if err != nil {
			if !strings.ContainsAny(name, "{`") {
				t.Fatalf("%q: %v", name, err)
			}
			return
		}
		tokens, err := caddyfile.Tokenize([]byte("key "+quoted+"\n}"), "Caddyfile")
		if err != nil || len(tokens) != 3 || tokens[1].Text != name {
			t.Fatalf("%q: %s is %+v, %v", name, quoted, tokens, err)
		}
	})
}

func TestShellQuote(t *testing.T) {
	words := append([]string{"/srv/root.crt", "sha256:00:pro", "'", "''", `'\''`, "a\nb", "-n", "*"}, generateNames[1:]...)
	var script strings.Builder
	script.WriteString(`printf '%s\0'`)
	for _, word := range words {
		script.WriteString(" " + shellQuote(word))
	}
	out, err := exec.Command("sh", "-c", script.String()).Output()
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Join(words, "\x00") + "\x00"; string(out) != want {
		t.Errorf("the shell read %q, want %q", out, want)
	}
}

func TestHash(t *testing.T) {
	const secret = "a-foreign-secret.0123456789"
	digest := key.Sum(secret).String()
	for _, tt := range []struct {
		in   string
		want string // else an error with wantErr
		err  string
	}{
		{secret, digest, ""},
		{secret + "\n", digest, ""},
		{secret + "\r\n", digest, ""},
		{secret + "\n\n", "", "expected one line"},
		{secret + "\nsecond line", "", "expected one line"},
		{secret + "\rsecond line", "", "expected one line"},
		{"", "", "expected"},
		{"\n", "", "expected"},
		{secret[:20], "", "expected"},
		{strings.Repeat("ab", 20), "", "expected"},
		{secret + " ", "", "expected"},
		{strings.Repeat(secret, 1000), "", "expected"},
	} {
		file := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(file, []byte(tt.in), 0o600); err != nil {
			t.Fatal(err)
		}
		in, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		var prompt, out bytes.Buffer
		got, err := readSecret(in, &prompt)
		if err == nil {
			err = hashSecret(&out, got)
		}
		if prompt.Len() > 0 {
			t.Errorf("%.60q: prompted %q without a terminal", tt.in, prompt.String())
		}
		if tt.err == "" {
			if err != nil || out.String() != tt.want+"\n" {
				t.Errorf("%.60q: %s, %v, want %s", tt.in, out.String(), err, tt.want)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tt.err) || out.Len() > 0 {
			t.Errorf("%.60q: %s, error %v, want one with %q", tt.in, out.String(), err, tt.err)
		} else if trimmed := strings.TrimSpace(tt.in); trimmed != "" && strings.Contains(err.Error(), trimmed[:min(8, len(trimmed))]) {
			t.Errorf("%.60q: the error shows the input: %v", tt.in, err)
		}
	}
}

func TestHashCommand(t *testing.T) {
	secret := key.Generate()
	code, out, errOut := runCaddy(t, secret+"\n", "zejzl", "hash")
	if want := key.Sum(secret).String() + "\n"; code != 0 || out != want || strings.Contains(errOut, secret) {
		t.Errorf("exit code %d, %q, %q; want %q", code, out, errOut, want)
	}
	code, out, errOut = runCaddy(t, secret+"!\n", "zejzl", "hash")
	if code != 1 || out != "" || !strings.Contains(errOut, "expected") || strings.Contains(errOut, secret) {
		t.Errorf("not a secret: exit code %d, %q, %q", code, out, errOut)
	}
}

// Whoever puts a secret on the command line finds it in no output besides: that
// may be a build log, which lives longer than the shell's history.
func TestCommandsTellNoArgument(t *testing.T) {
	secret := key.Generate()
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"hash", secret}, 1, "expected no argument; the secret comes from standard input"},
		{[]string{"generate", secret}, 1, "expected no argument; a tier and a name are given as --tier and --name"},
		{[]string{"check"}, 1, "accepts 1 arg(s), received 0"},
		{[]string{"check", "Caddyfile", secret}, 1, "accepts 1 arg(s), received 2"},
		{[]string{"hash", "--" + secret}, 1, "expected the flags that caddy zejzl hash --help shows"},
		{[]string{"hash", "-" + secret}, 1, "expected the flags that caddy zejzl hash --help shows"},
		{[]string{"generate", "--json=" + secret}, 1, "expected the flags that caddy zejzl generate --help shows"},
		{[]string{"check", "-" + secret, "Caddyfile"}, 1, "expected the flags that caddy zejzl check --help shows"},
		{[]string{"generate", "--tier", secret}, 1, "--tier: expected"},
		{[]string{secret}, 0, ""},
	} {
		code, out, errOut := runCaddy(t, "", append([]string{"zejzl"}, tt.args...)...)
		if code != tt.code || tt.code != 0 && out != "" || !strings.Contains(errOut, tt.want) {
			t.Errorf("%.12q: exit code %d, %q, %q; want %d, %q", tt.args, code, out, errOut, tt.code, tt.want)
		}
		if strings.Contains(out+errOut, secret[len(key.Prefix):]) {
			t.Errorf("%.12q: the output holds the secret: %q, %q", tt.args, out, errOut)
		}
	}
}

func TestGenerateCommand(t *testing.T) {
	code, out, errOut := runCaddy(t, "", "zejzl", "generate", "--tier", "pro", "--name", "CI runner")
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, errOut)
	}
	made := parseGenerated(t, out)
	checkGenerated(t, made, "CI runner")
	if strings.Contains(errOut, made.Secret) {
		t.Errorf("the secret is in the log: %s", errOut)
	}
	if code, out, _ = runCaddy(t, "", "zejzl", "generate", "--tier", "No Tier"); code != 1 || out != "" {
		t.Errorf("a bad tier: exit code %d, %q", code, out)
	}
}

func TestCheckCommand(t *testing.T) {
	secret := key.Generate()
	site := ":8080 {\n zejzl_auth {\n key " + secret + " pro\n %\n }\n reverse_proxy :8000\n}\n"
	safe, literal := safeLog+strings.Replace(site, "%", "", 1), `{"apps": {"http": {"servers": {"s": {"routes": [{"handle": [{"handler": "zejzl_auth", "keys": [{"secret": "`+secret+`"}]}]}]}}}}}`
	for _, tt := range []struct {
		file, content string
		args          []string
		code          int
		out, errOut   string
	}{
		{"Caddyfile", safe, nil, 0, "no findings\n", ""},
		{"site.conf", safe, nil, 0, "no findings\n", ""},
		{"config.json", safe, nil, exitUnchecked, "", "not valid JSON"},
		{"config.json", literal, nil, exitFindings, `log "default"`, "findings: 1"},
		{"config.txt", safe, []string{"--adapter", "caddyfile"}, 0, "no findings\n", ""},
		{"config.txt", safe, []string{"--adapter", "nonesuch"}, exitUnchecked, "", "nonesuch"},
		{"Caddyfile", strings.Replace(site, "%", "", 1), nil, exitFindings, `log "default"`, "findings: 1"},
		{"Caddyfile", strings.Replace(site, "%", secret, 1), nil, exitUnchecked, "", "unrecognized subdirective"},
		{"Caddyfile", strings.Replace(site, "%", "protect", 1), nil, exitUnchecked, "", "wrong argument count"},
		{"Caddyfile", strings.Replace(site, "%", "zone a "+secret, 1), nil, exitUnchecked, "", "wrong argument count"},
		{"Caddyfile", site + "}", nil, exitUnchecked, "", "adapting config"},
	} {
		file := filepath.Join(t.TempDir(), tt.file)
		if err := os.WriteFile(file, []byte(tt.content), 0o600); err != nil {
			t.Fatal(err)
		}
		code, out, errOut := runCaddy(t, "", append([]string{"zejzl", "check", file}, tt.args...)...)
		if code != tt.code || !strings.HasPrefix(out, tt.out) || (out == "") != (tt.out == "") || !strings.Contains(errOut, tt.errOut) {
			t.Errorf("%s %q: exit code %d, %q, %q; want %d, %q, %q\n%s", tt.file, tt.args, code, out, errOut, tt.code, tt.out, tt.errOut, tt.content)
		}
		if strings.Contains(out+errOut, secret) {
			t.Errorf("%s %q: the output holds the secret: %q, %q", tt.file, tt.args, out, errOut)
		}
	}
	if code, out, _ := runCaddy(t, "", "zejzl", "check", filepath.Join(t.TempDir(), "nonesuch")); code != exitUnchecked || out != "" {
		t.Errorf("no such file: exit code %d, %q", code, out)
	}
}
