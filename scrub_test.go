package zejzlauth

import (
	"encoding/base64"
	"regexp"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// canaryKey has the shape of a key, canaryForeign has none that could be known.
const (
	canaryKey     = "zejzl_0aA-_bB1cC2dD3eE4fF5gG6hH7iI8jJ9k"
	canaryForeign = "foreignCanary0123456789abcdef"
)

func TestScrub(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"empty", "", ""},
		{"plain", "GET /api/chat?model=x&stream=true HTTP/1.1", "GET /api/chat?model=x&stream=true HTTP/1.1"},

		{"key alone", canaryKey, "REDACTED"},
		{"key in text", "no " + canaryKey + ", sorry", "no REDACTED, sorry"},
		{"key after a letter", "x" + canaryKey, "xREDACTED"},
		{"key with a tail", canaryKey + "_Tail-9.rest", "REDACTED.rest"},
		{"two keys", canaryKey + " " + canaryKey, "REDACTED REDACTED"},
		{"prefix twice", "zejzl_" + canaryKey, "REDACTED"},
		{"encoded underscore", strings.Replace(canaryKey, "_", "%5F", 1), "REDACTED"},
		{"encoded underscore, lower case", strings.ReplaceAll(canaryKey, "_", "%5f"), "REDACTED"},
		{"encoded twice", strings.ReplaceAll(canaryKey, "_", "%255F"), "REDACTED"},
		{"encoded letter", "%7A" + canaryKey[1:], "REDACTED"},
		{"encoded hyphen within", strings.Replace(canaryKey, "-", "%2D", 1), "REDACTED"},
		{"escaped in JSON", `\u007a` + canaryKey[1:], "REDACTED"},
		{"one character short", canaryKey[:37], canaryKey[:37]},
		{"directive", "http.handlers.zejzl_auth", "http.handlers.zejzl_auth"},

		{"bearer", "Bearer " + canaryForeign, "Bearer REDACTED"},
		{"bearer, other case", "authorization: bEARER  a.b~c+d/e== end", "authorization: bEARER  REDACTED end"},
		{"bearer in a query", "/x?auth=Bearer%20abc%3D&b=1", "/x?auth=Bearer%20REDACTED&b=1"},
		{"bearer, plus", "/x?auth=bearer+abc", "/x?auth=bearer+REDACTED"},
		{"bearer without a token", "bearer, Bearer", "bearer, Bearer"},
		{"bearer challenge", `Bearer realm="zejzl", error="invalid_token"`, `Bearer realm="zejzl", error="invalid_token"`},
		{"bearer realm token", "Bearer realm=x", "Bearer REDACTED"},

		{"query", "/x?key=abc&b=1", "/x?key=REDACTED&b=1"},
		{"query, all names", "?API_KEY=a&Access-Token=b&apikey=c&x-api-key=d&x-goog-api-key=e#f", "?API_KEY=REDACTED&Access-Token=REDACTED&apikey=REDACTED&x-api-key=REDACTED&x-goog-api-key=REDACTED#f"},
		{"query without a URL", "api_key=abc", "api_key=REDACTED"},
		{"query, encoded name", "/x?%61pi%5Fkey=abc", "/x?%61pi%5Fkey=REDACTED"},
		{"query, encoded & in the value", "/x?key=a%26b%23c&d=1", "/x?key=REDACTED&d=1"},
		{"query in a query", "/x?next=https%3A%2F%2Fy%3Fapi_key%3Dabc%26b%3D1&c=1", "/x?next=https%3A%2F%2Fy%3Fapi_key%3DREDACTED%26b%3D1&c=1"},
		{"query in a query, twice", "?n=%253Fkey%253Dabc%2526b%253D1%26c%3D1", "?n=%253Fkey%253DREDACTED%2526b%253D1%26c%3D1"},
		{"query in quoted JSON", `{"url":"/x?a=1\u0026key=abc\u0026b=1"}`, `{"url":"/x?a=1\u0026key=REDACTED\u0026b=1"}`},
		{"query in an error", `Get "http://x/?key=abc": refused`, `Get "http://x/?key=REDACTED": refused`},
		{"query, no value", "/x?key=&b=1", "/x?key=&b=1"},
		{"query, other names", "?monkey=a&key_id=b&api.key.x=c&keys=d", "?monkey=a&key_id=b&api.key.x=c&keys=d"},
		{"malformed escapes", "?key=%zz%&b=%2", "?key=REDACTED&b=%2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := scrub(tt.in); got != tt.want {
				t.Errorf("scrub(%q)\n got %q\nwant %q", tt.in, got, tt.want)
			}
			if got := string(scrubBytes([]byte(tt.in))); got != tt.want {
				t.Errorf("scrubBytes(%q)\n got %q\nwant %q", tt.in, got, tt.want)
			}
		})
	}
}

func TestScrubBytesLeavesInput(t *testing.T) {
	in := []byte("a " + canaryKey)
	if got := string(scrubBytes(in)); got != "a REDACTED" {
		t.Errorf("got %q", got)
	}
	if string(in) != "a "+canaryKey {
		t.Errorf("the caller's bytes became %q", in)
	}
}

func TestScrubBase64(t *testing.T) {
	hidden := base64.StdEncoding.EncodeToString([]byte("text " + canaryKey))
	want := base64.StdEncoding.EncodeToString([]byte("text REDACTED"))
	if got := scrubBase64(hidden); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	harmless := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("text ", 20)))
	for _, s := range []string{harmless, strings.Repeat("no base64 here, ", 4)} {
		if got := scrubBase64(s); got != s {
			t.Errorf("got %q, want it unchanged: %q", got, s)
		}
	}
}

func TestScrubNoAllocations(t *testing.T) {
	for _, s := range []string{
		"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
		"/api/search?q=caf%C3%A9&monkey=1&zejzl_auth=%5F",
		`Bearer realm="zejzl"`,
	} {
		if n := testing.AllocsPerRun(100, func() { scrub(s) }); n != 0 {
			t.Errorf("scrub(%q): %v allocations, want none", s, n)
		}
	}
}

func TestCredentialHeaders(t *testing.T) {
	for _, tt := range []struct {
		name        string
		exact, like bool
	}{
		{"Authorization", true, true},
		{"PROXY_AUTHORIZATION", true, true},
		{"cookie", true, true},
		{"Set.Cookie", true, true},
		{"X-Api-Key", true, true},
		{"x_api_key", true, true},
		{"X.Api-Key", true, true},
		{"Api-Key", true, true},
		{"x-goog-api-key", true, true},
		{"Sec-Websocket-Protocol", true, true},
		{"X-Forwarded-Authorization", false, true},
		{"X-RapidApi-Key", false, true},
		{"Cookie2", false, true},
		{"X-Sec_WebSocket.Protocol-Copy", false, true},
		{"", false, false},
		{"Accept", false, false},
		{"X-Zejzl-Key-Id", false, false},
		{"Content-Security-Policy", false, false},
		{"X-Ratelimit-Remaining", false, false},
	} {
		if got := isCredentialHeader(tt.name); got != tt.exact {
			t.Errorf("isCredentialHeader(%q) = %v, want %v", tt.name, got, tt.exact)
		}
		if got := likeCredentialHeader(tt.name); got != tt.like {
			t.Errorf("likeCredentialHeader(%q) = %v, want %v", tt.name, got, tt.like)
		}
	}
}

var keyShape = regexp.MustCompile(`zejzl(_|%5[Ff]|\\u005[Ff])[A-Za-z0-9_-]{32}`)

func checkScrub(t interface{ Errorf(string, ...any) }, s string) {
	got := scrub(s)
	if keyShape.MatchString(got) {
		t.Errorf("scrub(%q) = %q still holds a key", s, got)
	}
	if again := scrub(got); again != got {
		t.Errorf("scrub(%q) = %q, scrubbed again %q", s, got, again)
	}
	// The cheap pass must never hide what the searches would find.
	full := maskSpans(maskSpans(maskSpans(s, findKey), findBearer), findQueryValue)
	if got != full {
		t.Errorf("scrub(%q) = %q, without clues %q", s, got, full)
	}
	if b := string(scrubBytes([]byte(s))); b != got {
		t.Errorf("scrubBytes(%q) = %q, scrub gives %q", s, b, got)
	}
}

func FuzzScrub(f *testing.F) {
	for _, s := range []string{
		"", canaryKey, "zejzl%5F" + canaryKey[6:], "zejzl_" + canaryKey[6:30] + canaryKey, "Bearer " + canaryKey, "?key=Bearer a&b",
		"?a=%253Fkey%253Dabc%2526b", `\u0026api_key=abc\`, "bearer bearer  realm=", "%25%2525%", "key=key=\"key=#",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) { checkScrub(t, s) })
}

// Texts of pieces that mean something to the scrubber meet far more of its
// cases than random bytes do.
func TestScrubProperties(t *testing.T) {
	piece := rapid.SampledFrom([]string{
		"zejzl", "_", "%5F", "%255f", `\u005f`, "%7A", "z", "ejzl_", canaryKey, canaryKey[6:30], canaryKey[30:], "-", "A",
		"Bearer", "bear", "er", " ", "+", "%20", "\t", "realm=", `"`, `\`, "=", "%3D", "%253D", "?", "&", "%26", "%2526", `\u0026`, "#",
		"key", "api", "access", "token", "x-", "KEY", ".", "%", "%2", "25", redacted, "é", "\xff",
	})
	rapid.Check(t, func(t *rapid.T) {
		checkScrub(t, strings.Join(rapid.SliceOfN(piece, 0, 24).Draw(t, "pieces"), ""))
	})
}
