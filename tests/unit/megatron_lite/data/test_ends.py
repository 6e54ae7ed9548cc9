"""What ends a text: what files say, what a template writes after an answer, and both beside each other."""

import json

import pytest
import tokenizers

from megatron_lite.data.ends import ends, named_ends, with_ends
from megatron_lite.data.template import PLAIN, ChatTemplate
from megatron_lite.data.tokenizer import load_tokenizer, tokenizer_files
from megatron_lite.errors import DataError
from tests.kit.corpora import CHATML, UNMARKED, write_json_tokenizer, write_tokenizer

GENERATION = "generation_config.json"
END, EOT, EOM, EOS, IM_END = "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|im_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer whose eos ends no turn, with control tokens and one marker that is none."""
    folder = write_json_tokenizer(tmp_path_factory.mktemp("ends") / "hf", eos=EOS)
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.add_special_tokens([EOT, EOM, END])
    model.add_tokens(["<turn/>"])
    model.save(str(folder / "tokenizer.json"))
    return folder


def written(answer, before=""):
    """A template that writes ``answer`` after an answer."""
    said = "{{ m.role + ': ' }}" + before + "{{ m.content }}"
    return "{% for m in messages %}" + said + "{% if m.role == 'assistant' %}" + answer + "{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, IM_END),
        (UNMARKED, IM_END),
        (PLAIN, EOS),
        (written(EOT), EOT),
        (written(END + "\n"), END),
        (written("\n " + EOT), EOT),
        (written(IM_END + "\n" + EOS), IM_END),
        (written("{{ eos_token }}"), EOS),
        (written("<turn/>\n"), "<turn/>"),
        (written(EOT, before="<think>\n\n</think>"), EOT),
        (written("{% generation %}.{% endgeneration %}" + EOT), None),
        (written("\n\n### "), None),
        (written(" ."), None),
        (written(""), None),
        (written("{{ raise_exception('only one turn') }}"), None),
    ],
)
def test_what_a_template_ends_an_answer_with(folder, template, end):
    tokenizer = load_tokenizer(folder)
    found = ChatTemplate(template, tokenizer).end()
    assert found == (-1 if end is None else tokenizer.encode(end, special=True)[0])


def test_of_a_sentencepiece_model(tmp_path):
    write_tokenizer(tmp_path / "t.model")
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert ChatTemplate(PLAIN, tokenizer).end() == tokenizer.eos_id == 3
    assert ChatTemplate(written(" </s>"), tokenizer).end() == 3
    assert ChatTemplate(written("<|im_end|>"), tokenizer).end() == -1


def test_they_stand_beside_those_there_are(folder):
    files, tokenizer = tokenizer_files(folder), load_tokenizer(folder)
    assert with_ends(files, []) == with_ends(files, [tokenizer.eos_id]) == files
    more = with_ends(files, [7, 2])
    assert json.loads(more[GENERATION]) == {"eos_token_id": [tokenizer.eos_id, 7, 2]}
    assert ends(tokenizer, more) == {tokenizer.eos_id, 7, 2}
    base = {**files, GENERATION: json.dumps({"do_sample": True, "eos_token_id": [9, 7]}).encode()}
    assert with_ends(base, [7]) == base
    tree = json.loads(with_ends(base, [2, 7])[GENERATION])
    assert tree == {"do_sample": True, "eos_token_id": [9, 7, 2]}
    theirs = pytest.importorskip("transformers", reason="transformers is not installed (the hf extra)")
    assert theirs.GenerationConfig(**tree).eos_token_id == [9, 7, 2]


@pytest.mark.parametrize(("value", "found"), [(None, []), (5, [5]), ([5, 6], [5, 6]), (-1, []), ([], [])])
def test_what_a_file_names(value, found):
    assert named_ends({GENERATION: json.dumps({"eos_token_id": value}).encode()}) == found


@pytest.mark.parametrize("value", ["</s>", 1.5, True, [[1]], {"a": 1}])
def test_what_is_no_token_is_refused(value):
    with pytest.raises(DataError, match=r"generation_config\.json: eos_token_id: expected token ids, found"):
        named_ends({GENERATION: json.dumps({"eos_token_id": value}).encode()})
