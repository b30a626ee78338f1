package integration

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// startFirstRun builds Caddy as the README does and runs a Caddyfile with it,
// in development mode and in a home of its own.
func startFirstRun(t *testing.T, caddyfile string) *server {
	t.Helper()
	dir := t.TempDir()
	caddy := realCaddy(t)
	s := &server{t: t, dir: dir, admin: fmt.Sprintf("127.0.0.1:%d", freePort(t)), log: new(lockedBuffer), done: make(chan struct{})}
	s.write("first.Caddyfile", caddyfile)
	httpsPort := freePort(t)
	s.cmd = exec.Command(caddy, "run", "--config", "first.Caddyfile")
	s.cmd.Dir = dir
	s.cmd.Env = []string{
		"HOME=" + dir, "XDG_DATA_HOME=" + dir + "/data", "XDG_CONFIG_HOME=" + dir + "/config", "PATH=" + os.Getenv("PATH"),
		"ENVIRONMENT=development", "CADDY_ADMIN=" + s.admin,
		fmt.Sprintf("ZEJZL_HTTP_PORT=%d", freePort(t)), fmt.Sprintf("ZEJZL_HTTPS_PORT=%d", httpsPort),
		fmt.Sprintf("ZEJZL_STAND_IN_PORT=%d", freePort(t)),
	}
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = s.cmd.Wait(); close(s.done) }()
	t.Cleanup(s.stop)
	s.waitUntil("serving initial configuration", func() bool {
		return strings.Contains(s.log.String(), "serving initial configuration")
	})
	// Caddy makes the certificate in the background; nobody pastes as fast as a test.
	config := &tls.Config{ServerName: "localhost", RootCAs: s.roots()}
	s.waitUntil("a certificate for localhost", func() bool {
		conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", httpsPort), config)
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
	return s
}

var (
	curlLine  = regexp.MustCompile(`(?m)^\s+(curl .*)$`)
	keyHeader = regexp.MustCompile(` -H '[^']*zejzl_[^']*'`)
	sitePort  = regexp.MustCompile(` https://localhost:(\d+)/`)
	keyShape  = regexp.MustCompile(`zejzl_[A-Za-z0-9_-]{32}`)
)

// paste runs a line as a newcomer's shell does, with -i for the headers.
func paste(t *testing.T, line string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", line)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", keyShape.ReplaceAllString(line, "KEY"), err, stderr.String())
	}
	head, body, ok := strings.Cut(string(out), "\r\n\r\n")
	if !ok {
		t.Fatalf("curl printed no headers: %q", out)
	}
	lines := strings.Split(head, "\r\n")
	fields := strings.Fields(lines[0])
	if len(fields) < 2 {
		t.Fatalf("curl printed the status line %q", lines[0])
	}
	got := outcome{header: make(http.Header), body: body}
	got.status, _ = strconv.Atoi(fields[1])
	for _, line := range lines[1:] {
		name, value, _ := strings.Cut(line, ": ")
		got.header.Add(name, value)
	}
	return got
}

// printedLine is the curl line that the process printed.
func (s *server) printedLine(t *testing.T) string {
	t.Helper()
	found := curlLine.FindStringSubmatch(s.log.String())
	if found == nil {
		t.Fatalf("no curl line in the output:\n%s", s.log.String())
	}
	return found[1]
}

func TestFirstRun(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("../example.Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	s := startFirstRun(t, string(example))
	line := s.printedLine(t)
	if strings.Contains(line, " -k") || strings.Contains(line, "--insecure") || !strings.Contains(line, "https://localhost:") {
		t.Errorf("the curl line must ask for https://localhost and check the certificate: %s", line)
	}

	checkOnLoopbackOnly(t, line)

	begin := time.Now()
	first := paste(t, line)
	checkFirstAnswer(t, first)

	refused := paste(t, keyHeader.ReplaceAllString(line, ""))
	var refusal struct {
		Error struct{ Code string }
	}
	if err := json.Unmarshal([]byte(refused.body), &refusal); err != nil || refusal.Error.Code != "invalid_api_key" {
		t.Errorf("without the key: %q (%v), want JSON with the code invalid_api_key", refused.body, err)
	}
	if refused.status != http.StatusUnauthorized || refused.header.Get("WWW-Authenticate") != `Bearer realm="zejzl"` {
		t.Errorf("without the key: status %d, WWW-Authenticate %q", refused.status, refused.header.Get("WWW-Authenticate"))
	}

	streamed := paste(t, strings.Replace(line, `{"model"`, `{"stream": true, "model"`, 1))
	if streamed.status != http.StatusOK || !strings.HasPrefix(streamed.header.Get("Content-Type"), "text/event-stream") ||
		!strings.Contains(streamed.body, "\ndata: [DONE]\n") {
		t.Errorf("streamed: status %d, %s: %q", streamed.status, streamed.header.Get("Content-Type"), streamed.body)
	}

	s.forceReload(t)
	for i := 3; i <= 10; i++ {
		if got := paste(t, line); got.status != http.StatusOK {
			t.Fatalf("call %d, after a reload: status %d: %s", i, got.status, got.body)
		}
	}
	eleventh := paste(t, line)
	received := time.Now()
	if took := received.Sub(begin); took > 50*time.Second {
		t.Skipf("eleven calls took %v: too slow here for a window of a minute", took)
	}
	if eleventh.status != http.StatusTooManyRequests {
		t.Fatalf("call 11 within the minute: status %d", eleventh.status)
	}
	wait, err := retryAfter(eleventh)
	if err != nil {
		t.Error(err)
	}
	checkOneKeyIsPrinted(t, s, line)
	if testing.Short() {
		return
	}
	time.Sleep(time.Until(received.Add(wait)))
	if got := paste(t, line); got.status != http.StatusOK {
		t.Errorf("status %d after waiting exactly %v as told", got.status, wait)
	}
}

// The line works as it stands for a guard that sees only part of a site, too.
func TestFirstRunOfPartOfASite(t *testing.T) {
	t.Parallel()
	s := startFirstRun(t, `{
	http_port {$ZEJZL_HTTP_PORT}
	https_port {$ZEJZL_HTTPS_PORT}
	skip_install_trust
}

*.localhost {
	bind 127.0.0.1
	zejzl_auth
}

localhost {
	bind 127.0.0.1
	handle /api/* {
		zejzl_auth
		respond "asked {http.request.uri.path}"
	}
	handle {
		respond "the site"
	}
}
`)
	line := s.printedLine(t)
	if got := paste(t, line); got.status != http.StatusOK || got.body != "asked /api/v1/chat/completions" {
		t.Errorf("the printed line: status %d: %s", got.status, got.body)
	}
	if got := paste(t, keyHeader.ReplaceAllString(line, "")); got.status != http.StatusUnauthorized {
		t.Errorf("without the key: status %d: %s", got.status, got.body)
	}
}

// checkOnLoopbackOnly: a name that only this machine has keeps nobody else
// out, who may say it to any address of the machine.
func checkOnLoopbackOnly(t *testing.T, line string) {
	t.Helper()
	port := sitePort.FindStringSubmatch(line)
	addrs, err := net.InterfaceAddrs()
	if port == nil || err != nil {
		t.Fatalf("no port in the line, or no addresses: %v", err)
	}
	for _, addr := range addrs {
		ip := addr.(*net.IPNet).IP
		if ip.IsLoopback() || ip.IsLinkLocalUnicast() {
			continue
		}
		if conn, err := net.DialTimeout("tcp", net.JoinHostPort(ip.String(), port[1]), time.Second); err == nil {
			conn.Close()
			t.Errorf("the site can be reached at %s", ip)
		}
	}
}

func checkFirstAnswer(t *testing.T, got outcome) {
	t.Helper()
	if got.status != http.StatusOK || !strings.Contains(got.body, `"chat.completion"`) {
		t.Fatalf("the printed line: status %d: %s", got.status, got.body)
	}
	for name, want := range map[string]string{
		"X-RateLimit-Limit":            "10",
		"X-RateLimit-Remaining":        "9",
		"X-RateLimit-Tier":             "free",
		"X-RateLimit-Limit-Requests":   "10",
		"RateLimit-Policy":             `"1m";q=10;w=60`,
		"X-Content-Type-Options":       "nosniff",
		"X-Frame-Options":              "DENY",
		"X-XSS-Protection":             "1; mode=block",
		"Referrer-Policy":              "no-referrer",
		"Content-Security-Policy":      "default-src 'none'; frame-ancestors 'none'",
		"Cross-Origin-Resource-Policy": "same-origin",
		"Cache-Control":                "no-store",
		"Strict-Transport-Security":    "", // never for localhost
		"Server":                       "",
		"Via":                          "",
	} {
		if values := got.header.Values(name); strings.Join(values, "|") != want {
			t.Errorf("%s: %q, want %q", name, values, want)
		}
	}
	if reset, err := strconv.Atoi(got.header.Get("X-RateLimit-Reset")); err != nil || reset < 1 || reset > 60 {
		t.Errorf("X-RateLimit-Reset: %q, want seconds up to a minute", got.header.Get("X-RateLimit-Reset"))
	}
	vary := strings.Join(got.header.Values("Vary"), ", ")
	for _, want := range []string{"Authorization", "X-API-Key", "Origin"} {
		if !slices.Contains(strings.Split(vary, ", "), want) {
			t.Errorf("Vary: %q lacks %s", vary, want)
		}
	}
}

// forceReload loads the running Caddyfile again although nothing changed.
func (s *server) forceReload(t *testing.T) {
	t.Helper()
	example, err := os.ReadFile(filepath.Join(s.dir, "first.Caddyfile"))
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest(http.MethodPost, "http://"+s.admin+"/load", bytes.NewReader(example))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "text/caddyfile")
	req.Header.Set("Cache-Control", "must-revalidate")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("reload: status %d", resp.StatusCode)
	}
}

// checkOneKeyIsPrinted: one key, shown by itself and in the curl line, once.
func checkOneKeyIsPrinted(t *testing.T, s *server, line string) {
	t.Helper()
	secret := keyShape.FindString(line)
	printed := keyShape.FindAllString(s.log.String(), -1)
	if len(printed) != 2 || printed[0] != secret || printed[1] != secret {
		t.Errorf("%d keys in the output, want the one key by itself and in the curl line, never again", len(printed))
	}
	for name, content := range s.filesBelow(t) {
		if keyShape.MatchString(content) {
			t.Errorf("%s holds a key", name)
		}
	}
	if strings.Contains(s.adminGet("/config/"), secret) || strings.Contains(s.adminGet("/metrics"), secret) {
		t.Error("the admin endpoint shows the key")
	}
}
