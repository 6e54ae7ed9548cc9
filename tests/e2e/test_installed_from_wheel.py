"""The packages, their commands and the shipped configs work from a wheel, outside the source tree."""

import os
import subprocess
import sys
import zipfile

import pytest

from tests.kit.jobs import REPOSITORY


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with nothing of ours but what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def command(site, tmp_path, *argv):
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, *argv], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_packages_come_from_the_wheel(site, tmp_path):
    code = (
        "import launch, megatron_lite, data_tools; print(launch.__file__, megatron_lite.__file__, data_tools.__file__)"
    )
    assert command(site, tmp_path, "-c", code).count(str(site)) == 3


@pytest.mark.parametrize("module", ["launch", "megatron_lite", "data_tools"])
def test_every_command_has_help(site, tmp_path, module):
    assert f"usage: python -m {module}" in command(site, tmp_path, "-m", module, "--help")


def test_shipped_configs_are_found_by_name(site, tmp_path):
    shape = ["--model.vocab_size=100", "--model.preset=llama-8b", "--data.tokenizer=null"]
    assert '"hidden_size": 4096' in command(site, tmp_path, "-m", "megatron_lite", "config", "pretrain", *shape)
