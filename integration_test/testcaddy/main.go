// Command testcaddy is Caddy with the guard and with handlers that misbehave
// on purpose, which no standard handler does.
package main

import (
	"errors"
	"io"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/zejzl/caddy-zejzl-auth"
)

func main() {
	caddy.RegisterModule(new(Misbehave))
	httpcaddyfile.RegisterHandlerDirective("misbehave", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		m := new(Misbehave)
		return m, m.UnmarshalCaddyfile(h.Dispenser)
	})
	httpcaddyfile.RegisterDirectiveOrder("misbehave", httpcaddyfile.Before, "respond")
	caddycmd.Main()
}

// Misbehave does one odd thing: `misbehave <how> [<text>]`.
type Misbehave struct {
	How  string `json:"how,omitempty"`
	Text string `json:"text,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*Misbehave) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.misbehave", New: func() caddy.Module { return new(Misbehave) }}
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler.
func (m *Misbehave) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.Args(&m.How) {
		return d.ArgErr()
	}
	d.Args(&m.Text)
	return nil
}

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (m *Misbehave) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	switch m.How {
	case "panic":
		panic(m.Text + r.Header.Get("X-Api-Key"))
	case "panic-late": // after the header was written
		_, _ = io.WriteString(w, "begun")
		panic(m.Text)
	case "abort":
		panic(http.ErrAbortHandler)
	case "copy": // io.Copy without WriteHeader finds ReadFrom, unless the reader has a WriteTo
		_, err := io.Copy(w, struct{ io.Reader }{strings.NewReader(m.Text)})
		return err
	case "flush": // a flush commits the header too
		if err := http.NewResponseController(w).Flush(); err != nil {
			return err
		}
		_, err := io.WriteString(w, m.Text)
		return err
	case "nothing": // neither writes nor fails
		return nil
	case "error": // plain error, no HandlerError
		return errors.New(m.Text)
	case "error-late":
		_, _ = io.WriteString(w, "begun")
		return caddyhttp.Error(http.StatusBadGateway, errors.New(m.Text))
	}
	return next.ServeHTTP(w, r)
}
