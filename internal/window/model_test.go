package window

import (
	"math/rand/v2"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// model is the rule written down as plainly as possible: lists of times, and
// no shared code with the State.
type model struct {
	clock    int64
	admitted map[time.Duration][]int64
	inFlight int

	// A refusal by a full window that is repeated, with no other decision and
	// no refund between, does not move the clock before the instant of its
	// Reset: the State answers it from memory.
	repeat      *Limits
	repeatUntil int64
}

func ceilDiv(a, b int64) int64 { return (a + b - 1) / b }

func unit(w time.Duration) int64 {
	u := int64(1)
	for 2*ceilDiv(w.Microseconds(), u) >= 1<<32 {
		u *= 2
	}
	return u
}

// leaves is the first tick at which an admission at t is out of the window.
func leaves(t int64, w time.Duration) int64 {
	u := unit(w)
	return (ceilDiv(t, u) + ceilDiv(w.Microseconds(), u)) * u
}

// live lists when the admissions that a window holds at a time leave it.
func (m *model) live(w time.Duration, at int64) []int64 {
	var out []int64
	for _, t := range m.admitted[w] {
		if until := leaves(t, w); until > at {
			out = append(out, until)
		}
	}
	return out
}

func (m *model) admit(now int64, l *Limits) Verdict {
	at := max(now, m.clock)
	v := Verdict{At: Tick(at)}
	free := at
	for _, r := range l.Requests() {
		if live := m.live(r.Window, at); len(live) >= r.Requests {
			v.Outcome = WindowFull
			free = max(free, live[len(live)-r.Requests])
		}
	}
	if v.Outcome == WindowFull {
		v.Wait = time.Duration(free-at) * time.Microsecond
	} else if l.Concurrent() > 0 && m.inFlight >= l.Concurrent() {
		v.Outcome = Busy
	} else {
		m.inFlight++
		for _, r := range l.Requests() {
			m.admitted[r.Window] = append(m.admitted[r.Window], at)
		}
	}
	var window time.Duration
	reset := at
	v.Remaining = maxRequests + 1
	for i, r := range l.Requests() {
		live := m.live(r.Window, at)
		remaining := max(0, r.Requests-len(live))
		if remaining > v.Remaining || remaining == v.Remaining && r.Window < window {
			continue
		}
		v.Limit, v.Remaining, window, reset = i, remaining, r.Window, at
		if len(live) > 0 {
			reset = live[0]
		}
	}
	v.Reset = min(window, time.Duration(reset-at)*time.Microsecond)

	if m.repeat == l && now < m.repeatUntil {
		return v
	}
	m.moveTo(at)
	m.repeat = nil
	if v.Outcome == WindowFull {
		m.repeat, m.repeatUntil = l, reset
	}
	return v
}

// moveTo forgets what is out for good; only so that long runs stay fast.
func (m *model) moveTo(at int64) {
	m.clock = at
	for w, times := range m.admitted {
		for len(times) > 0 && leaves(times[0], w) <= at {
			times = times[1:]
		}
		m.admitted[w] = times
	}
}

func (m *model) refund(at int64, l *Limits) {
	m.repeat = nil
	for _, r := range l.Requests() {
		for i, t := range m.admitted[r.Window] {
			if t == at {
				times := append([]int64(nil), m.admitted[r.Window][:i]...)
				m.admitted[r.Window] = append(times, m.admitted[r.Window][i+1:]...)
				break
			}
		}
	}
}

func (m *model) idle(now int64) bool {
	m.repeat = nil
	m.moveTo(max(now, m.clock))
	for w := range m.admitted {
		if len(m.live(w, m.clock)) > 0 {
			return false
		}
	}
	return m.inFlight == 0
}

type admission struct {
	at     int64
	limits *Limits
}

// tally counts what a run has seen, so that the test can tell that it has
// seen everything.
type tally struct {
	steps, admitted, full, repeated, busy, overtaken, refunds, goneRefunds, wraps, coarse, idle int
}

// run drives a State and the model with the same random steps. pick(n) is a
// random number below n.
func run(tb fataler, steps int, pick func(n int) int, seen *tally) {
	var (
		s     State
		m     = model{admitted: map[time.Duration][]int64{}}
		pool  = randomLimits(pick)
		now   int64
		given []admission // not refunded yet
		last  Verdict
	)
	for range steps {
		seen.steps++
		switch op := pick(10); {
		case op == 0 && m.inFlight > 0, op == 1 && m.inFlight > 2:
			s.Release()
			m.inFlight--
		case op == 2 && len(given) > 0:
			i := len(given) - 1 - pick(min(len(given), 50))
			a := given[i]
			given = append(given[:i:i], given[i+1:]...)
			seen.refunds++
			if leaves(a.at, a.limits.Requests()[0].Window) <= m.clock {
				seen.goneRefunds++
			}
			s.Refund(Tick(a.at), a.limits)
			m.refund(a.at, a.limits)
		case op == 3 && pick(2) == 0:
			if pick(2) == 0 {
				for ; m.inFlight > 0; m.inFlight-- {
					s.Release()
				}
			}
			want := m.idle(now)
			if got := s.Idle(Tick(now)); got != want {
				tb.Fatalf("Idle(%d) = %t with %d in flight", now, got, m.inFlight)
			}
			if want {
				seen.idle++
			}
		default:
			if jump := nextTime(pick, now, given, last) - now; jump > 0 {
				now += jump
				if jump >= 1<<32-10 {
					seen.wraps++
				}
			}
			at := now
			if pick(8) == 0 { // overtaken on the way to the lock
				at = max(0, now-int64(pick(3_000)))
			}
			l := pool[pick(len(pool))]
			if pick(3) > 0 {
				l = pool[0]
			}
			if at < m.clock {
				seen.overtaken++
			}
			if m.repeat == l && at < m.repeatUntil {
				seen.repeated++
			}
			want := m.admit(at, l)
			got := s.Admit(Tick(at), l)
			if got != want {
				tb.Fatalf("Admit(%d, %v concurrent %d):\n got %+v\nwant %+v", at, l.Requests(), l.Concurrent(), got, want)
			}
			last = got
			switch got.Outcome {
			case Admitted:
				seen.admitted++
				given = append(given, admission{int64(got.At), l})
			case WindowFull:
				seen.full++
				if unit(l.Requests()[got.Limit].Window) > 1 {
					seen.coarse++
				}
			case Busy:
				seen.busy++
			}
		}
		if got := s.InFlight(); got != m.inFlight {
			tb.Fatalf("InFlight() = %d, want %d", got, m.inFlight)
		}
	}
}

type fataler interface {
	Fatalf(format string, args ...any)
}

// randomLimits returns a few Limits over one to three window lengths, so that
// most share logs, with other numbers.
func randomLimits(pick func(int) int) []*Limits {
	lengths := []time.Duration{
		time.Second, 2 * time.Second, time.Minute, 2147 * time.Second, 2148 * time.Second,
		time.Hour, 24 * time.Hour, maxWindow,
	}
	var windows []time.Duration
	for range 1 + pick(3) {
		i := pick(len(lengths))
		windows = append(windows, lengths[i])
		lengths = append(lengths[:i], lengths[i+1:]...)
	}
	pool := make([]*Limits, 2+pick(3))
	for i := range pool {
		var requests []Limit
		for j, w := range windows {
			if j == i%len(windows) || pick(2) == 0 {
				requests = append(requests, Limit{1 + pick([]int{2, 6, 40}[pick(3)]), w})
			}
		}
		l, err := NewLimits(requests, []int{0, 0, 0, 1, 3, 30}[pick(6)])
		if err != nil {
			panic(err)
		}
		pool[i] = l
	}
	return pool
}

// nextTime returns a time to go to; one in the past is to be ignored.
func nextTime(pick func(int) int, now int64, given []admission, last Verdict) int64 {
	near := int64(pick(3)) - 1
	switch kind := pick(100); {
	case kind < 40:
		return now
	case kind < 65:
		return now + int64(pick(1_000))
	case kind < 70:
		return now + int64(pick(1_000_000))
	case kind < 85 && len(given) > 0:
		// An end of one of the latest admissions, by the rule or by the clock.
		a := given[len(given)-1-pick(min(len(given), 40))]
		requests := a.limits.Requests()
		w := requests[pick(len(requests))].Window
		if pick(2) == 0 {
			return a.at + w.Microseconds() + near
		}
		return leaves(a.at, w) + near
	case kind < 90:
		return int64(last.At) + last.Reset.Microseconds() + near
	case kind < 95:
		return int64(last.At) + last.Wait.Microseconds() + near
	case kind < 97:
		// Once round the 32 bits of each unit, to where old offsets return.
		return now + 1<<(32+pick(15)) + int64(pick(10)) - 5
	case kind < 98:
		return now + int64(pick(1<<31-1))*int64(1+pick(100_000))
	default:
		return now + int64(pick(2_000_000_000))
	}
}

func TestModelRapid(t *testing.T) {
	var seen tally
	rapid.Check(t, func(t *rapid.T) {
		pick := func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "pick") }
		run(t, 150, pick, &seen)
	})
	t.Logf("%+v", seen)
}

func TestModelMillionSteps(t *testing.T) {
	const steps, each = 1_000_000, 500
	var seen tally
	for seed := range uint64(steps / each) {
		r := rand.New(rand.NewPCG(seed, 1))
		run(t, each, r.IntN, &seen)
	}
	t.Logf("%+v", seen)
	if seen.steps != steps {
		t.Errorf("%d steps, want %d", seen.steps, steps)
	}
	for what, n := range map[string]int{
		"admitted": seen.admitted, "full": seen.full, "repeated refusals": seen.repeated, "busy": seen.busy,
		"overtaken callers": seen.overtaken, "refunds": seen.refunds, "refunds after the window": seen.goneRefunds,
		"jumps round 2^32": seen.wraps, "refusals by a coarse window": seen.coarse, "idle states": seen.idle,
	} {
		if n < 1000 {
			t.Errorf("only %d steps with %s", n, what)
		}
	}
}
