"""Compiled and recomputed blocks: equal gradients, less memory, and one compilation per kind of block."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from open_clip.transformer import QuickGELU
from step_oracle import Stage, assert_same_gradients, config, oracle
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RobertaConfig, RobertaModel

from dive_fast.config.schema import ModelConfig
from dive_fast.engine.deepspeed_config import deepspeed_section
from dive_fast.errors import ConfigError
from dive_fast.model import transformer_blocks as blocks
from dive_fast.model.towers import Towers, create
from dive_fast.model.transformer_blocks import (
    TEXT_MULTIPLE,
    RecomputeMLP,
    SavedInputQuickGELU,
    blocks_of,
    compile_blocks,
    recompute_activations,
    recompute_blocks,
    replace_quickgelu,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path)
    return path


@pytest.fixture
def towers(folder: Path) -> Towers:
    return create(ModelConfig(name=f"local-dir:{folder}"))


def compiled(folder: Path, backend: str) -> dict[Any, Any]:
    """On one rank: gradients of a step with compiled blocks, and the number of compilations."""
    from torch._dynamo.utils import counters

    blocks.BACKEND = backend
    stage = Stage(folder)
    results: dict[Any, Any] = {}
    for zero, micro, checkpointing in ((0, None, "off"), (2, 3, "off"), (2, None, "full"), (2, 3, "selective")):
        engine = stage.engine(zero, micro=micro, compile=True, activation_checkpointing=checkpointing)
        results[zero, checkpointing] = stage.accumulate(engine)
    before = counters["stats"]["unique_graphs"]
    towers = copy.deepcopy(stage.student)
    compile_blocks(towers)
    lengths = torch.randint(3, 78, (20, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for length, count in lengths:
        tokens = torch.randint(1, 1000, (count, 77))
        tokens[:, length - 1 :] = 49407
        assert torch.allclose(
            towers.encode_text(tokens, length), stage.student.encode_text(tokens, length), atol=1e-5
        )
    results["graphs"] = counters["stats"]["unique_graphs"] - before
    return results


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_match_the_oracle_with_few_compilations(folder: Path, backend: str) -> None:
    (results,) = run_ranks(1, compiled, folder, backend, init=False, timeout=500)
    expected, losses = oracle(folder)
    graphs = results.pop("graphs")
    for gradients, metrics in results.values():
        assert_same_gradients(gradients, expected, 1e-5)
        assert metrics["loss"] == pytest.approx(losses["loss"], rel=1e-4)
    # Twenty shapes need one compilation, and another one for sizes of 1 or 8.
    assert graphs <= 3


def test_text_multiple_pads_trimmed_texts(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(towers.text, "forward", lambda tokens: seen.append(tokens.shape[1]) or torch.zeros(1))
    tokens = torch.zeros(1, 77, dtype=torch.long)
    lengths = (1, 8, 9, 76, None)
    for length in lengths:
        towers.encode_text(tokens, length)
    assert seen == [1, 8, 9, 76, 77]  # a CPU gains nothing by padding
    seen.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = torch.zeros(1, 77, dtype=torch.long, device="cuda")
        for length in lengths:
            towers.encode_text(on_gpu, length)
    assert seen == [8, 8, 16, 77, 77]
    seen.clear()
    towers.text_multiple = TEXT_MULTIPLE
    for length in lengths:
        towers.encode_text(tokens, length)
    assert seen == [8, 8, 16, 77, 77]


def test_padded_texts_have_the_same_features(towers: Towers) -> None:
    tokens = torch.randint(1, 1000, (5, 77))
    tokens[:, 10:] = 0
    tokens[:, 10] = 49407
    towers = towers.double()
    features, padded = [], copy.deepcopy(towers)
    padded.text_multiple = TEXT_MULTIPLE
    for model in (towers, padded):
        feature = model.encode_text(tokens, length=11)
        feature.square().sum().backward()
        features.append(feature)
    torch.testing.assert_close(*features, rtol=1e-12, atol=0)
    for (name, plain), other in zip(towers.text.named_parameters(), padded.text.parameters(), strict=True):
        torch.testing.assert_close(other.grad, plain.grad, rtol=1e-12, atol=1e-12, msg=name)


class ProductCounter(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += "mm" in str(op)
        return op(*args, **kwargs or {})


def step(towers: Towers) -> tuple[int, int, dict[str, Tensor]]:
    """Bytes saved for the backward, number of products, and gradients."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, *towers.preprocess.size, generator=generator)
    words, context = towers.text.vocab_size, towers.text.context_length
    tokens = torch.randint(1, words - 1, (4, context), generator=generator)
    tokens[:, -1] = words - 1
    with ProductCounter() as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = towers(images, tokens, context)
        loss = features.image.square().sum() + features.text.square().sum()
    with counter:
        loss.backward()
    gradients = {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}
    return sum(saved.values()), counter.products, gradients


def test_recomputed_blocks_save_less_and_run_twice(towers: Towers) -> None:
    plain_bytes, plain_products, expected = step(copy.deepcopy(towers))
    recompute_blocks(towers)
    saved, products, gradients = step(towers)
    assert_same_gradients(gradients, expected, 1e-6)
    assert saved < 0.5 * plain_bytes
    assert products > 1.2 * plain_products


CUSTOM = tiny.CLIP | {"vision_cfg": tiny.VISION | {"scale_fc": True}}
"""A model with a layer norm inside the MLP."""


@pytest.mark.parametrize("model", [tiny.QUICKGELU, CUSTOM, tiny.reduced("ViT-B-16-SigLIP")])
@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_recomputed_activations_save_less_without_extra_products(
    tmp_path: Path, model: dict[str, Any], autocast: torch.dtype | None
) -> None:
    towers = create(ModelConfig(name=tiny.write_model(tmp_path, model)))
    towers.autocast = autocast
    replace_quickgelu(towers)
    names = list(towers.state_dict())
    plain_bytes, plain_products, expected = step(copy.deepcopy(towers))
    recompute_activations(towers)
    assert list(towers.state_dict()) == names
    saved, products, gradients = step(towers)
    assert products == plain_products
    assert saved < 0.85 * plain_bytes
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_recompute_mlp_runs_every_layer() -> None:
    mlp = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3), nn.Tanh())
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RecomputeMLP(mlp)(x), mlp(x))


def test_recompute_activations_rejects_blocks_without_plain_mlp(towers: Towers) -> None:
    towers.text.transformer.resblocks[1].mlp = nn.Sequential(nn.Linear(32, 32), nn.GELU())
    with pytest.raises(ConfigError, match=r"selective: the blocks of TextTransformer have no MLP of two linear"):
        recompute_activations(towers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_input_quickgelu_equals_open_clip_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(50, 70, generator=generator)).to(dtype).requires_grad_()
    upstream = torch.randn(50, 70, generator=generator).to(dtype)
    results, saved = {}, {}
    for activation in (QuickGELU(), SavedInputQuickGELU()):
        storages: set[int] = set()

        def pack(tensor: Tensor, storages: set[int] = storages) -> Tensor:
            storages.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = activation(x)
        results[activation] = result, *torch.autograd.grad(result, x, upstream)
        saved[activation] = len(storages)
    theirs, ours = results.values()
    assert all(map(torch.equal, theirs, ours))
    assert list(saved.values()) == [2, 1]


def test_replace_quickgelu_replaces_every_module(tmp_path: Path) -> None:
    towers = create(ModelConfig(name=tiny.write_model(tmp_path, tiny.QUICKGELU)))
    names = list(towers.state_dict())
    assert sum(isinstance(module, QuickGELU) for module in towers.modules()) == 4
    replace_quickgelu(towers)
    assert not any(isinstance(module, QuickGELU) for module in towers.modules())
    assert sum(isinstance(module, SavedInputQuickGELU) for module in towers.modules()) == 4
    assert list(towers.state_dict()) == names


def test_blocks_of_finds_the_stack_of_any_transformer(towers: Towers, tmp_path: Path) -> None:
    assert blocks_of(towers.visual, "x") == list(towers.visual.transformer.resblocks)
    siglip = create(ModelConfig(name=tiny.write_model(tmp_path / "siglip", tiny.reduced("ViT-B-16-SigLIP"))))
    assert blocks_of(siglip.visual, "x") == list(siglip.visual.trunk.blocks)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    roberta = RobertaModel(RobertaConfig(vocab_size=1000, **sizes))
    assert blocks_of(roberta, "x") == list(roberta.encoder.layer)
    with pytest.raises(ConfigError, match=r"train\.compile: Linear is not a stack of equal blocks; turn it off"):
        blocks_of(nn.Linear(3, 3), "train.compile")


def test_compile_is_refused_under_zero_3(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.compile: ZeRO-3"):
        deepspeed_section(config(folder, 3, "sequential", None, compile=True), 1)
