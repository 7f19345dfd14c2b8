"""`cdm plan` as a user meets it, and what it learns from a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import Result
from transformers import AutoConfig
from typer.testing import CliRunner

from cdm.calibration import read_records
from cdm.cli import app
from cdm.config import load_config
from cdm.corpus_size import corpus_size, side
from cdm.plan_view import sizes_of
from cdm.rates import load_rates
from cdm.shards import open_shards
from ray_jobs.measure import STEPS, miniature
from tests import tiny, whole

Finished = tuple[Path, str, str]


def plan(config: str, *options: str) -> Result:
    """In this process: a new one would import torch and transformers again for each of them."""
    return CliRunner().invoke(app, ["plan", config, *options])


# --- before anything ran -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config of models that exist, on GPUs, with prompts and responses in a file."""
    folder = tmp_path_factory.mktemp("plan")
    teacher, student = tiny.tiny_teacher(folder / "teacher"), tiny.tiny_student(folder / "student")
    lines = [f'{{"prompt": "what is {i}?", "response": "it is {i}, and {i + 1} follows"}}' for i in range(900)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    values = {
        "name": "gpus",
        "storage": str(folder / "storage"),
        "corpus": {"type": "jsonl", "path": str(folder / "pairs.jsonl")},
        "teachers": [{"model": teacher, "max_length": 128, "top_k": 8}],
        "student": {"model": student, "steps": 100, "max_length": 128},
        "method": {"type": "cdm"},
        "resources": {"teacher": {"gpus": 1}, "student": {"gpus": 1, "workers": 2}},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def test_every_device_of_the_table_is_compared(on_gpus: str) -> None:
    done = plan(on_gpus)
    assert (done.exit_code, done.stderr) == (0, "")
    for device in ("H100", "A100-40", "L40S", "L4"):
        assert f"│ {device} " in done.stdout
    assert "900 documents (the source's first 512 documents)" in done.stdout
    assert not Path(on_gpus).with_name("storage").exists(), "a plan writes nothing"


def test_a_cluster_file_gives_pools_and_prices(on_gpus: str, tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("devices: {A100-40: {memory_gib: 0.001}}")
    done = plan(on_gpus, "--cluster", str(whole.ROOT / "cluster.yaml"))
    assert (done.exit_code, done.stderr) == (0, "")
    assert "2 A100-40" in done.stdout and "1 L40S" in done.stdout and "1e12" in done.stdout
    assert "cost at the table's prices" in done.stdout and "not calibrated" in done.stdout
    done = plan(on_gpus, "--cluster", str(whole.ROOT / "cluster.yaml"), "--prices", str(prices))
    assert done.exit_code == 1
    assert "error: student" in done.stderr and "A100-40 has 0" in done.stderr


def test_what_is_wrong_is_one_line(on_gpus: str, tmp_path: Path) -> None:
    cluster = yaml.safe_load((whole.ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    for node in cluster["available_node_types"].values():
        node["node_config"]["InstanceType"] = "p5.48xlargest"
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(cluster))
    done = plan(on_gpus, "--cluster", str(file))
    assert done.exit_code == 2
    assert done.stderr.startswith(
        "error: instances: p5.48xlargest is not in the table of rates; did you mean p5.48xlarge?"
    )
    assert done.stderr.count("\n") == 1


def test_the_sample_is_what_the_tokenizers_say(on_gpus: str) -> None:
    config = load_config(on_gpus)
    found, rates = corpus_size(config), load_rates()
    assert found.documents == 900 and len(found.sample) == 512
    one = side(config.teachers[0].model, 128, found, config.storage, rates)
    cut = side(config.teachers[0].model, 30, found, config.storage, rates)
    assert one.source == "sampled with its tokenizer" and 0 < cut.tokens <= 30 < one.tokens
    _, sizes = sizes_of(config, rates)
    hf = AutoConfig.from_pretrained(config.teachers[0].model.name)
    assert sizes.teachers[0].layers == hf.num_hidden_layers and sizes.sides_t[0] == one


# --- after a run -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_run_calibrates(finished: Finished) -> None:
    storage, config, _ = finished
    records = read_records([str(storage)], gpus=False)
    titles = [record.title for record in records.runs]
    # the four steps of the teacher's own training are too few to tell a rate
    assert sorted(titles) == ["evaluate", "score teacher", "train cdm, top_k=20", "train sft"]
    assert all(record.seconds and record.config == load_config(config) for record in records.runs)
    speeds = [record.tokens_a_second for record in records.runs if record.title != "evaluate"]
    assert speeds[0] is None or all(speed and speed > 0 for speed in speeds if speed is not None)
    assert records.took(load_config(config), "align") and records.took(load_config(config), "corpus")
    assert records.took(load_config(config, ["seed=5"]), "train sft") is None
    assert read_records([str(storage)], gpus=True).runs == ()
    done = plan(config)
    assert done.exit_code == 0, done.stderr
    assert "the finished corpus" in done.stdout and "sampled with its tokenizer" in done.stdout
    assert "measured" in done.stdout and "calibrated on" in done.stdout


@pytest.mark.slow
def test_tokens_and_bytes_are_near_those_of_the_finished_shards(finished: Finished) -> None:
    storage, config, _ = finished
    (folder,) = (storage / "shards").iterdir()
    manifest = open_shards(str(folder))
    corpus, sizes = sizes_of(load_config(config), load_rates())
    assert corpus.documents * sizes.sides_t[0].response == pytest.approx(manifest.meta["tokens"], rel=0.1)
    assert sizes.shard_bytes[0] == manifest.bytes / manifest.meta["tokens"]


def test_the_miniature_is_the_same_in_small(tmp_path: Path) -> None:
    config = load_config(whole.write_config(tmp_path, tmp_path / "storage", baselines=[{"type": "sft"}]))
    small = miniature(config)
    assert small.storage == str(tmp_path / "storage" / "measured")
    assert small.student.steps == STEPS and small.student.best is None
    assert small.student.model == config.student.model, "a model with random weights stays one"
    assert small.teachers[0].model.training.steps == STEPS  # type: ignore[union-attr]
    assert (small.method, small.baselines, small.resources) == (config.method, config.baselines, config.resources)
    assert small.corpus.part_documents == 120 // 4
