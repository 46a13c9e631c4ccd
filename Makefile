# SPDX-License-Identifier: Apache-2.0
# Sluice: every target prints what it does, is safe to repeat, and fails with one clear line.
SHELL := /bin/bash
PYTHON := .venv/bin/python
BACKEND ?= nftables
PYTEST := $(PYTHON) -m pytest
ROOT = @[ "$$(id -u)" = 0 ] || { echo "make $@: not root; it makes network namespaces. Try: sudo make $@" >&2; exit 1; }

.PHONY: help setup plugin objects demo lab test check fuzz kube netns cri rehearsal e2e docs test-vm image bench soak compat clean lock

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup:  ## install what is needed: Debian packages, .venv from locked versions, the CNI plugin
	@tools/setup

plugin:  ## build the CNI plugin alone
	@$(MAKE) -s -C cni_plugin

objects:  ## build the eBPF objects alone (clang), and what copies short exchanges in the embedded ztunnel
	@$(MAKE) -s -C bpf
	@$(MAKE) -s -C relay

demo: setup  ## show and check capture with real traffic, then clean up; BACKEND=ebpf for eBPF (root)
	$(ROOT)
	@$(PYTHON) -m agent lab demo --backend $(BACKEND)

lab: setup  ## a lab to explore; remove it with: .venv/bin/sluice lab down (root)
	$(ROOT)
	@$(PYTHON) -m agent lab up

lint: setup
	@echo "lint: ruff, mypy, import contracts"
	@$(PYTHON) -m ruff check agent tests deploy/dashboards
	@$(PYTHON) -m ruff format --check -q agent tests || { echo "lint: run .venv/bin/ruff format agent tests" >&2; exit 1; }
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports --no-cache | tail -n 4

check: lint  ## lint, types, import contracts, unit, golden, contract and scenario tests; no root needed
	@$(PYTEST) -q tests/unit tests/golden tests/contract tests/scenario

fuzz: setup  ## Hypothesis on every parser of foreign input
	@$(PYTEST) -q tests/fuzz

kube: setup  ## the Kubernetes source with a failing API server; CNI installation; the chart
	@$(PYTEST) -q tests/kube tests/install tests/deploy

netns: setup  ## real packets in network namespaces (root)
	$(ROOT)
	@$(PYTEST) -q tests/netns

cri: setup  ## a real containerd with the plugin in its chain (root)
	$(ROOT)
	@$(PYTEST) -q tests/cri

rehearsal: setup  ## upgrades rehearsed over three containerd nodes: the guided script, the CNI, Sluice, reboots (root)
	$(ROOT)
	@$(PYTEST) -q tests/rehearsal

docs: setup  ## run the commands of the documents as they are written (root)
	$(ROOT)
	@$(PYTEST) -q tests/docs

e2e: setup  ## the agent, the proxy and the plugin together, broken on purpose; then the demo (root)
	$(ROOT)
	@$(PYTEST) -q tests/e2e

test: lint  ## everything that one machine can run (root)
	$(ROOT)
	@tools/test
	@$(PYTHON) -m agent lab demo --prefix sludemo --backend nftables
	@$(PYTHON) -m agent lab demo --prefix sludemo --backend ebpf

test-vm: setup  ## the guided script over three virtual machines by qemu (root; minutes, emulation is enough)
	$(ROOT)
	@SLUICE_VM=required $(PYTEST) -q tests/vm

image: setup  ## the container image, from Debian's packages and no registry; then its own tests (root, minutes)
	$(ROOT)
	@deploy/image/build
	@SLUICE_IMAGE=required $(PYTEST) -q tests/deploy/test_image.py

bench: setup  ## measure the aims of docs/performance.md: medians (root)
	$(ROOT)
	@$(PYTHON) -m tests.bench

soak: setup  ## descriptors and memory over 10,000 enrolments; by hand, some 9 minutes (root)
	$(ROOT)
	@$(PYTHON) -m tests.bench.soak

compat: setup  ## nft of four Debian releases reads and deletes our tables; downloads them (root)
	$(ROOT)
	@SLUICE_COMPAT=1 $(PYTEST) -q tests/compat

lock:  ## write requirements.lock (needs uv)
	@tools/lock

clean:  ## remove what the other targets made in this directory
	@$(MAKE) -s -C cni_plugin clean
	@$(MAKE) -s -C bpf clean
	@$(MAKE) -s -C relay clean
	@rm -rf .venv build sluice.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
