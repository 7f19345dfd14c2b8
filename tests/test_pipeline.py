"""The whole path at tiny size, as people start it: real vLLM, Ray, FSDP2 and MLflow; killed and rerun."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from cdm.export import read_about
from cdm.inspection import inspect_path
from tests import whole
from tests.whole import finish, runs, start, students, without_the_student, write_config

pytestmark = pytest.mark.slow


def test_it_ends_with_a_table_samples_and_where_things_are(finished: tuple[Path, str, str]) -> None:
    _, _, output = finished
    for text in ("teacher, teacher", "student before", "student, sft", "student, cdm", "bits per byte", "agreement"):
        assert text in output
    assert "a completion" in output and "student: " in output and "MLflow" in output
    assert "Traceback" not in output and "Warning" not in output


def test_every_stage_is_tracked_below_one_pipeline_run(finished: tuple[Path, str, str]) -> None:
    found = runs(finished[0])
    assert {"tiny", "pretrain teacher", "score teacher", "train sft", "train cdm, top_k=20", "evaluate"} == set(found)
    assert all(run.info.status == "FINISHED" for run in found.values())
    parent = found["tiny"].info.run_id
    assert {run.data.tags.get("mlflow.parentRunId") for name, run in found.items() if name != "tiny"} == {parent}
    assert found["tiny"].data.params["method.type"] == "cdm"
    assert {"loss", "ce", "kd", "d1", "d2", "one_to_one", "validation_bits_per_byte"} <= found[
        "train cdm, top_k=20"
    ].data.metrics.keys()
    assert "kd" not in found["train sft"].data.metrics


def test_the_best_validation_is_exported(finished: tuple[Path, str, str]) -> None:
    """From a checkpoint that Ray Train kept beside the newest."""
    storage = finished[0]
    run = runs(storage)["train cdm, top_k=20"]
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    history = client.get_metric_history(run.info.run_id, "validation_agreement")
    values = {metric.step: metric.value for metric in sorted(history, key=lambda metric: metric.step)}
    best = max(values, key=lambda step: (values[step], -step))
    about = read_about(str(next(path for path in students(storage) if "-cdm-" in path.name)))
    assert values.keys() == {4, 8} and about["step"] == best and about["steps"] == 8
    assert about["figures"]["validation_agreement"] == pytest.approx(values[best])
    (folder,) = (storage / "runs").glob("cdm-*")
    assert {f"step_{best:08d}", "step_00000008"} <= {path.name for path in folder.iterdir()}
    assert about["lineage"]["teachers"][0]["teacher"] == "teacher"


def test_a_second_call_finds_everything_done(finished: tuple[Path, str, str]) -> None:
    storage, config, first = finished
    before = {path: path.stat().st_mtime_ns for path in storage.rglob("*.parquet")}
    process = start("pipeline", config)
    output = finish(process)
    assert process.returncode == 0 and "done " not in output and output.count("have ") >= 6
    table = first[first.index("Held-out") : first.index("student: ")]
    assert table in output
    assert before == {path: path.stat().st_mtime_ns for path in storage.rglob("*.parquet")}


def test_transformers_and_vllm_load_the_student_and_generate(finished: tuple[Path, str, str]) -> None:
    folder = next(path for path in students(finished[0]) if "-cdm-" in path.name)
    script = f"""
import os, json
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1")
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
chat = [{{"role": "user", "content": "def add(a, b):"}}]
options = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = tokenizer.apply_chat_template(chat, **options)["input_ids"]
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
out = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, ids.shape[1]:].tolist()
from vllm import LLM, SamplingParams
llm = LLM({str(folder)!r}, dtype="float32", max_model_len=256, enforce_eager=True, kv_cache_memory_bytes=64 * 2**20)
sampling = SamplingParams(max_tokens=6, min_tokens=6, temperature=0)
again = llm.generate([{{"prompt_token_ids": ids[0].tolist()}}], sampling, use_tqdm=False)[0].outputs[0].token_ids
print("RESULT" + json.dumps([out, list(again)]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    transformers, vllm = json.loads(done.stdout.split("RESULT")[1])
    assert len(vllm) == 6 and transformers == vllm


@pytest.mark.parametrize("kind", ["corpus", "shards", "aligned", "models", "students", "runs", ""])
def test_inspect_shows_each_kind_of_artefact(
    finished: tuple[Path, str, str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = finished[0]
    for folder in (storage / kind).iterdir() if kind else [storage]:
        inspect_path(str(folder), 1)
        assert len(capsys.readouterr().out) > 100


def test_a_driver_killed_while_training_goes_on_where_it_was(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    """The weights are those of the undisturbed run, bit for bit, and no step is logged twice."""
    storage = tmp_path / "storage"
    without_the_student(finished[0], storage)
    config = write_config(tmp_path, storage)
    process = start("train", config)
    while not list((storage / "runs").glob("cdm-*/step_*")):
        assert process.poll() is None, finish(process)
        threading.Event().wait(0.05)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert not list((storage / "students").glob("*-cdm-*"))
    again = start("train", config)
    output = finish(again)
    assert again.returncode == 0, output
    assert "have score teacher" in output and "done train cdm" in output

    one, other = (next(path for path in students(s) if "-cdm-" in path.name) for s in (storage, finished[0]))
    expected, found = load_file(other / "model.safetensors"), load_file(one / "model.safetensors")
    assert all((expected[name] == found[name]).all() for name in expected)
    client, run = MlflowClient(f"sqlite:///{storage}/mlflow.db"), runs(storage)["train cdm, top_k=20"]
    steps = sorted(metric.step for metric in client.get_metric_history(run.info.run_id, "loss"))
    assert steps == list(range(1, 9))


def test_a_folder_is_evaluated_in_the_students_place(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    """On held-out documents and on tasks, by real engines in the pool; a second call finds all answers."""
    storage = tmp_path / "storage"
    shutil.copytree(finished[0], storage, ignore=shutil.ignore_patterns("mlflow.db", "tracking", "reports"))
    folder = next(path for path in students(storage) if "-cdm-" in path.name)
    rows = [{"prompt": f"Say {n}.", "response": f"{n} it is", "kind": "odd" if n % 2 else "even"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"type": "jsonl", "path": str(tmp_path / "rows.jsonl")}
    said = {"type": "instructions", "name": "said", "data": data, "category": "kind", "seeds": 2, "max_tokens": 16}
    counted = {"type": "final_number", "name": "counted", "data": data, "max_tokens": 16}
    engine = {"type": "transformers", "dtype": "float32"}
    evaluation = whole.CONFIG["evaluation"] | {"engine": engine, "tasks": [said, counted]}
    config = write_config(tmp_path, storage, evaluation=evaluation)

    process = start("evaluate", str(folder), "--config", config)
    output = finish(process)
    assert process.returncode == 0, output
    assert f"done answer {folder.name}: 18 answers" in output and "done grade" in output and "done train" not in output
    assert "said rouge_l" in output and "counted exact_match" in output and "±" in output
    file = Path(output.split("scores:")[1].split()[0])
    report = json.loads(file.read_text(encoding="utf-8"))
    scores = {(one["model"], one["task"], one["metric"]): one for one in report["scores"]}
    for model in ("teacher, teacher", folder.name):
        said_score = scores[model, "said", "rouge_l"]
        assert said_score["documents"] == 6 and len(said_score["seeds"]) == 2
        assert set(said_score["categories"]) == {"odd", "even"}
        assert said_score["low"] <= said_score["value"] <= said_score["high"]
        assert scores[model, "held-out", "bits_per_byte"]["low"] < scores[model, "held-out", "bits_per_byte"]["high"]
    assert {(one["task"], one["against"]) for one in report["comparisons"]} == {
        (task, "teacher, teacher") for task in ("held-out", "said", "counted")
    }

    again = start("evaluate", str(folder), "--config", config)
    output = finish(again)
    assert again.returncode == 0 and f"have answer {folder.name}" in output and "done " not in output, output
    assert json.loads(file.read_text(encoding="utf-8")) == report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "student.learning_rat=1"], "student.learning_rat: unknown key; did you mean learning_rate?"),
        (["--set", "student.model=./nowhere"], "no such file or folder: ./nowhere"),
        (["--set", "resources.student.workers=0"], "resources.student.workers"),
    ],
)
def test_a_bad_config_ends_with_two_before_anything_starts(tmp_path: Path, options: list[str], message: str) -> None:
    process = start("pipeline", write_config(tmp_path, tmp_path / "storage"), *options)
    output = finish(process)
    assert process.returncode == 2 and message in output and "Traceback" not in output
    assert not (tmp_path / "storage").exists()


def test_too_little_coverage_fails_before_anything_is_made(finished: tuple[Path, str, str]) -> None:
    storage, config, _ = finished
    before = {path.name for path in (storage / "shards").iterdir()}
    process = start("train", config, "--set", "student.min_coverage=1", "--set", "teachers.0.max_length=300")
    output = finish(process)
    assert process.returncode == 1 and re.search(r"teacher teacher see \d+\.\d% of the bytes", output)
    assert "student.min_coverage is 100.0%" in output
    assert {path.name for path in (storage / "shards").iterdir()} == before


def test_workers_that_never_fit_are_refused(finished: tuple[Path, str, str]) -> None:
    _, config, _ = finished
    process = start("train", config, "--set", "resources.student.workers=64", "--set", "seed=1")
    output = finish(process)
    assert process.returncode == 1 and "resources.student: the workers need 64 CPU" in output
