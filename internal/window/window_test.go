package window

import (
	"math"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"
)

const second = Tick(1_000_000)

func mustLimits(tb testing.TB, concurrent int, requests ...Limit) *Limits {
	tb.Helper()
	l, err := NewLimits(requests, concurrent)
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

func minute(tb testing.TB, n int) *Limits {
	tb.Helper()
	return mustLimits(tb, 0, Limit{n, time.Minute})
}

func TestNewLimits(t *testing.T) {
	for _, test := range []struct {
		name       string
		requests   []Limit
		concurrent int
		wantErr    string
	}{
		{"one", []Limit{{1, time.Second}}, 0, ""},
		{"largest", []Limit{{1_000_000_000, 366 * 24 * time.Hour}}, math.MaxInt, ""},
		{"none", nil, 5, "at least one"},
		{"negative slots", []Limit{{1, time.Second}}, -1, "concurrent -1"},
		{"no requests", []Limit{{0, time.Second}}, 0, "0 requests in 1s"},
		{"too many requests", []Limit{{1_000_000_001, time.Second}}, 0, "1000000001 requests"},
		{"no window", []Limit{{1, 0}}, 0, "window of whole seconds"},
		{"negative window", []Limit{{1, -time.Minute}}, 0, "window of whole seconds"},
		{"short window", []Limit{{1, 999 * time.Millisecond}}, 0, "window of whole seconds"},
		{"broken window", []Limit{{1, 1500 * time.Millisecond}}, 0, "window of whole seconds"},
		{"long window", []Limit{{1, 366*24*time.Hour + time.Second}}, 0, "window of whole seconds"},
		{"twice", []Limit{{1, time.Minute}, {2, time.Hour}, {3, 60 * time.Second}}, 0, "limited twice, to 1 and to 3"},
	} {
		t.Run(test.name, func(t *testing.T) {
			l, err := NewLimits(test.requests, test.concurrent)
			if test.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), test.wantErr) {
					t.Fatalf("error %v, want one with %q", err, test.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(l.Requests(), test.requests) || l.Concurrent() != test.concurrent {
				t.Errorf("got %v, %d", l.Requests(), l.Concurrent())
			}
		})
	}
}

func TestNewLimitsSortsACopy(t *testing.T) {
	given := []Limit{{5000, 24 * time.Hour}, {5, time.Second}, {300, time.Minute}}
	l := mustLimits(t, 20, given...)
	given[0].Requests = 1
	want := []Limit{{5, time.Second}, {300, time.Minute}, {5000, 24 * time.Hour}}
	if !slices.Equal(l.Requests(), want) {
		t.Errorf("got %v, want %v", l.Requests(), want)
	}
}

// Every window that can be configured: ages of two windows fit 32 bits, no
// finer unit would do, and no other window has the same scale.
func TestScales(t *testing.T) {
	var before scale
	for w := time.Second; w <= maxWindow; w += time.Second {
		c := scaleOf(w)
		us := uint64(w.Microseconds())
		if units := (us + 1<<c.shift - 1) >> c.shift; units != uint64(c.span) || 2*units >= 1<<32 {
			t.Fatalf("%v: span %d of unit 1<<%d, want %d", w, c.span, c.shift, units)
		}
		if c.shift > 0 && 2*us>>(c.shift-1) < 1<<32 {
			t.Fatalf("%v: a unit of 1<<%d would do", w, c.shift-1)
		}
		if c.shift < before.shift || c.shift == before.shift && c.span <= before.span {
			t.Fatalf("%v: scale %v after %v", w, c, before)
		}
		before = c
	}
	if before.shift != 14 {
		t.Errorf("unit of the longest window 1<<%d, want 1<<14", before.shift)
	}
}

func TestBoundary(t *testing.T) {
	for _, test := range []struct {
		window time.Duration
		unit   Tick
	}{
		{time.Second, 1},
		{time.Minute, 1},
		{2147 * time.Second, 1}, // the longest in microseconds
		{2148 * time.Second, 2},
		{time.Hour, 2},
		{24 * time.Hour, 64},
		{maxWindow, 1 << 14},
	} {
		t.Run(test.window.String(), func(t *testing.T) {
			l := mustLimits(t, 0, Limit{1, test.window})
			w := Tick(test.window.Microseconds())
			// At a whole unit nothing is rounded; just after one, all of it is.
			for _, start := range []Tick{0, 1, test.unit, 7*test.unit + 1, 1<<32 - 1, 1 << 32, 1<<32*test.unit + 1, 1 << 50} {
				up := (start + test.unit - 1) / test.unit * test.unit
				out := up + (w+test.unit-1)/test.unit*test.unit
				if late := out - start - w; late < 0 || late >= 2*test.unit {
					t.Fatalf("the test's own instant is %d ticks late", late)
				}
				for _, step := range []struct {
					at   Tick
					want Outcome
				}{
					{start, WindowFull},
					{start + w - 1, WindowFull},
					{out - 1, WindowFull},
					{out, Admitted},
					{out + 1, Admitted},
					{start + 2*w + 2*test.unit, Admitted},
				} {
					var s State
					if v := s.Admit(start, l); v.Outcome != Admitted || v.Reset != test.window {
						t.Fatalf("first: %+v", v)
					}
					if v := s.Admit(step.at, l); v.Outcome != step.want {
						t.Errorf("start %d, at +%d: %+v, want outcome %d", start, step.at-start, v, step.want)
					}
				}
				var s State
				s.Admit(start, l)
				v := s.Admit(start+1, l)
				if got := v.At + Tick(v.Wait.Microseconds()); got != out {
					t.Errorf("start %d: wait until +%d, want +%d", start, got-start, out-start)
				}
			}
		})
	}
}

// A limiter that reads the clock twice, or treats an age of exactly one
// window as neither in nor out, lets requests pass uncounted at the boundary.
func TestFrozenClockAtBoundary(t *testing.T) {
	const n = 2
	l := minute(t, n)
	var s State
	for round := range Tick(3) {
		admitted := 0
		for range 1000 {
			if s.Admit(round*60*second, l).Outcome == Admitted {
				admitted++
			}
		}
		if admitted != n {
			t.Errorf("round %d: %d of 1000 admitted at one instant, want %d", round, admitted, n)
		}
	}
}

func TestRaisedLimitOpensAtOnce(t *testing.T) {
	two, four := minute(t, 2), minute(t, 4)
	var s State
	s.Admit(0, two)
	s.Admit(second, two)
	if v := s.Admit(2*second, two); v.Outcome != WindowFull {
		t.Fatalf("third under 2: %+v", v)
	}
	for i, remaining := range []int{1, 0} {
		want := Verdict{At: 2 * second, Remaining: remaining, Reset: 58 * time.Second}
		if v := s.Admit(2*second, four); v != want {
			t.Fatalf("%d. under 4: %+v, want %+v", i+3, v, want)
		}
	}
	want := Verdict{Outcome: WindowFull, At: 2 * second, Reset: 58 * time.Second, Wait: 58 * time.Second}
	if v := s.Admit(2*second, four); v != want {
		t.Errorf("fifth under 4: %+v, want %+v", v, want)
	}
}

func TestLoweredLimitWaitsForItsPlace(t *testing.T) {
	ten, three := minute(t, 10), minute(t, 3)
	var s State
	for i := range Tick(10) {
		s.Admit(i*second, ten)
	}
	// Eight of ten must leave before fewer than three are left.
	want := Verdict{Outcome: WindowFull, At: 9 * second, Reset: 51 * time.Second, Wait: 58 * time.Second}
	v := s.Admit(9*second, three)
	if v != want {
		t.Fatalf("got %+v, want %+v", v, want)
	}
	open := v.At + Tick(v.Wait.Microseconds())
	if v := s.Admit(open-1, three); v.Outcome != WindowFull {
		t.Errorf("just before: %+v", v)
	}
	if v := s.Admit(open, three); v.Outcome != Admitted || v.Remaining != 0 {
		t.Errorf("after the wait: %+v", v)
	}
	// The two calls before belong to three; ten still sees the whole log.
	if v := s.Admit(open, ten); v.Outcome != Admitted || v.Remaining != 6 {
		t.Errorf("under 10: %+v", v)
	}
}

func TestHeadersSpeakOfTheTightestWindow(t *testing.T) {
	tie := mustLimits(t, 0, Limit{2, time.Minute}, Limit{2, time.Hour}, Limit{9, 24 * time.Hour})
	var s State
	want := Verdict{Limit: 1, Remaining: 1, Reset: time.Hour}
	if v := s.Admit(0, tie); v != want {
		t.Errorf("tie: %+v, want %+v", v, want)
	}
	short := mustLimits(t, 0, Limit{2, time.Minute}, Limit{5, time.Hour})
	want = Verdict{At: second, Remaining: 0, Reset: 59 * time.Second}
	if v := s.Admit(second, short); v != want {
		t.Errorf("short: %+v, want %+v", v, want)
	}
	// The minute has room again at 60 s, the hour of tie a while later.
	v := s.Admit(2*second, tie)
	if v.Outcome != WindowFull || v.Limit != 1 || v.Reset != time.Hour-2*time.Second || v.Wait != v.Reset {
		t.Errorf("both full: %+v", v)
	}
}

func TestRefusalsCostNothing(t *testing.T) {
	l := mustLimits(t, 1, Limit{2, time.Minute}, Limit{3, time.Hour})
	var s State
	s.Admit(0, l)
	for range 100 {
		want := Verdict{Outcome: Busy, Limit: 0, Remaining: 1, Reset: time.Minute}
		if v := s.Admit(0, l); v != want {
			t.Fatalf("busy: %+v, want %+v", v, want)
		}
	}
	s.Release()
	if v := s.Admit(0, l); v.Outcome != Admitted {
		t.Fatalf("second: %+v", v)
	}
	for range 100 { // slots are taken too: the window counts
		if v := s.Admit(0, l); v.Outcome != WindowFull {
			t.Fatalf("full: %+v", v)
		}
	}
	s.Release()
	if v := s.Admit(60*second, l); v.Outcome != Admitted || v.Limit != 1 || v.Remaining != 0 {
		t.Errorf("third of the hour: %+v", v)
	}
}

func TestBusyWithEmptyLog(t *testing.T) {
	l := mustLimits(t, 1, Limit{5, time.Minute})
	var s State
	s.Admit(0, l)
	want := Verdict{Outcome: Busy, At: 60 * second, Remaining: 5}
	if v := s.Admit(60*second, l); v != want {
		t.Errorf("got %+v, want %+v", v, want)
	}
}

func TestSlotsAreCountedWithoutACap(t *testing.T) {
	open := minute(t, 10)
	capped := mustLimits(t, 2, Limit{10, time.Minute})
	var s State
	s.Admit(0, open)
	s.Admit(0, open)
	if v := s.Admit(0, capped); v.Outcome != Busy {
		t.Errorf("with two in flight: %+v", v)
	}
	s.Release()
	if v := s.Admit(0, capped); v.Outcome != Admitted || s.InFlight() != 2 {
		t.Errorf("with one: %+v, then %d in flight", v, s.InFlight())
	}
}

func TestInFlightDoesNotOverflow(t *testing.T) {
	for _, l := range []*Limits{minute(t, 10), mustLimits(t, math.MaxInt, Limit{10, time.Minute})} {
		var s State
		s.inFlight.Store(math.MaxInt32 - 1)
		if v := s.Admit(0, l); v.Outcome != Admitted {
			t.Errorf("last slot: %+v", v)
		}
		if v := s.Admit(0, l); v.Outcome != Busy || s.InFlight() != math.MaxInt32 {
			t.Errorf("no slot left: %+v, %d in flight", v, s.InFlight())
		}
	}
}

func TestReleaseWithoutAdmissionPanics(t *testing.T) {
	var s State
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
		if s.InFlight() != 0 {
			t.Errorf("%d in flight, want 0", s.InFlight())
		}
	}()
	s.Release()
}

func TestRefund(t *testing.T) {
	l := mustLimits(t, 0, Limit{2, time.Minute}, Limit{9, time.Hour})
	var s State
	first := s.Admit(0, l)
	s.Admit(second, l)
	if v := s.Admit(2*second, l); v.Outcome != WindowFull {
		t.Fatalf("third: %+v", v)
	}
	s.Refund(first.At, l)
	if s.InFlight() != 2 {
		t.Errorf("%d in flight after a refund, want 2", s.InFlight())
	}
	want := Verdict{At: 2 * second, Remaining: 0, Reset: 59 * time.Second}
	if v := s.Admit(2*second, l); v != want {
		t.Errorf("after the refund: %+v, want %+v", v, want)
	}
	if v := s.Admit(2*second, l); v.Outcome != WindowFull || v.Wait != 59*time.Second {
		t.Errorf("full again: %+v", v)
	}
}

func TestIdle(t *testing.T) {
	l := mustLimits(t, 0, Limit{1, time.Second}, Limit{9, time.Hour})
	hour := 3600 * second
	must := func(s *State, now Tick, want bool) {
		t.Helper()
		if got := s.Idle(now); got != want {
			t.Errorf("at %d: %t, want %t", now, got, want)
		}
	}
	var s State
	must(&s, 0, true)
	s.Admit(second, l)
	must(&s, second, false)
	s.Release()
	must(&s, 2*second, false)        // out of the second, in the hour
	must(&s, second+hour-1, false)   // the last tick of it
	must(&s, second+hour+1000, true) // an hour is counted in units of two ticks
	must(&s, 0, true)                // what has left does not come back

	s = State{}
	s.Admit(0, l)
	must(&s, 2*hour, false) // a stream goes on
	s.Release()
	must(&s, 2*hour, true)

	s = State{}
	v := s.Admit(0, l)
	s.Release()
	if s.Admit(1, l).Outcome != WindowFull {
		t.Fatal("the second is not full")
	}
	s.Refund(v.At, l)
	must(&s, 2, true) // nothing was charged

	// A refusal that is remembered does not outlast the look.
	s = State{}
	s.Admit(0, l)
	s.Release()
	s.Admit(1, l)
	must(&s, second, false)
	if got := s.Admit(1, l); got.Outcome != Admitted || got.At != second {
		t.Errorf("overtaken by the look: %+v", got)
	}
}

// Once the 32 bits of the offsets have gone round, an old admission and a live
// one look the same in the log; only the live one may be taken out as itself.
func TestRefundAfterTheWindow(t *testing.T) {
	l := minute(t, 1)
	var s State
	old := s.Admit(5, l)
	live := s.Admit(5+1<<32, l)
	s.Refund(old.At, l)
	s.Refund(live.At+1<<32, l) // a time that is still to come
	if v := s.Admit(live.At, l); v.Outcome != WindowFull {
		t.Errorf("the live admission was taken out: %+v", v)
	}
	s.Refund(live.At, l)
	if v := s.Admit(live.At, l); v.Outcome != Admitted {
		t.Errorf("after its own refund: %+v", v)
	}
}

// A window not asked about for a long time must not come back to life.
func TestUnusedWindowGoesStale(t *testing.T) {
	both := mustLimits(t, 0, Limit{3, time.Second}, Limit{1, time.Minute})
	short := mustLimits(t, 0, Limit{3, time.Second})
	var s State
	s.Admit(7, both)
	for now := Tick(7); now < 1<<32; now += 50 * second {
		s.Admit(now, short)
	}
	if v := s.Admit(8+1<<32, both); v.Outcome != Admitted {
		t.Errorf("after 2^32 ticks: %+v", v)
	}
}

func TestRingGivesBackAfterIdling(t *testing.T) {
	l := minute(t, 1000)
	for _, idle := range []Tick{60*second + 1, 1 << 40} {
		var s State
		for range 1000 {
			s.Admit(0, l)
		}
		if got := len(s.first.ring); got != 1000 {
			t.Errorf("full ring has %d places, want 1000", got)
		}
		s.Admit(idle, l)
		if got := len(s.first.ring); got != minRing {
			t.Errorf("ring after %d has %d places, want %d", idle, got, minRing)
		}
	}
}

func TestMemory(t *testing.T) {
	if got := unsafe.Sizeof(State{}); got > 80 {
		t.Errorf("a State is %d bytes, want at most 80", got)
	}
	for _, test := range []struct {
		name        string
		limit       int
		most, total uint64
	}{
		{"a full log of 100", 100, 512, 0},
		{"100 of 100,000,000", 100_000_000, 0, 4 << 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			const keys = 1000
			l := minute(t, test.limit)
			states := make([]*State, keys)
			before := heap()
			for i := range states {
				states[i] = new(State)
				for range 100 {
					if states[i].Admit(Tick(i), l).Outcome != Admitted {
						t.Fatal("not admitted")
					}
				}
			}
			used := heap() - before
			runtime.KeepAlive(states)
			t.Logf("%d bytes a key", used/keys)
			if test.most > 0 && used > test.most*keys {
				t.Errorf("%d bytes a key, want at most %d", used/keys, test.most)
			}
			if test.total > 0 && used > test.total {
				t.Errorf("%d bytes, want at most %d", used, test.total)
			}
		})
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestNoAllocations(t *testing.T) {
	l := mustLimits(t, 5, Limit{50, time.Second}, Limit{100_000, time.Hour})
	full := minute(t, 1)
	var s, refusing State
	refusing.Admit(0, full)
	refusing.Admit(0, full)
	now := Tick(0)
	// 50 a second for more than an hour: the hour's ring is at its largest.
	step := func() {
		now += second / 50
		if s.Admit(now, l).Outcome == Admitted {
			s.Release()
		}
	}
	for range 200_000 {
		step()
	}
	if n := testing.AllocsPerRun(1000, step); n != 0 {
		t.Errorf("Admit and Release allocate %v times", n)
	}
	if n := testing.AllocsPerRun(1000, func() { refusing.Admit(1, full) }); n != 0 {
		t.Errorf("a repeated refusal allocates %v times", n)
	}
}

// Idle asks what Retire asks, and leaves the State in use.
func (s *State) Idle(now Tick) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.idle(now)
}

func TestRetire(t *testing.T) {
	l, err := NewLimits([]Limit{{1, time.Second}}, 0)
	if err != nil {
		t.Fatal(err)
	}
	var s State
	if v := s.Admit(1, l); v.Outcome != Admitted || s.Retire(1) || s.Retired() {
		t.Fatal("a State in use is given up")
	}
	s.Release()
	if s.Retire(Tick(time.Second/time.Microsecond)) || s.Admit(2, l).Outcome != WindowFull {
		t.Fatal("a State with an admission in its window is given up")
	}
	later := Tick(2 * time.Second / time.Microsecond)
	if !s.Retire(later) || !s.Retired() {
		t.Fatal("an idle State is kept")
	}
	if v := s.Admit(later, l); v.Outcome != Retired || s.InFlight() != 0 {
		t.Errorf("a retired State decides: %v", v)
	}
}
