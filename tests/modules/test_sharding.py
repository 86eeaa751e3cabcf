"""A divided model gives what it gives whole, on two real processes of which only some see images, tiles or videos."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from casp_pl.models.families import FAMILIES

WITH_IMAGES = [name for name in FAMILIES if name.startswith("Llava")]

DRIVER = """
import copy, sys
from pathlib import Path
import torch, torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from casp_pl.data.collate import Collator
from casp_pl.data.sample import Sample, Turn
from casp_pl.data.selection import encode_conversations
from casp_pl.models import adapt
from casp_pl.models.families import build_family
from casp_pl.modules.end_to_end import final_states
from casp_pl.modules.sharding import Sharding, build_sharded
from casp_pl.pipeline.launch import leave
from casp_pl.quantizers import RTNQuantizer
from casp_pl.models.compress import round_to_nearest

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
mesh = init_device_mesh("cpu", (2,))

def sample(name, images, video):
    return Sample(name, (Turn("What is odd?", "It is number one."),), None, images, video)

def batches(processor, videos):
    "Of rank 0 and of rank 1, step by step."
    picture, frames = (folder / "wide.png",), tuple(folder / f"frame{number}.png" for number in range(4))
    encode = lambda *wanted: Collator(processor)(
        [one for each in wanted for one in encode_conversations([each], processor, 4096)[0]]
    )
    image, text = encode(sample("image", picture, 0)), encode(sample("text", (), 0))
    steps = [(image, text), (text, image), (text, text), (image, image)]
    if videos:
        video = encode(sample("video", frames, 4))
        both = encode(sample("image", picture, 0), sample("video", frames, 4))
        steps += [(video, text), (image, video), (both, image), (video, both), (text, both)]
    return steps

for name in NAMES:
    model, processor = build_family(name)
    adapter = adapt(model.requires_grad_(False))
    blocks = list(round_to_nearest(adapter, RTNQuantizer(group_size=8), 4))
    for wrapping in ("fsdp", "fsdp2"):
        student = build_sharded(adapter, Sharding(wrapping, lambda number: copy.deepcopy(blocks[number])), final_states,
                                mesh if wrapping == "fsdp2" else None, torch.device("cpu"))
        for number, pair in enumerate(batches(processor, "Video" in name or "Onevision" in name)):
            student.root(pair[rank]).square().mean().backward()
            with torch.no_grad(), adapter.with_blocks(blocks):
                expected = final_states(adapter, pair[rank])
            torch.testing.assert_close(student.root(pair[rank]), expected, rtol=1e-4, atol=1e-5,
                                       msg=lambda text: f"{name} {wrapping} step {number}: {text}")
leave(0)
"""


def test_each_process_may_see_what_the_others_do_not(
    start_together: Callable[..., list[subprocess.Popen[bytes]]], finish_together: Callable[..., None], tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (70, 23), "red").save(tmp_path / "wide.png")
    for number in range(4):
        Image.new("RGB", (24, 20), (60 * number, 0, 0)).save(tmp_path / f"frame{number}.png")
    processes = start_together(["-c", f"NAMES = {WITH_IMAGES}\n{DRIVER}", str(tmp_path)])
    finish_together(processes)
    assert [process.returncode for process in processes] == [0, 0], "each has compared every step with the whole model"
