"""Small files beside the socket that let the plugin pass pods that are never captured while we are away."""

from __future__ import annotations

from pathlib import Path

from agent.core.pods import LABEL
from agent.core.settings import Settings


def write_exempt(settings: Settings) -> None:
    """<run_dir>/exempt/<namespace> for each excluded namespace, and for no other."""
    directory = Path(settings.run_dir) / "exempt"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    wanted = {name for name in settings.exclude_namespaces if LABEL.fullmatch(name)}
    for path in directory.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name in wanted:
        (directory / name).touch(mode=0o600)
