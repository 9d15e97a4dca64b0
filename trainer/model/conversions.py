"""Let transformers convert a folder's weights into shards as it does into a whole model.

In: a `from_pretrained`. Out: under ZeRO-3, the same names and layouts as without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from packhorse.trainer.utils.lean_import import replaced


@contextmanager
def alike_in_shards() -> Iterator[None]:
    """Convert weights in the block as a load without ZeRO-3 does.

    transformers 5 renames and converts weights while it loads. Under ZeRO-3 it does so by code of
    its own, which differs in two ways from its other one, and is mended here:

    - A name that no renaming was meant for, as it is the model's own already, is renamed all the
      same (DeepSeek V4's `model.norm.weight`).
    - A conversion that asks for a parameter's shape gets the empty one of a shard (the experts of
      Qwen 3 VL, which are transposed in some folders and not in others).
    """
    from transformers import PreTrainedModel, core_model_loading
    from transformers.core_model_loading import WeightConverter

    rename, convert = core_model_loading.rename_source_key, WeightConverter.convert

    def rename_others(
        key: str,
        renamings: list[Any],
        converters: list[Any],
        base_model_prefix: str | None = None,
        meta_state_dict: dict[str, Any] | None = None,
        **more: Any,
    ) -> tuple[str, str | None]:
        into = {"base_model_prefix": base_model_prefix, "meta_state_dict": meta_state_dict, **more}
        found = rename(key, renamings, converters, **into)
        own = meta_state_dict or {}
        return rename(key, [], [], **into) if found[0] not in own and key in own else found

    def convert_to_whole(*args: Any, **more: Any) -> Any:
        with replaced(PreTrainedModel, "get_parameter", _whole_shape):
            return convert(*args, **more)

    with (
        replaced(core_model_loading, "rename_source_key", rename_others),
        replaced(WeightConverter, "convert", convert_to_whole),
    ):
        yield


def _whole_shape(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter, or something of its shape where DeepSpeed has it in shards."""
    parameter = nn.Module.get_parameter(model, name)
    whole = getattr(parameter, "ds_shape", None)
    return parameter if whole is None else torch.empty(whole, device="meta")
