# One way to run each check. `make demo` and `make test` need nothing but Python 3.11 and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PEERS  := benchmarks/.venv

.PHONY: demo test browser check fix docs bench bench-table clean

demo: $(VENV)/.installed
	$(BIN)/headstart demo

test: $(VENV)/.installed-test browser check
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# The report is opened in a real browser. Where there is none and none can be installed, those tests are skipped.
browser:
	@command -v chromium chromedriver >/dev/null || (apt-get -qq update && apt-get -qq install -y chromium chromium-driver) \
		>/dev/null 2>&1 || echo "No Chromium: the report will not be opened in a browser."

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate_cli.py --check docs/cli.md
	$(BIN)/python docs/generate_schema.py --check src/headstart/train.schema.json
	$(BIN)/python benchmarks/table.py --check

fix: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/generate_cli.py docs/cli.md
	$(BIN)/python docs/generate_schema.py src/headstart/train.schema.json

# Against its peers, on ../shared/data: about an hour on two idle cores. One group: make bench ONLY=encode
bench: $(VENV)/.installed-test $(PEERS)/.installed
	$(BIN)/python benchmarks/run.py $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick)
	$(if $(QUICK),,$(MAKE) bench-table)

docs: $(VENV)/.installed-test
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build

bench-table:
	$(PYTHON) benchmarks/table.py

clean:
	rm -rf $(VENV) $(PEERS) docs/_build .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@ $(VENV)/.installed

# torch first and alone, so that nothing pulls another build of it in.
$(PEERS)/.installed: benchmarks/peers/requirements.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $<
	touch $@
