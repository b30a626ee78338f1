package key

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestRingEmpty(t *testing.T) {
	var r Ring
	if e, ok := r.Lookup(Sum("a")); ok || e != (Entry{}) || r.Len() != 0 {
		t.Errorf("%v, %t, %d", e, ok, r.Len())
	}
}

func TestRingReplaceKeepsWhatDidNotChange(t *testing.T) {
	var r Ring
	load := func(recs ...Record) []*Key {
		set := NewSet(len(recs))
		var keys []*Key
		for i, rc := range recs {
			keys = append(keys, mustAdd(t, set, Located{rc, Place{"file", i}}))
		}
		r.Replace(set, keys)
		return keys
	}
	find := func(s string) *Key {
		e, _ := r.Lookup(Sum(s))
		return e.Key
	}
	first := load(rec("", "A", "pro", "a"), rec("k_b", "B", "pro", "b"), rec("", "C", "pro", "c"))
	for i, s := range []string{"a", "b", "c"} {
		if find(s) != first[i] {
			t.Fatalf("%s is not in the ring", s)
		}
	}
	shard := r.shards[Sum("a")[0]].Load()

	second := load(rec("", "A", "pro", "a"), rec("k_b", "B", "pro", "b", "b2"), rec("", "C", "free", "c"))
	if find("a") != first[0] || r.shards[Sum("a")[0]].Load() != shard {
		t.Error("a did not change, but is another key or shard")
	}
	if find("b") != first[1] || find("b2") != first[1] {
		t.Error("b got a further secret: both must be the key that was")
	}
	if find("c") != second[2] {
		t.Error("c changed its tier, but is the old key")
	}

	load(rec("k_b", "B", "pro", "b2"))
	if find("a") != nil || find("b") != nil || find("c") != nil || find("b2") != first[1] || r.Len() != 1 {
		t.Error("the removed secrets are still in the ring, or b2 is not")
	}
	load()
	if r.Len() != 0 {
		t.Error("the ring is not empty")
	}
}

func TestRingIsLikeAMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var ring Ring
		secret := rapid.IntRange(0, 40)
		for range rapid.IntRange(1, 5).Draw(t, "loads") {
			set := NewSet(0)
			var keys []*Key
			want := make(map[Digest]Entry)
			for i := range rapid.IntRange(0, 30).Draw(t, "keys") {
				r := Record{ID: fmt.Sprintf("k_%d", i), Name: rapid.SampledFrom([]string{"A", "B"}).Draw(t, "name")}
				if rapid.Bool().Draw(t, "expires") {
					r.ExpiresAt = time.Unix(2e9, 0)
				}
				for _, n := range rapid.SliceOfN(secret, 1, 3).Draw(t, "secrets") {
					r.Secrets = append(r.Secrets, Secret{Digest: Sum(fmt.Sprint(n))})
					if rapid.Bool().Draw(t, "ends") {
						r.Secrets[len(r.Secrets)-1].NotAfter = time.Unix(1e9, 0)
					}
				}
				k, err := set.Add(located(r.ID, r))
				if err != nil {
					continue // a secret of another key
				}
				keys = append(keys, k)
				for _, s := range r.Secrets {
					want[s.Digest] = Entry{k, instant(s.NotAfter)}
				}
			}
			ring.Replace(set, keys)
			if ring.Len() != len(want) {
				t.Fatalf("%d secrets, want %d", ring.Len(), len(want))
			}
			for n := range 41 {
				d := Sum(fmt.Sprint(n))
				got, ok := ring.Lookup(d)
				w, wantOK := want[d]
				if ok != wantOK || got.NotAfter != w.NotAfter || ok && !got.Key.same(w.Key) {
					t.Fatalf("secret %d: got %+v, %t, want %+v, %t", n, got, ok, w, wantOK)
				}
			}
		}
	})
}

// While the content is replaced again and again, a key that stays is always found.
func TestRingConcurrent(t *testing.T) {
	load := func(r *Ring, from, to int) {
		set := NewSet(to - from + 100)
		var keys []*Key
		for i := range 100 {
			keys = append(keys, mustAdd(t, set, located("", rec("", "stays", "pro", fmt.Sprint("stays", i)))))
		}
		for i := from; i < to; i++ {
			keys = append(keys, mustAdd(t, set, located("", rec("", "goes", "pro", fmt.Sprint(i)))))
		}
		r.Replace(set, keys)
	}
	var r Ring
	load(&r, 0, 100)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := g; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				if e, ok := r.Lookup(Sum(fmt.Sprint("stays", i%100))); !ok || e.Key.Name != "stays" {
					t.Errorf("key %d was not found", i%100)
					return
				}
				if e, ok := r.Lookup(Sum(fmt.Sprint(i % 300))); ok && e.Key.Name != "goes" {
					t.Errorf("secret %d is of another key", i%300)
					return
				}
				runtime.Gosched()
			}
		})
	}
	for i := range 60 {
		load(&r, i%3*100, i%3*100+100+i)
	}
	close(done)
	wg.Wait()
}

func ringOf(tb testing.TB, n int) (*Ring, []Digest) {
	set := NewSet(n)
	keys := make([]*Key, n)
	digests := make([]Digest, n)
	for i := range n {
		digests[i] = Sum(fmt.Sprint(i))
		keys[i] = mustAdd(tb, set, located("", Record{Name: "customer of a shop", Tier: "pro", Secrets: []Secret{{Digest: digests[i]}}}))
	}
	var r Ring
	r.Replace(set, keys)
	rand.Shuffle(n, func(i, j int) { digests[i], digests[j] = digests[j], digests[i] })
	return &r, digests
}

func BenchmarkLookup(b *testing.B) {
	for _, n := range []int{1_000, 100_000, 1_000_000} {
		r, digests := ringOf(b, n)
		b.Run(fmt.Sprintf("keys=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if _, ok := r.Lookup(digests[i]); !ok {
					b.Fatal("not found")
				}
				if i++; i == n {
					i = 0
				}
			}
		})
		b.Run(fmt.Sprintf("miss/keys=%d", n), func(b *testing.B) {
			d := Sum("unknown")
			for b.Loop() {
				d[0]++
				d[9]++
				if _, ok := r.Lookup(d); ok {
					b.Fatal("found")
				}
			}
		})
	}
}

// load is what the root package does with a key file.
func load(tb testing.TB, data []byte, r *Ring) {
	recs, err := ParseFile(bytes.NewReader(data))
	if err != nil {
		tb.Fatal(err)
	}
	set := NewSet(len(recs))
	keys := make([]*Key, len(recs))
	for i, rc := range recs {
		if keys[i], err = set.Add(Located{rc, Place{"key file keys.json", i}}); err != nil {
			tb.Fatal(err)
		}
	}
	r.Replace(set, keys)
}

// One million keys must load in under three seconds.
func BenchmarkLoad(b *testing.B) {
	data := keyFile(1_000_000)
	b.Run("first", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var r Ring
			load(b, data, &r)
		}
	})
	b.Run("again", func(b *testing.B) {
		var r Ring
		load(b, data, &r)
		for b.Loop() {
			load(b, data, &r)
		}
	})
	b.Run("parse", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			if _, err := ParseFile(bytes.NewReader(data)); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// An idle key, with its entry, id and name, must take at most 300 bytes.
func BenchmarkIdleKey(b *testing.B) {
	for _, n := range []int{1_000, 10_000, 100_000, 120_000, 1_000_000} {
		b.Run(fmt.Sprintf("keys=%d", n), func(b *testing.B) {
			data := keyFile(n)
			var before, after runtime.MemStats
			for b.Loop() {
				var r Ring
				runtime.GC()
				runtime.ReadMemStats(&before)
				load(b, data, &r)
				runtime.GC()
				runtime.ReadMemStats(&after)
				runtime.KeepAlive(&r)
			}
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n), "B/key")
			runtime.KeepAlive(data)
		})
	}
}
