"""Image-text retrieval: whether an image finds its captions among all, and a caption its image."""

import torch
import torch.distributed as dist
from torch import Tensor

from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.prompts import Tokenizer, pack, warn_about_truncated_captions
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluate.datasets.evaluation_set import BROKEN, Captioned, StrictSamples, progress
from dive_fast.evaluate.scores import recall_at
from dive_fast.model.towers import Towers, unit

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
) -> tuple[dict[str, float], int, int]:
    """``image_to_text_r1``, ``_r5``, ``_r10``: the share of images with one of their captions among the first K;
    ``text_to_image_...``: the share of captions with their image among them. All ranks call it.

    Each distinct caption is encoded once, so that equal captions of two images tie exactly. Of answers that tie,
    the earlier ones of the set come first, as where CLIP-benchmark takes the K largest.

    Returns:
        The shares; how many images they are of; and how many samples were left out, because their images could not
        be read.

    Raises:
        DataError: an image is broken, and the set is to be measured whole.
    """
    captions = data.captions()
    distinct = {text: row for row, text in enumerate(dict.fromkeys(text for own in captions for text in own))}
    texts = list(distinct)
    if ranks.is_main:
        warn_about_truncated_captions(texts, tokenizer, name or "captions")
    samples = StrictSamples(data.source, towers.preprocess, 0, data.reports_skipped, data.remedy)
    images = torch.zeros(len(captions), towers.width, device=ranks.device)
    sentences = torch.zeros(len(texts), towers.width, device=ranks.device)
    broken = torch.zeros(len(captions), dtype=torch.int64, device=ranks.device)
    own_images, own_texts = ranks.local_range(len(images)), ranks.local_range(len(texts))
    at = own_images.start
    total = len(own_images) + len(own_texts)
    with ranks.raise_on_all(DataError), progress(ranks, total, name, "embedding") as bar:
        for batch in batches_of(samples, [(0, sample) for sample in own_images], batch_size, options):
            features = unit(towers.encode_image(batch.images.to(ranks.device)))
            images[at : at + len(features)] = features
            broken[at : at + len(features)] = (batch.labels == BROKEN).long()
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
        for rows in (images, sentences, broken):
            dist.all_reduce(rows, group=ranks.group)
    kept = torch.nonzero(broken == 0).flatten().tolist()
    if not kept:
        raise DataError(f"{name or 'the set'}: none of its {len(captions)} images can be read")
    images, captions = images[kept], [captions[image] for image in kept]
    image_of = torch.tensor([image for image, own in enumerate(captions) for _ in own], device=ranks.device)
    text_of = torch.tensor([distinct[text] for own in captions for text in own], device=ranks.device)
    image_rows = torch.arange(len(images), device=ranks.device)
    found = {
        "image_to_text": _places(images, sentences, text_of, image_rows, image_of, batch_size, ranks),
        "text_to_image": _places(sentences[text_of], images, image_rows, image_of, image_rows, batch_size, ranks),
    }
    counts = data.num_samples or (1,) * len(broken)
    left_out = sum(count for count, is_broken in zip(counts, broken.tolist(), strict=True) if is_broken)
    shares = {
        f"{way}_r{cut_off}": share
        for way, places in found.items()
        for cut_off, share in zip(CUT_OFFS, recall_at(places, CUT_OFFS), strict=True)
    }
    return shares, len(kept), left_out


def _places(
    queries: Tensor,
    rows: Tensor,
    row_of: Tensor,
    query_image: Tensor,
    answer_image: Tensor,
    block: int,
    ranks: Ranks,
) -> Tensor:
    """For each query, how many wrong answers come before its best right one; of answers that tie, the earlier do.

    Args:
        queries: ``(Q, D)``
        rows: ``(R, D)``: the distinct answers.
        row_of: ``(A,)``: which of these each answer is.
        query_image, answer_image: ``(Q,)`` and ``(A,)``: the image that each belongs to.
    """
    places = torch.zeros(len(queries), dtype=torch.int64, device=ranks.device)
    order = torch.arange(len(row_of), device=ranks.device)
    own = ranks.local_range(len(queries))
    for first in range(own.start, own.stop, block):
        part = slice(first, min(first + block, own.stop))
        # By column, so that equal answers have equal similarities whatever the matrix product's blocks.
        similarity = (queries[part] @ rows.T)[:, row_of]
        right = query_image[part, None] == answer_image[None]
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        first_best = (
            order.expand_as(right).masked_fill(~right | (similarity < best), len(order)).amin(1, keepdim=True)
        )
        ahead = (similarity > best) | ((similarity == best) & (order < first_best))
        places[part] = (ahead & ~right).sum(1)
    if ranks.group is not None:
        dist.all_reduce(places, group=ranks.group)
    return places.cpu()
