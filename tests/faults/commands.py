"""The commands of the drill: how each is called, what of its result is compared, and which pieces it keeps."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from PIL import Image

from tests.faults.drill import Ended, Started, start, start_program
from ttsnap_lib.tensors.tensor import open_rewards
from ttsnap_lib.trajectories.read import verify

STEPS, IMAGES, PROMPTS = 4, 2, 30  # a shard of scores owns 25 prompts, so there are two
TIMES = {"elapsed_s", "denoise_s", "decode_s", "score_s", "text_s"}
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "tiny.ipynb"


def _bytes(folder: Path, pattern: str) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def without_times(content: Any) -> Any:
    """Return plain JSON content without how long things took."""
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in TIMES}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def _json(path: Path) -> Any:
    return without_times(json.loads(path.read_text("utf-8")))


def _table(path: Path) -> str:
    frame = pd.read_csv(path)
    return frame.drop(columns=[name for name in frame if name in TIMES]).to_csv(index=False)


def _leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*") if path.suffix in (".part", ".old")]


@dataclass(frozen=True)
class Command:
    """A command of the drill.

    Attributes
    ----------
    words : callable
        ``words(world, out, shard)``: the command line.
    result : callable
        ``result(out)``: what must equal the undisturbed result, as a mapping.
    pieces : callable
        ``pieces(out)``: finished pieces that a later sitting must keep, each with a mark that changes when it is made
        again.
    made : callable or None
        ``made(said)``: how many pieces a sitting says it made, None for a sitting that says that nothing is left to do;
        None for a command that never says a number.
    compared : str
        What is compared, in words; and what is not, and why.
    """

    name: str
    words: Callable[[World, Path, str | None], list[object]]
    result: Callable[[Path], dict[str, Any]]
    pieces: Callable[[Path], dict[str, Any]]
    made: Callable[[str], int | None] | None
    compared: str
    shards: bool = False


class World:
    """The inputs of all commands, made once by undisturbed commands, and the undisturbed results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {"TTSNAP_DATA_CACHE": str(folder / "cache"), "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
        self._undisturbed: dict[str, tuple[Path, dict[str, Any], dict[str, Any], float]] = {}
        self._numbers = 0
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell gives it to what runs in the background
            signal.signal(signal.SIGINT, signal.default_int_handler)
        start(["--version"], folder / "first.said").end()  # the imports of the fork server are no part of a run
        (folder / "finetune.yaml").write_text(
            yaml.safe_dump({"reward": "pocket-clip", "steps": [2, 0], "batch_size": 16, "group_size": 2,
                            "epochs_per_step": 1, "save_every": 1, "validation_prompts": 5})
        )  # fmt: skip
        prompts = [f"a {color} {shape}" for color in ("red", "blue", "green", "white") for shape in ("ring", "star")]
        (folder / "prompts.txt").write_text("\n".join(prompts))
        (folder / "sweep.yaml").write_text(
            yaml.safe_dump({"notebook": str(NOTEBOOK), "parameters": {"label": "drill"}, "grid": {"x": [1, 2, 3, 4]}})
        )

    def new(self, name: str) -> Path:
        """Return a new empty folder."""
        self._numbers += 1
        path = self.folder / f"{self._numbers:04d}-{name}"
        path.mkdir()
        return path

    @property
    def trajectories(self) -> Path:
        """Undisturbed trajectories."""
        return self.undisturbed(COMMANDS["generate"])[0] / "out"

    @property
    def sweep(self) -> Path:
        """The folder of an undisturbed sweep."""
        return self.undisturbed(COMMANDS["sweep"])[0] / "out"

    def start(self, command: Command, place: Path, *, shard: str | None = None, program: bool = False,
              **options: Any) -> Started:  # fmt: skip
        """Start `command` with its output in ``place/out``."""
        begin = start_program if program else start
        environment = {**self.environment, **options.pop("environment", {})}
        self._numbers += 1
        said = self.folder / f"{self._numbers:04d}.said"
        return begin(command.words(self, place / "out", shard), said, environment, **options)

    def run(self, command: Command, place: Path, **options: Any) -> Ended:
        """Run `command` to its end, which must be a good one."""
        ended = self.start(command, place, **options).end()
        assert ended.code == 0, f"{command.name} ended with {ended.code}: {ended.said[-3000:]}"
        return ended

    def moment(self, command: Command, chance: random.Random, low: float = 0.0) -> float:
        """Return a random moment of a run, in seconds of work, from the share `low` of it on."""
        return chance.uniform(low, 1.0) * self.undisturbed(command)[3]

    def undisturbed(self, command: Command) -> tuple[Path, dict[str, Any], dict[str, Any], float]:
        """Return place, result, pieces and seconds of work of an undisturbed run."""
        if command.name not in self._undisturbed:
            place = self.new(f"undisturbed-{command.name}")
            work_s = self.run(command, place).work_s
            result, pieces = command.result(place / "out"), command.pieces(place / "out")
            self._undisturbed[command.name] = (place, result, pieces, work_s)
        return self._undisturbed[command.name]

    def resumed(self, command: Command, place: Path, **options: Any) -> int:
        """Take up `command` in `place`, hold it to the undisturbed result, and return how many pieces it found.

        No finished piece may be made again, and no half-written file may be left.
        """
        out = place / "out"
        before = command.pieces(out)
        ended = self.run(command, place, **options)
        _, result, pieces, _ = self.undisturbed(command)
        after = command.pieces(out)
        again = [name for name, mark in before.items() if after.get(name) != mark]
        assert not again, f"{command.name} made again what was there: {again}"
        if command.made is not None:
            made = command.made(ended.said) or 0
            assert made == len(pieces) - len(before), (command.name, made, len(before), ended.said)
        found = command.result(out)
        different = sorted(key for key in result.keys() | found.keys() if result.get(key) != found.get(key))
        assert not different, f"{command.name} in {out} differs from the undisturbed result in {different[:10]}"
        assert not _leftovers(place), _leftovers(place)
        return len(before)

    def remove(self, place: Path) -> None:
        """Remove a place, so that a long drill does not fill the disk itself."""
        shutil.rmtree(place, ignore_errors=True)


# -- generate ----------------------------------------------------------------------------------------------------------


def _generate(world: World, out: Path, shard: str | None) -> list[object]:
    words = ["generate", "--model", "pocket-flux", "--prompts", f"pocket:test:{PROMPTS}", "--images", IMAGES, "--steps",
             STEPS, "--batch-size", 4, "--threads", 1, "--device", "cpu", "-q", "--out", out]  # fmt: skip
    return [*words, *(["--shard", shard] if shard else [])]


def _inline(world: World, out: Path, shard: str | None) -> list[object]:
    words = _generate(world, out, shard)
    words[words.index("--out")] = "--score"
    return [*words, "--reward", "pocket-clip"]


def _generate_result(out: Path) -> dict[str, Any]:
    manifest = _json(out / "manifest.json")
    del manifest["provenance"]  # who wrote, and when
    report = verify(out)
    return {**_bytes(out, "p*/id*/*"), "manifest": manifest, "findings": [str(found) for found in report.findings]}


def _generate_pieces(out: Path) -> dict[str, Any]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.glob("p*/id*/s00.png")}


def _number(pattern: str, per: int = 1) -> Callable[[str], int | None]:
    def made(said: str) -> int | None:
        found = re.search(pattern, said)
        return int(found[1]) // per if found else None

    return made


# -- score -------------------------------------------------------------------------------------------------------------


def _score(world: World, out: Path, shard: str | None) -> list[object]:
    words = ["score", world.trajectories, "--reward", "pocket-clip", "--device", "cpu", "-q", "--out", out]
    return [*words, *(["--shard", shard] if shard else [])]


def _score_pieces(out: Path) -> dict[str, Any]:
    if not out.exists():
        return {}
    dataset = open_rewards(out)
    whole = ~(dataset["base"].isnull() | dataset["noise_aware"].isnull()).any(("reward", "image", "step")).values
    return {f"prompt {k}": True for k in range(len(whole)) if whole[k]}


# -- finetune ----------------------------------------------------------------------------------------------------------


def _finetune(world: World, out: Path, shard: str | None) -> list[object]:
    return ["finetune", "--config", world.folder / "finetune.yaml", "--trajectories", world.trajectories, "--device", "cpu",
            "-q", "--out", out]  # fmt: skip


def _finetune_result(out: Path) -> dict[str, Any]:
    whole = {name: _json(out / name) for name in ("curriculum.json", "config.json")}
    return {**_bytes(out, "step_*/*"), **_bytes(out, "losses.*"), "metrics.csv": _table(out / "metrics.csv"), **whole}


def _finetune_pieces(out: Path) -> dict[str, Any]:
    try:
        done = json.loads((out / "curriculum.json").read_text())["steps"]
    except OSError:
        return {}
    # The step that was finished last may be written again, with the same bytes, when its state was not saved yet.
    return {f"step_{step:02d}": True for step in done if (out / f"step_{step:02d}").is_dir()}


# -- search over a prompt file -----------------------------------------------------------------------------------------


def _search(world: World, out: Path, shard: str | None) -> list[object]:
    words = ["search", "--prompts", world.folder / "prompts.txt", "--candidates", 16, "--steps", STEPS, "--threads", 1,
             "--device", "cpu", "-q", "--out", out]  # fmt: skip
    return [*words, *(["--shard", shard] if shard else [])]


def _search_result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {**_bytes(out, "p*/candidates.parquet"), "results.csv": _table(out / "results.csv")}
    for path in sorted(out.glob("p*/*.json")):
        found[str(path.relative_to(out))] = _json(path)
    for path in sorted(out.glob("p*/image.png")):
        with Image.open(path) as picture:
            notes = {key: value for key, value in picture.text.items() if key.rpartition(":")[2] not in TIMES}
            found[str(path.relative_to(out))] = (notes, hashlib.sha256(picture.tobytes()).hexdigest())
    return found


def _marked(pattern: str, needs: str) -> Callable[[Path], dict[str, Any]]:
    def pieces(out: Path) -> dict[str, Any]:
        return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.glob(pattern) if needs in p.read_text()}

    return pieces


# -- sweep and report --------------------------------------------------------------------------------------------------


def _sweep(world: World, out: Path, shard: str | None) -> list[object]:
    return ["sweep", world.folder / "sweep.yaml", "-j", 2, "--folder", out, "--runs", out / "runs"]


def _sweep_result(out: Path) -> dict[str, Any]:
    content = _json(out / "sweep.json")
    states = [(run["run_hash"], run["status"]) for run in content["runs"]]
    runs = {**_bytes(out, "runs/*/*/results.*"), **_bytes(out, "results.*"), **_bytes(out, "summary.*")}
    return {**runs, "states": states, "failed": content["failed"]}


def _report(world: World, out: Path, shard: str | None) -> list[object]:
    return ["report", world.sweep, "--output", out / "report.html"]


COMMANDS = {
    command.name: command
    for command in (
        Command("generate", _generate, _generate_result, _generate_pieces, _number(r"(\d+) images made"),
                "every picture and the manifest, byte for byte; not the manifest's provenance (who wrote, when)", True),
        Command("score", _score, lambda out: _bytes(out, "**/*"), _score_pieces,
                _number(r"(\d+) pictures", IMAGES * STEPS), "every file of the tensor, byte for byte", True),
        Command("generate --score", _inline, lambda out: _bytes(out, "**/*"), _score_pieces,
                _number(r"(\d+) pictures", IMAGES * STEPS), "every file of the tensor, byte for byte", True),
        Command("finetune", _finetune, _finetune_result, _finetune_pieces, None,
                "every checkpoint and the losses, byte for byte; metrics and curriculum.json without elapsed seconds"),
        Command("search", _search, _search_result, _marked("p*/summary.json", '"stopped": ""'), None,
                "candidates byte for byte, pixels and notes of the pictures, records and tables without elapsed "
                "seconds", True),
        Command("sweep", _sweep, _sweep_result, _marked("runs/*/*/manifest.json", '"status": "complete"'),
                None, "tables and figures of the sweep and of its runs, byte for byte; not the times in "
                "sweep.json and the manifests"),
        Command("report", _report, lambda out: _bytes(out, "*"), lambda out: {}, None,
                "the page, byte for byte"),
    )
}  # fmt: skip


def found_again(command: Command, found: int, runs: int) -> str:
    """Return in words how many finished pieces the resumed sittings found."""
    if command.name == "report" or not runs:
        return "the same result"
    if command.name == "finetune":  # it may write its last step again, so its pieces have no mark
        return f"{found} finished steps found again; the same result"
    return f"{found} finished pieces found again, none made twice; the same result"
