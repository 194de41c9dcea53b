"""``make bench``: merging and taking stock of a generated 0.5 B-parameter bfloat16 model, beside ``cp`` and PEFT.

python -m bench.merge [--size 0.5B|1.5B] [--turns 3]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.timing import Run, fresh, in_turns, table, timed
from fixtures import generate

PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("0.05B", "0.5B", "1.5B"), default="0.5B")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out")
    options = parser.parse_args()
    shape = generate.SIZES[options.size]
    needed = 8 * 2 * shape.parameters
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < needed:
            sys.exit(f"{needed / 1e9:.0f} GB of free disk are needed in {folder.parent}; set TMPDIR")
        # In processes of their own: a child's peak memory is not below what its parent once held.
        for extra in (["base"], ["ft", "--tune"], ["adapter", "--adapter", "8"]):
            made = [
                sys.executable,
                "-m",
                "fixtures.generate",
                str(folder / extra[0]),
                "--size",
                options.size,
                *extra[1:],
            ]
            subprocess.run(made, check=True, cwd=Path(__file__).parent.parent)
        (folder / "merge_with_peft.py").write_text(PEFT)
        print(
            f"{options.size}: {shape.parameters / 1e9:.2f} B parameters in bfloat16, {2 * shape.parameters / 1e9:.2f} GB\n"
        )

        def surgery(*arguments: str) -> Run:
            return timed([sys.executable, "-m", "surgery", *arguments, "-q"], folder)

        def after(out: str, *command: str) -> Run:
            fresh(folder / out)
            return timed(command, folder)

        def merge() -> Run:
            fresh(folder / "merged")
            return surgery("merge", "base", "adapter", "-o", "merged")

        def extract() -> Run:
            fresh(folder / "lora")
            return surgery("extract-lora", "base", "ft", "--rank", "8", "-o", "lora")

        merging = {
            "cp": lambda: after("copy", "cp", "-r", "base", "copy"),
            "import torch": lambda: timed([sys.executable, "-c", "import torch"], folder),
            "surgery merge (LoRA rank 8 on q, v, down)": merge,
        }
        if not options.no_peft:
            merging["PEFT load, merge_and_unload, save"] = lambda: after(
                "peft-out", sys.executable, "merge_with_peft.py", "base", "adapter", "peft-out"
            )
        print(table("Merging an adapter", in_turns(merging, options.turns), "cp"), "\n")
        reading = {
            "cp": lambda: after("copy", "cp", "-r", "base", "copy"),
            "surgery diff --no-spectrum": lambda: surgery("diff", "base", "ft", "--no-spectrum"),
            "surgery diff": lambda: surgery("diff", "base", "ft"),
            "surgery extract-lora --rank 8": extract,
        }
        print(table("Comparing and extracting", in_turns(reading, max(options.turns - 1, 1)), "cp"))


if __name__ == "__main__":
    main()
