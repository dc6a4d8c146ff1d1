"""Nothing on a page is merely claimed: code runs or says why not, commands exist, links and anchors lead somewhere."""

import re
import shlex
from pathlib import Path

import doc_pages
import pytest
import typer
import typer.main
from doc_pages import PAGES, ROOT, name_of

from ckpt_cloud.cli.app import app

# typer may bring a click of its own.
ClickException = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")

RUN_BY = {
    "README.md": "test_readme.py",
    "docs/cli.md": "test_manager_pages.py",
    "docs/dcp-compatibility.md": "test_compatibility_page.py",
    "docs/howto/accelerate.md": "test_howto_pages.py",
    "docs/howto/fsdp2.md": "test_howto_pages.py",
    "docs/howto/lightning-sharded.md": "test_howto_pages.py",
    "docs/howto/lightning.md": "test_howto_pages.py",
    "docs/howto/plain-loop.md": "test_howto_pages.py",
    "docs/interop.md": "test_short_pages.py",
    "docs/local-stores.md": "test_short_pages.py",
    "docs/manager.md": "test_manager_pages.py",
    "docs/migrate/fsspec-writer.md": "test_howto_pages.py",
    "docs/migrate/s3torchconnector.md": "test_howto_pages.py",
    "docs/migrate/torch-save.md": "test_howto_pages.py",
    "docs/performance.md": "test_performance_page.py",
    "docs/security.md": "test_short_pages.py",
    "docs/stores.md": "test_stores_page.py",
    "docs/testing.md": "test_testing_page.py",
    "docs/tutorial.md": "test_howto_pages.py",
}
"""The test that runs all Python blocks of a page, but for those that say why not."""

BLOCKS = [block for page in PAGES for block in doc_pages.blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language in {"python", "py", "pycon"}]
SHELL = [block for block in BLOCKS if block.language in {"sh", "bash", "shell", "console"}]


def test_every_python_block_is_run_or_says_why_not():
    assert len(PYTHON) > 40
    unseen = [f"{b.page}:{b.line}" for b in PYTHON if not b.reason and b.page not in RUN_BY]
    assert unseen == []
    assert {page for page in RUN_BY if not any(b.page == page and not b.reason for b in PYTHON)} == set()


@pytest.mark.parametrize("page", RUN_BY)
def test_who_runs_a_page_names_it(page):
    runner = (Path(__file__).parent / RUN_BY[page]).read_text()
    assert Path(page).stem.lower() in runner.lower()


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_python_compiles(block):
    compile(block.code, block.page, "exec")


def commands():
    """Lines of shell blocks, each as its words; comments are gone and continued lines are one."""
    for block in SHELL:
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words:
                yield f"{block.page}:{block.line}", words


OURS = [(where, words) for where, words in commands() if words[0] == "ckpt-cloud"]


@pytest.mark.parametrize(("where", "words"), OURS, ids=[" ".join(words) for _, words in OURS])
def test_ckpt_cloud_commands_are_understood(where, words):
    root = typer.main.get_command(app)
    root_context = root.make_context("ckpt-cloud", [], resilient_parsing=True)
    name, command, rest = root.resolve_command(root_context, words[1:])
    try:
        command.make_context(name, rest, parent=root_context)
    except ClickException as error:
        pytest.fail(f"{where}: {error.format_message()}")


INLINE = [
    (name_of(page), *found)
    for page in PAGES
    for found in re.findall(r"`ckpt-cloud ([a-z]\w*)([^`]*)`", page.read_text())
    if page.name not in {"CHANGELOG.md", "format.md"}  # which has `ckpt-cloud commit 1`, a line of signed text
]


def test_commands_within_the_text_exist():
    """Their arguments are placeholders, so that only names are held against the command line."""
    assert len(OURS) > 12
    assert len(INLINE) > 15
    known = typer.main.get_command(app).commands
    wrong = [
        f"{page}: ckpt-cloud {name}{rest}"
        for page, name, rest in INLINE
        if name not in known
        or set(re.findall(r"--[\w-]+", rest))
        - {option for each in known[name].params for option in each.opts}
        - {"--help"}
    ]
    assert wrong == []


def test_a_command_that_does_not_exist_is_noticed():
    """So that the tests above can fail."""
    root = typer.main.get_command(app)
    context = root.make_context("ckpt-cloud", [], resilient_parsing=True)
    with pytest.raises(ClickException):
        root.commands["ls"].make_context("ls", ["s3://bucket", "--no-such"], parent=context)


def test_scripts_that_are_named_exist():
    named = {words[0] for _, words in commands() if words[0].startswith("scripts/")}
    text = "\n".join(page.read_text() for page in PAGES)
    named |= set(re.findall(r"`(scripts/\w+)(?:\.py)?[` ]", text))
    assert {"scripts/test", "scripts/lint", "scripts/docs"} <= named
    assert {
        script for script in named if not (ROOT / script).exists() and not (ROOT / f"{script}.py").exists()
    } == set()


LINK = re.compile(r"\]\(<?(?!https?:|mailto:)([^)\s>]+)>?(?: \"[^\"]*\")?\)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    dead = []
    for target in LINK.findall(doc_pages.without_code(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in doc_pages.anchors_of(file)):
            dead.append(target)
    assert dead == []


def test_links_would_be_found_dead(tmp_path):
    """So that the test above can fail."""
    page = tmp_path / "page.md"
    page.write_text("# One, two\n\n[a](#one-two) [b](#two) `[c](d)`\n")
    assert LINK.findall(doc_pages.without_code(page)) == ["#one-two", "#two"]
    assert doc_pages.anchors_of(page) == {"one-two"}
