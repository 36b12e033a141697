"""``gptface bundle``: one archive for a GPU machine without internet."""

from pathlib import Path
from typing import Annotated

import typer


def bundle(
    out: Annotated[Path, typer.Argument(help="Archive to write (.tar.xz).", show_default=False)],
    data: Annotated[Path, typer.Option(help="The quickstart's folder: its tokens and tokenizers go with it.")] = Path("out"),
    wheels: Annotated[Path, typer.Option(help="Folder for the wheels, kept between calls.")] = Path("build/wheels"),
    limit: Annotated[float, typer.Option(help="Largest archive in MiB; a larger one is refused.")] = 40.0,
) -> None:
    """Carry this checkout, the packages that a GPU machine lacks, tokens and the renderer's data (docs/gpu.md)."""
    from gptface_dist.launch.bundle import archive, contents
    from gptface_dist.launch.bundle.wheels import fetch, read_requirements

    root = Path(__file__).resolve().parents[1]
    members = [*contents.project(root), *contents.tokens(data), *contents.head_data()]
    fetch(read_requirements(root / "requirements-gpu.txt"), wheels)
    members += contents.wheels(wheels)
    size = archive.write(members, out, int(limit * archive.MIB))
    print(f"{out}: {size / archive.MIB:.1f} MiB ({archive.account(members)}), {len(members)} files in {contents.FOLDER}/")
    print(f"there: tar xJf {out.name} && python3 {contents.FOLDER}/launch/bundle/install.py")
