"""Image-text retrieval: recall of captions by images, and of images by captions."""

import torch
import torch.distributed as dist
from torch import Tensor

from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.prompts import pack, warn_about_truncated_captions
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.evaluation_set import Captioned
from dive_fast.evaluation.datasets.strict_samples import BROKEN, StrictSamples, progress
from dive_fast.evaluation.scores import recall_at
from dive_fast.model.features import Pairs
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
    """Recall at 1, 5 and 10 in both directions; all ranks must call this.

    ``image_to_text_r1``, ``_r5`` and ``_r10`` are the shares of images with one of their captions among the first
    K, ``text_to_image_...`` the shares of captions with their image among the first K. Each distinct caption is
    encoded once, so equal captions of two images tie exactly. Ties are ranked in the order of the set, like
    CLIP-benchmark's K largest.

    Returns:
        The recalls, the number of images measured, and the number of samples left out for their broken images.

    Raises:
        DataError: an image is broken and the set does not accept that, or the features are not finite.
    """
    captions = data.captions()
    texts = list(dict.fromkeys(text for image_captions in captions for text in image_captions))
    row_of = {text: row for row, text in enumerate(texts)}
    if ranks.is_main:
        warn_about_truncated_captions(texts, tokenizer, name or "captions")
    samples = StrictSamples(data.source, towers.preprocess, 0, data.reports_skipped, data.remedy)
    images = torch.zeros(len(captions), towers.width, device=ranks.device)
    sentences = torch.zeros(len(texts), towers.width, device=ranks.device)
    broken = torch.zeros(len(captions), dtype=torch.int64, device=ranks.device)
    local_images, local_texts = ranks.local_range(len(images)), ranks.local_range(len(texts))
    row = local_images.start
    total = len(local_images) + len(local_texts)
    with ranks.raise_on_all(DataError), progress(ranks, total, name, "embedding") as bar:
        for batch in batches_of(samples, [(0, sample) for sample in local_images], batch_size, options):
            features = unit(towers.encode_image(batch.images.to(ranks.device)))
            images[row : row + len(features)] = features
            broken[row : row + len(features)] = (batch.labels == BROKEN).long()
            row += len(features)
            bar.update(len(features))
        for first in range(local_texts.start, local_texts.stop, batch_size):
            part = slice(first, min(first + batch_size, local_texts.stop))
            text = pack(tokenizer(texts[part]), towers.pooled_at).to(ranks.device)
            sentences[part] = unit(towers.encode_text(text.tokens, text.length))[text.index]
            bar.update(part.stop - part.start)
        if not bool(images.isfinite().all() and sentences.isfinite().all()):
            raise DataError(
                f"{name or 'the set'}: the features are not finite: weights are broken, or activations overflow"
            )
    if ranks.group is not None:
        for rows in (images, sentences, broken):
            dist.all_reduce(rows, group=ranks.group)
    kept = torch.nonzero(broken == 0).flatten().tolist()
    if not kept:
        raise DataError(f"{name or 'the set'}: none of its {len(captions)} images can be read")
    images, captions = images[kept], [captions[image] for image in kept]
    image_of = torch.tensor(
        [image for image, image_captions in enumerate(captions) for _ in image_captions], device=ranks.device
    )
    text_of = torch.tensor(
        [row_of[text] for image_captions in captions for text in image_captions], device=ranks.device
    )
    image_rows = torch.arange(len(images), device=ranks.device)
    positions = {
        "image_to_text": _positions(images, sentences, text_of, image_rows, image_of, batch_size, ranks),
        "text_to_image": _positions(
            sentences[text_of], images, image_rows, image_of, image_rows, batch_size, ranks
        ),
    }
    counts = data.num_samples or (1,) * len(broken)
    left_out = sum(count for count, is_broken in zip(counts, broken.tolist(), strict=True) if is_broken)
    shares = {
        f"{direction}_r{cut_off}": share
        for direction, rows in positions.items()
        for cut_off, share in zip(CUT_OFFS, recall_at(rows, CUT_OFFS), strict=True)
    }
    return shares, len(kept), left_out


def paired_recalls(pairs: Pairs, captions: Tensor, ranks: Ranks, block: int) -> dict[str, float]:
    """Recall at 1 among pairs in both directions; all ranks call it.

    Pairs of equal captions are right for each other. Ties are ranked in the order of the set.

    Args:
        pairs: unit rows ``(N, D)``.
        captions: ``(N,)``, the number of each pair's caption, counted from 0 by first occurrence.
        block: queries whose similarities are in memory at once.
    """
    first_row: dict[int, int] = {}
    for row, number in enumerate(captions.tolist()):
        first_row.setdefault(number, row)
    first = torch.tensor(list(first_row.values()), device=captions.device)
    # Equal captions get one embedding: rows of different batches may differ in their last bits.
    texts = pairs.text[first]
    each_text, each_image = (torch.arange(len(rows), device=captions.device) for rows in (texts, pairs.image))
    positions = {
        "image_to_text": _positions(pairs.image, texts, each_text, captions, each_text, block, ranks),
        "text_to_image": _positions(texts[captions], pairs.image, each_image, captions, captions, block, ranks),
    }
    return {f"{direction}_r1": recall_at(rows, (1,))[0] for direction, rows in positions.items()}


def _positions(
    queries: Tensor,
    rows: Tensor,
    row_of: Tensor,
    query_image: Tensor,
    answer_image: Tensor,
    block: int,
    ranks: Ranks,
) -> Tensor:
    """Number of wrong answers ``(Q,)`` ranked before each query's best right answer; ties in the order of the set.

    Args:
        queries: ``(Q, D)``
        rows: ``(R, D)``, embeddings of the distinct answers.
        row_of: ``(A,)``, the row of each answer.
        query_image, answer_image: ``(Q,)`` and ``(A,)``, the image or caption that each belongs to.
        block: queries whose similarities are in memory at once.
    """
    positions = torch.zeros(len(queries), dtype=torch.int64, device=ranks.device)
    order = torch.arange(len(row_of), device=ranks.device)
    local = ranks.local_range(len(queries))
    for first in range(local.start, local.stop, block):
        part = slice(first, min(first + block, local.stop))
        # Columns are copied, so equal answers have equal similarities whatever blocks the product uses.
        similarity = (queries[part] @ rows.T)[:, row_of]
        right = query_image[part, None] == answer_image[None]
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        first_best = (
            order.expand_as(right).masked_fill(~right | (similarity < best), len(order)).amin(1, keepdim=True)
        )
        ahead = (similarity > best) | ((similarity == best) & (order < first_best))
        positions[part] = (ahead & ~right).sum(1)
    if ranks.group is not None:
        dist.all_reduce(positions, group=ranks.group)
    return positions.cpu()
