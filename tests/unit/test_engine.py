"""DeepSpeed's configuration has one owner for each setting."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from packhorse.trainer.config.recipe import ModelSection, OptimSection, ParallelSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.clipping import StepNumbers, gradient_norm, norm_on_host
from packhorse.trainer.engine.ds_config import (
    BUCKET,
    clear_nvme,
    deepspeed_config,
    for_deepspeed,
    offload_device,
    require_whole_groups,
    streams_optimizer,
)
from tests.ranks import ROOT

RUN = Path("runs/some")


def made(
    template: str | Path, dtype: str = "bfloat16", run_dir: Path = RUN, **parallel: Any
) -> dict[str, Any]:
    sections = (
        ParallelSection.model_validate({"deepspeed": str(template), **parallel}),
        ModelSection.model_validate({"name": "x", "dtype": dtype}),
        OptimSection(max_grad_norm=0.5),
    )
    return deepspeed_config(*sections, 64, run_dir)


def template(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "template.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem
)
def test_every_template_is_filled(path: Path) -> None:
    config = made(path, "float32" if path.stem == "zero0" else "bfloat16")
    assert "auto" not in json.dumps(config)
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"


def test_sizes_follow_the_hidden_size() -> None:
    zero = made("zero3")["zero_optimization"]
    assert zero["reduce_bucket_size"] == BUCKET  # which is more than 64 x 64
    assert zero["stage3_param_persistence_threshold"] == 640


def test_gradients_are_summed_in_fp32_unless_the_recipe_says_otherwise() -> None:
    assert made("zero2", grad_dtype="bfloat16")["communication_data_type"] == "bf16"
    assert made("zero2", "float32", grad_dtype="bfloat16")["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    "owned",
    [
        {"gradient_clipping": 1.0},
        {"train_batch_size": 8},
        {"gradient_accumulation_steps": 4},
        {"optimizer": {"type": "AdamW"}},
        {"bf16": {"enabled": True}},
        {"communication_data_type": "bf16"},
        {"elasticity": {"enabled": True}},
        {"torch_autocast": {"enabled": True}},
    ],
    ids=lambda owned: next(iter(owned)),
)
def test_what_the_recipe_owns_is_refused_in_a_template(
    tmp_path: Path, owned: dict[str, Any]
) -> None:
    with pytest.raises(BadInput, match=next(iter(owned))):
        made(template(tmp_path, {"zero_optimization": {"stage": 2}, **owned}))


@pytest.mark.parametrize(
    "key",
    [
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "zenflow",
    ],
)
def test_what_changes_learning_is_refused_in_a_template(tmp_path: Path, key: str) -> None:
    with pytest.raises(BadInput, match=rf"zero_optimization\.{key}: it rounds or delays"):
        made(template(tmp_path, {"zero_optimization": {"stage": 3, key: {"topk_ratio": 0.1}}}))
    made(template(tmp_path, {"zero_optimization": {"stage": 3, key: False}}))


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "not valid JSON"), ([], "JSON object"), ({"zero_optimization": 2}, "JSON object")],
)
def test_a_template_that_is_not_json_is_refused(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        made(template(tmp_path, content))


def test_a_missing_template_is_refused() -> None:
    with pytest.raises(
        BadInput, match=r"no file nowhere\.json; give a path, or one of zero0, zero1"
    ):
        made("nowhere.json")


def test_stage_0_in_bfloat16_is_refused() -> None:
    with pytest.raises(BadInput, match="zero1"):
        made("zero0")


def test_an_optimizer_that_is_offloaded_in_part_is_refused(tmp_path: Path) -> None:
    offload = {"device": "cpu", "ratio": 0.5}
    zero = {"stage": 3, "offload_optimizer": offload}
    with pytest.raises(BadInput, match="ratio"):
        made(template(tmp_path, {"zero_optimization": zero}))
    offload["ratio"] = 1.0
    assert made(template(tmp_path, {"zero_optimization": zero}))


def test_an_offload_of_null_is_none(tmp_path: Path) -> None:
    nothing = {"offload_optimizer": None, "offload_param": None}
    config = made(template(tmp_path, {"zero_optimization": {"stage": 3, **nothing}}))
    assert offload_device(config, "optimizer") == offload_device(config, "param") == "none"


def test_two_runs_share_no_folder_on_the_nvme(tmp_path: Path) -> None:
    text = (
        (ROOT / "ds_configs" / "zero3_nvme.json")
        .read_text()
        .replace("/local_nvme", str(tmp_path / "nvme"))
    )
    path = template(tmp_path, text)
    folders = [
        made(path, run_dir=tmp_path / name)["zero_optimization"]["offload_param"]["nvme_path"]
        for name in "ab"
    ]
    assert len(set(folders)) == 2
    clear_nvme(made(path, run_dir=tmp_path / "a"))
    left = Path(folders[0]) / "of a killed run"
    left.write_text("")
    clear_nvme(made(path, run_dir=tmp_path / "a"))
    assert not left.exists()


def test_an_nvme_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = (
        (ROOT / "ds_configs" / "zero3_nvme.json")
        .read_text()
        .replace("/local_nvme", str(tmp_path / "file"))
    )
    with pytest.raises(BadInput, match="nvme_path"):
        clear_nvme(made(template(tmp_path, text)))


@pytest.mark.parametrize(
    ("numel", "within"), [(0, 1e-12), (255, 1e-12), (256, 3e-7), (3000 * 256 + 1, 1e-8)]
)
def test_the_norm_by_blocks_is_the_norm_in_fp64(numel: int, within: float, monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    gradients = [torch.randn(numel), torch.randn(7) * 1e-3]
    exact = torch.cat(gradients).double().norm()
    assert float(gradient_norm(gradients)) == pytest.approx(float(exact), rel=within)
    assert float(gradient_norm([*gradients, torch.tensor([float("nan")])])) == -1.0


def test_only_adamw_is_offloaded(tmp_path: Path) -> None:
    sections = (ParallelSection(deepspeed="zero3_offload_optimizer"), ModelSection(name="m"))
    with pytest.raises(BadInput, match=r"only AdamW has a kernel for the CPU; set optim\.kind"):
        deepspeed_config(*sections, OptimSection(kind="lion"), 64, tmp_path)
    with pytest.raises(BadInput, match=r"kernel for the CPU; set optim\.state_dtype=fp32"):
        deepspeed_config(*sections, OptimSection(state_dtype="bf16"), 64, tmp_path)
    with pytest.raises(BadInput, match="the average of the weights is not offloaded"):
        deepspeed_config(*sections, OptimSection(ema_decay=0.9), 64, tmp_path)


@pytest.mark.parametrize(
    ("zero", "kind", "section", "why"),
    [
        ({"stage": 0}, "adamw", "streamed", "the weights are the master weights"),
        (
            {"stage": 3},
            "muon",
            "streamed",
            r"only AdamW updates by chunks, .* set optim\.kind",
        ),
        (
            *({"stage": 3, "offload_param": {"device": "cpu"}}, "adamw", "streamed"),
            "it needs weights on the GPU; remove offload",
        ),
        ({"stage": 3}, "ema", "streamed", r"the average of the weights is not streamed"),
        ({"stage": 3}, "adamw", "stremed", r'may hold \{"optimizer_state": "streamed"\} alone'),
    ],
)
def test_a_state_that_cannot_be_streamed_is_refused(
    tmp_path: Path, zero: dict[str, Any], kind: Any, section: str, why: str
) -> None:
    own = {"zero_optimization": zero, "packhorse": {"optimizer_state": section}}
    sections = (
        ParallelSection(deepspeed=str(template(tmp_path, own))),
        ModelSection(name="m", dtype="float32"),
    )
    optim = OptimSection(ema_decay=0.9) if kind == "ema" else OptimSection(kind=kind)
    with pytest.raises(BadInput, match=why):
        deepspeed_config(*sections, optim, 64, tmp_path)
    assert deepspeed_config(*sections, optim, 64, tmp_path, learns=False), "an evaluation has none"


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_deepspeed_does_not_see_our_section(stage: str) -> None:
    config = made(f"{stage}_streamed")
    assert streams_optimizer(config)
    assert for_deepspeed(config) == made(stage)


def test_groups_that_share_weights_are_whole_and_lie_on_one_node() -> None:
    config = made("zero3_hpz")
    for world, per_node in ((1, 1), (4, 4), (8, 8), (32, 8), (64, 16)):
        require_whole_groups(config, world, per_node)
    for world, per_node in ((12, 12), (12, 8), (16, 4), (12, 6)):
        with pytest.raises(BadInput, match=r"groups of 8 ranks do not divide"):
            require_whole_groups(config, world, per_node)


def test_a_prefetch_of_a_layer_follows_the_hidden_size() -> None:
    zero = made("zero3_prefetch")["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] == 13 * 64**2


def test_stage_1_in_bf16_gets_a_norm_in_fp64_too() -> None:
    from deepspeed.runtime import bf16_optimizer

    optimizer = object.__new__(bf16_optimizer.BF16_Optimizer)

    def norm_of(gradients: list[torch.Tensor]) -> torch.Tensor:
        with norm_on_host(optimizer, StepNumbers(torch.zeros(()), None)):
            return bf16_optimizer.get_global_norm_of_tensors(
                input_tensors=gradients, mpu=None, norm_type=2
            )

    # in fp32, each of the small ones would be lost beside the first
    gradients = [torch.tensor([1e4]), *torch.full((4000, 1), 1.0)]
    assert float(norm_of(gradients)) == pytest.approx((1e8 + 4000) ** 0.5, rel=1e-12)
    lost = norm_of([*gradients, torch.tensor([float("inf")])])
    assert bf16_optimizer.is_invalid_grad_norm(lost)


def test_a_deepspeed_that_takes_another_norm_is_refused() -> None:
    optimizer = SimpleNamespace(scaled_global_norm=lambda: torch.tensor(1.0))
    with (
        pytest.raises(RuntimeError, match="did not call `scaled_global_norm`"),
        norm_on_host(optimizer, StepNumbers(torch.zeros(()), None)),
    ):
        pass


def test_a_step_whose_loss_is_refused_has_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    refused = StepNumbers(torch.tensor(3.0), lambda loss: f"{loss:g} is too much")
    (norm,) = refused.read([torch.tensor(0.1)])
    assert refused.refused == "6 is too much", "the loss is that of all ranks"
    assert norm.isnan()
    taken = StepNumbers(torch.tensor(3.0), lambda loss: None)
    norms = [torch.tensor(0.1), torch.tensor(0.2)]
    assert taken.read(norms) == norms, "in their own type, bit by bit"


def test_deepspeed_clips_nothing_at_stage_0() -> None:
    """There packhorse clips; DeepSpeed's default limit is 1, whatever the recipe says."""
    assert made("zero0", "float32")["gradient_clipping"] == 0
    assert made("zero1")["gradient_clipping"] == 0.5
