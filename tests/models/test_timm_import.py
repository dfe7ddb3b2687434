"""The torchvision guard: with the timm that is installed, and with small fakes for each way to fail."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from circuitvit.errors import ModelError, ProcessError
from circuitvit.models.timm_import import import_timm

REPOSITORY = Path(__file__).resolve().parents[2]
MISMATCH = "operator torchvision::nms does not exist"
REGISTRATIONS = "torchvision._meta_registrations"

PlaceFakes = Callable[[dict[str, str]], None]


def run_python(code: str) -> str:
    """What a fresh interpreter prints for `code`; a non-zero exit fails the test with its traceback."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_fakes() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in {"timm", "torchvision", "timmlike"}]


@pytest.fixture
def place_fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlaceFakes]:
    """Replaces timm and torchvision by the given files until the test ends."""
    real = {name: sys.modules.pop(name) for name in loaded_fakes()}

    def place(files: dict[str, str]) -> None:
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    yield place
    for name in loaded_fakes():
        del sys.modules[name]
    sys.modules.update(real)


# Packages whose import order resembles that of the real ones: something complete, then torchvision.
TIMM = {
    "timm/__init__.py": """
        import timmlike
        from . import early
        from .layers import has_torchvision
        """,
    "timm/early.py": "",
    "timm/layers.py": "import torchvision; has_torchvision = True",
    "timmlike/__init__.py": "",
}
TORCHVISION = {
    "torchvision/__init__.py": "from . import extension; from torchvision import _meta_registrations, ops",
    "torchvision/extension.py": "",
    "torchvision/_meta_registrations.py": "registered = True",
    "torchvision/ops.py": "",
}
MISMATCHED = {**TORCHVISION, "torchvision/_meta_registrations.py": f"raise RuntimeError({MISMATCH!r})"}


def test_installed_timm_works_and_stays_importable_elsewhere() -> None:
    printed = run_python(
        """
        from circuitvit.models.timm_import import import_timm
        import sys
        assert "timm" not in sys.modules, "importing the guard must not import timm"
        guarded = import_timm()

        import timm
        import torch
        import torchvision
        from timm.data import resolve_model_data_config

        assert timm is guarded is import_timm()
        model = timm.create_model("vit_tiny_patch16_224").eval()
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, 224, 224))
        print(tuple(logits.shape), resolve_model_data_config(model)["input_size"])
        """
    )
    assert printed.split("\n")[0] == "(1, 1000) (3, 224, 224)"


def test_works_after_someone_else_has_tried_to_import_timm() -> None:
    run_python(
        """
        try:
            import timm
        except RuntimeError:
            pass
        from circuitvit.models.timm_import import import_timm

        model = import_timm().create_model("test_vit")
        assert model.num_classes == 1000
        """
    )


def test_importing_circuitvit_does_not_import_timm() -> None:
    run_python("import sys, circuitvit; assert not {'timm', 'torchvision'} & set(sys.modules)")


def test_matching_torchvision_is_left_alone(place_fakes: PlaceFakes) -> None:
    place_fakes({**TIMM, **TORCHVISION})
    timm = import_timm()
    assert timm.has_torchvision
    assert sys.modules[REGISTRATIONS].registered


def test_mismatched_torchvision_is_imported_without_its_registrations(place_fakes: PlaceFakes) -> None:
    place_fakes({**TIMM, **MISMATCHED})
    timm = import_timm()
    assert timm.has_torchvision
    assert timm is sys.modules["timm"]
    assert not hasattr(sys.modules[REGISTRATIONS], "registered")
    assert sys.modules["torchvision"].ops is sys.modules["torchvision.ops"]


def test_half_imported_modules_are_forgotten_and_no_others(place_fakes: PlaceFakes) -> None:
    place_fakes({**TIMM, **MISMATCHED})
    extension = importlib.import_module("timmlike")
    timm = import_timm()
    assert timm.early is sys.modules["timm.early"], "bound to the package that works"
    assert sys.modules["torchvision"].extension is sys.modules["torchvision.extension"]
    assert sys.modules["timmlike"] is extension, "a package with a similar name is not timm's"


def test_other_runtime_error_is_reported_with_its_cause(place_fakes: PlaceFakes) -> None:
    place_fakes(
        {**TIMM, **TORCHVISION, "torchvision/ops.py": "raise RuntimeError('no kernel for roi_align')"}
    )
    with pytest.raises(ModelError, match=r"timm cannot be imported: RuntimeError: no kernel") as caught:
        import_timm()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert sys.modules[REGISTRATIONS].registered, "nothing is replaced on any other failure"


def test_message_names_the_installed_versions(place_fakes: PlaceFakes) -> None:
    place_fakes({"timm/__init__.py": "raise OSError('libcudart.so: cannot open shared object file')"})
    with pytest.raises(
        ModelError, match=r"OSError: libcudart\.so.*\nInstalled: torch \d.*, timm \d"
    ) as caught:
        import_timm()
    assert isinstance(caught.value.__cause__, OSError)


def test_missing_timm_is_reported_with_its_cause(place_fakes: PlaceFakes) -> None:
    place_fakes({})
    sys.modules["timm"] = None  # type: ignore[assignment]  # Python's own way to make an import fail
    with pytest.raises(ModelError, match=r"ModuleNotFoundError.*\nInstalled: .*Install timm") as caught:
        import_timm()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_failing_a_second_time_leaves_no_empty_module_behind(place_fakes: PlaceFakes) -> None:
    place_fakes({**TIMM, **MISMATCHED, "torchvision/ops.py": f"raise RuntimeError({MISMATCH!r})"})
    with pytest.raises(ModelError, match=MISMATCH) as caught:
        import_timm()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert REGISTRATIONS not in sys.modules


def test_a_process_that_is_told_to_end_meanwhile_does_not_blame_timm(place_fakes: PlaceFakes) -> None:
    ended = "from circuitvit.errors import ProcessError\nraise ProcessError('this run was told to end')\n"
    place_fakes({"timm/__init__.py": ended})
    with pytest.raises(ProcessError, match="told to end"):
        import_timm()
