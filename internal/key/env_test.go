package key

import (
	"slices"
	"strings"
	"testing"
)

func TestParseEnv(t *testing.T) {
	environ := []string{
		"ZEJZL_API_KEY_2=" + otherSecret + ":pro:  Zoë: the second  ",
		"PATH=/bin",
		"ZEJZL_API_KEY_10=" + Sum("x").String() + ":enterprise",
		"ZEJZL_API_KEY_1=" + canary + ":free:CI runner",
		"zejzl_api_key_1=no",
		"ZEJZL_API_KEY_=" + strings.ToUpper(otherSecret) + ":a-b_1:",
	}
	before := slices.Clone(environ)
	got, err := ParseEnv(environ, "ZEJZL_API_KEY_")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(environ, before) {
		t.Error("the argument was changed")
	}
	want := []struct {
		variable, name, tier string
		digest               Digest
	}{
		{"ZEJZL_API_KEY_", "", "a-b_1", Sum(strings.ToUpper(otherSecret))},
		{"ZEJZL_API_KEY_1", "CI runner", "free", Sum(canary)},
		{"ZEJZL_API_KEY_10", "", "enterprise", Sum("x")},
		{"ZEJZL_API_KEY_2", "Zoë: the second", "pro", Sum(otherSecret)},
	}
	if len(got) != len(want) {
		t.Fatalf("%d keys, want %d", len(got), len(want))
	}
	for i, w := range want {
		g := got[i]
		if g.Place.String() != "environment variable "+w.variable || g.ID != "" || g.Name != w.name || g.Tier != w.tier ||
			len(g.Secrets) != 1 || g.Secrets[0].Digest != w.digest || !g.Secrets[0].NotAfter.IsZero() {
			t.Errorf("key %d: got %+v, want %+v", i, g, w)
		}
	}
}

func TestParseEnvNothing(t *testing.T) {
	if got, err := ParseEnv([]string{"A=b"}, "ZEJZL_API_KEY_"); len(got) != 0 || err != nil {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestParseSecret(t *testing.T) {
	for _, s := range []string{canary, Sum(canary).String(), "sha256:" + strings.ToUpper(Sum(canary).String()[7:])} {
		if d, err := ParseSecret(s); err != nil || d != Sum(canary) {
			t.Errorf("%v, %v", d, err)
		}
	}
	for s, want := range map[string]string{
		"": "expected a secret", canary[:20]: "expected a secret", "sha256:": "64 hex digits", "sha256:" + canary: "64 hex digits",
		strings.Repeat("k", 40): "different characters", Sum(canary).String()[:70]: "64 hex digits",
	} {
		_, err := ParseSecret(s)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", s, err, want)
			continue
		}
		checkMessage(t, s, err)
	}
}

var badLines = map[string]string{
	"":                                     "<secret or sha256:hex>",
	canary:                                 "<secret or sha256:hex>",
	Sum(canary).String():                   "<secret or sha256:hex>",
	"sha256:":                              "<secret or sha256:hex>",
	canary + ":":                           "expected a tier",
	canary + "::name":                      "expected a tier",
	canary + ":Pro":                        "expected a tier",
	canary + ": pro":                       "expected a tier",
	canary + ":pro\n":                      "expected a tier",
	" " + canary + ":pro":                  "expected a secret",
	":pro:" + canary:                       "expected a secret",
	"pro:" + canary:                        "expected a secret",
	canary[:20] + ":pro:" + canary:         "expected a secret",
	canary + "!:pro":                       "expected a secret",
	canary + ":pro:" + canary:              "do not contain the secret",
	otherSecret + ":pro:my " + otherSecret: "do not contain the secret",
	Sum("a").String() + ":pro:" + canary:   "contains no secret",
	Sum("a").String() + ":" + canary:       "expected a tier",
	canary + ":pro:a\nb":                   "control characters",
	canary + ":pro:\xff":                   "control characters",
	"sha256:" + canary + ":pro":            "64 hex digits",
	"SHA256:" + canary + ":pro":            "expected a secret",
	strings.Repeat("k", 40) + ":pro":       "different characters",
}

func TestParseEnvErrors(t *testing.T) {
	var all []string
	for line, want := range badLines {
		all = append(all, "K_"+string(rune('a'+len(all)))+"="+line)
		got, err := ParseEnv([]string{"K_1=" + line}, "K_")
		if err == nil || got != nil {
			t.Errorf("%q was accepted", line)
			continue
		}
		checkMessage(t, line, err)
		if msg := err.Error(); !strings.HasPrefix(msg, "environment variable K_1: ") || !strings.Contains(msg, want) {
			t.Errorf("%q: got %q, want %q", line, msg, want)
		}
	}
	_, err := ParseEnv(append(all, "K_good="+canary+":pro"), "K_")
	if err == nil {
		t.Fatal("bad lines were accepted")
	}
	if n := len(strings.Split(err.Error(), "\n")); n != len(badLines) {
		t.Errorf("%d errors for %d bad variables:\n%v", n, len(badLines), err)
	}
}

// checkMessage fails if the error shows a secret of the input, or most of one.
func checkMessage(t *testing.T, input string, err error) {
	t.Helper()
	for _, s := range []string{canary, otherSecret, strings.TrimPrefix(Sum(canary).String(), "sha256:")} {
		for _, part := range []string{s[:16], s[len(s)-16:]} {
			if strings.Contains(err.Error(), part) {
				t.Errorf("%q: the error shows it: %v", input, err)
			}
		}
	}
}

func FuzzEnvLine(f *testing.F) {
	for line := range badLines {
		f.Add(line)
	}
	f.Add(canary + ":pro:CI runner")
	f.Add(Sum(canary).String() + ":free")
	f.Fuzz(func(t *testing.T, line string) {
		keys, err := ParseEnv([]string{"K_1=" + line}, "K_")
		if err != nil {
			checkMessage(t, line, err)
			if keys != nil || !strings.HasPrefix(err.Error(), "environment variable K_1: expected ") &&
				!strings.HasPrefix(err.Error(), "environment variable K_1: the secret is too easy") {
				t.Errorf("%q: %v, %v", line, keys, err)
			}
			return
		}
		k := keys[0]
		if len(keys) != 1 || len(k.Secrets) != 1 || ValidateTierName(k.Tier) != nil || k.Name != "" && ValidateName(k.Name) != nil {
			t.Fatalf("%q: %+v", line, keys)
		}
		// The digest says the same as the secret that it stands for.
		again, err := ParseEnv([]string{"K_1=" + k.Secrets[0].Digest.String() + ":" + k.Tier + ":" + k.Name}, "K_")
		if err != nil || again[0].Secrets[0] != k.Secrets[0] || again[0].Name != k.Name || again[0].Tier != k.Tier {
			t.Errorf("%q: %+v, %v", line, again, err)
		}
	})
}
