"""Which samples are taken: spread over the images, seeded, and never one image on both sides of a split."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import chain, islice, zip_longest
from typing import TypeVar

import torch

from casp_pl.data.branches import join_branches
from casp_pl.data.images import ImageRefusedError, ImageSource
from casp_pl.data.sample import Sample
from casp_pl.data.skipped import Skipped
from casp_pl.data.tokenize import (
    Counted,
    Encoded,
    Processor,
    encode_sample,
    encode_windows,
    image_tokens_of,
    picture_token_id,
    truncate,
)
from casp_pl.errors import InputError

__all__ = [
    "choose_windows",
    "encode_conversations",
    "group_by_image",
    "hold_back",
    "join_overlapping",
    "shuffled",
    "some_images",
    "spread_over_images",
]

T = TypeVar("T")
S = TypeVar("S", Sample, Encoded)


def shuffled(items: Sequence[T], generator: torch.Generator) -> list[T]:
    """The items in random order."""
    return [items[number] for number in torch.randperm(len(items), generator=generator).tolist()]


def group_by_image(samples: Sequence[S]) -> list[list[S]]:
    """Samples of the same images together, in the order of their first samples; a sample without image is alone."""
    groups: dict[object, list[S]] = {}
    for sample in samples:
        groups.setdefault(sample.images or sample.id, []).append(sample)
    return list(groups.values())


def some_images(samples: Iterable[Sample], count: int, seed: int) -> list[Sample]:
    """All samples of `count` images, drawn with equal chances while the samples pass by, each of them held once.

    An image has a number that its name and the seed make, and the lowest numbers win. So whatever has lost is let go at
    once, and does not come back with a later sample.
    """
    kept: dict[object, list[Sample]] = {}
    highest_first: list[tuple[int, object]] = []
    for sample in samples:
        key = sample.images or sample.id
        if key in kept:
            kept[key].append(replace(sample, images=kept[key][0].images))
            continue
        kept[key] = [sample]
        heappush(highest_first, (-_drawn(sample, seed), key))
        if len(kept) > count:
            del kept[heappop(highest_first)[1]]
    return list(chain.from_iterable(kept.values()))


def _drawn(sample: Sample, seed: int) -> int:
    name = " ".join(map(str, sample.images)) or sample.id
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest())


def join_overlapping(groups: Sequence[Sequence[S]]) -> list[list[S]]:
    """Groups of `group_by_image` that have an image in common as one, at the place of the first of them."""
    place_of: dict[ImageSource, int] = {}
    joined: list[list[S]] = []
    for group in groups:
        images = group[0].images
        places = sorted({place_of[image] for image in images if image in place_of}) or [len(joined)]
        if places[0] == len(joined):
            joined.append([])
        for other in places[1:]:
            place_of.update({image: places[0] for sample in joined[other] for image in sample.images})
            joined[places[0]] += joined[other]
            joined[other] = []
        place_of.update(dict.fromkeys(images, places[0]))
        joined[places[0]] += group
    return [members for members in joined if members]


def spread_over_images(
    samples: Sequence[Sample], count: int, generator: torch.Generator, *, together: int = 1
) -> list[list[Sample]]:
    """`count` pieces of at most `together` samples of one image: a piece of every image before a second one of any.

    Raises:
        InputError: there are fewer than `count` pieces.
    """
    groups = shuffled([shuffled(group, generator) for group in group_by_image(samples)], generator)
    pieces = [[group[at : at + together] for at in range(0, len(group), together)] for group in groups]
    available = sum(map(len, pieces))
    if available < count:
        raise InputError(f"{count} image-text samples are wanted, the source has {available}: lower `samples`")
    rounds = chain.from_iterable(zip_longest(*pieces))
    return list(islice((piece for piece in rounds if piece is not None), count))


def hold_back(groups: Sequence[Sequence[T]], share: float) -> tuple[list[T], list[T]]:
    """(kept, held back): whole groups from the end are held back until they hold the share of all items.

    With a share above 0 at least one group is held back, and at least one is kept.
    """
    wanted = share * sum(len(group) for group in groups)
    border = len(groups)
    while border > 1 and sum(len(group) for group in groups[border:]) < wanted:
        border -= 1
    return list(chain.from_iterable(groups[:border])), list(chain.from_iterable(groups[border:]))


def encode_conversations(
    group: Sequence[Sample], processor: Processor, max_length: int, counted: Counted = "answers"
) -> tuple[list[Encoded], list[Skipped]]:
    """Tokenize the samples of the same image or images.

    Each is decoded once, to see that it can be and how many tokens it takes. Those that can share
    the image are joined (`join_branches`).
    """
    try:
        image_tokens = image_tokens_of(group[0], processor)
    except ImageRefusedError as error:
        return [], [Skipped(sample.id, str(error)) for sample in group]
    encoded, skipped = [], []
    for sample in group:
        whole = encode_sample(sample, processor, image_tokens=image_tokens, counted=counted)
        cut = truncate(whole, max_length, picture_token_id(processor, whole))
        if cut is None:
            images = ", or not all its images" if len(sample.images) > 1 else ""
            skipped.append(Skipped(sample.id, f"no answer within max_length = {max_length} tokens{images}"))
        else:
            encoded.append(cut)
    token = picture_token_id(processor, encoded[0]) if encoded else None
    return (encoded if token is None or not sum(image_tokens) else join_branches(encoded, token)), skipped


def choose_windows(
    texts: Iterable[Sample], processor: Processor, *, length: int, count: int, generator: torch.Generator
) -> list[Encoded]:
    """`count` random windows of `length` tokens out of the first 8 x `count` windows of the texts.

    Raises:
        InputError: the texts are too short.
    """
    windows = list(islice(encode_windows(texts, processor, length=length), 8 * count))
    if len(windows) < count:
        raise InputError(
            f"{count} text windows of {length} tokens are wanted, the text source has {len(windows)}\n"
            "Lower samples, text_ratio or text_length, or give a larger text source"
        )
    return shuffled(windows, generator)[:count]
