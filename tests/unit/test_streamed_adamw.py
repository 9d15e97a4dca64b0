"""AdamW by chunks, its state on the host, is torch's AdamW bit by bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine import streamed_adamw
from packhorse.trainer.engine.optimizers import moments_of
from packhorse.trainer.engine.streamed_adamw import StreamedAdamW, move_to_host, page_locked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_adamw, "CHUNK", 64)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator)
    plain, master = (values.clone().requires_grad_() for _ in range(2))
    given = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
    twin, streamed = torch.optim.AdamW([plain], **given), StreamedAdamW([master], **given)
    weights = values.to(dtype, copy=True)
    stand_in = move_to_host(master, weights)
    streamed.attach({id(master): stand_in})
    moments_of(streamed, stand_in.host, "adamw")
    assert master.untyped_storage().nbytes() == 0, "the device still holds the master weights"
    for _ in range(5):
        plain.grad = torch.randn(1000, generator=generator)
        stand_in.grad = plain.grad.clone()
        twin.step()
        streamed.step()
        # as DeepSpeed does after a step
        weights.data.copy_(stand_in.data)
    assert torch.equal(stand_in.host, plain)
    assert torch.equal(weights, plain.to(dtype))
    assert torch.equal(streamed.state[stand_in.host]["exp_avg_sq"], twin.state[plain]["exp_avg_sq"])


def test_weights_that_are_the_master_stay() -> None:
    both = torch.ones(8)
    stand_in = move_to_host(both, both)
    assert both.untyped_storage().nbytes() == stand_in.host.nbytes == 32


def test_all_ranks_refuse_memory_that_one_cannot_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    unlocked: list[int] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: 0, cudaHostUnregister=unlocked.append
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(dist, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(dist, "gather", lambda own: [own, 2])
    state = torch.ones(8)
    with pytest.raises(BadInput, match="CUDA error 2"):
        page_locked(state)
    address = state.data_ptr()
    del state
    assert unlocked == [address], "what this rank had locked"
