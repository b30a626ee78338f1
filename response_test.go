package zejzlauth

import (
	"bufio"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// recordingWriter is a server's writer that notes every call, and the headers
// of each status as they were.
type recordingWriter struct {
	header http.Header
	calls  []string
	sent   []http.Header
	fails  error
}

func newRecordingWriter() *recordingWriter { return &recordingWriter{header: make(http.Header)} }

func (w *recordingWriter) Header() http.Header { return w.header }

func (w *recordingWriter) WriteHeader(status int) {
	w.calls = append(w.calls, "header "+http.StatusText(status))
	w.sent = append(w.sent, w.header.Clone())
}

func (w *recordingWriter) Write(p []byte) (int, error) {
	w.calls = append(w.calls, "write "+string(p))
	return len(p), w.fails
}

func (w *recordingWriter) ReadFrom(r io.Reader) (int64, error) {
	p, _ := io.ReadAll(r)
	w.calls = append(w.calls, "readfrom "+string(p))
	return int64(len(p)), w.fails
}

func (w *recordingWriter) FlushError() error {
	w.calls = append(w.calls, "flush")
	return w.fails
}

func (w *recordingWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	w.calls = append(w.calls, "hijack")
	return nil, nil, w.fails
}

func (w *recordingWriter) SetWriteDeadline(time.Time) error {
	w.calls = append(w.calls, "deadline")
	return w.fails
}

func (w *recordingWriter) Push(target string, _ *http.PushOptions) error {
	w.calls = append(w.calls, "push "+target)
	return w.fails
}

func wrapped(w http.ResponseWriter) *response {
	r := new(response)
	r.ResponseWriter = w
	r.guard = &Guard{header: mustRules()}
	r.begin(w.Header())
	return r
}

func mustRules() headerRules {
	rules, err := newHeaderRules(nil)
	if err != nil {
		panic(err)
	}
	return rules
}

func TestResponseCalls(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(w *response)
		want []string
	}{
		"write header": {func(w *response) { w.WriteHeader(204) }, []string{"header No Content"}},
		"write":        {func(w *response) { _, _ = w.Write([]byte("a")); _, _ = w.Write(nil) }, []string{"header OK", "write a", "write "}},
		"both":         {func(w *response) { w.WriteHeader(404); _, _ = w.Write([]byte("a")) }, []string{"header Not Found", "write a"}},
		"copy":         {func(w *response) { _, _ = io.Copy(w, struct{ io.Reader }{strings.NewReader("abc")}) }, []string{"header OK", "readfrom abc"}},
		"flush": {
			func(w *response) { _ = http.NewResponseController(w).Flush() },
			[]string{"header OK", "flush"},
		},
		"flush between": {func(w *response) { w.WriteHeader(201); _ = http.NewResponseController(w).Flush() }, []string{"header Created", "flush"}},
		"hijack":        {func(w *response) { _, _, _ = http.NewResponseController(w).Hijack() }, []string{"hijack"}},
		"websocket": {
			func(w *response) { w.WriteHeader(101); _, _, _ = http.NewResponseController(w).Hijack() },
			[]string{"header Switching Protocols", "hijack"},
		},
		"deadline": {func(w *response) { _ = http.NewResponseController(w).SetWriteDeadline(time.Time{}) }, []string{"deadline"}},
		"push":     {func(w *response) { _ = w.Push("/style.css", nil) }, []string{"push /style.css"}},
		"early hints": {
			func(w *response) { w.WriteHeader(103); w.WriteHeader(103); w.WriteHeader(200) },
			[]string{"header Early Hints", "header Early Hints", "header OK"},
		},
		"early hints and write": {func(w *response) { w.WriteHeader(100); _, _ = w.Write([]byte("a")) }, []string{"header Continue", "header OK", "write a"}},
		"twice":                 {func(w *response) { w.WriteHeader(200); w.WriteHeader(500) }, []string{"header OK", "header Internal Server Error"}},
	} {
		t.Run(name, func(t *testing.T) {
			inner := newRecordingWriter()
			w := wrapped(inner)
			w.Header().Set("X-Powered-By", "backend")
			w.Header().Set("X-Frame-Options", "ALLOW")
			c.do(w)
			if !slices.Equal(inner.calls, c.want) {
				t.Errorf("calls %q, want %q", inner.calls, c.want)
			}
			final := slices.IndexFunc(c.want, func(call string) bool {
				return strings.HasPrefix(call, "header ") && call != "header Early Hints" && call != "header Continue"
			})
			if want := final >= 0 || name == "hijack"; w.committed != want {
				t.Errorf("committed %v, want %v", w.committed, want)
			}
			if final < 0 {
				return
			}
			if h := inner.sent[final]; h.Get("X-Powered-By") != "" || h.Get("X-Frame-Options") != "DENY" || h.Get(cspHeader) != apiPolicy {
				t.Errorf("headers at the final status: %v", h)
			}
			for i, h := range inner.sent[:final] { // an informational response is the backend's matter
				if h.Get(cspHeader) != "" {
					t.Errorf("headers at status %d: %v", i, h)
				}
			}
		})
	}
}

func TestResponsePassesErrors(t *testing.T) {
	failed := errors.New("gone")
	inner := newRecordingWriter()
	inner.fails = failed
	w := wrapped(inner)
	if _, _, err := http.NewResponseController(w).Hijack(); !errors.Is(err, failed) || w.committed {
		t.Errorf("hijack: %v, committed %v", err, w.committed)
	}
	_, err := w.Write([]byte("x"))
	_, copyErr := w.ReadFrom(strings.NewReader("x"))
	for what, err := range map[string]error{
		"write": err, "copy": copyErr, "flush": w.FlushError(), "push": w.Push("/", nil),
		"deadline": http.NewResponseController(w).SetWriteDeadline(time.Time{}),
	} {
		if !errors.Is(err, failed) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A writer that can't flush or hijack says so through the wrapper too.
func TestResponseUnsupported(t *testing.T) {
	type plain struct{ http.ResponseWriter }
	w := wrapped(plain{newRecordingWriter()})
	if err := http.NewResponseController(w).Flush(); !errors.Is(err, http.ErrNotSupported) {
		t.Errorf("flush: %v", err)
	}
	if _, _, err := http.NewResponseController(w).Hijack(); !errors.Is(err, http.ErrNotSupported) {
		t.Errorf("hijack: %v", err)
	}
	if n, err := w.ReadFrom(strings.NewReader("abc")); n != 3 || err != nil {
		t.Errorf("copy: %d %v", n, err)
	}
}

// Through the guard and a real server: nothing written, events, a hijack.
func TestResponseOnTheWire(t *testing.T) {
	r := newRig(t, &Guard{Tiers: map[string]Tier{"pro": {
		Requests: []RequestLimit{{Limit: 100, Window: 60e9}}, Concurrent: 1,
	}}})
	var next caddyhttp.HandlerFunc
	done := make(chan error, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		done <- r.ServeHTTP(w, req, next)
	}))
	defer server.Close()
	call := func(handler caddyhttp.HandlerFunc) *http.Response {
		t.Helper()
		next = handler
		req, _ := http.NewRequest(http.MethodGet, server.URL+"/x", nil)
		req.Header.Set("X-Api-Key", r.secret)
		resp, err := server.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}

	resp := call(func(http.ResponseWriter, *http.Request) error { return nil })
	if err := <-done; err != nil || resp.StatusCode != 200 || resp.Header.Get("X-Ratelimit-Limit") != "100" || resp.Header.Get(cspHeader) == "" {
		t.Errorf("nothing written: %d %v %v", resp.StatusCode, resp.Header, err)
	}

	release := make(chan struct{})
	resp = call(func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Trailer", "X-Sum")
		_, _ = io.WriteString(w, "data: 1\n\n")
		if err := http.NewResponseController(w).Flush(); err != nil {
			return err
		}
		<-release
		w.Header().Set("X-Sum", "1")
		return nil
	})
	event := make([]byte, 9)
	if _, err := io.ReadFull(resp.Body, event); err != nil || string(event) != "data: 1\n\n" {
		t.Errorf("first event: %q %v", event, err)
	}
	close(release)
	if _, err := io.ReadAll(resp.Body); err != nil || resp.Trailer.Get("X-Sum") != "1" {
		t.Errorf("trailers: %v %v", resp.Trailer, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}

	resp = call(func(w http.ResponseWriter, _ *http.Request) error {
		w.Header()["Connection"], w.Header()["Upgrade"] = []string{"Upgrade"}, []string{"websocket"}
		w.WriteHeader(http.StatusSwitchingProtocols)
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return err
		}
		defer conn.Close()
		_, _ = rw.WriteString("tunnel")
		return rw.Flush()
	})
	if body := bodyOf(t, resp); resp.StatusCode != 101 || body != "tunnel" || resp.Header.Get("X-Frame-Options") != "DENY" {
		t.Errorf("hijack: %d %q %v", resp.StatusCode, body, slices.Sorted(maps.Keys(resp.Header)))
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := r.inFlight(t); got != 0 {
		t.Errorf("in flight: %d", got)
	}
}
