# One command each, from a fresh clone: `make demo`, `make test`. Both set up all they need.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
NODE_ARGS ?=
# of `make bench-peers`; without --quick it takes about half an hour
BENCH_ARGS ?= --quick --plot build/peers.svg
# engines of others for `make test-peers`; their pins are those of Python 3.11
PEERS ?= build/peers
PEERS_PYTHON ?= $(PYTHON)
# the probe of faults that is run on the node and on Orthanc; our own cases need none
FAULTS_SCRIPT ?= ../shared/bench/dicom_faults.py
ROUNDS ?= 10
# of `make crash`: a script that kills at random moments and cuts the power, where there is one
KILL9 ?= $(wildcard ../shared/bench/dicom_kill9.py)
POWERCUTS ?= 5
# of `make soak`
MINUTES ?= 30
# the system tools the tests use: dcmtk (clients), orthanc (a foreign PACS), dicom3tools (dciodvfy), PixelMed (SR
# validator), prometheus (promtool), openssl, systemd (systemd-analyze)
APT_PACKAGES := dcmtk orthanc dicom3tools libpixelmed-java libxalan2-java libxerces2-java default-jre-headless \
  prometheus openssl systemd rsyslog rsyslog-gnutls

# a node is four processes: without compiled modules each would compile the package anew at every start
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo serve test test-peers peers lint sbom audit-deps crash soak faults fuzz fuzz-node fuzz-wire bench bench-models bench-growth bench-turnaround tools clean
help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("dicom-node needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(STAMP)

tools:           ## install the system tools the tests use, where root and apt are at hand
	@if command -v storescu >/dev/null && command -v Orthanc >/dev/null && command -v dciodvfy >/dev/null \
	    && command -v java >/dev/null && command -v promtool >/dev/null && command -v openssl >/dev/null \
	    && command -v systemd-analyze >/dev/null && command -v rsyslogd >/dev/null && [ -e /usr/share/java/pixelmed.jar ]; then \
	  :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(APT_PACKAGES) >/dev/null; \
	else \
	  echo "note: without root or apt these were not installed, the tests that need them will skip: $(APT_PACKAGES)"; \
	fi

demo: $(STAMP)   ## a node, a second node as "the PACS", phantom studies, results, a report; INPUT=folder for your own files
	$(BIN)/python -m dicom_node.cli demo --report demo-report $(if $(INPUT),--input "$(INPUT)")

serve: $(STAMP)  ## the node, with NODE_ARGS
	$(BIN)/dicom-node serve $(NODE_ARGS)

test: $(STAMP) tools  ## the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not crash and not engine_peers" $(PYTEST_ARGS)

peers: $(PEERS)/triton/.installed $(PEERS)/monai-label/.installed  ## real engines of others, each in its own environment under PEERS (4 GB)

$(PEERS)/%/.installed: tests/peers/requirements-%.txt
	$(PEERS_PYTHON) -c 'import sys; sys.exit("the pins of the peers are for Python 3.11; set PEERS_PYTHON=") if sys.version_info[:2] != (3, 11) else None'
	$(PEERS_PYTHON) -m venv $(@D)
	@# torch with what it needs where it is built for a GPU; then the list is whole, and nothing else is resolved or built
	if grep -q '^torch==' $<; then $(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch torchvision; fi
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

test-peers: $(STAMP) tools peers  ## the node with real engines of others, end to end: MONAI Label, Triton, a second node
	TEST_PEERS="$(abspath $(PEERS))" $(BIN)/python -m pytest tests/peers $(wildcard tests/e2e/test_dicom_engine.py) $(PYTEST_ARGS)

lint: $(STAMP)   ## ruff, mypy --strict, the layer test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

sbom: $(STAMP)   ## what the node is made of: build/sbom.cdx.json (CycloneDX)
	mkdir -p build
	$(BIN)/python .ci/sbom.py > build/sbom.cdx.json
	@echo "build/sbom.cdx.json: $$(grep -c '"bom-ref"' build/sbom.cdx.json) components"

audit-deps: build/audit/.installed  ## known vulnerabilities of the pinned dependencies (pip-audit); needs the network, a report only
	@echo "pip-audit of constraints.txt:"
	@timeout 120 build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
	  --timeout 15 --desc off || echo "audit-deps: read the lines above; none: it could not ask"

build/audit/.installed:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3'
	touch $@

crash: $(STAMP) tools  ## kill -9 at every commit point and at random moments, power cuts, outages; ROUNDS=n POWERCUTS=n
	TEST_CRASH_ROUNDS=$(ROUNDS) TEST_KILL9="$(abspath $(KILL9))" TEST_KILL9_ROUNDS=$(ROUNDS) TEST_KILL9_POWERCUTS=$(POWERCUTS) \
	  $(BIN)/python -m pytest -m crash tests -o log_cli=true -o log_cli_level=WARNING $(PYTEST_ARGS)

soak: $(STAMP)   ## everything at once at 80 % of capacity, a fault each minute, then every promise is checked; MINUTES=n
	$(BIN)/python -W ignore benchmarks/soak.py --minutes $(MINUTES) --json build/soak.json

fuzz-wire: $(STAMP) tools  ## the same bytes to both wires, many more of them; STREAMS=n SEED=n
	TEST_WIRE_STREAMS=$(or $(STREAMS),3000) TEST_WIRE_SEED=$(or $(SEED),1) $(BIN)/python -m pytest tests/dimse/test_differential.py --timeout 1800 $(PYTEST_ARGS)

fuzz: $(STAMP)  ## coverage-guided fuzzing of all that takes strangers' bytes, target by target; MINUTES=n, ONLY=names
	$(BIN)/python tests/fuzz/run.py --minutes $(or $(MINUTES),10) --only "$(ONLY)" --corpus build/fuzz/corpus

fuzz-node: $(STAMP)  ## malformed input against a running node, and what it grows by; FAULTS_SCRIPT=path MINUTES=n PACED=n
	$(BIN)/python -W ignore benchmarks/fuzz_node.py --script "$(FAULTS_SCRIPT)" --minutes $(MINUTES) --paced $(or $(PACED),30)

faults: $(STAMP) tools  ## faults and attacks on a running node, beside Orthanc; FAULTS_SCRIPT=path, FAULTS_ARGS="--only slow"
	$(BIN)/python benchmarks/faults.py --script "$(FAULTS_SCRIPT)" $(FAULTS_ARGS)
	$(BIN)/python -m pytest -m crash tests/faults --timeout 1800 $(PYTEST_ARGS)

bench: $(STAMP) bench-peers  ## speed, as ratios inside one run
	$(BIN)/python benchmarks/segment_ct.py
	$(BIN)/python benchmarks/ct_to_catalog.py
	$(BIN)/python benchmarks/wires.py

bench-peers: $(STAMP) tools  ## the running node beside Orthanc, a short look; BENCH_ARGS="--rounds 5" for all of it
	$(BIN)/python benchmarks/peers.py $(BENCH_ARGS)

bench-growth: $(STAMP)  ## a million instances: start to first answers, cost of one more; what waits costs; writes build/growth.svg
	$(BIN)/python benchmarks/restart.py
	$(BIN)/python benchmarks/growth.py --plot build/growth.svg
	$(BIN)/python benchmarks/waiting.py

bench-turnaround: $(STAMP) tools  ## 300 CT slices pushed to SEG at the destination, stage by stage
	$(BIN)/python -W ignore benchmarks/turnaround.py

bench-models: $(STAMP)  ## models: the zoo's spleen network beside stock MONAI, labels of 100 organs to SEG, radiograph to scores, serving, decoding
	$(BIN)/python -W ignore benchmarks/zoo_spleen.py
	$(BIN)/python -W ignore benchmarks/labels_to_seg.py
	$(BIN)/python benchmarks/cxr_to_scores.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/decode.py

clean:           ## remove what was built here; data folders stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache demo-report
