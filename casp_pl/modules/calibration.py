"""The calibration pass: the original model over the calibration samples, statistics of every block on the way."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from casp_pl.errors import NumericsError
from casp_pl.linalg import full_width_products, relative_proxy_loss, whitened_svd
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.branches import real_tokens, visible_pairs
from casp_pl.models.streams import model_inputs
from casp_pl.modules.statistics import CalibrationStatistics
from casp_pl.processes import process_count, process_rank, sum_of_all
from casp_pl.quantizers import RTNQuantizer

__all__ = ["CalibrationModule"]


class CalibrationModule(pl.LightningModule):
    """Evaluation-loop pass that fills `statistics` (method A). Run it with `Trainer.validate`.

    Args:
        adapter: the original model.
        sparsity_threshold: attention probabilities below it count as zero.
        sparsity_batches: batches on which attention is measured; these run with eager attention, which is slower.
        measure_rounding: also round every linear quickly and record its relative proxy loss (needed by the bit score
            `proxy_loss`; costs second moments of every linear's input).
        sensitivity: what was measured before (`linear_sensitivities`), to stand beside the rest.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        *,
        sparsity_threshold: float = 1e-3,
        sparsity_batches: int = 4,
        measure_rounding: bool = False,
        sensitivity: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.model = adapter.model
        self.sparsity_threshold = sparsity_threshold
        self.sparsity_batches = sparsity_batches
        self.measure_rounding = measure_rounding
        self.sensitivity = sensitivity or {}
        self.statistics: CalibrationStatistics | None = None

    def on_validation_start(self) -> None:
        """Empty sums, and hooks on every block."""
        count = len(self.adapter.blocks)
        self._moments: dict[str, Tensor] = {}
        self._cosines = torch.zeros(count, dtype=torch.float64)
        heads = int(self.adapter.decoder.config.num_attention_heads)
        self._sparsity = torch.zeros(count, heads, 2, 2, 2, dtype=torch.float64)
        self._tokens = self._image_tokens = 0
        self._handles = [handle for number in range(count) for handle in self._watch(number)]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch of the original model; the hooks do the rest."""
        self._real = real_tokens(batch)
        self._image = self.adapter.image_mask(batch["input_ids"]) & self._real
        windows = {self.adapter.window(number) for number in range(len(self.adapter.blocks))}
        self._visible = {window: visible_pairs(batch, window) for window in windows}
        self._tokens += int(self._real.sum())
        self._image_tokens += int(self._image.sum())
        self._watch_attention = batch_idx * process_count() + process_rank() < self.sparsity_batches
        before = self.adapter.decoder.config._attn_implementation
        self.adapter.decoder.set_attn_implementation("eager" if self._watch_attention else before)
        try:
            # the decoder's output is enough: logits of every token would cost a quarter more
            inputs = model_inputs(batch, self.model.dtype, self.adapter.shortest_window)
            getattr(self.model, "model", self.model)(**inputs, use_cache=False)
        finally:
            self.adapter.decoder.set_attn_implementation(before)

    def on_validation_epoch_end(self) -> None:
        """Sum over ranks, then spectra and scores.

        Raises:
            NumericsError: some activation was NaN or infinite; `modules.finite.broken_samples` tells whose.
        """
        for handle in self._handles:
            handle.remove()
        counts = torch.tensor([self._tokens, self._image_tokens], dtype=torch.float64)
        sums, cosines, sparsity = (sum_of_all(value) for value in (counts, self._cosines, self._sparsity))
        moments = {name: (sum_of_all(value) / sums[0]).float() for name, value in self._moments.items()}
        bad = [f"inputs of {name}" for name, value in moments.items() if not value.isfinite().all()]
        bad += [f"output of block {number}" for number in (~cosines.isfinite()).nonzero().flatten().tolist()]
        if bad:
            raise NumericsError(f"NaN or infinity in the {bad[0]} during calibration ({len(bad)} places in all).")
        low_rank = {self.adapter.full_name(b, n) for b in range(len(cosines)) for n in self.adapter.low_rank_names}
        weights = {name: self._weight(name) for name in self._names()}
        self.statistics = CalibrationStatistics(
            block_influence=(1 - cosines / sums[0]).float(),
            spectra={n: whitened_svd(weights[n], moments[self._source(n)]).S.float() for n in weights if n in low_rank},
            attention_sparsity=(sparsity[..., 0] / sparsity[..., 1]).mean(1).float(),
            head_sparsity=(sparsity[..., 0] / sparsity[..., 1]).float(),
            rounding=self._rounding(weights, moments) if self.measure_rounding else {},
            sensitivity=self.sensitivity,
            tokens=int(sums[0]),
            image_tokens=int(sums[1]),
        )
        self._moments = {}

    def _watch(self, number: int) -> list[Any]:
        block: Any = self.adapter.blocks[number]

        def block_done(_: nn.Module, inputs: Any, keywords: dict[str, Any], output: Any) -> None:
            before = (inputs[0] if inputs else keywords["hidden_states"])[self._real]
            after = (output[0] if isinstance(output, tuple) else output)[self._real]
            cosines = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            self._cosines[number] += cosines.double().sum()

        def attention_done(_: nn.Module, inputs: Any, output: Any) -> None:
            if self._watch_attention and output[1] is not None:
                self._sparsity[number] += self._count_sparse(output[1], self._visible[self.adapter.window(number)])

        def linear_reads(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0][self._real].float()
                # in fp32, whatever the model computes in
                with torch.autocast(x.device.type, enabled=False), full_width_products():
                    self._moments[name] = self._moments.get(name, 0) + (x.T @ x).double()  # see `collect_moments`

            return hook

        groups = self.adapter.linear_groups if self.measure_rounding else self.adapter.linear_groups[:1]
        handles = [
            block.get_submodule(group[0]).register_forward_pre_hook(
                linear_reads(self.adapter.full_name(number, group[0]))
            )
            for group in groups
        ]
        handles.append(block.register_forward_hook(block_done, with_kwargs=True))
        handles.append(block.self_attn.register_forward_hook(attention_done))
        return handles

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

    def _names(self) -> list[str]:
        numbers = range(len(self.adapter.blocks))
        return [self.adapter.full_name(number, name) for number in numbers for name in self.adapter.linear_names]

    def _weight(self, name: str) -> Tensor:
        linear: Any = self.model.get_submodule(name)
        weight: Tensor = linear.weight.detach()
        return weight

    def _source(self, name: str) -> str:
        """The linear whose input was recorded for `name`: the first of its group."""
        for group in self.adapter.linear_groups:
            for member in group:
                if name.endswith("." + member):
                    return name.removesuffix(member) + group[0]
        raise KeyError(name)

    def _rounding(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, float]:
        quantizer, result = RTNQuantizer(), {}
        for name, weight in weights.items():
            moment = moments[self._source(name)]
            rounded = quantizer.quantize(weight, moment, bits=2).dequantize().detach()
            result[name] = float(relative_proxy_loss(weight, rounded, moment))
        return result
