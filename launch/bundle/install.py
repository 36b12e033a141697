"""Install the unpacked bundle; run once with the machine's own Python: ``python3 launch/bundle/install.py``.

It installs the carried packages that the machine lacks, or has in a version that does not fit, into one folder, and prints
the next commands. The machine's own packages are not changed. It needs only pip: the project is not installed yet.
"""

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
WHEELS, PACKAGES = ROOT / "carried/wheels", ROOT / "carried/packages"


@dataclass(frozen=True)
class Wheel:
    """A package in the bundle."""

    path: Path
    """Path of the ``.whl`` file."""
    requires: Sequence[str]
    """Its requirements: ``Requires-Dist`` lines of its metadata."""


def read_wheels(folder: Path) -> dict[str, Wheel]:
    """Read the wheels of a folder: canonical name -> wheel."""
    wheels: dict[str, Wheel] = {}
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as packed:
            # At the top: setuptools has packages with metadata of their own inside.
            (name,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1)
            fields = Parser().parsestr(packed.read(name).decode("utf-8"), headersonly=True)
        wheels[canonicalize_name(fields["Name"])] = Wheel(path, fields.get_all("Requires-Dist") or [])
    return wheels


def project_requires(setup: Path) -> list[str]:
    """Requirements of the project for training, from the lists in its setup.py."""
    lists: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(setup.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            lists["install"] = ast.literal_eval(node.value)
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            lists["train"] = ast.literal_eval(node.value)["train"]
    return lists["install"] + lists["train"]


def installed(names: Iterable[str]) -> dict[str, str]:
    """Name -> version of those packages that this Python has."""
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def choose(wheels: Mapping[str, Wheel], there: Mapping[str, str], asked: Iterable[str]) -> list[str]:
    """Names of the wheels to install: those that are not there, or there in a version that somebody does not take.

    Args:
        wheels: by name.
        there: versions of what is installed, by name.
        asked: requirements of the project; those of every chosen wheel count too.
    """
    chosen = {name for name in wheels if name not in there}
    requirements = [*asked, *(line for name in chosen for line in wheels[name].requires)]
    while True:
        unmet = {name for name, fits in _demands(requirements, wheels, there) if name not in chosen and not fits}
        if not unmet:
            return sorted(chosen)
        chosen |= unmet
        requirements += [line for name in unmet for line in wheels[name].requires]


def _demands(lines: Iterable[str], wheels: Mapping[str, Wheel], there: Mapping[str, str]) -> Iterable[tuple[str, bool]]:
    """For each requirement that names a carried package: the name, and whether the installed version fits."""
    for line in lines:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in wheels and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            yield name, name in there and requirement.specifier.contains(there[name], prereleases=True)


def main() -> None:
    """Choose and install packages, then print the next commands."""
    # Packages that an earlier run installed do not belong to the machine.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != PACKAGES]
    wheels = read_wheels(WHEELS)
    chosen = choose(wheels, installed(wheels), project_requires(ROOT / "setup.py"))
    print(f"installing {len(chosen)} of {len(wheels)} carried packages: {', '.join(chosen)}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    files = [str(wheels[name].path) for name in chosen]
    if chosen and subprocess.run([*command, "--upgrade", "--target", str(PACKAGES), *files], check=False).returncode:
        sys.exit("pip could not install the carried packages, see above")
    python = sys.executable
    print(
        f"Now:\n\n  cd {ROOT}\n  export PYTHONPATH={ROOT}:{PACKAGES} OMP_NUM_THREADS=1\n"
        f"  {python} -m gptface_dist.tools.main bench gpu\n"
        f'  make gpu-study GPTFACE="{python} -m gptface_dist.tools.main"'
    )


if __name__ == "__main__":
    main()
