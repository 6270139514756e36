"""A server that stands in for Weights & Biases: keeps what `wandb sync` uploads, as the real one answers and stores it.

A run's history is a list of lines; each upload says at which line it begins.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import wandb

HISTORY, EVENTS, SUMMARY = "wandb-history.jsonl", "wandb-events.jsonl", "wandb-summary.json"
MANIFEST = "wandb_manifest.json"
PROJECT = {"id": "project", "name": "attnres", "entity": {"id": "entity", "name": "entity"}}


@dataclass
class Artifact:
    """What the server holds of an artifact; `committed` once all of it is there."""

    kind: str
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


@dataclass
class Run:
    """What the server holds of a run. Its `uploads` are files, images among them."""

    run_id: str
    files: dict[str, list[str]] = field(default_factory=lambda: {HISTORY: [], EVENTS: []})
    config: str = "{}"
    summary: str = "{}"
    uploads: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    def store(self, files: dict[str, Any]) -> None:
        for name, upload in files.items():
            lines = self.files.setdefault(name, [])
            lines[upload["offset"] :] = upload["content"]

    def describe(self) -> dict[str, Any]:
        names = dict.fromkeys(("id", "name", "displayName"), self.run_id)
        counts = {"historyLineCount": len(self.files[HISTORY]), "eventsLineCount": len(self.files[EVENTS])}
        tails = {"historyTail": json.dumps(self.files[HISTORY][-1:]), "eventsTail": json.dumps(self.files[EVENTS][-1:])}
        told = {"config": self.config, "summaryMetrics": self.summary, "wandbConfig": "{}", "project": PROJECT}
        return names | counts | tails | told | {"logLineCount": 0, "tags": []}


class Handler(BaseHTTPRequestHandler):
    runs: dict[str, Run]
    artifacts: dict[str, Artifact]  # by id

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body, answer = self.rfile.read(int(self.headers.get("Content-Length", 0))), {}
        if "json" in self.headers.get("Content-Type", ""):
            content = json.loads(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            if self.path.endswith("/file_stream"):
                self.runs[self.path.split("/")[-2]].store(content.get("files") or {})
            else:
                answer = {"data": self.answer(content.get("operationName"), content.get("variables") or {})}
        self.reply(answer)

    def do_PUT(self) -> None:
        """A file: /upload/run/ID/NAME or /upload/artifact/ID/NAME."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, _, kind, owner, name = unquote(self.path).split("/", maxsplit=4)
        (self.runs[owner].uploads if kind == "run" else self.artifacts[owner].files)[name] = body
        self.reply({})

    def do_GET(self) -> None:
        self.reply({})

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name")
        if operation == "RunResumeStatus":
            bucket = self.runs[name].describe() if name in self.runs else None
            return {"model": {**PROJECT, "bucket": bucket}}
        if operation == "UpsertBucket":
            inserted = name not in self.runs
            run = self.runs.setdefault(str(name), Run(str(name)))
            run.config = variables.get("config") or run.config
            run.summary = variables.get("summaryMetrics") or run.summary
            return {"upsertBucket": {"bucket": run.describe(), "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [self.upload("run", name=file, owner=variables["run"]) for file in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return self.answer_on_artifacts(operation, variables)

    def answer_on_artifacts(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables.get("input") or {}
        artifact_id = str(variables.get("artifactID") or variables.get("artifactManifestID"))
        if operation == "CreateArtifact":
            artifact_id, name = f"artifact-{len(self.artifacts)}", given["artifactCollectionName"]
            self.artifacts[artifact_id] = Artifact(given["artifactTypeName"])
            self.runs[given["runName"]].artifacts[name] = self.artifacts[artifact_id]
            artifact = {"id": artifact_id, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            manifest = {"id": artifact_id, "file": self.upload("artifact", artifact_id, MANIFEST)}
            return {operation[0].lower() + operation[1:]: {"artifactManifest": manifest}}
        if operation == "CreateArtifactFiles":
            files = [self.upload("artifact", file["artifactID"], file["name"]) for file in given["artifactFiles"]]
            return {"createArtifactFiles": {"files": {"edges": [{"node": file} for file in files]}}}
        if operation == "CommitArtifact":
            self.artifacts[artifact_id].committed = True
            return {"commitArtifact": {"artifact": {"id": artifact_id, "digest": "digest"}}}
        return {}

    def upload(self, kind: str, owner: str, name: str) -> dict[str, Any]:
        """Where a file of a run or an artifact is to be put."""
        url = f"http://{self.headers['Host']}/upload/{kind}/{owner}/{quote(name)}"
        names = dict.fromkeys(("id", "name", "displayName", "storagePath"), name)
        return names | {"uploadUrl": url, "uploadHeaders": [], "artifact": {"id": owner}}

    def reply(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def wandb_server() -> Iterator[tuple[str, dict[str, Run]]]:
    """Its address, and the runs that it has received by id."""
    runs: dict[str, Run] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Receiver", (Handler,), {"runs": runs, "artifacts": {}}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", runs
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def synced_history(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of the one W&B run that `wandb sync` makes of a run directory's offline files."""
    return [json.loads(line) for line in synced_run(run_dir).files[HISTORY]]


def synced_run(run_dir: Path) -> Run:
    """The one W&B run that `wandb sync` makes of a run directory's offline files."""
    wandb.teardown()  # a process of W&B's writes them, and may still be at it
    script = Path(sys.executable).with_name("wandb")
    with wandb_server() as (address, runs):
        environment = {**os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
        result = subprocess.run([script, "sync", "--yes"], cwd=run_dir, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    (run,) = runs.values()
    return run
