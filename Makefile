# The few commands. `make run` and `make test` also install what they need on a Debian machine (root or sudo).

SHELL := /bin/bash
export PATH := $(HOME)/.cargo/bin:$(PATH)
SERVERS := tests/real/servers
# What the caller chooses on make's command line reaches the scripts.
export N8N N8N_URL N8N_API_KEY N8N_PORT N8N_BROKER_PORT FASTAPI_BRIDGE_PORT DEALSCALE_ADMIN_PORT DEALSCALE_STATE BRIDGE_URL

.DEFAULT_GOAL := help
.PHONY: help run test test-long test-real test-host deb bench lint deny fmt ci clean-state

help:
	@echo 'make run         the main job on a real n8n, from nothing; stays up (N8N=none, N8N_URL=…, *_PORT=…)'
	@echo 'make test        unit, simulation, crash and integration tests, with embedded parts only'
	@echo 'make test-real   the same promises against real PostgreSQL, Pulsar, n8n, an OAuth2 server and an OTLP collector'
	@echo 'make deb         the Debian packages, in target/deb (checked by lintian)'
	@echo 'make test-host   those packages on clean Debian 12 and 13 hosts with systemd: install, upgrade, purge (root; not part of ci yet)'
	@echo 'make test-long   the long crash tests and simulations'
	@echo 'make bench       the figures of docs/benchmarks.md'
	@echo 'make lint        formatting, clippy, licences and bans'
	@echo 'make ci          all that has to pass: lint, test, test-real'
	@echo 'make clean-state removes .state of this checkout'

run:
	@tests/real/main-job.sh

test:
	@$(SERVERS)/packages.sh build test
	cargo test --locked

test-long:
	@$(SERVERS)/packages.sh build test
	DEALSCALE_TEST_LONG=1 cargo test --locked -- --include-ignored

test-real:
	@tests/real/run.sh

deb:
	@packaging/build.sh

test-host:
	@tests/host/run.sh

bench:
	@$(SERVERS)/packages.sh build test
	benches/run.sh

lint: deny
	cargo fmt --all --check
	cargo clippy --locked --all-targets -- -D warnings

deny:
	@tests/real/servers/deny.sh

fmt:
	cargo fmt --all

ci:
	@.ci/run

clean-state:
	rm -rf .state
