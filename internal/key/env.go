package key

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ParseEnv returns the keys that variables with the prefix state, sorted by
// variable. environ has the form of os.Environ. The error names every bad
// variable and shows no value.
func ParseEnv(environ []string, prefix string) ([]Located, error) {
	environ = slices.DeleteFunc(slices.Clone(environ), func(line string) bool {
		return !strings.HasPrefix(line, prefix)
	})
	slices.SortStableFunc(environ, func(a, b string) int {
		return strings.Compare(variable(a), variable(b))
	})

	var keys []Located
	var errs []error
	for _, line := range environ {
		name, value, _ := strings.Cut(line, "=")
		place := Place{Source: "environment variable " + name, Index: -1}
		rec, err := parseLine(value)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", place, err))
			continue
		}
		keys = append(keys, Located{Record: rec, Place: place})
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return keys, nil
}

func variable(line string) string {
	name, _, _ := strings.Cut(line, "=")
	return name
}

// parseLine reads "<secret or sha256:hex>:<tier>[:<name>]".
func parseLine(s string) (Record, error) {
	// The colon of "sha256:" is part of the first field.
	hashed := strings.HasPrefix(s, digestPrefix)
	colon := strings.IndexByte(strings.TrimPrefix(s, digestPrefix), ':')
	if colon < 0 {
		return Record{}, errors.New(`expected "<secret or sha256:hex>:<tier>[:<name>]"`)
	}
	if hashed {
		colon += len(digestPrefix)
	}
	secret, rest := s[:colon], s[colon+1:]

	digest, err := ParseSecret(secret)
	if err != nil {
		return Record{}, err
	}
	if strings.Contains(rest, secret) {
		return Record{}, errors.New("expected a tier and a name that do not contain the secret")
	}
	tier, name, _ := strings.Cut(rest, ":")
	if err := ValidateTierName(tier); err != nil {
		return Record{}, err
	}
	if name = strings.TrimSpace(name); name != "" {
		if err := ValidateName(name); err != nil {
			return Record{}, err
		}
	}
	return Record{Name: name, Tier: tier, Secrets: []Secret{{Digest: digest}}}, nil
}

// ParseSecret returns the digest of a secret that is stated whole or as its
// hash. The error does not show it.
func ParseSecret(s string) (Digest, error) {
	if strings.HasPrefix(s, digestPrefix) {
		return ParseDigest(s)
	}
	if err := ValidateSecret(s); err != nil {
		return Digest{}, err
	}
	return Sum(s), nil
}
