"""A checkpoint of another model, vocabulary or tokenizer is refused before a model is made."""

from pathlib import Path

from tests.kit.corpora import write_tokenizer
from tests.kit.tiny import TinyRuns, checkpoint_steps, tiny_data


def test_another_model_or_vocabulary(tmp_path: Path) -> None:
    runs = TinyRuns(tiny_data(tmp_path), tmp_path, {})
    runs.run(tmp_path, "--train.steps=3").expect(exit_code=0)
    for flags, said in (
        (["--model.hidden_size=64", "--model.num_layers=1"], r"model\.hidden_size 32 there, 64 here, model\.num_lay"),
        (["--model.vocab_size=65"], r"checkpoint vocab 64 \(tokenizer sha None\) vs config 65 \(tokenizer sha None\)"),
        (["--model.rope_theta=7"], r"model\.rope_theta 10000\.0 there, 7\.0 here; checkpoint\.allow_change=\[model\.r"),
    ):
        refused = runs.run(tmp_path, "--train.steps=4", *flags)
        refused.expect(exit_code=4, stderr=rf"error: \S+step_00000003: {said}")
        assert "parameters; peak" not in refused.stdout
    assert checkpoint_steps(tmp_path / "run") == [3]


def test_a_tokenizer_of_the_same_size_with_one_other_piece(tmp_path: Path) -> None:
    runs = TinyRuns(tiny_data(tmp_path), tmp_path, {})
    content = write_tokenizer(tmp_path / "t.model").read_bytes()
    sizes = [f"--data.tokenizer={tmp_path}/t.model", "--model.vocab_size=null"]
    runs.run(tmp_path, "--train.steps=3", *sizes).expect(exit_code=0)
    piece = b"\x0a\x01e\x15"  # "e", as protobuf has it
    assert content.count(piece) == 1
    (tmp_path / "t.model").write_bytes(content.replace(piece, b"\x0a\x01\x7f\x15"))
    said = r"checkpoint vocab (\d+) \(tokenizer sha \w{8}\) vs config \1 .*data\.force_tokenizer=true goes on"
    runs.run(tmp_path, "--train.steps=4", *sizes).expect(exit_code=4, stderr=said)
    runs.run(tmp_path, "--train.steps=4", *sizes, "--data.force_tokenizer=true").expect(exit_code=0)
    assert checkpoint_steps(tmp_path / "run") == [3, 4]
