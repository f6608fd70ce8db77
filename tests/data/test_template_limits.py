"""A chat template that loops, grows or fails in any way is refused in a line, and the process goes on as before."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from jax_simpo.data import template_limits
from jax_simpo.data.chat import TOO_MUCH, load_tokenizer, render_group
from jax_simpo.data.conversations import read_conversation
from jax_simpo.data.messages import BadRow
from jax_simpo.data.sources import from_memory
from jax_simpo.data.tokenize import tokenize_split
from jax_simpo.errors import DataError
from tests.small_tokenizer import save

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the limits of memory are those of Linux"),
    # The exception that ends a template may fall into a callback of the garbage collector. It is raised again then.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ANSWERS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
TIME, MEMORY = "it takes more than 0.2 seconds", "it takes more than 0.1 GB of memory"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tokenizer"), template=ANSWERS)


@pytest.fixture(autouse=True)
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    monkeypatch.setattr(template_limits, "BYTES", 100_000_000)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (LOOP, TIME),
        (GROW, MEMORY),
        ("{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", TIME),
        ("{{ [1]|slice(10000000000)|list }}", TIME),
        ("{{ 'a' * 10000000000 }}", MEMORY),
        ("{{ [0] * 10000000000 }}", MEMORY),
        ("{{ 'a'.center(10000000000) }}", MEMORY),
        ("{{ 'a'.ljust(10000000000) }}", MEMORY),
        ("{{ 'a\\nb'|indent(10000000000) }}", MEMORY),
        ("{{ '%10000000000d' % 1 }}", MEMORY),
        ("{{ '{:10000000000}'.format(1) }}", MEMORY),
        ("{{ ('a' * 100000)|replace('a', 'b' * 100000) }}", MEMORY),
        ("{{ messages|tojson(indent=10000000000) }}", MEMORY),
        ("{{ 'a' * 1000000 }}", "it writes 2,000,000 characters for a conversation of"),
        ("\n{{ 9 ** 9 ** 9 }}", "line 2: the power `**` may take for ever: remove it"),
        ("{% generation %}{{ 'a' * 10 ** 10 }}{% endgeneration %}", "line 1: the power `**` may take for ever"),
        ("{% include 'x' %}", "TypeError: no loader for this environment"),
        ("{{ range(10000000) }}", "OverflowError: Range too big"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError: maximum recursion depth exceeded"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError: maximum recursion depth exceeded"),
        ("{% for a in b %}" * 60 + "{% endfor %}" * 60, "SyntaxError: too many statically nested blocks"),
        ("{{ 1" + "0" * 6000 + " }}", "ValueError: Exceeds the limit"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ raise_exception('no\nway') }}", "cannot write a question and its answer (no way)"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError: 'utf-8' codec can't encode"),
        ("\n{% for %}", "line 2: Expected an expression, got 'end of statement block'"),
    ],
)
def test_a_hostile_template_is_refused_in_one_line_that_names_the_tokenizer(
    folder: Path, template: str, told: str
) -> None:
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder, chat_template=template)
    message = str(caught.value)
    assert message.startswith(f"chat template of {folder}") and told in message
    assert "\n" not in message and len(message) < 800


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x.jinja", "x" * 300])
def test_a_path_that_no_file_can_have_is_no_template(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"^chat_template '.*: (neither a built-in name|cannot be read)"):
        load_tokenizer(folder, chat_template=name)


def test_a_template_file_that_is_not_text_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"t.jinja': cannot be read \(UnicodeDecodeError: "):
        load_tokenizer(folder, chat_template=str(tmp_path / "t.jinja"))


def test_arguments_may_be_unpacked(folder: Path) -> None:
    template = "{% for m in messages %}{{ dict(**m).content }}{{ dict(m, **m).content }}{% endfor %}"
    assert load_tokenizer(folder, chat_template=template).chat_template == template


# --- rows

ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}


def only_for(text: str, statement: str) -> str:
    """A template that is hostile to rows with a text only."""
    return f"{{% if messages[0]['content'] == '{text}' %}}{statement}{{% endif %}}{ANSWERS}"


def tokenized(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], cache: Path) -> list[int]:
    """The numbers of the rows that are skipped."""
    data = tokenize_split(
        from_memory("train", rows),
        tokenizer,
        max_length=64,
        max_prompt_length=32,
        on_bad_row="skip",
        cache_dir=cache,
        progress=False,
    )
    return [row.index for row in data.skipped]


@pytest.mark.parametrize(
    ("statement", "kind", "detail"),
    [
        (LOOP, TOO_MUCH, TIME),
        (GROW, TOO_MUCH, MEMORY),
        ("{{ 'a' * 999999 }}", TOO_MUCH, r"it writes 1,000,0.. characters for a conversation of"),
        ("{{ 1 / 0 }}", "refused by the chat template", "ZeroDivisionError: division by zero"),
        ("{{ '\\ud800' }}", "refused by the chat template", "UnicodeEncodeError"),
    ],
)
def test_a_row_that_a_template_takes_too_much_for_is_a_bad_row(
    folder: Path, statement: str, kind: str, detail: str
) -> None:
    tokenizer = load_tokenizer(folder, chat_template=only_for("q", statement))
    with pytest.raises(BadRow, match=detail) as caught:
        render_group(read_conversation(ROW), tokenizer, True)
    assert caught.value.kind == kind
    assert render_group(read_conversation({**ROW, "prompt": "p"}), tokenizer, True).prompt == "<user>p"


def test_rows_after_one_that_takes_too_much_have_the_whole_time_again(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder, chat_template=only_for("q", LOOP))
    rows = [{**ROW, "prompt": prompt} for prompt in ("p", "q", "r", "q", "s")]
    assert tokenized(tokenizer, rows, tmp_path) == [1, 3]


def test_a_template_that_takes_too_much_for_many_rows_is_given_up(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder, chat_template=only_for("q", "{{ 'a' * 10000000000 }}"))
    with pytest.raises(DataError, match=rf"{TOO_MUCH}: {MEMORY} .*, in row 0 and in 9 of the 20 read with it"):
        tokenized(tokenizer, [ROW] * 20, tmp_path)


# --- what a process had before


def test_timers_signals_and_limits_are_afterwards_as_before() -> None:
    def own(number: int, frame: object) -> None:
        raise AssertionError("nobody sent this")

    def never_ends() -> None:
        while True:
            pass

    former, limits = signal.signal(signal.SIGVTALRM, own), resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1000.0)
    try:
        assert template_limits.limited(lambda: resource.getrlimit(resource.RLIMIT_AS)) != limits
        with pytest.raises(template_limits.TooMuchError):
            template_limits.limited(never_ends)
        assert signal.getsignal(signal.SIGVTALRM) is own
        assert 900 < signal.getitimer(signal.ITIMER_VIRTUAL)[0] <= 1001  # the kernel rounds up
        assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
        assert resource.getrlimit(resource.RLIMIT_AS) == limits
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)


def test_an_error_that_is_lost_is_raised_again() -> None:
    def loses_it() -> None:
        try:
            while True:
                pass
        except BaseException:
            while True:
                pass

    with pytest.raises(template_limits.TooMuchError, match=r"more than 0\.2 seconds"):
        template_limits.limited(loses_it)


def test_another_thread_has_no_limits_and_leaves_those_of_the_main_one() -> None:
    def in_thread() -> list[int]:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: template_limits.limited(lambda: seen.append(1)))
        thread.start()
        thread.join()
        return seen

    def then_never_ends() -> None:
        assert in_thread() == [1]
        while True:
            pass

    with pytest.raises(template_limits.TooMuchError):
        template_limits.limited(then_never_ends)


def test_a_call_that_nothing_can_interrupt_ends_the_process_and_names_its_line() -> None:
    script = """
from jax_simpo.data import template_limits
template_limits.LOST_SECONDS = 0.3
def render():
    return 7 ** 10**9
template_limits.limited(render)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGPROF
    assert 'File "<string>", line 5 in render' in done.stderr
