package key

import (
	"testing"
	"time"
	"unsafe"
)

func TestStatus(t *testing.T) {
	t0 := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	at := func(s int) time.Time { return t0.Add(time.Duration(s) * time.Second) }
	for _, c := range []struct {
		name            string
		from, to, gone  time.Time
		secretEnd       time.Time
		timed           bool
		before, on, aft Status // one second before t0, at t0, one after
	}{
		{name: "no rule"},
		{name: "starts", from: t0, timed: true, before: NotYet},
		{name: "expires", to: t0, timed: true, on: Expired, aft: Expired},
		{name: "revoked", gone: t0, timed: true, on: Revoked, aft: Revoked},
		{name: "secret ends", secretEnd: t0, timed: true, on: Expired, aft: Expired},
		{name: "revoked before it starts", from: at(9), gone: at(-9), timed: true, before: Revoked, on: Revoked, aft: Revoked},
		{name: "revoked and the secret ended", gone: t0, secretEnd: t0, timed: true, on: Revoked, aft: Revoked},
		{name: "expired before it starts", from: at(9), to: at(1), timed: true, before: NotYet, on: NotYet, aft: Expired},
		{name: "until the year 9999", to: time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC), timed: true},
		{name: "revoked at the epoch", gone: time.Unix(0, 0), timed: true, before: Revoked, on: Revoked, aft: Revoked},
		{name: "revoked long ago", gone: time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC), timed: true, before: Revoked, on: Revoked, aft: Revoked},
		{name: "from the year 9999", from: time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC), timed: true, before: NotYet, on: NotYet, aft: NotYet},
	} {
		l := located("a", rec("", "A", "pro", canary))
		l.NotBefore, l.ExpiresAt, l.RevokedAt, l.Secrets[0].NotAfter = c.from, c.to, c.gone, c.secretEnd
		set := NewSet(1)
		k := mustAdd(t, set, l)
		var ring Ring
		ring.Replace(set, []*Key{k})
		e, ok := ring.Lookup(Sum(canary))
		if !ok {
			t.Fatal("the key is not in the ring")
		}
		if e.Timed() != c.timed || k.Timed() != (c.timed && c.secretEnd.IsZero() || !c.gone.IsZero()) {
			t.Errorf("%s: timed: entry %t, key %t", c.name, e.Timed(), k.Timed())
		}
		for i, want := range []Status{c.before, c.on, c.aft} {
			if got := e.Status(at(i - 1)); got != want {
				t.Errorf("%s: %s at %+d s, want %s", c.name, got, i-1, want)
			}
			if got := k.Status(at(i - 1)); c.secretEnd.IsZero() && got != want {
				t.Errorf("%s: key %s at %+d s, want %s", c.name, got, i-1, want)
			}
		}
	}
}

func TestStatusNames(t *testing.T) {
	for s, want := range map[Status]string{Active: "active", NotYet: "not yet valid", Expired: "expired", Revoked: "revoked", 9: "unknown"} {
		if got := s.String(); got != want {
			t.Errorf("Status(%d) = %q", s, got)
		}
	}
}

// A million keys are a million of these.
func TestKeySize(t *testing.T) {
	if got := unsafe.Sizeof(Key{}); got > 80 {
		t.Errorf("a Key has %d bytes", got)
	}
}
