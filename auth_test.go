package zejzlauth

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

func TestBearerToken(t *testing.T) {
	for _, c := range []struct {
		value, token string
		ok           bool
	}{
		{"Bearer abc", "abc", true},
		{"bearer abc", "abc", true},
		{"BEARER abc", "abc", true},
		{"bEaReR   abc", "abc", true},
		{"Bearer a, Bearer b", "a, Bearer b", true},
		{"Bearer", "", true},
		{"Bearer ", "", true},
		{"Bearer\tabc", "\tabc", true}, // ours, but no key: the tab is part of the token
		{"Basic abc", "", false},
		{"", "", false},
		{"Bear", "", false},
		{"Beare\u0280 abc", "", false},
		{"abc Bearer", "", false},
	} {
		if token, ok := bearerToken(c.value); token != c.token || ok != c.ok {
			t.Errorf("%q: %q %v, want %q %v", c.value, token, ok, c.token, c.ok)
		}
	}
	if _, ok := bearerToken("Bearerabc"); ok {
		t.Error("Bearerabc is another scheme")
	}
}

func TestReadCredential(t *testing.T) {
	const a, b = "zejzl_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "zejzl_bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	for name, c := range map[string]struct {
		header http.Header
		secret string
		why    reason
	}{
		"none":                     {http.Header{}, "", reasonMissingKey},
		"Authorization":            {http.Header{"Authorization": {"Bearer " + a}}, a, ""},
		"X-API-Key":                {http.Header{"X-Api-Key": {a}}, a, ""},
		"X-Goog-Api-Key":           {http.Header{"X-Goog-Api-Key": {a}}, a, ""},
		"Api-Key":                  {http.Header{"Api-Key": {a}}, a, ""},
		"all alike":                {http.Header{"Authorization": {"bearer " + a}, "X-Api-Key": {a}, "Api-Key": {a}, "X-Goog-Api-Key": {a}}, a, ""},
		"two different":            {http.Header{"Authorization": {"Bearer " + a}, "X-Api-Key": {b}}, "", reasonAmbiguousKey},
		"two different headers":    {http.Header{"Api-Key": {a}, "X-Goog-Api-Key": {b}}, "", reasonAmbiguousKey},
		"two lines":                {http.Header{"X-Api-Key": {a, b}}, "", reasonAmbiguousKey},
		"two equal lines":          {http.Header{"X-Api-Key": {a, a}}, "", reasonAmbiguousKey},
		"two Authorization lines":  {http.Header{"Authorization": {"Bearer " + a, "Basic x"}}, "", reasonAmbiguousKey},
		"two Authorizations alike": {http.Header{"Authorization": {"Bearer " + a, "Bearer " + a}}, "", reasonAmbiguousKey},
		"empty":                    {http.Header{"X-Api-Key": {""}, "Authorization": {"Bearer "}}, "", reasonMissingKey},
		"empty beside a key":       {http.Header{"X-Api-Key": {""}, "Api-Key": {a}, "Authorization": {""}}, a, ""},
		"another scheme":           {http.Header{"Authorization": {"Basic " + a}}, "", reasonMissingKey},
		"another scheme and a key": {http.Header{"Authorization": {"Basic dTpw"}, "X-Api-Key": {a}}, a, ""},
		"no space after Bearer":    {http.Header{"Authorization": {"Bearer" + a}}, "", reasonMissingKey},
		"two in one line":          {http.Header{"Authorization": {"Bearer " + a + ", Bearer " + a}}, a + ", Bearer " + a, ""}, // no key is so
		"tab":                      {http.Header{"Authorization": {"Bearer\t" + a}}, "\t" + a, ""},
		"folded name":              {http.Header{"X_api_key": {a}, "Cookie": {"api_key=" + a}}, "", reasonMissingKey},
	} {
		if secret, why := readCredential(c.header); secret != c.secret || why != c.why {
			t.Errorf("%s: %q %q, want %q %q", name, secret, why, c.secret, c.why)
		}
	}
}

// What is sent once through any header must not reach the backend; what the
// guard did not read stays.
func TestCleanRequestCredentials(t *testing.T) {
	g := newRig(t, new(Guard))
	for name, c := range map[string]struct {
		header http.Header
		stays  []string
	}{
		"every header":   {http.Header{"Authorization": {"bEARER x"}, "X-Api-Key": {"x"}, "X-Goog-Api-Key": {"x"}, "Api-Key": {"x", "y"}}, nil},
		"another scheme": {http.Header{"Authorization": {"Basic x"}, "X-Api-Key": {"x"}}, []string{"Authorization"}},
		"tab":            {http.Header{"Authorization": {"Bearer\tx"}}, nil},
		"several lines":  {http.Header{"Authorization": {"Basic x", "Bearer x"}}, nil},
		"empty":          {http.Header{"Authorization": {""}}, nil},
		"others":         {http.Header{"Cookie": {"x"}, "Content-Type": {"x"}, "Openai-Organization": {"x"}}, []string{"Content-Type", "Cookie", "Openai-Organization"}},
	} {
		for _, rt := range []route{protected, public} {
			h := c.header.Clone()
			g.cleanRequest(h, rt, true)
			if got := slices.Sorted(maps.Keys(h)); !slices.Equal(got, c.stays) {
				t.Errorf("%s: %q stay, want %q", name, got, c.stays)
			}
		}
	}
	g.ForwardCredentials = true
	h := http.Header{"Authorization": {"Bearer x"}, "X-Api-Key": {"x"}}
	g.cleanRequest(h, protected, true)
	if len(h) != 2 {
		t.Errorf("forward_credentials removed some: %v", h)
	}
}

func TestCleanRequestNames(t *testing.T) {
	g := newRig(t, new(Guard))
	identity := []string{"X-Zejzl-Key-Id", "X_Zejzl_Tier", "x-zejzl-name", "X.Zejzl.Any", "X-Zejzl_", "x_ZEJZL-x", "X-Zejzl-"}
	overrides := []string{
		"X-Http-Method-Override", "X-Http-Method", "X_method.override", "X-Original-Url", "X-Rewrite-Url", "X-Original-Uri", "X-Forwarded-Uri",
	}
	others := []string{"X-Zejz", "X-Zejzla", "Zejzl-Key", "X-Method", "X-Forwarded-For", "X", "X-Original", "Content-Length"}
	for _, c := range []struct {
		rt    route
		keyed bool
		gone  []string
	}{
		{protected, true, slices.Concat(identity, []string{"Proxy"})},
		{protected, false, slices.Concat(identity, []string{"Proxy"}, overrides)},
		{public, true, slices.Concat(identity, []string{"Proxy"}, overrides)},
		{public, false, slices.Concat(identity, []string{"Proxy"}, overrides)},
	} {
		h := make(http.Header)
		for _, name := range slices.Concat(identity, overrides, others, []string{"Proxy"}) {
			h[name] = []string{"x"}
		}
		all := len(h)
		g.cleanRequest(h, c.rt, c.keyed)
		for _, name := range c.gone {
			if _, there := h[name]; there {
				t.Errorf("route %d, key %v: %s stayed", c.rt, c.keyed, name)
			}
		}
		if len(h) != all-len(c.gone) {
			t.Errorf("route %d, key %v: more went than should: %v", c.rt, c.keyed, h)
		}
	}
}

func TestConnectionTokens(t *testing.T) {
	g := newRig(t, new(Guard))
	for _, c := range []struct{ lines, want []string }{
		{[]string{"keep-alive, Upgrade"}, []string{"keep-alive, Upgrade"}},
		{[]string{"X-Zejzl-Key-Id"}, nil},
		{[]string{"close,x-zejzl-tier ,\tX_Zejzl_Key_Name,, te"}, []string{"close, te"}},
		{[]string{"close", "X-ZEJZL-TIER"}, []string{"close"}},
		{[]string{"close", "te"}, []string{"close", "te"}},
	} {
		h := http.Header{"Connection": c.lines}
		g.cleanRequest(h, protected, true)
		if got := h["Connection"]; !slices.Equal(got, c.want) {
			t.Errorf("%q: %q, want %q", c.lines, got, c.want)
		}
	}
}

func TestForeignUpgrade(t *testing.T) {
	r := newRig(t, &Guard{Public: []string{"/status"}})
	for _, c := range []struct {
		path    string
		upgrade []string
		want    http.Header
	}{
		{"/x", []string{"websocket"}, http.Header{"Upgrade": {"websocket"}, "Connection": {"keep-alive, Upgrade, HTTP2-Settings"}}},
		{"/x", []string{"WebSocket"}, http.Header{"Upgrade": {"WebSocket"}, "Connection": {"keep-alive, Upgrade, HTTP2-Settings"}}},
		{"/x", []string{"h2c"}, http.Header{"Connection": {"keep-alive"}}},
		{"/x", []string{"websocket, h2c"}, http.Header{"Connection": {"keep-alive"}}},
		{"/x", []string{"websocket", "h2c"}, http.Header{"Connection": {"keep-alive"}}},
		{"/x", []string{""}, http.Header{"Connection": {"keep-alive"}}},
		{"/status", []string{"websocket"}, http.Header{"Connection": {"keep-alive"}}}, // without a key there is no tunnel
	} {
		req := newRequest("GET", c.path)
		if c.path != "/status" {
			req.Header.Set("X-Api-Key", r.secret)
		}
		req.Header["Upgrade"], req.Header["Connection"] = c.upgrade, []string{"keep-alive, Upgrade, HTTP2-Settings"}
		r.must(t, http.StatusOK, req, func(w http.ResponseWriter, behind *http.Request) error {
			for _, name := range []string{"Upgrade", "Connection"} {
				if got := behind.Header[name]; !slices.Equal(got, c.want[name]) {
					t.Errorf("%s %q: %s %q, want %q", c.path, c.upgrade, name, got, c.want[name])
				}
			}
			return nil
		})
	}
}

// A server behind may merge trailers into headers, identity included.
func TestTrailersAreDropped(t *testing.T) {
	r := newRig(t, &Guard{Public: []string{"/status"}, Protect: []string{"/api/*", "/status"}})
	for _, req := range []*http.Request{r.chat(), newRequest("POST", "/other"), newRequest("GET", "/status")} {
		req.Trailer = http.Header{"X_Zejzl_Tier": nil, "Digest": nil}
		r.must(t, http.StatusOK, req, func(_ http.ResponseWriter, behind *http.Request) error {
			if len(behind.Trailer) > 0 {
				t.Errorf("%s: trailers %v are passed", behind.RequestURI, behind.Trailer)
			}
			return nil
		})
	}
}

func TestIdentifyWithoutName(t *testing.T) {
	h := make(http.Header)
	x := &exchange{request: &http.Request{Header: h}, key: &key.Key{ID: "k"}}
	x.identify("free")
	if _, there := h[nameHeader]; there || h.Get(idHeader) != "k" || h.Get(tierHeader) != "free" {
		t.Errorf("%v", h)
	}
}

func FuzzCredentialHeaders(f *testing.F) {
	secret := "zejzl_0123456789abcdefghijklmnopqrstuv"
	f.Add("Bearer "+secret, "", "", "X-Api-Key", "")
	f.Add("bearer  "+secret, secret, "", "X_Api_Key", secret)
	f.Add("Basic x", "", secret, "X_Zejzl-Key.Id", "admin")
	f.Add("Bearer"+secret, "", "", "Connection", "x-zejzl-key-id, close")
	f.Add("", secret, secret+"x", "Authorization", "Bearer x")
	g := newRig(f, new(Guard))
	f.Fuzz(func(t *testing.T, authorization, apiKey, second, otherName, otherValue string) {
		h := make(http.Header)
		for name, value := range map[string]string{"Authorization": authorization, "X-Api-Key": apiKey, "Api-Key": second} {
			if value != "" {
				h[name] = []string{value}
			}
		}
		h.Add(otherName, otherValue)
		got, why := readCredential(h)
		switch why {
		case reasonNone:
			if got == "" {
				t.Error("an empty credential")
			}
			// Whatever header it came from, no other credential header says something else.
			for _, name := range credentialHeaders {
				for _, line := range h[name] {
					if line != "" && line != got {
						t.Errorf("%s holds %q beside %q", name, line, got)
					}
				}
			}
			if token, ok := bearerToken(h.Get("Authorization")); ok && token != "" && token != got {
				t.Errorf("Authorization holds %q beside %q", token, got)
			}
		case reasonMissingKey, reasonAmbiguousKey:
			if got != "" {
				t.Errorf("%s with a credential", why)
			}
		default:
			t.Errorf("reason %q", why)
		}

		g.cleanRequest(h, protected, true)
		for name := range h {
			folded := strings.NewReplacer("_", "-", ".", "-").Replace(strings.ToLower(name))
			if strings.HasPrefix(folded, "x-zejzl-") || slices.Contains(credentialHeaders[:], name) {
				t.Errorf("%q is passed to the backend", name)
			}
		}
		for token := range strings.SplitSeq(strings.Join(h["Connection"], ","), ",") {
			if hasFoldedPrefix(strings.TrimSpace(token), identityPrefix) {
				t.Errorf("Connection %q", h["Connection"])
			}
		}
		for _, line := range h["Authorization"] {
			if scheme, _, _ := strings.Cut(line, " "); strings.EqualFold(scheme, "bearer") {
				t.Errorf("Authorization %q is passed to the backend", line)
			}
		}
	})
}
