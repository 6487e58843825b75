"""The towers that a run evaluates: built once, and with weights only during an evaluation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dive_fast.checkpoint.export import AVERAGE, MODEL, PROMPTS
from dive_fast.config.schema import ModelConfig
from dive_fast.engine.step import Engine
from dive_fast.model import head as heads
from dive_fast.model import prompt_file
from dive_fast.model.head import Head
from dive_fast.model.towers import ADDED, HEAD, Towers, create


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
        """The towers with the weights or the prompts of an export, and the head if there is one."""
        if self._engine.towers.prompts is not None:
            with self._with_state(self._engine.towers.state_dict(), ()) as (towers, _):
                towers.prompts = prompt_file.load(folder / PROMPTS).to(self._engine.ranks.device)
                yield towers, None
            return
        with self._loaded(folder / MODEL) as loaded:
            yield loaded

    @contextmanager
    def exported_average(self, folder: Path) -> Iterator[tuple[Towers, Head | None]]:
        """The towers with the averaged weights next to an exported model, and their head."""
        with self._loaded(folder / AVERAGE) as loaded:
            yield loaded

    @contextmanager
    def trained(self, class_names: tuple[str, ...]) -> Iterator[tuple[Towers, Head | None]]:
        """The towers with the weights that an export would have now, and their head.

        Only where :func:`has_all_weights`. With ``train.export_ema`` they are the averaged ones.

        Args:
            class_names: names of the head's rows.
        """
        average, state = self._engine.average, self._engine.towers.state_dict()
        is_averaged = average is not None and average.is_exported
        with self._with_state(average.replace(state) if average and is_averaged else state, class_names) as loaded:
            yield loaded

    @contextmanager
    def averaged(self, class_names: tuple[str, ...]) -> Iterator[tuple[Towers, Head | None]]:
        """The towers with the averaged weights of ``train.ema``, and their head; as :meth:`trained`."""
        average = self._engine.average
        assert average is not None
        with self._with_state(average.replace(self._engine.towers.state_dict()), class_names) as loaded:
            yield loaded

    @contextmanager
    def _loaded(self, weights: Path) -> Iterator[tuple[Towers, Head | None]]:
        path = heads.find_head(weights)
        with self._allocated():
            self._towers.load_exported(load_file(weights))
            yield self._towers, None if path is None else heads.load(path)

    @contextmanager
    def _with_state(
        self, state: Mapping[str, Tensor], class_names: tuple[str, ...]
    ) -> Iterator[tuple[Towers, Head | None]]:
        plain = self._engine.towers.plain_state(state)
        with self._allocated():
            self._towers.load_state_dict({name: plain[name] for name in plain if not name.startswith(ADDED)})
            self._towers.prompts = self._engine.towers.prompts
            yield self._towers, _head(state, class_names) if f"{HEAD}weight" in state else None

    @contextmanager
    def _allocated(self) -> Iterator[None]:
        try:
            for tensor, shape, stride in self._layouts:
                tensor.data = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
            yield
        finally:
            self._towers.prompts = None
            self._free()

    def _free(self) -> None:
        for tensor, *_ in self._layouts:
            tensor.data = tensor.new_empty(0)


def _head(state: Mapping[str, Tensor], class_names: tuple[str, ...]) -> Head:
    weight, bias = (state[f"{HEAD}{name}"].detach().float() for name in ("weight", "bias"))
    return Head(weight, bias, class_names)


def has_all_weights(engine: Engine) -> bool:
    """Whether each rank has all weights, as under ZeRO 0 to 2."""
    return bool(engine.deepspeed.zero_optimization_stage() < 3)
