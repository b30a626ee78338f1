package zejzlauth

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

func writeKeyFile(t testing.TB, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys.json")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// keysJSON is a key file with a pro key for each secret.
func keysJSON(secrets ...string) string {
	var records []string
	for i, secret := range secrets {
		records = append(records, fmt.Sprintf(`{"name": "key %d", "tier": "pro", "secrets": [{"hash": %q}]}`, i, key.Sum(secret)))
	}
	return `{"keys": [` + strings.Join(records, ",") + `]}`
}

// mustNotTell checks an error for what it must say and must not.
func mustNotTell(t *testing.T, err error, secrets []string, want ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %q", want)
	}
	for _, part := range want {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %v, want %q", err, part)
		}
	}
	for _, secret := range secrets {
		if strings.Contains(err.Error(), secret) {
			t.Errorf("the error tells a secret: %v", err)
		}
	}
}

func TestSourceErrors(t *testing.T) {
	t.Setenv("ZEJZL_TEST_EMPTY", "")
	t.Setenv("ZEJZL_TEST_BAD_A", literalSecret)
	t.Setenv("ZEJZL_TEST_BAD_B", literalSecret+":Pro")
	t.Setenv("ZEJZL_TEST_TIER_A", literalSecret+":nosuch")
	dir := t.TempDir()
	bad := writeKeyFile(t, `{"keys": [{"name": "a", "tier": "pro", "secrets": [{"hash": "`+literalSecret+`"}]}]}`)
	unknown := writeKeyFile(t, strings.Replace(keysJSON(literalSecret), `"tier": "pro"`, `"tier": "nosuch"`, 1))
	for _, c := range []struct {
		source Source
		want   []string
	}{
		{Source{}, []string{"sources[0]: source: expected env or file"}},
		{Source{Source: literalSecret}, []string{"sources[0]: source: expected env or file"}},
		{Source{Source: "env", Path: "x"}, []string{"path: expected for file sources only"}},
		{Source{Source: "file", Prefix: "x"}, []string{"prefix: expected for env sources only"}},
		{Source{Source: "file"}, []string{"path: expected the path of a key file"}},
		{Source{Source: "file", Path: "{env.ZEJZL_TEST_EMPTY}"}, []string{"sources[0]: path: ", "ZEJZL_TEST_EMPTY"}},
		{Source{Source: "file", Path: "{env.ZEJZL_TEST_UNSET}"}, []string{"sources[0]: path: ", "ZEJZL_TEST_UNSET"}},
		{Source{Source: "file", Path: filepath.Join(dir, "none")}, []string{"sources[0]: key file: ", "none"}},
		{Source{Source: "file", Path: dir}, []string{"key file " + dir + ": expected a regular file"}},
		{Source{Source: "file", Path: bad}, []string{"key file " + bad + ": ", "sha256"}},
		{Source{Source: "file", Path: unknown}, []string{"key file " + unknown + ": keys[0]: unknown tier, expected one of enterprise, free, pro"}},
		{Source{Source: "env", Prefix: "{env.ZEJZL_TEST_EMPTY}"}, []string{"sources[0]: prefix: ", "ZEJZL_TEST_EMPTY"}},
		{Source{Source: "env", Prefix: "{env.ZEJZL_TEST_UNSET}"}, []string{"sources[0]: prefix: ", "ZEJZL_TEST_UNSET"}},
		{Source{Source: "env", Prefix: "ZEJZL_TEST_BAD_"}, []string{"environment variable ZEJZL_TEST_BAD_A: expected", "environment variable ZEJZL_TEST_BAD_B: expected a tier"}},
		{Source{Source: "env", Prefix: "ZEJZL_TEST_TIER_"}, []string{"environment variable ZEJZL_TEST_TIER_A: unknown tier, expected one of"}},
	} {
		err := (&App{Sources: []Source{c.source}}).Provision(bareContext(t))
		mustNotTell(t, err, []string{literalSecret}, c.want...)
	}
	err := (&App{Sources: []Source{{}, {Source: "file"}}}).Provision(bareContext(t))
	mustNotTell(t, err, nil, "sources[0]", "sources[1]")
}

func TestSources(t *testing.T) {
	env, foreign, filed := key.Generate(), secretOf("env"), key.Generate()
	t.Setenv("ZEJZL_API_KEY_ONE", env+":pro:CI: runner")
	t.Setenv("MINE_2", key.Sum(foreign).String()+":enterprise")
	t.Setenv("ZEJZL_TEST_FILE", writeKeyFile(t, strings.Replace(keysJSON(filed), `{"name"`, `{"id": "k_1", "name"`, 1)))
	ids := func(a *App, secrets ...string) string {
		var found []string
		for _, secret := range secrets {
			if entry, ok := a.keyring.Lookup(key.Sum(secret)); ok {
				found = append(found, entry.Key.ID+"/"+entry.Key.Name+"/"+entry.Key.Tier)
			}
		}
		return strings.Join(found, " ")
	}
	app := new(App)
	if err := app.Provision(bareContext(t)); err != nil {
		t.Fatal(err)
	}
	if got, want := ids(app, env, foreign, filed), key.Sum(env).ID()+"/CI: runner/pro"; got != want {
		t.Errorf("by default: %s, want %s", got, want)
	}
	t.Setenv("ZEJZL_TEST_PREFIX", "MINE")
	app = provisionedApp(t, &App{Sources: []Source{{Source: "env", Prefix: "{env.ZEJZL_TEST_PREFIX}_"}, {Source: "file", Path: "{env.ZEJZL_TEST_FILE}"}}})
	if got, want := ids(app, env, foreign, filed), key.Sum(foreign).ID()+"//enterprise k_1/key 0/pro"; got != want {
		t.Errorf("with a list: %s, want %s", got, want)
	}
}

// The same secret with another tier or name is an error that names both places.
func TestContradictions(t *testing.T) {
	path := writeKeyFile(t, keysJSON(literalSecret))
	digest := key.Sum(literalSecret).String()
	secrets := []string{literalSecret, digest[7:]}
	withEnv := func(value string) error {
		t.Setenv("ZEJZL_TEST_CONTRA_A", value)
		sources := []Source{{Source: "env", Prefix: "ZEJZL_TEST_CONTRA_"}, {Source: "file", Path: path}}
		return (&App{Sources: sources}).Provision(bareContext(t))
	}
	mustNotTell(t, withEnv(literalSecret+":free:key 0"), secrets,
		"key file "+path+": keys[0] and environment variable ZEJZL_TEST_CONTRA_A state the same secret with a different tier")
	mustNotTell(t, withEnv(digest+":pro:other"), secrets, "ZEJZL_TEST_CONTRA_A", "different name")
	if err := withEnv(digest + ":pro:key 0"); err != nil {
		t.Errorf("the same key twice: %v", err)
	}

	app := provisionedApp(t, &App{Sources: []Source{{Source: "file", Path: path}}})
	guard := func(k ...GuardKey) error {
		g := &Guard{Keys: k, Zone: t.Name()}
		return g.provision(app.ctx, app)
	}
	if err := guard(GuardKey{digest, "pro", "key 0"}, GuardKey{digest, "pro", "key 0"}); err != nil {
		t.Errorf("the same key in a guard: %v", err)
	}
	mustNotTell(t, guard(GuardKey{digest, "free", "key 0"}), secrets,
		"key file "+path+": keys[0] and zejzl_auth key \"key 0\" state the same secret with a different tier")
	other := key.Sum(secretOf("other")).String()
	if err := guard(GuardKey{other, "pro", "a"}); err != nil {
		t.Fatal(err)
	}
	mustNotTell(t, guard(GuardKey{other, "pro", "a"}, GuardKey{other, "pro", "b"}), nil,
		`zejzl_auth key "a" and zejzl_auth key "b" state the same secret with a different name`)
	mustNotTell(t, guard(GuardKey{other, "nosuch", "a"}, GuardKey{literalSecret, "pro", ""}), secrets,
		"keys[0]: unknown tier, expected one of enterprise, free, pro", "keys[1]: secret: expected sha256:")
}

// reloading is an app with key files, whose log the test reads.
type reloading struct {
	*App
	logs *observer.ObservedLogs
	t    *testing.T
}

func newReloading(t *testing.T, paths ...string) *reloading {
	t.Helper()
	var sources []Source
	for _, path := range paths {
		sources = append(sources, Source{Source: "file", Path: path})
	}
	return newReloadingFrom(t, sources...)
}

func newReloadingFrom(t *testing.T, sources ...Source) *reloading {
	t.Helper()
	for _, source := range sources {
		if source.Path != "" {
			settle(t, source.Path, time.Now().Add(-time.Hour))
		}
	}
	app := provisionedApp(t, &App{Sources: sources})
	r := &reloading{App: app, t: t}
	var core zapcore.Core
	core, r.logs = observer.New(zapcore.InfoLevel)
	app.logger = zap.New(core)
	return r
}

func settle(t *testing.T, path string, at time.Time) {
	t.Helper()
	if err := os.Chtimes(path, at, at); err != nil {
		t.Fatal(err)
	}
}

var secretInLog = regexp.MustCompile(`zejzl_[\w-]{32}|[[:xdigit:]]{64}`)

// poll does what one tick of pollFiles does, and returns what was logged.
func (r *reloading) poll() string {
	r.pollOnce()
	var lines []string
	for _, entry := range r.logs.TakeAll() {
		lines = append(lines, entry.Message)
		for _, value := range entry.ContextMap() {
			if secretInLog.MatchString(fmt.Sprint(value)) {
				r.t.Errorf("a secret in the log: %v", value)
			}
		}
	}
	return strings.Join(lines, ", ")
}

func (r *reloading) write(path, content string, at time.Time) {
	r.t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		r.t.Fatal(err)
	}
	settle(r.t, path, at)
}

func (r *reloading) has(secret string) bool {
	_, ok := r.keyring.Lookup(key.Sum(secret))
	return ok
}

const (
	fileLoaded = "key files loaded"
	fileBad    = "a key file went bad: the last good keys stay in use"
)

func TestKeyFileReload(t *testing.T) {
	a, b := key.Generate(), key.Generate()
	path := writeKeyFile(t, keysJSON(a))
	r := newReloading(t, path)
	past := time.Now().Add(-time.Minute)
	step := func(what, wantLog string, wantA, wantB, wantOK bool) {
		t.Helper()
		if got := r.poll(); got != wantLog {
			t.Errorf("%s: logged %q, want %q", what, got, wantLog)
		}
		if r.has(a) != wantA || r.has(b) != wantB {
			t.Errorf("%s: keys %v %v", what, r.has(a), r.has(b))
		}
		want := keyState{failed: !wantOK}
		for _, has := range []bool{wantA, wantB} {
			if has {
				want.file++
			}
		}
		if got := *r.keyState.Load(); got != want {
			t.Errorf("%s: the metrics say %+v, want %+v", what, got, want)
		}
		if r.files[0].records != nil {
			t.Errorf("%s: the records are kept", what)
		}
	}
	r.forgetRecords() // as pollFiles does first
	step("unchanged", "", true, false, true)
	r.write(path, keysJSON(a, b), past)
	step("another key", fileLoaded, true, true, true)
	kept, _ := r.keyring.Lookup(key.Sum(a))
	settle(t, path, past.Add(time.Second))
	step("touched", fileLoaded, true, true, true)
	if now, _ := r.keyring.Lookup(key.Sum(a)); now.Key != kept.Key {
		t.Error("a key that says the same is another one")
	}
	for _, content := range []string{
		"", "{", `{"keys": [`, keysJSON(b)[:40], strings.Replace(keysJSON(b), "pro", "nosuch", 1), strings.Replace(keysJSON(b), `"tier"`, `"secret": "`+a+`", "tier"`, 1),
		strings.Replace(keysJSON(b), "sha256:", a, 1),
	} {
		r.write(path, content, past)
		past = past.Add(time.Millisecond)
		step("bad: "+content, fileBad, true, true, false)
		step("still bad", "", true, true, false)
	}
	r.write(path, keysJSON(b), past)
	step("good again", fileLoaded, false, true, true)

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	step("gone", fileBad, false, true, false)
	step("still gone", "", false, true, false)
	r.write(path, keysJSON(b), past)
	step("back, the same", fileLoaded, false, true, true)
	r.write(path, `{"keys": []}`, past)
	step("emptied on purpose", fileLoaded, false, false, true)
}

// What can't be read at all is tried again each second, and told once.
func TestKeyFileNotReadable(t *testing.T) {
	secret := key.Generate()
	path := writeKeyFile(t, keysJSON(secret))
	r := newReloading(t, path)
	for name, replace := range map[string]func(){
		"directory": func() { _ = os.Mkdir(path, 0o700) },
		"socket": func() {
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		},
		"pipe": func() { // opened as a file is, it would hold up the poll for good
			if err := syscall.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"not permitted": func() {
			if os.Getuid() == 0 {
				_ = os.Mkdir(path, 0o700) // to root all is permitted
				return
			}
			if err := os.WriteFile(path, []byte(keysJSON(secret)), 0); err != nil {
				t.Fatal(err)
			}
		},
	} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		replace()
		if got := r.poll(); got != fileBad {
			t.Errorf("%s: logged %q", name, got)
		}
		for range 3 {
			if got := r.poll(); got != "" {
				t.Errorf("%s: logged again: %q", name, got)
			}
		}
		if !r.has(secret) {
			t.Errorf("%s: the last good key is gone", name)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		r.write(path, keysJSON(secret), time.Now().Add(-time.Minute))
		if got := r.poll(); got != fileLoaded {
			t.Errorf("%s: logged %q when it was good again", name, got)
		}
	}
}

func TestKeyFileSymlinkSwapped(t *testing.T) {
	a, b := key.Generate(), key.Generate()
	dir := t.TempDir()
	link := filepath.Join(dir, "keys.json")
	for _, target := range []struct{ name, secret string }{{"a", a}, {"b", b}} {
		path := filepath.Join(dir, target.name)
		if err := os.WriteFile(path, []byte(keysJSON(target.secret)), 0o600); err != nil {
			t.Fatal(err)
		}
		settle(t, path, time.Unix(1e9, 0)) // the same size and time
	}
	if err := os.Symlink("a", link); err != nil {
		t.Fatal(err)
	}
	r := newReloading(t)
	f := &keyFile{path: link}
	if f.read(); f.err != nil || !f.settled || f.differs() {
		t.Fatalf("%v, settled %v, differs %v", f.err, f.settled, f.differs())
	}
	r.files = append(r.files, f)
	if err := os.Symlink("b", link+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link+".new", link); err != nil {
		t.Fatal(err)
	}
	if got := r.poll(); got != fileLoaded || r.has(a) || !r.has(b) {
		t.Errorf("logged %q, keys %v %v", got, r.has(a), r.has(b))
	}
}

// A file changed just now may change again under the same time stamp.
func TestKeyFileUnsettled(t *testing.T) {
	a, b := key.Generate(), key.Generate()
	path := writeKeyFile(t, keysJSON(a))
	r := newReloading(t, path)
	now := time.Now()
	r.write(path, keysJSON(b), now)
	if got := r.poll(); got != fileLoaded || !r.has(b) || r.files[0].settled {
		t.Fatalf("logged %q, key %v, settled %v", got, r.has(b), r.files[0].settled)
	}
	r.write(path, keysJSON(a), now)
	if got := r.poll(); got != "" || !r.has(a) {
		t.Errorf("logged %q, key %v", got, r.has(a))
	}
	r.write(path, "{", now)
	for _, want := range []string{fileBad, "", ""} { // read again and again, told once
		if got := r.poll(); got != want || !r.has(a) {
			t.Errorf("logged %q, want %q, key %v", got, want, r.has(a))
		}
	}
}

// A file that is good by itself must not contradict the other sources. Until
// it is mended, what was in use stays, and it is told once, however often the
// files are read again.
func TestKeyFileContradictsAtReload(t *testing.T) {
	a, b, c := key.Generate(), key.Generate(), key.Generate()
	first, second := writeKeyFile(t, keysJSON(a)), writeKeyFile(t, keysJSON(b))
	r := newReloading(t, first, second)
	step := func(what, wantLog string, wantB, wantC bool) {
		t.Helper()
		if got := r.poll(); got != wantLog {
			t.Errorf("%s: logged %q, want %q", what, got, wantLog)
		}
		if !r.has(a) || r.has(b) != wantB || r.has(c) != wantC {
			t.Errorf("%s: keys %v %v %v", what, r.has(a), r.has(b), r.has(c))
		}
		if got := r.keyState.Load(); got.failed == (wantB != wantC) || got.file != 2 {
			t.Errorf("%s: the metrics say %+v", what, got)
		}
	}
	step("before", "", true, false)
	r.write(second, strings.Replace(keysJSON(a), "key 0", "another", 1), time.Now()) // not settled: it is read at each tick
	if got := r.poll(); got != fileBad {
		t.Errorf("logged %q", got)
	}
	for range 3 {
		if got := r.poll(); got != "" || !r.has(a) || !r.has(b) || !r.keyState.Load().failed {
			t.Errorf("still: logged %q, keys %v %v, metrics %+v", got, r.has(a), r.has(b), r.keyState.Load())
		}
	}
	r.write(second, keysJSON(c), time.Now().Add(-time.Minute))
	step("mended", fileLoaded, false, true)
	step("after", "", false, true)
}

// A file must not contradict the keys of the environment or of a guard either,
// and what it says of such a key is told once.
func TestKeyFileContradictsOtherSources(t *testing.T) {
	a, b, c := key.Generate(), key.Generate(), key.Generate()
	t.Setenv("ZEJZL_TEST_OTHER_B", b+":free:another")
	for name, secret := range map[string]string{"guard": a, "environment": b} {
		t.Run(name, func(t *testing.T) {
			path := writeKeyFile(t, keysJSON(c))
			r := newReloadingFrom(t, Source{Source: "env", Prefix: "ZEJZL_TEST_OTHER_"}, Source{Source: "file", Path: path})
			g := newRigIn(t, r.App, &Guard{Keys: []GuardKey{{key.Sum(a).String(), "free", "one"}}, Zone: path})
			now := time.Now() // read again at each tick
			r.write(path, keysJSON(secret), now)
			if got := r.poll(); got != fileBad {
				t.Errorf("logged %q", got)
			}
			if got := r.poll(); got != "" {
				t.Errorf("logged again: %q", got)
			}
			for _, good := range []string{a, b, c} {
				g.must(t, http.StatusOK, newRequest("GET", "/x", "X-Api-Key", good), respondOK)
			}
			r.write(path, `{"keys": []}`, now)
			if got := r.poll(); got != fileLoaded || r.has(c) || !r.has(b) {
				t.Errorf("mended: logged %q, keys %v %v", got, r.has(c), r.has(b))
			}
		})
	}
}

// Nor does one that contradicts the configuration: what the other one ends has ended.
func TestOneContradictoryFileOfTwo(t *testing.T) {
	a, b := key.Generate(), key.Generate()
	first, second := writeKeyFile(t, keysJSON(a)), writeKeyFile(t, keysJSON(b))
	r := newReloading(t, first, second)
	past := time.Now().Add(-time.Minute)
	r.write(first, strings.Replace(keysJSON(a), `"pro"`, `"prro"`, 1), past)
	if got := r.poll(); got != fileBad || !r.has(a) || !r.has(b) {
		t.Fatalf("logged %q, keys %v %v", got, r.has(a), r.has(b))
	}
	r.write(second, `{"keys": []}`, past)
	if r.poll(); !r.has(a) || r.has(b) {
		t.Errorf("keys %v %v", r.has(a), r.has(b))
	}
	r.write(first, keysJSON(), past.Add(time.Second))
	if got := r.poll(); got != fileLoaded || r.has(a) || r.has(b) {
		t.Errorf("mended: logged %q, keys %v %v", got, r.has(a), r.has(b))
	}
}

// One bad file does not keep another one's changes from being used.
func TestOneBadFileOfTwo(t *testing.T) {
	a, b, c := key.Generate(), key.Generate(), key.Generate()
	bad, good := writeKeyFile(t, keysJSON(a)), writeKeyFile(t, keysJSON(b))
	r := newReloading(t, bad, good)
	past := time.Now().Add(-time.Minute)
	r.write(bad, "{", past)
	r.write(good, keysJSON(c), past)
	if got := r.poll(); got != fileBad || !r.has(a) || r.has(b) || !r.has(c) {
		t.Errorf("logged %q, keys %v %v %v", got, r.has(a), r.has(b), r.has(c))
	}
	r.write(good, keysJSON(b, c), past)
	if got := r.poll(); got != "" || !r.has(a) || !r.has(b) || !r.has(c) {
		t.Errorf("while one is bad: logged %q, keys %v %v %v", got, r.has(a), r.has(b), r.has(c))
	}
	if got, want := *r.keyState.Load(), (keyState{file: 3, failed: true}); got != want {
		t.Errorf("the metrics say %+v, want %+v", got, want)
	}
	r.write(bad, keysJSON(a), past.Add(time.Second))
	if got := r.poll(); got != fileLoaded || *r.keyState.Load() != (keyState{file: 3}) {
		t.Errorf("mended: logged %q, metrics %+v", got, r.keyState.Load())
	}
}

// tierOfSecret is the tier of the key that a secret opens, empty if it opens none.
func (r *reloading) tierOfSecret(secret string) string {
	entry, ok := r.keyring.Lookup(key.Sum(secret))
	if !ok {
		return ""
	}
	return entry.Key.Tier
}

func inTier(tier, keys string) string { return strings.ReplaceAll(keys, `"pro"`, `"`+tier+`"`) }

// What is written to several files takes effect at once, also if a tick comes
// between: a contradiction is no reason to lose the key.
func TestKeyInTwoFiles(t *testing.T) {
	a := key.Generate()
	both, none := keysJSON(a), `{"keys": []}`
	for name, c := range map[string]struct {
		first, second       string // at the start
		newFirst, newSecond string
		want                string // tier in the end
		between             [2]string
		logged              [2]string
	}{
		// between: the tier after one of the files is written, the first or the second
		"changes its tier":        {both, both, inTier("free", both), inTier("free", both), "free", [2]string{"pro", "pro"}, [2]string{fileBad, fileBad}},
		"moves with a new tier":   {both, none, none, inTier("free", both), "free", [2]string{"", "pro"}, [2]string{fileLoaded, fileBad}},
		"moves as it is":          {both, none, none, both, "pro", [2]string{"", "pro"}, [2]string{fileLoaded, fileLoaded}},
		"moves back, a new tier":  {none, both, inTier("free", both), none, "free", [2]string{"pro", ""}, [2]string{fileBad, fileLoaded}},
		"leaves one of the files": {both, both, none, both, "pro", [2]string{"pro", "pro"}, [2]string{fileLoaded, fileLoaded}},
	} {
		for order := range 2 {
			for _, tickBetween := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/order %d/%t", name, order, tickBetween), func(t *testing.T) {
					paths := [2]string{writeKeyFile(t, c.first), writeKeyFile(t, c.second)}
					contents := [2]string{c.newFirst, c.newSecond}
					r := newReloading(t, paths[:]...)
					past := time.Now().Add(-time.Minute)
					r.write(paths[order], contents[order], past)
					if tickBetween {
						if got := r.poll(); got != c.logged[order] || r.tierOfSecret(a) != c.between[order] {
							t.Errorf("between: logged %q, tier %q; want %q, %q", got, r.tierOfSecret(a), c.logged[order], c.between[order])
						}
					}
					r.write(paths[1-order], contents[1-order], past)
					if got := r.poll(); got != fileLoaded || r.tierOfSecret(a) != c.want {
						t.Errorf("in the end: logged %q, tier %q, want %q", got, r.tierOfSecret(a), c.want)
					}
					if got := *r.keyState.Load(); got != (keyState{file: 1}) {
						t.Errorf("the metrics say %+v", got)
					}
					if got := r.poll(); got != "" {
						t.Errorf("afterwards: logged %q", got)
					}
				})
			}
		}
	}
}

func TestOneFileListedTwice(t *testing.T) {
	a, b := key.Generate(), key.Generate()
	path := writeKeyFile(t, keysJSON(a))
	r := newReloading(t, path, path)
	if got := *r.keyState.Load(); got != (keyState{file: 1}) {
		t.Errorf("at the start: %+v", got)
	}
	past := time.Now().Add(-time.Minute)
	for i, content := range []string{inTier("free", keysJSON(a, b)), keysJSON(b)} {
		r.write(path, content, past.Add(time.Duration(i)*time.Second))
		if got := r.poll(); got != fileLoaded || !r.has(b) || r.has(a) != (i == 0) || r.keyState.Load().file != 2-i {
			t.Errorf("change %d: logged %q, keys %v %v, metrics %+v", i, got, r.has(a), r.has(b), r.keyState.Load())
		}
	}
}

// Records are kept only to be joined with those of another file.
func TestRecordsAreForgotten(t *testing.T) {
	content := keysJSON(key.Generate())
	one, two := newReloading(t, writeKeyFile(t, content)), newReloading(t, writeKeyFile(t, content), writeKeyFile(t, content))
	for i := range 2 {
		one.forgetRecords()
		two.forgetRecords()
		if one.files[0].records != nil || len(two.files[0].records) != 1 || len(two.files[1].records) != 1 {
			t.Errorf("tick %d: %v, %v, %v", i, one.files[0].records, two.files[0].records, two.files[1].records)
		}
		settle(t, one.files[0].path, time.Unix(1e9, 0))
		settle(t, two.files[0].path, time.Unix(1e9, 0))
		one.poll()
		two.poll()
	}
}

// A clock that is wrong on the host that wrote the file is no reason to read
// it at each tick.
func TestKeyFileOfTheFuture(t *testing.T) {
	a := key.Generate()
	path := writeKeyFile(t, keysJSON(key.Generate()))
	r := newReloading(t, path)
	future := time.Now().Add(time.Hour)
	r.write(path, keysJSON(a), future)
	if got := r.poll(); got != fileLoaded || !r.has(a) || !r.files[0].settled {
		t.Fatalf("logged %q, key %v, settled %v", got, r.has(a), r.files[0].settled)
	}
	read := r.files[0].info
	for range 3 {
		if r.poll(); r.files[0].info != read {
			t.Error("the file was read again")
		}
	}
	r.write(path, keysJSON(a, key.Generate()), future)
	if got := r.poll(); got != fileLoaded {
		t.Errorf("after a change: logged %q", got)
	}
}

// statedTwice is a key of two secrets with rules about time, as a file states it.
func statedTwice(rules, secretRules string, secrets ...string) string {
	var list []string
	for i, secret := range secrets {
		if i > 0 {
			secretRules = ""
		}
		list = append(list, fmt.Sprintf(`{"hash": %q%s}`, key.Sum(secret), secretRules))
	}
	return `{"keys": [{"id": "k_filed", "name": "key 0", "tier": "pro"` + rules + `, "secrets": [` + strings.Join(list, ",") + `]}]}`
}

// What a file ends is ended, wherever else the key is stated: revoking in one
// place must be enough.
func TestFileEndsWhatOtherSourcesState(t *testing.T) {
	a, b := key.Generate(), key.Generate()
	const past, future = `"2020-01-01T00:00:00Z"`, `"2040-01-01T00:00:00Z"`
	stated := map[string]func(path string) (*reloading, *rig){
		"guard": func(path string) (*reloading, *rig) {
			r := newReloading(t, path)
			return r, newRigIn(t, r.App, &Guard{Keys: []GuardKey{{key.Sum(a).String(), "pro", "key 0"}}, Zone: path})
		},
		"environment": func(path string) (*reloading, *rig) {
			t.Setenv("ZEJZL_TEST_TWICE_A", a+":pro:key 0")
			r := newReloadingFrom(t, Source{Source: "file", Path: path}, Source{Source: "env", Prefix: "ZEJZL_TEST_TWICE_"})
			return r, newRigIn(t, r.App, &Guard{Zone: path})
		},
	}
	for name, state := range stated {
		for what, c := range map[string]struct {
			content      string
			wantA, wantB int
		}{
			"no rule":        {statedTwice("", "", a, b), 200, 200},
			"revoked":        {statedTwice(`, "revoked_at": `+past, "", a, b), 401, 401},
			"revoked later":  {statedTwice(`, "revoked_at": `+future, "", a, b), 200, 200},
			"expired":        {statedTwice(`, "expires_at": `+past, "", a, b), 401, 401},
			"not yet":        {statedTwice(`, "not_before": `+future, "", a, b), 401, 401},
			"since long":     {statedTwice(`, "not_before": `+past, "", a, b), 200, 200},
			"secret ended":   {statedTwice("", `, "not_after": `+past, a, b), 401, 200},
			"secret removed": {statedTwice("", "", a), 200, 401},
			"key removed":    {`{"keys": []}`, 200, 401}, // it stays what the other place says
		} {
			t.Run(name+"/"+what, func(t *testing.T) {
				call := func(g *rig, secret string) int {
					resp, err := g.serve(newRequest("GET", "/x", "X-Api-Key", secret), respondOK)
					if err != nil {
						t.Fatal(err)
					}
					return resp.StatusCode
				}
				check := func(when string, g *rig) {
					t.Helper()
					if gotA, gotB := call(g, a), call(g, b); gotA != c.wantA || gotB != c.wantB {
						t.Errorf("%s: %d and %d, want %d and %d", when, gotA, gotB, c.wantA, c.wantB)
					}
				}
				_, g := state(writeKeyFile(t, c.content))
				check("at the start", g)
				path := writeKeyFile(t, statedTwice("", "", a, b))
				r, g := state(path)
				if gotA, gotB := call(g, a), call(g, b); gotA != 200 || gotB != 200 {
					t.Fatalf("before: %d and %d", gotA, gotB)
				}
				r.write(path, c.content, time.Now().Add(-time.Minute))
				if got := r.poll(); got != fileLoaded {
					t.Errorf("logged %q", got)
				}
				check("after a change of the file", g)
			})
		}
	}
}

// The watcher begins with Start, sees a change within a second, ends with Stop.
func TestKeyFileWatcher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := key.Generate(), key.Generate()
		path := writeKeyFile(t, keysJSON(a))
		r := newReloading(t, path)
		g := newRigIn(t, r.App, new(Guard))
		if err := r.Start(); err != nil {
			t.Fatal(err)
		}
		r.write(path, keysJSON(b), time.Now().Add(-time.Minute))
		g.must(t, http.StatusOK, newRequest("GET", "/x", "X-Api-Key", a), respondOK)
		time.Sleep(1100 * time.Millisecond)
		g.must(t, http.StatusOK, newRequest("GET", "/x", "X-Api-Key", b), respondOK)
		g.must(t, http.StatusUnauthorized, newRequest("GET", "/x", "X-Api-Key", a), notReached(t))
		if err := r.Stop(); err != nil {
			t.Fatal(err)
		}
		g.must(t, http.StatusOK, newRequest("GET", "/x", "X-Api-Key", b), respondOK) // requests under way
	})
}

// A poll that hangs, as on a dead file system, does not hold up Stop.
func TestStopDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := writeKeyFile(t, keysJSON(key.Generate()))
		r := newReloading(t, path)
		hangs := make(chan struct{})
		reached := false
		core, _ := observer.New(zapcore.InfoLevel)
		r.logger = zap.New(core, zap.Hooks(func(zapcore.Entry) error {
			reached = true
			<-hangs
			return nil
		}))
		started(t, r.App)
		r.write(path, keysJSON(key.Generate()), time.Now().Add(-time.Minute))
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		if !reached {
			t.Fatal("the poll does not hang")
		}
		stopped(t, r.App)
		close(hangs)
	})
}
