"""tests/ mirrors the package: who looks for the tests of a module finds them in the folder of the same name."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "megatron_opd"
BESIDE = {"docs", "examples", "slurm", "tools"}  # folders of the repository with tests of their own
OTHER = {"extending", "gpu", "pretended_gpu"}  # parts written outside the package; what needs a GPU, or pretends one
WHOLE = {f"test_{name}.py" for name in ("distributed", "imports", "mirror", "pickles", "type_checker", "words")}


def test_every_folder_of_tests_is_one_of_the_package():
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")} - {Path()}
    strangers = [f.as_posix() for f in folders if not (PACKAGE / f).is_dir() and f.parts[0] not in BESIDE | OTHER]
    assert not strangers, f"tests/{strangers}: megatron_opd/ has no such folder"
    assert all((TESTS.parent / name).is_dir() for name in BESIDE & {f.parts[0] for f in folders})


def test_what_lies_at_the_top_holds_for_the_whole_package():
    top = {path.name for path in TESTS.glob("test_*.py") if not (PACKAGE / path.name.removeprefix("test_")).exists()}
    assert top == WHOLE, "put a module's tests into the folder of its name"


def test_every_folder_is_a_package_of_its_own():
    """Else two modules of one name, such as test_run.py, could not be collected together."""
    bare = [p.parent for p in TESTS.rglob("test_*.py") if not (p.parent / "__init__.py").exists()]
    assert not bare
