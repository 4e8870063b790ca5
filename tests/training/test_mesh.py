"""Which processes join a run, and which GPUs they take."""

import pytest

from danube_jax.errors import UserError
from danube_jax.training.mesh import has_launcher, initialize_distributed, local_device_ids

STEP = {"SLURM_STEP_NODELIST": "node[1-4]"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", **STEP}, False),
        ({"SLURM_NTASKS": "4", **STEP}, True),
        ({"SLURM_NTASKS": "4"}, False),  # an sbatch script without srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_launchers(environment, expected):
    assert has_launcher(environment) is expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "CUDA_VISIBLE_DEVICES": "3"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),
        ({}, None),
    ],
)
def test_gpus_of_a_process(environment, expected):
    assert local_device_ids(environment) == expected


def test_explicit_arguments_go_together():
    with pytest.raises(UserError, match="go together"):
        initialize_distributed("localhost:1", None, 0)
