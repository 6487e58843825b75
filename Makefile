# `make demo` and `make test` are all a fresh machine needs: both install first.
bin := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all gpu-check format clean

help:
	@echo "make demo      fine-tune the embedded small model, install first if needed"
	@echo "make test      lint, types, import contracts and the quick tests, install first if needed"
	@echo "make test-all  the same with the slow tests, and coverage"
	@echo "make gpu-check all that is claimed of a GPU, measured on this one in nine minutes"
	@echo "make install   only the installation into .venv"
	@echo "make format    apply ruff's format and its safe fixes"
	@echo "make clean     remove caches and build files; .venv and runs stay"

install:
	@bash tools/install.sh

demo: install
	$(bin)/python launch/demo.py

# The tests use no network: nothing may wait for a hub that cannot be reached.
test test-all: export HF_HUB_OFFLINE := 1
test test-all: export TOKENIZERS_PARALLELISM := false
test: selection := -m "not slow"
test-all: coverage := --cov --cov-report=term:skip-covered
# Coverage would trace every operation of the Triton interpreter, and take several times as long.
test test-all: interpreted := tests/kernels
test test-all: install
	@failed=; \
	check() { name=$$1; shift; "$$@" || failed="$$failed $$name"; }; \
	check lint $(bin)/ruff check .; \
	check format $(bin)/ruff format --check .; \
	check types $(bin)/mypy; \
	check imports $(bin)/lint-imports --no-logo; \
	check kernels $(bin)/pytest $(selection) $(interpreted) -n logical --maxprocesses 4; \
	check tests $(bin)/pytest $(selection) $(addprefix --ignore=,$(interpreted)) $(coverage) -n 2 --dist loadfile; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

gpu-check: install
	$(bin)/python benchmarks/gpu_check.py

format: install
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info .coverage .coverage.* .hypothesis .benchmarks .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
