package zejzlauth

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

// logInterval is how long an event of the same kind and caller stays quiet,
// in ticks of the limiter's clock.
const logInterval = int64(time.Minute / time.Microsecond)

// successLevel says how much of the successful calls is logged.
type successLevel uint8

const (
	successInfo successLevel = iota
	successAll
	successDebug
	successOff
)

var successLevels = map[string]successLevel{
	"": successInfo, "info": successInfo, "all": successAll, "debug": successDebug, "off": successOff,
}

const successLevelNames = "info, all, debug or off"

// logAdmitted logs a successful authentication. The line at debug level tells
// when the limiter decided, by which anybody can check that it keeps its word.
func (g *Guard) logAdmitted(x *exchange) {
	if g.logSuccess == successOff {
		return
	}
	if c := g.logger.Check(zapcore.DebugLevel, "request admitted"); c != nil {
		c.Write(append(x.fields(), zap.Int64("admitted_at", int64(x.verdict.At)), zap.Int("remaining", x.verdict.Remaining))...)
	}
	count := int64(1)
	switch {
	case g.logSuccess == successDebug || len(x.charges) == 0:
		return
	case g.logSuccess == successInfo:
		var due bool
		if count, due = x.charges[0].account.successes.due(x.verdict.At); !due {
			return
		}
	}
	if c := g.logger.Check(zapcore.InfoLevel, "authenticated"); c != nil {
		c.Write(append(x.fields(), zap.Int64("count", count))...)
	}
}

// logRefusal logs a refusal, floods thinned: one line a minute for the same
// reason and caller, with the number of those it stands for.
func (g *Guard) logRefusal(x *exchange, f *refusal, message string) {
	count, due := refusalLog.due(f.reason, x.caller(), int64(x.start), 1)
	level := zapcore.InfoLevel
	if !due {
		level = zapcore.DebugLevel
	}
	c := g.logger.Check(level, message)
	if c == nil {
		return
	}
	fields := append(x.fields(), zap.String("reason", string(f.reason)), zap.Int("status", f.status), zap.Int64("count", count))
	if f.wait > 0 {
		fields = append(fields, zap.Duration("wait", f.wait))
	}
	if x.rejected != nil {
		fields = append(fields, zap.String("key_id", x.rejected.ID), zap.String("key_name", x.rejected.Name),
			zap.String("tier", x.rejected.Tier), zap.Stringer("key_status", x.status))
	}
	c.Write(fields...)
}

// logFailure logs an error from behind, in place of Caddy, which would log
// the request's headers with it, X-Api-Key included. A backend that is down
// makes a few lines a minute for each caller and path.
func (g *Guard) logFailure(x *exchange, f *refusal) {
	level, count := zapcore.DebugLevel, int64(1)
	if f.status >= http.StatusInternalServerError {
		var due bool
		if count, due = refusalLog.due(f.reason, x.caller()+x.path, int64(x.start), failureLines); due {
			level = zapcore.ErrorLevel
		}
	}
	c := g.logger.Check(level, "request failed behind the guard")
	if c == nil {
		return
	}
	fields := append(x.fields(),
		zap.String("reason", string(f.reason)),
		zap.Int("status", f.status),
		zap.Int64("count", count),
		zap.Duration("duration", time.Duration(g.clock.tick()-x.start)*time.Microsecond),
		zap.String("error", x.clean(f.err.Error())))
	if p, ok := errors.AsType[*panicError](f.err); ok {
		fields = append(fields, zap.String("panic", x.clean(fmt.Sprint(p.value))), zap.String("stack", x.clean(string(p.stack))))
	}
	c.Write(fields...)
}

// caller is whose events are counted together.
func (x *exchange) caller() string {
	if x.key != nil {
		return x.key.ID
	}
	return x.clientNet()
}

// fields are what every event tells: never a header, never a query.
func (x *exchange) fields() []zapcore.Field {
	fields := make([]zapcore.Field, 0, 14)
	fields = append(fields,
		zap.String("request_id", x.requestID()),
		zap.String("client_ip", x.clientIP()),
		zap.String("method", x.request.Method),
		zap.String("path", x.loggedPath()))
	if x.key != nil {
		fields = append(fields, zap.String("key_id", x.key.ID), zap.String("key_name", x.key.Name),
			zap.String("tier", x.guard.tierOf(x.key).name))
	}
	return fields
}

// maxLoggedPath keeps lines short that anybody may cause.
const maxLoggedPath = 256

func (x *exchange) loggedPath() string {
	path := x.clean(x.path)
	if len(path) > maxLoggedPath {
		path = path[:maxLoggedPath] + "..."
	}
	return path
}

// clean takes keys out of a text: those of our shape, and the one that came
// with the request, of whatever shape.
func (x *exchange) clean(s string) string {
	if key.WellFormed(x.secret) { // shorter words stand in every path
		s = strings.ReplaceAll(s, x.secret, "REDACTED")
	}
	return scrub(s)
}

// addAccessLogFields puts the key's name and tier beside user_id.
func (x *exchange) addAccessLogFields(ctx context.Context) {
	if extra, ok := ctx.Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		extra.Set(zap.String("key_name", x.key.Name))
		extra.Set(zap.String("tier", x.guard.tierOf(x.key).name))
	}
}

// clientIP is the client's address as Caddy found it by trusted_proxies.
func (x *exchange) clientIP() string {
	ip, _ := caddyhttp.GetVar(x.request.Context(), caddyhttp.ClientIPVarKey).(string)
	return ip
}

// clientNet is who counts as one client: an IPv6 network has more addresses
// than any table has room for.
func (x *exchange) clientNet() string {
	ip := x.clientIP()
	addr, err := netip.ParseAddr(ip)
	if err != nil || addr.Unmap().Is4() {
		return ip
	}
	network, err := addr.WithZone("").Prefix(64)
	if err != nil {
		return ip
	}
	return network.String()
}

// failureLines is how many errors from behind are logged a minute for the same
// reason, caller and path.
const failureLines = 10

// refusalLog thins the refusals and failures of this process.
var refusalLog = &thinner{seed: maphash.MakeSeed()}

// thinner lets a few events in a minute pass for each of its slots, so that no
// flood writes more lines than the slots allow. Callers that share a slot
// share its lines.
type thinner struct {
	seed  maphash.Seed
	slots [1024]struct {
		quietUntil, lines, unlogged atomic.Int64
	}
}

// due counts an event. If a line is due it returns how many events of its
// slot the line stands for.
func (t *thinner) due(why reason, who string, now, lines int64) (count int64, ok bool) {
	hash := maphash.String(t.seed, who) ^ maphash.String(t.seed, string(why))
	slot := &t.slots[hash%uint64(len(t.slots))]
	slot.unlogged.Add(1)
	if quiet := slot.quietUntil.Load(); now >= quiet && slot.quietUntil.CompareAndSwap(quiet, now+logInterval) {
		slot.lines.Store(0)
	}
	if slot.lines.Add(1) > lines {
		return 0, false
	}
	return slot.unlogged.Swap(0), true
}
