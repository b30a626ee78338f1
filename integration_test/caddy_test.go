// Package integration runs the guard as it is deployed: a real Caddy process,
// real sockets, real clients.
package integration

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// binary is testcaddy, built with the race detector by TestMain.
var binary string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "zejzl-integration-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "testcaddy")
	build := exec.Command("go", "build", "-race", "-o", binary, "./testcaddy")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "building testcaddy:", err)
		return 1
	}
	return m.Run()
}

// server is one Caddy process.
type server struct {
	t     testing.TB
	cmd   *exec.Cmd
	dir   string // home, data and working directory of the process
	admin string // host:port of its admin endpoint
	log   *lockedBuffer
	done  chan struct{}
}

// realCaddy builds the program that users run: without the race detector, which
// slows the guard's own code more than the rest, and without testcaddy's handlers.
func realCaddy(t testing.TB) string {
	t.Helper()
	path := filepath.Join(filepath.Dir(binary), "caddy")
	buildReal.Do(func() {
		build := exec.Command("go", "build", "-o", path, "./cmd/caddy")
		build.Dir = ".."
		if out, err := build.CombinedOutput(); err != nil {
			t.Errorf("building cmd/caddy: %v\n%s", err, out)
		}
	})
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	return path
}

var buildReal sync.Once

// lockedBuffer collects the output of a process that still runs.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// freePort finds a loopback port that nobody listens on.
func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// start runs Caddy with a Caddyfile until the test ends. In the text, ADMIN
// stands for the admin address and DIR for the process's own directory; env
// are further NAME=value settings. It fails the test if Caddy doesn't come up.
func start(t testing.TB, caddyfile string, env ...string) *server {
	t.Helper()
	return startBinary(t, binary, caddyfile, env...)
}

func startBinary(t testing.TB, binary, caddyfile string, env ...string) *server {
	t.Helper()
	dir := t.TempDir()
	s := &server{t: t, dir: dir, admin: fmt.Sprintf("127.0.0.1:%d", freePort(t)), log: new(lockedBuffer), done: make(chan struct{})}
	config := filepath.Join(dir, "Caddyfile")
	s.write("Caddyfile", s.fill(caddyfile))
	s.cmd = exec.Command(binary, "run", "--config", config, "--adapter", "caddyfile")
	s.cmd.Dir = dir
	s.cmd.Env = append([]string{
		"HOME=" + dir, "XDG_DATA_HOME=" + dir + "/data", "XDG_CONFIG_HOME=" + dir + "/config",
		"PATH=" + os.Getenv("PATH"), "GORACE=halt_on_error=0",
	}, env...)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = s.cmd.Wait(); close(s.done) }()
	t.Cleanup(s.stop)
	s.waitUntil("serving initial configuration", func() bool {
		return strings.Contains(s.log.String(), "serving initial configuration")
	})
	return s
}

// fill puts the server's own values into a Caddyfile.
func (s *server) fill(caddyfile string) string {
	return strings.NewReplacer("ADMIN", s.admin, "DIR", s.dir).Replace(caddyfile)
}

func (s *server) write(name, content string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// waitUntil polls a condition of the outside world, for at most 30 seconds.
func (s *server) waitUntil(what string, ok func() bool) {
	s.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		select {
		case <-s.done:
			s.t.Fatalf("caddy ended before %s:\n%s", what, s.log.String())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("timed out waiting for %s:\n%s", what, s.log.String())
		}
	}
}

// stop ends the process by its id, and fails the test if it raced or crashed.
func (s *server) stop() {
	select {
	case <-s.done:
	default:
		_ = s.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-s.done:
		case <-time.After(15 * time.Second):
			_ = s.cmd.Process.Kill()
			<-s.done
			s.t.Errorf("caddy did not stop in 15 s")
		}
	}
	out := s.log.String()
	if strings.Contains(out, "DATA RACE") || strings.Contains(out, "fatal error:") {
		s.t.Errorf("caddy raced or crashed:\n%s", out)
	}
}

// reload posts a Caddyfile to /load and returns the admin endpoint's answer.
func (s *server) reload(caddyfile string) (status int, body string) {
	s.t.Helper()
	req, err := http.NewRequest(http.MethodPost, "http://"+s.admin+"/load", strings.NewReader(s.fill(caddyfile)))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "text/caddyfile")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b)
}

// adminGet reads a path of the admin endpoint.
func (s *server) adminGet(path string) string {
	s.t.Helper()
	resp, err := http.Get("http://" + s.admin + path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(b)
}

// roots is the pool with the server's own local authority, for tls internal.
func (s *server) roots() *x509.CertPool {
	s.t.Helper()
	var pem []byte
	s.waitUntil("root certificate", func() (ok bool) {
		var err error
		pem, err = os.ReadFile(filepath.Join(s.dir, "data/caddy/pki/authorities/local/root.crt"))
		return err == nil
	})
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		s.t.Fatal("root certificate is not PEM")
	}
	return pool
}

// client speaks to the server over TLS with whatever host name, always at addr.
func (s *server) client(addr string) *http.Client {
	dialer := new(net.Dialer)
	transport := &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, addr)
		},
		TLSClientConfig:   &tls.Config{RootCAs: s.roots()},
		ForceAttemptHTTP2: true,
	}
	s.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}
}

// raw sends bytes over a fresh connection and reads one response to a request
// of that method; half of what matters can't be sent by an HTTP client.
func raw(t testing.TB, addr, method, request string) (*http.Response, string) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	return readResponse(t, conn, method)
}

// newKey makes a fresh secret with the binary itself, so no key is in the source.
func newKey(t testing.TB) string {
	t.Helper()
	out, err := exec.Command(binary, "zejzl", "generate", "--json").Output()
	if err != nil {
		t.Fatalf("caddy zejzl generate: %v", err)
	}
	var generated struct {
		Secret string `json:"secret"`
	}
	if err := json.Unmarshal(out, &generated); err != nil || generated.Secret == "" {
		t.Fatalf("caddy zejzl generate --json printed %d bytes that hold no secret: %v", len(out), err)
	}
	return generated.Secret
}
