package zejzlauth

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
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
	app = provisionedApp(t, &App{Sources: []Source{{Source: "env", Prefix: "MINE_"}, {Source: "file", Path: "{env.ZEJZL_TEST_FILE}"}}})
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
		err := g.provision(app.ctx, app)
		_ = g.Cleanup()
		return err
	}
	if err := guard(GuardKey{digest, "pro", "key 0"}, GuardKey{digest, "pro", "key 0"}); err != nil {
		t.Errorf("the same key in a guard: %v", err)
	}
	mustNotTell(t, guard(GuardKey{digest, "free", "key 0"}), secrets,
		"key file "+path+": keys[0] and zejzl_auth guard 2: keys[0] state the same secret with a different tier")
	other := key.Sum(secretOf("other")).String()
	if err := guard(GuardKey{other, "pro", "a"}); err != nil {
		t.Fatal(err)
	}
	mustNotTell(t, guard(GuardKey{other, "pro", "a"}, GuardKey{other, "pro", "b"}), nil, "guard 3: keys[0] and zejzl_auth guard 4: keys[1]")
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
	app := new(App)
	for _, path := range paths {
		settle(t, path, time.Now().Add(-time.Hour))
		app.Sources = append(app.Sources, Source{Source: "file", Path: path})
	}
	provisionedApp(t, app)
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

// poll does what one tick of pollFiles does, and returns what was logged.
func (r *reloading) poll() string {
	for _, f := range r.files {
		if differs := f.differs(); differs || !f.settled {
			r.reload(f, differs)
		}
	}
	var lines []string
	for _, entry := range r.logs.TakeAll() {
		lines = append(lines, entry.Message)
		for _, value := range entry.ContextMap() {
			if strings.Contains(fmt.Sprint(value), "zejzl_") {
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
	fileLoaded = "key file loaded"
	fileBad    = "key file went bad: its last good keys stay in use"
)

func TestKeyFileReload(t *testing.T) {
	a, b := key.Generate(), key.Generate()
	path := writeKeyFile(t, keysJSON(a))
	r := newReloading(t, path)
	past := time.Now().Add(-time.Minute)
	step := func(what, wantLog string, wantA, wantB bool, wantOK float64) {
		t.Helper()
		if got := r.poll(); got != wantLog {
			t.Errorf("%s: logged %q, want %q", what, got, wantLog)
		}
		if r.has(a) != wantA || r.has(b) != wantB {
			t.Errorf("%s: keys %v %v", what, r.has(a), r.has(b))
		}
		if wantLog == "" {
			return
		}
		if got := testutil.ToFloat64(metrics.keyFileOK); got != wantOK {
			t.Errorf("%s: key_file_ok %v", what, got)
		}
	}
	step("unchanged", "", true, false, 1)
	r.write(path, keysJSON(a, b), past)
	step("another key", fileLoaded, true, true, 1)
	if got := testutil.ToFloat64(metrics.keys.WithLabelValues("file")); got != 2 {
		t.Errorf("keys gauge %v", got)
	}
	kept, _ := r.keyring.Lookup(key.Sum(a))
	settle(t, path, past.Add(time.Second))
	step("touched", fileLoaded, true, true, 1)
	if now, _ := r.keyring.Lookup(key.Sum(a)); now.Key != kept.Key {
		t.Error("a key that says the same is another one")
	}
	for _, content := range []string{
		"", "{", `{"keys": [`, keysJSON(b)[:40], strings.Replace(keysJSON(b), "pro", "nosuch", 1), strings.Replace(keysJSON(b), `"tier"`, `"secret": "`+a+`", "tier"`, 1),
		strings.Replace(keysJSON(b), "sha256:", a, 1),
	} {
		r.write(path, content, past)
		past = past.Add(time.Millisecond)
		step("bad: "+content, fileBad, true, true, 0)
		step("still bad", "", true, true, 0)
	}
	if got := testutil.ToFloat64(metrics.keys.WithLabelValues("file")); got != 2 {
		t.Errorf("keys gauge %v", got)
	}
	r.write(path, keysJSON(b), past)
	step("good again", fileLoaded, false, true, 1)

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	step("gone", fileBad, false, true, 0)
	step("still gone", "", false, true, 0)
	r.write(path, keysJSON(b), past)
	step("back, the same", fileLoaded, false, true, 1)
	r.write(path, `{"keys": []}`, past)
	step("emptied on purpose", fileLoaded, false, false, 1)
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
	records, err := f.read()
	if err != nil || !f.settled || f.differs() {
		t.Fatalf("%v, settled %v, differs %v", err, f.settled, f.differs())
	}
	f.use(records)
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

// A file that is good by itself must not contradict the other sources.
func TestKeyFileContradictsAtReload(t *testing.T) {
	a, b := key.Generate(), key.Generate()
	first, second := writeKeyFile(t, keysJSON(a)), writeKeyFile(t, keysJSON(b))
	r := newReloading(t, first, second)
	past := time.Now().Add(-time.Minute)
	r.write(second, strings.Replace(keysJSON(a), "key 0", "another", 1), past)
	if got := r.poll(); got != fileBad || !r.has(a) || !r.has(b) {
		t.Errorf("logged %q, keys %v %v", got, r.has(a), r.has(b))
	}
	c := key.Generate()
	r.write(first, keysJSON(a, c), past)
	if got := r.poll(); got != fileLoaded || !r.has(a) || !r.has(b) || !r.has(c) {
		t.Errorf("logged %q, keys %v %v %v", got, r.has(a), r.has(b), r.has(c))
	}
	if got := testutil.ToFloat64(metrics.keyFileOK); got != 0 {
		t.Errorf("key_file_ok %v while one is bad", got)
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
