#!/usr/bin/env python3
"""Prepares an n8n for the bridge: owner, API key, credentials, data tables, templates.

    n8n_setup.py --url URL --state DIR [--bridge URL] [--bridge-token-file F] [--webhook-secret-file F]
                 [--oauth-token-url URL --oauth-client-id ID --oauth-client-secret-file F [--oauth-scope S]]
                 [--credentials-file F] [--templates DIR]... [--overwrite]

Can be run again: what exists is brought up to date, by name. A workflow that was changed in n8n since it was imported, or
that was there before, is somebody's work: it is kept and named (`--overwrite` replaces it). No secret is printed; DIR gets

    owner.json      e-mail and password of the owner that was made here (mode 600)
    api-key         key of n8n's public API (mode 600)
    workflows.json  name of each imported workflow -> its id
    versions.json   id of each imported workflow -> n8n's id of the version that was imported

With N8N_API_KEY in the environment no owner is made and that key is used: for an n8n that somebody else runs.
Only Python's standard library is used.
"""

import argparse
import http.cookiejar
import json
import os
import pathlib
import secrets
import sys
import time
import urllib.error
import urllib.request

TEMPLATES = pathlib.Path(__file__).resolve().parents[3] / "appliance/n8n/templates"
# The address that the shipped templates name.
BRIDGE = "http://127.0.0.1:8000"
# What the templates keep in data tables: name -> columns. The templates can also make them by hand.
TABLES = {
    "dealscale_done": {"event": "string", "execution_id": "string"},
    "dealscale_attempts": {
        "execution_id": "string", "url": "string", "attempt": "number", "ok": "boolean",
        "status": "number", "error": "string", "wait_seconds": "number",
    },
}
ON_ERROR = "dealscale: on error"
# A report of a failed report would go round for ever.
WITHOUT_ERROR_WORKFLOW = {ON_ERROR, "dealscale: receive errors"}


class Failed(Exception):
    pass


class N8n:
    """n8n's internal API (with the owner's session) and its public API (with a key)."""

    def __init__(self, url):
        self.url = url.rstrip("/")
        self.key = None
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        # No proxy: n8n is near.
        self.opener = urllib.request.build_opener(cookies, urllib.request.ProxyHandler({}))

    def call(self, method, path, body=None, accept=(200, 201)):
        headers = {"content-type": "application/json", "accept": "application/json", "browser-id": "dealscale-setup"}
        if self.key and path.startswith("/api/"):
            headers["X-N8N-API-KEY"] = self.key
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        try:
            answer = self.opener.open(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        except OSError as error:
            raise Failed(f"cannot reach n8n at {self.url}: {error}") from None
        text = answer.read().decode("utf-8", "replace")
        if answer.status not in accept:
            # n8n's messages name fields and ids, not values.
            try:
                text = json.loads(text).get("message", text)
            except ValueError:
                pass
            raise Failed(f"n8n answered {answer.status} to {method} {path.split('?')[0]}: {str(text)[:400]}")
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text

    def all(self, path):
        """Every page of a list of the public API."""
        cursor, items = None, []
        while True:
            _, page = self.call("GET", f"{path}?limit=100" + (f"&cursor={cursor}" if cursor else ""))
            items += page["data"]
            cursor = page.get("nextCursor")
            if not cursor:
                return items


def write_private(path, text):
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)


def ready(n8n):
    until = time.monotonic() + 60
    while True:
        try:
            n8n.call("GET", "/healthz/readiness")
            return
        except Failed:
            if time.monotonic() > until:
                raise
            time.sleep(1)


def api_key(n8n, state):
    """Makes the owner and a key at the first time; afterwards uses what was kept."""
    given = os.environ.get("N8N_API_KEY")
    kept = state / "api-key"
    if given or kept.exists():
        n8n.key = given or kept.read_text()
        try:
            n8n.call("GET", "/api/v1/workflows?limit=1")
        except Failed as error:
            raise Failed(f"the API key {'in N8N_API_KEY' if given else kept} does not work: {error}") from None
        if given:
            write_private(kept, given)
        return
    owner_file = state / "owner.json"
    if owner_file.exists():
        owner = json.loads(owner_file.read_text())
    else:
        # n8n asks for a digit and a capital letter.
        owner = {"email": "owner@dealscale.local", "firstName": "Dealscale", "lastName": "Owner",
                 "password": secrets.token_urlsafe(18) + "A1"}
        write_private(owner_file, json.dumps(owner, indent=2) + "\n")
    # The web server answers "ready" a moment before the REST routes are there; an existing owner is 400.
    until = time.monotonic() + 30
    while True:
        status, _ = n8n.call("POST", "/rest/owner/setup", owner, accept=(200, 201, 400, 404))
        if status != 404 or time.monotonic() > until:
            break
        time.sleep(0.5)
    try:
        n8n.call("POST", "/rest/login", {"emailOrLdapLoginId": owner["email"], "password": owner["password"]})
    except Failed as error:
        raise Failed(
            f"cannot sign in to n8n as the owner of {owner_file} ({error}); "
            "an n8n with an owner of its own needs an API key in N8N_API_KEY"
        ) from None
    _, scopes = n8n.call("GET", "/rest/api-keys/scopes")
    _, made = n8n.call("POST", "/rest/api-keys", {
        "label": f"dealscale {int(time.time())}", "expiresAt": None, "scopes": scopes["data"]})
    n8n.key = made["data"]["rawApiKey"]
    write_private(kept, n8n.key)


def credentials(n8n, args):
    """Name -> id of the credentials that the templates refer to, made or renewed."""
    wanted = {}
    if args.bridge_token_file:
        token = pathlib.Path(args.bridge_token_file).read_text().strip()
        wanted["dealscale bridge token"] = ("httpHeaderAuth", {"name": "Authorization", "value": f"Bearer {token}"})
    if args.webhook_secret_file:
        secret = pathlib.Path(args.webhook_secret_file).read_text().strip()
        wanted["dealscale webhook secret"] = ("httpHeaderAuth", {"name": "X-Dealscale-Secret", "value": secret})
    if args.oauth_token_url:
        wanted["dealscale bridge OAuth2"] = ("oAuth2Api", {
            "grantType": "clientCredentials",
            "accessTokenUrl": args.oauth_token_url,
            "clientId": args.oauth_client_id,
            "clientSecret": pathlib.Path(args.oauth_client_secret_file).read_text().strip(),
            "scope": args.oauth_scope,
            "authentication": "body" if args.oauth_in_body else "header",
            "sendAdditionalBodyProperties": bool(args.oauth_body),
            **({"additionalBodyProperties": args.oauth_body} if args.oauth_body else {}),
        })
    if args.credentials_file:
        for item in json.loads(pathlib.Path(args.credentials_file).read_text()):
            wanted[item["name"]] = (item["type"], item["data"])
    ids = {item["name"]: item["id"] for item in n8n.all("/api/v1/credentials")}
    for name, (kind, data) in wanted.items():
        body = {"name": name, "type": kind, "data": data}
        if name in ids:
            n8n.call("PATCH", f"/api/v1/credentials/{ids[name]}", body)
        else:
            _, made = n8n.call("POST", "/api/v1/credentials", body)
            ids[name] = made["id"]
    return ids


def tables(n8n):
    have = {item["name"] for item in n8n.all("/api/v1/data-tables")}
    for name, columns in TABLES.items():
        if name not in have:
            n8n.call("POST", "/api/v1/data-tables", {
                "name": name, "columns": [{"name": column, "type": kind} for column, kind in columns.items()]})


def adapt(workflow, bridge, credential_ids, workflow_ids):
    """Fills in what differs between installations. Returns the credentials that are missing here."""
    missing = set()
    for node in workflow["nodes"]:
        parameters = node["parameters"]
        url = parameters.get("url")
        if isinstance(url, str) and url.startswith(BRIDGE):
            parameters["url"] = bridge + url[len(BRIDGE):]
        for credential in node.get("credentials", {}).values():
            if credential["name"] in credential_ids:
                credential["id"] = credential_ids[credential["name"]]
            else:
                missing.add(credential["name"])
        called = parameters.get("workflowId")
        if isinstance(called, dict):
            called["value"] = workflow_ids[called["cachedResultName"]]
    if workflow["name"] not in WITHOUT_ERROR_WORKFLOW and ON_ERROR in workflow_ids:
        workflow["settings"]["errorWorkflow"] = workflow_ids[ON_ERROR]
    return missing


def import_order(workflow):
    """What others refer to comes first."""
    refers = any(isinstance(node["parameters"].get("workflowId"), dict) for node in workflow["nodes"])
    return (workflow["name"] != ON_ERROR, refers, workflow["name"])


def work(workflow):
    """What a workflow does, without what differs between installations: to see whether somebody changed it."""
    nodes = {}
    for node in workflow["nodes"]:
        parameters = dict(node["parameters"])
        url = parameters.get("url")
        if isinstance(url, str) and url.endswith("/pulsar/publish"):
            parameters["url"] = "/pulsar/publish"
        if isinstance(parameters.get("workflowId"), dict):
            parameters["workflowId"] = parameters["workflowId"].get("cachedResultName")
        names = sorted(credential["name"] for credential in node.get("credentials", {}).values())
        nodes[node["name"]] = [node["type"], node["typeVersion"], parameters, names, bool(node.get("disabled"))]
    return json.dumps([nodes, workflow["connections"]], sort_keys=True)


def templates(n8n, args, credential_ids, state):
    there = {}
    for item in n8n.all("/api/v1/workflows"):
        if not item.get("isArchived"):
            there.setdefault(item["name"], item)
    ids = {name: item["id"] for name, item in there.items()}
    versions_file = state / "versions.json"
    versions = json.loads(versions_file.read_text()) if versions_file.exists() else {}
    loaded = []
    for folder in args.templates or [TEMPLATES]:
        loaded += [json.loads(path.read_text()) for path in sorted(pathlib.Path(folder).glob("*.json"))]
    imported = {}
    for workflow in sorted(loaded, key=import_order):
        name = workflow["name"]
        missing = adapt(workflow, args.bridge.rstrip("/"), credential_ids, ids)
        old = there.get(name)
        if old and not args.overwrite and old["versionId"] != versions.get(ids[name]) and work(old) != work(workflow):
            imported[name] = ids[name]
            state_now = "active" if old["active"] else "not active"
            print(f"   {name}: differs from the template, and is kept as it is ({state_now}); renamed in n8n, it makes room")
            continue
        if name in ids:
            n8n.call("PUT", f"/api/v1/workflows/{ids[name]}", workflow)
        else:
            _, made = n8n.call("POST", "/api/v1/workflows", workflow)
            ids[name] = made["id"]
        imported[name] = ids[name]
        if not missing:
            n8n.call("POST", f"/api/v1/workflows/{ids[name]}/activate")
        _, now = n8n.call("GET", f"/api/v1/workflows/{ids[name]}")
        versions[ids[name]] = now["versionId"]
        versions_file.write_text(json.dumps(versions, indent=2) + "\n")
        if missing:
            print(f"   {name}: imported, not activated (credential {', '.join(sorted(missing))} is not set up)")
        else:
            print(f"   {name}: imported and active")
    (state / "workflows.json").write_text(json.dumps(imported, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--state", required=True, type=pathlib.Path)
    parser.add_argument("--bridge", default=BRIDGE)
    parser.add_argument("--bridge-token-file")
    parser.add_argument("--webhook-secret-file")
    parser.add_argument("--oauth-token-url")
    parser.add_argument("--oauth-client-id")
    parser.add_argument("--oauth-client-secret-file")
    parser.add_argument("--oauth-scope", default="")
    parser.add_argument("--oauth-body", default="", help="further properties of the token request, as a JSON object")
    parser.add_argument("--oauth-in-body", action="store_true", help="client id and secret in the body of the request")
    parser.add_argument("--credentials-file", help='more credentials: JSON, [{"name", "type", "data"}, …]')
    parser.add_argument("--overwrite", action="store_true", help="also replace workflows that were changed in n8n")
    parser.add_argument("--templates", action="append", type=pathlib.Path)
    args = parser.parse_args()
    args.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    n8n = N8n(args.url)
    try:
        ready(n8n)
        api_key(n8n, args.state)
        tables(n8n)
        templates(n8n, args, credentials(n8n, args), args.state)
    except Failed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
