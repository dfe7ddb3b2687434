"""The gallery's pictures are made by the code that it shows, the same every time, and stand in its page."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def _hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "hooks" / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gallery = _hook()


def test_the_code_makes_every_picture_and_the_same_ones_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = gallery.kept_pictures(gallery.code_of(TEXT))  # those of the site, where it has been built
    made = sorted(path.name for path in first.iterdir())
    assert made == sorted(gallery.names_of(TEXT)), "pictures that are made, and pictures that are shown"

    second = tmp_path
    monkeypatch.chdir(second)  # in this process: another seed of hashes, and no second start
    exec(compile(gallery.code_of(TEXT), "docs/gallery.md", "exec"), {"__name__": "__main__"})
    for name in made:
        content = (first / name).read_bytes()
        assert len(content) > 2_000, name
        assert content == (second / name).read_bytes(), f"{name} differs from run to run"

    page = (first / "circuit.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page), "the page loads something"


def test_every_picture_has_a_section_sentence_and_code() -> None:
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        assert gallery.names_of(body), f"{title} shows nothing"
        for part in re.split(gallery.PLACE, body)[:-1:3]:
            code = gallery.code_of(part)
            assert code, f"a picture of {title} comes without its code"
            assert gallery.BLOCK.sub("", part).strip(), f"a picture of {title} comes without a sentence"


def test_pictures_stand_in_the_page() -> None:
    shown = gallery.with_pictures(TEXT, gallery.names_of(TEXT))
    assert "<!--" not in shown
    assert "](gallery/circuit.svg)" in shown
    assert '<iframe src="gallery/circuit.html" title="' in shown
    with pytest.raises(RuntimeError, match=r"shows circuit\.svg, which its code does not write"):
        gallery.with_pictures(TEXT, ["circuit.html"])


def test_a_program_runs_once_until_it_changes(tmp_path: Path) -> None:
    code = "import os, pathlib; pathlib.Path('x.txt').write_text(str(os.getpid()))"
    first = gallery.kept_pictures(code, tmp_path)
    said = (first / "x.txt").read_text()
    assert gallery.kept_pictures(code, tmp_path) == first
    assert (first / "x.txt").read_text() == said
    second = gallery.kept_pictures(code + "  # changed", tmp_path)
    assert (second / "x.txt").read_text() != said
    assert list(tmp_path.iterdir()) == [second], "old pictures are thrown away"


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)gallery\.md fails.*ZeroDivisionError"):
        gallery.kept_pictures("1 / 0", tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing half made is kept"


def test_mkdocs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; `make docs` installs it")
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File, Files

    (tmp_path / "circuit.svg").write_text("<svg/>")
    monkeypatch.setattr(gallery, "kept_pictures", lambda code: tmp_path)
    config = MkDocsConfig()
    config.load_dict({"site_name": "x", "docs_dir": str(ROOT / "docs"), "site_dir": str(tmp_path / "site")})
    config.validate()
    config.plugins._current_plugin = "docs/hooks/gallery.py"  # as when mkdocs calls a hook
    files = Files([File.generated(config, "gallery.md", content=TEXT)])
    assert "gallery/circuit.svg" in gallery.on_files(files, config).src_uris
    with pytest.raises(PluginError, match=r"gallery\.md is missing"):
        gallery.on_files(Files([]), config)
