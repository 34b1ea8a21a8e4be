# Every target prepares what it needs: a virtualenv in .venv and, as root on Debian, the system packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/pytest $(PYTEST_ARGS)
SOURCES := rafs fuse builder backend tools tests

BUILD_PACKAGES := python3-venv python3-dev gcc pkg-config libfuse3-dev fuse3
DEMO_PACKAGES := $(BUILD_PACKAGES) docker-registry
TEST_PACKAGES := $(DEMO_PACKAGES) curl skopeo containerd umoci buildah erofs-utils attr zstd nginx-light openssl busybox-static e2fsprogs runc xfsprogs btrfs-progs iproute2
BENCH_PACKAGES := $(DEMO_PACKAGES) erofs-utils squashfs-tools zstd
BENCH_PODS_PACKAGES := $(DEMO_PACKAGES) containerd runc busybox-static iproute2
BENCH_PEERS_PACKAGES := $(DEMO_PACKAGES) iproute2 iptables curl

.PHONY: help demo test test-slow test-all check bench bench-versions bench-peers chaos fuzz fmt docs clean protobuf bench-pods
PROTOS := fuse/snapshotter/snapshots.proto fuse/snapshotter/image_auth.proto tools/bench/pods/cri.proto
.DELETE_ON_ERROR:

help:
	@echo 'make demo      build, push, mount lazily and read a real tree'
	@echo 'make test      formatting, linters, types, then unit to integration tests'
	@echo 'make test-slow the tests that take longer and repeat an idea of a quick one'
	@echo 'make test-all  both, the fuzz targets for a minute each, and chaos'
	@echo 'make check     formatting, linters and types only'
	@echo 'make bench     measure against tar, mkfs.erofs, squashfs and ext4'
	@echo 'make bench-versions  what a host fetches of an image like one that it holds'
	@echo 'make bench-peers  many hosts on shaped links read the same image (root)'
	@echo 'make bench-pods   pods from lazy images against pulled ones, by containerd (root)'
	@echo 'make chaos     200 SIGKILLs of the agent under verifying readers, for erofs and for fuse (5 minutes)'
	@echo 'make fuzz      fuzz every parser (FUZZ_SECONDS=60 each)'
	@echo 'make fmt       format and fix;  make docs: write docs/errors.md again'
	@echo 'make protobuf  write what protoc makes of the .proto files again'

demo: $(VENV)/.demo-packages $(VENV)/.installed
	$(BIN)/python -m tools.demo

test: $(VENV)/.test-packages check
	$(PYTEST) -m 'not slow'

test-slow: $(VENV)/.test-packages $(VENV)/.installed-test
	$(PYTEST) -m slow

test-all: test test-slow fuzz chaos

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

bench: $(VENV)/.bench-packages $(VENV)/.installed-bench
	$(BIN)/python -m tools.bench $(BENCH_ARGS)

bench-versions: $(VENV)/.bench-packages $(VENV)/.installed-bench
	$(BIN)/python -m tools.bench.versions $(BENCH_ARGS)

bench-pods: $(VENV)/.bench-pods-packages $(VENV)/.installed-bench
	$(BIN)/python -m tools.bench.pods $(BENCH_ARGS)

bench-peers: $(VENV)/.bench-peers-packages $(VENV)/.installed-bench
	$(BIN)/python -m tools.bench.peers $(BENCH_ARGS)

CHAOS_ARGS ?= --kills 200 --seconds 118
chaos: $(VENV)/.test-packages $(VENV)/.installed-test
	$(BIN)/python -m tests.stress.chaos --driver erofs $(CHAOS_ARGS)
	$(BIN)/python -m tests.stress.chaos --driver fuse $(CHAOS_ARGS)
	$(BIN)/python -m tests.stress.pod_chaos

FUZZ_SECONDS ?= 60
fuzz: $(VENV)/.installed-fuzz
	@mkdir -p $(VENV)/crashes
	@set -e; for target in tests/fuzz/fuzz_*.py; do \
		echo "$$target: $(FUZZ_SECONDS) s"; \
		$(BIN)/python "$$target" -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=$(VENV)/crashes/; \
	done

fmt: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protobuf: $(VENV)/.installed-test
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. $(PROTOS)

docs: $(VENV)/.installed
	$(BIN)/python -m tools.error_table > docs/errors.md.new && mv docs/errors.md.new docs/errors.md

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# One stamp for each set of packages and each set of extras: the second run has nothing to do.
$(VENV)/.build-packages: .ci/packages
	@.ci/packages $(BUILD_PACKAGES)
	@mkdir -p $(VENV) && touch $@

$(VENV)/.demo-packages: .ci/packages
	@.ci/packages $(DEMO_PACKAGES)
	@mkdir -p $(VENV) && touch $@

$(VENV)/.test-packages: .ci/packages
	@.ci/packages $(TEST_PACKAGES)
	@mkdir -p $(VENV) && touch $@

$(VENV)/.bench-packages: .ci/packages
	@.ci/packages $(BENCH_PACKAGES)
	@mkdir -p $(VENV) && touch $@

$(VENV)/.bench-pods-packages: .ci/packages
	@.ci/packages $(BENCH_PODS_PACKAGES)
	@mkdir -p $(VENV) && touch $@

$(VENV)/.bench-peers-packages: .ci/packages
	@.ci/packages $(BENCH_PEERS_PACKAGES)
	@mkdir -p $(VENV) && touch $@

$(VENV)/.installed: pyproject.toml .ci/venv $(VENV)/.build-packages
	@PYTHON='$(PYTHON)' .ci/venv $(VENV)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@PYTHON='$(PYTHON)' .ci/venv $(VENV) test,check
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@PYTHON='$(PYTHON)' .ci/venv $(VENV) test,bench
	@touch $@

$(VENV)/.installed-fuzz: $(VENV)/.installed
	@PYTHON='$(PYTHON)' .ci/venv $(VENV) test,fuzz
	@touch $@
