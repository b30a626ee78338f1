MODULE := github.com/zejzl/caddy-zejzl-auth
CADDY_VERSION := v2.11.9
GOLANGCI_LINT_VERSION := v2.15.0
GOVULNCHECK_VERSION := v1.9.0

# How long each fuzz target runs.
FUZZTIME ?= 10s

# Caddy as users get it, and the linter, in a directory of its version so that a new version is built.
CADDY := .bin/caddy
LINT := .bin/golangci-lint-$(GOLANGCI_LINT_VERSION)/golangci-lint
SOURCES := $(shell find . -name '*.go' ! -name '*_test.go' ! -path './integration_test/*') go.mod go.sum

.DEFAULT_GOAL := help
.NOTPARALLEL:

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

.PHONY: run
run: ## run example.Caddyfile in development mode
	ENVIRONMENT=development go run ./cmd/caddy run --config example.Caddyfile

.PHONY: packages
packages: ## install the system packages that the tests need
	@.ci/packages

# -count=1: the integration tests build and start programs, which the test cache knows nothing of.
.PHONY: test
test: packages ## every test of both modules, with the race detector
	go vet ./...
	CGO_ENABLED=1 go test -race -count=1 -timeout 20m ./...
	cd integration_test && go vet ./...
	cd integration_test && CGO_ENABLED=1 go test -race -count=1 -timeout 20m ./...

.PHONY: lint
lint: $(LINT) ## formatting and linters over both modules
	$(LINT) run ./...
	cd integration_test && ../$(LINT) run ./...

.PHONY: fmt
fmt: $(LINT) ## format both modules
	$(LINT) fmt ./...
	cd integration_test && ../$(LINT) fmt ./...

$(LINT):
	CGO_ENABLED=0 GOBIN=$(CURDIR)/$(@D) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)

.PHONY: vulncheck
vulncheck: ## known vulnerabilities in what is called (needs the network)
	go run golang.org/x/vuln/cmd/govulncheck@$(GOVULNCHECK_VERSION) ./...

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME
	@.ci/fuzz $(FUZZTIME)

.PHONY: build
build: $(CADDY) ## build Caddy with xcaddy and check its modules
	@modules=$$($(CADDY) list-modules) || exit 1; \
	for id in http.handlers.zejzl_auth zejzl caddy.logging.encoders.zejzl; do \
		printf '%s\n' "$$modules" | grep -Fqx "$$id" || { echo "$(CADDY): list-modules does not show $$id" >&2; exit 1; }; \
		echo "$(CADDY) has $$id"; \
	done

# With a version Go does not ask for a list of them, so the replacement builds before anything is published.
$(CADDY): $(SOURCES)
	go tool xcaddy build $(CADDY_VERSION) --with $(MODULE)@v0.1.0=. --output $@

.PHONY: examples
examples: $(CADDY) ## validate, format and adapt every example
	@.ci/examples $(CADDY)

.PHONY: bench
bench: ## the benchmarks in process
	go test -run '^$$' -bench . -benchmem ./...

.PHONY: check
check: test lint fuzz build examples ## all that CI checks
