"""Templates over a row's columns: Jinja2 in a sandbox, and the bodies that are made with them.

`--template`, `--system` and the tasks are all compiled here. A template sees the row's columns by
their names, and the whole row as `row` for names that are no identifiers: `{{ row['my column'] }}`.
A firing's `scheduled_for` and `firing` are variables beside them; a column of such a name wins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import jinja2
import jinja2.meta
from jinja2.runtime import Context, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import missing, pass_context

from nightherd.errors import UsageError

MAX_CHARS = 10_000_000
"""What one template may write; no context is near it, and a slip such as `10**9` is beyond it."""

_MAX_POWER_BITS = 20_000
_MAX_NAMES = 20
_PRINTABLE = frozenset((str, int, float, bool, list, tuple, dict))


class BadRowError(Exception):
    """One row cannot become a request; the message goes beside its line number."""


def one_line(text: str, limit: int = 400) -> str:
    """`text` on one line, printable and of bounded length: what a row holds can be anything."""
    text = "".join(char if char.isprintable() else " " for char in text[: 4 * limit])
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def unstorable(text: str) -> str | None:
    """Why `text` cannot be stored and encoded, if so."""
    if "\0" in text:
        return "a NUL character (U+0000), which SQL databases cannot store"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"half of a surrogate pair (U+{ord(text[error.start]):04X}), which is no text"
    return None


def describe_columns(columns: Mapping[str, Any], what: str = "columns") -> str:
    """The columns that are there, for the end of a message."""
    names = [repr(name)[1:-1] for name in list(columns)[:_MAX_NAMES]]
    more = ", …" if len(columns) > _MAX_NAMES else ""
    return f"({what}: {', '.join(names)}{more})" if names else f"(it has no {what})"


class _MissingColumnError(jinja2.UndefinedError):
    """A template used a name that the row does not have."""


class _Missing(StrictUndefined):
    """An undefined value that speaks of columns; any use of it but `is defined` fails."""

    __slots__ = ()

    def __init__(
        self,
        hint: str | None = None,
        obj: Any = missing,
        name: str | None = None,
        exc: type[jinja2.TemplateRuntimeError] = jinja2.UndefinedError,
    ) -> None:
        if hint is None and obj is missing:
            hint, exc = f"column {name!r} is not there", _MissingColumnError
        elif hint is None and isinstance(obj, dict):
            hint = f"key {name!r} is not there {describe_columns(obj, 'keys')}"
        super().__init__(hint, obj, name, exc)


@pass_context
def _check_printable(context: Context, value: object) -> object:
    # "None" or "<built-in method …>" in the middle of ten million prompts is found too late.
    if type(value) in _PRINTABLE:
        return value
    if value is None:
        nulls = [repr(name) for name, column in context.parent.items() if column is None]
        which = f" (null columns: {', '.join(nulls[:_MAX_NAMES])})" if nulls else ""
        raise BadRowError(f"a value is null{which}; {{{{ … or '' }}}} writes nothing for it")
    if isinstance(value, str | jinja2.Undefined):
        return value
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    kind = type(value).__name__
    if callable(value):
        raise BadRowError(f"a {kind} is no text; a key of that name is reached by ['name']")
    raise BadRowError(f"a {kind} is no text; | list or | join makes one of it")


def _tojson(value: object, indent: int | None = None) -> str:
    # Jinja's own escapes <, >, & and ' for HTML pages. `str` makes an undefined value complain.
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str)


def _time(value: object, filter_: str) -> datetime:
    if isinstance(value, datetime):
        return value
    if isinstance(value, jinja2.Undefined):
        str(value)  # complains of the missing column
    raise BadRowError(f"| {filter_} is for times, as {{{{ scheduled_for }}}} is one")


def _date(value: object, form: str = "%Y-%m-%d") -> str:
    """`{{ scheduled_for | date }}`, or in any form that strftime knows."""
    return _time(value, "date").strftime(form)


def _days(value: object, count: int) -> datetime:
    """The same time of day so many days later, also where a day has 23 or 25 hours."""
    return _time(value, "days") + timedelta(days=count)


def _hours(value: object, count: float) -> datetime:
    """So many hours later, as a stop watch counts them."""
    time = _time(value, "hours")
    return (time.astimezone(UTC) + timedelta(hours=count)).astimezone(time.tzinfo)


class _Sandbox(ImmutableSandboxedEnvironment):
    # An intercepted operator is also not computed while a template is compiled.
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size = 0
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    size = len(many) * times
        elif isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * right * (MAX_CHARS // _MAX_POWER_BITS)
        if size > MAX_CHARS:
            raise BadRowError(f"what '{operator}' makes is too large")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        if isinstance(obj, _Missing):
            # That the column is missing comes before what was to be done with it.
            return obj
        return super().unsafe_undefined(obj, attribute)


def _environment() -> _Sandbox:
    sandbox = _Sandbox(
        undefined=_Missing, autoescape=False, keep_trailing_newline=True, finalize=_check_printable
    )
    sandbox.filters |= {"tojson": _tojson, "date": _date, "days": _days, "hours": _hours}
    # They would hide that a column of their name is missing, and no prompt needs them.
    for name in ("lipsum", "cycler", "joiner", "dict"):
        del sandbox.globals[name]
    return sandbox


_SANDBOX = _environment()


class Template:
    """A compiled template; `names` are the columns and variables that it can use."""

    __slots__ = ("_compiled", "_constant", "_uses_row", "_variables", "names", "text", "what")

    def __init__(
        self,
        text: str,
        what: str,
        compiled: jinja2.Template,
        names: frozenset[str],
        variables: Mapping[str, Any],
    ) -> None:
        self.text = text
        self.what = what
        self.names = names
        self._compiled = compiled
        self._uses_row = "row" in names
        self._variables = {name: value for name, value in variables.items() if name in names}
        self._constant: str | None = None
        if not any(mark in text for mark in ("{{", "{%", "{#")):
            self._constant = self._run({})

    def render(self, columns: Mapping[str, Any]) -> str:
        """The text for one row; raises `BadRowError` whatever goes wrong."""
        if self._constant is not None:
            return self._constant
        values = {"row": columns, **columns} if self._uses_row else columns
        if self._variables:
            values = {**self._variables, **values}
        try:
            text = self._run(values)
        except BadRowError as error:
            raise BadRowError(f"{self.what}: {error}") from None
        except _MissingColumnError as error:
            raise BadRowError(f"{error} {describe_columns(columns)}") from None
        except jinja2.TemplateRuntimeError as error:
            raise BadRowError(one_line(f"{self.what}: {error}")) from None
        except Exception as error:
            # A template is the user's program over the user's data: it may raise anything.
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise BadRowError(one_line(f"{self.what}: {reason}")) from None
        unfit = unstorable(text)
        if unfit is not None:
            raise BadRowError(f"{self.what} writes {unfit}")
        return text

    def _run(self, values: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        # Counted piece by piece, so that a loop ends when it has written too much.
        context = self._compiled.new_context(values if type(values) is dict else dict(values))
        for piece in self._compiled.root_render_func(context):
            size += len(piece)
            if size > MAX_CHARS:
                raise BadRowError(f"it writes more than {MAX_CHARS:,} characters")
            pieces.append(piece)
        return "".join(pieces)


def compile_template(text: str, what: str, variables: Mapping[str, Any] | None = None) -> Template:
    """Compiles `text`; `what` names the option it came from.

    `variables` stand beside the columns of every row; a column of the same name wins. Raises
    `UsageError` with the option and the line of a syntax error.
    """
    reason = unstorable(text)
    if reason:
        raise UsageError(f"{what} holds {reason}")
    try:
        tree = _SANDBOX.parse(text)
        names = jinja2.meta.find_undeclared_variables(tree)
        if any(True for _ in jinja2.meta.find_referenced_templates(tree)):
            raise UsageError(f"{what} cannot include or import other templates; write it out")
        compiled = _SANDBOX.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(one_line(f"{what}, line {error.lineno}: {error.message}")) from None
    except (MemoryError, OverflowError, RecursionError, SyntaxError, ValueError) as error:
        # Python's own compiler has limits too, such as the depth of nested blocks.
        raise UsageError(one_line(f"{what} cannot be compiled: {error}")) from None
    return Template(text, what, compiled, frozenset(names), variables or {})
