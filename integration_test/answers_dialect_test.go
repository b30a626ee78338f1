package integration

import (
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// checkBody compares a refusal with what an SDK of that dialect parses.
var checkBody = map[string]func(*testing.T, *refusalCase, *reply){
	"zejzl": checkZejzlBody, "openai": checkOpenAIBody, "anthropic": checkAnthropicBody,
	"gemini": checkGeminiBody, "problem": checkProblemBody,
}

// wantFields fails the test unless the object has exactly these fields.
func wantFields(t *testing.T, doc map[string]any, names ...string) {
	t.Helper()
	slices.Sort(names)
	if got := slices.Sorted(maps.Keys(doc)); !slices.Equal(got, names) {
		t.Errorf("fields %q, want %q", got, names)
	}
}

func wantText(t *testing.T, doc map[string]any, name string) string {
	t.Helper()
	s, ok := doc[name].(string)
	if !ok || s == "" {
		t.Errorf("field %s is %v, want a text", name, doc[name])
	}
	return s
}

func wantValue(t *testing.T, doc map[string]any, name string, want any) {
	t.Helper()
	if got := doc[name]; !reflect.DeepEqual(got, want) {
		t.Errorf("field %s is %v, want %v", name, got, want)
	}
}

func inner(t *testing.T, doc map[string]any, name string) map[string]any {
	t.Helper()
	object, ok := doc[name].(map[string]any)
	if !ok {
		t.Fatalf("field %s is %v, want an object", name, doc[name])
	}
	return object
}

func checkZejzlBody(t *testing.T, c *refusalCase, got *reply) {
	t.Helper()
	got.wantHeader(t, "Content-Type", "application/json")
	doc := got.object(t)
	wantFields(t, doc, "error", "code", "detail")
	wantValue(t, doc, "code", c.code)
	wantText(t, doc, "detail")
	if sentence := wantText(t, doc, "error"); c.sentence != "" && sentence != c.sentence {
		t.Errorf("sentence %q, want %q", sentence, c.sentence)
	}
}

func checkOpenAIBody(t *testing.T, c *refusalCase, got *reply) {
	t.Helper()
	got.wantHeader(t, "Content-Type", "application/json")
	doc := got.object(t)
	wantFields(t, doc, "error")
	detail := inner(t, doc, "error")
	wantFields(t, detail, "message", "type", "param", "code")
	wantText(t, detail, "message")
	wantValue(t, detail, "type", c.openAI[0])
	wantValue(t, detail, "code", c.openAI[1])
	wantValue(t, detail, "param", nil)
}

func checkAnthropicBody(t *testing.T, c *refusalCase, got *reply) {
	t.Helper()
	got.wantHeader(t, "Content-Type", "application/json")
	doc := got.object(t)
	wantFields(t, doc, "type", "error", "request_id")
	wantValue(t, doc, "type", "error")
	wantValue(t, doc, "request_id", got.Header.Get("X-Request-Id"))
	detail := inner(t, doc, "error")
	wantFields(t, detail, "type", "message")
	wantText(t, detail, "message")
	wantValue(t, detail, "type", c.words[0])
}

func checkGeminiBody(t *testing.T, c *refusalCase, got *reply) {
	t.Helper()
	got.wantHeader(t, "Content-Type", "application/json")
	doc := got.object(t)
	wantFields(t, doc, "error")
	detail := inner(t, doc, "error")
	wantText(t, detail, "message")
	wantValue(t, detail, "code", float64(c.status))
	wantValue(t, detail, "status", c.words[1])
	if c.code != "rate_limited" {
		return
	}
	list, ok := detail["details"].([]any)
	if !ok || len(list) != 1 {
		t.Fatalf("details %v, want one", detail["details"])
	}
	retry, _ := list[0].(map[string]any)
	wantFields(t, retry, "@type", "retryDelay")
	wantValue(t, retry, "@type", "type.googleapis.com/google.rpc.RetryInfo")
	seconds, ok := strings.CutSuffix(wantText(t, retry, "retryDelay"), "s")
	if delay := parseFloat(t, seconds); !ok || delay <= 0 || delay > parseFloat(t, got.Header.Get("Retry-After")) {
		t.Errorf("retryDelay %v beside Retry-After %s", retry["retryDelay"], got.Header.Get("Retry-After"))
	}
}

// checkProblemBody: RFC 9457.
func checkProblemBody(t *testing.T, c *refusalCase, got *reply) {
	t.Helper()
	got.wantHeader(t, "Content-Type", "application/problem+json")
	doc := got.object(t)
	wantText(t, doc, "type")
	wantText(t, doc, "title")
	wantText(t, doc, "detail")
	wantValue(t, doc, "status", float64(c.status))
	wantValue(t, doc, "code", c.code)
	if c.code == "rate_limited" {
		wantValue(t, doc, "violated-policies", []any{map[string]string{"minute": "1m", "hour": "1h"}[c.key]})
	}
}

// TestAnswersAuto: the caller's dialect is found without being told.
func TestAnswersAuto(t *testing.T) {
	a := startAPI(t)
	for _, tc := range []struct {
		want, path string
		headers    []string
	}{
		{"zejzl", "/", nil},
		{"zejzl", "/api/chat", nil},
		{"zejzl", "/api/v1/things", nil},
		{"zejzl", "/v10/things", nil},
		{"zejzl", "/x?next=/v1/messages", nil},
		{"openai", "/v1/models", nil},
		{"openai", "/v1/chat/completions", nil},
		{"openai", "/openai/deployments/a/chat/completions", nil},
		{"openai", "/api/completions", nil},
		{"openai", "/api/responses", nil},
		{"openai", "/api/embeddings?x=1", nil},
		{"openai", "/x", []string{"X-Stainless-Lang: js"}},
		{"anthropic", "/v1/messages", nil},
		{"anthropic", "/proxy/v1/messages/count_tokens", nil},
		{"anthropic", "/v1/models", []string{"anthropic-version: 2023-06-01"}},
		{"anthropic", "/v1/messages", []string{"X-Stainless-Lang: js"}},
		{"gemini", "/v1beta/models", nil},
		{"gemini", "/v1/models/gemini-pro:generateContent", nil},
		{"gemini", "/models/gemini-pro:streamGenerateContent?alt=sse", nil},
		{"problem", "/x", []string{"Accept: application/problem+json"}},
		{"problem", "/v1/messages", []string{"Accept: application/json, application/problem+json;q=0.9", "anthropic-version: 2023-06-01"}},
	} {
		t.Run(tc.want+" "+tc.path, func(t *testing.T) {
			c := refusalCase{status: 401, code: "missing_key", openAI: noKey, words: noAuth, also: challenge}
			got := ask(t, http.MethodGet, "http://"+a.sites["auto"]+tc.path, tc.headers...)
			c.wantRefusal(t, got)
			checkBody[tc.want](t, &c, got)
		})
	}
}

// TestAnswersAutoAfterRewrite: the dialect follows the path that the caller
// sent, and an error from behind speaks it too.
func TestAnswersAutoAfterRewrite(t *testing.T) {
	key := newKey(t)
	site, addr := plainSite(t, "\tzejzl_auth\n\trewrite * /v1/chat/completions\n\thandle {\n\t\terror \"no\" 404\n\t}")
	start(t, preamble(t, "")+site, "ZEJZL_API_KEY_A="+key+":pro")
	c := refusalCase{status: 404, code: "not_found", words: [2]string{"not_found_error", "NOT_FOUND"}, behind: true}
	got := ask(t, http.MethodPost, "http://"+addr+"/v1/messages", "X-API-Key: "+key)
	c.wantRefusal(t, got)
	checkAnthropicBody(t, &c, got)
	got = ask(t, http.MethodPost, "http://"+addr+"/api/chat", "X-API-Key: "+key)
	c.wantRefusal(t, got)
	checkZejzlBody(t, &c, got)
}
