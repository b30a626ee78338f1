package zejzlauth

import (
	"net/http"
	"slices"
	"strings"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

// credentialHeaders carry an API key whole. Authorization does so after its
// scheme. Queries are never read: URLs end up in logs, histories and Referer.
var credentialHeaders = [...]string{"X-Api-Key", "X-Goog-Api-Key", "Api-Key"}

const (
	authorizationHeader = "Authorization"
	identityPrefix      = "x-zejzl-"

	idHeader   = "X-Zejzl-Key-Id"
	nameHeader = "X-Zejzl-Key-Name"
	tierHeader = "X-Zejzl-Tier"
)

// readCredential finds the one credential of a request. Two lines of one
// header or two different credentials are refused: whoever stands behind
// might read the other one.
func readCredential(h http.Header) (secret string, why reason) {
	if lines := h[authorizationHeader]; len(lines) > 1 {
		return "", reasonAmbiguousKey
	} else if len(lines) == 1 {
		if token, ok := bearerToken(lines[0]); ok {
			secret = token
		}
	}
	for _, name := range credentialHeaders {
		lines := h[name]
		if len(lines) == 0 {
			continue
		}
		if len(lines) > 1 {
			return "", reasonAmbiguousKey
		}
		if lines[0] == "" {
			continue
		}
		if secret != "" && secret != lines[0] {
			return "", reasonAmbiguousKey
		}
		secret = lines[0]
	}
	if secret == "" {
		return "", reasonMissingKey
	}
	return secret, reasonNone
}

// bearerToken takes the token of `Bearer <token>`: the scheme in any case,
// then spaces (RFC 9110, 11.1). ok tells that the scheme is Bearer.
func bearerToken(value string) (token string, ok bool) {
	const scheme = "bearer"
	if len(value) < len(scheme) || !strings.EqualFold(value[:len(scheme)], scheme) {
		return "", false
	}
	rest := value[len(scheme):]
	token = strings.TrimLeft(rest, " ")
	if len(token) == len(rest) && rest != "" {
		// "Bearerx" is another scheme; a tab is no separator but no part of a scheme either
		return token, rest[0] == '\t'
	}
	return token, true
}

// authenticate finds the key that a secret opens. Unknown, expired, revoked
// and malformed are one answer to the caller; the log may know more, so a key
// that is not active is returned too.
func (g *Guard) authenticate(secret string) (k *key.Key, status key.Status) {
	if !key.WellFormed(secret) {
		return nil, key.Active
	}
	entry, ok := g.lookup(key.Sum(secret))
	if !ok {
		return nil, key.Active
	}
	if entry.Timed() {
		status = entry.Status(g.clock.wall())
	}
	return entry.Key, status
}

func (g *Guard) lookup(d key.Digest) (key.Entry, bool) {
	// The app first: of a key that a file states too, the file says what holds now.
	entry, ok := g.app.keyring.Lookup(d)
	if !ok && g.keyring != nil {
		entry, ok = g.keyring.Lookup(d)
	}
	return entry, ok
}

// identify tells the backend who calls, in headers that no client can write:
// every spelling of them was removed before, and their names are taken out of
// Connection, which would else make the proxy drop them (CVE-2021-32813).
func (x *exchange) identify(tierName string) {
	h := x.request.Header
	h[idHeader] = x.value(x.key.ID)
	h[tierHeader] = x.value(tierName)
	if x.key.Name != "" {
		h[nameHeader] = x.value(x.key.Name)
	}
}

// cleanRequest removes what a client must not send through the guard, and
// tells whether a credential was among it.
func (g *Guard) cleanRequest(h http.Header, rt route, keyed bool) (credential bool) {
	keyed = keyed && rt != public // what is public was judged as what it says it is
	for name := range h {
		switch {
		case isIdentityHeader(name),
			rt != open && name == "Proxy", // CGI backends take it for HTTP_PROXY (httpoxy)
			!keyed && isPathOverride(name),
			!keyed && rt != open && isMethodOverride(name):
			delete(h, name)
		}
	}
	if lines, ok := h["Connection"]; ok {
		setConnection(h, lines, isIdentityHeader)
	}
	if rt != open && g.ForwardCredentials {
		return false
	}
	for _, name := range credentialHeaders {
		if lines, ok := h[name]; ok && (rt != open || slices.ContainsFunc(lines, g.isOurs)) {
			delete(h, name)
			credential = true
		}
	}
	for _, line := range h[authorizationHeader] {
		if _, bearer := bearerToken(line); rt != open && (bearer || line == "") || g.holdsOurs(line) {
			delete(h, authorizationHeader)
			credential = true
			break
		}
	}
	return credential
}

// holdsOurs tells whether an Authorization of any scheme, or none, carries a
// key of ours. Others, such as Basic for the backend, are not the guard's.
func (g *Guard) holdsOurs(line string) bool {
	token := line[strings.IndexAny(line, " \t")+1:]
	return g.isOurs(line) || g.isOurs(strings.TrimLeft(token, " \t"))
}

func (g *Guard) isOurs(secret string) bool {
	if key.Shaped(secret) {
		return true
	}
	if !key.WellFormed(secret) {
		return false
	}
	_, ok := g.lookup(key.Sum(secret))
	return ok
}

func isIdentityHeader(name string) bool { return hasFoldedPrefix(name, identityPrefix) }

// isPathOverride tells headers by which some frameworks serve another path
// than the request's: what passes without a key must be the path that the
// guard judged.
func isPathOverride(name string) bool {
	return hasAnyFoldedPrefix(name, "x-original-url", "x-rewrite-url", "x-original-uri", "x-forwarded-uri")
}

// isMethodOverride tells headers that turn a public GET into something else.
func isMethodOverride(name string) bool {
	return hasAnyFoldedPrefix(name, "x-http-method", "x-method-override")
}

func hasAnyFoldedPrefix(name string, prefixes ...string) bool {
	if name == "" || name[0]|0x20 != 'x' {
		return false
	}
	for _, prefix := range prefixes {
		if hasFoldedPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// removeUpgrade ends the wish to leave HTTP.
func removeUpgrade(h http.Header) {
	delete(h, "Upgrade")
	delete(h, "Http2-Settings")
	if lines, ok := h["Connection"]; ok {
		setConnection(h, lines, func(token string) bool {
			return strings.EqualFold(token, "upgrade") || strings.EqualFold(token, "http2-settings")
		})
	}
}

// isForeignUpgrade tells upgrades to anything but a websocket: behind an h2c
// tunnel the guard would see no more requests.
func isForeignUpgrade(h http.Header) bool {
	upgrade, ok := h["Upgrade"]
	return ok && (len(upgrade) != 1 || !strings.EqualFold(upgrade[0], "websocket"))
}

// setConnection takes tokens out of Connection, and the header if none stays.
func setConnection(h http.Header, lines []string, remove func(token string) bool) {
	var kept []string
	removed := false
	for _, line := range lines {
		for token := range strings.SplitSeq(line, ",") {
			token = strings.TrimSpace(token)
			if remove(token) {
				removed = true
			} else if token != "" {
				kept = append(kept, token)
			}
		}
	}
	switch {
	case !removed:
	case len(kept) == 0:
		delete(h, "Connection")
	default:
		h["Connection"] = []string{strings.Join(kept, ", ")}
	}
}
