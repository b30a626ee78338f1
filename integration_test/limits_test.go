package integration

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// globalBlock begins a Caddyfile for sites on loopback.
func globalBlock(t testing.TB, options string) string {
	t.Helper()
	return fmt.Sprintf("{\n\tadmin ADMIN\n\thttp_port %d\n\thttps_port %d\n\tskip_install_trust\n%s\n}\n",
		freePort(t), freePort(t), options)
}

// randomSecret is a key of the module's shape, made without a process.
func randomSecret() string {
	var b [24]byte
	_, _ = rand.Read(b[:])
	return "zejzl_" + base64.RawURLEncoding.EncodeToString(b[:])
}

type outcome struct {
	status int
	header http.Header
	body   string
}

// fetch gets a URL with a key, from any goroutine.
func fetch(client *http.Client, url, secret string) (outcome, error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return outcome{}, err
	}
	if secret != "" {
		req.Header.Set("X-API-Key", secret)
	}
	resp, err := client.Do(req)
	if err != nil {
		return outcome{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return outcome{resp.StatusCode, resp.Header, string(body)}, err
}

// mustFetch is fetch where an answer of whatever status is certain.
func mustFetch(t testing.TB, client *http.Client, url, secret string) outcome {
	t.Helper()
	got, err := fetch(client, url, secret)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// loadClient keeps its own connections, so that no test waits on another's.
func loadClient(t testing.TB) *http.Client {
	transport := &http.Transport{MaxIdleConnsPerHost: 256}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}

func TestParallelCallsAdmitExactlyTheLimit(t *testing.T) {
	const calls = 200
	limits := []int{1, 10, 100}
	secrets := make(map[int]string)
	var env []string
	for _, n := range limits {
		secrets[n] = randomSecret()
		env = append(env, fmt.Sprintf("ZEJZL_API_KEY_%d=%s:t%d", n, secrets[n], n))
	}
	port := freePort(t)
	start(t, globalBlock(t, `
	zejzl {
		tier t1 1/5m
		tier t10 10/5m
		tier t100 100/5m
	}`)+fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	zejzl_auth
	respond ok
}`, port), env...)

	client := loadClient(t)
	for _, n := range limits {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			var ready, done sync.WaitGroup
			gate := make(chan struct{})
			answers := make([]outcome, calls)
			errs := make([]error, calls)
			for i := range calls {
				ready.Add(1)
				done.Go(func() {
					ready.Done()
					<-gate
					answers[i], errs[i] = fetch(client, fmt.Sprintf("http://127.0.0.1:%d/", port), secrets[n])
				})
			}
			ready.Wait()
			close(gate)
			done.Wait()

			admitted, refused := 0, 0
			left := make(map[string]bool)
			for i := range answers {
				switch {
				case errs[i] != nil:
					t.Fatal(errs[i])
				case answers[i].status == http.StatusOK:
					admitted++
					left[answers[i].header.Get("X-RateLimit-Remaining")] = true
				case answers[i].status == http.StatusTooManyRequests:
					refused++
					if got := answers[i].header.Get("X-RateLimit-Remaining"); got != "0" {
						t.Errorf("X-RateLimit-Remaining of a refusal is %q, want 0", got)
					}
				default:
					t.Errorf("status %d: %s", answers[i].status, answers[i].body)
				}
			}
			if admitted != n || refused != calls-n {
				t.Errorf("%d admitted and %d refused, want %d and %d", admitted, refused, n, calls-n)
			}
			for i := range n {
				if !left[strconv.Itoa(i)] {
					t.Errorf("no admitted call was told %d remaining; each number belongs to one call", i)
				}
			}
		})
	}
}

// retryAfter reads both spellings of how long to wait and holds them against
// each other.
func retryAfter(r outcome) (time.Duration, error) {
	ms, err := strconv.Atoi(r.header.Get("Retry-After-Ms"))
	if err != nil || ms < 1 {
		return 0, fmt.Errorf("Retry-After-Ms is %q, want a positive number", r.header.Get("Retry-After-Ms"))
	}
	if want := strconv.Itoa((ms + 999) / 1000); r.header.Get("Retry-After") != want {
		return 0, fmt.Errorf("Retry-After is %q beside Retry-After-Ms %d, want %s", r.header.Get("Retry-After"), ms, want)
	}
	return time.Duration(ms) * time.Millisecond, nil
}

func TestRetryAfterIsNeitherTooShortNorTooLong(t *testing.T) {
	secret := randomSecret()
	port := freePort(t)
	start(t, globalBlock(t, "\tzejzl {\n\t\ttier x 10/2s\n\t}")+fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	zejzl_auth
	respond ok
}`, port), "ZEJZL_API_KEY_A="+secret+":x")
	url := fmt.Sprintf("http://127.0.0.1:%d/", port)
	client := loadClient(t)

	for i := range 10 {
		if got := mustFetch(t, client, url, secret); got.status != http.StatusOK {
			t.Fatalf("call %d: status %d, want 200", i+1, got.status)
		}
	}
	sent := time.Now()
	refusal := mustFetch(t, client, url, secret)
	received := time.Now()
	if refusal.status != http.StatusTooManyRequests {
		t.Fatalf("call 11: status %d, want 429", refusal.status)
	}
	wait, err := retryAfter(refusal)
	if err != nil || wait > 2*time.Second {
		t.Fatalf("told to wait %v for a window of 2s: %v", wait, err)
	}

	// The server decided after sent, and rounded up by less than a
	// millisecond: whoever is answered before this has come too early.
	early := sent.Add(wait - time.Millisecond)
	tries := 0
	for time.Until(early) > 100*time.Millisecond {
		got := mustFetch(t, client, url, secret)
		switch inTime := time.Now().Before(early); {
		case inTime && got.status != http.StatusTooManyRequests:
			t.Fatalf("status %d before the wait of %v was over: the server waits longer than it must", got.status, wait)
		case inTime:
			tries++
		default:
			t.Skip("one call took over 100 ms, across the end of the wait: too busy here to tell")
		}
	}
	if tries == 0 {
		t.Error("no call was made before the wait was over")
	}
	time.Sleep(time.Until(received.Add(wait)))
	if got := mustFetch(t, client, url, secret); got.status != http.StatusOK {
		t.Fatalf("status %d after waiting exactly %v as told, want 200", got.status, wait)
	}
}

// loadKey is a key under random load.
type loadKey struct {
	name, secret string
	tier         string // Caddyfile lines of its tier
	limits       []loadLimit
	workers      int
	obedient     bool // waits exactly as told; alone, since another would take its place

	mu    sync.Mutex
	calls []loadCall
}

type loadLimit struct {
	n      int
	window time.Duration
}

type loadCall struct {
	sent, received time.Time
	admitted       bool
}

func (k *loadKey) add(c loadCall) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.calls = append(k.calls, c)
}

func randomLoadKeys() []*loadKey {
	keys := []*loadKey{
		{name: "a", tier: "requests 3/1s", limits: []loadLimit{{3, time.Second}}, workers: 3},
		{name: "b", tier: "requests 12/2s", limits: []loadLimit{{12, 2 * time.Second}}, workers: 3},
		{name: "c", tier: "requests 50/3s", limits: []loadLimit{{50, 3 * time.Second}}, workers: 4},
		{name: "d", tier: "requests 8/1s 15/3s", limits: []loadLimit{{8, time.Second}, {15, 3 * time.Second}}, workers: 3},
		{name: "e", tier: "requests 4/1s", limits: []loadLimit{{4, time.Second}}, workers: 1, obedient: true},
		{name: "f", tier: "requests 5/1s 9/2s", limits: []loadLimit{{5, time.Second}, {9, 2 * time.Second}}, workers: 1, obedient: true},
	}
	for _, k := range keys {
		k.secret = randomSecret()
	}
	return keys
}

// pause is random: bursts, trickles, and silences as long as the window.
func (k *loadKey) pause() time.Duration {
	switch p := mrand.Float64(); {
	case p < 0.7:
		return time.Duration(mrand.Int64N(int64(20 * time.Millisecond)))
	case p < 0.97:
		return time.Duration(mrand.Int64N(int64(200 * time.Millisecond)))
	}
	return time.Duration(mrand.Int64N(int64(k.limits[0].window)))
}

func (k *loadKey) work(t *testing.T, client *http.Client, url string, end time.Time) {
	told := false // and waited as told since
	for time.Now().Before(end) {
		sent := time.Now()
		got, err := fetch(client, url, k.secret)
		received := time.Now()
		if err != nil {
			t.Errorf("key %s: %v", k.name, err)
			return
		}
		k.add(loadCall{sent, received, got.status == http.StatusOK})
		if got.status != http.StatusOK && got.status != http.StatusTooManyRequests {
			t.Errorf("key %s: status %d", k.name, got.status)
			return
		}
		if told && got.status != http.StatusOK {
			t.Errorf("key %s waited exactly as told and got %d", k.name, got.status)
		}
		if told = k.obedient && got.status == http.StatusTooManyRequests; told {
			wait, err := retryAfter(got)
			if err != nil {
				t.Errorf("key %s: %v", k.name, err)
			}
			time.Sleep(time.Until(received.Add(wait)))
			continue
		}
		time.Sleep(k.pause())
	}
}

func TestRandomLoadKeepsEveryWindow(t *testing.T) {
	t.Parallel()
	duration := time.Minute
	if testing.Short() {
		duration = 8 * time.Second
	}
	keys := randomLoadKeys()
	var tiers strings.Builder
	var env []string
	for _, k := range keys {
		fmt.Fprintf(&tiers, "\t\ttier %s {\n\t\t\t%s\n\t\t}\n", k.name, k.tier)
		env = append(env, fmt.Sprintf("ZEJZL_API_KEY_%s=%s:%s:%s", k.name, k.secret, k.name, k.name))
	}
	port := freePort(t)
	s := start(t, globalBlock(t, "\tdebug\n\tzejzl {\n"+tiers.String()+"\t}")+fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	zejzl_auth
	respond ok
}`, port), env...)

	end := time.Now().Add(duration)
	var wg sync.WaitGroup
	for _, k := range keys {
		for range k.workers {
			client := loadClient(t)
			wg.Go(func() { k.work(t, client, fmt.Sprintf("http://127.0.0.1:%d/", port), end) })
		}
	}
	wg.Wait()

	decided := admissions(t, s.log.String())
	for _, k := range keys {
		k.check(t, decided[k.name])
	}
}

// admissions are the limiter's own times of its decisions by key name.
func admissions(t testing.TB, log string) map[string][]time.Duration {
	t.Helper()
	decided := make(map[string][]time.Duration)
	for line := range strings.Lines(log) {
		if !strings.Contains(line, `"request admitted"`) {
			continue
		}
		var entry struct {
			Name string `json:"key_name"`
			At   *int64 `json:"admitted_at"`
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.At == nil {
			t.Fatalf("no admitted_at in %q: %v", line, err)
		}
		decided[entry.Name] = append(decided[entry.Name], time.Duration(*entry.At)*time.Microsecond)
	}
	return decided
}

// check holds what happened to a key against its limits: exactly by the time
// of decision, and from outside within the latency of the calls.
func (k *loadKey) check(t *testing.T, decided []time.Duration) {
	var sent []time.Duration
	var latency time.Duration
	refused := 0
	for _, c := range k.calls {
		if !c.admitted {
			refused++
			continue
		}
		sent = append(sent, c.sent.Sub(k.calls[0].sent))
		latency = max(latency, c.received.Sub(c.sent))
	}
	if len(decided) != len(sent) {
		t.Errorf("key %s: %d decisions in the debug log for %d admitted calls", k.name, len(decided), len(sent))
	}
	if len(sent) < 10 || refused == 0 {
		t.Errorf("key %s: %d admitted and %d refused calls prove nothing", k.name, len(sent), refused)
	}
	slices.Sort(decided)
	slices.Sort(sent)
	for _, l := range k.limits {
		for i := l.n; i < len(decided); i++ {
			if d := decided[i] - decided[i-l.n]; d < l.window {
				t.Errorf("key %s: %d admissions decided within %v, limit %d in %v", k.name, l.n+1, d, l.n, l.window)
			}
		}
		for i := l.n; i < len(sent); i++ {
			if d := sent[i] - sent[i-l.n]; d < l.window-latency {
				t.Errorf("key %s: %d admitted calls sent within %v, limit %d in %v with latency %v", k.name, l.n+1, d, l.n, l.window, latency)
			}
		}
	}
	t.Logf("key %s: %d admitted, %d refused, largest latency %v", k.name, len(sent), refused, latency.Round(time.Microsecond))
}

func TestInvalidKeysFloodNeitherLogNorMemory(t *testing.T) {
	const warmUp, flood = 4_000, 20_000
	secret := randomSecret()
	port := freePort(t)
	s := start(t, globalBlock(t, "")+fmt.Sprintf(`
http://127.0.0.1:%d {
	bind 127.0.0.1
	zejzl_auth
	respond ok
}`, port), "ZEJZL_API_KEY_A="+secret+":pro")
	url := fmt.Sprintf("http://127.0.0.1:%d/", port)
	client := loadClient(t)
	send := func(n int) {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range n / 4 {
					got, err := fetch(client, url, randomSecret())
					if err != nil || got.status != http.StatusUnauthorized {
						t.Errorf("status %d, %v, want 401", got.status, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	send(warmUp)
	linesBefore, heapBefore, before := strings.Count(s.log.String(), "\n"), s.heapKiB(), s.residentKiB()
	send(flood)
	lines := strings.Count(s.log.String(), "\n") - linesBefore
	heap, resident := s.heapKiB()-heapBefore, s.residentKiB()-before
	t.Logf("%d invalid keys: %d log lines, heap %+d KiB, resident memory %+d KiB of %d", flood, lines, heap, resident, before)
	// One client and one reason: a line a minute; reading the heap writes two more.
	if lines > 5 {
		t.Errorf("%d log lines for %d invalid keys of one client", lines, flood)
	}
	if !strings.Contains(s.log.String(), `"invalid_key"`) {
		t.Error("no log line tells of invalid keys")
	}
	// Were anything kept of each key, it would be 32 bytes of digest at least.
	if heap > flood*32>>10 {
		t.Errorf("the heap grew by %d KiB over %d invalid keys", heap, flood)
	}
	// Under the race detector the process itself swings by far more than the heap.
	if resident > 64<<10 {
		t.Errorf("resident memory grew by %d KiB over %d invalid keys", resident, flood)
	}
	if got := mustFetch(t, client, url, secret); got.status != http.StatusOK {
		t.Errorf("status %d for a good key after the flood", got.status)
	}
}

var heapAlloc = regexp.MustCompile(`(?m)^# HeapAlloc = (\d+)$`)

// heapKiB is what is in use of the heap after a garbage collection.
func (s *server) heapKiB() int {
	s.t.Helper()
	found := heapAlloc.FindStringSubmatch(s.adminGet("/debug/pprof/heap?gc=1&debug=1"))
	if found == nil {
		s.t.Fatal("no HeapAlloc in the heap profile of the admin endpoint")
	}
	n, _ := strconv.Atoi(found[1])
	return n >> 10
}

// residentKiB is the resident memory of the process.
func (s *server) residentKiB() int {
	s.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		s.t.Skipf("measuring memory needs /proc: %v", err)
	}
	var kib int
	if _, err := fmt.Sscanf(lineWith(string(status), "VmRSS:"), "VmRSS: %d kB", &kib); err != nil {
		s.t.Fatalf("reading VmRSS: %v", err)
	}
	return kib
}
