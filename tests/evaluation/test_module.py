import copy

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load, save

from casp_pl.data import EvaluationData, TextFiles
from casp_pl.data.sources import DataSource
from casp_pl.errors import InputError
from casp_pl.evaluation import ReferenceOutputs, evaluate_vqa
from casp_pl.evaluation.answers import normalise_answer
from casp_pl.modules.evaluation import EvaluationModule

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # lightning 2.6.6 on torch 2.13

WINDOW = 33


class Given(DataSource):
    def __init__(self, samples):
        self.samples = samples

    def rows(self, split, start=0):
        return iter(self.samples[start:])


@pytest.fixture
def data(tiny, questions, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, " * 10)
    data = EvaluationData(
        source=Given(questions), text_source=TextFiles(path=text, test_path=text), questions=None,
        text_tokens=5 * WINDOW, window=WINDOW, images_per_batch=3, windows_per_batch=2,
    )  # fmt: skip
    data.attach(tiny[1])
    return data


@pytest.fixture
def damaged(tiny):
    """The tiny model with other weights in its blocks; embeddings and lm_head are shared."""
    model = copy.deepcopy(tiny[0])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def run(model, data, processor, **settings):
    module = EvaluationModule(model, processor, **settings)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.test(module, datamodule=data, verbose=False)
    return module


def window_ids(data):
    return torch.cat([batch["input_ids"] for batch in data.test_dataloader()[-1]])


def test_figures_against_dense_computations(tiny, damaged, data, questions):
    original, processor = tiny
    reference = run(original, data, processor).outputs
    module = run(damaged, data, processor, reference=reference, chunk=50)
    figures = module.figures

    ids = window_ids(data)
    assert ids.shape == (5, WINDOW)
    with torch.no_grad():
        theirs, ours = (model(input_ids=ids).logits[:, :-1].double() for model in (original, damaged))
    nll = torch.nn.functional.cross_entropy(ours.flatten(0, 1), ids[:, 1:].flatten())
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    assert figures.perplexity == pytest.approx(nll.exp().item(), rel=1e-4)
    assert figures.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert figures.text_tokens == 5 * (WINDOW - 1)

    before, after = (evaluate_vqa(model, processor, questions) for model in (original, damaged))
    p, q = (original.lm_head(outputs.hidden).double().log_softmax(-1) for outputs in (before, after))
    assert figures.kl_answers == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    kept = [
        normalise_answer(mine) == normalise_answer(theirs)
        for mine, theirs in zip(after.predictions, before.predictions, strict=True)
    ]
    assert figures.flip_rate == pytest.approx(1 - sum(kept) / len(kept))
    assert 0 < sum(kept) < len(kept)
    assert figures.questions == len(questions)
    assert module.outputs.answers == tuple(after.predictions)
    assert figures.kl > 0.01
    assert figures.seconds > 0


def test_the_original_is_at_distance_zero_from_itself(tiny, data):
    reference = run(*tiny[:1], data, tiny[1]).outputs
    figures = run(tiny[0], data, tiny[1], reference=reference).figures
    assert (figures.flip_rate, figures.kl, figures.kl_answers) == (
        0,
        pytest.approx(0, abs=1e-9),
        pytest.approx(0, abs=1e-9),
    )


def test_without_reference_distances_are_none(tiny, data):
    figures = run(tiny[0], data, tiny[1]).figures
    assert (figures.kl, figures.kl_answers, figures.flip_rate) == (None, None, None)
    assert set(figures.to_dict()) >= {"vqa_accuracy", "vqa_interval", "perplexity", "seconds"}


def test_a_text_model_has_no_question_figures(tiny, data):
    from transformers import LlamaForCausalLM

    llava, processor = tiny
    text_model = LlamaForCausalLM(llava.config.text_config)
    state = {f"model.{name}": value for name, value in llava.model.language_model.state_dict().items()}
    text_model.load_state_dict(state | {"lm_head.weight": llava.lm_head.weight})
    expected = run(llava, data, processor).figures.perplexity
    data.attach(processor.tokenizer)
    figures = run(text_model.eval(), data, processor.tokenizer).figures
    assert (figures.vqa_accuracy, figures.vqa_interval, figures.vqa_accuracy_not_yes_no) == (None, None, None)
    assert figures.questions == 0
    assert figures.perplexity == pytest.approx(expected, rel=1e-5)


def test_compressed_weights_are_dense_only_meanwhile(tiny, data):
    from casp_pl.layers import QuantizedLinear
    from casp_pl.quantizers import RTNQuantizer

    model, processor = tiny
    layer = model.model.language_model.layers[0].mlp
    quantized = RTNQuantizer().quantize(layer.gate_proj.weight, torch.eye(48), bits=4)
    assert isinstance(quantized, QuantizedLinear)
    layer.gate_proj = quantized
    seen = []
    quantized.register_forward_hook(lambda module, inputs, output: seen.append(module.is_materialized))
    run(model, data, processor)
    assert set(seen) == {True}
    assert not quantized.is_materialized


def test_reference_survives_a_file(tiny, damaged, data):
    reference = run(tiny[0], data, tiny[1]).outputs
    tensors, metadata = reference.to_tensors()
    again = ReferenceOutputs.from_tensors(load(save(tensors, metadata)), metadata)
    assert (again.sample_ids, again.answers) == (reference.sample_ids, reference.answers)
    first = run(damaged, data, tiny[1], reference=reference).figures
    second = run(damaged, data, tiny[1], reference=again).figures
    assert (first.kl, first.kl_answers, first.flip_rate) == (second.kl, second.kl_answers, second.flip_rate)


def test_a_reference_of_other_data_is_refused(tiny, data, questions):
    reference = run(tiny[0], data, tiny[1]).outputs
    other = EvaluationData(source=Given(questions[1:]), questions=None, text_tokens=0)
    other.attach(tiny[1])
    with pytest.raises(InputError, match="other questions"):
        run(tiny[0], other, tiny[1], reference=reference)
    longer = EvaluationData(questions=0, text_tokens=192, window=64)
    longer.attach(tiny[1])
    with pytest.raises(InputError, match="text positions"):
        run(tiny[0], longer, tiny[1], reference=reference)
