package zejzlauth

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/spf13/cobra"
)

// Exit codes of `caddy zejzl check`, beside 0.
const (
	exitFindings  = 1
	exitUnchecked = 2
)

func checkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check <config> [--adapter <name>]",
		Short: "Names what in a configuration would leak keys or evade a guard",
		Long: `
Reads a configuration, without starting anything, and names

- each logger that would write API keys,
- each guard that a request could get past to the same backend, by a rewrite,
  a path that a matcher reads otherwise, or an error route,
- each guard that nothing comes behind,
- a configuration without any guard, and refusals that nothing answers.

Prints one line for each, and exits with 0 if there is none, 1 if there are,
2 if the configuration can't be read. Without --adapter, a file not named
.json is taken for a Caddyfile.`,
		Example: `  caddy zejzl check Caddyfile`,
		Args:    cobra.ExactArgs(1),
	}
	cmd.Flags().String("adapter", "", "the configuration's adapter")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(func(fl caddycmd.Flags) (int, error) {
		config, err := adaptConfig(fl.Arg(0), fl.String("adapter"))
		if err != nil {
			return exitUnchecked, err
		}
		findings, err := checkConfig(config)
		if err != nil {
			return exitUnchecked, err
		}
		out := cmd.OutOrStdout()
		if len(findings) == 0 {
			fmt.Fprintln(out, "no findings")
			return caddy.ExitCodeSuccess, nil
		}
		printFindings(out, findings)
		return exitFindings, fmt.Errorf("findings: %d", len(findings))
	})
	return cmd
}

func adaptConfig(file, adapter string) ([]byte, error) {
	if adapter == "" && !strings.EqualFold(filepath.Ext(file), ".json") {
		adapter = "caddyfile"
	}
	config, _, _, err := caddycmd.LoadConfig(file, adapter)
	if err != nil {
		return nil, errors.New(scrub(err.Error())) // adapters quote what they did not expect
	}
	return config, nil
}

// finding is a weakness of a configuration. It holds names and places, no values.
type finding struct{ where, what, mend string }

func printFindings(w io.Writer, findings []finding) {
	for _, f := range findings {
		fmt.Fprintln(w, scrub(f.where+": "+f.what+"; "+f.mend))
	}
}

// checkedConfig is what the check reads of a configuration.
type checkedConfig struct {
	Logging struct {
		Logs map[string]*caddy.CustomLog `json:"logs"`
	} `json:"logging"`
	Apps struct {
		HTTP struct {
			Servers map[string]*checkedServer `json:"servers"`
		} `json:"http"`
	} `json:"apps"`
}

type checkedServer struct {
	Routes caddyhttp.RouteList `json:"routes"`
	Errors struct {
		Routes caddyhttp.RouteList `json:"routes"`
	} `json:"errors"`
	NamedRoutes map[string]caddyhttp.Route `json:"named_routes"`
	Logs        *caddyhttp.ServerLogConfig `json:"logs"`
}

// checkedHandler is what the check reads of the handlers it knows.
type checkedHandler struct {
	Handler string `json:"handler"`

	Protect []string        `json:"protect"` // zejzl_auth
	Errors  json.RawMessage `json:"errors"`  // zejzl_auth: its dialect; subroute: routes

	Name           string            `json:"name"` // invoke
	Routes         []caddyhttp.Route `json:"routes"`
	HandleResponse []struct {
		Routes []caddyhttp.Route `json:"routes"`
	} `json:"handle_response"`

	Rewrite   *checkedRewrite `json:"rewrite"` // reverse_proxy
	Upstreams []struct {
		Dial string `json:"dial"`
	} `json:"upstreams"`
	DynamicUpstreams json.RawMessage `json:"dynamic_upstreams"`

	PassThru bool   `json:"pass_thru"` // file_server
	Root     string `json:"root"`      // file_server, vars

	Key   string `json:"key"` // log_append
	Value string `json:"value"`
}

// checkedRewrite is a rewrite without what changes only the query.
type checkedRewrite struct {
	Method          string            `json:"method"`
	URI             string            `json:"uri"`
	StripPathPrefix string            `json:"strip_path_prefix"`
	StripPathSuffix string            `json:"strip_path_suffix"`
	URISubstring    []json.RawMessage `json:"uri_substring"`
	PathRegexp      []json.RawMessage `json:"path_regexp"`
}

func (r *checkedRewrite) changesPath() bool {
	return r != nil && (r.Method != "" || r.URI != "" && r.URI[0] != '?' || r.StripPathPrefix != "" || r.StripPathSuffix != "" ||
		len(r.URISubstring) > 0 || len(r.PathRegexp) > 0)
}

// fixed tells a rewrite to a path that a request has no part in.
func (r *checkedRewrite) fixed() bool {
	if r == nil {
		return false
	}
	path, _, _ := strings.Cut(r.URI, "?")
	return strings.HasPrefix(path, "/") && !strings.Contains(strings.ReplaceAll(path, "{http.error.status_code}", ""), "{")
}

func checkConfig(config []byte) ([]finding, error) {
	var cfg checkedConfig
	if err := json.Unmarshal(config, &cfg); err != nil {
		return nil, fmt.Errorf("decoding the configuration: %w", err)
	}
	servers := cfg.Apps.HTTP.Servers
	maps.DeleteFunc(servers, func(_ string, s *checkedServer) bool { return s == nil })
	findings := checkLogs(cfg.Logging.Logs, servers)
	w := routeWalk{behind: make(map[backend][]string)}
	for _, name := range slices.Sorted(maps.Keys(servers)) {
		findings = append(findings, checkServerLogs(name, servers[name].Logs)...)
		w.server(name, servers[name])
	}
	if w.err != nil {
		return nil, w.err
	}
	return append(findings, w.report()...), nil
}

func checkServerLogs(name string, logs *caddyhttp.ServerLogConfig) []finding {
	if logs == nil {
		return nil
	}
	var findings []finding
	if logs.ShouldLogCredentials {
		findings = append(findings, finding{
			"server " + name, "log_credentials takes Authorization and cookies into the logs", "remove log_credentials (should_log_credentials)",
		})
	}
	if logs.Trace {
		findings = append(findings, finding{
			"server " + name, "trace writes the settings of every handler into the debug log, secrets among them", "remove trace",
		})
	}
	return findings
}

const defaultLog = caddy.DefaultLoggerName

// checkLogs names the logs that write requests without LogEncoder.
func checkLogs(logs map[string]*caddy.CustomLog, servers map[string]*checkedServer) []finding {
	if len(servers) == 0 {
		return nil
	}
	all := map[string]*caddy.CustomLog{defaultLog: nil} // Caddy makes it if nobody else does
	maps.Copy(all, logs)
	var findings []finding
	for _, name := range slices.Sorted(maps.Keys(all)) {
		l := all[name]
		where, mend := fmt.Sprintf("log %q", name), "give it format zejzl"
		switch {
		case l == nil:
			l = new(caddy.CustomLog)
			mend = "add log " + name + " { format zejzl } to the global options"
		case len(l.EncoderRaw) > 0:
			mend += ", with the format it has now as its wrap"
		}
		takes := requestLogger(l, servers)
		if takes == "" || discards(l) {
			continue
		}
		if hosts := logHosts(l, servers); len(hosts) > 0 {
			where += " (access log of " + strings.Join(hosts, ", ") + ")"
		}
		if !safeEncoder(l.EncoderRaw) {
			findings = append(findings, finding{where, "takes " + takes + " without the zejzl encoder, and with it API keys sent as X-API-Key", mend})
		}
		if l.CoreRaw != nil {
			findings = append(findings, finding{where, "its core gets " + takes + " before any encoder has cleaned it", "remove the core"})
		}
	}
	return findings
}

// requestLogger names a logger that logs requests and that the log takes.
func requestLogger(l *caddy.CustomLog, servers map[string]*checkedServer) string {
	loggers := []string{"http.log.error", "http.handlers"}
	for _, server := range servers {
		if server.Logs != nil {
			loggers = []string{"http.log.access", "http.log.error", "http.handlers"}
		}
	}
	for _, logger := range loggers {
		if takesLogger(l, logger) {
			return logger
		}
		for _, name := range l.Include {
			if strings.HasPrefix(name, logger+".") && takesLogger(l, name) {
				return name
			}
		}
	}
	return ""
}

// takesLogger is Caddy's rule: the longer of include and exclude wins.
func takesLogger(l *caddy.CustomLog, logger string) bool {
	longest := func(namespaces []string) (n int) {
		for _, namespace := range namespaces {
			if strings.HasPrefix(logger+".", namespace+".") {
				n = max(n, len(namespace))
			}
		}
		return n
	}
	if slices.Contains(l.Exclude, "*") {
		return false
	}
	accept, reject := longest(l.Include), longest(l.Exclude)
	return accept > reject || len(l.Include) == 0 && reject == 0
}

func discards(l *caddy.CustomLog) bool {
	var writer struct {
		Output string `json:"output"`
	}
	return l.CoreRaw == nil && json.Unmarshal(l.WriterRaw, &writer) == nil && writer.Output == "discard"
}

// logHosts finds whose access log it is: Caddy's adapter calls them log0, log1.
func logHosts(l *caddy.CustomLog, servers map[string]*checkedServer) []string {
	var hosts []string
	for _, server := range servers {
		if server.Logs == nil {
			continue
		}
		for host, names := range server.Logs.LoggerNames {
			if slices.ContainsFunc(names, func(name string) bool { return slices.Contains(l.Include, "http.log.access."+name) }) {
				hosts = append(hosts, host)
			}
		}
	}
	slices.Sort(hosts)
	return slices.Compact(hosts)
}

// namesCredential tells a placeholder of a header or query parameter that
// holds a key.
func namesCredential(placeholder string) bool {
	if !strings.HasPrefix(placeholder, "{") {
		return false
	}
	name := strings.Trim(placeholder, "{}")
	if _, header, ok := strings.Cut(name, ".header."); ok {
		return dropsField(header, true)
	}
	_, param, ok := strings.Cut(name, ".query.")
	return ok && isKeyParam(param)
}

// reachesProtected tells whether an evasion leads to what its guard protects.
// Without a rewrite it must be surely the same: sites with an open backend
// beside a guarded one are common.
func (w *routeWalk) reachesProtected(e evasion) bool {
	for _, b := range e.backends {
		same := slices.Contains(w.behind[b], e.guard)
		if same && b.address != "" || e.rewritten != "" && (same || b.unknown()) {
			return true
		}
	}
	if e.rewritten == "" {
		return false
	}
	for b, guards := range w.behind {
		if b.unknown() && slices.Contains(guards, e.guard) {
			return true
		}
	}
	return false
}

func (w *routeWalk) report() []finding {
	var findings []finding
	for _, at := range w.logged {
		findings = append(findings, finding{at, "log_append writes a credential into the access log, in a field that the zejzl encoder can't know for one", "remove it; user_id and key_name tell who it was"})
	}
	if len(w.guards) == 0 {
		return append(findings, finding{"configuration", "there is no zejzl_auth guard in it", "put zejzl_auth in front of what needs a key"})
	}
	var reported []string
	for _, e := range w.evasions {
		if slices.Contains(reported, e.guard) || !w.reachesProtected(e) {
			continue
		}
		reported = append(reported, e.guard)
		findings = append(findings, e.finding())
	}
	// Where nothing at all answers, the guard is an endpoint that checks keys.
	useful := slices.Concat(slices.Collect(maps.Values(w.behind))...)
	for _, guard := range w.guards {
		if len(w.behind) > 0 && !slices.Contains(useful, guard) {
			findings = append(findings, finding{guard, "nothing comes behind this guard: requests are answered before it or by nothing", "put it in front of what needs a key, or respond behind it"})
		}
	}
	for _, guard := range w.unanswered {
		findings = append(findings, finding{guard, "errors caddy leaves refusals to handle_errors, and there is none: they have no body", "add handle_errors, or drop errors caddy"})
	}
	return findings
}

func (e evasion) finding() finding {
	const (
		around = "let the guard see all that the backend gets, "
		inside = around + "with the rewrite inside: handle /api/* { zejzl_auth; reverse_proxy ... }"
	)
	switch {
	case e.kind == byRefusal:
		return finding{e.guard, "errors caddy hands refused requests to error routes, and these send them to the same backend", "answer them in handle_errors, with respond or a page of its own"}
	case e.kind == byProtect:
		return finding{e.guard, "protect leaves paths open, and " + e.rewritten +
			" rewrites requests: what was open as sent can reach the backend by a path that needs a key", inside}
	case e.rewritten != "":
		return finding{e.guard, "requests that a matcher leaves out don't meet this guard, and " + e.rewritten +
			" rewrites them: they can reach the same backend by a path that needs a key", inside}
	}
	return finding{
		e.guard, "requests that a matcher leaves out don't meet this guard, but come to the same backend, " +
			"which may read their path otherwise than the matcher does (%2f, //, upper case)",
		around + "without a matcher: zejzl_auth { protect /api/* }",
	}
}
