"""A PostgreSQL of a test's own: a new cluster in a temporary folder, reached through a socket in it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest

UNPRIVILEGED = "nobody"  # PostgreSQL refuses to run as root


def binaries() -> Path:
    """The folder of initdb and postgres; the test is skipped where there is none."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    on_path = shutil.which("initdb")
    if not debian and not on_path:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    return debian[-1] if debian else Path(str(on_path)).resolve().parent


@contextmanager
def postgresql() -> Iterator[str]:
    """The URI of an empty database."""
    where = binaries()
    with tempfile.TemporaryDirectory(prefix="pg") as folder:  # not pytest's own, which nobody else may enter
        options: dict[str, Any] = {"cwd": folder}
        if os.getuid() == 0:
            user = pwd.getpwnam(UNPRIVILEGED)
            os.chown(folder, user.pw_uid, user.pw_gid)
            options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        data = f"{folder}/data"
        made = [where / "initdb", "-D", data, "-U", "cdm", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, **options)
        command = [where / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        with open(f"{folder}/log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, **options)
            try:
                while not answers(folder):
                    assert process.poll() is None, Path(folder, "log").read_text(encoding="utf-8")
                    threading.Event().wait(0.05)
                yield f"postgresql+psycopg2://cdm@/postgres?host={folder}"
            finally:
                process.send_signal(signal.SIGINT)  # at once, whoever is connected
                process.wait(60)


def answers(folder: str) -> bool:
    try:
        psycopg2.connect(host=folder, user="cdm", dbname="postgres").close()
    except psycopg2.OperationalError:
        return False
    return True
