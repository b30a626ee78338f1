package key

import (
	"strings"
	"testing"
	"time"
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
	now := time.Unix(1_800_000_000, 0)
	with := func(r Record, change func(*Record)) Record {
		change(&r)
		return r
	}
	base := func() Record { return rec("", "A", "pro", "s1") }
	for _, c := range []struct {
		name   string
		second Record
		want   string
	}{
		{"name", rec("", "B", "pro", "s1"), "first and second state the same secret with a different name"},
		{"no name", rec("", "", "pro", "s1"), "first and second state the same secret with a different name"},
		{"tier", rec("", "A", "free", "s1"), "first and second state the same secret with a different tier"},
		{"start", with(base(), func(r *Record) { r.NotBefore = now }), "first and second state the same secret with a different not_before"},
		{"expiry", with(base(), func(r *Record) { r.ExpiresAt = now }), "first and second state the same secret with a different expires_at"},
		{"revocation", with(base(), func(r *Record) { r.RevokedAt = now }), "first and second state the same secret with a different revoked_at"},
		{"end", with(base(), func(r *Record) { r.Secrets[0].NotAfter = now }), "first and second state the same secret with a different not_after"},
		{"id", rec("k_2", "A", "pro", "s1"), "first and second state the same secret with a different id"},
		{"joins", rec("", "A", "pro", "s1", "s9"), "second has secrets of two keys, first and other"},
		{"same id", rec("k_9", "A", "pro", "s2"), `other and second are two keys with the same id "k_9"`},
		{"derived id", rec(Sum("s1").ID(), "A", "pro", "s2"), `first and second are two keys with the same id "` + Sum("s1").ID() + `"`},
		{"twice", rec("", "A", "pro", "s3", "s3"), "second states the same secret twice"},
		{"none", rec("", "A", "pro"), "second: expected at least one secret"},
	} {
		set := NewSet(2)
		first := mustAdd(t, set, located("first", base()))
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
	mustAdd(t, set, located("b", rec("", "A", "pro", "s1", "s2")))
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
