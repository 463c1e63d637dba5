# hydramoe: `make` lists what can be made.

PYTHON ?= python3
BIN := .venv/bin
# What goes into .venv beside hydramoe's own dependencies: mergekit (merge) and lm-eval (eval) among them.
EXTRAS := dev,ray,merge,eval
# Tests run side by side in so many processes, each of one thread and some 2 GB.
WORKERS ?= 2
# The virtual environment is right when the stamp holds the checksum of all that it is made from.
WANT = $(shell cat constraints.txt pyproject.toml | cksum)-$(EXTRAS)-$(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help setup assets demo test test-slow test-extern results paper readme lab hooks export clean check

help: ## list these targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv from constraints.txt (nothing to do when it is right)
	@if [ "$$(cat .venv/.stamp 2>/dev/null)" = "$(WANT)" ]; then exit 0; fi; set -e; \
	$(PYTHON) -c 'import sys; sys.exit(f"hydramoe needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}. Try: make setup PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'; \
	echo "making .venv (some 2.5 GB on disk; minutes, most of them download)"; \
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv; \
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[$(EXTRAS)]'; \
	echo "$(WANT)" > .venv/.stamp

assets: setup ## fetch and check the pinned models and data
	@$(BIN)/python -c 'from hydramoe.foundations.fetch import fetch_all; fetch_all()'

demo: setup ## from nothing to routed QLoRA experts and a report (some 15 minutes on two cores)
	@$(BIN)/hydramoe reproduce demo

test: assets ## the test suite: every notebook, and tests/ (under 20 minutes)
	@$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow and not extern' tests

test-slow: assets ## the tests that take long
	@$(BIN)/python -m pytest -n $(WORKERS) -m slow tests

test-extern: assets ## oracles that are asked now and then; the dated record is tests/EXTERN.md, commit it
	@$(BIN)/python -m pytest -m extern --record tests/EXTERN.md tests

results: setup ## copy finished runs into results/, and results into paper and README
	@$(BIN)/python -c 'from hydramoe.use.publish import publish; from hydramoe.use.paper import write_paper; publish(); write_paper()'
	@$(MAKE) --no-print-directory readme

paper: setup ## make papers/hydra/main.pdf (needs a LaTeX installation)
	@$(BIN)/python -c 'from hydramoe.use.paper import write_paper; write_paper()'
	@command -v latexmk >/dev/null || { echo 'latexmk is not installed; the generated tables are in papers/hydra/generated'; exit 1; }
	cd papers/hydra && latexmk -pdf -interaction=nonstopmode main.tex

readme: setup ## run nbs/index.ipynb and nbs/results.ipynb, and make the READMEs from them
	@cd nbs && HYDRAMOE_QUIET=1 ../$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace index.ipynb results.ipynb
	@for nb in index results; do $(BIN)/nbdev_clean --fname nbs/$$nb.ipynb; done
	@$(BIN)/python -c 'from hydramoe.use.pages import write_pages; write_pages()'

lab: setup ## open the notebooks in JupyterLab
	@OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-1000} $(BIN)/jupyter lab nbs

hooks: setup ## install nbdev's git hooks: clean notebooks, notebook merges
	@$(BIN)/nbdev_install_hooks

export: setup ## notebooks → hydramoe/*.py, cleaned
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean

check: export readme ## what CI checks first: exporting and cleaning change nothing
	@git diff --exit-code --stat

clean: ## remove build products and caches of tools (not .venv, runs/ or the asset cache)
	rm -rf build dist *.egg-info .pytest_cache _proc _docs
	cd papers/hydra && rm -f *.aux *.bbl *.blg *.fdb_latexmk *.fls *.log *.out *.pdf
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
