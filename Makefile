# ramshelf: `make` alone tells the targets.

GO            ?= go
VERSION       ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS       := -s -w -X main.version=$(VERSION)

# Versions of tools.
export GOLANGCI_LINT ?= v2.13.1

# Packages whose tests are quick enough under the race detector (flush/journal has no goroutines), and those that need the
# whole machine.
RACE     := ./nbd/... ./cache/... ./aoe/... ./flush ./flush/home ./cmd/...
UNIT      = $(shell $(GO) list ./... | grep -v /bench/system)
FUZZTIME ?= 3s

# What `make test` does, in this order.
PARTS    := deps lint vet build cross unit race planted fuzz-short system

# `make run`: a volume of its own beside the sources.
RUN_SIZE    := 1GiB
RUN_MEMORY  := 256MiB
RUN_ADDRESS := 127.0.0.1:10809

export CGO_ENABLED := 0

.PHONY: help build run test race fuzz lint bench soak lab clean deps vet cross unit planted fuzz-short system

help: ## tell the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

build: ## build bin/ramshelf
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ramshelf ./cmd/ramshelf

run: build ## build, and serve a volume of 1 GiB from ./var with 256 MiB of RAM on 127.0.0.1:10809
	@mkdir -p var
	@echo 'A volume of $(RUN_SIZE) at nbd://$(RUN_ADDRESS)/demo. Type in another terminal:'
	@echo '  nbdinfo nbd://$(RUN_ADDRESS)/demo'
	@echo '  nbdcopy --progress FILE nbd://$(RUN_ADDRESS)/demo'
	@echo '  bin/ramshelf status --control var/control.sock --watch'
	@echo '  bin/ramshelf flush --control var/control.sock'
	@echo 'Ctrl-C here brings everything home to var/backing.img and ends.'
	@exec bin/ramshelf serve --name demo --backing file:var/backing.img --size $(RUN_SIZE) --memory $(RUN_MEMORY) \
		--listen nbd://$(RUN_ADDRESS)/demo --control var/control.sock --shm /dev/shm/ramshelf

test: ## everything that a change must pass; tells the seconds of each part
	@mkdir -p out && : >out/seconds
	@for part in $(PARTS); do \
		echo "== $$part"; began=$$(date +%s); \
		$(MAKE) --no-print-directory $$part || { echo "make test: $$part failed" >&2; exit 1; }; \
		printf '%6d s  %s\n' $$(($$(date +%s) - began)) $$part >>out/seconds; \
	done; echo "== passed"; cat out/seconds

race: ## the quick tests under the race detector
	CGO_ENABLED=1 $(GO) test -race -short -timeout 30m $(RACE)

fuzz: ## every fuzz target for a minute
	@$(MAKE) --no-print-directory fuzz-short FUZZTIME=60s

lint: ## golangci-lint, with the rule who may import whom
	$$($(GO) env GOPATH)/bin/golangci-lint run ./...

bench: build ## compare with nbdkit, nbd-server and qemu-nbd
	$(GO) run ./bench/compare

soak: build ## the simulated disks and the system tests with the counts of a long run
	SIM_SEEDS=100 CACHE_SEEDS=200 $(GO) test -count=1 -timeout 4h -run 'Journal|Volume|PowerCut|EverySubset|Crash' ./flush ./cache ./cmd/internal/node
	RAMSHELF_SOAK=1 RAMSHELF=$(CURDIR)/bin/ramshelf $(GO) test -count=1 -timeout 6h -v ./bench/system/...

lab: ## the real kernel in a virtual machine (lands later)
	@echo 'make lab: lands later' >&2; exit 1

clean: ## remove what was built
	rm -rf bin out

deps: ## install what the tests need on Debian 12
	@.ci/deps

vet:
	$(GO) vet ./...
	$(GO) vet -tags planted ./...

cross:
	GOARCH=arm64 $(GO) build ./...

unit:
	$(GO) test -timeout 30m $(UNIT)

planted:
	$(GO) test -tags planted -timeout 30m -run 'Plant|Crash' $(UNIT)

fuzz-short:
	@grep -rHoE '^func Fuzz[A-Za-z0-9_]+' --include='*_test.go' . | sed -E 's|^(.*)/[^/]*:func |\1 |' | sort -u | \
	while read -r package target; do \
		echo "$$package $$target"; \
		$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x "$$package" >out/fuzz.log 2>&1 </dev/null || \
			{ cat out/fuzz.log; exit 1; }; \
	done

system: build
	RAMSHELF_KILLS=30 RAMSHELF=$(CURDIR)/bin/ramshelf $(GO) test -count=1 -timeout 40m ./bench/system/...
