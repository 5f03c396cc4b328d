"""A model hub on this machine, in memory: as much of its HTTP interface as sending and fetching a small model takes.

It refuses a card as the hub does: metadata that is not YAML, a ``pipeline_tag`` that it does not know, a
``model-index`` without what that must have.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from embedcache.fingerprint import sha256_bytes

# Of huggingface.co/api/tasks, those that a head may have.
TASKS = ("text-classification", "image-classification", "tabular-classification", "tabular-regression")


def card_errors(card: str) -> list[str]:
    """What the hub would refuse in a model card."""
    parts = card.split("---\n")
    if len(parts) < 3 or parts[0]:
        return ["no metadata"]
    try:
        data = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    errors = [] if data.get("pipeline_tag", TASKS[0]) in TASKS else ["pipeline_tag is not a task"]
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", data.get("base_model", "a/b")):
        errors.append("base_model is not the name of a model")
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model.get("results"):
            errors.append("a model of the index has no name or results")
        for result in model.get("results", []):
            dataset, task = result.get("dataset", {}), result.get("task", {})
            if task.get("type") not in TASKS or not all(isinstance(dataset.get(key), str) for key in ("name", "type")):
                errors.append("a result has no task, or a data set without name and type")
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float)):
                    errors.append("a metric has no type or value")
    return errors


class Hub:
    """Repositories by name: their commits, each a dict of files, the last of which is ``main``."""

    def __init__(self) -> None:
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.token = "hf_secret"
        self.fetched: list[str] = []
        self.endpoint = ""

    def sha(self, name: str, number: int) -> str:
        return f"{number:02d}" + sha256_bytes(name.encode())[:38]

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit's hash and files of a revision, None where there is none."""
        commits = self.commits[name]
        number = len(commits) - 1 if revision == "main" else int(revision[:2]) if revision[:2].isdigit() else -1
        return (self.sha(name, number), commits[number]) if 0 <= number < len(commits) else None


class Handler(BaseHTTPRequestHandler):
    """Answers requests about ``hub``."""

    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
            name, what, revision = match[1], match[2], match[3] or "main"
            if name not in self.hub.commits:
                return self.refuse(404, "RepoNotFound")
            if (found := self.hub.files(name, revision)) is None:
                return self.refuse(404, "RevisionNotFound")
            sha, files = found
            if what == "tree":
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": sha256_bytes(data)[:40]}
                    for file, data in files.items()
                ]
                return self.answer(tree)
            return self.answer({"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]})
        return self.resolve(send=True)

    def do_HEAD(self) -> None:
        self.resolve(send=False)

    def resolve(self, send: bool) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
        if match is None or match[1] not in self.hub.commits:
            return self.refuse(404, "RepoNotFound")
        found = self.hub.files(match[1], match[2])
        if found is None or match[3] not in found[1]:
            return self.refuse(404, "EntryNotFound")
        data = found[1][match[3]]
        self.hub.fetched += [match[3]] * send
        self.send_response(200)
        headers = {"ETag": f'"{sha256_bytes(data)[:40]}"', "X-Repo-Commit": found[0], "Content-Length": str(len(data))}
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if send:
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            errors = card_errors(json.loads(body)["content"])
            return self.answer({"errors": [{"message": error} for error in errors], "warnings": []}, 400 * bool(errors))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401, "GatedRepo", "Invalid credentials")
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            self.hub.commits.setdefault(name, [{".gitattributes": b""}])
            return self.answer({"url": f"{self.hub.endpoint}/{name}"})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/?]+)(?:\?.*)?", self.path)
        if match is None:
            return self.refuse(404, "EntryNotFound")
        if match[2] == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        commits = self.hub.commits[match[1]]
        new = dict(commits[-1])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                new[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del new[line["value"]["path"]]
        commits.append(new)
        sha = self.hub.sha(match[1], len(commits) - 1)
        self.answer({"commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{match[1]}/commit/{sha}", "success": True})

    def answer(self, value: Any, status: int = 0) -> None:
        data = json.dumps(value).encode()
        self.send_response(status or 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str = "Not found") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub with no repository."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()
