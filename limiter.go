package zejzlauth

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
	"github.com/zejzl/caddy-zejzl-auth/internal/window"
)

// Tier is a named set of limits.
type Tier struct {
	// How many requests a key may send in which time. All of them must hold.
	// At least one is required, each with a window of its own.
	// Example: `[{"limit": 100, "window": "1m"}, {"limit": 5000, "window": "1d"}]`.
	Requests []RequestLimit `json:"requests,omitempty"`

	// How many requests of a key may be under way at once; a stream counts
	// until it ends. Default: 0, no cap. Example: `4`.
	Concurrent int `json:"concurrent,omitempty"`
}

// RequestLimit admits at most Limit requests in any Window, exactly.
type RequestLimit struct {
	// The number of requests, 1 to 1,000,000,000. Required. Example: `100`.
	Limit int `json:"limit"`

	// The length of the sliding window, in whole seconds from 1s to 366d.
	// Required. Example: `"1m"`.
	Window caddy.Duration `json:"window"`
}

// builtinTiers exist in every configuration and can be changed by name.
var builtinTiers = map[string]Tier{
	"free":       {Requests: []RequestLimit{{Limit: 10, Window: caddy.Duration(time.Minute)}}},
	"pro":        {Requests: []RequestLimit{{Limit: 100, Window: caddy.Duration(time.Minute)}}},
	"enterprise": {Requests: []RequestLimit{{Limit: 1000, Window: caddy.Duration(time.Minute)}}},
}

const builtinDefaultTier = "free"

// tier is a Tier made ready: its limits, the words that headers use for
// them, and its counters.
type tier struct {
	name    string
	limits  *window.Limits
	words   []limitWords // by index in limits.Requests()
	policy  string       // value of RateLimit-Policy
	metrics atomic.Pointer[tierMetrics]
}

type limitWords struct {
	limit string // "100"
	label string // "1m"
}

func newTier(name string, t Tier) (*tier, error) {
	if err := key.ValidateTierName(name); err != nil {
		return nil, err
	}
	requests := make([]window.Limit, 0, len(t.Requests))
	for _, l := range t.Requests {
		requests = append(requests, window.Limit{Requests: l.Limit, Window: time.Duration(l.Window)})
	}
	limits, err := window.NewLimits(requests, t.Concurrent)
	if err != nil {
		return nil, fmt.Errorf("tier %q: %w", name, err)
	}
	made := &tier{name: name, limits: limits}
	var policies []string
	for _, l := range limits.Requests() {
		words := limitWords{limit: strconv.Itoa(l.Requests), label: windowLabel(l.Window)}
		made.words = append(made.words, words)
		policies = append(policies, fmt.Sprintf("%q;q=%s;w=%d", words.label, words.limit, int(l.Window/time.Second)))
	}
	made.policy = strings.Join(policies, ", ")
	return made, nil
}

// windowLabel spells a window as an operator would: 1d, 1h, 1m, 90s.
func windowLabel(d time.Duration) string {
	for _, unit := range []struct {
		length time.Duration
		name   string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "m"}} {
		if d%unit.length == 0 {
			return strconv.Itoa(int(d/unit.length)) + unit.name
		}
	}
	return strconv.Itoa(int(d/time.Second)) + "s"
}

// mergeTiers puts the tiers of a narrower scope over those of a wider one.
// What is not changed stays the same *tier, so that guards share its limits.
func mergeTiers(wider map[string]*tier, narrower map[string]Tier) (map[string]*tier, error) {
	merged := maps.Clone(wider)
	if merged == nil {
		merged = make(map[string]*tier)
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(narrower)) {
		made, err := newTier(name, narrower[name])
		if err != nil {
			errs = append(errs, err)
			continue
		}
		merged[name] = made
	}
	return merged, errors.Join(errs...)
}

func tierNames(tiers map[string]*tier) string {
	return strings.Join(slices.Sorted(maps.Keys(tiers)), ", ")
}

// processStart is the zero of the limiter's clock. time.Since reads the
// monotonic clock alone: a stepped wall clock neither frees nor locks a key.
var processStart = time.Now()

func monotonicTick() window.Tick {
	return window.Tick(time.Since(processStart) / time.Microsecond)
}

// zones holds the windows and slots of this process by zone name. They outlive
// configurations, also one without any guard: neither a reload nor an hour of
// maintenance hands every key a fresh limit.
var zones sync.Map // name to *zone

const defaultZone = "default"

func zoneOf(name string) *zone {
	z, ok := zones.Load(name)
	if !ok {
		z, _ = zones.LoadOrStore(name, new(zone))
	}
	return z.(*zone)
}

// zone is where guards that share windows meet.
type zone struct {
	shards [64]struct {
		mu       sync.Mutex
		accounts map[string]*account // by key id; only keys of the keyring get here
	}
}

// account is what the process keeps of one key in one zone.
type account struct {
	window.State
	successes successLog
}

// account finds a key's account without a lock or a map: the key of this
// configuration remembers it once it was looked up.
func (z *zone) account(k *key.Key) *account {
	slots := k.Slots.Load()
	if slots != nil {
		for i := range *slots {
			if slot := &(*slots)[i]; slot.Owner == any(z) {
				if acc := slot.State.(*account); !acc.Retired() {
					return acc
				}
			}
		}
	}
	acc := z.load(k.ID)
	var grown []key.Slot
	if slots != nil {
		grown = slices.DeleteFunc(slices.Clone(*slots), func(s key.Slot) bool { return s.Owner == any(z) })
	}
	grown = append(grown, key.Slot{Owner: z, State: acc})
	// Losing the race costs another look-up next time, nothing else.
	k.Slots.CompareAndSwap(slots, &grown)
	return acc
}

func (z *zone) load(id string) *account {
	var hash uint32 = 2166136261 // FNV-1a: ids are the operator's, not the client's
	for i := 0; i < len(id); i++ {
		hash = (hash ^ uint32(id[i])) * 16777619
	}
	shard := &z.shards[hash%uint32(len(z.shards))]
	shard.mu.Lock()
	defer shard.mu.Unlock()
	acc := shard.accounts[id]
	if acc == nil {
		if shard.accounts == nil {
			shard.accounts = make(map[string]*account)
		}
		acc = new(account)
		shard.accounts[id] = acc
	}
	return acc
}

// sweepZones gives up what no configuration needs any more: accounts of keys
// that are gone, once nothing of them is left in a window or under way. Another
// app may still know the key, or go on if the one that swept fails to start.
func sweepZones(now window.Tick, known func(id string) bool) {
	zones.Range(func(_, z any) bool {
		z.(*zone).sweep(now, known)
		return true
	})
}

func (z *zone) sweep(now window.Tick, known func(id string) bool) {
	for i := range z.shards {
		shard := &z.shards[i]
		shard.mu.Lock()
		for id, acc := range shard.accounts {
			if !known(id) && acc.Retire(now) {
				delete(shard.accounts, id)
			}
		}
		shard.mu.Unlock()
	}
}

// charge is one admission in one zone, kept so that it can be given back.
type charge struct {
	zone    *zone
	account *account
	limits  *window.Limits
	at      window.Tick
}

// release frees the concurrency slot.
func (c *charge) release() { c.account.Release() }

// refund takes the admission out of the windows again: a request that a
// later guard of the chain refuses costs nothing.
func (c *charge) refund() { c.account.Refund(c.at, c.limits) }

// successLog thins the log of successful calls to one line a key and minute.
type successLog struct {
	quietUntil atomic.Int64
	unlogged   atomic.Int64
}

// due counts one success. If a line is due it returns how many successes it
// stands for.
func (s *successLog) due(now window.Tick) (count int64, ok bool) {
	s.unlogged.Add(1)
	quiet := s.quietUntil.Load()
	if int64(now) < quiet || !s.quietUntil.CompareAndSwap(quiet, int64(now)+logInterval) {
		return 0, false
	}
	return s.unlogged.Swap(0), true
}
