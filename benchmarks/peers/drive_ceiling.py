"""No engine: the rate of the machine's fastest matrix product of a shape, in FLOP a second."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(fields: dict[str, object], result: Path) -> None:
    import torch

    from worker.bench import matrix_rate

    torch.set_num_threads(int(str(fields["threads"])))
    matrices = [(int(inputs), int(outputs)) for inputs, outputs in fields["matrices"]]  # type: ignore[attr-defined]
    dtype = getattr(torch, str(fields["dtype"]))
    rate = matrix_rate(matrices, dtype, torch.device(str(fields["device"])), seconds=0.1)
    made = {"matrix_flops": rate}
    if str(fields["device"]).startswith("cuda"):
        sys.path.append(str(Path(__file__).resolve().parents[1]))
        from card import limits

        found = limits()
        made = {**found, "matrix_flops": max(rate, found["matrix_flops"])}
    result.write_text(json.dumps(made))


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    main(task, Path(task["result"]))
