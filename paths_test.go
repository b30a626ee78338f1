package zejzlauth

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func pathRulesOf(t testing.TB, protect, public []string) pathRules {
	t.Helper()
	rules, err := newPathRules(protect, public)
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

var (
	testProtect = []string{"/api/*", "/v1/*", "/Admin", "/caf%C3%A9/*"}
	testPublic  = []string{"/api/status", "/api/docs/*", "/status", "/api/sm%C3%B8rbr%C3%B8d"}
)

func TestClassify(t *testing.T) {
	rules := pathRulesOf(t, testProtect, testPublic)
	for want, uris := range map[route][]string{
		public: {
			"/api/status", "/api/status?x=/../y", "/status", "/api/docs/a", "/api/docs/a/b", "/api/docs/A%20b",
			"/api/sm%C3%B8rbr%C3%B8d", "/api/docs/.well-known", "/api/docs/...",
		},
		open: {
			"/", "/other", "/apix", "/v1x/y", "/adminx", "/api-docs/", "/caf", "/x/api/chat", "/%7Euser", "/a.b", "/.well-known/x",
			"/other?next=/api/../chat",
		},
		protected: {
			"/api/chat", "/api/", "/api", "/API/chat", "/aPi", "/%61pi/chat", "/api%20/../", "/admin", "/Admin", "/ADMIN/", "/%41dmin",
			"/api/status/", "/api/status/x", "/api/Status", "/api/%73tatus", "/api/statusx", "/api/docs", "/api/docs/", "/API/docs/a",
			"/api/smørbrød", "/api/sm%c3%b8rbr%c3%b8d", "/café/x", "/caf%c3%a9/x", "/%63af%C3%A9/x", "/CAF%C3%89/x",
			// Unusual: what they name depends on who reads them.
			"//other", "/other//x", "/other;x", "/other%3Bx", "/other%2Fx", "/other%2e", "/other%252e", "/other%25", "/other%3F",
			"/other%23", "/other%", "/other%zz", "/other%4", "/other/%ff", "/\xff", "/other#x", "", "other", "*",
			"http://host/api/status", "http://host/other", "host:443", "/api/docs//a", "/api/docs/a;b", "/api/docs/a%2Fb", "/api/docs/%2541",
		},
	} {
		for _, uri := range uris {
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				if got, _ := rules.classify(method, uri); got != want {
					t.Errorf("%s %q: route %d, want %d", method, uri, got, want)
				}
			}
		}
	}
	for uri, want := range map[string]route{"/api/status": protected, "/status": open, "/api/docs/a": protected, "/other": open} {
		for _, method := range []string{"POST", "OPTIONS", "DELETE", "get", ""} {
			if got, _ := rules.classify(method, uri); got != want {
				t.Errorf("%s %q: route %d, want %d", method, uri, got, want)
			}
		}
	}
}

func TestClassifyBadPath(t *testing.T) {
	rules := pathRulesOf(t, testProtect, testPublic)
	for want, uris := range map[bool][]string{
		true: {
			"/..", "/.", "/api/status/..", "/api/status/../chat", "/api/./status", "/../api/status", "/api/status/%2e%2e/chat",
			"/api/status/%2E./chat", "/api/status/.%2e", "/api/status/..%2fchat", "/api/status%2f..%2fchat", "/a/..;/b", "/a/..;x=y/b",
			"/a/.;", "/a/%2e%2e%3b/b", "/%252e%252e/x", "/%25252e./x", "/%%32%65%2e/x", "/a%252f..%252fb", "/other/..?x", "/api/docs/../chat",
			`/a\b`, "/a%5cb", "/a%5Cb", "/a%255cb", `\`, "/a%00b", "/a%0d%0ab", "/a%7f", "/a\x01b", "/a\x7f", "/a%2500", "..", "../x",
			"http://host/../x", `/api/status\..\chat`, "/a/..%00/b",
		},
		false: {
			"/", "/...", "/.x", "/..x", "/x..", "/x.", "/a/.b/c", "/a.;b", "/a%20b", "//", "/a;..", "/a?../b", `/a?\`, "/a?%00", "/a%3F..", "*",
		},
	} {
		for _, uri := range uris {
			if _, got := rules.classify(http.MethodGet, uri); got != want {
				t.Errorf("%q: bad %v, want %v", uri, got, want)
			}
		}
	}
}

// Without protect every path needs a key, and public makes the only holes.
func TestClassifyDefault(t *testing.T) {
	rules := pathRulesOf(t, nil, []string{"/api/status", "/pub/*"})
	for uri, want := range map[string]route{
		"/": protected, "/api/status": public, "/pub/x": public, "/pub/": protected, "/pub": protected, "/x": protected,
	} {
		if got, bad := rules.classify(http.MethodGet, uri); got != want || bad {
			t.Errorf("%q: route %d bad %v, want %d", uri, got, bad, want)
		}
	}
}

func TestPathRuleErrors(t *testing.T) {
	for _, pattern := range []string{
		"", "*", "api", "/api*", "/a*b", "/api/*/x", "//", "/a//b", "/a/../b", "/a/.", `/a\b`, "/a;b", "/a%2fb", "/a%2e", "/a%", "/a%zz",
		"/a?b", "/a#b", "/{env.X}", "/a\x00", "/a%00", "/\xff", "http://host/a",
	} {
		for _, list := range []string{"protect", "public"} {
			protect, public := []string{pattern}, []string(nil)
			if list == "public" {
				protect, public = public, protect
			}
			_, err := newPathRules(protect, public)
			if err == nil || !strings.HasPrefix(err.Error(), list+": path ") || !strings.Contains(err.Error(), "expected") {
				t.Errorf("%s %q: error %v", list, pattern, err)
			}
		}
	}
}

func TestMethodAllowed(t *testing.T) {
	for method, want := range map[string]bool{
		"GET": true, "HEAD": true, "POST": true, "PUT": true, "PATCH": true, "DELETE": true, "OPTIONS": true, "PROPFIND": true, "M-SEARCH": true,
		"CONNECT": false, "TRACE": false, "TRACK": false, "get": false, "Get": false, "GEt": false, "pOST": false, "trace": false,
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Method = method
		if got := methodAllowed(r); got != want {
			t.Errorf("%s: %v", method, got)
		}
	}
	for _, c := range []struct {
		major           int
		proto, protocol string
		want            bool
	}{
		{1, "HTTP/1.1", "websocket", false},
		{2, "HTTP/2.0", "websocket", true},
		{2, "HTTP/2.0", "", false},
		{2, "HTTP/2.0", "connect-udp", false},
		{3, "websocket", "", true},
		{3, "HTTP/3.0", "", false},
		{3, "connect-udp", "", false},
	} {
		r := httptest.NewRequest(http.MethodConnect, "/", nil)
		r.ProtoMajor, r.Proto = c.major, c.proto
		if c.protocol != "" {
			r.Header[":protocol"] = []string{c.protocol}
		}
		if got := methodAllowed(r); got != c.want {
			t.Errorf("CONNECT %+v: %v", c, got)
		}
	}
}

// decodings are all that a path may become when it is decoded again and again.
// It decodes as net/url does, apart from the guard's own code.
func decodings(raw string) []string {
	all := []string{raw}
	for range len(raw) {
		var out strings.Builder
		for i := 0; i < len(raw); i++ {
			if i+3 <= len(raw) {
				if c, err := url.PathUnescape(raw[i : i+3]); err == nil && len(c) == 1 {
					out.WriteString(c)
					i += 2
					continue
				}
			}
			out.WriteByte(raw[i])
		}
		if out.String() == raw {
			break
		}
		raw = out.String()
		all = append(all, raw)
	}
	return all
}

// naivePath is the normal form of a path as a backend might make it.
func naivePath(path string) string {
	var segments []string
	for segment := range strings.SplitSeq(strings.ToLower(strings.ReplaceAll(path, `\`, "/")), "/") {
		segment, _, _ = strings.Cut(segment, ";")
		switch segment {
		case "", ".":
		case "..":
			segments = segments[:max(0, len(segments)-1)]
		default:
			segments = append(segments, segment)
		}
	}
	return "/" + strings.Join(segments, "/")
}

func hasDotSegment(path string) bool {
	return slices.ContainsFunc(strings.FieldsFunc(path, func(r rune) bool { return r == '/' || r == '\\' }), func(segment string) bool {
		name, _, _ := strings.Cut(segment, ";")
		return name == "." || name == ".."
	})
}

func checkPathRules(t *testing.T, rules *pathRules, method, uri string) {
	rt, bad := rules.classify(method, uri)
	raw, _, _ := strings.Cut(uri, "?")
	all := decodings(raw)
	if bad && rt != protected {
		t.Errorf("%s %q: bad on route %d", method, uri, rt)
	}
	for _, path := range all {
		if odd := hasDotSegment(path) || strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\\' }); odd && !bad {
			t.Errorf("%s %q reads as %q and is not bad", method, uri, path)
		}
	}
	plain := !strings.Contains(raw, "//") && !strings.ContainsAny(raw, `;\#`) && len(all) <= 2 && len(all[len(all)-1]) > 0
	switch rt {
	case public:
		if method != http.MethodGet && method != http.MethodHead {
			t.Errorf("%s %q is public", method, uri)
		}
		if !plain || !slices.ContainsFunc(testPublic, func(entry string) bool {
			prefix, subtree := strings.CutSuffix(entry, "*")
			return raw == entry || subtree && strings.HasPrefix(raw, prefix) && raw != prefix
		}) {
			t.Errorf("%s %q is public", method, uri)
		}
	case open:
		for _, path := range all {
			normal := naivePath(path)
			for _, entry := range []string{"/api", "/v1", "/admin", "/café"} {
				if normal == entry || entry != "/admin" && strings.HasPrefix(normal, entry+"/") {
					t.Errorf("%s %q is open and reads as %q", method, uri, normal)
				}
			}
		}
		if !plain || raw[0] != '/' {
			t.Errorf("%s %q is open and unusual", method, uri)
		}
	}
}

func FuzzPathRules(f *testing.F) {
	for _, uri := range []string{
		"/api/status", "/api/status/..%2fchat", "/other", "/%61pi/x", "//api/chat", "/api/docs/x", "/x/%2e%2e/api/chat", "/x/..;/api", "*",
		"/%252e%252e/api", `/x\..\api`, "/Admin/", "http://host/api/status", "/caf%C3%A9/x", "/x?y=/../z", "/K/x", "/%%36%31pi/",
	} {
		f.Add("GET", uri)
		f.Add("POST", uri)
	}
	rules := pathRulesOf(f, testProtect, testPublic)
	f.Fuzz(func(t *testing.T, method, uri string) {
		if len(uri) > 1<<10 {
			t.Skip("the reference decodes in quadratic time")
		}
		checkPathRules(t, &rules, method, uri)
	})
}

func TestPathRulesProperty(t *testing.T) {
	rules := pathRulesOf(t, testProtect, testPublic)
	fragments := []string{
		"/", "/", "/", ".", "..", "%2e", "%2E", "%2f", "%25", "%5c", `\`, ";", "%3b", "%", "2", "e", "%61", "%41", "#", "?", "a", "%00",
		"/api", "/API", "api", "/v1", "/admin", "/café", "/caf%C3%A9", "/other", "/api/status", "/api/docs/", "/%61pi", "/status",
	}
	rapid.Check(t, func(r *rapid.T) {
		uri := strings.Join(rapid.SliceOfN(rapid.SampledFrom(fragments), 0, 12).Draw(r, "uri"), "")
		checkPathRules(t, &rules, rapid.SampledFrom([]string{"GET", "HEAD", "POST"}).Draw(r, "method"), uri)
		if t.Failed() {
			r.FailNow()
		}
	})
}

// A long chain of escapes costs one pass: the reference above would take minutes.
func TestDecodeIsLinear(t *testing.T) {
	path := "/%" + strings.Repeat("25", 1<<19) + "2e%2e"
	if inspectPath(path) != badPath {
		t.Error("a deeply encoded dot segment passes")
	}
}
