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


class Run:
    """What the server holds of a run."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.files: dict[str, list[str]] = {HISTORY: [], EVENTS: []}
        self.config = "{}"
        self.summary = "{}"
        self.uploads: dict[str, bytes] = {}  # files of the run, images among them
        self.artifacts: dict[str, Artifact] = {}

    def store(self, files: dict[str, Any]) -> None:
        for name, upload in files.items():
            lines = self.files.setdefault(name, [])
            lines[upload["offset"] :] = upload["content"]

    def describe(self) -> dict[str, Any]:
        history, events = self.files[HISTORY], self.files[EVENTS]
        return {
            **{"id": self.run_id, "name": self.run_id, "displayName": self.run_id, "project": PROJECT},
            **{"historyLineCount": len(history), "eventsLineCount": len(events), "logLineCount": 0},
            **{"historyTail": json.dumps(history[-1:]), "eventsTail": json.dumps(events[-1:])},
            **{"config": self.config, "summaryMetrics": self.summary, "wandbConfig": "{}", "sweepName": None},
            **{"tags": [], "notes": None, "description": None},
        }


class Handler(BaseHTTPRequestHandler):
    runs: dict[str, Run]
    artifacts: dict[str, Artifact]  # by id

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "json" not in self.headers.get("Content-Type", ""):
            return self.reply({})
        content = json.loads(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
        if self.path.endswith("/file_stream"):
            self.runs[self.path.split("/")[-2]].store(content.get("files") or {})
            return self.reply({})
        return self.reply({"data": self.answer(content.get("operationName"), content.get("variables") or {})})

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
            files = [
                {"name": file, "uploadUrl": self.url("run", variables["run"], file)} for file in variables["files"]
            ]
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
            file = {"uploadUrl": self.url("artifact", artifact_id, MANIFEST), "uploadHeaders": [], "name": MANIFEST}
            manifest = {"id": artifact_id, "file": {**file, "id": "manifest", "displayName": MANIFEST}}
            return {operation[0].lower() + operation[1:]: {"artifactManifest": manifest}}
        if operation == "CreateArtifactFiles":
            edges = [{"node": self.describe_file(file)} for file in given["artifactFiles"]]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation == "CommitArtifact":
            self.artifacts[artifact_id].committed = True
            return {"commitArtifact": {"artifact": {"id": artifact_id, "digest": "digest"}}}
        return {}

    def describe_file(self, file: dict[str, Any]) -> dict[str, Any]:
        artifact_id, name = file["artifactID"], file["name"]
        where = {"uploadUrl": self.url("artifact", artifact_id, name), "uploadHeaders": [], "storagePath": name}
        return {**where, "id": name, "name": name, "displayName": name, "artifact": {"id": artifact_id}}

    def url(self, kind: str, owner: str, name: str) -> str:
        return f"http://{self.headers['Host']}/upload/{kind}/{owner}/{quote(name)}"

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
