"""Every supported class against transformers' own model: blocks one by one, images, tiles, frames, windows, saving."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from casp_pl import load_compressed
from casp_pl.checkpoint import save_compressed
from casp_pl.data.collate import Collator
from casp_pl.data.sample import Sample, Turn
from casp_pl.data.selection import encode_conversations
from casp_pl.data.tokenize import Encoded
from casp_pl.errors import ConfigError
from casp_pl.export.dense import to_dense
from casp_pl.models import ModelAdapter, adapt, load_model
from casp_pl.models.families import FAMILIES, build_family, write_family
from casp_pl.models.streams import first_block_batches, model_inputs, run_blocks
from casp_pl.models.surgery import round_to_storage
from casp_pl.quantizers import RTNQuantizer
from casp_pl.quantizers.low_rank import quantize_low_rank

WITH_IMAGES = [name for name in FAMILIES if name.startswith("Llava")]
WITH_VIDEO = ["LlavaNextVideoForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"]
SIZES = ((64, 64), (70, 23), (20, 61))  # width and height: square, wide and tall take different tiles


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """Name, model and processor of a class."""
    model, processor = build_family(request.param)
    return request.param, model.requires_grad_(False), processor


def _picture(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = torch.randint(
        0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(pixels.numpy())


def _samples(folder: Path, name: str, turns: int = 1) -> list[list[Sample]]:
    """Samples by image: three pictures of different shapes, a video of eleven frames where the class knows videos."""
    groups = []
    for number, size in enumerate(SIZES if name in WITH_IMAGES else ()):
        _picture(size, number).save(folder / f"{number}.png")
        groups.append(((folder / f"{number}.png",), 0))
    if name in WITH_VIDEO:
        frames = tuple(folder / f"frame{number}.png" for number in range(11))
        for number, frame in enumerate(frames):
            _picture((24, 20), 100 + number).save(frame)
        groups.append((frames, 8))
    if name not in WITH_IMAGES:
        groups = [((), 0)] * 2
    return [
        [
            Sample(
                f"{place}/{turn}",
                (Turn(f"What is {'so ' * turn}odd?", f"It is number {place + turn}."),),
                None,
                images,
                video,
            )
            for turn in range(turns)
        ]
        for place, (images, video) in enumerate(groups)
    ]


def _encoded(folder: Path, name: str, processor: Any, turns: int = 1) -> list[Encoded]:
    return [one for group in _samples(folder, name, turns) for one in encode_conversations(group, processor, 4096)[0]]


def _one_by_one(adapter: ModelAdapter, batch: dict[str, Any]) -> Tensor:
    """Logits of the blocks run one after another on what `first_block_batches` caught."""
    (stream,) = first_block_batches(adapter, [batch])
    for block in adapter.blocks:
        (stream,) = run_blocks(block, [stream])
    return adapter.head(adapter.decoder.norm(stream.hidden))


def test_blocks_one_by_one_give_the_logits_of_the_model(family: tuple[str, Any, Any], tmp_path: Path) -> None:
    name, model, processor = family
    batch = Collator(processor)(_encoded(tmp_path, name, processor))
    assert batch["input_ids"].shape[1] > 24, "longer than the sliding windows"
    expected = model(**model_inputs(batch)).logits
    actual = _one_by_one(adapt(model), batch)
    assert torch.equal(actual, expected), f"{(actual - expected).abs().max()}"


def test_all_tokens_of_pictures_are_image_tokens(family: tuple[str, Any, Any], tmp_path: Path) -> None:
    name, model, processor = family
    encoded = _encoded(tmp_path, name, processor)
    mask = adapt(model).image_mask(Collator(processor)(encoded)["input_ids"])
    assert mask.sum(1).tolist() == [sample.image_tokens for sample in encoded]
    if "Next" in name or "Onevision" in name:
        assert len({sample.image_tokens for sample in encoded}) >= 3, "tiles differ"


def test_windows_are_those_that_transformers_masks(family: tuple[str, Any, Any]) -> None:
    """A token 24 places back reaches the output of a block with a window of 24 tokens, one 25 places back does not."""
    name, model, _ = family
    adapter = adapt(model)
    ids = torch.arange(40)[None] + 40
    changed = ids.clone()
    changed[0, 3] = 99
    (before,), (after,) = (
        first_block_batches(adapter, [{"input_ids": i, "attention_mask": torch.ones_like(i)}]) for i in (ids, changed)
    )
    for number, block in enumerate(adapter.blocks):
        (one,), (other,) = run_blocks(block, [before]), run_blocks(block, [after])
        moved = (one.hidden != other.hidden).any(-1)[0].nonzero().flatten().tolist()
        window = adapter.window(number)
        assert moved == list(range(3, 40 if window is None else 3 + window))
    expected = {"MistralForCausalLM": [24, 24], "Qwen2ForCausalLM": [None, 24]}.get(name, [None, None])
    assert [adapter.window(number) for number in range(2)] == expected


def test_conversations_that_share_a_picture_are_as_if_alone(family: tuple[str, Any, Any], tmp_path: Path) -> None:
    name, model, processor = family
    if name not in WITH_IMAGES:
        pytest.skip("a text model has no pictures")
    adapter = adapt(model)
    joined = _encoded(tmp_path, name, processor, turns=3)
    assert all(len(set(sample.branches)) == 4 for sample in joined), "the start and three conversations"
    together = _one_by_one(adapter, Collator(processor)(joined))
    for row, group in enumerate(_samples(tmp_path, name, turns=3)):
        for number, sample in enumerate(group, start=1):
            ((alone,), _) = encode_conversations([sample], processor, 4096)
            logits = model(**model_inputs(Collator(processor)([alone]))).logits[0]
            places = [place for place, branch in enumerate(joined[row].branches) if branch in (0, number)]
            torch.testing.assert_close(together[row, places], logits, rtol=1e-4, atol=1e-4)


def test_short_windows_and_shared_pictures_are_refused() -> None:
    adapter = adapt(build_family("MistralForCausalLM")[0])
    batch = {"input_ids": torch.zeros(1, 25, dtype=torch.int64), "branches": torch.zeros(1, 25, dtype=torch.int64)}
    with pytest.raises(ConfigError, match=r"25 tokens, the model's sliding window holds 24") as caught:
        first_block_batches(adapter, [batch])
    assert "questions_per_image" in str(caught.value)


def _compressed(model: Any) -> Any:
    """A copy with low-rank W_q and W_k and all other linears rounded."""
    model = copy.deepcopy(model)
    adapter = adapt(model)
    quantizer = RTNQuantizer(group_size=8)
    for block in adapter.blocks:
        for name in adapter.linear_names:
            linear: Any = block.get_submodule(name)
            eye, settings = torch.eye(linear.in_features), {"bits": 4, "bias": linear.bias}
            if name in adapter.low_rank_names:
                layer: nn.Module = quantize_low_rank(linear.weight, eye, 9, quantizer, **settings)
            else:
                layer = quantizer.quantize(linear.weight, eye, **settings)
            block.set_submodule(name, layer)
    round_to_storage(model)
    return model.requires_grad_(False)


def test_compressed_blocks_are_their_dense_product(family: tuple[str, Any, Any], tmp_path: Path) -> None:
    """Biases, norms of queries and keys, rotary embeddings and grouped heads work on the low-rank product as ever."""
    name, model, processor = family
    batch = model_inputs(Collator(processor)(_encoded(tmp_path, name, processor)))
    compressed = _compressed(model)
    expected = copy.deepcopy(model)
    for block, other in zip(adapt(expected).blocks, adapt(compressed).blocks, strict=True):
        for linear in adapt(expected).linear_names:
            layer: Any = other.get_submodule(linear)
            block.get_submodule(linear).weight.copy_(layer.dequantize())  # their biases stay
    torch.testing.assert_close(compressed(**batch).logits, expected(**batch).logits, rtol=1e-4, atol=1e-4)
    assert (compressed(**batch).logits - model(**batch).logits).abs().max() > 1e-2
    to_dense(compressed)
    torch.testing.assert_close(compressed(**batch).logits, expected(**batch).logits, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_again(family: tuple[str, Any, Any], tmp_path: Path) -> None:
    name, model, processor = family
    batch = model_inputs(Collator(processor)(_encoded(tmp_path, name, processor)))
    compressed = _compressed(model)
    save_compressed(compressed, processor, tmp_path / "model", card="# A card\n")
    loaded, again = load_compressed(tmp_path / "model")
    assert type(loaded).__name__ == name
    assert torch.equal(loaded(**batch).logits, compressed(**batch).logits)
    before, after = (Collator(one)(_encoded(tmp_path, name, one)) for one in (processor, again))
    assert all(torch.equal(before[key], after[key]) for key in before if isinstance(before[key], Tensor))
    length = int(batch["attention_mask"][0].sum())
    first = {key: batch[key][:1, :length] for key in ("input_ids", "attention_mask")}
    first |= {key: batch[key][:1] for key in ("pixel_values", "image_sizes") if key in batch}
    tokens = loaded.generate(**first, max_new_tokens=2, do_sample=False)
    assert tokens[0, length] == compressed(**batch).logits[0, length - 1].argmax()


def test_read_from_a_directory(family: tuple[str, Any, Any], tmp_path: Path) -> None:
    name, model, processor = family
    write_family(name, tmp_path / "original")
    loaded, again = load_model(str(tmp_path / "original"))
    assert type(loaded).__name__ == name
    assert loaded.dtype == torch.float32
    batch = Collator(again)(_encoded(tmp_path, name, processor))
    assert torch.equal(loaded(**model_inputs(batch)).logits, model(**model_inputs(batch)).logits)
