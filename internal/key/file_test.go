package key

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

var (
	hash1 = Sum(canary).String()
	hash2 = Sum(otherSecret).String()
)

// fileKey returns a valid key of a key file, with more fields after it.
func fileKey(more string) string {
	return `{"name":"A","tier":"pro","secrets":[{"hash":"` + hash1 + `"}]` + more + `}`
}

func fileOf(keys ...string) string { return `{"keys":[` + strings.Join(keys, ",") + `]}` }

func TestParseFile(t *testing.T) {
	in := `
{
	"keys": [
		{
			"id": "k_7", "name": "CI \u0072unner \"1\"", "tier": "pro",
			"secrets": [
				{"hash": "` + hash1 + `", "not_after": "2030-01-31T00:00:00.5+01:00"},
				{"not_after": "9999-12-31T23:59:59Z", "hash": "sha256:` + strings.ToUpper(hash2[7:]) + `"}
			],
			"not_before": "1970-01-01T00:00:00Z",
			"expires_at": "2031-01-01T00:00:00Z",
			"revoked_at": "2032-01-01T00:00:00Z"
		},
		{"t\u0069er": "free", "secrets": [{"hash": "` + hash2 + `"}], "name": "Zo\u00eb \ud83d\ude00"}
	]
}` + "\r\n"
	day := func(y int) time.Time { return time.Date(y, 1, 1, 0, 0, 0, 0, time.UTC) }
	want := []Record{
		{
			ID: "k_7", Name: `CI runner "1"`, Tier: "pro",
			Secrets: []Secret{
				{Sum(canary), time.Date(2030, 1, 30, 23, 0, 0, 5e8, time.UTC)},
				{Sum(otherSecret), time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)},
			},
			NotBefore: day(1970), ExpiresAt: day(2031), RevokedAt: day(2032),
		},
		{Name: "Zoë 😀", Tier: "free", Secrets: []Secret{{Digest: Sum(otherSecret)}}},
	}
	got, err := ParseFile(strings.NewReader(in))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
	for _, in := range []string{`{"keys":[]}`, " { \"keys\" : [ ] } \n"} {
		if got, err := ParseFile(strings.NewReader(in)); len(got) != 0 || err != nil {
			t.Errorf("%s: %v, %v", in, got, err)
		}
	}
}

var badFiles = map[string]string{
	"":                               `expected an object (line 1)`,
	"\n\n":                           `expected an object (line 3)`,
	"null":                           `expected an object (line 1)`,
	"[]":                             `expected an object (line 1)`,
	"\ufeff" + fileOf():              `expected an object (line 1)`,
	"{":                              `expected a string (line 1)`,
	"{}":                             `expected the field "keys" (line 1)`,
	`{"keys":null}`:                  `keys: expected a list (line 1)`,
	`{"keys":{}}`:                    `keys: expected a list (line 1)`,
	`{"keys":[}`:                     `keys[0]: expected an object (line 1)`,
	`{"keys":[]`:                     `expected "," or "}" (line 1)`,
	`{"keys":[],}`:                   `expected a string (line 1)`,
	`{"keys":[]} x`:                  `expected nothing after the closing brace (line 1)`,
	`{"keys":[]}{"keys":[]}`:         `expected nothing after the closing brace (line 1)`,
	`{"keys":[]}` + "\x00":           `expected nothing after the closing brace (line 1)`,
	`{"keys":[],"keys":[]}`:          `keys: the field is stated twice (line 1)`,
	`{"keys":[],"` + canary + `":1}`: `unknown field: expected keys (line 1)`,
	`{"Keys":[]}`:                    `unknown field: expected keys (line 1)`,
	`{"keys":[] // ok` + "\n}":       `expected "," or "}" (line 1)`,
	fileOf(fileKey("")) + canary:     `expected nothing after the closing brace (line 1)`,
	"{\"keys\":[\n" + fileKey("") + ",\n" + fileKey("") + ",\n]}": `keys[2]: expected an object (line 4)`,

	fileOf("null"):                                               `keys[0]: expected an object (line 1)`,
	fileOf(`"` + canary + `"`):                                   `keys[0]: expected an object (line 1)`,
	fileOf(fileKey(""), fileKey(`,"name":"B"`)):                  `keys[1].name: the field is stated twice (line 1)`,
	fileOf(fileKey(`,"n\u0061me":"B"`)):                          `keys[0].name: the field is stated twice (line 1)`,
	fileOf(fileKey(`,"` + canary + `":"B"`)):                     `keys[0]: unknown field: expected name, tier, secrets, id, not_before, expires_at, revoked_at (line 1)`,
	fileOf(fileKey(`,"Revoked_at":"2020-01-01T00:00:00Z"`)):      `keys[0]: unknown field: expected name, tier, secrets, id, not_before, expires_at, revoked_at (line 1)`,
	fileOf(fileKey(`,"id":""`)):                                  `keys[0].id: expected an id of 1 to 64 characters from A-Z a-z 0-9 . _ - (line 1)`,
	fileOf(fileKey(`,"id":"` + canary + `"`)):                    `keys[0].id: expected an id that contains no secret (line 1)`,
	fileOf(fileKey(`,"id":7`)):                                   `keys[0].id: expected a string (line 1)`,
	fileOf(fileKey(`,"id":null`)):                                `keys[0].id: expected a string (line 1)`,
	fileOf(fileKey(`,"id" "k"`)):                                 `keys[0].id: expected ":" (line 1)`,
	fileOf(fileKey(`,"id":"k" "name"`)):                          `keys[0]: expected "," or "}" (line 1)`,
	fileOf(fileKey(`,`)):                                         `keys[0]: expected a string (line 1)`,
	fileOf(fileKey(`,"id":"` + canary)):                          `keys[0].id: expected the end of a string (line 1)`,
	fileOf(fileKey(`,"id":"\ud800"`)):                            `keys[0].id: expected a string with valid escapes (line 1)`,
	fileOf(fileKey(`,"id":"\q` + canary + `"`)):                  `keys[0].id: expected a string with valid escapes (line 1)`,
	fileOf(fileKey(`,"id":"\u00`)):                               `keys[0].id: expected a string with valid escapes (line 1)`,
	fileOf(fileKey(",\"id\":\"\t" + canary + `"`)):               `keys[0].id: expected no control character in a string (line 1)`,
	fileOf(fileKey(",\"id\":\"\\n\t" + canary + `"`)):            `keys[0].id: expected a string with valid escapes (line 1)`,
	fileOf(fileKey(`,"not_before":"` + canary + `"`)):            badTime("not_before"),
	fileOf(fileKey(`,"expires_at":"2030-01-31"`)):                badTime("expires_at"),
	fileOf(fileKey(`,"expires_at":"2030-01-31 00:00:00Z"`)):      badTime("expires_at"),
	fileOf(fileKey(`,"expires_at":"2030-02-30T00:00:00Z"`)):      badTime("expires_at"),
	fileOf(fileKey(`,"expires_at":"2030-01-31T0:00:00Z"`)):       badTime("expires_at"),
	fileOf(fileKey(`,"expires_at":"2030-01-31T00:00:00,5Z"`)):    badTime("expires_at"),
	fileOf(fileKey(`,"expires_at":"2030-01-31T00:00:00+24:00"`)): badTime("expires_at"),
	fileOf(fileKey(`,"expires_at":"2030-01-31T00:00:00-01:60"`)): badTime("expires_at"),
	fileOf(fileKey(`,"expires_at":"2030-01-31T00:00:00"`)):       badTime("expires_at"),
	fileOf(fileKey(`,"revoked_at":"0001-01-01T00:00:00Z"`)):      badTime("revoked_at"),
	fileOf(fileKey(`,"revoked_at":"1969-12-31T23:59:59Z"`)):      badTime("revoked_at"),
	fileOf(fileKey(`,"revoked_at":1700000000`)):                  `keys[0].revoked_at: expected a string (line 1)`,
	fileOf(fileKey(`,"revoked_at":""`)):                          badTime("revoked_at"),
	fileOf(fileKey(`,"revoked_at":false`)):                       `keys[0].revoked_at: expected a string (line 1)`,

	fileOf(`{}`):                                  `keys[0]: expected the field "name" (line 1)`,
	fileOf(`{"name":"A"}`):                        `keys[0]: expected the field "tier" (line 1)`,
	fileOf(`{"name":"A","tier":"pro"}`):           `keys[0]: expected the field "secrets" (line 1)`,
	fileOf(`{"name":""}`):                         `keys[0].name: expected a name of 1 to 128 bytes (line 1)`,
	fileOf(`{"name":"a\nb"}`):                     `keys[0].name: expected a name without control characters, in UTF-8 (line 1)`,
	fileOf(`{"name":"` + canary + `"}`):           `keys[0].name: expected a name that contains no secret (line 1)`,
	fileOf(`{"name":"\u007a` + canary[1:] + `"}`): `keys[0].name: expected a name that contains no secret (line 1)`,
	fileOf(`{"tier":"` + canary + `"}`):           `keys[0].tier: expected a tier of 1 to 32 characters from a-z 0-9 _ - (line 1)`,
	fileOf(`{"tier":null}`):                       `keys[0].tier: expected a string (line 1)`,

	fileOf(`{"secrets":[]}`):                                                      `keys[0].secrets: expected at least one secret (line 1)`,
	fileOf(`{"secrets":["` + canary + `"]}`):                                      `keys[0].secrets[0]: expected an object (line 1)`,
	fileOf(`{"secrets":"` + canary + `"}`):                                        `keys[0].secrets: expected a list (line 1)`,
	fileOf(`{"secrets":[{}]}`):                                                    `keys[0].secrets[0]: expected the field "hash" (line 1)`,
	fileOf(`{"secrets":[{"hash":"` + canary + `"}]}`):                             badHash("keys[0].secrets[0]"),
	fileOf(`{"secrets":[{"hash":"sha256:` + canary + `"}]}`):                      badHash("keys[0].secrets[0]"),
	fileOf(`{"secrets":[{"hash":"` + hash1[:70] + `"}]}`):                         badHash("keys[0].secrets[0]"),
	fileOf(`{"secrets":[{"hash":"` + hash1 + `"},{"hash":"` + hash1[7:] + `"}]}`): badHash("keys[0].secrets[1]"),
	fileOf(`{"secrets":[{"hash":"` + hash1 + `","Not_after":""}]}`):               `keys[0].secrets[0]: unknown field: expected hash, not_after (line 1)`,
	fileOf(`{"secrets":[{"hash":"` + hash1 + `","hash":"` + hash2 + `"}]}`):       `keys[0].secrets[0].hash: the field is stated twice (line 1)`,
	fileOf(`{"secrets":[{"not_after":"` + canary + `"}]}`):                        badTime("secrets[0].not_after"),

	fileOf(fileKey(",\"id\":\"\xff" + canary + `"`)): `expected UTF-8`,
	"\xff\xfe{\x00": `expected UTF-8`,
}

func badTime(field string) string {
	return "keys[0]." + field + ": expected a time such as 2030-01-31T00:00:00Z (RFC 3339, 1970 or later) (line 1)"
}

func badHash(secret string) string {
	return secret + `.hash: expected "sha256:" and 64 hex digits (line 1)`
}

func TestParseFileErrors(t *testing.T) {
	for in, want := range badFiles {
		got, err := ParseFile(strings.NewReader(in))
		if err == nil || got != nil {
			t.Errorf("%s was accepted: %v", in, got)
			continue
		}
		checkMessage(t, in, err)
		if err.Error() != want {
			t.Errorf("%s\n got %v\nwant %s", in, err, want)
		}
	}
}

// A file that is half written is never taken for a shorter list of keys.
func TestParseFileTruncated(t *testing.T) {
	whole := fileOf(fileKey(`,"id":"k\u005f1","expires_at":"2031-01-01T00:00:00Z"`), fileKey(""))
	if _, err := ParseFile(strings.NewReader(whole)); err != nil {
		t.Fatal(err)
	}
	for n := range len(whole) {
		_, err := ParseFile(strings.NewReader(whole[:n]))
		if err == nil {
			t.Errorf("the first %d bytes were accepted", n)
			continue
		}
		checkMessage(t, whole[:n], err)
	}
}

func TestParseFileReadError(t *testing.T) {
	broken := errors.New("broken")
	if _, err := ParseFile(iotest.ErrReader(broken)); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

func FuzzKeyFile(f *testing.F) {
	for in := range badFiles {
		f.Add([]byte(in))
	}
	f.Add([]byte(fileOf(fileKey(`,"id":"k_1","expires_at":"2031-01-01T00:00:00Z"`), fileKey(""))))
	f.Fuzz(func(t *testing.T, in []byte) {
		got, err := ParseFile(bytes.NewReader(in))
		if err != nil {
			if got != nil {
				t.Errorf("%q: an error and keys", in)
			}
			checkMessage(t, string(in), err)
			return
		}
		// What is accepted, a lax parser reads in the same way.
		var lax struct {
			Keys []struct {
				ID, Name, Tier string
				Secrets        []struct {
					Hash     string
					NotAfter time.Time `json:"not_after"`
				}
				NotBefore time.Time `json:"not_before"`
				ExpiresAt time.Time `json:"expires_at"`
				RevokedAt time.Time `json:"revoked_at"`
			}
		}
		dec := json.NewDecoder(bytes.NewReader(in))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&lax); err != nil || len(lax.Keys) != len(got) {
			t.Fatalf("%q: %d keys, encoding/json says %d, %v", in, len(got), len(lax.Keys), err)
		}
		for i, w := range lax.Keys {
			g := got[i]
			if g.ID != w.ID || g.Name != w.Name || g.Tier != w.Tier || !g.NotBefore.Equal(w.NotBefore) ||
				!g.ExpiresAt.Equal(w.ExpiresAt) || !g.RevokedAt.Equal(w.RevokedAt) || len(g.Secrets) != len(w.Secrets) {
				t.Fatalf("%q: got %+v, want %+v", in, g, w)
			}
			for j, ws := range w.Secrets {
				if gs := g.Secrets[j]; gs.Digest.String() != strings.ToLower(ws.Hash) || !gs.NotAfter.Equal(ws.NotAfter) {
					t.Fatalf("%q: got %+v, want %+v", in, gs, ws)
				}
			}
			if ValidateName(g.Name) != nil || ValidateTierName(g.Tier) != nil || len(g.Secrets) == 0 {
				t.Fatalf("%q: %+v", in, g)
			}
		}
	})
}

// keyFile returns a file of n keys as a program would write it.
func keyFile(n int) []byte {
	var b bytes.Buffer
	b.WriteString("{\"keys\": [\n")
	for i := range n {
		if i > 0 {
			b.WriteString(",\n")
		}
		fmt.Fprintf(&b, `{"id": "k_%012d", "name": "customer %d", "tier": "%s", "secrets": [{"hash": "%s"}], "expires_at": "2031-01-01T00:00:00Z"}`,
			i, i, []string{"free", "pro", "enterprise"}[i%3], Sum(fmt.Sprint(i)))
	}
	b.WriteString("\n]}\n")
	return b.Bytes()
}
