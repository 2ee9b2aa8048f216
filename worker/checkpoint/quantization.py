"""Quantised checkpoints: what they need installed beside transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

# By method: the packages on PyPI, with the module to look for where it has another name. As
# transformers' own quantizers ask for them.
_PACKAGES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "aqlm": (("aqlm", "aqlm"), ("accelerate", "accelerate")),
    "auto-round": (("auto-round", "auto_round"),),
    "awq": (("gptqmodel", "gptqmodel"), ("accelerate", "accelerate")),
    "bitnet": (("accelerate", "accelerate"),),
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"), ("accelerate", "accelerate")),
    "compressed-tensors": (("compressed-tensors", "compressed_tensors"),),
    "eetq": (("kernels", "kernels"), ("accelerate", "accelerate")),
    "fbgemm_fp8": (("fbgemm-gpu", "fbgemm_gpu"), ("accelerate", "accelerate")),
    "fp8": (("accelerate", "accelerate"),),
    "fp_quant": (("fp_quant", "fp_quant"),),
    "gptq": (("gptqmodel", "gptqmodel"), ("optimum", "optimum")),
    "hqq": (("hqq", "hqq"), ("accelerate", "accelerate")),
    "mxfp4": (("kernels", "kernels"), ("accelerate", "accelerate")),
    "quanto": (("optimum-quanto", "optimum.quanto"), ("accelerate", "accelerate")),
    "quark": (("amd-quark", "quark"),),
    "spqr": (("spqr_quant[gpu]", "spqr_quant"), ("accelerate", "accelerate")),
    "torchao": (("torchao", "torchao"),),
    "vptq": (("vptq", "vptq"), ("accelerate", "accelerate")),
}


def method_of(config: Mapping[str, Any]) -> str | None:
    """How a checkpoint is quantised, None if it is not."""
    said = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(said, Mapping):
        return None
    method = said.get("quant_method")
    if method is None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method or "compressed-tensors").lower()


def missing_packages(method: str) -> list[str]:
    """What `pip install` is to be given for this method, without what is here already."""
    return [package for package, module in _PACKAGES.get(method, ()) if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
