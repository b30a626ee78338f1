// Command caddy is Caddy with zejzl_auth built in, for development, tests and the first run.
// Production builds use xcaddy; see the README.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/zejzl/caddy-zejzl-auth"
)

func main() {
	caddycmd.Main()
}
