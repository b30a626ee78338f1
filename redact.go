package zejzlauth

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/logging"
	"go.uber.org/zap"
	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

func init() {
	caddy.RegisterModule(new(LogEncoder))
}

const logEncoderName = "zejzl"

// LogEncoder keeps credentials out of logs, whatever encoder then writes them.
//
// Caddy hides Authorization and cookies, but logs X-Api-Key in full: in access
// logs, and with any error of status 5xx even where no access log is set up.
// No handler can change that, since Caddy takes the request to log before the
// first handler runs. So this encoder belongs on every log, the default one too.
//
// It drops fields named like a credential header (Authorization,
// Proxy-Authorization, Cookie, Set-Cookie, X-Api-Key, Api-Key, X-Goog-Api-Key,
// Sec-WebSocket-Protocol) at any depth, and within logged headers also names
// that contain one. In every text it masks this module's keys, bearer tokens,
// and the query parameters key, api_key and access_token. It can't know the
// key of another make in free text, such as an error that quotes it.
type LogEncoder struct {
	// The encoder that writes the entries after they are cleaned. Default:
	// `{"format": "json"}`, or `{"format": "console"}` if the log goes to a
	// terminal. Example: `{"format": "json", "time_format": "rfc3339"}`.
	WrappedRaw json.RawMessage `json:"wrap,omitempty" caddy:"namespace=caddy.logging.encoders inline_key=format"`

	cleanObject `json:"-"` // takes the fields of With, into wrapped

	wrapped          zapcore.Encoder
	wrappedIsDefault bool
	ctx              caddy.Context
}

// CaddyModule returns the Caddy module information.
func (*LogEncoder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "caddy.logging.encoders." + logEncoderName,
		New: func() caddy.Module { return new(LogEncoder) },
	}
}

// Provision sets up the wrapped encoder.
func (e *LogEncoder) Provision(ctx caddy.Context) error {
	e.ctx = ctx
	if err := e.provisionWrapped(); err != nil {
		return err
	}
	noteLogEncoder(ctx)
	return nil
}

func (e *LogEncoder) provisionWrapped() error {
	if e.WrappedRaw == nil {
		e.wrappedIsDefault = true
		return e.wrapDefault(new(logging.JSONEncoder))
	}
	mod, err := e.ctx.LoadModule(e, "WrappedRaw")
	if err != nil {
		return fmt.Errorf("loading the log encoder that zejzl wraps: %w", err)
	}
	enc, ok := mod.(zapcore.Encoder)
	if !ok {
		return fmt.Errorf("zejzl can't wrap %T: expected a log encoder", mod)
	}
	e.wrap(enc)
	return nil
}

// Cleanup implements caddy.CleanerUpper. Caddy calls it after a failed
// Provision too; then the configuration is dropped with all its encoders.
func (e *LogEncoder) Cleanup() error {
	forgetLogEncoders(e.ctx)
	return nil
}

// ConfigureDefaultFormat writes for humans if the log goes to a terminal and
// the configuration names no encoder, as Caddy does without this module.
func (e *LogEncoder) ConfigureDefaultFormat(wo caddy.WriterOpener) error {
	if !e.wrappedIsDefault {
		if cfd, ok := e.wrapped.(caddy.ConfiguresFormatterDefault); ok {
			return cfd.ConfigureDefaultFormat(wo)
		}
		return nil
	}
	if caddy.IsWriterStandardStream(wo) && term.IsTerminal(int(os.Stderr.Fd())) {
		return e.wrapDefault(new(logging.ConsoleEncoder))
	}
	return nil
}

type provisionedEncoder interface {
	zapcore.Encoder
	caddy.Provisioner
}

func (e *LogEncoder) wrapDefault(enc provisionedEncoder) error {
	if err := enc.Provision(e.ctx); err != nil {
		return fmt.Errorf("provisioning the default log encoder: %w", err)
	}
	e.wrap(enc)
	return nil
}

func (e *LogEncoder) wrap(enc zapcore.Encoder) {
	e.wrapped = enc
	e.ObjectEncoder = enc
}

// UnmarshalCaddyfile sets up the encoder from Caddyfile tokens. Syntax:
//
//	zejzl [json|console] {
//	    wrap <encoder> ...
//	}
//
// A block with wrap takes any encoder with its options; it excludes the
// argument. Examples:
//
//	format zejzl
//
//	format zejzl {
//	    wrap json {
//	        time_format rfc3339
//	    }
//	}
func (e *LogEncoder) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the encoder's name
	if d.NextArg() {
		format := d.Val()
		if format != "json" && format != "console" {
			return d.Err("format zejzl: expected json or console, or a block with wrap for another encoder")
		}
		if d.NextArg() {
			return d.ArgErr()
		}
		e.WrappedRaw = caddyconfig.JSON(map[string]string{"format": format}, nil)
	}
	for d.NextBlock(0) {
		if d.Val() != "wrap" {
			return d.Errf("format zejzl: unrecognized subdirective '%s', expected wrap", scrub(d.Val()))
		}
		if e.WrappedRaw != nil {
			return d.Err("format zejzl: the wrapped encoder is already specified")
		}
		if !d.NextArg() {
			return d.ArgErr()
		}
		name := d.Val()
		mod, err := caddyfile.UnmarshalModule(d, "caddy.logging.encoders."+name)
		if err != nil {
			return err
		}
		enc, ok := mod.(zapcore.Encoder)
		if !ok {
			return d.Errf("format zejzl: can't wrap %T, expected a log encoder", mod)
		}
		e.WrappedRaw = caddyconfig.JSONModuleObject(enc, "format", name, nil)
	}
	return nil
}

// Clone implements zapcore.Encoder.
func (e *LogEncoder) Clone() zapcore.Encoder {
	clone := &LogEncoder{cleanObject: cleanObject{headers: e.headers}}
	clone.wrap(e.wrapped.Clone())
	return clone
}

// EncodeEntry implements zapcore.Encoder.
func (e *LogEncoder) EncodeEntry(ent zapcore.Entry, fields []zapcore.Field) (*buffer.Buffer, error) {
	ent.Message = scrub(ent.Message)
	ent.LoggerName = scrub(ent.LoggerName)
	ent.Stack = scrub(ent.Stack)
	entry := &cleanFields{cleanObject: cleanObject{headers: e.headers}, fields: fields}
	buf, err := e.wrapped.EncodeEntry(ent, []zapcore.Field{zap.Inline(entry)})
	if err != nil {
		return nil, err
	}
	scrubKeys(buf)
	return buf, nil
}

var keyPrefixStem = []byte(strings.TrimSuffix(key.Prefix, "_"))

// scrubKeys is the net under everything above: whatever way a key took into
// the entry, it leaves here. No encoder escapes a character of a key, and the
// mask has none that needs escaping.
func scrubKeys(buf *buffer.Buffer) {
	if !bytes.Contains(buf.Bytes(), keyPrefixStem) {
		return
	}
	line := buf.String()
	if clean := maskSpans(line, findKey); clean != line {
		buf.Reset()
		buf.AppendString(clean)
	}
}

// safeEncoder tells whether a log's encoder configuration is that of
// LogEncoder. One that only wraps it is not: it could rename a header before
// LogEncoder sees it.
func safeEncoder(raw json.RawMessage) bool {
	var enc struct {
		Format string `json:"format"`
	}
	return json.Unmarshal(raw, &enc) == nil && enc.Format == logEncoderName
}

// cleanObject drops and masks what passes through it into another encoder.
// Numbers, times and booleans hold no credential and pass as they are.
type cleanObject struct {
	zapcore.ObjectEncoder

	// headers is set within logged headers, where a name that only resembles
	// a credential header's is dropped too.
	headers bool
}

func (o *cleanObject) drops(name string) bool { return dropsField(name, o.headers) }

func dropsField(name string, inHeaders bool) bool {
	return isCredentialHeader(name) || inHeaders && likeCredentialHeader(name)
}

// namesHeaders tells the fields that hold headers: headers, resp_headers, and
// Header as in http.Request.
func namesHeaders(name string) bool {
	const word = "header"
	if n := len(name); n > 0 && name[n-1]|0x20 == 's' {
		name = name[:n-1]
	}
	return len(name) >= len(word) && strings.EqualFold(name[len(name)-len(word):], word)
}

func (o *cleanObject) AddString(name, value string) {
	if !o.drops(name) {
		o.ObjectEncoder.AddString(scrub(name), scrub(value))
	}
}

func (o *cleanObject) AddByteString(name string, value []byte) {
	if !o.drops(name) {
		o.ObjectEncoder.AddByteString(scrub(name), scrubBytes(value))
	}
}

func (o *cleanObject) AddBinary(name string, value []byte) {
	if !o.drops(name) {
		o.ObjectEncoder.AddBinary(scrub(name), scrubBytes(value))
	}
}

func (o *cleanObject) AddArray(name string, m zapcore.ArrayMarshaler) error {
	if o.drops(name) {
		return nil
	}
	return o.ObjectEncoder.AddArray(scrub(name), cleanArrayOf(m, o.headers || namesHeaders(name)))
}

func (o *cleanObject) AddObject(name string, m zapcore.ObjectMarshaler) error {
	if o.drops(name) {
		return nil
	}
	return o.ObjectEncoder.AddObject(scrub(name), cleanObjectOf(m, o.headers || namesHeaders(name)))
}

func (o *cleanObject) AddReflected(name string, value any) error {
	if o.drops(name) {
		return nil
	}
	clean, err := scrubReflected(value, o.headers || namesHeaders(name))
	if err != nil {
		return err
	}
	return o.ObjectEncoder.AddReflected(scrub(name), clean)
}

func (o *cleanObject) OpenNamespace(name string) {
	o.headers = o.headers || namesHeaders(name)
	o.ObjectEncoder.OpenNamespace(scrub(name))
}

// cleanArray is cleanObject for the elements of an array.
type cleanArray struct {
	zapcore.ArrayEncoder
	headers bool
}

func (a *cleanArray) AppendString(value string) { a.ArrayEncoder.AppendString(scrub(value)) }

func (a *cleanArray) AppendByteString(value []byte) {
	a.ArrayEncoder.AppendByteString(scrubBytes(value))
}

func (a *cleanArray) AppendArray(m zapcore.ArrayMarshaler) error {
	return a.ArrayEncoder.AppendArray(cleanArrayOf(m, a.headers))
}

func (a *cleanArray) AppendObject(m zapcore.ObjectMarshaler) error {
	return a.ArrayEncoder.AppendObject(cleanObjectOf(m, a.headers))
}

func (a *cleanArray) AppendReflected(value any) error {
	clean, err := scrubReflected(value, a.headers)
	if err != nil {
		return err
	}
	return a.ArrayEncoder.AppendReflected(clean)
}

// cleanFields are the fields of an entry, handed on as one inline object. So
// they reach the wrapped encoder through cleanObject without a clone of it.
type cleanFields struct {
	cleanObject
	fields []zapcore.Field
}

func (f *cleanFields) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	f.ObjectEncoder = enc
	for i := range f.fields {
		f.fields[i].AddTo(&f.cleanObject)
	}
	return nil
}

type cleanObjectMarshaler struct {
	cleanObject
	zapcore.ObjectMarshaler
}

func cleanObjectOf(m zapcore.ObjectMarshaler, headers bool) zapcore.ObjectMarshaler {
	return &cleanObjectMarshaler{cleanObject{headers: headers}, m}
}

func (m *cleanObjectMarshaler) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	m.ObjectEncoder = enc
	return m.ObjectMarshaler.MarshalLogObject(&m.cleanObject)
}

type cleanArrayMarshaler struct {
	cleanArray
	zapcore.ArrayMarshaler
}

// cleanArrayOf keeps Caddy's own type of a header's values: the filters of a
// wrapped filter encoder (ip_mask, hash, query) know arrays by that type.
func cleanArrayOf(m zapcore.ArrayMarshaler, headers bool) zapcore.ArrayMarshaler {
	values, ok := m.(caddyhttp.LoggableStringArray)
	if !ok {
		return &cleanArrayMarshaler{cleanArray{headers: headers}, m}
	}
	if !slices.ContainsFunc(values, func(s string) bool { return clues(s) != 0 }) {
		return m
	}
	clean := make(caddyhttp.LoggableStringArray, len(values))
	for i, s := range values {
		clean[i] = scrub(s)
	}
	return clean
}

func (m *cleanArrayMarshaler) MarshalLogArray(enc zapcore.ArrayEncoder) error {
	m.ArrayEncoder = enc
	return m.ArrayMarshaler.MarshalLogArray(&m.cleanArray)
}

// scrubReflected returns the JSON form of a value without credentials. The
// value itself, which may still be in use elsewhere, is only read.
func scrubReflected(value any, headers bool) (any, error) {
	if value == nil {
		return nil, nil
	}
	if _, ok := value.(http.Header); ok {
		headers = true
	}
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false) // as zap does
	if err := enc.Encode(value); err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(text.Bytes()))
	dec.UseNumber()
	var tree any
	if err := dec.Decode(&tree); err != nil {
		return nil, err
	}
	tree, changed := scrubTree(tree, headers)
	if !changed {
		return json.RawMessage(bytes.TrimSuffix(text.Bytes(), []byte("\n"))), nil // in its own order
	}
	return tree, nil
}

// scrubTree cleans a decoded JSON value in place.
func scrubTree(tree any, headers bool) (clean any, changed bool) {
	switch v := tree.(type) {
	case string:
		s := scrubBase64(v)
		return s, s != v
	case []any:
		for i := range v {
			var c bool
			v[i], c = scrubTree(v[i], headers)
			changed = changed || c
		}
	case map[string]any:
		for name, value := range v {
			if dropsField(name, headers) {
				delete(v, name)
				changed = true
				continue
			}
			value, c := scrubTree(value, headers || namesHeaders(name))
			masked := scrub(name)
			if !c && masked == name {
				continue
			}
			delete(v, name)
			v[masked] = value
			changed = true
		}
	}
	return tree, changed
}

// logEncoders holds, by the context of the configuration they belong to, that
// log encoders of ours exist. Caddy opens logs before it provisions apps, and
// tells apps nothing of them.
var logEncoders sync.Map // Done channel of the configuration's context

func noteLogEncoder(ctx caddy.Context) { logEncoders.Store(ctx.Done(), nil) }

// forgetLogEncoders is for Cleanup: Context.OnCancel would add to a copy.
func forgetLogEncoders(ctx caddy.Context) { logEncoders.Delete(ctx.Done()) }

func hasLogEncoder(ctx caddy.Context) bool {
	_, ok := logEncoders.Load(ctx.Done())
	return ok
}

// MarshalLogObject shows the guard in logs: the trace of a server logs the
// exported fields of its handlers otherwise, hashes of keys among them.
func (g *Guard) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	zone, dialect := g.Zone, g.Errors
	if zone == "" {
		zone = defaultZone
	}
	if dialect == "" {
		dialect = "auto"
	}
	enc.AddString("zone", zone)
	enc.AddInt("keys", len(g.Keys))
	enc.AddString("tiers", tierNames(g.tiers))
	enc.AddString("errors", dialect)
	return nil
}

// Interface guards
var (
	_ caddy.Provisioner                = (*LogEncoder)(nil)
	_ caddy.CleanerUpper               = (*LogEncoder)(nil)
	_ caddy.ConfiguresFormatterDefault = (*LogEncoder)(nil)
	_ caddyfile.Unmarshaler            = (*LogEncoder)(nil)
	_ zapcore.Encoder                  = (*LogEncoder)(nil)
	_ zapcore.ObjectEncoder            = (*cleanObject)(nil)
	_ zapcore.ArrayEncoder             = (*cleanArray)(nil)
	_ zapcore.ObjectMarshaler          = (*Guard)(nil)
	_ zapcore.ObjectMarshaler          = (*cleanFields)(nil)
	_ zapcore.ObjectMarshaler          = (*cleanObjectMarshaler)(nil)
	_ zapcore.ArrayMarshaler           = (*cleanArrayMarshaler)(nil)
)
