#!/usr/bin/env python3
"""Names, versions, licences and licence texts of every crate inside the binary, from the lock file of this checkout.

licences.py TARGET >FILE. Fails when a crate names no licence. A text that several crates share is printed once.
"""
import hashlib
import json
import pathlib
import re
import subprocess
import sys

TEXT = re.compile(r"^(licen[cs]e|copying|notice|copyright|unlicense)", re.IGNORECASE)


def main(target):
    metadata = json.loads(subprocess.run(
        ["cargo", "metadata", "--format-version=1", "--locked", "--filter-platform", target],
        check=True, stdout=subprocess.PIPE).stdout)
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]
    linked, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node in linked:
            continue
        linked.add(node)
        # What only builds or tests is not in the binary.
        todo += [d["pkg"] for d in nodes[node]["deps"] if any(kind["kind"] is None for kind in d["dep_kinds"])]
    linked.discard(root)

    texts, lines = {}, []
    for package in sorted((packages[i] for i in linked), key=lambda p: (p["name"], p["version"])):
        licence = package["license"] or package["license_file"]
        if not licence:
            sys.exit(f"{package['name']} {package['version']} names no licence")
        numbers = []
        for file in texts_of(pathlib.Path(package["manifest_path"]).parent):
            text = file.read_text(encoding="utf-8", errors="replace").strip()
            key = hashlib.sha256(re.sub(r"\s+", " ", text).encode()).hexdigest()
            numbers.append(texts.setdefault(key, (len(texts) + 1, text))[0])
        source = package["repository"] or package["homepage"] or "https://crates.io/crates/" + package["name"]
        lines.append(f"{package['name']} {package['version']}\n    licence: {licence}\n    source:  {source}\n"
                     f"    texts:   {', '.join(f'[{n}]' for n in sorted(set(numbers))) or 'as named by the licence'}\n")
    print("The program dealscale contains the crates below, the C libraries inside some of them (AWS-LC, SQLite), and the Rust standard\n"
          "library (MIT OR Apache-2.0, https://www.rust-lang.org). Each is used under the licence that stands beside it.\n")
    print("\n".join(lines))
    for number, text in sorted(texts.values()):
        print(f"{'=' * 78}\n[{number}]\n\n{text}\n")


def texts_of(folder):
    """Licence files of a crate, and of a library in a folder of it (aws-lc-sys/aws-lc)."""
    found = [f for f in folder.iterdir() if f.is_file() and TEXT.match(f.name)]
    found += [f for d in folder.iterdir() if d.is_dir() for f in d.iterdir() if f.is_file() and TEXT.match(f.name)]
    return sorted(found)


if __name__ == "__main__":
    main(sys.argv[1])
