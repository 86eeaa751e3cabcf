"""Videos as images: folders of frames, and files that PyAV itself has written."""

import numpy as np
import pytest
from PIL import Image

from casp_pl.data import CalibrationData, LlavaJson, SampleStream, load_image
from casp_pl.data.images import ImageRefusedError
from casp_pl.data.video import video_frames
from casp_pl.errors import ConfigError, InputError


def level(image):
    return float(np.asarray(load_image(image)).mean())


@pytest.fixture
def folder(tmp_path):
    """Frames 1 to 12, each of its own grey, with a file that is no frame among them."""
    path = tmp_path / "clip"
    path.mkdir()
    for number in range(1, 13):
        Image.new("RGB", (8, 6), (20 * number,) * 3).save(path / f"frame{number}.png")
    (path / "notes.txt").write_text("no frame")
    return path


@pytest.fixture
def file(tmp_path):
    """Two seconds at 10 frames a second, ever brighter, with a key frame only every 10 frames."""
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 10
        for number in range(20):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (10 * number + 20,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_frames_of_a_folder_are_spread_in_the_order_of_their_numbers(folder):
    assert [frame.name for frame in video_frames(folder, 4)] == [f"frame{n}.png" for n in (2, 5, 8, 11)]
    assert [frame.name for frame in video_frames(folder, 99)] == [f"frame{n}.png" for n in range(1, 13)]
    assert [frame.name for frame in video_frames(folder, 1)] == ["frame7.png"]


def test_frames_of_a_file_are_those_of_their_times(file):
    av = pytest.importorskip("av")
    with av.open(str(file)) as container:
        every = {frame.time: np.asarray(frame.to_image()) for frame in container.decode(video=0)}
    frames = video_frames(file, 5)
    assert [round(frame.second, 6) for frame in frames] == [0.2, 0.6, 1.0, 1.4, 1.8]
    for frame in frames:
        expected = every[min(every, key=lambda time: abs(time - frame.second))]
        assert (np.asarray(load_image(frame)) == expected).all()
    assert len({hash(frame) for frame in frames}) == 5


def test_what_is_no_video_is_refused_with_its_path(tmp_path, file):
    (tmp_path / "none").mkdir()
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    for name, reason in (("none", "without frames"), ("absent.mp4", "no such video"), ("broken.mp4", "cannot be")):
        with pytest.raises(ImageRefusedError, match=reason) as caught:
            video_frames(tmp_path / name, 2)
        assert name in str(caught.value)
    frame = video_frames(file, 1)[0]
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ImageRefusedError, match=r"clip\.mp4@1\.000s: cannot be decoded"):
        load_image(frame)


def test_large_videos_are_refused_before_they_are_decoded(file, monkeypatch):
    monkeypatch.setattr("casp_pl.data.images.MAX_PIXELS", 3000)
    monkeypatch.setattr("casp_pl.data.images.refuse_too_large.__defaults__", (3000,))
    with pytest.raises(ImageRefusedError, match="64x48 pixels"):
        load_image(video_frames(file, 1)[0])


def test_without_pyav_files_are_refused_and_folders_are_not(folder, file, monkeypatch):
    monkeypatch.setattr("casp_pl.data.video.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'casp_pl\[video\]'") as caught:
        video_frames(file, 2)
    assert not isinstance(caught.value, ImageRefusedError), "that would only be skipped"
    assert len(video_frames(folder, 2)) == 2


def test_videos_in_conversations(llava_folder, folder, file, tmp_path, tiny):
    def talk(video, question):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "It grows."}]
        return {"video": video, "conversations": turns}

    rows = [talk("clip", "<video>\nWhat?"), talk("clip.mp4", "<image>\nWhat?"), *[talk("clip", "<video> Why?")] * 40]
    rows[5] = talk("gone.mp4", "<video>\nWhat?")
    source = LlavaJson(path=llava_folder[1](rows), image_folder=tmp_path, frames=3)
    stream = SampleStream(source)
    samples = list(stream)
    assert {len(sample.images) for sample in samples} == {3}
    assert samples[0].turns[0].question == "<image><image><image>\nWhat?"
    for sample in samples[:2]:
        greys = [level(image) for image in sample.images]
        assert greys == sorted(greys)
        assert greys[2] - greys[0] > 50
    assert [(entry.id, "no such video" in entry.reason) for entry in stream.skipped] == [("train.json#5", True)]
    data = CalibrationData(source=source, text_ratio=0, samples=2, holdout=0)
    data.attach(tiny[1])
    (batch,) = data.calibration_dataloader()
    assert batch["pixel_values"].shape == (6, 3, 32, 32)


@pytest.mark.parametrize(
    "row",
    [
        {"video": "clip", "image": "a.png"},
        {"video": 7},
        {"video": "clip", "question": "What?"},
        {"video": "clip", "question": "<video><image>What?"},
    ],
)
def test_bad_video_rows_are_named(llava_folder, row, tmp_path):
    question = row.pop("question", "<video>\nWhat?")
    row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": "It grows."}]
    (skipped,) = LlavaJson(path=llava_folder[1]([row]), image_folder=tmp_path).rows("train")
    assert skipped.id == "train.json#0"
    assert "train.json, row 0: a video goes with one <video> mark" in skipped.reason
    with pytest.raises(ConfigError, match="frames is 0"):
        LlavaJson(path=tmp_path, image_folder=tmp_path, frames=0)
