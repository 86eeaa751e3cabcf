"""Train the demo's vision tower and projector on the training split of easy-VQA; the language model stays frozen.

    python scripts/train_demo_vision.py --out casp_pl/models/demo

With --resume an interrupted training goes on after the last epoch that was saved.

Two steps. (1) The tower learns shape and colour, taken from the answers of the training questions. (2) Tower and
projector learn to make the frozen language model answer: cross entropy on the answer tokens. All questions of an image
share one image prefix; a block-diagonal attention mask hides them from each other, so that each is trained as if asked
alone. The last 200 training images are held back for validation; the test split is never opened.

Shapes: B images, P prefix tokens, T tokens in all, Q questions of an image.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from casp_pl.data.sample import Sample
from casp_pl.data.sources.easy_vqa import load_easy_vqa
from casp_pl.models.demo.language import IMAGE_TOKEN, load_language_model
from casp_pl.models.demo.llava import build_llava, load_processor

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
HELD_BACK = 200
QUESTIONS = 6  # of an image at a visit
# how often a question is drawn: open ones are learned at once, yes or no about a shape takes the longest
KINDS = {"open": 0.3, "colour yes/no": 1.0, "shape yes/no": 3.0}
IGNORE = -100


def group_by_image(samples: list[Sample]) -> list[list[Sample]]:
    groups: dict[Path, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.image, []).append(sample)
    return list(groups.values())


def load_pixels(groups: list[list[Sample]], processor) -> Tensor:
    """(B, 3, 64, 64), normalised as the image processor does it."""
    images = [Image.open(group[0].image).convert("RGB") for group in groups]
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and shift the batch by up to 4 pixels."""
    flip = torch.rand(len(pixels), generator=generator) < 0.5
    pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
    dy, dx = torch.randint(0, 9, (2,), generator=generator).tolist()
    size = pixels.shape[-1]
    return F.pad(pixels, (4, 4, 4, 4), mode="replicate")[:, :, dy : dy + size, dx : dx + size]


def attribute_labels(groups: list[list[Sample]]) -> Tensor:
    """(B, 2): shape and colour as the training questions tell them, IGNORE where no question does."""
    labels = torch.full((len(groups), 2), IGNORE)
    for row, group in enumerate(groups):
        for sample in group:
            for column, names in enumerate((SHAPES, COLOURS)):
                question, answer = sample.turns[0].question, sample.turns[0].answer
                if answer in names:
                    labels[row, column] = names.index(answer)
                for name in names if answer in ("yes", "no") else ():
                    negated = " no " in question or " not " in question
                    if f" {name}" in question and (answer == "yes") != negated:
                        labels[row, column] = names.index(name)
    return labels


def pretrain_tower(tower: nn.Module, pixels: Tensor, labels: Tensor, epochs: int, generator: torch.Generator) -> float:
    """Teach shape and colour through two linear heads on the mean patch feature; returns the held-back accuracy."""
    heads = nn.Linear(tower.config.hidden_size, len(SHAPES) + len(COLOURS))
    steps = epochs * (len(pixels) - HELD_BACK) // 64
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1, pct_start=0.1)

    def scores(batch: Tensor) -> tuple[Tensor, Tensor]:
        features = tower(batch, output_hidden_states=True).hidden_states[-1][:, 1:].mean(1)
        return heads(features).float().split([len(SHAPES), len(COLOURS)], -1)

    for step in range(steps):
        rows = torch.randint(0, len(pixels) - HELD_BACK, (64,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            shape, colour = scores(augment(pixels[rows], generator))
        loss = F.cross_entropy(shape, labels[rows, 0], ignore_index=IGNORE)
        loss = loss + F.cross_entropy(colour, labels[rows, 1], ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"tower step {step}/{steps} loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        guesses = torch.stack([part.argmax(-1) for part in scores(pixels[-HELD_BACK:])], -1)
    known = labels[-HELD_BACK:] != IGNORE
    return (guesses == labels[-HELD_BACK:])[known].float().mean().item()


def pack(group: list[Sample], processor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One image's questions in one row: tokens, targets, positions and segments (0 the shared prefix), each (T,)."""
    tokens, targets, positions, segments = [], [], [], []
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    for number, sample in enumerate(group, 1):
        question, reply = sample.turns[0].question, sample.turns[0].answer
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        text = prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * 64)
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = processor.tokenizer(reply + "<|im_end|>", add_special_tokens=False)["input_ids"]
        split = len(ids) - ids[::-1].index(image_id)
        if number == 1:
            tokens, targets = ids[:split], [IGNORE] * split
            positions, segments = list(range(split)), [0] * split
        turn = ids[split:] + answer[:-1]
        tokens += turn
        targets += [IGNORE] * (len(ids) - split - 1) + answer
        positions += range(split, split + len(turn))
        segments += [number] * len(turn)
    return tuple(torch.tensor(part) for part in (tokens, targets, positions, segments))


def kind_of(sample: Sample) -> str:
    question, answer = sample.turns[0].question, sample.turns[0].answer
    if answer not in ("yes", "no"):
        return "open"
    return "colour yes/no" if any(f" {colour} " in question for colour in COLOURS) else "shape yes/no"


def batch_loss(model: nn.Module, pixels: Tensor, packed: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the answer tokens and the share of them that is predicted right."""
    pad = nn.utils.rnn.pad_sequence
    tokens, targets, positions, segments = (
        pad([row[part] for row in packed], batch_first=True, padding_value=value)
        for part, value in ((0, 2), (1, IGNORE), (2, 0), (3, -1))
    )
    same = segments[:, :, None] == segments[:, None, :]
    shared = (segments[:, None, :] == 0) & (segments[:, :, None] >= 0)
    order = torch.arange(tokens.shape[1])
    seen = ((same | shared) & (order[None, :] <= order[:, None]))[:, None]
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -30000.0)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        image = model.model.multi_modal_projector(hidden[:, 1:])
    embeddings = model.model.language_model.embed_tokens(tokens)
    is_image = tokens == model.config.image_token_id
    embeddings = embeddings.masked_scatter(is_image[..., None], image.to(embeddings.dtype))
    output = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    wanted = targets != IGNORE
    logits = model.lm_head(output[wanted]).float()
    return F.cross_entropy(logits, targets[wanted]), (logits.argmax(-1) == targets[wanted]).float().mean()


def train_through_language_model(
    model: nn.Module,
    pixels: Tensor,
    groups: list[list[Sample]],
    processor,
    epochs: int,
    batch: int,
    done: int,
    lr: float,
    generator: torch.Generator,
) -> Iterator[tuple[int, float]]:
    """Tower and projector through the frozen language model; yields step and held-back token accuracy every epoch.

    The first `done` of the epochs were run by an earlier process: the schedule starts behind them.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    rates = [lr, 0.3 * lr]
    groups_of = [
        {"params": part.parameters(), "lr": rate} for part, rate in zip((projector, tower), rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups_of, weight_decay=0.01, betas=(0.9, 0.98))
    train = len(groups) - HELD_BACK
    held_back = [pack(group, processor) for group in groups[train:]]
    steps = epochs * (train // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps + 1, pct_start=0.05)
    step = first = done * (train // batch)
    for _ in range(first):
        optimizer.step()  # without gradients it changes nothing; the schedule wants to follow a step
        schedule.step()
    start = time.time()

    def ask_some(group: list[Sample]) -> tuple[Tensor, ...]:
        weights = torch.tensor([KINDS[kind_of(sample)] for sample in group])
        chosen = torch.multinomial(weights, min(QUESTIONS, len(group)), generator=generator).tolist()
        return pack([group[number] for number in chosen], processor)

    for _ in range(done, epochs):
        for rows in torch.randperm(train, generator=generator)[: train // batch * batch].view(-1, batch):
            loss, right = batch_loss(model, augment(pixels[rows], generator), [ask_some(groups[row]) for row in rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*projector.parameters(), *tower.parameters()], 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 10 == 0:
                seconds = (time.time() - start) / (step - first)
                print(f"step {step}/{steps} loss {loss:.4f} right {right:.3f} {seconds:.2f} s/step", flush=True)
        with torch.no_grad():
            parts = [
                batch_loss(model, pixels[train + row :][:20], held_back[row : row + 20])[1]
                for row in range(0, HELD_BACK, 20)
            ]
        yield step, torch.stack(parts).mean().item()


def save(model: nn.Module, out: Path, record: dict) -> None:
    state = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in model.model.state_dict().items()
        if not name.startswith("language_model.")
    }
    save_file(state, out / "vision.safetensors")
    (out / "vision.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("casp_pl/models/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower_epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8, help="images a step, each with all its questions")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest rate of the projector; the tower has 0.3 of it")
    parser.add_argument("--resume", action="store_true", help="go on after the last epoch in --out")
    options = parser.parse_args()
    record = json.loads((options.out / "vision.json").read_text()) if options.resume else {}
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed + record.get("steps", 0))
    start = time.time()

    processor = load_processor()
    model = build_llava(load_language_model(), processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    model.requires_grad_(False)
    model.model.language_model.to(torch.bfloat16)
    model.model.language_model.set_attn_implementation("eager")  # its backward is twice as fast here as the fused one
    model.model.vision_tower.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)
    groups = group_by_image(load_easy_vqa("train"))
    pixels = load_pixels(groups, processor)

    command = f"python scripts/train_demo_vision.py {' '.join(sys.argv[1:])}"
    if options.resume:
        state = {name: value.float() for name, value in load_file(options.out / "vision.safetensors").items()}
        model.model.load_state_dict(state, strict=False)
        record["commands"].append(f"{command}  # after step {record['steps']}")
    else:
        labels = attribute_labels(groups)
        attributes = pretrain_tower(model.model.vision_tower, pixels, labels, options.tower_epochs, generator)
        print(f"tower: held-back accuracy of shape and colour {attributes:.4f}", flush=True)
        record = {
            "commands": [command],
            "data": f"easy-vqa 1.0, training split: {len(groups) - HELD_BACK} images, last {HELD_BACK} held back",
            "torch": torch.__version__,
            "held_back_attribute_accuracy": attributes,
        }
    earlier = record.get("seconds", 0)
    done = record.get("steps", 0) // ((len(groups) - HELD_BACK) // options.batch_size)
    for step, accuracy in train_through_language_model(
        model, pixels, groups, processor, options.epochs, options.batch_size, done, options.lr, generator
    ):
        seconds = earlier + round(time.time() - start)
        record |= {"steps": step, "held_back_token_accuracy": accuracy, "seconds": seconds}
        print(json.dumps(record), flush=True)
        save(model, options.out, record)


if __name__ == "__main__":
    main()
