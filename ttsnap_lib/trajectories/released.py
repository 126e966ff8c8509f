"""Folders of the released code: pictures without a manifest get one, and then are trajectory folders like any other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ttsnap_lib.checks import text
from ttsnap_lib.errors import TrajectoryError
from ttsnap_lib.files import as_path
from ttsnap_lib.provenance import now, versions
from ttsnap_lib.trajectories.layout import (
    IMAGE_FORMATS,
    MANIFEST,
    Manifest,
    prompt_folders,
    prompt_name,
    read_image,
    scan_prompt,
)
from ttsnap_lib.trajectories.prompts import read_prompts


def import_trajectories(
    folder: str | Path,
    prompts: str | Path | Sequence[str],
    model: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write the manifest of a folder of pictures that the released code made; nothing else in it is touched.

    Afterwards :class:`~ttsnap_lib.trajectories.read.Trajectories`, scoring, finetuning and ``verify`` read it. Pictures
    cannot be added or repaired: how they were made is not known.

    Parameters
    ----------
    folder : str or Path
        Holds ``p0000/id000/s00.png`` and so on; prompts may begin at another number than 0, and have gaps. Every prompt
        has the same images, counted from 0, and every image the same steps.
    prompts : str, Path or sequence of str
        What :func:`ttsnap_lib.trajectories.prompts.read_prompts` reads: the whole set, where the number of a folder is the
        position in it, or exactly the prompts of the folders, in their order.
    model : str
        The diffusion model that made the pictures, such as ``black-forest-labs/FLUX.1-dev``.
    progress : callable, optional
        ``progress(done, total)`` in prompts.

    Returns
    -------
    Manifest

    Raises
    ------
    TrajectoryError
        No pictures, a manifest that is there already, a file that is missing (the first is named), too few prompts.
    PromptError
        Prompts that cannot be read.
    """
    folder = as_path("trajectory folder", folder, error=TrajectoryError)
    model = text("model", model)
    if (folder / MANIFEST).exists():
        raise TrajectoryError(f"{folder} has a {MANIFEST} already: got one, expected none. Remove it to import again.")
    places = prompt_folders(folder) if folder.is_dir() else {}
    first = next((path for place in places.values() for path in sorted(place.glob("id*/s*.*"))), None)
    image_format = "" if first is None else first.suffix[1:]
    if first is None or image_format not in IMAGE_FORMATS:
        found = "no pictures" if first is None else first
        raise TrajectoryError(f"{folder}: got {found}, expected p0000/id000/s00.png and so on. Name their folder.")
    shown = [path for place in places.values() for path in (place / "id000").glob(f"s*.{image_format}")]
    n_steps = 1 + max((int(path.stem[1:]) for path in shown if path.stem[1:].isdigit()), default=0)
    height, width = read_image(first).shape[:2]

    texts = read_prompts(prompts)
    numbers = list(places)
    by_number = len(texts) > numbers[-1]
    if not by_number and len(texts) != len(numbers):
        raise TrajectoryError(
            f"prompts: got {len(texts)}, expected those of the {len(numbers)} folders, or the whole set, whose position "
            f"{numbers[-1]} is {prompt_name(numbers[-1])}. Give the file that the pictures were made from."
        )
    chosen = numbers if by_number else range(len(texts))

    states = {number: scan_prompt(place, n_steps, image_format) for number, place in places.items()}
    n_images = max(image + 1 for state in states.values() for image in {*state.whole, *state.incomplete})
    identity = {
        "model": model,
        "imported": True,
        "n_steps": n_steps,
        "height": height,
        "width": width,
        "image_format": image_format,
        "prompt_numbers": numbers,
    }
    if numbers == list(range(len(numbers))):
        del identity["prompt_numbers"]
    manifest = Manifest(
        identity,
        tuple(texts[place] for place in chosen),
        n_images,
        ({"versions": {"ttsnap": versions().get("ttsnap")}, "time": now()},),
        tuple(texts.metadata[place] for place in chosen),
    )
    # What tells these pictures from others: the size of every file, and the first clean picture of every prompt.
    digest = hashlib.sha256()
    for prompt, state in enumerate(states.values()):
        for image in range(n_images):
            if image not in state.whole:
                gone = state.incomplete.get(image, [0])[0]
                raise TrajectoryError(
                    f"{folder / manifest.file(prompt, image, gone)} is missing: got {len(state.whole)} whole images, "
                    f"expected {n_images} images x {n_steps} steps of every prompt. Fetch it, or move the prompt away."
                )
            for step in range(n_steps):
                digest.update(f"{(folder / manifest.file(prompt, image, step)).stat().st_size} ".encode())
        digest.update((folder / manifest.file(prompt, 0, n_steps - 1)).read_bytes())
        if progress is not None:
            progress(prompt + 1, len(numbers))
    identity["pictures"] = digest.hexdigest()[:16]
    manifest.write(folder)
    return manifest
