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
- each guard that a request could get past by a rewrite,
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

func checkConfig(config []byte) ([]finding, error) {
	var cfg checkedConfig
	if err := json.Unmarshal(config, &cfg); err != nil {
		return nil, fmt.Errorf("decoding the configuration: %w", err)
	}
	servers := cfg.Apps.HTTP.Servers
	maps.DeleteFunc(servers, func(_ string, s *checkedServer) bool { return s == nil })
	findings := checkLogs(cfg.Logging.Logs, servers)
	w := routeWalk{behind: make(map[string]bool)}
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
