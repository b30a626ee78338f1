package zejzlauth

import (
	"errors"
	"maps"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
	"github.com/zejzl/caddy-zejzl-auth/internal/window"
)

// exchangeVar is where a guard leaves its decision for a later one of the chain.
const exchangeVar = "zejzl_auth.exchange"

// exchange is one request on its way through the guard.
type exchange struct {
	response

	request  *http.Request
	path     string // as the client sent it, without the query
	start    window.Tick
	key      *key.Key // the caller; nil: nobody in particular
	left     *openCredential
	secret   string       // the credential, to be kept out of logs
	rejected *key.Key     // a key that is known but not active
	status   key.Status   // of rejected
	metered  *tierMetrics // counts this request as in flight
	charges  []charge
	room     [1]charge // for charges: one guard is the rule
	observed bool
	ended    bool
}

// String is what the placeholder of exchangeVar shows, in place of the request.
func (*exchange) String() string { return "zejzl_auth" }

func newExchange(g *Guard, w http.ResponseWriter, r *http.Request, rt route, uri string) *exchange {
	x := &exchange{request: r, start: g.clock.tick()}
	x.path, _, _ = strings.Cut(uri, "?")
	// Some backends take trailers for headers. None can be let through by name:
	// net/http adds to those announced whatever else ends the body.
	r.Trailer = nil
	x.ResponseWriter = w
	x.charges = x.room[:0]
	x.guard, x.route = g, rt
	x.secure = isSecure(r)
	if rt == open {
		return x
	}
	x.origin = g.cors.origin(r.Header)
	if x.dialect = g.errors; x.dialect == dialectAuto {
		x.dialect = speaks(r, x.path)
	}
	return x
}

// originalTarget is the method and URI of the request as the client sent it.
func originalTarget(r *http.Request) (method, uri string) {
	if original, ok := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok {
		return original.Method, original.RequestURI
	}
	return r.Method, r.RequestURI
}

// identified records who calls, for the backend's placeholders and the access log.
func (x *exchange) identified(k *key.Key) {
	x.key, x.keyed = k, true
	ctx := x.request.Context()
	if repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Map(x.placeholder)
	}
	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if ok && server != nil && server.Logs != nil {
		x.addAccessLogFields(ctx)
	}
}

// placeholder implements caddy.ReplacerFunc.
func (x *exchange) placeholder(name string) (any, bool) {
	switch name {
	case "http.auth.user.id", "http.zejzl_auth.key.id":
		return x.key.ID, true
	case "http.zejzl_auth.key.name":
		return x.key.Name, true
	case "http.zejzl_auth.key.tier":
		return x.guard.tierOf(x.key).name, true
	}
	return nil, false
}

// meter counts the request as admitted and in flight, unless it passes in shadow.
func (x *exchange) meter() {
	if len(x.charges) > 0 {
		x.metered = x.tier.counters()
		x.metered.admitted.Inc()
		x.metered.inFlight.Inc()
	}
}

// observe measures how long the decision took, once.
func (x *exchange) observe() {
	if x.observed {
		return
	}
	x.observed = true
	observeDecision(time.Duration(x.guard.clock.tick()-x.start) * time.Microsecond)
}

func (x *exchange) charged(z *zone) bool {
	for i := range x.charges {
		if x.charges[i].zone == z {
			return true
		}
	}
	return false
}

func (x *exchange) refund() {
	for i := range x.charges {
		x.charges[i].refund()
	}
}

// passOpen serves a path outside the guard's: four headers, and no key of
// ours to strangers.
func (x *exchange) passOpen(next caddyhttp.Handler) error {
	openRequests.Inc()
	h, ctx := x.request.Header, x.request.Context()
	secret, why := readCredential(h)
	if x.guard.cleanRequest(h, open, false) {
		caddyhttp.SetVar(ctx, exchangeVar, &openCredential{secret, why})
	}
	err := next.ServeHTTP(x, x.request)
	x.finish(x.Header())
	return err
}

// openCredential is what a guard read, and then removed, of a request outside
// its paths: a later guard of the chain, which protects them, judges that.
type openCredential struct {
	secret string
	why    reason
}

// String is what the placeholder of exchangeVar shows.
func (*openCredential) String() string { return "zejzl_auth" }

// servePreflight answers a CORS preflight. Browsers send it without the key,
// so it costs none; it is never forwarded unless CORS is the backend's.
func (x *exchange) servePreflight(next caddyhttp.Handler) error {
	g, h := x.guard, x.Header()
	if g.corsBackend {
		publicRequests.Inc()
		removeUpgrade(x.request.Header)
		g.cleanRequest(x.request.Header, x.route, false)
		return x.forward(next)
	}
	x.origin = "" // a preflight has CORS headers of its own, a refused one has none
	granted := make(http.Header)
	if !g.cors.preflight(x.request, granted) {
		return refuse(reasonForbidden)
	}
	publicRequests.Inc()
	x.commit()
	maps.Copy(h, granted)
	x.ResponseWriter.WriteHeader(http.StatusNoContent)
	return nil
}

// forward hands the request to the next handler, with what was decided for a
// later guard of the chain.
func (x *exchange) forward(next caddyhttp.Handler) error {
	caddyhttp.SetVar(x.request.Context(), exchangeVar, x)
	return next.ServeHTTP(x, x.request)
}

// end is deferred around all that a request meets: it frees the slots, turns a
// panic into an answer where there is none yet, and settles errors.
func (x *exchange) end(err *error) {
	x.ended = true
	for i := range x.charges {
		x.charges[i].release()
	}
	if x.metered != nil {
		x.metered.inFlight.Dec()
	}
	if v := recover(); v != nil {
		if v == http.ErrAbortHandler || x.committed { //nolint:errorlint // as net/http compares it
			panic(v)
		}
		*err = &panicError{value: v, stack: debug.Stack()}
	}
	if *err != nil && !x.committed {
		*err = x.refuse(refusalOf(*err))
		return
	}
	// Nothing written means that net/http will write 200 with what is there.
	x.finish(x.Header())
	x.finishTrailers(x.Header())
}

// panicError is a panic of a handler behind the guard. Its text tells nothing
// of the request; the value goes to the guard's own log.
type panicError struct {
	value any
	stack []byte
}

func (*panicError) Error() string { return "panic behind the guard" }

// refuse answers with a refusal, or hands it to Caddy where the site has
// handle_errors of its own.
func (x *exchange) refuse(f *refusal) error {
	g, h := x.guard, x.Header()
	requestID := x.requestID()
	if f.err == nil {
		x.observe()
		countDecision(decisionRefused, f.reason, x.tierName())
		g.logRefusal(x, f, "request refused")
	} else if _, panicked := errors.AsType[*panicError](f.err); panicked || x.dialect != dialectCaddy {
		g.logFailure(x, f) // else Caddy logs it, but for what a panic said
	}

	if x.dialect == dialectCaddy {
		server, ok := x.request.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
		x.unseen = ok && server != nil && server.Errors != nil
		x.finish(h)
		f.setHeaders(h)
		h["X-Request-Id"] = []string{requestID}
		err := f.err
		if err == nil {
			err = f
		}
		// Without a status, handle_errors would answer a panic with 200.
		return caddyhttp.Error(f.status, err)
	}
	// What an inner handler said of a body that will not come.
	for _, name := range [...]string{"Content-Type", "Content-Encoding", "Etag", "Last-Modified", "Accept-Ranges", "Content-Range"} {
		delete(h, name)
	}
	x.finish(h)
	f.setHeaders(h)
	h["X-Request-Id"] = []string{requestID}
	if x.dialect == dialectAnthropic {
		h["Request-Id"] = []string{requestID}
	}
	body, mediaType := f.body(x.dialect, requestID)
	h["Content-Type"] = []string{mediaType}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	x.committed = true
	x.ResponseWriter.WriteHeader(f.status)
	if x.request.Method != http.MethodHead {
		// A client that has left can't be told.
		_, _ = x.ResponseWriter.Write(body) //nolint:gosec // G705: JSON of our own words, with nosniff
	}
	return nil
}

func (x *exchange) tierName() string {
	if x.tier == nil {
		return ""
	}
	return x.tier.name
}

// requestID is Caddy's own id of the request.
func (x *exchange) requestID() string {
	if repl, ok := x.request.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		id, _ := repl.GetString("http.request.uuid")
		return id
	}
	return ""
}
