"""No engine: the rate of the machine's fastest matrix product of a shape, in FLOP a second."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NAMES = {"float32": "float32", "bfloat16": "bf16"}
SUSTAINED_SECONDS = 4.0


def number_types(dtype: str, device: str) -> list[str]:
    """Whose products limit an engine that is asked for one number type.

    On a CPU without instructions for bfloat16 its products take many times as long as those of
    float32, which an engine may as well compute with; bfloat16 is no limit for who is to compute in
    float32.
    """
    return [*NAMES] if dtype == "bfloat16" and device == "cpu" else [dtype]


def main(fields: dict[str, Any], result: Path) -> None:
    import torch

    from worker.speed import matrix_rate, sustained_rate

    torch.set_num_threads(fields["threads"])
    matrices = [(inputs, outputs) for inputs, outputs in fields["matrices"]]
    device = torch.device(fields["device"])
    rates = {
        NAMES[name]: matrix_rate(matrices, getattr(torch, name), device, seconds=0.1)
        for name in number_types(fields["dtype"], device.type)
    }
    made: dict[str, Any] = {}
    if device.type == "cuda":
        sys.path.append(str(Path(__file__).resolve().parents[1]))
        from card import limits

        made = dict(limits())
        rates["bf16"] = max(rates.get("bf16", 0.0), made["matrix_flops"])
    best = max(rates, key=rates.__getitem__)
    made |= {"matrix_flops": rates[best], "matrix_dtype": best, "flops_by_dtype": rates}
    if device.type == "cpu":
        fastest = next(name for name, short in NAMES.items() if short == best)
        dtype = getattr(torch, fastest)
        made["sustained_flops"] = sustained_rate(matrices, dtype, device, SUSTAINED_SECONDS)
    result.write_text(json.dumps(made))


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    main(task, Path(task["result"]))
