# make demo: environment, install, main job.  make test: environment, install, tests.  Both from requirements.lock.
VENV ?= .venv
PYTHON ?= python3
ARGS ?=

.PHONY: demo test transformers machines other-name floors lock

demo: $(VENV)/installed
	$(VENV)/bin/lightning-cf $(ARGS)

test: $(VENV)/installed $(VENV)/zoo $(VENV)/linters
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	PYTHONPATH=$(VENV)/linters:. $(VENV)/bin/python $(VENV)/linters/bin/lint-imports
	$(VENV)/bin/pytest --numprocesses 2

# The whole suite as other processors would round: their vector widths as far as this one has them, one thread and two.
# Threads that wait sleep, so that twice two of them fit on two cores. Takes hours.
machines: $(VENV)/installed $(VENV)/zoo
	for capability in default avx2 avx512; do for threads in 1 2; do \
		if [ $$capability != default ] && ! grep -q $$capability /proc/cpuinfo; then continue; fi; \
		echo "$$capability, $$threads threads"; \
		ATEN_CPU_CAPABILITY=$$capability OMP_WAIT_POLICY=passive $(VENV)/bin/pytest --numprocesses 2 \
			--threads $$threads -m "slow or not slow" || exit 1; done; done

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Networks of timm, to be checked for exactness. Without its dependencies: none of them is needed to make a network.
$(VENV)/zoo: requirements-zoo.lock $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-zoo.lock
	touch $@

# Checks which package may import which. In a folder of its own: it needs rich, with which Lightning shows other bars.
$(VENV)/linters: requirements-linters.lock $(VENV)/installed
	rm -rf $@
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --target $@ --requirement $<
	touch $@

# The transformers library's own classes, each through three tasks. In a folder of its own: torchmetrics imports the
# library wherever it finds it, and nothing else here is to.
transformers: $(VENV)/transformers
	PYTHONPATH=$(VENV)/transformers $(VENV)/bin/pytest --numprocesses 2 -m slow tests/whole/test_transformers.py

$(VENV)/transformers: requirements-transformers.lock $(VENV)/installed
	rm -rf $@
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --target $@ --requirement $<
	touch $@

# Part of the suite in a project that imports pytorch_lightning, the other name of the same library.
OTHER_NAME = callbacks/test_callbacks callbacks/test_heads callbacks/test_schedule whole/test_module
other-name: $(VENV)/installed
	rm -rf $(VENV)/other-name && mkdir $(VENV)/other-name && cp -r tests conf pyproject.toml $(VENV)/other-name
	cd $(VENV)/other-name && sed -i -e 's/lightning[.]pytorch/pytorch_lightning/g' -e 's/lightning[.]fabric/lightning_fabric/g' \
		-e 's/module="lightning"/module="(pytorch_)?lightning"/' -e 's/UserWarning:lightning/UserWarning:pytorch_lightning/' \
		$$(find tests -name '*.py') pyproject.toml
	cd $(VENV)/other-name && sed -i '1a import pytorch_lightning' tests/conftest.py
	cd $(VENV)/other-name && $(abspath $(VENV))/bin/pytest --numprocesses 2 $(OTHER_NAME:%=tests/%.py)

# Part of the suite on the oldest versions that pyproject.toml allows, torch excepted, in an environment of its own. They
# warn of what was deprecated since in the newest versions of what they need themselves, which nothing here pins.
FLOORS = configs data doctor lean_imports ledger lightning_api accuracy_matrix clusters records run_files run_lock scores \
	similarity structure unit_pictures yaml
floors: $(VENV)/floors/installed
	PYTHONPATH=. $(VENV)/floors/bin/python -m pytest --numprocesses 2 -W ignore::DeprecationWarning \
		-W ignore::FutureWarning $$(find tests -false $(FLOORS:%=-o -name test_%.py))

$(VENV)/floors/installed: .ci/floors.py requirements.lock pyproject.toml
	rm -rf $(VENV)/floors && $(PYTHON) -m venv $(VENV)/floors
	$(PYTHON) .ci/floors.py > $(VENV)/floors/pins
	$(VENV)/floors/bin/pip install --quiet --disable-pip-version-check --requirement $(VENV)/floors/pins
	touch $@

# Writes requirements.lock anew from the floors in pyproject.toml.
lock:
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet torch==2.13.0 hatchling editables '.[test]'
	.lock-venv/bin/pip freeze --exclude lightning-cf | sed 's/+cpu$$//' > requirements.lock
	rm -rf .lock-venv
