package window

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"
)

// The benchmarks make time go by one millisecond a request, so that logs are
// pruned as fast as they fill.
const perRequest = 1000

func BenchmarkAdmitRelease(b *testing.B) {
	b.Run("one key", func(b *testing.B) {
		benchmarkKeys(b, 1, minute(b, 100_000))
	})
	b.Run("1000 random keys", func(b *testing.B) {
		benchmarkKeys(b, 1000, minute(b, 100_000))
	})
	b.Run("one key, minute and day", func(b *testing.B) {
		benchmarkKeys(b, 1, mustLimits(b, 4, Limit{100_000, time.Minute}, Limit{100_000_000, 24 * time.Hour}))
	})
	b.Run("never dropping", func(b *testing.B) {
		l := minute(b, 1_000_000_000)
		var s State
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			s.Admit(1, l)
			s.Release()
			if i&1023 == 1023 {
				s = State{}
			}
		}
	})
}

func benchmarkKeys(b *testing.B, keys int, l *Limits) {
	states := make([]State, keys)
	order := make([]uint16, 1<<14)
	for i := range order {
		order[i] = uint16(rand.IntN(keys))
	}
	b.ReportAllocs()
	now := Tick(0)
	for i := 0; b.Loop(); i++ {
		now += perRequest
		s := &states[order[i&(1<<14-1)]]
		if s.Admit(now, l).Outcome == Admitted {
			s.Release()
		}
	}
}

func BenchmarkRefusal(b *testing.B) {
	l := minute(b, 1)
	var s State
	s.Admit(0, l)
	b.ReportAllocs()
	for b.Loop() {
		if s.Admit(1, l).Outcome != WindowFull {
			b.Fatal("admitted")
		}
	}
}

func BenchmarkParallel(b *testing.B) {
	for name, keys := range map[string]int{"one key": 1, "1000 keys": 1000} {
		b.Run(name, func(b *testing.B) {
			l := minute(b, 100_000)
			states := make([]*State, keys)
			for i := range states {
				states[i] = new(State)
			}
			var seed atomic.Uint64
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				r := rand.New(rand.NewPCG(1, seed.Add(1)))
				now := Tick(0)
				for pb.Next() {
					now += perRequest
					s := states[r.IntN(keys)]
					if s.Admit(now, l).Outcome == Admitted {
						s.Release()
					}
				}
			})
		})
	}
	b.Run("refusal", func(b *testing.B) {
		l := minute(b, 1)
		var s State
		s.Admit(0, l)
		s.Admit(1, l)
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				s.Admit(1, l)
			}
		})
	})
}
