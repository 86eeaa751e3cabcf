"""Whether a model can be computed with at all: every tensor has values, and every value is a number."""

from torch import Tensor, nn

from casp_pl.errors import InputError, NumericsError

__all__ = ["require_finite_weights", "require_materialized"]


def require_materialized(module: nn.Module, prefix: str = "") -> None:
    """Refuse tensors on the meta device: they have a shape and no values, and training on them is garbage.

    Args:
        module: a model or a part of it.
        prefix: what the names of a part begin with.

    Raises:
        InputError: the message names the first of them and how many there are.
    """
    named = [*module.named_parameters(), *module.named_buffers()]  # buffers that no file holds, too
    empty = [prefix + name for name, tensor in named if tensor.is_meta]
    if empty:
        raise InputError(
            f"{empty[0]} was never filled: it is on the meta device ({len(empty)} tensors in all).\n"
            "The checkpoint lacks it, or the model was built and not loaded."
        )


def require_finite_weights(model: nn.Module, prefix: str = "") -> None:
    """Refuse NaN and infinity in any tensor of a model, before anything is computed with it.

    Args:
        model: a model or a part of it.
        prefix: what the names of a part begin with.

    Raises:
        NumericsError: the message names the first such tensor, how many of its values are broken, and how many tensors.
        InputError: a tensor has no values at all.
    """
    require_materialized(model, prefix)
    broken: dict[str, tuple[int, int]] = {}
    for name, tensor in model.state_dict().items():
        if _is_tensor(tensor) and tensor.is_floating_point():
            count = tensor.numel() - int(tensor.isfinite().sum())
            if count:
                broken[prefix + name] = count, tensor.numel()
    if broken:
        name, (count, total) = next(iter(broken.items()))
        raise NumericsError(
            f"{name}: {count} of {total} weights are NaN or infinite ({len(broken)} such tensors in all).\n"
            "The checkpoint is broken: fetch or make it again."
        )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)  # a module may keep other things as its extra state
