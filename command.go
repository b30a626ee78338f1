package zejzlauth

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/zejzl/caddy-zejzl-auth/internal/key"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "zejzl",
		Usage: "generate | hash | check",
		Short: "Makes and checks what zejzl_auth needs",
		Long: `
Commands around the zejzl_auth guard. None of them needs a running server.

No secret is ever taken from the command line, where other users and the
shell's history would see it.`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.AddCommand(generateCommand(), hashCommand(), checkCommand())
			cmd.SetFlagErrorFunc(func(cmd *cobra.Command, _ error) error { // which quotes the argument
				return fmt.Errorf("expected the flags that %s --help shows", cmd.CommandPath())
			})
		},
	})
}

// noArgument is cobra.NoArgs without the argument that it quotes: what somebody
// gave in spite of the above must not reach a build log too.
func noArgument(instead string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) > 0 {
			return errors.New("expected no argument; " + instead)
		}
		return nil
	}
}

func generateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "generate [--tier <tier>] [--name <name>] [--json]",
		Short: "Makes a new API key and prints it once",
		Long: `
Makes a new API key from 24 random bytes. Prints the secret, which is for the
caller alone, its hash, and ready lines for the environment and the Caddyfile.`,
		Example: `  caddy zejzl generate --tier pro --name "CI runner"`,
		Args:    noArgument("a tier and a name are given as --tier and --name"),
	}
	cmd.Flags().String("tier", builtinDefaultTier, "the tier of the key")
	cmd.Flags().String("name", "", "a name for logs and the backend")
	cmd.Flags().Bool("json", false, "print JSON")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(func(fl caddycmd.Flags) (int, error) {
		if err := generate(os.Stdout, fl.String("tier"), fl.String("name"), fl.Bool("json")); err != nil {
			return caddy.ExitCodeFailedStartup, err
		}
		return caddy.ExitCodeSuccess, nil
	})
	return cmd
}

// generatedKey is what `generate --json` prints.
type generatedKey struct {
	Secret    string `json:"secret"`
	Hash      string `json:"hash"`
	ID        string `json:"id"`
	Env       string `json:"env"`
	Caddyfile string `json:"caddyfile"`
}

func generate(w io.Writer, tierName, name string, asJSON bool) error {
	if err := key.ValidateTierName(tierName); err != nil {
		return fmt.Errorf("--tier: %w", err)
	}
	if name != "" {
		if err := key.ValidateName(name); err != nil {
			return fmt.Errorf("--name: %w", err)
		}
	}
	secret := key.Generate()
	digest := key.Sum(secret)
	value, line := digest.String()+":"+tierName, "key "+digest.String()+" "+tierName
	if name != "" {
		quoted, err := caddyfileQuote(name)
		if err != nil {
			return fmt.Errorf("--name: %w", err)
		}
		value, line = value+":"+name, line+" "+quoted
	}
	generated := generatedKey{
		Secret: secret, Hash: digest.String(), ID: digest.ID(),
		Env:       defaultEnvPrefix + strings.ToUpper(digest.ID()) + "=" + shellQuote(value),
		Caddyfile: line,
	}
	if asJSON {
		return json.NewEncoder(w).Encode(generated) //nolint:gosec // G117: showing the secret once is what the command is for
	}
	_, err := fmt.Fprintf(w, `API key (shown once, give it to the caller):

  %s

What the server keeps, one of:

  environment  %s
  Caddyfile    %s
`, generated.Secret, generated.Env, generated.Caddyfile)
	return err
}

// caddyfileQuote makes one token of s. A Caddyfile has no escape for its
// placeholders, for a backtick in backticks, nor for a backslash anywhere.
func caddyfileQuote(s string) (string, error) {
	switch {
	case strings.Contains(s, "{"), strings.Contains(s, "`") && strings.Contains(s, `\`):
		return "", errors.New("expected a name without { and without ` beside \\, for a Caddyfile can't hold it")
	case strings.Contains(s, "`"):
		return `"` + strings.ReplaceAll(s, `"`, `\"`) + `"`, nil
	case strings.ContainsAny(s, `"\`):
		return "`" + s + "`", nil
	}
	return `"` + s + `"`, nil
}

func hashCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "hash",
		Short: "Prints the hash of an existing secret",
		Long: `
Reads a secret from standard input, or without echo from a terminal, and prints
the sha256: form that configurations and key files hold.`,
		Example: `  caddy zejzl hash < secret.txt`,
		Args:    noArgument("the secret comes from standard input"),
		RunE: caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) {
			secret, err := readSecret(os.Stdin, os.Stderr)
			if err == nil {
				err = hashSecret(os.Stdout, secret)
			}
			if err != nil {
				return caddy.ExitCodeFailedStartup, err
			}
			return caddy.ExitCodeSuccess, nil
		}),
	}
}

func hashSecret(w io.Writer, secret string) error {
	if err := key.ValidateSecret(secret); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w, key.Sum(secret))
	return err
}

// readSecret reads one line, so that `echo` and files with a final newline
// work, and refuses more: a second line is a mistake that must not be dropped.
func readSecret(in *os.File, prompt io.Writer) (string, error) {
	if fd := int(in.Fd()); term.IsTerminal(fd) {
		fmt.Fprint(prompt, "Secret: ")
		secret, err := term.ReadPassword(fd)
		fmt.Fprintln(prompt)
		return string(secret), err
	}
	input, err := io.ReadAll(io.LimitReader(in, 4096))
	if err != nil {
		return "", fmt.Errorf("reading standard input: %w", err)
	}
	secret := strings.TrimSuffix(strings.TrimSuffix(string(input), "\n"), "\r")
	if strings.ContainsAny(secret, "\r\n") {
		return "", errors.New("standard input: expected one line with the secret")
	}
	return secret, nil
}
