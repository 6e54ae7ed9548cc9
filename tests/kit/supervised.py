"""Supervise any program, without a config.

``python tests/kit/supervised.py RUN_DIR NPROC fake|torchrun RESTARTS -- ARGV …``
"""

import sys
from pathlib import Path

from launch.hosts.hostfile import Host
from launch.hosts.job import Command, Job, Launch, rank_defaults
from launch.launchers import torchrun
from launch.watch import supervise

FAKE_AGENT = Path(__file__).with_name("fake_agent.py")


def fake(job: Job) -> Launch:
    argv = [sys.executable, str(FAKE_AGENT), str(job.size), *job.rank_argv("--stderr-fd=0")]
    return Launch("torchrun", [Command(argv, job.rank_env, console=True)])


def main() -> int:
    run_dir, nproc, agent, restarts, _, *program = sys.argv[1:]
    hosts = (Host("localhost", int(nproc)),)
    job = Job(tuple(program), hosts, Path(run_dir), rank_defaults(int(nproc), {}), resume=("resumed",))
    supervise._KILL_AFTER_S = 2.5  # the real 8 s would only make the tests longer
    outcome = supervise.supervise(job, torchrun.command if agent == "torchrun" else fake, int(restarts))
    if outcome.line:
        supervise.say(outcome.line)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
