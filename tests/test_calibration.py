"""What logs say about speed: rates by hand, the nearest run first, and how far one run predicts another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cdm.calibration import WARM_UP, Record, Records, read_records
from cdm.config import Config, parse_config
from cdm.corpus_size import Side
from cdm.journal import Journal, RunRef
from cdm.model_size import ModelSize, model_config
from cdm.rates import load_rates, pools_of
from cdm.speeds import Speeds
from tests import whole

RATES = load_rates()
SIDE = Side(prompt=100.0, response=100.0, squares=40_000.0, source="by hand")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config({**whole.CONFIG, "storage": str(tmp_path), "tracking": {"type": "none"}})


def log(config: Config, stage: str, name: str, parent: str | None, tags: dict[str, str]) -> Journal:
    journal = Journal(RunRef(f"{config.storage}/tracking/{stage}-{name.replace(' ', '-')}"))
    journal.write("run", {"stage": stage, "name": name, "identity": "x", "parent": parent})
    journal.write("status", "RUNNING")
    journal.tags(tags)
    return journal


def a_pipeline(config: Config) -> str:
    above = log(config, "pipeline", "tiny", None, {})
    above.params(config.model_dump(mode="json"))
    above.metrics(0, {"seconds.align": 2.0})
    above.metrics(1, {"seconds.align": 3.0})
    above.close()
    return Path(above.ref.folder).name


def test_rates_are_those_of_the_steps_after_the_first_ones(config: Config) -> None:
    parent = a_pipeline(config)
    tags = {"cdm.from": "/models/student-0123456789ab", "cdm.method": "cdm"}
    trained = log(config, "train", "train cdm", parent, tags)
    seconds = 0.0
    for step in range(1, 9):
        took = 10.0 if step <= WARM_UP else 0.5
        seconds += took
        trained.metrics(step, {"seconds": seconds, "tokens_a_second": 1000 / took})
    trained.close()
    scored = log(config, "score", "score teacher", parent, {})
    scored.metrics(0, {"tokens_scored": 600.0, "seconds_scored": 2.0})
    scored.close()
    failed = log(config, "score", "score other", parent, {})
    failed.metrics(0, {"tokens_scored": 600.0, "seconds_scored": 2.0})
    failed.close("FAILED")
    records = read_records([config.storage], gpus=False)
    found = {record.kind: record for record in records.runs}
    assert len(records.runs) == 2, "what failed is no record"
    workers = config.resources.student.workers
    assert found["training"].tokens_a_second == pytest.approx(2000 / workers)
    assert (found["training"].model, found["training"].method) == ("student", "cdm")
    assert found["scoring"].tokens_a_second == pytest.approx(300)
    assert found["scoring"].config == config
    assert records.took(config, "align") == 5.0, "both alignments"
    assert read_records([config.storage], gpus=True).runs == ()


def test_a_run_that_went_on_after_a_kill_has_a_rate_and_no_seconds(config: Config) -> None:
    scored = log(config, "score", "score teacher", a_pipeline(config), {})
    scored.metrics(0, {"tokens_scored": 600.0, "seconds_scored": 2.0})
    scored.write("status", "RUNNING")
    scored.close()
    (record,) = read_records([config.storage], gpus=False).runs
    assert record.tokens_a_second == pytest.approx(300) and record.seconds is None and record.fixed is None


def a_record(config: Config, method: str, rate: float, model: str = "student") -> Record:
    return Record("training", f"train {method}", model, method, config, rate, 50.0, 20.0)


def speeds(config: Config, *records: Record) -> Speeds:
    return Speeds(config, Records(records, ()), RATES, SIDE, (SIDE,))


def test_the_nearest_run_counts(config: Config) -> None:
    pool = pools_of(config.resources.teacher, config.resources.student, ("cpu", "cpu"), 2).student
    device = RATES.device("cpu")
    assert speeds(config).training("student", "cdm", pool) == (device.flops * device.training_mfu, "table")
    both = speeds(config, a_record(config, "cdm", 100.0), a_record(config, "sft", 400.0))
    a_token = ModelSize.of(model_config(config.student.model)).training(SIDE.a_token())
    assert both.training("student", "cdm", pool) == (pytest.approx(100 * a_token), "measured")
    assert both.training("student", "uld", pool) == (pytest.approx(200 * a_token), "other training runs")
    assert both.fixed("training", "train cdm", 99.0) == 20.0 and both.fixed("scoring", "score teacher", 99.0) == 99.0


def test_the_error_is_that_of_predicting_one_run_from_the_others(config: Config) -> None:
    assert speeds(config, a_record(config, "cdm", 100.0)).errors == (), "one run says nothing of another"
    same = speeds(config, a_record(config, "cdm", 100.0), a_record(config, "cdm", 125.0))
    assert same.errors == pytest.approx((100 / 125 - 1, 125 / 100 - 1))
    slower = replace(a_record(config, "sft", 50.0), kind="training")
    assert speeds(config, a_record(config, "cdm", 100.0), slower).errors == pytest.approx((1.0, -0.5))
