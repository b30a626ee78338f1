package key

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strings"
)

// A generated secret is Prefix and shapeLen characters of base64url, which
// hold 24 random bytes: 192 bits.
const (
	Prefix   = "zejzl_"
	shapeLen = 32
)

// Any secret, generated or foreign, has this many characters.
const (
	minSecretLen = 24
	maxSecretLen = 256
)

// minDistinct is how many different characters a secret must have. It turns
// away placeholders ("xxxxxxxx…", "changechange…"); it does not measure entropy.
const minDistinct = 8

const (
	digestPrefix = "sha256:"
	idLen        = 12
)

const (
	shapeChars  = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	secretChars = shapeChars + ".~+/="
	idChars     = shapeChars + "."
	tierChars   = "abcdefghijklmnopqrstuvwxyz0123456789-_"
)

var (
	inShape  = table(shapeChars)
	inSecret = table(secretChars)
	inID     = table(idChars)
	inTier   = table(tierChars)
)

func table(chars string) (t [256]bool) {
	for i := range len(chars) {
		t[chars[i]] = true
	}
	return t
}

func madeOf(s string, t *[256]bool) bool {
	for i := range len(s) {
		if !t[s[i]] {
			return false
		}
	}
	return true
}

// Digest is the SHA-256 of a secret: all that is ever kept of it. A fast hash
// is enough, because nobody can enumerate secrets of this length.
type Digest [sha256.Size]byte

// Sum returns the digest of a secret.
func Sum(secret string) Digest {
	if len(secret) > maxSecretLen {
		return sha256.Sum256([]byte(secret))
	}
	var buf [maxSecretLen]byte // on the stack: this runs for every request
	return sha256.Sum256(buf[:copy(buf[:], secret)])
}

var errDigest = errors.New(`expected "sha256:" and 64 hex digits`)

// ParseDigest reads "sha256:" and 64 hex digits of either case.
func ParseDigest(s string) (Digest, error) { return parseDigest(s) }

// parseDigest spares a key file of a million keys as many strings.
func parseDigest[T string | []byte](s T) (Digest, error) {
	var d Digest
	var digits [2 * sha256.Size]byte
	if len(s) != len(digestPrefix)+len(digits) || string(s[:len(digestPrefix)]) != digestPrefix {
		return Digest{}, errDigest
	}
	copy(digits[:], s[len(digestPrefix):])
	if _, err := hex.Decode(d[:], digits[:]); err != nil {
		return Digest{}, errDigest // hex's own error shows a character of the input
	}
	return d, nil
}

// String returns the form that configuration and key files hold.
func (d Digest) String() string { return digestPrefix + hex.EncodeToString(d[:]) }

// ID returns the first 12 hex digits, which name a key that has no id. They
// tell nothing about the secret.
func (d Digest) ID() string { return hex.EncodeToString(d[:idLen/2]) }

// Generate returns a new secret.
func Generate() string {
	var b [shapeLen / 4 * 3]byte
	_, _ = rand.Read(b[:]) // it never fails: it ends the process instead
	return Prefix + base64.RawURLEncoding.EncodeToString(b[:])
}

// Shaped reports whether s has exactly the form of a generated secret.
func Shaped(s string) bool {
	return len(s) == len(Prefix)+shapeLen && indexShaped(s) == 0
}

// indexShaped returns where in s the first string of the form of a generated
// secret begins, or -1.
func indexShaped(s string) int {
	for from := 0; ; {
		i := strings.Index(s[from:], Prefix)
		if i < 0 {
			return -1
		}
		from += i
		rest := s[from+len(Prefix):]
		if len(rest) >= shapeLen && madeOf(rest[:shapeLen], &inShape) {
			return from
		}
		from += len(Prefix)
	}
}

// WellFormed reports whether s can be a secret at all: 24 to 256 characters of
// [A-Za-z0-9._~+/=-]. The colon is not among them, so a stored "sha256:…" that
// leaked is never taken for a key.
func WellFormed(s string) bool {
	return len(s) >= minSecretLen && len(s) <= maxSecretLen && madeOf(s, &inSecret)
}

// ValidateSecret says what is wrong with a secret of the configuration. Beyond
// its form it needs at least eight different characters.
func ValidateSecret(s string) error {
	if !WellFormed(s) {
		return errors.New("expected a secret of 24 to 256 characters from A-Z a-z 0-9 . _ ~ + / = -")
	}
	var seen [256]bool
	distinct := 0
	for i := range len(s) {
		if !seen[s[i]] {
			seen[s[i]] = true
			distinct++
		}
	}
	if distinct < minDistinct {
		return errors.New("the secret is too easy to guess: expected at least 8 different characters")
	}
	return nil
}
