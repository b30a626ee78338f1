package key

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func rec(id, name, tier string, secrets ...string) Record {
	r := Record{ID: id, Name: name, Tier: tier}
	for _, s := range secrets {
		r.Secrets = append(r.Secrets, Secret{Digest: Sum(s)})
	}
	return r
}

func located(place string, r Record) Located {
	return Located{Record: r, Place: Place{Source: place, Index: -1}}
}

func mustAdd(t testing.TB, s *Set, l Located) *Key {
	t.Helper()
	k, err := s.Add(l)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestSetSameKey(t *testing.T) {
	set := NewSet(0)
	a := mustAdd(t, set, located("file", rec("k_1", "A", "pro", "s1", "s2")))
	for _, r := range []Record{
		rec("", "A", "pro", "s1"),
		rec("", "A", "pro", "s2"),
		rec("k_1", "A", "pro", "s2", "s3"), // brings a secret
		rec("", "A", "pro", "s3", "s1"),
	} {
		if got := mustAdd(t, set, located("env", r)); got != a {
			t.Errorf("%+v is another key", r)
		}
	}
	b := mustAdd(t, set, located("env", rec("", "A", "pro", "s4")))
	if b == a || b.ID != Sum("s4").ID() || a.ID != "k_1" {
		t.Errorf("ids: %s, %s", a.ID, b.ID)
	}
	if set.Len() != 2 {
		t.Errorf("%d keys", set.Len())
	}
	var ring Ring
	ring.Replace(set, []*Key{a, b, a}) // the root package may name a key twice
	if ring.Len() != 4 {
		t.Errorf("%d secrets in the ring", ring.Len())
	}
	for s, want := range map[string]*Key{"s1": a, "s2": a, "s3": a, "s4": b, "s5": nil} {
		if e, ok := ring.Lookup(Sum(s)); e.Key != want || ok != (want != nil) {
			t.Errorf("%s: %v, %t", s, e, ok)
		}
	}
}

func TestSetContradictions(t *testing.T) {
	for _, c := range []struct {
		name   string
		second Record
		want   string
	}{
		{"name", rec("", "B", "pro", "s1"), "first and second state the same secret with a different name"},
		{"no name", rec("", "", "pro", "s1"), "first and second state the same secret with a different name"},
		{"tier", rec("", "A", "free", "s1"), "first and second state the same secret with a different tier"},
		{"id", rec("k_2", "A", "pro", "s1"), "first and second state the same secret with a different id"},
		{"joins", rec("", "A", "pro", "s1", "s9"), "second has secrets of two keys, first and other"},
		{"same id", rec("k_9", "A", "pro", "s2"), `other and second are two keys with the same id "k_9"`},
		{"derived id", rec(Sum("s1").ID(), "A", "pro", "s2"), `first and second are two keys with the same id "` + Sum("s1").ID() + `"`},
		{"twice", rec("", "A", "pro", "s3", "s3"), "second states the same secret twice"},
		{"none", rec("", "A", "pro"), "second: expected at least one secret"},
	} {
		set := NewSet(2)
		first := mustAdd(t, set, located("first", rec("", "A", "pro", "s1")))
		mustAdd(t, set, located("other", rec("k_9", "A", "pro", "s9")))
		k, err := set.Add(located("second", c.second))
		if err == nil || k != nil || err.Error() != c.want {
			t.Errorf("%s: %v, %v\nwant %s", c.name, k, err, c.want)
		}
		// A refused record leaves nothing behind.
		if set.Len() != 2 || len(set.byDigest) != 2 || len(set.byID) != 2 || len(set.secrets(first, 0)) != 1 {
			t.Errorf("%s: the set changed: %+v", c.name, set)
		}
	}
}

// timed is the record of one secret under the rules that the time t stands for;
// the zero time is no rule.
func timed(t [4]time.Time) Record {
	r := rec("", "A", "pro", "s1")
	r.NotBefore, r.ExpiresAt, r.RevokedAt, r.Secrets[0].NotAfter = t[0], t[1], t[2], t[3]
	return r
}

// Of what several sources say of one secret the strictest holds, in whatever
// order they come.
func TestSetJoinsTimes(t *testing.T) {
	early, late := time.Unix(1_800_000_000, 0), time.Unix(1_900_000_000, 0)
	var none time.Time
	for i, what := range []string{"not_before", "expires_at", "revoked_at", "not_after"} {
		later := i == 0 // the later start is the stricter one, and the earlier end
		for _, c := range [][2]time.Time{{none, none}, {none, late}, {early, late}, {early, early}} {
			strict := c[0]
			if later || strict.IsZero() {
				strict = c[1]
			}
			for _, order := range [][]time.Time{{c[0], c[1]}, {c[1], c[0]}, {c[1], c[0], c[1], none}} {
				set := NewSet(0)
				var k *Key
				for _, at := range order {
					var times [4]time.Time
					times[i] = at
					k = mustAdd(t, set, located("a source", timed(times)))
				}
				var ring Ring
				ring.Replace(set, []*Key{k})
				got, _ := ring.Lookup(Sum("s1"))
				want := [4]int64{}
				want[i] = instant(strict)
				if is := [4]int64{got.Key.notBefore, got.Key.expiresAt, got.Key.revokedAt, got.NotAfter}; is != want {
					t.Errorf("%s stated as %v: %v, want %v", what, order, is, want)
				}
			}
		}
	}
}

// Whatever a source says of a key more than the others, it can only end the
// key sooner or let it begin later.
func TestSetNeverJoinsToLess(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		moment := rapid.Custom(func(t *rapid.T) time.Time {
			if n := rapid.Int64Range(0, 5).Draw(t, "time"); n > 0 {
				return time.Unix(n, 0)
			}
			return time.Time{}
		})
		var records []Record
		set := NewSet(0)
		var k *Key
		for range rapid.IntRange(1, 4).Draw(t, "sources") {
			var times [4]time.Time
			for i := range times {
				times[i] = moment.Draw(t, "t")
			}
			records = append(records, timed(times))
			var err error
			if k, err = set.Add(located("a source", timed(times))); err != nil {
				t.Fatal(err)
			}
		}
		var ring Ring
		ring.Replace(set, []*Key{k})
		joined, _ := ring.Lookup(Sum("s1"))
		for n := range int64(7) {
			now := time.Unix(n, 0)
			active := true
			for _, r := range records {
				alone := NewSet(1)
				var one Ring
				single, err := alone.Add(located("a source", r))
				if err != nil {
					t.Fatal(err)
				}
				one.Replace(alone, []*Key{single})
				e, _ := one.Lookup(Sum("s1"))
				active = active && e.Status(now) == Active
			}
			if got := joined.Status(now); (got == Active) != active {
				t.Fatalf("at %d: %s, want active %t", n, got, active)
			}
		}
	})
}

func TestSetHas(t *testing.T) {
	set := NewSet(0)
	mustAdd(t, set, located("a", rec("k_1", "A", "pro", "s1")))
	mustAdd(t, set, located("b", rec("", "B", "pro", "s2")))
	for id, want := range map[string]bool{"k_1": true, Sum("s2").ID(): true, Sum("s1").ID(): false, "": false, "k_2": false} {
		if got := set.Has(id); got != want {
			t.Errorf("Has(%q) = %t", id, got)
		}
	}
}

// A key of another set has no secrets here: it must not get those of a member.
func TestSetForeignKey(t *testing.T) {
	set, other := NewSet(1), NewSet(1)
	mustAdd(t, set, located("a", rec("k_1", "A", "pro", "s1")))
	for _, id := range []string{"k_1", "k_2"} {
		k := mustAdd(t, other, located("b", rec(id, "B", "enterprise", id)))
		var ring Ring
		ring.Replace(set, []*Key{k})
		if ring.Len() != 0 {
			t.Errorf("%s is in the ring", id)
		}
	}
}

func TestSetKeepsTheCallersSecrets(t *testing.T) {
	set := NewSet(1)
	r := rec("", "A", "pro", "s1")
	r.Secrets = append(make([]Secret, 0, 4), r.Secrets...)
	mustAdd(t, set, located("a", r))
	ended := rec("", "A", "pro", "s1", "s2")
	ended.Secrets[0].NotAfter = time.Unix(1, 0)
	mustAdd(t, set, located("b", ended))
	if !r.Secrets[0].NotAfter.IsZero() {
		t.Error("the set wrote the end of a secret into the caller's record, which another set may get")
	}
	if spare := r.Secrets[:2]; spare[1] != (Secret{}) {
		t.Error("the set wrote into the caller's slice")
	}
}

func TestSetErrorNamesIndex(t *testing.T) {
	set := NewSet(2)
	for i, name := range []string{"A", "B"} {
		_, err := set.Add(Located{rec("", name, "pro", canary), Place{"key file keys.json", i}})
		if i == 1 && (err == nil || !strings.HasPrefix(err.Error(), "key file keys.json: keys[0] and key file keys.json: keys[1] ")) {
			t.Errorf("got %v", err)
		}
	}
}
