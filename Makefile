# Everything a developer or a first-time user runs. Needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
QUIET := OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 KMP_BLOCKTIME=0 TOKENIZERS_PARALLELISM=false

.PHONY: demo up test check lint install bench constraints clean servers prove

demo: install
	$(QUIET) $(BIN)/python examples/demo.py $(if $(WORKSPACE),--workspace $(WORKSPACE))

up: install
	$(QUIET) $(BIN)/tunesmith up --port 8000

test: install servers
	$(QUIET) $(BIN)/pytest

# The servers that tests start for themselves, by the system's packages where this user may.
servers:
	@sh tests/servers.sh

# Storms, simulations, torn checkpoints: what the tests show once, many times. LONG=1 for hours.
prove: install servers
	PYTHONPATH=tests $(QUIET) $(BIN)/python -m prove $(if $(LONG),--long)

check: lint servers
	$(QUIET) $(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/lint-imports

bench: install
	$(QUIET) $(BIN)/python bench/train.py
	$(QUIET) $(BIN)/python bench/train.py --method dpo
	$(QUIET) $(BIN)/python bench/train.py --method pretrain
	$(QUIET) $(BIN)/python bench/loss.py
	$(QUIET) $(BIN)/python bench/data.py
	$(QUIET) $(BIN)/python bench/train.py --method grpo
	$(QUIET) $(BIN)/python bench/start.py
	$(QUIET) $(BIN)/python bench/sse.py
	$(QUIET) $(BIN)/python bench/submit.py
	$(QUIET) $(BIN)/python bench/list.py
	$(QUIET) $(BIN)/python bench/ready.py
	$(QUIET) $(BIN)/python bench/hop.py
	$(QUIET) $(BIN)/python bench/draw.py

install: .venv/installed

# torch first and by pip, so that a CPU build at hand is used; uv then takes the pinned rest.
.venv/installed: pyproject.toml src/tuning_sdk/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 uv==0.13.8
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt \
		-e src/tuning_sdk -e '.[all,ray,dev]'
	touch $@

# Without find-links, so that the pins of a GPU machine stay in.
constraints:
	{ echo "# Every version that is installed, made by: make constraints"; \
	sed '/"tuning-sdk==/d' pyproject.toml > .venv/pyproject.toml && \
	echo "torch==2.13.0" | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		--no-header --no-annotate --extra all --extra ray --extra dev --no-emit-package tunesmith \
		-c - .venv/pyproject.toml; } > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
