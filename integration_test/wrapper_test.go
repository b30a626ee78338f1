package integration

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"time"
)

// oneAtATime is a site whose only key has one slot, so that a slot that is
// not freed shows.
func oneAtATime(t *testing.T, options, guard, rest string) (s *server, url, key string) {
	t.Helper()
	key = newKey(t)
	site, addr := plainSite(t, "\tzejzl_auth {\n"+guard+"\n\t}\n"+rest)
	s = start(t, preamble(t, options+"\n\tzejzl {\n\t\ttier single 100000/1h {\n\t\t\tconcurrent 1\n\t\t}\n\t}")+site, "ZEJZL_API_KEY_A="+key+":single:one")
	return s, "http://" + addr, key
}

// wantSlotFreed calls until the key's slot is free, which it is a moment after
// the client has seen the end of the answer.
func wantSlotFreed(t *testing.T, url, key string) *reply {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; {
		switch r := ask(t, http.MethodGet, url, "X-API-Key: "+key); {
		case r.StatusCode == http.StatusOK:
			return r
		case r.StatusCode != http.StatusTooManyRequests || time.Now().After(deadline):
			t.Fatalf("the slot was not freed: %d %s", r.StatusCode, r.text)
		}
	}
}

// wantBusy: the slot is taken now.
func wantBusy(t *testing.T, url, key string) {
	t.Helper()
	r := ask(t, http.MethodGet, url, "X-API-Key: "+key).wantStatus(t, http.StatusTooManyRequests)
	if code := r.object(t)["code"]; code != "concurrency_limited" {
		t.Fatalf("code %v, want concurrency_limited", code)
	}
}

// receive waits for something that has to happen.
func receive[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatalf("timed out waiting for %s", what)
		panic("unreachable")
	}
}

// TestStream: the client has an event, and the guard's headers, before the
// backend sends the next one.
func TestStream(t *testing.T) {
	next := make(chan struct{})
	target := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/stream" {
			return
		}
		boast(w.Header())
		w.Header().Set("Content-Type", "text/event-stream")
		_ = http.NewResponseController(w).Flush() // the header alone
		for i := range 3 {
			hold(r, next)
			fmt.Fprintf(w, "data: %d\n\n", i)
			_ = http.NewResponseController(w).Flush()
		}
		hold(r, next)
	})
	for _, rest := range []string{"reverse_proxy " + target, "encode gzip\n\treverse_proxy " + target} {
		_, url, key := oneAtATime(t, "", "", rest)
		resp, err := plainClient.Do(newRequest(t, http.MethodPost, url+"/stream", "{}", "X-API-Key: "+key))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		r := (&reply{resp, ""}).wantStatus(t, 200)
		checkSecurityHeaders(t, r.Header)
		wantModest(t, r)
		wantBusy(t, url, key)
		lines := bufio.NewReader(resp.Body)
		for i := range 3 {
			next <- struct{}{}
			for _, want := range []string{fmt.Sprintf("data: %d\n", i), "\n"} {
				if got, err := lines.ReadString('\n'); err != nil || got != want {
					t.Fatalf("line %q, want %q: %v", got, want, err)
				}
			}
		}
		next <- struct{}{}
		if rest, err := io.ReadAll(lines); err != nil || len(rest) > 0 {
			t.Errorf("after the last event: %q, %v", rest, err)
		}
		wantSlotFreed(t, url+"/x", key)
	}
}

// TestSlowAnswer: a backend that thinks longer than the idle timeouts of the
// connection is waited for, before the answer and within it.
func TestSlowAnswer(t *testing.T) {
	const idle = 300 * time.Millisecond
	canceled := make(chan error, 1)
	target := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		for i := range 2 {
			select { // what is slow here is the backend, not the test
			case <-time.After(3 * idle):
			case <-r.Context().Done():
				canceled <- r.Context().Err()
				return
			}
			fmt.Fprintf(w, "part %d;", i)
			_ = http.NewResponseController(w).Flush()
		}
		canceled <- nil
	})
	_, url, key := oneAtATime(t, fmt.Sprintf(`servers {
		timeouts {
			read_body_idle %s
			write_idle %s
		}
	}`, idle, idle), "", "reverse_proxy "+target)
	r := do(t, plainClient, newRequest(t, http.MethodPost, url, "a question", "X-API-Key: "+key)).wantStatus(t, 200)
	if err := receive(t, "the backend", canceled); err != nil || r.text != "part 0;part 1;" {
		t.Errorf("body %q; the backend saw %v", r.text, err)
	}
}

// TestTrailers: announced and unannounced, on streams.
func TestTrailers(t *testing.T) {
	target := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "X-Announced")
		fmt.Fprint(w, "body")
		_ = http.NewResponseController(w).Flush()
		w.Header().Set("X-Announced", "yes")
		w.Header().Set(http.TrailerPrefix+"X-Late", "too")
	})
	_, url, key := oneAtATime(t, "", "", "reverse_proxy "+target)
	r := ask(t, http.MethodGet, url, "X-API-Key: "+key).wantStatus(t, 200)
	checkSecurityHeaders(t, r.Header)
	if r.text != "body" || r.Trailer.Get("X-Announced") != "yes" || r.Trailer.Get("X-Late") != "too" {
		t.Errorf("body %q, trailers %v", r.text, r.Trailer)
	}
}

// TestInformational: 1xx of a backend pass, and the final answer after them
// is as any other, although the proxy writes the header map over.
func TestInformational(t *testing.T) {
	target := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		for _, link := range []string{"</a.css>", "</b.css>"} {
			w.Header().Set("Link", link)
			w.WriteHeader(http.StatusEarlyHints)
		}
		w.Header().Del("Link")
		fmt.Fprint(w, "final")
	})
	_, url, key := oneAtATime(t, "", "", "reverse_proxy "+target)
	var links []string
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
		links = append(links, fmt.Sprintf("%d %s", code, h.Get("Link")))
		return nil
	}}
	req := newRequest(t, http.MethodGet, url, "", "X-API-Key: "+key)
	r := do(t, plainClient, req.WithContext(httptrace.WithClientTrace(req.Context(), trace))).wantStatus(t, 200)
	if want := "103 </a.css>,103 </b.css>"; strings.Join(links, ",") != want {
		t.Errorf("informational answers %q, want %q", links, want)
	}
	checkSecurityHeaders(t, r.Header)
	r.wantHeader(t, "Cache-Control", "no-store")
	if !hasLimitHeaders(r.Header) || r.text != "final" {
		t.Errorf("%v %q", r.Header, r.text)
	}
}

// TestExpectContinue: the client sends its body only when it is asked to, and
// a refusal asks for none.
func TestExpectContinue(t *testing.T) {
	target := newBackend(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	_, url, key := oneAtATime(t, "", "", "reverse_proxy "+target)
	addr := strings.TrimPrefix(url, "http://")
	head := "POST / HTTP/1.1\r\nHost: " + addr + "\r\nContent-Length: 4\r\nExpect: 100-continue\r\nConnection: close\r\n"
	if resp, _ := raw(t, addr, http.MethodPost, head+"\r\n"); resp.StatusCode != 401 {
		t.Errorf("status %d, want 401 at once", resp.StatusCode)
	}
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(conn, "%sX-API-Key: %s\r\n\r\n", head, key)
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil || resp.StatusCode != http.StatusContinue {
		t.Fatalf("%v, want 100 Continue: %v", resp, err)
	}
	fmt.Fprint(conn, "text")
	for resp.StatusCode == http.StatusContinue { // the backend may say so too
		if resp, err = http.ReadResponse(in, nil); err != nil {
			t.Fatal(err)
		}
	}
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 200 || string(body) != "text" {
		t.Errorf("%d %q", resp.StatusCode, body)
	}
}

// TestClientLeaves: at whatever point the client leaves, the backend hears of
// it and the slot is free again.
func TestClientLeaves(t *testing.T) {
	reached, left := make(chan struct{}, 1), make(chan struct{}, 1)
	target := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/before": // nothing is sent yet
		case "/headers":
			_ = http.NewResponseController(w).Flush()
		case "/stream":
			fmt.Fprint(w, "data: 1\n\n")
			_ = http.NewResponseController(w).Flush()
		case "/body": // in the middle of the request
			_, _ = io.ReadFull(r.Body, make([]byte, 4))
			reached <- struct{}{}
			_, _ = io.Copy(io.Discard, r.Body)
			left <- struct{}{}
			return
		default:
			return
		}
		reached <- struct{}{}
		<-r.Context().Done()
		left <- struct{}{}
	})
	_, url, key := oneAtATime(t, "", "", "reverse_proxy "+target)
	for _, path := range []string{"/before", "/headers", "/stream", "/body"} {
		t.Run(path, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var body io.Reader
			if path == "/body" {
				reader, writer := io.Pipe()
				defer context.AfterFunc(ctx, func() { writer.CloseWithError(ctx.Err()) })()
				body = reader
				go func() { _, _ = writer.Write([]byte("half")) }()
			}
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+path, body)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("X-API-Key", key)
			var wait sync.WaitGroup
			wait.Go(func() {
				resp, err := plainClient.Do(req)
				if err != nil {
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			})
			receive(t, "the backend to be reached", reached)
			wantBusy(t, url+"/x", key)
			cancel()
			receive(t, "the backend to hear that the client left", left)
			wait.Wait()
			wantSlotFreed(t, url+"/x", key)
		})
	}
}

// TestSlotAfterFailure: whatever happens behind the guard.
func TestSlotAfterFailure(t *testing.T) {
	target := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		fmt.Fprint(conn, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
		conn.Close()
	})
	rest := "\thandle /cut {\n\t\treverse_proxy " + target + "\n\t}\n"
	for _, how := range []string{"panic", "panic-late", "abort", "error", "error-late", "nothing"} {
		rest += fmt.Sprintf("\thandle /%s {\n\t\tmisbehave %s\n\t}\n", how, how)
	}
	rest += "\thandle {\n\t\trespond ok\n\t}"
	_, url, key := oneAtATime(t, "", "", rest)
	for _, tc := range []struct {
		path   string
		status int // 0: the connection ends without an answer, or in the middle of one
	}{{"/panic", 500}, {"/panic-late", 0}, {"/abort", 0}, {"/cut", 0}, {"/error", 500}, {"/error-late", 200}, {"/nothing", 200}} {
		t.Run(tc.path, func(t *testing.T) {
			for range 3 {
				resp, err := plainClient.Do(newRequest(t, http.MethodGet, url+tc.path, "", "X-API-Key: "+key))
				if err == nil {
					_, err = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
				switch {
				case tc.status == 0 && err == nil:
					t.Errorf("status %d and a whole body, want a broken connection", resp.StatusCode)
				case tc.status != 0 && (err != nil || resp.StatusCode != tc.status):
					t.Fatalf("%v, want %d", err, tc.status)
				case tc.status != 0:
					checkSecurityHeaders(t, resp.Header)
				}
				wantSlotFreed(t, url+"/x", key)
			}
		})
	}
}

// TestFailuresLogNoHeader: panics and errors of a backend are logged, with no
// header and no key, even by a logger without the zejzl encoder.
func TestFailuresLogNoHeader(t *testing.T) {
	key := newKey(t)
	site, addr := plainSite(t, fmt.Sprintf(`
	zejzl_auth {
		forward_credentials
	}
	handle /panic {
		misbehave panic "went wrong with "
	}
	handle /error {
		misbehave error "went wrong"
	}
	handle /late {
		misbehave panic-late "went wrong"
	}
	handle {
		reverse_proxy 127.0.0.1:%d
	}`, freePort(t)))
	global := strings.Replace(preamble(t, ""), "format zejzl json\n\t\tlevel DEBUG", "level INFO", 1)
	s := start(t, global+site, "ZEJZL_API_KEY_A="+key+":enterprise")
	const canary = "a-header-that-no-log-may-hold"
	for path, status := range map[string]int{"/panic": 500, "/error": 500, "/dead": 502} {
		r := ask(t, http.MethodGet, "http://"+addr+path+"?q="+canary, "X-API-Key: "+key, "X-Canary: "+canary, "User-Agent: "+canary).wantStatus(t, status)
		s.logLines(`"request_id":"`+r.Header.Get("X-Request-Id")+`"`, `"level":"error"`)
	}
	resp, err := plainClient.Do(newRequest(t, http.MethodGet, "http://"+addr+"/late", "", "X-API-Key: "+key, "X-Canary: "+canary))
	if err == nil {
		resp.Body.Close()
		err = errors.New("an answer")
	}
	if !errors.Is(err, io.EOF) {
		t.Errorf("a panic after the first byte ended with %v", err)
	}
	ask(t, http.MethodGet, "http://"+addr+"/dead", "X-API-Key: "+key).wantStatus(t, 502)
	log := s.log.String()
	for _, secret := range []string{key, key[len("zejzl_"):], canary} {
		if strings.Contains(log, secret) {
			t.Errorf("the log holds a header or the key")
		}
	}
	if !strings.Contains(log, "went wrong with") {
		t.Error("the log does not tell what the panic said")
	}
}
