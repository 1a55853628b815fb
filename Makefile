.PHONY: install demo demo-cascade test test-lowest test-page test-page-api test-slow bench-train bench-step bench-gpu bench-overhead bench-eval bench-sampling bench-guidance cards judge docs quality style

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

install: $(VENV)/.installed

# Made anew when the packaging changes; `python3 -m venv` and pip are all that a machine needs.
$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e ".[train,eval,export,test]"
	touch $@

demo: install
	$(BIN)/diffusers-adm demo --output demo.png
	$(BIN)/diffusers-adm demo --photos --output photos.png

demo-cascade: install
	$(BIN)/diffusers-adm demo --cascade --output cascade.png

# Side by side: most of the time is that of processes that tests start and wait for.
test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# In an environment of its own, without the export to ONNX, which needs a newer torch; `make install` in a new clone takes the
# newest versions. Old versions of some packages call names of other packages that are deprecated today.
LOWEST := .venv-lowest
test-lowest: install
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q -e ".[train,eval,test]" $$($(BIN)/python tests/helpers/lowest_versions.py)
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal -W ignore::DeprecationWarning

# gradio requires an older Pillow than the newest. It and its packages lie in an environment that finds the rest in the usual one.
PAGE := .venv-page
$(PAGE)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(PAGE)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	    > $$($(PAGE)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/usual.pth
	$(PAGE)/bin/python -m pip install -q -e ".[page,test-page]"
	touch $@

# gradio leaves event loops to the garbage collector, and calls pandas in ways that pandas 4 will not know.
TEST_PAGE := $(PAGE)/bin/python -m pytest -W ignore:unclosed:ResourceWarning -W ignore::pandas.errors.Pandas4Warning tests/page
test-page: $(PAGE)/.installed
	$(TEST_PAGE) -m page

test-page-api: $(PAGE)/.installed
	$(TEST_PAGE) -m "page and not browser"

test-slow: install
	$(BIN)/python -m pytest -m slow

bench-train: install
	$(BIN)/python -m diffusers_adm.benchmarks.training

bench-step: install
	$(BIN)/python -m diffusers_adm.benchmarks.step --packed

bench-gpu: install
	$(BIN)/python -m diffusers_adm.benchmarks.gpu

bench-overhead: install
	$(BIN)/python -m diffusers_adm.benchmarks.overhead

bench-eval: install
	$(BIN)/python -m diffusers_adm.benchmarks.metrics

# Hours; goes on where it was stopped. MNIST may be a local folder of the dataset; each process takes one core, or a GPU.
MNIST ?= ylecun/mnist
PROCESSES ?= 1
bench-sampling: install
	$(BIN)/torchrun --standalone --nproc_per_node $(PROCESSES) -m diffusers_adm.benchmarks.sampling \
	    $(MNIST) --split test --resolution 32 --crop pad \
	    --register tests/helpers/digit_features.py --feature_extractor mnist-digits --output runs/bench-sampling

# Hours, as bench-sampling.
bench-guidance: install
	$(BIN)/torchrun --standalone --nproc_per_node $(PROCESSES) -m diffusers_adm.benchmarks.guidance \
	    $(MNIST) --split test --resolution 32 --crop pad --seed 3 \
	    --register tests/helpers/digit_features.py --feature_extractor mnist-digits --output runs/bench-guidance

cards: install
	$(BIN)/python -m diffusers_adm.hub.cards model_cards

judge: install
	$(BIN)/python tests/helpers/judge_digits.py

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e ".[docs]"
	touch $@

# Any warning fails, such as that of a link to a page that does not exist.
docs: $(VENV)/.docs-installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "Wrote build/docs/index.html"

# pyright reads the package as it is installed, with `pipelines/` and `training/` inside it.
quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/diffusers_adm
	ln -s $(CURDIR)/diffusers_adm/* $(CURDIR)/pipelines $(CURDIR)/training $(CURDIR)/model_cards build/types/diffusers_adm
	cp tests/typing/* build/types
	$(BIN)/pyright --project build/types --pythonpath $(BIN)/python

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
