"""Text generation: the cache changes nothing, sampling draws from the set it should, and so on every rank."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

from megatron_lite.config import PACKED_BYTES
from megatron_lite.data.template import PLAIN
from megatron_lite.data.tokenizer import load_tokenizer, tokenizer_files
from megatron_lite.distributed.mesh import build_mesh, solo_mesh
from megatron_lite.distributed.shard import spec_of
from megatron_lite.errors import CheckpointError, ConfigError, NonFiniteError
from megatron_lite.inference.codec import Codec
from megatron_lite.inference.generate import generate_text
from megatron_lite.inference.loading import open_models
from megatron_lite.inference.requests import Request, Sampling
from megatron_lite.inference.sampling import choose, generate, of_request
from megatron_lite.layers.context import Context
from megatron_lite.tasks.causal_lm import CausalLM
from tests.kit.adapters import FAMILIES, LENGTH, VOCAB, decoder, saved
from tests.kit.corpora import UNMARKED, write_json_tokenizer
from tests.kit.tokenizers import slow_folder
from tests.kit.world import run_ranks

PROMPT = [5, 17, 40, 2]


def produce(model, **sampling):
    return generate(model, PROMPT, Sampling(**sampling), (), torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_cache_as_without(family):
    model = decoder(family)
    tokens = list(PROMPT)
    for _ in range(20):
        tokens.append(int(model(torch.tensor([tokens]), Context(torch.float64)).argmax()))
    assert produce(model, max_new_tokens=20) == tokens[len(PROMPT) :]
    assert len(set(tokens)) > 5


def on_two_ranks(rank, size):
    mesh = build_mesh({"tp": size}, torch.device("cpu"))
    return [
        produce(decoder(family, mesh.tp, sp), max_new_tokens=16, temperature=temperature, top_k=20)
        for family in FAMILIES
        for sp in (False, True)
        for temperature in (0.0, 1.0)
    ]


def test_the_same_tokens_on_one_rank_and_on_two():
    solo = solo_mesh()
    want = [
        produce(decoder(family, solo.tp), max_new_tokens=16, temperature=temperature, top_k=20)
        for family in FAMILIES
        for _ in range(2)
        for temperature in (0.0, 1.0)
    ]
    assert run_ranks(on_two_ranks, 2, timeout=60) == [want, want]


def test_it_ends_at_the_stop_token_and_at_the_models_length():
    model = decoder("llama")
    whole = produce(model, max_new_tokens=1000)
    assert len(whole) == LENGTH - len(PROMPT)
    stop = whole[6]
    assert generate(model, PROMPT, Sampling(), {stop}, torch.float64) == whole[: whole.index(stop)]


def drawn(sampling, logits, count=400):
    return {int(choose(logits.log().unsqueeze(0), sampling, position)) for position in range(count)}


def test_top_k_and_top_p_keep_what_they_should():
    probabilities = torch.tensor([0.05, 0.5, 0.05, 0.3, 0.1])
    assert drawn(Sampling(temperature=1.0), probabilities) == {0, 1, 2, 3, 4}
    assert drawn(Sampling(temperature=1.0, top_k=2), probabilities) == {1, 3}
    assert drawn(Sampling(temperature=1.0, top_p=0.4), probabilities) == {1}
    assert drawn(Sampling(temperature=1.0, top_p=0.6), probabilities) == {1, 3}
    assert drawn(Sampling(temperature=1.0, top_p=0.85), probabilities) == {1, 3, 4}
    assert drawn(Sampling(temperature=1.0, top_k=3, top_p=0.6), probabilities) == {1, 3}
    assert drawn(Sampling(temperature=1e-4), probabilities) == drawn(Sampling(), probabilities) == {1}


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.2, 0.8])
    ones = sum(int(choose(probabilities.log().unsqueeze(0), Sampling(temperature=1.0), i)) for i in range(4000))
    assert abs(ones / 4000 - 0.8) < 0.03
    hot = sum(int(choose(probabilities.log().unsqueeze(0), Sampling(temperature=2.0), i)) for i in range(4000))
    assert abs(hot / 4000 - 2 / 3) < 0.03


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-300])
def test_the_smallest_temperature_is_greedy_and_the_largest_even(temperature):
    probabilities = torch.tensor([0.05, 0.5, 0.05, 0.3, 0.1])
    assert drawn(Sampling(temperature=temperature, top_k=3, top_p=0.9), probabilities) == {1}
    assert drawn(Sampling(temperature=1e308), probabilities) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature):
    with pytest.raises(NonFiniteError, match="the model's logits are not finite"):
        choose(torch.tensor([[0.0, float("nan"), 1.0]]), Sampling(temperature=temperature), 0)


def test_rows_that_only_pad_the_vocabulary_are_never_drawn():
    model = decoder("gpt2")  # 61 tokens, 64 rows, which are those of the embedding, too
    with torch.no_grad():
        model.projection.weight[VOCAB:] = 50 * model.projection.weight[:3]
    hot = produce(model, temperature=100.0, max_new_tokens=28)
    assert max(hot) < VOCAB and len(set(hot)) > 10
    some = generate(model, PROMPT, Sampling(temperature=100.0), (), torch.float64, known=50)
    assert max(some) < 50 < max(hot)


def test_requests_draw_unlike_each_other_and_alike_again():
    sampling, model = Sampling(temperature=1.0, seed=5, max_new_tokens=16), decoder("llama")

    def draw(index, **own):
        return generate(model, PROMPT, of_request(sampling, index, own), (), torch.float64)

    texts = [draw(index) for index in range(4)]
    assert len({tuple(text) for text in texts}) == 4
    assert texts == [draw(index) for index in range(4)]
    assert texts[0] == produce(model, temperature=1.0, seed=5, max_new_tokens=16)
    assert draw(3, seed=5) == texts[0]
    assert draw(3, temperature=0.0, max_new_tokens=3) == produce(model, max_new_tokens=3)


ADAPTERS = {
    "lora": {"method": "lora", "targets": ["*"]},
    "bottleneck": {"method": "adapter", "size": 4},
    "prefix": {"method": "prefix", "length": 3, "reparameterize": 4},
}


def with_adapter(method):
    return decoder("llama", method=method)


def test_adapters_share_a_base_and_each_request_names_its_own(tmp_path):
    saved(tmp_path / "base", with_adapter(None), 1)
    alone, paths = {None: produce(with_adapter(None), max_new_tokens=12)}, {}
    for seed, (name, method) in enumerate(ADAPTERS.items(), 2):
        model = with_adapter(method)
        saved(tmp_path / name, model, seed, method)
        alone[name], paths[name] = produce(model, max_new_tokens=12), tmp_path / name
    assert len({tuple(tokens) for tokens in alone.values()}) == len(alone)

    with open_models(tmp_path / "base", solo_mesh(), None, paths, None) as (models, _, default):
        assert default is None
        for name in (*alone, *reversed(alone)):
            assert produce(models[name], max_new_tokens=12) == alone[name]
        weights = {model.blocks[0].mlp.up.weight.data_ptr() for model in models.by_name.values()}
        assert len(weights) == 1
        with pytest.raises(ConfigError, match=r"no adapter 'loro' \(did you mean 'lora'\?\); loaded: lora, bottleneck"):
            models["loro"]
    with open_models(tmp_path / "lora", solo_mesh(), None, {}, None) as (models, _, default):
        assert produce(models[default], max_new_tokens=12) == alone["lora"]


def test_an_adapter_of_another_base_is_refused(tmp_path):
    model = with_adapter(None)
    with torch.no_grad():
        model.norm.weight[3] += 0.1
    saved(tmp_path / "base", model, 1)
    saved(tmp_path / "lora", with_adapter(ADAPTERS["lora"]), 2, ADAPTERS["lora"])
    refused = pytest.raises(CheckpointError, match="was trained on a base of fingerprint")
    with refused, open_models(tmp_path / "lora", solo_mesh(), None, {}, None):
        pass


def packed(mesh, folder, packing):
    """What an adapter and its base produce, stored so."""
    with open_models(folder / "lora", mesh, None, {}, None, packing) as (models, _, default):
        return [produce(models[name], max_new_tokens=16) for name in (default, None)]


def packed_on_two_ranks(rank, size, folder):
    mesh = build_mesh({"tp": size}, torch.device("cpu"))
    return [packed(mesh, folder, packing) for packing in PACKED_BYTES]


def test_on_a_packed_base_one_rank_and_two_produce_what_was_trained(tmp_path):
    """The adapter is of the base on disk, however that was stored in training."""
    method = {"method": "lora", "targets": ["q", "o", "up", "down"]}
    base, adapter = decoder("llama", hidden=128), decoder("llama", hidden=128, method=method)
    saved(tmp_path / "base", base, 1)
    saved(tmp_path / "lora", adapter, 2, {**method, "base_dtype": "int8"})
    found = [packed(solo_mesh(), tmp_path, packing) for packing in PACKED_BYTES]
    assert run_ranks(packed_on_two_ranks, 2, tmp_path, timeout=60) == [found, found]
    for packing, (adapted, alone) in zip(PACKED_BYTES, found, strict=True):
        model = decoder("llama", hidden=128, method={**method, "base_dtype": packing})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if spec_of(parameter).packing is None:
                    parameter.copy_(adapter.get_parameter(name))
        assert adapted == produce(model, max_new_tokens=16) != alone
    assert packed(solo_mesh(), tmp_path, None)[1] == produce(base, max_new_tokens=16)


def test_a_base_whose_rows_are_no_blocks_is_not_packed(tmp_path):
    saved(tmp_path / "base", decoder("llama"), 1)
    with (
        pytest.raises(ConfigError, match=r"nf4: attention\.qkv has 32 input features, not a multiple of the block"),
        open_models(tmp_path / "base", solo_mesh(), None, {}, None, "nf4"),
    ):
        pass


def test_a_prompt_is_read_as_transformers_reads_it(tmp_path):
    folder = slow_folder(tmp_path / "t", add_bos_token=True, add_eos_token=True)
    theirs, files = transformers.AutoTokenizer.from_pretrained(folder), tokenizer_files(folder)

    def read(text, add=(None, None), template=None):
        more = {} if template is None else {"chat_template.jinja": template.encode()}
        return Codec({**files, **more}, folder, 10**6, add).read(text, chat=template is not None)

    for text in ("hello world", "hello ", " the", "<|im_start|>user\nwho<|im_end|>\n"):
        assert read(text) == theirs(text)["input_ids"]
        assert read(text, (False, False)) == theirs(text, add_special_tokens=False)["input_ids"]
    spelled = theirs("<s>hello<|im_end|>", add_special_tokens=False)["input_ids"]
    assert read("<s>hello<|im_end|>") == spelled  # never two
    assert read("", (False, False)) == [load_tokenizer(folder).eos_id]
    chat = [{"role": "user", "content": "who"}]
    for source in ("{{ bos_token }}" + UNMARKED, UNMARKED):
        theirs.chat_template = source
        want = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert read("who", template=source) == want
        assert read("who", (True, None), source) == [1, *want[want[0] == 1 :]]
    assert read("who", template=PLAIN)[0] == load_tokenizer(folder).bos_id


CHAT = [{"role": "user", "content": "import os"}]


def test_messages_are_read_as_training_reads_them(tmp_path):
    files = tokenizer_files(write_json_tokenizer(tmp_path))

    def read(template, *messages):
        codec = Codec({**files, "chat_template.jinja": template.encode()}, tmp_path, 10**6)
        return codec.tokenizer.decode(codec.read(messages, chat=True))

    shown = (
        "{% for m in messages %}{{ m.role }}:{{ m.name if m.name is defined }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %};{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"é": 1}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}
    assert read(shown, {**CHAT[0], "name": None}, answer) == 'user::import os;assistant::{"é": 1};'
    deaf = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="the prompt: the chat template leaves out message 1, of role 'system'"):
        read(deaf, {"role": "system", "content": "Count."}, *CHAT)
    with pytest.raises(ConfigError, match="the prompt: message 2: the chat template leaves out its tool calls"):
        read(deaf, *CHAT, answer)


def speaking(folder, vocab=400, **tokenizer):
    """A base that has a tokenizer, and its small files."""
    files = tokenizer_files(write_json_tokenizer(folder / "hf", **tokenizer))
    saved(folder / "base", decoder("gpt2", vocab=vocab), 1, files=files)
    return folder / "base", files


def said(path, *requests, **options):
    """What each is answered, greedily."""
    numbered = [replace(request, line=line) for line, request in enumerate(requests, 1)]
    return list(generate_text(path, numbered, Sampling(max_new_tokens=8), torch.float64, **options))


def ending_with(files, token):
    return {**files, "generation_config.json": json.dumps({"eos_token_id": [399, token]}).encode()}


def test_what_cannot_be_answered_says_so_and_the_others_are(tmp_path):
    path, _ = speaking(tmp_path, vocab=380)
    far = "".join(map(chr, range(0x4E00, 0x4E0B)))  # a token for each byte
    good, long, surrogate, again = said(path, *map(Request, ("import os", 9 * far, "\ud800", "import os")))
    assert good == again
    assert (good.prompt, good.num_tokens, good.finish_reason) == ("import os", 8, "length")
    assert (long.text, long.error) == ("", "the prompt has 297 tokens; this model takes at most 31")
    assert surrogate.error == "the prompt cannot be encoded as UTF-8"
    with pytest.raises(ConfigError, match="the prompt has 297 tokens; this model takes at most 31"):
        list(generate_text(path, [Request(9 * far)], Sampling()))


def test_a_token_beyond_the_models_rows_is_refused_by_name(tmp_path, caplog):
    path, _ = speaking(tmp_path, vocab=2)
    (answer,) = said(path, Request("\n", own={"max_new_tokens": 1}), chat=False)
    assert re.search(r"the prompt has token \d+ '\\n', but the model's vocabulary has 2 entries; .* 400", answer.error)
    (answer,) = said(path, Request(CHAT))
    assert re.search(r"the prompt has token \d+ '.*', but the model's vocabulary has 2 entries", answer.error)
    assert "no text can end with token 2 '<|im_end|>': the model's vocabulary has 2" in caplog.text
    with pytest.raises(CheckpointError, match="the prompt has token"):
        list(generate_text(path, [Request("\n")], Sampling()))


def test_a_text_ends_with_what_the_files_say_and_an_answer_with_what_the_template_writes(tmp_path):
    _, files = speaking(tmp_path, eos="<|endoftext|>")
    model = decoder("gpt2", vocab=400)
    tokenizer = load_tokenizer(tmp_path / "hf")
    produced = generate(model, tokenizer.encode("import os"), Sampling(max_new_tokens=8), (), torch.float64)
    stop = produced[4]
    saved(tmp_path / "told", model, 1, files=ending_with(files, stop))
    (answer,) = said(tmp_path / "told", Request("import os"))
    first = produced.index(stop)
    assert (answer.num_tokens, answer.finish_reason) == (first, "stop")
    assert answer.text == tokenizer.decode(produced[:first])
    template = (
        "{{ messages[0].content }}{% if messages[1] %}{{ messages[1].content + '" + "<|im_end|>" + "' }}{% endif %}"
    )
    with torch.no_grad():  # in a chat <|im_end|>, which no file names, is what it says at once
        model.projection.weight[tokenizer.special["<|im_end|>"]] = model.projection.weight[produced[0]]
        model.projection.weight[produced[0]] = 0.0
    saved(tmp_path / "chat", model, 1, files={**files, "chat_template.jinja": template.encode()})
    plain, chat = said(tmp_path / "chat", Request("import os"), Request(CHAT))
    assert (plain.num_tokens, plain.finish_reason) == (8, "length")
    assert (chat.num_tokens, chat.finish_reason, chat.text) == (0, "stop", "")


@pytest.mark.parametrize(("tokens", "eos"), [([], -1), ([5, 90], 2)])
def test_training_shows_no_sample_of_a_prompt_that_the_model_has_no_rows_for(tokens, eos, caplog):
    tokenizer = SimpleNamespace(encode_prompt=lambda text: tokens or [eos], eos_id=eos)
    task = CausalLM(SimpleNamespace(train=SimpleNamespace(sample_prompt="x")))
    assert task.sample(SimpleNamespace(vocab_size=90), tokenizer, {}, Context()) is None
    assert "no sample: train.sample_prompt has tokens that the model does not" in caplog.text


def test_a_template_that_does_not_compile_is_refused_before_anything_is_computed(tmp_path):
    _, files = speaking(tmp_path)
    saved(tmp_path / "odd", decoder("gpt2", vocab=400), 1, files={**files, "chat_template.jinja": b"{% if %}"})
    answers = generate_text(tmp_path / "odd", [Request("import os", line=1), Request(CHAT, line=2)], Sampling())
    with pytest.raises(ConfigError, match="odd's chat template, line 1: "):
        next(answers)


def test_each_adapter_has_its_own_template_and_ends(tmp_path):
    path, files = speaking(tmp_path)
    method = ADAPTERS["lora"]
    model = decoder("gpt2", vocab=400, method=method)
    saved(tmp_path / "a", model, 2, method, files)
    whole, base = said(path, Request(CHAT, "a"), Request(CHAT), adapters={"a": tmp_path / "a"})
    assert (whole.adapter, base.adapter, whole.num_tokens) == ("a", None, 8)
    assert whole.text != base.text
    other = {**files, "chat_template.jinja": b"{{ messages[0].content }}"}
    saved(tmp_path / "b", decoder("gpt2", vocab=400, method=method), 2, method, other)
    answers = said(
        path,
        Request(CHAT, "a"),
        Request(CHAT, "b"),
        Request("import os", "a"),
        adapters={"a": tmp_path / "a", "b": tmp_path / "b"},
    )
    assert answers[0] == whole
    assert answers[1].text == answers[2].text != whole.text
    with pytest.raises(ConfigError, match="--adapters: default is the name of"):
        said(tmp_path / "a", Request("x"), adapters={"default": tmp_path / "b"})
