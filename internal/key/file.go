package key

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// ParseFile returns the keys of a key file:
//
//	{"keys": [{
//		"id": "k_7", "name": "CI runner", "tier": "pro",
//		"secrets": [{"hash": "sha256:…", "not_after": "2030-01-31T00:00:00Z"}],
//		"not_before": "…", "expires_at": "…", "revoked_at": "…"
//	}]}
//
// name, tier and one secret are required. Anything else than this is an error,
// which names the field and the line and shows no value. encoding/json is not
// used: it would let pass "Name" for "name", duplicate fields and null, where a
// mistyped revoked_at would leave a key alive.
func ParseFile(r io.Reader) ([]Record, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("reading: %w", err)
	}
	if !utf8.Valid(data) {
		return nil, errors.New("expected UTF-8")
	}
	s := scanner{data: data, tiers: make(map[string]string)}
	// A key has two objects at least. Growing the list would take longer than reading it.
	keys := make([]Record, 0, min(bytes.Count(data, []byte("{"))/2, len(data)/minRecordLen))
	err = s.object([]string{"keys"}, 1, func(int) error {
		return s.list(func() error {
			var rec Record
			if err := s.record(&rec); err != nil {
				return err
			}
			keys = append(keys, rec)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	if s.next() != 0 || s.pos < len(s.data) {
		return nil, s.errorf("expected nothing after the closing brace")
	}
	return keys, nil
}

// scanner reads the JSON of a key file.
type scanner struct {
	data  []byte
	pos   int
	path  []byte            // of the value being read, for errors: "keys[3].name"
	tiers map[string]string // so that a million keys share a few strings
}

// minRecordLen is less than the length of the shortest record.
const minRecordLen = 100

var (
	recordFields = []string{"name", "tier", "secrets", "id", "not_before", "expires_at", "revoked_at"}
	secretFields = []string{"hash", "not_after"}
)

func (s *scanner) record(rec *Record) error {
	return s.object(recordFields, 3, func(field int) (err error) {
		switch recordFields[field] {
		case "id":
			rec.ID, err = s.valid(ValidateID)
		case "name":
			rec.Name, err = s.valid(ValidateName)
		case "tier":
			rec.Tier, err = s.tier()
		case "secrets":
			rec.Secrets, err = s.secrets()
		case "not_before":
			rec.NotBefore, err = s.time()
		case "expires_at":
			rec.ExpiresAt, err = s.time()
		case "revoked_at":
			rec.RevokedAt, err = s.time()
		}
		return err
	})
}

func (s *scanner) secrets() ([]Secret, error) {
	var secrets []Secret
	err := s.list(func() error {
		var sec Secret
		err := s.object(secretFields, 1, func(field int) (err error) {
			switch secretFields[field] {
			case "hash":
				sec.Digest, err = s.digest()
			case "not_after":
				sec.NotAfter, err = s.time()
			}
			return err
		})
		secrets = append(secrets, sec)
		return err
	})
	if err == nil && len(secrets) == 0 {
		err = s.errorf("expected at least one secret")
	}
	return secrets, err
}

// valid reads a string that the function accepts.
func (s *scanner) valid(validate func(string) error) (string, error) {
	b, err := s.text()
	if err != nil {
		return "", err
	}
	str := string(b)
	if err := validate(str); err != nil {
		return "", s.errorf("%w", err)
	}
	return str, nil
}

func (s *scanner) tier() (string, error) {
	start := s.pos
	b, err := s.text()
	if err != nil {
		return "", err
	}
	if tier, ok := s.tiers[string(b)]; ok {
		return tier, nil
	}
	s.pos = start
	tier, err := s.valid(ValidateTierName)
	if err == nil {
		s.tiers[tier] = tier
	}
	return tier, err
}

func (s *scanner) digest() (Digest, error) {
	b, err := s.text()
	if err != nil {
		return Digest{}, err
	}
	d, err := parseDigest(b)
	if err != nil {
		return Digest{}, s.errorf("%w", err)
	}
	return d, nil
}

// time refuses years before 1970: a zero time that some program wrote could be
// meant as "never" or as "always".
func (s *scanner) time() (time.Time, error) {
	b, err := s.text()
	if err != nil {
		return time.Time{}, err
	}
	var t time.Time
	if err := t.UnmarshalText(b); err != nil || !strict(b) || t.Unix() < 0 {
		return time.Time{}, s.errorf("expected a time such as 2030-01-31T00:00:00Z (RFC 3339, 1970 or later)")
	}
	return t.UTC(), nil
}

// strict refuses what Go reads although RFC 3339 does not have it (go.dev/issue/54580):
// an hour of one digit, a comma before fractions, a zone beyond a day.
func strict(b []byte) bool {
	zone := b[len(b)-len("07:00"):]
	return b[len("2006-01-02T15")] == ':' && b[len("2006-01-02T15:04:05")] != ',' &&
		(b[len(b)-1] == 'Z' || string(zone[:2]) < "24" && string(zone[3:]) < "60")
}

// object reads an object, of which the first fields are required, and calls
// value, with the index of its name, where each value begins.
func (s *scanner) object(fields []string, required int, value func(field int) error) error {
	var seen [8]bool
	depth := len(s.path)
	err := s.sequence('{', '}', "an object", func() error {
		name, err := s.text()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(fields, func(f string) bool { return f == string(name) })
		if i < 0 {
			return s.errorf("unknown field: expected %s", strings.Join(fields, ", "))
		}
		s.path = append(append(s.path[:depth], '.'), fields[i]...)
		if seen[i] {
			return s.errorf("the field is stated twice")
		}
		seen[i] = true
		if !s.accept(':') {
			return s.errorf(`expected ":"`)
		}
		err = value(i)
		if err == nil {
			s.path = s.path[:depth]
		}
		return err
	})
	if err != nil {
		return err
	}
	for i, f := range fields[:required] {
		if !seen[i] {
			return s.errorf("expected the field %q", f)
		}
	}
	return nil
}

func (s *scanner) list(element func() error) error {
	depth := len(s.path)
	n := int64(0)
	return s.sequence('[', ']', "a list", func() error {
		s.path = append(strconv.AppendInt(append(s.path, '['), n, 10), ']')
		n++
		err := element()
		if err == nil {
			s.path = s.path[:depth]
		}
		return err
	})
}

// sequence reads the elements, with commas between, of an object or a list.
func (s *scanner) sequence(open, closing byte, what string, element func() error) error {
	if !s.accept(open) {
		return s.errorf("expected %s", what)
	}
	if s.accept(closing) {
		return nil
	}
	for {
		if err := element(); err != nil {
			return err
		}
		if s.accept(closing) {
			return nil
		}
		if !s.accept(',') {
			return s.errorf(`expected "," or %q`, string(closing))
		}
	}
}

// text reads a string. The bytes are valid until the next call.
func (s *scanner) text() ([]byte, error) {
	if !s.accept('"') {
		return nil, s.errorf("expected a string")
	}
	start := s.pos
	for ; s.pos < len(s.data); s.pos++ {
		switch c := s.data[s.pos]; {
		case c == '"':
			s.pos++
			return s.data[start : s.pos-1], nil
		case c == '\\':
			return s.escaped(start)
		case c < ' ':
			return nil, s.errorf("expected no control character in a string")
		}
	}
	return nil, s.errorf("expected the end of a string")
}

// escaped reads a string with escapes, which begins at start.
func (s *scanner) escaped(start int) ([]byte, error) {
	for ; s.pos < len(s.data) && s.data[s.pos] != '"'; s.pos++ {
		if s.data[s.pos] == '\\' {
			s.pos++
		}
	}
	s.pos = min(s.pos+1, len(s.data))
	var str string
	err := json.Unmarshal(s.data[start-1:s.pos], &str)
	// A lone half of a surrogate pair becomes U+FFFD.
	if err != nil || strings.ContainsRune(str, utf8.RuneError) {
		return nil, s.errorf("expected a string with valid escapes")
	}
	return []byte(str), nil
}

// accept skips white space and then c, and reports whether c was there.
func (s *scanner) accept(c byte) bool {
	if s.next() != c {
		return false
	}
	s.pos++
	return true
}

// next skips white space and returns the byte that follows, 0 at the end.
func (s *scanner) next() byte {
	for ; s.pos < len(s.data); s.pos++ {
		switch c := s.data[s.pos]; c {
		case ' ', '\t', '\n', '\r':
		default:
			return c
		}
	}
	return 0
}

// errorf returns an error with the field and the line. Its arguments never hold
// a part of the file.
func (s *scanner) errorf(format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	line := 1 + bytes.Count(s.data[:s.pos], []byte("\n"))
	if len(s.path) == 0 {
		return fmt.Errorf("%w (line %d)", err, line)
	}
	return fmt.Errorf("%s: %w (line %d)", s.path[1:], err, line)
}
