# `make demo` and `make test` work on a fresh machine: both install everything first.
bin := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all docs gpu-check format clean

help:
	@echo "make demo      fine-tune the embedded small model; installs first if needed"
	@echo "make test      lint, types, import contracts and quick tests; installs first if needed"
	@echo "make test-all  the same with slow tests and coverage"
	@echo "make docs      build the documentation as a site, into build/site"
	@echo "make gpu-check measure all claims about GPUs on this GPU: CALL=1, 2 and 3, nine minutes each"
	@echo "make install   install into .venv"
	@echo "make format    apply ruff's formatter and safe fixes"
	@echo "make clean     remove caches and build files; keeps .venv and runs"

install:
	@bash tools/install.sh

demo: install
	$(bin)/python launch/demo.py

# The tests use no network; nothing waits for an unreachable hub.
test test-all: export HF_HUB_OFFLINE := 1
test test-all: export TOKENIZERS_PARALLELISM := false
test: selection := -m "not slow"
test-all: coverage := --cov --cov-report=term:skip-covered
# Tests without coverage, which would trace every operation of the Triton interpreter and take several times as long.
test test-all: interpreted := tests/kernels
# mypy, which uses one core for a minute, runs next to the tests.
test test-all: install
	@failed=; \
	check() { name=$$1; shift; "$$@" || failed="$$failed $$name"; }; \
	check lint $(bin)/ruff check .; \
	check format $(bin)/ruff format --check .; \
	mkdir -p build; $(bin)/mypy >build/types.log 2>&1 & types=$$!; \
	check imports $(bin)/lint-imports --no-logo; \
	check kernels $(bin)/pytest $(selection) $(interpreted) -n logical --maxprocesses 4; \
	check tests $(bin)/pytest $(selection) $(addprefix --ignore=,$(interpreted)) $(coverage) -n 2 --dist loadfile --no-loadscope-reorder; \
	wait $$types || failed="$$failed types"; cat build/types.log; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# Fails on a broken link. The variable turns off an advertisement.
docs: export NO_MKDOCS_2_WARNING := 1
docs: install
	$(bin)/mkdocs build --strict

gpu-check: install
	$(bin)/python benchmarks/gpu_check.py $(if $(CALL),--call $(CALL))

format: install
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info .coverage .coverage.* .hypothesis .benchmarks .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
