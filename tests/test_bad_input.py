"""Input that no model should give but some do: each has one defined result or one clear error.

Others live with what they are about: broken fingerprints and files in test_vocab_map, broken weights in test_teacher.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cdm.alignment import align, as_groups
from cdm.vocab_map import VocabMap, build_vocab_map
from tests.test_methods import STUDENT, TEACHER, V_S, V_T, Batch, document, run


@pytest.fixture(scope="module")
def vocab_map() -> VocabMap:
    return build_vocab_map(STUDENT, TEACHER)


@pytest.fixture
def batch() -> Batch:
    return document(1, [(1, 1), (2, 1), (1, 1)])


@pytest.mark.parametrize("method", ["exact", "dtw"])
def test_a_response_of_special_tokens_alone_is_one_group(method: str) -> None:
    groups = align(method=method, ends_s=[0, 0], ends_t=[0], texts_s=["", ""], texts_t=[""])
    assert as_groups(groups) == [((0, 2), (0, 1))]


@pytest.mark.parametrize("tail", ["renormalise", "residual"])
def test_teacher_ids_beyond_its_tokenizer_are_unmapped_mass(batch: Batch, vocab_map: VocabMap, tail: str) -> None:
    """Padded rows of the embedding, where an untrained row may well be among the best."""
    totals = []
    for token_id in (V_T, V_T + 999, -1):
        ids = batch["teacher"].topk_ids_t.clone()
        ids[:, 0] = token_id
        out = run("cdm", batch | {"teacher": replace(batch["teacher"], topk_ids_t=ids)}, vocab_map, tail=tail)
        best = batch["teacher"].topk_logp_t[:, 0].exp()
        assert out.metrics["mass_unmapped"] >= best[batch["teacher"].groups_t[:, 0]].sum() - 1e-9
        totals.append(out.total.item())
    assert totals[0] == totals[1] == totals[2] and torch.tensor(totals).isfinite().all()


@pytest.mark.parametrize("tail", ["renormalise", "residual"])
def test_masked_padded_rows_of_the_student_change_nothing(batch: Batch, vocab_map: VocabMap, tail: str) -> None:
    whole = batch["logits_s"].clone()
    whole[:, V_S - 2 :] = -torch.inf
    masked, narrow = (
        run("cdm", batch | {"logits_s": z}, vocab_map, tail=tail, top_k=V_S) for z in (whole, whole[:, : V_S - 2])
    )
    assert masked.total.isfinite()
    assert masked.total.item() == pytest.approx(narrow.total.item(), rel=1e-12)


def test_a_nan_row_is_seen_in_the_total(batch: Batch, vocab_map: VocabMap) -> None:
    """The training step refuses a total that is not finite; a NaN that vanished would go on training."""
    batch["logits_s"][1] = torch.nan
    assert run("cdm", batch, vocab_map).total.isnan()


def test_more_candidates_than_ids_are_all_of_them(batch: Batch, vocab_map: VocabMap) -> None:
    wide, whole = (run("cdm", batch, vocab_map, top_k=k).total.item() for k in (10**6, V_S))
    assert wide == whole
