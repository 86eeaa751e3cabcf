"""The calibration pass: the original model over the calibration samples, statistics of every block on the way."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from casp_pl.errors import NumericsError
from casp_pl.linalg import GramSum, full_width_products, relative_proxy_loss, whitened_spectrum
from casp_pl.models.activations import Keep, in_memory
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.branches import visible_pairs
from casp_pl.models.streams import BlockBatch, first_block_batches, run_block
from casp_pl.modules.stage_module import StageModule
from casp_pl.modules.statistics import CalibrationStatistics
from casp_pl.processes import process_count, process_rank, sum_of_all
from casp_pl.quantizers import RTNQuantizer

__all__ = ["CalibrationModule"]


class CalibrationModule(StageModule):
    """Evaluation-loop pass that fills `statistics` (method A). Run it with `Trainer.validate(module)`.

    All batches go through a block before the next block is read: a step of the loop is one batch in one block, and of
    everything that is measured only the current block's is in memory.

    Args:
        adapter: the original model.
        batches: the calibration batches of this process, on its device.
        keep: keeps the inputs of the current block for all batches.
        sparsity_threshold: attention probabilities below it count as zero.
        sparsity_batches: batches on which attention is measured; these run with eager attention, which is slower.
        measure_rounding: also round every linear quickly and record its relative proxy loss (needed by the bit score
            `proxy_loss`; costs second moments of every linear's input).
        sensitivity: what was measured before (`linear_sensitivities`), to stand beside the rest.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        batches: Sequence[dict[str, Any]],
        *,
        keep: Keep = in_memory,
        sparsity_threshold: float = 1e-3,
        sparsity_batches: int = 4,
        measure_rounding: bool = False,
        sensitivity: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.batches = batches
        self.keep = keep
        self.sparsity_threshold = sparsity_threshold
        self.sparsity_batches = sparsity_batches
        self.measure_rounding = measure_rounding
        self.sensitivity = sensitivity or {}
        self.statistics: CalibrationStatistics | None = None
        self._block: Any = None

    def val_dataloader(self) -> DataLoader[Any]:
        """(block, batch) numbers, block by block."""
        numbers = list(product(range(len(self.adapter.blocks)), range(len(self.batches))))
        return DataLoader(numbers, batch_size=None)  # type: ignore[arg-type]  # a sequence is dataset enough

    def on_validation_start(self) -> None:
        """Empty sums."""
        count = len(self.adapter.blocks)
        self._states: list[BlockBatch] = []
        self._originals = self.adapter.originals()
        self._cosines = torch.zeros(count, dtype=torch.float64)
        heads = int(self.adapter.decoder.config.num_attention_heads)
        self._sparsity = torch.zeros(count, heads, 2, 2, 2, dtype=torch.float64)
        self._spectra: dict[str, Tensor] = {}
        self._rounding: dict[str, float] = {}
        self._counts = self._total = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, numbers: tuple[int, int], batch_idx: int) -> None:
        """One batch in one block; the hooks measure."""
        number, index = numbers
        with self._attention_of(index):
            if number == 0:
                self._states += first_block_batches(self.adapter, [self.batches[index]], keep=self.keep)
            if index == 0:
                self._begin_block(number)
            self._run(number, index)
        if index == len(self.batches) - 1:
            self._end_block(number)

    def on_validation_epoch_end(self) -> None:
        """Scores out of the sums over ranks."""
        cosines, sparsity = sum_of_all(self._cosines), sum_of_all(self._sparsity)
        tokens, image_tokens = self._total.tolist()
        self.statistics = CalibrationStatistics(
            block_influence=(1 - cosines / tokens).float(),
            spectra=self._spectra,
            attention_sparsity=(sparsity[..., 0] / sparsity[..., 1]).mean(1).float(),
            head_sparsity=(sparsity[..., 0] / sparsity[..., 1]).float(),
            rounding=self._rounding,
            sensitivity=self.sensitivity,
            tokens=int(tokens),
            image_tokens=int(image_tokens),
        )
        self._states, self._block = [], None

    @contextmanager
    def _attention_of(self, index: int) -> Iterator[None]:
        """Inside, the decoder computes attention so that its probabilities can be seen, if this batch's are wanted."""
        decoder = self.adapter.decoder
        self._watch_attention = index * process_count() + process_rank() < self.sparsity_batches
        before = decoder.config._attn_implementation
        decoder.set_attn_implementation("eager" if self._watch_attention else before)
        try:
            yield
        finally:
            decoder.set_attn_implementation(before)

    def _begin_block(self, number: int) -> None:
        self._block = None  # not two at a time
        self._block = next(self._originals)
        groups = self.adapter.linear_groups if self.measure_rounding else self.adapter.linear_groups[:1]
        self._moments: dict[str, GramSum] = {}
        self._handles = [
            self._block.get_submodule(group[0]).register_forward_pre_hook(self._linear_reads(group[0]))
            for group in groups
        ]
        self._handles.append(self._block.self_attn.register_forward_hook(self._attention_done(number)))

    def _run(self, number: int, index: int) -> None:
        state = self._states[index]
        self._real, self._image = state.real, state.image
        if self._watch_attention:
            self._visible = visible_pairs(self.batches[index], self.adapter.window(number))
        if number == 0:
            counts = [int(state.real.sum()), int(state.image.sum())]
            self._counts = self._counts + torch.tensor(counts, dtype=torch.float64)
        after = run_block(self._block, state)
        before = state.hidden.to(after.device)[state.real]
        cosines = nn.functional.cosine_similarity(before.float(), after[state.real].float(), dim=-1)
        self._cosines[number] += cosines.double().sum().cpu()
        self._states[index] = state.with_hidden(self.keep(after))

    def _end_block(self, number: int) -> None:
        """Spectra and rounding out of the moments of all ranks; then the block is done with."""
        for handle in self._handles:
            handle.remove()
        if number == 0:
            self._total = sum_of_all(self._counts)
        if not sum_of_all(self._cosines[number]).isfinite():
            self._refuse(f"output of block {number}")
        for group in self.adapter.linear_groups:
            total = self._moments.pop(group[0], None)
            if total is None:
                continue
            moment = total.narrow(self._mean)
            if not moment.isfinite().all():
                self._refuse(f"inputs of {self.adapter.full_name(number, group[0])}")
            for name in group:
                self._measure(self.adapter.full_name(number, name), name, moment)

    def _mean(self, total: Tensor) -> Tensor:
        """Of a sum over this process's tokens, the mean over those of all."""
        return sum_of_all(total).div_(self._total[0].to(total.device))

    def _refuse(self, place: str) -> NoReturn:
        """Some activation was NaN or infinite; `modules.finite.broken_samples` tells whose."""
        raise NumericsError(f"NaN or infinity in the {place} during calibration.")

    def _measure(self, full_name: str, name: str, moment: Tensor) -> None:
        weight: Tensor = self._block.get_submodule(name).weight.detach()
        with torch.autocast(moment.device.type, enabled=False):  # moments are too large for float16
            if name in self.adapter.low_rank_names:
                self._spectra[full_name] = whitened_spectrum(weight, moment).float()
            if self.measure_rounding:
                rounded = RTNQuantizer().quantize(weight, moment, bits=2).dequantize().detach()
                self._rounding[full_name] = float(relative_proxy_loss(weight, rounded, moment))

    def _attention_done(self, number: int) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if self._watch_attention and output[1] is not None:
                self._sparsity[number] += self._count_sparse(output[1], self._visible)

        return hook

    def _linear_reads(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][self._real].float()
            if name not in self._moments:
                self._moments[name] = GramSum(x.shape[1], x.device)
            # in fp32, whatever the model computes in
            with torch.autocast(x.device.type, enabled=False), full_width_products():
                self._moments[name].add(x)

        return hook

    def _count_sparse(self, probabilities: Tensor, visible: Tensor) -> Tensor:
        """(head, query modality, key modality, [below threshold, all]) over real tokens that see each other."""
        small = probabilities < self.sparsity_threshold
        result = torch.zeros(small.shape[1], 2, 2, 2, dtype=torch.float64)
        kinds = (self._real & ~self._image, self._image)
        for q, query in enumerate(kinds):
            for k, key in enumerate(kinds):
                pairs = query[:, :, None] & key[:, None, :] & visible
                result[:, q, k, 0] = (small & pairs[:, None]).sum((0, 2, 3)).cpu()
                result[:, q, k, 1] = pairs.sum().cpu()
        return result
