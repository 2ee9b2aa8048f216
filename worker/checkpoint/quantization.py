"""Quantised checkpoints: what they need installed beside transformers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
    "mxfp8": (("accelerate", "accelerate"),),
    "quanto": (("optimum-quanto", "optimum.quanto"), ("accelerate", "accelerate")),
    "quark": (("amd-quark", "quark"),),
    "spqr": (("spqr_quant[gpu]", "spqr_quant"), ("accelerate", "accelerate")),
    "torchao": (("torchao", "torchao"),),
    "vptq": (("vptq", "vptq"), ("accelerate", "accelerate")),
}
_FP8 = ("fp8", "mxfp8")


def method_of(config: Mapping[str, Any]) -> str | None:
    """How a checkpoint is quantised, None if it is not."""
    said = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(said, Mapping):
        return None
    method = said.get("quant_method")
    if method is None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method or "compressed-tensors").lower()


def missing_packages(method: str, device: torch.device | None = None) -> list[str]:
    """What `pip install` is to be given for this method, without what is here already."""
    needs = _PACKAGES.get(method, ())
    if method in _FP8 and _computes_fp8(device):
        # Elsewhere transformers makes bfloat16 of it.
        needs = (*needs, ("kernels", "kernels"))
    return [package for package, module in needs if not _installed(module)]


def _computes_fp8(device: torch.device | None) -> bool:
    if device is None or device.type != "cuda":
        return False
    import torch

    return torch.cuda.get_device_capability(device) >= (8, 9)


def is_unpacked(config: Mapping[str, Any], device: torch.device) -> bool:
    """Whether loading turns the weights into plain ones, which take more than they do as stored."""
    method = method_of(config)
    if method == "compressed-tensors":
        return not (_stores_fp8(config) and _computes_fp8(device))
    return method in _FP8 and not _computes_fp8(device)


def _stores_fp8(config: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors says so of some weights."""
    said = config.get("quantization_config") or config.get("compression_config") or {}
    groups = said.get("config_groups") or {}
    weights = [
        group.get("weights") or {} for group in groups.values() if isinstance(group, Mapping)
    ]
    return any(one.get("type") == "float" and one.get("num_bits") == 8 for one in weights)


def loading_options(config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told so that a quantised checkpoint computes as fast as it can."""
    if method_of(config) != "compressed-tensors":
        return {}
    from transformers import CompressedTensorsConfig

    # Else it would unpack them in its first forward pass, and FP8 too.
    unpacked = is_unpacked(config, device)
    made = CompressedTensorsConfig(dequantize=unpacked, use_optimized_inference=not unpacked)
    return {"quantization_config": made}


def unwrap(model: Any) -> None:
    """Takes away what compressed-tensors has put around all modules to unpack some."""
    try:
        dispatch = importlib.import_module("compressed_tensors.offload.dispatch")
    except ImportError:
        return
    dispatch.remove_dispatch(model, onload_tensors=True)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
