"""Image-text retrieval: recall of captions by images, and of images by captions."""

import torch
from torch import Tensor

from dive_fast.data.loaders.loader import Options
from dive_fast.data.prompts import warn_about_truncated_captions
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.evaluation_set import Captioned
from dive_fast.evaluation.datasets.strict_samples import StrictSamples
from dive_fast.evaluation.image_features import check_finite, embed_images
from dive_fast.evaluation.ranking import rank
from dive_fast.evaluation.scores import recall_at
from dive_fast.evaluation.text_features import embed_texts
from dive_fast.model.features import Pairs
from dive_fast.model.towers import Towers

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
    images, is_broken = embed_images(towers, samples, range(len(captions)), ranks, batch_size, options, name)
    sentences = embed_texts(towers, tokenizer, texts, ranks)
    check_finite(sentences, name)
    kept = torch.nonzero(~is_broken).flatten().tolist()
    if not kept:
        raise DataError(f"{name or 'the set'}: none of its {len(captions)} images can be read")
    images, captions = images[kept], [captions[image] for image in kept]
    image_of = torch.tensor(
        [image for image, image_captions in enumerate(captions) for _ in image_captions], device=ranks.device
    )
    text_of = torch.tensor(
        [row_of[text] for image_captions in captions for text in image_captions], device=ranks.device
    )
    matches = image_of, torch.arange(len(image_of), device=ranks.device)
    of_images, of_captions = rank(images, sentences, text_of, matches, ranks)
    positions = {"image_to_text": of_images, "text_to_image": of_captions}
    counts = data.num_samples or (1,) * len(is_broken)
    left_out = sum(count for count, broken in zip(counts, is_broken.tolist(), strict=True) if broken)
    shares = {
        f"{direction}_r{cut_off}": share
        for direction, rows in positions.items()
        for cut_off, share in zip(CUT_OFFS, recall_at(rows, CUT_OFFS), strict=True)
    }
    return shares, len(kept), left_out


def paired_recalls(pairs: Pairs, captions: Tensor, ranks: Ranks) -> dict[str, float]:
    """Recall at 1 among pairs in both directions; all ranks call it.

    Pairs of equal captions are right for each other. Ties are ranked in the order of the set.

    Args:
        pairs: unit rows ``(N, D)``.
        captions: ``(N,)``, the number of each pair's caption, counted from 0 by first occurrence.
    """
    first_row: dict[int, int] = {}
    for row, number in enumerate(captions.tolist()):
        first_row.setdefault(number, row)
    first = torch.tensor(list(first_row.values()), device=captions.device)
    # Equal captions get one embedding: rows of different batches may differ in their last bits.
    texts = pairs.text[first]
    each_text, each_image = (torch.arange(len(rows), device=captions.device) for rows in (texts, pairs.image))
    of_images, of_texts = rank(pairs.image, texts, each_text, (each_image, captions), ranks)
    positions = {"image_to_text": of_images, "text_to_image": of_texts[captions.cpu()]}
    return {f"{direction}_r1": recall_at(rows, (1,))[0] for direction, rows in positions.items()}
