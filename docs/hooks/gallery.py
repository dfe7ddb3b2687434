"""The pictures of docs/gallery.md: made by the code that the page shows, when the site is built.

The page is one program: its blocks marked `python` run one after another, in a process and a folder of their
own, and every file that they write becomes part of the site. A comment says where a picture stands:

    <!-- picture: lens.svg | What the picture shows, for those who cannot see it. -->

Pictures are kept in build/gallery under a name made from the page's code and all that it runs, so that they
are made again when one of these has changed, and only then.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGE = "gallery.md"
FOLDER = "gallery"  # of the site, where the pictures are
CACHE = ROOT / "build" / "gallery"
BEHIND = ("matplotlib", "numpy", "timm", "torch")  # other versions of these may draw other pictures
LONGEST = 900  # seconds, on a busy machine; on an idle one it takes about 20

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACE = re.compile(r"^<!-- picture: (\S+) \| (.+?) -->$", re.MULTILINE)


def code_of(text: str) -> str:
    """The program of a page: all its blocks of Python, in order."""
    return "\n".join(BLOCK.findall(text))


def names_of(text: str) -> list[str]:
    """The pictures that a page shows, in order."""
    return [name for name, _ in PLACE.findall(text)]


def make_pictures(code: str, folder: Path) -> None:
    """Run a page's program in a folder.

    Args:
        code: that writes files into its working directory.
        folder: for the files; it exists.

    Raises:
        RuntimeError: if the program fails, with what it said.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error:::__main__", "-c", code],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"the code of docs/{PAGE} fails:\n{run.stderr}")


def kept_pictures(code: str, cache: Path = CACHE) -> Path:
    """The folder with the pictures of a program, which is run only if they are not there yet."""
    wanted = cache / _fingerprint(code)
    if not wanted.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            make_pictures(code, made)
            for old in cache.iterdir():
                if old != Path(scratch):
                    shutil.rmtree(old, ignore_errors=True)
            made.rename(wanted)  # whole or not at all
    return wanted


def with_pictures(text: str, names: Iterable[str]) -> str:
    """A page with its pictures in their places.

    Raises:
        RuntimeError: if a picture is named that the program does not write.
    """
    written = set(names)

    def figure(place: re.Match[str]) -> str:
        name, shows = place.groups()
        if name not in written:
            raise RuntimeError(f"docs/{PAGE} shows {name}, which its code does not write")
        if not name.endswith(".html"):
            return f"![{shows}]({FOLDER}/{name})"
        return (
            f'<iframe src="{FOLDER}/{name}" title="{escape(shows)}" loading="lazy" '
            'style="width: 100%; height: 42rem; border: 1px solid #8888"></iframe>\n\n'
            f"[The page by itself]({FOLDER}/{name}): one file, to be saved and opened without a network."
        )

    return PLACE.sub(figure, text)


def _fingerprint(code: str) -> str:
    """A name that changes with the program, the library, this file and the packages behind them."""
    library = (ROOT / "circuitvit").rglob("*")
    files = sorted(path for path in library if path.is_file() and "__pycache__" not in path.parts)
    found = hashlib.sha256(code.encode())
    for path in (Path(__file__), *files):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    found.update(repr([(name, _version_of(name)) for name in BEHIND]).encode())
    return found.hexdigest()[:16]


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# -- what mkdocs calls ---------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures to the site's files."""
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    page = files.get_file_from_path(PAGE)
    if page is None:
        raise PluginError(f"docs/{PAGE} is missing, for which docs/hooks/gallery.py makes pictures")
    try:
        made = kept_pictures(code_of(page.content_string))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        raise PluginError(str(error)) from error
    for path in sorted(made.iterdir()):
        files.append(File.generated(config, f"{FOLDER}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the pictures into the gallery's text."""
    from mkdocs.exceptions import PluginError

    if page.file.src_uri != PAGE:
        return markdown
    within = f"{FOLDER}/"
    names = [path.removeprefix(within) for path in files.src_uris if path.startswith(within)]
    try:
        return with_pictures(markdown, names)
    except RuntimeError as error:
        raise PluginError(str(error)) from error
