package zejzlauth

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/logging"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

func newTestEncoder(t testing.TB, config string) *LogEncoder {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	mod, err := ctx.LoadModuleByID("caddy.logging.encoders.zejzl", json.RawMessage(config))
	if err != nil {
		t.Fatal(err)
	}
	return mod.(*LogEncoder)
}

func newTestLogger(t testing.TB, config string) (*zap.Logger, *bytes.Buffer) {
	t.Helper()
	out := new(bytes.Buffer)
	core := zapcore.NewCore(newTestEncoder(t, config), zapcore.AddSync(out), zapcore.DebugLevel)
	return zap.New(core), out
}

// decodeLines checks that each line is JSON and returns the last.
func decodeLines(t *testing.T, out *bytes.Buffer) map[string]any {
	t.Helper()
	var last map[string]any
	for line := range strings.Lines(out.String()) {
		last = nil
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			t.Fatalf("%v in line %s", err, line)
		}
	}
	return last
}

// checkNoCanary looks for both canaries, also in the base64 of a whole value.
func checkNoCanary(t *testing.T, out string) {
	t.Helper()
	for _, canary := range []string{canaryKey, canaryKey[len("zejzl_"):], canaryForeign} {
		if strings.Contains(out, canary) || strings.Contains(out, base64.StdEncoding.EncodeToString([]byte(canary))) {
			t.Errorf("%s leaked: %s", canary, out)
		}
	}
}

type stringer string

func (s stringer) String() string { return string(s) }

type verboseError struct{ brief, verbose string }

func (e verboseError) Error() string { return e.brief }

func (e verboseError) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, e.verbose) }

type joinedErrors []error

func (joinedErrors) Error() string     { return "several" }
func (e joinedErrors) Errors() []error { return e }

func object(fields ...zap.Field) zapcore.ObjectMarshaler {
	return zapcore.ObjectMarshalerFunc(func(enc zapcore.ObjectEncoder) error {
		for _, f := range fields {
			f.AddTo(enc)
		}
		return nil
	})
}

// fieldKinds holds canaries in every way a zap field can.
func fieldKinds() map[string][]zap.Field {
	header := http.Header{
		"X-Api-Key": {canaryForeign}, "X_api.key": {canaryForeign}, "Sec-Websocket-Protocol": {"bearer, " + canaryForeign},
		"X-Forwarded-Authorization": {canaryForeign}, "Referer": {"https://x/?api_key=" + canaryForeign + "&a=1"},
		"Content-Type": {"text/plain"},
	}
	type inner struct {
		Secret  string `json:"secret"`
		Raw     []byte
		Cookie  []string
		Headers http.Header
	}
	value := inner{"x " + canaryKey, []byte(canaryKey), []string{canaryForeign}, header}
	token := "Bearer " + canaryForeign
	return map[string][]zap.Field{
		"String":       {zap.String("f", canaryKey), zap.String("g", token), zap.String("cookie", canaryForeign)},
		"Stringp":      {zap.Stringp("f", new(canaryKey))},
		"Strings":      {zap.Strings("f", []string{"a", canaryKey, "/?key=" + canaryForeign})},
		"Stringer":     {zap.Stringer("f", stringer(token))},
		"Stringers":    {zap.Stringers("f", []stringer{stringer(token), canaryKey})},
		"ByteString":   {zap.ByteString("f", []byte(canaryKey)), zap.ByteString("X-API-Key", []byte(canaryForeign))},
		"ByteStrings":  {zap.ByteStrings("f", [][]byte{[]byte(token)})},
		"Binary":       {zap.Binary("f", []byte(canaryKey)), zap.Binary("cookie", []byte(canaryForeign))},
		"Error":        {zap.Error(fmt.Errorf("sent: %w", errors.New(canaryKey)))},
		"verbose":      {zap.Error(verboseError{"brief", "verbose " + canaryKey})},
		"Errors":       {zap.Errors("f", []error{errors.New(token), nil})},
		"error causes": {zap.Error(joinedErrors{errors.New(canaryKey)})},
		"key":          {zap.String(canaryKey, "v"), zap.Int(canaryKey, 1), zap.Bool("zejzl%5F"+canaryKey[6:]+"x", true)},
		"Any string":   {zap.Any("f", canaryKey)},
		"Any bytes":    {zap.Any("f", []byte(canaryKey))},
		"Any error":    {zap.Any("f", errors.New(canaryKey))},
		"Any struct":   {zap.Any("f", value)},
		"Any pointer":  {zap.Any("f", &value)},
		"Any map":      {zap.Any("f", map[string]any{canaryKey: []any{map[string]any{"cookie": canaryForeign}}, "n": 1.5})},
		"Any slice":    {zap.Any("f", []any{canaryKey, []any{token}, inner{Cookie: []string{canaryForeign}}})},
		"Any header":   {zap.Any("f", header), zap.Any("headers", header), zap.Any("Set-Cookie", header)},
		"Any values":   {zap.Any("f", url.Values{"api_key": {canaryForeign}, "x": {canaryKey}})},
		"Any raw":      {zap.Any("f", json.RawMessage(`{"a":[1,"\u007aejzl`+canaryKey[5:]+`"],"api.key":"`+canaryForeign+`"}`))},
		"Reflect":      {zap.Reflect("f", value), zap.Reflect("nil", nil)},
		"Inline":       {zap.Inline(object(zap.String("f", canaryKey), zap.String("authorization", canaryForeign)))},
		"Dict":         {zap.Dict("f", zap.String("g", token), zap.Dict("h", zap.String("x-goog-api-key", canaryForeign)))},
		"Namespace":    {zap.Namespace("resp_headers"), zap.Strings("X-My-Cookie", []string{canaryForeign}), zap.String("f", canaryKey)},
		"Object": {zap.Object("f", object(
			zap.Namespace(canaryKey), zap.Object("g", object(zap.Any("h", value), zap.String("api-key", canaryForeign))))), zap.Int("after", 1)},
		"Array": {zap.Array("f", zapcore.ArrayMarshalerFunc(func(enc zapcore.ArrayEncoder) error {
			enc.AppendString(canaryKey)
			enc.AppendByteString([]byte(token))
			enc.AppendInt(1)
			return errors.Join(
				enc.AppendObject(object(zap.String("Cookie", canaryForeign), zap.String("f", canaryKey))),
				enc.AppendReflected(value),
				enc.AppendArray(zapcore.ArrayMarshalerFunc(func(enc zapcore.ArrayEncoder) error {
					enc.AppendString(canaryKey)
					return enc.AppendArray(caddyhttp.LoggableStringArray{"a", canaryKey})
				})))
		}))},
		"failing object": {zap.Object("f", zapcore.ObjectMarshalerFunc(func(zapcore.ObjectEncoder) error { return errors.New(canaryKey) }))},
		"failing any":    {zap.Any("f", map[string]any{"a": canaryKey, "b": func() {}})},
		"caddy header":   {zap.Object("headers", caddyhttp.LoggableHTTPHeader{Header: header, ShouldLogCredentials: true})},
	}
}

func TestLogEncoderFields(t *testing.T) {
	for name, fields := range fieldKinds() {
		t.Run(name, func(t *testing.T) {
			for _, config := range []string{`{}`, `{"wrap":{"format":"filter","wrap":{"format":"json"},"fields":{"x>y":{"filter":"delete"}}}}`} {
				logger, out := newTestLogger(t, config)
				logger.Info("entry", fields...)
				logger.With(fields...).Info("with", zap.String("last", "1"))
				logger.WithLazy(fields...).With(zap.Int("i", 1)).Info("lazy", fields...)
				decodeLines(t, out)
				checkNoCanary(t, out.String())
				if n := strings.Count(out.String(), "\n"); n != 3 {
					t.Errorf("%d lines, want 3: %s", n, out)
				}
			}
			logger, out := newTestLogger(t, `{"wrap":{"format":"console"}}`)
			logger.With(fields...).Info("console", fields...)
			checkNoCanary(t, out.String())
		})
	}
}

// What holds no credential must come out as the wrapped encoder writes it alone.
func TestLogEncoderKeepsTheRest(t *testing.T) {
	fields := []zap.Field{
		zap.String("s", "a\"b\\c\n<é>\xff"), zap.Int("i", -1), zap.Uint8("u", 1), zap.Float64("f", 1.5), zap.Bool("b", true),
		zap.Complex128("c", 1i), zap.Duration("d", 1500), zap.Binary("bin", []byte{0, 1}), zap.Any("nil", nil),
		zap.Any("struct", struct {
			B string
			A float64
			C json.Number
		}{"<&>", 1e21, "12345678901234567890"}),
		zap.Any("map", map[string]any{"z": 1, "a": []any{nil, "x", map[string]int{}}}),
		zap.Ints("ints", []int{1, 2}), zap.Error(errors.New("oops")), zap.Strings("strings", []string{"a", ""}),
		zap.Object("o", object(zap.Namespace("ns"), zap.Int("x", 1))), zap.Namespace("ns"), zap.String("in", "ns"),
		zap.Any("unencodable", func() {}), zap.Stringer("nil stringer", (*url.URL)(nil)),
	}
	for _, format := range []string{"json", "console"} {
		plain := map[string]provisionedEncoder{"json": new(logging.JSONEncoder), "console": new(logging.ConsoleEncoder)}[format]
		if err := plain.Provision(caddy.Context{}); err != nil {
			t.Fatal(err)
		}
		ours := newTestEncoder(t, `{"wrap":{"format":"`+format+`"}}`)
		write := func(enc zapcore.Encoder) string {
			out := new(bytes.Buffer)
			core := zapcore.NewCore(enc, zapcore.AddSync(out), zapcore.DebugLevel).With(fields)
			if err := core.Write(zapcore.Entry{LoggerName: "a.b", Message: "msg", Stack: "stack"}, fields); err != nil {
				t.Fatal(err)
			}
			return out.String()
		}
		if got, want := write(ours), write(plain); got != want {
			t.Errorf("%s\n got %s\nwant %s", format, got, want)
		}
	}
}

func TestLogEncoderEntry(t *testing.T) {
	logger, out := newTestLogger(t, `{}`)
	logger = logger.WithOptions(zap.AddStacktrace(zapcore.ErrorLevel)).Named("log." + canaryKey)
	logger.Error("sent Bearer " + canaryForeign + " to /?key=" + canaryForeign + " and " + canaryKey)
	line := decodeLines(t, out)
	checkNoCanary(t, out.String())
	if want := "sent Bearer REDACTED to /?key=REDACTED and REDACTED"; line["msg"] != want {
		t.Errorf("msg is %q, want %q", line["msg"], want)
	}
	if line["logger"] != "log.REDACTED" {
		t.Errorf("logger is %q", line["logger"])
	}

	buf, err := newTestEncoder(t, `{}`).EncodeEntry(zapcore.Entry{Stack: "main." + canaryKey + "()"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	checkNoCanary(t, buf.String())
}

// Fields of one child logger must not reach its parent or siblings, and a
// namespace opened by one holds for that one.
func TestLogEncoderClone(t *testing.T) {
	logger, out := newTestLogger(t, `{}`)
	child := logger.With(zap.Namespace("headers"), zap.String("a", canaryKey))
	sibling := logger.With(zap.String("b", "2"))
	for _, l := range []*zap.Logger{child, sibling, logger} {
		out.Reset()
		l.Info("x", zap.String("X-My-Api-Key", "seen"))
		line := decodeLines(t, out)
		switch l {
		case child:
			headers := line["headers"].(map[string]any)
			if len(headers) != 1 || headers["a"] != "REDACTED" {
				t.Errorf("child: %s", out)
			}
		case sibling:
			if line["b"] != "2" || line["X-My-Api-Key"] != "seen" || line["headers"] != nil {
				t.Errorf("sibling: %s", out)
			}
		default:
			if line["b"] != nil || line["headers"] != nil {
				t.Errorf("parent: %s", out)
			}
		}
	}
}

func TestLogEncoderLeavesCallerValues(t *testing.T) {
	header := http.Header{"X-Api-Key": {canaryForeign}, "A": {canaryKey}}
	nested := map[string]any{"cookie": canaryForeign, "list": []any{canaryKey}}
	raw := json.RawMessage(`{"a":"` + canaryKey + `"}`)
	values := caddyhttp.LoggableStringArray{canaryKey}
	logger, _ := newTestLogger(t, `{}`)
	logger.Info("x", zap.Any("h", header), zap.Any("n", nested), zap.Any("r", raw), zap.Array("v", values), zap.Any("b", []byte(raw)))
	if len(header) != 2 || header["A"][0] != canaryKey || len(nested) != 2 || nested["list"].([]any)[0] != canaryKey ||
		!strings.Contains(string(raw), canaryKey) || values[0] != canaryKey {
		t.Errorf("changed: %v %v %s %v", header, nested, raw, values)
	}
}

func TestLogEncoderPanic(t *testing.T) {
	logger, out := newTestLogger(t, `{}`)
	func() {
		defer func() {
			if r := recover(); r != "boom" {
				t.Errorf("recovered %v, want the marshaler's own panic", r)
			}
		}()
		logger.Info("x", zap.Object("o", zapcore.ObjectMarshalerFunc(func(zapcore.ObjectEncoder) error { panic("boom") })))
	}()
	out.Reset()
	logger.Info("still alive", zap.String("a", canaryKey))
	if line := decodeLines(t, out); line["a"] != "REDACTED" {
		t.Errorf("got %s", out)
	}
}

func accessLogRequest() *http.Request {
	r := httptest.NewRequest(http.MethodPost, "https://api.example.com/v1/chat/completions?stream=true&api_key="+canaryForeign, nil)
	for name, value := range map[string]string{
		"Accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8", "Accept-Encoding": "gzip, deflate, br",
		"Accept-Language": "en-US,en;q=0.5", "Content-Type": "application/json", "Content-Length": "512",
		"User-Agent":      "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36",
		"X-Forwarded-For": "203.0.113.7", "X-Stainless-Lang": "python", "X-Stainless-Runtime-Version": "3.12.1",
	} {
		r.Header.Set(name, value)
	}
	r.Header["X-Api-Key"] = []string{canaryForeign}
	r.Header["X_Api_Key"] = []string{canaryForeign}
	r.Header["Authorization"] = []string{"Bearer " + canaryKey}
	r.Header["Sec-Websocket-Protocol"] = []string{"zejzl, " + canaryForeign}
	r.Header["Referer"] = []string{"https://app.example.com/?api_key=" + canaryForeign + "&tab=1"}
	return r
}

func accessLogFields() []zap.Field {
	return []zap.Field{
		zap.Int("bytes_read", 512), zap.String("user_id", "0a1b2c3d4e5f"), zap.Duration("duration", 1234567), zap.Int("size", 2048),
		zap.Int("status", 200), zap.Object("resp_headers", caddyhttp.LoggableHTTPHeader{Header: http.Header{
			"Content-Type": {"application/json"}, "Set-Cookie": {"a=" + canaryForeign}, "X-Ratelimit-Limit": {"100"},
			"X-Ratelimit-Remaining": {"99"}, "X-Content-Type-Options": {"nosniff"}, "Alt-Svc": {`h3=":443"; ma=2592000`},
		}, ShouldLogCredentials: true}),
	}
}

func TestLogEncoderRequest(t *testing.T) {
	request := zap.Object("request", caddyhttp.LoggableHTTPRequest{Request: accessLogRequest(), ShouldLogCredentials: true})
	for _, config := range []string{
		`{}`,
		`{"wrap":{"format":"filter","wrap":{"format":"json"},"fields":{"request>headers>X-Forwarded-For":{"filter":"ip_mask","ipv4_cidr":16}}}}`,
	} {
		logger, out := newTestLogger(t, config)
		logger.WithLazy(request).Info("handled request", accessLogFields()...)
		line := decodeLines(t, out)
		checkNoCanary(t, out.String())

		req := line["request"].(map[string]any)
		if want := "https://api.example.com/v1/chat/completions?stream=true&api_key=REDACTED"; req["uri"] != want {
			t.Errorf("uri is %q, want %q", req["uri"], want)
		}
		headers := req["headers"].(map[string]any)
		want := []string{
			"Accept", "Accept-Encoding", "Accept-Language", "Content-Length", "Content-Type", "Referer", "User-Agent",
			"X-Forwarded-For", "X-Stainless-Lang", "X-Stainless-Runtime-Version",
		}
		if got := slices.Sorted(maps.Keys(headers)); !slices.Equal(got, want) {
			t.Errorf("request headers %v, want %v", got, want)
		}
		if got := fmt.Sprint(headers["Referer"]); got != "[https://app.example.com/?api_key=REDACTED&tab=1]" {
			t.Errorf("Referer is %s", got)
		}
		if got := fmt.Sprint(headers["X-Forwarded-For"]); config != `{}` && got != "[203.0.0.0]" {
			t.Errorf("a filter inside must still see a header's values: X-Forwarded-For is %s", got)
		}
		if got := len(line["resp_headers"].(map[string]any)); got != 5 {
			t.Errorf("%d response headers, want 5: all but Set-Cookie", got)
		}
	}
}

func TestLogEncoderWrapUnknown(t *testing.T) {
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	if _, err := ctx.LoadModuleByID("caddy.logging.encoders.zejzl", json.RawMessage(`{"wrap":{"format":"nonesuch"}}`)); err == nil {
		t.Error("an unknown encoder must be an error")
	}
}

func TestLogEncoderTerminal(t *testing.T) {
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no pseudo terminal here")
	}
	file, err := os.Create(t.TempDir() + "/stderr")
	if err != nil {
		t.Fatal(err)
	}
	stderr := os.Stderr
	defer func() {
		os.Stderr = stderr
		_ = terminal.Close()
		_ = file.Close()
	}()
	for _, tt := range []struct {
		name, config string
		stderr       *os.File
		writer       caddy.WriterOpener
		console      bool
	}{
		{"terminal", `{}`, terminal, caddy.StderrWriter{}, true},
		{"no terminal", `{}`, file, caddy.StderrWriter{}, false},
		{"other writer", `{}`, terminal, caddy.DiscardWriter{}, false},
		{"explicit json", `{"wrap":{"format":"json"}}`, terminal, caddy.StderrWriter{}, false},
		{"passed on", `{"wrap":{"format":"filter"}}`, terminal, caddy.StderrWriter{}, true},
	} {
		os.Stderr = tt.stderr
		enc := newTestEncoder(t, tt.config)
		if err := enc.ConfigureDefaultFormat(tt.writer); err != nil {
			t.Fatal(err)
		}
		buf, err := enc.EncodeEntry(zapcore.Entry{Message: "msg"}, []zap.Field{zap.String("a", canaryKey)})
		if err != nil {
			t.Fatal(err)
		}
		if got := !strings.HasPrefix(buf.String(), "{"); got != tt.console {
			t.Errorf("%s: console is %v, want %v: %s", tt.name, got, tt.console, buf)
		}
		checkNoCanary(t, buf.String())
	}
}

func TestLogEncoderCaddyfile(t *testing.T) {
	for _, tt := range []struct{ in, want, wantErr string }{
		{"zejzl", `{}`, ""},
		{"zejzl json", `{"wrap":{"format":"json"}}`, ""},
		{"zejzl console", `{"wrap":{"format":"console"}}`, ""},
		{"zejzl {\n wrap json {\n time_format rfc3339\n }\n}", `{"wrap":{"format":"json","time_format":"rfc3339"}}`, ""},
		{"zejzl {\n wrap filter {\n a delete\n }\n}", `{"wrap":{"fields":{"a":{"filter":"delete"}},"format":"filter"}}`, ""},
		{"zejzl logfmt", "", "expected json or console"},
		{"zejzl json console", "", "wrong argument count"},
		{"zejzl json {\n wrap console\n}", "", "already specified"},
		{"zejzl {\n wrap json\n wrap console\n}", "", "already specified"},
		{"zejzl {\n wrap\n}", "", "wrong argument count"},
		{"zejzl {\n wrap json console\n}", "", "wrong argument count"},
		{"zejzl {\n wrap nonesuch\n}", "", "nonesuch"},
		{"zejzl {\n mask all\n}", "", "unrecognized subdirective 'mask', expected wrap"},
	} {
		var enc LogEncoder
		err := enc.UnmarshalCaddyfile(caddyfile.NewTestDispenser(tt.in))
		if tt.wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
				t.Errorf("%q: error %v, want one with %q", tt.in, err, tt.wantErr)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", tt.in, err)
			continue
		}
		if got := string(caddyconfig.JSON(&enc, nil)); got != tt.want {
			t.Errorf("%q: %s, want %s", tt.in, got, tt.want)
		}
	}
}

// The whole way from a Caddyfile's log directive to a provisioned encoder.
func TestLogEncoderFromLogDirective(t *testing.T) {
	adapter := caddyconfig.GetAdapter("caddyfile")
	config, _, err := adapter.Adapt([]byte("{\n log default {\n format zejzl json\n }\n}\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	var parsed caddy.Config
	if err := json.Unmarshal(config, &parsed); err != nil {
		t.Fatal(err)
	}
	raw := parsed.Logging.Logs["default"].EncoderRaw
	if !safeEncoder(raw) {
		t.Errorf("safeEncoder(%s) = false", raw)
	}
	if err := caddy.Validate(&parsed); err != nil {
		t.Errorf("validating %s: %v", config, err)
	}
}

func TestSafeEncoder(t *testing.T) {
	for raw, want := range map[string]bool{
		`{"format":"zejzl"}`:                            true,
		`{"format":"zejzl","wrap":{"format":"filter"}}`: true,
		`{"format":"json"}`:                             false,
		`{"format":"filter","wrap":{"format":"zejzl"}}`: false,
		`{}`:      false,
		`"zejzl"`: false,
		`null`:    false,
		``:        false,
	} {
		if got := safeEncoder(json.RawMessage(raw)); got != want {
			t.Errorf("safeEncoder(%s) = %v, want %v", raw, got, want)
		}
	}
}

func BenchmarkAccessLog(b *testing.B) {
	plain := new(logging.JSONEncoder)
	if err := plain.Provision(caddy.Context{}); err != nil {
		b.Fatal(err)
	}
	r := accessLogRequest()
	for _, bb := range []struct {
		name string
		enc  zapcore.Encoder
	}{{"json", plain}, {"zejzl", newTestEncoder(b, `{}`)}} {
		b.Run(bb.name, func(b *testing.B) {
			core := zapcore.NewCore(bb.enc, zapcore.AddSync(io.Discard), zapcore.DebugLevel)
			b.ReportAllocs()
			for b.Loop() {
				// As Caddy does: the request is added to a child logger, once a request.
				c := core.With([]zap.Field{zap.Object("request", caddyhttp.LoggableHTTPRequest{Request: r})})
				if err := c.Write(zapcore.Entry{LoggerName: "http.log.access", Message: "handled request"}, accessLogFields()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
