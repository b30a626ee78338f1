package zejzlauth

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const safeLog = "{\n log default {\n format zejzl\n }\n}\n"

func adapt(t testing.TB, config string) []byte {
	t.Helper()
	adapted, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(config), nil)
	if err != nil {
		t.Fatalf("adapting %s: %v", config, err)
	}
	return adapted
}

// checkFindings compares findings with parts of the wanted lines, in order.
func checkFindings(t *testing.T, config []byte, want ...string) {
	t.Helper()
	findings, err := checkConfig(config)
	if err != nil {
		t.Fatalf("%v in %s", err, config)
	}
	var out strings.Builder
	printFindings(&out, findings)
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if len(findings) != len(want) {
		t.Fatalf("%d findings, want %d %q:\n%s", len(findings), len(want), want, out.String())
	}
	for i := range want {
		if !strings.Contains(lines[i], want[i]) {
			t.Errorf("finding %q, want one with %q", lines[i], want[i])
		}
	}
}

func TestCheckLogs(t *testing.T) {
	site := "a.example.com {\n zejzl_auth\n respond ok\n %LOG\n}\n"
	for name, tt := range map[string]struct {
		global, log string
		want        []string
	}{
		"safe":                     {"log default {\n format zejzl\n }", "", nil},
		"safe, access log":         {"log default {\n format zejzl\n }", "log {\n format zejzl json\n }", nil},
		"safe, discarded":          {"log default {\n format zejzl\n }", "log {\n output discard\n }", nil},
		"safe, of the admin API":   {"log default {\n format zejzl\n }\n log a {\n include admin\n }", "", nil},
		"safe, without requests":   {"log default {\n format zejzl\n }\n log a {\n exclude http.log http.handlers\n }", "", nil},
		"safe, no module's":        {"log default {\n format zejzl\n }\n log a {\n exclude *\n }", "", nil},
		"no log":                   {"", "", []string{`log "default": takes http.log.error without the zejzl encoder`}},
		"default without format":   {"log default {\n level ERROR\n }", "", []string{`log "default"`}},
		"another format":           {"log default {\n format json\n }", "", []string{"with the format it has now as its wrap"}},
		"wrapped the wrong way":    {"log default {\n format filter {\n wrap zejzl\n fields {\n a delete\n }\n }\n }", "", []string{`log "default"`}},
		"access log":               {"log default {\n format zejzl\n }", "log", []string{}},
		"access log to a file":     {"log default {\n format zejzl\n }", "log {\n output stdout\n }", []string{`log "log0" (access log of a.example.com): takes http.log.access.log0`}},
		"both":                     {"", "log {\n output stdout\n }", []string{`log "default"`, `log "log0"`}},
		"of everything":            {"log default {\n format zejzl\n }\n log all {\n output stdout\n }", "", []string{`log "all": takes http.log.error`}},
		"of errors":                {"log default {\n format zejzl\n }\n log e {\n include http.log.error\n }", "", []string{`log "e": takes http.log.error `}},
		"of one handler":           {"log default {\n format zejzl\n }\n log h {\n include http.handlers.reverse_proxy\n }", "", []string{`log "h": takes http.handlers.reverse_proxy `}},
		"of http, not all":         {"log default {\n format zejzl\n }\n log h {\n include http\n exclude http.log\n }", "", []string{`log "h": takes http.handlers `}},
		"access, but none is made": {"log default {\n format zejzl\n }\n log h {\n include http.log.access\n }", "", nil},
		"access by name":           {"log default {\n format zejzl\n }\n log h {\n include http.log.access.x\n }", "log", []string{`log "h": takes http.log.access.x `}},
		"credentials and trace": {
			"log default {\n format zejzl\n }\n servers {\n log_credentials\n trace\n }", "log",
			[]string{"server srv0: log_credentials", "server srv0: trace"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			checkFindings(t, adapt(t, "{\n"+tt.global+"\n}\n"+strings.Replace(site, "%LOG", tt.log, 1)), tt.want...)
		})
	}
}

func TestCheckLogsJSON(t *testing.T) {
	servers := `"apps": {"http": {"servers": {"s": {"routes": [{"handle": [{"handler": "zejzl_auth"}]}]}}}}`
	for logs, want := range map[string][]string{
		`{"default": {"encoder": {"format": "zejzl"}, "core": {"module": "mock"}}}`: {"core gets http.log.error"},
		`{"default": {"writer": {"output": "discard"}}}`:                            nil,
		`{"default": null}`: {`log "default"`},
		`{"default": {"encoder": {"format": "zejzl"}}, "x": {"exclude": ["http"], "include": ["http.log.error"]}}`: {`log "x"`},
	} {
		checkFindings(t, []byte(`{"logging": {"logs": `+logs+`}, `+servers+`}`), want...)
	}
}

// Each site with another way to a guarded backend, or without.
func TestCheckGuards(t *testing.T) {
	const missed, narrowed = "requests that a matcher leaves out don't meet this guard, and ", "protect leaves paths open"
	for name, tt := range map[string]struct {
		site string
		want []string
	}{
		"whole site":      {"zejzl_auth\n rewrite /x/* /api{uri}\n reverse_proxy localhost:8000", nil},
		"explicitly":      {"zejzl_auth {\n protect /api/* /*\n }\n rewrite /x/* /api{uri}\n reverse_proxy localhost:8000", nil},
		"mixed site":      {"handle /api/* {\n zejzl_auth\n uri strip_prefix /api\n reverse_proxy localhost:8000\n }\n handle {\n respond hi\n }", nil},
		"mixed with SPA":  {"handle /api/* {\n zejzl_auth\n reverse_proxy localhost:8000\n }\n handle {\n try_files {path} /index.html\n file_server\n }", nil},
		"two guarded":     {"handle /api/* {\n zejzl_auth\n reverse_proxy :8000\n }\n handle_path /v1/* {\n zejzl_auth\n rewrite * /api{uri}\n reverse_proxy :8000\n }", nil},
		"other backend":   {"handle /api/* {\n zejzl_auth\n reverse_proxy :8000\n }\n handle_path /web/* {\n reverse_proxy :3000\n }", nil},
		"no rewrite":      {"zejzl_auth {\n protect /api/*\n }\n reverse_proxy :8000", nil},
		"query only":      {"zejzl_auth {\n protect /api/*\n }\n rewrite * ?a=b\n uri query +c d\n reverse_proxy :8000", nil},
		"behind a header": {"@a header X-A *\n zejzl_auth @a\n rewrite * /x\n reverse_proxy :8000", nil},
		"for outsiders":   {"@a not remote_ip 10.0.0.0/8\n zejzl_auth @a\n reverse_proxy :8000", nil},
		"by method":       {"@a not method GET HEAD\n zejzl_auth @a\n reverse_proxy :8000", nil},
		"every path":      {"zejzl_auth /*\n reverse_proxy :8000", nil},
		"answered first":  {"route {\n zejzl_auth {\n protect /api/*\n }\n respond ok\n rewrite * /x\n reverse_proxy :8000\n }", nil},

		"narrowed":          {"zejzl_auth {\n protect /api/*\n }\n rewrite /x/* /api{uri}\n reverse_proxy :8000", []string{narrowed}},
		"narrowed, strip":   {"zejzl_auth {\n protect /api/*\n }\n uri strip_prefix /x\n reverse_proxy :8000", []string{narrowed}},
		"narrowed, replace": {"zejzl_auth {\n protect /api/*\n }\n uri replace /x /api\n reverse_proxy :8000", []string{narrowed}},
		"narrowed, regexp":  {"zejzl_auth {\n protect /api/*\n }\n uri path_regexp /x /api\n reverse_proxy :8000", []string{narrowed}},
		"narrowed, method":  {"zejzl_auth {\n protect /api/*\n }\n method POST\n reverse_proxy :8000", []string{narrowed}},
		"narrowed, proxy":   {"zejzl_auth {\n protect /api/*\n }\n reverse_proxy :8000 {\n rewrite /api{uri}\n }", []string{narrowed}},
		"narrowed, inner":   {"zejzl_auth {\n protect /api/*\n }\n handle_path /x/* {\n reverse_proxy :8000\n }", []string{narrowed}},
		"narrowed, before":  {"handle_path /x/* {\n zejzl_auth {\n protect /api/*\n }\n reverse_proxy :8000\n }", []string{narrowed}},
		"narrowed, files":   {"zejzl_auth {\n protect /private/*\n }\n rewrite /x/* /private{uri}\n file_server", []string{narrowed}},
		"forward_auth between": {
			"zejzl_auth {\n protect /api/*\n }\n rewrite /x/* /api{uri}\n forward_auth :9000 {\n uri /ok\n }\n reverse_proxy :8000", []string{narrowed},
		},
		"matcher":         {"zejzl_auth /api/*\n rewrite /x/* /api{uri}\n reverse_proxy :8000", []string{missed}},
		"named matcher":   {"@a expression path('/api/*')\n zejzl_auth @a\n rewrite /x/* /api{uri}\n reverse_proxy :8000", []string{missed}},
		"matcher, inner":  {"zejzl_auth /api/*\n handle_path /x/* {\n reverse_proxy :8000\n }", []string{missed}},
		"alternative":     {"handle /api/* {\n zejzl_auth\n reverse_proxy localhost:8000\n }\n handle_path /x/* {\n reverse_proxy 127.0.0.1:8000\n }", []string{missed}},
		"first of two":    {"handle /long/x/* {\n rewrite * /api{uri}\n reverse_proxy :8000\n }\n handle {\n zejzl_auth\n reverse_proxy :8000\n }", []string{missed}},
		"unknown backend": {"handle /api/* {\n zejzl_auth\n reverse_proxy {env.A}\n }\n handle_path /x/* {\n reverse_proxy :3000\n }", []string{missed}},
		"in a route":      {"route {\n route /api/* {\n zejzl_auth\n }\n rewrite /x/* /api{uri}\n reverse_proxy :8000\n }", []string{missed}},
		"method":          {"@a method POST\n zejzl_auth @a\n method POST\n reverse_proxy :8000", []string{missed}},
		"by invoke":       {"handle /api/* {\n invoke guarded\n reverse_proxy :8000\n }\n handle_path /x/* {\n reverse_proxy :8000\n }", []string{"srv0.named_routes.guarded.handle[0]: " + missed}},
		"in an error route": {
			"handle_errors {\n zejzl_auth /api/*\n rewrite /x/* /api{uri}\n reverse_proxy :8000\n }", []string{"srv0.errors.routes"},
		},
		"two": {
			"zejzl_auth /api/*\n zejzl_auth {\n protect /v1/*\n }\n rewrite /x/* /api{uri}\n reverse_proxy :8000", []string{missed, narrowed},
		},

		"errors caddy":         {"zejzl_auth {\n errors caddy\n }\n respond ok", []string{"errors caddy leaves refusals to handle_errors"}},
		"errors caddy, served": {"zejzl_auth {\n errors caddy\n }\n respond ok\n handle_errors {\n respond oh\n }", nil},
		"no guard":             {"reverse_proxy :8000", []string{"configuration: there is no zejzl_auth guard"}},
	} {
		t.Run(name, func(t *testing.T) {
			config := safeLog + "&(guarded) {\n zejzl_auth\n}\nhttp://a.example.com {\n " + tt.site + "\n}\n"
			checkFindings(t, adapt(t, config), tt.want...)
		})
	}
}

// A guard that no request comes to, or that nothing comes behind.
func TestCheckGuardOfNothing(t *testing.T) {
	const nothing = "nothing comes behind this guard"
	for name, tt := range map[string]struct {
		order, site string
		want        []string
	}{
		"ordered last":      {"last", "zejzl_auth\n reverse_proxy :8000", []string{nothing}},
		"last, of a part":   {"last", "zejzl_auth\n reverse_proxy /api/* :8000", []string{nothing}},
		"last, by handle":   {"last", "zejzl_auth\n handle {\n reverse_proxy :8000\n }", []string{nothing}},
		"after the backend": {"first", "route {\n reverse_proxy :8000\n zejzl_auth\n }", []string{nothing}},
		"answered before":   {"first", "route {\n handle {\n reverse_proxy :8000\n }\n zejzl_auth\n respond no\n }", []string{nothing}},
		"after a taker":     {"first", "route {\n handle {\n reverse_proxy :8000\n }\n handle /api/* {\n zejzl_auth\n respond no\n }\n }", []string{nothing}},
		"alone":             {"first", "zejzl_auth", nil},
		"by invoke":         {"first", "route {\n respond hi\n invoke guarded\n }", []string{"named_routes.guarded.handle[0]: " + nothing}},
		"metrics":           {"first", "zejzl_auth\n metrics", nil},
		"acme_server":       {"first", "zejzl_auth\n acme_server", nil},
		"answered later":    {"first", "route {\n respond /x hi\n zejzl_auth\n respond ok\n }", nil},
	} {
		t.Run(name, func(t *testing.T) {
			config := strings.Replace(safeLog, "{", "{\n order zejzl_auth "+tt.order, 1) + "&(guarded) {\n zejzl_auth\n}\nhttp://a.example.com {\n " + tt.site + "\n}\n"
			checkFindings(t, adapt(t, config), tt.want...)
		})
	}
}

// A matcher is not exact, so what it leaves out must not come to the same backend.
func TestCheckSameBackend(t *testing.T) {
	const same = "requests that a matcher leaves out don't meet this guard, but come to the same backend"
	for name, tt := range map[string]struct {
		site string
		want []string
	}{
		"whole site":         {"zejzl_auth /api/*\n reverse_proxy :8000", []string{same}},
		"expression":         {"@a expression path('/api/*')\n zejzl_auth @a\n reverse_proxy :8000", []string{same}},
		"all but some":       {"@a not path /open/*\n zejzl_auth @a\n reverse_proxy :8000", []string{same}},
		"alternative":        {"handle /api/* {\n zejzl_auth\n reverse_proxy :8000\n }\n handle {\n reverse_proxy 127.0.0.1:8000\n }", []string{same}},
		"before the guard":   {"route {\n reverse_proxy /open/* :8000\n zejzl_auth\n reverse_proxy :8000\n }", []string{same}},
		"files":              {"root * /srv\n handle /a/* {\n zejzl_auth\n file_server\n }\n handle {\n file_server\n }", []string{same}},
		"files, spelled out": {"handle /a/* {\n zejzl_auth\n file_server {\n root /srv/\n }\n }\n handle {\n root * /srv\n file_server\n }", []string{same}},
		"same variable":      {"handle /a/* {\n zejzl_auth\n reverse_proxy {env.A}\n }\n handle {\n reverse_proxy {env.A}\n }", []string{same}},
		"response handled":   {"zejzl_auth /api/*\n reverse_proxy :8000 {\n handle_response {\n copy_response\n }\n }", []string{same}},
		"after a failure":    {"handle /api/* {\n zejzl_auth\n reverse_proxy :8000\n }\n handle {\n basic_auth {\n a $2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG\n }\n respond ok\n }\n handle_errors {\n reverse_proxy :8000\n }", []string{same}},
		"dynamic":            {"zejzl_auth /api/*\n reverse_proxy {\n dynamic a api.local 80\n }", []string{same}},

		"other backend":      {"handle /api/* {\n zejzl_auth\n reverse_proxy :8000\n }\n handle {\n reverse_proxy :3000\n }", nil},
		"other variable":     {"handle /a/* {\n zejzl_auth\n reverse_proxy {env.A}\n }\n handle {\n reverse_proxy {env.B}\n }", nil},
		"other root":         {"handle /a/* {\n zejzl_auth\n root * /srv/a\n file_server\n }\n handle {\n root * /srv/www\n try_files {path} /index.html\n file_server\n }", nil},
		"header before":      {"route {\n header /x/* A b\n zejzl_auth\n reverse_proxy :8000\n }", nil},
		"header, outsiders":  {"header /x/* A b\n @a not remote_ip 10.0.0.0/8\n zejzl_auth @a\n reverse_proxy :8000", nil},
		"taken by address":   {"@in remote_ip 10.0.0.0/8\n handle @in {\n reverse_proxy :8000\n }\n handle {\n zejzl_auth\n reverse_proxy :8000\n }", nil},
		"guarded by another": {"handle /api/* {\n zejzl_auth\n reverse_proxy :8000\n }\n handle {\n zejzl_auth\n reverse_proxy :8000\n }", nil},
		"in front of an error page": {
			"zejzl_auth /api/*\n reverse_proxy /api/* :8000\n handle_errors {\n reverse_proxy :3000\n }", nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			checkFindings(t, adapt(t, safeLog+"http://a.example.com {\n "+tt.site+"\n}\n"), tt.want...)
		})
	}
}

// Files of two sites are one backend only by their root.
func TestCheckFilesOfSites(t *testing.T) {
	site := "http://HOST.example.com {\n root * /srv/HOST\n GUARD\n file_server\n}\n"
	guarded := strings.NewReplacer("HOST", "a", "GUARD", "zejzl_auth").Replace(site)
	spa := "http://b.example.com {\n root * /srv/ROOT\n handle /api/* {\n zejzl_auth\n reverse_proxy :8000\n }\n handle {\n try_files {path} /index.html\n file_server\n }\n}\n"
	checkFindings(t, adapt(t, safeLog+guarded+strings.Replace(spa, "ROOT", "b", 1)))
}

func TestCheckForwardAuth(t *testing.T) {
	const site = "http://a.example.com {\n zejzl_auth {\n protect /api/*\n }\n forward_auth auth:9091 {\n uri URI\n }\n reverse_proxy :8000\n}\n"
	for uri, want := range map[string][]string{
		"/verify":          nil,
		"/verify?of={uri}": nil,
		"/verify{uri}":     {"protect leaves paths open"},
	} {
		checkFindings(t, adapt(t, safeLog+strings.Replace(site, "URI", uri, 1)), want...)
	}
}

// What a guard refuses must not come to its backend by an error route.
func TestCheckErrorRoutes(t *testing.T) {
	const refused = "errors caddy hands refused requests to error routes"
	for name, tt := range map[string]struct {
		guard, handler, site string
		want                 []string
	}{
		"same backend":       {"errors caddy", "reverse_proxy :8000", "reverse_proxy :8000", []string{refused}},
		"of one status":      {"errors caddy", "reverse_proxy :8000", "@e expression {err.status_code} == 401\n handle @e {\n reverse_proxy :8000\n }\n respond no", []string{refused}},
		"same files":         {"errors caddy", "file_server", "file_server", []string{refused}},
		"a rewrite":          {"errors caddy", "file_server", "rewrite * /{err.status_code}{uri}\n file_server", []string{refused}},
		"open, rewritten":    {"protect /api/*", "reverse_proxy :8000", "rewrite * /api{uri}\n reverse_proxy :8000", []string{"protect leaves paths open"}},
		"error page":         {"errors caddy", "file_server", "rewrite * /{err.status_code}.html\n file_server", nil},
		"error page, open":   {"protect /api/*", "file_server", "rewrite * /{err.status_code}.html\n file_server", nil},
		"other backend":      {"errors caddy", "reverse_proxy :8000", "reverse_proxy :3000", nil},
		"own answers":        {"", "reverse_proxy :8000", "reverse_proxy :8000", nil},
		"guarded once more":  {"errors caddy", "reverse_proxy :8000", "zejzl_auth\n reverse_proxy :8000", nil},
		"answered by itself": {"errors caddy", "reverse_proxy :8000", "respond no", nil},
	} {
		t.Run(name, func(t *testing.T) {
			site := "zejzl_auth {\n " + tt.guard + "\n }\n " + tt.handler + "\n handle_errors {\n " + tt.site + "\n }"
			checkFindings(t, adapt(t, safeLog+"http://a.example.com {\n "+site+"\n}\n"), tt.want...)
		})
	}
}

// LogEncoder knows a foreign key only by the name of its field.
func TestCheckLogAppend(t *testing.T) {
	const logged = "log_append writes a credential"
	for args, want := range map[string][]string{
		"who {header.X-Api-Key}":                     {logged},
		"who {http.request.header.authorization}":    {logged},
		"<who {header.Cookie}":                       {logged},
		"who {header.X-Forwarded-Authorization}":     {logged},
		"who {query.api_key}":                        {logged},
		"who {http.reverse_proxy.header.Set-Cookie}": {logged},
		"x_api_key {header.X-Api-Key}":               nil, // the encoder drops the field
		"who {header.User-Agent}":                    nil,
		"who {query.page}":                           nil,
		"who X-Api-Key":                              nil,
	} {
		checkFindings(t, adapt(t, safeLog+"http://a.example.com {\n log_append "+args+"\n zejzl_auth\n respond ok\n}\n"), want...)
	}
}

func TestCheckPlace(t *testing.T) {
	config := adapt(t, safeLog+"a.example.com, b.example.com {\n zejzl_auth {\n protect /api/*\n }\n rewrite * /api{uri}\n reverse_proxy :8000\n}\n")
	const site = "srv0.routes[0](a.example.com b.example.com).handle[0]."
	checkFindings(t, config, site+"routes[0].handle[0]: protect leaves paths open, and "+site+"routes[1].handle[0] rewrites requests")
}

// Handlers that the check doesn't know may serve anything and hold routes.
func TestCheckUnknownHandler(t *testing.T) {
	const logs = `{"logging": {"logs": {"default": {"encoder": {"format": "zejzl"}}}}, "apps": {"http": {"servers": {"s": {"routes": `
	guarded := `{"handle": [{"handler": "zejzl_auth"}, {"handler": "php"}], "match": [{"path": ["/api/*"]}], "terminal": true}`
	for name, tt := range map[string]struct {
		routes string
		want   []string
	}{
		"serves":      {`[` + guarded + `, {"handle": [{"handler": "rewrite", "uri": "/x"}, {"handler": "php"}]}]`, []string{"s.routes[0].handle[0]"}},
		"another":     {`[` + guarded + `, {"handle": [{"handler": "rewrite", "uri": "/x"}, {"handler": "cgi"}]}]`, nil},
		"middleware":  {`[` + guarded + `, {"handle": [{"handler": "php"}]}]`, nil},
		"holds":       {`[{"handle": [{"handler": "x", "name": 5, "routes": [{"handle": [{"handler": "zejzl_auth"}, {"handler": "y"}]}]}]}]`, nil},
		"other names": {`[{"handle": [{"handler": "x", "routes": 5, "rewrite": "y"}, {"handler": "zejzl_auth"}, {"handler": "x"}]}]`, nil},
		"sub-errors": {
			`[{"handle": [{"handler": "subroute", "routes": [{"handle": [{"handler": "zejzl_auth", "errors": "caddy"}, {"handler": "static_response"}]}],
			"errors": {"routes": [{"handle": [{"handler": "static_response"}]}]}}]}]`, nil,
		},
		"sub-errors that go on": {
			`[{"handle": [{"handler": "subroute", "routes": [{"handle": [{"handler": "zejzl_auth", "errors": "caddy"}]}],
			"errors": {"routes": [{"handle": [{"handler": "headers"}]}]}}, {"handler": "file_server"}]}]`, []string{"errors caddy hands"},
		},
		"itself": {`[{"handle": [{"handler": "zejzl_auth"}, {"handler": "invoke", "name": "a"}]}], "named_routes": {"a": {"handle": [{"handler": "invoke", "name": "a"}, {"handler": "error"}]}}`, nil},
	} {
		t.Run(name, func(t *testing.T) { checkFindings(t, []byte(logs+tt.routes+`}}}}}`), tt.want...) })
	}
}

func TestCheckBadConfig(t *testing.T) {
	for config, want := range map[string]string{
		``:                                    "decoding the configuration",
		`{"apps": {"http": {"servers": []}}}`: "decoding the configuration",
		`{"apps": {"http": {"servers": {"s": {"routes": [{"handle": ["x"]}]}}}}}`:                                       "decoding s.routes[0].handle[0]",
		`{"apps": {"http": {"servers": {"s": {"routes": [{"handle": [{"handler": "zejzl_auth", "protect": "/"}]}]}}}}}`: "decoding s.routes[0].handle[0]",
		`{"apps": {"http": {"servers": {"s": {"routes": [{"handle": [{"handler": "rewrite", "method": 1}]}]}}}}}`:       "decoding s.routes[0].handle[0]",
		`{"apps": {"http": {"servers": {"s": {"routes": [{"handle": [{"handler": "subroute", "errors": 1}]}]}}}}}`:      "decoding s.routes[0].handle[0].errors",
	} {
		if _, err := checkConfig([]byte(config)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one with %q", config, err, want)
		}
	}
}

func TestCheckEmptyConfig(t *testing.T) {
	checkFindings(t, []byte(`{}`), "there is no zejzl_auth guard")
	checkFindings(t, []byte(`{"apps": {"http": {"servers": {"s": null}}}}`), "there is no zejzl_auth guard")
}

func TestCheckExampleCaddyfile(t *testing.T) {
	config, err := os.ReadFile("example.Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	checkFindings(t, adapt(t, string(config)))
}

func TestGuardInLogs(t *testing.T) {
	const digest = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
	g := &Guard{
		Keys:  []GuardKey{{Secret: digest, Tier: "pro", Name: "CI runner"}, {Secret: "{env.PROD_KEY}"}},
		tiers: map[string]*tier{"pro": nil, "free": nil},
	}
	enc := zapcore.NewJSONEncoder(zapcore.EncoderConfig{})
	for want, set := range map[string]func(){
		`{"module":{"zone":"default","keys":2,"tiers":"free, pro","errors":"auto"}}`:   func() {},
		`{"module":{"zone":"chat","keys":2,"tiers":"free, pro","errors":"anthropic"}}`: func() { g.Zone, g.Errors = "chat", "anthropic" },
	} {
		g.Zone, g.Errors = "", ""
		set()
		buf, err := enc.EncodeEntry(zapcore.Entry{}, []zap.Field{zap.Any("module", g)})
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(buf.String()); got != want {
			t.Errorf("logged as %s, want %s", got, want)
		}
	}
}

// The App warns of access logs exactly if no log has the encoder, also when
// an earlier configuration had one.
func TestWarningOfUnsafeLogs(t *testing.T) {
	t.Setenv("ENVIRONMENT", "")
	t.Cleanup(func() { _ = caddy.Stop() })
	for i, tt := range []struct {
		encoder, serverLogs string
		want                int
	}{
		{`{"format": "zejzl"}`, `{}`, 0},
		{`{"format": "json"}`, `{}`, 1},
		{`{"format": "zejzl", "wrap": {"format": "console"}}`, `{}`, 0},
		{`{"format": "json"}`, `null`, 0},
	} {
		file := filepath.Join(t.TempDir(), "log")
		name, err := json.Marshal(file)
		if err != nil {
			t.Fatal(err)
		}
		config := `{"admin": {"disabled": true, "config": {"persist": false}},
			"logging": {"logs": {"default": {"writer": {"output": "file", "filename": ` + string(name) + `}, "encoder": ` + tt.encoder + `}}},
			"apps": {"http": {"servers": {"s": {"listen": ["127.0.0.1:0"], "logs": ` + tt.serverLogs + `,
			"automatic_https": {"disable": true}, "routes": [{"handle": [{"handler": "zejzl_auth"}]}]}}}}}`
		if err := caddy.Load([]byte(config), true); err != nil {
			t.Fatal(err)
		}
		out, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(out), "no API key is configured") {
			t.Fatalf("%d: the log lacks the App's other warning: %s", i, out)
		}
		if got := strings.Count(string(out), "access logs are on"); got != tt.want {
			t.Errorf("%d: %d warnings, want %d: %s", i, got, tt.want, out)
		}
	}
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	logEncoders.Range(func(_, _ any) bool {
		t.Error("a log encoder is remembered after its configuration ended")
		return false
	})
}
