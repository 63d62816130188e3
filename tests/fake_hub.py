"""A hub on this machine: the part of the hub's HTTP API that uploads use, over a real socket."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


TOKEN = "hf_test_token_that_must_never_be_seen"
LFS_BYTES = 4096  # larger files go the way of large files


class FakeHub:
    """Repositories by name, files by path; and what was asked.

    Attributes:
        repos: {name: {path: bytes}}.
        private: {name: bool}.
        calls: (method, path without query) of every request.
        fail: Called with method and path; a status that it returns is the answer, -1 drops the connection.
        num_uploaded: Contents that were sent, by the way of large files.
    """

    def __init__(self):
        self.repos, self.private, self.calls, self.blobs = {}, {}, [], {}
        self.licenses = {}
        self.fail = lambda method, path: None
        self.num_uploaded = 0
        self.commits = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, "GET")

            def do_POST(self):
                hub.answer(self, "POST")

            def do_PUT(self):
                hub.answer(self, "PUT")

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request, method):
        """One request."""
        path = request.path.split("?")[0]
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.calls.append((method, path))
        status = self.fail(method, path)
        if status == -1:
            request.connection.close()
            return
        if status is None:
            needs_token = not path.startswith("/blobs/") and path != "/api/validate-yaml"
            if needs_token and request.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, content = 401, {"error": "Invalid credentials"}
            else:
                status, content = self.route(method, path, body)
        else:
            content = {"error": "the hub is not well"}
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def route(self, method, path, body):
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body))
        if parts[0] == "blobs":
            return self.store(parts[1], body)
        if path.endswith("/info/lfs/objects/batch"):
            return 200, self.batch(json.loads(body))
        name = "/".join(parts[2:4])
        if parts[:2] == ["api", "models"] and parts[4:5] == ["preupload"]:
            return 200, self.preupload(name, json.loads(body))
        if parts[:2] == ["api", "models"] and parts[4:5] == ["commit"]:
            return 200, self.commit(name, body)
        if parts[:2] == ["api", "models"] and "tree" in parts:
            files = [{"type": "file", "path": p, "size": len(c), "oid": ""} for p, c in self.repos[name].items()]
            return 200, files
        if parts[:2] == ["api", "models"] and (name in self.repos or name in self.licenses):
            siblings = [{"rfilename": p} for p in self.repos.get(name, {})]
            card = {"license": self.licenses.get(name)}
            return 200, {"id": name, "sha": "0" * 40, "siblings": siblings, "cardData": card}
        return 404, {"error": f"nothing at {method} {path}"}

    def create(self, wanted):
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if not name.startswith("me/"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        content = {"url": f"{self.endpoint}/{name}", "name": name, "id": name}
        if name in self.repos:
            return 409, {**content, "error": "You already created this model repo"}
        self.repos[name], self.private[name] = {}, bool(wanted.get("private") or wanted.get("visibility") == "private")
        return 200, content

    def validate(self, card):
        header = card["content"].split("---")[1]
        try:
            content = yaml.safe_load(header)
        except yaml.YAMLError as error:
            return 400, {"error": str(error)}
        relation = content.get("base_model_relation")
        if relation not in (None, "adapter", "finetune", "merge", "quantized"):
            return 400, {"error": f"base_model_relation {relation}"}
        return 200, {"errors": [], "warnings": []}

    def preupload(self, name, wanted):
        def mode(file):
            known = self.repos[name].get(file["path"])
            oid = None if known is None else hashlib.sha1(b"blob %d\0" % len(known) + known).hexdigest()
            large = file["size"] > LFS_BYTES
            return {
                "path": file["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
                "oid": oid,
            }

        return {"files": [mode(file) for file in wanted["files"]]}

    def batch(self, wanted):
        def action(item):
            if item["oid"] in self.blobs:
                return {"oid": item["oid"], "size": item["size"]}
            upload = {"href": f"{self.endpoint}/blobs/{item['oid']}", "header": {}}
            return {"oid": item["oid"], "size": item["size"], "actions": {"upload": upload}}

        return {"transfer": "basic", "objects": [action(item) for item in wanted["objects"]]}

    def store(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the content is not that of the hash"}
        self.blobs[oid] = body
        self.num_uploaded += 1
        return 200, {}

    def commit(self, name, body):
        files = self.repos[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.commits.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        return {"commitOid": "0" * 40, "commitUrl": f"{self.endpoint}/{name}/commit/{'0' * 40}", "success": True}
