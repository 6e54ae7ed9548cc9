"""Text generation: the cache changes nothing, sampling draws from the set it should, and so on every rank."""

import pytest
import torch
import transformers

from megatron_lite.config import PACKED_BYTES
from megatron_lite.data.template import PLAIN, ChatTemplate
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.distributed.mesh import build_mesh, solo_mesh
from megatron_lite.distributed.shard import spec_of
from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.errors import CheckpointError, ConfigError, DataError
from megatron_lite.generate import Sampling, choose, generate, open_models, read_prompt, read_requests
from tests.kit.adapters import FAMILIES, LENGTH, decoder, saved
from tests.kit.corpora import UNMARKED
from tests.kit.tokenizers import slow_folder

PROMPT = [5, 17, 40, 2]


def produce(model, **sampling):
    return generate(model, PROMPT, Sampling(**sampling), (), torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_cache_as_without(family):
    model = decoder(family)
    tokens = list(PROMPT)
    for _ in range(20):
        tokens.append(int(model(torch.tensor([tokens]), dtype=torch.float64).argmax()))
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


def test_numbers_that_make_no_sense_are_all_named():
    with pytest.raises(ConfigError) as caught:
        Sampling(max_new_tokens=0, temperature=float("nan"), top_k=-1, top_p=0).check()
    told = str(caught.value)
    assert told.count("\n") == 3
    for flag in ("--max_new_tokens=0", "--temperature=nan", "--top_k=-1", "--top_p=0"):
        assert flag in told


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
        pytest.raises(ConfigError, match=r"nf4: attention\.qkv has 32 input features, which are no whole blocks of 64"),
        open_models(tmp_path / "base", solo_mesh(), None, {}, None, "nf4"),
    ):
        pass


@pytest.mark.parametrize(
    ("line", "problem"), [("{", "Expecting"), ('{"prompt": 3}', "are texts"), ('{"text": "x"}', "expected an object")]
)
def test_a_bad_request_is_named(tmp_path, line, problem):
    (tmp_path / "r.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(DataError, match=rf"r\.jsonl:2: .*{problem}"):
        read_requests(tmp_path / "r.jsonl")


def test_a_prompt_is_read_as_transformers_reads_it(tmp_path):
    folder = slow_folder(tmp_path / "t", add_bos_token=True, add_eos_token=True)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in ("hello world", "hello ", " the", "<|im_start|>user\nwho<|im_end|>\n"):
        assert read_prompt(text, ours, None) == theirs(text)["input_ids"]
        assert read_prompt(text, ours, None, (False, False)) == theirs(text, add_special_tokens=False)["input_ids"]
    spelled = theirs("<s>hello<|im_end|>", add_special_tokens=False)["input_ids"]
    assert read_prompt("<s>hello<|im_end|>", ours, None) == spelled  # never two
    assert read_prompt("", ours, None, (False, False)) == [ours.eos_id]
    chat = [{"role": "user", "content": "who"}]
    for source in ("{{ bos_token }}" + UNMARKED, UNMARKED):
        template = ChatTemplate(source, ours)
        theirs.chat_template = source
        want = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert read_prompt("who", ours, template) == want
        assert read_prompt("who", ours, template, (True, None)) == [1, *want[want[0] == 1 :]]
    assert read_prompt("who", ours, ChatTemplate(PLAIN, ours))[0] == ours.bos_id
