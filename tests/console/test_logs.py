import os
import subprocess
import sys

SCRIPT = """
import logging, sys, warnings
from casp_pl.console import setup_logging
from tqdm.auto import tqdm
logging.getLogger("lightning").addHandler(logging.StreamHandler())  # as lightning does when it is imported
for verbose in (True, False):
    setup_logging(verbose=verbose)
    logging.getLogger("casp_pl.data").info("ours")
    logging.getLogger("casp_pl.data").warning("one sample skipped")
    logging.getLogger("lightning.pytorch").info("a note")
    logging.getLogger("lightning.pytorch").warning("a foreign warning")
    warnings.warn(f"The 'train_dataloader' does not have many workers ({verbose}).")
    warnings.warn(f"something new ({verbose})")
    list(tqdm(range(3), desc="a foreign bar"))
    print("-----", file=sys.stderr)
"""


def test_noise_is_shown_only_when_verbose():
    # a command that ran in this process may have set these for the processes that it starts
    quieting = ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM")
    fresh = {name: value for name, value in os.environ.items() if name not in quieting}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=fresh)
    assert done.stdout == ""
    verbose, quiet, _ = done.stderr.split("-----\n")
    assert all(
        text in verbose for text in ("casp_pl.data: ours", "a note", "workers", "something new", "a foreign bar")
    )
    assert quiet.splitlines()[:3] == ["ours", "warning: one sample skipped", "warning: a foreign warning"]
    assert quiet.count("a foreign warning") == 1
    assert "something new" in quiet
    assert not any(text in quiet for text in ("a note", "workers", "a foreign bar"))
