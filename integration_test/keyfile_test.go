package integration

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func hashOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// fileKey is a key of a key file, with its times left out where zero.
type fileKey struct {
	name, tier, secret string

	notBefore, expiresAt, revokedAt, secretNotAfter time.Time
}

func keyFileJSON(keys ...fileKey) string {
	list := make([]map[string]any, 0, len(keys))
	for _, k := range keys {
		secret := map[string]any{"hash": hashOf(k.secret)}
		record := map[string]any{"name": k.name, "tier": k.tier, "secrets": []any{secret}}
		setTime(secret, "not_after", k.secretNotAfter)
		setTime(record, "not_before", k.notBefore)
		setTime(record, "expires_at", k.expiresAt)
		setTime(record, "revoked_at", k.revokedAt)
		list = append(list, record)
	}
	text, err := json.Marshal(map[string]any{"keys": list})
	if err != nil {
		panic(err) // strings and times only
	}
	return string(text)
}

func setTime(object map[string]any, field string, t time.Time) {
	if !t.IsZero() {
		object[field] = t.Format(time.RFC3339Nano)
	}
}

// replace puts a file in place at once, as a careful writer does.
func (s *server) replace(name, content string) {
	s.t.Helper()
	s.write(name+".new", content)
	if err := os.Rename(filepath.Join(s.dir, name+".new"), filepath.Join(s.dir, name)); err != nil {
		s.t.Fatal(err)
	}
}

// liveWithin is how soon a change of a key file must hold: polled each second,
// read, and a margin for a busy machine.
const liveWithin = 3 * time.Second

// within polls until a condition holds.
func within(t testing.TB, limit time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	for !ok() {
		if time.Since(begin) > limit {
			t.Fatalf("%s: not within %v", what, limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return time.Since(begin)
}

// coldStartFile has 100,000 keys, of which it returns a few secrets.
func coldStartFile() (content []byte, secrets []string) {
	var b bytes.Buffer
	b.WriteString(`{"keys": [`)
	for i := range 100_000 {
		var digest [sha256.Size]byte
		if i%1000 == 0 {
			secrets = append(secrets, randomSecret())
			digest = sha256.Sum256([]byte(secrets[len(secrets)-1]))
		} else {
			_, _ = rand.Read(digest[:])
		}
		if i > 0 {
			b.WriteString(",\n")
		}
		fmt.Fprintf(&b, `{"id": "k_%d", "name": "key %d", "tier": "enterprise", "secrets": [{"hash": "sha256:%x"}]}`, i, i, digest)
	}
	b.WriteString(`]}`)
	return b.Bytes(), secrets
}

func TestColdStartWithManyKeysRefusesNoGoodKey(t *testing.T) {
	content, secrets := coldStartFile()
	path := filepath.Join(t.TempDir(), "keys.json")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	// Caddy starts its apps in random order: some of these starts open the
	// listener before the zejzl app is started.
	for i := range 3 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			port := freePort(t)
			var stopped atomic.Bool
			var admitted atomic.Int64
			var wg sync.WaitGroup
			for w := range 4 {
				client := loadClient(t)
				wg.Go(func() {
					for n := w; !stopped.Load(); n++ {
						got, err := fetch(client, fmt.Sprintf("http://127.0.0.1:%d/", port), secrets[n%len(secrets)])
						switch {
						case errors.Is(err, syscall.ECONNREFUSED):
							time.Sleep(time.Millisecond)
						case err != nil:
							t.Error(err)
						case got.status == http.StatusOK:
							admitted.Add(1)
						default:
							t.Errorf("status %d for a good key: %s", got.status, got.body)
							return
						}
					}
				})
			}
			defer wg.Wait()
			defer stopped.Store(true)
			s := start(t, globalBlock(t, "\tzejzl {\n\t\tkeys file "+path+"\n\t\ttier enterprise 1000000/1m\n\t}")+fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	zejzl_auth
	respond ok
}`, port))
			s.waitUntil("some calls after the start", func() bool { return admitted.Load() > 200 })
		})
	}
}

// fileServer is a server with keys in DIR/keys.json.
type fileServer struct {
	*server
	client *http.Client
	url    string
}

func startWithFile(t *testing.T, content string, files ...string) *fileServer {
	t.Helper()
	port := freePort(t)
	options := "\tzejzl {\n\t\tkeys file keys.json\n"
	for _, name := range files {
		options += "\t\tkeys file " + name + "\n"
	}
	// The file must be there before the process, which has a directory of its own.
	dir := t.TempDir()
	for _, name := range append(files, "keys.json") {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		content = `{"keys": []}`
	}
	options = strings.ReplaceAll(options, "keys file ", "keys file "+dir+"/")
	s := start(t, globalBlock(t, options+"\t}")+fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	zejzl_auth
	respond ok
}`, port))
	s.dir = dir
	return &fileServer{server: s, client: loadClient(t), url: fmt.Sprintf("http://127.0.0.1:%d/", port)}
}

func (s *fileServer) status(secret string) int {
	s.t.Helper()
	return mustFetch(s.t, s.client, s.url, secret).status
}

func (s *fileServer) live(t *testing.T, what string, secret string, status int) {
	t.Helper()
	took := within(t, liveWithin, what, func() bool { return s.status(secret) == status })
	t.Logf("%s: after %v", what, took.Round(time.Millisecond))
}

var keyFileOK = regexp.MustCompile(`(?m)^zejzl_auth_key_file_ok(\{.*\})? (\d)$`)

func (s *fileServer) metricOK() string {
	s.t.Helper()
	found := keyFileOK.FindStringSubmatch(s.adminGet("/metrics"))
	if found == nil {
		s.t.Fatal("no zejzl_auth_key_file_ok on /metrics")
	}
	return found[2]
}

// errorLines counts what is logged at level error, of whatever text.
func (s *fileServer) errorLines() int { return strings.Count(s.log.String(), `"level":"error"`) }

func TestKeyFileChangesAreLive(t *testing.T) {
	t.Parallel()
	first := fileKey{name: "first", tier: "enterprise", secret: randomSecret()}
	second := fileKey{name: "second", tier: "enterprise", secret: randomSecret()}
	s := startWithFile(t, keyFileJSON(first))
	if got := s.status(first.secret); got != http.StatusOK {
		t.Fatalf("status %d for the first key", got)
	}
	if got := s.status(second.secret); got != http.StatusUnauthorized {
		t.Fatalf("status %d for a key that is not in the file", got)
	}

	s.replace("keys.json", keyFileJSON(first, second))
	s.live(t, "key added by rename", second.secret, http.StatusOK)

	s.replace("keys.json", keyFileJSON(second))
	s.live(t, "key removed", first.secret, http.StatusUnauthorized)

	// In place and of the same size: another secret of the same key.
	other := second
	other.secret = randomSecret()
	s.write("keys.json", keyFileJSON(other))
	s.live(t, "secret changed in place", other.secret, http.StatusOK)
	if got := s.status(second.secret); got != http.StatusUnauthorized {
		t.Errorf("status %d for the secret that was replaced", got)
	}

	other.revokedAt = time.Now().Add(-time.Second)
	s.replace("keys.json", keyFileJSON(other))
	s.live(t, "key revoked", other.secret, http.StatusUnauthorized)
}

// TestKeyFileBehindSwappedSymlink mounts the file as Kubernetes mounts a
// secret: keys.json -> ..data/keys.json, ..data -> a directory of a version.
func TestKeyFileBehindSwappedSymlink(t *testing.T) {
	t.Parallel()
	first := fileKey{name: "k", tier: "pro", secret: randomSecret()}
	second := fileKey{name: "k", tier: "pro", secret: randomSecret()}
	s := startWithFile(t, keyFileJSON(first))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	path := func(name string) string { return filepath.Join(s.dir, name) }
	must(os.Mkdir(path("..v1"), 0o700))
	must(os.Mkdir(path("..v2"), 0o700))
	s.write("..v1/keys.json", keyFileJSON(first))
	s.write("..v2/keys.json", keyFileJSON(second)) // same size, and soon the same time
	stamp := time.Now()
	must(os.Chtimes(path("..v1/keys.json"), stamp, stamp))
	must(os.Chtimes(path("..v2/keys.json"), stamp, stamp))
	must(os.Symlink("..v1", path("..data")))
	must(os.Symlink("..data/keys.json", path("link")))
	must(os.Rename(path("link"), path("keys.json")))
	time.Sleep(1500 * time.Millisecond) // let it be polled once as a link

	must(os.Symlink("..v2", path("..data_tmp")))
	must(os.Rename(path("..data_tmp"), path("..data")))
	s.live(t, "symlink swapped", second.secret, http.StatusOK)
	if got := s.status(first.secret); got != http.StatusUnauthorized {
		t.Errorf("status %d for a key of the version before", got)
	}
}

func TestBadKeyFileKeepsLastGoodKeys(t *testing.T) {
	t.Parallel()
	good := fileKey{name: "good", tier: "enterprise", secret: randomSecret()}
	content := keyFileJSON(good)
	tests := []struct {
		name  string
		spoil func(path string) error
	}{
		{"truncated to nothing", func(path string) error { return os.Truncate(path, 0) }},
		{"half written", func(path string) error { return os.Truncate(path, int64(len(content)/2)) }},
		{"replaced by a directory", func(path string) error {
			return errors.Join(os.Remove(path), os.Mkdir(path, 0o700))
		}},
		{"deleted", func(path string) error { return os.RemoveAll(path) }},
		{"unknown field", func(path string) error {
			return os.WriteFile(path, []byte(strings.Replace(content, `"tier"`, `"Tier"`, 1)), 0o600)
		}},
		{"unknown tier", func(path string) error {
			return os.WriteFile(path, []byte(strings.Replace(content, `"enterprise"`, `"nosuchtier"`, 1)), 0o600)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := startWithFile(t, content)
			path := filepath.Join(s.dir, "keys.json")
			if got := s.metricOK(); got != "1" {
				t.Fatalf("zejzl_auth_key_file_ok is %s before", got)
			}
			if err := tt.spoil(path); err != nil {
				t.Fatal(err)
			}
			within(t, liveWithin, "an error line", func() bool { return s.errorLines() > 0 })
			time.Sleep(2200 * time.Millisecond) // two more polls must stay silent
			if got := s.errorLines(); got != 1 {
				t.Errorf("%d error lines, want one", got)
			}
			if !strings.Contains(s.log.String(), path) {
				t.Error("the log does not name the file")
			}
			if got := s.metricOK(); got != "0" {
				t.Errorf("zejzl_auth_key_file_ok is %s, want 0", got)
			}
			if got := s.status(good.secret); got != http.StatusOK {
				t.Errorf("status %d for the last good key", got)
			}

			repaired := fileKey{name: "new", tier: "enterprise", secret: randomSecret()}
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			s.replace("keys.json", keyFileJSON(good, repaired))
			s.live(t, "repaired", repaired.secret, http.StatusOK)
			within(t, liveWithin, "zejzl_auth_key_file_ok 1", func() bool { return s.metricOK() == "1" })
		})
	}
}

func TestKeyFileTimesAreEnforced(t *testing.T) {
	t.Parallel()
	now := time.Now()
	past, future := now.Add(-time.Minute), now.Add(time.Hour)
	tests := []struct {
		key    fileKey
		status int
	}{
		{fileKey{name: "no times"}, 200},
		{fileKey{name: "expired", expiresAt: past}, 401},
		{fileKey{name: "expires later", expiresAt: future}, 200},
		{fileKey{name: "not yet", notBefore: future}, 401},
		{fileKey{name: "since a while", notBefore: past}, 200},
		{fileKey{name: "revoked", revokedAt: past}, 401},
		{fileKey{name: "revoked and not expired", revokedAt: past, expiresAt: future}, 401},
		{fileKey{name: "secret ended", secretNotAfter: past}, 401},
		{fileKey{name: "secret ends later", secretNotAfter: future}, 200},
	}
	var keys []fileKey
	for i := range tests {
		tests[i].key.tier, tests[i].key.secret = "pro", randomSecret()
		keys = append(keys, tests[i].key)
	}
	// These two change their state while the server runs, without any change of the file.
	turn := now.Add(5 * time.Second)
	ending := fileKey{name: "ending", tier: "enterprise", secret: randomSecret(), expiresAt: turn}
	coming := fileKey{name: "coming", tier: "enterprise", secret: randomSecret(), notBefore: turn}
	s := startWithFile(t, keyFileJSON(append(keys, ending, coming)...))

	unknown := mustFetch(t, s.client, s.url, randomSecret())
	for _, tt := range tests {
		got := mustFetch(t, s.client, s.url, tt.key.secret)
		if got.status != tt.status {
			t.Errorf("%s: status %d, want %d", tt.key.name, got.status, tt.status)
		}
		if tt.status == http.StatusUnauthorized && got.body != unknown.body {
			t.Errorf("%s: the caller is told %q, want the same as for an unknown key, %q", tt.key.name, got.body, unknown.body)
		}
	}
	for time.Now().Before(turn.Add(time.Second)) {
		sent := time.Now()
		endingStatus, comingStatus := s.status(ending.secret), s.status(coming.secret)
		switch received := time.Now(); {
		case received.Before(turn) && (endingStatus != 200 || comingStatus != 401):
			t.Fatalf("%v before the turn: %d and %d, want 200 and 401", turn.Sub(received), endingStatus, comingStatus)
		case !sent.Before(turn) && (endingStatus != 401 || comingStatus != 200):
			t.Fatalf("%v after the turn: %d and %d, want 401 and 200", sent.Sub(turn), endingStatus, comingStatus)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestTwoKeyFiles(t *testing.T) {
	t.Parallel()
	a := fileKey{name: "a", tier: "enterprise", secret: randomSecret()}
	b := fileKey{name: "b", tier: "enterprise", secret: randomSecret()}
	s := startWithFile(t, keyFileJSON(a), "more.json")
	s.replace("keys.json", keyFileJSON(a))
	s.replace("more.json", keyFileJSON(b))
	s.live(t, "key of the second file", b.secret, http.StatusOK)
	s.live(t, "key of the first file", a.secret, http.StatusOK)

	// The second file contradicts the first: it goes bad as a whole.
	contradiction := a
	contradiction.tier = "pro"
	c := fileKey{name: "c", tier: "pro", secret: randomSecret()}
	s.replace("more.json", keyFileJSON(contradiction, c))
	within(t, liveWithin, "an error line", func() bool { return s.errorLines() > 0 })
	line := lineWith(s.log.String(), `"level":"error"`)
	for _, want := range []string{"keys.json: keys[0]", "more.json: keys[0]", "tier"} {
		if !strings.Contains(line, want) {
			t.Errorf("the error does not name %q: %s", want, line)
		}
	}
	for _, k := range []fileKey{a, b} {
		if got := s.status(k.secret); got != http.StatusOK {
			t.Errorf("status %d for key %s, want its last good state", got, k.name)
		}
	}
	if got := s.status(c.secret); got != http.StatusUnauthorized {
		t.Errorf("status %d for a key of the bad file", got)
	}
	s.replace("more.json", keyFileJSON(c))
	s.live(t, "repaired", c.secret, http.StatusOK)
	if got := s.status(a.secret); got != http.StatusOK {
		t.Errorf("status %d for the first file's key after the second changed", got)
	}
}

// TestKeyFileEndsKeysOfOtherPlaces states one key in the environment and the
// file, another one in a guard and the file.
func TestKeyFileEndsKeysOfOtherPlaces(t *testing.T) {
	t.Parallel()
	inEnv := fileKey{name: "env", tier: "enterprise", secret: randomSecret()}
	inGuard := fileKey{name: "guard", tier: "enterprise", secret: randomSecret()}
	path := filepath.Join(t.TempDir(), "keys.json")
	if err := os.WriteFile(path, []byte(keyFileJSON(inEnv, inGuard)), 0o600); err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	s := &fileServer{client: loadClient(t), url: fmt.Sprintf("http://127.0.0.1:%d/", port)}
	s.server = start(t, globalBlock(t, "\tzejzl {\n\t\tkeys env {env.PREFIX}\n\t\tkeys file "+path+"\n\t}")+fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	zejzl_auth {
		zone {env.ZONE}
		key %s enterprise guard
	}
	respond ok
}`, port, hashOf(inGuard.secret)), "PREFIX=MINE_", "MINE_1="+inEnv.secret+":enterprise:env", "ZONE=of the environment")
	s.dir = filepath.Dir(path)
	both := []fileKey{inEnv, inGuard}
	check := func(when string, status int) {
		t.Helper()
		for _, k := range both {
			s.live(t, when+": "+k.name, k.secret, status)
		}
	}
	check("at the start", http.StatusOK)
	if got := s.adminGet("/metrics"); !strings.Contains(got, `zejzl_auth_keys{source="file"} 2`) ||
		!strings.Contains(got, `zejzl_auth_keys{source="env"} 0`) || !strings.Contains(got, `zejzl_auth_keys{source="config"} 0`) {
		t.Errorf("a key that is stated twice must count once:\n%s", lineWith(got, "zejzl_auth_keys{"))
	}
	revoked := []fileKey{inEnv, inGuard}
	for i := range revoked {
		revoked[i].revokedAt = time.Now().Add(-time.Minute)
	}
	s.replace("keys.json", keyFileJSON(revoked...))
	check("revoked in the file", http.StatusUnauthorized)
	s.replace("keys.json", keyFileJSON())
	check("no longer in the file", http.StatusOK)
}

// TestFailedReloadLeavesKeysAndMetrics loads a configuration that can't start,
// since its port is taken. Caddy starts apps in any order, hence several times.
func TestFailedReloadLeavesKeysAndMetrics(t *testing.T) {
	t.Parallel()
	good := fileKey{name: "good", tier: "enterprise", secret: randomSecret()}
	s := startWithFile(t, keyFileJSON(good, fileKey{name: "other", tier: "pro", secret: randomSecret()}))
	s.live(t, "before", good.secret, http.StatusOK)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for i := range 8 {
		status, body := s.reload(globalBlock(t, "\tzejzl {\n\t\tkeys env NONE_\n\t\ttier unheard 5/1m\n\t}") + fmt.Sprintf(`
http://%s {
	bind 127.0.0.1
	zejzl_auth
	respond new
}`, taken.Addr()))
		if status == http.StatusOK || !strings.Contains(body, "address already in use") {
			t.Fatalf("reload %d: status %d, %s", i, status, body)
		}
		metrics := s.adminGet("/metrics")
		if !strings.Contains(metrics, `zejzl_auth_keys{source="file"} 2`) || strings.Contains(metrics, "unheard") {
			t.Fatalf("after failed reload %d the metrics are not those of what runs:\n%s", i, lineWith(metrics, `zejzl_auth_keys{source="file"}`))
		}
	}
	next := fileKey{name: "next", tier: "enterprise", secret: randomSecret()}
	s.replace("keys.json", keyFileJSON(good, next))
	s.live(t, "the file is still watched", next.secret, http.StatusOK)
}

// TestWindowsOutliveMaintenance reloads to a configuration without any guard,
// or that of another module altogether, and back.
func TestWindowsOutliveMaintenance(t *testing.T) {
	t.Parallel()
	secret := randomSecret()
	port := freePort(t)
	global := globalBlock(t, "")
	site := func(handlers string) string {
		return global + fmt.Sprintf("\nhttp://127.0.0.1:%d {\n\tbind 127.0.0.1\n%s\n}", port, handlers)
	}
	guarded := site("\tzejzl_auth {\n\t\ttier pro 2/1h\n\t}\n\trespond ok")
	s := start(t, guarded, "ZEJZL_API_KEY_A="+secret+":pro")
	client, url := loadClient(t), fmt.Sprintf("http://127.0.0.1:%d/", port)
	must := func(when string, status int) {
		t.Helper()
		if got := mustFetch(t, client, url, secret); got.status != status {
			t.Fatalf("%s: status %d, want %d: %s", when, got.status, status, got.body)
		}
	}
	must("first", http.StatusOK)
	must("second", http.StatusOK)
	must("third", http.StatusTooManyRequests)
	for _, between := range []string{site("\trespond \"back soon\" 503"), global + fmt.Sprintf("\nhttp://127.0.0.1:%d {\n\trespond away\n}", freePort(t))} {
		for _, caddyfile := range []string{between, guarded} {
			if status, body := s.reload(caddyfile); status != http.StatusOK {
				t.Fatalf("reload: status %d: %s", status, body)
			}
		}
		must("after maintenance", http.StatusTooManyRequests)
	}
}

// TestKeyMovesBetweenFiles writes the file that gets the key first: until the
// other one gives it up, the two contradict each other.
func TestKeyMovesBetweenFiles(t *testing.T) {
	t.Parallel()
	k := fileKey{name: "moving", tier: "enterprise", secret: randomSecret()}
	s := startWithFile(t, keyFileJSON(k), "more.json")
	s.replace("keys.json", keyFileJSON(k))
	s.replace("more.json", keyFileJSON())
	tier := func() string { return mustFetch(t, s.client, s.url, k.secret).header.Get("X-RateLimit-Tier") }
	s.live(t, "in the first file", k.secret, http.StatusOK)
	moved := k
	moved.tier = "pro"
	s.replace("more.json", keyFileJSON(moved))
	within(t, liveWithin, "an error line", func() bool { return s.errorLines() > 0 })
	if got := tier(); got != "enterprise" {
		t.Errorf("tier %q while the files contradict each other", got)
	}
	s.replace("keys.json", keyFileJSON())
	within(t, liveWithin, "the new tier", func() bool {
		got := mustFetch(t, s.client, s.url, k.secret)
		if got.status != http.StatusOK {
			t.Fatalf("status %d: the key is in neither file", got.status)
		}
		return got.header.Get("X-RateLimit-Tier") == "pro"
	})
	within(t, liveWithin, "zejzl_auth_key_file_ok 1", func() bool { return s.metricOK() == "1" })
	if got := s.errorLines(); got != 1 {
		t.Errorf("%d error lines, want one", got)
	}
}

func lineWith(log, part string) string {
	for line := range strings.Lines(log) {
		if strings.Contains(line, part) {
			return line
		}
	}
	return ""
}
