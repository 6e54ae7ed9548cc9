"""The training data is not what it was when the run was saved."""

import re
from pathlib import Path

from tests.kit.tiny import TinyRuns, append_document, checkpoint_steps, edit_token, tiny_data


def test_refused_unless_allowed(tmp_path: Path) -> None:
    runs = TinyRuns(tiny_data(tmp_path), tmp_path, {})
    runs.run(tmp_path, "--train.steps=3").expect(exit_code=0)
    told = r"error: the training data .* changed since \S+step_00000003: fingerprint (\w{64}) then, (\w{64}) now"

    fingerprints = set()
    for change in (edit_token, append_document):  # of the same size; longer by a document
        change(runs.data)
        refused = runs.run(tmp_path, "--train.steps=4").expect(exit_code=3, stderr=told)
        found = re.search(told, refused.stderr)
        assert found
        fingerprints.update(found.groups())
    assert len(fingerprints) == 3
    assert checkpoint_steps(tmp_path / "run") == [3]

    runs.run(tmp_path, "--train.steps=4", "--data.allow_change=true").expect(exit_code=0)
    assert checkpoint_steps(tmp_path / "run") == [3, 4]
