"""Scoring on two Ray nodes (two raylets of this machine), an engine on each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.data import DataContext

from cdm import parts, shards
from cdm.config import TeacherPool
from tests import tiny
from tests.scoring import TRANSFORMERS, asked, files, in_process, one_row, run, write_corpus

DOCUMENTS, PART_DOCUMENTS = 120, 8


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setattr(DataContext.get_current(), "wait_for_min_actors_s", 300)  # else the first may do all the parts
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_engines_on_both_nodes_write_what_one_process_writes(two_nodes: None, tmp_path: Path) -> None:
    model = tiny.tiny_teacher(tmp_path / "teacher")
    corpus_folder = write_corpus(tmp_path / "corpus", tiny.documents(DOCUMENTS), PART_DOCUMENTS)
    told: list[str] = []
    run(
        model,
        corpus_folder,
        str(tmp_path / "shards"),
        TRANSFORMERS,
        pool=TeacherPool(actors=2, cpus=1),
        on_progress=lambda done, note: told.append(note),
    )
    assert told[-1].endswith("on 2 nodes"), "all parts were scored on one node"
    actor = in_process(asked(model, TRANSFORMERS), model, corpus_folder, tmp_path / "by hand")
    corpus = parts.read_manifest(corpus_folder)
    for part in corpus.parts:
        assert actor(one_row(part))["error"] == [""]
    shards.finish_shards(str(tmp_path / "by hand"), corpus.names, actor.identity)
    assert files(tmp_path / "shards") == files(tmp_path / "by hand")
