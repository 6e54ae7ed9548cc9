"""Whatever a config or a command line says, a mistake in it costs a line, exit 2, and nothing else."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.peft import METHODS

BASE = "model: {vocab_size: 100}\ndata: {train: [{path: x}]}\n"
TRAIN_KEYS = (
    "steps, global_batch_size, micro_batch_size, precision, task, compile, log_every, eval_every, eval_steps, "
    "sample_every, sample_prompt, hang_timeout, skip_bad_batches, peak_tflops, profile"
)
SECTIONS = "run, model, data, optim, parallel, train, checkpoint, init, peft, launch"
ALIASES = "c.yaml: YAML anchors and aliases (& and *) are not allowed in a config"
NOT_FILLED = "c.yaml: ${…} is not substituted; write the value, or give it as --section.key=value"
NO_SECTIONS = "c.yaml: expected sections such as 'model:' and 'train:'"
NO_CONSTRUCTOR = "could not determine a constructor for the tag"
NAMES = "string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'"
NUL = "no path, argument or variable can hold a NUL character"
INTEGER = "input should be a valid integer, unable to parse string as an integer"
NO_BASE = "peft: init.from is missing; it names the model to adapt"
ZERO_1 = (
    "parallel.zero=1: FSDP2 shards gradients whenever it shards optimizer state; use parallel.zero=2, which sends as "
    "many bytes and needs less memory, or parallel.engine=deepspeed"
)

FILES = {  # a file and what is said about it
    f"run: !!python/object/apply:os.mkdir [owned]\n{BASE}": (
        f"c.yaml:1:6: {NO_CONSTRUCTOR} 'tag:yaml.org,2002:python/object/apply:os.mkdir'"
    ),
    f"run: !!python/name:os.system\n{BASE}": f"c.yaml:1:6: {NO_CONSTRUCTOR} 'tag:yaml.org,2002:python/name:os.system'",
    f"run: !mine {{a: 1}}\n{BASE}": f"c.yaml:1:6: {NO_CONSTRUCTOR} '!mine'",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n": ALIASES,
    "model:\n  <<: *base\n": ALIASES,
    "a: " + "[" * 101 + "]" * 101: "c.yaml: nested too deeply",
    "a: " + "[" * 400_000 + "]" * 400_000: "c.yaml: nested too deeply",  # PyYAML alone overflows the stack
    f"{BASE}train: {{steps: 1, steps: 2}}\n": ("c.yaml:3:19: while constructing a mapping found duplicate key steps"),
    f"{BASE}model: {{vocab_size: 3}}\n": "c.yaml:3:1: while constructing a mapping found duplicate key model",
    "model:\n\tvocab_size: 3\n": (
        "c.yaml:2:1: while scanning for the next token found character that cannot start any token"
    ),
    "model: {vocab_size: 3\n": "c.yaml:2:1: while parsing a flow mapping did not find expected ',' or '}'",
    f"{BASE}---\n{BASE}": "c.yaml:3:1: expected a single document in the stream but found another document",
    "model: {vocab_size: 3}\0\n": (
        "c.yaml: unacceptable character #x0000: control characters are not allowed at position 22"
    ),
    f'{BASE}run: {{dir: "a\\0b"}}\n': f"run.dir: {NUL}",
    f'{BASE}launch: {{env: {{A: "\\0"}}, slurm: {{setup: [x, "\\0"]}}}}\n': (
        f"launch.env.A: {NUL}\nlaunch.slurm.setup.1: {NUL}\n"
        "launch.slurm.setup.1: string should match pattern '^[^\\n\\r\\x00]*$', not '\\x00'"
    ),
    "\x80\x81": "cannot read c.yaml: 'utf-8' codec can't decode byte 0x80 in position 0: invalid start byte",
    "": "model: missing\ndata: missing",
    "null\n": "model: missing\ndata: missing",
    "- a\n- b\n": NO_SECTIONS,
    "3": NO_SECTIONS,
    f"{BASE}run: {{name: '${{oc.env:HOME}}'}}\n": NOT_FILLED,
    f"{BASE}run: {{dir: '${{run.name}}'}}\n": NOT_FILLED,
    "data: {train: [{path: x}]}\n": "model: missing",
    "data: {train: [{path: x}]}\npeft: {method: lora}\n": f"{NO_BASE}\nmodel: missing",
    "model: {vocab_size: 100}\n": "data: missing",
    "model: 3\ndata: {train: [{path: x}]}\n": "model: expected a section, not 3",
    f"{BASE}train: [1]\n": "train: expected a section, not [1]",
    f"{BASE}trian: {{steps: 1}}\n": f"trian: unknown key (did you mean 'train'?); known: {SECTIONS}",
    f"{BASE}train: {{step: 1}}\n": f"train.step: unknown key (did you mean 'steps'?); known: {TRAIN_KEYS}",
    f"{BASE}train: {{bf16: true, gradient-accumulation-steps: 2}}\n": (
        f"train.bf16: unknown key (is train.precision=bfloat16 here); known: {TRAIN_KEYS}\n"
        "train.gradient-accumulation-steps: unknown key (it follows: train.global_batch_size ÷ "
        f"(train.micro_batch_size × dp)); known: {TRAIN_KEYS}"
    ),
    f"{BASE}train: {{profile: {{begin: 1}}}}\n": "train.profile.begin: unknown key; known: start, steps",
    f"{BASE}1: 2\n": "1: keys should be strings, not 1",
    "model: {vocab_size: 100}\ndata: {train: [{path: x, wieght: 1}]}\n": (
        "data.train.0.wieght: unknown key (did you mean 'weight'?); known: path, weight"
    ),
    f"{BASE}train: {{stpes: 1}}\noptim: {{lr: -1}}\n": (
        "optim.lr: input should be greater than 0, not -1\n"
        f"train.stpes: unknown key (did you mean 'steps'?); known: {TRAIN_KEYS}"
    ),
}

FLAGS = {  # what is typed after the name of a good config, and what is said about it
    "--parallel.tp=0": "parallel.tp: input should be greater than 0, not '0'",
    "--parallel.tp=-1": "parallel.tp: input should be greater than 0, not '-1'",
    "--parallel.tp=9223372036854775808": (
        "parallel.tp: input should be less than 281474976710656, not '9223372036854775808'"
    ),
    "--parallel.tp=1.5": "parallel.tp: input should be a valid integer, got a number with a fractional part, not 1.5",
    "--parallel.tp=two": f"parallel.tp: {INTEGER}, not 'two'",
    "--parallel.tp=": f"parallel.tp: {INTEGER}, not ''",
    "--parallel.tp=true": "parallel.tp: expected a number, not True (a flag without a value counts as true)",
    "--parallel.tp=[2]": "parallel.tp: input should be a valid integer, not [2]",
    "--parallel.tp=null": "parallel.tp: input should be a valid integer, not None",
    "--parallel.sp=maybe": "parallel.sp: input should be a valid boolean, unable to interpret input, not 'maybe'",
    "--parallel.zero=4": "parallel.zero: input should be less than or equal to 3, not '4'",
    "--parallel.zero=1 --ranks=1": ZERO_1,
    "--parallel.dp_replicate=2 --ranks=2": (
        "parallel.dp_replicate=2 requires zero 2 or 3; with parallel.zero=0 every rank holds everything"
    ),
    "--parallel.dp_replicate=3 --parallel.zero=3 --ranks=4": "parallel.dp_replicate=3 does not divide dp 4",
    "--parallel.tp=2 --ranks=1": "parallel.tp=2 does not divide the 1 rank of this job",
    "--parallel.tp=8 --ranks=8": "parallel.tp=8 does not divide model.num_heads=4; this model can use tp 1, 2, 4",
    "--parallel.tp=2 --parallel.sp=true --data.seq_len=3 --train.micro_batch_size=1 --ranks=2": (
        "parallel.sp: micro batch × seq_len = 3 tokens cannot be split over tp=2"
    ),
    "--ranks=3": ("train.global_batch_size=8 must be a multiple of dp 3 × train.micro_batch_size 8 = 24; nearest: 24"),
    "--ranks=0": "--ranks=0: expected at least 1",
    "--ranks=x": "--ranks=x: expected int",
    "--train.steps=nan": "train.steps: input should be a finite number, not nan",
    "--train.precision=fp16": "train.precision: expected 'float32', 'bfloat16' or 'float64', not 'fp16' (there is "
    "no float16; bfloat16 has its size)",
    "--train.global_batch_size=9": ("config: train.global_batch_size=9 must be a multiple of train.micro_batch_size=8"),
    "--train.stesp=1": f"train.stesp: unknown key (did you mean 'steps'?); known: {TRAIN_KEYS}",
    "--trian.steps=1": f"trian: unknown key (did you mean 'train'?); known: {SECTIONS}",
    "--optim.lr=1e-4x": "optim.lr: input should be a valid number, unable to parse string as a number, not '1e-4x'",
    "--optim.lr=inf": "optim.lr: input should be a finite number, not 'inf'",
    "--optim.lr=0": "optim.lr: input should be greater than 0, not '0'",
    "--optim.lr": "optim.lr: expected a number, not True (a flag without a value counts as true)",
    "--optim.lr --train.steps=2": "optim.lr: expected a number, not True (a flag without a value counts as true)",
    "--optim.lr=1e-4 --optim.lr=1e-5": "--optim.lr is given twice",
    "--optim.betas=[0.9]": "optim.betas.1: missing",
    "--optim.betas=[0.9,1.0]": "optim.betas.1: input should be less than 1, not 1.0",
    "--optim.betas=[0.9,": "optim.betas: [0.9,:2:1: while parsing a flow node did not find expected node content",
    "--optim.schedule=cosin": (
        "optim.schedule: expected 'cosine', 'linear', 'wsd' or 'constant', not 'cosin' (did you mean 'cosine'?)"
    ),
    "--optim.warmup_steps=101": "config: optim.warmup_steps=101 is longer than train.steps=100; at most 100",
    "--optim.schedule=wsd --optim.warmup_steps=20 --optim.decay_steps=81": (
        "config: optim.decay_steps=81 exceeds the 80 steps of train.steps=100 that remain after "
        "optim.warmup_steps=20; at most 80"
    ),
    "--optim.decay_steps=5": "config: optim.decay_steps=5: optim.schedule=cosine has no separate decay; wsd has",
    "--optim.min_lr_ratio=1.1": "optim.min_lr_ratio: input should be less than or equal to 1, not '1.1'",
    "--model.hidden_size=100 --model.num_heads=7": (
        "model: num_heads=7 must divide hidden_size=100, for example 4, 5, 10; or set head_dim"
    ),
    "--model.num_kv_heads=3": "model: num_kv_heads=3 must divide num_heads=4",
    "--model.head_dim=63": "model: head_dim=63 must be even for rotary positions",
    "--model.family=lama": "model.family: expected 'llama' or 'gpt2', not 'lama' (did you mean 'llama'?)",
    "--model.family=qwen3": (
        "model.family: expected 'llama' or 'gpt2', not 'qwen3' (comes with init.from, as one of family llama)"
    ),
    "--model.preset=llama-7": (
        "no config 'llama-7' (did you mean 'llama-7b'?); shipped with the package: gpt2-small, gpt2-xl, llama-160m, "
        "llama-1b, llama-70b, llama-7b, llama-8b, tiny"
    ),
    "--model.vocab_size=null": (
        "model.vocab_size is unknown: set data.tokenizer (its size is used) or model.vocab_size"
    ),
    "--model.vocab_size=null --data.tokenizer=none.model": "data.tokenizer: no file none.model",
    "--model.vocab_size=null --data.tokenizer=gpt2": (
        "data.tokenizer: no file gpt2; nothing is downloaded here; from the hub: hf download gpt2 --local-dir DIR"
    ),
    "--model.vocab_size.x=1": "model.vocab_size.x: vocab_size is not a section",
    "--model=3": "unknown flag --model (is a section here); config keys are written --section.key=value",
    "--data.seq_len=4096": "config: data.seq_len=4096 exceeds model.max_seq_len=2048",
    "--data.train=[]": "data.train: list should have at least 1 item after validation, not 0, not []",
    "--data.train=x": "data.train: expected a list such as [{path: PREFIX}], not 'x'",
    "--data.train=[x]": "data.train.0: expected {path: PREFIX}, not 'x'",
    "--data.train.0.path=x": "data.train.0.path: train is a list, and a list can only be given as a whole",
    "--data.validation=x": "data.validation: expected a list such as [{path: PREFIX}], not 'x'",
    "--data.split=969,30,1": "data.split: expected a list such as [0.98, 0.01, 0.01], not '969,30,1'",
    "--launch.ssh.options=x": 'launch.ssh.options: expected a list such as ["a", "b"], not \'x\'',
    "--data.document_mask=2": (
        "data.document_mask: input should be a valid boolean, unable to interpret input, not '2'"
    ),
    "--run.name=../x": f"run.name: {NAMES}, not '../x'",
    "--run.name=": f"run.name: {NAMES}, not ''",
    "--run.seed=99999999999999999999": (
        "run.seed: input should be less than 281474976710656, not '99999999999999999999'"
    ),
    "--checkpoint.every=-1": "checkpoint.every: input should be greater than or equal to 0, not '-1'",
    "--steps=1": (
        "unknown flag --steps (is train.steps or train.profile.steps here); config keys are written --section.key=value"
    ),
    "--num-layers 2": (
        "unknown flag --num_layers (is model.num_layers here); config keys are written --section.key=value"
    ),
    "--optim.learning-rate=1": (
        "optim.learning_rate: unknown key (is optim.lr here); known: name, lr, betas, eps, momentum, weight_decay, "
        "clip, schedule, warmup_steps, decay_steps, min_lr_ratio"
    ),
    "--zero_optimization.stage=2": f"zero_optimization: unknown key (is parallel.zero here); known: {SECTIONS}",
    "extra": "unexpected argument 'extra'; see --help",
    "train.steps=30": "unexpected argument 'train.steps=30' (did you mean --train.steps=30?)",
    "--peft=null": "unknown flag --peft (is a section here); config keys are written --section.key=value",
    "--peft.method=dora": (
        f"{NO_BASE}\npeft.method: expected {', '.join(METHODS)}, not 'dora' "
        "(is peft.dora=true with peft.method=lora here)"
    ),
    "--peft.method=lora --peft.base_dtype=int4": (
        f"{NO_BASE}\npeft.base_dtype: expected 'float32', 'bfloat16', 'int8' or 'nf4', not 'int4' (is nf4 here)"
    ),
    "--peft.method=prefix --peft.r=8 --peft.dropout=0.1": (
        f"{NO_BASE}\npeft.r: unknown key (belongs to peft.method=lora); known: base_dtype, method, length, "
        "reparameterize\npeft.dropout: unknown key (belongs to peft.method=lora); known: base_dtype, method, length, "
        "reparameterize"
    ),
    "-x": "unknown flag --x; config keys are written --section.key=value",
    "-- --x": "unexpected argument '--'; see --help",
}

COMMANDS = {
    "trian": "unknown command 'trian' (did you mean 'train'?); there are: train, generate, prove, config, rank, ckpt",
    "train": "missing CONFIG; see --help",
    "train demoo": "no config 'demoo' (did you mean 'demo'?); shipped with the package: demo, lora, pretrain",
    "train .": "no config '.'; shipped with the package: demo, lora, pretrain",
    "train c.yaml --parallel.tp=2": "parallel.tp=2 does not divide the 1 rank of this job",
    "prove c.yaml --a=tp=0": "parallel.tp: input should be greater than 0, not '0'",
    "prove c.yaml --b=tpp=2": (
        "layout 'tpp=2': unknown key 'tpp' (did you mean 'tp'?); known: tp, sp, engine, zero, dp_replicate, recompute, "
        "offload_activations, dp, accumulation, compile"
    ),
    "prove c.yaml --b=tp:2": "layout 'tp:2': expected KEY=VALUE such as tp=2, not 'tp:2'",
    "prove c.yaml --a=dp=3": "layout 'dp=3': dp 3 × accumulation 1 must divide train.global_batch_size=8",
    "prove c.yaml --dtype=fp8": "train.precision: expected 'float32', 'bfloat16' or 'float64', not 'fp8'",
    "generate": "missing CHECKPOINT; see --help",
    "generate x --top_p=a": "--top_p=a: expected float",
    "ckpt inspct x": (
        "unknown command 'inspct' (did you mean 'inspect'?); there are: "
        "inspect, verify, diff, reshard, import_hf, import_megatron, import_deepspeed, export_hf, "
        "average, merge_adapter, import_peft, export_peft"
    ),
    "ckpt reshard x y --max_ram=lots": "--max_ram=lots: expected a size such as 256M or 5G, and at least 64M",
    "ckpt reshard x y --max_ram=63M": "--max_ram=63M: expected a size such as 256M or 5G, and at least 64M",
    "train c.yaml --init.from=a/b-1.5": (
        "init.from: a/b-1.5: no checkpoint and no Hugging Face folder; nothing is downloaded here; from the hub: "
        "hf download a/b-1.5 --local-dir DIR"
    ),
    "train c.yaml --init.from=c.yaml": "init.from: c.yaml: no checkpoint and no Hugging Face folder",
    "train c.yaml --init.from=../nowhere": "init.from: ../nowhere: no checkpoint and no Hugging Face folder",
}

IN_ONE_PROCESS = """
import contextlib, io, json, os, sys, time
from megatron_lite.__main__ import main
results = []
for text, words in json.load(sys.stdin):
    with open("c.yaml", "w", encoding="latin-1") as file:
        file.write(text)
    sys.argv = ["megatron_lite", *words]
    said, began = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main()
        except SystemExit as end:
            code = end.code
    results.append([code, said.getvalue(), time.process_time() - began, sorted(os.listdir()), "torch" in sys.modules])
json.dump(results, sys.stdout)
"""
TABLE = (
    [(text, ["config", "c.yaml"], said) for text, said in FILES.items()]
    + [(BASE, ["config", "c.yaml", *flags.split(" ")], said) for flags, said in FLAGS.items()]
    + [(BASE, words.split(" "), said) for words, said in COMMANDS.items()]
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    given = json.dumps([case[:2] for case in TABLE])
    argv, folder = [sys.executable, "-c", IN_ONE_PROCESS], tmp_path_factory.mktemp("here")
    return json.loads(
        subprocess.run(argv, input=given, cwd=folder, stdout=-1, text=True, timeout=60, check=True).stdout
    )


@pytest.mark.parametrize(
    "case", range(len(TABLE)), ids=lambda i: f"{TABLE[i][0] if i < len(FILES) else TABLE[i][1]}"[:60]
)
def test_a_mistake_is_told_in_a_line(results, case):
    code, said, seconds, files, torch = results[case]
    assert said == "".join(f"error: {line}\n" for line in TABLE[case][2].split("\n"))
    assert (code, files, torch) == (2, ["c.yaml"], False)
    assert seconds < 1


def timed(argv: list[str], folder: Path) -> tuple[int, str, float]:
    """Exit code, stderr, and the seconds that it kept a core busy: on a busy machine any command takes long."""

    def busy() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = busy()
    done = subprocess.run([sys.executable, "-m", *argv], cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr, busy() - before


@pytest.mark.parametrize("command", [["megatron_lite", "train"], ["launch", "run"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    "flag, said",
    [("--train.stesp=3", "train.stesp: unknown key"), ("--parallel.tp=3", "parallel.tp=3 does not divide the 1 rank")],
)
def test_in_a_fraction_of_a_second_and_without_a_trace_on_disk(tmp_path, command, flag, said):
    (tmp_path / "c.yaml").write_text(BASE)
    code, error, seconds = min((timed([*command, "c.yaml", flag], tmp_path) for _ in range(3)), key=lambda run: run[2])
    assert code == 2
    assert error.startswith(f"error: {said}")
    assert seconds < 0.6  # 0.2 where nothing else runs; importing torch takes a second
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_what_is_typed_means_what_it_says(tmp_path):
    (tmp_path / "c.yaml").write_text(f"{BASE}train:\noptim: {{lr: 1e-4}}\n")
    flags = ["--train.steps=1e3", "--run.name=2026_11_24", "--train.sample_prompt=# 1: [", "--optim.betas=[0.8, 0.9]"]
    argv = [sys.executable, "-m", "megatron_lite", "config", "c.yaml", *flags, "--model.tie_embeddings=true"]
    config = json.loads(subprocess.run(argv, cwd=tmp_path, capture_output=True, check=True, timeout=60).stdout)
    assert config["train"]["steps"] == 1000
    assert config["run"]["name"] == "2026_11_24"
    assert config["train"]["sample_prompt"] == "# 1: ["
    assert (config["optim"]["lr"], config["optim"]["betas"]) == (1e-4, [0.8, 0.9])
    assert config["model"]["tie_embeddings"] is True
