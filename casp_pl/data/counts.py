"""What samples hold: images, and tokens of each kind."""

from collections.abc import Sequence

from casp_pl.data.tokenize import IGNORE, Encoded

__all__ = ["count_samples"]


def count_samples(samples: Sequence[Encoded]) -> dict[str, int]:
    """Samples, conversations about images, images, and tokens: of images, of text, and of these the counted ones.

    A token is counted that has a label: of an answer, or of a plain text (see `tokenize.Counted`).
    """
    with_images = [sample for sample in samples if sample.images]
    image_tokens = sum(sample.image_tokens for sample in samples)
    return {
        "samples": len(samples),
        "conversations": sum(max(sample.branches, default=1) for sample in with_images),
        "image_samples": len(with_images),
        "text_samples": len(samples) - len(with_images),
        "images": sum(len(sample.images) for sample in samples),
        "image_tokens": image_tokens,
        "text_tokens": sum(map(len, samples)) - image_tokens,
        "counted_tokens": sum(label != IGNORE for sample in samples for label in sample.labels),
    }
