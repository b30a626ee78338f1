// Package key knows API keys: the form of their secrets, where they are stated,
// and the keyring that finds a key by the digest of its secret.
package key

import (
	"math"
	"sync/atomic"
	"time"
)

// Key is what the running guard knows of a key. It never changes, but for
// Slots; a key whose record changes is a new Key with the same ID.
type Key struct {
	ID, Name, Tier string

	notBefore, expiresAt, revokedAt int64 // unix nanoseconds, 0: no such rule

	// Slots is the limiter's cache of this key's state in each zone, which
	// lets a request skip a map. Nothing depends on it being filled.
	Slots atomic.Pointer[[]Slot]
}

// Slot is the state of one key with one owner.
type Slot struct {
	Owner, State any
}

// Status says whether a key may be used.
type Status uint8

// The states of a key or secret. Of several that hold, the one that lasts wins:
// Revoked, then Expired, then NotYet.
const (
	Active Status = iota
	NotYet
	Expired
	Revoked
)

func (s Status) String() string {
	switch s {
	case Active:
		return "active"
	case NotYet:
		return "not yet valid"
	case Expired:
		return "expired"
	case Revoked:
		return "revoked"
	}
	return "unknown"
}

// Timed reports whether the key has any rule about time. Without one, Status
// is always Active and the caller need not read the clock.
func (k *Key) Timed() bool {
	return k.notBefore|k.expiresAt|k.revokedAt != 0
}

// Status returns the state of the key at now, the wall clock.
func (k *Key) Status(now time.Time) Status {
	t := instant(now)
	switch {
	case k.revokedAt != 0 && t >= k.revokedAt:
		return Revoked
	case k.expiresAt != 0 && t >= k.expiresAt:
		return Expired
	case t < k.notBefore:
		return NotYet
	}
	return Active
}

// same reports whether the two say the same.
func (k *Key) same(o *Key) bool {
	return k.ID == o.ID && k.Name == o.Name && k.Tier == o.Tier &&
		k.notBefore == o.notBefore && k.expiresAt == o.expiresAt && k.revokedAt == o.revokedAt
}

// Entry is what the ring holds for one secret.
type Entry struct {
	Key      *Key
	NotAfter int64 // unix nanoseconds at which this secret ends, 0: never
}

// Timed reports whether the secret or its key has any rule about time.
func (e Entry) Timed() bool { return e.NotAfter != 0 || e.Key.Timed() }

// Status returns the state of the key for a caller with this secret. A secret
// that has ended is Expired.
func (e Entry) Status(now time.Time) Status {
	s := e.Key.Status(now)
	if s != Revoked && e.NotAfter != 0 && instant(now) >= e.NotAfter {
		return Expired
	}
	return s
}

// maxInstant is the last second whose nanoseconds an int64 holds, in the year 2262.
const maxInstant = math.MaxInt64/int64(time.Second) - 1

// instant returns t in unix nanoseconds, and 0 only for the zero time. Times
// out of range become the nearest one in range: "9999-12-31" must stay in the
// future, and a revocation in 1970 must stay a revocation.
func instant(t time.Time) int64 {
	switch s := t.Unix(); {
	case t.IsZero():
		return 0
	case s > maxInstant:
		return math.MaxInt64
	case s < 0:
		return 1
	}
	return max(t.UnixNano(), 1)
}
