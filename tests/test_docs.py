"""The documents say what is so: generated pages, examples in help texts, links, the tour."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from models.job import CHUNK_STATES, JOB_STATES
from models.schedule import FIRING_STATES
from models.webhook import WEBHOOK_STATES
from nightherd.cli import COMMANDS, CommandEntry, cli, load_command
from nightherd.errors import RowErrorCode

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = Path(sys.executable).parent / "nightherd"
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
HEAVY = ("torch", "transformers")

ENTRIES = {name: entry for section in COMMANDS.values() for name, entry in section.items()}


def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The paths of a command and, if it is a group, of all commands in it."""
    yield path
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from walk(child, (*path, name))


COMMAND_PATHS = [
    path for name, entry in ENTRIES.items() for path in walk(load_command(entry), (name,))
]


def command_at(path: tuple[str, ...]) -> click.Command:
    command = load_command(ENTRIES[path[0]])
    for name in path[1:]:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command


# The generated pages.


@pytest.mark.parametrize("columns", ["40", "200"])
def test_generated_pages_are_up_to_date_in_any_terminal(columns: str, tmp_path: Path) -> None:
    checked = subprocess.run(
        [sys.executable, "-P", str(ROOT / "scripts" / "make_docs.py"), "--check"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": columns, "XDG_DATA_HOME": str(tmp_path)},
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_cli_page_has_every_command() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for path in COMMAND_PATHS:
        assert re.search(rf"^#+ nightherd {' '.join(path)}$", page, re.MULTILINE), path


# Help texts.


@pytest.mark.parametrize("path", COMMAND_PATHS, ids=" ".join)
def test_help_has_an_example_that_parses(path: tuple[str, ...]) -> None:
    text = command_at(path).help
    assert text
    lines = examples(text)
    assert lines, "the help has no 'Example:'"
    own = [parse(line) for line in lines]
    assert path in [one[: len(path)] for one in own], f"no example of itself, only of {own}"


def test_root_help_has_an_example_that_parses() -> None:
    assert cli.help is not None
    assert [parse(line) for line in examples(cli.help)] == [("run",)]


def examples(help_text: str) -> list[str]:
    """The lines under `Example:`, up to the next blank one."""
    _, found, rest = help_text.partition("Example:\n")
    if not found:
        return []
    block = rest.split("\n\n")[0].replace("\b", "")
    return [line.strip() for line in block.splitlines() if line.strip()]


def parse(line: str) -> tuple[str, ...]:
    """Parses an example by the command's own parser, without running it; the command's path.

    An option or argument that does not exist, or a value that is refused, raises.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|")
    lexer.whitespace_split = True
    words = list(lexer)
    start = words.index("nightherd") + 1
    end = words.index("|", start) if "|" in words[start:] else len(words)
    arguments = words[start:end]
    command: click.Command = cli
    context = click.Context(cli, info_name="nightherd")
    path: tuple[str, ...] = ()
    while isinstance(command, click.Group) and arguments:
        name = arguments.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"no command {name!r} in {line!r}"
        command, path = found, (*path, name)
        context = click.Context(command, context, name)
    if not isinstance(command, click.Group):
        command.make_context(path[-1], arguments, context.parent)
    return path


def test_parsing_of_examples_finds_mistakes() -> None:
    assert parse("zcat a.gz | X=1 nightherd submit - --n 2 | jq .") == ("submit",)
    assert parse("nightherd db path") == ("db", "path")
    with pytest.raises(click.NoSuchOption):
        parse("nightherd submit a.jsonl --temprature 0")
    with pytest.raises(click.BadParameter):
        parse("nightherd jobs --limit none")
    with pytest.raises(AssertionError, match="no command"):
        parse("nightherd launch")


@pytest.mark.parametrize("path", COMMAND_PATHS, ids=" ".join)
def test_every_option_is_described(path: tuple[str, ...]) -> None:
    for parameter in command_at(path).params:
        if isinstance(parameter, click.Option) and parameter.name != "limit":
            assert parameter.help, f"{parameter.opts[0]} has no help"


@pytest.mark.parametrize(("name", "entry"), ENTRIES.items(), ids=ENTRIES)
def test_short_help_agrees_with_the_command(name: str, entry: CommandEntry) -> None:
    command = load_command(entry)
    assert command.name == name
    assert command.help
    assert re.fullmatch(r"[A-Z].{5,58}\.", entry.help)
    # Both begin with the same verb.
    assert entry.help.split()[0].strip(":,.") == command.help.split()[0].strip(":,.")


# Speed, and who imports what.


@pytest.mark.parametrize("command", [[], ["submit"]], ids=["nightherd", "submit"])
def test_help_is_fast(command: list[str], tmp_path: Path) -> None:
    taken = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run(
            [PROGRAM, *command, "--help"], check=True, stdout=subprocess.DEVNULL, cwd=tmp_path
        )
        taken.append(time.monotonic() - started)
    assert min(taken) < 0.4, taken


@pytest.mark.parametrize("command", [[], ["submit"]], ids=["nightherd", "submit"])
def test_help_imports_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    program = (
        "import sys; from nightherd.cli import cli\n"
        f"cli.main({[*command, '--help']!r}, 'nightherd', standalone_mode=False)\n"
        "print(*sys.modules, sep='\\n')"
    )
    modules = modules_after(program, tmp_path)
    assert "nightherd.cli" in modules
    assert not modules & {*HEAVY, "sqlalchemy", "celery", "kombu", "redis", "pydantic", "jinja2"}


def test_producer_side_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    program = f"""
import importlib, pkgutil, sys
from pathlib import Path
for root in ("nightherd", "models", "migrations", "producer"):
    package = importlib.import_module(root)
    for found in pkgutil.walk_packages(package.__path__, f"{{root}}."):
        if found.name != "migrations.env":  # runs inside of Alembic alone: below
            importlib.import_module(found.name)
from migrations import schema
from models.database import Database
schema.upgrade(Database("sqlite:///{tmp_path / "empty.db"}"))
print(*sys.modules, sep="\\n")
"""
    modules = modules_after(program, tmp_path)
    assert {
        "producer.jobs.create",
        "producer.commands.results.results",
        "models.store.leases",
    } <= modules
    assert not modules & set(HEAVY)


def modules_after(program: str, folder: Path) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    return set(done.stdout.splitlines())


def test_every_target_of_the_table_imports() -> None:
    for entry in ENTRIES.values():
        module, _, attribute = entry.target.partition(":")
        assert isinstance(getattr(importlib.import_module(module), attribute), click.Command)


# Links.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert file.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(file), f"{target}: {file.name} has no such heading"


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them in links."""
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_commands_that_documents_name_exist() -> None:
    for page in PAGES:
        text = re.sub(r"^<!--.*?-->", "", page.read_text(encoding="utf-8"))
        for name in re.findall(r"`nightherd ([a-z]+)", text):
            assert name in ENTRIES, f"{page.name} names `nightherd {name}`"


# What architecture.md and operations.md say of the code.


def table_cells(page: str, heading: str) -> list[list[str]]:
    """The rows of the tables below a heading, up to the next of its rank or above."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rank = len(heading) - len(heading.lstrip("#"))
    found = re.search(
        rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{rank}}} |\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert found, f"{page} has no {heading!r}"
    rows = re.findall(r"^\| (.*) \|$", found[1], re.MULTILINE)
    return [row.split(" | ") for row in rows if not row.startswith("---")]


def test_modules_of_the_map_exist_and_none_is_left_out() -> None:
    named: set[Path] = set()
    for cell, _ in table_cells("architecture.md", "## Modules")[1:]:
        if cell.startswith("**"):  # a whole package
            continue
        folder = None
        for name in re.findall(r"`([^`]+)`", cell):
            # A name without a folder is beside the one before it.
            path = ROOT / name if "/" in name[:-1] or folder is None else folder / name
            assert path.exists(), name
            folder = path.parent
            named.add(path)
    for package in ("nightherd", "models", "producer", "worker", "migrations"):
        for module in (ROOT / package).rglob("*.py"):
            if module.name in ("__init__.py", "base.py"):
                continue
            assert named & {module, *module.parents}, f"{module.relative_to(ROOT)} is on no map"


@pytest.mark.parametrize(
    ("table", "states"),
    [
        ("### Job", JOB_STATES),
        ("### Chunk", CHUNK_STATES),
        ("### Firing", FIRING_STATES),
        ("### Webhook", WEBHOOK_STATES),
    ],
)
def test_functions_of_the_state_tables_exist(table: str, states: tuple[str, ...]) -> None:
    rows = table_cells("architecture.md", table)[1:]
    assert len(rows) > 6
    for before, after, by, _ in rows:
        assert {*before.split(", "), *after.split(", ")} <= {"–", "(deleted)", *states}
        for name in re.findall(r"`([^`]+)`", by):
            module, _, function = name.partition(".")
            assert callable(getattr(importlib.import_module(f"models.store.{module}"), function))


def test_operations_page_has_every_setting_of_celery_and_its_transport() -> None:
    from nightherd.queue import make_app
    from nightherd.settings import Settings

    conf = make_app("redis://nowhere", Settings()).conf
    assert len(conf.changes) > 15
    named = {
        name
        for row in table_cells("operations.md", "## Celery")
        for name in re.findall(r"`(\w+)`", row[0])
    }
    options = {*conf.changes, *conf.broker_transport_options} - {"broker_transport_options"}
    assert not options - named - {"broker_url", "deprecated_settings"}
    assert not {name for name in named if name not in options and name not in conf}


def test_operations_page_has_every_code_of_a_failed_row() -> None:
    rows = table_cells("operations.md", "## Failed rows")[1:]
    assert sorted(code.strip("`") for code, *_ in rows) == sorted(typing.get_args(RowErrorCode))


def test_documents_name_no_unknown_code_of_a_failed_row() -> None:
    """Codes are words with an underscore after `--only`, `--code` and in the README's outputs."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for code in re.findall(r"(?:--only|--code) ([a-z]+_[a-z_]+)", text):
            assert code in typing.get_args(RowErrorCode), f"{page.name} names {code}"


# The tour.


def console_steps(section: str) -> list[tuple[str, list[str]]]:
    """The commands of a README section's console blocks, each with the output printed below it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"the README has no section {section!r}"
    steps: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", found[1], re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append((line.removeprefix("$ "), []))
            else:
                steps[-1][1].append(line)
    return steps


_ID = re.compile(r"\b1[0-9a-hjkmnp-tv-z]{9}\b")
_TEXT = re.compile(r'"text": "(?:\\.|[^"\\])*"')


def shape(line: str) -> str:
    """A line without what differs from run to run: ids, numbers, texts, bars, widths.

    Whether nothing or something has failed, or is to be done, stays.
    """
    line = _TEXT.sub('"text": TEXT', _ID.sub("ID", line))
    line = re.sub(r'"finish_reason": "(stop|length)"', '"finish_reason": END', line)
    line = re.sub(r"[█░]+", "BAR", line)
    line = re.sub(r"\b0 (failed|to go)", r"none \1", line)
    line = re.sub(r"\d[\d,.]*", "#", line)
    return re.sub(r"# (s|min)\b", "TIME", " ".join(line.split()))


def matches(expected: list[str], got: list[str]) -> bool:
    """Whether the lines are of the same shape; `...` stands for any lines."""
    pattern = "".join(
        r"(?:.*\n)*" if line == "..." else re.escape(shape(line)) + "\n" for line in expected
    )
    return re.fullmatch(pattern, "".join(shape(line) + "\n" for line in got)) is not None


def test_shapes_of_outputs() -> None:
    assert matches(["1qm5e982mz: 40 done in 3 s"], ["1qm5ezzzzz: 1,234 done in 2 min"])
    assert matches(["a", "..."], ["a", "b", "c"])
    assert matches(['{"text": "a \\" b", "n": 1}'], ['{"text": "", "n": 20}'])
    assert not matches(["1 failed"], ["1 done"])
    assert not matches(["0 failed"], ["1 failed"])
    assert not matches(["a"], ["a", "b"])


def play(steps: list[tuple[str, list[str]]], folder: Path, **environment: str) -> None:
    """Runs the steps in one shell, as a reader would, and compares what they print.

    A step must exit with 0 unless it says itself what it exits with.
    """
    (folder / "examples").symlink_to(ROOT / "examples")
    mark = "=== end of step"
    script = "".join(f"{command}\necho '{mark}' $?\n" for command, _ in steps)
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={
            **os.environ,
            "PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}",
            "NIGHTHERD_HOME": str(folder / "home"),
            **environment,
        },
        start_new_session=True,
    )
    try:
        output, _ = shell.communicate(timeout=280)
    finally:
        end_group(shell.pid)
    parts = re.split(rf"^{mark} (\d+)\n", output, flags=re.MULTILINE)
    logs = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.log"))
    for index, (command, expected) in enumerate(steps):
        assert len(parts) > 2 * index + 1, f"the shell ended before: {command}\n{output}\n{logs}"
        got, code = parts[2 * index].splitlines(), parts[2 * index + 1]
        said = "\n".join(got)
        fails = any(line.startswith("nightherd: ") for line in expected)
        assert (code == "0") != fails, f"$ {command}\n{said}\nexit code {code}\n{logs}"
        assert matches(expected, got), (
            f"$ {command}\nprinted:\n{said}\nthe README has:\n" + "\n".join(expected)
        )


def end_group(process_group: int) -> None:
    """Ends what a broken tour may have left behind."""
    import signal

    try:
        os.killpg(process_group, signal.SIGTERM)
    except ProcessLookupError:
        return


@pytest.mark.timeout(300)
def test_tour_of_the_readme_works_as_printed(tmp_path: Path) -> None:
    steps = console_steps("A tour")
    assert len(steps) > 20
    play(steps, tmp_path)


@pytest.mark.timeout(300)
def test_several_machines_of_the_readme_work_as_printed(
    tmp_path: Path, empty_postgresql: str, redis_socket: Path
) -> None:
    """The same commands, with the addresses of real servers."""
    addresses = {
        "DATABASE": empty_postgresql.replace("postgresql+psycopg://", "postgresql://"),
        "BROKER": f"redis+socket://{redis_socket}?virtual_host=0",
    }
    steps = []
    for command, expected in console_steps("Several machines"):
        for name, address in addresses.items():
            if command.startswith(f"export NIGHTHERD_{name}_URL="):
                command = f"export NIGHTHERD_{name}_URL={shlex.quote(address)}"
        steps.append((command, expected))
    assert sum("export" in command for command, _ in steps) == 2
    play(steps, tmp_path)
