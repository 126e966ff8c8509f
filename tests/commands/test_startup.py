"""What a command loads, and what it says meanwhile: a search in a process of its own."""

from __future__ import annotations

import ast
import subprocess
import sys

from seaborn import color_palette

from tests.launch import environment
from ttsnap_lib.style import COLORS

SEARCH = ["search", "a small red ring", "--adapters", "pocket", "--candidates", "2", "--steps", "2", "--out"]
# What has no place in one search with a CLIP reward; and what its table and its picture need, after the work.
UNUSED = (
    "open_clip", "ImageReward", "timm", "dask", "distributed", "numba", "xarray", "zarr", "seaborn", "ipywidgets",
    "IPython", "papermill", "torch._inductor.compile_fx", "transformers.models.blip.modeling_blip",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "ttsnap_lib.finetuning",
    "ttsnap_lib.scoring", "ttsnap_lib.simulation", "ttsnap_lib.tensors.tensor", "ttsnap_lib.trajectories",
)  # fmt: skip
LATE = ("pandas", "pyarrow", "matplotlib")
WATCHED = f"""
import sys
from ttsnap_lib.__main__ import main
lines, terminal = [], sys.stderr
class Watched:
    def write(self, text):
        if text.strip():
            names = ("torch", "diffusers", "transformers", *{LATE})
            lines.append((text.strip(), [name for name in names if name in sys.modules]))
    def flush(self):
        pass
sys.stderr = Watched()
status = main(sys.argv[1:])
said, unused = list(lines), [name for name in {UNUSED} if name in sys.modules]
lines.clear()
status += main([*sys.argv[1:-1], sys.argv[-1] + "-quiet", "--quiet"])
sys.stderr = terminal
print(repr((status, said, unused, lines)))
"""


def test_a_search_loads_what_it_needs_and_says_so_from_the_start_unless_it_is_to_be_quiet(tmp_path):
    command = [sys.executable, "-c", WATCHED, *SEARCH, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    status, lines, unused, quiet = ast.literal_eval(done.stdout.splitlines()[-1])
    assert status == 0 and unused == []
    said = [text for text, _ in lines if not text.startswith("candidate steps:")]
    assert said == [f"loading {what} ..." for what in ("torch, diffusers, transformers", "pocket-clip", "pocket-flux")]
    assert lines[0][1] == []  # said before anything heavy was imported
    assert [name for name in lines[len(said) - 1][1] if name in LATE] == []
    assert done.stderr == ""  # nothing of other libraries went past our stream
    assert quiet == [] and (tmp_path / "out-quiet" / "image.png").is_file()


def test_what_is_wrong_with_the_words_is_told_before_torch(tmp_path):
    bad = (
        "search cat --out o --candidates 0", "search cat --out o --candidates 3 --negtome 2",
        "search cat --out o --candidates 2 --steps 0", "search cat --out o --candidates 2 --batch-size 0",
        "search cat --out o --budget 1e-9 --cost pocket-flux+pocket-clip", "search cat --out o --budget 3 --cost none",
        "search cat --out o --candidates 2 --schedule '{steps: [19], keep_ratios: [0.5]}'",
        "search ' ' --out o --candidates 2", "search --prompts none.txt --out o --candidates 2",
    )  # fmt: skip
    code = f"""
import shlex, sys
from ttsnap_lib.__main__ import main
print([main(shlex.split(line)) for line in {bad}], "torch" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, check=True)
    assert done.stdout.split("\n")[0] == f"{[1] * len(bad)} False", done.stderr
    assert [line[:8] for line in done.stderr.splitlines()] == ["ttsnap: "] * len(bad)


def test_colours_are_seaborn_s():
    assert list(COLORS) == color_palette("colorblind").as_hex()
