package key

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/net/http/httpguts"
)

const (
	maxNameLen = 128
	maxIDLen   = 64
	maxTierLen = 32
)

// Record is a key as its source states it. A zero time means that there is no
// such rule; any other time is the first instant at which the rule holds.
type Record struct {
	ID      string // empty: the ID of the first secret's digest
	Name    string
	Tier    string // may be empty in the server's configuration: the default tier
	Secrets []Secret

	NotBefore, ExpiresAt, RevokedAt time.Time
}

// Secret is one secret of a key, which ends at NotAfter (zero: never).
type Secret struct {
	Digest   Digest
	NotAfter time.Time
}

// Place is where a record was found.
type Place struct {
	Source string // for example "key file keys.json"
	Index  int    // in the list "keys" of the source; below 0 there is no list
}

func (p Place) String() string {
	if p.Index < 0 {
		return p.Source
	}
	return fmt.Sprintf("%s: keys[%d]", p.Source, p.Index)
}

// Located is a record and its place.
type Located struct {
	Record
	Place Place
}

// ValidateName says what is wrong with the name of a key. It must be fit for a
// header, because the backend gets it in one, and must not hold a secret,
// because logs get it too.
func ValidateName(s string) error {
	switch {
	case s == "" || len(s) > maxNameLen:
		return errors.New("expected a name of 1 to 128 bytes")
	case !utf8.ValidString(s) || !httpguts.ValidHeaderFieldValue(s):
		return errors.New("expected a name without control characters, in UTF-8")
	case strings.TrimSpace(s) != s:
		return errors.New("expected a name without spaces around it")
	case indexShaped(s) >= 0:
		return errors.New("expected a name that contains no secret")
	}
	return nil
}

// ValidateID says what is wrong with the id of a key.
func ValidateID(s string) error {
	if s == "" || len(s) > maxIDLen || !madeOf(s, &inID) {
		return errors.New("expected an id of 1 to 64 characters from A-Z a-z 0-9 . _ -")
	}
	if indexShaped(s) >= 0 {
		return errors.New("expected an id that contains no secret")
	}
	return nil
}

// ValidateTierName says what is wrong with the name of a tier.
func ValidateTierName(s string) error {
	if s == "" || len(s) > maxTierLen || !madeOf(s, &inTier) {
		return errors.New("expected a tier of 1 to 32 characters from a-z 0-9 _ -")
	}
	return nil
}
