package key

import (
	"maps"
	"sync/atomic"
)

// Ring finds the key of a secret by its digest. Lookup never waits. The shards,
// one for each first byte of a digest, are maps that never change: a writer
// puts another in place. The zero Ring is empty.
type Ring struct {
	shards [256]atomic.Pointer[map[Digest]Entry]
}

// Lookup returns the entry of the secret with the digest. How long it takes
// tells nothing about other secrets: nobody can steer a digest, and Go's maps
// are seeded at random.
func (r *Ring) Lookup(d Digest) (Entry, bool) {
	shard := r.shards[d[0]].Load()
	if shard == nil {
		return Entry{}, false
	}
	e, ok := (*shard)[d]
	return e, ok
}

// Len returns the number of secrets.
func (r *Ring) Len() int {
	n := 0
	for i := range r.shards {
		if shard := r.shards[i].Load(); shard != nil {
			n += len(*shard)
		}
	}
	return n
}

// Replace makes the given keys of the set the whole content of the ring. Shards
// that do not change stay as they are, and a key that says the same as before
// stays the same *Key, with its Slots. Calls must not overlap; a concurrent
// Lookup sees each shard either before or after.
func (r *Ring) Replace(s *Set, keys []*Key) {
	secrets := make([][]Secret, len(keys))
	var sizes [len(r.shards)]int
	for i, k := range keys {
		secrets[i] = s.secrets(k, i)
		for _, sec := range secrets[i] {
			sizes[sec.Digest[0]]++
		}
	}
	var next [len(r.shards)]map[Digest]Entry
	for i, n := range sizes {
		if n > 0 {
			next[i] = make(map[Digest]Entry, n)
		}
	}
	for i, k := range keys {
		k = r.kept(k, secrets[i])
		for _, sec := range secrets[i] {
			next[sec.Digest[0]][sec.Digest] = Entry{Key: k, NotAfter: instant(sec.NotAfter)}
		}
	}
	for i, shard := range next {
		var old map[Digest]Entry
		if p := r.shards[i].Load(); p != nil {
			old = *p
		}
		if !maps.Equal(old, shard) {
			r.shards[i].Store(&shard)
		}
	}
}

// kept returns the ring's own Key if it says the same as k.
func (r *Ring) kept(k *Key, secrets []Secret) *Key {
	for _, sec := range secrets {
		if e, ok := r.Lookup(sec.Digest); ok && e.Key.same(k) {
			return e.Key
		}
	}
	return k
}
