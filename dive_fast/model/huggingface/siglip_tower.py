"""SigLIP's image tower at any size, as timm models whose names say everything about them.

open_clip builds SigLIP's image tower from a timm model by name. timm has names only for the published sizes, most
of them with another activation than transformers. :func:`register` adds the named model to timm's registry.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
from timm.layers import GELUTanh, QuickGELU
from timm.layers.norm import LayerNorm
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

PREFIX = "siglip_dive_fast_"
"""Prefix of the names of these models."""
ACTIVATIONS = {"gelu": nn.GELU, "gelu_pytorch_tanh": GELUTanh, "quick_gelu": QuickGELU}
"""Activation modules of timm by their names in transformers."""


@dataclass(frozen=True)
class ImageTower:
    """The hyper-parameters of SigLIP's image tower."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str
    """As in transformers, a key of :data:`ACTIVATIONS`."""
    epsilon: float

    @property
    def name(self) -> str:
        """timm's name if it has this tower, otherwise one that :func:`register` understands."""
        return next((name for name, tower in _published() if tower == self), self._own_name)

    @property
    def _own_name(self) -> str:
        # timm reads a tag behind a dot.
        epsilon = repr(self.epsilon).replace(".", "d").replace("-", "m")
        return (
            f"{PREFIX}i{self.image_size}_p{self.patch_size}_w{self.width}_l{self.layers}_h{self.heads}"
            f"_m{self.mlp_width}_e{epsilon}_{self.activation}"
        )

    def create(self, **_: Any) -> VisionTransformer:
        """Builds the tower; timm's other arguments are those of open_clip for every SigLIP."""
        return VisionTransformer(
            img_size=self.image_size,
            patch_size=self.patch_size,
            num_classes=0,
            global_pool="map",
            embed_dim=self.width,
            depth=self.layers,
            num_heads=self.heads,
            mlp_ratio=ratio(self.mlp_width, self.width),
            class_token=False,
            norm_layer=partial(LayerNorm, eps=self.epsilon),
            act_layer=ACTIVATIONS[self.activation],
        )


def ratio(mlp_width: int, width: int) -> float:
    """The MLP ratio from which timm and open_clip compute exactly this width of an MLP."""
    value = mlp_width / width
    return value if int(width * value) == mlp_width else (mlp_width + 0.5) / width


def register(name: str | None) -> None:
    """Adds the model of a name of :class:`ImageTower` to timm's registry; other names are left to timm.

    open_clip alone needs this call before it loads such a model.

    Raises:
        ValueError: the name begins like one of these, but is incomplete.
    """
    if name is None or not name.startswith(PREFIX) or timm.is_model(name):
        return
    number = r"([0-9]+)"
    pattern = (
        f"i{number}_p{number}_w{number}_l{number}_h{number}_m{number}_e([0-9dm+e]+)_({'|'.join(ACTIVATIONS)})"
    )
    match = re.fullmatch(pattern, name.removeprefix(PREFIX))
    if match is None:
        raise ValueError(f"vision_cfg.timm_model_name = {name} is incomplete")
    image_size, patch_size, width, layers, heads, mlp_width = map(int, match.groups()[:6])
    epsilon = float(match[7].replace("d", ".").replace("m", "-"))
    tower = ImageTower(image_size, patch_size, width, layers, heads, mlp_width, match[8], epsilon)

    def create(**arguments: Any) -> VisionTransformer:
        return tower.create(**arguments)

    create.__name__ = name
    register_model(create)


def read(trunk: Any) -> ImageTower:
    """The hyper-parameters of a timm model that is SigLIP's image tower.

    Raises:
        ValueError: it is another model; the message says why.
    """
    if not isinstance(trunk, VisionTransformer):
        raise ValueError(f"the image tower is timm's {type(trunk).__name__}, and transformers' SigLIP has a ViT")
    pool = trunk.attn_pool
    if trunk.global_pool != "map" or pool is None or pool.latent_len != 1 or pool.pos_embed is not None:
        raise ValueError("the image tower does not pool like SigLIP, by the attention of one latent")
    if trunk.has_class_token or trunk.num_reg_tokens or not isinstance(trunk.norm_pre, nn.Identity):
        raise ValueError("the image tower has a class token, registers or a first norm, unlike SigLIP")
    block = trunk.blocks[0]
    layer_scales, norms = (block.ls1, block.ls2), (block.attn.q_norm, block.attn.k_norm)
    if not all(isinstance(module, nn.Identity) for module in (*layer_scales, *norms, trunk.head)):
        raise ValueError("the image tower has layer scales, norms of queries or a classifier, unlike SigLIP")
    if len({*trunk.patch_embed.img_size}) > 1 or len({*trunk.patch_embed.patch_size}) > 1:
        raise ValueError("images or patches are not square")
    return ImageTower(
        trunk.patch_embed.img_size[0],
        trunk.patch_embed.patch_size[0],
        trunk.embed_dim,
        len(trunk.blocks),
        block.attn.num_heads,
        block.mlp.fc1.out_features,
        activation_name(block.mlp.act),
        trunk.norm.eps,
    )


def activation_name(module: nn.Module) -> str:
    """The name of an activation in transformers.

    Raises:
        ValueError: it has none here.
    """
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    for name, kind in ACTIVATIONS.items():
        if type(module).__name__ == kind.__name__:
            return name
    raise ValueError(f"the activation {type(module).__name__} has no counterpart")


_BASE, _LARGE, _SO400M, _GIANT = (
    (768, 12, 12, 3072),
    (1024, 24, 16, 4096),
    (1152, 27, 16, 4304),
    (1536, 40, 16, 6144),
)


def _published() -> list[tuple[str, ImageTower]]:
    """timm's names of the towers that compute the same as those of transformers, with GELU by tanh."""
    sizes = {
        "vit_base_patch32_siglip_256": (256, 32, *_BASE),
        "vit_large_patch16_siglip_512": (512, 16, *_LARGE),
        "vit_so400m_patch16_siglip_256": (256, 16, *_SO400M),
        "vit_so400m_patch16_siglip_384": (384, 16, *_SO400M),
        "vit_so400m_patch16_siglip_512": (512, 16, *_SO400M),
        "vit_giantopt_patch16_siglip_256": (256, 16, *_GIANT),
        "vit_giantopt_patch16_siglip_384": (384, 16, *_GIANT),
    }
    return [(name, ImageTower(*size, "gelu_pytorch_tanh", 1e-6)) for name, size in sizes.items()]
