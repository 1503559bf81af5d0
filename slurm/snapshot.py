"""What a run was made of, saved beside its logs: config, command, git revision, package versions, environment, job."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# Whole words of a name, so that TOKENIZERS_PARALLELISM is none; PGPASSWORD and MYSQL_PWD are, PWD and OLDPWD are not.
SECRET_NAME = re.compile(
    r"(?:^|[^a-z])(?:(?:api|access)?keys?|tokens?|secrets?|pass|credentials?|auth|cookies?|session|pat|jwt|dsn|netrc)"
    r"(?:$|[^a-z])|pass(?:word|wd|phrase)|_pwd$",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(
    r"(?<=://)[^/@\s]+@"  # user and password of an address
    r"|\b(?:sk|hf|gh[a-z]|github_pat|glpat|xox[a-z]|nvapi)[-_][A-Za-z0-9_-]{8,}|\bAKIA[A-Z0-9]{12,}|\bAIza[A-Za-z0-9_-]{20,}"
    r"|\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"  # a JSON web token
    r"|(?<=[Bb]earer )\S{8,}"
)


def save_snapshot(directory: Path, config: str, command: list[str]) -> None:
    """Writes config.yaml, command.txt, git.txt, git.diff, packages.txt, environment.txt and job.txt."""
    directory.mkdir(parents=True, exist_ok=True)
    job = output("scontrol", "show", "job", os.environ.get("SLURM_JOB_ID", "")) if "SLURM_JOB_ID" in os.environ else ""
    files = {
        "config.yaml": config,
        "command.txt": shlex.join(command) + "\n",
        "git.txt": output("git", "-C", str(REPO), "log", "-1", "--format=%H %cI %s")
        + output("git", "-C", str(REPO), "status", "--short"),
        "git.diff": output("git", "-C", str(REPO), "diff", "HEAD"),
        "packages.txt": f"python {platform.python_version()} ({sys.executable})\n" + packages(),
        "environment.txt": "".join(f"{k}={v}\n" for k, v in sorted(redacted(os.environ).items())),
        "job.txt": job,
    }
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


def redacted(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without values that look like secrets, by their name or by their form."""
    return {
        name: "(redacted)" if SECRET_NAME.search(name) else SECRET_VALUE.sub("(redacted)", value).replace("\n", "\\n")
        for name, value in environment.items()
    }


def packages() -> str:
    """name==version of every installed package, one a line."""
    return "".join(sorted({f"{d.metadata['Name']}=={d.version}\n" for d in distributions()}, key=str.lower))


def output(*command: str) -> str:
    """What the command printed; what went wrong if it did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"(not available: {error})\n"
    return done.stdout if done.returncode == 0 else f"(not available: {done.stderr.strip()})\n"
