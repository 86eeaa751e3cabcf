"""KL divergence between two sets of logits that never exist as a whole.

A vocabulary is large (49,152 here, 32,064 in LLaVA-1.5): the logits of 2,048 tokens and what autograd keeps beside
them take gigabytes. The output head is frozen, so all that a training step needs is the gradient with respect to the
hidden states, and that can be had chunk by chunk in the forward pass.

Letters: N tokens, I hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["head_divergence", "head_divergence_reference"]


def head_divergence_reference(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """`head_divergence` written down directly, the oracle of its test."""
    target = F.log_softmax(teacher @ head.T, dim=-1)
    return F.kl_div(F.log_softmax(student @ head.T, dim=-1), target, log_target=True, reduction="batchmean")


def head_divergence(student: Tensor, teacher: Tensor, head: Tensor, *, chunk: int = 128) -> Tensor:
    """Mean over tokens of KL(softmax(teacher head^T) || softmax(student head^T)), in nats.

    The products are taken in autocast's type where that is on, the logarithms and the sum in float32 and more.

    Args:
        student: hidden states (N, I); the only argument that gets a gradient.
        teacher: hidden states (N, I).
        head: weight of the frozen output head (V, I).
        chunk: tokens whose logits exist at a time.
    """
    result: Tensor = _HeadDivergence.apply(student, teacher.detach(), head.detach(), chunk)  # type: ignore[no-untyped-call]
    return result


class _HeadDivergence(torch.autograd.Function):
    """d KL / d student = (softmax(student logits) - softmax(teacher logits)) head / N."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, chunk: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        student, teacher, head = _as_autocast_would(student, teacher, head)
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            target = F.log_softmax(teacher[rows] @ head.T, dim=-1, dtype=torch.float32)
            output = F.log_softmax(student[rows] @ head.T, dim=-1, dtype=torch.float32)
            weights = target.exp()
            total += target.sub_(output).mul_(weights).sum(dtype=torch.float64)  # autocast leaves these as they are
            if gradient is not None:
                gradient[rows] = output.exp_().sub_(weights).to(head.dtype) @ head
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(len(student)))
        return (total / max(1, len(student))).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None, None


def _as_autocast_would(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Once for all chunks: autocast would cast the head, which needs no gradient, again for every product."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
