import pytest
import torch

from casp_pl.data import Sample, load_image
from casp_pl.errors import InputError
from casp_pl.evaluation import evaluate_vqa
from casp_pl.evaluation.answers import is_yes_no, normalise_answer
from casp_pl.evaluation.vqa import answer_questions, decode_answers


def ask_alone(model, processor, sample, **settings):
    """Prompt, generated tokens and the first answer position's hidden state from transformers alone."""
    content = [{"type": "image"}, {"type": "text", "text": sample.turns[0].question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[load_image(sample.image)], text=[text], return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=6, **settings)
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    return tokens[0, inputs["input_ids"].shape[1] :].tolist(), hidden


def ends_that_stop_some(model, processor, samples):
    """End tokens that stop the answers at different steps."""
    rows = [ask_alone(model, processor, sample)[0] for sample in samples]
    return sorted({rows[0][0], rows[3][2], rows[-1][1]})


@pytest.mark.parametrize(("images_per_batch", "stops"), [(1, True), (3, True), (20, False)])
def test_answers_are_those_of_generate(tiny, questions, images_per_batch, stops):
    model, processor = tiny
    if stops:
        model.generation_config.eos_token_id = ends_that_stop_some(model, processor, questions)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    outputs = evaluate_vqa(model, processor, questions, images_per_batch=images_per_batch)
    assert outputs.sample_ids == [sample.id for sample in questions]
    lengths = set()
    for row, sample in enumerate(questions):
        tokens, hidden = ask_alone(model, processor, sample)
        lengths.add(len(tokens))
        expected = processor.tokenizer.decode(
            [token for token in tokens if token not in ends], skip_special_tokens=True
        )
        assert outputs.predictions[row] == expected.strip()
        torch.testing.assert_close(outputs.hidden[row], hidden, atol=1e-4, rtol=1e-4)
    assert len(lengths) > 1 or not stops


def test_tokens_are_those_of_generate(tiny, questions):
    from casp_pl.data.questions import QuestionCollator, encode_questions

    model, processor = tiny
    ends = model.generation_config.eos_token_id = ends_that_stop_some(model, processor, questions)
    groups, _ = encode_questions(questions, processor)
    answered = answer_questions(model, QuestionCollator(processor)(groups), max_new_tokens=6)
    for row, sample in zip(answered.tokens.tolist(), questions, strict=True):
        tokens, _ = ask_alone(model, processor, sample)
        assert row[: len(tokens)] == tokens
        assert set(row[len(tokens) :]) <= {tokens[-1]}
        assert tokens[-1] in ends or len(tokens) == 6


def test_the_image_goes_through_the_model_once(tiny, questions):
    model, processor = tiny
    seen = []
    model.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(len(output[0])))
    evaluate_vqa(model, processor, questions, images_per_batch=4)
    assert seen == [4, 3]


def test_samples_without_image_are_refused(tiny, questions):
    with pytest.raises(InputError, match="t: an evaluation question needs an image"):
        evaluate_vqa(*tiny, [*questions, Sample(id="t", text="text")])


def test_unreadable_images_are_too_many_here(tiny, questions):
    questions[3].image.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be used"):
        evaluate_vqa(*tiny, questions)


def test_decoding_stops_at_the_end_token(tiny):
    processor = tiny[1]
    ids = processor.tokenizer("yes<|im_end|>no")["input_ids"]
    assert decode_answers(torch.tensor([ids]), processor, [processor.tokenizer.eos_token_id]) == ["yes"]
    assert decode_answers(torch.tensor([ids]), processor, []) == ["yesno"]


@pytest.mark.parametrize(
    ("text", "normal"),
    [("Yes.", "yes"), (" A  circle!\n", "circle"), ("the red-ish one", "red ish one"), ("", ""), ("an", "")],
)
def test_answers_are_normalised(text, normal):
    assert normalise_answer(text) == normal


def test_yes_and_no():
    assert [is_yes_no(answer) for answer in ("yes", "No.", "red", "yes red")] == [True, True, False, False]
