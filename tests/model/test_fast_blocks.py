"""Fast blocks: features and gradients of open_clip's own blocks, fewer operations, nothing ignored silently."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from open_clip.transformer import LayerNorm
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from dive_fast.config.schema import ModelConfig
from dive_fast.model.fast_blocks import FastBlock, FastModule, install
from dive_fast.model.towers import Towers, create
from dive_fast.model.transformer_blocks import recompute_activations, recompute_blocks
from dive_fast.planner.simulate import fake_tensors

VISION, TEXT = tiny.VISION, tiny.TEXT
BOTH = "fast blocks: image and text towers"
END, PAD = TEXT["vocab_size"] - 1, 5
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "gelu": (tiny.CLIP, BOTH),
    "quickgelu": (tiny.QUICKGELU, BOTH),
    "layer scale": (
        tiny.CLIP
        | {"vision_cfg": VISION | {"ls_init_value": 0.5}, "text_cfg": TEXT | {"ls_init_value": 0.3, "layers": 3}},
        BOTH,
    ),
    "average pool": (tiny.CLIP | {"vision_cfg": VISION | {"pool_type": "avg", "no_ln_pre": True}}, BOTH),
    "norm after pool": (tiny.CLIP | {"vision_cfg": VISION | {"final_ln_after_pool": True, "layers": 1}}, BOTH),
    "attentional pool": (
        tiny.CLIP | {"vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2}},
        BOTH,
    ),
    "end token": (tiny.CLIP | {"text_cfg": TEXT | {"pool_type": "eos", "eos_id": END}}, BOTH),
    "first token": (tiny.CLIP | {"text_cfg": TEXT | {"pool_type": "first"}}, BOTH),
    "last token": (tiny.CLIP | {"text_cfg": TEXT | {"pool_type": "last"}}, BOTH),
    "no causal mask": (tiny.CLIP | {"text_cfg": TEXT | {"no_causal_mask": True}}, BOTH),
    "class token": (tiny.CLIP | {"text_cfg": TEXT | {"embed_cls": True, "pad_id": PAD}}, BOTH),
    "pad mask": (tiny.CLIP | {"text_cfg": TEXT | {"no_causal_mask": True, "pad_id": PAD}}, BOTH),
    "other blocks": (
        tiny.CLIP | {"vision_cfg": VISION | {"scale_fc": True}},
        "fast blocks: text tower; the image tower keeps its own (its blocks are CustomResidualAttentionBlock)",
    ),
    "timm": (
        tiny.reduced("ViT-B-16-SigLIP"),
        "fast blocks: text tower; the image tower keeps its own (TimmModel is not a transformer of open_clip)",
    ),
}
"""Name -> architecture, and the line about it."""
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def random_towers(folder: Path, case: str) -> Towers:
    """Towers in training whose biases, gains and scales are random too."""
    name = tiny.write_model(folder, CASES[case][0])
    towers = create(ModelConfig(name=name, random=True)).train()
    towers.text.use_pad_mask = case == "pad mask"  # no option of open_clip's configs
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return towers


@pytest.fixture
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Towers:
    return random_towers(tmp_path, getattr(request, "param", "quickgelu"))


def fast(towers: Towers, backend: str = "torch", defers: bool = True) -> Towers:
    """A copy with fast blocks."""
    towers = copy.deepcopy(towers)
    install(towers, defers)
    for module in towers.modules():
        if isinstance(module, FastModule):
            module.backend = backend
    return towers


def texts(towers: Towers, count: int, length: int) -> Tensor:
    """Token rows, the first of which has ``length`` tokens and the others fewer; padding as in any tokenizer."""
    generator, context = torch.Generator().manual_seed(2), int(towers.text.context_length)
    end = int(towers.text.vocab_size) - 1
    tokens = torch.randint(PAD + 1, end, (count, context), generator=generator)
    for row, each in enumerate(tokens):
        last = max(min(length, context) - 1 - 2 * row, 0)
        each[last:] = PAD
        each[last] = end
    return tokens


def differentiate(
    towers: Towers, images: int = 3, num_texts: int = 4, length: int = 77, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Features of images and texts, and the gradients of a random linear function of them."""
    generator = torch.Generator().manual_seed(0)
    dtype, towers.autocast = towers.logit_scale.dtype, autocast
    pixels = torch.randn(images, 3, *towers.preprocess.size, generator=generator).to(dtype)
    features = towers(pixels, texts(towers, num_texts, length), length)
    assert features.text is not None
    upstream = [torch.randn(rows.shape, generator=generator) for rows in (features.image, features.text)]
    ((features.image * upstream[0]).sum() + (features.text * upstream[1]).sum()).backward()
    gradients = {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}
    towers.zero_grad(set_to_none=True)
    return features.image.detach(), features.text.detach(), gradients


def distance(tensor: Tensor, expected: Tensor) -> float:
    return float((tensor.double() - expected.double()).norm() / expected.double().norm())


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.double().flatten() for gradient in gradients.values()])


def assert_equal_steps(towers: Towers, expected: Towers, **sizes: Any) -> None:
    """Features and gradients to 1e-6; of each single parameter, with its own rounding, to 5e-6."""
    (image, text, gradients), (*features, reference) = (
        differentiate(each, **sizes) for each in (towers, expected)
    )
    assert max(distance(image, features[0]), distance(text, features[1])) < 1e-6
    assert list(gradients) == list(reference)
    assert distance(flat(gradients), flat(reference)) < 1e-6
    for name, gradient in gradients.items():
        assert distance(gradient, reference[name]) < 5e-6, name


@pytest.mark.parametrize(
    ("plain", "line"), [(case, CASES[case][1]) for case in CASES], indirect=["plain"], ids=CASES
)
def test_fast_blocks_equal_open_clips(plain: Towers, line: str) -> None:
    towers = copy.deepcopy(plain)
    assert install(towers) == line
    assert [*towers.state_dict()] == [*plain.state_dict()]
    assert [name for name, _ in towers.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for defers in (True, False):
        assert_equal_steps(fast(plain, defers=defers), plain)


@pytest.mark.parametrize("plain", ["quickgelu", "layer scale", "class token"], indirect=True)
def test_interpreted_kernels_equal_open_clips_blocks(plain: Towers) -> None:
    assert_equal_steps(fast(plain, "triton"), plain, images=2, num_texts=2, length=6)


@pytest.mark.parametrize("sizes", [(1, 1, 77), (1, 2, 1), (2, 1, 8)])
def test_fast_blocks_at_small_sizes(plain: Towers, sizes: tuple[int, int, int]) -> None:
    images, num_texts, length = sizes
    assert_equal_steps(fast(plain), plain, images=images, num_texts=num_texts, length=length)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plain", ["quickgelu", "layer scale"], indirect=True)
def test_fast_blocks_round_at_most_twice_as_much(plain: Towers, precision: str, backend: str) -> None:
    sizes = {"images": 2, "num_texts": 3, "length": 9}
    exact = differentiate(copy.deepcopy(plain).double(), **sizes)
    steps = [
        differentiate(each, autocast=PRECISIONS[precision], **sizes) for each in (plain, fast(plain, backend))
    ]
    errors = [
        [distance(image, exact[0]), distance(text, exact[1]), distance(flat(gradients), flat(exact[2]))]
        for image, text, gradients in steps
    ]
    for plain_error, error in zip(*errors, strict=True):
        assert 1e-5 < error < 2 * plain_error


def residual_dtypes(towers: Towers) -> list[tuple[torch.dtype, ...]]:
    """Dtypes of the residual stream after each block of both towers under fp16."""
    dtypes: list[tuple[torch.dtype, ...]] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        dtypes.append((output[0] if isinstance(output, tuple) else output).dtype)

    blocks = [block for tower in (towers.visual, towers.text) for block in tower.transformer.resblocks]
    handles = [block.register_forward_hook(note) for block in blocks]
    differentiate(towers, autocast=torch.float16)
    for handle in handles:
        handle.remove()
    return dtypes


@pytest.mark.parametrize("plain", ["quickgelu", "layer scale"], indirect=True)
def test_residual_stream_has_open_clips_dtypes(plain: Towers) -> None:
    # A deferring block has not yet added its own branch, so that LayerScale's fp32 comes one block later.
    assert residual_dtypes(fast(plain, defers=False)) == residual_dtypes(plain)


def test_only_the_pooled_token_passes_the_last_block(tmp_path: Path) -> None:
    rows = {}
    for case in ("gelu", "average pool", "attentional pool"):
        towers = fast(random_towers(tmp_path / case, case))
        for name, tower in (("image", towers.visual), ("text", towers.text)):
            tower.transformer.register_forward_hook(
                lambda _, __, output, key=(case, name): rows.update({key: output.shape[1]})
            )
        differentiate(towers)
    assert rows == {
        ("gelu", "image"): 1,
        ("gelu", "text"): 1,
        ("average pool", "image"): 17,
        ("average pool", "text"): 1,
        ("attentional pool", "image"): 17,
        ("attentional pool", "text"): 1,
    }


def test_towers_that_return_tokens_keep_the_last_block(plain: Towers) -> None:
    plain.visual.output_tokens = plain.text.output_tokens = True
    towers = fast(plain)
    images, tokens = torch.randn(2, 3, 32, 32), texts(plain, 3, 20)
    with torch.no_grad():
        for tower, expected, rows in ((towers.visual, plain.visual, images), (towers.text, plain.text, tokens)):
            for output, reference in zip(tower(rows), expected(rows), strict=True):
                assert distance(output, reference) < 1e-6


def test_copy_of_fast_towers_is_independent(plain: Towers) -> None:
    student = fast(plain)
    teacher = copy.deepcopy(student).eval()
    assert_equal_steps(teacher, plain)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert_equal_steps(teacher, plain)


def test_fast_towers_can_be_pickled(plain: Towers) -> None:
    content = io.BytesIO()
    torch.save(fast(plain), content)
    content.seek(0)
    assert_equal_steps(torch.load(content, weights_only=False), plain, num_texts=2, length=6)


class Adapter(nn.Module):
    """A wrapped linear layer, as adapters are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


def _wrap(owner: Callable[[Any], Any], name: str) -> Callable[[Any], None]:
    return lambda block: setattr(owner(block), name, Adapter(getattr(owner(block), name)))


CHANGED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "adapter": (_wrap(lambda block: block.mlp, "c_fc"), "resblocks.1.mlp.c_fc is Adapter"),
    "adapter of attention": (_wrap(lambda block: block.attn, "out_proj"), "attn.out_proj is Adapter"),
    "parametrization": (
        lambda block: parametrizations.weight_norm(block.mlp.c_proj),
        "resblocks.1.mlp.c_proj is ParametrizedLinear",
    ),
    "hook": (lambda block: block.ln_2.register_forward_hook(lambda *_: None), "hooks or another forward"),
    "pre-hook": (lambda block: block.mlp.gelu.register_forward_pre_hook(lambda *_: None), "hooks or another"),
    "forward": (lambda block: setattr(block, "forward", block.forward), "hooks or another forward"),
    "norm": (lambda block: setattr(block, "ln_1", nn.RMSNorm(32)), "resblocks.1.ln_1 is RMSNorm"),
    "bias of norm": (
        lambda block: setattr(block, "ln_1", LayerNorm(32, bias=False)),
        "layer norms have no weight and bias",
    ),
    "other layers": (lambda block: block.mlp.add_module("drop", nn.Dropout(0.1)), "mlp has other layers"),
    "more layers": (lambda block: block.add_module("adapter", nn.Linear(32, 32)), "resblocks.1.adapter is Linear"),
    "dropout": (lambda block: setattr(block.attn, "dropout", 0.1), "attention has dropout"),
    "attention": (
        lambda block: setattr(block, "attn", nn.MultiheadAttention(32, 2, add_bias_kv=True)),
        "attention has other parameters",
    ),
}


@pytest.mark.parametrize("change", CHANGED)
def test_changed_layers_are_never_ignored(plain: Towers, change: str) -> None:
    function, reason = CHANGED[change]
    function(plain.visual.transformer.resblocks[1])
    transformer = plain.visual.transformer
    line = install(plain)
    assert line.startswith("fast blocks: text tower; the image tower keeps its own (")
    assert reason in line
    assert plain.visual.transformer is transformer


def test_checkpointing_of_open_clip_is_not_ignored(plain: Towers) -> None:
    plain.visual.set_grad_checkpointing()
    assert "the image tower keeps its own (open_clip's grad_checkpointing is on;" in install(plain)


def test_unknown_activation_is_called_as_it_is(plain: Towers) -> None:
    for block in [*plain.visual.transformer.resblocks, *plain.text.transformer.resblocks]:
        block.mlp.gelu = nn.SiLU()
    assert_equal_steps(fast(plain), plain)


def flop(towers: Towers, images: int = 2) -> int:
    """FLOP of forward and backward of the image tower, on fake tensors."""
    rows = torch.empty(images, 3, *towers.preprocess.size)
    with FlopCounterMode(display=False) as counter:
        towers.encode_image(rows).sum().backward()
    towers.zero_grad(set_to_none=True)
    return counter.get_total_flops()


@pytest.mark.slow
def test_last_block_of_one_token_saves_flop_at_real_size() -> None:
    with fake_tensors():
        towers = create(ModelConfig(name="ViT-B-16-quickgelu", pretrained="openai"), weights=False).train()
        full, pooled = flop(towers), flop(fast(towers))
        recomputed = fast(towers)
        recompute_activations(recomputed)
        assert flop(recomputed) == pooled
        full_recomputation = fast(towers, defers=False)
        recompute_blocks(full_recomputation)
        ratio = flop(full_recomputation) / pooled
    assert 0.925 < pooled / full < 0.94
    assert 1.2 < ratio < 1.25


def saved_bytes(towers: Towers) -> int:
    """Bytes that a forward saves for the backward."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        differentiate(towers)
    return sum(saved.values())


def test_recomputation_of_fast_blocks(tmp_path: Path) -> None:
    plain = random_towers(tmp_path, "quickgelu")
    selective, full = fast(plain), fast(plain, defers=False)
    recompute_activations(selective)
    recompute_blocks(full)
    for towers in (selective, full):
        assert_equal_steps(towers, plain)
    sizes = [saved_bytes(towers) for towers in (full, selective, fast(plain))]
    assert sizes[0] < 0.7 * sizes[1] < 0.6 * sizes[2]


def test_blocks_compile_without_graph_break(tmp_path: Path) -> None:
    plain = random_towers(tmp_path, "quickgelu")
    towers = fast(plain)
    recompute_activations(towers)
    for tower, is_dynamic in ((towers.visual, False), (towers.text, True)):
        for block in tower.transformer.resblocks:
            assert isinstance(block, FastBlock)
            block.compile(backend="aot_eager", dynamic=is_dynamic, fullgraph=True)
    for length in (9, 20):
        assert_equal_steps(towers, plain, num_texts=length, length=length)
