"""The towers that a run evaluates: built once, and with weights only during an evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from dive_fast.checkpoint.export import MODEL
from dive_fast.config.schema import ModelConfig
from dive_fast.engine.step import Engine
from dive_fast.model import head as heads
from dive_fast.model.head import Head
from dive_fast.model.towers import HEAD, Towers, create


class EvaluationTowers:
    """A second copy of the towers in eval mode, without the compiled or recomputed blocks of training.

    So an evaluation has the exported model's figures, bit for bit. Between evaluations the copy has no weights and
    takes no memory from training.
    """

    def __init__(self, model: ModelConfig, engine: Engine) -> None:
        """Builds the copy on the engine's device; draws random numbers."""
        self._engine, self._model = engine, model
        self._towers = create(model, weights=False).to(engine.ranks.device).eval()
        self._towers.preprocess = engine.towers.preprocess
        self._towers.autocast = engine.towers.autocast
        tensors = self._towers.state_dict(keep_vars=True).values()
        self._layouts = [(tensor, tensor.shape, tensor.stride()) for tensor in tensors]
        self._free()

    @contextmanager
    def pretrained(self) -> Iterator[Towers]:
        """The towers with the weights that the run started from."""
        state = create(self._model).state_dict()
        with self._allocated():
            self._towers.load_state_dict(state)
            yield self._towers

    @contextmanager
    def exported(self, folder: Path) -> Iterator[tuple[Towers, Head | None]]:
        """The towers with the weights of an exported model, and the head next to it."""
        path = heads.find_head(folder / MODEL)
        with self._allocated():
            self._towers.load_exported(load_file(folder / MODEL))
            yield self._towers, None if path is None else heads.load(path)

    @contextmanager
    def trained(self, class_names: tuple[str, ...]) -> Iterator[tuple[Towers, Head | None]]:
        """The towers with the engine's present weights, and its head; only where :func:`has_all_weights`.

        Args:
            class_names: names of the head's rows.
        """
        linear, state = self._engine.towers.head, self._engine.towers.state_dict()
        with self._allocated():
            self._towers.load_state_dict({name: state[name] for name in state if not name.startswith(HEAD)})
            yield self._towers, None if linear is None else _head(linear, class_names)

    @contextmanager
    def _allocated(self) -> Iterator[None]:
        try:
            for tensor, shape, stride in self._layouts:
                tensor.data = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
            yield
        finally:
            self._free()

    def _free(self) -> None:
        for tensor, *_ in self._layouts:
            tensor.data = tensor.new_empty(0)


def _head(linear: nn.Linear, class_names: tuple[str, ...]) -> Head:
    return Head(linear.weight.detach().float(), linear.bias.detach().float(), class_names)


def has_all_weights(engine: Engine) -> bool:
    """Whether each rank has all weights, as under ZeRO 0 to 2."""
    return bool(engine.deepspeed.zero_optimization_stage() < 3)
