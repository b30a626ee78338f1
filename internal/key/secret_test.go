package key

import (
	"crypto/sha256"
	"strings"
	"testing"

	"golang.org/x/net/http/httpguts"
	"pgregory.net/rapid"
)

const (
	canary      = "zejzl_CanaryCanary-0123456789_abcdefXY"
	otherSecret = "foreign.secret~0123456789/abc+d="
)

func TestGenerate(t *testing.T) {
	seen := make(map[string]bool)
	for range 1000 {
		s := Generate()
		if !Shaped(s) || !WellFormed(s) || ValidateSecret(s) != nil || seen[s] {
			t.Fatalf("generated %q: shaped %t, well formed %t, %v, seen before %t",
				s, Shaped(s), WellFormed(s), ValidateSecret(s), seen[s])
		}
		seen[s] = true
	}
}

func TestShaped(t *testing.T) {
	for _, c := range []struct {
		s     string
		index int
		exact bool
	}{
		{canary, 0, true},
		{"", -1, false},
		{"zejzl_", -1, false},
		{canary[:len(canary)-1], -1, false},
		{canary + "x", 0, false},
		{"x" + canary, 1, false},
		{"Zejzl_" + canary[6:], -1, false},
		{canary[:len(canary)-1] + "=", -1, false},
		{"zejzl_short " + canary, 12, false},
		{"zejzl_" + canary, 0, false},
		{"zejzl_!" + canary, 7, false},
	} {
		if got := indexShaped(c.s); got != c.index {
			t.Errorf("indexShaped(%q) = %d, want %d", c.s, got, c.index)
		}
		if got := Shaped(c.s); got != c.exact {
			t.Errorf("Shaped(%q) = %t", c.s, got)
		}
	}
}

func TestWellFormed(t *testing.T) {
	for s, want := range map[string]bool{
		canary:                         true,
		otherSecret:                    true,
		strings.Repeat("a", 23):        false,
		strings.Repeat("a", 24):        true,
		strings.Repeat("a", 256):       true,
		strings.Repeat("a", 257):       false,
		"":                             false,
		canary + " ":                   false,
		canary + ",":                   false,
		canary + "\n":                  false,
		canary + "\x00":                false,
		canary + "é":                   false,
		Sum(canary).String():           false,
		"sha256:" + otherSecret:        false,
		strings.Repeat("\xff", 32):     false,
		"dev_test_key_insecure":        false, // the development key of the article
		"ABCDEFGHIJKLMNOPQRSTUVWXYZ./": true,
	} {
		if got := WellFormed(s); got != want {
			t.Errorf("WellFormed(%q) = %t", s, got)
		}
	}
}

// A hash that leaked from a configuration or a key file must open nothing.
func TestStoredHashIsNoKey(t *testing.T) {
	set := NewSet(1)
	k := mustAdd(t, set, located("a", rec("", "A", "pro", canary)))
	var ring Ring
	ring.Replace(set, []*Key{k})
	stored := Sum(canary).String()
	if WellFormed(stored) || ValidateSecret(stored) == nil {
		t.Error("the stored hash passes as a credential")
	}
	if _, ok := ring.Lookup(Sum(stored)); ok {
		t.Error("the stored hash is in the ring")
	}
	if _, ok := ring.Lookup(Sum(canary)); !ok {
		t.Error("the secret is not in the ring")
	}
}

func TestValidateSecret(t *testing.T) {
	for s, want := range map[string]string{
		canary:                        "",
		otherSecret:                   "",
		canary[:20]:                   "24 to 256",
		canary + "!":                  "24 to 256",
		strings.Repeat("x", 40):       "different characters",
		"change-change-change-change": "different characters",
		strings.Repeat("abcdefg", 5):  "different characters",
		strings.Repeat("abcdefgh", 3): "",
	} {
		err := ValidateSecret(s)
		switch {
		case want == "" && err != nil:
			t.Errorf("%q: %v", s, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%q: got %v, want %q", s, err, want)
		case err != nil && strings.Contains(err.Error(), s):
			t.Errorf("%q: the error shows it", s)
		}
	}
}

func TestParseDigest(t *testing.T) {
	d := Sum(canary)
	hexes := strings.TrimPrefix(d.String(), "sha256:")
	for _, s := range []string{"sha256:" + hexes, "sha256:" + strings.ToUpper(hexes)} {
		if got, err := ParseDigest(s); err != nil || got != d {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{
		"", hexes, "sha256:", "SHA256:" + hexes, "sha256:" + hexes[1:], "sha256:" + hexes + "0",
		"sha256:" + hexes[1:] + "g", "sha256: " + hexes[1:], "sha512:" + hexes, canary, "sha256:" + canary,
	} {
		_, err := ParseDigest(s)
		if err == nil {
			t.Errorf("%q was accepted", s)
		} else if err.Error() != `expected "sha256:" and 64 hex digits` {
			t.Errorf("%q: %v", s, err)
		}
	}
	if got := d.ID(); got != hexes[:12] {
		t.Errorf("ID = %s, digest %s", got, hexes)
	}
}

func TestDigestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.String().Draw(t, "secret")
		d := Sum(s)
		if d != sha256.Sum256([]byte(s)) {
			t.Fatal("Sum is not SHA-256")
		}
		if got, err := ParseDigest(d.String()); err != nil || got != d {
			t.Fatalf("%s: %v, %v", d, got, err)
		}
	})
}

func TestSumAllocates(t *testing.T) {
	for _, n := range []int{24, 38, 256} {
		s := strings.Repeat("k", n)
		if got := testing.AllocsPerRun(100, func() { sink = Sum(s) }); got != 0 {
			t.Errorf("%d bytes: %v allocations", n, got)
		}
	}
}

var sink Digest

func FuzzCredential(f *testing.F) {
	for _, s := range []string{"", canary, otherSecret, Sum(canary).String(), canary + "\x00", strings.Repeat("a", 300)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if Sum(s) != sha256.Sum256([]byte(s)) {
			t.Error("Sum is not SHA-256")
		}
		if Shaped(s) && !WellFormed(s) {
			t.Error("shaped but not well formed")
		}
		if WellFormed(s) && (len(s) < 24 || len(s) > 256 || !httpguts.ValidHeaderFieldValue(s) || strings.ContainsAny(s, ": ,\t")) {
			t.Error("well formed, but not fit for a header")
		}
		if strings.HasPrefix(s, "sha256:") && WellFormed(s) {
			t.Error("a stored hash is well formed")
		}
		if i := indexShaped(s); i >= 0 && !Shaped(s[i:i+len(canary)]) {
			t.Error("indexShaped points at something else")
		}
		if ValidateSecret(s) == nil && !WellFormed(s) {
			t.Error("valid but not well formed")
		}
		if d, err := ParseDigest(s); err == nil && d.String() != strings.ToLower(s) {
			t.Error("the digest does not round trip")
		}
	})
}

func BenchmarkSum(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		sink = Sum(canary)
	}
}

func BenchmarkWellFormed(b *testing.B) {
	for b.Loop() {
		if !WellFormed(canary) {
			b.Fatal("not well formed")
		}
	}
}
