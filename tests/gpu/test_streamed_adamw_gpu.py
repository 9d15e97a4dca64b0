"""On a GPU: AdamW whose state lies on the host, against the plain one.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import pytest
import torch

from packhorse.trainer.engine import streamed_adamw
from packhorse.trainer.engine.optimizers import moments_of
from packhorse.trainer.engine.streamed_adamw import StreamedAdamW, move_to_host, page_locked

pytestmark = pytest.mark.gpu


def test_chunks_on_three_streams_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_adamw, "CHUNK", 2**20)
    torch.manual_seed(0)
    values = torch.randn(9 * 2**20 + 5, device="cuda")
    plain, master = (values.clone().requires_grad_() for _ in range(2))
    given = {"lr": 1e-3, "weight_decay": 0.1, "fused": True}
    twin, streamed = torch.optim.AdamW([plain], **given), StreamedAdamW([master], **given)
    weights = values.bfloat16()
    stand_in = move_to_host(master, weights)
    streamed.attach({id(master): stand_in})
    for moment in moments_of(streamed, stand_in.host, "adamw").values():
        page_locked(moment)
    for _ in range(5):
        plain.grad = torch.randn_like(values)
        stand_in.grad = plain.grad.clone()
        twin.step()
        streamed.step()
    streamed.wait()
    assert stand_in.host.is_pinned()
    assert torch.equal(stand_in.host, plain.detach().cpu())
    assert torch.equal(weights, plain.detach().bfloat16())
    moments, own = twin.state[plain], streamed.state[stand_in.host]
    assert all(torch.equal(own[name], moments[name].cpu()) for name in ("exp_avg", "exp_avg_sq"))
