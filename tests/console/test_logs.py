import subprocess
import sys

SCRIPT = """
import logging, sys, warnings
from casp_pl.console import setup_logging
setup_logging(verbose=sys.argv[1] == "verbose")
logging.getLogger("lightning").addHandler(logging.StreamHandler())  # as lightning does when it is imported
logging.getLogger("casp_pl.data").info("ours")
logging.getLogger("casp_pl.data").warning("one sample skipped")
logging.getLogger("lightning.pytorch").info("a note")
logging.getLogger("lightning.pytorch").warning("a foreign warning")
warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.")
warnings.warn("something new")
from tqdm.auto import tqdm
list(tqdm(range(3), desc="a foreign bar"))
"""


def run(mode):
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr


def test_only_what_matters():
    text = run("quiet")
    assert text.count("a foreign warning") == 1
    assert text.splitlines()[:3] == ["ours", "warning: one sample skipped", "warning: a foreign warning"]
    assert "something new" in text
    assert "workers" not in text
    assert "a foreign bar" not in text


def test_verbose_shows_all():
    text = run("verbose")
    assert "casp_pl.data: ours" in text
    assert "a note" in text
    assert "workers" in text
    assert "a foreign bar" in text
