"""The folder of a run, as a kill may leave it."""

import os
import subprocess
import sys

import pytest

from danube_jax.config import base_config, parse_config, phase, source
from danube_jax.errors import UserError
from danube_jax.training.workdir import check_workdir, claim_workdir


@pytest.fixture(scope="module")
def run():
    config = base_config()
    config.data.tokenizer.path = "tokenizer.model"
    config.data.sources = {"web": source(path="web")}
    config.phases = (phase(name="only", tokens=2**20, context_length=256, mixture={"web": 1.0}),)
    config.training.batch_tokens = 2**12
    return parse_config(config)


def test_a_kill_amid_the_first_file_leaves_a_folder_that_the_run_takes(run, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    left = tmp_path / f".config.json.{killed.pid}.tmp"
    left.write_text("{")
    others = tmp_path / f".config.json.{os.getppid()}.tmp"  # of a process that runs
    others.write_text("{")
    check_workdir(tmp_path, run)
    assert left.exists()
    claim_workdir(tmp_path, run)
    assert not left.exists()
    assert others.exists()
    check_workdir(tmp_path, run)


def test_what_is_not_ours_is_refused(run, tmp_path):
    (tmp_path / ".notes.tmp").write_text("")
    with pytest.raises(UserError, match=r"holds '\.notes\.tmp' but no config\.json"):
        check_workdir(tmp_path, run)
