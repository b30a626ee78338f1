package zejzlauth

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

const (
	sourceEnv  = "env"
	sourceFile = "file"

	defaultEnvPrefix = "ZEJZL_API_KEY_"
)

// Source is where keys come from.
type Source struct {
	// The kind of source, env or file. Required.
	Source string `json:"source"`

	// For env: every variable whose name starts so holds a key, as
	// `<secret or sha256:hex>:<tier>[:<name>]`. Default: `"ZEJZL_API_KEY_"`.
	Prefix string `json:"prefix,omitempty"`

	// For file: the path of a key file, relative to the working directory.
	// It is read again when it changes. Required. Example: `"keys.json"`.
	Path string `json:"path,omitempty"`
}

func (a *App) provisionSource(s Source) error {
	switch s.Source {
	case sourceEnv:
		if s.Path != "" {
			return errors.New("path: expected for file sources only")
		}
		if s.Prefix == "" {
			s.Prefix = defaultEnvPrefix
		}
		located, err := key.ParseEnv(os.Environ(), s.Prefix)
		a.stated = append(a.stated, located...)
		return err
	case sourceFile:
		if s.Prefix != "" {
			return errors.New("prefix: expected for env sources only")
		}
		return a.provisionFile(s.Path)
	}
	return errors.New("source: expected env or file")
}

func (a *App) provisionFile(path string) error {
	path, err := caddy.NewReplacer().ReplaceOrErr(path, true, true)
	if err != nil {
		return fmt.Errorf("path: %w", err)
	}
	if path == "" {
		return errors.New("path: expected the path of a key file")
	}
	f := &keyFile{path: path}
	records, err := f.read()
	if err != nil {
		return err
	}
	f.use(records)
	a.files = append(a.files, f)
	return nil
}

func isHash(s string) bool { return strings.HasPrefix(s, "sha256:") }

// digestOf takes a secret or its sha256: form. Errors never tell it.
func digestOf(s string) (key.Digest, error) {
	if isHash(s) {
		return key.ParseDigest(s)
	}
	if err := key.ValidateSecret(s); err != nil {
		return key.Digest{}, err
	}
	return key.Sum(s), nil
}

// keyFile is a file of keys, and what of it is in use.
type keyFile struct {
	path    string
	info    os.FileInfo  // as it was last read; nil: it could not be
	settled bool         // it will not change again under the same time stamp
	records []key.Record // last good ones
	count   int          // of records in use
	failed  bool         // it went bad after it was good
}

// pollInterval is how soon a changed key file is noticed. Polling sees what
// notification misses: other mounts, symlinks swapped by an orchestrator.
const pollInterval = time.Second

// settleTime: a file changed this shortly before it was read may change again
// within the same time stamp, so it is read once more.
const settleTime = 2 * time.Second

// differs tells whether the file is another one than was last read. Symlinks
// are followed.
func (f *keyFile) differs() bool {
	info, err := os.Stat(f.path)
	if err != nil || f.info == nil {
		return (err == nil) != (f.info != nil)
	}
	return !os.SameFile(info, f.info) || info.Size() != f.info.Size() || !info.ModTime().Equal(f.info.ModTime())
}

// read parses the file and remembers which version of it that was.
func (f *keyFile) read() ([]key.Record, error) {
	f.info, f.settled = nil, true
	info, err := os.Stat(f.path)
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	f.info = info
	if !info.Mode().IsRegular() { // opening a pipe would wait for its other end
		return nil, fmt.Errorf("key file %s: expected a regular file", f.path)
	}
	file, err := os.Open(f.path)
	if err != nil {
		f.settled = false // differs does not see permissions change
		return nil, fmt.Errorf("key file: %w", err)
	}
	defer file.Close()
	f.settled = time.Since(info.ModTime()) > settleTime
	records, err := key.ParseFile(bufio.NewReaderSize(file, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("key file %s: %w", f.path, err)
	}
	return records, nil
}

func (f *keyFile) use(records []key.Record) {
	f.records, f.count, f.failed = records, len(records), false
}

// pollFiles keeps the keyring as the key files say until ctx ends.
func (a *App) pollFiles(ctx context.Context) {
	defer close(a.pollDone)
	// Records are kept only to be joined with those of another file that changes.
	if len(a.files) == 1 {
		a.files[0].records = nil
	}
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			for _, f := range a.files {
				if differs := f.differs(); differs || !f.settled {
					a.reload(f, differs)
				}
			}
		}
	}
}

// reload puts a key file in use again. If it is bad, its last good keys stay.
func (a *App) reload(f *keyFile, differs bool) {
	last, count, failed := f.records, f.count, f.failed
	records, err := f.read()
	if err == nil {
		f.use(records)
		var set *key.Set
		var keys []*key.Key
		if set, keys, err = a.assemble(); err == nil {
			a.keyring.Replace(set, keys)
		}
	}
	if err != nil {
		f.records, f.count, f.failed = last, count, true
		if !failed || differs {
			a.logger.Error("key file went bad: its last good keys stay in use", zap.Error(err))
		}
	} else if failed || differs {
		a.logger.Info("key file loaded", zap.String("path", f.path), zap.Int("keys", f.count))
	}
	if len(a.files) == 1 {
		f.records = nil
	}
	a.reportFiles()
}

func (a *App) reportFiles() {
	ok, total := 1.0, 0
	for _, f := range a.files {
		total += f.count
		if f.failed {
			ok = 0
		}
	}
	metrics.keyFileOK.Set(ok)
	metrics.keys.WithLabelValues(sourceFile).Set(float64(total))
}
