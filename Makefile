# Each target builds the environment that it needs, if that is missing or older than the files that describe it: .venv,
# .venv-lowest or .venv-newest. CONTRIBUTING.md lists the targets.
PYTHON ?= python3
VENV := .venv
comma := ,
BIN := $(VENV)/bin
# pytest workers: each holds transformers and torch in memory (about 1 GB).
TEST_WORKERS ?= 2

# The tests that touch the interfaces of other libraries: model, processor, saving and remote code, generation, Trainer,
# LoRA, merging, packing, chat session, images of all formats, and one run of each script.
INTERFACES := tests/modeling tests/processing/test_processing_jnana.py tests/processing/test_chat_templates.py \
	tests/processing/data/test_images.py tests/processing/data/test_pixels.py \
	tests/training/test_stages.py tests/training/test_loading.py tests/training/test_quantization.py \
	tests/training/test_device_map.py tests/evaluation/test_generation.py tests/evaluation/test_prefixes.py \
	tests/chat/test_session.py \
	tests/scripts/test_chain.py tests/scripts/test_tower.py tests/interfaces tests/export
TEST_SETTINGS := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test test-lowest test-newest update-newest bench bench-gpu quality links style clean

demo: $(VENV)/.installed
	$(BIN)/python examples/chess_demo/run_demo.py $(ARGS)

# One thread a worker: tiny models gain nothing from more, and workers stop fighting over the cores.
test: $(VENV)/.installed-dev
	$(TEST_SETTINGS) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(ARGS)

# The lowest versions that setup.cfg allows, and the newest of all dependencies, each in an environment of its own:
# docs/versions.md.
test-lowest test-newest: test-%: .venv-%/.installed
	$(TEST_SETTINGS) .venv-$*/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(INTERFACES) \
		--deselect tests/modeling/test_versions.py $(ARGS)

# Writes the newest versions of today into constraints-newest.txt and prints what changed.
update-newest:
	PYTHON=$(PYTHON) bash .ci/update_newest.sh

# Training throughput beside stock LLaVA, on one thread: benchmarks/README.md.
bench: $(VENV)/.installed-dev
	$(TEST_SETTINGS) $(BIN)/python -m benchmarks.train_throughput $(ARGS)

# All that is to be measured on a GPU, in under nine minutes.
bench-gpu: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu $(ARGS)

quality: $(VENV)/.installed-dev links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/file_names.py
	cd .package && ../$(BIN)/mypy --config-file ../pyproject.toml -p jnana

# The package as it installs, made of links: type checkers and editors do not run `jnana/__init__.py`, which finds the
# folders beside it.
links:
	rm -rf .package/jnana && mkdir -p .package/jnana
	cd .package/jnana && ln -s ../../jnana/*.py ../../jnana/py.typed ../../modeling ../../processing ../../training ../../evaluation ../../export ../../chat . \
		&& ln -s ../../run_*.py ../../app.py .

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .package *.egg-info .pytest_cache .ruff_cache .mypy_cache

# The demo needs what training needs; everything else also needs what tests, style checks and the app use.
$(VENV)/.installed: EXTRAS = [train]
$(VENV)/.installed-dev: EXTRAS = [app,dev,clients,notebook,onnx]
$(VENV)/.installed $(VENV)/.installed-dev: setup.cfg setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$(EXTRAS)"
	touch $@

.venv-%/.installed: setup.cfg setup.py pyproject.toml constraints-%.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$*.txt -e ".[app,dev$(if $(filter newest,$*),$(comma)clients)]"
	touch $@
