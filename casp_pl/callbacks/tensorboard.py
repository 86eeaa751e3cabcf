"""What a run shows in TensorBoard besides its losses: the plan, every linear, every stage, the pictures and examples.

Each function takes the `experiment` of a Lightning `TensorBoardLogger`. The step of a block's figure is its number.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from casp_pl.callbacks.pictures import png_bytes
from casp_pl.callbacks.report import BlockFigures, CompressionReport, Example, ModuleFigures, StageRow

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["log_blocks", "log_examples", "log_modules", "log_pictures", "log_report", "log_stage"]


def log_report(experiment: "SummaryWriter", report: CompressionReport, pictures: Mapping[str, Figure]) -> None:
    """Everything below but the stages, which `StageReport` shows as soon as each is measured."""
    log_modules(experiment, report.modules)
    log_blocks(experiment, report.blocks)
    log_examples(experiment, report.examples)
    log_pictures(experiment, pictures)


def log_stage(experiment: "SummaryWriter", row: StageRow, step: int) -> None:
    """Scalars stage/FIGURE at `step`, the stage's place in the run; what was not measured is left out."""
    figures = ("vqa_accuracy", "vqa_accuracy_not_yes_no", "perplexity", "kl", "kl_answers", "flip_rate")
    for figure in (*figures, "bits_per_weight_codes", "bits_per_weight_total", "model_bytes", "seconds"):
        value = getattr(row, figure)
        if value is not None:
            experiment.add_scalar(f"stage/{figure}", value, step)


def log_modules(experiment: "SummaryWriter", modules: Sequence[ModuleFigures]) -> None:
    """Scalars bits/LINEAR, rank/LINEAR, relative_proxy_loss/LINEAR over the blocks, and a histogram of all losses."""
    for module in modules:
        for figure in ("bits", "rank", "relative_proxy_loss"):
            value = getattr(module, figure)
            if value is not None:
                experiment.add_scalar(f"{figure}/{module.linear}", value, module.block)
    losses = [module.relative_proxy_loss for module in modules if module.relative_proxy_loss]
    if losses:
        decades = torch.tensor([math.log10(loss) for loss in losses])
        experiment.add_histogram("relative_proxy_loss/log10_of_all", decades)


def log_blocks(experiment: "SummaryWriter", blocks: Sequence[BlockFigures]) -> None:
    """Scalars score and attention_sparsity/QUERY_to_KEY over the blocks."""
    for block in blocks:
        if block.score is not None:
            experiment.add_scalar("score", block.score, block.block)
        for kind, share in block.attention_sparsity.items():
            if share is not None:
                experiment.add_scalar(f"attention_sparsity/{kind.replace(' ', '_')}", share, block.block)


def log_examples(experiment: "SummaryWriter", examples: Sequence[Example]) -> None:
    """The questions with all answers as text; the images come with the picture `examples`."""
    for step, example in enumerate(examples):
        lines = [f"**{example.question}**", f"original: {example.original}", f"compressed: {example.compressed}"]
        if example.reference is not None:
            lines.append(f"right: {example.reference}")
        experiment.add_text("examples", "\n\n".join(lines), step)


def log_pictures(experiment: "SummaryWriter", pictures: Mapping[str, Figure]) -> None:
    """Figures as images pictures/NAME."""
    for name, figure in pictures.items():
        with Image.open(io.BytesIO(png_bytes(figure))) as image:
            pixels = np.array(image.convert("RGB"))
        experiment.add_image(f"pictures/{name}", pixels, 0, dataformats="HWC")
