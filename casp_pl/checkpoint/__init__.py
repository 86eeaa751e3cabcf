"""Files that survive kills, full disks and flipped bits: run directories, and models as Hugging Face directories."""

from casp_pl.checkpoint.atomic import write_bytes, write_json, write_safetensors, write_text
from casp_pl.checkpoint.directory import require_new
from casp_pl.checkpoint.hugging_face import load_compressed, save_compressed, save_plain
from casp_pl.checkpoint.reading import read_json, read_safetensors, sha256_of
from casp_pl.checkpoint.run_directory import RunDirectory
from casp_pl.checkpoint.streamed import save_streamed
from casp_pl.checkpoint.verify import verify

__all__ = [
    "RunDirectory",
    "load_compressed",
    "read_json",
    "read_safetensors",
    "require_new",
    "save_compressed",
    "save_plain",
    "save_streamed",
    "sha256_of",
    "verify",
    "write_bytes",
    "write_json",
    "write_safetensors",
    "write_text",
]
