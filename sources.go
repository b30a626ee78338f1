package zejzlauth

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
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
	// The kind of source, env or file. Required. Example: `"file"`.
	Source string `json:"source"`

	// For env: every variable whose name starts so holds a key, as
	// `<secret or sha256:hex>:<tier>[:<name>]`. Default: `"ZEJZL_API_KEY_"`.
	// Example: `"CHAT_KEY_"`.
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
		prefix, err := caddy.NewReplacer().ReplaceOrErr(s.Prefix, true, true)
		if err != nil {
			return fmt.Errorf("prefix: %w", err)
		}
		located, err := key.ParseEnv(os.Environ(), prefix)
		a.env = append(a.env, located...)
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
	f.read()
	a.files = append(a.files, f)
	return f.err
}

func isHash(s string) bool { return strings.HasPrefix(s, "sha256:") }

// keyFile is a file of keys, as it was last read.
type keyFile struct {
	path    string
	info    os.FileInfo  // nil: it could not be opened
	settled bool         // it will not change again under the same time stamp
	fresh   []key.Record // as last parsed
	records []key.Record // in use, or tried
	good    []key.Record // as last put in use
	err     error        // why fresh is not what the file holds
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
func (f *keyFile) read() {
	var records []key.Record
	if records, f.err = f.parse(); f.err == nil {
		f.fresh, f.records = records, records
	}
}

func (f *keyFile) parse() ([]key.Record, error) {
	f.info, f.settled = nil, true
	file, err := os.OpenFile(f.path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would wait for its other end
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("key file %s: expected a regular file", f.path)
	}
	f.info, f.settled = info, time.Since(info.ModTime()).Abs() > settleTime
	records, err := key.ParseFile(bufio.NewReaderSize(file, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("key file %s: %w", f.path, err)
	}
	return records, nil
}

// pollFiles keeps the keyring as the key files say until ctx ends.
func (a *App) pollFiles(ctx context.Context) {
	a.forgetRecords()
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			a.pollOnce()
		}
	}
}

// pollOnce reads the key files that changed and puts them in use at once: a
// key that moves from one file to another is in both or neither for a while.
func (a *App) pollOnce() {
	read, parsed, changed := false, false, false
	for _, f := range a.files {
		differs := f.differs()
		if differs || !f.settled {
			f.read()
			read, parsed = true, parsed || f.err == nil
		}
		changed = changed || differs
	}
	if read {
		a.useFiles(parsed, changed)
		a.forgetRecords()
	}
}

// useFiles puts in use what was parsed, and tells how that went.
func (a *App) useFiles(parsed, changed bool) {
	var errs []error
	for _, f := range a.files {
		if f.err != nil {
			errs = append(errs, f.err)
		}
	}
	state := *a.keyState.Load()
	if parsed {
		set, keys, assembled, err := a.assembleFiles()
		if err != nil {
			errs = append(errs, err)
		}
		if set != nil {
			a.keyring.Replace(set, keys)
			sweepZones(monotonicTick(), set.Has)
			state = assembled
		}
	}
	err := firstErrors(errs)
	state.failed = err != nil
	a.keyState.Store(&state)
	switch {
	case err == nil:
		if changed || a.lastError != "" {
			a.logger.Info("key files loaded", zap.Int("keys", state.file))
		}
		a.lastError = ""
	case err.Error() != a.lastError:
		a.lastError = err.Error()
		a.logger.Error("a key file went bad: the last good keys stay in use", zap.Error(err))
	}
}

// assembleFiles joins all files as they stand. If they contradict each other or
// another source, it joins those that can be without the others: a mistake in
// one file must not hold up a revocation in another. set is nil if none can.
func (a *App) assembleFiles() (set *key.Set, keys []*key.Key, state keyState, err error) {
	for _, f := range a.files {
		f.records = f.fresh
	}
	if set, keys, state, err = a.assemble(); err == nil || len(a.files) == 1 {
		if err != nil {
			set = nil
		}
		a.keepRecords()
		return set, keys, state, err
	}
	for _, f := range a.files {
		f.records = f.good
	}
	for _, f := range a.files {
		f.records = f.fresh
		if _, _, _, bad := a.assemble(); bad != nil {
			f.records = f.good
		}
	}
	set, keys, state, bad := a.assemble()
	if bad != nil {
		return nil, nil, state, err
	}
	a.keepRecords()
	return set, keys, state, err
}

func (a *App) keepRecords() {
	for _, f := range a.files {
		f.good = f.records
	}
}

// forgetRecords frees what is only needed to join a file with others.
func (a *App) forgetRecords() {
	if f := a.files[0]; len(a.files) == 1 {
		f.fresh, f.records, f.good = nil, nil, nil
	}
}
