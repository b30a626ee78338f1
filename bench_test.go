package zejzlauth

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

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
		Tiers:   map[string]Tier{"bench": {Requests: []RequestLimit{{Limit: 100_000_000, Window: caddy.Duration(time.Second)}}}},
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

// benchRequest is a request as the server hands it to the chain, made ready
// again for each turn: served once, it has lost its key.
type benchRequest struct {
	*http.Request
	repl, fresh caddy.Replacer // what the context holds, and how it began
	vars        map[string]any
}

func newBenchRequest(method, target string) *benchRequest {
	b := &benchRequest{fresh: *caddy.NewReplacer()}
	b.repl = b.fresh
	b.Request = caddyhttp.PrepareRequest(httptest.NewRequest(method, target, nil), &b.repl, nil, nil)
	b.fresh = b.repl
	b.vars = b.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	return b
}

// renew gives the request its header again and forgets what the guard left.
func (b *benchRequest) renew(header http.Header) {
	b.repl = b.fresh
	delete(b.vars, exchangeVar)
	clear(b.Header)
	maps.Copy(b.Header, header)
}

var (
	benchServer = []string{caddyhttp.ServerHeader}
	benchType   = []string{"application/json"}
	benchLength = []string{"498"}
	benchDate   = []string{"Mon, 23 Nov 2026 12:00:00 GMT"}
)

// benchNext answers with no header of its own, so that the row shows the
// guard's; benchBackend with three, as a backend does: with more than 14
// headers in all, Go's map doubles once more.
var (
	benchNext = caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		w.WriteHeader(http.StatusOK)
		return nil
	})
	benchBackend = caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		h := w.Header()
		h["Content-Type"], h["Content-Length"], h["Date"] = benchType, benchLength, benchDate
		w.WriteHeader(http.StatusOK)
		return nil
	})
)

// benchServe runs the handler over one request again and again. Making the
// request ready is timed too; the row "baseline" is that alone, so the guard
// is the difference to it.
func benchServe(b *testing.B, handler caddyhttp.MiddlewareHandler, want int, r *benchRequest, header func(i int) http.Header) {
	b.Helper()
	benchServeTo(b, handler, benchNext, want, r, header)
}

func benchServeTo(b *testing.B, handler caddyhttp.MiddlewareHandler, next caddyhttp.Handler, want int, r *benchRequest, header func(i int) http.Header) {
	b.Helper()
	w := new(discardWriter)
	b.ReportAllocs()
	b.ResetTimer()
	for i := 0; i < b.N; i++ {
		r.renew(header(i))
		w.header = make(http.Header)
		w.header["Server"] = benchServer // as the server does, from a shared slice
		if err := handler.ServeHTTP(w, r.Request, next); err != nil {
			b.Fatal(err)
		}
		if w.status != want {
			b.Fatalf("status %d, expected %d", w.status, want)
		}
	}
}

// passThrough is no guard.
type passThrough struct{}

func (passThrough) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(w, r)
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
		g := &Guard{LogSuccess: "off"}
		secrets := benchGuard(b, n, g)
		headers := make([]http.Header, n)
		for i, j := range rand.New(rand.NewPCG(1, 2)).Perm(n) {
			headers[i] = chatHeader("X-Api-Key", secrets[j])
		}
		header := func(i int) http.Header { return headers[i%n] }
		name := func(row string) string { return fmt.Sprintf("%s/keys=%d", row, n) }
		b.Run(name("baseline"), func(b *testing.B) {
			benchServe(b, passThrough{}, http.StatusOK, newBenchRequest(http.MethodPost, "/api/chat"), header)
		})
		b.Run(name("admitted"), func(b *testing.B) {
			benchServe(b, g, http.StatusOK, newBenchRequest(http.MethodPost, "/api/chat"), header)
		})
		b.Run(name("baseline-backend"), func(b *testing.B) {
			benchServeTo(b, passThrough{}, benchBackend, http.StatusOK, newBenchRequest(http.MethodPost, "/api/chat"), header)
		})
		b.Run(name("admitted-backend"), func(b *testing.B) {
			benchServeTo(b, g, benchBackend, http.StatusOK, newBenchRequest(http.MethodPost, "/api/chat"), header)
		})
		b.Run(name("admitted-openai"), func(b *testing.B) {
			benchServe(b, g, http.StatusOK, newBenchRequest(http.MethodPost, "/v1/chat/completions"), header)
		})
	}
	plain := http.Header{"Accept": {"*/*"}, "User-Agent": {"bench"}}
	b.Run("public", func(b *testing.B) {
		g := &Guard{Public: []string{"/api/status", "/api/health"}}
		benchGuard(b, 1000, g)
		benchServe(b, g, http.StatusOK, newBenchRequest(http.MethodGet, "/api/health"), same(plain))
	})
	b.Run("open", func(b *testing.B) {
		g := &Guard{Protect: []string{"/api/*"}}
		benchGuard(b, 1000, g)
		benchServe(b, g, http.StatusOK, newBenchRequest(http.MethodGet, "/index.html"), same(plain))
	})
	b.Run("preflight", func(b *testing.B) {
		g := &Guard{CORS: &CORS{Origins: []string{"https://app.example.com"}}}
		benchGuard(b, 1000, g)
		benchServe(b, g, http.StatusNoContent, newBenchRequest(http.MethodOptions, "/api/chat"), same(http.Header{
			"Origin": {"https://app.example.com"}, "Access-Control-Request-Method": {"POST"},
			"Access-Control-Request-Headers": {"content-type,x-api-key"},
		}))
	})
	b.Run("refused/401", func(b *testing.B) {
		g := new(Guard)
		benchGuard(b, 1000, g)
		benchServe(b, g, http.StatusUnauthorized, newBenchRequest(http.MethodPost, "/api/chat"),
			same(chatHeader("X-Api-Key", key.Generate())))
	})
	b.Run("refused/429", func(b *testing.B) {
		g := &Guard{Tiers: map[string]Tier{"bench": {Requests: []RequestLimit{{Limit: 1, Window: caddy.Duration(24 * time.Hour)}}}}}
		header := same(chatHeader("X-Api-Key", benchGuard(b, 1, g)[0]))
		r := newBenchRequest(http.MethodPost, "/api/chat")
		r.renew(header(0))
		if err := g.ServeHTTP(&discardWriter{header: make(http.Header)}, r.Request, benchNext); err != nil { // takes the one place
			b.Fatal(err)
		}
		benchServe(b, g, http.StatusTooManyRequests, r, header)
	})
}

func same(h http.Header) func(int) http.Header { return func(int) http.Header { return h } }

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
