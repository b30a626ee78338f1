package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"strings"
	"testing"
)

// TestProductionExampleRoundTrip loads the README's production Caddyfile
// through the admin API, reads it back, and loads what was read.
func TestProductionExampleRoundTrip(t *testing.T) {
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "answer")
	}))
	defer backend.Close()
	secret := newKey(t)
	s := start(t, "{\n\tadmin ADMIN\n}\n", "PROD_KEY="+secret)
	for name, source := range map[string]string{"keys.json": "../examples/keys.json", "production.Caddyfile": "../examples/production.Caddyfile"} {
		content, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		s.write(name, string(content))
	}
	content, err := os.ReadFile("../examples/production.Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	_, port, _ := strings.Cut(addr, ":")
	ports := fmt.Sprintf("{\n\tadmin ADMIN\n\thttp_port %d\n\tskip_install_trust\n", freePort(t))
	caddyfile := strings.Replace(string(content), "{\n", ports, 1)
	caddyfile = strings.NewReplacer("api.example.com {", "localhost:"+port+" {\n\tbind 127.0.0.1",
		"localhost:8000", strings.TrimPrefix(backend.URL, "http://")).Replace(caddyfile)

	if status, body := s.reload(caddyfile); status != http.StatusOK {
		t.Fatalf("POST /load: %d %s", status, body)
	}
	read := s.adminGet("/config/")
	if strings.Contains(read, secret) {
		t.Error("/config/ holds the secret")
	}
	resp, err := http.Post("http://"+s.admin+"/load", "application/json", bytes.NewReader([]byte(read)))
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("POST /load of what was read: %d %s", resp.StatusCode, body)
	}
	var first, second any
	if err := json.Unmarshal([]byte(read), &first); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(s.adminGet("/config/")), &second); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(first, second) {
		t.Errorf("read %v\nthen %v", first, second)
	}

	client := s.client(addr)
	for _, c := range []struct {
		key  string
		want int
	}{{secret, http.StatusOK}, {"", http.StatusUnauthorized}} {
		req, err := http.NewRequest(http.MethodGet, "https://localhost:"+port+"/v1/models", nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.key != "" {
			req.Header.Set("X-API-Key", c.key)
		}
		var resp *http.Response
		s.waitUntil("the certificate", func() bool {
			resp, err = client.Do(req)
			return err == nil
		})
		resp.Body.Close()
		if resp.StatusCode != c.want {
			t.Errorf("status %d, expected %d", resp.StatusCode, c.want)
		}
	}
}
