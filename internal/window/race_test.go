package window

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestConcurrentAdmitsExactlyN(t *testing.T) {
	for _, n := range []int{1, 10, 100} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			l := mustLimits(t, 0, Limit{n, time.Minute}, Limit{n + 5, time.Hour})
			var s State
			var admitted atomic.Int64
			inParallel(200, func(g int) {
				for i := range 50 {
					// All within one window, and far from in order.
					now := Tick((g*7919 + i*104729) % int(60*second))
					if s.Admit(now, l).Outcome == Admitted {
						admitted.Add(1)
					}
				}
			})
			if got := admitted.Load(); got != int64(n) || s.InFlight() != n {
				t.Errorf("%d admitted, %d in flight, want %d", got, s.InFlight(), n)
			}
		})
	}
}

func TestConcurrentSlots(t *testing.T) {
	const slots = 7
	l := mustLimits(t, slots, Limit{1_000_000, time.Minute})
	var s State
	var inside, admitted atomic.Int64
	inParallel(200, func(int) {
		for range 100 {
			if s.Admit(0, l).Outcome != Admitted {
				continue
			}
			admitted.Add(1)
			if got := inside.Add(1); got > slots {
				t.Errorf("%d at once, want at most %d", got, slots)
			}
			inside.Add(-1)
			s.Release()
		}
	})
	if admitted.Load() < slots || s.InFlight() != 0 {
		t.Errorf("%d admitted in all, %d left in flight", admitted.Load(), s.InFlight())
	}
}

// Time goes by, and callers with different limits share one log: whoever is
// admitted at t, under N, must have found fewer than N in the window before.
// This is where a stale block, or one kept for other limits, would show.
func TestConcurrentLimitsOnOneLog(t *testing.T) {
	type admission struct {
		at    Tick
		limit int
	}
	window := Tick(1_000_000)
	limits := []*Limits{
		mustLimits(t, 0, Limit{3, time.Second}),
		mustLimits(t, 0, Limit{10, time.Second}),
		mustLimits(t, 0, Limit{30, time.Second}, Limit{1_000_000, time.Hour}),
	}
	var (
		s     State
		clock atomic.Int64
		mu    sync.Mutex
		all   []admission
	)
	inParallel(30, func(g int) {
		l := limits[g%3]
		var own []admission
		for range 3000 {
			now := Tick(clock.Add(997))
			if v := s.Admit(now, l); v.Outcome == Admitted {
				s.Release()
				own = append(own, admission{v.At, l.Requests()[0].Requests})
			} else if v.Wait <= 0 || v.Reset <= 0 || v.Reset > v.Wait {
				t.Errorf("refused with %+v", v)
			}
		}
		mu.Lock()
		all = append(all, own...)
		mu.Unlock()
	})
	slices.SortFunc(all, func(a, b admission) int { return int(a.at - b.at) })
	first := 0
	for i, a := range all {
		for all[first].at <= a.at-window {
			first++
		}
		same := i // of those at the very same tick the order is not known
		for same > first && all[same-1].at == a.at {
			same--
		}
		if same-first >= a.limit {
			t.Fatalf("admitted at %d under %d with %d in the window", a.at, a.limit, same-first)
		}
		if i-first >= 30 {
			t.Fatalf("%d in the window up to %d, want at most 30", i-first+1, a.at)
		}
	}
	// Somebody asks all the time, so even under the lowest limit each window fills.
	if seconds := int(clock.Load()) / int(window); len(all) < 3*seconds {
		t.Errorf("%d admitted in %d s, want at least 3 in each", len(all), seconds)
	}
}

// Every admission is refunded, so none may be refused for good.
func TestConcurrentRefunds(t *testing.T) {
	l := mustLimits(t, 0, Limit{5, time.Minute}, Limit{5, time.Hour})
	var s State
	var clock atomic.Int64
	inParallel(50, func(int) {
		for range 500 {
			if v := s.Admit(Tick(clock.Add(1)), l); v.Outcome == Admitted {
				s.Refund(v.At, l)
				s.Release()
			}
		}
	})
	want := Verdict{At: Tick(clock.Load()), Limit: 1, Remaining: 4, Reset: time.Hour}
	if v := s.Admit(want.At, l); v != want {
		t.Errorf("after all refunds: %+v, want %+v", v, want)
	}
}

func inParallel(n int, f func(i int)) {
	var ready, done sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		ready.Add(1)
		done.Go(func() {
			ready.Done()
			<-start
			f(i)
		})
	}
	ready.Wait()
	close(start)
	done.Wait()
}
