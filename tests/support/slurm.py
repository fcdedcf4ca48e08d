"""A cluster in a folder: small stand-ins of Slurm's commands, and of uvim-fsq, that the templates find on the PATH."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

#: Starts $SLURM_NTASKS copies of a command, ends with the highest exit code. As srun does, it answers SIGTERM with
#: SIGKILL for the tasks ("forcing job termination").
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
for i in range(int(os.environ["SLURM_NTASKS"])):
    place = dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i % per_node), SLURM_NODEID=str(i // per_node))
    tasks.append(subprocess.Popen(words, env=dict(os.environ, **place)))
with open(os.environ["CLUSTER"] + "/tasks", "w") as file:
    print(*(task.pid for task in tasks), file=file)
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
show) printf '%s\\n' node1 node2 ;;
requeue) echo "$2" >>"$CLUSTER/requeued" ;;
esac
"""
#: Signals the tasks that srun started, not the script of the job.
SCANCEL = """#!/usr/bin/env bash
[ "$1 $2" = "--signal=TERM $SLURM_JOB_ID" ] || exit 1
read -ra tasks <"$CLUSTER/tasks"
kill -TERM "${tasks[@]}"
"""
#: Records what it would submit, and prints a job number.
SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CLUSTER/submitted"
echo $((100 + $(wc -l <"$CLUSTER/submitted")))
"""
#: Records rank, rendezvous and arguments. "$CLUSTER/behavior" says what it then does.
UVIM_FSQ = """#!/usr/bin/env bash
echo "${RANK-} ${LOCAL_RANK-} ${WORLD_SIZE-} ${MASTER_ADDR-}:${MASTER_PORT-} $*" >>"$CLUSTER/started"
case $(cat "$CLUSTER/behavior") in
waits)
  trap 'sleep 0.2; echo saved >>"$CLUSTER/saved"; exit ${ENDS_WITH-143}' TERM
  echo >>"$CLUSTER/ready"
  for _ in $(seq 200); do sleep 0.05; done ;;
fails) exit 2 ;;
prints) cat "$CLUSTER/printed" ;;
esac
"""


class Cluster:
    """A folder with the commands, and what they recorded."""

    def __init__(self, folder: Path, tasks: int = 4, per_node: int = 2) -> None:
        self.folder = folder
        bin = folder / "bin"
        bin.mkdir(parents=True)
        programs = {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "sbatch": SBATCH, "uvim-fsq": UVIM_FSQ}
        for name, text in programs.items():
            (bin / name).write_text(text)
            (bin / name).chmod(0o755)
        self.environment = {
            "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
            "CLUSTER": str(folder),
            "SLURM_JOB_ID": "40123",
            "SLURM_ARRAY_JOB_ID": "40123",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": str(tasks),
            "SLURM_NTASKS_PER_NODE": str(per_node),
        }

    def lines(self, name: str) -> list[str]:
        """What was recorded under a name."""
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def run(
        self, script: Path, *arguments: str, behavior: str = "ends", send: int | None = None, **environment: str
    ) -> int:
        """Runs a job's script; once the training runs, sends a signal to the script alone. Returns the exit code."""
        (self.folder / "behavior").write_text(behavior)
        process = subprocess.Popen(
            ["bash", str(script), *arguments], env={**self.environment, **environment}, cwd=self.folder
        )
        try:
            if send is not None:
                self._wait_for_all()
                process.send_signal(send)
            return process.wait(timeout=60)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)

    def _wait_for_all(self) -> None:
        end = time.monotonic() + 60
        while len(self.lines("ready")) < int(self.environment["SLURM_NTASKS"]):
            assert time.monotonic() < end, "the job did not start"
            time.sleep(0.02)
