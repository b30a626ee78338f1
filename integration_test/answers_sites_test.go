package integration

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

// preamble is the global block of a server whose sites have ports of their own.
func preamble(t testing.TB, options string) string {
	return fmt.Sprintf(`{
	admin ADMIN
	http_port %d
	https_port %d
	skip_install_trust
	log default {
		format zejzl json
		level DEBUG
	}
	%s
}
`, freePort(t), freePort(t), options)
}

// plainSite is a site over plain HTTP on a port of its own.
func plainSite(t testing.TB, body string) (caddyfile, addr string) {
	t.Helper()
	addr = fmt.Sprintf("127.0.0.1:%d", freePort(t))
	return fmt.Sprintf("http://%s {\n\tbind 127.0.0.1\n%s\n}\n", addr, body), addr
}

// newBackend runs a backend on loopback and returns its host and port.
func newBackend(t testing.TB, handler http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(func() {
		server.CloseClientConnections() // a test that failed may have left one waiting
		server.Close()
	})
	return server.Listener.Addr().String()
}

// hold keeps a request waiting until release, or until its client has left.
func hold(r *http.Request, release <-chan struct{}) {
	select {
	case <-release:
	case <-r.Context().Done():
	}
}

// digestOf is a secret as configuration holds it.
func digestOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// reply is an answer that was read to its end.
type reply struct {
	*http.Response
	text string
}

// plainClient shows answers as they are: no decompression, no redirects.
var plainClient = &http.Client{
	Transport:     &http.Transport{DisableCompression: true, DisableKeepAlives: true},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Timeout:       30 * time.Second,
}

func newRequest(t testing.TB, method, url, body string, headers ...string) *http.Request {
	t.Helper()
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, url, reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, header := range headers {
		name, value, ok := strings.Cut(header, ": ")
		if !ok {
			t.Fatalf("header %q: expected a name, a colon and a space", name)
		}
		if name == "Host" {
			req.Host = value
			continue
		}
		req.Header.Add(name, value)
	}
	return req
}

// ask sends a request without a body, with headers as "Name: value".
func ask(t testing.TB, method, url string, headers ...string) *reply {
	t.Helper()
	return do(t, plainClient, newRequest(t, method, url, "", headers...))
}

func do(t testing.TB, client *http.Client, req *http.Request) *reply {
	t.Helper()
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("reading the body: %v", err)
	}
	return &reply{resp, string(body)}
}

// wantStatus ends the test if the answer is not the expected one.
func (r *reply) wantStatus(t testing.TB, status int) *reply {
	t.Helper()
	if r.StatusCode != status {
		t.Fatalf("status %d, want %d\n%v\n%s", r.StatusCode, status, r.Header, r.text)
	}
	return r
}

// wantHeader fails the test unless the header has exactly these lines.
func (r *reply) wantHeader(t testing.TB, name string, lines ...string) {
	t.Helper()
	if got := r.Header[http.CanonicalHeaderKey(name)]; !slices.Equal(got, lines) {
		t.Errorf("%s: got %q, want %q", name, got, lines)
	}
}

// object parses the body as one JSON object.
func (r *reply) object(t testing.TB) map[string]any {
	t.Helper()
	var doc map[string]any
	if err := json.Unmarshal([]byte(r.text), &doc); err != nil {
		t.Fatalf("body %q: %v", r.text, err)
	}
	return doc
}

// logLines waits until a log line has the fields, each as it stands in JSON,
// and returns all that do, parsed.
func (s *server) logLines(fields ...string) []map[string]any {
	s.t.Helper()
	var found []map[string]any
	s.waitUntil("a log line with "+strings.Join(fields, " and "), func() bool {
		found = nil
		for line := range strings.Lines(s.log.String()) {
			var entry map[string]any
			lacks := func(field string) bool { return !strings.Contains(line, field) }
			if !slices.ContainsFunc(fields, lacks) && json.Unmarshal([]byte(line), &entry) == nil {
				found = append(found, entry)
			}
		}
		return len(found) > 0
	})
	return found
}
