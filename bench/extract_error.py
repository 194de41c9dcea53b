"""Judge an adapter by its file: the relative squared error of ``scaling · B @ A`` over all linear weights of the layers.

The official safetensors reads, torch multiplies in float64 blocks; nothing of surgery takes part.

python -m bench.extract_error FOLDER-WITH-base-AND-ft ADAPTER
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open


def main() -> None:
    """Print ``{"share": ‖Δ − BA‖² / ‖Δ‖²}``."""
    folder, adapter = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((adapter / "adapter_config.json").read_text())
    left = total = 0.0
    with ExitStack() as stack:
        base, tuned = (_tensors(stack, folder / side) for side in ("base", "ft"))
        factors = _tensors(stack, adapter)
        for name in sorted(base):
            if not re.search(r"layers\.\d+\..*_proj\.weight$", name):
                continue
            delta = tuned[name].get_tensor(name).float() - base[name].get_tensor(name).float()
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (_factor(factors, f"{stem}.lora_{side}.weight") for side in "AB")
            ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
            module = name.removesuffix(".weight")
            scaling = _pattern(alphas, module, config["lora_alpha"]) / _pattern(ranks, module, config["r"])
            for row in range(0, len(delta), 256):
                block = delta[row : row + 256].double()
                total += float(block.square().sum())
                left += float((block - scaling * (b[row : row + 256] @ a)).square().sum())
    print(json.dumps({"share": left / total}))


def _tensors(stack: ExitStack, folder: Path) -> dict[str, safe_open]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = stack.enter_context(safe_open(path, "pt"))
        found |= dict.fromkeys(file.keys(), file)
    return found


def _factor(tensors: dict[str, safe_open], key: str) -> torch.Tensor:
    return tensors[key].get_tensor(key).double()


def _pattern(patterns: dict[str, float], module: str, default: float) -> float:
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)


if __name__ == "__main__":
    main()
