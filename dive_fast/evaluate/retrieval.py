"""Image-text retrieval: whether an image finds its captions among all, and a caption its image."""

import torch
import torch.distributed as dist
from torch import Tensor

from dive_fast.data.loader import Options, batches_of
from dive_fast.data.prompts import Tokenizer, pack
from dive_fast.data.source import DataError
from dive_fast.evaluate.labelled import Captioned, CountedSamples, progress
from dive_fast.evaluate.scores import recall_at
from dive_fast.ranks import Ranks
from dive_fast.towers import Towers, unit

CUT_OFFS = (1, 5, 10)


@torch.no_grad()
def recalls(
    towers: Towers,
    tokenizer: Tokenizer,
    data: Captioned,
    ranks: Ranks,
    batch_size: int,
    options: Options,
    name: str = "",
) -> dict[str, float]:
    """``image_to_text_r1``, ``_r5``, ``_r10``: the share of images with one of their captions among the first K;
    ``text_to_image_...``: the share of captions with their image among them. All ranks call it.

    Raises:
        DataError: an image is broken.
    """
    captions = data.captions()
    texts = [text for own in captions for text in own]
    image_of = torch.tensor([image for image, own in enumerate(captions) for _ in own], device=ranks.device)
    samples = CountedSamples(data.source, towers.preprocess)
    images = torch.zeros(len(captions), towers.width, device=ranks.device)
    sentences = torch.zeros(len(texts), towers.width, device=ranks.device)
    own_images, own_texts = ranks.share(len(images)), ranks.share(len(texts))
    at = own_images.start
    total = len(own_images) + len(own_texts)
    with ranks.together(DataError), progress(ranks, total, name, "embedding") as bar:
        for batch in batches_of(samples, [(0, sample) for sample in own_images], batch_size, options):
            features = unit(towers.encode_image(batch.images.to(ranks.device)))
            images[at : at + len(features)] = features
            at += len(features)
            bar.update(len(features))
        for first in range(own_texts.start, own_texts.stop, batch_size):
            part = slice(first, min(first + batch_size, own_texts.stop))
            text = pack(tokenizer(texts[part]), towers.pooled_at).to(ranks.device)
            sentences[part] = unit(towers.encode_text(text.tokens, text.length))[text.index]
            bar.update(part.stop - part.start)
        if not bool(images.isfinite().all() and sentences.isfinite().all()):
            raise DataError(
                f"{name or 'the set'}: the features are not finite: the weights are broken, or overflow"
            )
    if ranks.group is not None:
        dist.all_reduce(images, group=ranks.group)
        dist.all_reduce(sentences, group=ranks.group)
    image_rows = torch.arange(len(images), device=ranks.device)
    found = {
        "image_to_text": _places(images, sentences, image_rows, image_of, batch_size, ranks),
        "text_to_image": _places(sentences, images, image_of, image_rows, batch_size, ranks),
    }
    return {
        f"{way}_r{cut_off}": share
        for way, places in found.items()
        for cut_off, share in zip(CUT_OFFS, recall_at(places, CUT_OFFS), strict=True)
    }


def _places(
    queries: Tensor, answers: Tensor, query_image: Tensor, answer_image: Tensor, block: int, ranks: Ranks
) -> Tensor:
    """For each query, how many wrong answers come before its best right one; ties count against it."""
    places = torch.zeros(len(queries), dtype=torch.int64, device=ranks.device)
    own = ranks.share(len(queries))
    for first in range(own.start, own.stop, block):
        part = slice(first, min(first + block, own.stop))
        similarity = queries[part] @ answers.T
        right = query_image[part, None] == answer_image[None]
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        places[part] = ((similarity >= best) & ~right).sum(1)
    if ranks.group is not None:
        dist.all_reduce(places, group=ranks.group)
    return places.cpu()
