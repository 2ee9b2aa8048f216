from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nightherd.errors import CheckpointError, RowError
from nightherd.params import SamplingParams
from nightherd.text import TextProcessor
from tests.checkpoints import CORPUS, write_text_files

KINDS = ("byte-level", "metaspace")
TEXTS = [
    *CORPUS,
    "",
    " ",
    "  two spaces first",
    "ends in a space ",
    "\n\nbreaks\n",
    "<|end|>special</s> in the text<s>",
    "한국어 ไทย \U0001f3f3\ufe0f\u200d\U0001f308",
]
CHAT = [
    {"role": "system", "content": "You keep a lighthouse."},
    {"role": "user", "content": '  Hello, "Ada"! <b>é</b>  '},
    {"role": "assistant", "content": "Good evening."},
    {"role": "user", "content": "A story, please."},
]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_files(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def text(folder: Path) -> TextProcessor:
    return TextProcessor.load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def params(**given: Any) -> SamplingParams:
    return SamplingParams.model_validate(given)


@pytest.mark.parametrize("special", [True, False])
def test_encodes_as_transformers(text: TextProcessor, theirs: Any, special: bool) -> None:
    wanted = [theirs(one, add_special_tokens=special)["input_ids"] for one in TEXTS]
    assert [text.encode(one, special) for one in TEXTS] == wanted
    assert text.encode_batch(TEXTS, special) == wanted
    assert text.vocab_size == len(theirs)


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_renders_a_chat_as_transformers(
    text: TextProcessor, theirs: Any, generation_prompt: bool
) -> None:
    wanted = theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=generation_prompt
    )
    assert text.render_chat(CHAT, generation_prompt) == wanted
    ids = theirs.apply_chat_template(
        CHAT, add_generation_prompt=generation_prompt, return_dict=False
    )
    if generation_prompt:
        assert text.prepare({"messages": CHAT}, params()) == ids
    assert text.encode(wanted, False) == ids


TEMPLATES = [
    "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{{ m.role }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "{% set n = namespace() %}{% for m in messages %}{% set n.x = m %}{% endfor %}{{ n.x.role }}",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ tools is none }}{{ documents is none }}{{ 'x' if messages[0].name is defined else 'y' }}",
    "{{ strftime_now('%Y') | length }}",
    "  {% if true %}\n  kept\n  {% endif %}\n",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_see_what_transformers_shows_them(tmp_path: Path, template: str) -> None:
    folder = write_text_files(tmp_path, template=template, pad_token="<|end|>")
    chat: list[dict[str, Any]] = [{**message, "name": None} for message in CHAT]
    theirs = AutoTokenizer.from_pretrained(folder)
    wanted = theirs.apply_chat_template(chat, tokenize=False)
    assert TextProcessor.load(folder).render_chat(chat, False) == wanted


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ namespace(__class__=1) }}",
    ],
)
def test_a_template_that_refuses_fails_the_row_alone(tmp_path: Path, template: str) -> None:
    text = TextProcessor.load(write_text_files(tmp_path, template=template))
    with pytest.raises(RowError, match=r"the chat template refused: .") as caught:
        text.render_chat(CHAT)
    assert caught.value.code == "invalid_request"


def test_where_the_chat_template_comes_from(tmp_path: Path) -> None:
    many = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    folder = write_text_files(tmp_path, template=None, chat_template=many)
    assert TextProcessor.load(folder).render_chat(CHAT) == "default"
    (folder / "chat_template.jinja").write_text("file")
    own = TextProcessor.load(folder)
    assert own.render_chat(CHAT) == "file"
    given = TextProcessor.load(folder, chat_template="given")
    assert given.render_chat(CHAT) == "given"
    assert own.template_hash != given.template_hash
    assert own.tokenizer_hash == given.tokenizer_hash
    assert len(own.tokenizer_hash) == len(own.template_hash or "") == 32
    with pytest.raises(CheckpointError, match=r"not valid Jinja2: line 2.*--chat-template"):
        TextProcessor.load(folder, chat_template="\n{% for %}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, False), (False, True)])
def test_added_special_tokens_are_those_of_tokenizer_json(
    tmp_path: Path, kind: str, bos: bool, eos: bool
) -> None:
    folder = write_text_files(tmp_path, kind, add_bos_token=bos, add_eos_token=eos)
    text = TextProcessor.load(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert text.encode("the ship", True) == theirs("the ship")["input_ids"]


def test_special_tokens_of_the_older_files(tmp_path: Path) -> None:
    folder = write_text_files(tmp_path, template="{{ eos_token }}{{ pad_token }}")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|assistant|>"}, "pad_token": "<|end|>"})
    )
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template(CHAT, tokenize=False) == "<|assistant|><|end|>"
    assert TextProcessor.load(folder).render_chat(CHAT) == "<|assistant|><|end|>"


def test_a_prompt_gets_special_tokens_and_a_chat_gets_no_second_bos(text: TextProcessor) -> None:
    bos = text.bos_token_id
    assert text.prepare({"prompt": "the ship"}, params())[0] == bos
    assert bos not in text.prepare({"prompt": "the ship"}, params(add_special_tokens=False))
    chat = text.prepare({"messages": CHAT}, params())
    assert chat[0] == bos
    assert bos not in chat[1:]
    assert text.prepare({"messages": CHAT}, params(add_special_tokens=True))[:2] == [bos, bos]


def test_a_chat_goes_before_the_prompt_where_there_is_a_template(tmp_path: Path) -> None:
    both = {"prompt": "the ship", "messages": CHAT}
    chatty = TextProcessor.load(write_text_files(tmp_path / "chat"))
    base = TextProcessor.load(write_text_files(tmp_path / "base", template=None))
    assert chatty.prepare(both, params()) == chatty.prepare({"messages": CHAT}, params())
    assert base.prepare(both, params()) == base.prepare({"prompt": "the ship"}, params())
    assert not base.has_chat_template
    assert base.template_hash is None
    with pytest.raises(RowError, match="--chat-template") as caught:
        base.prepare({"messages": CHAT}, params())
    assert caught.value.code == "invalid_request"


def test_token_ids_are_checked_against_the_vocabulary(text: TextProcessor) -> None:
    last = text.vocab_size - 1
    assert text.prepare({"prompt": [5, last]}, params()) == [5, last]
    for bad in (last + 1, -1):
        with pytest.raises(RowError, match=rf"token id {bad} is not in the vocabulary \(0 to"):
            text.prepare({"prompt": [5, bad]}, params())


def test_truncation_keeps_the_end(text: TextProcessor) -> None:
    whole = text.prepare({"prompt": CORPUS[0]}, params())
    assert text.prepare({"prompt": CORPUS[0]}, params(truncate_prompt_tokens=3)) == whole[-3:]


def test_an_empty_prompt_is_the_bos_token(text: TextProcessor, tmp_path: Path) -> None:
    bare = params(add_special_tokens=False)
    assert text.prepare({"prompt": ""}, bare) == [text.bos_token_id]
    folder = write_text_files(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    with pytest.raises(RowError, match="the prompt is empty"):
        TextProcessor.load(folder).prepare({"prompt": ""}, bare)


def test_many_at_once_are_as_one_by_one(text: TextProcessor) -> None:
    items: list[tuple[dict[str, Any], SamplingParams]] = [
        *[({"prompt": one}, params()) for one in TEXTS],
        ({"prompt": [1, 2, 3]}, params(truncate_prompt_tokens=2)),
        ({"prompt": [10**6]}, params()),
        ({"messages": CHAT}, params()),
        ({"prompt": "no specials"}, params(add_special_tokens=False)),
        ({"prompt": "half \ud800 a pair"}, params()),
        ({}, params()),
    ]
    for (body, given), outcome in zip(items, text.prepare_many(items), strict=True):
        if isinstance(outcome, RowError):
            with pytest.raises(RowError) as caught:
                text.prepare(body, given)
            assert caught.value.message == outcome.message
        else:
            assert outcome == text.prepare(body, given)
    failed = [index for index, out in enumerate(text.prepare_many(items)) if type(out) is RowError]
    assert failed == [len(TEXTS) + 1, len(TEXTS) + 4, len(TEXTS) + 5]


def test_decoding_goes_on_where_the_prompt_ended(text: TextProcessor) -> None:
    """However a text is cut into prompt and continuation, together they are the text."""
    for whole in [*CORPUS, TEXTS[-1]]:
        ids = text.encode(whole, True)
        assert text.decode(ids) == text.tokenizer.decode(ids)
        for cut in range(1, len(ids)):
            before = text.tokenizer.decode(ids[:cut])
            if "\ufffd" not in before:
                assert before + text.decode(ids[cut:], ids[:cut]) == whole


def test_incomplete_characters_are_replacement_characters(text: TextProcessor) -> None:
    ids = text.encode("Ada 東", False)
    cut = next(cut for cut in range(len(ids)) if "\ufffd" in text.decode(ids[:cut]))
    prompt = text.encode("the ship", True)
    shown = text.decode(ids[:cut], prompt)
    assert shown.rstrip("\ufffd").endswith("Ada ")
    assert shown.endswith("\ufffd")
    # A prompt that ends within a character, which the first tokens then complete.
    assert text.decode(ids[cut:], ids[:cut]).endswith("東")


def test_special_tokens_are_skipped_or_shown(text: TextProcessor) -> None:
    prompt = text.encode("the", True)
    ship = text.encode("the ship", False)[len(prompt) - 1 :]
    end = sorted(text.eos_token_ids)
    assert text.decode([*ship, *end], prompt) == " ship"
    assert text.decode([*ship, *end], prompt, skip_special_tokens=False).endswith(
        text.special_tokens["eos_token"]
    )


def test_bytes_of_tokens_make_up_the_text(text: TextProcessor) -> None:
    for whole in CORPUS:
        joined = b"".join(text.token_bytes(token) for token in text.encode(whole, False))
        assert joined.decode().removeprefix(" ") == whole
    (end,) = text.eos_token_ids
    assert text.token_bytes(end).decode() == text.special_tokens["eos_token"]
    assert text.token_bytes(10**6) == b""


def test_what_ends_a_text(tmp_path: Path) -> None:
    folder = write_text_files(tmp_path)
    assert TextProcessor.load(folder).eos_token_ids == {1}
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    text = TextProcessor.load(folder)
    assert text.eos_token_ids == {1, 2}
    assert text.generation_layer == {"temperature": 0.6}
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert TextProcessor.load(folder).eos_token_ids == {2}
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text('{"text_config": {"max_position_embeddings": 77}}')
    text = TextProcessor.load(folder)
    assert text.eos_token_ids == {1}
    assert text.context_length == 77


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json in "),
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", None, "config.json has no max_position_embeddings"),
        ("generation_config.json", '{"temperature": -1}', "generation_config.json: temperature"),
        ("chat_template.jinja", "{% if", "the chat template is not valid Jinja2"),
    ],
)
def test_a_broken_checkpoint_is_one_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    folder = write_text_files(tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        TextProcessor.load(folder)
    assert "\n" not in str(caught.value)


def test_a_sentencepiece_model_alone_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"convert its tokenizer\.model: nightherd check"):
        TextProcessor.load(tmp_path)


def test_llama_2_as_its_own_class_encodes_the_same(tmp_path: Path) -> None:
    """Where transformers builds the tokenizer from its class instead of reading the pipeline."""
    folder = write_text_files(tmp_path, "metaspace", tokenizer_class="LlamaTokenizer")
    text = TextProcessor.load(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for one in CORPUS:
        assert text.encode(one, True) == theirs(one)["input_ids"]


def test_text_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, nightherd.text, nightherd.catalogue; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
