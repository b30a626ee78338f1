// Package window is the exact sliding window: a request at t is admitted if
// and only if fewer than N admitted requests lie in (t-W, t], for every limit
// of N requests in W, and a refused request costs nothing.
//
// Time is counted in ticks of one microsecond. A window over 35 minutes is
// counted in a coarser unit, the least power of two in which twice the window
// is below 2^32 (2 microseconds for an hour, 16 milliseconds for a year). There
// an admission leaves late by less than two units, so the limiter may admit
// less than it could within that time, and never more.
package window

import (
	"sync"
	"sync/atomic"
	"time"
)

// Tick is a moment of the limiter's clock: microseconds since an arbitrary
// start, not negative, from a monotonic source.
type Tick int64

// Outcome says what became of a request.
type Outcome uint8

// A request that finds a window full and every slot taken is WindowFull.
const (
	Admitted   Outcome = iota
	WindowFull         // a request limit is reached
	Busy               // as many requests are in flight as the limits allow
	Retired            // nothing was decided: the State was given up, its owner has another
)

// Verdict is the answer to one request. All of it comes from one look at the
// logs.
type Verdict struct {
	Outcome Outcome

	// At is when the request was decided: the given time, or that of an
	// earlier decision if it was later. Refund needs it.
	At Tick

	// Limit is the index in Limits.Requests of the window that headers speak
	// of: the one with the fewest requests remaining, the longest of several.
	Limit int

	// Remaining is how many more requests that window takes after this one.
	Remaining int

	// Reset is the time until the oldest admission of that window leaves, at
	// most its length; 0 if there is none.
	Reset time.Duration

	// Wait is set for WindowFull: the time until no window is full. A request
	// exactly then finds a place if no other came before.
	Wait time.Duration
}

// State is all that the limiter knows of one key in one zone: a log for each
// window length in use, and the requests in flight. The limits come with each
// call, so changed limits hold at once, and calls with different limits for
// the same window share its log. An entry leaves a log only by age or Refund.
//
// The zero State is ready; it must not be copied after first use. All methods
// may be called concurrently.
type State struct {
	blocked  atomic.Pointer[block] // written under mu
	mu       sync.Mutex
	clock    Tick // time of the latest decision under mu; no log is behind it
	inFlight atomic.Int32
	retired  atomic.Bool // written under mu
	first    log         // inline, as most tiers have one window
}

// block is the latest refusal by a full window, kept so that those after it
// need no lock.
//
// It is right to answer from it, because while it is published the State is as
// it was when the refusal was made. Every other decision, every Refund and Idle
// replaces or removes it before it unlocks, so a caller that loads it while
// one of them is under way is simply ahead of that one. Only time has passed:
// until the header's window loses its oldest entry, that window is still full,
// the longest that is, and the instants below do not move. (Its own wait is
// among those that Wait is the maximum of, so until comes no earlier.)
//
// A caller whose time is before the block's was overtaken, and gets the
// block's time, as it would under the lock. Answers from the block do not
// advance the clock: they leave no trace, so a later caller with an earlier
// time may well be decided at its own.
type block struct {
	limits *Limits // held, so no other Limits can take its address
	at     Tick    // time of the refusal
	reset  Tick    // when the oldest entry of the header's window leaves
	until  Tick    // when every window has a place
	limit  int
}

// Admit decides one request at the time now, for all of l or not at all. An
// Admitted verdict takes a slot that Release must give back, whether or not l
// caps the number of slots.
func (s *State) Admit(now Tick, l *Limits) (v Verdict) {
	// v is filled in place: returning it from function to function, six words
	// each time, would cost more than the decision.
	if b := s.blocked.Load(); b != nil && b.limits == l && now < b.reset {
		b.answer(&v, now)
		return v
	}
	s.mu.Lock()
	if s.retired.Load() {
		v.Outcome = Retired
	} else {
		s.decide(&v, now, l)
	}
	s.mu.Unlock()
	return v
}

// Release gives back the slot of one Admitted verdict. More calls than there
// were such verdicts are a bug in the caller, which would let others exceed
// their cap: it panics.
func (s *State) Release() {
	if s.inFlight.Add(-1) < 0 {
		s.inFlight.Add(1)
		panic("window: Release without an admission")
	}
}

// Refund takes the admission decided at the time at, under l, back out of the
// windows of l. Its slot is not affected. Once the admission has left a window
// there is nothing to take out.
func (s *State) Refund(at Tick, l *Limits) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range l.bounds {
		if g := s.find(l.bounds[i].scale); g != nil {
			g.remove(at, s.clock)
		}
	}
	s.blocked.Store(nil)
}

// Retire gives the State up if at now nothing is left of it: no slot is taken
// and no admission counts. From then on it admits nobody, so that whoever still
// holds it must ask for the State that took its place.
func (s *State) Retire(now Tick) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	idle := s.idle(now)
	s.retired.Store(s.retired.Load() || idle)
	return idle
}

// Retired reports whether the State was given up.
func (s *State) Retired() bool { return s.retired.Load() }

func (s *State) idle(now Tick) bool {
	s.advance(now)
	s.blocked.Store(nil)
	for g := &s.first; g != nil; g = g.next {
		if g.n > 0 {
			return false
		}
	}
	return s.inFlight.Load() == 0
}

// InFlight returns the number of slots taken.
func (s *State) InFlight() int { return int(s.inFlight.Load()) }

func (s *State) decide(v *Verdict, now Tick, l *Limits) {
	now = s.advance(now)
	v.At = now
	until := now
	for i := range l.bounds {
		b := &l.bounds[i]
		remaining := int(b.requests)
		if g := s.find(b.scale); g != nil {
			remaining = max(0, remaining-int(g.n)) // g.n is more after a higher limit
			if remaining == 0 {
				v.Outcome = WindowFull
				until = max(until, g.leaves(g.n-b.requests, now))
			}
		}
		if i == 0 || remaining <= v.Remaining {
			v.Limit, v.Remaining = i, remaining
		}
	}
	switch {
	case v.Outcome == WindowFull:
		v.Wait = (until - now).duration()
	case s.inFlight.Load() >= l.slots:
		v.Outcome = Busy
	default:
		s.record(now, l)
		v.Remaining-- // every window took one, so v.Limit is still the one
	}
	reset := now
	if g := s.find(l.bounds[v.Limit].scale); g != nil && g.n > 0 {
		reset = g.leaves(0, now)
	}
	v.Reset = l.reset(v.Limit, reset-now)
	switch {
	case v.Outcome == WindowFull:
		s.blocked.Store(&block{limits: l, at: now, reset: reset, until: until, limit: v.Limit})
	case s.blocked.Load() != nil: // an atomic store costs more than a load
		s.blocked.Store(nil)
	}
}

// advance moves the clock, and drops from all logs what has left by then.
// Callers read the time before they get the lock, so now may be in the past;
// what has been dropped can't come back, so it counts as the present.
func (s *State) advance(now Tick) Tick {
	now = max(now, s.clock)
	for g := &s.first; g != nil; g = g.next {
		g.expire(s.clock, now)
	}
	s.clock = now
	return now
}

// record enters an admission in the log of every window and takes a slot.
func (s *State) record(now Tick, l *Limits) {
	for i := range l.bounds {
		b := &l.bounds[i]
		g := s.find(b.scale)
		if g == nil {
			g = s.add(b.scale)
		}
		g.push(now, b.requests)
	}
	s.inFlight.Add(1)
}

// find returns the log of a window, nil if nothing was ever admitted under it.
func (s *State) find(c scale) *log {
	for g := &s.first; g != nil; g = g.next {
		if g.scale == c {
			return g
		}
	}
	return nil
}

// add makes a log for a new window. Logs are not taken away: their number is
// that of the window lengths ever configured for the key, and an empty one is
// small.
func (s *State) add(c scale) *log {
	g := &s.first
	if g.scale != (scale{}) {
		g = &log{next: s.first.next}
		s.first.next = g
	}
	g.scale = c
	return g
}

func (b *block) answer(v *Verdict, now Tick) {
	now = max(now, b.at)
	v.Outcome = WindowFull
	v.At = now
	v.Limit = b.limit
	v.Reset = b.limits.reset(b.limit, b.reset-now)
	v.Wait = (b.until - now).duration()
}

// reset keeps the rounding of long windows out of the headers: nobody should
// read 3601 seconds for a window of an hour. Wait stays exact.
func (l *Limits) reset(limit int, left Tick) time.Duration {
	return min(left.duration(), l.requests[limit].Window)
}

func (t Tick) duration() time.Duration { return time.Duration(t) * time.Microsecond }
