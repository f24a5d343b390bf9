"""States of this user's Slurm jobs, and their cancellation."""

import os
import subprocess
import time
from dataclasses import dataclass, field

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line

LOOK_EVERY = 15.0
"""Seconds between two calls of squeue, which lists all jobs of the user."""

PROGRAMS = ("sbatch", "squeue", "scancel", "srun")
"""Programs that a machine needs to submit jobs; submitit detects Slurm by ``srun``."""

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT"}
)
NEVER = frozenset(
    {
        "PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints", "InvalidAccount", "InvalidQOS",
        "QOSMaxWallDurationPerJobLimit", "AssocMaxWallDurationPerJobLimit",
    }
)  # fmt: skip
"""Reasons of pending jobs that will never start as submitted."""


@dataclass(frozen=True)
class State:
    """A job's state in ``squeue``, and why it is pending. Both are empty for a job that Slurm no longer lists."""

    name: str
    reason: str

    @property
    def waits(self) -> bool:
        return self.name in WAITING

    @property
    def ended(self) -> bool:
        return not self.name or self.name in ENDED


@dataclass
class Queue:
    """This user's jobs, by ``squeue``: not every cluster has accounting (``sacct``)."""

    _states: dict[str, State] = field(default_factory=dict)
    _looked: float = float("-inf")
    _answered: bool = False

    def state(self, job: str) -> State:
        """A job's state, at most `LOOK_EVERY` seconds old or as of Slurm's last answer.

        Raises:
            QVLMError: Slurm has never answered.
        """
        if time.monotonic() - self._looked >= LOOK_EVERY:
            self._looked = time.monotonic()
            command = ["squeue", f"--user={os.getuid()}", "--noheader", "--states=all", "--format=%i|%T|%r"]
            listed = subprocess.run(command, capture_output=True, text=True)
            if listed.returncode == 0:
                rows = (line.strip().split("|", 2) for line in listed.stdout.splitlines())
                self._answered = True
                self._states = {number: State(name, reason) for number, name, reason in rows}
            elif not self._answered:
                raise QVLMError(f"squeue failed: {one_line(listed.stderr)}")
        return self._states.get(job, State("", ""))

    def add(self, job: str) -> None:
        """Add a job that has just been submitted, until the next call of squeue."""
        self._states = {**self._states, job: State("PENDING", "submitted")}


def withdraw(job: str) -> None:
    """Cancel a pending job; a job that runs or has ended is left alone."""
    subprocess.run(["scancel", "--state=PENDING", job], capture_output=True)
