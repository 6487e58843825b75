"""A measurement under attack that is interrupted at one of its blocks."""

from typing import Any

import pytest
from torch import Tensor

from dive_fast.evaluation.attacks import robust_accuracy


def interrupt_at(block: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Raises KeyboardInterrupt at this block, once; returns the list of sample numbers of each block begun."""
    original, blocks = robust_accuracy._outcomes, list[list[int]]()

    def interrupted(model: Any, attack: Any, batch: Any, numbers: Tensor, name: str) -> Tensor:
        blocks.append(numbers.tolist())
        if len(blocks) == block:
            raise KeyboardInterrupt
        return original(model, attack, batch, numbers, name)

    monkeypatch.setattr(robust_accuracy, "_outcomes", interrupted)
    return blocks
