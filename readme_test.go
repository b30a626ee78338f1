package zejzlauth

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

// docBlock is a fenced code block of a Markdown file.
type docBlock struct {
	place string // file:line
	text  string
}

func docBlocks(t *testing.T, file, language string) []docBlock {
	t.Helper()
	const fence = "```"
	var blocks []docBlock
	var block *docBlock
	for i, line := range strings.SplitAfter(readDoc(t, file), "\n") {
		switch bare := strings.TrimSpace(line); {
		case block == nil && bare == fence+language:
			block = &docBlock{place: fmt.Sprintf("%s:%d", file, i+1)}
			if !strings.HasPrefix(line, fence) {
				t.Errorf("%s: expected a %s block at the start of the line", block.place, language)
			}
		case block != nil && bare == fence:
			blocks = append(blocks, *block)
			block = nil
		case block != nil:
			block.text += line
		}
	}
	if block != nil {
		t.Fatalf("%s: the block does not end", block.place)
	}
	return blocks
}

func readDoc(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The Caddyfiles of the documentation are formatted, adapted without a warning
// and validated. A block without a site stands for what is in one.
func TestDocumentedCaddyfiles(t *testing.T) {
	pages, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range append(pages, "README.md") {
		blocks := docBlocks(t, page, "caddyfile")
		if page == "README.md" && len(blocks) == 0 {
			t.Error("README.md has no Caddyfile")
		}
		for _, block := range blocks {
			t.Run(block.place, func(t *testing.T) {
				if got := string(caddyfile.Format([]byte(block.text))); got != block.text {
					t.Errorf("not formatted, expected:\n%s", got)
				}
				supplyEnvironment(t, block.text)
				raw := adaptText(t, wholeCaddyfile(block.text))
				if err := caddy.Validate(harmless(t, raw)); err != nil {
					t.Errorf("validating: %v", err)
				}
				if page == "README.md" && strings.Contains(block.text, ".example.com {") {
					expectNoFindings(t, raw)
				}
			})
		}
	}
}

// wholeCaddyfile puts a fragment where it belongs: lines of the guard in a
// guard, other directives in a site.
func wholeCaddyfile(text string) string {
	var first string
	for line := range strings.Lines(text) {
		if word, _, _ := strings.Cut(strings.TrimSpace(line), " "); word != "" && word[0] != '#' {
			first = word
			break
		}
	}
	inside := func(outer string) string {
		return outer + " {\n\t" + strings.ReplaceAll(strings.TrimSuffix(text, "\n"), "\n", "\n\t") + "\n}\n"
	}
	switch {
	case strings.ContainsAny(first, "{(.:"), first == "localhost":
		return text
	case slices.Contains(subdirectives(reflect.TypeFor[Guard]()), first):
		text = inside("zejzl_auth")
	}
	return inside("api.example.com")
}

// supplyEnvironment sets the variables that the Caddyfile names without a default.
func supplyEnvironment(t *testing.T, text string) {
	t.Helper()
	t.Setenv("ENVIRONMENT", "")
	for _, match := range regexp.MustCompile(`\{(?:env\.|\$)(\w+)\}`).FindAllStringSubmatch(text, -1) {
		switch name := match[1]; {
		case strings.Contains(name, "ORIGIN"):
			t.Setenv(name, "https://one.example.com, https://two.example.com")
		case strings.Contains(name, "KEY"):
			t.Setenv(name, key.Generate())
		}
	}
}

func adaptText(t *testing.T, text string) []byte {
	t.Helper()
	raw, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		t.Fatalf("adapting: %v\n%s", err, text)
	}
	for _, warning := range warnings {
		t.Errorf("warning: %s\n%s", warning, text)
	}
	return raw
}

// harmless takes out of a configuration what validation would touch of this
// machine, and gives it the key file of the README.
func harmless(t *testing.T, raw []byte) *caddy.Config {
	t.Helper()
	dir := t.TempDir()
	keys := filepath.Join(dir, "keys.json")
	if err := os.WriteFile(keys, []byte(readDoc(t, "examples/keys.json")), 0o600); err != nil {
		t.Fatal(err)
	}
	var cfg *caddy.Config
	if err := json.Unmarshal(raw, &cfg); err != nil {
		t.Fatal(err)
	}
	cfg.StorageRaw = caddyconfig.JSON(map[string]string{"module": "file_system", "root": dir}, nil)
	if cfg.Logging == nil {
		cfg.Logging = new(caddy.Logging)
	}
	if cfg.Logging.Logs == nil {
		cfg.Logging.Logs = make(map[string]*caddy.CustomLog)
	}
	if cfg.Logging.Logs[caddy.DefaultLoggerName] == nil {
		cfg.Logging.Logs[caddy.DefaultLoggerName] = new(caddy.CustomLog)
	}
	for _, log := range cfg.Logging.Logs {
		log.WriterRaw = json.RawMessage(`{"output": "discard"}`)
	}
	if rawApp, ok := cfg.AppsRaw["zejzl"]; ok {
		var app App
		if err := json.Unmarshal(rawApp, &app); err != nil {
			t.Fatal(err)
		}
		for i := range app.Sources {
			if app.Sources[i].Source == sourceFile {
				app.Sources[i].Path = keys
			}
		}
		cfg.AppsRaw["zejzl"] = caddyconfig.JSON(&app, nil)
	}
	return cfg
}

// expectNoFindings holds what people copy to our own advice.
func expectNoFindings(t *testing.T, raw []byte) {
	t.Helper()
	findings, err := checkConfig(raw)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		t.Errorf("caddy zejzl check: %s: %s", f.where, f.what)
	}
}

func TestReadmeExamplesAreTheFiles(t *testing.T) {
	for file, language := range map[string]string{
		"examples/production.Caddyfile": "caddyfile",
		"examples/keys.json":            "json",
	} {
		text := readDoc(t, file)
		if !slices.ContainsFunc(docBlocks(t, "README.md", language), func(b docBlock) bool { return b.text == text }) {
			t.Errorf("README.md has no %s block that equals %s", language, file)
		}
	}
	if _, err := key.ParseFile(strings.NewReader(readDoc(t, "examples/keys.json"))); err != nil {
		t.Error(err)
	}
}

// The JSON example says what the Caddyfile says. It has no subroutes and
// spells durations, so it is compared by meaning.
func TestProductionJSONIsTheCaddyfile(t *testing.T) {
	want := meaningOf(t, adaptText(t, readDoc(t, "examples/production.Caddyfile")))
	got := meaningOf(t, []byte(readDoc(t, "examples/production.json")))
	for part := range want {
		if !reflect.DeepEqual(got[part], want[part]) {
			t.Errorf("%s:\n got %s\nwant %s", part, caddyconfig.JSON(got[part], nil), caddyconfig.JSON(want[part], nil))
		}
	}
}

type docRoute struct {
	Match    any               `json:"match"`
	Handle   []json.RawMessage `json:"handle"`
	Terminal bool              `json:"terminal"`
}

func meaningOf(t *testing.T, raw []byte) map[string]any {
	t.Helper()
	var cfg struct {
		Logging any `json:"logging"`
		Apps    struct {
			App  *App `json:"zejzl"`
			HTTP struct {
				Servers map[string]struct {
					Listen []string   `json:"listen"`
					Logs   any        `json:"logs"`
					Routes []docRoute `json:"routes"`
				} `json:"servers"`
			} `json:"http"`
		} `json:"apps"`
	}
	parseJSON(t, raw, &cfg)
	if len(cfg.Apps.HTTP.Servers) != 1 {
		t.Fatalf("got %d servers, expected 1", len(cfg.Apps.HTTP.Servers))
	}
	meaning := map[string]any{"logging": cfg.Logging, "app": cfg.Apps.App}
	for _, server := range cfg.Apps.HTTP.Servers {
		meaning["listen"], meaning["access logs"] = server.Listen, server.Logs
		meaning["matcher"] = server.Routes[0].Match
		meaning["handlers"] = handlersOf(t, server.Routes)
	}
	return meaning
}

// handlersOf lists the handlers in their order, those of subroutes in place.
func handlersOf(t *testing.T, routes []docRoute) []any {
	t.Helper()
	var handlers []any
	for _, route := range routes {
		for _, raw := range route.Handle {
			var handler struct {
				Handler string     `json:"handler"`
				Routes  []docRoute `json:"routes"`
			}
			parseJSON(t, raw, &handler)
			var value any
			switch handler.Handler {
			case "subroute":
				handlers = append(handlers, handlersOf(t, handler.Routes)...)
				continue
			case "zejzl_auth":
				value = new(Guard)
			}
			parseJSON(t, raw, &value)
			handlers = append(handlers, value)
		}
	}
	return handlers
}

func parseJSON(t *testing.T, raw []byte, value any) {
	t.Helper()
	if err := json.Unmarshal(raw, value); err != nil {
		t.Fatal(err)
	}
}

// subdirectives are the Caddyfile names of a type's JSON fields.
func subdirectives(of reflect.Type) []string {
	var names []string
	for field := range of.Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		switch name {
		case "":
			continue
		case "keys", "tiers": // one a line
			name = strings.TrimSuffix(name, "s")
		case "sources":
			name = "keys"
		case "origins", "backend": // arguments of cors itself
			continue
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// docTable returns the rows, below its header, of the README's table that has
// the given first column.
func docTable(t *testing.T, column string) [][]string {
	t.Helper()
	_, rest, ok := strings.Cut(readDoc(t, "README.md"), "\n| "+column+" |")
	if !ok {
		t.Fatalf("README.md has no table with the column %q", column)
	}
	var rows [][]string
	for i, line := range strings.Split(rest, "\n") {
		cells, isRow := strings.CutPrefix(line, "| ")
		if i < 2 { // the rest of the header, and the rule
			continue
		}
		if !isRow {
			break
		}
		rows = append(rows, strings.Split(strings.TrimSuffix(cells, " |"), " | "))
	}
	return rows
}

// quoted finds what a table cell has in backquotes.
func quoted(cell string) []string {
	var all []string
	for _, match := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
		all = append(all, match[1])
	}
	return all
}

// The tables of directives name what the parsers know, no less and no more,
// and their examples are valid.
func TestReadmeDirectives(t *testing.T) {
	for column, test := range map[string]struct {
		of    reflect.Type
		parse func(line string) error
	}{
		"subdirective": {reflect.TypeFor[Guard](), func(line string) error {
			return new(Guard).UnmarshalCaddyfile(caddyfile.NewTestDispenser("zejzl_auth {\n" + line + "\n}"))
		}},
		"in the block": {reflect.TypeFor[CORS](), func(line string) error {
			return new(Guard).UnmarshalCaddyfile(caddyfile.NewTestDispenser(
				"zejzl_auth {\ncors https://app.example.com {\n" + line + "\n}\n}"))
		}},
		"option": {reflect.TypeFor[App](), func(line string) error {
			return new(App).UnmarshalCaddyfile(caddyfile.NewTestDispenser("zejzl {\n" + line + "\n}"))
		}},
	} {
		var names []string
		for _, row := range docTable(t, column) {
			for _, syntax := range quoted(row[0]) {
				name, _, _ := strings.Cut(syntax, " ")
				names = append(names, name)
				if err := test.parse(name); err != nil && strings.Contains(err.Error(), "unrecognized") {
					t.Errorf("%s %s: %v", column, name, err)
				}
			}
			for _, example := range quoted(row[2]) {
				if err := test.parse(example); err != nil {
					t.Errorf("%s: example %s: %v", column, example, err)
				}
			}
		}
		slices.Sort(names)
		if want := subdirectives(test.of); !slices.Equal(slices.Compact(names), want) {
			t.Errorf("%s: the README names %v, the type has %v", column, names, want)
		}
	}
}

func TestReadmeAnswers(t *testing.T) {
	documented := make(map[string]string)
	for _, row := range docTable(t, "case") {
		documented[quoted(row[2])[0]] = row[1]
	}
	for why, words := range wordings {
		status, ok := documented[string(why)]
		if !ok || status != "as it is" && !strings.Contains(status, fmt.Sprint(words.status)) {
			t.Errorf("README.md: %s has status %q, expected %d", why, status, words.status)
		}
		delete(documented, string(why))
	}
	for code := range documented {
		t.Errorf("README.md: %s is no reason code", code)
	}
}

func TestReadmeMetrics(t *testing.T) {
	var documented, registered []string
	for _, row := range docTable(t, "metric") {
		documented = append(documented, quoted(row[0])...)
	}
	registry := prometheus.NewRegistry()
	descriptions := make(chan *prometheus.Desc, 100)
	for _, c := range []prometheus.Collector{
		metrics.requests, metrics.inFlight, metrics.decisions, keyGauges{},
	} {
		registry.MustRegister(c)
	}
	registry.Describe(descriptions)
	close(descriptions)
	for desc := range descriptions {
		registered = append(registered, regexp.MustCompile(`fqName: "(\w+)"`).FindStringSubmatch(desc.String())[1])
	}
	slices.Sort(documented)
	slices.Sort(registered)
	if !slices.Equal(documented, registered) {
		t.Errorf("README.md names %v, registered are %v", documented, registered)
	}
}
