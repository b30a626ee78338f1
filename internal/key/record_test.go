package key

import (
	"strings"
	"testing"
)

func TestValidateNames(t *testing.T) {
	for _, c := range []struct {
		what     string
		validate func(string) error
		good     []string
		bad      []string
	}{
		{
			"name", ValidateName,
			[]string{"CI runner", "a", "Zoë's phone", "zejzl_dev", strings.Repeat("n", 128), `a "b" <c>: d`},
			[]string{
				"", " a", "a ", "a\n", "a\nb", "a\r\nX-Admin: 1", "a\x00b", "a\x7f", "\xff\xfe", "\u00a0a",
				strings.Repeat("n", 129), canary, "key " + canary + "!",
			},
		},
		{
			"id", ValidateID,
			[]string{"k_7", "A.b-c_1", "0", strings.Repeat("i", 64), "zejzl_dev"},
			[]string{"", "a b", "a/b", "a:b", "é", "a\n", strings.Repeat("i", 65), canary, "k" + canary},
		},
		{
			"tier", ValidateTierName,
			[]string{"free", "pro-2", "a_b", "0", strings.Repeat("t", 32)},
			[]string{"", "Pro", "a b", "a.b", "a:b", "é", strings.Repeat("t", 33), canary},
		},
	} {
		for _, s := range c.good {
			if err := c.validate(s); err != nil {
				t.Errorf("%s %q: %v", c.what, s, err)
			}
		}
		for _, s := range c.bad {
			err := c.validate(s)
			if err == nil {
				t.Errorf("%s %q was accepted", c.what, s)
			} else if strings.Contains(err.Error(), canary) {
				t.Errorf("%s: the error shows the secret: %v", c.what, err)
			}
		}
	}
}

func TestPlace(t *testing.T) {
	for want, p := range map[string]Place{
		"environment variable ZEJZL_API_KEY_1": {"environment variable ZEJZL_API_KEY_1", -1},
		"key file keys.json: keys[3]":          {"key file keys.json", 3},
	} {
		if got := p.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
