"""The command line: exit codes, one line per error, pure JSON where JSON is asked for."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from isthmus import __version__, registry
from isthmus.claims import Ledger
from isthmus.cli.main import main
from making import MakeSystem

START = (
    "import sys; from pathlib import Path; from isthmus import registry;"
    "registry.ROOT = Path(sys.argv.pop(1)); registry_package = registry._package;"
    "registry._package = lambda root: registry_package(root or registry.ROOT);"
    "from isthmus.cli.main import main; sys.exit(main())"
)


def isthmus(
    *words: str, root: Path | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "isthmus.cli.main", *words]
    if root is not None:
        command = [sys.executable, "-c", START, str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def assert_one_line_error(run: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.fixture
def here(systems_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Point this process at made-up systems and leave the checkout."""
    package = registry._package
    monkeypatch.setattr(registry, "ROOT", systems_root)
    monkeypatch.setattr(registry, "_package", lambda root: package(root or systems_root))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


# The command itself


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from isthmus.cli.main import main; main(['--help']);"
        "sys.exit(not {'torch', 'transformers', 'numpy'}.isdisjoint(sys.modules))"
    )
    costs_s = []
    for _ in range(4):
        before = os.times()
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()
        assert shown.returncode == 0, shown.stderr
        for name in ("generate", "systems", "show", "claim", "bench"):
            assert name in shown.stdout
        costs_s.append(
            after.children_user
            - before.children_user
            + after.children_system
            - before.children_system
        )
    # Processor time, and the best run: neither tells what else the machine is doing.
    assert min(costs_s) < 0.35


def test_listing_and_errors_import_nothing_heavy() -> None:
    code = (
        "import sys; from isthmus.cli.main import main; main(['systems']); main(['sistems']);"
        "main(['claim']); main(['show', 'no-such-system']);"
        "sys.exit(not {'torch', 'transformers', 'numpy'}.isdisjoint(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_version() -> None:
    shown = isthmus("--version")
    assert (shown.returncode, shown.stdout) == (0, f"{__version__}\n")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["frobnicate"], ["unknown command 'frobnicate'", "to choose from"]),
        (["sistems"], ["did you mean 'systems'?"]),
        (["bench", "decod"], ["did you mean 'decode'"]),
        (["systems", "--famly", "speculative"], ["--famly"]),
        (["systems", "--family", "specullative"], ["unknown family 'specullative'"]),
        (["show"], ["SLUG"]),
        (["show", "no-such-system"], ["unknown system 'no-such-system'"]),
        (["claim"], ["one system"]),
        (["claim", "x", "--all"], ["one system"]),
        (["claim", "--all", "--scale", "huge"], ["huge", "small"]),
        (["claim", "--all", "--scale", "test", "--resume"], ["--ledger"]),
    ],
)
def test_errors_are_one_line_and_exit_2(words: list[str], parts: list[str]) -> None:
    assert_one_line_error(isthmus(*words), *parts)


def test_a_closed_pipe_is_quiet(systems_root: Path, make_system: MakeSystem) -> None:
    for number in range(300):
        make_system(f"system-{number}", idea="an idea " * 30)
    command = [sys.executable, "-c", START, str(systems_root), "systems", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(timeout=60)


# isthmus systems, isthmus show


def test_systems(here: Path, make_system: MakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    make_system("made-up")
    make_system("other", "codecs", idea="a small thing.")
    code, out, err = run(["systems"], capsys)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["system", "other", "made-up"]
    assert "not measured yet" in out
    code, out, _ = run(["systems", "--family", "codecs", "--json"], capsys)
    (values,) = json.loads(out)["systems"]
    assert values["slug"] == "other"
    assert values["idea"] == "a small thing."
    assert values["status"] is None


def test_show(here: Path, make_system: MakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    make_system("made-up")
    code, out, err = run(["show", "made-up"], capsys)
    assert (code, err) == (0, "")
    for part in ("A made-up method", "arXiv:2401.01234", "width", "int", "enabled", "True"):
        assert part in out
    assert "isthmus claim made-up" in out
    _, out, _ = run(["show", "made-up", "--json"], capsys)
    values = json.loads(out)
    assert values["settings"] == {"width": 4, "enabled": True}
    assert values["claim"] is None
    assert values["class"].endswith(".MadeUp")


def test_a_malformed_header_is_one_line(systems_root: Path, make_system: MakeSystem) -> None:
    path = make_system("made-up")
    path.write_text(path.read_text().replace("Idea:", "idea"))
    assert_one_line_error(isthmus("systems", root=systems_root), "made_up.py", "'Idea:'")


# isthmus claim


def test_claim_prints_one_object_and_records(
    systems_root: Path, make_system: MakeSystem, tmp_path: Path
) -> None:
    make_system("made-up")
    ledger = tmp_path / "ledger.json"
    shown = isthmus("claim", "made-up", "--json", "--ledger", str(ledger), root=systems_root)
    assert shown.returncode == 0, shown.stderr
    # The made-up system prints while it measures; that must not reach standard output.
    assert "a library that talks" in shown.stderr
    values = json.loads(shown.stdout)
    assert values["claims"]["made-up"]["status"] == "reproduced"
    assert values["claims"] == json.loads(ledger.read_text())["claims"]
    assert Ledger(ledger).read()["made-up"].claim.seeds == (0,)


def test_claim_without_ledger_only_prints(
    here: Path, make_system: MakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    make_system("made-up")
    before = sorted(here.iterdir())
    code, out, _ = run(["claim", "made-up"], capsys)
    assert code == 0
    assert "reproduced" in out
    assert "speed-up" in out
    assert "not recorded" in out
    assert sorted(here.iterdir()) == before


def test_claim_finds_the_ledger_of_a_checkout(
    here: Path, make_system: MakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    make_system("made-up")
    (here / "pyproject.toml").write_text('[project]\nname = "isthmus"\n')
    (here / "docs").mkdir()
    page = here / "docs" / "ledger.md"
    page.write_text("")
    ledger = Ledger(here / "docs" / "ledger.json")
    # A test-sized run must not take the place of a real measurement.
    assert run(["claim", "made-up", "--scale", "test"], capsys)[0] == 0
    assert ledger.read() == {}
    assert run(["claim", "made-up"], capsys)[0] == 0
    assert ledger.read()["made-up"].claim.scale == "small"
    assert page.read_text() == ledger.render()


def test_claim_all_resumes_and_survives_a_failing_system(
    here: Path, make_system: MakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    make_system("a")
    make_system(
        "b",
        before="""
        from isthmus.errors import InvalidInputError
        raise InvalidInputError("no data here")
        """,
    )
    make_system("c", "codecs")
    make_system("d", before="raise ZeroDivisionError('oops')")
    words = ["claim", "--all", "--json", "--ledger", "l.json"]
    code, out, err = run(words, capsys)
    assert code == 2
    assert "error: b: no data here" in err
    assert json.loads(out)["failed"] == {
        "b": "no data here",
        "d": "bug: ZeroDivisionError('oops')",
    }
    assert list(Ledger("l.json").read()) == ["a", "c"]
    code, out, _ = run([*words, "--resume"], capsys)
    assert code == 2
    assert json.loads(out)["skipped"] == ["c", "a"]
    assert json.loads(out)["claims"] == {}
    # Another scale is another measurement.
    _, out, _ = run([*words, "--resume", "--scale", "test"], capsys)
    assert sorted(json.loads(out)["claims"]) == ["a", "c"]


def test_claim_refuses_a_ledger_before_it_measures(
    here: Path, make_system: MakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    make_system("made-up", before="raise RuntimeError('measured')")
    (here / "broken.json").write_text('{"schema": 1, "cla')
    for path in ("broken.json", "no/such/folder.json"):
        code, out, err = run(["claim", "made-up", "--ledger", path], capsys)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert path in err
    assert (here / "broken.json").read_text() == '{"schema": 1, "cla'


def test_a_claim_of_the_wrong_kind_is_refused(
    here: Path, make_system: MakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    make_system("made-up", before="return None")
    code, _, err = run(["claim", "made-up"], capsys)
    assert code == 2
    assert "must return a Claim of 'made-up'" in err


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_exits_130(systems_root: Path, make_system: MakeSystem) -> None:
    make_system("made-up", before="import sys, time; print('begun', flush=True); time.sleep(60)")
    command = [sys.executable, "-c", START, str(systems_root), "claim", "made-up", "--json"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=systems_root.parent,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "a library that talks" in process.stderr.readline()
        assert "begun" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stdout.read() == ""
        assert "Traceback" not in process.stderr.read()
