package integration

import (
	"bufio"
	"context"
	"crypto/sha1"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	h2 "golang.org/x/net/http2"
)

// newEcho is a backend that speaks websocket as far as a proxy can tell: it
// shakes hands and returns what it gets.
func newEcho(t testing.TB) (addr string, ended <-chan struct{}) {
	t.Helper()
	done := make(chan struct{}, 16)
	addr = newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			fmt.Fprintf(w, "%s %q %q", r.Method, r.Header["Upgrade"], r.Header["Connection"])
			return
		}
		sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
			"Sec-WebSocket-Accept: %s\r\nServer: inner\r\nX-Powered-By: 7777\r\nX-Frame-Options: ALLOWALL\r\n\r\n",
			base64.StdEncoding.EncodeToString(sum[:]))
		_ = rw.Flush()
		_, _ = io.Copy(conn, rw)
		done <- struct{}{}
	})
	return addr, done
}

// upgrade sends a websocket handshake and returns the answer to it.
func upgrade(t testing.TB, addr string, headers ...string) (net.Conn, *bufio.Reader, *http.Response) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", addr)
	for _, header := range headers {
		fmt.Fprintf(conn, "%s\r\n", header)
	}
	fmt.Fprint(conn, "\r\n")
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	return conn, in, resp
}

// echo sends bytes and expects them back.
func echo(t testing.TB, conn io.Writer, in io.Reader, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(in, got); err != nil || string(got) != text {
		t.Fatalf("echo %q, want %q: %v", got, text, err)
	}
}

// TestWebsocket: refused before the upgrade, passed through after it, one slot
// from the first byte to the last.
func TestWebsocket(t *testing.T) {
	target, ended := newEcho(t)
	_, url, key := oneAtATime(t, "", "", "reverse_proxy "+target)
	addr := strings.TrimPrefix(url, "http://")

	_, _, resp := upgrade(t, addr)
	if resp.StatusCode != http.StatusUnauthorized {
		t.Fatalf("without a key: %d", resp.StatusCode)
	}
	checkSecurityHeaders(t, resp.Header)

	for range 2 {
		conn, in, resp := upgrade(t, addr, "X-API-Key: "+key)
		r := &reply{resp, ""}
		r.wantStatus(t, http.StatusSwitchingProtocols)
		r.wantHeader(t, "Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=") // the example of RFC 6455
		r.wantHeader(t, "Upgrade", "websocket")
		checkSecurityHeaders(t, r.Header)
		if !hasLimitHeaders(r.Header) {
			t.Error("no limit headers on the 101")
		}
		echo(t, conn, in, "\x81\x84mask\x1d\x08\x1d\x0c")
		wantBusy(t, url+"/x", key)
		_, _, second := upgrade(t, addr, "X-API-Key: "+key)
		if second.StatusCode != http.StatusTooManyRequests {
			t.Errorf("a second socket: %d, want 429", second.StatusCode)
		}
		echo(t, conn, in, "still open")
		conn.Close()
		receive(t, "the backend to see the end", ended)
		wantSlotFreed(t, url+"/x", key)
	}
}

// TestOtherUpgrades: nothing but a websocket leaves HTTP behind the guard.
func TestOtherUpgrades(t *testing.T) {
	target, _ := newEcho(t)
	_, url, key := oneAtATime(t, "", "", "reverse_proxy "+target)
	addr := strings.TrimPrefix(url, "http://")
	for _, headers := range []string{
		"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
		"Connection: upgrade, close\r\nUpgrade: custom\r\n",
		"Connection: Upgrade, close\r\nUpgrade: websocket, h2c\r\n",
	} {
		resp, body := raw(t, addr, http.MethodGet, "GET / HTTP/1.1\r\nHost: "+addr+"\r\nX-API-Key: "+key+"\r\n"+headers+"\r\n")
		if resp.StatusCode != 200 || body != "GET [] []" {
			t.Errorf("%q: %d %s", headers, resp.StatusCode, body)
		}
		wantSlotFreed(t, url+"/x", key)
	}
}

// TestWebsocketHTTP2: an extended CONNECT (RFC 8441) is a websocket as any
// other; no other CONNECT passes.
func TestWebsocketHTTP2(t *testing.T) {
	target, ended := newEcho(t)
	addr := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	key := newKey(t)
	_, port, _ := net.SplitHostPort(addr)
	s := start(t, preamble(t, "zejzl {\n\t\ttier single 1000/1h {\n\t\t\tconcurrent 1\n\t\t}\n\t}")+
		"https://example.test:"+port+" {\n\tbind 127.0.0.1\n\ttls internal\n\tzejzl_auth\n\treverse_proxy "+target+"\n}\n",
		"ZEJZL_API_KEY_A="+key+":single", "GODEBUG=http2xconnect=1")
	s.waitForCertificates(addr, "example.test")
	// net/http's own transport takes no :protocol.
	transport := &h2.Transport{ //nolint:staticcheck // SA1019, see above
		TLSClientConfig: &tls.Config{RootCAs: s.roots(), ServerName: "example.test", NextProtos: []string{"h2"}}, //nolint:staticcheck // SA1019
		//nolint:staticcheck // SA1019
		DialTLSContext: func(ctx context.Context, network, _ string, config *tls.Config) (net.Conn, error) {
			return (&tls.Dialer{Config: config}).DialContext(ctx, network, addr)
		},
	}
	defer transport.CloseIdleConnections() //nolint:staticcheck // SA1019
	connect := func(protocol string, headers ...string) (io.WriteCloser, *http.Response) {
		t.Helper()
		reader, writer := io.Pipe()
		req := newRequest(t, http.MethodConnect, "https://example.test:"+port+"/ws", "", headers...)
		req.Body = reader
		req.Header[":protocol"] = []string{protocol}
		req.Header.Set("Sec-WebSocket-Version", "13")
		resp, err := transport.RoundTrip(req) //nolint:staticcheck // SA1019
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { writer.Close(); resp.Body.Close() })
		return writer, resp
	}

	for _, tc := range []struct {
		protocol string
		status   int
		headers  []string
	}{{"websocket", 401, nil}, {"connect-udp", 405, []string{"X-API-Key: " + key}}} {
		_, resp := connect(tc.protocol, tc.headers...)
		if resp.StatusCode != tc.status {
			t.Errorf("%s: %d, want %d", tc.protocol, resp.StatusCode, tc.status)
		}
		checkSecurityHeaders(t, resp.Header, hsts)
	}

	conn, resp := connect("websocket", "X-API-Key: "+key)
	(&reply{resp, ""}).wantStatus(t, 200)
	checkSecurityHeaders(t, resp.Header, hsts)
	echo(t, conn, resp.Body, "one way")
	if _, second := connect("websocket", "X-API-Key: "+key); second.StatusCode != http.StatusTooManyRequests {
		t.Errorf("a second socket: %d, want 429", second.StatusCode)
	}
	echo(t, conn, resp.Body, "and back")
	conn.Close()
	resp.Body.Close()
	receive(t, "the backend to see the end", ended)
	client := s.client(addr)
	s.waitUntil("the slot to be free", func() bool {
		return do(t, client, newRequest(t, http.MethodGet, "https://example.test:"+port+"/x", "", "X-API-Key: "+key)).StatusCode == 200
	})
}
