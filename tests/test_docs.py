"""The README is true: its blocks are run, and what it shows is what is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import surgery
from fixtures import real_pair
from surgery.cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "base").symlink_to(real_pair.base())
    (folder / "ft").symlink_to(real_pair.tuned())
    return folder


def without_times(text):
    return re.sub(r"in \d+\.\d s", "in T s", text)


def test_the_console_blocks_print_what_they_show(workshop, monkeypatch, capfd):
    monkeypatch.chdir(workshop)
    shown = [entry for block in blocks("console") for entry in re.split(r"^\$ ", block, flags=re.MULTILINE) if entry]
    assert len(shown) >= 4
    for entry in shown:
        command, _, wanted = entry.partition("\n")
        program, *arguments = shlex.split(command)
        assert program == "surgery"
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capfd.readouterr()
        assert not stopped.value.code, err
        assert without_times(out).strip() == without_times(wanted).strip(), command


def test_the_python_blocks_run(workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_python_blocks_of_the_algorithms_run():
    shown = blocks("python", (ROOT / "docs" / "algorithms.md").read_text())
    assert shown
    for block in shown:
        exec(compile(block, "docs/algorithms.md", "exec"), {})


def test_every_command_is_in_the_readme():
    for command in COMMANDS:
        assert f"surgery {command} " in README, command


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (?:TORCH_INDEX=URL )?([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_between_documents_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_version_is_said_once():
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_public_names_are_documented_with_an_example():
    functions = [name for name in surgery.__all__ if name[0].islower() and not name.startswith("__")]
    assert {"extract_lora", "merge", "unmerge", "diff", "open", "convert", "info", "verify"} <= set(functions)
    for name in functions:
        documentation = getattr(surgery, name).__doc__
        assert "Args:" in documentation, name
        assert "Raises:" in documentation or name == "info", name


def test_the_document_of_algorithms_is_what_the_registry_says():
    from fixtures import algorithm_docs

    assert (ROOT / "docs" / "algorithms.md").read_text() == algorithm_docs.render(), (
        "python -m fixtures.algorithm_docs > docs/algorithms.md"
    )
