package zejzlauth

import (
	"bytes"
	"fmt"
	"os"
	"reflect"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

func openTerminal(t *testing.T) (user, program *os.File) {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { user.Close() })
	if err := unix.IoctlSetPointerInt(int(user.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(user.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return user, program
}

func TestHashReadsTerminalWithoutEcho(t *testing.T) {
	user, program := openTerminal(t)
	before, err := term.GetState(int(program.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	type result struct {
		secret string
		err    error
	}
	read := make(chan result)
	go func() {
		secret, err := readSecret(program, program)
		read <- result{secret, err}
	}()

	// Until the echo is off, the terminal would show what is typed.
	for deadline := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		now, err := term.GetState(int(program.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(now, before) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the echo stays on")
		}
	}
	secret := key.Generate()
	if _, err := user.WriteString(secret + "\n"); err != nil {
		t.Fatal(err)
	}
	if got := <-read; got.err != nil || got.secret != secret {
		t.Fatalf("read %q, %v", got.secret, got.err)
	}
	if after, err := term.GetState(int(program.Fd())); err != nil || !reflect.DeepEqual(after, before) {
		t.Errorf("the terminal is left changed: %v", err)
	}
	shown := make([]byte, 1024)
	n, err := user.Read(shown)
	if err != nil {
		t.Fatal(err)
	}
	if shown = shown[:n]; !bytes.HasPrefix(shown, []byte("Secret: ")) || bytes.Contains(shown, []byte(secret)) {
		t.Errorf("the terminal shows %q", shown)
	}
}
