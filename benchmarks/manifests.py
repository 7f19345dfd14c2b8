"""What the manifest of a folder of a million parts weighs, and how long it takes: `python -m benchmarks.manifests`.

Side by side: a JSON object a part in manifest.json, and the table of parts beside it that `cdm.parts` writes.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict

from cdm import parts
from cdm.parts import Manifest, Part

PARTS = 1_000_000


def main() -> None:
    print(json.dumps(measure()))


def measure() -> dict[str, float]:
    """Megabytes and CPU seconds, and a table of them printed."""
    found = tuple(Part(f"train-{n:07d}.parquet", 256, 5_000_000 + n, os.urandom(32).hex()) for n in range(PARTS))
    manifest = Manifest(parts.SCHEMA_VERSION, "shards", {"k": 100}, found)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        with open(f"{folder}/objects.json", "w") as file:
            json.dump([asdict(part) for part in found], file, indent=1)
        wrote_json = time.process_time()
        with open(f"{folder}/objects.json") as file:
            assert tuple(Part(**part) for part in json.load(file)) == found
        read_json = time.process_time()
        parts.write_manifest(folder, manifest)
        wrote_table = time.process_time()
        assert parts.read_manifest(folder) == manifest
        read_table = time.process_time()
        megabytes = [os.path.getsize(f"{folder}/{name}") / 1e6 for name in ("objects.json", parts.PARTS)]
    print(f"{PARTS:,} parts{'MB':>18}{'write s':>10}{'read s':>10}")
    print(f"JSON objects   {megabytes[0]:15.1f}{wrote_json - began:10.1f}{read_json - wrote_json:10.1f}")
    print(f"table of parts {megabytes[1]:15.1f}{wrote_table - read_json:10.1f}{read_table - wrote_table:10.1f}")
    figures = {"json_mb": megabytes[0], "table_mb": megabytes[1], "table_read_s": read_table - wrote_table}
    return {**figures, "table_write_s": wrote_table - read_json}


if __name__ == "__main__":
    main()
