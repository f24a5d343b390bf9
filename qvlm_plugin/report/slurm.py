"""What Slurm says of this user's jobs, and how jobs are taken back."""

import os
import subprocess
import time
from dataclasses import dataclass, field

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line

LOOK_EVERY = 15.0
"""Seconds between two questions to Slurm's controller, which answers for all of a user's jobs at once."""

PROGRAMS = ("sbatch", "squeue", "scancel", "srun")
"""What a machine has that hands jobs to Slurm; submitit takes it for one by ``srun``."""

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
"""Why a job waits that will never start as it is."""


@dataclass(frozen=True)
class State:
    """A job as ``squeue`` shows it: its state, and why it waits. Both are empty of a job that Slurm has forgotten."""

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
    """This user's jobs. Accounting (``sacct``) is not needed, which not every cluster has."""

    _states: dict[str, State] = field(default_factory=dict)
    _looked: float = float("-inf")
    _answered: bool = False

    def state(self, job: str) -> State:
        """How a job stands, as of at most `LOOK_EVERY` seconds ago or of when Slurm answered last.

        Raises:
            QVLMError: it has never answered.
        """
        if time.monotonic() - self._looked >= LOOK_EVERY:
            self._looked = time.monotonic()
            command = ["squeue", f"--user={os.getuid()}", "--noheader", "--states=all", "--format=%i|%T|%r"]
            asked = subprocess.run(command, capture_output=True, text=True)
            if asked.returncode == 0:
                rows = (line.strip().split("|", 2) for line in asked.stdout.splitlines())
                self._answered = True
                self._states = {number: State(name, reason) for number, name, reason in rows}
            elif not self._answered:
                raise QVLMError(f"Slurm does not answer: {one_line(asked.stderr)}")
        return self._states.get(job, State("", ""))

    def add(self, job: str) -> None:
        """Note a job that has just been submitted, until Slurm is asked again."""
        self._states = {**self._states, job: State("PENDING", "submitted")}


def withdraw(job: str) -> None:
    """Take back a job that waits; one that runs or has ended is left alone."""
    subprocess.run(["scancel", "--state=PENDING", job], capture_output=True)
