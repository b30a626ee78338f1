package integration

import (
	"fmt"
	"io"
	"net/http"
	"testing"
)

// TestNestedGuards: a guard behind another trusts its decision, charges only
// its own zone, and a refusal of it costs nothing.
func TestNestedGuards(t *testing.T) {
	target := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%q %q %q %q", r.Header["X-Zejzl-Key-Id"], r.Header["X-Zejzl-Key-Name"], r.Header["X-Zejzl-Tier"], r.Header["X-Api-Key"])
	})
	key := newKey(t)
	id := digestOf(key)[len("sha256:"):][:12]
	site, addr := plainSite(t, `
	zejzl_auth {
		zone outer
		tier team 4/1h
		public /same/status
		errors openai
	}
	handle /same* {
		zejzl_auth {
			zone outer
			tier team 1/1h
			errors anthropic
		}
		reverse_proxy `+target+`
	}
	handle /own* {
		zejzl_auth {
			zone inner
			tier team 1/30m
			errors anthropic
		}
		reverse_proxy `+target+`
	}
	handle {
		reverse_proxy `+target+`
	}`)
	start(t, preamble(t, "zejzl {\n\t\ttier team 4/1h\n\t}")+site, "ZEJZL_API_KEY_A="+key+":team:the team")
	call := func(path string, status int) *reply {
		t.Helper()
		return ask(t, http.MethodGet, "http://"+addr+path, "X-API-Key: "+key).wantStatus(t, status)
	}
	introduced := fmt.Sprintf("[%q] [%q] [%q] []", id, "the team", "team")

	for _, step := range []struct {
		path             string
		status           int
		limit, remaining string
	}{
		{"/same", 200, "4", "3"},        // one zone: charged once, by the first guard
		{"/own", 200, "1", "0"},         // both zones: the fullest window speaks
		{"/plain", 200, "4", "1"},       // 4 less three
		{"/own", 429, "1", "0"},         // refused further in
		{"/own", 429, "1", "0"},         // again
		{"/plain", 200, "4", "0"},       // and cost nothing
		{"/same", 429, "4", "0"},        // now the first guard refuses
		{"/own", 429, "4", "0"},         // and before the second is asked
		{"/same/status", 429, "4", "0"}, // a key counts on public paths too
	} {
		r := call(step.path, step.status)
		r.wantHeader(t, "X-RateLimit-Limit", step.limit)
		r.wantHeader(t, "X-RateLimit-Remaining", step.remaining)
		checkSecurityHeaders(t, r.Header)
		if step.status == 200 && r.text != introduced {
			t.Errorf("%s: the backend got %s, want %s", step.path, r.text, introduced)
		}
		if step.status == 429 {
			c := refusalCase{status: 429, code: "rate_limited", openAI: full}
			checkOpenAIBody(t, &c, r) // the first guard answers, in its dialect
			wholeNumber(t, r, "Retry-After")
		}
	}

	// Nobody in particular stays so.
	r := ask(t, http.MethodGet, "http://"+addr+"/same/status").wantStatus(t, 200)
	if r.text != "[] [] [] []" {
		t.Errorf("the backend got %s of an anonymous call", r.text)
	}
	ask(t, http.MethodGet, "http://"+addr+"/own").wantStatus(t, 401)
}

// TestNestedSlots: the slots of both zones are held to the end and then free,
// and a refusal further in frees the first one.
func TestNestedSlots(t *testing.T) {
	arrived, release := make(chan struct{}, 1), make(chan struct{})
	target := newBackend(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/own/hold" {
			arrived <- struct{}{}
			hold(r, release)
		}
	})
	key := newKey(t)
	site, addr := plainSite(t, `
	zejzl_auth {
		zone outer-slots
		tier team 100/1h {
			concurrent 2
		}
	}
	handle /own* {
		zejzl_auth {
			zone inner-slots
			tier team 1000/1h {
				concurrent 1
			}
		}
		reverse_proxy `+target+`
	}
	handle {
		reverse_proxy `+target+`
	}`)
	start(t, preamble(t, "zejzl {\n\t\ttier team 100/1h\n\t}")+site, "ZEJZL_API_KEY_A="+key+":team")
	url := "http://" + addr
	held := make(chan error, 1)
	go func() {
		resp, err := plainClient.Do(newRequest(t, http.MethodGet, url+"/own/hold", "", "X-API-Key: "+key))
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		held <- err
	}()
	<-arrived
	for range 3 { // were the first guard's slot not freed, the second round would stop there
		ask(t, http.MethodGet, url+"/own", "X-API-Key: "+key).wantStatus(t, 429)
	}
	ask(t, http.MethodGet, url+"/plain", "X-API-Key: "+key).wantStatus(t, 200).wantHeader(t, "X-RateLimit-Remaining", "98")
	release <- struct{}{}
	if err := <-held; err != nil {
		t.Fatal(err)
	}
	wantSlotFreed(t, url+"/own", key).wantHeader(t, "X-RateLimit-Remaining", "97")
}
