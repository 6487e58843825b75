"""Low-rank adapters (LoRA) in the towers, by peft.

::

    W = W0 + (alpha / r) B A          A (r, n), B (m, r), W0 (m, n)

W0 is frozen; B is zero at the start, so the features are those of the pre-trained model. A layer is adapted where
its class calls it. open_clip's attention reads its packed weights itself, so it is split into linear layers of the
same mathematics (:class:`~dive_fast.model.low_rank.SplitAttention`); :meth:`Adapters.merge` packs them again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn

from dive_fast.config.schema import LoraConfig
from dive_fast.errors import ConfigError
from dive_fast.model.low_rank import PARTS, SplitAttention
from dive_fast.model.towers import Towers
from dive_fast.model.transformer_blocks import blocks_of

DEFAULT, PERTURBATION = "default", "perturbation"
"""peft's names of the trained adapter, and of one that :func:`add_perturbation` adds."""
BASE = ".base_layer."
"""Part of the name of a frozen parameter in an adapted layer."""
_TARGETS: dict[str, str] = {
    **dict.fromkeys(("q_proj", "attention.self.query", "SelfAttention.q"), "q"),
    **dict.fromkeys(("k_proj", "attention.self.key", "SelfAttention.k"), "k"),
    **dict.fromkeys(("v_proj", "attention.self.value", "SelfAttention.v"), "v"),
    **{"attn.qkv": "qkv", "attn.kv": "kv"},
    **dict.fromkeys(("attn.proj", "attn.out_proj", "self_attn.out_proj", "attention.out_proj"), "out"),
    **dict.fromkeys(("attention.output.dense", "SelfAttention.o", "attention.out_lin", "attnpool.c_proj"), "out"),
    **dict.fromkeys(("mlp.c_fc", "mlp.c_proj", "mlp.fc1", "mlp.fc2", "mlp.fc1_g", "mlp.fc1_x"), "mlp"),
    **dict.fromkeys(("mlp.w12", "mlp.w3", "intermediate.dense", "output.dense", "ffn.lin1", "ffn.lin2"), "mlp"),
    **{f"DenseReluDense.{name}": "mlp" for name in ("wi", "wi_0", "wi_1", "wo")},
}
"""Ends of the names of linear layers in open_clip, timm and transformers; the longest one that fits counts."""
_PACKED = {"qkv": ("q", "k", "v"), "kv": ("k", "v")}
"""Layers that compute several projections by one weight."""


class CalledAttentionPool(nn.Module):
    """The attention pool of open_clip's ModifiedResNet, which calls its layers, for the pooled token alone."""

    def __init__(self, pool: AttentionPool2d) -> None:
        """Takes over the parameters of ``pool``; their names stay."""
        super().__init__()
        self.num_heads, self.positional_embedding = pool.num_heads, pool.positional_embedding
        self.k_proj, self.q_proj, self.v_proj, self.c_proj = pool.k_proj, pool.q_proj, pool.v_proj, pool.c_proj

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, D)``."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        projected = self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens)
        heads = [rows.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for rows in projected]
        attended = F.scaled_dot_product_attention(*heads)
        pooled: Tensor = self.c_proj(attended.transpose(1, 2).flatten(1))
        return pooled


class AdaptedLayer(NamedTuple):
    """A linear layer with its factors; all tensors are the parameters themselves."""

    name: str
    """Name of the layer in :class:`~dive_fast.model.towers.Towers`."""
    weight: nn.Parameter
    """W0, ``(m, n)``, frozen."""
    lora_A: nn.Parameter  # noqa: N815 - peft's name
    """``(r, n)``"""
    lora_B: nn.Parameter  # noqa: N815
    """``(m, r)``"""
    scaling: float
    """alpha / r."""
    perturbation_A: nn.Parameter | None  # noqa: N815
    """``(r', n)``, added by :func:`add_perturbation`; None before it."""
    perturbation_B: nn.Parameter | None  # noqa: N815
    """``(m, r')``, likewise."""


class Adapters:
    """The record of the adapters in a pair of towers: their config and the names of adapted layers."""

    def __init__(self, config: LoraConfig, layers: Sequence[str], packed: Sequence[str]) -> None:
        """Takes the names.

        Args:
            config: its ``towers`` are those that are adapted.
            layers: adapted layers.
            packed: attentions that were split.
        """
        self.config, self.layers = config, tuple(layers)
        self._packed = tuple(packed)

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return scaling_of(self.config)

    def merge(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of the towers without adapters, with ``W0 + (alpha / r) B A`` and packed attentions.

        The sum is computed in fp64 and rounded once. Layers without factors in ``state`` keep W0; a perturbation
        is left out.

        Args:
            state: complete state of the adapted towers, by name.
        """
        merged = {name.replace(BASE, "."): tensor for name, tensor in state.items() if not is_factor(name)}
        for layer in self.layers:
            first, second = (state.get(f"{layer}.lora_{factor}.{DEFAULT}.weight") for factor in "AB")
            if first is not None and second is not None:
                weight = merged[f"{layer}.weight"]
                product = self.scaling * (second.detach().double() @ first.detach().double())
                merged[f"{layer}.weight"] = (weight.detach().double() + product).to(weight.dtype)
        for attention in self._packed:
            for kind in ("weight", "bias"):
                parts = [merged.pop(f"{attention}.{part}.{kind}") for part in PARTS]
                merged[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
        return merged

    def factors(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained factors in a state of the towers, by the names ``<layer>.lora_A`` and ``<layer>.lora_B``."""
        end = f".{DEFAULT}.weight"
        return {name.removesuffix(end): tensor for name, tensor in state.items() if is_factor(name, DEFAULT)}

    def plain_name(self, name: str) -> str:
        """The name, in towers without adapters, of the parameter that an adapted one belongs to."""
        layer, _, kind = name.replace(BASE, ".").rpartition(".")
        if is_factor(name):
            layer = name.partition(".lora_")[0]
        attention, _, part = layer.rpartition(".")
        if attention in self._packed and part in PARTS:
            return f"{attention}.in_proj_{kind}"
        return f"{layer}.{kind}" if layer else kind


def is_factor(name: str, adapter: str = "") -> bool:
    """Whether a parameter of this name is a factor of an adapter, or of the one of this name."""
    return any(f".lora_{factor}.{adapter}" in name for factor in "AB")


def scaling_of(lora: LoraConfig) -> float:
    """alpha / r; alpha is r by default."""
    return (lora.rank if lora.alpha is None else lora.alpha) / lora.rank


def check(towers: Towers, lora: LoraConfig) -> list[str]:
    """Validates a config against the towers without changing them; returns the names of the layers to adapt.

    Raises:
        ConfigError: a tower lacks a target, has it in a packed layer that is not a target as a whole, or has a
            smaller layer than the rank; or peft is not installed.
    """
    _import_peft()
    return [layer for name in lora.towers for layer in _layers_of(towers, name, lora)]


def apply(towers: Towers, lora: LoraConfig, seed: int = 0) -> Adapters:
    """Adds adapters to the towers, in place, and freezes all other parameters of both towers.

    The logit scale and a head stay as they are. The record is kept as ``towers.adapters``.

    Args:
        towers: with the pre-trained weights, before an engine is built.
        lora: adapts the towers that it names.
        seed: seed of A, which is equal on all ranks.

    Raises:
        ConfigError: as :func:`check`, or the tower does not call a layer, so that its adapter would be ignored.
    """
    peft = _import_peft()
    assert towers.adapters is None, "towers are adapted once"
    names = check(towers, lora)
    packed = _split_attentions(towers, names)
    others = {name: p.requires_grad for name, p in towers.named_parameters() if not _is_in_tower(name)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=scaling_of(lora) * lora.rank,
            lora_dropout=lora.dropout,
            target_modules=names,
        )
        peft.inject_adapter_in_model(options, towers, adapter_name=DEFAULT)
    for name, parameter in towers.named_parameters():
        parameter.requires_grad_(others.get(name, is_factor(name)))
    for layer in _peft_layers(towers).values():
        # Autocast casts the input of both products; peft would copy it to fp32 before.
        layer.cast_input_dtype_enabled = False
    adapters = towers.adapters = Adapters(lora, names, packed)
    _check_calls(towers, lora)
    return adapters


def adapted_layers(towers: Towers) -> list[AdaptedLayer]:
    """The adapted layers in the order of the towers' modules; empty without adapters."""
    layers = []
    for name, layer in _peft_layers(towers).items():
        second = [
            factors[PERTURBATION].weight if PERTURBATION in factors else None
            for factors in (layer.lora_A, layer.lora_B)
        ]
        first = layer.lora_A[DEFAULT].weight, layer.lora_B[DEFAULT].weight
        layers.append(AdaptedLayer(name, layer.base_layer.weight, *first, layer.scaling[DEFAULT], *second))
    return layers


def add_perturbation(towers: Towers, rank: int) -> None:
    """Adds a second pair of factors to each adapted layer, zero and not trained, for :func:`perturbation`.

    No optimizer, checkpoint or export has it. The caller fills it in, equally on all ranks, and may differentiate
    by it while its ``requires_grad`` is set.
    """
    peft = _import_peft()
    options = peft.LoraConfig(r=rank, lora_alpha=rank)
    for layer in _peft_layers(towers).values():
        trained = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            layer.update_layer(PERTURBATION, rank, lora_alpha=rank, config=options)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(trained.get(name, False))
            if name not in trained:
                nn.init.zeros_(parameter)
        layer._active_adapter = [DEFAULT]


@contextmanager
def perturbation(towers: Towers) -> Iterator[None]:
    """Adds ``B_P A_P`` to the adapted layers within the context.

    A backward that runs blocks again (``train.activation_checkpointing``) has to be within it too.
    """
    layers = list(_peft_layers(towers).values())
    try:
        for layer in layers:
            layer._active_adapter = [DEFAULT, PERTURBATION]
        yield
    finally:
        for layer in layers:
            layer._active_adapter = [DEFAULT]


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"model.lora needs the package peft ({error}): pip install 'dive_fast[lora]'") from error
    return peft


def _peft_layers(towers: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in towers.named_modules() if hasattr(module, "lora_A")}


def _is_in_tower(name: str) -> bool:
    return name.startswith(("visual.", "text."))


def _can_split(attention: nn.MultiheadAttention) -> bool:
    has_others = attention.bias_k is not None or attention.add_zero_attn or attention.dropout > 0
    return attention.in_proj_weight is not None and attention.batch_first and not has_others


def _split_attentions(towers: Towers, names: Sequence[str]) -> list[str]:
    """Replaces the attentions that adapted layers are parts of; returns the names of those with packed weights."""
    packed = []
    for name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = towers.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            packed.append(name)
            towers.set_submodule(name, SplitAttention(module))
        elif isinstance(module, AttentionPool2d):
            towers.set_submodule(name, CalledAttentionPool(module))
    return packed


def _layers_of(towers: Towers, tower: str, lora: LoraConfig) -> list[str]:
    """Names of the layers to adapt in one tower, as they are once its attentions are split.

    Raises:
        ConfigError: as :func:`check`.
    """
    module: nn.Module = towers.visual if tower == "image" else towers.text
    prefix, kind = {"image": "visual", "text": "text"}[tower], type(module).__name__
    shapes: dict[str, torch.Size] = {}
    layers = {
        f"{prefix}.{name}": (target, shape) for name, target, shape in _linear_layers(module, f"{tower} tower")
    }
    available = {part for target, _ in layers.values() for part in _PACKED.get(target, (target,))}
    for target in lora.targets:
        if target not in available:
            raise ConfigError(
                f"model.lora.targets: the {tower} tower ({kind}) has no layer {target}; it has "
                f"{', '.join(sorted(available)) or 'none that can be adapted'}"
            )
    for name, (kind_of_layer, shape) in layers.items():
        parts = _PACKED.get(kind_of_layer, (kind_of_layer,))
        selected = [part for part in parts if part in lora.targets]
        if selected and len(selected) < len(parts):
            raise ConfigError(
                f"model.lora.targets: {name} of the {tower} tower ({kind}) computes {', '.join(parts)} by one "
                f"weight; name all of them or none, not {', '.join(selected)} alone"
            )
        if selected:
            shapes[name] = shape
    for name, shape in shapes.items():
        if lora.rank > min(shape):
            raise ConfigError(
                f"model.lora.rank = {lora.rank} exceeds the smaller side of {name}, "
                f"{' x '.join(map(str, shape))}; use at most {min(shape)}"
            )
    return list(shapes)


def _linear_layers(tower: nn.Module, where: str) -> Iterator[tuple[str, str, torch.Size]]:
    """Name, target and shape of the weight of each linear layer that can be adapted."""
    pool = getattr(tower, "attnpool", None)
    if isinstance(pool, AttentionPool2d):
        roots: list[nn.Module] = [pool]
    else:
        roots = blocks_of(tower, "model.lora")
    names = {id(module): name for name, module in tower.named_modules()}
    for root in roots:
        for name, module in root.named_modules(prefix=names[id(root)]):
            if isinstance(module, nn.MultiheadAttention):
                if not _can_split(module):
                    raise ConfigError(
                        f"model.lora: {name} of the {where} is an attention with other parameters than "
                        "open_clip's; leave this tower out of model.lora.towers"
                    )
                side = torch.Size([module.embed_dim, module.embed_dim])
                parts = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out"}
                yield from ((f"{name}.{part}", target, side) for part, target in parts.items())
                continue
            parent = tower.get_submodule(name.rpartition(".")[0])
            is_layer = isinstance(module, nn.Linear) and not isinstance(parent, nn.MultiheadAttention)
            if is_layer and (target := _target_of(name)) is not None:
                yield name, target, module.weight.shape


def _target_of(name: str) -> str | None:
    ends = [end for end in _TARGETS if f".{name}".endswith(f".{end}")]
    return _TARGETS[max(ends, key=len)] if ends else None


@torch.no_grad()
def _check_calls(towers: Towers, lora: LoraConfig) -> None:
    """Validates by one forward that the towers call each adapted layer.

    Raises:
        ConfigError: a tower reads the weights of an adapted layer itself.
    """
    layers, called = _peft_layers(towers), set()

    def record(layer: nn.Module, *_: Any) -> None:
        called.add(layer)

    handles = [layer.register_forward_pre_hook(record) for layer in layers.values()]
    scale, was_training = towers.logit_scale, towers.training
    towers.eval()
    if "image" in lora.towers:
        towers.encode_image(scale.new_zeros(1, 3, *towers.preprocess.size))
    if "text" in lora.towers:
        # Towers of transformers count fewer positions than they have, and take any number of tokens.
        length = 8 if isinstance(towers.text, HFTextEncoder) else towers.context_length or 77
        towers.encode_text(scale.new_zeros(1, length, dtype=torch.long))
    towers.train(was_training)
    for handle in handles:
        handle.remove()
    if ignored := [name for name, layer in layers.items() if layer not in called]:
        raise ConfigError(
            f"model.lora.targets: {ignored[0]} cannot be adapted, nor {len(ignored) - 1} more, since the tower "
            "reads their weights without calling them; use other targets or towers"
        )
