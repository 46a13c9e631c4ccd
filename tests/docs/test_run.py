# SPDX-License-Identifier: Apache-2.0
"""The commands of the documents, run as they are written, where they say that they are run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support import chart
from support.documents import ROOT, Block, blocks

LAB = Path("/run/slulab")  # the lab's own name: the documents say it
OWN = "README.md"  # its block makes the lab and removes it itself
# These say by 1 that something is not right, which is for their reader; 2 is that they failed.
_TELLING = re.compile(r"sluice (verify|doctor|diff|preflight)\b")
_SHELL = """shopt -s expand_aliases; set -o pipefail; sluice() { "$PWD/.venv/bin/sluice" "$@"; }
trap 'echo "FAILED $? $BASH_COMMAND" >&2' ERR
"""


def of(place: str) -> list[Block]:
    return [block for block in blocks() if block.place == place]


def run(block: Block, inside: Sequence[str] = (), **variables: str) -> str:
    """Its output. Every command must succeed. `inside`: what runs the shell."""
    path = f"{ROOT}/build/prometheus:{os.environ['PATH']}:/usr/sbin:/sbin"
    environ = {**os.environ, "PATH": path, **variables}
    argv = [*inside, "bash", "-c", _SHELL + block.text]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=110, cwd=ROOT, env=environ)
    failed = re.findall(r"^FAILED (\d+) (.*)$", done.stderr, re.MULTILINE)
    bad = [(code, command) for code, command in failed if not (code == "1" and _TELLING.match(command))]
    assert not bad, f"{block}: {bad}\n{done.stderr}\n{done.stdout[-2000:]}"
    return done.stdout


@pytest.fixture
def alone() -> Iterator[None]:
    if LAB.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{LAB} is there: somebody's lab; sluice lab down")
    yield
    subprocess.run([ROOT / ".venv/bin/sluice", "lab", "down"], check=True, capture_output=True)


@pytest.mark.root
def test_the_readmes_lab_as_it_is_typed(alone: None) -> None:
    (block,) = [block for block in of("lab") if block.document == OWN]
    shown = run(block)
    assert "shop/client" in shown
    assert not LAB.exists()


@pytest.mark.root
def test_the_other_documents_commands_in_one_lab(alone: None) -> None:
    subprocess.run([ROOT / ".venv/bin/sluice", "lab", "up"], check=True, capture_output=True, timeout=60)
    lines = [replace(block, text="\n".join(_ours(block))) for block in of("reading") if _ours(block)]
    found = [*(block for block in of("lab") if block.document != OWN), *lines]
    assert len(found) >= 20
    for block in found:
        run(block, ["nsenter", "--net=/run/netns/slulab-node1", "--"], SLUICE_RUN_DIR=str(LAB / "node1"))


def _ours(block: Block) -> list[str]:
    return [line for line in block.text.splitlines() if line.startswith("sluice ")]


def test_what_is_run_in_a_clone() -> None:
    found = of("dist")
    assert found
    for block in found:
        run(block)


def test_what_helm_is_asked_for_can_be_rendered(tmp_path: Path) -> None:
    found = [(block, line) for block in of("cluster") for line in re.findall(r"^helm .*$", block.text, re.MULTILINE)
             if "deploy/chart/sluice" in line]  # fmt: skip
    assert len(found) >= 4
    for block, line in found:
        _, _, release, *rest = line.split()
        rest = [word for word in rest if word not in ("--create-namespace", "--reuse-values", "--install", "--wait")]
        for name, text in _files(block):
            (tmp_path / name).write_text(text)
        argv = [chart.helm(), "template", release, *(str(tmp_path / w) if w.endswith(".yaml") else w for w in rest)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.returncode == 0, f"{block}: {line}: {done.stderr}"


def _files(block: Block) -> list[tuple[str, str]]:
    """Files that the document shows before the block: YAML whose first line is its name, as a comment."""
    before = (ROOT / block.document).read_text().split(block.text)[0]
    return re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```$", before, re.MULTILINE | re.DOTALL)


def test_what_kubectl_is_asked_for_is_what_the_chart_makes() -> None:
    objects = chart.render({"image": {"repository": "registry.example.com/sluice"}})
    made = {f"{one['kind'].lower()}/{one['metadata']['name']}" for one in objects}
    labels = {f"{k}={v}" for one in objects if one["kind"] == "DaemonSet"
              for k, v in one["spec"]["template"]["metadata"]["labels"].items()}  # fmt: skip
    text = "\n".join(block.text for block in of("cluster"))
    named = set(re.findall(r"\b(?:daemonset|configmap)/[a-z-]+", text))
    assert named and named <= made, named - made
    selected = {label for labels in re.findall(r"kubectl .* -l ([^\s)]+)", text) for label in labels.split(",")}
    assert selected and selected <= labels, selected - labels


def test_the_blocks_of_yaml_and_json_can_be_read() -> None:
    for path in (ROOT / "docs").glob("*.md"):
        for text in re.findall(r"^```(?:yaml|json)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
            assert yaml.safe_load(text) is not None, path
