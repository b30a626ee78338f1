package integration

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// witness is a backend that keeps what it was sent byte by byte: an HTTP
// server of Go would already have refused or folded half of it.
type witness struct {
	addr string
	mu   sync.Mutex
	seen []sighting
	raw  strings.Builder // everything that ever arrived
}

// sighting is one request as it reached the backend.
type sighting struct {
	method, uri string
	fields      [][2]string // names in the spelling of the wire
	head, tail  string      // all lines before the body; body and trailer
}

func newWitness(t testing.TB) *witness {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	w := &witness{addr: l.Addr().String()}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
			go w.serve(conn)
		}
	}()
	return w
}

// Write implements io.Writer for the copy of all bytes.
func (w *witness) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.raw.Write(p)
}

func (w *witness) serve(conn net.Conn) {
	r := bufio.NewReader(io.TeeReader(conn, w))
	for {
		s, err := readSighting(r)
		if err != nil {
			return
		}
		w.mu.Lock()
		w.seen = append(w.seen, s)
		w.mu.Unlock()
		if strings.HasPrefix(s.uri, "/ws/yes") {
			_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			_, _ = io.Copy(conn, r)
			return
		}
		answer := "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nAccess-Control-Allow-Origin: *\r\nAccess-Control-Allow-Credentials: true\r\n\r\n"
		if s.method != http.MethodHead {
			answer += "seen"
		}
		_, _ = io.WriteString(conn, answer)
	}
}

func readSighting(r *bufio.Reader) (s sighting, err error) {
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return s, err
		}
		s.head += line
		line = strings.TrimRight(line, "\r\n")
		if line == "" {
			break
		}
		if s.method == "" {
			s.method, line, _ = strings.Cut(line, " ")
			s.uri = strings.TrimSuffix(line, " HTTP/1.1")
			continue
		}
		name, value, _ := strings.Cut(line, ":")
		s.fields = append(s.fields, [2]string{name, strings.TrimSpace(value)})
	}
	if slices.Equal(s.get("Transfer-Encoding"), []string{"chunked"}) {
		body, err := io.ReadAll(httputil.NewChunkedReader(r))
		s.tail = string(body)
		for err == nil { // the trailer, up to the empty line
			var line string
			line, err = r.ReadString('\n')
			s.tail += line
			if line == "\r\n" {
				return s, nil
			}
		}
		return s, err
	}
	for _, length := range s.get("Content-Length") {
		n, _ := strconv.Atoi(length)
		body := make([]byte, n)
		_, err = io.ReadFull(r, body)
		s.tail = string(body)
	}
	return s, err
}

// get returns the values of a field in order, by its exact name but for case.
func (s *sighting) get(name string) (values []string) {
	for _, f := range s.fields {
		if strings.EqualFold(f[0], name) {
			values = append(values, f[1])
		}
	}
	return values
}

// folded returns all fields whose name is, to a CGI backend, the given one or,
// with a dash at its end, begins so.
func (s *sighting) folded(name string) (found []string) {
	for _, f := range s.fields {
		n := strings.ToLower(strings.NewReplacer("_", "-", ".", "-").Replace(f[0]))
		if n == name || strings.HasSuffix(name, "-") && strings.HasPrefix(n, name) {
			found = append(found, f[0]+": "+f[1])
		}
	}
	return found
}

// take returns what arrived since the last call.
func (w *witness) take() []sighting {
	w.mu.Lock()
	defer w.mu.Unlock()
	seen := w.seen
	w.seen = nil
	return seen
}

func (w *witness) bytes() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.raw.String()
}

// one returns the only request that arrived since the last call.
func (w *witness) one(t testing.TB) *sighting {
	t.Helper()
	seen := w.take()
	if len(seen) != 1 {
		t.Fatalf("the backend saw %d requests, want 1: %q", len(seen), seen)
	}
	return &seen[0]
}

func (w *witness) none(t testing.TB) {
	t.Helper()
	for _, s := range w.take() {
		t.Errorf("the backend saw %q, want nothing", s.head)
	}
}

// site is a Caddy with guarded ports in front of one witness.
type site struct {
	*server
	*witness
	addr []string // by number of the PORT in the Caddyfile
}

// guarded starts Caddy with plain HTTP sites. In the text, PORT0, PORT1 … are
// free ports and BACKEND is the witness; global goes into the global block.
func guarded(t testing.TB, global, sites string, env ...string) *site {
	t.Helper()
	g := &site{witness: newWitness(t)}
	text := fmt.Sprintf("{\n\tadmin ADMIN\n\thttp_port %d\n\thttps_port %d\n\tskip_install_trust\n%s\n}\n%s",
		freePort(t), freePort(t), global, sites)
	text = strings.ReplaceAll(text, "BACKEND", g.witness.addr)
	for i := 0; strings.Contains(text, "PORT"+strconv.Itoa(i)); i++ {
		port := strconv.Itoa(freePort(t))
		text = strings.ReplaceAll(text, "PORT"+strconv.Itoa(i), port)
		g.addr = append(g.addr, "127.0.0.1:"+port)
	}
	g.server = start(t, text, env...)
	t.Cleanup(func() { // before the server is stopped
		if strings.Contains(g.log.String(), "panic") {
			t.Errorf("something panicked:\n%s", g.log.String())
		}
	})
	return g
}

// verdict is one answer of the guard.
type verdict struct {
	*http.Response
	body string
}

// ask sends one request over a fresh connection: its line and header lines as
// they stand, with a Host unless there is one.
func (g *site) ask(t testing.TB, line string, fields ...string) *verdict {
	t.Helper()
	return g.askAt(t, 0, line, fields...)
}

func (g *site) askAt(t testing.TB, port int, line string, fields ...string) *verdict {
	t.Helper()
	method, _, _ := strings.Cut(line, " ")
	request := line + " HTTP/1.1\r\n"
	if !slices.ContainsFunc(fields, func(f string) bool { return strings.HasPrefix(f, "Host:") }) {
		request += "Host: " + g.addr[port] + "\r\n"
	}
	for _, f := range fields {
		request += f + "\r\n"
	}
	resp, body := raw(t, g.addr[port], method, request+"\r\n")
	return &verdict{resp, body}
}

// wants checks the status and, for a refusal, its reason code, and that no
// refusal but 429 tells limits.
func (r *verdict) wants(t testing.TB, status int, code string) {
	t.Helper()
	if r.StatusCode != status {
		t.Errorf("status %d, want %d; body %q", r.StatusCode, status, r.body)
		return
	}
	if code == "" {
		return
	}
	var refusal struct{ Code string }
	if err := json.Unmarshal([]byte(r.body), &refusal); err != nil || refusal.Code != code {
		t.Errorf("body %q, want code %s", r.body, code)
	}
	if status != http.StatusTooManyRequests && r.Header.Get("X-Ratelimit-Limit") != "" {
		t.Errorf("a refusal with status %d tells limits", status)
	}
	if challenge := r.Header.Get("Www-Authenticate"); (status == http.StatusUnauthorized) != (challenge != "") {
		t.Errorf("status %d with WWW-Authenticate %q", status, challenge)
	}
}

// noSecret fails if a request that reached the backend holds one of secrets.
func (s *sighting) noSecret(t testing.TB, secrets ...string) {
	t.Helper()
	for _, secret := range secrets {
		if strings.Contains(s.head+s.tail, secret) {
			t.Errorf("the backend was sent a key:\n%s", s.head)
		}
	}
}
