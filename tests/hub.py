"""A Hugging Face Hub on 127.0.0.1: what huggingface_hub asks a Hub for, answered from memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from faults import Fault, Server, serving

Files = Mapping[str, bytes]


@contextmanager
def hub_of(name: str, revisions: Mapping[str, tuple[str, Files]]) -> Iterator[Server]:
    """Serve a model: each branch or tag (`main` among them) is a commit and its files."""
    with serving({}) as server:
        for revision, (commit, files) in revisions.items():
            publish(server, name, revision, commit, files)
        yield server


def publish(server: Server, name: str, revision: str, commit: str, files: Files) -> None:
    """Let `revision` of a model stand for this commit from now on."""
    names = [{"rfilename": file} for file in sorted(files)]
    listing = json.dumps({"id": name, "sha": commit, "siblings": names}).encode()
    for called in (revision, commit):
        server.files[f"/api/models/{name}/revision/{called.replace('/', '%2F')}"] = listing
        for file, content in files.items():
            path = f"/{name}/resolve/{called.replace('/', '%2F')}/{file}"
            server.files[path], server.commits[path] = content, commit


def refuse(
    server: Server, name: str, status: int, code: str | None, revision: str = "main"
) -> None:
    """Let the Hub answer with this error whenever a model is asked for."""
    fault = [Fault(status=status, code=code)] * 9
    server.faults[f"/api/models/{name}/revision/{revision}"] = fault
