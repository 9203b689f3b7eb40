"""The key that is most like another: by its words, then by its numbers, and quickly."""

from __future__ import annotations

import time

from nas.latency.keys import nearest

KEYS = [
    f"{precision} {c}x{side}x{side} conv{c * e}k1.relu6 dw{c * e}k{k}s{stride}.relu6 conv{out}k1 +in"
    for precision in ("fp32", "int8") for c in range(8, 136, 8) for side in (7, 14, 28, 56) for e in (2, 4, 6)
    for k in (3, 5, 7) for stride in (1, 2) for out in (16, 24, 32)
]  # fmt: skip


def test_the_numbers_are_compared_by_their_ratios() -> None:
    asked = "fp32 70x28x28 conv280k1.relu6 dw280k5s1.relu6 conv24k1 +in"
    assert nearest(asked, KEYS) == "fp32 72x28x28 conv288k1.relu6 dw288k5s1.relu6 conv24k1 +in"
    assert nearest("conv8k3", ["conv80k3", "conv9k3"]) == "conv9k3"


def test_the_words_come_first() -> None:
    assert nearest("int8 8x4x4 conv8k3", ["fp32 8x4x4 conv8k3", "int8 64x4x4 conv9k3"]) == "int8 64x4x4 conv9k3"
    assert nearest("fp16 8x4x4 gap conv8k3", ["fp32 4x4 normalize", "fp32 8x4x4 conv8k3"]) == "fp32 8x4x4 conv8k3"


def test_there_is_one_unless_there_is_none() -> None:
    assert nearest("x", []) is None
    assert nearest("", ["y"]) == "y"
    assert nearest("x", ["", "12"]) in ("", "12")


def test_thousands_of_keys_take_no_time() -> None:
    start = time.perf_counter()
    for asked in ("fp32 68x28x28 conv272k1.relu6 dw272k5s1.relu6 conv24k1 +in", "bf16 attention 4 heads of 64", "?"):
        assert nearest(asked, (KEYS * 2)[:5000]) in KEYS
    assert time.perf_counter() - start < 3.0
