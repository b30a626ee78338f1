package zejzlauth

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

// The rows of the design's speed promises that need no server. Each request
// has a response header map of its own, as net/http gives it: a reused map
// would hide what filling one costs.

// benchGuard provisions a guard with n keys of a tier that is never full, and
// returns their secrets.
func benchGuard(b *testing.B, n int, g *Guard) []string {
	b.Helper()
	secrets := make([]string, n)
	var file strings.Builder
	file.WriteString(`{"keys": [`)
	for i := range secrets {
		secrets[i] = key.Generate()
		if i > 0 {
			file.WriteByte(',')
		}
		fmt.Fprintf(&file, `{"name": "key %d", "tier": "bench", "secrets": [{"hash": %q}]}`, i, key.Sum(secrets[i]))
	}
	file.WriteString(`]}`)
	path := filepath.Join(b.TempDir(), "keys.json")
	if err := os.WriteFile(path, []byte(file.String()), 0o600); err != nil {
		b.Fatal(err)
	}

	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	b.Cleanup(cancel)
	app := &App{
		Sources: []Source{{Source: sourceFile, Path: path}},
		Tiers:   map[string]Tier{"bench": {Requests: []RequestLimit{{Limit: 100_000_000, Window: caddy.Duration(1e9)}}}},
	}
	if err := app.Provision(ctx); err != nil {
		b.Fatal(err)
	}
	for _, f := range app.files {
		f.records = nil
	}
	if err := g.provision(ctx, app); err != nil {
		b.Fatal(err)
	}
	app.set = nil           // as Start does
	g.logger = zap.NewNop() // at Caddy's default level the lines of a flood are thinned to nearly none
	b.Cleanup(func() { _ = g.Cleanup() })
	return secrets
}

// discardWriter has a fresh header map for each request and no body.
type discardWriter struct {
	header http.Header
	status int
}

func (w *discardWriter) Header() http.Header         { return w.header }
func (w *discardWriter) Write(p []byte) (int, error) { return len(p), nil }
func (w *discardWriter) WriteHeader(status int)      { w.status = status }

// benchRequest makes a request template as the server hands it to the chain.
func benchRequest(method, target string, header http.Header) *http.Request {
	r := httptest.NewRequest(method, target, nil)
	r.Header = header
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), nil, nil)
}

var (
	benchServer = []string{caddyhttp.ServerHeader}
	benchType   = []string{"application/json"}
)

var benchNext = caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
	w.Header()["Content-Type"] = benchType
	w.WriteHeader(http.StatusOK)
	return nil
})

// benchServe runs the guard over requests prepared outside the timer, since
// a request is changed by being served.
func benchServe(b *testing.B, g *Guard, want int, request func(i int) *http.Request) {
	b.Helper()
	const batch = 1024
	var requests [batch]*http.Request
	w := new(discardWriter)
	b.ReportAllocs()
	b.ResetTimer()
	for i := 0; i < b.N; i++ {
		if i%batch == 0 {
			b.StopTimer()
			for j := range requests {
				requests[j] = request(i + j)
			}
			b.StartTimer()
		}
		w.header = make(http.Header)
		w.header["Server"] = benchServer // as the server does, from a shared slice
		if err := g.ServeHTTP(w, requests[i%batch], benchNext); err != nil {
			b.Fatal(err)
		}
		if w.status != want {
			b.Fatalf("status %d, expected %d", w.status, want)
		}
	}
}

func chatHeader(name, value string) http.Header {
	return http.Header{
		"Accept": {"*/*"}, "Content-Type": {"application/json"}, "User-Agent": {"bench"},
		"Content-Length": {"150"}, name: {value},
	}
}

func BenchmarkDecision(b *testing.B) {
	for _, n := range []int{1000, 100_000} {
		b.Run(fmt.Sprintf("keys=%d", n), func(b *testing.B) {
			g := new(Guard)
			secrets := benchGuard(b, n, g)
			headers := make([]http.Header, len(secrets))
			for i, secret := range secrets {
				headers[i] = chatHeader("X-Api-Key", secret)
			}
			order := rand.New(rand.NewPCG(1, 2)).Perm(n)
			x := new(exchange)
			b.ReportAllocs()
			b.ResetTimer()
			for i := 0; i < b.N; i++ {
				secret, why := readCredential(headers[order[i%n]])
				if why != reasonNone {
					b.Fatal(why)
				}
				k, status := g.authenticate(secret)
				if k == nil || status != key.Active {
					b.Fatal("no key")
				}
				x.key, x.tier, x.charges = k, nil, x.room[:0]
				if f := g.admit(x); f != nil {
					b.Fatal(f)
				}
				x.charges[0].release()
			}
		})
	}
}

func BenchmarkGuard(b *testing.B) {
	for _, n := range []int{1000, 100_000} {
		for _, path := range []string{"/api/chat", "/v1/chat/completions"} {
			b.Run(fmt.Sprintf("admitted/keys=%d%s", n, path), func(b *testing.B) {
				g := &Guard{LogSuccess: "off"}
				secrets := benchGuard(b, n, g)
				random := rand.New(rand.NewPCG(1, 2))
				benchServe(b, g, http.StatusOK, func(int) *http.Request {
					return benchRequest(http.MethodPost, path, chatHeader("X-Api-Key", secrets[random.IntN(n)]))
				})
			})
		}
	}
	b.Run("public", func(b *testing.B) {
		g := &Guard{Public: []string{"/api/status", "/api/health"}}
		benchGuard(b, 1000, g)
		benchServe(b, g, http.StatusOK, func(int) *http.Request {
			return benchRequest(http.MethodGet, "/api/health", http.Header{"Accept": {"*/*"}, "User-Agent": {"bench"}})
		})
	})
	b.Run("open", func(b *testing.B) {
		g := &Guard{Protect: []string{"/api/*"}}
		benchGuard(b, 1000, g)
		benchServe(b, g, http.StatusOK, func(int) *http.Request {
			return benchRequest(http.MethodGet, "/index.html", http.Header{"Accept": {"*/*"}, "User-Agent": {"bench"}})
		})
	})
	b.Run("preflight", func(b *testing.B) {
		g := &Guard{CORS: &CORS{Origins: []string{"https://app.example.com"}}}
		benchGuard(b, 1000, g)
		benchServe(b, g, http.StatusNoContent, func(int) *http.Request {
			return benchRequest(http.MethodOptions, "/api/chat", http.Header{
				"Origin": {"https://app.example.com"}, "Access-Control-Request-Method": {"POST"},
				"Access-Control-Request-Headers": {"content-type,x-api-key"},
			})
		})
	})
	b.Run("refused/401", func(b *testing.B) {
		g := new(Guard)
		benchGuard(b, 1000, g)
		unknown := key.Generate()
		benchServe(b, g, http.StatusUnauthorized, func(int) *http.Request {
			return benchRequest(http.MethodPost, "/api/chat", chatHeader("X-Api-Key", unknown))
		})
	})
	b.Run("refused/429", func(b *testing.B) {
		g := &Guard{Tiers: map[string]Tier{"bench": {Requests: []RequestLimit{{Limit: 1, Window: caddy.Duration(24 * 3600e9)}}}}}
		secrets := benchGuard(b, 1, g)
		request := func(int) *http.Request {
			return benchRequest(http.MethodPost, "/api/chat", chatHeader("X-Api-Key", secrets[0]))
		}
		w := &discardWriter{header: make(http.Header)}
		if err := g.ServeHTTP(w, request(0), benchNext); err != nil { // the one that is admitted, or an earlier run's
			b.Fatal(err)
		}
		benchServe(b, g, http.StatusTooManyRequests, request)
	})
}

// BenchmarkMemory reports the heap a key takes: idle in the keyring, and full
// in its window.
func BenchmarkMemory(b *testing.B) {
	const n = 20_000
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	for range b.N {
		before := heap()
		g := &Guard{Zone: "memory"}
		secrets := benchGuard(b, n, g)
		loaded := heap()
		full := &Guard{Zone: "memory"}
		full.app = g.app
		for _, secret := range secrets {
			k, _ := g.authenticate(secret)
			x := &exchange{key: k}
			x.charges = x.room[:0]
			for range 100 {
				if f := g.admit(x); f != nil {
					b.Fatal(f)
				}
				x.charges[0].release()
				x.charges = x.room[:0]
			}
		}
		used := heap()
		b.ReportMetric(float64(loaded-before)/n-float64(len(secrets[0])+16), "B/idle-key")
		b.ReportMetric(float64(used-loaded)/n, "B/key-with-100-admissions")
		runtime.KeepAlive(secrets)
		runtime.KeepAlive(g)
	}
}
