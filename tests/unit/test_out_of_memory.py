"""A full GPU ends the run with one sentence; the log compares predicted and measured memory."""

import pytest
import torch

from packhorse.trainer.build_engine import explain_out_of_memory
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.metrics import memory_line


def test_a_full_gpu_is_bad_input_that_says_what_to_do() -> None:
    sentence = (
        r"the model does not fit .*micro_batch_size.*activation_checkpointing.*`packhorse plan`"
    )
    with pytest.raises(BadInput, match=sentence), explain_out_of_memory("the model"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_predicted_stands_beside_measured() -> None:
    line = memory_line(40 * 2**30, 44 * 2**30, 50 * 2**30)
    assert (
        line
        == "memory of a GPU at its peak: predicted 40.0 GiB, measured 44.0 GiB (+10%), reserved "
        "50.0 GiB"
    )
