package window

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"time"
)

const (
	maxRequests = 1_000_000_000
	maxWindow   = 366 * 24 * time.Hour
)

// Limit allows at most Requests admissions in any Window, for example
// {100, time.Minute}. Requests is 1 to 1,000,000,000; Window is whole seconds,
// from one second to 366 days.
type Limit struct {
	Requests int
	Window   time.Duration
}

// Limits is what one tier allows. It never changes after NewLimits, and is
// told apart by pointer: a changed tier is a new Limits.
type Limits struct {
	requests   []Limit
	bounds     []bound // of requests, in the same order
	concurrent int
	slots      int32 // concurrent, or the most that can be counted
}

// bound is a Limit in the terms of the log.
type bound struct {
	requests uint32
	scale    scale
}

// scale is a window length as a log counts it: span units of 1<<shift
// microseconds. No two windows of whole seconds share a scale.
type scale struct {
	span  uint32
	shift uint8
}

// NewLimits returns the limits of a tier: one or more request limits, no two
// with the same window, and how many requests may be in flight at once
// (0: any number).
func NewLimits(requests []Limit, concurrent int) (*Limits, error) {
	if len(requests) == 0 {
		return nil, errors.New("no request limit: want at least one, such as 100 in 1m")
	}
	if concurrent < 0 {
		return nil, fmt.Errorf("concurrent %d: want 0 (no cap) or more", concurrent)
	}
	l := &Limits{
		requests:   slices.Clone(requests),
		concurrent: concurrent,
		slots:      math.MaxInt32,
	}
	if concurrent > 0 {
		l.slots = int32(min(concurrent, math.MaxInt32))
	}
	slices.SortStableFunc(l.requests, func(a, b Limit) int { return cmp.Compare(a.Window, b.Window) })
	for i, r := range l.requests {
		if r.Requests < 1 || r.Requests > maxRequests {
			return nil, fmt.Errorf("%d requests in %v: want 1 to %d requests", r.Requests, r.Window, maxRequests)
		}
		if r.Window < time.Second || r.Window > maxWindow || r.Window%time.Second != 0 {
			return nil, fmt.Errorf("%d requests in %v: want a window of whole seconds, 1s to 366 days", r.Requests, r.Window)
		}
		if i > 0 && r.Window == l.requests[i-1].Window {
			return nil, fmt.Errorf("window %v is limited twice, to %d and to %d requests: want one limit a window",
				r.Window, l.requests[i-1].Requests, r.Requests)
		}
		l.bounds = append(l.bounds, bound{uint32(r.Requests), scaleOf(r.Window)})
	}
	return l, nil
}

// Requests returns the request limits, shortest window first. The slice is
// shared and must not be changed.
func (l *Limits) Requests() []Limit { return l.requests }

// Concurrent returns how many requests may be in flight at once; 0 is no cap.
func (l *Limits) Concurrent() int { return l.concurrent }

// scaleOf picks the finest unit in which twice the window stays below 2^32, so
// that 32-bit offsets are enough to tell ages apart.
func scaleOf(window time.Duration) scale {
	us := uint64(window / time.Microsecond)
	shift := max(0, bits.Len64(2*us)-32)
	// Rounding the span up, like rounding event times up, can only under-admit.
	return scale{span: uint32((us + 1<<shift - 1) >> shift), shift: uint8(shift)}
}
