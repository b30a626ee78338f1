package zejzlauth

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// dialect is how errors and limit headers look to a caller.
type dialect uint8

const (
	dialectAuto dialect = iota
	dialectZejzl
	dialectOpenAI
	dialectAnthropic
	dialectGemini
	dialectProblem // RFC 9457
	dialectCaddy   // errors go to Caddy's own handle_errors
)

var dialects = map[string]dialect{
	"": dialectAuto, "auto": dialectAuto, "zejzl": dialectZejzl, "openai": dialectOpenAI,
	"anthropic": dialectAnthropic, "gemini": dialectGemini, "problem": dialectProblem, "caddy": dialectCaddy,
}

const dialectNames = "auto, zejzl, openai, anthropic, gemini, problem or caddy"

// speaks finds the dialect of the caller, so that its SDK raises its own
// typed error. Ollama's clients read the zejzl dialect.
func speaks(r *http.Request, path string) dialect {
	for _, accept := range r.Header["Accept"] {
		if strings.Contains(accept, "application/problem+json") {
			return dialectProblem
		}
	}
	if len(r.Header["Anthropic-Version"]) > 0 || strings.Contains(path, "/v1/messages") {
		return dialectAnthropic
	}
	if strings.Contains(path, "/v1beta/") || strings.HasSuffix(path, ":generateContent") ||
		strings.HasSuffix(path, ":streamGenerateContent") {
		return dialectGemini
	}
	if len(r.Header["X-Stainless-Lang"]) > 0 || strings.HasPrefix(path, "/v1/") {
		return dialectOpenAI
	}
	for _, end := range [...]string{"/completions", "/responses", "/embeddings"} {
		if strings.HasSuffix(path, end) {
			return dialectOpenAI
		}
	}
	return dialectZejzl
}

// reason is a reason code: part of the contract with callers, of log lines
// and of metric labels.
type reason string

const (
	reasonNone               reason = ""
	reasonMissingKey         reason = "missing_key"
	reasonInvalidKey         reason = "invalid_key"
	reasonAmbiguousKey       reason = "ambiguous_key"
	reasonInvalidPath        reason = "invalid_path"
	reasonBadRequest         reason = "bad_request"
	reasonMethodNotAllowed   reason = "method_not_allowed"
	reasonForbidden          reason = "forbidden"
	reasonRateLimited        reason = "rate_limited"
	reasonConcurrencyLimited reason = "concurrency_limited"
	reasonNotFound           reason = "not_found"
	reasonRequestTooLarge    reason = "request_too_large"
	reasonInternalError      reason = "internal_error"
	reasonUpstreamError      reason = "upstream_error"
	reasonStarting           reason = "starting"
)

// wording is a reason in the words of a person and of the providers.
type wording struct {
	status           int
	sentence, detail string
	openAI           [2]string // type, code
	anthropic        string
	gemini           string
}

var wordings = map[reason]wording{
	reasonMissingKey: {
		http.StatusUnauthorized, "Authentication required",
		"Send your API key in the X-API-Key header, or as a Bearer token in Authorization.",
		[2]string{"invalid_request_error", "invalid_api_key"},
		"authentication_error", "UNAUTHENTICATED",
	},
	reasonInvalidKey: {
		http.StatusUnauthorized, "Invalid API key",
		"Check the key for missing characters, or ask the operator for a new one.",
		[2]string{"invalid_request_error", "invalid_api_key"},
		"authentication_error", "UNAUTHENTICATED",
	},
	reasonAmbiguousKey: {
		http.StatusBadRequest, "More than one API key",
		"Send one key in one header.",
		[2]string{"invalid_request_error", "ambiguous_key"},
		"invalid_request_error", "INVALID_ARGUMENT",
	},
	reasonInvalidPath: {
		http.StatusBadRequest, "Invalid path",
		"Send the path without dot segments, backslashes and control characters, in any spelling.",
		[2]string{"invalid_request_error", "invalid_path"},
		"invalid_request_error", "INVALID_ARGUMENT",
	},
	reasonBadRequest: {
		http.StatusBadRequest, "Bad request",
		"The request could not be served as it was sent.",
		[2]string{"invalid_request_error", "bad_request"},
		"invalid_request_error", "INVALID_ARGUMENT",
	},
	reasonMethodNotAllowed: {
		http.StatusMethodNotAllowed, "Method not allowed",
		"Use one of " + allowedMethods + ".",
		[2]string{"invalid_request_error", "method_not_allowed"},
		"invalid_request_error", "INVALID_ARGUMENT",
	},
	reasonForbidden: {
		http.StatusForbidden, "Forbidden",
		"This is not allowed here.",
		[2]string{"invalid_request_error", "forbidden"},
		"permission_error", "PERMISSION_DENIED",
	},
	reasonRateLimited: {
		http.StatusTooManyRequests, "Rate limit exceeded",
		"Wait as long as Retry-After says, then try again.",
		[2]string{"requests", "rate_limit_exceeded"},
		"rate_limit_error", "RESOURCE_EXHAUSTED",
	},
	reasonConcurrencyLimited: {
		http.StatusTooManyRequests, "Too many requests at once",
		"Wait until one of your requests has ended.",
		[2]string{"requests", "rate_limit_exceeded"},
		"rate_limit_error", "RESOURCE_EXHAUSTED",
	},
	reasonNotFound: {
		http.StatusNotFound, "Not found",
		"There is nothing at this path.",
		[2]string{"invalid_request_error", "not_found"},
		"not_found_error", "NOT_FOUND",
	},
	reasonRequestTooLarge: {
		http.StatusRequestEntityTooLarge, "Request too large",
		"Send a smaller body.",
		[2]string{"invalid_request_error", "request_too_large"},
		"request_too_large", "INVALID_ARGUMENT",
	},
	reasonInternalError: {
		http.StatusInternalServerError, "Internal error",
		"Try again; if it stays, give the operator the request id.",
		[2]string{"server_error", "internal_error"},
		"api_error", "INTERNAL",
	},
	reasonUpstreamError: {
		http.StatusBadGateway, "The backend failed",
		"Try again; if it stays, give the operator the request id.",
		[2]string{"server_error", "upstream_error"},
		"api_error", "UNAVAILABLE",
	},
	reasonStarting: {
		http.StatusServiceUnavailable, "Starting",
		"The server is still loading keys. Try again in a moment.",
		[2]string{"server_error", "starting"},
		"overloaded_error", "UNAVAILABLE",
	},
}

// refusal says no: which status, why, and from when on it would be yes. It is
// an error so that a guard further in can hand it to the outermost one.
type refusal struct {
	status int
	reason reason
	wait   time.Duration // until it makes sense to try again; 0: not known
	policy string        // label of the window that is full
	err    error         // what failed behind the guard; never shown to the caller
}

func refuse(why reason) *refusal {
	f := &refusal{status: wordings[why].status, reason: why}
	if why == reasonConcurrencyLimited || why == reasonStarting {
		f.wait = time.Second // nobody knows when a request will end
	}
	return f
}

// Error implements error.
func (f *refusal) Error() string { return string(f.reason) }

// refusalOf makes a refusal of an error from behind the guard.
func refusalOf(err error) *refusal {
	if inner, ok := errors.AsType[*refusal](err); ok {
		return inner
	}
	f := &refusal{status: http.StatusInternalServerError, err: err}
	if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err); ok && handlerErr.StatusCode >= http.StatusBadRequest {
		f.status = handlerErr.StatusCode
	}
	switch f.status {
	case http.StatusForbidden:
		f.reason = reasonForbidden
	case http.StatusNotFound:
		f.reason = reasonNotFound
	case http.StatusMethodNotAllowed:
		f.reason = reasonMethodNotAllowed
	case http.StatusRequestEntityTooLarge:
		f.reason = reasonRequestTooLarge
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		f.reason = reasonUpstreamError
	default:
		f.reason = reasonBadRequest
		if f.status >= http.StatusInternalServerError {
			f.reason = reasonInternalError
		}
	}
	return f
}

// longestRetry is how long official SDKs wait on a server's word; beyond it
// they would retry early, so they are told not to.
const longestRetry = time.Minute

// setHeaders writes what belongs to the refusal itself.
func (f *refusal) setHeaders(h http.Header) {
	switch f.reason {
	case reasonMissingKey:
		h["Www-Authenticate"] = []string{`Bearer realm="zejzl"`}
	case reasonInvalidKey:
		h["Www-Authenticate"] = []string{`Bearer realm="zejzl", error="invalid_token"`}
	case reasonMethodNotAllowed:
		if f.err == nil {
			h["Allow"] = []string{allowedMethods}
		}
	case reasonRateLimited:
		// RFC 9110 knows whole seconds only: rounded up, so that waiting is enough.
		h["Retry-After"] = []string{strconv.FormatInt(max(1, ceilSeconds(f.wait)), 10)}
		if f.wait <= longestRetry {
			ms := max(1, ceilTo(f.wait, time.Millisecond)/time.Millisecond)
			h["Retry-After-Ms"] = []string{strconv.FormatInt(int64(ms), 10)}
		} else {
			h["X-Should-Retry"] = []string{"false"}
		}
	case reasonConcurrencyLimited, reasonStarting:
		h["Retry-After"] = []string{strconv.FormatInt(ceilSeconds(f.wait), 10)}
	}
	h["Cache-Control"] = []string{"no-store"}
}

// body is the refusal in the caller's dialect, and its media type.
func (f *refusal) body(d dialect, requestID string) ([]byte, string) {
	words := wordings[f.reason]
	message := words.sentence + ". " + words.detail
	var doc any
	switch d {
	case dialectOpenAI:
		doc = openAIError{openAIDetail{Message: message, Type: words.openAI[0], Code: words.openAI[1]}}
	case dialectAnthropic:
		kind := words.anthropic
		if f.status == http.StatusGatewayTimeout {
			kind = "timeout_error"
		}
		doc = anthropicError{"error", anthropicDetail{kind, message}, requestID}
	case dialectGemini:
		detail := geminiDetail{Code: f.status, Message: message, Status: words.gemini}
		if f.status == http.StatusGatewayTimeout {
			detail.Status = "DEADLINE_EXCEEDED"
		}
		if f.status == http.StatusTooManyRequests && f.wait > 0 {
			delay := strconv.FormatFloat(ceilTo(f.wait, time.Millisecond).Seconds(), 'f', -1, 64) + "s"
			detail.Details = []retryInfo{{"type.googleapis.com/google.rpc.RetryInfo", delay}}
		}
		doc = geminiError{detail}
	case dialectProblem:
		p := problem{Type: "about:blank", Title: http.StatusText(f.status), Status: f.status, Detail: message, Code: f.reason}
		if f.reason == reasonRateLimited {
			p.Type, p.Title = "https://iana.org/assignments/http-problem-types#quota-exceeded", words.sentence
			p.ViolatedPolicies = []string{f.policy}
		}
		doc = p
	default:
		doc = zejzlError{words.sentence, f.reason, words.detail}
	}
	body, err := json.Marshal(doc)
	if err != nil { // plain structs of strings and numbers
		panic(err)
	}
	if d == dialectProblem {
		return body, "application/problem+json"
	}
	return body, "application/json"
}

type (
	zejzlError struct {
		Error  string `json:"error"`
		Code   reason `json:"code"`
		Detail string `json:"detail"`
	}
	openAIError struct {
		Error openAIDetail `json:"error"`
	}
	openAIDetail struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"` // SDKs expect all four fields
		Code    string  `json:"code"`
	}
	anthropicError struct {
		Type      string          `json:"type"`
		Error     anthropicDetail `json:"error"`
		RequestID string          `json:"request_id"`
	}
	anthropicDetail struct {
		Type    string `json:"type"`
		Message string `json:"message"`
	}
	geminiError struct {
		Error geminiDetail `json:"error"`
	}
	geminiDetail struct {
		Code    int         `json:"code"`
		Message string      `json:"message"`
		Status  string      `json:"status"`
		Details []retryInfo `json:"details,omitempty"`
	}
	retryInfo struct {
		Type       string `json:"@type"`
		RetryDelay string `json:"retryDelay"`
	}
	problem struct {
		Type             string   `json:"type"`
		Title            string   `json:"title"`
		Status           int      `json:"status"`
		Detail           string   `json:"detail"`
		Code             reason   `json:"code"`
		ViolatedPolicies []string `json:"violated-policies,omitempty"`
	}
)
