package zejzlauth

import (
	"encoding/base64"
	"strings"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

// redacted stands where a secret stood.
const redacted = "REDACTED"

// keyBodyLen is how many characters follow key.Prefix in a key at least.
const keyBodyLen = 32

// scrub masks in a text what could be a credential: keys of our own shape
// anywhere, the token after "Bearer", and the values of the query parameters
// key, api_key and access_token (any case, with or without separators, also
// with "x_" or "x_goog_" in front). All of it also percent-encoded, as a
// Referer inside a query is, and as a JSON \u escape, as the text of a quoted
// document is. A text without any of it is returned as it is, without a copy.
func scrub(s string) string {
	found := clues(s)
	if found&clueKey != 0 {
		s = maskSpans(s, findKey)
	}
	if found&clueBearer != 0 {
		s = maskSpans(s, findBearer)
	}
	if found&clueQuery != 0 {
		s = maskSpans(s, findQueryValue)
	}
	return s
}

// scrubBytes is scrub for bytes. It never changes b itself.
func scrubBytes(b []byte) []byte {
	if clues(b) == 0 {
		return b
	}
	s := string(b)
	if clean := scrub(s); clean != s {
		return []byte(clean)
	}
	return b
}

// scrubBase64 is scrub for a text that may be the base64 of bytes: so does
// encoding/json write a []byte, and a key inside would keep no shape to see.
func scrubBase64(s string) string {
	if clean := scrub(s); clean != s || len(s)%4 != 0 || len(s) < len(key.Prefix)+keyBodyLen {
		return clean
	}
	raw, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		return s
	}
	text := string(raw)
	clean := scrub(text)
	if clean == text {
		return s
	}
	return base64.StdEncoding.EncodeToString([]byte(clean))
}

const (
	clueKey = 1 << iota
	clueBearer
	clueQuery

	clueAny = clueKey | clueBearer | clueQuery
)

// telling marks the characters that clues looks at more closely.
var telling = [256]bool{'%': true, '\\': true, '_': true, '=': true, ' ': true, '\t': true, '+': true}

// clues tells in one cheap pass what is worth searching for. Nearly every text
// in a log has none of it.
func clues[S string | []byte](s S) (found uint8) {
	for i := range len(s) {
		if !telling[s[i]] {
			continue
		}
		var before byte
		if i > 0 {
			before = foldChar(s[i-1])
		}
		switch c := s[i]; {
		case c == '%' || c == '\\':
			return clueAny
		case c == '_' && before == 'l': // zejzl_
			found |= clueKey
		case c == '=' && (before == 'y' || before == 'n' || before == '-'): // key=, token=, key_=
			found |= clueQuery
		case isTokenSpace(c) && before == 'r': // Bearer
			found |= clueBearer
		}
	}
	return found
}

// maskSpans replaces every span that find reports, from left to right.
func maskSpans(s string, find func(s string, from int) (start, end int)) string {
	start, end := find(s, 0)
	if start < 0 {
		return s
	}
	var b strings.Builder
	from := 0
	for start >= 0 {
		b.WriteString(s[from:start])
		b.WriteString(redacted)
		from = end
		start, end = find(s, from)
	}
	b.WriteString(s[from:])
	return b.String()
}

// findKey finds the next text of a key's shape, with all characters that
// follow without a break, so that no tail of a longer secret remains.
func findKey(s string, from int) (start, end int) {
	for i := from; i < len(s); {
		c, width := charAt(s, i)
		if c == key.Prefix[0] {
			if end := keyEnd(s, i); end > 0 {
				return i, end
			}
		}
		i += width
	}
	return -1, -1
}

func keyEnd(s string, i int) int {
	for j := range len(key.Prefix) {
		if i >= len(s) {
			return -1
		}
		c, width := charAt(s, i)
		if c != key.Prefix[j] {
			return -1
		}
		i += width
	}
	end, n := skip(s, i, isKeyChar)
	if n < keyBodyLen {
		return -1
	}
	return end
}

// findBearer finds the next token after the word Bearer.
func findBearer(s string, from int) (start, end int) {
	const word = "bearer"
	for i := from; i+len(word) < len(s); i++ {
		if s[i]|0x20 != word[0] || !strings.EqualFold(s[i:i+len(word)], word) {
			continue
		}
		start, spaces := skip(s, i+len(word), isTokenSpace)
		if spaces == 0 {
			continue
		}
		end, n := skip(s, start, isTokenChar)
		if n > 0 && s[start:end] != "realm=" { // realm="…" is a challenge, not a token
			return start, end
		}
	}
	return -1, -1
}

// findQueryValue finds the next value of a query parameter that holds keys.
func findQueryValue(s string, from int) (start, end int) {
	name := from
	for i := from; i < len(s); {
		c, width := charAt(s, i)
		if c == '=' && isKeyParam(s[name:i]) {
			if end := queryValueEnd(s, i+width, width); end > i+width {
				return i + width, end
			}
		}
		i += width
		if !isNameChar(c) {
			name = i
		}
	}
	return -1, -1
}

// queryValueEnd returns where a value ends that starts at i after a "=" of the
// given width. An encoded "&" ends it only if the "=" was encoded as often:
// else it belongs to the value.
func queryValueEnd(s string, i, width int) int {
	for i < len(s) {
		c, w := charAt(s, i)
		if (c == '&' || c == '#') && w <= width {
			return i
		}
		if s[i] <= ' ' || strings.IndexByte("\"\\<>", s[i]) >= 0 {
			return i
		}
		i += w
	}
	return i
}

// isKeyParam tells a query parameter that holds a key, whatever its case,
// separators and encoding.
func isKeyParam(name string) bool {
	var buf [len("xgoogapikey")]byte
	n := 0
	for i := 0; i < len(name); {
		c, width := charAt(name, i)
		i += width
		if c = foldChar(c); c == '-' {
			continue
		}
		if n == len(buf) {
			return false
		}
		buf[n] = c
		n++
	}
	switch string(buf[:n]) {
	case "key", "apikey", "xapikey", "xgoogapikey", "accesstoken":
		return true
	}
	return false
}

// isCredentialHeader tells a header that holds a credential. Upper and lower
// case count as one, and so do "-", "_" and ".": Caddy drops a header named
// X_Api_Key, but logs it.
func isCredentialHeader(name string) bool {
	var buf [len("sec-websocket-protocol")]byte
	if len(name) > len(buf) {
		return false
	}
	for i := range len(name) {
		buf[i] = foldChar(name[i])
	}
	switch string(buf[:len(name)]) {
	case "authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "api-key", "x-goog-api-key",
		"sec-websocket-protocol": // browsers can send a key for a websocket only there
		return true
	}
	return false
}

// likeCredentialHeader tells a name with that of a credential header in it,
// such as X-Forwarded-Authorization.
func likeCredentialHeader(name string) bool {
	for i := range len(name) {
		switch name[i] | 0x20 {
		case 'a':
			if hasFoldedPrefix(name[i:], "authorization") || hasFoldedPrefix(name[i:], "api-key") {
				return true
			}
		case 'c':
			if hasFoldedPrefix(name[i:], "cookie") {
				return true
			}
		case 's':
			if hasFoldedPrefix(name[i:], "sec-websocket-protocol") {
				return true
			}
		}
	}
	return false
}

// charAt returns the character at i and how many bytes spell it: one, or a
// percent escape, itself escaped any number of times, or a JSON escape of ASCII.
func charAt(s string, i int) (c byte, width int) {
	switch s[i] {
	case '%':
		digits := i + 1
		for isHexPair(s, digits+2) && s[digits:digits+2] == "25" {
			digits += 2
		}
		if isHexPair(s, digits) {
			return unhex(s[digits])<<4 | unhex(s[digits+1]), digits + 2 - i
		}
	case '\\':
		if strings.HasPrefix(s[i:], `\u00`) && isHexPair(s, i+4) {
			return unhex(s[i+4])<<4 | unhex(s[i+5]), 6
		}
	}
	return s[i], 1
}

func isHexPair(s string, i int) bool {
	return i+1 < len(s) && unhex(s[i]) < 16 && unhex(s[i+1]) < 16
}

// skip returns the end of the characters from i on that are in a class, and
// their number.
func skip(s string, i int, in func(byte) bool) (end, n int) {
	for i < len(s) {
		c, width := charAt(s, i)
		if !in(c) {
			break
		}
		i += width
		n++
	}
	return i, n
}

func isKeyChar(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_' || c == '-'
}

func isNameChar(c byte) bool { return isKeyChar(c) || c == '.' }

// isTokenChar tells the characters of a bearer token (RFC 6750, 2.1).
func isTokenChar(c byte) bool { return isNameChar(c) || c == '~' || c == '+' || c == '/' || c == '=' }

// isTokenSpace tells what stands between Bearer and the token: "+" in a query.
func isTokenSpace(c byte) bool { return c == ' ' || c == '\t' || c == '+' }

func foldChar(c byte) byte {
	switch {
	case 'A' <= c && c <= 'Z':
		return c | 0x20
	case c == '_' || c == '.':
		return '-'
	}
	return c
}
