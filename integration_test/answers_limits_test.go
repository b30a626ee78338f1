package integration

import (
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"
)

func parseFloat(t *testing.T, s string) float64 {
	t.Helper()
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		t.Fatalf("expected a number: %v", err)
	}
	return f
}

func wholeNumber(t *testing.T, r *reply, name string) int {
	t.Helper()
	n, err := strconv.Atoi(r.Header.Get(name))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// limitSite is a server whose only site has the given tiers, with a key each,
// named k0, k1 and so on.
func limitSite(t *testing.T, guard string, tiers ...string) (url string, keys []string) {
	t.Helper()
	var options, env []string
	for i, tier := range tiers {
		keys = append(keys, newKey(t))
		options = append(options, fmt.Sprintf("tier t%d %s", i, tier))
		env = append(env, fmt.Sprintf("ZEJZL_API_KEY_%d=%s:t%d", i, keys[i], i))
	}
	site, addr := plainSite(t, "\tzejzl_auth {\n"+guard+"\n\t}\n\trespond ok")
	start(t, preamble(t, "zejzl {\n"+strings.Join(options, "\n")+"\n}")+site, env...)
	return "http://" + addr + "/x", keys
}

// wantLimits checks the families that every dialect has. The time to reset is
// length minus what passed since before, rounded up.
func wantLimits(t *testing.T, r *reply, limit, remaining int, tier, label string, length time.Duration, since time.Time) {
	t.Helper()
	passed := time.Since(since)
	r.wantHeader(t, "X-RateLimit-Limit", strconv.Itoa(limit))
	r.wantHeader(t, "X-RateLimit-Remaining", strconv.Itoa(remaining))
	r.wantHeader(t, "X-RateLimit-Tier", tier)
	reset := wholeNumber(t, r, "X-RateLimit-Reset")
	if least := int(math.Ceil((length - passed).Seconds())); reset < least || reset > int(length.Seconds()) {
		t.Errorf("X-RateLimit-Reset %d, want %d to %v", reset, least, length.Seconds())
	}
	r.wantHeader(t, "RateLimit", fmt.Sprintf("%q;r=%d;t=%d", label, remaining, reset))
}

// TestLimitHeaders: the window with the fewest remaining speaks, the longest
// of several; all numbers come from one reading.
func TestLimitHeaders(t *testing.T) {
	url, keys := limitSite(t, "", "3/1m {\nrequests 2/1h\n}", "2/1h {\nrequests 2/90s\n}", "2/1m {\nrequests 1000/1d\n}")
	call := func(i int) *reply { return ask(t, http.MethodGet, url, "X-API-Key: "+keys[i]) }

	begin := time.Now()
	r := call(0).wantStatus(t, 200)
	wantLimits(t, r, 2, 1, "t0", "1h", time.Hour, begin)
	r.wantHeader(t, "RateLimit-Policy", `"1m";q=3;w=60, "1h";q=2;w=3600`)
	wantLimits(t, call(0).wantStatus(t, 200), 2, 0, "t0", "1h", time.Hour, begin)
	wantLimits(t, call(0).wantStatus(t, 429), 2, 0, "t0", "1h", time.Hour, begin)

	begin = time.Now()
	r = call(1).wantStatus(t, 200)
	wantLimits(t, r, 2, 1, "t1", "1h", time.Hour, begin) // a tie
	r.wantHeader(t, "RateLimit-Policy", `"90s";q=2;w=90, "1h";q=2;w=3600`)

	begin = time.Now()
	wantLimits(t, call(2).wantStatus(t, 200), 2, 1, "t2", "1m", time.Minute, begin)
	call(2).wantStatus(t, 200)
	r = call(2).wantStatus(t, 429)
	wantLimits(t, r, 2, 0, "t2", "1m", time.Minute, begin)
	r.wantHeader(t, "RateLimit-Policy", `"1m";q=2;w=60, "1d";q=1000;w=86400`)
}

// TestRetryAfter: whole seconds rounded up, and milliseconds up to a minute,
// both of the same wait; beyond, SDKs are told not to retry.
func TestRetryAfter(t *testing.T) {
	url, keys := limitSite(t, "", "1/1m", "1/90s", "1/10s {\nrequests 1/20s 5/1h\n}", "1/1m {\nrequests 1/1h\n}")
	for i, want := range []struct {
		longest time.Duration // of the full windows
		ms      bool
	}{{time.Minute, true}, {90 * time.Second, false}, {20 * time.Second, true}, {time.Hour, false}} {
		begin := time.Now()
		ask(t, http.MethodGet, url, "X-API-Key: "+keys[i]).wantStatus(t, 200)
		r := ask(t, http.MethodGet, url, "X-API-Key: "+keys[i]).wantStatus(t, 429)
		passed := time.Since(begin)

		seconds := wholeNumber(t, r, "Retry-After")
		least := int(math.Ceil((want.longest - passed).Seconds()))
		if seconds < least || seconds > int(want.longest.Seconds()) {
			t.Errorf("key %d: Retry-After %d, want %d to %v", i, seconds, least, want.longest.Seconds())
		}
		if !want.ms {
			r.wantHeader(t, "Retry-After-Ms")
			r.wantHeader(t, "X-Should-Retry", "false")
			continue
		}
		r.wantHeader(t, "X-Should-Retry")
		ms := wholeNumber(t, r, "Retry-After-Ms")
		if ms < int((want.longest-passed).Milliseconds()) || ms > int(want.longest.Milliseconds()) {
			t.Errorf("key %d: Retry-After-Ms %d, want %v less at most %v", i, ms, want.longest, passed)
		}
		if (ms+999)/1000 != seconds {
			t.Errorf("key %d: Retry-After %d and Retry-After-Ms %d are not one wait", i, seconds, ms)
		}
	}
}

// TestLimitFamilies: each dialect's own limit headers, on admitted answers, on
// errors from behind and on 429, and only in that dialect.
func TestLimitFamilies(t *testing.T) {
	own := map[string][]string{
		"openai":    {"x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"},
		"anthropic": {"anthropic-ratelimit-requests-limit", "anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"},
		"zejzl":     nil, "gemini": nil, "problem": nil, "caddy": nil,
	}
	for dialect := range own {
		t.Run(dialect, func(t *testing.T) {
			url, keys := limitSite(t, "errors "+dialect, "2/1m")
			begin := time.Now()
			for i, status := range []int{200, 200, 429} {
				r := ask(t, http.MethodGet, url, "X-API-Key: "+keys[0]).wantStatus(t, status)
				remaining := max(0, 1-i)
				wantLimits(t, r, 2, remaining, "t0", "1m", time.Minute, begin)
				for other, names := range own {
					for _, name := range names {
						if other != dialect {
							r.wantHeader(t, name)
						}
					}
				}
				if names := own[dialect]; names != nil {
					r.wantHeader(t, names[0], "2")
					r.wantHeader(t, names[1], strconv.Itoa(remaining))
					checkFamilyReset(t, dialect, r.Header.Get(names[2]), begin)
				}
				if exact := r.Header.Get("x-ratelimit-reset-requests"); i == 0 && dialect == "openai" && exact != "1m0s" {
					t.Errorf("first reset %q, want 1m0s", exact)
				}
			}
		})
	}
}

// checkFamilyReset: a Go duration in milliseconds for OpenAI, an instant in
// RFC 3339 for Anthropic; both a minute after begin.
func checkFamilyReset(t *testing.T, dialect, value string, begin time.Time) {
	t.Helper()
	passed := time.Since(begin)
	if dialect == "openai" {
		d, err := time.ParseDuration(value)
		if err != nil || d > time.Minute || d < time.Minute-passed || d%time.Millisecond != 0 || d.String() != value {
			t.Errorf("reset %q after %v: %v", value, passed, err)
		}
		return
	}
	at, err := time.Parse("2006-01-02T15:04:05Z", value)
	// Whole seconds, rounded up: a place must not be promised too early.
	if early, late := begin.Add(time.Minute), begin.Add(time.Minute+passed+time.Second); err != nil || at.Before(early) || at.After(late) {
		t.Errorf("reset %q, want between %v and %v: %v", value, early.UTC(), late.UTC(), err)
	}
}

// TestNoLimitHeadersOfOthers: refusals without an admission and anonymous
// public calls show nothing of anybody's limits; a key on a public path does.
func TestNoLimitHeadersOfOthers(t *testing.T) {
	url, keys := limitSite(t, "public /x", "2/1m")
	base := strings.TrimSuffix(url, "/x")
	for _, r := range []*reply{
		ask(t, http.MethodGet, url).wantStatus(t, 200),
		ask(t, http.MethodGet, url, "X-API-Key: "+newKey(t)).wantStatus(t, 200),
		ask(t, http.MethodGet, base+"/y").wantStatus(t, 401),
		ask(t, http.MethodGet, base+"/../y", "X-API-Key: "+keys[0]).wantStatus(t, 400),
	} {
		if hasLimitHeaders(r.Header) {
			t.Errorf("limit headers on %d: %v", r.StatusCode, r.Header)
		}
	}
	begin := time.Now()
	wantLimits(t, ask(t, http.MethodGet, url, "X-API-Key: "+keys[0]).wantStatus(t, 200), 2, 1, "t0", "1m", time.Minute, begin)
	wantLimits(t, ask(t, http.MethodGet, url, "X-API-Key: "+keys[0]).wantStatus(t, 200), 2, 0, "t0", "1m", time.Minute, begin)
	ask(t, http.MethodGet, url, "X-API-Key: "+keys[0]).wantStatus(t, 429)
}

// TestRefusedCallsCostNothing: what is refused before admission leaves the
// window as it was; what fails behind counts.
func TestRefusedCallsCostNothing(t *testing.T) {
	key := newKey(t)
	site, addr := plainSite(t, "\tzejzl_auth\n\thandle /fails {\n\t\terror \"no\" 500\n\t}\n\thandle {\n\t\trespond ok\n\t}")
	start(t, preamble(t, "")+site, "ZEJZL_API_KEY_A="+key+":free")
	url := "http://" + addr
	with := "X-API-Key: " + key
	ask(t, http.MethodGet, url+"/a/../b", with).wantStatus(t, 400)
	ask(t, "TRACE", url+"/x", with).wantStatus(t, 405)
	ask(t, http.MethodGet, url+"/x", with, with).wantStatus(t, 400)
	ask(t, http.MethodGet, url+"/x", with, "Authorization: Bearer "+newKey(t)).wantStatus(t, 400)
	ask(t, http.MethodGet, url+"/x", with).wantStatus(t, 200).wantHeader(t, "X-RateLimit-Remaining", "9")
	ask(t, http.MethodGet, url+"/fails", with).wantStatus(t, 500).wantHeader(t, "X-RateLimit-Remaining", "8")
}

// TestConcurrencyLimit: the refusal costs no request, and says to come back.
func TestConcurrencyLimit(t *testing.T) {
	arrived, release := make(chan struct{}, 1), make(chan struct{})
	target := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hold" {
			arrived <- struct{}{}
			hold(r, release)
		}
	})
	key := newKey(t)
	site, addr := plainSite(t, "\tzejzl_auth {\n\t\ttier free 5/1h {\n\t\t\tconcurrent 1\n\t\t}\n\t}\n\treverse_proxy "+target)
	start(t, preamble(t, "")+site, "ZEJZL_API_KEY_A="+key+":free")
	url := "http://" + addr
	held := make(chan error, 1)
	go func() {
		resp, err := plainClient.Do(newRequest(t, http.MethodGet, url+"/hold", "", "X-API-Key: "+key))
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		held <- err
	}()
	<-arrived
	r := ask(t, http.MethodGet, url+"/x", "X-API-Key: "+key).wantStatus(t, 429)
	r.wantHeader(t, "Retry-After", "1")
	r.wantHeader(t, "X-RateLimit-Limit", "5")
	r.wantHeader(t, "X-RateLimit-Remaining", "4")
	if code := r.object(t)["code"]; code != "concurrency_limited" {
		t.Errorf("code %v", code)
	}
	release <- struct{}{}
	if err := <-held; err != nil {
		t.Fatal(err)
	}
	wantSlotFreed(t, url+"/x", key).wantHeader(t, "X-RateLimit-Remaining", "3") // the refusal cost nothing
}
