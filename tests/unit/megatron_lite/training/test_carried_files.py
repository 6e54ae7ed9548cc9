"""What a run's checkpoints carry beside its weights: the tokenizer and what came with it, and what ends a text."""

import json
from types import SimpleNamespace

import pytest

from megatron_lite.data.tokenizer import tokenizer_files
from megatron_lite.training.origin import Origin
from tests.kit.corpora import write_json_tokenizer

GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"


@pytest.fixture
def folder(tmp_path):
    folder = write_json_tokenizer(tmp_path / "hf", eos="<|endoftext|>")
    (folder / GENERATION).write_text('{"eos_token_id": 0, "do_sample": true}')
    return folder


def carried(folder, *, ends, source=None, template=None):
    """The files of a run whose data ends answers with ``ends``, on weights that came with those of ``source``."""
    data = SimpleNamespace(ends=ends, chat_template=template)
    config = SimpleNamespace(data=SimpleNamespace(tokenizer=None if folder is None else str(folder)))
    weights = None if source is None else SimpleNamespace(extras=lambda: dict(source))
    return Origin._extras(SimpleNamespace(config=config, resumed=None, source=weights, adapter=None, train_data=data))


def end_ids(files):
    return json.loads(files[GENERATION])["eos_token_id"]


def test_what_the_data_ends_answers_with_joins_what_ended_a_text_before(folder):
    base = tokenizer_files(folder)
    assert carried(folder, ends=[], source=base) == carried(folder, ends=[0], source=base) == base
    tuned = carried(folder, ends=[2], source=base)
    assert json.loads(tuned[GENERATION]) == {"eos_token_id": [0, 2], "do_sample": True}
    assert tuned.items() >= {name: content for name, content in base.items() if name != GENERATION}.items()
    assert end_ids(carried(folder, ends=[2])) == [0, 2]


def test_it_stays_when_training_goes_on_from_there(folder):
    """On a checkpoint's files, which say more than those of the tokenizer's folder, whatever the data is."""
    tuned = carried(folder, ends=[2], source=tokenizer_files(folder), template="a template")
    for tokenizer in (folder, None):
        again = carried(tokenizer, ends=[], source=tuned)
        assert again == tuned
        assert end_ids(carried(tokenizer, ends=[1], source=tuned)) == [0, 2, 1]


def test_it_does_not_stay_with_another_tokenizer(folder, tmp_path):
    other = write_json_tokenizer(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    tuned = carried(folder, ends=[1], source=tokenizer_files(folder))
    assert carried(other, ends=[2], source=tuned) == tokenizer_files(other)
    assert end_ids(carried(other, ends=[0], source=tuned)) == [2, 0]
