"""On a GPU: answers from the engine are those of `model.generate` alone, one prompt at a time, in
fp32.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.numerics.test_generation import Answers, make_order

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    order = make_order(tmp_path_factory.mktemp("generation"))
    return Answers(order, worlds=(1,), templates=("zero2", "zero3"))


@pytest.mark.parametrize("template", ["zero2", "zero3"])
@pytest.mark.parametrize("way", ["greedy", "sampled", "greedy, by layers", "sampled, by layers"])
def test_an_engines_answers_are_the_models(answers: Any, template: str, way: str) -> None:
    assert answers.seen[1][template][way] == answers.alone[way.removesuffix(", by layers")]
