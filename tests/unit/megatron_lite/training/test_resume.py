"""What a run that goes on compares with its checkpoint: refused by name, allowed by name, or said in the log."""

import json
import re
from types import SimpleNamespace

import pytest
import yaml

from megatron_lite.config import CHANGEABLE, ModelConfig, load_config, model_section
from megatron_lite.config.model import _SHAPES, _WITHOUT_EFFECT
from megatron_lite.data.tokenizer import SETTINGS, load_tokenizer, tokenizer_files
from megatron_lite.errors import CheckpointError, ConfigError, DataError
from megatron_lite.training.resume import check_optimizer, check_tokenizers
from tests.kit.alone import moments_step, run_alone
from tests.kit.corpora import write_json_tokenizer
from tests.kit.tiny import append_document, losses, tiny_config, tiny_data


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("key", ModelConfig.model_fields)
def test_every_key_of_the_model_is_a_shape_a_function_or_known_to_be_neither(key, family):
    """A key that is added is compared until it is said that it does not matter."""
    here = ModelConfig(vocab_size=64, family=family)
    shapes, function = here.differences(here.model_copy(update={key: "another"}))
    learned = family == "gpt2"
    if key in _SHAPES or (learned and key == "max_seq_len"):
        assert (shapes, function) == ([key], [])
    elif key in _WITHOUT_EFFECT or (learned and key in ("rope_theta", "rope_scaling")):
        assert (shapes, function) == ([], [])
    else:
        assert (shapes, function) == ([], [key]) and f"model.{key}" in CHANGEABLE


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of three steps: its config and its checkpoint."""
    folder = tmp_path_factory.mktemp("begun")
    config = tiny_config(folder, tiny_data(folder), train__steps=3, train__log_every=100)
    run_alone(config)
    return config, folder / "run" / "checkpoints" / "step_00000003"


@pytest.fixture
def go_on(begun, tmp_path):
    """A fourth step in a folder of its own; the log of it."""
    config, start = begun
    return lambda *flags: run_alone(config, f"run.dir={tmp_path}", f"checkpoint.resume={start}", *flags)[1]


MORE = ("train.steps=4", "optim.schedule=constant")


@pytest.mark.parametrize(
    "change",
    [
        "model.rope_theta=5e5",
        "model.rope_scaling={type: linear, factor: 2}",
        "model.norm_eps=1e-3",
        "model.dropout=0.1",
        "model.attention_dropout=0.1",
    ],
)
def test_another_function_of_the_same_tensors_is_refused_unless_it_is_named(go_on, begun, change):
    key, start = re.escape(change.partition("=")[0]), re.escape(str(begun[1]))
    told = rf"{key} .+ there, .+ here; checkpoint\.allow_change=\[{key}\] continues with the values of this config"
    with pytest.raises(CheckpointError, match=rf"\A{start}: {told}\Z"):
        go_on(*MORE, change, "checkpoint.allow_change=[chat_template]")
    log = go_on(*MORE, change, f"checkpoint.allow_change=[{change.partition('=')[0]}]")
    assert re.search(rf"^changed since the checkpoint: {key} .+ → .+$", log, re.MULTILINE)


def test_shapes_are_refused_whatever_is_allowed(go_on):
    told = r"model\.num_heads 4 there, 2 here, model\.num_kv_heads .*, model\.rope_theta 10000\.0 there, 7\.0 here\Z"
    with pytest.raises(CheckpointError, match=told):
        go_on(*MORE, "model.num_heads=2", "model.rope_theta=7")


def test_a_vocabulary_padded_to_another_size_is_refused_by_its_key(go_on):
    with pytest.raises(CheckpointError, match=r"step_00000003: model\.vocab_multiple 128 there, 96 here: a run"):
        go_on(*MORE, "model.vocab_multiple=96")


def test_what_is_allowed_is_a_key_that_may_change(begun):
    known = ", ".join(map(repr, (*CHANGEABLE, "chat_template")))
    for key, hint in (("model.rope_thta", " (did you mean 'model.rope_theta'?)"), ("optim", "")):
        with pytest.raises(ConfigError) as refused:
            load_config(str(begun[0]), {"checkpoint.allow_change": f"[{key}]"})
        assert str(refused.value) == f"checkpoint.allow_change.0: expected {known}, not '{key}'{hint}"
    with pytest.raises(ConfigError, match=r"expected 'model.*, not 'model\.hidden_size'"):
        load_config(str(begun[0]), {"checkpoint.allow_change": "[model.hidden_size]"})


def test_what_else_changed_is_said_and_what_is_allowed_in_vain(go_on, begun):
    log = go_on(*MORE, "optim.lr=1e-3", "train.log_every=7", "launch.tp_across_hosts=true", "model.init_std=0.5")
    assert re.findall(r"changed since the checkpoint: (.*)\n", log) == [
        "model.init_std 0.02 → 0.5",
        "optim.lr 0.01 → 0.001",
        "optim.schedule cosine → constant",
        "train.steps 3 → 4",
        "train.log_every 100 → 7",
    ]
    log = go_on("checkpoint.allow_change=[model.norm_eps]")
    assert log.partition(f"resumed {begun[1]}: step 3\n")[2].startswith(
        "checkpoint.allow_change: model.norm_eps has not changed\n"
    )
    assert "changed since" not in log


def test_another_optimizer_has_no_use_for_the_state(go_on):
    with pytest.raises(CheckpointError, match=r"optim\.name adamw there, muon here: .* --init\.from=\S+\Z"):
        go_on(*MORE, "optim.name=muon")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_a_learning_rate_that_jumps_is_said(tmp_path, schedule):
    config = tiny_config(tmp_path, tiny_data(tmp_path), train__steps=12, optim__schedule=schedule)
    run_alone(config)
    start = f"checkpoint.resume={tmp_path}/run/checkpoints/step_00000009"
    _, log = run_alone(config, start, "run.name=longer", "train.steps=40")
    found = re.findall(r"the learning rate of step 10 is (\S+); by the schedule of the checkpoint it was (\S+)\n", log)
    assert "changed since the checkpoint: train.steps 12 → 40\n" in log
    lrs = [json.loads(line)["lr"] for line in (tmp_path / "longer" / "metrics.jsonl").read_text().splitlines()]
    if schedule in ("constant", "wsd"):
        assert not found and lrs[0] == 1e-2
    else:
        before = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[9])["lr"]
        assert found == [(f"{lrs[0]:.3g}", f"{before:.3g}")] and lrs[0] > 2 * before


def test_a_decay_has_to_fit_what_is_left(go_on, begun):
    wsd = ("optim.schedule=wsd", "optim.decay_steps=4")
    with pytest.raises(ConfigError) as refused:
        go_on(*wsd, "train.steps=6")
    assert str(refused.value) == (
        f"optim.decay_steps=4 exceeds the 3 steps of train.steps=6 that remain after {begun[1]}; at most 3"
    )
    go_on(*wsd, "train.steps=7")


def test_another_chat_template_is_refused_unless_it_is_named(tmp_path):
    folder = write_json_tokenizer(tmp_path / "hf")
    config = tiny_config(tmp_path, tiny_data(tmp_path), train__steps=3, data__tokenizer=str(folder))
    tree = yaml.safe_load(config.read_text())
    del tree["model"]["vocab_size"]
    config.write_text(yaml.safe_dump(tree))
    run_alone(config)
    write_json_tokenizer(folder, "{{ messages }}")
    with pytest.raises(CheckpointError) as refused:
        run_alone(config, "train.steps=4")
    assert re.fullmatch(
        r"\S+/step_00000003: chat template sha \w{8} there, chat template sha \w{8} here \(data\.tokenizer's or "
        r"data\.train's\); checkpoint\.allow_change=\[chat_template\] continues with the one here",
        str(refused.value),
    )
    run, log = run_alone(config, "train.steps=4", "checkpoint.allow_change=[chat_template]")
    assert f"changed since the checkpoint: {SETTINGS}\nchanged since the checkpoint: chat template sha " in log
    assert json.loads((run.saver.folder / "step_00000004" / SETTINGS).read_bytes())["chat_template"] == "{{ messages }}"
    assert "chat template" not in run_alone(config, "train.steps=5")[1]


def test_an_optimizer_that_goes_on_counts_its_updates_not_the_steps(tmp_path):
    config = tiny_config(tmp_path, tiny_data(tmp_path), train__steps=3, train__skip_bad_batches=1)
    assert moments_step(run_alone(config, faults="nan:step=2")[0]) == {2}
    start = (f"init.from={tmp_path}/run", "init.optimizer=true", "run.name=next", "train.steps=2")
    assert moments_step(run_alone(config, *start)[0]) == {4}


def test_a_source_of_another_function_is_noted_and_an_adapter_of_one_refused(tmp_path):
    config = tiny_config(tmp_path, tiny_data(tmp_path), train__steps=2)
    run_alone(config)
    tuned = ("run.name=tuned", f"init.from={tmp_path}/run", "peft.method=lora")
    assert "there" not in run_alone(config, *tuned)[1]
    further = ("run.name=further", *tuned[1:], f"init.adapter={tmp_path}/tuned")
    other = ("model.rope_theta=7", "model.dropout=0.1")
    _, log = run_alone(config, "run.name=other", f"init.from={tmp_path}/run", *other)
    told = [r"\S+: model\.rope_theta 10000\.0 there, 7\.0 here", r"\S+: model\.dropout 0\.0 there, 0\.1 here"]
    assert re.search(r"\n".join(told), log)
    with pytest.raises(CheckpointError, match=rf"{told[0]}; checkpoint\.allow_change=\[model\.rope_theta\] continues"):
        run_alone(config, *further, *other)
    _, log = run_alone(config, *further, *other, "checkpoint.allow_change=[model.rope_theta]")
    assert len(re.findall(r"\n".join(told), log)) == 2  # of the base, and of the adapter
    assert losses(tmp_path / "further").keys() == {1, 2}


def test_a_start_that_was_refused_leaves_no_trace_in_what_comes_from_the_run(tmp_path):
    config = tiny_config(tmp_path, tiny_data(tmp_path), train__steps=2)
    run_alone(config)
    written = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match="rope_theta"):
        run_alone(config, "train.steps=3", "model.rope_theta=3")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == written
    tree = yaml.safe_load(written)
    tree["model"]["rope_theta"] = 3.0  # a start that is no more than that is not what the checkpoints are of
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(tree))
    assert model_section(str(tmp_path / "run"))["rope_theta"] == 10000.0


def test_a_run_at_its_end_or_beyond_says_that_there_is_nothing_to_train(tmp_path):
    config = tiny_config(tmp_path, tiny_data(tmp_path), train__steps=3)
    run_alone(config)
    for steps in (3, 2):
        log = run_alone(config, f"train.steps={steps}", "optim.schedule=constant")[1]
        assert f"nothing to train: the run is already at step 3 of train.steps={steps}\n" in log


def test_other_validation_data_is_said(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
    train, validation = tiny_data(tmp_path / "train"), tiny_data(tmp_path / "validation", descending=True)
    config = tiny_config(tmp_path, train, train__steps=2, train__eval_every=2)
    tree = yaml.safe_load(config.read_text())
    tree["data"] |= {"validation": [{"path": str(validation)}]}
    config.write_text(yaml.safe_dump(tree))
    run_alone(config)
    assert "validation data" not in run_alone(config, "train.steps=3")[1]
    append_document(validation)
    assert "changed since the checkpoint: the validation data (" in run_alone(config, "train.steps=4")[1]


def test_numbers_are_written_after_a_line_that_was_cut_short(tmp_path):
    config = tiny_config(tmp_path, tiny_data(tmp_path), train__steps=2)
    run_alone(config)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-5])
    run_alone(config, "train.steps=3")
    first, cut, third = metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in (first, third)] == [1, 3] and not cut.endswith("}")


def _made(prefix, sha):
    """What a dataset's sources know of themselves."""
    card = {"tokenizer": f"{prefix}.model", "tokenizer_sha256": sha}
    return SimpleNamespace(sources=[SimpleNamespace(card=card, data=SimpleNamespace(prefix=prefix))])


def test_the_data_has_one_tokenizer_which_is_the_runs(begun):
    config, ours = load_config(str(begun[0]), {}), SimpleNamespace(sha256="a" * 64, vocab_size=5)
    named = load_config(str(begun[0]), {"data.tokenizer": "t.model"})
    forced = load_config(str(begun[0]), {"data.force_tokenizer": "true"})
    same, other = _made("same", "a" * 64), _made("other", "b" * 64)
    check_tokenizers(named, [same], ours, None)
    check_tokenizers(config, [same, _made("again", "a" * 64), _made("unknown", None)], None, None)
    check_tokenizers(forced, [same, other], None, None)
    for checked, data, tokenizer, than in (
        (named, [same, other], ours, r"data\.tokenizer=t\.model \(sha aaaaaaaa\)"),
        (config, [same, other], None, r"that of same, 'same\.model' \(sha aaaaaaaa\)"),
    ):
        with pytest.raises(DataError) as refused:
            check_tokenizers(checked, data, tokenizer, None)
        assert re.fullmatch(
            rf"other was made with another tokenizer, 'other\.model' \(sha bbbbbbbb\), than {than}; "
            r"data\.force_tokenizer=true goes on with it",
            str(refused.value),
        )


def test_a_tokenizer_has_no_more_tokens_than_the_model_unless_it_is_the_models_own(begun, tmp_path):
    folder = write_json_tokenizer(tmp_path / "hf")
    config = load_config(str(begun[0]), {"data.tokenizer": str(folder), "model.vocab_size": "50"})
    ours, start = load_tokenizer(folder), SimpleNamespace(path="base", extras=lambda: tokenizer_files(folder))
    assert ours.vocab_size > 50
    check_tokenizers(config, [], ours, start)
    with pytest.raises(DataError, match=rf"data\.tokenizer: {folder} has \d+ entries, the model's vocabulary 50; "):
        check_tokenizers(config, [], ours, None)
    told = r"x was made with another tokenizer, .*, than that of base \(.*\); set data\.tokenizer to the run's"
    with pytest.raises(DataError, match=told):
        check_tokenizers(config, [_made("x", "b" * 64)], None, start)


def test_an_optimizer_that_is_not_there_or_another_is_named():
    with pytest.raises(CheckpointError, match=r"\Ainit\.optimizer: there has no optimizer state\Z"):
        check_optimizer(SimpleNamespace(path="there", tensors={"model.x": 0}), ["optimizer.x.exp_avg"], "adamw")
    source = SimpleNamespace(path="there", tensors={"optimizer.x.exp_avg": 0})
    check_optimizer(source, ["optimizer.x.exp_avg"], "adamw")
    told = r"init\.optimizer: there lacks optimizer\.x\.momentum_buffer: its optimizer is not optim\.name=muon"
    with pytest.raises(CheckpointError, match=told):
        check_optimizer(source, ["optimizer.x.momentum_buffer"], "muon")


def test_metrics_that_cannot_be_written_do_not_end_a_run(tmp_path):
    config = tiny_config(tmp_path, tiny_data(tmp_path), train__steps=2)
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    run, log = run_alone(config)
    assert run.trainer.state.step == 2 and log.count("cannot write metrics") == 1
