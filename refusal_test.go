package zejzlauth

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// One sentence of the design, one row.
func TestSpeaks(t *testing.T) {
	for _, c := range []struct {
		path   string
		header []string
		want   dialect
	}{
		{"/api/chat", nil, dialectZejzl},
		// Accept: application/problem+json → problem, before all else
		{"/api/chat", []string{"Accept", "application/problem+json"}, dialectProblem},
		{"/v1/messages", []string{"Accept", "application/json, application/problem+json;q=0.9", "Anthropic-Version", "x"}, dialectProblem},
		{"/api/chat", []string{"Accept", "application/json", "Accept", "application/problem+json"}, dialectProblem},
		{"/api/chat", []string{"Accept", "*/*"}, dialectZejzl},
		{"/api/chat", []string{"Accept", "application/json"}, dialectZejzl},
		// anthropic-version header or /v1/messages anywhere in the path → anthropic
		{"/api/chat", []string{"Anthropic-Version", "2023-06-01"}, dialectAnthropic},
		{"/v1/messages", nil, dialectAnthropic},
		{"/proxy/v1/messages/count_tokens", nil, dialectAnthropic},
		{"/v1/message", nil, dialectOpenAI},
		{"/v1/chat/completions", []string{"Anthropic-Version", "x", "X-Stainless-Lang", "js"}, dialectAnthropic},
		// /v1beta/, :generateContent, :streamGenerateContent → gemini
		{"/v1beta/models", nil, dialectGemini},
		{"/x/v1beta/models/m:countTokens", nil, dialectGemini},
		{"/v1/models/gemini:generateContent", nil, dialectGemini},
		{"/v1/models/gemini:streamGenerateContent", []string{"X-Stainless-Lang", "js"}, dialectGemini},
		{"/v1beta", nil, dialectZejzl},
		// x-stainless-lang, a path starting /v1/ or ending in one of four → openai
		{"/api/chat", []string{"X-Stainless-Lang", "python"}, dialectOpenAI},
		{"/v1/models", nil, dialectOpenAI},
		{"/openai/chat/completions", nil, dialectOpenAI},
		{"/openai/completions", nil, dialectOpenAI},
		{"/openai/responses", nil, dialectOpenAI},
		{"/openai/embeddings", nil, dialectOpenAI},
		{"/x/v1/models", nil, dialectZejzl},
		{"/openai/responses/1", nil, dialectZejzl},
		{"/embeddingss", nil, dialectZejzl},
		{"/v1", nil, dialectZejzl},
		// Ollama's clients read the zejzl dialect
		{"/api/generate", nil, dialectZejzl},
	} {
		if got := speaks(newRequest("POST", "/", c.header...), c.path); got != c.want {
			t.Errorf("%s %q: %d, want %d", c.path, c.header, got, c.want)
		}
	}
}

// reasons is the contract: status, zejzl sentence, and the provider's words.
var reasons = map[reason]struct {
	status                          int
	sentence                        string
	openAIType, openAI, claude, rpc string
}{
	"missing_key":         {401, "Authentication required", "invalid_request_error", "invalid_api_key", "authentication_error", "UNAUTHENTICATED"},
	"invalid_key":         {401, "Invalid API key", "invalid_request_error", "invalid_api_key", "authentication_error", "UNAUTHENTICATED"},
	"ambiguous_key":       {400, "", "invalid_request_error", "ambiguous_key", "invalid_request_error", "INVALID_ARGUMENT"},
	"invalid_path":        {400, "", "invalid_request_error", "invalid_path", "invalid_request_error", "INVALID_ARGUMENT"},
	"bad_request":         {400, "", "invalid_request_error", "bad_request", "invalid_request_error", "INVALID_ARGUMENT"},
	"method_not_allowed":  {405, "", "invalid_request_error", "method_not_allowed", "invalid_request_error", "INVALID_ARGUMENT"},
	"forbidden":           {403, "", "invalid_request_error", "forbidden", "permission_error", "PERMISSION_DENIED"},
	"rate_limited":        {429, "Rate limit exceeded", "requests", "rate_limit_exceeded", "rate_limit_error", "RESOURCE_EXHAUSTED"},
	"concurrency_limited": {429, "", "requests", "rate_limit_exceeded", "rate_limit_error", "RESOURCE_EXHAUSTED"},
	"not_found":           {404, "", "invalid_request_error", "not_found", "not_found_error", "NOT_FOUND"},
	"request_too_large":   {413, "", "invalid_request_error", "request_too_large", "request_too_large", "INVALID_ARGUMENT"},
	"internal_error":      {500, "", "server_error", "internal_error", "api_error", "INTERNAL"},
	"upstream_error":      {502, "", "server_error", "upstream_error", "api_error", "UNAVAILABLE"},
	"starting":            {503, "", "server_error", "starting", "overloaded_error", "UNAVAILABLE"},
}

func TestRefusalBodies(t *testing.T) {
	if got, want := slices.Sorted(maps.Keys(wordings)), slices.Sorted(maps.Keys(reasons)); !slices.Equal(got, want) {
		t.Fatalf("reasons %q, want %q", got, want)
	}
	for why, want := range reasons {
		f := refuse(why)
		if f.status != want.status {
			t.Errorf("%s: status %d, want %d", why, f.status, want.status)
		}
		words := wordings[why]
		if want.sentence != "" && words.sentence != want.sentence || words.sentence == "" || words.detail == "" {
			t.Errorf("%s: %q, %q", why, words.sentence, words.detail)
		}
		message := words.sentence + ". " + words.detail
		retry, violated := "", ""
		if why == reasonRateLimited {
			f.wait, f.policy = 34400*time.Millisecond-time.Microsecond, "1m"
			retry = `,"details":[{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"34.4s"}]`
			violated = `,"violated-policies":["1m"]`
		}
		if why == reasonConcurrencyLimited {
			retry = `,"details":[{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"1s"}]`
		}
		problemType, title := "about:blank", http.StatusText(want.status)
		if why == reasonRateLimited {
			problemType, title = "https://iana.org/assignments/http-problem-types#quota-exceeded", "Rate limit exceeded"
		}
		for d, golden := range map[dialect]string{
			dialectZejzl:     fmt.Sprintf(`{"error":%q,"code":%q,"detail":%q}`, words.sentence, why, words.detail),
			dialectOpenAI:    fmt.Sprintf(`{"error":{"message":%q,"type":%q,"param":null,"code":%q}}`, message, want.openAIType, want.openAI),
			dialectAnthropic: fmt.Sprintf(`{"type":"error","error":{"type":%q,"message":%q},"request_id":"req"}`, want.claude, message),
			dialectGemini:    fmt.Sprintf(`{"error":{"code":%d,"message":%q,"status":%q%s}}`, want.status, message, want.rpc, retry),
			dialectProblem: fmt.Sprintf(`{"type":%q,"title":%q,"status":%d,"detail":%q,"code":%q%s}`,
				problemType, title, want.status, message, why, violated),
		} {
			body, mediaType := f.body(d, "req")
			wantType := "application/json"
			if d == dialectProblem {
				wantType = "application/problem+json"
			}
			if string(body) != golden || mediaType != wantType {
				t.Errorf("%s in dialect %d (%s):\n%s\nwant\n%s", why, d, mediaType, body, golden)
			}
		}
	}
	timeout := refusalOf(caddyhttp.Error(http.StatusGatewayTimeout, nil))
	if body, _ := timeout.body(dialectAnthropic, ""); !strings.Contains(string(body), `"timeout_error"`) {
		t.Errorf("Anthropic 504: %s", body)
	}
}

func TestRefusalHeaders(t *testing.T) {
	for why := range reasons {
		h := make(http.Header)
		refuse(why).setHeaders(h)
		want := map[string][]string{"Cache-Control": {"no-store"}}
		switch why {
		case "missing_key":
			want["Www-Authenticate"] = []string{`Bearer realm="zejzl"`}
		case "invalid_key":
			want["Www-Authenticate"] = []string{`Bearer realm="zejzl", error="invalid_token"`}
		case "method_not_allowed":
			want["Allow"] = []string{"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"}
		case "concurrency_limited", "starting":
			want["Retry-After"] = []string{"1"}
		case "rate_limited":
			want["Retry-After"], want["Retry-After-Ms"] = []string{"1"}, []string{"1"}
		}
		if !maps.EqualFunc(h, want, slices.Equal) {
			t.Errorf("%s: %v, want %v", why, h, want)
		}
	}
	for wait, want := range map[time.Duration][3]string{
		time.Microsecond:                   {"1", "1", ""},
		time.Millisecond:                   {"1", "1", ""},
		time.Millisecond + 1:               {"1", "2", ""},
		time.Second:                        {"1", "1000", ""},
		time.Second + time.Microsecond:     {"2", "1001", ""},
		time.Minute:                        {"60", "60000", ""},
		time.Minute + time.Microsecond:     {"61", "", "false"},
		24*time.Hour - 500*time.Nanosecond: {"86400", "", "false"},
	} {
		f := refuse(reasonRateLimited)
		f.wait = wait
		h := make(http.Header)
		f.setHeaders(h)
		if got := [3]string{h.Get("Retry-After"), h.Get("Retry-After-Ms"), h.Get("X-Should-Retry")}; got != want {
			t.Errorf("%s: %q, want %q", wait, got, want)
		}
	}
	// A 405 from behind is the backend's: it knows its methods.
	h := http.Header{"Allow": {"GET"}}
	refusalOf(caddyhttp.Error(http.StatusMethodNotAllowed, nil)).setHeaders(h)
	if h.Get("Allow") != "GET" {
		t.Errorf("Allow %q", h["Allow"])
	}
}

func TestRefusalOf(t *testing.T) {
	plain := errors.New("plain")
	for _, c := range []struct {
		err    error
		status int
		why    reason
	}{
		{plain, 500, "internal_error"},
		{&panicError{value: "x"}, 500, "internal_error"},
		{caddyhttp.Error(500, plain), 500, "internal_error"},
		{caddyhttp.Error(507, plain), 507, "internal_error"},
		{caddyhttp.Error(502, plain), 502, "upstream_error"},
		{caddyhttp.Error(503, plain), 503, "upstream_error"},
		{caddyhttp.Error(504, plain), 504, "upstream_error"},
		{caddyhttp.Error(404, plain), 404, "not_found"},
		{caddyhttp.Error(403, plain), 403, "forbidden"},
		{caddyhttp.Error(405, plain), 405, "method_not_allowed"},
		{caddyhttp.Error(413, plain), 413, "request_too_large"},
		{caddyhttp.Error(400, plain), 400, "bad_request"},
		{caddyhttp.Error(415, plain), 415, "bad_request"},
		{caddyhttp.Error(401, plain), 401, "bad_request"},
		{fmt.Errorf("wrapped: %w", caddyhttp.Error(404, plain)), 404, "not_found"},
		{caddyhttp.HandlerError{Err: plain}, 500, "internal_error"},
		{caddyhttp.Error(200, plain), 500, "internal_error"},
		{fmt.Errorf("wrapped: %w", refuse(reasonRateLimited)), 429, "rate_limited"},
	} {
		if f := refusalOf(c.err); f.status != c.status || f.reason != c.why {
			t.Errorf("%v: %d %s, want %d %s", c.err, f.status, f.reason, c.status, c.why)
		}
	}
	if got := (&panicError{value: "secret"}).Error(); strings.Contains(got, "secret") {
		t.Errorf("the text of a panic: %s", got)
	}
}

// Through the guard: the dialect of the caller, ids, and a body that belongs.
func TestRefusalAnswers(t *testing.T) {
	r := newRig(t, &Guard{CORS: &CORS{Origins: []string{corsTestOrigin}}})
	for _, c := range []struct {
		req       *http.Request
		status    int
		mediaType string
	}{
		{newRequest("POST", "/v1/messages", "Origin", corsTestOrigin), 401, "application/json"},
		{newRequest("POST", "/v1/chat/completions", "X-Api-Key", "wrong"), 401, "application/json"},
		{newRequest("HEAD", "/x", "Accept", "application/problem+json"), 401, "application/problem+json"},
		{newRequest("GET", "/x/.."), 400, "application/json"},
		{newRequest("GET", "/x", "X-Api-Key", "a", "Api-Key", "b"), 400, "application/json"},
		{newRequest("TRACE", "/x"), 405, "application/json"},
	} {
		resp := r.must(t, c.status, c.req, notReached(t))
		body := bodyOf(t, resp)
		id := resp.Header.Get("X-Request-Id")
		if len(id) != 36 || resp.Header.Get("Cache-Control") != "no-store" || resp.Header.Get("Content-Type") != c.mediaType {
			t.Errorf("%s: %v", c.req.URL, resp.Header)
		}
		if (resp.Header.Get("Access-Control-Allow-Origin") == corsTestOrigin) != (c.req.Header.Get("Origin") != "") {
			t.Errorf("%s: CORS headers %v", c.req.URL, resp.Header)
		}
		for name := range resp.Header {
			if strings.Contains(strings.ToLower(name), "ratelimit") {
				t.Errorf("%s: limit header %s on a refusal that is no 429", c.req.URL, name)
			}
		}
		if r.logs.FilterMessage("request refused").FilterFieldKey("request_id").Len() == 0 {
			t.Error("not logged")
		}
		if c.req.Method == http.MethodHead {
			if body != "" || resp.Header.Get("Content-Length") == "0" {
				t.Errorf("HEAD: %q %v", body, resp.Header)
			}
			continue
		}
		if want := fmt.Sprint(len(body)); resp.Header.Get("Content-Length") != want || !json.Valid([]byte(body)) {
			t.Errorf("%s: %s %v", c.req.URL, body, resp.Header)
		}
		if anthropic := c.req.URL.Path == "/v1/messages"; (resp.Header.Get("Request-Id") == id) != anthropic || strings.Contains(body, id) != anthropic {
			t.Errorf("%s: request id in %s %v", c.req.URL, body, resp.Header)
		}
	}
}

// A limit behind the guard tells no time, so none is made up for it.
func TestRefusalBehindHasNoRetryInfo(t *testing.T) {
	body, _ := refusalOf(caddyhttp.Error(http.StatusTooManyRequests, errors.New("inner limit"))).body(dialectGemini, "req")
	if strings.Contains(string(body), "RetryInfo") {
		t.Errorf("%s", body)
	}
}
