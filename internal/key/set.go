package key

import (
	"fmt"
	"slices"
)

// Set collects the keys of all sources of one configuration and refuses
// contradictions. It serves only while a configuration is loaded: the ring
// keeps what it needs. It is not safe for concurrent use.
type Set struct {
	members  []member
	byDigest map[Digest]int
	byID     map[string]int
}

type member struct {
	key     *Key
	place   Place
	secrets []Secret
}

// NewSet returns an empty set with room for about hint keys.
func NewSet(hint int) *Set {
	return &Set{
		members:  make([]member, 0, hint),
		byDigest: make(map[Digest]int, hint),
		byID:     make(map[string]int, hint),
	}
}

// Len returns the number of keys.
func (s *Set) Len() int { return len(s.members) }

// Has reports whether a key of the set has the id.
func (s *Set) Has(id string) bool {
	_, ok := s.byID[id]
	return ok
}

// Add puts the record's key into the set. A record that shares a secret with a
// key of the set must state the same name and tier, and the same id or none; it
// is then that key, which gets the record's further secrets, and of the times
// that the two state the stricter ones: no source can let in what another one
// ended. Sources that give ids are therefore added first. Errors name both
// places; after one, the set is as it was. The set keeps l.Secrets.
func (s *Set) Add(l Located) (*Key, error) {
	if err := checkSecrets(l); err != nil {
		return nil, err
	}
	for _, sec := range l.Secrets {
		if i, ok := s.byDigest[sec.Digest]; ok {
			return s.merge(i, l)
		}
	}

	k := &Key{
		ID:        l.ID,
		Name:      l.Name,
		Tier:      l.Tier,
		notBefore: instant(l.NotBefore),
		expiresAt: instant(l.ExpiresAt),
		revokedAt: instant(l.RevokedAt),
	}
	if k.ID == "" {
		k.ID = l.Secrets[0].Digest.ID()
	}
	if i, ok := s.byID[k.ID]; ok {
		return nil, fmt.Errorf("%s and %s are two keys with the same id %q", s.members[i].place, l.Place, k.ID)
	}

	i := len(s.members)
	s.members = append(s.members, member{key: k, place: l.Place, secrets: slices.Clip(l.Secrets)})
	s.byID[k.ID] = i
	for _, sec := range l.Secrets {
		s.byDigest[sec.Digest] = i
	}
	return k, nil
}

// merge adds a record to the member with which it shares a secret.
func (s *Set) merge(i int, l Located) (*Key, error) {
	m := &s.members[i]
	if what := m.difference(l.Record); what != "" {
		return nil, fmt.Errorf("%s and %s state the same secret with a different %s", m.place, l.Place, what)
	}
	for _, sec := range l.Secrets {
		if j, ok := s.byDigest[sec.Digest]; ok && j != i {
			return nil, fmt.Errorf("%s has secrets of two keys, %s and %s", l.Place, m.place, s.members[j].place)
		}
	}
	m.key.notBefore = max(m.key.notBefore, instant(l.NotBefore))
	m.key.expiresAt = earlier(m.key.expiresAt, instant(l.ExpiresAt))
	m.key.revokedAt = earlier(m.key.revokedAt, instant(l.RevokedAt))
	m.secrets = slices.Clone(m.secrets) // they are the record's, which may be added again
	for _, sec := range l.Secrets {
		j := slices.IndexFunc(m.secrets, func(known Secret) bool { return known.Digest == sec.Digest })
		switch {
		case j < 0:
			s.byDigest[sec.Digest] = i
			m.secrets = append(m.secrets, sec)
		case m.secrets[j].NotAfter.IsZero() || !sec.NotAfter.IsZero() && sec.NotAfter.Before(m.secrets[j].NotAfter):
			m.secrets[j].NotAfter = sec.NotAfter
		}
	}
	return m.key, nil
}

// earlier is the stricter of two ends, of which 0 is none.
func earlier(a, b int64) int64 {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// secrets returns the secrets of a key of the set, which is probably number
// guess. A key that the set did not make has none here, so it can open nothing.
func (s *Set) secrets(k *Key, guess int) []Secret {
	if guess < len(s.members) && s.members[guess].key == k {
		return s.members[guess].secrets
	}
	if i, ok := s.byID[k.ID]; ok && s.members[i].key == k {
		return s.members[i].secrets
	}
	return nil
}

// difference returns the first field in which the record contradicts the key.
func (m *member) difference(r Record) string {
	k := m.key
	switch {
	case r.ID != "" && r.ID != k.ID:
		return "id"
	case r.Name != k.Name:
		return "name"
	case r.Tier != k.Tier:
		return "tier"
	}
	return ""
}

func checkSecrets(l Located) error {
	if len(l.Secrets) == 1 {
		return nil // nearly every key: no map needed
	}
	if len(l.Secrets) == 0 {
		return fmt.Errorf("%s: expected at least one secret", l.Place)
	}
	seen := make(map[Digest]bool, len(l.Secrets))
	for _, sec := range l.Secrets {
		if seen[sec.Digest] {
			return fmt.Errorf("%s states the same secret twice", l.Place)
		}
		seen[sec.Digest] = true
	}
	return nil
}
