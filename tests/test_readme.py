"""Every Python block and every command of the README and the documentation is run, at pocket size where it is for a GPU."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest

from tests.conftest import ROOT
from tests.pages import PAGES, at_pocket_size, blocks, commands, given_words, make_world, name_of
from ttsnap_lib.__main__ import main, parser

README = PAGES[0]
TEXT = README.read_text("utf-8")
PYTHON = [(page, code) for page in PAGES for language, code in blocks(page) if language == "python"]
COMMANDS = [(page, command) for page in PAGES for command in commands(page)]
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page, code", PYTHON, ids=[name_of(page) for page, _ in PYTHON])
def test_python_blocks_run(page, code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {})  # noqa: S102 - our own page
    assert capsys.readouterr().out


def test_the_pages_have_commands():
    assert len(COMMANDS) > 60 and {name_of(page) for page, _ in COMMANDS} >= {"README.md", "docs/gpu.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page):
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_linked_files_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page, command", COMMANDS, ids=[f"{name_of(page)}: {text[:60]}" for page, text in COMMANDS])
def test_commands_are_ones_that_the_parser_takes(page, command, tmp_path):
    """As they stand in the page; a notebook's parameters are checked as well."""
    if command.startswith(("make ", "python ")):
        assert command.startswith("make ") or (ROOT / shlex.split(command)[1]).is_file() or " -m " in command
        return
    given = parser().parse_args(given_words(command))
    assert given.func
    if given.command == "run":
        from ttsnap_lib.runs.parameters import declared_parameters, from_text, read_notebook
        from ttsnap_lib.runs.run import find_notebook, plan

        declared = declared_parameters(read_notebook(find_notebook(given.notebook)))
        values = {name: from_text(text, declared.get(name)) for name, text in given.parameters}
        assert plan(given.notebook, values, folder=tmp_path).parameters
    for name in (getattr(given, "cost", None), *(v for k, v in getattr(given, "parameters", []) if k == "cost")):
        if name not in (None, "auto") and not name.endswith(".json"):
            from ttsnap_lib import CostModel

            assert CostModel.load(name)


def run_page(page, folder, monkeypatch, cluster=None):
    """Run the commands of a page in their order, in one folder."""
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(folder / "data_cache"))
    places = make_world(folder, page)
    monkeypatch.chdir(folder)
    for command in commands(page):
        if command.startswith("make "):
            continue
        if command.startswith("python "):
            words = [places.get(word, word) for word in shlex.split(command)[1:]]
            if words[0].endswith("make.py"):
                assert draw(words[1:], folder, monkeypatch) == 0, command
            continue
        words = at_pocket_size(command, places)
        if words[0] == "import-checkpoints":
            make_checkpoints(folder / "checkpoints")
        if words[0] in ("score", "finetune") and "trajectories" in words and not (folder / "trajectories").exists():
            assert main(["generate", "--prompts", "prompts.json", "--images", "8", "--out", "trajectories", "-q"]) == 0
        if "--scheduler" in words and words[0] == "sweep":
            words[words.index("--scheduler") + 1] = cluster()
        assert main(words) == 0, f"{command}\nas {shlex.join(words)}"


def make_checkpoints(folder):
    import torch

    from ttsnap_lib.rewards.loading import load_reward

    folder.mkdir()
    torch.save(load_reward("pocket-clip", device="cpu").module.state_dict(), folder / "Ct14.pt")


def figures_script():
    """Return docs/figures/make.py as a module."""
    spec = importlib.util.spec_from_file_location("figures_make", ROOT / "docs" / "figures" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(arguments, folder, monkeypatch):
    """Run docs/figures/make.py, its pictures into `folder`."""
    module = figures_script()
    target = folder / "docs" / "figures"
    target.mkdir(parents=True)
    monkeypatch.setattr(module, "HERE", target)
    done = module.main(arguments)
    assert list(target.glob("*.png"))
    return done


@pytest.fixture
def cluster():
    """Return a function that starts a Dask cluster of one worker and returns its address."""
    from distributed import LocalCluster

    started = []

    def start():
        started.append(LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None))
        return started[-1].scheduler_address

    yield start
    for one in started:
        one.close()


def test_readme_commands_run_in_order(tmp_path, monkeypatch, cluster):
    run_page(README, tmp_path, monkeypatch, cluster)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if commands(page)], ids=name_of)
def test_page_commands_run_in_order(page, tmp_path, monkeypatch, cluster):
    run_page(page, tmp_path, monkeypatch, cluster)


def test_numbers_of_the_readme_are_the_estimates(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from ttsnap_docs.estimates import Recording, _bytes, _time, hours

    from ttsnap_lib import CostModel

    flux, sdxl = Recording("flux-512", 512, 200, 200), Recording("sdxl-512", 512, 200, 200)
    shown = " ".join(TEXT.split())
    assert f"takes {CostModel.preset('flux-512+image_reward').total(1):.0f} TFLOPs" in shown
    assert f"{flux.image_tflops:.0f} TFLOPs with all 20 estimates" in shown
    assert f"{_time(hours(flux.tflops(), 'A100'))} on an A100 at 40% of its peak" in shown
    assert f"(SDXL: {_time(hours(sdxl.tflops(), 'A100'))})" in shown
    assert f"they fill {_bytes(flux.picture_bytes('png'))}" in shown
    assert f"a tensor of {_bytes(flux.tensor_bytes())}" in shown


def test_figures_that_the_pages_show_have_a_script(capsys):
    module = figures_script()
    made = {f"{notebook}-{figure}.png" for notebook, figures in module.NOTEBOOKS.items() for figure in figures}
    assert {path.name for path in module.HERE.glob("*.png")} == made | {"reward_against_budget.png"}
    shown = {name for page in PAGES for name in re.findall(r"figures/([\w-]+\.png)", page.read_text("utf-8"))}
    assert shown == made | {"reward_against_budget.png"}
    assert module.main(["published"]) == 1 and "--values FOLDER" in capsys.readouterr().err
