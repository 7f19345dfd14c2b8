"""What a config takes: operations and memory by hand, real parameter counts, and what more of anything may not do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, Phi3Config, Qwen2Config

from cdm.calibration import Records
from cdm.config import Config, parse_config
from cdm.corpus_size import CorpusSize, Side, side
from cdm.model_size import ModelSize, Work
from cdm.planning import Plan, Sizes, fit_problems, make_plan, student_fit, teacher_devices
from cdm.preflight import GIB
from cdm.rates import Pools, cluster_pools, load_rates, pools_of
from tests import whole

ROOT = Path(__file__).resolve().parent.parent
RATES = load_rates()
QWEN2_05B = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
QWEN2_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
LLAMA3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
PHI3_MINI = Phi3Config(
    vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, tie_word_embeddings=False, pad_token_id=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (QWEN2_05B, 494_032_768),
        (QWEN2_7B, 7_615_616_512),
        (LLAMA3_8B, 8_030_261_248),
        (PHI3_MINI, 3_821_079_552),
    ],
    ids=["Qwen2-0.5B", "Qwen2-7B", "Llama-3-8B", "Phi-3-mini"],
)
def test_weights_are_those_that_the_makers_say(config: Any, weights: int) -> None:
    size = ModelSize.of(config)
    assert size.weights == weights
    assert size.head == config.vocab_size * config.hidden_size
    assert size.weights - size.body == size.head * (1 if config.tie_word_embeddings else 2)


def test_operations_by_hand() -> None:
    size = ModelSize(weights=1_000, body=700, head=300, layers=2, width=10)
    work = Work(tokens=5, pairs=25, rows=3)  # a document of 5 tokens, 3 of the response
    forward = 2 * 700 * 5 + 2 * 300 * 3 + 4 * 2 * 10 * 25
    assert size.scoring(work) == forward
    assert size.training(work) == 3 * forward  # 6 a weight and token, 12 x layers x width a pair
    assert (
        size.training(work, recomputed=True) == 3 * forward + 2 * 700 * 5 + 4 * 2 * 10 * 25
    )  # 8 a weight of the blocks
    assert size.training(work, frozen=True) == 4 * 700 * 5 + 4 * 300 * 3 + 12 * 2 * 10 * 25


# --- plans -------------------------------------------------------------------------------------------------------


def config(**changes: Any) -> Config:
    values = yaml.safe_load((ROOT / "configs" / "phi3-qwen2.yaml").read_text(encoding="utf-8"))
    return parse_config(values | changes)


def sizes(documents: float = 50_000) -> Sizes:
    one = Side(prompt=300.0, response=700.0, squares=1.4e6, source="by hand")
    shares = {"train": 0.97, "validation": 0.01, "test": 0.02}
    models = (ModelSize.of(QWEN2_05B), (ModelSize.of(PHI3_MINI),))
    return Sizes(documents, shares, *models, one, (one,), (200.0,))


def on(device: str, asked: Config, actors: int = 8, workers: int = 8) -> Pools:
    resources = asked.resources
    teacher = resources.teacher.model_copy(update={"actors": actors})
    student = resources.student.model_copy(update={"workers": workers})
    return pools_of(teacher, student, (device, device), 16)


def planned(of: Sizes, pools: Pools, asked: Config | None = None) -> Plan:
    return make_plan(asked or config(), of, pools, RATES, Records((), ()))


def test_seconds_by_hand() -> None:
    """50,000 documents of Phi-3 on 8 H100 at 45 % of 989 Tflop/s, and 1,000 steps of 131,072 tokens at 35 %."""
    asked, of = config(), sizes()
    plan = planned(of, on("H100", asked))
    stages = {stage.title: stage for stage in plan.stages}
    teacher = of.teachers[0]
    flops = 50_000 * (2 * teacher.body * 1000 + 2 * teacher.head * 700 + 4 * 32 * 3072 * 1.4e6)
    score = stages["score microsoft/Phi-3-mini-4k-instruct"]
    assert score.flops == pytest.approx(flops)
    assert score.work == pytest.approx(flops / (8 * 0.45 * 9.89e14))
    student = of.student
    step = 131_072 * (6 * student.body + 6 * student.head * 0.7 + 12 * 24 * 896 * 1.4e3)
    validation = 64 * (2 * student.body * 1000 + 2 * student.head * 700 + 4 * 24 * 896 * 1.4e6)
    train = stages["train cdm"]
    assert train.flops == pytest.approx(1000 * step + 11 * validation)  # every 100 steps, and the export's
    assert train.work == pytest.approx(train.flops / (8 * 0.35 * 9.89e14))
    assert [stage.title for stage in plan.stages if stage.pool is plan.pools.student] == [
        "train sft", "train cdm", "evaluate",
    ]  # fmt: skip


def test_more_nodes_are_never_slower() -> None:
    asked = config()
    for actors_or_workers in (lambda n: (n, 8), lambda n: (8, n)):
        times = [planned(sizes(), on("A100-40", asked, *actors_or_workers(n))).seconds for n in (1, 2, 3, 8, 64, 500)]
        assert times == sorted(times, reverse=True)


def test_more_tokens_are_never_cheaper_nor_faster() -> None:
    pools = on("L40S", config())
    orders = [10**exponent for exponent in range(6, 13)] + [3e7, 1.001e9]
    plans = [planned(sizes().scaled(tokens), pools) for tokens in sorted(orders)]
    for figures in (
        [plan.seconds for plan in plans],
        [plan.dollars("on_demand") for plan in plans],
        [plan.dollars("spot") for plan in plans],
        [plan.hours(pools.teacher) for plan in plans],
        [plan.hours(pools.student) for plan in plans],
    ):
        assert figures == sorted(figures) and all(math.isfinite(figure) and figure > 0 for figure in figures)
    assert plans[-1].hours(pools.teacher) == pytest.approx(1000 * plans[4].hours(pools.teacher), rel=0.02)


def test_scaling_keeps_the_passes_over_the_corpus() -> None:
    of = sizes().scaled(1e9)
    assert of.documents * of.sides_t[0].tokens == pytest.approx(1e9)
    assert of.passes == pytest.approx(1e9 / 50e6)


def test_spot_nodes_are_cheaper_and_prices_are_those_of_the_table() -> None:
    pools = on("H100", config())
    plan = planned(sizes(), pools)
    hours = plan.hours(pools.teacher) + plan.hours(pools.student)
    assert plan.dollars("on_demand") == pytest.approx(7.0 * hours)
    assert plan.dollars("spot") == pytest.approx(3.0 * hours)


def test_generation_comes_before_scoring_and_takes_longer_than_reading() -> None:
    asked = config(generation={"replace": "all", "samples": 4})
    stages = {stage.title.split()[0]: stage for stage in planned(sizes(), on("H100", asked), asked).stages}
    once = {stage.title.split()[0]: stage for stage in planned(sizes(), on("H100", config())).stages}
    assert list(stages).index("generate") < list(stages).index("score")
    assert stages["score"].flops == pytest.approx(once["score"].flops * (0.97 * 4 + 0.03))


# --- memory ------------------------------------------------------------------------------------------------------


def test_memory_and_the_smallest_pool() -> None:
    """16 bytes a weight, shared by the workers: 8 B need 119.7 GiB, so two workers of 79 GiB do with the rest."""
    asked = config(
        student={"model": "a/student", "steps": 10, "micro_batch_tokens": 2048, "activation_checkpointing": True}
    )
    alone = student_fit(LLAMA3_8B, asked.student, on("H100", asked, workers=1).student, RATES)
    assert alone.memory.state == 16 * 8_030_261_248
    assert alone.need == alone.memory.least + alone.memory.activations and not alone.fits
    assert alone.smallest > 1
    for workers, fits in ((alone.smallest - 1, False), (alone.smallest, True)):
        assert student_fit(LLAMA3_8B, asked.student, on("H100", asked, workers=workers).student, RATES).fits is fits
    tiny = student_fit(LLAMA3_8B, asked.student, on("L4", asked, workers=64).student, RATES)
    (problem, *_) = fit_problems(asked, sizes(), on("H100", asked, workers=1), RATES, alone)
    assert f"the smallest pool that does is {alone.smallest} workers" in problem
    assert tiny.smallest == 0 or tiny.smallest > alone.smallest


def test_what_no_pool_holds_says_what_to_lower() -> None:
    asked = config(student={"model": "a/student", "steps": 10, "micro_batch_tokens": 65536, "max_length": 4096})
    pools = on("L4", asked)
    fit = student_fit(LLAMA3_8B, asked.student, pools.student, RATES)
    assert fit.smallest == 0
    assert "no number of workers does" in fit_problems(asked, sizes(), pools, RATES, fit)[0]


def test_a_teacher_that_one_device_cannot_hold() -> None:
    asked = config()
    size = ModelSize(weights=70_000_000_000, body=1, head=1, layers=1, width=1)
    assert teacher_devices(size, asked.teachers[0], 79.0) == 2  # 140 GB, 90 % of 79 GiB each
    pools, of = on("H100", asked), replace(sizes(), teachers=(size,))
    fit = student_fit(QWEN2_05B, asked.student, pools.student, RATES)
    assert any("need 2 H100 an engine" in line for line in fit_problems(asked, of, pools, RATES, fit))


# --- rates and clusters ------------------------------------------------------------------------------------------


def test_unknown_devices_and_instances_have_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"devices: H1000 is not in the table.*did you mean H100\?"):
        RATES.device("H1000")
    with pytest.raises(ValueError, match=r"instances: p4d\.24xlarg is not .*p4d\.24xlarge"):
        RATES.instance("p4d.24xlarg")


def test_a_users_file_replaces_entries_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("devices: {H100: {spot: 1.5}}\ninstances: {mine: {device: L4, count: 2}}\n")
    rates = load_rates(str(file))
    assert rates.device("H100") == RATES.device("H100").model_copy(update={"spot": 1.5})
    assert rates.instance("mine").count == 2 and rates.instances.keys() == RATES.instances.keys() | {"mine"}
    file.write_text("devices: {H100: {prise: 1.5}}\n")
    with pytest.raises(ValueError, match=r"prices\.yaml: devices\.H100\.prise"):
        load_rates(str(file))
    file.write_text("devices: {new: {flops: 1e15}}\n")
    with pytest.raises(ValueError, match=r"devices\.new\.memory_gib"):
        load_rates(str(file))


def test_every_instance_is_of_a_known_device() -> None:
    for name in RATES.instances:
        assert RATES.device(RATES.instance(name).device).flops > 0


def test_the_pools_of_the_shipped_cluster_file() -> None:
    asked = config()
    pools = cluster_pools(str(ROOT / "cluster.yaml"), asked.resources.teacher, asked.resources.student, RATES)
    assert (pools.teacher.device, pools.teacher.nodes, pools.teacher.node_devices) == ("L40S", 2, 4)
    assert (pools.student.device, pools.student.nodes, pools.student.node_devices) == ("A100-40", 1, 8)
    assert pools.teacher.idle_seconds == 600 and pools.head == ("cpu", 16)
    without_idle = replace(pools, teacher=replace(pools.teacher, idle_seconds=0.0))
    paid, unpaid = planned(sizes(), pools), planned(sizes(), without_idle)
    assert paid.dollars("spot") - unpaid.dollars("spot") == pytest.approx(600 / 3600 * 8 * 1.10)


def test_a_pool_that_the_cluster_file_does_not_allow() -> None:
    asked = config(resources={"teacher": {"actors": 8, "gpus": 1}, "student": {"workers": 800, "gpus": 1}})
    pools = cluster_pools(str(ROOT / "cluster.yaml"), asked.resources.teacher, asked.resources.student, RATES)
    fit = student_fit(QWEN2_05B, asked.student, pools.student, RATES)
    assert any(
        "student needs 100 nodes, the cluster file allows" in x for x in fit_problems(asked, sizes(), pools, RATES, fit)
    )


def test_gpus_of_a_cluster_that_nobody_books() -> None:
    asked = config(resources={"teacher": {"gpus": 1}}).resources
    with pytest.raises(ValueError, match=r"resources\.student\.gpus is 0, so nothing of A100-40"):
        cluster_pools(str(ROOT / "cluster.yaml"), asked.teacher, asked.student, RATES)


def test_a_worker_uses_one_gpu_or_a_part_of_one() -> None:
    asked = config()
    for gpus, gib in ((0.5, 39.5), (1.0, 79.0), (2.0, 79.0)):
        pool = replace(on("H100", asked).student, devices=gpus)
        assert student_fit(QWEN2_05B, asked.student, pool, RATES).device == int(gib * GIB)


def test_a_cluster_of_machines_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "local.yaml"
    file.write_text("cluster_name: here\nprovider: {type: local, head_ip: 127.0.0.1}\n")
    asked = config().resources
    with pytest.raises(ValueError, match="plan without --cluster"):
        cluster_pools(str(file), asked.teacher, asked.student, RATES)


# --- tokens ------------------------------------------------------------------------------------------------------


def test_tokens_are_assumed_where_nothing_can_be_read(tmp_path: Path) -> None:
    model = parse_config({**whole.CONFIG, "storage": str(tmp_path)}).student.model
    found = side(model, 512, CorpusSize(10, {}, (), "nothing"), str(tmp_path), RATES)
    assert (found.prompt, found.response) == pytest.approx(
        (500 / 3, 512 - 500 / 3)
    )  # 1,500 bytes are cut to 512 tokens
    assert found.source == "assumed: 3 bytes a token" and found.squares == pytest.approx(512**2)
