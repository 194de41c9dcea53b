"""Parameter counts that papers print, recomputed from shapes alone, each with its formula.

``d`` is the width, ``L`` the blocks, ``r`` a rank or the size of a bottleneck, ``l`` a length. Where no natural reading
of a printed figure gives that figure, the row says so: its exact count is then that of the nearest reading.
"""

from __future__ import annotations

from dataclasses import dataclass


def lora(width: int, depth: int, rank: int, *, matrices: int = 2) -> int:
    """Count LoRA on ``matrices`` square weights a block: ``L · m · 2 r d``.

    >>> lora(1024, 24, 8)
    786432
    """
    return depth * matrices * 2 * rank * width


def bottlenecks(width: int, count: int, size: int, *, norms: int = 0, biases: bool = True) -> int:
    """Count ``count`` bottleneck adapters: ``n (2 d r + r + d)``, and ``2 d`` for each of ``norms`` LayerNorms.

    >>> bottlenecks(12288, 2 * 96, 1)
    7078080
    """
    return count * (2 * width * size + (size + width if biases else 0)) + 2 * width * norms


def block(width: int) -> int:
    """Count a GPT-2 block: ``12 d² + 13 d``."""
    return 12 * width * width + 13 * width


def biases(width: int, depth: int, *, scales: bool) -> int:
    """Count the biases of a body whose feed-forward part is ``4 d`` wide, with its last or embedding norm.

    ``L (q 1 + k 1 + v 1 + o 1 + up 4 + down 1 + norms 2) d + d = 11 L d + d``; with the norms' scales ``13 L d + 2 d``.
    """
    return (13 * depth + 2) * width if scales else (11 * depth + 1) * width


def gpt2(width: int, depth: int, *, vocabulary: int = 50257, positions: int = 1024) -> int:
    """Count GPT-2 with its tied head: ``(V + P) d + L (12 d² + 13 d) + 2 d``."""
    return (vocabulary + positions) * width + depth * block(width) + 2 * width


def roberta(width: int, depth: int, *, vocabulary: int = 50265, positions: int = 514, pooler: bool = True) -> int:
    """Count RoBERTa's body: ``(V + P + 1) d + 2 d + L (12 d² + 13 d)``, and ``d² + d`` for the pooler."""
    body = (vocabulary + positions + 1) * width + 2 * width + depth * block(width)
    return body + (width * width + width if pooler else 0)


def head(width: int, labels: int) -> int:
    """Count RoBERTa's classification head: ``d² + d``, and ``labels (d + 1)``.

    >>> head(768, 3)
    592899
    """
    return width * width + width + labels * (width + 1)


@dataclass(frozen=True, slots=True)
class Published:
    """A figure as printed, and what it comes to."""

    table: str
    method: str
    printed: str
    exact: int
    formula: str
    inconsistent: str = ""
    """Why the printed figure is not the exact one rounded; empty where it is."""


_BIG = "350M, L=24, d=1024"
_ROBERTA = "RoBERTa-base, L=12, d=768"
_GPT2 = "GPT-2 M, L=24, d=1024"
PUBLISHED: tuple[Published, ...] = (
    Published(
        _BIG, "prompt tuning, l=20", "15k (0.006 %)", 20 * 1024, "l·d",
        "15k is 20·768 or 15·1024, but its 0.006 % is that of 20,480; no model of this size has d=768",
    ),
    Published(
        _BIG, "adapters, r=64", "6M (2 %)", bottlenecks(1024, 2 * 24, 64), "2L(2dr + r + d): Houlsby's, with biases, no norms"
    ),
    Published(_BIG, "LoRA, r=8", "0.8M (0.22 %)", lora(1024, 24, 8), "q and v: L·2·2rd"),
    Published(
        _BIG, "BitFit", "0.32M (0.09 %)", biases(1024, 24, scales=True), "13Ld + 2d: biases and norm scales",
        f"biases alone are {biases(1024, 24, scales=False):,}: the figure counts the norms' scales too",
    ),
    Published(
        _ROBERTA, "FT", "125.0M", roberta(768, 12), "(V + P + 1)d + 2d + L(12d² + 13d) + d² + d",
        f"125M is nominal: without the pooler there are {roberta(768, 12, pooler=False):,}, with a head of 3 labels in "
        f"its place {roberta(768, 12, pooler=False) + head(768, 3):,}",
    ),
    Published(_ROBERTA, "BitFit", "0.1M", biases(768, 12, scales=False), "11Ld + d: biases, without the head"),
    Published(_ROBERTA, "Adapter^D", "0.9M", bottlenecks(768, 12, 48), "L(2dr + r + d), r=48: Pfeiffer's"),
    Published(
        _ROBERTA, "Adapter^D", "0.3M", bottlenecks(768, 4, 48), "(2dr + r + d) in 4 of 12 blocks, r=48",
        f"ambiguous: r=16 in all 12 blocks, {bottlenecks(768, 12, 16):,}, is 0.3M too",
    ),
    Published(_ROBERTA, "LoRA, r=8", "0.3M", lora(768, 12, 8), "q and v: L·2·2rd"),
    Published(
        _GPT2, "FT", "354.92M", gpt2(1024, 24), "(V + P)d + L(12d² + 13d) + 2d, head tied",
        f"the model has 354.82M; GPT-2 L's 774.03M is exact ({gpt2(1280, 36):,})",
    ),
    Published(_GPT2, "Adapter^L", "0.37M", bottlenecks(1024, 24, 6, norms=24), "L(2dr + r + d) + 2Ld, r=6"),
    Published(_GPT2, "Adapter^L", "11.09M", bottlenecks(1024, 24, 224, norms=24), "L(2dr + r + d) + 2Ld, r=224"),
    Published(
        _GPT2, "Adapter^H", "11.09M", bottlenecks(1024, 2 * 24, 112), "2L(2dr + r + d), r=112",
        "no whole r gives 11.09M; the printed figure is that of Adapter^L",
    ),
    Published(_GPT2, "FT^Top2", "25.19M", 2 * block(1024), "2(12d² + 13d): no last norm, no head"),
    Published(
        _GPT2, "PreLayer", "0.35M", 14 * 24 * 1024, "L·d·l, l=14",
        f"0.35M is 0.1 % of 354.92M, a nominal size: l=14 gives {14 * 24 * 1024:,}, l=15 {15 * 24 * 1024:,}",
    ),
    Published(
        _GPT2, "LoRA, r=4", "0.35M", lora(1024, 24, 4), "q and v: L·2·2rd",
        "0.35M is nominal too: the released file holds 393,216 values",
    ),
    Published("GPT-2 L, L=36, d=1280", "FT", "774.03M", gpt2(1280, 36), "(V + P)d + L(12d² + 13d) + 2d, head tied"),
    Published("GPT-2 L, L=36, d=1280", "Adapter^L", "0.88M", bottlenecks(1280, 36, 8, norms=36), "L(2dr + r + d) + 2Ld, r=8"),
    Published("GPT-2 L, L=36, d=1280", "Adapter^L", "23.00M", bottlenecks(1280, 36, 248, norms=36), "L(2dr + r + d) + 2Ld, r=248"),
    Published(
        "GPT-2 L, L=36, d=1280", "LoRA, r=4", "0.77M", lora(1280, 36, 4), "q and v: L·2·2rd",
        "0.77M is 0.1 % of 774.03M, a nominal size",
    ),
    Published("RoBERTa-large, L=24, d=1024", "Adapter^P, r=16", "0.8M", bottlenecks(1024, 24, 16), "L(2dr + r + d)"),
    Published("RoBERTa-large, L=24, d=1024", "Adapter^H, r=8", "0.8M", bottlenecks(1024, 2 * 24, 8), "2L(2dr + r + d)"),
    Published(
        "RoBERTa-large, L=24, d=1024", "Adapter^P, r=64", "3.0M", bottlenecks(1024, 24, 64), "L(2dr + r + d)",
        f"no size gives 3.0M that a script names: r=60 gives {bottlenecks(1024, 24, 60):,}",
    ),
    Published(
        "RoBERTa-large, L=24, d=1024", "Adapter^H, r=64", "6.0M", bottlenecks(1024, 2 * 24, 64), "2L(2dr + r + d)",
        f"no size gives 6.0M that a script names: r=60 gives {bottlenecks(1024, 2 * 24, 60):,}",
    ),
    Published("DeBERTa-XXL, L=48, d=1536", "LoRA, r=16", "4.7M", lora(1536, 48, 16), "q and v: L·2·2rd"),
    Published("GPT-3, L=96, d=12288", "LoRA, r=1", "4.7M", lora(12288, 96, 1), "q and v: L·2·2rd"),
    Published("GPT-3, L=96, d=12288", "LoRA, r=8", "37.7M", lora(12288, 96, 8), "q and v: L·2·2rd"),
    Published("GPT-3, L=96, d=12288", "Adapter^H, r=1", "7.1M", bottlenecks(12288, 2 * 96, 1), "2L(2dr + r + d)"),
    Published("GPT-3, L=96, d=12288", "Adapter^H, r=8", "40.1M", bottlenecks(12288, 2 * 96, 8), "2L(2dr + r + d)"),
)  # fmt: skip
"""The 350M table first, then RoBERTa-base and GPT-2 M of the LoRA paper (arXiv:2106.09685, tables 2 and 3), then others."""
