package window

// Rings start at minRing entries; an empty log keeps a ring of up to keepRing
// entries, so that a slow caller does not allocate at each request.
const (
	minRing  = 4
	keepRing = 16
)

// log holds the admissions of one window length, oldest first: a ring of times
// in units of the scale, modulo 2^32.
//
// For an admission at t the log holds s = (t-1)>>shift, which is t rounded up
// to the next unit, less one. It has left once now>>shift - s > span. With a
// shift of 0 that is exactly now-t >= window; with a coarser unit, times are
// rounded up, now is rounded down, and so an admission leaves late, by less
// than two units, and never early.
//
// The modulo is safe because every log is pruned at every decision: what is
// left was at most one span old at the decision before, and if more than one
// span has passed since, expire drops all of it unseen. So the ages it compares
// stay within two spans, which scaleOf keeps below 2^32.
type log struct {
	ring  []uint32
	next  *log // of the same State, for another window
	head  uint32
	n     uint32
	scale scale // zero while the log has no window
}

// at returns the i-th oldest entry.
func (g *log) at(i uint32) *uint32 {
	i += g.head // cannot overflow: both are below 1e9
	if i >= uint32(len(g.ring)) {
		i -= uint32(len(g.ring))
	}
	return &g.ring[i]
}

// expire drops what has left by now; last is the time of the decision before.
func (g *log) expire(last, now Tick) {
	if g.n == 0 {
		return
	}
	t := now >> g.scale.shift
	if t-last>>g.scale.shift > Tick(g.scale.span) {
		g.n = 0
	}
	for g.n > 0 && uint32(t)-g.ring[g.head] > g.scale.span {
		g.n--
		g.head++
		if g.head == uint32(len(g.ring)) {
			g.head = 0
		}
	}
	if g.n == 0 {
		g.head = 0
		if len(g.ring) > keepRing {
			g.ring = nil
		}
	}
}

// push adds an admission. limit is what n has been found to be below, so
// growing to it always makes room.
func (g *log) push(t Tick, limit uint32) {
	if g.n == uint32(len(g.ring)) {
		g.grow(min(limit, max(minRing, 2*g.n)))
	}
	g.n++
	*g.at(g.n - 1) = uint32((t - 1) >> g.scale.shift)
}

func (g *log) grow(size uint32) {
	ring := make([]uint32, size)
	k := copy(ring, g.ring[g.head:])
	copy(ring[k:], g.ring[:g.head])
	g.ring, g.head = ring, 0
}

// remove takes out one admission of time t; last is the time of the latest
// decision. One that has left is none of the entries any more, though its
// offset may equal one of theirs, so its age is checked in full first.
func (g *log) remove(t, last Tick) {
	s := (t - 1) >> g.scale.shift
	age := last>>g.scale.shift - s
	if age < 0 || age > Tick(g.scale.span) {
		return
	}
	// From the newest: refunds follow their admission closely.
	for i := g.n; i > 0; i-- {
		if *g.at(i - 1) != uint32(s) {
			continue
		}
		for ; i < g.n; i++ {
			*g.at(i - 1) = *g.at(i)
		}
		g.n--
		return
	}
}

// leaves returns the first tick at which the i-th oldest admission is out.
func (g *log) leaves(i uint32, now Tick) Tick {
	t := now >> g.scale.shift
	left := g.scale.span - (uint32(t) - *g.at(i))
	return (t + Tick(left) + 1) << g.scale.shift
}
