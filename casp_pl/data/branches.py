"""Several conversations about one image (or the same ones) as one sample: they share the tokens up to its end.

With 64 to 2,880 image tokens and questions of a dozen, this makes most of the tokens text and most of them new.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from casp_pl.data.tokenize import IGNORE, Encoded

__all__ = ["join_branches", "positions"]


def join_branches(samples: Sequence[Encoded], image_token_id: int) -> list[Encoded]:
    """Samples of one image, those that agree up to and with the image joined into one each; nothing is lost.

    A joined sample is called by its first member and the number of the others, "id+3".
    """

    def start(sample: Encoded) -> tuple[int, ...]:
        end = len(sample) - sample.input_ids[::-1].index(image_token_id)
        return sample.input_ids[:end]

    if len(samples) == 1:
        return list(samples)

    groups = [(shared, list(members)) for shared, members in groupby(sorted(samples, key=start), key=start)]
    return [_join(members, len(shared)) for shared, members in groups]


def positions(branches: Sequence[int]) -> tuple[int, ...]:
    """Position of every token in its own conversation: (T,) of (T,)."""
    shared = branches.count(0)
    counts: dict[int, int] = {}
    result = []
    for branch in branches:
        place = counts.get(branch, shared if branch else 0)
        counts[branch] = place + 1
        result.append(place)
    return tuple(result)


def _join(members: Sequence[Encoded], shared: int) -> Encoded:
    first = members[0]
    if len(members) == 1:
        return first
    ids, labels, branches = first.input_ids[:shared], first.labels[:shared], (0,) * shared
    for number, member in enumerate(members, start=1):
        ids += member.input_ids[shared:]
        labels += (IGNORE, *member.labels[shared + 1 :])  # in front of it stands another branch, not the image
        branches += (number,) * (len(member) - shared)
    name = f"{first.id}+{len(members) - 1}"
    return replace(first, id=name, input_ids=ids, labels=labels, branches=branches)
